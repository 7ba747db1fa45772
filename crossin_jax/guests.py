"""Modules that the core uses but does not import: each is opened by name, when a run needs it.

A reader of the core need not know them. `tests/test_layers.py` fails if the core imports a guest
program.
"""

import importlib
from types import ModuleType

GUESTS = {
    # sources of kind "world", and the benchmark cross_world
    "world": "crossin_jax.world.facts",
    # rules that answer cross_world without a model
    "world baselines": "crossin_jax.world.baselines",
    # evaluation.benchmarks: refused before training where evaluate would refuse them afterwards
    "benchmark rows": "crossin_jax.evaluation.benchmarks",
    # train.benchmark_every: benchmark scores during training
    "benchmarks": "crossin_jax.evaluation.during_training",
    # after a loss that is not finite: the rows it came from
    "faults": "crossin_jax.training.faults",
    # train --tuned
    "proposal": "crossin_jax.plan.proposal",
    # train --selftest_resume
    "selftest": "crossin_jax.selftest",
}


def open_guest(name: str) -> ModuleType:
    """The module of a guest."""
    return importlib.import_module(GUESTS[name])
