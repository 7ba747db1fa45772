"""Directions and tags: who says what in which language."""

from pathlib import Path

import pytest
from babel import Locale

from crossin_jax.checks import check
from crossin_jax.config import Component, Config, Data, Model, Source, UserError
from crossin_jax.data import kinds
from crossin_jax.data.corpus import Corpus, Record, Text
from crossin_jax.data.kinds import (
    KINDS,
    LANGUAGE,
    Kind,
    add_tag,
    make_example,
)
from crossin_jax.data.mixture import Mixture
from crossin_jax.languages import request_language

RECORD = Record(
    "r1",
    {
        "en": Text("Name it.", "A river", "Seine"),
        "zh": Text("请说出。", "一条河", "塞纳河"),
        "es": Text("Nómbralo.", "", "Sena"),
    },
)


@pytest.mark.parametrize(
    ("kind", "pair", "expected"),
    [
        ("base", ("en", "en"), ("Name it.", "A river", "Seine")),
        ("en2x", ("en", "zh"), ("Name it.", "A river\n[zh]", "塞纳河")),
        ("x2en", ("zh", "en"), ("请说出。", "一条河\n[en]", "Seine")),
        ("x2x", ("zh", "es"), ("请说出。", "一条河\n[es]", "Sena")),
        ("x2x", ("es", "zh"), ("Nómbralo.\n[zh]", "", "塞纳河")),
        ("same", ("zh", "zh"), ("请说出。", "一条河\n[zh]", "塞纳河")),
        (
            "trans",
            ("zh", "en"),
            ("Translate the following sentence into English.", "请说出。", "Name it."),
        ),
        (
            "trans",
            ("en", "zh"),
            ("Translate the following sentence into Chinese.", "Name it.", "请说出。"),
        ),
        ("text", ("zh", "zh"), ("", "", "塞纳河")),
    ],
)
def test_each_direction_joins_the_right_sides(kind, pair, expected):
    example = make_example(RECORD, kind, *pair, tag="input")
    assert (example.instruction, example.input, example.output) == expected
    assert (example.id, example.component, example.prompt_language, example.answer_language) == (
        "r1",
        kind,
        *pair,
    )


def test_translation_of_the_whole_record():
    example = make_example(RECORD, "trans", "zh", "en", tag="input", translate_what="record")
    assert example.instruction == "Translate the following text into English."
    assert (example.input, example.output) == (
        "请说出。\n\n一条河\n\n塞纳河",
        "Name it.\n\nA river\n\nSeine",
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "english", "own"),
    [
        (
            "zh",
            "en",
            "Translate the following sentence into English.",
            "请把下面的文字翻译成英语。",
        ),
        ("en", "zh", "Translate the following sentence into Chinese.", None),
        ("xh", "fr", "Translate the following sentence into French.", None),  # no sentence in Xhosa
        (
            "fr",
            "ja",
            "Translate the following sentence into Japanese.",
            "Traduis le texte suivant en japonais.",
        ),
    ],
)
def test_a_translation_is_asked_for_in_english_or_in_the_language_of_the_prompt(
    prompt, answer, english, own
):
    record = Record("r", {code: Text(f"I {code}", "", "O") for code in (prompt, answer)})
    asked = {
        request: make_example(
            record, "trans", prompt, answer, tag="none", request=request
        ).instruction
        for request in ("english", "prompt")
    }
    assert asked == {"english": english, "prompt": own or english}


@pytest.mark.parametrize(
    ("style", "with_input", "without"),
    [
        ("none", ("Q", "I"), ("Q", "")),
        ("input", ("Q", "I\n[zh]"), ("Q\n[zh]", "")),
        ("input_released", ("Q", "I\n[zh]"), ("Q", "\n[zh]")),
        ("instruction", ("Q\n[zh]", "I"), ("Q\n[zh]", "")),
        ("sentence", ("Q Answer in Chinese.", "I"), ("Q Answer in Chinese.", "")),
    ],
)
def test_tag_styles(style, with_input, without):
    assert add_tag("Q", "I", "zh", "en", style) == with_input
    assert add_tag("Q", "", "zh", "en", style) == without


@pytest.mark.parametrize(
    ("question", "prompt", "answer", "asked"),
    [
        ("塞纳河在哪里？", "zh", "en", "塞纳河在哪里？请用英语回答。"),
        ("请说出。", "zh", "es", "请说出。请用西班牙语回答。"),
        ("说！", "zh", "zh", "说！请用中文回答。"),
        ("Name it.", "en", "zh", "Name it. Answer in Chinese."),
        ("Where?", "en", "de", "Where? Answer in German."),
        ("¿Dónde?", "es", "en", "¿Dónde? Responde en inglés."),
        ("塞纳河", "zh", "vi", "塞纳河 请用越南语回答。"),
        ("Go!", "id", "en", "Go! Jawablah dalam bahasa Inggris."),
    ],
)
def test_a_request_follows_chinese_punctuation_without_a_space(question, prompt, answer, asked):
    """Readers of Chinese put no space after a full stop; the other languages have one."""
    assert add_tag(question, "I", answer, prompt, "sentence") == (asked, "I")
    record = Record("r", {prompt: Text(question, "I", "A"), answer: Text(question, "I", "B")})
    assert (
        make_example(
            record, "same" if prompt == answer else "x2x", prompt, answer, tag="sentence"
        ).instruction
        == asked
    )


SEVEN = ("en", "zh", "vi", "es", "id", "ms", "fil")
# Where the sentence has another name than CLDR: the language of the prompt and of the answer
OWN_NAMES = {("ms", "fil"): "bahasa Filipino", ("fil", "zh"): "Tsino", ("fil", "es"): "Espanyol"}


def test_requests_name_the_language_as_cldr_does():
    for prompt in SEVEN:
        told = Locale.parse(prompt).languages
        for answer in SEVEN:
            name = OWN_NAMES.get((prompt, answer), told[answer])
            sentence, _ = request_language(prompt, answer)
            assert name.lower() in sentence.lower(), (prompt, answer)


def test_base_rows_carry_a_sentence_but_no_marker():
    assert make_example(RECORD, "base", "en", "en", tag="input_released").input == "A river"
    assert (
        make_example(RECORD, "base", "en", "en", tag="sentence").instruction
        == "Name it. Answer in English."
    )


def test_every_seaeval_language_asks_for_every_other_in_its_own_words():
    requests = {(a, b): request_language(a, b) for a in SEVEN for b in SEVEN}
    assert all(is_own for _, is_own in requests.values())
    sentences = {pair: sentence for pair, (sentence, _) in requests.items()}
    assert len(set(sentences.values())) == len(sentences) == 49
    assert (
        sentences["zh", "en"] == "请用英语回答。" and sentences["es", "zh"] == "Responde en chino."
    )


CHAT = Text(
    "and?",
    "",
    "so",
    (("system", "s"), ("user", "hi"), ("assistant", "ho"), ("user", "and?"), ("assistant", "so")),
)


@pytest.mark.parametrize(
    ("kind", "tag", "asked"),
    [
        ("x2x", "none", ("hi", "and?")),
        ("x2x", "input", ("hi\n[zh]", "and?\n[zh]")),
        ("x2x", "input_released", ("hi\n[zh]", "and?\n[zh]")),
        ("x2x", "instruction", ("hi\n[zh]", "and?\n[zh]")),
        ("x2x", "sentence", ("hi Answer in Chinese.", "and? Answer in Chinese.")),
        ("base", "input", ("hi", "and?")),
        ("base", "input_released", ("hi", "and?")),
        ("base", "instruction", ("hi", "and?")),
        ("base", "none", ("hi", "and?")),
        ("base", "sentence", ("hi Answer in English.", "and? Answer in English.")),
    ],
)
def test_every_user_turn_of_a_chat_is_tagged(kind, tag, asked):
    """As a question without an input is; of a base row only by the sentence."""
    zh = Text(
        "还有？",
        "",
        "就这样",
        (("user", "你"), ("assistant", "好"), ("user", "还有？"), ("assistant", "就这样")),
    )
    pair = ("en", "en") if kind == "base" else ("en", "zh")
    example = make_example(Record("c", {"en": CHAT, "zh": zh}), kind, *pair, tag=tag)
    replies = ("ho", "so") if kind == "base" else ("好", "就这样")
    assert example.messages == (
        ("system", "s"),
        ("user", asked[0]),
        ("assistant", replies[0]),
        ("user", asked[1]),
        ("assistant", replies[1]),
    )
    assert example.output == replies[1]


def test_a_chat_and_a_plain_row_meet():
    """A plain answer follows the first question; a plain prompt has one turn."""
    record = Record("c", {"en": CHAT, "zh": Text("问", "在巴黎", "塞纳河")})
    assert make_example(record, "en2x", "en", "zh", tag="none").messages == (
        ("system", "s"),
        ("user", "hi"),
        ("assistant", "塞纳河"),
        ("user", "and?"),
        ("assistant", "so"),
    )
    example = make_example(record, "x2en", "zh", "en", tag="input")
    assert (example.instruction, example.input, example.output) == ("问", "在巴黎\n[en]", "so")
    assert example.messages is None


def test_a_chat_is_translated_by_its_last_exchange():
    zh = Text("还有？", "", "就这样", (("user", "还有？"), ("assistant", "就这样")))
    record = Record("c", {"en": CHAT, "zh": zh})
    for what, texts in (
        ("instruction", ("还有？", "and?")),
        ("record", ("还有？\n\n就这样", "and?\n\nso")),
    ):
        example = make_example(record, "trans", "zh", "en", tag="sentence", translate_what=what)
        assert (example.input, example.output) == texts and example.messages is None


def test_a_component_s_name_is_its_own_or_that_of_its_kind():
    assert (
        make_example(RECORD, "x2x", "en", "zh", tag="none", component="x2x:s").component == "x2x:s"
    )
    assert make_example(RECORD, "x2x", "en", "zh", tag="none").component == "x2x"


def test_chats_take_user_turns_from_one_side_and_replies_from_the_other():
    def chat(hi, ho):
        turns = (
            ("system", "s"),
            ("user", hi),
            ("assistant", ho),
            ("user", hi + "2"),
            ("assistant", ho + "2"),
        )
        return Text(hi, "", ho, turns)

    record = Record("c", {"en": chat("hi", "ho"), "zh": chat("你", "好")})
    example = make_example(record, "x2x", "en", "zh", tag="input")
    assert example.messages == (
        ("system", "s"),
        ("user", "hi\n[zh]"),
        ("assistant", "好"),
        ("user", "hi2\n[zh]"),
        ("assistant", "好2"),
    )


def test_a_new_kind_is_one_entry(monkeypatch):
    """An entry alone is checked, drawn and made: instruction and answer in one language, the input
    in the pivot.
    """
    config = Config(
        model=Model(path="m"),
        data=Data(
            sources=(Source(name="r", path="r.jsonl"),),
            components=(Component(kind="pivot_input", source="r"),),
            languages=("en", "zh", "es"),
            tag="none",
        ),
    )
    with pytest.raises(UserError, match="kind='pivot_input' is not one of base, en2x, .*, text"):
        check(config)

    def make(pair: kinds.Pair) -> kinds.Content:
        return pair.answer.instruction, pair.prompt.input, pair.answer.output, None

    entry = Kind(draw=lambda draws: (draws.pivot, draws.language(LANGUAGE)), make=make)
    monkeypatch.setitem(KINDS, "pivot_input", entry)
    mixture = Mixture(check(config).data, {"r": Corpus("r", [RECORD])}, seed=1)
    asked = {(e.instruction, e.input, e.output) for e in mixture.take(range(20))}
    assert asked == {("请说出。", "A river", "塞纳河"), ("Nómbralo.", "A river", "Sena")}


def test_kinds_that_need_the_pivot_are_refused_without_it():
    for kind, entry in KINDS.items():
        data = Data(
            sources=(Source(name="r", path="r.jsonl"),),
            components=(Component(kind=kind, source="r"),),
            languages=("zh", "es"),
        )
        if entry.needs_pivot:
            with pytest.raises(UserError, match=f"kind '{kind}' needs the pivot language"):
                check(Config(model=Model(path="m"), data=data))
        else:
            check(Config(model=Model(path="m"), data=data))


def test_the_documentation_lists_every_kind():
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    for kind in KINDS:
        assert f"| `{kind}` |" in page
