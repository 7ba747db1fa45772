"""What a run says of itself: progress bar, JSONL, TensorBoard, tokens per second, model FLOPs utilisation."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

# dense bfloat16 peak per chip, FLOP/s, from the makers' data sheets; by the start of `device.device_kind`
PEAK_FLOPS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where no data sheet is listed (a CPU)."""
    kinds = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_FLOPS[max(kinds, key=len)] if kinds else None


class Telemetry:
    """Collects metrics on the device and reports them every `log_every` steps; only process 0 writes."""

    def __init__(self, folder: Path, *, name: str, num_steps: int, groups: list[tuple[str, str]], log_every: int,
                 flops_per_token: float, use_tensorboard: bool, use_wandb: bool, config: dict[str, Any]):
        self._active = jax.process_index() == 0
        self._groups, self._log_every, self._num_steps = groups, log_every, num_steps
        self._flops_per_token = flops_per_token
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._time: float | None = None
        self._bar = self._lines = self._board = self._wandb = None
        if not self._active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._bar = tqdm(total=num_steps, desc=name, unit="step", file=sys.stderr, mininterval=0.5, dynamic_ncols=True)
        self._lines = (folder / "metrics.jsonl").open("a")
        if use_tensorboard:
            from tensorboardX import SummaryWriter
            self._board = SummaryWriter(str(folder / "tensorboard"))
        if use_wandb:
            self._wandb = _start_wandb(name, folder, config)

    def resume_at(self, step: int) -> None:
        """Moves the progress bar to the step that a restored run continues from."""
        if self._bar:
            self._bar.n = self._bar.initial = step
            self._bar.refresh()

    def add(self, step: int, metrics: dict[str, jax.Array], learning_rate: float) -> None:
        """Takes the metrics of a finished step; raises `FloatingPointError` at a report that holds a non-finite loss."""
        if self._time is None:
            self._time = time.perf_counter()  # the first step compiles; it is no part of the throughput
            skip_rate = True
        else:
            skip_rate = False
        self._pending.append((step, metrics))
        if self._bar:
            self._bar.update(step - self._bar.n)
        if step % self._log_every == 0 or step == self._num_steps or skip_rate:
            self._report(learning_rate, skip_rate)

    def _report(self, learning_rate: float, skip_rate: bool) -> None:
        steps, metrics = zip(*jax.device_get(self._pending), strict=True)
        self._pending = []
        now = time.perf_counter()
        seconds, self._time = now - self._time, now
        bad = [step for step, m in zip(steps, metrics, strict=True)
               if not (np.isfinite(m["loss"]) and np.isfinite(m["grad_norm"]))]
        if bad:
            raise FloatingPointError(bad[0])
        record: dict[str, Any] = {"step": int(steps[-1])}
        count = sum(m["count"] for m in metrics)
        record["loss"] = float(sum(m["loss"] * m["count"] for m in metrics) / count)
        record["grad_norm"] = float(metrics[-1]["grad_norm"])
        record["learning_rate"] = float(learning_rate)
        record["losses"] = [float(m["loss"]) for m in metrics]  # one a step, for comparing runs
        record |= group_metrics(self._groups, sum(m["group_loss"] for m in metrics),
                                sum(m["group_count"] for m in metrics))
        if not skip_rate:
            tokens = float(sum(m["tokens"] for m in metrics))
            record["tokens_per_second"] = tokens / seconds
            record["learned_tokens_per_second"] = float(count) / seconds
            if self._peak:
                record["mfu"] = tokens * self._flops_per_token / seconds / self._peak
        memory = jax.local_devices()[0].memory_stats()
        if memory and "peak_bytes_in_use" in memory:
            record["peak_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record to every sink; numbers become TensorBoard scalars."""
        if not self._active:
            return
        step = record["step"]
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        scalars = {k: v for k, v in record.items() if isinstance(v, float)}
        for key, value in scalars.items():
            if self._board:
                self._board.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(scalars, step=step)
        shown = {"loss": f"{record['loss']:.3f}"} if "loss" in record else {}
        if "tokens_per_second" in record:
            shown["tok/s"] = f"{record['tokens_per_second']:,.0f}"
        if "mfu" in record:
            shown["mfu"] = f"{record['mfu']:.1%}"
        if shown:
            self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Flushes and closes every sink."""
        for sink in (self._bar, self._lines, self._board):
            if sink:
                sink.close()
        if self._wandb:
            self._wandb.finish()


def group_metrics(groups: list[tuple[str, str]], losses: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Loss and share of the learned tokens by component and answer language, e.g. {"loss/x2x/zh": 1.2}."""
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
        logging.warning("train.wandb is set but wandb is not installed; metrics go to %s only", folder)
        return None
    return wandb.init(project="crossin_jax", name=name, dir=str(folder), config=config, resume="allow")
