"""PEFT adapters: their logits are ours, ours are theirs, and a round trip keeps every bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from crossin_jax.checkpoint.hf import load_weights, read_spec, state_leaves
from crossin_jax.checkpoint.load import abstract_transformer, load_model
from crossin_jax.checkpoint.peft import CONFIG, WEIGHTS, load_adapter, read_adapter, save_adapter
from crossin_jax.config import Config, Lora, Mesh, Model, UserError
from crossin_jax.models.lora import resolve
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import abstract_model, abstract_state, model_spec, start_state
from tests.parity.adapters import ADAPTERS, load_peft, logits_of, make_adapter, quiet
from tests.parity.families import tiny_config

TOKENS = np.random.default_rng(0).integers(3, 97, (2, 24))


def load_state(base, adapter, lora=None):
    """(adapter file, state) of an adapter on its base."""
    file = read_adapter(adapter, read_spec(base), lora)
    _, state = abstract_transformer(file.spec, None, lora=file.lora, frozen_dtype="float32")
    state = load_weights(base, state, progress=False)
    return file, load_adapter(file, state, progress=False)


def add_base(adapter, base):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


@pytest.mark.parametrize("name", ADAPTERS)
def test_both_ways(tmp_path, name):
    base, adapter = make_adapter(tmp_path, name)
    add_base(adapter, base)
    wanted = logits_of(load_peft(base, adapter), TOKENS)
    ours = load_model(adapter, progress=False)
    assert np.abs(np.asarray(ours(TOKENS)) - wanted).max() <= 2e-4
    plain = load_model(base, progress=False)
    assert np.abs(np.asarray(plain(TOKENS)) - wanted).max() > 0.1  # the adapter matters

    file, state = load_state(base, adapter)
    save_adapter(tmp_path / "out", file.spec, file.lora, state, base=str(base), card="# Card\n", progress=False)
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}
    assert all(after[n].tobytes() == before[n].tobytes() for n in before)
    np.testing.assert_array_equal(logits_of(load_peft(base, tmp_path / "out"), TOKENS), wanted)

    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path / "out"))
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "peft_type", "task_type",
                  "base_model_name_or_path"):
        assert new[field] == old[field], field
    assert sorted(new["target_modules"]) == sorted(old["target_modules"])
    assert new.get("ensure_weight_tying", False) == old["ensure_weight_tying"]


@pytest.mark.parametrize("name, tied", [("tied_kept", True), ("tied_broken", False), ("tied_head_only", False),
                                        ("tied_embedding_only", False), ("tied_frozen", True)])
def test_an_adapter_says_whether_tied_embeddings_stay_tied(tmp_path, name, tied):
    base, adapter = make_adapter(tmp_path, name)
    file, state = load_state(base, adapter)
    assert read_spec(base).tie_embeddings and file.spec.tie_embeddings is tied
    leaves = state_leaves(state)
    assert ("lm_head/weight" in leaves) is not tied
    if name == "tied_embedding_only":  # the head stays the base's embedding
        np.testing.assert_array_equal(np.asarray(leaves["lm_head/weight"]),
                                      load_file(base / "model.safetensors")["model.embed_tokens.weight"])


@pytest.mark.parametrize("modules", [("embed_tokens", "norm"), ()])
def test_an_adapter_for_the_text_part_of_a_multimodal_model(tmp_path, modules):
    text = tiny_config("gemma3")
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                       attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    quiet(model.save_pretrained, tmp_path / "base")
    plain = load_model(tmp_path / "base", progress=False)
    assert np.abs(np.asarray(plain(TOKENS)) - logits_of(model, TOKENS)).max() <= 2e-4

    lora = resolve(Lora(rank=3, alpha=6.0, modules_to_save=modules), plain.spec)
    _, state = abstract_transformer(plain.spec, None, lora=lora, frozen_dtype="float32")
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else 0.1 * rng.standard_normal(
        leaf.shape).astype(np.float32), load_weights(tmp_path / "base", state, progress=False))
    save_adapter(tmp_path / "out", plain.spec, lora, state, base=str(tmp_path / "base"), multimodal=True,
                 progress=False)
    ours = np.asarray(load_model(tmp_path / "out", progress=False)(TOKENS))
    assert np.abs(ours - np.asarray(plain(TOKENS))).max() > 0.01
    with_adapter = quiet(peft.PeftModel.from_pretrained, model, tmp_path / "out")
    assert np.abs(ours - logits_of(with_adapter, TOKENS)).max() <= 2e-4
    assert not any("lora" in name for name, _ in with_adapter.named_parameters() if "vision" in name)


@pytest.mark.parametrize("name", ["two_targets", "tied_broken", "dora"])
def test_a_run_continues_from_an_adapter(tmp_path, name):
    base, adapter = make_adapter(tmp_path, name)
    file = read_adapter(adapter, read_spec(base))
    config = Config(model=Model(path=str(base), frozen_dtype="float32", compute_dtype="float32"),
                    lora=dataclasses.replace(file.lora, dropout=0.2))
    logits = np.asarray(start_model(config)(TOKENS))
    assert np.abs(logits - logits_of(load_peft(base, adapter), TOKENS)).max() <= 2e-4


def test_new_dora_adapters_start_from_the_base(tmp_path):
    base, _ = make_adapter(tmp_path, "dora")
    config = Config(model=Model(path=str(base), frozen_dtype="float32", compute_dtype="float32"),
                    lora=Lora(rank=2, use_dora=True))
    wanted = np.asarray(load_model(base, progress=False)(TOKENS))
    np.testing.assert_allclose(np.asarray(start_model(config)(TOKENS)), wanted, atol=2e-4)


def start_model(config):
    """The model of a run before its first step."""
    mesh, optimizer = make_mesh(Mesh(), jax.devices()[:1]), make_optimizer(config.optim, 1)
    model = abstract_model(config, model_spec(config), mesh)
    state = start_state(config, model, abstract_state(model, optimizer, mesh), optimizer)
    return nnx.merge(model.graphdef, state.trainable, state.frozen)


def test_settings_that_contradict_the_adapter_come_with_the_ones_that_do_not(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    right = Lora(rank=4, alpha=12.0, targets=("down_proj", "q_proj"), modules_to_save=(), dropout=0.3)
    file, _ = load_state(base, adapter, right)
    assert file.lora.dropout == 0.3 and file.lora.path == str(adapter)
    with pytest.raises(UserError) as error:
        load_state(base, adapter, Lora())
    assert str(error.value).split("\n")[1] == (
        "--config.lora.rank=4 --config.lora.alpha=12.0 --config.lora.targets=q_proj,down_proj "
        "--config.lora.modules_to_save=()")


def test_tied_modules_count_under_either_name(tmp_path):
    base, adapter = make_adapter(tmp_path, "tied_kept")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for modules in (("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")):
        load_state(base, adapter, Lora(rank=4, alpha=12.0, targets=targets, modules_to_save=modules))


def test_misfits_are_listed_with_shapes(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    tensors = load_file(adapter / WEIGHTS)
    prefix = "base_model.model.model.layers."
    del tensors[prefix + "0.self_attn.q_proj.lora_A.weight"]
    tensors[prefix + "1.mlp.down_proj.lora_B.weight"] = np.zeros((48, 5), np.float32)
    tensors["lm_head.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UserError) as error:
        load_state(base, adapter)
    assert str(error.value).split("\n")[1:] == [
        f"missing: {prefix}0.self_attn.q_proj.lora_A.weight (4, 48)",
        f"shape: {prefix}1.mlp.down_proj.lora_B.weight (48, 5) in the file, (48, 4) expected",
        "unknown: lm_head.weight (2, 2)"]


@pytest.mark.parametrize("change, words", [
    ({"peft_type": "IA3"}, "'IA3' is not supported"), ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
    ({"layers_to_transform": [0]}, "layers_to_transform"), ({"bias": "all"}, "bias='all'"),
    ({"init_lora_weights": "pissa"}, "'pissa' changes the base weights too"), ({"r": None}, "'r' is missing")])
def test_settings_of_peft_that_we_lack_are_refused_by_name(tmp_path, change, words):
    base, adapter = make_adapter(tmp_path, "two_targets")
    config = {k: v for k, v in {**json.loads((adapter / CONFIG).read_text()), **change}.items() if v is not None}
    (adapter / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=words) as error:
        load_state(base, adapter)
    assert str(adapter / CONFIG) in str(error.value)


def test_absent_and_pickled_adapters(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    with pytest.raises(UserError, match="base_model_name_or_path is missing"):
        config = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
        load_model(adapter)
    with pytest.raises(UserError, match="is a PEFT adapter, not a model; set lora.path"):
        shutil.copyfile(base / "config.json", adapter / "config.json")
        load_model(adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        load_state(base, adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS}: no such file"):
        load_state(base, adapter)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_state(base, tmp_path / "nowhere")
