"""Tuning: what is tried, what wins, and that training takes the proposal and no other's."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest

from crossin_jax import tune as tuning
from crossin_jax.config import Data, Lora, Mesh, Model, Train, UserError, replace_settings
from crossin_jax.plan import Phase
from crossin_jax.training.proposal import apply_proposal, write_proposal
from tests.conftest import REPOSITORY
from tests.parallel.tpu import topology
from tests.test_plan import ROWS, config_of


def test_the_compilers_cycles_decide(tmp_path, monkeypatch):
    """The compiler itself, on a few variants of a small model."""
    slice_ = topology("v5e:2x2")
    for name, values in {"REMATS": ("dots",), "CHUNKS": (), "TILES": ()}.items():
        monkeypatch.setattr(tuning, name, values)
    monkeypatch.setattr(tuning, "meshes", lambda _: [{"mesh.data": 1, "mesh.fsdp": 3, "mesh.tensor": 1}])
    config = dataclasses.replace(config_of(tmp_path), model=Model(path=str(tmp_path), remat="full"))
    lines = []
    best, (full, dots) = tuning.tune(config, slice_, lines.append)
    assert (full.change, dots.change) == ({}, {"model.remat": "dots"})
    assert best is min(full, dots, key=lambda trial: trial.cycles)
    assert full.phase.flops > dots.phase.flops and dots.kernels > 0 < dots.links
    assert dots.compiler == dots.phase.cycles and full.kernels > dots.kernels  # the kernel runs forward twice
    assert len(lines) == 3 and "mesh.fsdp=3" in lines[2] and "4 devices" in lines[2]
    assert "best so far" in lines[0] and all("Mcycles" in line for line in lines[:2])


def phase_of(config) -> Phase:
    """A made-up step: what remat keeps lies in memory and need not be computed again; micro-batches cost a little."""
    kept = tuning.REMATS.index(config.model.remat)
    temporary = (10 + 10 * kept) // config.train.accumulation
    cycles = 1000 - 50 * kept + 10 * config.train.accumulation + 100 * (config.mesh.tensor > 1)
    return Phase(5, temporary, 5 + temporary, 0, 0.0, 1.0, 0.0, 1.0, cycles, cycles, {"all-gather": 0.0}, {}, 1.0)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A configuration whose steps cost what `phase_of` says, and a slice of four chips."""
    tried = []

    def make_plan(config, *_):
        tried.append((config.model.remat, config.train.accumulation))
        return types.SimpleNamespace(phases={"train": phase_of(config)})

    monkeypatch.setattr(tuning, "make_plan", make_plan)
    monkeypatch.setattr(tuning, "peak_flops", lambda _: 1e12)
    chip = types.SimpleNamespace(clock=1.0, links=1.0)
    return config_of(tmp_path, train=Train(batch_size=16)), types.SimpleNamespace(
        devices=(None,) * 4, chip=chip, hbm_limit=50), tried


def test_a_policy_that_does_not_fit_is_tried_with_micro_batches(made_up):
    config, slice_, tried = made_up
    best, trials = tuning.tune(config, slice_, lambda _: None)
    # 46 of 50 may be used: the fourth policy takes 45, the next 55 and with two micro-batches 30, all of them 75 and 40
    assert replace_settings(config, best.change).model.remat == "none" and best.change["train.accumulation"] == 2
    assert max(trial.phase.peak_bytes for trial in trials if trial.fits) == 45
    assert (tuning.REMATS[4], 1) in tried and (tuning.REMATS[5], 1) not in tried and len(tried) == len(trials)
    assert best.cycles == min(trial.cycles for trial in trials)


def test_mesh_loss_chunk_and_tile_are_tried(made_up, monkeypatch):
    config, slice_, _ = made_up
    config.data.length = 2048

    def make_plan(config, *_):
        wanted = ((config.mesh.fsdp, config.mesh.tensor) == (2, 2), config.train.loss_chunk == 1024,
                  config.model.attention == "splash:1024")
        cycles = 1000.0 - 50 * sum(wanted)
        return types.SimpleNamespace(phases={"train": Phase(
            5, 5, 10, 0, 0.0, 1.0, 0.0, 1.0, cycles, cycles, {"all-gather": 0.0}, {}, 1.0)})

    monkeypatch.setattr(tuning, "make_plan", make_plan)
    best, _ = tuning.tune(config, slice_, lambda _: None)
    found = replace_settings(config, best.change)
    assert (found.mesh.fsdp, found.mesh.tensor, found.train.loss_chunk, found.model.attention) == (
        2, 2, 1024, "splash:1024")


def test_nothing_is_proposed_where_nothing_fits(made_up):
    config, slice_, _ = made_up
    slice_.hbm_limit = 6
    lines = []
    assert tuning.tune(config, slice_, lines.append)[0] is None and all("does not leave" in line for line in lines[:2])
    assert tuning.propose(config, slice_, None, lines.append) is None


@pytest.mark.parametrize(("change", "words"), [
    ({"lora": Lora(rank=8)}, "lora="), ({"train": Train(batch_size=2 * ROWS)}, "train.batch_size=16, tuned for 8"),
    ({"data": Data(length=512)}, "data.length=512"), ({"mesh": Mesh(fsdp=2)}, "mesh.fsdp=2, tuned for 4")])
def test_a_proposal_for_another_run_is_refused(tmp_path, change, words):
    config = config_of(tmp_path)
    write_proposal(tmp_path / "p.json", config, {"model.remat": "dots"})
    with pytest.raises(UserError, match=words):
        apply_proposal(tmp_path / "p.json", dataclasses.replace(config, **change))
    assert apply_proposal(tmp_path / "p.json", config).model.remat == "dots"


def test_a_proposal_for_another_model_or_a_file_of_another_kind_is_refused(tmp_path):
    config = config_of(tmp_path)
    write_proposal(tmp_path / "p.json", config, {"model.remat": "dots"})
    model = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(model | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match="num_layers=4, tuned for 3"):
        apply_proposal(tmp_path / "p.json", config)
    for text in ("{", "[]", '{"settings": {}}'):
        (tmp_path / "q.json").write_text(text)
        with pytest.raises(UserError, match="--tune --out"):
            apply_proposal(tmp_path / "q.json", config)
    (tmp_path / "q.json").write_text('{"settings": {"optim.learning_rate": 1}, "made_for": {}}')
    with pytest.raises(UserError, match="not tuned"):
        apply_proposal(tmp_path / "q.json", config)


def test_training_takes_a_proposal_with_one_flag(tmp_path):
    from tests.configs import tiny
    config = tiny.get_config()
    write_proposal(tmp_path / "p.json", config, {"model.remat": "q+k+v+attention", "mesh.fsdp": 4})
    command = [sys.executable, "-m", "crossin_jax.train", "--config=tests/configs/tiny.py", "--config.train.steps=2",
               f"--config.output_dir={tmp_path}/run", f"--tuned={tmp_path}/p.json"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ran = json.loads((tmp_path / "run/config.json").read_text())
    assert ran["model"]["remat"] == "q+k+v+attention" and ran["mesh"]["fsdp"] == 4
    refused = subprocess.run([*command, "--config.train.batch_size=16"], cwd=REPOSITORY, capture_output=True, text=True)
    assert refused.returncode == 2 and "tuned for 8" in refused.stderr and len(refused.stderr.splitlines()) <= 3
