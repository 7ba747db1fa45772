"""An exported model is asked, and ends its answers, as the run did: by our programs and by
transformers.
"""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import transformers
from tokenizers.processors import ByteLevel

from crossin_jax.checkpoint.hf import read_tensors
from crossin_jax.config import Config, Data, Evaluation, Lora, UserError
from crossin_jax.data.kinds import Example
from crossin_jax.data.pipeline import PROMPT_FILE, load_tokenizer, read_answer_ends, read_prompt
from crossin_jax.data.prompts import Renderer
from crossin_jax.data.templates import TEMPLATES
from crossin_jax.evaluate import settle_template
from crossin_jax.export import export, write_prompt
from crossin_jax.generation.chat import load_chat_model
from tests.checkpoint.runs import edit_config, make_run
from tests.data.test_chat_templates import ALTERNATES, DATED, DROPS_SYSTEM, REFUSES_SYSTEM, TURNS
from tests.parity.families import quiet

CUSTOM = {
    "prompt_input": 'Task: {instruction}\nText: {input}\nSay "it":',
    "prompt_no_input": '{system}Task: {instruction} {{é}}\nSay "it" \\n:',
    "system_form": "{system}\n",
    "system": "Be 'kind'.",
    "answer_prefix": " ",
}


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Folders of tokenizers: without BOS, with BOS, with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tokenizer.save_pretrained(folder / "bos")
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    bare.save_pretrained(folder / "bare")
    return folder


def reopen(source, data, folder):
    """The renderer of training, that of the folder as exported, and the folder's tokenizer in
    transformers.
    """
    renderer = Renderer(
        load_tokenizer(str(source)),
        data.template,
        system=data.system,
        tokenization=data.tokenization,
    )
    shutil.copytree(source, folder)
    config = dataclasses.make_dataclass("Config", ["data"])(data)
    write_prompt(folder, config, renderer)
    exported = load_tokenizer(str(folder))
    return renderer, Renderer(exported, **exported.prompt), exported


@pytest.mark.parametrize("form", ["bos", "bare"])
@pytest.mark.parametrize("tokenization", ["joint", "apart"])
@pytest.mark.parametrize("template", [*TEMPLATES, "custom"])
def test_transformers_asks_as_training_did(saved, form, template, tokenization, tmp_path):
    """For a question, for a chat with solved questions, and with the system prompt of the run."""
    if template == "custom":
        template = str(tmp_path / "mine.json")
        (tmp_path / "mine.json").write_text(json.dumps(CUSTOM))
    system = 'Be "brief".\n' if template in ("llama", "chatml") else None
    data = Data(template=template, system=system, tokenization=tokenization)
    renderer, again, exported = reopen(saved / form, data, tmp_path / "out")
    assert (again.hash, again.end_id) == (renderer.hash, renderer.end_id)
    for question in ("Name the river", "¿Qué?  ", "a{instruction}{{ b }}"):
        expected = renderer.render_prompt(question)
        np.testing.assert_array_equal(again.render_prompt(question), expected)
        chat = [{"role": "user", "content": question}]
        asked = exported.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert asked == expected.tolist()
    if tokenization == "joint":
        messages = (("system", "S"), ("user", "one"), ("assistant", "Seine"), ("user", "two"))
        solved = renderer.render(
            dataclasses.replace(EXAMPLE, messages=(*messages, ("assistant", "Sena")))
        )
        chat = [{"role": role, "content": text} for role, text in messages]
        chat.append({"role": "assistant", "content": "Sena"})
        assert exported.apply_chat_template(chat)["input_ids"] == solved.ids.tolist()


EXAMPLE = Example("r", "base", "en", "en", "", "", "")


@pytest.mark.parametrize("source", [TURNS, REFUSES_SYSTEM, DROPS_SYSTEM, ALTERNATES, DATED])
@pytest.mark.parametrize("system", [None, 'Be "brief".'])
def test_a_chat_template_keeps_its_system_prompt_and_its_date(saved, source, system, tmp_path):
    folder = shutil.copytree(saved / "bos", tmp_path / "base")
    (folder / "chat_template.jinja").write_text(source)
    (folder / "additional_chat_templates").mkdir()
    data = Data(template="chat", system=system)
    renderer, again, exported = reopen(folder, data, tmp_path / "out")
    expected = renderer.render_prompt("Hi").tolist()
    assert again.render_prompt("Hi").tolist() == expected
    chat = [{"role": "user", "content": "Hi"}]
    text = exported.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    bos = exported.bos_token  # the template writes none; training puts it first
    assert exported(bos + text, add_special_tokens=False).input_ids == expected
    if system:
        own = [{"role": "system", "content": "Own."}, *chat]
        text = exported.apply_chat_template(own, add_generation_prompt=True, tokenize=False)
        if source is TURNS:
            assert "Own." in text and system not in text


def test_the_token_that_ends_an_answer_is_eos_in_the_export(saved, tmp_path):
    """Where training ended answers with another token than the tokenizer's EOS."""
    _, again, exported = reopen(saved / "bos", Data(template="chatml"), tmp_path / "out")
    assert exported.eos_token == "<|im_end|>" and again.end_id == exported.eos_token_id == 4
    _, _, same = reopen(saved / "bos", Data(template="plain"), tmp_path / "same")
    assert same.eos_token == "</s>"


# ---- Whole exports


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    make_run(folder, "llama3.1", Lora(rank=2, alpha=2.0))
    (folder / "base" / "additional_chat_templates").mkdir()
    (folder / "base" / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    file = folder / "base" / "generation_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"eos_token_id": [7, 9], "max_length": 99}))
    return folder / "run"


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_an_exported_folder_is_asked_as_the_run(format, low_rank, tmp_path):
    """By `generate` without any flag; every end of an answer is known to it and to transformers."""
    out = export(low_rank, format, tmp_path / "out")
    run, exported = load_chat_model(str(low_rank)), load_chat_model(str(out))
    assert exported.renderer.hash == run.renderer.hash
    assert set(exported.engine.programs.eos) == set(run.engine.programs.eos) >= {7, 9}
    assert read_prompt(out)["template"] == run.renderer.template_name
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == "{{ documents }}"
    if format == "merged":
        generation = quiet(transformers.GenerationConfig.from_pretrained, out)
        assert generation.eos_token_id == list(run.renderer.eos_ids) == list(read_answer_ends(out))
        assert generation.max_length == 99
        config = json.loads((out / "config.json").read_text())
        assert config["eos_token_id"] == generation.eos_token_id
    on_base = (
        load_chat_model(str(low_rank.parent / "base"), adapter=str(out))
        if format == "peft"
        else run
    )
    assert on_base.renderer.hash == run.renderer.hash


MARKED = (
    "{% for m in messages %}w50 {{ m.content }} w51 {% endfor %}"
    "{% if add_generation_prompt %}w52{% endif %}"
)


@pytest.mark.parametrize("template", ["chat", "plain", "custom"])
def test_an_export_answers_as_its_run(template, low_rank, tmp_path):
    """Word for word, without any flag: in the model's own chat template and in the user's."""
    shutil.copytree(low_rank.parent, tmp_path / "all")
    base, run = tmp_path / "all/base", tmp_path / "all/run"
    (base / "chat_template.jinja").write_text(MARKED)
    name = template
    if template == "custom":
        name = str(tmp_path / "mine.json")
        (tmp_path / "mine.json").write_text(
            json.dumps(
                {"prompt_input": "{instruction} {input}", "prompt_no_input": "w9 {instruction}"}
            )
        )
    edit_config(run, 0, "model", path=str(base))
    edit_config(run, 0, "data", template=name)
    questions = [("w3 w5 w8", ""), ("w7", "w11"), ("w20 w21", "")]
    answers = {}
    for place in ("run", "merged", "peft"):
        folder = run if place == "run" else tmp_path / place
        if place != "run":
            export(run, place, folder, "float32" if place == "merged" else None)
        asked = load_chat_model(str(folder))
        assert asked.renderer.template_name != "alpaca"
        answers[place] = asked.answer(questions, max_new_tokens=6)
    assert answers["run"] == answers["merged"] == answers["peft"] and any(answers["run"])


def test_an_exported_model_is_evaluated_as_it_was_trained(low_rank, tmp_path):
    prompt = {"template": CUSTOM, "system": None, "tokenization": "joint"}
    (tmp_path / "mine.json").write_text(json.dumps(CUSTOM))
    asked = Config(data=Data(template=str(tmp_path / "mine.json")))
    settle_template(asked, prompt)
    settle_template(asked, {})
    for wrong in (prompt | {"template": "plain"}, prompt | {"tokenization": "apart"}):
        with pytest.raises(UserError, match="but the model was trained with"):
            settle_template(asked, wrong)
        settle_template(dataclasses.replace(asked, evaluation=Evaluation(template="plain")), wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"template": 3}, {"template": "nope"}, {"tokenization": "x"}, {"template": {"a": 1}}],
    ids=str,
)
def test_a_damaged_prompt_file_is_refused(wrong, tmp_path):
    (tmp_path / PROMPT_FILE).write_text(json.dumps({"template": "plain"} | wrong))
    with pytest.raises(UserError, match=r"prompt\.json"):
        read_prompt(tmp_path)


def scale_update(run, factor):
    """Settings under which the adapter of a run counts for a part."""
    edit_config(run, 0, "lora", alpha=2.0 * factor)


@pytest.mark.parametrize(
    ("factor", "dtype", "stored"),
    [
        (1.0, None, "BF16"),
        (1e-3, None, "F32"),
        (1e-3, "bfloat16", "BF16"),
        (1e-3, "float32", "F32"),
    ],
)
def test_a_small_update_is_not_rounded_away(
    factor, dtype, stored, low_rank, tmp_path, capsys, caplog
):
    """The ratio is printed at every merge; above a tenth the default is float32, and bfloat16
    warns.
    """
    run = shutil.copytree(low_rank, tmp_path / "run")
    shutil.copytree(low_rank.parent / "base", tmp_path / "base")
    edit_config(run, 0, "model", frozen_dtype="bfloat16")
    scale_update(run, factor)
    out = export(run, "merged", tmp_path / "out", dtype)
    assert {tensor.code for tensor in read_tensors(out).values()} == {stored}
    told = capsys.readouterr().out
    ratio = float(told.split("rounding error is ")[1].split()[0])
    lost = dtype == "bfloat16" or dtype is None and factor < 1
    assert (ratio > 0.1) == lost and ("written as float32" in told) == (lost and dtype is None)
    assert ("loses much" in caplog.text) == (dtype == "bfloat16")
