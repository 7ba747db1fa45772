"""The fastest training step for a topology, found by compiling: greedy, one kind of setting after the other.

A trial counts only if it leaves a share of the HBM free. Trials are compared by estimated cycles: the compiler's, plus
attention kernels and collectives, which it does not estimate, by formula (see `Trial`). Nothing of it was timed on a
chip. `model.remat=offload` is not tried: how long its copies to the host take is not known to the compiler.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from crossin_jax.checks import check
from crossin_jax.config import Config, UserError, replace_settings
from crossin_jax.models.attention import choose_kernel, tile
from crossin_jax.parallel.topology import Topology
from crossin_jax.plan import PROGRAMS, Phase, Plan, describe_change, make_plan
from crossin_jax.training.proposal import write_proposal
from crossin_jax.training.state import model_spec
from crossin_jax.training.telemetry import peak_flops

RESERVE = 0.08  # of the HBM stays free: for the loader's batches, evaluations and what the estimate misses
# from what keeps nothing between layers to what keeps everything; each step spares products of the backward pass
REMATS = ("full", "attention", "q+k+v+attention", "q+k+v+attention+output", "q+k+v+attention+output+gate", "dots",
          "none")
CHUNKS = (256, 512, 1024, 2048)
TILES = (512, 1024, 2048)
TILE_START = 0.35e-6  # seconds that a Pallas kernel on TPU spends on one step of its grid, whatever its size


@dataclasses.dataclass(frozen=True)
class Trial:
    """One compiled training step; cycles are per chip and step, and None where it does not fit."""

    change: dict[str, Any]
    phase: Phase
    fits: bool  # with the reserve
    compiler: float | None = None  # cycles by the compiler
    kernels: float | None = None  # attention: FLOPs at the chip's peak, and a start for every tile
    links: float | None = None  # collectives: bytes at the speed of the links, as if nothing ran beside them

    @property
    def cycles(self) -> float:
        """What trials are compared by."""
        return self.compiler + self.kernels + self.links if self.fits else float("inf")


def propose(config: Config, topology: Topology, out: str | None, report: Callable[[str], None]) -> Plan | None:
    """Tunes the training step, writes the proposal to `out`, and plans the run with it; None where nothing fits."""
    best, trials = tune(config, topology, report)
    if best is None:
        return None
    if out:
        write_proposal(out, config, best.change, topology=topology.name, trials=[
            {"settings": one.change, "fits": one.fits, "cycles": one.cycles if one.fits else None,
             "peak_bytes": one.phase.peak_bytes, "compile_seconds": one.phase.compile_seconds} for one in trials])
    plan = make_plan(replace_settings(config, best.change), topology, PROGRAMS)
    return dataclasses.replace(plan, change=best.change)


def tune(config: Config, topology: Topology, report: Callable[[str], None] = print) -> tuple[Trial | None, list[Trial]]:
    """The best trial, None where none fits, and all of them; `report` gets a line for each as it is made."""
    search = _Search(config, topology, report)
    search.attempt({})
    _try_remats(search)
    mesh = search.mesh(search.start())
    for other in meshes(topology):
        search.attempt(search.start() | other)
    if search.mesh(search.start()) != mesh:
        _try_remats(search)
    for chunk in CHUNKS:
        if chunk <= config.data.length:
            search.attempt(search.start() | {"train.loss_chunk": chunk})
    if choose_kernel(config.model.attention, search.spec, config.data.length, config.model.compute_dtype,
                     "tpu").name == "splash":
        for size in TILES:
            if size <= config.data.length and config.data.length % size == 0:
                search.attempt(search.start() | {"model.attention": f"splash:{size}"})
    return search.best, search.trials


def _try_remats(search: "_Search") -> None:
    """Every policy with the fewest micro-batches that fit."""
    parts, before = 1, float("inf")
    for remat in REMATS:
        cycles = None
        while parts is not None:
            trial = search.attempt(search.start() | {"model.remat": remat, "train.accumulation": parts})
            if trial is None or trial.fits:
                cycles = trial and trial.cycles
                break
            parts = search.more_parts(trial)
        if cycles is None or parts > 1 and cycles >= before:  # what keeps more needs smaller micro-batches still
            return
        before = min(before, cycles)


def meshes(topology: Topology) -> Iterator[dict[str, Any]]:
    """Meshes over all chips, those without tensor parallelism first."""
    devices = len(topology.devices)
    for tensor in (1, 2, 4, 8):
        for data in (1, 2, 4) if tensor == 1 else (1,):
            if devices % (tensor * data) == 0:
                yield {"mesh.data": data, "mesh.fsdp": devices // (tensor * data), "mesh.tensor": tensor}


class _Search:
    def __init__(self, config: Config, topology: Topology, report: Callable[[str], None]):
        self.config, self.topology, self.report = config, topology, report
        self.spec = model_spec(config)
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self._seen: dict[str, Trial | None] = {}

    def start(self) -> dict[str, Any]:
        """The settings to vary: the best so far, else those that need the least memory."""
        return self.best.change if self.best else {"model.remat": "full"}

    def attempt(self, change: dict[str, Any]) -> Trial | None:
        """Compiles with a change; None where the configuration cannot have it."""
        changed = replace_settings(self.config, change)
        key = str((changed.model.remat, self._tile(changed), changed.train, self.mesh(change)))
        if key not in self._seen:
            change = {name: value for name, value in change.items()
                      if replace_settings(self.config, {name: value}) != self.config}
            flags = describe_change(change) or "as it is"
            try:
                self._seen[key] = trial = self._compile(check(changed), change)
                self.trials.append(trial)
                if trial.fits and (self.best is None or trial.cycles < self.best.cycles):
                    self.best = trial
                self.report(f"{flags}: {describe(trial, self.topology)}{', best so far' * (trial is self.best)}")
            except UserError as error:
                self._seen[key] = None
                if not change:
                    raise
                self.report(f"{flags}: {str(error).splitlines()[0]}")
        return self._seen[key]

    def _compile(self, config: Config, change: dict[str, Any]) -> Trial:
        phase = make_plan(config, self.topology, ("train",)).phases["train"]
        if phase.cycles is None or phase.peak_bytes > (1 - RESERVE) * self.topology.hbm_limit:
            return Trial(change, phase, False, phase.cycles)
        chip = self.topology.chip
        # forward, dk and dv, dq have 2, 4 and 3 products in a tile: three on average for one start
        starts = phase.kernel_flops / (3 * 2 * self._tile(config) ** 2 * self.spec.head_width)
        kernels = phase.kernel_flops / peak_flops(self.topology.devices[0]) + starts * TILE_START
        return Trial(change, phase, True, phase.cycles, kernels * chip.clock,
                     sum(phase.sent_bytes.values()) / chip.links * chip.clock)

    def more_parts(self, trial: Trial) -> int | None:
        """Micro-batches with which it may fit, as temporaries shrink with them; None where there is no such number."""
        room = (1 - RESERVE) * self.topology.hbm_limit - trial.phase.argument_bytes
        parts = replace_settings(self.config, trial.change).train.accumulation
        needed = parts * trial.phase.temporary_bytes / max(room, 1)
        data, fsdp, _ = self.mesh(trial.change)
        return next((more for more in (2, 4, 8, 16, 32, 64) if more > parts and more >= 0.8 * needed and
                     self.config.train.batch_size % (more * data * fsdp) == 0), None)

    def mesh(self, change: dict[str, Any]) -> tuple[int, int, int]:
        """The sizes of data, fsdp and tensor with a change."""
        mesh = replace_settings(self.config, change).mesh
        return mesh.data or len(self.topology.devices) // (mesh.fsdp * mesh.tensor), mesh.fsdp, mesh.tensor

    def _tile(self, config: Config) -> int:
        length = config.data.length
        kernel = choose_kernel(config.model.attention, self.spec, length, config.model.compute_dtype, "tpu")
        return tile(kernel, length) if kernel.name == "splash" else length


def describe(trial: Trial, topology: Topology) -> str:
    """A trial in words."""
    memory = f"{trial.phase.peak_bytes / 2**30:.2f} of {topology.hbm_limit / 2**30:.2f} GiB"
    seconds = f"compiled in {trial.phase.compile_seconds:.0f} s"
    if not trial.fits:
        return f"{memory}, does not leave {RESERVE:.0%} free, {seconds}"
    return (f"{memory}, {trial.cycles / 1e6:,.0f} Mcycles (compiler {trial.compiler / 1e6:,.0f}, attention "
            f"{trial.kernels / 1e6:,.0f}, links {trial.links / 1e6:,.0f}), {seconds}")
