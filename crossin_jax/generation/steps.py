"""The compiled programs of the engine as pure functions: prefill, insert, resize, decode, score."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from crossin_jax.generation.sampling import Sampling, draw
from crossin_jax.models.transformer import Cache, Transformer
from crossin_jax.parallel.mesh import RULES

LOGITS_AT_ONCE = 1 << 24  # float32 numbers: 64 MiB


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that decoding changes, for B rows; a row's slot in the cache is its position."""

    cache: Cache
    token_B: jax.Array  # drawn last, not yet read by the model
    position_B: jax.Array  # of that token
    left_B: jax.Array  # tokens that may still be drawn
    seed_B: jax.Array  # uint32
    done_B: jax.Array
    finite: jax.Array  # () bool: no draw has met logits that are not numbers


def cache_axes(model: Transformer, dtype: Any) -> dict[str, tuple[str, ...]]:
    """The logical axes of each array of the cache, read off its shape."""
    B, S = 10_007, 10_009  # primes that are no size of a model
    shapes = jax.eval_shape(lambda: model.init_cache(B, S, dtype))
    named = {B: "batch", S: "length"}

    def axes(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        if name in ("positions", "length"):
            return tuple(named[size] for size in shape)
        others = iter(("layers", "kv_heads", "head"))
        return tuple(named.get(size) or next(others) for size in shape)

    return {name: axes(name, leaf.shape) for name, leaf in shapes.items()} | {"length": ("batch",)}


def partition(axes: tuple[str, ...], shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> jax.sharding.PartitionSpec:
    """Where an array of the cache lies on the mesh; a dimension that does not divide is whole on every device."""
    def divided(axis, size):
        names = RULES[axis][1]
        parts = math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))
        return names if size % parts == 0 else None

    return jax.sharding.PartitionSpec(*map(divided, axes, shape))


def empty_state(model: Transformer, B: int, S: int, dtype: Any) -> State:
    """B rows with nothing to do and S cache slots each."""
    zero = jnp.zeros((B,), jnp.int32)
    cache = model.init_cache(B, S, dtype) | {"length": zero}
    return State(cache, zero, zero, zero, zero.astype(jnp.uint32), jnp.ones((B,), bool), jnp.ones((), bool))


def extend_prefix(model: Transformer, axes: dict[str, tuple[str, ...]], prefix: Cache | None, rows: int, slots: int,
                  dtype: Any) -> Cache:
    """A cache that holds the prefix in every row and has `slots` more after its last token."""
    if prefix is None:
        return model.init_cache(rows, slots, dtype)
    cache = model.init_cache(rows, prefix["positions"].shape[1] + slots, dtype)
    for name, stored in cache.items():
        if name != "length":
            shape = list(prefix[name].shape)
            shape[axes[name].index("batch")] = rows
            cache[name] = jax.lax.dynamic_update_slice(stored, jnp.broadcast_to(prefix[name], shape), (0,) * stored.ndim)
    return cache | {"length": prefix["length"]}


def read_prefix(model: Transformer, tokens_1P: jax.Array, length: jax.Array, dtype: Any) -> Cache:
    """The cache of one row that other rows start from; its length is a scalar."""
    P = tokens_1P.shape[1]
    real = (jnp.arange(P)[None] < length).astype(jnp.int32)
    _, cache = model.hidden(tokens_1P, None, real, cache=model.init_cache(1, P, dtype))
    return cache | {"length": length}


def read_prompts(model: Transformer, cache: Cache, tokens_BT: jax.Array, lengths_B: jax.Array,
                 attention: str) -> tuple[jax.Array, Cache]:
    """Logits (B, V) after the last token of each right-padded prompt, and the cache that holds the prompts."""
    T = tokens_BT.shape[1]
    real = (jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32)
    hidden, cache = model.hidden(tokens_BT, None, real, cache=cache, attention=attention)
    last = jnp.take_along_axis(hidden, (lengths_B - 1)[:, None, None], axis=1)
    return model.unembed(last)[:, 0], cache


def prefill(model: Transformer, cache: Cache, tokens_BT: jax.Array, lengths_B: jax.Array, left_B: jax.Array,
            seed_B: jax.Array, sampling: Sampling, eos: jax.Array, attention: str) -> State:
    """Rows whose prompts are read and whose first token is drawn."""
    position_B = cache["length"] + lengths_B
    logits, cache = read_prompts(model, cache, tokens_BT, lengths_B, attention)
    token_B = draw(logits, seed_B, position_B, sampling)
    done_B = (left_B <= 1) | _is_any(token_B, eos)
    finite = jnp.isfinite(logits.max())
    return State(cache | {"length": position_B}, token_B, position_B, left_B - 1, seed_B, done_B, finite)


def insert(state: State, rows: State, index_A: jax.Array, axes: dict[str, tuple[str, ...]]) -> State:
    """The state with `rows` in place of the rows `index_A`; an index past the last row is left out."""
    def put(stored, new, names):
        where: list[Any] = [slice(None)] * stored.ndim
        where[names.index("batch")] = index_A
        if "length" in names:  # slots past the prompt's are never read: their stored positions are -1
            axis = names.index("length")
            size = min(stored.shape[axis], new.shape[axis])
            where[axis], new = slice(size), jax.lax.slice_in_dim(new, 0, size, axis=axis)
        return stored.at[tuple(where)].set(new, mode="drop")

    cleared = state.cache | {"positions": state.cache["positions"].at[index_A].set(-1, mode="drop")}
    cache = {name: put(cleared[name], rows.cache[name], names) for name, names in axes.items()}
    vectors = {name: put(getattr(state, name), getattr(rows, name), ("batch",))
               for name in ("token_B", "position_B", "left_B", "seed_B", "done_B")}
    return State(cache, **vectors, finite=state.finite & rows.finite)


def resize(state: State, S: int, axes: dict[str, tuple[str, ...]]) -> State:
    """The state with S cache slots per row."""
    def fit(name, stored):
        if name == "length":
            return stored
        axis = axes[name].index("length")
        if stored.shape[axis] >= S:
            return jax.lax.slice_in_dim(stored, 0, S, axis=axis)
        padding = [(0, S - stored.shape[axis] if i == axis else 0) for i in range(stored.ndim)]
        return jnp.pad(stored, padding, constant_values=-1 if name == "positions" else 0)

    return dataclasses.replace(state, cache={name: fit(name, stored) for name, stored in state.cache.items()})


def decode(model: Transformer, state: State, alive_B: jax.Array, steps: jax.Array, leave_at: jax.Array,
           sampling: Sampling, eos: jax.Array, width: int) -> tuple[State, jax.Array]:
    """Up to `steps` tokens for every row that is alive and not done, (B, width) with -1 where there is none.

    Leaves as soon as `leave_at` rows are done, so that waiting prompts can take their place.
    """
    state = dataclasses.replace(state, done_B=state.done_B | ~alive_B)

    def going(carry):
        step, state, _ = carry
        return (step < steps) & (state.done_B.sum() < leave_at)

    def advance(carry):
        step, state, out = carry
        active_B = ~state.done_B
        hidden, cache = model.hidden(state.token_B[:, None], state.position_B[:, None],
                                     active_B[:, None].astype(jnp.int32), cache=state.cache)
        logits = model.unembed(hidden)[:, 0]
        position_B = jnp.where(active_B, state.position_B + 1, state.position_B)
        token_B = draw(logits, state.seed_B, position_B, sampling)
        ended_B = _is_any(token_B, eos)
        out = out.at[:, step].set(jnp.where(active_B & ~ended_B, token_B, -1))
        finite = state.finite & jnp.isfinite(jnp.where(active_B, logits.max(axis=-1), 0)).all()
        left_B = state.left_B - 1
        done_B = state.done_B | ended_B | (left_B <= 0)
        state = State(cache | {"length": position_B}, token_B, position_B, left_B, state.seed_B, done_B, finite)
        return step + 1, state, out

    out = jnp.full((state.token_B.shape[0], width), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(going, advance, (jnp.zeros((), jnp.int32), state, out))
    return state, out


def score(model: Transformer, cache: Cache, tokens_BT: jax.Array, lengths_B: jax.Array, choices_CBK: jax.Array,
          sizes_CB: jax.Array, attention: str) -> jax.Array:
    """Log-likelihood of every token of every choice after its prompt, (C, B, K) float32; past a choice's size: anything.

    The prompts are read once. Each choice in turn is written over the one before it, in slots after the prompts.
    """
    start_B = cache["length"] + lengths_B
    logits, cache = read_prompts(model, cache, tokens_BT, lengths_B, attention)
    first = jnp.take_along_axis(logits[None], choices_CBK[:, :, :1], axis=-1)
    first -= jax.nn.logsumexp(logits, axis=-1)[None, :, None]
    steps = jnp.arange(choices_CBK.shape[2] - 1)
    if not len(steps):
        return first

    def score_choice(cache, choice):
        tokens_BK, sizes_B = choice
        real = (steps[None] < sizes_B[:, None] - 1).astype(jnp.int32)
        hidden, after = model.hidden(tokens_BK[:, :-1], start_B[:, None] + steps[None], real, cache=cache)
        return after | {"length": cache["length"]}, log_likelihoods(model, hidden, tokens_BK[:, 1:])

    return jnp.concatenate([first, jax.lax.scan(score_choice, cache, (choices_CBK, sizes_CB))[1]], axis=-1)


def log_likelihoods(model: Transformer, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """log p(target), (B, T) float32, with the logits of a few positions at a time."""
    def at_positions(inputs):
        hidden, targets = inputs
        logits = model.unembed(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    B, T, D = hidden_BTD.shape
    size = max(1, min(T, LOGITS_AT_ONCE // (B * model.spec.vocab_size)))
    if size == T:
        return at_positions((hidden_BTD, targets_BT))
    spare = -T % size
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, spare), (0, 0))).reshape(B, -1, size, D).swapaxes(0, 1)
    targets = jnp.pad(targets_BT, ((0, 0), (0, spare))).reshape(B, -1, size).swapaxes(0, 1)
    return jax.lax.map(at_positions, (hidden, targets)).swapaxes(0, 1).reshape(B, -1)[:, :T]


def _is_any(token_B: jax.Array, ids: jax.Array) -> jax.Array:
    return (token_B[:, None] == ids[None]).any(axis=-1)
