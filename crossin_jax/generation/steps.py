"""The compiled programs of the engine as pure functions: prefill, insert, resize, decode, score.

Shape letters: B rows that decode together · A rows that are admitted · T positions of a prompt · P
of a shared prefix · S slots of the cache, R of them for prompts and W for the ring · C choices · K
tokens of a choice · D model width · V vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from crossin_jax.generation.sampling import Sampling, draw
from crossin_jax.models.transformer import Cache, Transformer
from crossin_jax.parallel.mesh import constrain_residual, weights_stay

# float32 numbers, so 64 MiB
LOGITS_AT_ONCE = 1 << 24


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that decoding changes, for B rows.

    The cache has a region of R slots per row for prompts, and a ring of W slots for drawn tokens:

        slots   0 … R-1             R … R+W-1
        row 0   Paris is the ·      capital of France ·     started first
        row 1   Name a river ·      ·       ·  Seine  ·     admitted two steps later
                                                      ▲ cache["next_slot"], for all rows

    All rows write to the same slot, which is cheap: dynamic_update_slice instead of a scatter. The
    price is that rows which start later waste the slots before their start. After the last slot,
    writing continues at R. So a row must end before the ring reaches its first token again.
    """

    cache: Cache
    token_B: jax.Array  # the token that was drawn last, which the model has not read yet
    position_B: jax.Array  # its position
    left_B: jax.Array  # how many tokens may still be drawn
    seed_B: jax.Array
    done_B: jax.Array
    finite: jax.Array  # () bool: whether all logits so far were finite


@dataclass(frozen=True)
class Axes:
    """The dimensions of one array of the cache, as logical axes."""

    names: tuple[str, ...]

    @property
    def batch(self) -> int:
        return self.names.index("batch")

    @property
    def length(self) -> int:
        return self.names.index("length")


def cache_axes(model: Transformer, dtype: Any) -> Any:
    """The `Axes` of every array of the cache, which may be stacked over layers or not."""
    # Shapes of a cache (without memory) for numbers of rows and slots that no model has as another
    # size: where they are in the shape of an array, its rows and slots are.
    B, S = 10_007, 10_009

    def axes(leaf):
        others = iter(("kv_heads", "head"))
        named = {B: "batch", S: "length"}
        return Axes(
            tuple(
                named.get(size) or ("layers" if i == 0 else next(others))
                for i, size in enumerate(leaf.shape)
            )
        )

    return jax.tree.map(axes, jax.eval_shape(lambda: model.init_cache(B, S, dtype)))


def empty_state(model: Transformer, B: int, R: int, W: int, dtype: Any) -> State:
    """B rows with nothing to do."""
    zero = jnp.zeros((B,), jnp.int32)
    cache = model.init_cache(B, R + W, dtype) | {"next_slot": jnp.int32(R)}
    return State(
        cache, zero, zero, zero, zero.astype(jnp.uint32), jnp.ones((B,), bool), jnp.ones((), bool)
    )


def extend_prefix(
    model: Transformer, axes: Any, prefix: Cache | None, rows: int, slots: int, dtype: Any
) -> Cache:
    """A cache with the prefix in every row, and `slots` more slots after it."""
    if prefix is None:
        return model.init_cache(rows, slots, dtype)

    def put(empty, stored, names):
        if not names.names:
            return stored
        repeated = jnp.broadcast_to(
            stored, [rows if i == names.batch else n for i, n in enumerate(stored.shape)]
        )
        return jax.lax.dynamic_update_slice(empty, repeated, (0,) * empty.ndim)

    return jax.tree.map(
        put, model.init_cache(rows, prefix["positions"].shape[1] + slots, dtype), prefix, axes
    )


def read_prefix(model: Transformer, tokens_1P: jax.Array, length: jax.Array, dtype: Any) -> Cache:
    """The cache of one row that other rows start from; its length is a scalar."""
    P = tokens_1P.shape[1]
    real = (jnp.arange(P)[None] < length).astype(jnp.int32)
    _, cache = model.hidden(tokens_1P, None, real, cache=model.init_cache(1, P, dtype))
    return cache | {"next_slot": length}


def read_prompts(
    model: Transformer,
    cache: Cache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    attention: str,
    cache_is_empty: bool,
) -> tuple[jax.Array, Cache]:
    """Logits (B, V) after the last token of each right-padded prompt, and the cache with them.

    `cache_is_empty`: see `Transformer.hidden`.
    """
    T = tokens_BT.shape[1]
    real = (jnp.arange(T)[None] < lengths_B[:, None]).astype(jnp.int32)
    hidden, cache = model.hidden(
        tokens_BT, None, real, cache=cache, attention=attention, cache_is_empty=cache_is_empty
    )
    last = jnp.take_along_axis(hidden, (lengths_B - 1)[:, None, None], axis=1)
    last = constrain_residual(last, weights_stay(len(last), model.spec.width))
    return model.unembed(last)[:, 0], cache


def prefill(
    model: Transformer,
    cache: Cache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    left_B: jax.Array,
    seed_B: jax.Array,
    sampling: Sampling,
    eos: jax.Array,
    attention: str,
    cache_is_empty: bool,
) -> State:
    """Rows whose prompts are read and whose first token is drawn."""
    # In a cache of prompts alone, the slot of a token is its position.
    position_B = cache["next_slot"] + lengths_B
    logits, cache = read_prompts(model, cache, tokens_BT, lengths_B, attention, cache_is_empty)
    token_B = draw(logits, seed_B, position_B, sampling)
    done_B = (left_B <= 1) | _is_any(token_B, eos)
    finite = jnp.isfinite(logits.max())
    return State(cache, token_B, position_B, left_B - 1, seed_B, done_B, finite)


# Two admitted prompts take rows 0 and 2 of three. A third place of the program had no prompt, so
# its index is past the end, and it is dropped:
#
#     index_A    0  2  3        state    new  old  new
def insert(state: State, rows: State, index_A: jax.Array, R: int, axes: Any) -> State:
    """The state with `rows` in place of the rows `index_A`; indices past the end are ignored."""

    def put(stored, new, names):
        if not names.names:  # the slot to write belongs to all rows
            return stored
        where: list[Any] = [slice(None)] * stored.ndim
        where[names.batch] = index_A
        if "length" in names.names:
            size = min(R, new.shape[names.length])
            where[names.length] = slice(size)
            new = jax.lax.slice_in_dim(new, 0, size, axis=names.length)
        return stored.at[tuple(where)].set(new, mode="drop")

    # Slots with position -1 are never read, whatever an earlier row left there.
    cleared = state.cache | {"positions": state.cache["positions"].at[index_A].set(-1, mode="drop")}
    cache = jax.tree.map(put, cleared, rows.cache, axes)
    vectors = {
        name: put(getattr(state, name), getattr(rows, name), Axes(("batch",)))
        for name in ("token_B", "position_B", "left_B", "seed_B", "done_B")
    }
    return State(cache, **vectors, finite=state.finite & rows.finite)


def resize(state: State, R: int, to_R: int, to_W: int, axes: Any) -> State:
    """The state with other sizes of the prompt region and the ring.

    The ring is turned so that its oldest slot comes first. Then slots can be added after the newest
    one, or the oldest ones can be dropped:

        ring   e f c d     next slot is that of c, the oldest
        turned c d e f
        larger c d e f · ·      smaller d e f
    """
    slot = state.cache["next_slot"]
    W = state.cache["positions"].shape[1] - R

    def fit(stored, names):
        if "length" not in names.names:
            return stored
        axis = names.length
        prompts = jax.lax.slice_in_dim(stored, 0, R, axis=axis)
        ring = jnp.roll(jax.lax.slice_in_dim(stored, R, R + W, axis=axis), R - slot, axis)
        empty = -1 if stored.dtype == jnp.int32 else 0  # positions, or keys and values
        return jnp.concatenate(
            [
                _resize(prompts, axis, 0, to_R, empty),
                _resize(ring, axis, max(0, W - to_W), to_W, empty),
            ],
            axis=axis,
        )

    cache = jax.tree.map(fit, state.cache, axes)
    return dataclasses.replace(
        state, cache=cache | {"next_slot": jnp.int32(to_R + (W if to_W > W else 0))}
    )


def _resize(x: jax.Array, axis: int, start: int, size: int, empty: int) -> jax.Array:
    """`size` slots of x from `start` on, with empty ones at the end."""
    x = jax.lax.slice_in_dim(x, start, min(start + size, x.shape[axis]), axis=axis)
    return jnp.pad(
        x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=empty
    )


# One step reads the token that was drawn last and draws the next one. A row with the prompt "Name a
# river" (positions 0 to 2), whose prefill drew "The":
#
#     step    reads    at position    writes slot    draws
#     0       The      3              R              Seine
#     1       Seine    4              R + 1          EOS: the row is done
#
# From then on the row's slots are padding. After slot R + W − 1 comes slot R again.
def decode(
    model: Transformer,
    state: State,
    alive_B: jax.Array,
    steps: jax.Array,
    leave_at: jax.Array,
    sampling: Sampling,
    eos: jax.Array,
    R: int,
    width: int,
) -> tuple[State, jax.Array]:
    """Up to `steps` tokens for every row that is alive and not done, (B, width); -1 means none.

    It stops as soon as `leave_at` rows are done, so that waiting prompts can take their place.
    """
    state = dataclasses.replace(state, done_B=state.done_B | ~alive_B)
    S = state.cache["positions"].shape[1]

    def going(carry):
        step, state, _ = carry
        return (step < steps) & (state.done_B.sum() < leave_at)

    def advance(carry):
        step, state, out = carry
        active_B = ~state.done_B
        hidden, cache = model.hidden(
            state.token_B[:, None],
            state.position_B[:, None],
            active_B[:, None].astype(jnp.int32),
            cache=state.cache,
        )
        logits = model.unembed(hidden)[:, 0]
        position_B = jnp.where(active_B, state.position_B + 1, state.position_B)
        token_B = draw(logits, state.seed_B, position_B, sampling)
        ended_B = _is_any(token_B, eos)
        out = out.at[:, step].set(jnp.where(active_B & ~ended_B, token_B, -1))
        finite = state.finite & jnp.isfinite(jnp.where(active_B, logits.max(axis=-1), 0)).all()
        left_B = state.left_B - 1
        done_B = state.done_B | ended_B | (left_B <= 0)
        cache["next_slot"] = jnp.where(cache["next_slot"] == S, R, cache["next_slot"])
        state = State(cache, token_B, position_B, left_B, state.seed_B, done_B, finite)
        return step + 1, state, out

    out = jnp.full((state.token_B.shape[0], width), -1, jnp.int32)
    _, state, out = jax.lax.while_loop(going, advance, (jnp.zeros((), jnp.int32), state, out))
    return state, out


# A prompt "x y" and the choice "a b c":
#
#     reads    x y      the logits after y score a
#     reads    a b      the logits after a score b, those after b score c; c is not read
#
# The first token of every choice is scored by one reading of the prompt.
def score(
    model: Transformer,
    cache: Cache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    choices_CBK: jax.Array,
    sizes_CB: jax.Array,
    attention: str,
    cache_is_empty: bool,
) -> tuple[jax.Array, jax.Array]:
    """Log-likelihoods of the tokens of every choice, and whether each is the likeliest token.

    (C, B, K) float32 and bool; after the end of a choice the values mean nothing. The prompts are
    read once. Each choice in turn is written over the one before it, in slots after the prompts.
    """
    start_B = cache["next_slot"] + lengths_B
    logits, cache = read_prompts(model, cache, tokens_BT, lengths_B, attention, cache_is_empty)
    first = _score_targets(logits[None], choices_CBK[:, :, 0])
    steps = jnp.arange(choices_CBK.shape[2] - 1)
    if not len(steps):
        return tuple(x[..., None] for x in first)

    def score_choice(cache, choice):
        tokens_BK, sizes_B = choice
        real = (steps[None] < sizes_B[:, None] - 1).astype(jnp.int32)
        hidden, after = model.hidden(
            tokens_BK[:, :-1], start_B[:, None] + steps[None], real, cache=cache
        )
        return after | {"next_slot": cache["next_slot"]}, log_likelihoods(
            model, hidden, tokens_BK[:, 1:]
        )

    rest = jax.lax.scan(score_choice, cache, (choices_CBK, sizes_CB))[1]
    return tuple(
        jnp.concatenate([x[..., None], y], axis=-1) for x, y in zip(first, rest, strict=True)
    )


def log_likelihoods(
    model: Transformer, hidden_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log p(target) float32, and whether no token is likelier, both (B, T).

    Only a few positions have logits at one time.
    """

    def at_positions(inputs):
        hidden, targets = inputs
        return _score_targets(model.unembed(hidden), targets)

    B, T, D = hidden_BTD.shape
    size = max(1, min(T, LOGITS_AT_ONCE // (B * model.spec.vocab_size)))
    if size == T:
        return at_positions((hidden_BTD, targets_BT))
    spare = -T % size
    hidden = (
        jnp.pad(hidden_BTD, ((0, 0), (0, spare), (0, 0))).reshape(B, -1, size, D).swapaxes(0, 1)
    )
    targets = jnp.pad(targets_BT, ((0, 0), (0, spare))).reshape(B, -1, size).swapaxes(0, 1)
    return tuple(
        x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in jax.lax.map(at_positions, (hidden, targets))
    )


def _score_targets(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p(target), and whether no token is likelier, for logits (…, V) and targets (…)."""
    shape = (*targets.shape, logits.shape[-1])
    chosen = jnp.take_along_axis(jnp.broadcast_to(logits, shape), targets[..., None], axis=-1)[
        ..., 0
    ]
    return chosen - jax.nn.logsumexp(logits, axis=-1), chosen >= logits.max(axis=-1)


def _is_any(token_B: jax.Array, ids: jax.Array) -> jax.Array:
    return (token_B[:, None] == ids[None]).any(axis=-1)
