"""The state before the first step: what is drawn, from which seed, and what is loaded as it is."""

import dataclasses

import jax
import numpy as np
import pytest

from crossin_jax.checkpoint.open import open_model
from crossin_jax.config import Config, Lora, Mesh, Model, UserError
from crossin_jax.export import export
from crossin_jax.models.lora import TARGETS
from crossin_jax.parallel.mesh import leaf_name, make_mesh
from crossin_jax.train import set_up, train
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import (
    abstract_model,
    abstract_state,
    describe_precision,
    model_spec,
    settle_precision,
    start_state,
    to_mesh,
)
from tests.helpers import config_in
from tests.test_train import read_arrays


def start(config: Config, **mesh) -> dict[str, np.ndarray]:
    """The arrays of the first state by name; those of moments begin with "moments/"."""
    device_mesh = make_mesh(Mesh(**mesh), None if mesh else jax.devices()[:1])
    model = abstract_model(config, model_spec(config), device_mesh)
    rule = make_optimizer(config.optim, 6)
    abstract = abstract_state(model, rule, device_mesh)
    with jax.set_mesh(device_mesh):
        state = start_state(config, model, abstract, rule)
    assert int(state.step) == 0 and bool(state.finite)
    trees = ("", state.trainable), ("", state.frozen), ("moments/", state.optimizer)
    return {
        prefix + leaf_name(path): np.asarray(leaf)
        for prefix, tree in trees
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def weights(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a state alone."""
    return {name: value for name, value in state.items() if not name.startswith("moments/")}


def test_every_drawn_weight_of_a_new_model_follows_the_seed(tmp_path):
    """Two seeds share no matrix, one is the same on every mesh; norms and moments are constant."""
    one, other = (start(config_in(tmp_path, seed=seed)) for seed in (1, 2))
    again = start(config_in(tmp_path, seed=1), fsdp=4, tensor=2)
    for name, value in one.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
        if name.startswith("moments/"):
            assert not value.any() and not other[name].any(), name
        elif "norm" in name:
            assert (value == 1).all() and (other[name] == 1).all(), name
        else:
            assert (value != other[name]).mean() > 0.99, name
    matrices = [value for name, value in weights(one).items() if "norm" not in name]
    for i, a in enumerate(matrices):  # no two are drawn alike either, where they have one shape
        for b in matrices[i + 1 :]:
            assert a.shape != b.shape or (a != b).mean() > 0.99


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_fresh_adapter_follows_the_seed_and_the_base_does_not(changes, pretrained, tmp_path):
    """lora_a is drawn by the seed with peft's bound, lora_b is zero, everything else is loaded."""
    base = start(config_in(tmp_path, str(pretrained / "model"), lora=None))
    lora = Lora(rank=4, modules_to_save=(), **changes)
    states = [
        start(config_in(tmp_path, str(pretrained / "model"), lora=lora, seed=seed))
        for seed in (1, 2)
    ]
    one, other = map(weights, states)
    for module in TARGETS:
        a, b, weight = (one[f"layers/{module}/{kind}"] for kind in ("lora_a", "lora_b", "weight"))
        assert (a != other[f"layers/{module}/lora_a"]).mean() > 0.99, module
        assert (a[0] != a[1]).mean() > 0.99, module  # every layer its own
        bound = a[0, 0].size ** -0.5  # of as many inputs
        assert 0.9 * bound < np.abs(a).max() <= bound and abs(a.mean()) < 0.2 * bound, module
        assert not b.any() and not other[f"layers/{module}/lora_b"].any(), module
        if changes:
            inputs = tuple(range(weight.ndim - a.ndim + 2, weight.ndim))
            np.testing.assert_allclose(
                one[f"layers/{module}/magnitude"], np.sqrt((weight**2).sum(inputs)), rtol=1e-5
            )
    for name, value in weights(base).items():
        np.testing.assert_array_equal(value, one[name], err_msg=name)
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    assert one.keys() - base.keys() == {
        f"layers/{module}/{kind}"
        for module in TARGETS
        for kind in ("lora_a", "lora_b", *["magnitude"] * bool(changes))
    }


def test_a_continued_adapter_is_loaded_as_it_is(adapted, pretrained, tmp_path):
    """An adapter that lora.path names starts as the run that made it ended, whatever the seed."""
    export(adapted, "peft", tmp_path / "adapter")
    config = config_in(tmp_path, str(pretrained / "model"))
    lora = dataclasses.replace(config.lora, path=str(tmp_path / "adapter"))
    one, other = (
        weights(start(dataclasses.replace(config, lora=lora, seed=seed))) for seed in (1, 2)
    )
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    for name, value in read_arrays(adapted, 6).items():
        if name.startswith("trainable/"):
            np.testing.assert_array_equal(one[name.removeprefix("trainable/")], value, err_msg=name)


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_batch_lies_on_the_mesh_by_rows(axes):
    """Every device has whole rows, in the order of data and fsdp; tensor has copies."""
    mesh = make_mesh(Mesh(**axes))
    batch = {
        "tokens_BT": np.arange(48, dtype=np.int32).reshape(16, 3),
        "loss_mask_BT": np.arange(48).reshape(16, 3) % 2 == 0,
    }
    placed = to_mesh(batch, mesh)
    assert placed.keys() == batch.keys()
    parts = 8 // axes.get("tensor", 1)
    order = {device: i for i, device in enumerate(mesh.devices.reshape(parts, -1)[:, 0])}
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows)
        for shard in placed[name].addressable_shards:
            assert shard.data.shape == (16 // parts, 3)
            if shard.device in order:
                i = order[shard.device] * (16 // parts)
                np.testing.assert_array_equal(shard.data, rows[i : i + 16 // parts])


def test_rows_longer_than_the_context_are_announced_before_the_run(tmp_path, caplog):
    """Not rows as long as the context; and the run is set up all the same."""
    config = config_in(tmp_path)
    config.model.architecture = dataclasses.replace(config.model.architecture, max_length=64)
    for length, is_said in ((64, False), (65, True)):
        caplog.clear()
        longer = dataclasses.replace(config, data=dataclasses.replace(config.data, length=length))
        assert set_up(longer, tmp_path).num_steps > 0
        said = "data.length=65 is longer than the context of the model, 64 tokens"
        assert (said in caplog.text) == is_said


# ---- The precision "auto"


@pytest.mark.parametrize("has_steps", [True, False])
def test_auto_is_the_precision_of_the_run_that_goes_on_else_the_devices(has_steps, tmp_path):
    """A run that moves to another machine computes as it began; what one names is left alone."""
    if has_steps:
        (tmp_path / "checkpoints/3/state").mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"model": {"compute_dtype": "bfloat16"}}')
    auto, named = Config(), Config(model=Model(compute_dtype="float32"))
    settled = settle_precision(auto, tmp_path)
    assert settled.model.compute_dtype == ("bfloat16" if has_steps else "float32")
    assert settle_precision(auto, None).model.compute_dtype == "float32"
    assert settle_precision(named, tmp_path) == named
    (tmp_path / "config.json").write_text('{"model": ')
    assert settle_precision(auto, tmp_path).model.compute_dtype == "float32"


def test_every_program_computes_in_the_same_precision_and_says_so(adapted):
    """Of a run its own, of a folder the device's; the log and the records name it."""
    run = open_model(adapted, dtype="auto")
    assert run.config.model.compute_dtype == "float32"
    folder = open_model(run.config.model.path, dtype="auto")
    assert folder.config.model.compute_dtype == folder.config.model.param_dtype == "float32"
    assert open_model(adapted, dtype="bfloat16").config.model.compute_dtype == "bfloat16"
    said = describe_precision(run.config, run.mesh)
    assert "cpu: products in float32, frozen weights in float32" in said
    assert run.provenance["precision"] == "float32"
    with pytest.raises(UserError, match="auto, float32 or bfloat16"):
        open_model(adapted, dtype="float16")


# ---- Settings from Python


def test_a_run_from_python_may_name_languages_in_any_way(tmp_path, monkeypatch):
    """`train(config)` checks its settings as the command line does, before it makes a folder."""
    seen = []

    def look(config, folder):
        seen.append(config.data.languages)
        raise KeyboardInterrupt

    monkeypatch.setattr("crossin_jax.train.set_up", look)
    config = config_in(tmp_path / "run")
    config.data = dataclasses.replace(config.data, languages=("English", "zho_Hans", "español"))
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert seen == [("en", "zh", "es")]
    for changes in ({"languages": ("Englisch?",)}, {"length": -1}):
        config = config_in(tmp_path / "refused")
        config.data = dataclasses.replace(config.data, **changes)
        with pytest.raises(UserError, match=f"data.{next(iter(changes))}"):
            train(config)
    assert not (tmp_path / "refused").exists()
