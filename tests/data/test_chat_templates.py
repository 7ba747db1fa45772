"""Chat templates as they are published: system turns, dates, opened thoughts, and limits on what
one may do.
"""

import copy
import json
import pickle

import numpy as np
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from crossin_jax.config import UserError
from crossin_jax.data.kinds import Example
from crossin_jax.data.pipeline import read_answer_ends
from crossin_jax.data.prompts import Renderer, RowFault
from crossin_jax.data.templates import MAX_CHARS, MAX_STEPS, ChatTemplate, open_chat_template

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURNS
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TURNS
)
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nToday: {{ date_string }}<|im_end|>\n" + TURNS
)
THINKS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ m.content.split('</think>')[-1] | trim }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
EMPTY_THOUGHT = THINKS.replace("<think>\\n", "<think>\\n\\n</think>\\n\\n")


def open_renderer(tokenizer, source, **options):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    return Renderer(tokenizer, "chat", **options)


def make_example(*messages, output=""):
    if messages:
        return Example("r1", "base", "en", "en", "", "", "", messages=messages)
    return Example("r1", "base", "en", "en", "Name it", "", output)


# ---- One rendering for us and for transformers


@pytest.mark.parametrize(
    "source",
    [
        TURNS,
        ALTERNATES,
        THINKS,
        "{% for m in messages %}{{ m | tojson }}{% if loop.last %}!{% endif %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(x='') %}{% for m in messages %}{% if loop.index0 > 0 %}{% break %}"
        "{% endif %}{% set ns.x = ns.x ~ m.content.replace('a', 'b') %}{% endfor %}{{ ns.x }}",
        "{% macro f(a) %}[{{ a }}]{% endmacro %}{{ f('q') }}"
        "{{ messages | map(attribute='content') | join(', ') | replace('x', 'y') | upper }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{% for k, v in messages[0].items() %}{{ '%s=%s' | format(k, v) | indent(2) }}{% endfor %}",
    ],
)
def test_the_text_is_that_of_transformers(source):
    messages = (("user", "a 123456 <b>é</b>"), ("assistant", " yes\nx</think> no "), ("user", "?"))
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    expected = render_jinja_template(
        [[{"role": role, "content": text} for role, text in messages]],
        chat_template=source,
        add_generation_prompt=True,
        **specials,
    )[0][0]
    template = ChatTemplate(source, specials)
    assert template.render(messages, True) == expected
    assert pickle.loads(pickle.dumps(template)).render(messages, True) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in 'a' * 3000 %}{% for b in 'b' * 3000 %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [1] * 10 ** 9 }}",
        "{{ 9 ** 999999999 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ '%0999999999d' % 3 }}",
        "{{ '%0999999999d' | format(3) }}",
        "{{ '{:>999999999}'.format(3) }}",
        "{{ ('a' * 9999999).replace('a', 'b' * 9999999) }}",
        "{{ ('a' * 9999999) | replace('a', 'b' * 9999999) }}",
        "{{ ('b' * 99999).join('a' * 999) }}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% "
        "endfor %}",
        "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% "
        "endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor "
        "%}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_would_do_harm_is_stopped(source):
    assert MAX_STEPS <= 10**6 and MAX_CHARS <= 10**7
    with pytest.raises(UserError, match="chat template refuses the turns user: "):
        ChatTemplate(source, {}).render((("user", "Hi"),), True)


def test_of_several_templates_the_default_one_is_taken(tokenizer):
    several = copy.deepcopy(tokenizer)
    several.chat_template = {"tool_use": DATED, "default": TURNS}
    assert open_chat_template(several).source == TURNS
    for absent in ({"tool_use": DATED}, None):
        several.chat_template = absent
        with pytest.raises(UserError, match="the tokenizer has no chat template; use another"):
            open_chat_template(several)
    with pytest.raises(UserError, match="not valid Jinja"):
        ChatTemplate("{% for %}", {})


# ---- System turns


@pytest.mark.parametrize("source", [REFUSES_SYSTEM, DROPS_SYSTEM, ALTERNATES])
def test_a_system_turn_without_a_place_goes_before_the_first_question(tokenizer, source):
    renderer = open_renderer(tokenizer, source)
    asked = "<s><|im_start|>user\nBe kind.\n\nHi<|im_end|>\n<|im_start|>assistant\n"
    turns = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))
    rendered = renderer.render(make_example(*turns))
    assert tokenizer.decode(rendered.ids) == f"{asked}Hello<|im_end|>"
    assert tokenizer.decode(rendered.ids[rendered.loss_mask]) == "Hello<|im_end|>"
    with_system = open_renderer(tokenizer, source, system="Be kind.")
    assert tokenizer.decode(with_system.render_prompt("Hi")) == asked
    assert open_renderer(tokenizer, TURNS).render(make_example(*turns)).ids.size > 0


def test_a_place_for_the_system_turn_is_used(tokenizer):
    turns = (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))
    text = tokenizer.decode(open_renderer(tokenizer, TURNS).render(make_example(*turns)).ids)
    assert text.startswith("<s><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<")


def test_a_chat_that_the_template_refuses_is_named(tokenizer):
    renderer = open_renderer(tokenizer, ALTERNATES)
    turns = (("user", "Hi"), ("user", "Hi?"), ("assistant", "Hello"))
    fine = make_example(("user", "Hi"), ("assistant", "Hello"))
    with pytest.raises(RowFault, match="row 'r1': .* refuses the turns user, user: roles must"):
        renderer.render_many([fine, make_example(*turns)])


# ---- Dates


def test_the_date_is_the_same_on_every_day_and_part_of_the_hash(tokenizer):
    dated, plain = open_renderer(tokenizer, DATED), open_renderer(tokenizer, TURNS)
    text = tokenizer.decode(dated.render_prompt("Hi"))
    assert "Today: 26 Jul 2024<|im_end|>" in text
    assert dated.hash == open_renderer(tokenizer, DATED).hash != plain.hash
    # a template without a date keeps the hash that its runs have recorded
    assert open_chat_template(tokenizer_with(tokenizer, TURNS)).is_dated is False


def tokenizer_with(tokenizer, source):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    return tokenizer


# ---- Thoughts


@pytest.mark.parametrize("source", [THINKS, EMPTY_THOUGHT])
def test_an_answer_follows_the_thought_that_the_prompt_opens(tokenizer, source):
    renderer = open_renderer(tokenizer, source)
    opening = "<think>\n" if source is THINKS else "<think>\n\n</think>\n\n"
    prompt = renderer.render_prompt("Name it")
    assert tokenizer.decode(prompt).endswith(f"Name it<|im_end|>\n<|im_start|>assistant\n{opening}")
    rendered = renderer.render(make_example(output="Paris"))
    assert np.array_equal(rendered.ids[: len(prompt)], prompt)
    assert not rendered.loss_mask[: len(prompt)].any() and rendered.loss_mask[len(prompt) :].all()
    assert tokenizer.decode(rendered.ids[len(prompt) :]) == "Paris<|im_end|>"
    assert renderer.eos_ids == (4, 2)


def test_an_answer_may_bring_its_own_thought(tokenizer):
    """Nothing of the thought is lost, and it is not opened twice."""
    renderer = open_renderer(tokenizer, THINKS)
    for output in ("<think>\nFrance.\n</think>\n\nParis", "France.\n</think>\n\nParis"):
        rendered = renderer.render(make_example(output=output))
        learned = tokenizer.decode(rendered.ids[rendered.loss_mask])
        assert learned == "France.\n</think>\n\nParis<|im_end|>"


WRAPS = (  # a template that writes every last answer with a thought, empty where it has none
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n<think>\n"
    "{% set parts = m.content.split('</think>') %}"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}"
    "\n</think>\n\n{{ parts[-1].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    "thought", ["", "Capital.\n</think>\n\n", "<think>\nCapital.\n</think>\n\n"]
)
def test_a_template_that_wraps_every_answer_in_a_thought_is_learned_as_it_writes(
    tokenizer, thought
):
    """Whether the answer brings the whole thought, its end alone (as a model's own answer does) or
    none.
    """
    renderer = open_renderer(tokenizer, WRAPS)
    rendered = renderer.render(make_example(output=thought + "Paris"))
    learned = tokenizer.decode(rendered.ids[rendered.loss_mask])
    assert learned == ("Capital." if thought else "") + "\n</think>\n\nParis<|im_end|>"
    assert tokenizer.decode(rendered.ids).count("<think>") == 1


def test_many_turns_under_such_a_template_are_refused_with_the_row(tokenizer):
    chat = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(RowFault, match="row 'r1': .* rewrites earlier turns"):
        open_renderer(tokenizer, THINKS).render(make_example(*chat))


# ---- Where an answer ends


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, ()),
        ({"generation_config": {"eos_token_id": 7}}, (7,)),
        ({"generation_config": {"eos_token_id": [7, 9]}, "config": {"eos_token_id": 2}}, (7, 9)),
        ({"generation_config": {"do_sample": True}, "config": {"eos_token_id": [2, 9]}}, (2, 9)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 2}}, (2,)),
        ({"config": {"text_config": {"eos_token_id": [1, 106]}}}, (1, 106)),
        ({"config": {"text_config": None, "eos_token_id": 5}}, (5,)),
    ],
    ids=str,
)
def test_a_models_files_say_where_an_answer_ends(tmp_path, files, ends):
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    assert read_answer_ends(tmp_path) == ends


@pytest.mark.parametrize("wrong", ["</s>", [1, "</s>"], -1, 2.5, True])
def test_ends_that_are_no_ids_are_refused(tmp_path, wrong):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.*are not token"):
        read_answer_ends(tmp_path)


def test_special_tokens_are_shown_where_a_stop_names_them(tokenizer):
    renderer = Renderer(tokenizer, "plain")
    ids = tokenizer.encode("Paris<|im_end|>\ncity</s>", add_special_tokens=False)
    assert renderer.decode(ids) == "Paris\ncity"
    assert renderer.decode(ids, shown=["<|im_end|>"]) == "Paris<|im_end|>\ncity"
    assert renderer.decode(ids, shown=["\n", "city</s>"]) == "Paris\ncity</s>"
