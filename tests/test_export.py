"""The export program: transformers and peft load what it writes, with our logits; wrong requests
are one line.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from unittest import mock

import huggingface_hub
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from crossin_jax.checkpoint.hf import read_tensors, state_leaves
from crossin_jax.checkpoint.open import open_model
from crossin_jax.config import Lora, UserError
from crossin_jax.export import export, load_starts
from crossin_jax.generation.model import load_model
from crossin_jax.report.summary import Block, Estimate, Row
from crossin_jax.training.state import describe_precision
from tests.checkpoint.runs import (
    NEW,
    edit_config,
    make_run,
    read_trained,
    write_base,
    write_tokenizer,
)
from tests.conftest import REPOSITORY
from tests.parity.adapters import load_base, load_peft, logits_of
from tests.parity.families import quiet

TOKENS = np.random.default_rng(0).integers(3, 60, (8, 24))


def our_logits(run, **model):
    restored = open_model(run, progress=False, **model)
    return np.asarray(
        jax.jit(lambda state: nnx.merge(restored.graphdef, state)(TOKENS))(restored.state)
    )


def assert_same_weights(folder, run):
    """What `load_model` reads from an export is the run's model, bit by bit.

    Their logits are not compared: the two programs take their products in another order, and with
    equal weights they differ by up to 1.3e-5 at logits of 7.5, as XLA's flags and the CPU will.
    """
    loaded, restored = load_model(folder, progress=False), open_model(run, progress=False)
    assert loaded.spec == restored.spec
    ours, theirs = state_leaves(loaded.state), state_leaves(restored.state)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert np.asarray(leaf).tobytes() == np.asarray(theirs[path]).tobytes(), path


LORA = Lora(rank=3, alpha=5.0, dropout=0.1)


@pytest.mark.parametrize("family", ["llama3.1", None], ids=["imported", "from_scratch"])
def test_a_full_model(tmp_path, family):
    config = make_run(tmp_path, family)
    out = export(tmp_path / "run", "hf", tmp_path / "out")
    wanted = our_logits(tmp_path / "run")
    np.testing.assert_allclose(logits_of(load_base(out), TOKENS), wanted, atol=2e-4)
    assert_same_weights(out, tmp_path / "run")
    tokenizer = quiet(transformers.AutoTokenizer.from_pretrained, out)
    assert tokenizer("w3 w4").input_ids == [6, 7]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and ("max_new_tokens" in generation) is (
        family is not None
    )
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    card = (out / "README.md").read_text()
    for word in (
        "# tiny",
        "cafe0123",
        "beef4567",
        "jax 1.2.3",
        "x2x of world",
        "optim.learning_rate | 0.0002",
        "None recorded",
        config.model.path or "trained from random weights",
    ):
        assert word in card, word


@pytest.mark.parametrize("family", ["llama3.1", "gemma_2b"], ids=["untied", "tied"])
def test_an_adapter(tmp_path, family):
    make_run(tmp_path, family, LORA)
    (tmp_path / "run/evaluation").mkdir()
    scores = {name: Estimate(0.41234, 0.3, 0.5) for name in ("accuracy", "consistency_3", "AC3_3")}
    rows = [
        Row(arm, (0,), 150, scores, {}, {}, [], {}, {}, is_baseline=arm == "blind")
        for arm in ("tiny", "blind")
    ]
    blocks = [
        asdict(
            Block("cross_mmlu", "choices", tag, ("en", "zh", "vi", "es"), 150, 0.25, tuple(rows))
        )
        for tag in (None, "tagged")
    ]
    (tmp_path / "run/evaluation/results.json").write_text(
        json.dumps(
            {"runs": [{"name": "tiny", "provenance": {"model": {"step": 7}}}], "blocks": blocks}
        )
    )
    out = export(tmp_path / "run/checkpoints/0", "peft", tmp_path / "out")
    wanted = our_logits(tmp_path / "run")
    np.testing.assert_allclose(
        logits_of(load_peft(tmp_path / "base", out), TOKENS), wanted, atol=2e-4
    )
    assert peft.PeftConfig.from_pretrained(out).base_model_name_or_path == str(tmp_path / "base")
    assert_same_weights(out, tmp_path / "run")
    card = (out / "README.md").read_text()
    assert card.count("cross_mmlu") == 1
    estimate = "0.412 (0.300 to 0.500)"
    assert (
        f"| cross_mmlu | choices | en, zh, vi, es | 150 | tiny | 7 | {' | '.join([estimate] * 3)} |"
        in card
    )


@pytest.mark.parametrize(
    "family, lora",
    [
        ("llama3.1", LORA),
        ("gemma_2b", LORA),
        ("qwen2", Lora(rank=3, use_dora=True, use_rslora=True)),
    ],
)
def test_a_merged_model(tmp_path, family, lora):
    make_run(tmp_path, family, lora)
    out = export(tmp_path / "run", "merged", tmp_path / "out")
    wanted = our_logits(tmp_path / "run")
    np.testing.assert_allclose(logits_of(load_base(out), TOKENS), wanted, atol=2e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_and_its_exports_compute_in_one_precision(tmp_path, precision):
    """By "auto", whatever the device computes fast: that is for models that no run of ours made."""
    make_run(tmp_path, "llama3.1", LORA, frozen_dtype="bfloat16")
    run, base = tmp_path / "run", str(tmp_path / "base")
    edit_config(run, 0, "model", compute_dtype=precision)
    adapter = export(run, "peft", tmp_path / "adapter")
    merged = {
        dtype: export(run, "merged", tmp_path / dtype, dtype) for dtype in ("float32", "bfloat16")
    }
    open_auto = partial(open_model, dtype="auto", progress=False)
    opened = [open_auto(run), open_auto(adapter), open_auto(base, adapter=str(adapter))]
    opened.append(open_auto(merged["bfloat16"]))
    assert {model.config.model.compute_dtype for model in opened} == {precision}
    # What bfloat16 would round away again is computed in float32, as foreign models are here.
    for source in (merged["float32"], base):
        assert open_auto(source).config.model.compute_dtype == "float32"
    said = describe_precision(opened[1].config, opened[1].mesh)
    assert f"products in {precision}" in said


def test_a_sum_is_rounded_once(tmp_path):
    """In float32 the merged weights are exact sums whatever the frozen precision; bfloat16 is their
    rounding.
    """
    make_run(tmp_path, "llama3.1", LORA)
    edit_config(tmp_path / "run", 0, "model", frozen_dtype="nf4")
    export(tmp_path / "run", "merged", tmp_path / "wide", "float32")
    export(tmp_path / "run", "merged", tmp_path / "narrow")
    peft_merged = quiet(
        load_peft(
            tmp_path / "base", export(tmp_path / "run", "peft", tmp_path / "a")
        ).merge_and_unload
    )
    theirs = peft_merged.state_dict()
    from safetensors.torch import load_file

    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert all(tensor.code == "BF16" for tensor in read_tensors(tmp_path / "narrow").values())
    for name, tensor in wide.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
        if "proj" not in name:
            torch.testing.assert_close(narrow[name], tensor.bfloat16(), rtol=0, atol=0)
        else:  # the base was read as bfloat16 here: two roundings of half a step each
            torch.testing.assert_close(narrow[name].float(), tensor, rtol=2**-7, atol=2e-3)


# ---- what an export says of itself


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run that trained every weight, with checkpoints of steps 3 and 10."""
    folder = tmp_path_factory.mktemp("full")
    make_run(folder, steps=(3, 10), frozen_dtype="bfloat16")
    return folder / "run"


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory):
    """A LoRA run with a fractional alpha, a revision, a tokenizer of its own and steps 3 and 10."""
    folder = tmp_path_factory.mktemp("lora")
    tokenizer = write_tokenizer(folder / "tokenizer", first="x")
    make_run(
        folder,
        lora=Lora(
            rank=3,
            alpha=2.5,
            dropout=0.25,
            targets=("q_proj", "up_proj"),
            modules_to_save=("lm_head",),
        ),
        steps=(3, 10),
        revision="v1.2",
        tokenizer=str(tokenizer),
    )
    return folder / "run"


@pytest.mark.parametrize(
    "format, frozen, dtype, wanted",
    [
        ("hf", "bfloat16", None, "float32"),
        ("hf", "bfloat16", "float32", "float32"),
        ("hf", "bfloat16", "bfloat16", "bfloat16"),
        ("hf", "bfloat16", "float16", "float16"),
        ("merged", "float32", None, "float32"),
        ("merged", "bfloat16", None, "bfloat16"),
        ("merged", "nf4", None, "bfloat16"),
        ("merged", "float32", "bfloat16", "bfloat16"),
        ("merged", "bfloat16", "float16", "float16"),
        ("merged", "int8", "float32", "float32"),
    ],
)
def test_config_json_names_the_precision_of_the_weights(
    format, frozen, dtype, wanted, full, low_rank, tmp_path
):
    """Every tensor has the precision that was asked for, or the one that was trained or frozen."""
    source = full if format == "hf" else low_rank
    run = shutil.copytree(source, tmp_path / "run")
    edit_config(run, 10, "model", frozen_dtype=frozen)
    out = export(run, format, tmp_path / "out", dtype)
    codes = {tensor.code for tensor in read_tensors(out).values()}
    assert codes == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[wanted]}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == wanted
    assert transformers.AutoConfig.from_pretrained(out).dtype == getattr(torch, wanted)


@pytest.mark.parametrize("format", ["hf", "merged", "peft"])
@pytest.mark.parametrize("own", [True, False], ids=["own_tokenizer", "tokenizer_of_the_base"])
def test_an_export_carries_the_tokenizer_that_was_used(format, own, full, low_rank, tmp_path):
    run = shutil.copytree(full if format == "hf" else low_rank, tmp_path / "run")
    used = low_rank.parent / "tokenizer"
    edit_config(run, 10, "model", tokenizer=str(used) if own else None)
    out = export(run, format, tmp_path / "out")
    base = (full if format == "hf" else low_rank).parent / "base"
    assert (used / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes()
    source = used if own else base
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings.pop("chat_template") == (out / "chat_template.jinja").read_text()
    assert settings == json.loads((source / "tokenizer_config.json").read_text())
    loaded = quiet(transformers.AutoTokenizer.from_pretrained, out)
    assert loaded("x3" if own else "w3").input_ids == [6]


def test_the_rounding_of_modules_trained_in_full_counts(low_rank, tmp_path, capsys):
    """`lm_head` is trained beside the adapter: its update decides too if bfloat16 is enough."""
    opened = open_model(low_rank, progress=False)
    ((trained, start),) = load_starts(opened)
    np.testing.assert_array_equal(trained, read_trained(low_rank, 10)["lm_head/weight"])
    base = load_file(low_rank.parent / "base/model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(np.asarray(start).reshape(-1), base.reshape(-1))
    seen = []
    with mock.patch(
        "crossin_jax.models.lora.measure_rounding", lambda *given: seen.append(given) or 0.25
    ):
        export(low_rank, "merged", tmp_path / "out", "bfloat16")
    ((_, dtype, saved),) = seen
    assert (dtype, len(saved)) == ("bfloat16", 1) and "0.250" in capsys.readouterr().out


def test_an_exported_adapter_says_everything_that_peft_needs(low_rank, tmp_path):
    """Every field of peft's configuration: ours where the run sets it, peft's default elsewhere."""
    out = export(low_rank, "peft", tmp_path / "out")
    wanted = peft.LoraConfig(
        r=3,
        lora_alpha=2.5,
        lora_dropout=0.25,
        target_modules=["q_proj", "up_proj"],
        modules_to_save=["lm_head"],
        base_model_name_or_path=str(low_rank.parent / "base"),
        revision="v1.2",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    assert asdict(peft.PeftConfig.from_pretrained(out)) == asdict(wanted)
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 2.5
    wanted = our_logits(low_rank)
    theirs = logits_of(load_peft(low_rank.parent / "base", out), TOKENS)
    np.testing.assert_allclose(theirs, wanted, atol=2e-4)
    assert_same_weights(out, low_rank)
    card = (out / "README.md").read_text()
    assert f"| base model | {low_rank.parent / 'base'} at v1.2 |" in card
    for line in (
        "lora.rank | 3",
        "lora.alpha | 2.5",
        "lora.targets | q_proj, up_proj",
        "train.length | 1024",
        "optim.b2 | 0.999",
        "train.seed | 42",
        "train.epochs | 1.0",
    ):
        assert f"| {line} |" in card, line


@pytest.mark.parametrize("format", ["hf", "merged", "peft"])
@pytest.mark.parametrize("step", [3, 10, None])
def test_a_step_that_is_asked_for_is_the_one_that_is_written(
    format, step, full, low_rank, tmp_path
):
    """None: a run folder, which means its newest step."""
    run = full if format == "hf" else low_rank
    out = export(run / f"checkpoints/{step}" if step else run, format, tmp_path / "out")
    trained = read_trained(run, step or 10)
    tensor = ("base_model.model." if format == "peft" else "") + "lm_head.weight"
    file = "adapter_model.safetensors" if format == "peft" else "model.safetensors"
    np.testing.assert_array_equal(load_file(out / file)[tensor], trained["lm_head/weight"])
    other = read_trained(run, 3 if step != 3 else 10)
    assert not np.array_equal(trained["lm_head/weight"], other["lm_head/weight"])
    card = (out / "README.md").read_text()
    assert f"| step | {step or 10} |" in card
    assert f"| data manifest | data-of-{step or 10} |" in card


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_moved_run_of_a_new_model(tied, tmp_path):
    """It takes the tokenizer that moved with it; the head is written where it is one of its own."""
    architecture = dataclasses.replace(NEW, tie_embeddings=tied)
    make_run(tmp_path / "old", None, architecture=architecture)
    run = shutil.move(tmp_path / "old/run", tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    out = export(run, "hf", tmp_path / "out")
    assert not (tmp_path / "old").exists()
    assert (out / "tokenizer.json").read_bytes() == (
        tmp_path / "new/tokenizer/tokenizer.json"
    ).read_bytes()
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    trained, written = read_trained(tmp_path / "new", 0), load_file(out / "model.safetensors")
    assert ("lm_head.weight" in written) is ("lm_head/weight" in trained) is not tied
    for tensor, path in (
        ("model.embed_tokens.weight", "embed_tokens/weight"),
        ("lm_head.weight", "lm_head/weight"),
        ("model.norm.weight", "norm/weight"),
    ):
        if tensor in written:
            np.testing.assert_array_equal(written[tensor], trained[path])
    theirs = load_base(out)
    np.testing.assert_allclose(logits_of(theirs, TOKENS), our_logits(run), atol=2e-4)
    assert theirs.generation_config.eos_token_id == 2 and theirs.config.pad_token_id == 0


def test_settings_of_generation_come_from_the_base_or_else_from_its_config(full, tmp_path):
    """A base without generation_config.json is exported with the token ids of its config.json."""
    base = shutil.copytree(full.parent / "base", tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(
            values
            | {
                "bos_token_id": 1,
                "eos_token_id": [2, 5],
                "pad_token_id": None,
                "initializer_range": 0.5,
            }
        )
    )
    run = shutil.copytree(full, tmp_path / "run")
    edit_config(run, 10, "model", path=str(base))
    with_settings = export(run, "hf", tmp_path / "with")
    (base / "generation_config.json").unlink()
    without = export(run, "hf", tmp_path / "without")
    for out in (with_settings, without):
        config = json.loads((out / "config.json").read_text())
        assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 5])
        assert config["initializer_range"] == 0.5 and config.get("pad_token_id") is None
    read = [
        json.loads((out / "generation_config.json").read_text()) for out in (with_settings, without)
    ]
    assert read == [
        {"eos_token_id": 2, "max_new_tokens": 7},
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2, 5]},
    ]


def test_a_base_from_the_hub_is_asked_for_at_its_revision_and_named_by_its_id(
    low_rank, tmp_path, monkeypatch
):
    """Another revision has other weights; both reach the adapter's configuration and the card."""
    asked = []
    folders = {"v1.2": low_rank.parent / "base", "main": write_base(tmp_path / "main", "llama3.1")}

    def download(repo_id, *, revision, **_):
        asked.append((repo_id, revision))
        return str(folders[revision])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    run = shutil.copytree(low_rank, tmp_path / "run")
    edit_config(run, 10, "model", path="org/model")
    wanted = open_model(low_rank, progress=False).state
    found = open_model(run, progress=False)
    assert set(asked) == {("org/model", "v1.2")} and found.base == folders["v1.2"]
    for path, leaf in state_leaves(wanted).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(state_leaves(found.state)[path]))
    out = export(run, "peft", tmp_path / "out")
    written = json.loads((out / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("org/model", "v1.2")
    card = (out / "README.md").read_text()
    assert 'base_model: "org/model"' in card and "| base model | org/model at v1.2 |" in card


def test_a_base_is_named_as_given(low_rank, tmp_path, monkeypatch):
    """No path of this machine goes with an adapter that names its base by a relative one."""
    run = shutil.copytree(low_rank, tmp_path / "run")
    edit_config(run, 10, "model", path="base")
    monkeypatch.chdir(low_rank.parent)
    out = export(run, "peft", tmp_path / "out")
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "base"
    card = (out / "README.md").read_text()
    assert '\nbase_model: "base"\n' in card.split("---")[1]
    assert str(low_rank.parent) not in card + json.dumps(written)


def test_the_card_tells_languages_and_the_length_of_the_run(low_rank, tmp_path):
    """Steps where they were set, else epochs; a result that cannot be read is left out."""
    run = shutil.copytree(low_rank, tmp_path / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation/results.json").write_text("{")
    edit_config(run, 10, "train", steps=7, epochs=2.5, batch_size=24)
    edit_config(run, 10, "data", languages=["en", "vi"])
    card = (export(run, "peft", tmp_path / "a") / "README.md").read_text()
    for line in (
        'language: ["en", "vi"]',
        "| languages | en, vi |",
        "| train.steps | 7 |",
        "| train.batch_size | 24 |",
        'tags: ["crossin_jax", "lora"]',
        'library_name: "peft"',
        "None recorded",
    ):
        assert line in card.splitlines() or line in card, line
    assert "train.epochs" not in card
    edit_config(run, 10, "train", steps=None)
    card = (export(run, "merged", tmp_path / "b") / "README.md").read_text()
    assert "| train.epochs | 2.5 |" in card and "train.steps" not in card
    assert 'library_name: "transformers"' in card


def test_an_adapter_on_the_text_part_of_a_multimodal_base_is_told_apart(tmp_path):
    """The vision tower has projections of the same names: the text part is named in full."""
    make_run(tmp_path, "gemma3", Lora(rank=2, targets=("q_proj",), modules_to_save=()))
    for multimodal in (False, True):
        if multimodal:
            file = tmp_path / "base/config.json"
            text = json.loads(file.read_text())
            file.write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
        out = export(tmp_path / "run", "peft", tmp_path / f"out-{multimodal}")
        prefix = "base_model.model.model." + ("language_model." if multimodal else "")
        names = load_file(out / "adapter_model.safetensors").keys()
        assert all(name.startswith(f"{prefix}layers.") for name in names)
        targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
        path = f"model.{'language_model.' if multimodal else ''}layers.3.self_attn.q_proj"
        if not multimodal:
            assert targets == ["q_proj"]
            continue
        assert re.fullmatch(targets, path)
        assert not re.fullmatch(targets, "model.vision_tower.layers.3.self_attn.q_proj")


def test_requests_that_do_not_suit_the_run(tmp_path):
    make_run(tmp_path, "llama3.1", LORA)
    for format, dtype, words in (
        ("hf", None, "use --format=merged"),
        ("pft", None, "did you mean peft"),
        ("merged", "float64", "--dtype=float64 is not one of"),
        ("peft", "float32", "--dtype goes"),
    ):
        with pytest.raises(UserError, match=words):
            export(tmp_path / "run", format, tmp_path / "out", dtype)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(UserError, match="out: exists already"):
        export(tmp_path / "run", "merged", tmp_path / "out")
    full = tmp_path / "full"
    make_run(full, None)
    with pytest.raises(UserError, match="has no adapter; use --format=hf"):
        export(full / "run", "peft", tmp_path / "out")


@pytest.mark.parametrize("damaged", [False, True], ids=["nowhere", "damaged"])
def test_the_program_prints_one_line_for_a_fault(damaged, full, tmp_path):
    """Also for a checkpoint that lost arrays before their sizes were noted."""
    run, words = tmp_path / "nowhere", f"{tmp_path / 'nowhere'} does not exist"
    if damaged:
        run = shutil.copytree(full, tmp_path / "run")
        (run / "checkpoints/files.json").unlink()
        for file in (run / "checkpoints/10/state").glob("*/d/*"):
            file.unlink()
        words = f"{run / 'checkpoints/10'}: "
    command = [
        sys.executable,
        "-m",
        "crossin_jax.export",
        "--checkpoint",
        str(run),
        "--format",
        "hf",
        "--out",
        str(tmp_path / "out"),
    ]
    program = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert program.returncode == 2 and not (tmp_path / "out").exists()
    errors = [line for line in program.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {words}")
    assert not damaged or "parts are missing, truncated or changed, e.g. state/" in errors[0]
    assert len(program.stderr.splitlines()) == 1
