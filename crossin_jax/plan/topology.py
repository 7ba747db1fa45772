"""Absent TPUs: their devices by name, and programs compiled for them."""

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

from crossin_jax.cli import set_libtpu_env
from crossin_jax.config import UserError
from crossin_jax.plan.cost import Cost, count

FORMS = (
    "v4:2x2x1",
    "v4:2x2x2",
    "v5e:2x2",
    "v5e:4x4",
    "v5e:8x16",
    "v5p:2x2x1",
    "v5p:4x4x4",
    "v6e:2x4",
    "v6e:16x16",
    "v5e:4x4x2slices",
)
_SHAPE = re.compile(r"(\d+(?:x\d+)*?)(?:x(\d+)slices)?")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class NoCompiler(UserError):
    """The TPU compiler is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do, from the maker's data sheets: bytes per second, cycles per second."""

    hbm: float
    # what all links together can send, and their number
    links: float
    num_links: int
    # its share of what its host can send to other slices; the sheet of v4 does not say
    network: float | None
    # The data sheets have FLOP/s. A unit of 128 x 128 makes 2 * 128 * 128 FLOP per cycle; v4 and
    # v5p have 8 such units, v5e has 4, and v6e has 16.
    clock: float


CHIPS = {
    "v4": Chip(1.228e12, 3.0e11, 6, None, 1.05e9),
    "v5e": Chip(8.19e11, 2.0e11, 4, 3.125e9, 1.5e9),
    "v5p": Chip(2.765e12, 6.0e11, 6, 6.25e9, 1.75e9),
    "v6e": Chip(1.64e12, 4.0e11, 4, 1.25e10, 1.75e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """An absent slice of TPUs, or several slices that are alike."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]
    # bytes of HBM per chip that the compiler allows programs to use
    hbm_limit: int

    @property
    def num_hosts(self) -> int:
        """Machines that the chips are in."""
        return len({device.process_index for device in self.devices})


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: bytes of HBM per chip, and the cost of one run."""

    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    # in the host's memory, for this chip
    offloaded_bytes: int
    # with the time for tracing
    compile_seconds: float
    # None if the program does not fit
    cost: Cost | None


def open_topology(name: str) -> Topology:
    """The slice with a name like v5e:4x4; `UserError` for an unknown one, or without a compiler."""
    kind, _, shape = name.partition(":")
    form = _SHAPE.fullmatch(shape)
    if kind not in CHIPS or not form:
        raise UserError(
            f"--topology={name}: not a TPU slice; give CHIP:SHAPE with {', '.join(CHIPS)}, "
            f"e.g. {', '.join(FORMS)}"
        )
    shape, slices = form.groups()
    sides, number = (3, "three") if kind in ("v4", "v5p") else (2, "two")
    if shape.count("x") + 1 != sides:
        raise UserError(
            f"--topology={name}: a slice of {kind} has {number} sides, e.g. "
            + ", ".join(known for known in FORMS if known.startswith(f"{kind}:"))
        )
    set_libtpu_env()
    # Without this, the library locks the chips of this machine.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    try:
        import libtpu  # noqa: F401 - whether it is there
    except ImportError:
        raise NoCompiler(
            "the TPU compiler is not installed: pip install libtpu (Linux on x86-64)"
        ) from None
    from jax.experimental import topologies

    # The two cores of a v4 or v5p chip work as one device, as on real slices.
    options = {"chip_config_name": "megacore"} if kind in ("v4", "v5p") else {}
    if slices:
        options["num_slices"] = int(slices)
    # libtpu ends the process if XLA_FLAGS has a flag that it does not know, so they are removed for
    # a moment. The backend of this machine reads them when it starts, so it is started before.
    jax.devices()
    xla_flags = os.environ.pop("XLA_FLAGS", None)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        ).devices
        return Topology(name, CHIPS[kind], tuple(devices), _hbm_limit(devices[0]))
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")[:200]
        raise UserError(f"--topology={name}: {reason}\nknown forms: {', '.join(FORMS)}") from None
    finally:
        if xla_flags is not None:
            os.environ["XLA_FLAGS"] = xla_flags


def _hbm_limit(device: Any) -> int:
    """The HBM that the compiler allows, which is less than the data sheet's."""
    # Its error for a program that needs a tebibyte names the limit.
    too_much = jax.ShapeDtypeStruct(
        (2**40,), jnp.int8, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    try:
        jax.jit(lambda x: x + 1).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        return _sizes(error)[1]
    raise AssertionError("a tebibyte fits")


def _sizes(error: Exception) -> tuple[int, int]:
    """(bytes needed, bytes available) of the compiler's error."""
    if "ScopedVmemOom" in str(error):
        raise UserError(
            "a kernel's tile does not fit the chip's fast memory; "
            "set model.attention=splash:512 or less"
        )
    found = re.search(
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(error)
    )
    if not found:
        raise error
    needed, unit, limit, limit_unit = found.groups()
    return int(float(needed) * _UNITS[unit]), int(float(limit) * _UNITS[limit_unit])


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Without JAX's cache on disk, which cannot restore programs of absent devices."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX remembers whether the cache is in use; without a reset it would still be.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@uncached()
def compile_program(function: Any, *arguments: Any) -> Program:
    """Compiles a jitted function for the devices of its abstract arguments.

    If it does not fit, the peak is what it would need, and there is no cost.
    """
    start = time.perf_counter()
    lowered, argument_bytes = function.lower(*arguments), shard_bytes(arguments)
    with tempfile.TemporaryDirectory(prefix="crossin_jax_plan_") as folder:
        try:
            # The compiler writes the text of the program into the folder: compiled.as_text fails on
            # some programs.
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        except jax.errors.JaxRuntimeError as error:
            needed, _ = _sizes(error)
            return Program(
                argument_bytes,
                needed - argument_bytes,
                needed,
                0,
                time.perf_counter() - start,
                None,
            )
        seconds = time.perf_counter() - start
        text = next(Path(folder).glob("*.after_codegen.txt")).read_text()
    memory = compiled.memory_analysis()
    temporary, peak = memory.temp_size_in_bytes, memory.peak_memory_in_bytes
    offloaded = memory.host_temp_size_in_bytes
    # With offloading, the analysis gives the peak of the host's memory instead of the chip's.
    if offloaded:
        peak = (
            memory.argument_size_in_bytes
            + temporary
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return Program(argument_bytes, temporary, peak, offloaded, seconds, count(text))


def shard_bytes(tree: Any) -> int:
    """Bytes of an abstract tree on one chip; a leaf without a sharding counts as zero."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if getattr(leaf, "sharding", None) is not None
    )
