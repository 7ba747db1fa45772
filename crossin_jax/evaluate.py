"""Generate and score the benchmarks for a checkpoint or a base model, and compare results.

  python -m crossin_jax.evaluate --config configs/xquad_llama.py --checkpoint runs/xquad
  python -m crossin_jax.evaluate --config configs/xquad_llama.py                    (the base model, or lora.path on it)
  python -m crossin_jax.evaluate --compare runs/a/evaluation runs/b/evaluation

An interrupted evaluation goes on where it stopped. Results: results.json, results.md, report.html, predictions/ (with
logs in SeaEval's layout).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx

from crossin_jax import config as settings
from crossin_jax import program, provenance
from crossin_jax.checkpoint.restore import restore_params
from crossin_jax.config import Config, UserError
from crossin_jax.data.pipeline import open_renderer, open_tokenizer
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.report import Run, print_table, write_results
from crossin_jax.evaluation.runner import run_benchmarks
from crossin_jax.generation.engine import Engine
from crossin_jax.parallel.mesh import make_mesh
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
    else:
        adapter = config.lora.path if config.lora else None
        config = dataclasses.replace(config, lora=config.lora if adapter else None)
        mesh, spec = make_mesh(config.mesh), model_spec(config)
        model = abstract_model(config, spec, mesh)
        tokenizer, trained = open_tokenizer(config), {"base": config.model.path, "adapter": adapter}
        check_tokenizer(config, tokenizer, spec)
        graphdef, state = model.graphdef, nnx.merge_state(*load_base(config, model.trainable, model.frozen))
    renderer = open_renderer(config, tokenizer)
    engine = Engine(graphdef, state, spec, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id, mesh=mesh,
                    batch_size=config.evaluation.batch_size, cache_dtype=config.evaluation.cache_dtype,
                    attention=config.model.attention)
    predictions = run_benchmarks(config, engine, renderer, cache=out / "predictions",
                                 weights=provenance.content_hash(trained))
    source = provenance.describe(settings.to_dict(config), model=trained, template=renderer.hash,
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


def main(config: Config, arguments: Any) -> None:
    """Evaluates and prints the table."""
    out = Path(arguments.out or f"{config.output_dir}/evaluation").expanduser()
    predictions, source = evaluate(config, arguments.checkpoint, out)
    if jax.process_index() == 0:
        runs = [Run(config.name, config.seed, predictions, source)]
        write_results(out, runs, mode=config.evaluation.mode)
        print(print_table(runs, mode=config.evaluation.mode))
        print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    program.run(main, define=define_flags)
