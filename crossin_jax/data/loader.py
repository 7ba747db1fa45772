"""Batches for the training mesh; Grain makes the windows of rows in worker processes.

The position in the data is two integers: the window, and its row that comes next. Every host makes
the same rows and keeps its own part, so the stream does not depend on the number of hosts or
workers:

    window 0          rows 0 … 127   ┐ batch of 8 rows ┬ host 0: rows 0 to 3
    window 1          rows 0 … 131   ┘                 └ host 1: rows 4 to 7

Shape letters: B rows of a batch (of this host) · T positions.
"""

import logging
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from crossin_jax.config import Data, UserError
from crossin_jax.data.mixture import Mixture
from crossin_jax.data.packing import BUCKETS, PackedWindows, count_dropped
from crossin_jax.data.prompts import Renderer

FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask", "group")


class Loader:
    """Iterates this host's rows: dicts of int32 arrays, and loss_mask_BT bool.

    They are tokens_BT, targets_BT, segment_ids_BT (0 on padding), positions_BT (from 0 in every
    segment), group_BT (an index of `groups`) and loss_mask_BT. Packed rows have `length` positions,
    others a quarter, a half or all of it. Where the windows end after some epochs, the last batch
    is filled with empty rows. `dropped` counts the examples so far of which a part or all is in no
    row.
    """

    def __init__(
        self,
        windows: PackedWindows,
        *,
        batch_size: int,
        process_index: int,
        process_count: int,
        workers: int,
    ):
        self._windows, self._batch_size, self._workers = windows, batch_size, workers
        share = batch_size // process_count
        self._mine = slice(process_index * share, (process_index + 1) * share)
        self.groups = windows.groups
        self.dropped: Counter[str] = Counter()
        self._window, self._row = 0, 0  # of the next batch
        self._source: Iterator[dict[str, np.ndarray]] | None = None
        self._rows: dict[str, np.ndarray] | None = None  # arrays of the current window
        self._has_warned = False

    @property
    def steps_per_epoch(self) -> float:
        """Batches per epoch; exact for up to four windows, else estimated from the first four."""
        return self._per_epoch(lambda rows: len(rows["tokens"])) / self._batch_size

    @property
    def tokens_per_epoch(self) -> float:
        """Tokens per epoch without padding, as exact as `steps_per_epoch`."""
        return self._per_epoch(lambda rows: int((rows["segment_ids"] > 0).sum()))

    # A mixture of 2,000 examples in 3 windows is counted as a whole. One of a million examples in
    # 1,500 windows is counted in the first 4 and scaled by 1,000,000 / their examples.
    def _per_epoch(self, count: Callable[[dict[str, np.ndarray]], int]) -> float:
        number = min(self._windows.windows_per_epoch, 4, len(self._windows))
        covered = self._windows.find_positions(number - 1).stop
        return (
            sum(count(self._windows[g]) for g in range(number))
            / covered
            * len(self._windows.mixture)
        )

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        parts, missing = [], self._batch_size
        while missing:
            if self._rows is None and not self._open_window():
                break
            stop = min(self._row + missing, len(self._rows["tokens"]))
            parts.append({name: self._rows[name][self._row : stop] for name in FIELDS})
            missing -= stop - self._row
            self._row = stop
            if stop == len(self._rows["tokens"]):
                self._window, self._row, self._rows = self._window + 1, 0, None
        if not parts:
            raise StopIteration
        batch = {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}
        if missing:  # the end of the last epoch
            batch = {
                name: np.concatenate([rows, np.zeros((missing, rows.shape[1]), rows.dtype)])
                for name, rows in batch.items()
            }
        # Rows of 512 positions whose longest example has 200: of the widths 128, 256 and 512 the
        # batch gets 256. There are only three, because the step is compiled for each width.
        width = self._windows.length
        if not self._windows.packing:
            longest = int((batch["segment_ids"] > 0).sum(1).max())
            widths = [math.ceil(width / divisor) for divisor in BUCKETS]
            width = min(width for width in widths if width >= longest)
        return {
            f"{name}_BT": np.ascontiguousarray(rows[self._mine, :width])
            for name, rows in batch.items()
        }

    def _open_window(self) -> bool:
        """Fetches the window of the next row; False where there is none."""
        if self._source is None:
            self._source = self._start()
        rows = next(self._source, None)
        if rows is None:
            return False
        self._rows = rows
        self.dropped.update(count_dropped(rows["dropped"], self.groups))
        if self.dropped and not self._has_warned:
            self._has_warned = True
            logging.warning(
                "data: some examples cannot be used as they are (%s); "
                "`prepare audit` counts all of them",
                ", ".join(f"{n} {name}" for name, n in self.dropped.most_common(4)),
            )
        if not len(rows["tokens"]):
            self._window, self._row, self._rows = self._window + 1, 0, None
            return self._open_window()
        return True

    def _start(self) -> Iterator[dict[str, np.ndarray]]:
        """Grain's iterator over the windows from the current one on."""
        # Without workers, a thread makes the next window: tokenizers release the interpreter lock.
        threads = 0 if self._workers else 1
        ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        windows = grain.MapDataset.range(self._window, len(self._windows)).map(
            self._windows.__getitem__
        )
        windows = windows.to_iter_dataset(ahead)
        if self._workers:
            # Grain's workers read absl's flags, which only our programs parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            windows = windows.mp_prefetch(
                grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=1),
                worker_init_fn=ignore_interrupts,
            )
        return iter(windows)

    @property
    def position(self) -> tuple[int, int]:
        """The window and the row in it that the next batch begins with."""
        return self._window, self._row

    def go_to(self, position: tuple[int, int]) -> None:
        """Makes the next batch begin at a position."""
        self.close()
        self._window, self._row = position

    def name_rows(self, position: tuple[int, int]) -> list[list[str]]:
        """The examples in each row, over all hosts, of the batch that began at a position."""
        (window, row), names = position, []
        while len(names) < self._batch_size and window < len(self._windows):
            names += self._windows.name_examples(window)[row:]
            window, row = window + 1, 0
        return names[: self._batch_size]

    def close(self) -> None:
        """Ends the workers."""
        if self._source is not None:
            self._source.close()
        self._source = self._rows = None

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, for a checkpoint (JSON types)."""
        return {"window": self._window, "row": self._row, **self._windows.describe()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position at once; `UserError` if the data are not the checkpoint's."""
        mine = self._windows.describe()
        for name, value in mine.items():
            if state.get(name) != value:
                raise UserError(
                    f"the data changed since the checkpoint: {name} was {state.get(name)!r}, "
                    f"is {value!r}; restore the settings, or start over with another output_dir "
                    "or with --noresume"
                )
        self.go_to((int(state["window"]), int(state["row"])))


def ignore_interrupts(worker_index: int, worker_count: int) -> None:
    """In a worker: Ctrl-C, which a terminal sends to all processes, is left to the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(
    mixture: Mixture,
    renderer: Renderer,
    data: Data,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_epochs: int | None = None,
) -> Loader:
    """Batches of `batch_size` rows over all hosts; this host gets its part of each.

    Without `num_epochs` they never end. Raises `UserError` where rows do not divide over the hosts
    or nothing in the mixture can be learned from.
    """
    if batch_size % process_count:
        raise UserError(
            f"train.batch_size={batch_size} does not divide over {process_count} processes; "
            f"use {batch_size // process_count * process_count or process_count} "
            f"or {(batch_size // process_count + 1) * process_count}"
        )
    windows = PackedWindows(
        mixture,
        renderer,
        length=data.length,
        packing=data.packing,
        over_long=data.over_long,
        batch_size=batch_size,
        seed=seed,
        num_epochs=num_epochs,
    )
    return Loader(
        windows,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        workers=data.workers,
    )
