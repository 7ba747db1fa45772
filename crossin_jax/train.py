"""Fine-tune a model on a cross-lingual mixture, or train a small one from scratch.

  python -m crossin_jax.train --config configs/xquad_llama.py --config.optim.learning_rate=1e-4

The run in reading order: mesh, data, model, resume, loop. The same command continues an interrupted
run. SIGTERM saves and exits with 75, Ctrl-C saves and exits with 130; a second Ctrl-C exits at
once, without saving.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from absl import flags
from jax.sharding import Mesh

from crossin_jax import cli, process, provenance
from crossin_jax.checkpoint.fingerprint import fingerprints
from crossin_jax.checkpoint.store import (
    Store,
    check_place,
    identify_start,
    list_steps,
    read_origin,
)
from crossin_jax.checks import check
from crossin_jax.config import Config, Data, Train, UserError, to_dict
from crossin_jax.data.lengths import describe_lost
from crossin_jax.data.loader import Loader, make_loader
from crossin_jax.data.pipeline import Pipeline, open_eval_renderer, open_pipeline
from crossin_jax.files import write_whole
from crossin_jax.guests import open_guest
from crossin_jax.parallel import hosts, roll_call
from crossin_jax.parallel.mesh import check_batch, make_mesh
from crossin_jax.paths import as_path
from crossin_jax.training.held_out import HeldOut
from crossin_jax.training.optim import make_optimizer, make_schedule
from crossin_jax.training.state import (
    AbstractModel,
    abstract_model,
    abstract_state,
    check_base,
    describe_precision,
    flops_per_token,
    load_base,
    model_spec,
    settle_precision,
    start_state,
    to_mesh,
)
from crossin_jax.training.step import (
    COMPILER_OPTIONS,
    StepSettings,
    TrainState,
    make_train_step,
)
from crossin_jax.training.telemetry import Profiler, Telemetry, is_recorded

COMPILATION_CACHE = "~/.cache/crossin_jax/xla"

Scores = Callable[[TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run consists of, before any of its arrays exists."""

    config: Config
    folder: Path
    mesh: Mesh
    data: Pipeline
    loader: Loader
    num_steps: int
    model: AbstractModel
    optimizer: optax.GradientTransformation
    settings: StepSettings
    held_out: Scores | None
    benchmarks: Scores | None


# How the parts of a run belong together:
#
#     configs/x.py ─ set_up ─► Run: mesh, loader, abstract model, optimizer; no array yet
#                                │
#     checkpoints/STEP ─ restore ┤
#     model.path ─ start_state ──┴─► TrainState ◄─── take_steps ◄─── Loader: one batch per step
#                                                        └─► metrics.jsonl, checkpoints, evaluations
def train(
    config: Config,
    *,
    resume: bool = True,
    use_wandb: bool = False,
    profile_steps: Sequence[int] = (),
    kill_after: int | None = None,
) -> Path:
    """Runs one experiment to its last step and returns its folder.

    Raises `SystemExit` with 75 after SIGTERM and with 130 after Ctrl-C, once the current step is
    saved. Raises `UserError` for a setting that is not allowed, and where another run is using the
    folder.
    """
    config = check(config)
    if config.evaluation.benchmarks:
        warn_of_absent_benchmarks(config)
    folder = find_folder(config)
    with hosts.own_folder(folder), process.cleanup(partial(forget_refused, folder)):
        config = settle_precision(config, folder if resume else None)
        hosts.report_saved(partial(describe_saved, folder))
        run = set_up(config, folder)
        with jax.set_mesh(run.mesh), Store(folder, config=config) as store:
            # ---- Resume
            abstract = abstract_state(run.model, run.optimizer, run.mesh)
            state = restore(run, store, abstract) if resume else None
            is_resumed = state is not None
            if state is None:
                state = start_state(config, run.model, abstract, run.optimizer)
            start_weights = identify_start(store, state, is_resumed)
            # Nothing is changed before this line: a refused run leaves the folder as it was.
            if not resume:
                store.set_aside()
            write_config(folder, config)
            if jax.process_index() == 0:
                print(describe_precision(config, run.mesh), file=sys.stderr, flush=True)

            # ---- Loop
            telemetry = Telemetry(
                folder,
                name=config.name,
                start=int(state.step),
                num_steps=run.num_steps,
                groups=run.loader.groups,
                log_every=config.train.log_every,
                use_wandb=use_wandb,
                flops_per_token=flops_per_token(run.model, config.data.length),
                use_tensorboard=config.train.tensorboard,
                config=to_dict(config),
            )
            profiler = Profiler(profile_steps, folder / "profile")
            with (
                hosts.Preemption() as preemption,
                contextlib.closing(run.loader),
                contextlib.closing(telemetry),
                contextlib.closing(profiler),
            ):
                if is_resumed:
                    do_missed_evaluations(run, state, telemetry)
                elif run.held_out:
                    telemetry.write({"step": 0} | run.held_out(state))
                take_steps(
                    run, state, store, preemption, telemetry, profiler, kill_after, start_weights
                )
    return folder


def set_up(config: Config, folder: Path) -> Run:
    """Mesh, data and model of a run; the model is shapes and shardings only, so this takes no
    device memory.
    """
    # ---- Mesh
    mesh = make_mesh(config.mesh)
    check_batch(config.train.batch_size, config.train.accumulation, mesh)

    # ---- Data
    spec = model_spec(config)  # before the data, so that a wrong model folder is reported at once
    data = open_pipeline(config)
    if jax.process_index() == 0:
        warn_of_data(config.data, data, spec.max_length)
    eval_renderer = open_eval_renderer(config, data.tokenizer)  # refuses a wrong template now
    for renderer in (data.renderer, eval_renderer):
        renderer.check_embeddings(spec.vocab_size, config.model.tokenizer or config.model.path)
    open_batches = partial(
        make_loader,
        renderer=data.renderer,
        data=config.data,
        batch_size=config.train.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    loader = open_batches(data.mixture)
    num_steps = config.train.steps or math.ceil(config.train.epochs * loader.steps_per_epoch)

    # ---- Model
    model = abstract_model(config, spec, mesh)
    settings = StepSettings(
        accumulation=config.train.accumulation,
        loss_chunk=config.train.loss_chunk,
        remat=config.model.remat,
        attention=config.model.attention,
        seed=config.seed,
        num_groups=len(loader.groups),
    )

    # ---- Evaluations during training
    held_out = benchmarks = None
    if data.held_out:
        held_out = HeldOut(partial(open_batches, data.held_out), model, settings, mesh)
    if config.train.benchmark_every:
        guest = open_guest("benchmarks")
        benchmarks = guest.Benchmarks(config, eval_renderer, model, mesh)
    return Run(
        config,
        folder,
        mesh,
        data,
        loader,
        num_steps,
        model,
        make_optimizer(config.optim, num_steps),
        settings,
        held_out,
        benchmarks,
    )


def warn_of_absent_benchmarks(config: Config) -> None:
    """Refuses benchmarks as `evaluate` would; a file that only `evaluate` needs may come later."""
    files_may_come = config.train.benchmark_every is None
    absent = open_guest("benchmark rows").check_benchmarks(config, files_may_come)
    if absent and jax.process_index() == 0:
        logging.warning("evaluate will need what is not there yet: %s", ", ".join(absent))


def warn_of_data(settings: Data, data: Pipeline, context: int) -> None:
    """Warns before the first step of rows that are lost and of requests in English; the model reads
    `context` tokens.
    """
    if english := data.mixture.count_english_requests():
        counts = ", ".join(f"{code} {count}" for code, count in english.items())
        logging.warning(
            "these languages have no sentence for requests, so they ask in English: %s", counts
        )
    for line in describe_lost(data.mixture, data.held_out, data.renderer, settings, context):
        logging.warning("data: %s", line)
    if settings.length > context:
        logging.warning(
            "data.length=%d is longer than the context of the model, %d tokens: longer examples "
            "are learned at positions that the model has never seen; set data.length=%d",
            settings.length,
            context,
            context,
        )


def restore(run: Run, store: Store, abstract: TrainState) -> TrainState | None:
    """The state of the newest whole checkpoint, with the loader moved to its data; None in a new
    folder.
    """
    restored = store.restore_newest(abstract, run.config)
    if restored is None:
        return None
    state, position = restored
    run.loader.set_state(position)
    # A checkpoint has no frozen weights: they are read from the base model, if there is one.
    state.frozen = run.model.frozen
    if run.config.model.path:
        (state.frozen,) = load_base(run.config, run.model.frozen)
        place = store.folder / str(int(state.step))
        check_base(run.config, state.frozen, read_origin(place), place)
    return state


# The order within a step, between whose parts a run may be stopped:
#
#     compute ─ report (raises for a non-finite loss) ─ save ─ stop, if a signal asked ─ evaluate
#
# A stopped run has saved but not evaluated. `do_missed_evaluations` does it when the run continues.
def take_steps(
    run: Run,
    state: TrainState,
    store: Store,
    preemption: hosts.Preemption,
    telemetry: Telemetry,
    profiler: Profiler,
    kill_after: int | None,
    start_weights: dict[str, str],
) -> None:
    """The training loop, from the step of the state to the last one."""
    config, loader, num_steps = run.config, run.loader, run.num_steps
    schedule = make_schedule(config.optim, num_steps)
    train_step = jax.jit(
        make_train_step(run.model.graphdef, run.optimizer, run.settings),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS.get(jax.default_backend()),
    )
    source = provenance.describe(
        to_dict(config),
        manifest=run.data.mixture.manifest()["hash"],
        precision=config.model.compute_dtype,
        template=run.data.renderer.hash,
        tokenizer=provenance.identify_tokenizer(run.data.tokenizer),
        base=config.model.path,
        base_weights=fingerprints(state.frozen),
        start_weights=start_weights,
    )
    # The data position of each step that is not reported yet, for the rows of a non-finite loss.
    batch_starts: deque[tuple[int, Any]] = deque(maxlen=config.train.log_every + 1)
    saved_at = time.monotonic()
    try:
        for step in range(int(state.step) + 1, num_steps + 1):
            batch_starts.append((step, loader.position))
            state, metrics = train_step(state, to_mesh(next(loader), run.mesh))
            telemetry.add(step, metrics, schedule(step - 1))
            profiler.after(step, metrics)
            is_last = step == num_steps
            must_stop = preemption.reached(step) and not is_last
            if must_stop or is_last or is_save_due(config.train, step, saved_at):
                # The report comes first: it raises for a non-finite loss, which is not to be saved.
                telemetry.report(schedule(step - 1))
                telemetry.flush()
                store.save(state, loader.get_state(), source)
                saved_at = time.monotonic()
            if must_stop:
                store.wait()
                logging.warning("stopping: step %d is saved; %s", step, describe_command())
                raise SystemExit(process.exit_code())
            for _, scores in due_evaluations(run, step):
                telemetry.write({"step": step} | scores(state))
            if step == kill_after:  # set by the self-test only
                store.wait()
                os.kill(os.getpid(), signal.SIGKILL)
    except FloatingPointError as fault:
        (bad_step,) = fault.args
        start = dict(batch_starts)[bad_step]
        # A step with a non-finite loss changes nothing: this is the state before it.
        message = open_guest("faults").explain(run, bad_step, start, state, store.steps())
        raise UserError(message) from None


def due_evaluations(run: Run, step: int) -> Iterator[tuple[str, Scores]]:
    """(prefix of the names of its metrics, function) of each evaluation that follows a step."""
    settings = run.config.train
    if run.held_out and (is_due(step, settings.eval_every) or step == run.num_steps):
        yield "held_out/", run.held_out
    if run.benchmarks and is_due(step, settings.benchmark_every):
        yield run.config.evaluation.benchmarks[0], run.benchmarks


def do_missed_evaluations(run: Run, state: TrainState, telemetry: Telemetry) -> None:
    """Does the evaluations after the restored step that metrics.jsonl does not have.

    The previous run was stopped after saving this step, before evaluating it.
    """
    step = int(state.step)
    for prefix, scores in due_evaluations(run, step):
        # Process 0 alone writes the file, but all processes must evaluate together.
        if hosts.any_process(not is_recorded(run.folder, step, prefix)):
            telemetry.write({"step": step} | scores(state))


def is_due(step: int, every: int | None) -> bool:
    """Whether a periodic action falls on this step."""
    return every is not None and step % every == 0


def is_save_due(train: Train, step: int, saved_at: float) -> bool:
    """Whether a checkpoint falls on this step, by its number or by the minutes since the last
    one.
    """
    if is_due(step, train.checkpoint_every):
        return True
    if train.checkpoint_every is None or train.checkpoint_minutes is None:
        return False
    # Clocks differ, so the processes must agree. They do so only where they report and wait anyway.
    if jax.process_count() > 1 and not is_due(step, train.log_every):
        return False
    return hosts.any_process(time.monotonic() - saved_at > 60 * train.checkpoint_minutes)


def describe_saved(folder: Path) -> str:
    """The newest whole checkpoint of a run."""
    steps = list_steps(folder / "checkpoints")
    return f"step {max(steps)} is saved" if steps else "nothing is saved yet"


def describe_command() -> str:
    """How to continue a run that this program has saved."""
    words = [word for word in sys.orig_argv[1:] if word != "--noresume"]  # it would start over
    command = f": {shlex.join(['python', *words])}" if words[:1] == ["-m"] else ""
    return f"the same command continues{command}"


def find_folder(config: Config) -> Path:
    """The folder of the run, `output_dir`."""
    check_place(config.output_dir, "output_dir=")
    return as_path(config.output_dir)


def forget_refused(folder: Path) -> None:
    """Removes what a run wrote that was refused before it began, and so has no config.json."""
    if jax.process_index() == 0 and not (folder / "config.json").exists():
        process.remove(folder / "tokenizer")  # trained for settings that may change now


def write_config(folder: Path, config: Config) -> None:
    """Writes the resolved configuration; every checkpoint has its own copy."""
    if jax.process_index() == 0:
        text = json.dumps(to_dict(config), indent=2, ensure_ascii=False)
        write_whole(folder / "config.json", text)


def next_command(config: Config, folder: Path) -> str:
    """What to do with a trained run: answer its benchmarks, or a prompt where it has none."""
    place = shlex.quote(str(folder))
    if config.evaluation.benchmarks:
        return f"python -m crossin_jax.evaluate --checkpoint {place}"
    return f"python -m crossin_jax.generate --model {place} --prompt 'Name a river.'"


def keep_compiled(folder: str = COMPILATION_CACHE) -> None:
    """Keeps compiled programs in a folder across runs; JAX_COMPILATION_CACHE_DIR takes
    precedence.
    """
    if folder and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(as_path(folder)))


def read_window(words: list[str]) -> tuple[int, ...]:
    """The two steps of `--profile_steps`, or none."""
    steps = tuple(int(word) for word in words if word.isdigit())
    if words and (len(steps) != 2 or len(words) != 2 or steps[0] >= steps[1]):
        raise UserError(
            f"--profile_steps={','.join(words)}: give two steps, the first below the second, "
            "e.g. 10,12"
        )
    return steps


def define_flags() -> None:
    """Flags beside the configuration."""
    roll_call.define_flags()
    flags.DEFINE_string("tuned", None, "file of plan --tune: run with the settings it proposes")
    flags.DEFINE_bool(
        "resume",
        True,
        "continue from the newest whole checkpoint in output_dir; --noresume "
        "sets those checkpoints aside and starts from the beginning",
    )
    flags.DEFINE_list(
        "profile_steps", [], "two steps, e.g. 10,12: profile from after the first to the second"
    )
    flags.DEFINE_string(
        "compilation_cache",
        COMPILATION_CACHE,
        "folder of compiled programs kept across runs; empty: none",
    )
    flags.DEFINE_bool(
        "selftest_resume", False, "kill and continue a short run here, and compare it bit by bit"
    )
    flags.DEFINE_integer("kill_after", None, "step after which the self-test kills its run")
    flags.DEFINE_bool("wandb", False, "log to Weights & Biases too, where it is installed")


def main(config: Config, arguments: Any) -> int | None:
    """Joins the processes of the run and trains."""
    if arguments.tuned:
        config = open_guest("proposal").apply_proposal(arguments.tuned, config)
    if arguments.selftest_resume:
        place = hosts.detect_process(
            arguments.coordinator,
            arguments.num_processes,
            arguments.process_id,
            arguments.start_timeout,
        )
        process_id = place.process_id if place else 0
        return open_guest("selftest").run_selftest(config.output_dir, process=process_id)
    profile_steps = read_window(arguments.profile_steps)
    keep_compiled(arguments.compilation_cache)
    with hosts.joined(arguments):
        folder = train(
            config,
            resume=arguments.resume,
            use_wandb=arguments.wandb,
            profile_steps=profile_steps,
            kill_after=arguments.kill_after,
        )
    if jax.process_index() == 0:
        print(f"trained: {folder}; next: {next_command(config, folder)}")
    return 0


if __name__ == "__main__":
    cli.run(main, define=define_flags)
