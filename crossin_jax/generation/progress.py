"""A progress bar whose remaining time leaves out what compiling took."""

import time
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """Counts finished prompts; `compile_seconds()` is the time spent compiling so far."""

    def __init__(self, name: str, total: int, compile_seconds: Callable[[], float], shown: bool):
        self._compile_seconds, self._before = compile_seconds, compile_seconds()
        self.start = time.perf_counter()
        # Without smoothing the rate is the mean since `start_t`, which moves with every
        # compilation:
        #
        #     start ── compile 40 s ──┬─ 8 prompts in 2 s ─► 4 prompts/s, not 0.2
        #                             └─ start_t
        self._bar = tqdm(
            total=total, desc=name, unit="prompt", disable=not shown, delay=2, smoothing=0
        )
        self._begun = getattr(self._bar, "start_t", 0.0)

    def add(self, count: int, note: str = "") -> None:
        """So many more prompts are finished."""
        self._bar.start_t = self._begun + self._compile_seconds() - self._before
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    @property
    def seconds(self) -> float:
        """Since the start, without compiling."""
        return time.perf_counter() - self.start - (self._compile_seconds() - self._before)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
