"""Adapters: what trains, what a fresh adapter changes (nothing), dropout, merging, DoRA, names that
match nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crossin_jax.config import Lora, UserError
from crossin_jax.models.layers import Adapter, dropout
from crossin_jax.models.lora import (
    is_trainable,
    measure_rounding,
    merge,
    resolve,
    start_magnitudes,
)
from tests.models.models import GEMMA, LLAMA, MISTRAL, QWEN, make_model, make_tokens

TOKENS = make_tokens(2, 12)


def leaves_of(model):
    return {"/".join(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def with_fresh_adapters(model):
    """The same model with B = 0, as after initialisation."""
    for path, leaf in leaves_of(model).items():
        if path.endswith("lora_b"):
            leaf.set_value(jnp.zeros_like(leaf.get_value()))
    start_magnitudes(model)
    return model


def base_of(model, spec):
    """The model without its adapters."""
    base, leaves = make_model(spec), leaves_of(model)
    for path, leaf in leaves_of(base).items():
        leaf.set_value(leaves[path].get_value())
    return base


@pytest.mark.parametrize("spec", [QWEN, GEMMA], ids=lambda spec: spec.model_type)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(spec, use_dora):
    model = make_model(spec, lora=Lora(rank=3, use_dora=use_dora))
    base = base_of(model, spec)
    trained = model(TOKENS)
    np.testing.assert_allclose(with_fresh_adapters(model)(TOKENS), base(TOKENS), atol=1e-4)
    assert np.abs(trained - base(TOKENS)).max() > 0.1


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=3),
        Lora(rank=4, use_rslora=True, targets=("q_proj", "down_proj")),
        Lora(rank=3, use_dora=True),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_merged_equals_unmerged(lora):
    model = make_model(QWEN, lora=dataclasses.replace(lora, alpha=2.0))
    merged = merge(model)
    np.testing.assert_allclose(merged(TOKENS), model(TOKENS), atol=3e-4)
    assert not any(isinstance(leaf, Adapter) for leaf in leaves_of(merged).values())
    assert leaves_of(merged).keys() == leaves_of(make_model(QWEN)).keys()
    assert leaves_of(model)["layers/q_proj/lora_a"].get_value() is not None, (
        "the model itself stays as it was"
    )


def test_scale_is_alpha_over_rank_or_its_root():
    for lora, factor in (
        (Lora(rank=16, alpha=8.0), 0.5),
        (Lora(rank=16, alpha=8.0, use_rslora=True), 2.0),
    ):
        model = make_model(LLAMA, lora=lora)
        layer = model.layers.up_proj
        a, b, w = (
            np.asarray(x.get_value()[0], np.float64)
            for x in (layer.lora_a, layer.lora_b, layer.weight)
        )
        one = nnx.merge(*_first_layer(layer))
        np.testing.assert_allclose(one.merged_weight(), w + factor * b @ a, atol=1e-5)


def _first_layer(stacked):
    graphdef, state = nnx.split(stacked)
    return graphdef, jax.tree.map(lambda leaf: leaf[0], state)


def test_lengths_of_dora_equal_those_of_the_formed_sum():
    model = make_model(GEMMA, lora=Lora(rank=3, use_dora=True))
    for layer, contracted in ((model.layers.q_proj, 1), (model.layers.o_proj, 2)):
        one = nnx.merge(*_first_layer(layer))
        plain = nnx.clone(one)
        plain.magnitude = None
        axes = tuple(range(-contracted, 0))
        np.testing.assert_allclose(
            one.lengths(), np.sqrt(np.square(plain.merged_weight()).sum(axes)), rtol=1e-5
        )


def test_dropout_acts_on_adapters_only_with_a_key_and_keeps_the_mean():
    lora = Lora(rank=3, dropout=0.5)
    model = make_model(LLAMA, lora=lora)
    graphdef, state = nnx.split(model)
    hidden = jax.jit(
        lambda state, key: nnx.merge(graphdef, state).hidden(TOKENS, dropout_key=key)[0]
    )
    np.testing.assert_array_equal(hidden(state, None), hidden(state, None))
    first, again, other = (hidden(state, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2 and np.abs(first - hidden(state, None)).max() > 1e-2
    fresh = nnx.state(with_fresh_adapters(nnx.merge(graphdef, state)))
    np.testing.assert_allclose(hidden(fresh, jax.random.key(1)), hidden(fresh, None), atol=1e-6)
    x = jnp.ones((400, 500))
    dropped = dropout(x, 0.25, jax.random.key(0))
    assert (
        set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
        and abs(float(dropped.mean()) - 1) < 0.01
    )


def test_rows_and_layers_draw_their_own_dropout():
    model = make_model(LLAMA, lora=Lora(rank=3, dropout=0.5))
    hidden, _ = model.hidden(np.repeat(TOKENS[:1], 2, axis=0), dropout_key=jax.random.key(1))
    assert np.abs(hidden[0] - hidden[1]).max() > 1e-2


@pytest.mark.parametrize(
    ("spec", "lora", "trained"),
    [
        (LLAMA, None, {"embed_tokens", "norm", "q_proj", "up_proj", "input_layernorm"}),
        (MISTRAL, Lora(), {"embed_tokens", "lm_head", "lora"}),
        (LLAMA, Lora(modules_to_save=("lm_head",)), {"embed_tokens", "lora"}),  # tied: one matrix
        (MISTRAL, Lora(modules_to_save=("lm_head",)), {"lm_head", "lora"}),
        (MISTRAL, Lora(modules_to_save=("input_layernorm",)), {"input_layernorm", "lora"}),
        (MISTRAL, Lora(modules_to_save=()), {"lora"}),
    ],
)
def test_what_trains(spec, lora, trained):
    lora = resolve(lora, spec)
    model = make_model(spec, lora=lora, param_dtype="float32", frozen_dtype="bfloat16")
    found = set()
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if is_trainable(path, leaf, lora):
            found.add("lora" if "lora" in path[-1] else path[-2])
        # what trains is stored wide, what does not is not
        assert (leaf.get_value().dtype == jnp.float32) == is_trainable(path, leaf, lora), path
    assert trained <= found
    assert lora is None or found == trained


def test_gradients_reach_both_factors_and_no_frozen_weight_is_differentiated():
    lora = resolve(Lora(rank=2, modules_to_save=()), LLAMA)
    model = make_model(LLAMA, lora=lora)
    graphdef, trainable, frozen = nnx.split(model, functools.partial(is_trainable, lora=lora), ...)
    grads = jax.grad(lambda t: nnx.merge(graphdef, t, frozen)(TOKENS).var())(trainable)
    flat = nnx.to_flat_state(grads)
    assert len(flat) == 14 and all(np.abs(leaf.get_value()).max() > 0 for _, leaf in flat)


def test_released_code_compatible_leaves_q_proj_alone():
    lora = resolve(Lora(released_code_compatible=True), LLAMA)
    assert lora.targets == ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert make_model(LLAMA, lora=Lora(released_code_compatible=True)).layers.q_proj.lora_a is None


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (Lora(targets=("q_proj", "p_proj")), "'p_proj' matches nothing.*did you mean"),
        (Lora(targets=("q_prj",)), "did you mean q_proj"),
        (Lora(targets=()), "targets is empty"),
        (Lora(targets=("q_proj",), released_code_compatible=True), "targets is empty"),
        (Lora(modules_to_save=("lm_haed",)), "did you mean lm_head"),
        (Lora(modules_to_save=("q_norm",)), "'q_norm' matches nothing in a llama model"),
        (Lora(modules_to_save=("up_proj",)), "is in targets and in modules_to_save"),
    ],
)
def test_names_that_match_nothing_or_twice_are_refused(lora, words):
    with pytest.raises(UserError, match=words):
        resolve(lora, LLAMA)


def test_rounding_counts_what_was_trained_in_full():
    """What is lost of modules beside the adapter, or of the adapter: whichever is more."""
    rng = np.random.default_rng(0)
    model = make_model(LLAMA, lora=Lora(rank=3))
    alone = measure_rounding(model, "bfloat16")
    assert 0 < alone < 0.1 and measure_rounding(model, "float32") == 0
    before = rng.standard_normal((64, 32), dtype=np.float32)
    for step in (1e-4, 1.0):
        after = before + step * rng.standard_normal((64, 32), dtype=np.float32)
        rounded = after.astype(jnp.bfloat16).astype(np.float32)
        error, update = np.sum((rounded - after) ** 2), np.sum((after - before) ** 2)
        saved = [(jnp.asarray(after), jnp.asarray(before))]
        both = measure_rounding(model, "bfloat16", saved)
        np.testing.assert_allclose(both, max(alone, np.sqrt(error / update)), rtol=1e-4)
        assert (both > 0.1) == (step < 0.1)
