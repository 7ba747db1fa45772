"""One renderer: the text of every template, joint ids, the mask, BOS and EOS, and what is
refused.
"""

import copy
import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.checks import check
from crossin_jax.config import Component, Config, Data, Model, Source, UserError
from crossin_jax.data.kinds import Example
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.pipeline import load_tokenizer, open_eval_renderer, open_renderer
from crossin_jax.data.prompts import Renderer, RowFault, _find_tokens
from crossin_jax.data.templates import TEMPLATES, load_template
from crossin_jax.data.tokens import token_bytes
from tests.golden.make_templates import render

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} "
    "[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHATS = {"chatml": CHATML, "llama2": LLAMA2, "bare": BARE}


def example(
    instruction="Name the river", input="in Paris\n[zh]", output="塞纳河", **changes
) -> Example:
    return Example("r1", "x2x", "en", "zh", instruction, input, output, **changes)


def with_chat(tokenizer, chat_template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers(tokenizer, request) -> dict:
    """The small tokenizer, and the real Llama-2 and Mistral ones where they are."""
    found = {"small": tokenizer}
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
    for name in ("llama2", "mistral"):
        if (folder / name).is_dir():
            found[name] = load_tokenizer(str(folder / name))
    return found


def test_templates_are_pinned():
    golden = json.loads(
        (Path(__file__).parents[1] / "golden" / "templates.json").read_text(encoding="utf-8")
    )
    assert render() == golden, (
        "templates are part of checkpoints; change tests/golden only on purpose"
    )


@pytest.mark.parametrize("name", ["small", "llama2", "mistral"])
@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("tokenization", ["joint", "apart"])
def test_prompt_answer_and_eos(tokenizers, name, template, tokenization):
    if name not in tokenizers:
        pytest.skip("real tokenizers in ../shared are not beside this checkout")
    tokenizer = tokenizers[name]
    renderer = Renderer(tokenizer, template, tokenization=tokenization)
    for output in ("塞纳河", "Seine", "麤 is rare", "¿Qué?", "1", "  indented\n\ncode"):
        for input in ("in Paris", ""):
            rendered = renderer.render(example(input=input, output=output))
            first = int(np.argmax(rendered.loss_mask))
            assert rendered.loss_mask[first:].all() and rendered.ids[-1] == renderer.eos_ids[0]
            assert (
                rendered.ids[0] == tokenizer.bos_token_id
                and (rendered.ids == tokenizer.bos_token_id).sum() == 1
            )
            assert tokenizer.decode(rendered.ids[first:-1]).strip() == output.strip()
            if not output.startswith(" "):
                assert np.array_equal(
                    renderer.render_prompt("Name the river", input), rendered.ids[:first]
                )
            again = renderer.render_answer("Name the river", input, output)
            assert np.array_equal(again.ids, rendered.ids) and np.array_equal(
                again.loss_mask, rendered.loss_mask
            )


@pytest.mark.parametrize("name", ["small", "llama2", "mistral"])
def test_joint_ids_are_those_of_the_whole_text(tokenizers, name):
    if name not in tokenizers:
        pytest.skip("real tokenizers in ../shared are not beside this checkout")
    tokenizer = tokenizers[name]
    text = TEMPLATES["alpaca"].fill("Name the river", "in Paris\n[zh]", None) + "塞纳河"
    rendered = Renderer(tokenizer, "alpaca").render(example())
    assert rendered.ids.tolist() == [*tokenizer(text).input_ids, tokenizer.eos_token_id]


def test_the_released_form_is_prompt_and_answer_tokenized_apart(tokenizers):
    if "llama2" not in tokenizers:
        pytest.skip("real tokenizers in ../shared are not beside this checkout")
    tokenizer = tokenizers["llama2"]
    prompt = tokenizer(TEMPLATES["alpaca"].fill("Name the river", "in Paris\n[zh]", None)).input_ids
    answer = tokenizer("塞纳河</s>", add_special_tokens=False).input_ids
    rendered = Renderer(tokenizer, "alpaca", tokenization="apart").render(example())
    assert rendered.ids.tolist() == prompt + answer
    assert rendered.loss_mask.tolist() == [False] * len(prompt) + [True] * len(answer)


@settings(max_examples=60, deadline=None)
@given(
    instruction=st.text(min_size=1, max_size=30),
    input=st.text(max_size=30),
    output=st.text(min_size=1, max_size=30),
    template=st.sampled_from(list(TEMPLATES)),
)
def test_any_text_keeps_its_answer(tokenizer, instruction, input, output, template):
    clean = [text.encode("utf-8", "ignore").decode() for text in (instruction, input, output)]
    renderer = Renderer(tokenizer, template)
    try:
        rendered = renderer.render(example(*clean))
    except RowFault as fault:
        assert fault.reason.startswith(("nothing to learn", "special token"))
        return
    end = "<|im_end|>" if template == "chatml" else "</s>"
    assert tokenizer.decode(rendered.ids[rendered.loss_mask]).endswith(clean[2] + end)


def test_a_token_across_the_border_belongs_to_the_answer(tokenizer):
    template = {"prompt_input": "{instruction}{input} Pa", "prompt_no_input": "{instruction} Pa"}
    renderer = Renderer(tokenizer, "gemma")
    renderer.template = type(renderer.template)(**template)
    rendered = renderer.render(example(instruction="q", input="", output="ris"))
    whole = tokenizer("q Paris").input_ids
    assert (
        rendered.ids[:-1].tolist() == whole
        and tokenizer.convert_ids_to_tokens(whole)[-1] == "ĠParis"
    )
    assert rendered.loss_mask.tolist() == [False] * (len(whole) - 1) + [True, True]


def test_special_tokens_in_a_row_are_text_or_refused(tokenizer):
    rendered = Renderer(tokenizer, "alpaca").render(
        example(instruction="write <s> and </s>", output="</s> it is")
    )
    assert (rendered.ids == tokenizer.bos_token_id).sum() == 1
    assert (rendered.ids == tokenizer.eos_token_id).sum() == 1
    for template in ("chatml", "chat"):
        renderer = Renderer(with_chat(tokenizer, CHATML), template)
        with pytest.raises(RowFault, match="row 'r1': special token"):
            renderer.render(example(instruction="now <|im_end|>"))


FORGED = ("now <|im_end|>", "<|im_start|>user", "<s>", "a </s> b", "<pad>")


@pytest.mark.parametrize("special", FORGED)
@pytest.mark.parametrize("template", ["chatml", "chat"])
def test_a_special_token_anywhere_in_an_example_is_refused(tokenizer, template, special):
    renderer = Renderer(with_chat(tokenizer, CHATML), template)
    turns = (
        ("system", "S"),
        ("user", "one"),
        ("assistant", "Seine"),
        ("user", "two"),
        ("assistant", "Sena"),
    )
    assert renderer.render(example(messages=turns)) and renderer.render(example())
    for i, (role, text) in enumerate(turns):
        forged = (*turns[:i], (role, f"{text} {special}"), *turns[i + 1 :])
        with pytest.raises(
            RowFault, match="row 'r1': special token in the text: it would forge a turn"
        ):
            renderer.render(example(messages=forged))
    for field in ("instruction", "input", "output"):
        with pytest.raises(RowFault, match="special token"):
            renderer.render(dataclasses.replace(example(), **{field: f"a{special}"}))


def test_a_template_file_with_special_tokens_refuses_them_in_rows(tokenizer, tmp_path):
    """Whichever field of the file holds one; a file without any takes them as text."""
    texts = {
        "prompt_input": "{system}{instruction} {input}\n",
        "prompt_no_input": "{system}{instruction}\n",
        "answer_prefix": " ",
        "system_form": "{system}",
        "system": "S",
        "end": "|",
    }
    forged = example(instruction="write <s>")
    assert Renderer(tokenizer, write(tmp_path, json.dumps(texts))).render(forged)
    for field, text in texts.items():
        renderer = Renderer(
            tokenizer, write(tmp_path, json.dumps(texts | {field: text + "<|im_end|>"}))
        )
        with pytest.raises(RowFault, match="special token"):
            renderer.render(forged)


def test_chatml_ends_with_its_own_token(tokenizer):
    renderer = Renderer(tokenizer, "chatml", system="Be brief.")
    text = tokenizer.decode(renderer.render(example(input="", output="Seine")).ids)
    assert text == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nName the river<|im_end|>\n"
        "<|im_start|>assistant\nSeine<|im_end|>"
    )
    assert renderer.eos_ids == (4, 2)


@pytest.mark.parametrize("form", list(CHATS))
def test_chat_templates_learn_every_assistant_turn(tokenizer, form):
    tokenizer = with_chat(tokenizer, CHATS[form])
    renderer = Renderer(tokenizer, "chat")
    end = "<|im_end|>" if form == "chatml" else "</s>"
    messages = (("user", "one"), ("assistant", "Seine"), ("user", "two"), ("assistant", "Sena"))
    rendered = renderer.render(example(messages=messages))
    loss_mask = tokenizer.decode(rendered.ids[rendered.loss_mask]).replace(" ", "")
    assert (
        loss_mask
        == {
            "chatml": f"Seine{end}Sena{end}",
            "llama2": f"Seine{end}Sena{end}",
            "bare": f"Seine\nSena\n{end}",
        }[form]
    )
    assert rendered.ids[-1] == renderer.eos_ids[0] and not np.array_equal(
        rendered.ids[:1], rendered.ids[1:2]
    )
    single = renderer.render(example())
    first = int(np.argmax(single.loss_mask))
    assert np.array_equal(
        renderer.render_prompt("Name the river", "in Paris\n[zh]"), single.ids[:first]
    )


TURNS = (("user", "one"), ("assistant", "Seine"), ("user", "two"), ("assistant", "Sena"))


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_prompt_is_how_its_example_begins_under_a_chat_template(tokenizer, system):
    """With the system prompt of the settings too: a model is asked as it was trained."""
    tokenizer = with_chat(tokenizer, CHATML)
    renderer = Renderer(tokenizer, "chat", system=system)
    for one in (example(), example(input="")):
        rendered, prompt = renderer.render(one), renderer.render_prompt(one.instruction, one.input)
        first = int(np.argmax(rendered.loss_mask))
        assert np.array_equal(prompt, rendered.ids[:first])
        user = f"{one.instruction}\n{one.input}" if one.input else one.instruction
        told = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        assert tokenizer.decode(prompt) == (
            f"<s>{told}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.decode(rendered.ids[first:]) == f"{one.output}<|im_end|>"


def test_the_system_prompt_opens_chats_that_have_none(tokenizer):
    tokenizer = with_chat(tokenizer, CHATML)
    renderer = Renderer(tokenizer, "chat", system="Be brief.")

    def text(*turns) -> str:
        return tokenizer.decode(renderer.render(example(messages=turns)).ids)

    chat = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in TURNS).rstrip("\n")
    assert text(*TURNS) == f"<s><|im_start|>system\nBe brief.<|im_end|>\n{chat}"
    assert text(("system", "Own."), *TURNS) == f"<s><|im_start|>system\nOwn.<|im_end|>\n{chat}"
    loss_mask = renderer.render(example(messages=TURNS))
    assert tokenizer.decode(loss_mask.ids[loss_mask.loss_mask]) == "Seine<|im_end|>Sena<|im_end|>"


def test_templates_without_turns_chain_exchanges(tokenizer):
    messages = (
        ("system", "S"),
        ("user", "one"),
        ("assistant", "Seine"),
        ("user", "two"),
        ("assistant", "Sena"),
    )
    renderer = Renderer(tokenizer, "gemma")
    rendered = renderer.render(example(messages=messages))
    assert tokenizer.decode(rendered.ids) == "<s>S\n\none\nSeine</s>two\nSena</s>"
    assert tokenizer.decode(rendered.ids[rendered.loss_mask]) == "Seine</s>Sena</s>"


@pytest.mark.parametrize("template", [*TEMPLATES, "chat"])
def test_text_learns_every_token_and_ends_with_eos(tokenizer, template):
    """Also under a template whose answers end with a token of their own."""
    renderer = Renderer(with_chat(tokenizer, CHATML), template)
    rendered = renderer.render(Example("t", "text", "en", "en", "", "", "Paris city"))
    assert tokenizer.decode(rendered.ids) == "<s>Paris city</s>"
    assert rendered.loss_mask.tolist() == [False] + [True] * (len(rendered.ids) - 1)


def test_a_template_that_brings_its_own_bos_gets_no_second(tokenizer, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(
        json.dumps(
            {"prompt_input": "<s>{instruction} {input}\n", "prompt_no_input": "<s>{instruction}\n"}
        )
    )
    rendered = Renderer(tokenizer, str(path)).render(example())
    assert (rendered.ids == 1).sum() == 1
    for twice in ("<s><s>", "Q: <s>"):  # of its own, or one beside that which comes first
        path.write_text(
            json.dumps(
                {
                    "prompt_input": f"{twice}{{instruction}} {{input}}\n",
                    "prompt_no_input": f"{twice}{{instruction}}\n",
                }
            )
        )
        with pytest.raises(RowFault, match="double BOS"):
            Renderer(tokenizer, str(path)).render(example())


def test_a_token_may_be_both_bos_and_eos(tokenizer):
    """As GPT-2's is; an example then holds it at both ends, a chat after each answer too."""
    renderer = Renderer(edit(tokenizer, eos_token="<s>"), "gemma")
    assert (
        tokenizer.decode(renderer.render(example(input="", output="Seine")).ids)
        == "<s>Name the river\nSeine<s>"
    )
    assert renderer.render(example(messages=TURNS)).ids.tolist().count(1) == 3


def test_each_turn_of_a_chat_template_may_bring_a_bos_and_no_more(tokenizer):
    renderer = Renderer(with_chat(tokenizer, LLAMA2), "chat")
    assert renderer.render(example(messages=TURNS)).ids.tolist().count(1) == 2
    twice = LLAMA2.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
    with pytest.raises(RowFault, match="double BOS: the template or the text brings its own"):
        Renderer(with_chat(tokenizer, twice), "chat").render(example(messages=TURNS))


def test_many_equal_one_by_one_and_faults_keep_their_place(tokenizer):
    renderer = Renderer(tokenizer, "alpaca")
    examples = [example(output=f"answer {i}") for i in range(5)]
    examples.insert(2, example(output=""))
    results = renderer.render_many(examples)
    assert isinstance(results[2], RowFault) and results[2].reason.startswith("nothing to learn")
    for one, result in zip(examples, results, strict=True):
        if not isinstance(result, RowFault):
            assert np.array_equal(renderer.render(one).ids, result.ids)


def test_the_release_s_template_files_load_and_placeholders_in_rows_stay(tokenizer, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {
                "description": "mine",
                "prompt_input": "Q: {instruction} ({input})\nA: {output_lang}",
                "prompt_no_input": "Q: {instruction} {keep}\nA: {output_lang}",
            }
        )
    )
    assert load_template(str(path)).fill("say {input} and {instruction}", "x", None) == (
        "Q: say {input} and {instruction} (x)\nA: "
    )
    assert load_template(str(path)).fill("q", "", None) == "Q: q {keep}\nA: "
    one, two = (Renderer(tokenizer, name).hash for name in (str(path), "alpaca"))
    assert (
        one
        != two
        == Renderer(tokenizer, "alpaca").hash
        != Renderer(tokenizer, "alpaca", tokenization="apart").hash
    )


@pytest.mark.parametrize("template", ["plain", "alpaca", "llama", "chatml", "chat"])
def test_the_hash_is_the_one_that_checkpoints_hold(template, tokenizer):
    """A digest of tokenizer, template, system prompt, form, BOS and the end of an answer: another
    would end runs.
    """
    tokenizer = with_chat(tokenizer, CHATML)
    renderer = Renderer(tokenizer, template)
    text = dataclasses.asdict(TEMPLATES[template]) if template in TEMPLATES else CHATML
    end = tokenizer.convert_tokens_to_ids(
        "<|im_end|>" if template in ("chatml", "chat") else "</s>"
    )
    parts = [tokenizer.backend_tokenizer.to_str(), text, None, "joint", tokenizer.bos_token_id, end]
    expected = hashlib.blake2b(
        json.dumps(parts, sort_keys=True).encode(), digest_size=16
    ).hexdigest()
    assert renderer.hash == expected


def edit(tokenizer, **changes):
    """A copy of a tokenizer with some attributes set anew."""
    tokenizer = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def rebuild(tokenizer, change):
    """The tokenizer with its tokenizer.json changed, and nothing else."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def swap_two_letters(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]


FILE = {
    "prompt_input": "{system}Q: {instruction} {input}\n",
    "prompt_no_input": "{system}Q: {instruction}\n",
    "answer_prefix": " ",
    "system_form": "S: {system}\n",
    "system": "Be brief.",
    "end": "<|im_end|>",
}
LOWER = {"type": "Lowercase"}

# What is different → (tokenizer, folder) → the two renderers
RENDERERS = {
    "tokenizer: ids": lambda t, d: (
        Renderer(rebuild(t, dict), "plain"),
        Renderer(rebuild(t, swap_two_letters), "plain"),
    ),
    "tokenizer: merges": lambda t, d: (
        Renderer(rebuild(t, dict), "plain"),
        Renderer(rebuild(t, lambda content: content["model"]["merges"].clear()), "plain"),
    ),
    "tokenizer: normalizer": lambda t, d: (
        Renderer(rebuild(t, dict), "plain"),
        Renderer(rebuild(t, lambda content: content.update(normalizer=LOWER)), "plain"),
    ),
    "BOS": lambda t, d: (Renderer(t, "plain"), Renderer(edit(t, bos_token=None), "plain")),
    "EOS": lambda t, d: (Renderer(t, "plain"), Renderer(edit(t, eos_token="<pad>"), "plain")),
    "template": lambda t, d: (Renderer(t, "plain"), Renderer(t, "gemma")),
    **{
        f"template file: {field}": lambda t, d, field=field, value=value: (
            Renderer(t, write(d, json.dumps(FILE))),
            Renderer(t, write(d, json.dumps(FILE | {field: value}))),
        )
        for field, value in {
            "prompt_input": "{system}{instruction}{input}",
            "prompt_no_input": "{instruction}",
            "answer_prefix": "\n",
            "system_form": "{system}",
            "system": "Be long.",
            "end": None,
        }.items()
    },
    "chat template": lambda t, d: [
        Renderer(with_chat(t, form), "chat") for form in (CHATML, LLAMA2)
    ],
    "system": lambda t, d: [
        Renderer(t, "chatml", system=system) for system in ("Be brief.", "Be long.")
    ],
    "no system": lambda t, d: (Renderer(t, "chatml", system="Be brief."), Renderer(t, "chatml")),
    "chat system": lambda t, d: [
        Renderer(with_chat(t, CHATML), "chat", system=system) for system in (None, "Be brief.")
    ],
    "tokenization": lambda t, d: [
        Renderer(t, "plain", tokenization=form) for form in ("joint", "apart")
    ],
    "others": lambda t, d: (
        Renderer(t, "plain"),
        Renderer(t, "plain", others={"x2x": Renderer(t, "gemma")}),
    ),
    "template of another": lambda t, d: [
        Renderer(t, "plain", others={"x2x": Renderer(t, name)}) for name in ("gemma", "llama")
    ],
    "component of another": lambda t, d: [
        Renderer(t, "plain", others={name: Renderer(t, "gemma")}) for name in ("x2x", "base")
    ],
}
SHOWN = (
    example(),
    example(input=""),
    example(messages=TURNS),
    Example("t", "text", "en", "en", "", "", "A City"),
    example("Name THE river"),
)


@pytest.mark.parametrize("part", RENDERERS)
def test_renderers_that_render_otherwise_have_another_hash(tokenizer, tmp_path, part):
    one, other = RENDERERS[part](tokenizer, tmp_path)
    texts = [
        [rendered.ids.tolist() for rendered in renderer.render_many(SHOWN)]
        for renderer in (one, other)
    ]
    assert texts[0] != texts[1]
    assert one.hash != other.hash


def test_renderers_that_are_made_alike_have_one_hash(tokenizer, tmp_path):
    """Also where the template's file lies elsewhere, or equals a built-in one."""
    for make in (
        lambda: Renderer(tokenizer, "alpaca"),
        lambda: Renderer(with_chat(tokenizer, CHATML), "chat"),
        lambda: Renderer(
            copy.deepcopy(tokenizer), "plain", others={"x2x": Renderer(tokenizer, "gemma")}
        ),
    ):
        assert make().hash == make().hash
    (tmp_path / "elsewhere").mkdir()
    names = [write(folder, json.dumps(FILE)) for folder in (tmp_path, tmp_path / "elsewhere")]
    assert len({Renderer(tokenizer, name).hash for name in names}) == 1
    plain = {field: getattr(TEMPLATES["plain"], field) for field in FILE}
    assert (
        Renderer(tokenizer, write(tmp_path, json.dumps(plain))).hash
        == Renderer(tokenizer, "plain").hash
    )


def test_renderers_travel_to_workers_unchanged(tokenizer):
    for name, renderer in {
        "alpaca": Renderer(tokenizer, "alpaca"),
        "chat": Renderer(with_chat(tokenizer, CHATML), "chat"),
    }.items():
        again = pickle.loads(pickle.dumps(renderer))
        assert np.array_equal(again.render(example()).ids, renderer.render(example()).ids), name


def test_settings_of_the_tokenizer_do_not_leak(tokenizer):
    clipped = copy.deepcopy(tokenizer)
    clipped.backend_tokenizer.enable_truncation(4)
    clipped.backend_tokenizer.enable_padding(length=500)
    for one, other in zip(
        *(
            Renderer(t, "alpaca").render_many([example(), example(output="Seine")])
            for t in (clipped, tokenizer)
        ),
        strict=True,
    ):
        assert np.array_equal(one.ids, other.ids) and len(one.ids) < 400


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t, d: Renderer(t, "alpacca"), "did you mean alpaca"),
        (lambda t, d: Renderer(t, "chat"), "the tokenizer has no chat template"),
        (lambda t, d: Renderer(t, "alpaca", system="S"), "template 'alpaca' has no place for it"),
        (lambda t, d: Renderer(t, write(d, "{oops")), "not JSON"),
        (
            lambda t, d: Renderer(t, write(d, '{"prompt_inptu": ""}')),
            "no 'prompt_inptu'; did you mean prompt_input",
        ),
        (
            lambda t, d: Renderer(
                t, write(d, '{"prompt_input": "{instruction}", "prompt_no_input": ""}')
            ),
            "prompt_no_input lacks {instruction}",
        ),
        (
            lambda t, d: Renderer(with_chat(t, CHATML), "chat", tokenization="apart"),
            "has no meaning for template 'chat'",
        ),
        (lambda t, d: load_tokenizer(str(d)), "no tokenizer can be read there"),
        (
            lambda t, d: Renderer(with_chat(t, "{{ raise_exception('no') }}"), "chat"),
            "template refuses the turns user",
        ),
        (
            lambda t, d: Renderer(with_chat(t, "{{ messages | length }}"), "chat"),
            "rewrites earlier turns",
        ),
    ],
)
def test_faults_of_templates_and_tokenizers(tokenizer, tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        make(tokenizer, tmp_path)


def write(folder, text) -> str:
    (folder / "template.json").write_text(text)
    return str(folder / "template.json")


@pytest.mark.parametrize("name", ["small", "llama2", "mistral"])
def test_counting_bytes_finds_the_same_border_as_offsets(tokenizers, name, shared):
    tokenizer, codes = (
        tokenizers[name],
        ("ar", "de", "el", "en", "es", "hi", "ru", "th", "tr", "vi", "zh"),
    )
    renderer = Renderer(tokenizer, "alpaca")
    files = [json.loads((shared / "xquad" / f"xquad.{code}.json").read_text()) for code in codes]
    texts = [file["data"][3]["paragraphs"][1] for file in files]
    examples = [
        example(paragraph["qas"][0]["question"], paragraph["context"], qa["answers"][0]["text"])
        for paragraph in texts
        for qa in paragraph["qas"]
    ]
    for result, one in zip(renderer.render_many(examples), examples, strict=True):
        (piece,) = renderer._split(one)
        encoding = renderer._tokenizer.encode(piece.text, add_special_tokens=False)
        ((start, stop),) = _find_tokens(encoding, piece)
        assert result.loss_mask.tolist() == [False] * (start + 1) + [True] * (stop - start + 1)
        assert result.ids[1:-1].tolist() == encoding.ids


@pytest.mark.parametrize("name", ["small", "llama2"])
def test_tokens_stand_for_the_bytes_of_the_text(tokenizers, name):
    """Every byte that UTF-8 has, in byte-level tokens and in those with byte fallback."""
    if name not in tokenizers:
        pytest.skip("real tokenizers in ../shared are not beside this checkout")
    text = "".join(
        map(chr, [*range(0x21, 0x800), 0x6CB3, 0x9EA4, 0xFFFD, *range(0x10000, 0x110000, 0x8081)])
    )
    renderer = Renderer(tokenizers[name], "gemma")
    tokens = [
        renderer.id_to_token(i) for i in tokenizers[name](text, add_special_tokens=False).input_ids
    ]
    found = b"".join(token_bytes(token, renderer.is_byte_level, False) for token in tokens)
    # Llama reads a text as if a space stood before it.
    assert found == b" " * (name == "llama2") + text.encode()
    assert (
        renderer.is_byte_level == (name == "small") and token_bytes("</s>", True, True) == b"</s>"
    )


def test_a_tokenizer_that_rewrites_text_falls_back_to_offsets(tokenizer):
    from tokenizers import normalizers

    rewriting = copy.deepcopy(tokenizer)
    rewriting.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()]
    )
    rendered = Renderer(rewriting, "gemma").render(example("¿Cuál es?", "", "París ñandú"))
    assert rewriting.decode(rendered.ids[rendered.loss_mask]) == "Paris nandu</s>"


def test_a_component_may_have_a_template_and_a_tag_of_its_own(tokenizer, parallel_file):
    components = (
        Component(kind="base", source="s"),
        Component(kind="en2x", source="s", tag="sentence"),
        Component(kind="trans", source="s", template="gemma", translate="x2en"),
    )
    config = Config(
        data=Data(
            sources=(Source(name="s", path=parallel_file),), components=components, template="llama"
        )
    )
    renderer = open_renderer(config, tokenizer)
    mixture = Mixture(config.data, load_corpora(config.data, 0), 0)
    own = {
        name: Renderer(tokenizer, "gemma" if name == "trans" else "llama")
        for name in ("base", "en2x", "trans")
    }
    for example, rendered in zip(mixture, renderer.render_many(list(mixture)), strict=True):
        assert np.array_equal(rendered.ids, own[example.component].render(example).ids)
        assert np.array_equal(rendered.ids, renderer.render(example).ids)
        assert ("Answer in" in example.instruction) == (example.component == "en2x")
    plain = Renderer(tokenizer, "llama")
    assert np.array_equal(renderer.render_prompt("Where?"), plain.render_prompt("Where?"))
    assert (
        renderer.hash != plain.hash and plain.hash == Renderer(tokenizer, "llama", others={}).hash
    )
    changed = dataclasses.replace(
        config.data, components=(components[0], Component(kind="en2x", source="s"), components[2])
    )
    assert Mixture(changed, mixture.corpora, 0).manifest()["hash"] != mixture.manifest()["hash"]


@pytest.mark.parametrize(
    ("system", "tokenization"), [("Be brief.", "joint"), (None, "apart"), ("Be brief.", "apart")]
)
def test_system_and_tokenization_reach_every_renderer_of_an_experiment(
    tokenizer, system, tokenization
):
    """That of training, those of components, and that of the benchmarks."""
    components = (
        Component(kind="base", source="s"),
        Component(kind="x2x", source="s", template="chatml"),
    )
    config = Config(
        data=Data(components=components, template="llama", system=system, tokenization=tokenization)
    )
    shared = {"system": system, "tokenization": tokenization}
    llama, chatml = (Renderer(tokenizer, name, **shared) for name in ("llama", "chatml"))
    training, asking = open_renderer(config, tokenizer), open_eval_renderer(config, tokenizer)
    one, other = example(), dataclasses.replace(example(), component="base")
    for renderer in (training, asking):
        assert np.array_equal(renderer.render_prompt("Where?"), llama.render_prompt("Where?"))
        for shown, expected in zip(
            renderer.render_many([one, other]),
            (chatml.render(one), llama.render(other)),
            strict=True,
        ):
            assert shown.ids.tolist() == expected.ids.tolist()
            assert shown.loss_mask.tolist() == expected.loss_mask.tolist()
    assert training.hash == asking.hash
    config.evaluation.template = "chatml"
    assert np.array_equal(
        open_eval_renderer(config, tokenizer).render_prompt("Where?"),
        chatml.render_prompt("Where?"),
    )
    assert open_renderer(config, tokenizer).hash == training.hash


@pytest.mark.parametrize("template", [*TEMPLATES, "chat"])
@pytest.mark.parametrize(
    ("output", "messages"),
    [
        ("", None),
        (" \n", None),
        ("", (("user", "one"), ("assistant", " "), ("user", "two"), ("assistant", ""))),
    ],
)
def test_an_answer_without_tokens_cannot_be_learned(tokenizer, template, output, messages):
    renderer = Renderer(with_chat(tokenizer, CHATML), template)
    with pytest.raises(RowFault, match="row 'r1': nothing to learn: the answer has no tokens"):
        renderer.render(example(output=output, messages=messages))
    if messages:  # one answer is enough
        some = (*messages[:3], ("assistant", "Sena"))
        assert "Sena" in tokenizer.decode(renderer.render(example(messages=some)).ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kind": "x2x", "template": "lama"},
            r"data.components\[0\].template='lama' is neither a file .* did you mean llama\?",
        ),
        (
            {"kind": "x2x", "tag": "inptu"},
            r"data.components\[0\].tag='inptu' is not one of .* did you mean input\?",
        ),
        ({"kind": "trans", "tag": "input"}, "has no effect on kind 'trans'"),
        ({"kind": "base", "tag": "input"}, "has no effect on kind 'base'"),
        ({"kind": "text", "template": "llama"}, "has no effect on kind 'text'"),
    ],
)
def test_a_component_s_template_and_tag_are_checked(tokenizer, settings, message):
    component = Component(source="s", **settings)
    config = Config(
        model=Model(path="m"), data=Data(sources=(Source(name="s"),), components=(component,))
    )
    with pytest.raises(UserError, match=message):
        open_renderer(check(config), tokenizer)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_added_tokens_beyond_the_embedding_are_refused_where_they_occur(tokenizer, template):
    """As in Gemma 3 1B, and in models whose padding token has no row of its own."""
    far = with_chat(tokenizer, BARE)
    rows = len(far)
    far.add_tokens(["<far>"])
    far.add_special_tokens({"pad_token": "<fill>"})
    renderer = Renderer(far, template, others={"other": Renderer(far, "alpaca")})
    assert renderer.pad_id == rows + 1
    renderer.check_embeddings(rows, "org/name")
    assert renderer.pad_id == renderer.end_id
    assert renderer.render(example()).ids.max() < rows
    for component in ("", "other"):
        row = dataclasses.replace(example(output="a <far> b"), component=component)
        with pytest.raises(
            RowFault, match=f"'r1': token without an embedding: <far> has id {rows}, of {rows} emb"
        ):
            renderer.render(row)
    renderer.check_embeddings(rows + 2, "org/name")
    assert renderer.render(example(output="a <far> b")).ids.max() == rows


@pytest.mark.parametrize("which", ["vocabulary", "eos_token"])
def test_a_tokenizer_of_another_model_is_refused(tokenizer, which):
    far, rows = copy.deepcopy(tokenizer), len(tokenizer)
    if which == "vocabulary":
        rows -= 1
    else:
        far.add_special_tokens({which: "<edge>"})
    renderer = Renderer(far, "plain")
    with pytest.raises(UserError, match=f"model.tokenizer=org/name: .* vocabulary has {rows}; use"):
        renderer.check_embeddings(rows, "org/name")
