"""The engine: token ids in, token ids or log-likelihoods out, in few compiled programs of fixed shape."""

import logging
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from crossin_jax.config import UserError
from crossin_jax.generation.plan import (
    CHOICE_BUCKETS,
    LENGTH_BUCKETS,
    TAIL_BUCKETS,
    Group,
    Stop,
    bucket,
    coarsen,
    find_stop,
    leave_out_beginnings,
    power_of_two,
    share_prefixes,
)
from crossin_jax.generation.programs import CHUNK, Programs
from crossin_jax.generation.sampling import Sampling, make_sampling
from crossin_jax.models.spec import ModelSpec

CHUNK_WITH_STOPS = 8  # the host looks for stops: what lies past one is thrown away
RING = 256  # slots for drawn tokens at most, until an answer grows longer
FEW_WAIT, MANY_WAIT = 2.0, 1.25  # by what factor the room for prompts shrinks: smaller steps are more programs
SCORED_TOKENS = 512  # per row of batch_size in one scoring program
NOT_FINITE = "are not finite: the weights are damaged or their training diverged; use an earlier checkpoint"

log = logging.getLogger(__name__)


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
    """Prompts that are prefilled together: they share a prefix, and the length T that the rest is padded to."""

    group: Group
    T: int
    prompts: list[Prompt]


class Engine:
    """Generates and scores with one model; an answer depends on its own prompt, seed and settings alone.

    `params` is the model's whole NNX state; it may be replaced by one of the same shapes. `batch_size` rows decode at
    once (rounded up to the shards of a batch). Lengths round up to `length_buckets`, so that the number of programs,
    `compilations`, is bounded by the buckets in use. Scoring keeps keys and values in the compute precision.
    """

    def __init__(self, graphdef: Any, params: Any, spec: ModelSpec, *, eos_ids: Sequence[int], pad_id: int,
                 mesh: Mesh | None = None, batch_size: int = 16, cache_dtype: str = "bfloat16",
                 max_length: int | None = None, length_buckets: Sequence[int] = LENGTH_BUCKETS,
                 share_prefix: bool = True, attention: str = "reference"):
        self.spec, self.share_prefix = spec, share_prefix
        self.max_length = max_length or spec.max_length
        self.buckets = (*(size for size in length_buckets if size < self.max_length), self.max_length)
        self.programs = Programs(graphdef, params, mesh=mesh, batch_size=batch_size, cache_dtype=cache_dtype,
                                 eos_ids=eos_ids, pad_id=pad_id, attention=attention)

    @property
    def params(self) -> Any:
        """The model's state."""
        return self.programs.params

    @params.setter
    def params(self, params: Any) -> None:
        self.programs.params = params

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self.programs.compiled.total()

    def generate(self, prompts: Sequence[Any], *, max_new_tokens: int | Sequence[int], temperature: float = 0.0,
                 top_k: int | None = None, top_p: float | None = None, seeds: Sequence[int] | None = None,
                 stop: Sequence[Stop] = (), detokenize: Callable[[list[int]], str] | None = None,
                 over_long: str = "raise", stream: Callable[[int, list[int]], None] | None = None,
                 progress: bool = True) -> list[list[int] | None]:
        """The answer to each prompt as token ids, without EOS and without what only a stop needs.

        A stop is a text (found through `detokenize`; the last token may reach into it) or token ids. Row i draws by
        `seeds[i]` and position; without seeds a prompt's own tokens seed it. A prompt too long for `max_length` raises
        `UserError`, or yields None with over_long="skip". `stream(i, new ids)` is called as answers grow.
        """
        sampling, tokens = make_sampling(temperature, top_k, top_p), self._check_prompts(prompts)
        limits = [max_new_tokens] * len(tokens) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        seeds = [zlib.crc32(ids.tobytes()) for ids in tokens] if seeds is None else [seed % (1 << 32) for seed in seeds]
        if any(isinstance(entry, str) for entry in stop) and detokenize is None:
            raise UserError(f"stop={list(stop)!r} holds texts; pass detokenize, or stops as token ids")
        fits = self._fitting(tokens, limits, "max_new_tokens", over_long)
        asked = [Prompt(i, *rest) for i, rest in enumerate(zip(tokens, limits, seeds, strict=True)) if i in fits]
        start, drawn = time.perf_counter(), 0
        with tqdm(total=len(asked), desc="generate", unit="prompt", disable=not progress, delay=2) as bar:
            for prompt, added, done in self._decode_all([p for p in asked if p.limit > 0], sampling,
                                                        CHUNK_WITH_STOPS if stop else CHUNK, stop, detokenize):
                drawn += len(added)
                if stream and added:
                    stream(prompt.index, added)
                if done:
                    bar.set_postfix_str(f"{drawn / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
                    bar.update()
        log.info("%d tokens for %d prompts in %.1f s, %d programs compiled so far", drawn, len(asked),
                 time.perf_counter() - start, self.compilations)
        answers: list[list[int] | None] = [None] * len(tokens)
        for prompt in asked:
            answers[prompt.index] = prompt.answer
        return answers

    def score(self, prompts: Sequence[Any], continuations: Sequence[Sequence[Any]], *, over_long: str = "raise",
              progress: bool = True) -> list[np.ndarray | None]:
        """The summed log-likelihood of each continuation given its prompt, (C,) float64 per prompt.

        A prompt is read once for all its continuations, and a continuation that another begins with is not read again.
        A prompt too long for `max_length` (the last token of a continuation
        is not read) raises `UserError`, or yields None with over_long="skip".
        """
        return [judged and judged[0] for judged in self.judge(prompts, continuations, over_long=over_long,
                                                              progress=progress)]

    def judge(self, prompts: Sequence[Any], continuations: Sequence[Sequence[Any]], *, over_long: str = "raise",
              progress: bool = True) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """As `score`, and beside it (C,) bool: whether greedy decoding would give the continuation."""
        tokens = self._check_prompts(prompts)
        choices = [[np.asarray(choice, np.int32) for choice in entry] for entry in continuations]
        assert len(choices) == len(tokens), (len(choices), len(tokens))
        for i, entry in enumerate(choices):
            if not entry or min(map(len, entry)) == 0:
                raise UserError(f"prompt {i}: a continuation without tokens cannot be scored")
            self._check_ids(np.concatenate(entry), f"a continuation of prompt {i}")
        fits = self._fitting(tokens, [max(map(len, entry)) - 1 for entry in choices],
                             "the longest continuation but its last token", over_long)
        results: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(tokens)
        kept, places = zip(*map(leave_out_beginnings, choices), strict=True) if choices else ((), ())
        read = [[entry[k] for k in some] for entry, some in zip(choices, kept, strict=True)]
        pending: deque = deque()

        def collect():
            members, judged = pending.popleft()
            scores_BCK, best_BCK = (np.asarray(x).swapaxes(0, 1) for x in judged)
            for i, scores_CK, best_CK in zip(members, scores_BCK.astype(np.float64), best_BCK, strict=False):
                where = [(c, len(choice)) for c, choice in zip(places[i], choices[i], strict=True)]
                results[i] = (np.array([scores_CK[c, :n].sum() for c, n in where]),
                              np.array([best_CK[c, :n].all() for c, n in where]))
                if not np.isfinite(results[i][0]).all():
                    raise UserError(f"prompt {i}: log-likelihoods {NOT_FINITE}")
            bar.update(len(members))

        with tqdm(total=len(fits), desc="score", unit="prompt", disable=not progress, delay=2) as bar:
            for group in self._groups(tokens, sorted(fits)):
                prefix = self._read_prefix(group.prefix, self.programs.score_dtype)
                for shape, members in self._scoring_batches(group, tokens, read):
                    rests = [tokens[i][len(group.prefix):] for i in members]
                    pending.append((members, self.programs.score(prefix, shape, rests, [read[i] for i in members])))
                    if len(pending) > 2:  # one runs and one waits while the host prepares the next
                        collect()
            while pending:
                collect()
        return results

    # ---- the host's side

    def _decode_all(self, prompts: list[Prompt], sampling: Sampling, chunk: int, stop: Sequence[Stop],
                    detokenize: Callable[[list[int]], str] | None) -> Iterator[tuple[Prompt, list[int], bool]]:
        """Continuous batching: (prompt, its new tokens, whether it is done) after every chunk of decode steps."""
        if not prompts:
            return
        programs, queue, B = self.programs, deque(self._admissions(prompts)), self.programs.batch_size
        rows: list[Prompt | None] = [None] * B
        state, R, W, group, prefix = None, 0, 0, None, None
        ring = bucket(min(max(prompt.limit for prompt in prompts), RING), self.buckets)
        while queue or any(rows):
            admitted = []  # (rows, state of those rows, their first tokens)
            while queue and rows.count(None) >= len(queue[0].prompts):
                admission = queue.popleft()
                if admission.group is not group:
                    group = admission.group
                    prefix = self._read_prefix(group.prefix, programs.cache_dtype)
                free = [row for row in range(B) if rows[row] is None][:len(admission.prompts)]
                for row, prompt in zip(free, admission.prompts, strict=True):
                    rows[row] = prompt
                rests = [prompt.tokens[len(group.prefix):] for prompt in admission.prompts]
                admitted.append((free, *programs.prefill(
                    prefix, admission.T, rests, [prompt.limit for prompt in admission.prompts],
                    [prompt.seed for prompt in admission.prompts], sampling)))
            need_R = max(len(prompt.tokens) for prompt in rows if prompt)
            need_W = max(min(max(1, len(prompt.answer)) + chunk, prompt.limit) for prompt in rows if prompt)
            waiting = sum(len(admission.prompts) for admission in queue)
            state, R, W = self._fit(state, R, W, need_R, max(need_W, ring), MANY_WAIT if waiting >= 2 * B else FEW_WAIT)
            for free, prefilled, _ in admitted:
                state = programs.insert(state, prefilled, free, R)
            leave_at = len(queue[0].prompts) if queue else B
            alive = np.array([row is not None for row in rows])
            state, *results = programs.decode(state, R, alive, chunk, leave_at, sampling)
            (out, done, finite), firsts = jax.device_get((results, [first for *_, first in admitted]))
            if not finite:
                raise UserError(f"the model's logits {NOT_FINITE}")
            first = {row: int(token) for (free, *_), ids in zip(admitted, firsts, strict=True)
                     for row, token in zip(free, ids, strict=False) if token not in programs.eos}
            for row, prompt in enumerate(rows):
                if prompt is None:
                    continue
                added = [*([first[row]] if row in first else ()), *out[row][out[row] >= 0].tolist()]
                prompt.answer.extend(added)
                end = find_stop(prompt.answer, len(added), stop, detokenize)
                if end is not None:
                    added = added[:max(0, len(added) + end - len(prompt.answer))]
                    del prompt.answer[end:]
                finished = end is not None or bool(done[row])
                if finished:
                    rows[row] = None
                yield prompt, added, finished

    def _check_prompts(self, prompts: Sequence[Any]) -> list[np.ndarray]:
        tokens = [np.ascontiguousarray(prompt, np.int32) for prompt in prompts]
        for i, prompt in enumerate(tokens):
            if not len(prompt):
                raise UserError(f"prompt {i} has no tokens; start it with the tokenizer's BOS or any text")
            self._check_ids(prompt, f"prompt {i}")
        return tokens

    def _check_ids(self, ids: np.ndarray, place: str) -> None:
        wrong = ids[(ids < 0) | (ids >= self.spec.vocab_size)]
        if len(wrong):
            raise UserError(f"{place}: token id {wrong[0]} is outside the model's vocabulary of "
                            f"{self.spec.vocab_size}; use the tokenizer that belongs to the model")

    def _fitting(self, tokens: list[np.ndarray], more: Sequence[int], what: str, over_long: str) -> set[int]:
        """The prompts that fit `max_length` with what follows them."""
        assert over_long in ("raise", "skip"), over_long
        long = [i for i, prompt in enumerate(tokens) if len(prompt) + more[i] > self.max_length]
        if long and over_long == "raise":
            i = long[0]
            raise UserError(f"prompt {i} has {len(tokens[i])} tokens; with {what} = {more[i]} the limit is "
                            f"{self.max_length - more[i]} ({len(long)} of {len(tokens)} prompts are too long)\n"
                            'shorten it, or pass over_long="skip"')
        if long:
            log.warning("skipped %d of %d prompts that do not fit %d tokens", len(long), len(tokens), self.max_length)
        return set(range(len(tokens))) - set(long)

    def _groups(self, tokens: list[np.ndarray], members: list[int]) -> list[Group]:
        if not self.share_prefix:
            return [Group(np.zeros(0, np.int32), tuple(members))]
        found = share_prefixes([tokens[i] for i in members])
        return [Group(group.prefix, tuple(members[i] for i in group.members)) for group in found]

    def _admissions(self, prompts: list[Prompt]) -> Iterator[Admission]:
        """Every prompt in one admission; the longest first, so that memory is known early and the cache shrinks."""
        groups = self._groups([prompt.tokens for prompt in prompts], list(range(len(prompts))))
        for group in sorted(groups, key=lambda group: -max(len(prompts[i].tokens) for i in group.members)):
            members = sorted((prompts[i] for i in group.members), key=lambda prompt: -len(prompt.tokens))
            sizes = coarsen([len(prompt.tokens) - len(group.prefix) for prompt in members], self.buckets)
            for T in sorted(set(sizes), reverse=True):
                same = [prompt for prompt, size in zip(members, sizes, strict=True) if size == T]
                for start in range(0, len(same), self.programs.admitted):
                    yield Admission(group, T, same[start:start + self.programs.admitted])

    def _scoring_batches(self, group: Group, tokens: list[np.ndarray], choices: list[list[np.ndarray]],
                         ) -> Iterator[tuple[tuple[int, int, int, int], list[int]]]:
        """((B, T, C, K), members) of every call."""
        C = bucket(max(len(choices[i]) for i in group.members), CHOICE_BUCKETS)
        P = bucket(len(group.prefix), self.buckets) if len(group.prefix) else 0
        tails = coarsen([max(map(len, choices[i])) - 1 for i in group.members], TAIL_BUCKETS, weight=C)
        for tail in sorted(set(tails)):
            alike = [i for i, size in zip(group.members, tails, strict=True) if size == tail]
            sizes = coarsen([len(tokens[i]) - len(group.prefix) for i in alike], self.buckets)
            for T in sorted(set(sizes)):
                members = [i for i, size in zip(alike, sizes, strict=True) if size == T]
                most = max(1, self.programs.batch_size * SCORED_TOKENS // (P + T + C * (tail + 1)))
                B = self.programs.whole_rows(min(1 << most.bit_length() - 1, power_of_two(len(members))))
                for start in range(0, len(members), B):
                    yield (B, T, C, tail + 1), members[start:start + B]

    def _read_prefix(self, prefix: np.ndarray, dtype: Any) -> Any:
        return self.programs.read_prefix(prefix, bucket(len(prefix), self.buckets), dtype) if len(prefix) else None

    def _fit(self, state: Any, R: int, W: int, need_R: int, need_W: int, shrink: float) -> tuple[Any, int, int]:
        """The state with room for prompts of `need_R` tokens and for `need_W` drawn ones, and both sizes.

        The room for prompts shrinks by a factor of at least `shrink`, that for drawn tokens only doubles: every size
        is a program.
        """
        to_R, to_W = bucket(need_R, self.buckets), W
        if need_W > W:
            to_W = bucket(min(max(need_W, 2 * W), self.max_length), self.buckets)
        if state is None:
            return self.programs.create(to_R, to_W), to_R, to_W
        if to_R <= R < shrink * to_R:
            to_R = R
        return (state if (to_R, to_W) == (R, W) else self.programs.resize(state, R, to_R, to_W)), to_R, to_W
