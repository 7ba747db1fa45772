"""Continuous batching: a waiting prompt takes the row of one that is done.

Shape letters: B rows of the batch · T length of admitted prompts · R slots for prompts · W slots of
the ring, for answers.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from crossin_jax.config import UserError
from crossin_jax.generation.batching import (
    Group,
    Stop,
    bucket,
    by_bucket,
    cut_into_batches,
    find_stop,
    share_prefixes,
)
from crossin_jax.generation.programs import CHUNK, Programs
from crossin_jax.generation.sampling import Sampling

CHUNK_WITH_STOPS = 8  # with stop strings the host checks every 8 tokens; later ones are discarded
RING = 256  # slots for decoded tokens at the start; the ring grows when an answer needs more
# Shrink the prompt region only by this factor or more, because each size is one more compilation.
# While many prompts wait, the smaller cache is used for longer, so a smaller gain is enough.
SHRINK_IDLE, SHRINK_BUSY = 2.0, 1.25
NOT_FINITE = (
    "are not finite: the weights are damaged or their training diverged; use an earlier checkpoint"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt on its way through the engine; `answer` grows."""

    index: int
    tokens: np.ndarray
    limit: int
    seed: int
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Admission:
    """Prompts that are prefilled together: one shared prefix, the rest of each padded to T
    tokens.
    """

    group: Group
    T: int
    prompts: list[Prompt]


def plan_admissions(
    prompts: list[Prompt], buckets: Sequence[int], most: int, share_prefix: bool
) -> list[Admission]:
    """Admissions of at most `most` prompts each, in the order in which they enter the batch."""
    admissions = []
    # Longest prompts first: the largest cache is needed at once (if memory is short, it fails
    # early), and the prompt region only shrinks from then on.
    groups = [
        (group, sorted((prompts[i] for i in group.members), key=lambda p: -len(p.tokens)))
        for group in share_prefixes([prompt.tokens for prompt in prompts], share_prefix)
    ]
    for group, members in sorted(groups, key=lambda pair: -len(pair[1][0].tokens)):
        sizes = [len(prompt.tokens) - len(group.prefix) for prompt in members]
        for T, alike in reversed(by_bucket(members, sizes, buckets)):
            admissions += [Admission(group, T, some) for some in cut_into_batches(alike, most)]
    return admissions


class Decoder:
    """The decode batch of one call of `Engine.generate`, and the prompts that wait for a row in it.

    A prompt with no room for one token must not be among the admissions.
    """

    # One turn of `run`, with B = 4 rows and three prompts per admission:
    #
    #     row     before        admit      make room      decode a chunk     collect
    #      0      prompt 3                                3: + 32 tokens     3 yields 32 tokens
    #      1      free          prompt 5   resize the     5: + 6, then EOS   5 yields 6, row is free
    #      2      free          prompt 6   cache if it    6: + 32 tokens     6 yields 32 tokens
    #      3      free          prompt 7   is too small   7: + 32 tokens     7 yields 32 tokens
    #
    # An admission waits until it finds a free row for each of its prompts. The decode program
    # returns early when enough rows are free for the next one.

    def __init__(
        self,
        programs: Programs,
        admissions: Sequence[Admission],
        buckets: Sequence[int],
        sampling: Sampling,
        stop: Sequence[Stop],
        detokenize: Callable[[list[int]], str] | None,
    ):
        self.programs, self.buckets, self.sampling = programs, buckets, sampling
        self.stop, self.detokenize = stop, detokenize
        self.chunk = CHUNK_WITH_STOPS if stop else CHUNK
        self.queue = deque(admissions)
        self.rows: list[Prompt | None] = [None] * programs.batch_size
        longest = max((p.limit for entry in admissions for p in entry.prompts), default=1)
        self.first_ring = bucket(min(longest, RING), buckets)
        self.state, self.R, self.W = None, 0, 0
        self.group = self.prefix = None

    def run(self) -> Iterator[tuple[Prompt, list[int], bool]]:
        """(prompt, its new tokens, whether it is done) for every row, after every chunk of decode
        steps.
        """
        while self.queue or any(self.rows):
            admitted = self._admit()
            self._make_room()
            for free, prefilled, _ in admitted:
                self.state = self.programs.insert(self.state, prefilled, free, self.R)
            yield from self._collect(*self._decode(admitted))

    def _admit(self) -> list[tuple[list[int], Any, jax.Array]]:
        """Prefills waiting prompts while rows are free: (rows, their state, their first tokens) of
        each admission.
        """
        admitted = []
        while self.queue and self.rows.count(None) >= len(self.queue[0].prompts):
            entry = self.queue.popleft()
            group, prompts = entry.group, entry.prompts
            if group is not self.group:
                self.group = group
                self.prefix = self.programs.read_prefix(
                    group.prefix, self.buckets, self.programs.cache_dtype
                )
            free = [row for row, prompt in enumerate(self.rows) if prompt is None][: len(prompts)]
            for row, prompt in zip(free, prompts, strict=True):
                self.rows[row] = prompt
            prefilled, first = self.programs.prefill(
                self.prefix,
                entry.T,
                [prompt.tokens[len(group.prefix) :] for prompt in prompts],
                [prompt.limit for prompt in prompts],
                [prompt.seed for prompt in prompts],
                self.sampling,
            )
            admitted.append((free, prefilled, first))
        return admitted

    def _make_room(self) -> None:
        """Creates or resizes the cache so that every row has room for its prompt and for the next
        chunk.
        """
        # A row's slots are R for its prompt and W for its answer; each size is one more
        # compilation:
        #
        #     | prompt region, R slots | ring, W slots |
        #       longest prompt here      longest answer here, at least RING
        #       shrinks rarely           doubles, and never shrinks
        prompts = [prompt for prompt in self.rows if prompt]
        R, W = bucket(max(len(prompt.tokens) for prompt in prompts), self.buckets), self.W
        waiting = sum(len(entry.prompts) for entry in self.queue)
        shrink = SHRINK_BUSY if waiting >= 2 * len(self.rows) else SHRINK_IDLE
        if R <= self.R < shrink * R:
            R = self.R
        # The first token of an answer comes from prefill and needs no slot before it is read.
        need = max(min(max(1, len(p.answer)) + self.chunk, p.limit) for p in prompts)
        need = max(need, self.first_ring)
        if need > W:
            W = bucket(min(max(need, 2 * W), self.buckets[-1]), self.buckets)
        if self.state is None:
            self.state = self.programs.create(R, W)
        elif (R, W) != (self.R, self.W):
            self.state = self.programs.resize(self.state, self.R, R, W)
        self.R, self.W = R, W

    def _decode(self, admitted: list) -> tuple[list[list[int]], np.ndarray]:
        """Runs one chunk: the new tokens of every row, and (B,) bool, whether it is done."""
        leave_at = len(self.queue[0].prompts) if self.queue else len(self.rows)
        alive = np.array([prompt is not None for prompt in self.rows])
        self.state, *results = self.programs.decode(
            self.state, self.R, alive, self.chunk, leave_at, self.sampling
        )
        (out, done, finite), firsts = jax.device_get((results, [first for *_, first in admitted]))
        if not finite:
            raise UserError(f"the model's logits {NOT_FINITE}")
        added = [tokens[tokens >= 0].tolist() for tokens in out]
        for (free, *_), tokens in zip(admitted, firsts, strict=True):
            for row, token in zip(free, tokens.tolist(), strict=False):  # spare rows come last
                if token not in self.programs.eos:
                    added[row].insert(0, token)
        return added, done

    def _collect(
        self, added: list[list[int]], done: np.ndarray
    ) -> Iterator[tuple[Prompt, list[int], bool]]:
        """Appends new tokens to the answers, cuts them at a stop, and frees the rows that are
        done.
        """
        for row, prompt in enumerate(self.rows):
            if prompt is None:
                continue
            before = len(prompt.answer)
            prompt.answer.extend(added[row])
            end = find_stop(prompt.answer, len(added[row]), self.stop, self.detokenize)
            if end is not None:
                del prompt.answer[end:]
            finished = end is not None or bool(done[row])
            if finished:
                self.rows[row] = None
            yield prompt, prompt.answer[before:], finished
