"""Compile a run for TPUs that are not there: does it fit, what does it cost, and what to change where it does not.

  python -m crossin_jax.plan --config configs/xquad_llama.py:DATA --topology v5e:4x4 [--tune --out FILE.json]

Compiled are the programs of the run itself: loading, the training step, and prefill and decoding of the benchmarks. Of
the model config.json is enough; data need not be there. `--json` prints the numbers for other programs. `--tune` looks
for the fastest way to run the step; `python -m crossin_jax.train --tuned=FILE.json` takes what it proposes.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from crossin_jax import program
from crossin_jax.checkpoint.hf import is_adapter, leaf_path
from crossin_jax.checkpoint.hf_map import weight_keys
from crossin_jax.checkpoint.stream import layers_at_once, make_writer, predict_peak
from crossin_jax.checks import check
from crossin_jax.config import Config, UserError, replace_settings
from crossin_jax.generation.engine import RING
from crossin_jax.generation.plan import LENGTH_BUCKETS, bucket
from crossin_jax.generation.programs import CHUNK, Programs
from crossin_jax.generation.sampling import make_sampling
from crossin_jax.models.attention import Kernel, choose_kernel, kernel_flops
from crossin_jax.outputs import check_output
from crossin_jax.parallel.mesh import batch_sharding, check_batch, make_mesh
from crossin_jax.parallel.topology import Program, Topology, compile_program, open_topology, shard_bytes, uncached
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import AbstractModel, abstract_model, abstract_state, model_spec
from crossin_jax.training.step import COMPILER_OPTIONS, StepSettings, make_train_step
from crossin_jax.training.telemetry import peak_flops

PROGRAMS = ("load", "train", "prefill", "decode")
FILE_BYTES = 2  # of a number in a checkpoint's bfloat16 file


@dataclasses.dataclass(frozen=True)
class Phase:
    """A compiled program of the run; all numbers are per chip and per execution (decode: per token of every row)."""

    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    offloaded_bytes: int  # in the host's memory, where model.remat=offload keeps what the backward pass needs
    compile_seconds: float
    flops: float | None = None  # executed matrix FLOPs, attention kernels included; None and below: does not fit
    kernel_flops: float | None = None  # of them in attention kernels, by formula
    hbm_bytes: float | None = None
    cycles: float | None = None  # the compiler's estimate, without attention kernels and collectives
    matrix_cycles: float | None = None
    sent_bytes: dict[str, float] | None = None
    collectives: dict[str, float] | None = None
    floor_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would need and cost on a topology."""

    topology: str
    chips: int
    hosts: int
    hbm_limit: int
    mesh: dict[str, int]
    fits: bool
    phases: dict[str, Phase]
    read_bytes: int  # of the checkpoint by the busiest host
    host_peak_bytes: int  # host memory while it loads
    saved_bytes: int  # trained weights and moments that a host copies and writes for a checkpoint
    tokens_per_step: int
    steps: int | None
    hours_floor: float | None
    change: dict[str, Any]  # settings that differ from the configuration that was asked for


def make_plan(config: Config, topology: str | Topology, programs: tuple[str, ...] = PROGRAMS) -> Plan:
    """Compiles the programs of a run for a topology; `programs` chooses among PROGRAMS."""
    if isinstance(topology, str):
        topology = open_topology(topology)
    mesh, spec = make_mesh(config.mesh, list(topology.devices)), model_spec(config)
    check_batch(config.train.batch_size, config.train.accumulation, mesh)
    model = abstract_model(config, spec, mesh)
    optimizer = make_optimizer(config.optim, config.train.steps or 1000)
    state = abstract_state(model, optimizer, mesh)
    host_peak = predict_peak(0, max(_file_sizes(config, model), default=0))
    phases = {}
    with jax.set_mesh(mesh):
        if "load" in programs and config.model.path:
            phases["load"] = _plan_load(config, topology, mesh, model)
        if "train" in programs:
            phases["train"] = _plan_step(config, topology, mesh, model, optimizer, state)
        if config.evaluation.benchmarks and {"prefill", "decode"} & set(programs):
            phases |= _plan_generation(config, topology, mesh, model)
    beside = shard_bytes(state.optimizer) if config.train.benchmark_every else 0  # moments stay during a benchmark
    fits = all(phase.peak_bytes + (beside if name in ("prefill", "decode") else 0) <= topology.hbm_limit
               for name, phase in phases.items())
    seconds = phases["train"].floor_seconds if "train" in phases else None
    chips_per_host = len(topology.devices) // topology.num_hosts
    return Plan(topology.name, len(topology.devices), topology.num_hosts, topology.hbm_limit, dict(mesh.shape), fits,
                phases, _read_bytes(config, model), host_peak,
                shard_bytes((state.trainable, state.optimizer)) * chips_per_host,
                config.train.batch_size * config.data.length, config.train.steps,
                seconds * config.train.steps / 3600 if seconds and config.train.steps else None, {})


def _plan_load(config: Config, topology: Topology, mesh: Mesh, model: AbstractModel) -> Phase:
    """Writing a piece of the largest stack of layers, beside all other weights."""
    leaves = jax.tree_util.tree_flatten_with_path((model.trainable, model.frozen))[0]
    weights = {leaf_path(path): leaf for path, leaf in leaves if not is_adapter(leaf_path(path))}
    stacks = {path: leaf for path, leaf in weights.items() if path.startswith("layers/") and path.endswith("/weight")}
    path, array = max(stacks.items(), key=lambda item: np.prod(item[1].shape))
    scale = weights.get(path.removesuffix("weight") + "scale")
    targets = (array,) if scale is None else (array, scale)
    layers = layers_at_once(int(np.prod(array.shape[1:])) * FILE_BYTES, max(_file_sizes(config, model)))
    piece = jax.ShapeDtypeStruct((min(layers, array.shape[0]), *array.shape[1:]), jnp.bfloat16, sharding=array.sharding)
    compiled = compile_program(make_writer(array, scale), targets, piece, jax.ShapeDtypeStruct((), jnp.int32))
    others = shard_bytes(weights) - shard_bytes(targets)
    compiled = dataclasses.replace(compiled, argument_bytes=compiled.argument_bytes + others,
                                   peak_bytes=compiled.peak_bytes + others)
    phase = _phase(topology, mesh, model, compiled, Kernel("reference"), 0, 0)
    return dataclasses.replace(phase, floor_seconds=None)  # files are slower than the chip


def _plan_step(config: Config, topology: Topology, mesh: Mesh, model: AbstractModel, optimizer: Any,
               state: Any) -> Phase:
    """The training step, with the settings that `train` gives it."""
    rows, length = config.train.batch_size, config.data.length
    kernel = choose_kernel(config.model.attention, model.spec, length, config.model.compute_dtype, "tpu")
    groups = max(1, len(config.data.components)) * max(1, len(config.data.languages))
    static = StepSettings(config.train.accumulation, config.train.loss_chunk, config.model.remat, kernel, config.seed,
                          groups)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
    batch = {name: ids for name in ("tokens_BT", "targets_BT", "segment_ids_BT", "positions_BT", "group_BT")}
    batch["learned_BT"] = jax.ShapeDtypeStruct(ids.shape, bool, sharding=ids.sharding)
    step = jax.jit(make_train_step(model.graphdef, optimizer, static), donate_argnums=0,
                   compiler_options=COMPILER_OPTIONS["tpu"])
    compiled = compile_program(step, state, batch)
    return _phase(topology, mesh, model, compiled, kernel, rows // config.train.accumulation, length)


class AbsentPrograms(Programs):
    """The generation engine's programs, compiled and never run."""

    def _run(self, kind: str, key: tuple, program: Any, *inputs: Any, donate: tuple[int, ...] = ()) -> Any:
        program.__name__ = kind
        function = jax.jit(program, donate_argnums=donate)
        if kind in PROGRAMS:
            return compile_program(function, *inputs)
        with uncached():
            compiled = function.lower(*inputs).compile()
        return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                            compiled.out_info, compiled.output_shardings)


def _plan_generation(config: Config, topology: Topology, mesh: Mesh, model: AbstractModel) -> dict[str, Phase]:
    """Prefill and one decoding step for the longest prompts that the configuration allows."""
    settings, spec = config.evaluation, model.spec
    limit = min(settings.max_new_tokens, spec.max_length - 1)
    buckets = (*(size for size in LENGTH_BUCKETS if size < spec.max_length), spec.max_length)
    length = bucket(min(config.data.length, spec.max_length - limit), buckets)
    ring = bucket(min(limit, RING), buckets)
    kernel = choose_kernel(config.model.attention, spec, length, config.model.compute_dtype, "tpu", required=False)
    programs = AbsentPrograms(model.graphdef, nnx.merge_state(model.trainable, model.frozen), mesh=mesh,
                              batch_size=settings.batch_size, cache_dtype=settings.cache_dtype, eos_ids=(0,), pad_id=0,
                              attention=kernel)
    sampling = make_sampling(settings.temperature, settings.top_k, settings.top_p)
    prefill = programs.prefill(None, length, [np.zeros(length, np.int32)], [limit], [0], sampling)
    decode = programs.decode(programs.create(length, ring), length, np.ones(programs.batch_size, bool), CHUNK,
                             programs.batch_size, sampling)
    return {"prefill": _phase(topology, mesh, model, prefill, kernel, programs.admitted, length),
            "decode": _phase(topology, mesh, model, decode, kernel, programs.batch_size, 1)}


def _phase(topology: Topology, mesh: Mesh, model: AbstractModel, compiled: Program, kernel: Kernel, rows: int,
           length: int) -> Phase:
    sizes = (compiled.argument_bytes, compiled.temporary_bytes, compiled.peak_bytes, compiled.offloaded_bytes,
             compiled.compile_seconds)
    cost = compiled.cost
    if cost is None:
        return Phase(*sizes)
    rows_here = rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    in_kernels = kernel_flops(model.spec, kernel, cost.kernels, rows_here, length, mesh.shape["tensor"])
    flops = cost.flops + in_kernels
    # every argument is read at least once, and the chip is never faster than its data sheet
    floor = max(flops / peak_flops(topology.devices[0]), compiled.argument_bytes / topology.chip.hbm)
    return Phase(*sizes, flops, in_kernels, cost.bytes, cost.cycles, cost.matrix_cycles, dict(cost.sent),
                 dict(cost.collectives), floor)


def _file_sizes(config: Config, model: AbstractModel) -> list[int]:
    """Bytes of each kind of tensor in the checkpoint's files."""
    if config.model.path is None:
        return []
    return [int(np.prod(key.file_shape)) * FILE_BYTES for key in weight_keys(model.spec).values()]


def _read_bytes(config: Config, model: AbstractModel) -> int:
    """What the busiest host reads of the checkpoint's files: the slices that its chips hold, each once."""
    if config.model.path is None:
        return 0
    by_host: dict[int, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path((model.trainable, model.frozen))[0]:
        name, slices = leaf_path(path), {}
        if is_adapter(name) or name.endswith("/scale"):
            continue  # made here: the files hold neither
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            box = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
            slices.setdefault(device.process_index, set()).add(box)
        for host, boxes in slices.items():
            numbers = sum(int(np.prod([stop - start for start, stop in box])) for box in boxes)
            by_host[host] = by_host.get(host, 0) + numbers * FILE_BYTES
    return max(by_host.values())


# ---- what to change where it does not fit


def find_change(config: Config, topology: Topology, failed: Plan) -> Plan | None:
    """The plan of the first change that fits, the smallest first; each is compiled. None where none does."""
    if failed.phases["train"].peak_bytes <= topology.hbm_limit and (found := _find_batch(config, topology, failed)):
        return found
    for change in changes(config, topology):
        changed = check(replace_settings(config, change))
        try:
            mesh = make_mesh(changed.mesh, list(topology.devices))
            check_batch(changed.train.batch_size, changed.train.accumulation, mesh)
            model = abstract_model(changed, model_spec(changed), mesh)
        except UserError:
            continue  # this mesh does not divide the model or the batch
        state = abstract_state(model, make_optimizer(changed.optim, 1000), mesh)
        if shard_bytes(state) >= topology.hbm_limit:
            continue  # the state alone is too big: nothing to compile
        print(f"trying {describe_change(change)}", file=sys.stderr)
        plan = make_plan(changed, topology, tuple(failed.phases))
        if plan.fits:
            return dataclasses.replace(plan, change=change)
    return None


def _find_batch(config: Config, topology: Topology, failed: Plan) -> Plan | None:
    """The plan with the largest evaluation.batch_size that fits, where training fits and the benchmarks do not."""
    rows = config.evaluation.batch_size
    while (rows := rows // 2) >= failed.mesh["data"] * failed.mesh["fsdp"]:
        change = {"evaluation.batch_size": rows}
        print(f"trying {describe_change(change)}", file=sys.stderr)
        plan = make_plan(check(replace_settings(config, change)), topology, ("prefill", "decode"))
        if plan.fits:
            return dataclasses.replace(failed, fits=True, phases=failed.phases | plan.phases, change=change)
    return None


def changes(config: Config, topology: Topology) -> Iterator[dict[str, Any]]:
    """Settings to try, from those that change nothing but speed to those that need another mesh."""
    weaker = ("none", "dots", "full")
    kept = config.model.remat if config.model.remat in weaker else "dots"
    remats = [{"model.remat": name} for name in weaker[weaker.index(kept) + 1:]]
    parts = config.train.accumulation
    micro = [{"train.accumulation": parts * factor} for factor in (2, 4, 8, 16)
             if config.train.batch_size % (parts * factor) == 0]
    here = [*remats, *([remats[-1] | one for one in micro] if remats else micro)]
    yield from here
    devices, mesh = len(topology.devices), config.mesh
    least = here[-1] if here else {}
    for tensor in sorted({mesh.tensor, 2, 4, 8}):
        fsdp = devices // tensor
        if tensor >= mesh.tensor and fsdp * tensor == devices and (fsdp, tensor) != (mesh.fsdp, mesh.tensor):
            moved = {"mesh.data": None, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
            yield from (moved, *(moved | remat for remat in remats[-1:]))
            if least:
                yield moved | least


def describe_change(change: dict[str, Any]) -> str:
    """A change as flags, e.g. "--config.model.remat=full"."""
    return " ".join(f"--config.{name}={value}" for name, value in change.items())


# ---- what is printed


def render(plan: Plan) -> str:
    """The plan as text for people."""
    gib, lines = 2**30, []
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines.append(f"{plan.topology}: {plan.chips} chips on {plan.hosts} hosts, mesh {mesh}, "
                 f"{plan.tokens_per_step:,} tokens per step")
    names = list(plan.phases)
    rows = [("per chip", names)]

    def row(label, value, form="{:,.2f}"):
        cells = [value(phase) for phase in plan.phases.values()]
        rows.append((label, ["-" if cell is None else form.format(cell) for cell in cells]))

    def scaled(field, unit):
        return lambda phase: None if getattr(phase, field) is None else getattr(phase, field) / unit

    row("HBM, arguments, GiB", scaled("argument_bytes", gib))
    row("HBM, temporaries, GiB", scaled("temporary_bytes", gib))
    row(f"HBM, peak of {plan.hbm_limit / gib:.2f} GiB", scaled("peak_bytes", gib))
    if any(phase.offloaded_bytes for phase in plan.phases.values()):
        row("memory of its host, GiB", scaled("offloaded_bytes", gib))
    row("matrix TFLOP executed", scaled("flops", 1e12), "{:,.3f}")
    row("  of it in attention kernels (formula)", scaled("kernel_flops", 1e12), "{:,.3f}")
    row("HBM traffic, GB", scaled("hbm_bytes", 1e9))
    row("compiler's Mcycles", scaled("cycles", 1e6), "{:,.1f}")
    row("  of it matrix work", lambda phase: phase.matrix_cycles / phase.cycles if phase.cycles else None, "{:.0%}")
    for kind in sorted({kind for phase in plan.phases.values() for kind in phase.sent_bytes or ()}):
        row(f"sent by {kind}, GB", lambda phase, kind=kind: (phase.sent_bytes or {}).get(kind, 0) / 1e9)
        row("  times", lambda phase, kind=kind: (phase.collectives or {}).get(kind, 0), "{:,.0f}")
    row("compiled here in seconds", lambda phase: phase.compile_seconds, "{:,.0f}")
    row("seconds at least (ceiling of the chip)", lambda phase: phase.floor_seconds, "{:,.4f}")
    lines += [f"  {label:40}" + "".join(f"{cell:>14}" for cell in cells) for label, cells in rows]
    if plan.read_bytes:
        lines.append(f"loading: a host reads {plan.read_bytes / gib:.2f} GiB of weights; its memory peaks at about "
                     f"{plan.host_peak_bytes / gib:.2f} GiB")
    lines.append(f"checkpoints: a host copies and writes {plan.saved_bytes / gib:.2f} GiB")
    train = plan.phases.get("train")
    if train and train.floor_seconds:
        hours = (f"; {plan.steps:,} steps take at least {plan.hours_floor:.2f} hours" if plan.steps else
                 "; set train.steps for the hours of the run")
        lines.append(f"training: at most {plan.tokens_per_step / train.floor_seconds:,.0f} tokens/s{hours}")
    lines.append("fits" if plan.fits else "does not fit")
    return "\n".join(lines)


def define_flags() -> None:
    """Flags beside the configuration."""
    flags.DEFINE_string("topology", None, "TPU slice, e.g. v5e:4x4, v6e:2x4, v5p:2x2x4, v4:2x2x2")
    flags.DEFINE_bool("json", False, "print JSON")
    flags.DEFINE_bool("search", True, "where it does not fit, compile changes until one does")
    flags.DEFINE_bool("tune", False, "compile variants of the training step and propose the fastest that fits")
    flags.DEFINE_string("out", None, "file for the proposal of --tune, which train takes as --tuned=FILE")


def main(config: Config, arguments: Any) -> int:
    """Plans, and looks for a change where it does not fit; 1 where none was found."""
    if not arguments.topology:
        raise UserError("--topology is missing; give CHIP:SHAPE, e.g. --topology v5e:4x4")
    jax.config.update("jax_platforms", "cpu")  # real chips, where there are any, stay free
    topology = open_topology(arguments.topology)
    if arguments.out:
        check_output("--out", Path(arguments.out))
    if arguments.out and not arguments.tune:
        raise UserError("--out is for the proposal of --tune; add --tune, or leave it out")
    if arguments.tune:
        return _tune(config, topology, arguments)
    plan = make_plan(config, topology)
    better = None if plan.fits or not arguments.search else find_change(config, topology, plan)
    if arguments.json:
        print(json.dumps({"plan": dataclasses.asdict(plan), "change": better and dataclasses.asdict(better)}, indent=1))
    else:
        print(render(plan))
        if better:
            print(f"\nthe smallest change that fits: {describe_change(better.change)}\n{render(better)}")
        elif not plan.fits and arguments.search:
            print("no change of model.remat, train.accumulation, mesh or evaluation.batch_size fits: take more chips, "
                  "LoRA, or model.param_dtype=bfloat16")
    return 0 if plan.fits or better else 1


def _tune(config: Config, topology: Topology, arguments: Any) -> int:
    """Proposes how to train; 1 where nothing fits."""
    from crossin_jax.tune import propose

    plan = propose(config, topology, arguments.out, lambda line: print(line, file=sys.stderr, flush=True))
    if arguments.json:
        print(json.dumps({"plan": plan and dataclasses.asdict(plan)}, indent=1))
    elif plan:
        print(f"{render(plan)}\n\nproposed: {describe_change(plan.change) or 'the configuration as it is'}")
        if arguments.out:
            print(f"to train with it: python -m crossin_jax.train --config ... --tuned={arguments.out}")
    else:
        print("nothing fits: take more chips, LoRA, or model.param_dtype=bfloat16")
    return 0 if plan and plan.fits else 1


if __name__ == "__main__":
    program.run(main, define=define_flags)
