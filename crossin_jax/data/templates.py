"""The text around a prompt: built-in templates, those of files, and chat templates."""

import dataclasses
import datetime
import functools
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes, sandbox
from jinja2.ext import Extension, loopcontrols
from jinja2.visitor import NodeTransformer

from crossin_jax.config import UserError, hint
from crossin_jax.files import check_fields, read_json
from crossin_jax.paths import as_path


@dataclass(frozen=True, slots=True)
class Template:
    """Text around a prompt; {instruction}, {input}, {system} are filled in, every other brace
    stays.

    Trailing spaces of a prompt are tokenized with the answer, as is `answer_prefix`: a tokenizer
    then sees " Paris", the form the word has inside a text. `system_form` surrounds the system
    prompt. `end` ends an answer where it is one token of the tokenizer; elsewhere, and by default,
    EOS does.
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
        values = {
            "instruction": instruction,
            "input": input,
            "output_lang": "",
            "system": self.system_form.replace("{system}", system) if system else "",
        }
        return re.sub(
            r"\{(instruction|input|system|output_lang)\}",
            lambda match: values[match[1]],
            self.prompt_input if input else self.prompt_no_input,
        )


_TASK = "Below is an instruction that describes a task"
_RESPOND = "Write a response that appropriately completes the request."
_FIELDS = "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n "
_NO_INPUT = _FIELDS.replace("### Input:\n{input}\n\n", "")
_MANY = " in one or more languages"

TEMPLATES: dict[str, Template] = {
    # the wording of Alpaca and of the CrossIn release, which checkpoints in use were trained with
    "alpaca": Template(
        f"{_TASK}, paired with an input that provides further context. {_RESPOND}{_FIELDS}",
        f"{_TASK}. {_RESPOND}{_NO_INPUT}",
    ),
    "cl_boost": Template(
        f"{_TASK}{_MANY}, paired with an input in one or more language that provides further "
        f"context. {_RESPOND}{_FIELDS}",
        f"{_TASK}{_MANY}. {_RESPOND}{_NO_INPUT}",
    ),
    "llama": Template(
        "[INST] {system}{instruction}\n{input}[/INST]",
        "[INST] {system}{instruction}[/INST]",
        " ",
        "<<SYS>>\n{system}\n<</SYS>>\n\n",
        "You are a helpful assistant.",
    ),
    "gemma": Template("{instruction}\n{input}\n", "{instruction}\n"),
    # Short, and a name has the same tokens in a text and in an answer.
    "plain": Template("{instruction}\n{input}\n ", "{instruction}\n "),
    "chatml": Template(
        "{system}<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "{system}<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_start|>system\n{system}<|im_end|>\n",
        None,
        "<|im_end|>",
    ),
}


def load_template(name: str | dict[str, Any], place: str = "data.template") -> Template | None:
    """A built-in template, or a JSON file with its fields, as the release's template files are;
    None for "chat".

    An exported model has the fields themselves. `place` is the setting that an error names.
    """
    if isinstance(name, dict):
        return _make_template(dict(name), place)
    if name == "chat":
        return None
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = as_path(name)
    if not path.is_file():
        raise UserError(
            f"{place}={name!r} is neither a file nor one of {', '.join((*TEMPLATES, 'chat'))}"
            f"{hint(name, (*TEMPLATES, 'chat'))}"
        )
    return _make_template(read_json(path, expect=dict, what="a template"), name)


def _make_template(values: dict[str, Any], name: str) -> Template:
    """A template from its fields; `name` is what an error names."""
    known = set(Template.__dataclass_fields__)
    values.pop("description", None)
    for key in values:
        if key not in known:
            raise UserError(
                f"{name}: template has no {key!r}{hint(key, known)}; fields: "
                f"{', '.join(sorted(known))}"
            )
    check_fields(values, {field.name: field.type for field in dataclasses.fields(Template)}, name)
    values = {key: value for key, value in values.items() if value is not None}
    for key in ("prompt_input", "prompt_no_input"):
        if "{instruction}" not in values.get(key, ""):
            raise UserError(f"{name}: {key} lacks {{instruction}}")
    return Template(**values)


# ---- Chat templates

# A template that writes today's date would give other tokens tomorrow. It is given this date on
# every day, which Llama 3 writes where it knows no date. `Renderer.hash` holds it, and an export
# writes it into its chat template.
DATE = datetime.datetime(2024, 7, 26)
MAX_STEPS = 1_000_000  # loop passes, calls, look-ups and pieces of output of one chat
MAX_CHARS = 10_000_000  # of one text that a template makes
MARK = "crossin"  # a text that no template has of its own


class TemplateRefusal(UserError):
    """A chat that a template does not take."""


class ChatTemplate:
    """A Jinja chat template of a tokenizer, rendered in a sandbox with limits on work and size."""

    def __init__(self, source: str, specials: dict[str, str]):
        self.source, self._specials = source, specials
        try:
            self._template = _make_sandbox().from_string(source)
        except Exception as error:  # Jinja's lexer, parser and compiler raise many kinds
            raise UserError(f"the tokenizer's chat template is not valid Jinja: {error}") from None

    def __reduce__(self):
        return ChatTemplate, (self.source, self._specials)  # compiled code cannot be pickled

    @property
    def is_dated(self) -> bool:
        """Whether the template asks for the date."""
        return "strftime_now" in self.source

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether a system turn appears in the text; some templates refuse it, others leave it out
        silently.
        """
        try:
            return MARK in self._render((("system", MARK), ("user", "a")), True)
        except TemplateRefusal:
            return False

    def render(self, messages: Sequence[tuple[str, str]], generation: bool) -> str:
        """The text of (role, content) turns; with `generation`, up to where the next answer begins.

        Without a place for a system turn its text goes before the first user's, after an empty
        line.
        """
        if messages[0][0] == "system" and not self.takes_system and messages[1:2]:
            (_, system), (role, text), *rest = messages
            if role == "user":
                messages = ((role, f"{system}\n\n{text}"), *rest)
        return self._render(messages, generation)

    def _render(self, messages: Sequence[tuple[str, str]], generation: bool) -> str:
        environment = self._template.environment
        environment.budget.left = MAX_STEPS
        try:
            pieces, size = [], 0
            for piece in self._template.generate(
                messages=[{"role": role, "content": text} for role, text in messages],
                tools=None,
                documents=None,
                add_generation_prompt=generation,
                **self._specials,
            ):
                environment.spend(1)
                size += len(piece)
                environment.check_size(size)
                pieces.append(piece)
            return "".join(pieces)
        except Exception as error:  # a Jinja template may raise anything
            roles = ", ".join(role for role, _ in messages)
            raise TemplateRefusal(
                f"the tokenizer's chat template refuses the turns {roles}: {error}"
            ) from None


def open_chat_template(tokenizer: Any) -> ChatTemplate:
    """The chat template of a tokenizer; of several the default one. `UserError` where there is
    none.
    """
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        raise UserError(
            "data.template='chat', but the tokenizer has no chat template; use another template, "
            f"e.g. {', '.join(TEMPLATES)}"
        )
    return ChatTemplate(source, {k: str(v) for k, v in tokenizer.special_tokens_map.items()})


class _Generation(Extension):
    """{% generation %} marks what an assistant says; the text is the same without it."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Counted(NodeTransformer):
    """Puts filters that count around loops and around "~", which call no method of the sandbox."""

    def visit_For(self, node):
        self.generic_visit(node)
        node.iter = self.wrap(node.iter, "count_items")
        return node

    def visit_Concat(self, node):
        return self.wrap(self.generic_visit(node), "check_concat")

    def wrap(self, node, name):
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Counts what a template does, and stops one that would run forever or fill the memory."""

    # Every loop, call, look-up and operator passes one of these methods:
    #
    #     {% for m in messages %}    count_items: as many steps as there are messages
    #     m.role                     getattr, getitem: one step
    #     ' ' * 10 ** 9              call_binop: the size is checked before the text is made
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    budget = threading.local()

    def spend(self, steps: int) -> None:
        self.budget.left -= steps
        if self.budget.left < 0:
            raise sandbox.SecurityError(f"it takes more than {MAX_STEPS:,} steps")

    def check_size(self, size: float) -> None:
        if size > MAX_CHARS:
            raise sandbox.SecurityError(f"it makes a text of more than {MAX_CHARS:,} characters")

    def check_format(self, text: Any) -> None:
        if isinstance(text, str) and re.search(r"\d{6}", text):
            raise sandbox.SecurityError("it formats a number with a width of six digits")

    def count_items(self, items: Any) -> Any:
        if not hasattr(items, "__len__"):
            items = list(self.take(items))
        self.spend(len(items))
        return items

    def take(self, items: Any) -> Any:
        for item in items:
            self.spend(1)
            yield item

    def check_join(self, separator: str, items: Any) -> list[str]:
        items = list(map(str, self.count_items(items)))
        self.check_size(sum(map(len, items)) + len(separator) * len(items))
        return items

    def check_replace(self, text: str, old: str, new: str) -> None:
        self.check_size(len(text) + text.count(old) * len(new))

    def check_concat(self, text: str) -> str:
        self.spend(1)
        self.check_size(len(text))
        return text

    def _parse(self, *arguments):
        return _Counted().visit(super()._parse(*arguments))

    def call_binop(self, context, operator, left, right):
        self.spend(1)
        if operator == "**":
            self.check_size(abs(right) * max(1, abs(left)).bit_length())
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if hasattr(text, "__len__"):
                    self.check_size(len(text) * times)
        elif operator == "+" and hasattr(left, "__len__"):
            self.check_size(len(left) + len(right))
        elif operator == "%":
            self.check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context, function, *arguments, **named):
        self.spend(1)
        for value in (*arguments, *named.values()):
            if isinstance(value, int):
                self.check_size(abs(value))
        method = getattr(function, "__wrapped__", function)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name in ("format", "format_map"):
                self.check_format(owner)
            elif name == "join":
                arguments = (self.check_join(owner, *arguments),)
            elif name == "replace":
                self.check_replace(owner, *arguments[:2])
        return super().call(context, function, *arguments, **named)

    def getattr(self, value, name):
        self.spend(1)
        return super().getattr(value, name)

    def getitem(self, value, name):
        self.spend(1)
        return super().getitem(value, name)

    def join(self, items: Any, separator: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        return separator.join(self.check_join(separator, items))

    def format(self, text: str, *values: Any, **named: Any) -> str:
        self.check_format(text)
        return text % (named or values)

    def replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        self.check_replace(str(text), old, new)
        return str(text).replace(old, new, -1 if count is None else count)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter writes "<" as "\u003c"
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent and min(indent, 16),
        separators=separators,
        sort_keys=sort_keys,
    )


def _indent(text, width=4, first=False, blank=False):
    width = width if isinstance(width, str) else min(width, 100)
    return jinja2.filters.do_indent(text, width, first, blank)


@functools.cache
def _make_sandbox() -> Any:
    """A Jinja environment with the functions that transformers gives to chat templates."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    for name in ("center", "wordwrap", "urlize", "pprint"):  # they make any size of text
        del environment.filters[name]
    environment.filters |= {
        "tojson": _to_json,
        "indent": _indent,
        "join": environment.join,
        "replace": environment.replace,
        "format": environment.format,
        "count_items": environment.count_items,
        "check_concat": environment.check_concat,
    }
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _refuse, "strftime_now": DATE.strftime}
    return environment
