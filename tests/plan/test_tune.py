"""Tuning: what is tried, what wins, and that training takes the proposal and no other's."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest

from crossin_jax.config import Data, Lora, Mesh, Model, Train, UserError
from crossin_jax.plan import tune as tuning
from crossin_jax.plan.plan import PROGRAMS, Phase, Plan
from crossin_jax.plan.proposal import apply_proposal, replace_settings, write_proposal
from tests.conftest import REPOSITORY
from tests.parallel.tpu import topology
from tests.plan.test_plan import ROWS, config_of


def test_the_compilers_cycles_decide(tmp_path, monkeypatch):
    """The compiler itself, on a few variants of a small model."""
    slice_ = topology("v5e:2x2")
    for name, values in {"REMATS": ("dots",), "CHUNKS": (), "TILES": ()}.items():
        monkeypatch.setattr(tuning, name, values)
    monkeypatch.setattr(
        tuning, "meshes", lambda _: [{"mesh.data": 1, "mesh.fsdp": 3, "mesh.tensor": 1}]
    )
    config = dataclasses.replace(config_of(tmp_path), model=Model(path=str(tmp_path), remat="full"))
    lines = []
    best, (full, dots) = tuning.tune(config, slice_, lines.append)
    assert (full.change, dots.change) == ({}, {"model.remat": "dots"})
    assert best is min(full, dots, key=lambda trial: trial.cycles)
    assert full.phase.flops > dots.phase.flops and dots.kernels > 0 < dots.links
    # The kernel runs forward twice.
    assert dots.compiler == dots.phase.cycles and full.kernels > dots.kernels
    assert len(lines) == 3 and "mesh.fsdp=3" in lines[2] and "4 devices" in lines[2]
    assert "best so far" in lines[0] and all("Mcycles" in line for line in lines[:2])


def phase_of(config) -> Phase:
    """A made-up step: what remat keeps lies in memory and need not be computed again; micro-batches
    cost a little.
    """
    kept = tuning.REMATS.index(config.model.remat)
    temporary = (10 + 10 * kept) // config.train.accumulation
    cycles = 1000 - 50 * kept + 10 * config.train.accumulation + 100 * (config.mesh.tensor > 1)
    return Phase(
        5,
        temporary,
        5 + temporary,
        0,
        0.0,
        1.0,
        0.0,
        1.0,
        cycles,
        cycles,
        {"all-gather": 0.0},
        {},
        1.0,
    )


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
    return (
        config_of(tmp_path, train=Train(batch_size=16)),
        types.SimpleNamespace(devices=(None,) * 4, chip=chip, hbm_limit=50),
        tried,
    )


def test_a_policy_that_does_not_fit_is_tried_with_micro_batches(made_up):
    config, slice_, tried = made_up
    best, trials = tuning.tune(config, slice_, lambda _: None)
    # 46 of 50 may be used: the fourth policy takes 45, the next 55 and with two micro-batches 30,
    # all of them 75 and 40
    assert (
        replace_settings(config, best.change).model.remat == "none"
        and best.change["train.accumulation"] == 2
    )
    assert max(trial.phase.peak_bytes for trial in trials if trial.fits) == 45
    assert (
        (tuning.REMATS[4], 1) in tried
        and (tuning.REMATS[5], 1) not in tried
        and len(tried) == len(trials)
    )
    assert best.cycles == min(trial.cycles for trial in trials)


def test_mesh_loss_chunk_and_tile_are_tried(made_up, monkeypatch):
    config, slice_, _ = made_up
    config.data.length = 2048

    def make_plan(config, *_):
        wanted = (
            (config.mesh.fsdp, config.mesh.tensor) == (2, 2),
            config.train.loss_chunk == 1024,
            config.model.attention == "splash:1024",
        )
        cycles = 1000.0 - 50 * sum(wanted)
        return types.SimpleNamespace(
            phases={
                "train": Phase(
                    5, 5, 10, 0, 0.0, 1.0, 0.0, 1.0, cycles, cycles, {"all-gather": 0.0}, {}, 1.0
                )
            }
        )

    monkeypatch.setattr(tuning, "make_plan", make_plan)
    best, _ = tuning.tune(config, slice_, lambda _: None)
    found = replace_settings(config, best.change)
    assert (found.mesh.fsdp, found.mesh.tensor, found.train.loss_chunk, found.model.attention) == (
        2,
        2,
        1024,
        "splash:1024",
    )


@pytest.mark.parametrize("limit", [20, 30, 47, 50, 60, 80])
def test_a_share_of_the_memory_stays_free(made_up, limit):
    """Every trial: it fits where it leaves 8 % of the memory, and only then has cycles."""
    config, slice_, _ = made_up
    slice_.hbm_limit = limit
    best, trials = tuning.tune(config, slice_, lambda _: None)
    for trial in trials:
        assert trial.fits == (trial.phase.peak_bytes <= 0.92 * limit), trial
        assert trial.fits == (trial.cycles < float("inf"))
    assert any(trial.phase.peak_bytes > 0.92 * limit for trial in trials)
    fitting = [trial.cycles for trial in trials if trial.fits]
    assert best.cycles == min(fitting)


def test_no_batch_is_cut_into_parts_that_do_not_divide_over_the_mesh(made_up):
    """16 rows over four shards make four micro-batches at most."""
    config, slice_, tried = made_up
    slice_.hbm_limit = 10  # eight micro-batches would need 5 + 10 // 8
    best, _ = tuning.tune(config, slice_, lambda _: None)
    assert {parts for _, parts in tried} == {1, 2, 4} and best.change["train.accumulation"] == 4


def phase_with(**changes) -> Phase:
    """A made-up step that fits, with some numbers changed."""
    sound = Phase(
        5, 5, 10, 0, 2.0, 1.0, 0.0, 1.0, 1000.0, 500.0, {}, {}, 1.0, waiting_seconds=(0.0, 0.0)
    )
    return dataclasses.replace(sound, **changes)


def test_cycles_are_those_of_compiler_kernels_and_links(made_up, monkeypatch):
    """The kernels' FLOPs at the chip's peak and a start for every tile; the lower waiting."""
    config, slice_, _ = made_up
    config.data.length = 2048
    slice_.chip = types.SimpleNamespace(clock=2e9)
    phase = phase_with(cycles=7e6, kernel_flops=6e9, waiting_seconds=(2e-3, 5e-3))
    monkeypatch.setattr(
        tuning, "make_plan", lambda *_: types.SimpleNamespace(phases={"train": phase})
    )
    _, trials = tuning.tune(config, slice_, lambda _: None)
    tiles = set()
    for trial in trials:
        changed = replace_settings(config, trial.change).model.attention
        tile = int(changed.partition(":")[2] or 512)
        tiles.add(tile)
        # one start of .35 microseconds for every 3 products of tile x tile x 128
        seconds = 6e9 / 1e12 + 6e9 / (3 * 2 * tile**2 * 128) * 0.35e-6
        assert (trial.compiler, trial.links) == (7e6, pytest.approx(2e-3 * 2e9))
        assert trial.kernels == pytest.approx(seconds * 2e9)
        assert trial.cycles == trial.compiler + trial.kernels + trial.links
    assert tiles == {512, 1024, 2048}


@pytest.mark.parametrize(
    ("part", "value"),
    [("cycles", 900.0), ("kernel_flops", 0.0), ("waiting_seconds", (0.0, 0.0))],
)
def test_each_part_of_the_cycles_can_decide(made_up, monkeypatch, part, value):
    """The mesh 2 x 2 wins where one part of its cycles is lower and the others are alike."""
    config, slice_, _ = made_up
    alike = {"cycles": 1000.0, "kernel_flops": 1e14, "waiting_seconds": (100.0, 100.0)}

    def make_plan(config, *_):
        wins = (config.mesh.fsdp, config.mesh.tensor) == (2, 2)
        phase = phase_with(**alike | ({part: value} if wins else {}))
        return types.SimpleNamespace(phases={"train": phase})

    monkeypatch.setattr(tuning, "make_plan", make_plan)
    best, _ = tuning.tune(config, slice_, lambda _: None)
    found = replace_settings(config, best.change).mesh
    assert (found.fsdp, found.tensor) == (2, 2)


def test_policies_are_tried_again_on_a_better_mesh(made_up, monkeypatch):
    """What keeps everything fits on the mesh 2 x 2 alone, which wins with what keeps nothing."""
    config, slice_, _ = made_up

    def make_plan(config, *_):
        is_better = (config.mesh.fsdp, config.mesh.tensor) == (2, 2)
        kept = tuning.REMATS.index(config.model.remat)
        room = 1 if is_better else 100
        cycles = 1000.0 - 100 * is_better - 10 * kept
        return types.SimpleNamespace(
            phases={
                "train": phase_with(
                    temporary_bytes=kept * room, peak_bytes=5 + kept * room, cycles=cycles
                )
            }
        )

    monkeypatch.setattr(tuning, "make_plan", make_plan)
    best, _ = tuning.tune(config, slice_, lambda _: None)
    found = replace_settings(config, best.change)
    assert (found.mesh.fsdp, found.mesh.tensor, found.model.remat) == (2, 2, "none")


@pytest.mark.parametrize(
    ("chips", "expected"),
    [
        (1, {(1, 1, 1)}),
        (4, {(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (1, 1, 4)}),
        (8, {(1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)}),
        (6, {(1, 6, 1), (2, 3, 1), (1, 3, 2)}),
    ],
)
def test_meshes_cover_all_chips(chips, expected):
    """Replicas, shards and tensor parallelism by powers of two; those without tensor go first."""
    found = [
        tuple(mesh.values())
        for mesh in tuning.meshes(types.SimpleNamespace(devices=(None,) * chips))
    ]
    assert set(found) == expected and len(found) == len(expected)
    assert [tensor for *_, tensor in found] == sorted(tensor for *_, tensor in found)
    # On two slices, data alone crosses from one to the other.
    twice = [types.SimpleNamespace(slice_index=i // chips) for i in range(2 * chips)]
    assert {
        (data // 2, fsdp, tensor)
        for data, fsdp, tensor in map(
            dict.values, tuning.meshes(types.SimpleNamespace(devices=twice))
        )
    } == expected


@pytest.mark.parametrize(
    ("length", "attention", "chunks", "tiles"),
    [
        (2048, "auto", {256, 512, 1024, 2048}, {512, 1024, 2048}),
        (1024, "auto", {256, 512, 1024}, {512, 1024}),
        (1536, "splash", {256, 512, 1024}, {512}),
        (2048, "reference", {256, 512, 1024, 2048}, set()),
        (200, "auto", set(), set()),
    ],
)
def test_chunks_and_tiles_are_those_that_fit_the_row(
    made_up, monkeypatch, length, attention, chunks, tiles
):
    """No chunk is longer than a row; a tile divides it, and only the kernel that has tiles."""
    config, slice_, _ = made_up
    config.data.length, config.model.attention = length, attention
    asked = []

    def make_plan(config, *_):
        asked.append((config.train.loss_chunk, config.model.attention))
        return types.SimpleNamespace(phases={"train": phase_with()})

    monkeypatch.setattr(tuning, "make_plan", make_plan)
    monkeypatch.setattr(tuning, "_try_remats", lambda _: None)
    config.train.loss_chunk = 7
    tuning.tune(config, slice_, lambda _: None)
    assert {chunk for chunk, _ in asked} == chunks | {7}
    named = {int(name.partition(":")[2]) for _, name in asked if ":" in name}
    assert named | ({512} & tiles) == tiles  # 512 is the kernel's own: it was tried at first


def test_a_proposal_is_what_won_and_the_plan_is_made_with_it(made_up, monkeypatch, tmp_path):
    """The file holds settings and trials; training takes the settings; the plan is the run's."""
    config, slice_, _ = made_up
    slice_.name = "v5e:2x2"
    planned, tried = [], tuning.make_plan

    def make_plan(config, topology, programs):
        if programs == ("train",):
            return tried(config)
        planned.append((config, programs))
        return Plan("v5e:2x2", 4, 1, 50, {}, True, {}, 0, 0, 0, 0, None, None, {})

    monkeypatch.setattr(tuning, "make_plan", make_plan)
    best, trials = tuning.tune(config, slice_, lambda _: None)
    plan = tuning.propose(config, slice_, str(tmp_path / "p.json"), lambda _: None)
    written = json.loads((tmp_path / "p.json").read_text())
    assert plan.change == written["settings"] == best.change and written["topology"] == "v5e:2x2"
    assert planned == [(replace_settings(config, best.change), PROGRAMS)]
    assert [
        (trial["settings"], trial["fits"], trial["cycles"], trial["peak_bytes"])
        for trial in written["trials"]
    ] == [
        (trial.change, trial.fits, trial.cycles if trial.fits else None, trial.phase.peak_bytes)
        for trial in trials
    ]
    assert apply_proposal(tmp_path / "p.json", config) == replace_settings(config, best.change)


def test_a_mesh_that_the_model_does_not_have_is_passed_over(made_up, monkeypatch):
    """The reason is told and the search goes on; a wrong configuration is refused as it is."""
    config, slice_, _ = made_up
    tried, lines = tuning.make_plan, []

    def make_plan(config, *rest):
        if config.mesh.tensor > 1:
            raise UserError("heads do not divide\nchoose another mesh")
        return tried(config, *rest)

    monkeypatch.setattr(tuning, "make_plan", make_plan)
    best, trials = tuning.tune(config, slice_, lines.append)
    assert replace_settings(config, best.change).mesh.tensor == 1 and len(trials) > 5
    refused = [line for line in lines if "heads do not divide" in line]
    assert len(refused) == 2 and all(line.endswith(": heads do not divide") for line in refused)
    config.mesh.tensor = 2
    with pytest.raises(UserError, match="heads do not divide"):
        tuning.tune(config, slice_, lines.append)


def test_nothing_is_proposed_where_nothing_fits(made_up):
    config, slice_, _ = made_up
    slice_.hbm_limit = 6
    lines = []
    assert tuning.tune(config, slice_, lines.append)[0] is None and all(
        "does not leave" in line for line in lines[:2]
    )
    assert tuning.propose(config, slice_, None, lines.append) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": Lora(rank=8)}, "lora="),
        ({"train": Train(batch_size=2 * ROWS)}, "train.batch_size=16, tuned for 8"),
        ({"data": Data(length=512)}, "data.length=512"),
        ({"mesh": Mesh(fsdp=2)}, "mesh.fsdp=2, tuned for 4"),
    ],
)
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


@pytest.mark.long
def test_training_takes_a_proposal_with_one_flag(tmp_path):
    from tests.configs import tiny

    config = tiny.get_config()
    write_proposal(tmp_path / "p.json", config, {"model.remat": "q+k+v+attention", "mesh.fsdp": 4})
    command = [
        sys.executable,
        "-m",
        "crossin_jax.train",
        "--config=tests/configs/tiny.py",
        "--config.train.steps=2",
        f"--config.output_dir={tmp_path}/run",
        f"--tuned={tmp_path}/p.json",
    ]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ran = json.loads((tmp_path / "run/config.json").read_text())
    assert ran["model"]["remat"] == "q+k+v+attention" and ran["mesh"]["fsdp"] == 4
    refused = subprocess.run(
        [*command, "--config.train.batch_size=16"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (
        refused.returncode == 2
        and "tuned for 8" in refused.stderr
        and len(refused.stderr.splitlines()) <= 3
    )
