"""Run a study: train and evaluate every cell, skip what is done, write one report.

  python -m crossin_jax.study --config configs/quickstart.py [--seeds=0,1,2] \\
      [--languages=en,zh,vi,es,id,ms,fil]
  python -m crossin_jax.study --config configs/paper/table2.py --dry_run --topology=v5e:4x4

A configuration file offers a study as `get_study()`; text after a colon goes to it. An interrupted
study goes on; a cell whose settings changed, or whose base changed, is the only one that runs
again. Pods that share a folder can each run a part of the cells (--cells); whichever runs last
writes the report of all that is done.
"""

import time
from typing import Any

import jax
from absl import flags

from crossin_jax import cli
from crossin_jax.config import Study, UserError
from crossin_jax.study.cost import print_costs
from crossin_jax.study.run import (
    cell_keys,
    check_cells,
    check_folders,
    is_done,
    run_study,
    with_budget,
    write_report,
)
from crossin_jax.study.trial import try_cells
from crossin_jax.tables import FORMAT_FLAG, print_parts
from crossin_jax.train import keep_compiled


def define_flags() -> None:
    """Flags of a study."""
    flags.DEFINE_string(
        "config", None, "Python file with get_study(); FILE.py:PART passes the part to it"
    )
    flags.DEFINE_list("seeds", None, "seeds, e.g. 0,1,2 (default: the study's own)")
    flags.DEFINE_list(
        "languages", None, "language codes, e.g. en,zh,vi,es,id,ms,fil (default: the study's own)"
    )
    flags.DEFINE_string("budget", None, "the same for every arm: steps=N, examples=N or tokens=N")
    flags.DEFINE_string("cells", None, "part of the cells to run here, FIRST:LAST (as in Python)")
    flags.DEFINE_bool("report_only", False, "run nothing; write the report of what is done")
    flags.DEFINE_bool(
        "dry_run",
        False,
        "open everything, count, time a few steps and prompts, print hours per cell, and exit",
    )
    flags.DEFINE_enum(*FORMAT_FLAG)
    flags.DEFINE_bool("time", True, "time steps and prompts in a dry run; --notime only counts")
    flags.DEFINE_string(
        "topology",
        None,
        "TPU slice that the dry run plans for, without data and weights, e.g. v5e:4x4",
    )


def main(arguments: Any) -> None:
    """Runs the study and prints its tables."""
    keep_compiled()
    study = read_study(arguments)
    keys = cell_keys(study)
    chosen = slice(None)
    if arguments.cells:
        try:
            chosen = slice(*(int(part) if part else None for part in arguments.cells.split(":")))
        except ValueError:
            raise UserError(f"--cells={arguments.cells}: give FIRST:LAST, e.g. 0:4") from None
        if not study.cells[chosen]:
            raise UserError(
                f"--cells={arguments.cells}: the study has cells 0 to {len(study.cells) - 1}; "
                f"give a part of 0:{len(study.cells)}"
            )
    if arguments.dry_run:
        done = {cell.name for cell in study.cells if is_done(cell, keys)}
        if arguments.topology:
            # Planned for absent chips: neither data nor weights are opened, and real chips stay
            # free.
            jax.config.update("jax_platforms", "cpu")
            print_costs(study, done, chosen, arguments.topology, style=arguments.format)
        else:
            left = [cell for cell in study.cells[chosen] if cell.name not in done]
            check_folders(study, chosen)
            trials = try_cells(study, left, arguments.time)
            print_costs(study, done, chosen, trials=trials, style=arguments.format)
        return
    start = time.time()
    if not arguments.report_only:
        run_study(study, chosen)
    if not jax.process_index() and (page := write_report(study, arguments.format)):
        last = f"{len(study.cells)} cells in {time.time() - start:.0f} s; report: {page}"
        print_parts(arguments.format, [last])


def read_study(arguments: Any) -> Study:
    """The study that the flags describe."""
    if not arguments.config:
        raise UserError("--config=FILE.py is missing; see configs/quickstart.py")
    options: dict[str, Any] = {}
    if arguments.seeds:
        try:
            options["seeds"] = tuple(int(seed) for seed in arguments.seeds)
        except ValueError:
            raise UserError(
                f"--seeds={','.join(arguments.seeds)}: seeds are whole numbers, e.g. 0,1,2"
            ) from None
    if arguments.languages:
        options["languages"] = tuple(arguments.languages)
    study = cli.call_config_file(arguments.config, "get_study", **options)
    if not isinstance(study, Study):
        raise UserError(
            f"--config={arguments.config}: get_study() returns {type(study).__name__}, not "
            "crossin_jax.config.Study"
        )
    study = check_cells(study)
    return with_budget(study, arguments.budget) if arguments.budget else study


if __name__ == "__main__":
    cli.run(main, define=define_flags, takes_config=False)
