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

from crossin_jax.checkpoint.hf import read_tensors, state_leaves
from crossin_jax.checkpoint.load import load_model
from crossin_jax.checkpoint.restore import restore_params
from crossin_jax.config import Lora, UserError
from crossin_jax.evaluation.summary import Block, Estimate, Row
from crossin_jax.export import export
from tests.checkpoint.runs import edit_config, make_run
from tests.conftest import REPOSITORY
from tests.parity.adapters import load_peft, logits_of, quiet

TOKENS = np.random.default_rng(0).integers(3, 60, (8, 24))


def our_logits(run, **model):
    restored = restore_params(run, progress=False, **model)
    return np.asarray(jax.jit(lambda state: nnx.merge(restored.graphdef, state)(TOKENS))(restored.state))


def load_torch(folder):
    return quiet(transformers.AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float32,
                 attn_implementation="eager").eval()


def assert_same_weights(folder, run):
    """What `load_model` reads from an export is the run's model, bit by bit.

    Their logits are not compared: the two programs take their products in another order, and with
    equal weights they differ by up to 1.3e-5 at logits of 7.5, as XLA's flags and the CPU will.
    """
    loaded, restored = load_model(folder, progress=False), restore_params(run, progress=False)
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
    np.testing.assert_allclose(logits_of(load_torch(out), TOKENS), wanted, atol=2e-4)
    assert_same_weights(out, tmp_path / "run")
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
    assert_same_weights(out, tmp_path / "run")
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
    edit_config(tmp_path / "run", 0, "model", frozen_dtype="nf4")
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
