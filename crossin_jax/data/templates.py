"""The text around a prompt: built-in templates, and those of a user's file."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from crossin_jax.config import UserError, hint


@dataclass(frozen=True, slots=True)
class Template:
    """Text around a prompt; {instruction}, {input}, {system} are filled in, every other brace stays.

    Trailing spaces of a prompt are tokenized with the answer, as is `answer_prefix`: a tokenizer then sees " Paris",
    the form the word has inside a text. `system_form` surrounds the system prompt. `end` ends an answer where it is
    one token of the tokenizer; elsewhere, and by default, EOS does.
    """

    prompt_input: str
    prompt_no_input: str
    answer_prefix: str = ""
    system_form: str = ""
    system: str | None = None
    end: str | None = None

    def fill(self, instruction: str, input: str, system: str | None) -> str:
        """The whole prompt as text; the form without input is taken where the input is empty."""
        system = system if system is not None else self.system
        values = {"instruction": instruction, "input": input, "output_lang": "",
                  "system": self.system_form.replace("{system}", system) if system else ""}
        return re.sub(r"\{(instruction|input|system|output_lang)\}", lambda match: values[match[1]],
                      self.prompt_input if input else self.prompt_no_input)


_TASK = "Below is an instruction that describes a task"
_RESPOND = "Write a response that appropriately completes the request."
_FIELDS = "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n "
_NO_INPUT = _FIELDS.replace("### Input:\n{input}\n\n", "")
_MANY = " in one or more languages"

TEMPLATES: dict[str, Template] = {
    # the wording of Alpaca and of the CrossIn release, which checkpoints in use were trained with
    "alpaca": Template(f"{_TASK}, paired with an input that provides further context. {_RESPOND}{_FIELDS}",
                       f"{_TASK}. {_RESPOND}{_NO_INPUT}"),
    "cl_boost": Template(f"{_TASK}{_MANY}, paired with an input in one or more language that provides further context. "
                         f"{_RESPOND}{_FIELDS}", f"{_TASK}{_MANY}. {_RESPOND}{_NO_INPUT}"),
    "llama": Template("[INST] {system}{instruction}\n{input}[/INST]", "[INST] {system}{instruction}[/INST]", " ",
                      "<<SYS>>\n{system}\n<</SYS>>\n\n", "You are a helpful assistant."),
    "gemma": Template("{instruction}\n{input}\n", "{instruction}\n"),
    "plain": Template("{instruction}\n{input}\n ", "{instruction}\n "),  # short; names keep their tokens in an answer
    "chatml": Template("{system}<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
                       "{system}<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n", "",
                       "<|im_start|>system\n{system}<|im_end|>\n", None, "<|im_end|>"),
}


def load_template(name: str, place: str = "data.template") -> Template | None:
    """A built-in template, or a JSON file with its fields, as the release's template files are; None for "chat".

    `place` is the setting that an error names.
    """
    if name == "chat":
        return None
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"{place}={name!r} is no file and none of {', '.join((*TEMPLATES, 'chat'))}"
                        f"{hint(name, (*TEMPLATES, 'chat'))}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{place}={name}: not JSON ({error})") from None
    known = set(Template.__dataclass_fields__)
    values.pop("description", None)
    for key in values:
        if key not in known:
            raise UserError(f"{name}: template has no {key!r}{hint(key, known)}; fields: {', '.join(sorted(known))}")
    for key in ("prompt_input", "prompt_no_input"):
        if "{instruction}" not in values.get(key, ""):
            raise UserError(f"{name}: {key} lacks {{instruction}}")
    return Template(**values)
