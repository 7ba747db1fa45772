"""What a study costs before it runs: steps and disk per cell, and on a TPU slice memory per chip and hours."""

import dataclasses
from typing import Any

import jax

from crossin_jax.config import Cell, Study, UserError
from crossin_jax.models.spec import ModelSpec
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import abstract_model, abstract_state, model_spec


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one cell; `disk` in bytes at its fullest, None where its model is not at hand to be measured."""

    number: int
    name: str
    length: str
    disk: int | None
    plan: str


def estimate_costs(study: Study, chosen: slice = slice(None), topology: str | None = None) -> list[Cost]:
    """The cost of every chosen cell; cells that train the same step share its plan."""
    by_name = {cell.name: cell for cell in study.cells}
    numbers = range(len(study.cells))[chosen]
    costs = []
    for number in numbers:
        cell = study.cells[number]
        spec = find_spec(cell, by_name)
        costs.append(Cost(number, cell.name, describe_length(cell), measure_disk(cell, spec) if spec else None, ""))
    return costs


def find_spec(cell: Cell, by_name: dict[str, Cell]) -> ModelSpec | None:
    """The cell's model, which may be one that another cell has yet to train; None where its folder is not here."""
    for name in cell.needs:
        base = by_name[name].config
        if cell.config.model.path == f"{base.output_dir}/model":
            return model_spec(base)
    try:
        return model_spec(cell.config)
    except UserError:
        return None


def measure_disk(cell: Cell, spec: ModelSpec) -> int:
    """Bytes of the kept checkpoints, of the one being written beside them, and of the exported model."""
    config = cell.config
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=1, tensor=1), jax.devices()[:1])
    model = abstract_model(config, spec, mesh)
    state = abstract_state(model, make_optimizer(config.optim, 1), mesh)
    checkpoints = config.train.keep + 1 if config.train.checkpoint_every else 1
    exported = count_bytes((model.trainable, model.frozen)) if cell.exports else 0
    return checkpoints * count_bytes((state.trainable, state.optimizer)) + exported


def count_bytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe_length(cell: Cell) -> str:
    """How long a cell trains, as far as it is known without its data."""
    train = cell.config.train
    return cell.budget or (f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs")


def print_costs(costs: list[Cost], done: set[str]) -> str:
    """A line per cell and the sum of what is still to be written."""
    width = max((len(cost.name) for cost in costs), default=0)
    lines = [f"{cost.number:3d}  {'done' if cost.name in done else 'to do':5s}  {cost.name:{width}s}  "
             f"{cost.length:>12s}  disk {_size(cost.disk):>9s}  {cost.plan}".rstrip() for cost in costs]
    left = [cost for cost in costs if cost.name not in done]
    total = sum(cost.disk or 0 for cost in left)
    return "\n".join([*lines, f"{len(left)} of {len(costs)} cells to do; disk {_size(total)}"])


def _size(count: int | None) -> str:
    if count is None:
        return "no model"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
