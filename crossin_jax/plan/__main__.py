"""Compile a run for TPUs that this machine lacks: does it fit, and at what cost?

  python -m crossin_jax.plan --config configs/xquad_llama.py:DATA --topology v5e:4x4 \\
      [--tune --out FILE.json]

It compiles the programs of the run itself: loading, the training step, and prefill and decoding of
the benchmarks. Of the model it needs only config.json, and it needs no data. If the run does not
fit, it looks for the smallest change that does. `--json` prints the numbers for other programs.
`--tune` looks for the fastest way to run the step, and
`python -m crossin_jax.train --tuned=FILE.json` uses what it proposes.
"""

import dataclasses
import json
import shlex
import sys
from functools import partial
from typing import Any

import jax
from absl import flags

from crossin_jax import cli
from crossin_jax.config import Config, UserError
from crossin_jax.files import check_output
from crossin_jax.paths import as_path
from crossin_jax.plan.plan import describe_change, find_change, make_plan
from crossin_jax.plan.report import render
from crossin_jax.plan.topology import Topology, open_topology
from crossin_jax.tables import FORMAT_FLAG, print_parts


def define_flags() -> None:
    """Flags beside the configuration."""
    flags.DEFINE_string(
        "topology",
        None,
        "TPU slice, e.g. v5e:4x4, v6e:2x4, v5p:2x2x4, v4:2x2x2, or slices: v5e:4x4x2slices",
    )
    flags.DEFINE_bool("json", False, "print JSON")
    flags.DEFINE_enum(*FORMAT_FLAG)
    flags.DEFINE_bool(
        "search", True, "if it does not fit, compile changed configurations until one fits"
    )
    flags.DEFINE_bool(
        "tune", False, "compile variants of the training step and propose the fastest that fits"
    )
    flags.DEFINE_string(
        "out", None, "file for the proposal of --tune, which train takes as --tuned=FILE"
    )


def main(config: Config, arguments: Any) -> int:
    """Plans, and looks for a change if it does not fit; 1 if none was found."""
    if not arguments.topology:
        raise UserError("--topology is missing; give CHIP:SHAPE, e.g. --topology v5e:4x4")
    # Real chips stay free for others.
    jax.config.update("jax_platforms", "cpu")
    topology = open_topology(arguments.topology)
    if arguments.out:
        check_output("--out", as_path(arguments.out))
    if arguments.out and not arguments.tune:
        raise UserError("--out is for the proposal of --tune; add --tune, or leave it out")
    if arguments.tune:
        return _tune(config, topology, arguments)
    plan = make_plan(config, topology)
    better = None if plan.fits or not arguments.search else find_change(config, topology, plan)
    if arguments.json:
        change = better and dataclasses.asdict(better)
        print(json.dumps({"plan": dataclasses.asdict(plan), "change": change}, indent=1))
        return 0 if plan.fits or better else 1
    parts = [*render(plan)]
    if better:
        change = describe_change(better.change)
        parts += [f"\nthe smallest change that fits: {change}", *render(better)]
    elif not plan.fits and arguments.search:
        parts.append(
            "no change of model.remat, train.accumulation, mesh or evaluation.batch_size fits: "
            "take more chips, LoRA, or model.param_dtype=bfloat16"
        )
    print_parts(arguments.format, parts)
    return 0 if plan.fits or better else 1


def _tune(config: Config, topology: Topology, arguments: Any) -> int:
    """Proposes how to train; 1 if nothing fits."""
    from crossin_jax.plan.tune import propose

    report = partial(print, file=sys.stderr, flush=True)
    plan = propose(config, topology, arguments.out, report)
    if arguments.json:
        print(json.dumps({"plan": plan and dataclasses.asdict(plan)}, indent=1))
    elif plan:
        change = describe_change(plan.change) or "the configuration as it is"
        parts = [*render(plan), f"\nproposed: {change}"]
        if arguments.out:
            parts.append(f"to train with it: {train_command(sys.orig_argv, arguments.out)}")
        print_parts(arguments.format, parts)
    else:
        print("nothing fits: take more chips, LoRA, or model.param_dtype=bfloat16")
    return 0 if plan and plan.fits else 1


def train_command(argv: list[str], out: str) -> str:
    """The command that trains what this command line planned, with the proposal in `out`."""
    program = ["python", "-m", "crossin_jax.train"]
    return shlex.join([*program, *cli.list_config_flags(argv), f"--tuned={out}"])


if __name__ == "__main__":
    cli.run(main, define=define_flags)
