"""Chat templates for other programs, which then ask an exported model as training did."""

import json
import re

from crossin_jax.data.templates import DATE, ChatTemplate, Template


def write_chat_template(
    template: Template, system: str | None, *, bos: bool, end: str, apart: bool
) -> str:
    """A chat template (Jinja) for other programs that asks a model as `template` does.

    `end` is the text of the token that ends an answer; `apart` keeps trailing spaces in the prompt.
    """
    # "### Instruction:\n{instruction}\n\n### Response:\n " becomes
    #
    #     a question    '### Instruction:\n' + ask.text + '\n\n### Response:\n'
    #     a solved one  '### Instruction:\n' + ask.text + '\n\n### Response:\n ' + answer + '</s>'
    #
    # A system turn, or a second question, goes before the next question, as in training.
    parts = template.fill("\0", "", system).split("\0")
    whole = " + ask.text + ".join(map(_quote, parts))
    opened = f"({whole})" if apart else f"({whole}).rstrip(' ')"
    prefix = "" if parts[-1].endswith(" ") or apart else template.answer_prefix
    return (
        ("{{- bos_token }}" if bos else "")
        + "{%- set ask = namespace(text='') %}{%- for message in messages %}"
        "{%- if message['role'] == 'assistant' %}"
        f"{{{{- {whole} + {_quote(prefix)} + message['content'] + {_quote(end)} }}}}"
        "{%- set ask.text = '' %}"
        "{%- elif ask.text %}{%- set ask.text = ask.text + '\\n\\n' + message['content'] %}"
        "{%- else %}{%- set ask.text = message['content'] %}{%- endif %}{%- endfor %}"
        f"{{%- if add_generation_prompt %}}{{{{- {opened} }}}}{{%- endif %}}"
    )


def pin_chat_template(template: ChatTemplate, system: str | None) -> str:
    """A chat template that writes our date on every day, and `system` where a chat has no system
    turn.
    """
    source, has_system = template.source, "messages[0]['role'] == 'system'"
    if system and not template.takes_system:
        joined = "messages[0]['content'] + '\\n\\n' + messages[1]['content']"
        source = (
            f"{{%- if {has_system} and messages[1:] and messages[1]['role'] == 'user' %}}"
            f"{{%- set messages = [{{'role': 'user', 'content': {joined}}}] + messages[2:] %}}"
            "{%- endif %}" + source
        )
    if system:
        turn = f"[{{'role': 'system', 'content': {_quote(system)}}}]"
        source = (
            f"{{%- if not ({has_system}) %}}{{%- set messages = {turn} + messages %}}{{%- endif %}}"
            + source
        )
    if template.is_dated:
        formats = dict.fromkeys(re.findall(r"strftime_now\(\s*['\"](.*?)['\"]\s*\)", source))
        cases = "".join(
            f"{{%- if format == {_quote(text)} %}}{{{{- {_quote(DATE.strftime(text))} }}}}{{%- "
            f"endif %}}"
            for text in formats
        )
        source = f"{{%- macro strftime_now(format) %}}{cases}{{%- endmacro %}}" + source
    return source


def _quote(text: str) -> str:
    """A text as a Jinja literal."""
    return json.dumps(text, ensure_ascii=False)
