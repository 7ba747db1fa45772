"""Finds the fastest training step for a topology by compiling, one kind of setting after another.

A trial counts only if it leaves a share of the HBM free. Trials are compared by estimated cycles:
the compiler's, plus attention kernels and collectives, which the compiler does not estimate, by
formula (see `Trial`). The estimates were not compared with times on a chip. `model.remat=offload`
is not tried, because the compiler does not know how long its copies to the host take.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from crossin_jax.checks import check
from crossin_jax.config import Config, UserError
from crossin_jax.models.attention import choose_kernel, tile
from crossin_jax.parallel.mesh import count_slices
from crossin_jax.plan.plan import PROGRAMS, Phase, Plan, describe_change, make_plan
from crossin_jax.plan.proposal import replace_settings, write_proposal
from crossin_jax.plan.topology import Topology
from crossin_jax.training.state import model_spec, resolve_precision
from crossin_jax.training.telemetry import peak_flops

# This share of the HBM stays free, for batches of the loader, evaluations and errors of the
# estimate.
RESERVE = 0.08
# From the policy that keeps nothing between layers to the one that keeps everything. Each one saves
# products of the backward pass that the one before computes again.
REMATS = (
    "full",
    "attention",
    "q+k+v+attention",
    "q+k+v+attention+output",
    "q+k+v+attention+output+gate",
    "dots",
    "none",
)
CHUNKS = (256, 512, 1024, 2048)
TILES = (512, 1024, 2048)
# seconds that a Pallas kernel on TPU needs to start one step of its grid, whatever its size
TILE_START = 0.35e-6


@dataclasses.dataclass(frozen=True)
class Trial:
    """One compiled training step; cycles are per chip and step, and None if it does not fit."""

    change: dict[str, Any]
    phase: Phase
    # with the reserve
    fits: bool
    # the compiler's estimate
    compiler: float | None = None
    # attention: FLOPs at the chip's peak, and a start for every tile
    kernels: float | None = None
    # waiting for collectives at the speed of the data sheet, after the program's schedule
    links: float | None = None

    @property
    def cycles(self) -> float:
        """The sum, by which trials are compared."""
        return self.compiler + self.kernels + self.links if self.fits else float("inf")


def propose(
    config: Config, topology: Topology, out: str | None, report: Callable[[str], None]
) -> Plan | None:
    """Tunes the step, writes the proposal to `out`, and plans the run with it; None: none fits."""
    best, trials = tune(config, topology, report)
    if best is None:
        return None
    if out:
        write_proposal(
            out,
            config,
            best.change,
            topology=topology.name,
            trials=[
                {
                    "settings": one.change,
                    "fits": one.fits,
                    "cycles": one.cycles if one.fits else None,
                    "peak_bytes": one.phase.peak_bytes,
                    "compile_seconds": one.phase.compile_seconds,
                }
                for one in trials
            ],
        )
    plan = make_plan(replace_settings(config, best.change), topology, PROGRAMS)
    return dataclasses.replace(plan, change=best.change)


def tune(
    config: Config, topology: Topology, report: Callable[[str], None] = print
) -> tuple[Trial | None, list[Trial]]:
    """The best trial (None if none fits) and all trials; `report` gets a line for each of them."""
    # Each step starts from the best settings so far: what is kept for the backward pass, then the
    # mesh, then the chunks of the loss, then the tiles of the attention kernel.
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
    if (
        choose_kernel(
            config.model.attention,
            search.spec,
            config.data.length,
            search.config.model.compute_dtype,
            "tpu",
        ).name
        == "splash"
    ):
        for size in TILES:
            if size <= config.data.length and config.data.length % size == 0:
                search.attempt(search.start() | {"model.attention": f"splash:{size}"})
    return search.best, search.trials


def _try_remats(search: "_Search") -> None:
    """Every policy with the fewest micro-batches that fit.

    A policy that keeps more needs as many micro-batches or more, so their number never decreases.
    """
    parts, before = 1, float("inf")
    for remat in REMATS:
        cycles = None
        while parts is not None:
            trial = search.attempt(
                search.start() | {"model.remat": remat, "train.accumulation": parts}
            )
            if trial is None or trial.fits:
                cycles = trial and trial.cycles
                break
            parts = search.next_accumulation(trial)
        # The next policies would need even smaller micro-batches.
        if cycles is None or parts > 1 and cycles >= before:
            return
        before = min(before, cycles)


def meshes(topology: Topology) -> Iterator[dict[str, Any]]:
    """Meshes over all chips, those without tensor parallelism first."""
    devices, slices = len(topology.devices), count_slices(topology.devices)
    for tensor in (1, 2, 4, 8):
        for data in (slices, 2 * slices, 4 * slices) if tensor == 1 else (slices,):
            if devices % (tensor * data) == 0:
                yield {
                    "mesh.data": data,
                    "mesh.fsdp": devices // (tensor * data),
                    "mesh.tensor": tensor,
                }


class _Search:
    def __init__(self, config: Config, topology: Topology, report: Callable[[str], None]):
        self.config = resolve_precision(config, topology.devices[0])
        self.topology, self.report = topology, report
        self.spec = model_spec(config)
        self.trials: list[Trial] = []
        self.best: Trial | None = None
        self._seen: dict[str, Trial | None] = {}

    def start(self) -> dict[str, Any]:
        """The settings to vary: the best so far, else those that need the least memory."""
        return self.best.change if self.best else {"model.remat": "full"}

    def attempt(self, change: dict[str, Any]) -> Trial | None:
        """Compiles with a change; None if the configuration does not allow it."""
        changed = replace_settings(self.config, change)
        key = str((changed.model.remat, self._tile(changed), changed.train, self.mesh(change)))
        if key not in self._seen:
            change = {
                name: value
                for name, value in change.items()
                if replace_settings(self.config, {name: value}) != self.config
            }
            flags = describe_change(change) or "as it is"
            try:
                self._seen[key] = trial = self._compile(check(changed), change)
                self.trials.append(trial)
                if trial.fits and (self.best is None or trial.cycles < self.best.cycles):
                    self.best = trial
                suffix = ", best so far" if trial is self.best else ""
                self.report(f"{flags}: {describe(trial, self.topology)}{suffix}")
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
        # The kernels for forward, dk and dv, and dq have 2, 4 and 3 products per tile: on average
        # there is one start for three products.
        starts = phase.kernel_flops / (3 * 2 * self._tile(config) ** 2 * self.spec.head_width)
        kernels = phase.kernel_flops / peak_flops(self.topology.devices[0]) + starts * TILE_START
        return Trial(
            change,
            phase,
            True,
            phase.cycles,
            kernels * chip.clock,
            (phase.waiting_seconds or (0.0,))[0] * chip.clock,
        )

    def next_accumulation(self, trial: Trial) -> int | None:
        """The number of micro-batches to try next; None if there is none."""
        # Temporaries shrink with the micro-batch. 0.8: the estimate may be too high.
        room = (1 - RESERVE) * self.topology.hbm_limit - trial.phase.argument_bytes
        parts = replace_settings(self.config, trial.change).train.accumulation
        needed = parts * trial.phase.temporary_bytes / max(room, 1)
        data, fsdp, _ = self.mesh(trial.change)
        return next(
            (
                more
                for more in (2, 4, 8, 16, 32, 64)
                if more > parts
                and more >= 0.8 * needed
                and self.config.train.batch_size % (more * data * fsdp) == 0
            ),
            None,
        )

    def mesh(self, change: dict[str, Any]) -> tuple[int, int, int]:
        """The sizes of data, fsdp and tensor with a change."""
        mesh = replace_settings(self.config, change).mesh
        return (
            mesh.data or len(self.topology.devices) // (mesh.fsdp * mesh.tensor),
            mesh.fsdp,
            mesh.tensor,
        )

    def _tile(self, config: Config) -> int:
        length = config.data.length
        kernel = choose_kernel(
            config.model.attention, self.spec, length, config.model.compute_dtype, "tpu"
        )
        return tile(kernel, length) if kernel.name == "splash" else length


def describe(trial: Trial, topology: Topology) -> str:
    """A trial in words."""
    memory = f"{trial.phase.peak_bytes / 2**30:.2f} of {topology.hbm_limit / 2**30:.2f} GiB"
    seconds = f"compiled in {trial.phase.compile_seconds:.0f} s"
    if not trial.fits:
        return f"{memory}, does not leave {RESERVE:.0%} free, {seconds}"
    return (
        f"{memory}, {trial.cycles / 1e6:,.0f} Mcycles (compiler {trial.compiler / 1e6:,.0f}, "
        f"attention {trial.kernels / 1e6:,.0f}, links {trial.links / 1e6:,.0f}), {seconds}"
    )
