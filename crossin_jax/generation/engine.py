"""The engine: token ids in, token ids or log-likelihoods out.

A compiled program has a fixed shape, so lengths are rounded up to buckets, and few programs serve
all prompts. The parts: `batching` decides which prompts share a program and a prefix, `decoding`
admits prompts into the rows that decode and collects their answers, `programs` compiles and calls
the pure functions of `steps`.

Shape letters: B prompts of a batch · T positions of a prompt · P of a shared prefix · C choices ·
K tokens of a choice.
"""

import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from crossin_jax.config import UserError
from crossin_jax.generation.batching import (
    CHOICE_BUCKETS,
    LENGTH_BUCKETS,
    TAIL_BUCKETS,
    Group,
    Stop,
    bucket,
    by_bucket,
    check_stops,
    cut_into_batches,
    drop_prefix_choices,
    power_of_two,
    share_prefixes,
)
from crossin_jax.generation.decoding import NOT_FINITE, Decoder, Prompt, plan_admissions
from crossin_jax.generation.programs import Programs
from crossin_jax.generation.progress import Progress
from crossin_jax.generation.sampling import make_sampling
from crossin_jax.models.spec import ModelSpec

SCORED_TOKENS = 512  # per row of batch_size in one scoring program

log = logging.getLogger(__name__)


class Engine:
    """Generates and scores with one model; an answer depends only on its prompt, seed and settings.

    `params` is the model's whole NNX state; it may be replaced by one of the same shapes.
    `batch_size` rows decode at once (rounded up to the shards of a batch). Lengths are rounded up
    to `length_buckets`, so that the number of programs, `compilations`, is bounded by the buckets
    in use. Scoring keeps keys and values in the compute precision.
    """

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        spec: ModelSpec,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        mesh: Mesh | None = None,
        batch_size: int = 16,
        cache_dtype: str = "bfloat16",
        max_length: int | None = None,
        length_buckets: Sequence[int] = LENGTH_BUCKETS,
        share_prefix: bool = True,
        attention: str = "reference",
    ):
        self.spec, self.share_prefix = spec, share_prefix
        self.max_length = max_length or spec.max_length
        self.buckets = (
            *(size for size in length_buckets if size < self.max_length),
            self.max_length,
        )
        self.programs = Programs(
            graphdef,
            params,
            mesh=mesh,
            batch_size=batch_size,
            cache_dtype=cache_dtype,
            eos_ids=eos_ids,
            pad_id=pad_id,
            attention=attention,
        )

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

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int | Sequence[int],
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seeds: Sequence[int] | None = None,
        stop: Sequence[Stop] = (),
        detokenize: Callable[[list[int]], str] | None = None,
        over_long: str = "raise",
        stream: Callable[[int, list[int]], None] | None = None,
        finished: Callable[[int, list[int]], None] | None = None,
        progress: bool = True,
    ) -> list[list[int] | None]:
        """The answer to each prompt as token ids, without EOS and without what only a stop needs.

        A stop is a text (found through `detokenize`; the last token may reach into it) or token
        ids. Row i draws by `seeds[i]` and position; without seeds a prompt's own tokens seed it. A
        prompt too long for `max_length` raises `UserError`, or gives None with over_long="skip".
        `stream(i, new ids)` is called as answers grow, `finished(i, ids)` when one is complete.
        """
        sampling = make_sampling(temperature, top_k, top_p)
        tokens = self._check_prompts(prompts)
        check_stops(stop, detokenize)
        limits = [max_new_tokens] * len(tokens)
        if not isinstance(max_new_tokens, int):
            limits = list(max_new_tokens)
        # Without seeds the prompt's own tokens are the seed: the answer does not depend on its
        # place among other prompts.
        if seeds is None:
            seeds = [zlib.crc32(ids.tobytes()) for ids in tokens]
        fits = self._find_fitting(tokens, limits, "max_new_tokens", over_long)
        asked = [
            Prompt(i, ids, limit, seed % (1 << 32))
            for i, (ids, limit, seed) in enumerate(zip(tokens, limits, seeds, strict=True))
            if i in fits
        ]
        admissions = plan_admissions(
            [prompt for prompt in asked if prompt.limit > 0],
            self.buckets,
            self.programs.admitted,
            self.share_prefix,
        )
        decoder = Decoder(self.programs, admissions, self.buckets, sampling, stop, detokenize)
        self._run(decoder, len(asked), stream, finished, progress)
        answers: list[list[int] | None] = [None] * len(tokens)
        for prompt in asked:
            answers[prompt.index] = prompt.answer
        return answers

    def _run(
        self,
        decoder: Decoder,
        total: int,
        stream: Callable[[int, list[int]], None] | None,
        finished: Callable[[int, list[int]], None] | None,
        progress: bool,
    ) -> None:
        """Decodes everything, with a progress bar and a line in the log."""
        drawn = 0
        with self._open_bar("generate", total, progress) as bar:
            for prompt, added, done in decoder.run():
                drawn += len(added)
                if stream and added:
                    stream(prompt.index, added)
                if done and finished:
                    finished(prompt.index, prompt.answer)
                if done:
                    bar.add(1, f"{drawn / bar.seconds:.0f} tokens/s")
            log.info(
                "%d tokens for %d prompts in %.1f s without compiling, %d programs compiled so far",
                drawn,
                total,
                bar.seconds,
                self.compilations,
            )

    def _open_bar(self, name: str, total: int, shown: bool) -> Progress:
        return Progress(name, total, lambda: self.programs.compile_seconds, shown)

    def score(
        self,
        prompts: Sequence[Any],
        continuations: Sequence[Sequence[Any]],
        *,
        over_long: str = "raise",
        finished: Callable[[int, np.ndarray], None] | None = None,
        progress: bool = True,
    ) -> list[np.ndarray | None]:
        """The summed log-likelihood of each continuation given its prompt, (C,) float64 per prompt.

        A prompt is read once for all its continuations. A continuation is not read if another one
        begins with it. A prompt too long for `max_length` (the last token of a continuation is not
        read) raises `UserError`, or gives None with over_long="skip".
        `finished(i, scores)` is called when prompt i is scored.
        """
        scored = self.score_with_greedy(
            prompts, continuations, over_long=over_long, finished=finished, progress=progress
        )
        return [entry and entry[0] for entry in scored]

    def score_with_greedy(
        self,
        prompts: Sequence[Any],
        continuations: Sequence[Sequence[Any]],
        *,
        over_long: str = "raise",
        finished: Callable[[int, np.ndarray], None] | None = None,
        progress: bool = True,
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """As `score`, and (C,) bool: whether greedy decoding would give the continuation."""
        tokens = self._check_prompts(prompts)
        choices = self._check_choices(continuations)
        assert len(choices) == len(tokens), (len(choices), len(tokens))
        fits = self._find_fitting(
            tokens,
            [max(map(len, entry)) - 1 for entry in choices],
            "the longest continuation but its last token",
            over_long,
        )
        results: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(tokens)
        # A choice that begins another one is not read by itself. With the choices "(A" and "(A)
        # Paris" only the second is read; its first tokens give the score of the first.
        kept, places = zip(*map(drop_prefix_choices, choices), strict=True) if choices else ((), ())
        read = [[entry[k] for k in some] for entry, some in zip(choices, kept, strict=True)]
        # Up to three batches are on the device while the host prepares the next one.
        pending: deque = deque()
        with self._open_bar("score", len(fits), progress) as bar:

            def collect():
                members, scored = pending.popleft()
                for i, scores_CK, best_CK in _by_prompt(members, scored):
                    results[i] = _sum_choices(i, choices[i], places[i], scores_CK, best_CK)
                    if finished:
                        finished(i, results[i][0])
                bar.add(len(members))

            for members, scored in self._score_all(tokens, read, sorted(fits)):
                pending.append((members, scored))
                if len(pending) > 2:
                    collect()
            while pending:
                collect()
        return results

    def _score_all(
        self, tokens: list[np.ndarray], choices: list[list[np.ndarray]], asked: list[int]
    ) -> Iterator[tuple[list[int], Any]]:
        """(prompts of a batch, result of the scoring program); the device may not be done yet."""
        for group in share_prefixes([tokens[i] for i in asked], self.share_prefix):
            group = Group(group.prefix, tuple(asked[i] for i in group.members))
            prefix = self.programs.read_prefix(
                group.prefix, self.buckets, self.programs.score_dtype
            )
            for shape, members in self._scoring_batches(group, tokens, choices):
                rests = [tokens[i][len(group.prefix) :] for i in members]
                yield (
                    members,
                    self.programs.score(prefix, shape, rests, [choices[i] for i in members]),
                )

    def _check_prompts(self, prompts: Sequence[Any]) -> list[np.ndarray]:
        tokens = [np.ascontiguousarray(prompt, np.int32) for prompt in prompts]
        for i, prompt in enumerate(tokens):
            if not len(prompt):
                raise UserError(
                    f"prompt {i} has no tokens; start it with the tokenizer's BOS or any text"
                )
            self._check_ids(prompt, f"prompt {i}")
        return tokens

    def _check_choices(self, continuations: Sequence[Sequence[Any]]) -> list[list[np.ndarray]]:
        choices = [[np.asarray(choice, np.int32) for choice in entry] for entry in continuations]
        for i, entry in enumerate(choices):
            if not entry or min(map(len, entry)) == 0:
                raise UserError(f"prompt {i}: a continuation without tokens cannot be scored")
            self._check_ids(np.concatenate(entry), f"a continuation of prompt {i}")
        return choices

    def _check_ids(self, ids: np.ndarray, place: str) -> None:
        wrong = ids[(ids < 0) | (ids >= self.spec.vocab_size)]
        if len(wrong):
            raise UserError(
                f"{place}: token id {wrong[0]} is outside the model's vocabulary of "
                f"{self.spec.vocab_size}; use the tokenizer that belongs to the model"
            )

    def _find_fitting(
        self, tokens: list[np.ndarray], more: Sequence[int], what: str, over_long: str
    ) -> set[int]:
        """The prompts that fit `max_length` with `more` tokens after them, which are called `what`
        in the message; others are refused, or skipped.
        """
        assert over_long in ("raise", "skip"), over_long
        long = [i for i, prompt in enumerate(tokens) if len(prompt) + more[i] > self.max_length]
        if long and over_long == "raise":
            i = long[0]
            raise UserError(
                f"prompt {i} has {len(tokens[i])} tokens; with {what} = {more[i]} the limit is "
                f"{self.max_length - more[i]} ({len(long)} of {len(tokens)} prompts are too long)\n"
                'shorten it, or pass over_long="skip"'
            )
        if long:
            log.warning(
                "skipped %d of %d prompts that do not fit %d tokens",
                len(long),
                len(tokens),
                self.max_length,
            )
        return set(range(len(tokens))) - set(long)

    # A batch has about batch_size · SCORED_TOKENS tokens. With batch_size 16, a prompt of T = 256
    # and C = 4 choices of 11 tokens: 16 · 512 // (256 + 4 · 11) = 27 rows, rounded down to 16.
    def _scoring_batches(
        self,
        group: Group,
        tokens: list[np.ndarray],
        choices: list[list[np.ndarray]],
    ) -> Iterator[tuple[tuple[int, int, int, int], list[int]]]:
        """((B, T, C, K), members) of every call."""
        # One program per (B, T, C, K): rows, length of the prompt, choices, tokens of a choice.
        # Long prompts come in smaller batches, so that every call has about as many tokens.
        C = bucket(max(len(choices[i]) for i in group.members), CHOICE_BUCKETS)
        P = bucket(len(group.prefix), self.buckets) if len(group.prefix) else 0
        tails = [max(map(len, choices[i])) - 1 for i in group.members]
        for tail, alike in by_bucket(group.members, tails, TAIL_BUCKETS, weight=C):
            sizes = [len(tokens[i]) - len(group.prefix) for i in alike]
            for T, members in by_bucket(alike, sizes, self.buckets):
                most = max(1, self.programs.batch_size * SCORED_TOKENS // (P + T + C * (tail + 1)))
                B = self.programs.whole_rows(
                    min(1 << most.bit_length() - 1, power_of_two(len(members)))
                )
                for batch in cut_into_batches(members, B):
                    yield (B, T, C, tail + 1), batch


def _by_prompt(members: list[int], scored: Any) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(prompt, (C, K) log-likelihoods, (C, K) whether likeliest) from arrays (C, B, K)."""
    scores_BCK, best_BCK = (np.asarray(x).swapaxes(0, 1) for x in scored)
    return zip(members, scores_BCK.astype(np.float64), best_BCK, strict=False)


def _sum_choices(
    i: int,
    choices: list[np.ndarray],
    places: list[int],
    scores_CK: np.ndarray,
    best_CK: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The summed log-likelihood of each choice of prompt i, and whether all tokens are likeliest.

    `places` names the scored choice whose first tokens are this choice.
    """
    # "Paris" is not scored if "Paris, France" is: its sum is that of the first tokens there.
    where = [(place, len(choice)) for place, choice in zip(places, choices, strict=True)]
    sums = np.array([scores_CK[place, :n].sum() for place, n in where])
    if not np.isfinite(sums).all():
        raise UserError(f"prompt {i}: log-likelihoods {NOT_FINITE}")
    return sums, np.array([best_CK[place, :n].all() for place, n in where])
