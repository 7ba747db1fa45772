"""TPUs that are not there: their devices by name, and programs compiled for them."""

import contextlib
import dataclasses
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from crossin_jax.config import UserError
from crossin_jax.parallel.cost import Cost, count

FORMS = ("v4:2x2x1", "v4:2x2x2", "v5e:2x2", "v5e:4x4", "v5e:8x16", "v5p:2x2x1", "v5p:4x4x4", "v6e:2x4", "v6e:16x16")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class NoCompiler(UserError):
    """The TPU compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do, from the maker's data sheets: bytes per second, cycles per second."""

    hbm: float
    links: float  # what all links together can send
    clock: float  # peak FLOP/s over 2 * 128 * 128 per unit: 8 such units in v4 and v5p, 4 in v5e, 16 in v6e


CHIPS = {"v4": Chip(1.228e12, 3.0e11, 1.05e9), "v5e": Chip(8.19e11, 2.0e11, 1.5e9),
         "v5p": Chip(2.765e12, 6.0e11, 1.75e9), "v6e": Chip(1.64e12, 4.0e11, 1.75e9)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """An absent slice of TPUs."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    hbm_limit: int  # bytes of HBM per chip that programs may use, as the compiler says

    @property
    def num_hosts(self) -> int:
        """Machines that the slice hangs on."""
        return len({device.process_index for device in self.devices})


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: bytes of HBM per chip, and what one run costs; `cost` is None where it does not fit."""

    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    offloaded_bytes: int  # in the host's memory, for this chip
    compile_seconds: float  # tracing included
    cost: Cost | None


def open_topology(name: str) -> Topology:
    """The slice that a name like v5e:4x4 stands for; `UserError` where there is none, or no TPU compiler."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(f"--topology={name}: not a TPU slice; give CHIP:SHAPE with {', '.join(CHIPS)}, "
                        f"e.g. {', '.join(FORMS)}")
    sides, form = (3, "three") if kind in ("v4", "v5p") else (2, "two")
    if shape.count("x") + 1 != sides:
        raise UserError(f"--topology={name}: a slice of {kind} has {form} sides, e.g. "
                        + ", ".join(known for known in FORMS if known.startswith(f"{kind}:")))
    stand_in_for_tpus()
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no lock on real chips
    try:
        import libtpu  # noqa: F401 - whether it is there
    except ImportError:
        raise NoCompiler("the TPU compiler is not installed: pip install libtpu (Linux on x86-64)"
                        ) from None
    from jax.experimental import topologies

    # two cores of a v4 or v5p chip work as one device, as they do where they are
    options = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
    jax.devices()  # this machine's own backend reads XLA_FLAGS when it starts: now, not while they are away
    xla_flags = os.environ.pop("XLA_FLAGS", None)  # the library ends the process over a flag that it does not know
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        return Topology(name, CHIPS[kind], tuple(devices), _hbm_limit(devices[0]))
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")[:200]
        raise UserError(f"--topology={name}: {reason}\nknown forms: {', '.join(FORMS)}") from None
    finally:
        if xla_flags is not None:
            os.environ["XLA_FLAGS"] = xla_flags


def stand_in_for_tpus() -> None:
    """Tells libtpu what it asks of a TPU host; read when the library is loaded, which else complains for a page."""
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no questions to a metadata server that is not there
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _hbm_limit(device: Any) -> int:
    """The HBM that the compiler grants, which is less than the data sheet's: it says so when asked for too much."""
    too_much = jax.ShapeDtypeStruct((2**40,), jnp.int8, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        return _sizes(error)[1]
    raise AssertionError("a tebibyte fits")


def _sizes(error: Exception) -> tuple[int, int]:
    """(bytes needed, bytes there are) of the compiler's complaint."""
    if "ScopedVmemOom" in str(error):
        raise UserError("a kernel's tile does not fit the chip's fast memory; set model.attention=splash:512 or less")
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(error))
    if not found:
        raise error
    needed, unit, limit, limit_unit = found.groups()
    return int(float(needed) * _UNITS[unit]), int(float(limit) * _UNITS[limit_unit])


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Leaves jax's cache on disk alone, which cannot give back programs of devices that are not there."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else the answer to "is it used" of an earlier program stands
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@uncached()
def compile_program(function: Any, *arguments: Any) -> Program:
    """Compiles a jitted function for the devices of its abstract arguments.

    Where it does not fit, the peak is what it would need, and there is no cost.
    """
    start = time.perf_counter()
    lowered, argument_bytes = function.lower(*arguments), shard_bytes(arguments)
    with tempfile.TemporaryDirectory(prefix="crossin_jax_plan_") as folder:
        try:
            # the text of some compiled programs cannot be had afterwards (compiled.as_text fails on them)
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            needed, _ = _sizes(error)
            return Program(argument_bytes, needed - argument_bytes, needed, 0, time.perf_counter() - start, None)
        seconds = time.perf_counter() - start
        text = next(Path(folder).glob("*.after_codegen.txt")).read_text()
    memory = compiled.memory_analysis()
    temporary, offloaded, peak = (memory.temp_size_in_bytes, memory.host_temp_size_in_bytes,
                                  memory.peak_memory_in_bytes)
    if offloaded:  # the peak would be that of the host's memory
        peak = memory.argument_size_in_bytes + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(argument_bytes, temporary, peak, offloaded, seconds, count(text))


def shard_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on one chip; what has no place on the mesh yet counts for nothing."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree) if getattr(leaf, "sharding", None) is not None)
