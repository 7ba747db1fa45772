"""Compiles the programs of a run for absent TPUs, and looks for changes if it does not fit.

Shape letters: B batch rows · T positions.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from crossin_jax.checkpoint.hf import is_adapter, leaf_path
from crossin_jax.checkpoint.hf_map import weight_keys
from crossin_jax.checkpoint.weights import layers_at_once, make_writer, predict_peak
from crossin_jax.checks import check
from crossin_jax.config import Config, UserError
from crossin_jax.generation.batching import LENGTH_BUCKETS, bucket
from crossin_jax.generation.decoding import RING
from crossin_jax.generation.programs import CHUNK, Programs
from crossin_jax.generation.sampling import make_sampling
from crossin_jax.models.attention import Kernel, choose_kernel
from crossin_jax.parallel.mesh import batch_sharding, check_batch, count_slices, make_mesh
from crossin_jax.plan.cost import Cost, kernel_flops
from crossin_jax.plan.proposal import replace_settings
from crossin_jax.plan.schedule import BETWEEN_SLICES, Speed, waiting_seconds
from crossin_jax.plan.topology import (
    Chip,
    Program,
    Topology,
    compile_program,
    open_topology,
    shard_bytes,
    uncached,
)
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import (
    AbstractModel,
    abstract_model,
    abstract_state,
    model_spec,
    resolve_precision,
)
from crossin_jax.training.step import COMPILER_OPTIONS, StepSettings, make_train_step
from crossin_jax.training.telemetry import peak_flops

PROGRAMS = ("load", "train", "prefill", "decode")
# bytes of a number in a checkpoint's bfloat16 file
FILE_BYTES = 2
GIB = 2**30
# seconds until a collective sends, over links and over the network, in the upper estimates;
# assumed: no data sheet has them
COLLECTIVE_STARTS = (5e-6, 1e-4)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A compiled program of the run; all numbers are per chip and per execution.

    Decode counts one token of every row. A program that does not fit has no costs: they are None.
    Seconds in pairs are estimates, the lower and the upper one: see `_estimate`.
    """

    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    # in the host's memory, where model.remat=offload keeps what the backward pass needs
    offloaded_bytes: int
    compile_seconds: float
    # executed matrix FLOPs, and those of them in attention kernels, which follow from a formula
    flops: float | None = None
    kernel_flops: float | None = None
    hbm_bytes: float | None = None
    # the compiler's estimate, without attention kernels and collectives
    cycles: float | None = None
    matrix_cycles: float | None = None
    sent_bytes: dict[str, float] | None = None
    collectives: dict[str, float] | None = None
    floor_seconds: float | None = None
    # in which the chip only waits for others
    waiting_seconds: tuple[float, float] | None = None
    seconds: tuple[float, float] | None = None
    # those of sent_bytes that go while other work runs
    beside_bytes: dict[str, float] | None = None
    # of the batch, or prompts that a run of the program serves
    rows: int = 0


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
    # what the busiest host reads of the model's files, and its peak of memory meanwhile
    read_bytes: int
    host_peak_bytes: int
    # trained weights and moments that a host copies and writes for a checkpoint
    saved_bytes: int
    tokens_per_step: int
    steps: int | None
    # of all steps: the estimates
    hours: tuple[float, float] | None
    # settings that differ from the given configuration
    change: dict[str, Any]
    # of 1,000 prompts of full length, each with an answer of `answer_tokens`
    answer_hours: tuple[float, float] | None = None
    answer_tokens: int = 0


def make_plan(
    config: Config, topology: str | Topology, programs: tuple[str, ...] = PROGRAMS
) -> Plan:
    """Compiles the programs of a run for a topology; `programs` are some of PROGRAMS."""
    if isinstance(topology, str):
        topology = open_topology(topology)
    mesh, spec = make_mesh(config.mesh, list(topology.devices)), model_spec(config)
    config = resolve_precision(config, topology.devices[0])
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
    # The optimizer's moments stay on the chip while training asks a benchmark.
    beside = shard_bytes(state.optimizer) if config.train.benchmark_every else 0
    fits = all(
        phase.peak_bytes + (beside if name in ("prefill", "decode") else 0) <= topology.hbm_limit
        for name, phase in phases.items()
    )
    seconds = phases["train"].seconds if "train" in phases else None
    chips_per_host = len(topology.devices) // topology.num_hosts
    return Plan(
        topology.name,
        len(topology.devices),
        topology.num_hosts,
        topology.hbm_limit,
        dict(mesh.shape),
        fits,
        phases,
        _read_bytes(config, model),
        host_peak,
        shard_bytes((state.trainable, state.optimizer)) * chips_per_host,
        config.train.batch_size * config.data.length,
        config.train.steps,
        tuple(one * config.train.steps / 3600 for one in seconds)
        if seconds and config.train.steps
        else None,
        {},
        _estimate_answers(phases, config.evaluation.max_new_tokens),
        config.evaluation.max_new_tokens,
    )


def _estimate_answers(phases: dict[str, Phase], tokens: int) -> tuple[float, float] | None:
    """Hours of 1,000 prompts of full length with answers of so many tokens: lower, upper."""
    prefill, decode = phases.get("prefill"), phases.get("decode")
    if not (prefill and decode and prefill.seconds and decode.seconds):
        return None
    return tuple(
        1000 * (first / prefill.rows + tokens * more / decode.rows) / 3600
        for first, more in zip(prefill.seconds, decode.seconds, strict=True)
    )


def _plan_load(config: Config, topology: Topology, mesh: Mesh, model: AbstractModel) -> Phase:
    """Writing a piece of the largest stack of layers, beside all other weights."""
    # The loader writes some layers of a stack at a time, straight to where they are sharded:
    #   q_proj/weight  (L, N, H, D)  ◄── layers 0 to 3 ── layers 4 to 7 ── …
    leaves = jax.tree_util.tree_flatten_with_path((model.trainable, model.frozen))[0]
    weights = {leaf_path(path): leaf for path, leaf in leaves if not is_adapter(leaf_path(path))}
    stacks = {
        path: leaf
        for path, leaf in weights.items()
        if path.startswith("layers/") and path.endswith("/weight")
    }
    path, array = max(stacks.items(), key=lambda item: np.prod(item[1].shape))
    scale = weights.get(path.removesuffix("weight") + "scale")
    targets = (array,) if scale is None else (array, scale)
    layers = layers_at_once(
        int(np.prod(array.shape[1:])) * FILE_BYTES, max(_file_sizes(config, model))
    )
    piece = jax.ShapeDtypeStruct(
        (min(layers, array.shape[0]), *array.shape[1:]), jnp.bfloat16, sharding=array.sharding
    )
    compiled = compile_program(
        make_writer(array, scale), targets, piece, jax.ShapeDtypeStruct((), jnp.int32)
    )
    others = shard_bytes(weights) - shard_bytes(targets)
    compiled = dataclasses.replace(
        compiled,
        argument_bytes=compiled.argument_bytes + others,
        peak_bytes=compiled.peak_bytes + others,
    )
    phase = _phase(topology, mesh, model, compiled, Kernel("reference"), 0, 0)
    # No lower limit of the time: files are slower than the chip.
    return dataclasses.replace(phase, floor_seconds=None, waiting_seconds=None, seconds=None)


def _plan_step(
    config: Config, topology: Topology, mesh: Mesh, model: AbstractModel, optimizer: Any, state: Any
) -> Phase:
    """The training step, with the settings that `train` gives it."""
    rows, length = config.train.batch_size, config.data.length
    kernel = choose_kernel(
        config.model.attention, model.spec, length, config.model.compute_dtype, "tpu"
    )
    groups = max(1, len(config.data.components)) * max(1, len(config.data.languages))
    static = StepSettings(
        config.train.accumulation,
        config.train.loss_chunk,
        config.model.remat,
        kernel,
        config.seed,
        groups,
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
    names = ("tokens_BT", "targets_BT", "segment_ids_BT", "positions_BT", "group_BT")
    batch = dict.fromkeys(names, ids)
    batch["loss_mask_BT"] = jax.ShapeDtypeStruct(ids.shape, bool, sharding=ids.sharding)
    step = jax.jit(
        make_train_step(model.graphdef, optimizer, static),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS["tpu"],
    )
    compiled = compile_program(step, state, batch)
    phase = _phase(
        topology, mesh, model, compiled, kernel, rows // config.train.accumulation, length
    )
    return dataclasses.replace(phase, rows=rows)


class AbsentPrograms(Programs):
    """The generation engine's programs, compiled but never run.

    Instead of arrays they return the shapes of arrays, which the next program is compiled for.
    """

    def _run(
        self, kind: str, key: tuple, program: Any, *inputs: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        program.__name__ = kind
        function = jax.jit(program, donate_argnums=donate)
        if kind in PROGRAMS:
            return compile_program(function, *inputs)
        with uncached():
            compiled = function.lower(*inputs).compile()
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            compiled.out_info,
            compiled.output_shardings,
        )


def _plan_generation(
    config: Config, topology: Topology, mesh: Mesh, model: AbstractModel
) -> dict[str, Phase]:
    """Prefill and one decoding step for the longest prompts that the configuration allows."""
    settings, spec = config.evaluation, model.spec
    limit = min(settings.max_new_tokens, spec.max_length - 1)
    buckets = (*(size for size in LENGTH_BUCKETS if size < spec.max_length), spec.max_length)
    length = bucket(min(config.data.length, spec.max_length - limit), buckets)
    ring = bucket(min(limit, RING), buckets)
    kernel = choose_kernel(
        config.model.attention, spec, length, config.model.compute_dtype, "tpu", required=False
    )
    programs = AbsentPrograms(
        model.graphdef,
        nnx.merge_state(model.trainable, model.frozen),
        mesh=mesh,
        batch_size=settings.batch_size,
        cache_dtype=settings.cache_dtype,
        eos_ids=(0,),
        pad_id=0,
        attention=kernel,
    )
    sampling = make_sampling(settings.temperature, settings.top_k, settings.top_p)
    prefill = programs.prefill(None, length, [np.zeros(length, np.int32)], [limit], [0], sampling)
    decode = programs.decode(
        programs.create(length, ring),
        length,
        np.ones(programs.batch_size, bool),
        CHUNK,
        programs.batch_size,
        sampling,
    )
    return {
        "prefill": _phase(topology, mesh, model, prefill, kernel, programs.admitted, length),
        "decode": _phase(topology, mesh, model, decode, kernel, programs.batch_size, 1),
    }


def _phase(
    topology: Topology,
    mesh: Mesh,
    model: AbstractModel,
    compiled: Program,
    kernel: Kernel,
    rows: int,
    length: int,
) -> Phase:
    """A compiled program with its costs; `rows` and `length` are those that attention computes."""
    cost = compiled.cost
    sizes = {
        field.name: getattr(compiled, field.name)
        for field in dataclasses.fields(Program)
        if field.name != "cost"
    }
    if cost is None:
        return Phase(**sizes)
    rows_here = rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    in_kernels = kernel_flops(
        model.spec, kernel, cost.kernels, rows_here, length, mesh.shape["tensor"]
    )
    flops = cost.flops + in_kernels
    # Every argument is read at least once, and the chip is never faster than its data sheet.
    peak = peak_flops(topology.devices[0])
    floor = max(flops / peak, compiled.argument_bytes / topology.chip.hbm)
    waiting, seconds = _estimate(topology.chip, cost, floor, in_kernels / peak)
    return Phase(
        **sizes,
        flops=flops,
        kernel_flops=in_kernels,
        hbm_bytes=cost.bytes,
        cycles=cost.cycles,
        matrix_cycles=cost.matrix_cycles,
        sent_bytes=dict(cost.sent),
        beside_bytes=dict(cost.beside),
        collectives=dict(cost.collectives),
        floor_seconds=floor,
        waiting_seconds=waiting,
        seconds=seconds,
        rows=rows,
    )


def _estimate(
    chip: Chip, cost: Cost, floor: float, kernels: float
) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """Seconds of waiting for others, and of one run, each lower and upper; None if unknown."""
    if chip.network is None and any(kind.endswith(BETWEEN_SLICES) for kind in cost.sent):
        return None, None
    # The lower one: as fast as the data sheet says, with all links in use. The upper one: the
    # compiler's cycles, attention kernels at half the peak, one link in use, half the network, and
    # a start of every collective.
    network = chip.network or math.inf
    fast = Speed(chip.clock, chip.links, network)
    slow = Speed(chip.clock, chip.links / chip.num_links, network / 2, *COLLECTIVE_STARTS)
    waiting = tuple(waiting_seconds(cost.timelines, speed) for speed in (fast, slow))
    upper = cost.cycles / chip.clock + 2 * kernels + waiting[1]
    return waiting, (floor + waiting[0], max(floor + waiting[1], upper))


def _file_sizes(config: Config, model: AbstractModel) -> list[int]:
    """Bytes of each kind of tensor in the checkpoint's files."""
    if config.model.path is None:
        return []
    return [int(np.prod(key.file_shape)) * FILE_BYTES for key in weight_keys(model.spec).values()]


def _read_bytes(config: Config, model: AbstractModel) -> int:
    """Bytes that the busiest host reads of the files: the slices of its chips, each once."""
    if config.model.path is None:
        return 0
    by_host: dict[int, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path((model.trainable, model.frozen))[0]:
        name, slices = leaf_path(path), {}
        if is_adapter(name) or name.endswith("/scale"):
            continue  # adapters and scales are made here: the files have neither
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            # (start, stop) of the slice in every dimension; chips that hold the same slice share it
            box = tuple(
                part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)
            )
            slices.setdefault(device.process_index, set()).add(box)
        for host, boxes in slices.items():
            numbers = sum(int(np.prod([stop - start for start, stop in box])) for box in boxes)
            by_host[host] = by_host.get(host, 0) + numbers * FILE_BYTES
    return max(by_host.values())


# ---- What to change if it does not fit


def find_change(config: Config, topology: Topology, failed: Plan) -> Plan | None:
    """The plan of the smallest change that fits, found by compiling; None if no change fits."""
    if failed.phases["train"].peak_bytes <= topology.hbm_limit and (
        found := _find_batch(config, topology, failed)
    ):
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
    """The plan with the largest evaluation.batch_size that fits; training fits already."""
    rows = config.evaluation.batch_size
    while (rows := rows // 2) >= failed.mesh["data"] * failed.mesh["fsdp"]:
        change = {"evaluation.batch_size": rows}
        print(f"trying {describe_change(change)}", file=sys.stderr)
        plan = make_plan(check(replace_settings(config, change)), topology, ("prefill", "decode"))
        if plan.fits:
            return dataclasses.replace(
                failed, fits=True, phases=failed.phases | plan.phases, change=change
            )
    return None


def changes(config: Config, topology: Topology) -> Iterator[dict[str, Any]]:
    """Settings to try, from those that change only the speed to those that need another mesh."""
    # From what keeps the most for the backward pass to what keeps the least.
    weaker = ("none", "dots", "full")
    kept = config.model.remat if config.model.remat in weaker else "dots"
    remats = [{"model.remat": name} for name in weaker[weaker.index(kept) + 1 :]]
    parts = config.train.accumulation
    micro = [
        {"train.accumulation": parts * factor}
        for factor in (2, 4, 8, 16)
        if config.train.batch_size % (parts * factor) == 0
    ]
    # First less memory per token, then with the least of it also fewer tokens at once.
    here = [*remats, *([remats[-1] | one for one in micro] if remats else micro)]
    yield from here
    # The chips of one slice, for data alone may cross to another.
    devices, mesh = len(topology.devices) // count_slices(topology.devices), config.mesh
    least = here[-1] if here else {}
    for tensor in sorted({mesh.tensor, 2, 4, 8}):
        fsdp = devices // tensor
        if (
            tensor >= mesh.tensor
            and fsdp * tensor == devices
            and (fsdp, tensor) != (mesh.fsdp, mesh.tensor)
        ):
            moved = {"mesh.data": None, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
            yield from (moved, *(moved | remat for remat in remats[-1:]))
            if least:
                yield moved | least


def describe_change(change: dict[str, Any]) -> str:
    """A change as flags, e.g. "--config.model.remat=full"."""
    return " ".join(f"--config.{name}={value}" for name, value in change.items())
