"""One forward pass for training, prefill and decoding: every way of running it gives the same
numbers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from crossin_jax import config as settings
from crossin_jax.config import Lora, UserError
from crossin_jax.models.attention import Kernel, attend
from crossin_jax.models.layers import Adapter
from crossin_jax.models.rope import rope_frequencies, rope_tables
from crossin_jax.models.transformer import REMAT, Transformer
from crossin_jax.parallel.mesh import make_mesh, shardings
from tests.models.models import GEMMA, LLAMA, MISTRAL, SPECS, make_model, make_rows, make_tokens

B, T = 3, 24
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def run(model, *inputs, **options):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs, **options))(
        state, *inputs
    )


@specs
def test_packed_documents_get_the_logits_they_get_alone(spec):
    model, tokens = make_model(spec), make_tokens(B, T)
    positions, segments = make_rows(B, T)
    packed = run(model, tokens, positions, segments)
    alone = jax.jit(lambda tokens: model(tokens))
    for row in range(B):
        for segment in range(1, segments[row].max() + 1):
            where = segments[row] == segment
            padded = np.zeros((1, T), np.int32)
            padded[0, : where.sum()] = tokens[row, where]
            np.testing.assert_allclose(
                packed[row, where], alone(padded)[0, : where.sum()], atol=2e-4
            )


@specs
def test_no_token_sees_the_future_nor_beyond_the_windows(spec):
    tokens = make_tokens(1, T)
    logits = jax.jit(make_model(spec).__call__)
    expected = logits(tokens)
    for t in (0, 7, T - 1):
        changed = tokens.copy()
        changed[0, t] = tokens[0, t] % 60 + 1
        moved = np.abs(logits(changed) - expected)[0].max(-1) > 1e-6
        assert not moved[:t].any() and moved[t:].any()
        # A layer of window w carries a token w - 1 places on.
        if spec.local_layers and all(spec.local_layers):
            assert not moved[t + spec.num_layers * (spec.window - 1) + 1 :].any()


@pytest.mark.parametrize("per_row", [False, True], ids=["common_slot", "slot_per_row"])
@specs
def test_prefill_and_decode_equal_the_full_forward_with_left_and_right_padding(spec, per_row):
    model, tokens = make_model(spec), make_tokens(B, T)
    expected = run(model, tokens)
    lengths, prompt = np.array([9, 4, 12]), 12
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="cache_is_empty")
    def step(state, cache, tokens, positions, segments, cache_is_empty):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.hidden(
            tokens, positions, segments, cache=cache, cache_is_empty=cache_is_empty
        )
        return model.unembed(hidden), cache

    for left in (False, True):
        for cache_is_empty in (False, True):
            block, positions, segments = np.zeros((3, B, prompt), np.int32)
            for row, n in enumerate(lengths):
                where = slice(prompt - n, prompt) if left else slice(0, n)
                block[row, where], positions[row, where], segments[row, where] = (
                    tokens[row, :n],
                    np.arange(n),
                    1,
                )
            cache = model.init_cache(B, 2 * T, "float32")
            logits, cache = step(state, cache, block, positions, segments, cache_is_empty)
            if per_row:
                cache["next_slot"] = jnp.asarray([prompt, prompt + 3, prompt - 0])
            for row, n in enumerate(lengths):
                where = slice(prompt - n, prompt) if left else slice(0, n)
                np.testing.assert_allclose(logits[row, where], expected[row, :n], atol=2e-4)
            for i in range(5):
                at = (lengths + i)[:, None].astype(np.int32)
                logits, cache = step(
                    state, cache, np.take_along_axis(tokens, at, 1), at, np.ones_like(at), False
                )
                np.testing.assert_allclose(
                    logits[:, 0], expected[np.arange(B), at[:, 0]], atol=2e-4
                )


def test_a_cache_in_int8_stays_near_and_default_positions_continue_it():
    model, tokens = make_model(LLAMA), make_tokens(B, T)
    expected = run(model, tokens)
    for dtype, limit in (("float32", 2e-4), ("int8", 0.05 * float(jnp.std(expected)))):
        cache, parts = model.init_cache(B, T, dtype), []
        for piece in np.split(tokens, (10, 11), axis=1):
            hidden, cache = model.hidden(piece, cache=cache)
            parts.append(model.unembed(hidden))
        assert np.abs(np.concatenate(parts, axis=1) - expected).mean() < limit
    assert cache["k"].dtype == jnp.int8 and int(cache["next_slot"]) == T


@specs
def test_scan_over_layers_equals_a_loop(spec):
    model, tokens = make_model(spec), make_tokens(B, T)
    positions, segments = make_rows(B, T)
    graphdef, stacked = nnx.split(model.layers)
    x = model.embed_tokens.embed(tokens) * (spec.width**0.5 if spec.scale_embedding else 1.0)
    for i in range(spec.num_layers):
        is_local = bool(spec.local_layers) and spec.local_layers[i]
        rope = (spec.local_rope or spec.rope) if is_local else spec.rope
        attention = functools.partial(
            attend,
            positions_BT=positions,
            segment_ids_BT=segments,
            kernel=Kernel("reference"),
            is_local=None,
            window=spec.window if is_local else None,
            soft_cap=spec.attention_soft_cap,
        )
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        x = block(
            x,
            *rope_tables(jnp.asarray(positions), rope_frequencies(rope, spec.head_width)),
            attention,
            None,
        )
    hidden, _ = model.hidden(tokens, positions, segments)
    np.testing.assert_allclose(model.norm(x), hidden, atol=2e-4)


def test_every_remat_policy_gives_the_same_gradients_and_an_unknown_one_is_refused():
    model, tokens = (
        make_model(LLAMA, lora=Lora(rank=2, targets=("k_proj", "down_proj"))),
        make_tokens(1, 8),
    )
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="remat")
    def gradient(state, remat):
        def loss(state):
            model = nnx.merge(graphdef, state)
            return model.unembed(
                model.hidden(tokens, dropout_key=jax.random.key(3), remat=remat)[0]
            ).var()

        return jax.grad(loss)(state)

    same = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4)
    expected = gradient(state, "none")
    for name in REMAT[1:]:
        jax.tree.map(same, gradient(state, name), expected)
    with pytest.raises(UserError, match="did you mean dots"):
        model.hidden(tokens, remat="dot")


def test_a_kernel_in_the_scan_under_remat_and_with_a_fresh_cache_equals_the_reference():
    model, tokens = make_model(GEMMA), make_tokens(1, 128)
    positions, segments = make_rows(1, 128, seed=3)
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="kernel")
    def run(state, kernel):
        def loss(state):
            model = nnx.merge(graphdef, state)
            hidden, _ = model.hidden(tokens, positions, segments, remat="dots", attention=kernel)
            return jnp.square(model.unembed(hidden)).mean()

        model = nnx.merge(graphdef, state)
        prefilled, cache = model.hidden(
            tokens,
            positions,
            segments,
            cache=model.init_cache(1, 130, "float32"),
            cache_is_empty=True,
            attention=kernel,
        )
        return jax.value_and_grad(loss)(state), prefilled, cache

    same = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-3)
    jax.tree.map(
        same, run(state, Kernel("splash", 128, interpret=True)), run(state, Kernel("reference"))
    )


@pytest.mark.parametrize("spec", [LLAMA, GEMMA], ids=["llama", "gemma3_text"])
def test_with_dots_kept_no_product_is_taken_twice(spec):
    model, tokens = make_model(spec, lora=Lora(rank=2)), make_tokens(2, 9)
    graphdef, adapters, rest = nnx.split(model, Adapter, ...)

    def products(remat):
        def loss(adapters):
            return nnx.merge(graphdef, adapters, rest).hidden(tokens, remat=remat)[0].sum()

        return _count_products(jax.make_jaxpr(jax.grad(loss))(adapters).jaxpr, weights)

    weights = {
        leaf.shape[1:]
        for path, leaf in nnx.to_flat_state(rest)
        if path[0] == "layers" and len(leaf.shape) > 2
    }
    none, dots, some, full = (
        products(name) for name in ("none", "dots", "gate+up+attention", "full")
    )
    assert none == dots == 14 and dots < some < full  # seven weights, once in each direction


def _count_products(jaxpr, weights):
    """Matrix products in a program with an operand of one of these shapes."""
    count = sum(
        eqn.primitive.name == "dot_general" and any(v.aval.shape in weights for v in eqn.invars)
        for eqn in jaxpr.eqns
    )
    inner = (jaxpr for eqn in jaxpr.eqns for jaxpr in jaxprs_in_params(eqn.params))
    return count + sum(_count_products(jaxpr, weights) for jaxpr in inner)


def test_sharded_equals_unsharded():
    spec = dataclasses.replace(GEMMA, vocab_size=64)
    model, tokens = (
        make_model(spec, lora=Lora(rank=2, targets=("o_proj", "up_proj"))),
        make_tokens(8, T),
    )
    positions, segments = make_rows(8, T)
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss_and_gradient(state):
        def loss(state):
            model = nnx.merge(graphdef, state)
            return jnp.square(
                model.unembed(model.hidden(tokens, positions, segments, remat="dots")[0])
            ).mean()

        return jax.value_and_grad(loss)(state)

    expected = loss_and_gradient(state)
    mesh = make_mesh(settings.Mesh(data=2, fsdp=2, tensor=2))
    sharded = jax.device_put(state, shardings(state, mesh))
    assert sharded["layers"]["q_proj"]["weight"].get_value().sharding.shard_shape(
        (3, 4, 8, 24)
    ) == (3, 2, 8, 12)
    with jax.set_mesh(mesh):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-4),
            loss_and_gradient(sharded),
            expected,
        )


def test_an_id_outside_the_vocabulary_gives_nan_not_another_token():
    tokens = make_tokens(2, 6)
    tokens[1, 3] = LLAMA.vocab_size
    logits = make_model(LLAMA)(tokens)
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1, 3:]).all()


def test_declared_shapes_axes_and_precisions_of_a_model_without_bytes():
    spec = dataclasses.replace(
        MISTRAL,
        width=4096,
        ff_width=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_width=128,
        vocab_size=32000,
        local_layers=(True,) * 32,
        window=4096,
    )
    lora = Lora(rank=64, modules_to_save=("lm_head",))
    model = nnx.eval_shape(lambda: Transformer(spec, lora=lora, rngs=nnx.Rngs(0)))
    leaves = {"/".join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert all(len(leaf.shape) == len(leaf.axes) for leaf in leaves.values())
    assert leaves["layers/k_proj/weight"].shape == (32, 8, 128, 4096)
    assert leaves["layers/k_proj/weight"].axes == ("layers", "kv_heads", "head", "embed")
    assert leaves["layers/o_proj/lora_a"].shape == (32, 64, 32, 128)
    assert leaves["layers/o_proj/lora_b"].shape == (32, 4096, 64)
    assert (
        leaves["embed_tokens/weight"].dtype == jnp.bfloat16
        and leaves["lm_head/weight"].dtype == jnp.float32
    )
    base = sum(leaf.size for path, leaf in leaves.items() if "lora" not in path)
    assert base == spec.num_parameters == 7_241_732_096  # Mistral 7B v0.1


def test_initial_weights_have_the_published_spread():
    spec = dataclasses.replace(
        LLAMA, width=128, ff_width=256, num_layers=8, num_heads=8, head_width=16
    )
    state = nnx.state(Transformer(spec, rngs=nnx.Rngs(0)))
    for path, std in {"q_proj": 0.02, "up_proj": 0.02, "o_proj": 0.005, "down_proj": 0.005}.items():
        np.testing.assert_allclose(
            state["layers"][path]["weight"].get_value().std(), std, rtol=0.02
        )
    assert (state["norm"]["weight"].get_value() == 1).all()
    first, second = state["layers"]["q_proj"]["weight"].get_value()[:2]
    assert (first != second).mean() > 0.99


@pytest.mark.parametrize("spec", [LLAMA, MISTRAL, GEMMA], ids=["tied", "untied", "soft_cap"])
def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(spec):
    """They are float32 sums of exact products: the steps of bfloat16 near 20 are 0.125."""
    model = make_model(
        spec, param_dtype="bfloat16", frozen_dtype="bfloat16", compute_dtype="bfloat16"
    )
    hidden, _ = model.hidden(make_tokens(2, 9))
    assert hidden.dtype == jnp.bfloat16
    head = np.asarray(model.head.weight.get_value(), np.float64)
    cap = spec.final_soft_cap
    for weight in (None, jnp.asarray(2 * head, jnp.float32)):  # the second in place of the head
        logits = np.asarray(model.unembed(hidden, weight))
        exact = np.asarray(hidden, np.float64) @ (head if weight is None else 2 * head).T
        exact = cap * np.tanh(exact / cap) if cap else exact
        assert logits.dtype == np.float32 and logits.shape == (2, 9, spec.vocab_size)
        np.testing.assert_allclose(logits, exact, atol=1e-5)
        assert (logits != logits.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.9
    whole = np.asarray(run(model, make_tokens(2, 9)))
    assert (whole != whole.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.9
