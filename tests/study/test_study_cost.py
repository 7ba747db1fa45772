"""What a study's cells need on disk and per chip, against sums by hand; nothing is compiled."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

from crossin_jax.config import Cell, Config, Study
from crossin_jax.study import cost as costs
from crossin_jax.study.cost import estimate_costs, print_costs
from tests.helpers import config_in
from tests.test_fields import change

WIDTH, FF, LAYERS, HEADS, KV_HEADS, VOCAB, RANK = 32, 48, 2, 4, 2, 400, 4  # tests/configs/tiny.py
KV = WIDTH // HEADS * KV_HEADS
EMBEDDING, NORMS = VOCAB * WIDTH, (2 * LAYERS + 1) * WIDTH
PROJECTIONS = {
    "q": (WIDTH, WIDTH),
    "k": (WIDTH, KV),
    "v": (WIDTH, KV),
    "o": (WIDTH, WIDTH),
    "gate": (WIDTH, FF),
    "up": (WIDTH, FF),
    "down": (FF, WIDTH),
}
WHOLE = EMBEDDING + NORMS + LAYERS * sum(a * b for a, b in PROJECTIONS.values())
ADAPTER = LAYERS * RANK * sum(a + b for a, b in PROJECTIONS.values())


def new(**changes) -> Config:
    """A small model from random weights."""
    return changed(config_in(Path("new"), seed=1), changes)


def tuned(**changes) -> Config:
    """An adapter on the model that the cell "new" trains."""
    return changed(config_in(Path("tuned"), "new/model", seed=1), changes)


def changed(config: Config, changes: dict) -> Config:
    for path, value in changes.items():
        change(config, path.replace("__", "."), value)
    return config


def costs_of(*cells: Cell, **options) -> list:
    """The costs of cells after that of the small model."""
    first = Cell(name="new", config=new(), exports=True)
    return estimate_costs(
        Study(name="costs", output_dir="out", cells=(first, *cells)), slice(1, None), **options
    )


def disk_of(config: Config, *, needs=(), **cell) -> int:
    (cost,) = costs_of(Cell(name="cell", config=config, needs=needs, **cell))
    return cost.disk


KEPT = [
    ({"train__keep": 1}, 2),
    ({"train__keep": 3}, 4),
    ({"train__checkpoint_every": None}, 1),
    ({"train__checkpoint_every": None, "train__keep": 5}, 1),
]


@pytest.mark.parametrize(("changes", "checkpoints"), KEPT)
def test_disk_holds_the_kept_checkpoints_and_the_one_being_written(changes, checkpoints):
    """Each has the trained weights and AdamW's two moments in float32; an exported model comes on
    top.
    """
    disk = disk_of(new(**changes))
    # And a few counters.
    assert disk == pytest.approx(checkpoints * 3 * 4 * WHOLE, abs=checkpoints * 16)
    assert disk_of(new(**changes), exports=True) == disk + 4 * WHOLE
    disk = disk_of(tuned(**changes), needs=("new",))
    assert disk == pytest.approx(checkpoints * 3 * 4 * ADAPTER, abs=checkpoints * 16)
    assert disk_of(tuned(**changes), needs=("new",), exports=True) == disk + 4 * (WHOLE + ADAPTER)


BYTES = [  # bytes per trained parameter in a checkpoint
    ({}, 12),
    ({"optim__moments_dtype": "bfloat16"}, 10),
    ({"optim__name": "lion"}, 8),
    ({"optim__name": "lion", "optim__moments_dtype": "bfloat16"}, 6),
]


@pytest.mark.parametrize(("changes", "num_bytes"), BYTES)
def test_disk_follows_the_optimizer(changes, num_bytes):
    """Lion has one moment, AdamW two; the first may be in bfloat16."""
    assert disk_of(new(**changes)) == pytest.approx(4 * num_bytes * WHOLE, abs=64)


DIFFERENT = {
    "new": [
        {"model__architecture__width": 64},
        {"model__param_dtype": "bfloat16"},
        {"train__keep": 1},
        {"train__checkpoint_every": None},
        {"optim__name": "lion"},
        {"optim__moments_dtype": "bfloat16"},
    ],
    "tuned": [
        {"lora__rank": 2},
        {"lora__targets": ("q_proj",)},
        {"lora__modules_to_save": ("embed_tokens",)},
        {"lora__use_dora": True},
    ],
}


def test_cells_that_share_an_estimate_have_the_same_one_alone():
    """Each cell's disk is that of a study with this cell alone, and another than its base's."""
    cells = [
        Cell(
            name=f"{base} {i}",
            config={"new": new, "tuned": tuned}[base](**changes),
            needs=("new",) * (base == "tuned"),
        )
        for base, several in DIFFERENT.items()
        for i, changes in enumerate([{}, *several])
    ]
    together = [cost.disk for cost in costs_of(*cells)]
    assert together == [costs_of(cell)[0].disk for cell in cells]
    count = 1 + len(DIFFERENT["new"])
    assert all(
        disk != some[0] for some in (together[:count], together[count:]) for disk in some[1:]
    )


def plan_of(config: Config) -> tuple[int, float]:
    """Made-up bytes and seconds that depend on everything that a step's memory and time
    depend on.
    """
    parts = [
        config.data.length,
        config.data.packing,
        config.train.batch_size,
        config.train.accumulation,
        config.train.loss_chunk,
        repr(config.model),
        repr(config.lora),
        repr(config.mesh),
        config.optim.name,
        config.optim.moments_dtype,
    ]
    number = int.from_bytes(repr(parts).encode(), "big") % 999_983
    return number, 1.0 + number % 977


@pytest.fixture
def planned(monkeypatch):
    """The configurations that were planned; plans are made up."""
    asked = []

    def plan(config, topology, programs):
        assert (topology.name, programs) == ("v5e:2x2", ("train",))
        asked.append(copy.deepcopy(config))
        number, seconds = plan_of(config)
        step = SimpleNamespace(peak_bytes=number, floor_seconds=seconds)
        return SimpleNamespace(fits=number % 2 == 0, phases={"train": step})

    monkeypatch.setattr(costs, "make_plan", plan)
    return asked


PLANNED = [
    {},
    {"data__length": 64},
    {"data__packing": False},
    {"train__batch_size": 16},
    {"train__accumulation": 2},
    {"train__loss_chunk": 8},
    {"model__remat": "full"},
    {"model__compute_dtype": "bfloat16"},
    {"model__attention": "reference"},
    {"mesh__fsdp": 2},
    {"optim__name": "lion"},
    {"optim__moments_dtype": "bfloat16"},
    {"model__architecture__num_layers": 3},
]
SAME = [
    {"seed": 5},
    {"optim__learning_rate": 1.0},
    {"name": "x"},
    {"train__steps": 3},
    {"train__log_every": 7},
]


def test_every_cell_has_the_plan_of_its_own_step(planned):
    """Cells with other shapes, precision, optimizer or mesh are planned apart, others once."""
    cells = [
        Cell(name=str(i), config=new(**changes)) for i, changes in enumerate([*PLANNED, *SAME])
    ]
    for cell, cost in zip(
        cells, costs_of(*cells, topology=SimpleNamespace(name="v5e:2x2")), strict=True
    ):
        number, seconds = plan_of(cell.config)
        assert (cost.hbm, cost.fits) == (number, number % 2 == 0), cell.config
        if cell.config.data.packing:
            assert cost.hours == pytest.approx(seconds * cell.config.train.steps / 3600)
    unpacked = sum(not config.data.packing for config in planned)
    assert len(planned) - unpacked == len(PLANNED) - 1 and unpacked in (1, 2)


@pytest.mark.parametrize(
    ("changes", "budget", "length", "is_known"),
    [
        ({"train__steps": 7}, None, "7 steps", True),
        ({"train__steps": 7}, "tokens=9", "tokens=9", False),
        ({"train__steps": None, "train__epochs": 2.5}, None, "2.5 epochs", False),
    ],
)
def test_hours_need_a_number_of_steps(planned, changes, budget, length, is_known):
    (cost,) = costs_of(
        Cell(name="cell", config=new(**changes), budget=budget),
        topology=SimpleNamespace(name="v5e:2x2"),
    )
    assert (cost.number, cost.name, cost.length) == (1, "cell", length)
    assert cost.hours == (pytest.approx(plan_of(new())[1] * 7 / 3600) if is_known else None)


def test_the_last_line_sums_what_is_to_do(planned, monkeypatch, capsys):
    """Disk and hours of done cells are not in the sums."""
    monkeypatch.setattr(costs, "open_topology", lambda name: SimpleNamespace(name=name))
    cells = [
        Cell(name=name, config=new(train__steps=10**6 * (i + 1))) for i, name in enumerate("abc")
    ]
    print_costs(
        Study(name="costs", output_dir="out", cells=tuple(cells)), {"b"}, slice(None), "v5e:2x2"
    )
    _, *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["0", "to", "do", "a"],
        ["1", "done", "b", "2000000"],
        ["2", "to", "do", "c"],
    ]
    seconds, disk = plan_of(new())[1], 2 * 4 * 3 * 4 * WHOLE
    assert last == (
        f"2 of 3 cells to do; disk {disk / 2**20:.0f} MiB; at least {seconds * 4e6 / 3600:.1f} "
        "hours on v5e:2x2"
    )
