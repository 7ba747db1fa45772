"""The compiled programs of the engine: built at the first call with a shape, and counted.

Shape letters: B rows that decode together · A rows that are admitted · T positions of a prompt · P
of a shared prefix · R slots for prompts · W slots of the ring · C choices · K tokens of a choice.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crossin_jax.generation import steps
from crossin_jax.generation.batching import bucket, pad
from crossin_jax.generation.sampling import Sampling
from crossin_jax.generation.steps import State
from crossin_jax.models.cpu import UnrolledModel, unstack
from crossin_jax.parallel.mesh import activation_spec

CHUNK = 32  # decode steps after which the host reads the new tokens
# On a CPU, a layer's slice of stacked weights or of a stacked cache is a copy. So a model of up to
# this many layers is unrolled, with arrays for each layer. More layers would take too long to
# compile, and too much memory, because their weights are there twice.
UNROLLED_LAYERS = 16

log = logging.getLogger(__name__)


class Programs:
    """The device's side of the engine; ids are numpy arrays, states are pytrees on the mesh."""

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        *,
        mesh: Mesh | None,
        batch_size: int,
        cache_dtype: str,
        eos_ids: Sequence[int],
        pad_id: int,
        attention: str,
    ):
        self.graphdef, self.mesh, self.pad_id, self.attention = graphdef, mesh, pad_id, attention
        self.eos = np.asarray(sorted(set(eos_ids)) or [-1], np.int32)
        self.compiled: Counter[str] = Counter()  # by kind
        self.compile_seconds = 0.0
        self._programs: dict[tuple, Any] = {}
        self._shards = mesh.shape["data"] * mesh.shape["fsdp"] if mesh is not None else 1
        self.batch_size = self.whole_rows(batch_size)
        self.admitted = self.whole_rows(max(1, self.batch_size // 8))  # rows of one prefill
        self._signature: Any = None
        devices = mesh.devices.flat if mesh is not None else jax.tree.leaves(params)[0].devices()
        on_cpu = next(iter(devices)).platform == "cpu"
        num_layers = nnx.eval_shape(lambda: nnx.merge(graphdef, params)).spec.num_layers
        self._unrolls = on_cpu and num_layers <= UNROLLED_LAYERS
        self._unstack = jax.jit(
            lambda params: unstack(nnx.merge(graphdef, params).layers, num_layers)
        )
        self.params = params
        model = self._abstract()
        self.cache_dtype, self.score_dtype = jnp.dtype(cache_dtype), model.compute_dtype
        self._axes = steps.cache_axes(model, self.cache_dtype)
        self._score_axes = steps.cache_axes(model, self.score_dtype)

    @property
    def params(self) -> Any:
        """The model's state; a new one of the same shapes and shardings keeps the programs."""
        return jax.tree.unflatten(self._treedef, self._leaves)

    @params.setter
    def params(self, params: Any) -> None:
        self._leaves, self._treedef = jax.tree.flatten(params)
        # Programs are compiled for shapes, precisions and shardings. The weights of later training
        # steps have the same, so benchmarks during training compile once.
        signature = (
            self._treedef,
            [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in self._leaves],
        )
        if signature != self._signature:
            self._programs.clear()
            self._signature = signature
        self._weights = self._leaves, self._unstack(params) if self._unrolls else None

    def whole_rows(self, rows: int) -> int:
        """Rows rounded up so that every shard of a batch has as many."""
        return -(-rows // self._shards) * self._shards

    def read_prefix(self, prefix: np.ndarray, buckets: Sequence[int], dtype: Any) -> Any:
        """A cache of one row that holds the prefix in a bucket of slots; None for an empty
        prefix.
        """
        if not len(prefix):
            return None
        P = bucket(len(prefix), buckets)

        def program(weights, tokens, length):
            return self._everywhere(steps.read_prefix(self._model(weights), tokens, length, dtype))

        return self._run(
            "prefix",
            (P, dtype),
            program,
            self._weights,
            pad([prefix], P, self.pad_id),
            np.int32(len(prefix)),
        )

    def prefill(
        self,
        prefix: Any,
        T: int,
        prompts: list[np.ndarray],
        limits: list[int],
        seeds: list[int],
        sampling: Sampling,
    ) -> tuple[State, jax.Array]:
        """Rows for up to `admitted` prompts, and their first tokens; spare rows repeat the last
        prompt.
        """
        # A program has one shape: fewer prompts than rows are filled up, and `insert` drops the
        # rest.
        A, spare = self.admitted, self.admitted - len(prompts)
        prompts, limits, seeds = ([*x, *x[-1:] * spare] for x in (prompts, limits, seeds))

        def program(weights, prefix, tokens, lengths, limits, seeds, sampling):
            model = self._model(weights)
            cache = steps.extend_prefix(model, self._axes, prefix, A, T, self.cache_dtype)
            rows = steps.prefill(
                model,
                cache,
                tokens,
                lengths,
                limits,
                seeds,
                sampling,
                self.eos,
                self.attention,
                prefix is None,
            )
            return self._place(rows), self._everywhere(rows.token_B)

        return self._run(
            "prefill",
            (_slots(prefix), T, sampling.rules),
            program,
            self._weights,
            prefix,
            pad(prompts, T, self.pad_id),
            np.array([len(prompt) for prompt in prompts], np.int32),
            np.array(limits, np.int32),
            np.array(seeds, np.uint32),
            sampling,
        )

    def create(self, R: int, W: int) -> State:
        """An empty state with R slots for prompts and W for drawn tokens."""
        return self._run(
            "create",
            (R, W),
            lambda: self._place(
                steps.empty_state(self._abstract(), self.batch_size, R, W, self.cache_dtype)
            ),
        )

    def resize(self, state: State, R: int, to_R: int, to_W: int) -> State:
        """The state with other sizes."""
        return self._run(
            "resize",
            (_slots(state.cache), R, to_R, to_W),
            lambda state: self._place(steps.resize(state, R, to_R, to_W, self._axes)),
            state,
        )

    def insert(self, state: State, rows: State, free: list[int], R: int) -> State:
        """The state with prefilled rows in its rows `free`; the state passed in is used up."""
        # An index behind the last row is dropped: rows that only filled the program up go nowhere.
        index = np.full(self.admitted, self.batch_size, np.int32)
        index[: len(free)] = free
        return self._run(
            "insert",
            (_slots(state.cache), R, _slots(rows.cache)),
            lambda *inputs: self._place(steps.insert(*inputs, R, self._axes)),
            state,
            rows,
            index,
            donate=(0,),
        )

    def decode(
        self,
        state: State,
        R: int,
        alive_B: np.ndarray,
        chunk: int,
        leave_at: int,
        sampling: Sampling,
    ) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """The state after at most `chunk` steps, tokens (B, CHUNK) or -1, done (B,), whether all
        logits were finite.

        The state passed in is used up.
        """

        def program(weights, state, alive, chunk, leave_at, sampling):
            state, out = steps.decode(
                self._model(weights), state, alive, chunk, leave_at, sampling, self.eos, R, CHUNK
            )
            return self._place(state), *self._everywhere((out, state.done_B, state.finite))

        assert chunk <= CHUNK
        return self._run(
            "decode",
            (_slots(state.cache), R, sampling.rules),
            program,
            self._weights,
            state,
            alive_B,
            np.int32(chunk),
            np.int32(leave_at),
            sampling,
            donate=(1,),
        )

    def score(
        self,
        prefix: Any,
        shape: tuple[int, int, int, int],
        prompts: list[np.ndarray],
        choices: list[list[np.ndarray]],
    ) -> tuple[jax.Array, jax.Array]:
        """Log-likelihoods (C, B, K) of the tokens of every choice, and whether each is the
        likeliest there, for a shape (B, T, C, K).
        """
        B, T, C, K = shape
        ids_CBK, sizes_CB = np.full((C, B, K), self.pad_id, np.int32), np.ones((C, B), np.int32)
        for b, entry in enumerate(choices):
            for c, choice in enumerate(entry):
                ids_CBK[c, b, : len(choice)], sizes_CB[c, b] = choice, len(choice)
        # Rows without a prompt read one token; their scores are not used.
        prompts = prompts + [np.zeros(1, np.int32)] * (B - len(prompts))

        def program(weights, prefix, tokens, lengths, choices, sizes):
            model = self._model(weights)
            cache = steps.extend_prefix(
                model, self._score_axes, prefix, B, T + K - 1, self.score_dtype
            )
            return self._everywhere(
                steps.score(
                    model, cache, tokens, lengths, choices, sizes, self.attention, prefix is None
                )
            )

        return self._run(
            "score",
            (_slots(prefix), *shape),
            program,
            self._weights,
            prefix,
            pad(prompts, T, self.pad_id),
            np.array([len(prompt) for prompt in prompts], np.int32),
            ids_CBK,
            sizes_CB,
        )

    # A key is all that decides the shapes of the inputs, e.g. ("decode", slots, R, rules). Programs
    # are compiled ahead of time: such a program refuses inputs of another shape, while `jax.jit`
    # would silently compile again.
    def _run(
        self, kind: str, key: tuple, program: Callable, *inputs: Any, donate: tuple[int, ...] = ()
    ) -> Any:
        """Calls the compiled program of a kind and key, after compiling it if it is new."""
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            compiled = self._programs.get((kind, *key))
            if compiled is None:
                start, program.__name__ = time.perf_counter(), kind  # the name that profiles show
                compiled = self._programs[kind, *key] = (
                    jax.jit(program, donate_argnums=donate).lower(*inputs).compile()
                )
                self.compiled[kind] += 1
                self.compile_seconds += time.perf_counter() - start
                log.info(
                    "program %d: %s %s, compiled in %.1f s",
                    self.compiled.total(),
                    kind,
                    key,
                    time.perf_counter() - start,
                )
            return compiled(*inputs)

    def _model(self, weights: tuple[list[jax.Array], list[Any] | None]) -> Any:
        leaves, layers = weights
        model = nnx.merge(self.graphdef, jax.tree.unflatten(self._treedef, leaves))
        return model if layers is None else UnrolledModel(model, layers)

    def _abstract(self) -> Any:
        model = nnx.eval_shape(lambda: nnx.merge(self.graphdef, self.params))
        return UnrolledModel(model, []) if self._unrolls else model

    def _place(self, state: State) -> State:
        """Pins a state to the mesh, so that a program returns what the next one expects."""
        if self.mesh is None:
            return state
        axes = State(self._axes, *[steps.Axes(("batch",))] * 5, steps.Axes(()))
        return jax.tree.map(
            lambda leaf, axes: jax.lax.with_sharding_constraint(
                leaf, NamedSharding(self.mesh, activation_spec(leaf.shape, axes.names, self.mesh))
            ),
            state,
            axes,
        )

    def _everywhere(self, tree: Any) -> Any:
        """The arrays whole on every device, so that every process can read them."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec()))


def _slots(cache: Any) -> int:
    return 0 if cache is None else cache["positions"].shape[1]
