"""The engine: token ids in, token ids or log-likelihoods out, in few compiled programs of fixed shape."""

import contextlib
import logging
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from crossin_jax.config import UserError
from crossin_jax.generation import steps
from crossin_jax.generation.plan import LENGTH_BUCKETS, Group, bucket, pad, power_of_two, share_prefixes
from crossin_jax.generation.sampling import Sampling, make_sampling
from crossin_jax.generation.steps import State
from crossin_jax.models.spec import ModelSpec
from crossin_jax.parallel.mesh import BATCH

CHUNK = 32  # decode steps between two looks of the host
CHUNK_WITH_STOPS = 8  # the host looks for stop sequences: what lies past one is thrown away
CHOICE_BUCKETS = (1, 2, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 128)
SCORED_TOKENS = 512  # per row of batch_size in one scoring program

log = logging.getLogger(__name__)
Stop = str | Sequence[int]


class Engine:
    """Generates and scores with one model; an answer depends on its own prompt, seed and settings alone.

    `params` is the model's whole NNX state; it may be replaced by one of the same shapes. `batch_size` rows decode at
    once (rounded up to the shards of a batch). Lengths round up to `length_buckets`, so that the number of programs,
    `compilations`, is bounded by the buckets in use.
    """

    def __init__(self, graphdef: Any, params: Any, spec: ModelSpec, *, eos_ids: Sequence[int], pad_id: int,
                 mesh: Mesh | None = None, batch_size: int = 16, cache_dtype: str = "bfloat16",
                 max_length: int | None = None, length_buckets: Sequence[int] = LENGTH_BUCKETS,
                 share_prefix: bool = True, attention: str = "reference"):
        self.spec, self.mesh, self.pad_id, self.share_prefix, self.attention = spec, mesh, pad_id, share_prefix, attention
        self.graphdef, self.cache_dtype = graphdef, jnp.dtype(cache_dtype)
        self.max_length = max_length or spec.max_length
        self.buckets = (*(size for size in length_buckets if size < self.max_length), self.max_length)
        self.programs: Counter[str] = Counter()  # compiled programs by kind
        self._compiled: dict[tuple, Any] = {}
        self._eos = np.asarray(sorted(set(eos_ids)) or [-1], np.int32)
        self._shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
        self.batch_size = self._whole(batch_size)
        self.admitted = self._whole(max(1, self.batch_size // 8))  # rows per prefill
        self._signature: Any = None
        self.params = params
        self._axes = steps.cache_axes(nnx.eval_shape(lambda: nnx.merge(graphdef, params)), self.cache_dtype)

    @property
    def params(self) -> Any:
        """The model's state."""
        return jax.tree.unflatten(self._treedef, self._leaves)

    @params.setter
    def params(self, params: Any) -> None:
        self._leaves, self._treedef = jax.tree.flatten(params)
        signature = [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in self._leaves]
        if signature != self._signature:
            self._compiled.clear()
            self._signature = signature

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self.programs.total()

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
        assert len(limits) == len(tokens) and over_long in ("raise", "skip")
        if any(isinstance(entry, str) for entry in stop) and detokenize is None:
            raise UserError(f"stop={list(stop)!r} holds texts; pass detokenize, or stops as token ids")
        fits = self._fitting(tokens, limits, "max_new_tokens", over_long)
        answers: list[list[int] | None] = [[] if i in fits else None for i in range(len(tokens))]
        seeds = [zlib.crc32(t.tobytes()) for t in tokens] if seeds is None else [seed % (1 << 32) for seed in seeds]
        queue = deque(self._admissions(tokens, [i for i in sorted(fits) if limits[i] > 0]))
        total = sum(len(members) for _, _, members in queue)
        B, chunk = self.batch_size, CHUNK_WITH_STOPS if stop else CHUNK
        rows: list[int | None] = [None] * B
        state, prefix, prefix_cache = None, None, None
        with tqdm(total=total, desc="generate", unit="prompt", disable=not progress, delay=2) as bar:
            start, drawn = time.perf_counter(), 0
            while queue or any(row is not None for row in rows):
                admitted = []
                while queue and rows.count(None) >= len(queue[0][2]):
                    group, T, members = queue.popleft()
                    if group is not prefix:
                        prefix, prefix_cache = group, self._read_prefix(group.prefix)
                    free = [row for row in range(B) if rows[row] is None][:len(members)]
                    for row, i in zip(free, members, strict=True):
                        rows[row] = i
                    admitted.append((free, *self._prefill(group, prefix_cache, T, members, tokens, limits, seeds,
                                                          sampling)))
                need = max(min(len(tokens[i]) + max(1, len(answers[i])) + chunk, len(tokens[i]) + limits[i])
                           for i in rows if i is not None)
                state = self._fit(state, need)
                for free, prefilled, _ in admitted:
                    index = np.full(self.admitted, B, np.int32)
                    index[:len(free)] = free
                    state = self._insert(state, prefilled, index)
                alive = np.array([row is not None for row in rows])
                leave_at = len(queue[0][2]) if queue else B
                state, *results = self._decode(state, alive, chunk, leave_at, sampling)
                (out, done, finite), firsts = jax.device_get((results, [first for *_, first in admitted]))
                if not finite:
                    raise UserError("the model's logits are not finite: the weights are damaged or their training "
                                    "diverged; use an earlier checkpoint")
                first = {row: token for (free, *_), ids in zip(admitted, firsts, strict=True)
                         for row, token in zip(free, ids, strict=False)}
                for row, i in enumerate(rows):
                    if i is None:
                        continue
                    added = out[row][out[row] >= 0].tolist()
                    if row in first and first[row] not in self._eos:
                        added.insert(0, int(first[row]))
                    answers[i] += added
                    drawn += len(added)
                    end = _find_stop(answers[i], len(added), stop, detokenize)
                    if stream:
                        stream(i, added if end is None else added[:max(0, len(added) - len(answers[i]) + end)])
                    if end is not None:
                        del answers[i][end:]
                    if end is not None or done[row]:
                        rows[row] = None
                        bar.update()
                bar.set_postfix_str(f"{drawn / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
        log.info("generated %d tokens for %d prompts, %d programs compiled so far", drawn, total, self.compilations)
        return answers

    def score(self, prompts: Sequence[Any], continuations: Sequence[Sequence[Any]], *, over_long: str = "raise",
              progress: bool = True) -> list[np.ndarray | None]:
        """The summed log-likelihood of each continuation given its prompt, (C,) float64 per prompt.

        A prompt is read once for all its continuations. One too long for `max_length` raises `UserError`, or yields
        None with over_long="skip".
        """
        tokens, sampling = self._check_prompts(prompts), over_long
        choices = [[np.asarray(choice, np.int32) for choice in entry] for entry in continuations]
        assert len(choices) == len(tokens) and sampling in ("raise", "skip")
        for i, entry in enumerate(choices):
            if not entry or min(map(len, entry)) == 0:
                raise UserError(f"continuation of prompt {i}: no tokens to score; give every choice at least one")
            self._check_ids(np.concatenate(entry), f"continuation of prompt {i}")
        fits = self._fitting(tokens, [max(map(len, entry)) for entry in choices], "the longest continuation", over_long)
        results: list[np.ndarray | None] = [None] * len(tokens)
        pending: deque = deque()

        def collect():
            members, scores = pending.popleft()
            scores_BCK = np.asarray(scores).astype(np.float64).transpose(1, 0, 2)
            for i, scores_CK in zip(members, scores_BCK, strict=False):
                results[i] = np.array([row[:len(choice)].sum() for row, choice in zip(scores_CK, choices[i], strict=False)])
                if not np.isfinite(results[i]).all():
                    raise UserError(f"prompt {i}: its log-likelihoods are not finite; the weights are damaged or their "
                                    "training diverged")
            bar.update(len(members))

        with tqdm(total=len(fits), desc="score", unit="prompt", disable=not progress, delay=2) as bar:
            for group in self._groups(tokens, sorted(fits)):
                prefix_cache = self._read_prefix(group.prefix)
                for shape, B, members in self._scoring_batches(group, tokens, choices):
                    pending.append((members, self._score(group, prefix_cache, shape, B, members, tokens, choices)))
                    if len(pending) > 2:  # one runs, one waits: the host prepares the next
                        collect()
            while pending:
                collect()
        return results

    # ---- plans

    def _check_prompts(self, prompts: Sequence[Any]) -> list[np.ndarray]:
        tokens = [np.ascontiguousarray(prompt, np.int32) for prompt in prompts]
        for i, prompt in enumerate(tokens):
            if not len(prompt):
                raise UserError(f"prompt {i} has no tokens; start it with the tokenizer's BOS or any text")
            self._check_ids(prompt, f"prompt {i}")
        return tokens

    def _check_ids(self, ids: np.ndarray, place: str) -> None:
        if ids.min() < 0 or ids.max() >= self.spec.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.spec.vocab_size)][0]
            raise UserError(f"{place}: token id {wrong} is outside the model's vocabulary of {self.spec.vocab_size}; "
                            "use the tokenizer that belongs to the model")

    def _fitting(self, tokens: list[np.ndarray], more: Sequence[int], what: str, over_long: str) -> set[int]:
        long = [i for i, prompt in enumerate(tokens) if len(prompt) + more[i] > self.max_length]
        if long and over_long == "raise":
            i = long[0]
            raise UserError(f"prompt {i} has {len(tokens[i])} tokens; with {what} = {more[i]} the limit is "
                            f"{self.max_length - more[i]} ({len(long)} of {len(tokens)} prompts are too long); shorten "
                            'it or pass over_long="skip"')
        if long:
            log.warning("skipped %d of %d prompts that are too long for %d tokens", len(long), len(tokens),
                        self.max_length)
        return set(range(len(tokens))) - set(long)

    def _groups(self, tokens: list[np.ndarray], members: list[int]) -> list[Group]:
        if not self.share_prefix:
            return [Group(np.zeros(0, np.int32), tuple(members))] if members else []
        found = share_prefixes([tokens[i] for i in members])
        return [Group(group.prefix, tuple(members[i] for i in group.members)) for group in found]

    def _rest(self, group: Group, prompt: np.ndarray) -> int:
        """The bucket of what a prompt has after its group's prefix."""
        return bucket(len(prompt) - len(group.prefix), self.buckets)

    def _admissions(self, tokens: list[np.ndarray], members: list[int]) -> Iterator[tuple[Group, int, list[int]]]:
        """Prompts that are prefilled together: one prefix, one bucket; the longest first, so that memory is known."""
        groups = self._groups(tokens, members)
        for group in sorted(groups, key=lambda group: -max(len(tokens[i]) for i in group.members)):
            ordered = sorted(group.members, key=lambda i: (-len(tokens[i]), i))
            sizes = [self._rest(group, tokens[i]) for i in ordered]
            for T in sorted(set(sizes), reverse=True):
                same = [i for i, size in zip(ordered, sizes, strict=True) if size == T]
                for start in range(0, len(same), self.admitted):
                    yield group, T, same[start:start + self.admitted]

    def _scoring_batches(self, group: Group, tokens: list[np.ndarray],
                         choices: list[list[np.ndarray]]) -> Iterator[tuple[tuple[int, int, int], int, list[int]]]:
        """((T, C, K), rows, members) of every call; shapes that would stay half empty join a larger one."""
        C = bucket(max(len(choices[i]) for i in group.members), CHOICE_BUCKETS)
        shapes: dict[tuple[int, int], list[int]] = {}
        for i in group.members:
            K = 1 + power_of_two(max(map(len, choices[i])) - 1)
            shapes.setdefault((self._rest(group, tokens[i]), K), []).append(i)

        def rows(T, K):
            P = bucket(len(group.prefix), self.buckets) if len(group.prefix) else 0
            fit = self.batch_size * SCORED_TOKENS // (P + T + C * K)
            return max(1, 1 << fit.bit_length() - 1) if fit else 1

        for T, K in sorted(shapes):
            members = shapes.pop((T, K))
            larger = [(t, k) for t, k in shapes if t >= T and k >= K]
            if larger and len(members) < rows(T, K) / 2:
                shapes[min(larger, key=lambda shape: shape[0] + C * shape[1])] += members
                continue
            B = self._whole(min(rows(T, K), power_of_two(len(members))))
            for start in range(0, len(members), B):
                yield (T, C, K), B, members[start:start + B]

    # ---- compiled programs

    def _read_prefix(self, prefix: np.ndarray) -> Any:
        if not len(prefix):
            return None
        P = bucket(len(prefix), self.buckets)

        def program(leaves, tokens, length):
            return steps.read_prefix(self._model(leaves), tokens, length, self.cache_dtype)

        return self._run("prefix", (P,), program, self._leaves, pad([prefix], P, self.pad_id), np.int32(len(prefix)))

    def _prefill(self, group: Group, prefix_cache: Any, T: int, members: list[int], tokens: list[np.ndarray],
                 limits: list[int], seeds: list[int], sampling: Sampling) -> tuple[State, jax.Array]:
        """The rows of some prompts, and their first tokens; empty rows repeat the last prompt."""
        A, p = self.admitted, len(group.prefix)
        filled = [*members, *[members[-1]] * (A - len(members))]
        rests = [tokens[i][p:] for i in filled]

        def program(leaves, prefix_cache, tokens, lengths, left, seeds, sampling):
            model = self._model(leaves)
            cache = steps.extend_prefix(model, self._axes, prefix_cache, A, T, self.cache_dtype)
            rows = steps.prefill(model, cache, tokens, lengths, left, seeds, sampling, self._eos, self.attention)
            return self._place(rows), self._gather(rows.token_B)

        P = 0 if prefix_cache is None else prefix_cache["positions"].shape[1]
        return self._run("prefill", (A, P, T, sampling.rules), program, self._leaves, prefix_cache,
                         pad(rests, T, self.pad_id), np.array([len(rest) for rest in rests], np.int32),
                         np.array([limits[i] for i in filled], np.int32),
                         np.array([seeds[i] for i in filled], np.uint32), sampling)

    def _fit(self, state: State | None, need: int) -> State:
        """The state with a bucket of cache slots that holds `need`; shrinks only where much is spare."""
        S = bucket(need, self.buckets)
        if state is None:
            def create():
                model = nnx.eval_shape(lambda: nnx.merge(self.graphdef, self.params))
                return self._place(steps.empty_state(model, self.batch_size, S, self.cache_dtype))

            return self._run("create", (S,), create)
        size = state.cache["positions"].shape[1]
        if need <= size and bucket(min(need * 5 // 4, self.max_length), self.buckets) >= size:
            return state
        return self._run("resize", (size, S), lambda state: self._place(steps.resize(state, S, self._axes)), state)

    def _insert(self, state: State, rows: State, index: np.ndarray) -> State:
        sizes = state.cache["positions"].shape[1], rows.cache["positions"].shape[1]
        return self._run("insert", sizes, lambda *inputs: self._place(steps.insert(*inputs, self._axes)), state, rows,
                         index, donate=(0,))

    def _decode(self, state: State, alive: np.ndarray, chunk: int, leave_at: int, sampling: Sampling) -> tuple:
        def program(leaves, state, alive, chunk, leave_at, sampling):
            state, out = steps.decode(self._model(leaves), state, alive, chunk, leave_at, sampling, self._eos, CHUNK)
            return self._place(state), *map(self._gather, (out, state.done_B, state.finite))

        return self._run("decode", (state.cache["positions"].shape[1], sampling.rules), program, self._leaves, state,
                         alive, np.int32(chunk), np.int32(leave_at), sampling, donate=(1,))

    def _score(self, group: Group, prefix_cache: Any, shape: tuple[int, int, int], B: int, members: list[int],
               tokens: list[np.ndarray], choices: list[list[np.ndarray]]) -> jax.Array:
        T, C, K = shape
        ids_CBK, sizes_CB = np.full((C, B, K), self.pad_id, np.int32), np.ones((C, B), np.int32)
        for b, i in enumerate(members):
            for c, choice in enumerate(choices[i]):
                ids_CBK[c, b, :len(choice)], sizes_CB[c, b] = choice, len(choice)
        rests = [tokens[i][len(group.prefix):] for i in members] + [np.zeros(1, np.int32)] * (B - len(members))

        def program(leaves, prefix_cache, tokens, lengths, choices, sizes):
            model = self._model(leaves)
            cache = steps.extend_prefix(model, self._axes, prefix_cache, B, T + K - 1, self.cache_dtype)
            return self._gather(steps.score(model, cache, tokens, lengths, choices, sizes, self.attention))

        P = 0 if prefix_cache is None else prefix_cache["positions"].shape[1]
        return self._run("score", (P, B, *shape), program, self._leaves, prefix_cache, pad(rests, T, self.pad_id),
                         np.array([len(rest) for rest in rests], np.int32), ids_CBK, sizes_CB)

    def _run(self, kind: str, key: tuple, program: Callable, *inputs: Any, donate: tuple[int, ...] = ()) -> Any:
        """Calls the compiled program of a kind and key, after compiling it if it is new."""
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            compiled = self._compiled.get((kind, *key))
            if compiled is None:
                start = time.perf_counter()
                compiled = jax.jit(program, donate_argnums=donate).lower(*inputs).compile()
                self._compiled[kind, *key] = compiled
                self.programs[kind] += 1
                log.info("compiled %s %s in %.1f s, program %d", kind, key, time.perf_counter() - start,
                         self.compilations)
            return compiled(*inputs)

    def _model(self, leaves: list[jax.Array]) -> Any:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _place(self, state: State) -> State:
        """Pins a state to the mesh, so that every program takes what every other gives."""
        if self.mesh is None:
            return state
        rows = state.token_B.shape[0]
        vector = PartitionSpec(BATCH) if rows % self._shards == 0 else PartitionSpec()
        cache = {name: steps.partition(self._axes[name], leaf.shape, self.mesh) for name, leaf in state.cache.items()}
        specs = State(cache, *[vector] * 5, PartitionSpec())
        place = partial(NamedSharding, self.mesh)
        return jax.tree.map(lambda leaf, spec: jax.lax.with_sharding_constraint(leaf, place(spec)), state, specs)

    def _gather(self, x: jax.Array) -> jax.Array:
        """The whole array on every device, so that every process can read it."""
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec()))

    def _whole(self, rows: int) -> int:
        return -(-rows // self._shards) * self._shards


def _find_stop(answer: list[int], added: int, stop: Sequence[Stop],
               detokenize: Callable[[list[int]], str] | None) -> int | None:
    """How many tokens of an answer stand before the first stop, or None; `added` of them are new."""
    ends = []
    texts = [entry for entry in stop if isinstance(entry, str)]
    for ids in (list(entry) for entry in stop if not isinstance(entry, str)):
        first = max(0, len(answer) - added - len(ids) + 1)
        ends += [i for i in range(first, len(answer) - len(ids) + 1) if answer[i:i + len(ids)] == ids][:1]
    if texts and added:
        text = detokenize(answer)
        starts = [start for start in (text.find(entry) for entry in texts) if start >= 0]
        if starts:
            kept = text[:min(starts)]
            ends.append(next(k for k in range(len(answer) + 1) if detokenize(answer[:k]).startswith(kept)))
    return min(ends, default=None)
