"""Fine-tune a model on a cross-lingual mixture, or train a small one from random weights.

  python -m crossin_jax.train --config configs/xquad_llama.py --config.optim.learning_rate=1e-4

The run in reading order: mesh, data, model, steps, resume, loop. The same command continues an interrupted run. SIGTERM
saves and exits with 75, Ctrl-C saves and exits with 130; a second Ctrl-C leaves at once.
"""

import json
import logging
import math
import os
import shlex
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from crossin_jax import config as settings
from crossin_jax import program, provenance
from crossin_jax.checkpoint.store import Store
from crossin_jax.config import Config, UserError
from crossin_jax.data.loader import make_loader
from crossin_jax.data.pipeline import open_asker, open_pipeline
from crossin_jax.evaluation.metrics import evaluate
from crossin_jax.evaluation.runner import run_benchmarks
from crossin_jax.generation.engine import Engine
from crossin_jax.outputs import write_whole
from crossin_jax.parallel import hosts
from crossin_jax.parallel.mesh import check_batch, make_mesh
from crossin_jax.training.faults import describe_fault, find_bad_rows
from crossin_jax.training.optim import make_optimizer, make_schedule
from crossin_jax.training.proposal import apply_proposal
from crossin_jax.training.selftest import run_selftest
from crossin_jax.training.state import (
    abstract_model,
    abstract_state,
    check_tokenizer,
    load_base,
    model_spec,
    start_state,
    to_mesh,
)
from crossin_jax.training.step import COMPILER_OPTIONS, StepSettings, make_eval_step, make_train_step
from crossin_jax.training.telemetry import Profiler, Telemetry, flops_per_token, group_metrics, is_recorded

CACHE = "~/.cache/crossin_jax/xla"


def train(config: Config, *, resume: bool = True, use_wandb: bool = False, profile_steps: Sequence[int] = (),
          kill_after: int | None = None) -> Path:
    """Runs one experiment to its last step and returns its folder.

    Raises `SystemExit` with 75 after SIGTERM and with 130 after Ctrl-C, when the step under way is saved; raises
    `UserError` where another run is using the folder.
    """
    output_dir = make_folder(config)
    with hosts.own_folder(output_dir):
        _train_in(output_dir, config, resume=resume, use_wandb=use_wandb, profile_steps=profile_steps,
                  kill_after=kill_after)
    return output_dir


def _train_in(output_dir: Path, config: Config, *, resume: bool, use_wandb: bool, profile_steps: Sequence[int],
              kill_after: int | None) -> None:
    # ---- Mesh
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, config.train.accumulation, mesh)

    # ---- Data
    spec = model_spec(config)  # first: a wrong model folder should not wait for the data
    data = open_pipeline(config)
    check_tokenizer(config, data.tokenizer, spec)
    batches_of = partial(make_loader, renderer=data.renderer, data=config.data, batch_size=config.train.batch_size,
                         seed=config.seed, process_index=jax.process_index(), process_count=jax.process_count())
    loader = batches_of(data.mixture)
    num_steps = config.train.steps or math.ceil(config.train.epochs * loader.steps_per_epoch)

    # ---- Model
    model = abstract_model(config, spec, mesh)
    optimizer, schedule = make_optimizer(config.optim, num_steps), make_schedule(config.optim, num_steps)
    abstract = abstract_state(model, optimizer, mesh)

    # ---- Steps
    static = StepSettings(config.train.accumulation, config.train.loss_chunk, config.model.remat,
                          config.model.attention, config.seed, len(loader.groups))
    train_step = jax.jit(make_train_step(model.graphdef, optimizer, static), donate_argnums=0,
                         compiler_options=COMPILER_OPTIONS.get(jax.default_backend()))
    source = provenance.describe(settings.to_dict(config), manifest=data.mixture.manifest()["hash"],
                                 template=data.renderer.hash, base=config.model.path)

    with jax.set_mesh(mesh), hosts.Preemption() as preemption, Store(output_dir, config=config) as store:
        # ---- Resume
        if not resume:
            store.set_aside()
        restored = store.restore_newest(abstract, config)
        if restored:
            state, position = restored
            state.frozen = load_base(config, model.frozen)[0] if config.model.path else model.frozen
            loader.set_state(position)
        else:
            state = start_state(config, model, abstract, optimizer)
        start = int(state.step)
        write_config(output_dir, config)  # not before: a run that is refused leaves the folder's own as it was

        # ---- Loop
        telemetry = Telemetry(output_dir, name=config.name, start=start, num_steps=num_steps, groups=loader.groups,
                              log_every=config.train.log_every, use_wandb=use_wandb,
                              flops_per_token=flops_per_token(spec, model, config.data.length),
                              use_tensorboard=config.train.tensorboard, config=settings.to_dict(config))
        profiler = Profiler(profile_steps, output_dir / "profile")
        held_out_losses = HeldOut(batches_of, data.held_out, model, static, mesh)
        benchmark_scores = Benchmarks(config, open_asker(config, data.tokenizer), model, mesh)
        begins = deque(maxlen=config.train.log_every + 1)  # (step, where its batch begins): no more wait for a report

        def due_evaluations(step: int) -> Iterator[tuple[str, Callable]]:
            if data.held_out and (due(step, config.train.eval_every) or step == num_steps):
                yield "held_out/", held_out_losses
            if due(step, config.train.benchmark_every):
                yield config.evaluation.benchmarks[0], benchmark_scores

        try:
            for name, scores in due_evaluations(start) if restored else ():
                if hosts.agree(not is_recorded(output_dir, start, name)):  # the run was ended while it evaluated
                    telemetry.write({"step": start} | scores(state))
            for step in range(start + 1, num_steps + 1):
                begins.append((step, loader.position))
                state, metrics = train_step(state, to_mesh(next(loader), mesh))
                telemetry.add(step, metrics, schedule(step - 1))
                profiler.after(step, metrics)
                stop = preemption.reached(step) and step < num_steps
                if stop or step == num_steps or due(step, config.train.checkpoint_every):
                    telemetry.report(schedule(step - 1))  # raises before a checkpoint could hide a non-finite loss
                    store.save(state, loader.get_state(), source)
                if stop:
                    store.wait()
                    logging.warning("told to stop: step %d is saved; the same command continues", step)
                    raise SystemExit(preemption.exit_code)
                for _, scores in due_evaluations(step):
                    telemetry.write({"step": step} | scores(state))
                if step == kill_after:  # of the self-test
                    store.wait()
                    os.kill(os.getpid(), signal.SIGKILL)
        except FloatingPointError as fault:
            newest = max(store.steps(), default=None)
            good = f"checkpoint {newest} is the last good state" if newest else "there is no checkpoint yet"
            begin = dict(begins)[fault.args[0]]
            bad = find_bad_rows(loader, begin, state, model, static, mesh)
            raise UserError(f"{output_dir}: the loss or gradient of step {fault.args[0]} is not finite; {good}\n"
                            f"{describe_fault(output_dir, fault.args[0], bad, loader.name_rows(begin))}\n"
                            "lower optim.learning_rate, set optim.clip_norm, or mend those rows") from None
        finally:
            profiler.close()
            telemetry.close()
            loader.close()


def make_folder(config: Config) -> Path:
    """Makes `output_dir`, which every process must see."""
    if "://" in config.output_dir:
        raise UserError(f"output_dir={config.output_dir}: give a folder; a bucket can be mounted as one (docs/tpu.md)")
    folder = Path(config.output_dir).expanduser()
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    hosts.check_shared(folder)
    return folder


def write_config(folder: Path, config: Config) -> None:
    """Writes the resolved configuration for people and other programs; every checkpoint has its own copy."""
    if jax.process_index() == 0:
        write_whole(folder / "config.json", json.dumps(settings.to_dict(config), indent=2, ensure_ascii=False))


def due(step: int, every: int | None) -> bool:
    """Whether a periodic action falls on this step."""
    return every is not None and step % every == 0


class HeldOut:
    """The loss of held-out records, overall and by language; its program is compiled once."""

    def __init__(self, batches_of: Any, mixture: Any, model: Any, static: StepSettings, mesh: Any):
        self._batches_of, self._mixture, self._mesh = batches_of, mixture, mesh
        if mixture is not None:
            groups = batches_of(mixture).groups  # one component per language, e.g. ("same:dev#2", "zh")
            self._groups = [((name.partition(":")[2] or name).split("#")[0], language) for name, language in groups]
            static = StepSettings(1, static.loss_chunk, static.remat, static.attention, 0, len(self._groups))
            self._step = jax.jit(make_eval_step(model.graphdef, static))

    def __call__(self, state: Any) -> dict[str, float]:
        """Means by name: held_out/loss, and held_out/loss/SOURCE/LANGUAGE."""
        loader = self._batches_of(self._mixture, num_epochs=1)
        sums = [self._step(state.trainable, state.frozen, to_mesh(batch, self._mesh)) for batch in loader]
        loader.close()
        total = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *jax.device_get(sums))
        losses = {"held_out/loss": float(total["loss"] / total["count"])}
        by_group = group_metrics(self._groups, total["group_loss"], total["group_count"])
        return losses | {f"held_out/{name}": value for name, value in by_group.items() if name.startswith("loss")}


class Benchmarks:
    """Accuracy, consistency and AC3 on the training mesh, through the functions that `evaluate` calls."""

    def __init__(self, config: Config, renderer: Any, model: Any, mesh: Any):
        self._config, self._renderer, self._model, self._mesh = config, renderer, model, mesh
        self._engine: Engine | None = None

    def __call__(self, state: Any) -> dict[str, float]:
        """Scores by name, e.g. cross_mmlu/sum/p1/AC3_3."""
        params = nnx.merge_state(state.trainable, state.frozen)
        if self._engine is None:
            settings, renderer = self._config.evaluation, self._renderer
            self._engine = Engine(self._model.graphdef, params, self._model.spec, eos_ids=renderer.eos_ids,
                                  pad_id=renderer.pad_id, mesh=self._mesh, batch_size=settings.batch_size,
                                  cache_dtype=settings.cache_dtype, attention=self._config.model.attention)
        self._engine.params = params
        scores = {}
        for predictions in run_benchmarks(self._config, self._engine, self._renderer, progress=False):
            name = f"{predictions.benchmark}/{predictions.method}/p{predictions.prompt}"
            flat = evaluate(predictions, self._config.evaluation.mode).flatten()
            scores |= {f"{name}/{key}": value for key, value in flat.items()}
        return scores


def next_command(config: Config, folder: Path) -> str:
    """What to do with a trained run: answer its benchmarks, or a prompt where it has none."""
    place = shlex.quote(str(folder))
    if config.evaluation.benchmarks:
        return f"python -m crossin_jax.evaluate --checkpoint {place}"
    return f"python -m crossin_jax.generate --model {place} --prompt 'Name a river.'"


def keep_compiled(folder: str = CACHE) -> None:
    """Keeps compiled programs in a folder across runs; one that JAX's environment variable names is left alone."""
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))


def read_window(words: list[str]) -> tuple[int, ...]:
    """The two steps of `--profile_steps`, or none."""
    steps = tuple(int(word) for word in words if word.isdigit())
    if words and (len(steps) != 2 or len(words) != 2 or steps[0] >= steps[1]):
        raise UserError(f"--profile_steps={','.join(words)}: give two steps, the first below the second, e.g. 10,12")
    return steps


def define_flags() -> None:
    """Flags beside the configuration."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0, where the cluster does not tell")
    flags.DEFINE_integer("num_processes", None, "processes of the run, with --coordinator")
    flags.DEFINE_integer("process_id", None, "number of this process, with --coordinator")
    flags.DEFINE_integer("start_timeout", 300, "seconds to wait for all processes")
    flags.DEFINE_string("tuned", None, "file of plan --tune: run with the settings that it proposes")
    flags.DEFINE_bool("resume", True, "continue from the newest whole checkpoint in output_dir; --noresume "
                      "sets the checkpoints there aside and starts anew")
    flags.DEFINE_list("profile_steps", [], "profiled: after the first to after the second, e.g. 10,12")
    flags.DEFINE_string("compilation_cache", CACHE, "folder of compiled programs kept across runs; empty: none")
    flags.DEFINE_bool("selftest_resume", False, "kill and continue a short run here, and compare it bit by bit")
    flags.DEFINE_integer("kill_after", None, "step after which the self-test kills its run")
    flags.DEFINE_bool("wandb", False, "log to Weights & Biases too, where it is installed")


def main(config: Config, arguments: Any) -> int | None:
    """Joins the hosts and trains."""
    if arguments.tuned:
        config = apply_proposal(arguments.tuned, config)
    place = arguments.coordinator, arguments.num_processes, arguments.process_id
    if arguments.selftest_resume:
        found = hosts.find_place(*place, arguments.start_timeout)
        return run_selftest(config.output_dir, process=found.process_id if found else 0)
    profile_steps = read_window(arguments.profile_steps)
    keep_compiled(arguments.compilation_cache)
    hosts.start(*place, timeout_seconds=arguments.start_timeout)
    folder = train(config, resume=arguments.resume, use_wandb=arguments.wandb, profile_steps=profile_steps,
                   kill_after=arguments.kill_after)
    if jax.process_index() == 0:
        print(f"trained: {folder}; next: {next_command(config, folder)}")
    return 0


if __name__ == "__main__":
    program.run(main, define=define_flags)
