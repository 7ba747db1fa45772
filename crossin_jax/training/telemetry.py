"""What a run reports on the console, in metrics.jsonl and TensorBoard: losses, tokens per second,
model FLOPs utilisation, memory.
"""

import datetime
import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from crossin_jax.files import Lines, write_whole
from crossin_jax.paths import LocalFolder, is_bucket

# Dense bfloat16 peak per chip, FLOP/s, from the makers' data sheets, by how `device.device_kind`
# begins.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


# What the console shows of a record: name in the record → (word, format)
SHOWN = {
    "loss": ("loss", "{:.3f}".format),
    "held_out/loss": ("held-out loss", "{:.3f}".format),
    "grad_norm": ("norm", "{:.2f}".format),
    "learning_rate": ("rate", "{:.2e}".format),
    "tokens_per_second": ("tok/s", "{:,.0f}".format),
    "mfu": ("mfu", "{:.1%}".format),
    "peak_memory_gib": ("GiB", "{:.1f}".format),
    "seconds_left": ("left", lambda seconds: str(datetime.timedelta(seconds=round(seconds)))),
}


def peak_host_bytes() -> int:
    """The most memory this process has held on its host so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where no data sheet is listed (a CPU)."""
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


class Telemetry:
    """Collects metrics on the device and reports them every `log_every` steps; only process 0
    writes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        start: int,
        num_steps: int,
        log_every: int,
        groups: list[tuple[str, str]],
        flops_per_token: float,
        use_tensorboard: bool,
        use_wandb: bool,
        config: dict[str, Any],
    ):
        self._active = jax.process_index() == 0
        self._groups, self._log_every, self._num_steps = groups, log_every, num_steps
        self._flops_per_token = flops_per_token
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        # Of the last report; None until the first step is over, which compiles.
        self._time: float | None = None
        if not self._active:
            return
        verb = "continues from the checkpoint" if start else "starts a new run"
        print(
            f"step {start}/{num_steps} {verb} in {folder}; its first step takes longer, because "
            "it compiles",
            file=sys.stderr,
            flush=True,
        )
        cut_records(folder / "metrics.jsonl", start)
        self._lines = Lines(folder / "metrics.jsonl")
        self._bar = None  # a log file gets a line per report instead
        if sys.stderr.isatty():
            self._bar = tqdm(
                initial=start,
                total=num_steps,
                desc=name,
                unit="step",
                file=sys.stderr,
                mininterval=0.5,
                smoothing=0,
                dynamic_ncols=True,
            )
        self._board = self._wandb = None
        if use_tensorboard:
            from tensorboardX import SummaryWriter

            self._board_folder = LocalFolder(folder / "tensorboard")
            # The purge hides what an earlier start of the run wrote after its last checkpoint.
            self._board = SummaryWriter(str(self._board_folder.path), purge_step=start + 1)
        if use_wandb:
            self._wandb = _start_wandb(name, folder, config)

    def add(self, step: int, metrics: dict[str, jax.Array], learning_rate: float) -> None:
        """Collects the metrics of a step, and reports where it is time to: see `report`."""
        self._pending.append((step, metrics))
        if self._active and self._bar is not None:
            self._bar.update(step - self._bar.n)
        if self._time is None or step % self._log_every == 0 or step == self._num_steps:
            self.report(learning_rate)

    def report(self, learning_rate: float) -> None:
        """Fetches the metrics since the last report and writes one record.

        Raises `FloatingPointError(step)` for the first step whose loss or gradient is not finite.
        """
        if not self._pending:
            return
        steps, metrics = zip(*jax.device_get(self._pending), strict=True)
        self._pending = []
        now, before = time.perf_counter(), self._time
        self._time = now
        if before is None and self._active and self._bar is not None:
            # The first step compiled: the bar estimates from the steps after it.
            self._bar.initial, self._bar.start_t = self._bar.n, time.time()
        bad = [
            step
            for step, m in zip(steps, metrics, strict=True)
            if not (np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]))
        ]
        if bad:
            raise FloatingPointError(bad[0])
        count, tokens = (float(sum(m[name] for m in metrics)) for name in ("count", "tokens"))
        record: dict[str, Any] = {"step": int(steps[-1])}
        record["loss"] = float(sum(m["loss"] * m["count"] for m in metrics)) / max(count, 1.0)
        record["losses"] = [float(m["loss"]) for m in metrics]  # one a step, for comparing runs
        record["grad_norm"] = float(metrics[-1]["grad_norm"])
        record["learning_rate"] = float(learning_rate)
        record |= group_metrics(
            self._groups,
            sum(m["group_loss"] for m in metrics),
            sum(m["group_count"] for m in metrics),
        )
        if before is not None:
            record["tokens_per_second"] = tokens / (now - before)
            record["learned_tokens_per_second"] = count / (now - before)
            record["seconds_left"] = (now - before) / len(steps) * (self._num_steps - steps[-1])
            if self._peak:
                record["mfu"] = record["tokens_per_second"] * self._flops_per_token / self._peak
        memory = jax.local_devices()[0].memory_stats()
        if memory and "peak_bytes_in_use" in memory:
            record["peak_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        record["peak_host_memory_gib"] = peak_host_bytes() / 2**30
        self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record to every sink; numbers become TensorBoard scalars."""
        if not self._active:
            return
        step = record["step"]
        self._lines.write(json.dumps(record))
        scalars = {k: v for k, v in record.items() if isinstance(v, float)}
        for key, value in scalars.items():
            if self._board:
                self._board.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)
        shown = {word: text(record[name]) for name, (word, text) in SHOWN.items() if name in record}
        if self._bar is not None:
            shown.pop("left", None)  # the bar has its own
            self._bar.set_postfix(shown, refresh=False)
        elif shown:
            words = " ".join(f"{word} {text}" for word, text in shown.items())
            print(f"step {step}/{self._num_steps} {words}", file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Writes everything so far into the bucket; on a disk it is written at once."""
        if not self._active:
            return
        self._lines.flush()
        if self._board and self._board_folder.is_copy:
            self._board.flush()
            self._board_folder.upload()

    def close(self) -> None:
        """Flushes and closes every sink."""
        if not self._active:
            return
        for sink in (self._bar, self._lines, self._board):
            if sink is not None:  # a progress bar without a total counts as false
                sink.close()
        if self._board:
            self._board_folder.close()
        if self._wandb:
            self._wandb.finish()


class Profiler:
    """JAX's profiler from after the first to after the second step of its window, on process 0."""

    def __init__(self, window: tuple[int, ...], folder: Path):
        self._window, self._place = window if jax.process_index() == 0 else (), folder
        self._running = False

    def after(self, step: int, metrics: Any) -> None:
        """Starts or stops it where the window says so; a run resumed inside the window starts at
        once.
        """
        inside = bool(self._window) and self._window[0] <= step < self._window[1]
        if inside != self._running:
            jax.block_until_ready(metrics)
            if inside:
                self._folder = LocalFolder(self._place)
                jax.profiler.start_trace(str(self._folder.path))
            else:
                jax.profiler.stop_trace()
                self._folder.close()
            self._running = inside

    def close(self) -> None:
        """Writes what was profiled so far where the run ends inside the window."""
        if self._running:
            jax.profiler.stop_trace()
            self._folder.close()


def cut_records(file: Path, step: int) -> None:
    """Drops the records after a step, and a last line that is not whole.

    A killed run wrote them after its last checkpoint, and the continued run writes them again. A
    run that starts over, at step 0, keeps none.
    """
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    whole = [line for line in lines if step and line.endswith("}\n")]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    if kept != lines:
        write_whole(file, "".join(kept))


def is_recorded(folder: Path, step: int, name: str) -> bool:
    """Whether metrics.jsonl has a value of that name, or that beginning of a name, at a step."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    records = [
        json.loads(line) for line in lines if f'"step": {step},' in line and line.endswith("}")
    ]
    return any(key.startswith(name) for record in records for key in record)


def group_metrics(
    groups: list[tuple[str, str]], losses: np.ndarray, counts: np.ndarray
) -> dict[str, float]:
    """Loss and share of the learned tokens by component and answer language, e.g. {"loss/x2x/zh":
    1.2}.
    """
    total = max(float(counts.sum()), 1.0)
    record = {}
    for (component, language), loss, count in zip(groups, losses, counts, strict=True):
        if count:
            record[f"loss/{component}/{language}"] = float(loss / count)
            record[f"share/{component}/{language}"] = float(count / total)
    return record


def _start_wandb(name: str, folder: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        logging.warning("--wandb is set but wandb is not installed; metrics go to %s only", folder)
        return None
    return wandb.init(
        project="crossin_jax",
        name=name,
        dir=None if is_bucket(folder) else str(folder),
        config=config,
        resume="allow",
    )
