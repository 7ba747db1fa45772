"""The export program: transformers and peft load what it writes, with our logits; wrong requests are one line."""

import json
import subprocess
import sys
from dataclasses import asdict

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from crossin_jax import config as settings
from crossin_jax.checkpoint.hf import read_tensors
from crossin_jax.checkpoint.load import load_model
from crossin_jax.checkpoint.restore import restore_params
from crossin_jax.checkpoint.store import Store
from crossin_jax.config import Architecture, Component, Config, Lora, Model, Source, UserError
from crossin_jax.evaluation.summary import Block, Estimate, Row
from crossin_jax.export import export
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.state import abstract_model, load_base, model_spec
from crossin_jax.training.step import TrainState
from tests.conftest import REPOSITORY
from tests.parity.adapters import load_peft, logits_of, quiet
from tests.parity.families import tiny_config, torch_model

TOKENS = np.random.default_rng(0).integers(3, 60, (8, 24))
PROVENANCE = {"versions": {"jax": "1.2.3"}, "manifest": "cafe0123", "template": "beef4567", "commit": "0a1b2c",
              "device": "8 x cpu (cpu)"}


def write_tokenizer(folder):
    """A tokenizer of 60 words."""
    import tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(57))]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>",
                                         pad_token="<pad>").save_pretrained(folder)


def make_run(folder, family="llama3.1", lora=None, **model):
    """A run with one checkpoint of a base model whose trained weights all moved; returns its configuration."""
    base = folder / "base"
    if family:
        quiet(torch_model(tiny_config(family)).save_pretrained, base)
        write_tokenizer(base)
        (base / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 7}')
        model = Model(path=str(base), frozen_dtype="float32", compute_dtype="float32", **model)
    else:
        write_tokenizer(folder / "run/tokenizer")
        model = Model(compute_dtype="float32", architecture=Architecture(
            width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64, vocab_size=300))
    config = Config(name="tiny", output_dir=str(folder / "run"), model=model, lora=lora)
    config.data.sources, config.data.components = (Source(name="world"),), (Component(source="world", kind="x2x"),)
    mesh, rng = make_mesh(settings.Mesh(), jax.devices()[:1]), np.random.default_rng(3)
    abstract = abstract_model(config, model_spec(config), mesh)
    trainable = load_base(config, abstract.trainable)[0] if family else abstract.trainable

    def train(path, leaf):
        noise = 0.1 * rng.standard_normal(leaf.shape).astype(leaf.dtype)
        start = 1.0 if "norm" in str(path) or "magnitude" in str(path) else 0.0
        return jax.device_put(noise + (start if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)))

    trainable = jax.tree_util.tree_map_with_path(train, trainable)
    state = TrainState(jax.numpy.int32(0), jax.numpy.bool_(True), trainable, abstract.frozen, {})
    with Store(config.output_dir, config=config) as store:
        store.save(state, {}, PROVENANCE)
    return config


def our_logits(run, **model):
    restored = restore_params(run, progress=False, **model)
    return np.asarray(jax.jit(lambda state: nnx.merge(restored.graphdef, state)(TOKENS))(restored.state))


def load_torch(folder):
    return quiet(transformers.AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32,
                 attn_implementation="eager").eval()


LORA = Lora(rank=3, alpha=5.0, dropout=0.1)


@pytest.mark.parametrize("family", ["llama3.1", None], ids=["imported", "from_scratch"])
def test_a_full_model(tmp_path, family):
    config = make_run(tmp_path, family)
    out = export(tmp_path / "run", "hf", tmp_path / "out")
    wanted = our_logits(tmp_path / "run")
    np.testing.assert_allclose(logits_of(load_torch(out), TOKENS), wanted, atol=2e-4)
    np.testing.assert_allclose(np.asarray(load_model(out, progress=False)(TOKENS)), wanted, atol=1e-5)
    tokenizer = quiet(transformers.AutoTokenizer.from_pretrained, out)
    assert tokenizer("w3 w4").input_ids == [6, 7]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2 and ("max_new_tokens" in generation) is (family is not None)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    card = (out / "README.md").read_text()
    for word in ("# tiny", "cafe0123", "beef4567", "jax 1.2.3", "x2x of world", "optim.learning_rate | 0.0002",
                 "None recorded", config.model.path or "trained from random weights"):
        assert word in card, word


@pytest.mark.parametrize("family", ["llama3.1", "gemma_2b"], ids=["untied", "tied"])
def test_an_adapter(tmp_path, family):
    make_run(tmp_path, family, LORA)
    (tmp_path / "run/evaluation").mkdir()
    scores = {name: Estimate(0.41234, 0.3, 0.5) for name in ("accuracy", "consistency_3", "AC3_3")}
    rows = [Row(arm, (0,), 150, scores, {}, {}, [], {}, {}, is_baseline=arm == "blind") for arm in ("tiny", "blind")]
    blocks = [asdict(Block("cross_mmlu", "choices", tag, ("en", "zh", "vi", "es"), 150, 0.25, tuple(rows)))
              for tag in (None, "tagged")]
    (tmp_path / "run/evaluation/results.json").write_text(json.dumps(
        {"runs": [{"name": "tiny", "provenance": {"model": {"step": 7}}}], "blocks": blocks}))
    out = export(tmp_path / "run/checkpoints/0", "peft", tmp_path / "out")
    wanted = our_logits(tmp_path / "run")
    np.testing.assert_allclose(logits_of(load_peft(tmp_path / "base", out), TOKENS), wanted, atol=2e-4)
    assert peft.PeftConfig.from_pretrained(out).base_model_name_or_path == str(tmp_path / "base")
    np.testing.assert_allclose(np.asarray(load_model(out, progress=False)(TOKENS)), wanted, atol=1e-5)
    card = (out / "README.md").read_text()
    assert card.count("cross_mmlu") == 1
    estimate = "0.412 (0.300 to 0.500)"
    assert f"| cross_mmlu | choices | en, zh, vi, es | 150 | tiny | 7 | {' | '.join([estimate] * 3)} |" in card


@pytest.mark.parametrize("family, lora", [
    ("llama3.1", LORA), ("gemma_2b", LORA), ("qwen2", Lora(rank=3, use_dora=True, use_rslora=True))])
def test_a_merged_model(tmp_path, family, lora):
    make_run(tmp_path, family, lora)
    out = export(tmp_path / "run", "merged", tmp_path / "out")
    wanted = our_logits(tmp_path / "run")
    np.testing.assert_allclose(logits_of(load_torch(out), TOKENS), wanted, atol=2e-4)


def test_a_sum_is_rounded_once(tmp_path):
    """In float32 the merged weights are exact sums whatever the frozen precision; bfloat16 is their rounding."""
    make_run(tmp_path, "llama3.1", LORA)
    stored = tmp_path / "run/checkpoints/0/config/metadata"
    config = json.loads(stored.read_text())
    config["model"]["frozen_dtype"] = "nf4"
    stored.write_text(json.dumps(config))
    export(tmp_path / "run", "merged", tmp_path / "wide", "float32")
    export(tmp_path / "run", "merged", tmp_path / "narrow")
    peft_merged = quiet(load_peft(tmp_path / "base", export(tmp_path / "run", "peft", tmp_path / "a")).merge_and_unload)
    theirs = peft_merged.state_dict()
    from safetensors.torch import load_file

    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert all(tensor.code == "BF16" for tensor in read_tensors(tmp_path / "narrow").values())
    for name, tensor in wide.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
        if "proj" not in name:
            torch.testing.assert_close(narrow[name], tensor.bfloat16(), rtol=0, atol=0)
        else:  # the base was read as bfloat16 here: two roundings of half a step each
            torch.testing.assert_close(narrow[name].float(), tensor, rtol=2 ** -7, atol=2e-3)


def test_requests_that_do_not_suit_the_run(tmp_path):
    make_run(tmp_path, "llama3.1", LORA)
    for format, dtype, words in (
            ("hf", None, "use --format=merged"), ("pft", None, "did you mean peft"),
            ("merged", "float64", "--dtype=float64 is not one of"), ("peft", "float32", "--dtype goes")):
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


def test_the_program_prints_one_line_for_a_fault():
    command = [sys.executable, "-m", "crossin_jax.export", "--checkpoint", "nowhere", "--format", "hf", "--out", "x"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert run.returncode == 2
    assert run.stderr.startswith("error: nowhere holds no checkpoint") and len(run.stderr.splitlines()) == 1
