"""A record and a language pair become one instruction example: the directions and tags of the CrossIn paper."""

from dataclasses import dataclass

from crossin_jax.data.corpus import Record, Text
from crossin_jax.languages import LANGUAGES

KINDS = ("base", "en2x", "x2en", "x2x", "same", "trans", "text")


@dataclass(frozen=True, slots=True)
class Example:
    """What one training sequence says; for kind "text" only `output` is set, for chats `messages` holds the turns."""

    id: str
    component: str
    prompt_language: str
    answer_language: str
    instruction: str
    input: str
    output: str
    messages: tuple[tuple[str, str], ...] | None = None


# The request for an answer in a language, said in the prompt's language: {prompt language: (sentence, {answer: name})}
SENTENCES: dict[str, tuple[str, dict[str, str]]] = {
    "en": ("Answer in {}.", {code: name for code, name in LANGUAGES.items()}),
    "zh": ("请用{}回答。", {"en": "英语", "zh": "中文", "vi": "越南语", "es": "西班牙语",
                         "id": "印度尼西亚语", "ms": "马来语", "fil": "菲律宾语"}),
    "vi": ("Hãy trả lời bằng {}.", {
        "en": "tiếng Anh", "zh": "tiếng Trung", "vi": "tiếng Việt", "es": "tiếng Tây Ban Nha", "id": "tiếng Indonesia",
        "ms": "tiếng Mã Lai", "fil": "tiếng Philippines"}),
    "es": ("Responde en {}.", {"en": "inglés", "zh": "chino", "vi": "vietnamita", "es": "español", "id": "indonesio",
                               "ms": "malayo", "fil": "filipino"}),
    "id": ("Jawablah dalam {}.", {
        "en": "bahasa Inggris", "zh": "bahasa Tionghoa", "vi": "bahasa Vietnam", "es": "bahasa Spanyol",
        "id": "bahasa Indonesia", "ms": "bahasa Melayu", "fil": "bahasa Filipino"}),
    "ms": ("Jawab dalam {}.", {
        "en": "bahasa Inggeris", "zh": "bahasa Cina", "vi": "bahasa Vietnam", "es": "bahasa Sepanyol",
        "id": "bahasa Indonesia", "ms": "bahasa Melayu", "fil": "bahasa Filipino"}),
    "fil": ("Sumagot sa {}.", {"en": "Ingles", "zh": "Tsino", "vi": "Vietnamese", "es": "Espanyol",
                               "id": "Indonesian", "ms": "Malay", "fil": "Filipino"}),
}


def request_language(prompt_language: str, answer_language: str) -> str:
    """The sentence that asks for the answer's language; in English where the table lacks one of the two."""
    sentence, names = SENTENCES.get(prompt_language, SENTENCES["en"])
    if answer_language not in names:
        sentence, names = SENTENCES["en"]
    return sentence.format(names[answer_language])


def add_tag(instruction: str, input: str, answer_language: str, prompt_language: str, style: str) -> tuple[str, str]:
    """Names the wanted language in a prompt; returns (instruction, input). Styles: see `data.tag`.

    "input" puts the tag after the input, and after the instruction where there is no input; "input_released" is the
    released builder's form, which makes an input of the tag alone.
    """
    if style == "none":
        return instruction, input
    if style == "sentence":
        gap = "" if instruction.endswith(("。", "？", "！")) else " "
        return instruction + gap + request_language(prompt_language, answer_language), input
    tag = f"\n[{answer_language}]"
    if style == "instruction" or style == "input" and not input:
        return instruction + tag, input
    assert style in ("input", "input_released"), style
    return instruction, input + tag


def make_example(record: Record, kind: str, prompt_language: str, answer_language: str, *, tag: str,
                 translate_what: str = "instruction", component: str | None = None) -> Example:
    """Joins the prompt of one language with the answer of another.

    `base` rows stay as they are: of the tag styles only "sentence" reaches them, since it reads as part of a question.
    `trans` has the text to translate as input, and the request in English. Raises KeyError where a language is absent.
    """
    assert kind in KINDS, kind
    prompt, answer = record.texts[prompt_language], record.texts[answer_language]
    where = record.id, component or kind, prompt_language, answer_language
    if kind == "text":
        return Example(*where, "", "", answer.output)
    if kind == "trans":
        unit = "sentence" if translate_what == "instruction" else "text"
        return Example(*where, f"Translate the following {unit} into {LANGUAGES[answer_language]}.",
                       _join_text(prompt, translate_what), _join_text(answer, translate_what))
    style = tag if kind != "base" or tag == "sentence" else "none"
    instruction, input = add_tag(prompt.instruction, prompt.input, answer_language, prompt_language, style)
    if prompt.messages is None:
        return Example(*where, instruction, input, answer.output)
    return Example(*where, instruction, input, answer.output,
                   _join_chat(prompt, answer, answer_language, prompt_language, style))


def _join_text(text: Text, what: str) -> str:
    parts = (text.instruction,) if what == "instruction" else (text.instruction, text.input, text.output)
    return "\n\n".join(filter(None, parts))


def _join_chat(prompt: Text, answer: Text, answer_language: str, prompt_language: str,
               style: str) -> tuple[tuple[str, str], ...]:
    """The prompt's user turns, each with the tag, and the answer's assistant turns."""
    turns = []
    replies = iter([text for role, text in answer.messages or () if role == "assistant"] or [answer.output])
    for role, text in prompt.messages or ():
        if role == "assistant":
            turns.append((role, next(replies, text)))
        elif role == "user":
            turns.append((role, "".join(add_tag(text, "", answer_language, prompt_language,
                                                "input" if style == "input_released" else style))))
        else:
            turns.append((role, text))
    return tuple(turns)
