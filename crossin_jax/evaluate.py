"""Generate and score the benchmarks for a checkpoint or a base model, and compare results.

  python -m crossin_jax.evaluate --checkpoint runs/xquad                            (with the settings of the run)
  python -m crossin_jax.evaluate --config configs/xquad_llama.py --checkpoint runs/xquad
  python -m crossin_jax.evaluate --config configs/xquad_llama.py                    (the base model, or lora.path on it)
  python -m crossin_jax.evaluate --compare runs/a/evaluation runs/b/evaluation

An interrupted evaluation goes on where it stopped. Results: results.json, results.md, report.html, predictions/ (with
logs in SeaEval's layout).
"""

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx

from crossin_jax import config as settings
from crossin_jax import program, provenance
from crossin_jax.checkpoint.fingerprint import fingerprint
from crossin_jax.checkpoint.restore import restore_params
from crossin_jax.checkpoint.store import find_checkpoint, read_config
from crossin_jax.checks import check
from crossin_jax.config import Config, UserError
from crossin_jax.data.pipeline import open_asker, open_tokenizer
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.report import Run, print_table, read_pair, write_results
from crossin_jax.evaluation.runner import describe_benchmarks, load_benchmarks, run_benchmarks
from crossin_jax.generation.engine import Engine
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.score import write_log
from crossin_jax.training.state import abstract_model, check_tokenizer, load_base, model_spec


def evaluate(config: Config, checkpoint: str | Path | None, out: Path) -> tuple[list[Predictions], dict[str, Any]]:
    """Answers and provenance of one model on the benchmarks of the configuration; finished parts are kept in `out`."""
    if not config.evaluation.benchmarks:
        raise UserError("evaluation.benchmarks is empty; name at least one, e.g. cross_mmlu or cross_world")
    if checkpoint is not None:
        restored = restore_params(checkpoint, mesh=make_mesh(config.mesh))
        check_template(config, restored.config)
        spec, graphdef, state, mesh = restored.spec, restored.graphdef, restored.state, restored.mesh
        tokenizer, trained = restored.tokenizer, restored.provenance | {"step": restored.step, "run": str(restored.run)}
        lora, compute_dtype = restored.config.lora, restored.config.model.compute_dtype
    else:
        adapter = config.lora.path if config.lora else None
        config = dataclasses.replace(config, lora=config.lora if adapter else None)
        mesh, spec = make_mesh(config.mesh), model_spec(config)
        model = abstract_model(config, spec, mesh)
        tokenizer, trained = open_tokenizer(config), {"base": config.model.path, "adapter": adapter}
        check_tokenizer(config, tokenizer, spec)
        graphdef, state = model.graphdef, nnx.merge_state(*load_base(config, model.trainable, model.frozen))
        lora, compute_dtype = config.lora, config.model.compute_dtype
    trained["weights"] = fingerprint(state)
    renderer = open_asker(config, tokenizer)
    engine = Engine(graphdef, state, spec, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id, mesh=mesh,
                    batch_size=config.evaluation.batch_size, cache_dtype=config.evaluation.cache_dtype,
                    attention=config.model.attention)
    # the cached answers belong to what computes them, by content: a path may hold other weights tomorrow
    computes = [trained["weights"], dataclasses.asdict(spec), compute_dtype,
                lora and dataclasses.asdict(dataclasses.replace(lora, path=None))]
    predictions = run_benchmarks(config, engine, renderer, cache=out / "predictions",
                                 weights=provenance.content_hash(computes))
    source = provenance.describe(settings.to_dict(config), model=trained, template=renderer.hash,
                                 benchmarks=describe_benchmarks(config, load_benchmarks(config)),
                                 compilations=engine.compilations)
    return predictions, source


def check_template(config: Config, trained: Config) -> None:
    """Refuses to ask in another form than the one that was trained, unless `evaluation.template` says so."""
    if config.evaluation.template is not None:
        config.data.template = config.evaluation.template
        return
    for field in ("template", "system", "tokenization", "tag"):
        now, before = getattr(config.data, field), getattr(trained.data, field)
        if now != before:
            raise UserError(f"data.{field}={now!r}, but the checkpoint was trained with {before!r}; use that, or set "
                            f"evaluation.template to ask in another form on purpose")


def define_flags() -> None:
    """Flags beside the configuration."""
    flags.DEFINE_string("checkpoint", None, "run folder or one of its checkpoints/STEP; none: the base model")
    flags.DEFINE_string("out", None, "folder for results (default: output_dir/evaluation)")
    flags.DEFINE_integer("limit", None, "short for --config.evaluation.limit: first items of each benchmark")
    flags.DEFINE_list("languages", None, "short for --config.evaluation.languages, e.g. en,zh")
    flags.DEFINE_list("prompts", None, "short for --config.evaluation.prompts, e.g. 1,3")
    flags.DEFINE_string("compare", None, "two folders of results, A B: what changed from A to B, and how clearly")
    flags.DEFINE_string("after", None, "the second folder of --compare")


def write_run(config: Config, run: Run, out: Path) -> None:
    """Writes the report of one run, and its answers as logs in SeaEval's layout."""
    benchmarks = load_benchmarks(config)
    write_results(out, [run], mode=config.evaluation.mode, title=run.name, benchmarks=benchmarks)
    items = {benchmark.name: benchmark.items for benchmark in benchmarks}
    (out / "logs").mkdir(exist_ok=True)
    for predictions in run.predictions:
        name = re.sub(r"[^\w.]+", "_", f"{predictions.benchmark}_{predictions.method}_p{predictions.prompt}")
        write_log(out / "logs" / f"{name}.json", items[predictions.benchmark], predictions)


def narrow(config: Config, arguments: Any) -> None:
    """Takes over the short flags that ask for less than the configuration does."""
    given = {"limit": arguments.limit, "languages": arguments.languages and tuple(arguments.languages)}
    if arguments.prompts:
        try:
            given["prompts"] = tuple(map(int, arguments.prompts))
        except ValueError:
            raise UserError(f"--prompts={','.join(arguments.prompts)}: give numbers from 1 to 5, e.g. 1,3") from None
    config.evaluation = dataclasses.replace(config.evaluation, **{k: v for k, v in given.items() if v is not None})
    check(config)


def main(config: Config, arguments: Any) -> None:
    """Evaluates and prints the table."""
    narrow(config, arguments)
    out = Path(arguments.out or f"{config.output_dir}/evaluation").expanduser()
    predictions, source = evaluate(config, arguments.checkpoint, out)
    if jax.process_index() == 0:
        run = Run(config.name if arguments.checkpoint else "base model", config.seed, predictions, source)
        write_run(config, run, out)
        print(print_table([run], mode=config.evaluation.mode))
        print(f"report: {out / 'report.html'}; logs in SeaEval's layout: {out / 'logs'}")


def compare(arguments: Any) -> None:
    """Before and after, from two folders of results."""
    if not arguments.after:
        raise UserError("--compare takes two folders: --compare A B")
    runs = read_pair(arguments.compare, arguments.after)
    out = Path(arguments.out or arguments.after).expanduser() / "comparison"
    write_results(out, runs, title=f"{runs[0].name} and {runs[-1].name}")
    print(print_table(runs))
    print(f"report: {out / 'report.html'}")


def config_of_run(checkpoint: str) -> Config:
    """The settings of a run or checkpoint; its folder may have moved."""
    config = read_config(checkpoint)
    config.output_dir = str(find_checkpoint(checkpoint)[0])
    return config


def split_pair(argv: list[str]) -> bool:
    """Turns `--compare A B` into flags; True where the command line asks for a comparison."""
    for i, argument in enumerate(argv):
        if argument.lstrip("-").split("=")[0] == "compare" and argument.startswith("-"):
            last = i + (1 if "=" in argument else 2)
            if last < len(argv) and not argv[last].startswith("-"):
                argv[last] = f"--after={argv[last]}"
            return True
    return False


if __name__ == "__main__":
    if split_pair(sys.argv):
        program.run(compare, define=define_flags, takes_config=False)
    program.run(main, define=define_flags, run_flag=("checkpoint", config_of_run))
