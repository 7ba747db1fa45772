"""What a study costs before it runs: steps and disk per cell, and on a TPU slice memory per chip
and hours.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax

from crossin_jax import config as settings
from crossin_jax.config import Cell, Config, Study, UserError
from crossin_jax.data.packing import BUCKETS
from crossin_jax.files import content_hash
from crossin_jax.models.spec import ModelSpec
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.plan.plan import make_plan
from crossin_jax.plan.topology import NoCompiler, Topology, open_topology
from crossin_jax.study.trial import Estimate as Trial
from crossin_jax.study.trial import describe, describe_device, format_hours
from crossin_jax.tables import Table, print_parts
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import abstract_model, abstract_state, model_spec


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one cell; None is what cannot be known here. `disk` is bytes at its fullest, `hbm` bytes
    per chip.
    """

    number: int
    name: str
    length: str
    disk: int | None
    hbm: int | None = None
    fits: bool | None = None
    hours: float | None = None  # at least


def estimate_costs(
    study: Study, chosen: slice = slice(None), topology: Topology | None = None
) -> list[Cost]:
    """The cost of every chosen cell; cells with the same model, rows and mesh share one
    estimate.
    """
    by_name = {cell.name: cell for cell in study.cells}
    known: dict[str, Any] = {}
    costs = []
    for number in range(len(study.cells))[chosen]:
        cell = study.cells[number]
        spec, key = find_spec(cell, by_name), alike(cell.config)
        cost = Cost(number, cell.name, describe_length(cell), None)
        if spec:
            if key not in known:
                known[key] = measure_disk(cell, spec)
            cost = dataclasses.replace(cost, disk=known[key][0] + known[key][1] * cell.exports)
            if topology and not cell.needs:  # config.json of the others' model is not there yet
                if (key, "plan") not in known:
                    known[key, "plan"] = plan_step(cell.config, topology)
                hbm, fits, seconds = known[key, "plan"]
                steps = cell.config.train.steps if cell.budget is None else None
                cost = dataclasses.replace(
                    cost,
                    hbm=hbm,
                    fits=fits,
                    hours=seconds * steps / 3600 if seconds and steps else None,
                )
        costs.append(cost)
    return costs


def alike(config: Config) -> str:
    """The same for cells whose steps compile to the same program, but for the number of mixture
    components.
    """
    values = settings.to_dict(config)
    train = {
        name: values["train"][name]
        for name in ("batch_size", "accumulation", "loss_chunk", "keep", "checkpoint_every")
    }
    optim = {name: values["optim"][name] for name in ("name", "moments_dtype")}
    return content_hash(
        [
            values["model"],
            values["lora"],
            values["mesh"],
            train,
            optim,
            values["data"]["length"],
            values["data"]["packing"],
        ]
    )


def find_spec(cell: Cell, by_name: dict[str, Cell]) -> ModelSpec | None:
    """The cell's model, which may be one that another cell has yet to train; None where its folder
    is not here.
    """
    for name in cell.needs:
        base = by_name[name].config
        if cell.config.model.path == f"{base.output_dir}/model":
            return model_spec(base)
    try:
        return model_spec(cell.config)
    except UserError:
        return None


def measure_disk(cell: Cell, spec: ModelSpec) -> tuple[int, int]:
    """Bytes of the kept checkpoints with the one being written beside them, and of an exported
    model.
    """
    config = cell.config
    mesh = make_mesh(settings.Mesh(data=1), jax.devices()[:1])
    model = abstract_model(config, spec, mesh)
    state = abstract_state(model, make_optimizer(config.optim, 1), mesh)
    checkpoints = config.train.keep + 1 if config.train.checkpoint_every else 1
    return checkpoints * count_bytes((state.trainable, state.optimizer)), count_bytes(
        (model.trainable, model.frozen)
    )


def count_bytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def plan_step(config: Config, topology: Topology) -> tuple[int, bool, float | None]:
    """(bytes per chip, whether they fit, seconds at least) of a training step: memory with the
    longest rows.

    Unpacked rows are cut to buckets, so there the seconds are those of the shortest.
    """
    print(
        f"compiling the step of {config.model.path or config.name} for {topology.name}",
        file=sys.stderr,
    )
    plan = make_plan(config, topology, ("train",))
    step = plan.phases["train"]
    seconds = step.floor_seconds
    if not config.data.packing and plan.fits:
        shortest = dataclasses.replace(
            config.data, length=math.ceil(config.data.length / max(BUCKETS))
        )
        seconds = (
            make_plan(dataclasses.replace(config, data=shortest), topology, ("train",))
            .phases["train"]
            .floor_seconds
        )
    return step.peak_bytes, plan.fits, seconds


def describe_length(cell: Cell) -> str:
    """How long a cell trains, as far as it is known without its data."""
    train = cell.config.train
    return cell.budget or (f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs")


def print_costs(
    study: Study,
    done: set[str],
    chosen: slice = slice(None),
    topology: str | None = None,
    trials: dict[str, Trial] | None = None,
    style: str = "text",
) -> None:
    """A row per cell, and the sums of what is still to do; without a TPU compiler one line says
    so. `trials` are what the cells showed in miniature, `style` is one of `tables.STYLES`.
    """
    slice_of_tpus, trials = None, trials or {}
    parts: list[str | Table] = []
    try:
        slice_of_tpus = open_topology(topology) if topology else None
    except NoCompiler as error:
        parts.append(f"no plan: {error}")
    costs = estimate_costs(study, chosen, slice_of_tpus)
    rows = [
        (
            cost.number,
            "done" if cost.name in done else "to do",
            cost.name,
            describe(trials[cost.name]) if cost.name in trials else cost.length,
            _size(cost.disk),
            *(_describe_plan(cost) if topology else ()),
        )
        for cost in costs
    ]
    head = ("", "state", "cell", "work", "disk", *(("per chip", "at least") if topology else ()))
    parts.append(Table(head, rows, "><<<>"))
    left = [cost for cost in costs if cost.name not in done]
    hours = [cost.hours for cost in left if cost.hours is not None]
    timed = [trial for trial in trials.values() if trial.training_hours is not None]
    parts.append(
        f"{len(left)} of {len(costs)} cells to do; "
        f"disk {_size(sum(cost.disk or 0 for cost in left))}"
        + (f"; at least {sum(hours):.1f} hours on {topology}" if hours else "")
        + (f"; {describe_sum(timed)}" if timed else "")
    )
    print_parts(style, parts)


def describe_sum(timed: Sequence[Trial]) -> str:
    """Hours of training and evaluation in all, on the devices at hand."""
    training = sum(trial.training_hours or 0 for trial in timed)
    evaluation = sum(trial.evaluation_hours or 0 for trial in timed)
    return (
        f"{format_hours(training + evaluation)} in all ({format_hours(training)} of training, "
        f"{format_hours(evaluation)} of evaluation) on {describe_device()}, "
        "without loading and compiling"
    )


def _describe_plan(cost: Cost) -> tuple[str, str]:
    if cost.hbm is None:
        return "", ""
    hours = f"{cost.hours:.2f} h" if cost.hours is not None else ""
    return f"{cost.hbm / 2**30:.2f} GiB{'' if cost.fits else ', does not fit'}", hours


def _size(count: int | None) -> str:
    if count is None:
        return "no model"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
