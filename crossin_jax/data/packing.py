"""Examples become rows of a batch: best-fit packing, or one example per row, sorted by length.

The stream of examples is cut into windows. Each window is packed independently of its neighbours.
So any worker can make any window alone, and a continued run starts at its window without making
those before it:

    stream    e0 e1 e2 e3 e4 e5 e6 │ e7 e8 e9 … │        positions of the mixture
    window 0  row 0 │ e4 e4 e4 e1 e1 ·│               · is padding
              row 1 │ e0 e0 e6 e6 e6 e6│               rows are then shuffled

An example of n token ids takes n - 1 positions of a row: the last id is only a target.

    ids        <s>  Q   A   </s>       loss mask of ids  0 0 1 1
    tokens     <s>  Q   A              what the model reads
    targets    Q    A   </s>           what it should predict
    loss_mask  0    1   1              which targets count

Shape letters: R rows of a window · T positions of a row.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from crossin_jax.config import UserError
from crossin_jax.data.kinds import Example, mix_bits
from crossin_jax.data.mixture import Mixture
from crossin_jax.data.prompts import Rendered, Renderer, RowFault

# What may happen to an example on its way into a row; each but "input shortened" drops it. The
# others after it are how the reason of a `RowFault` begins.
REASONS = (
    "over-long",
    "input shortened",
    "nothing to learn",
    "special token in the text",
    "double BOS",
    "token without an embedding",
)
# The minimum size of a window. On average its last row is half empty, so small windows would waste
# more.
WINDOW_ROWS, WINDOW_TOKENS = 128, 65536
# Mixtures of up to this many examples are tokenized once and kept.
MEMORY_EXAMPLES = 1 << 15
# Rows of an unpacked batch are padded to a quarter, a half or all of the length: its divisors.
BUCKETS = (4, 2, 1)


# Lengths 3 2 4 1 in rows of 6, the longest first. A length goes where it leaves the least space:
#
#     4    new row      4 4 4 4 · ·
#     3    new row      4 4 4 4 · ·    3 3 3 · · ·
#     2    first row    4 4 4 4 2 2    3 3 3 · · ·
#     1    second row   4 4 4 4 2 2    3 3 3 1 · ·
def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: for each row the indices of its examples, in stream order."""
    rows: list[list[int]] = []
    # open_rows[s] are the rows with s free places, and bit s of `spaces` says whether there are
    # any. The lowest bit of `spaces >> length` is the smallest space that is large enough: the best
    # fit.
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    for i in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        fits = spaces >> lengths[i]
        if fits:
            space = lengths[i] + (fits & -fits).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        open_rows[space - lengths[i]].append(row)
        spaces |= 1 << (space - lengths[i])
    return [sorted(row) for row in rows]


def shorten_input(example: Example, renderer: Renderer, length: int) -> Rendered | None:
    """The example with the end of its input cut off, so that it fits a row; None if impossible.

    The language tag and the answer are never cut.
    """
    tag = f"\n[{example.answer_language}]"
    body, tag = (
        (example.input[: -len(tag)], tag) if example.input.endswith(tag) else (example.input, "")
    )
    rendered = renderer.render(example)
    # How many tokens a cut saves is known only after rendering: cut by the mean, render, repeat.
    while (excess := len(rendered.ids) - 1 - length) > 0:
        if not body or example.messages:
            return None
        body = body[: -max(1, math.ceil(excess * len(body) / len(rendered.ids)))]
        rendered = renderer.render(dataclasses.replace(example, input=body.rstrip() + tag))
    return rendered


class PackedWindows:
    """The windows by number: window g is a fixed range of the stream, packed by itself.

    A window is a part of an epoch, or, of a small mixture, several whole epochs. `self[g]` is a
    dict of arrays: tokens, targets, segment_ids, positions, group (R, T) int32, loss_mask (R, T)
    bool, and dropped (reasons, groups).
    """

    def __init__(
        self,
        mixture: Mixture,
        renderer: Renderer,
        *,
        length: int,
        packing: bool,
        over_long: str,
        batch_size: int,
        seed: int,
        num_epochs: int | None,
    ):
        self.mixture, self.renderer, self.length, self.packing = mixture, renderer, length, packing
        self.shortens, self.batch_size, self.seed = over_long == "shorten_input", batch_size, seed
        self.groups, self._memory = mixture.groups, {}
        self._group = {group: i for i, group in enumerate(self.groups)}
        # The size of a window in examples. If examples take 100 positions on average, 128 rows of
        # 512 positions hold 656 examples:
        #
        #     mixture of 2,000    3 windows per epoch, of 666 or 667 examples
        #     mixture of 100      1 window for 7 epochs, packed together: fewer half-empty rows
        mean = self._survey()
        rows = max(WINDOW_ROWS, WINDOW_TOKENS // length)
        size = (
            math.ceil(rows * length / mean) if packing else max(1, rows // batch_size) * batch_size
        )
        self.windows_per_epoch = max(1, round(len(mixture) / size))
        epochs = math.ceil(size / len(mixture)) if self.windows_per_epoch == 1 else 1
        self._num_epochs = math.inf if num_epochs is None else num_epochs
        self._epochs_per_window = min(epochs, self._num_epochs)

    def __len__(self) -> int:
        if self._num_epochs == math.inf:
            return 1 << 40
        return self.windows_per_epoch * math.ceil(self._num_epochs / self._epochs_per_window)

    def find_positions(self, g: int) -> range:
        """The stream positions of window g."""
        # 2,000 examples in 3 windows per epoch: window 4 is k=1 of epoch 1, 2000 + 666 … 1333.
        epoch, k = divmod(g, self.windows_per_epoch)
        n = len(self.mixture) * self._epochs_per_window
        start, stop = (epoch * n + n * i // self.windows_per_epoch for i in (k, k + 1))
        return range(start, min(stop, self._num_epochs * len(self.mixture)))

    def render(self, positions: Sequence[int]) -> tuple[list[tuple[Rendered, int]], np.ndarray]:
        """(ids and mask, group) of the examples that fit a row, and counts by `REASONS`."""
        draws = list(map(tuple, self.mixture.draw(np.asarray(positions)).tolist()))
        if len(self.mixture) > MEMORY_EXAMPLES or len(self._memory) > 4 * MEMORY_EXAMPLES:
            self._memory = {}  # only a small mixture keeps its rendered examples for later epochs
        memory = self._memory
        new = list(dict.fromkeys(draw for draw in draws if draw not in memory))
        examples = [self.mixture.make(*draw) for draw in new]
        for draw, example, rendered in zip(
            new, examples, self.renderer.render_many(examples), strict=True
        ):
            memory[draw] = self._fit(example, rendered)
        kept, dropped = [], np.zeros((len(REASONS), len(self.groups)), np.int32)
        for draw in draws:
            rendered, group, reason = memory[draw]
            if reason is not None:
                dropped[reason, group] += 1
            if rendered is not None:
                kept.append((rendered, group))
        return kept, dropped

    def _fit(
        self, example: Example, rendered: Rendered | RowFault
    ) -> tuple[Rendered | None, int, int | None]:
        """(what goes into a row, group, index in `REASONS` unless the whole example does)."""
        group = self._group[example.component, example.answer_language]
        if isinstance(rendered, RowFault):
            reasons = [i for i, name in enumerate(REASONS) if rendered.reason.startswith(name)]
            return None, group, reasons[0]
        if len(rendered.ids) - 1 <= self.length:
            return rendered, group, None
        short = shorten_input(example, self.renderer, self.length) if self.shortens else None
        return short, group, REASONS.index("input shortened" if short else "over-long")

    def _survey(self) -> float:
        """Mean positions of the first examples; refuses a mixture of which none can be learned."""
        count = min(len(self.mixture), 512)
        kept, dropped = self.render(range(count))
        if not kept:
            reasons = ", ".join(
                f"{n} {name}" for name, n in zip(REASONS, dropped.sum(1), strict=True) if n
            )
            raise UserError(
                f"none of the first {count} examples can be learned from ({reasons}); "
                f"first row: {self.mixture[0].id!r}; data.length={self.length}, "
                f"data.template={self.renderer.template_name!r}"
            )
        return float(np.mean([len(rendered.ids) - 1 for rendered, _ in kept]))

    def __getitem__(self, g: int) -> dict[str, np.ndarray]:
        kept, dropped = self.render(self.find_positions(g))
        return self._fill(self._lay_out(kept, g), kept) | {"dropped": dropped}

    def name_examples(self, g: int) -> list[list[str]]:
        """The examples in each row of window g, e.g. ["row-17 x2x en>zh", …], for messages."""
        positions = self.find_positions(g)
        kept, _ = self.render(positions)
        draws = [
            draw
            for draw in map(tuple, self.mixture.draw(np.asarray(positions)).tolist())
            if self._memory[draw][0] is not None
        ]
        examples = [self.mixture.make(*draw) for draw in draws]
        names = [f"{e.id} {e.component} {e.prompt_language}>{e.answer_language}" for e in examples]
        return [[names[i] for i in row] for row in self._lay_out(kept, g)]

    def _lay_out(self, kept: list[tuple[Rendered, int]], g: int) -> list[list[int]]:
        """The rows of window g as indices of its examples."""
        lengths = [len(rendered.ids) - 1 for rendered, _ in kept]
        if not self.packing:
            return self._sort_rows(lengths, g)
        rows = pack_rows(lengths, self.length)
        return [rows[i] for i in self._shuffle(len(rows), g)]

    def _shuffle(self, count: int, g: int) -> np.ndarray:
        return np.argsort(
            mix_bits(np.arange(count, dtype=np.uint64), mix_bits(g, self.seed)[0]), kind="stable"
        )

    # Lengths 9 2 8 3 7 in batches of 2:   2 3 │ 7 8 │ 9 ·     The full batches are shuffled, and
    # the short one stays last. A batch of short rows is cut to a smaller width: see `Loader`.
    def _sort_rows(self, lengths: list[int], g: int) -> list[list[int]]:
        """One example per row, in shuffled batches of similar lengths, the last one filled up."""
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rows = [[i] for b in self._shuffle(len(batches), g) for i in batches[b]]
        if len(order) % self.batch_size:  # in the middle, the short batch would shift all others
            short = set(batches[-1])
            rows = [row for row in rows if row[0] not in short] + [[i] for i in batches[-1]]
            rows += [[]] * (-len(rows) % self.batch_size)
        return rows

    def _fill(
        self, rows: list[list[int]], kept: list[tuple[Rendered, int]]
    ) -> dict[str, np.ndarray]:
        """The arrays of a window, with the examples of every row side by side."""
        # All examples at once, without a loop: `place` is the position of every token in the
        # flattened (R, T) arrays. With rows of 6 and lengths 3, 2 | 4:
        #   row_of 0 0 1 · begins 0 3 0 · inside 0 1 2 0 1 0 1 2 3 · place 0 1 2 3 4 6 7 8 9
        shape, flat = (len(rows), self.length), [i for row in rows for i in row]
        names = ("tokens", "targets", "segment_ids", "positions", "group")
        arrays = {name: np.zeros(shape, np.int32) for name in names}
        arrays["tokens"][:], arrays["targets"][:] = self.renderer.pad_id, self.renderer.pad_id
        arrays["loss_mask"] = np.zeros(shape, bool)
        if not flat:
            return arrays
        lengths = np.array([len(kept[i][0].ids) - 1 for i in flat])
        ends = np.cumsum(lengths)
        counts = np.array([len(row) for row in rows])
        row_of = np.repeat(np.arange(len(rows)), counts)
        first = np.cumsum(counts) - counts  # of each row, among all examples
        # Where each example begins within its row.
        begins = (ends - lengths) - (ends - lengths)[first[row_of]]
        inside = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        place = np.repeat(row_of * self.length + begins, lengths) + inside
        values = {
            "tokens": np.concatenate([kept[i][0].ids[:-1] for i in flat]),
            "targets": np.concatenate([kept[i][0].ids[1:] for i in flat]),
            "loss_mask": np.concatenate([kept[i][0].loss_mask[1:] for i in flat]),
            "positions": inside,
            "segment_ids": np.repeat(np.arange(len(flat)) - first[row_of] + 1, lengths),
            "group": np.repeat([kept[i][1] for i in flat], lengths),
        }
        for name, array in arrays.items():
            array.reshape(-1)[place] = values[name]
        return arrays

    def __getstate__(self) -> dict[str, Any]:  # workers start with an empty memory
        return self.__dict__ | {"_memory": {}}

    def describe(self) -> dict[str, Any]:
        """What decides the rows: a data position means the same only where all of it is equal."""
        return {
            "mixture": self.mixture.manifest()["hash"],
            "template": self.renderer.hash,
            "length": self.length,
            "packing": self.packing,
            "shortens": self.shortens,
            "seed": self.seed,
            "batch_size": None if self.packing else self.batch_size,
        }


def count_dropped(dropped: np.ndarray, groups: Sequence[tuple[str, str]]) -> Counter[str]:
    """ "over-long x2x/zh": 3 and so on, from a (reasons, groups) array."""
    return Counter(
        {
            f"{REASONS[i]} {groups[j][0]}/{groups[j][1]}": int(dropped[i, j])
            for i, j in zip(*np.nonzero(dropped), strict=True)
        }
    )
