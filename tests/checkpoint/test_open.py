"""A run's model for use: trained weights of the step asked for, frozen ones of the base."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossin_jax.checkpoint.hf import is_adapter, load_weights, read_spec, state_leaves
from crossin_jax.checkpoint.open import open_model
from crossin_jax.config import Lora, Mesh, UserError
from crossin_jax.export import export
from crossin_jax.generation.model import load_model
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.state import abstract_model, load_base
from tests.checkpoint.abstract import abstract_transformer
from tests.checkpoint.runs import PROVENANCE, edit_config, make_run, read_trained, write_tokenizer
from tests.helpers import as_earlier_version

LORA = Lora(rank=2, targets=("q_proj", "down_proj"), modules_to_save=("lm_head",))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LoRA run with checkpoints of steps 9 and 10; do not write into it."""
    folder = tmp_path_factory.mktemp("restore")
    make_run(folder, lora=LORA, steps=(9, 10))
    return folder / "run"


def leaves_of(restored):
    return {path: np.asarray(leaf) for path, leaf in state_leaves(restored.state).items()}


@pytest.mark.parametrize("step", [9, 10, None])
def test_trained_weights_are_those_of_the_step_and_frozen_ones_those_of_the_base(step, run):
    """None: the run folder, which means its newest step, the largest number."""
    restored = open_model(run / f"checkpoints/{step}" if step else run, progress=False)
    step = step or 10
    assert (restored.run, restored.step, restored.base) == (run, step, run.parent / "base")
    assert restored.provenance == PROVENANCE | {"manifest": f"data-of-{step}"}
    assert restored.config.lora == LORA and len(restored.tokenizer) == 60
    trained, other = read_trained(run, step), read_trained(run, 19 - step)
    _, base = abstract_transformer(read_spec(run.parent / "base"), None)
    base = state_leaves(load_weights(run.parent / "base", base, progress=False))
    found = leaves_of(restored)
    assert {path for path in trained if is_adapter(path)} == trained.keys() - {"lm_head/weight"}
    assert found.keys() == trained.keys() | base.keys()
    for path, leaf in found.items():
        wanted = trained[path] if path in trained else np.asarray(base[path])
        assert leaf.tobytes() == wanted.tobytes(), path
        assert path not in other or leaf.tobytes() != other[path].tobytes(), path


def test_load_model_opens_what_the_programs_open(run, tmp_path):
    """A run, one of its steps, the adapter exported from it, and its configuration on that adapter:
    the same logits.
    """
    tokens = np.arange(12).reshape(2, 6)
    expected = load_model(run, progress=False)(tokens)
    assert expected.shape == (2, 6, 97) and expected.dtype == jnp.float32
    adapter = export(run, "peft", tmp_path / "adapter")
    config = open_model(run, progress=False).config
    on_adapter = replace(config, lora=replace(LORA, path=str(adapter)))
    for source in (run / "checkpoints/10", adapter, on_adapter):
        opened = open_model(source, dtype="float32", progress=False)
        np.testing.assert_allclose(opened(tokens), expected, atol=1e-5, err_msg=str(source))
        assert len(opened.tokenizer) == 60
    assert np.abs(load_model(run / "checkpoints/9", progress=False)(tokens) - expected).max() > 0.1
    with pytest.raises(UserError, match="is a run with weights of its own; export it first"):
        open_model(run, adapter=str(adapter))


def test_the_frozen_weights_of_a_run_that_began_with_an_adapter_come_from_the_base(run, tmp_path):
    """Its checkpoint has the adapter already: what `train` does when it continues such a run."""
    adapter = export(run, "peft", tmp_path / "adapter")
    opened = open_model(run, progress=False)
    config = replace(opened.config, lora=replace(LORA, path=str(adapter)))
    frozen = abstract_model(config, opened.spec, opened.mesh).frozen
    (found,) = load_base(config, frozen, progress=False)
    expected = state_leaves(opened.state)
    for path, leaf in state_leaves(found).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_settings_of_the_model_can_be_replaced(run):
    restored = open_model(run, progress=False, frozen_dtype="bfloat16", compute_dtype="bfloat16")
    assert restored.config.model.compute_dtype == "bfloat16"
    for path, leaf in state_leaves(restored.state).items():
        trained = is_adapter(path) or path == "lm_head/weight"
        assert leaf.dtype == (jnp.float32 if trained else jnp.bfloat16), path


@pytest.mark.parametrize(
    "stored, asked, shape",
    [
        (Mesh(fsdp=2), None, (4, 2, 1)),
        (Mesh(data=16), None, (1, 8, 1)),
        (Mesh(fsdp=2), Mesh(fsdp=4), (2, 4, 1)),
    ],
)
def test_the_mesh_is_the_one_asked_for_or_the_runs_or_one_that_fits(
    stored, asked, shape, run, tmp_path
):
    """A run of 16 devices is read onto 8, with its parameters in 8 parts."""
    folder = shutil.copytree(run, tmp_path / "run")
    edit_config(folder, 10, "mesh", **vars(stored))
    restored = open_model(folder, progress=False, mesh=asked and make_mesh(asked))
    assert tuple(restored.mesh.shape.values()) == shape
    wanted = leaves_of(open_model(run, progress=False))
    for path in ("layers/up_proj/weight", "lm_head/weight"):  # of the base, and trained
        leaf = state_leaves(restored.state)[path]
        assert leaf.sharding.mesh == restored.mesh and len(leaf.devices()) == jax.device_count()
        assert leaf.addressable_shards[0].data.size * shape[1] == leaf.size
        np.testing.assert_array_equal(np.asarray(leaf), wanted[path])


@pytest.mark.parametrize("left", ["nothing", "another_tokenizer"])
def test_a_moved_run_takes_the_tokenizer_beside_it(left, tmp_path):
    """Whatever lies where the run was; there, nothing is made."""
    make_run(tmp_path / "old", None)
    run = shutil.copytree(tmp_path / "old/run", tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    if left == "another_tokenizer":
        write_tokenizer(tmp_path / "old/run/tokenizer", first="x")
    before = sorted(tmp_path.rglob("*"))
    restored = open_model(run, progress=False)
    assert "w3" in restored.tokenizer.get_vocab() and restored.base is None
    assert restored.config.output_dir == str(run) and sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    edit_config(folder, 10, "lora", rank=3)
    with pytest.raises(
        UserError,
        match=r"checkpoints/10/state does not fit its own configuration: "
        r".*lora_.*: checkpoint \(.*\), model \(.*\) \(4 in all\)",
    ):
        open_model(folder, progress=False)
    edit_config(folder, 10, "lora", rank=2, targets=["q_proj", "k_proj", "down_proj"])
    with pytest.raises(UserError, match=r"k_proj/lora_.: checkpoint missing, .* \(2 in all\)"):
        open_model(folder, progress=False)
    open_model(folder / "checkpoints/9", progress=False)  # the other step is as it was


@pytest.mark.parametrize("damage", ["cut", "grown", "deleted"])
def test_damaged_weights_are_refused_and_other_steps_serve(damage, run, tmp_path):
    """The noted sizes tell before anything is read; a cut array might be read in silence."""
    folder = shutil.copytree(run, tmp_path / "run")
    state = folder / "checkpoints/10/state"
    file = max(state.glob("*/d/*"), key=lambda file: file.stat().st_size)
    data = file.read_bytes()
    file.unlink()
    if damage != "deleted":
        file.write_bytes(data[:-1] if damage == "cut" else data + b"\0")
    with pytest.raises(
        UserError,
        match="checkpoints/10: 1 parts are missing, truncated or changed, e.g. "
        f"{file.relative_to(state.parent)}; use another step",
    ):
        open_model(folder, progress=False)
    assert open_model(folder / "checkpoints/9", progress=False).step == 9


def test_an_unreadable_checkpoint_of_unknown_size_is_named(run, tmp_path):
    """A run that was killed before it noted the sizes."""
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "checkpoints/files.json").unlink()
    assert open_model(folder, progress=False).step == 10
    (folder / "checkpoints/10/state/_METADATA").unlink()
    with pytest.raises(UserError, match="checkpoints/10/state: unreadable checkpoint"):
        open_model(folder, progress=False)


def test_a_checkpoint_without_provenance_has_none(run, tmp_path):
    folder = as_earlier_version(shutil.copytree(run, tmp_path / "run"))
    file = folder / "checkpoints/10/provenance/metadata"
    file.write_text(json.dumps({"commit": "abc"}))
    assert open_model(folder, progress=False).provenance == {"commit": "abc"}
    file.unlink()
    assert open_model(folder, progress=False).provenance == {}
