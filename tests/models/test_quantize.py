"""Frozen weights in 8 and 4 bits: the code book, the error, and a model that reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crossin_jax.config import Lora
from crossin_jax.models.lora import merge
from crossin_jax.models.quantize import KINDS, block_size, dequantize, kind_of, nf4_values, quantize
from tests.models.models import LLAMA, QWEN, make_model, make_tokens

TOKENS = make_tokens(2, 12)


def quantized_model(model, spec, kind, **options):
    """The model with its projections stored in `kind`, everything else as it was."""
    small = make_model(spec, frozen_dtype=kind, **options)
    wide = dict(nnx.to_flat_state(nnx.state(model)))
    for path, leaf in nnx.to_flat_state(nnx.state(small)):
        if path[-1] == "scale":
            continue
        value = wide[path].get_value()
        if kind_of(leaf.get_value().dtype):
            scale = getattr(small.layers, path[1]).scale
            value, codes_scale = quantize(value, scale.get_value().shape, kind)
            scale.set_value(codes_scale)
        leaf.set_value(value.astype(leaf.get_value().dtype))
    return small


def test_nf4_values_are_those_of_the_paper():
    published = [
        -1.0,
        -0.6961928,
        -0.52507305,
        -0.39491749,
        -0.28444138,
        -0.18477343,
        -0.09105004,
        0.0,
        0.0795803,
        0.1609302,
        0.2461123,
        0.33791524,
        0.44070983,
        0.562617,
        0.72295684,
        1.0,
    ]
    np.testing.assert_allclose(nf4_values(), published, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "scale_shape", "relative_error"),
    [("int8", (3, 6, 8), 0.01), ("nf4", (3, 6, 8, 2), 0.11)],
)
def test_what_is_read_back_is_near_and_exact_where_it_can_be(kind, scale_shape, relative_error):
    weight = jax.random.normal(jax.random.key(0), (3, 6, 8, 128))
    codes, scale = quantize(weight, scale_shape, kind)
    assert codes.dtype == KINDS[kind] and codes.shape == weight.shape and scale.shape == scale_shape
    back = dequantize(codes, scale, jnp.float32)
    assert np.sqrt(np.square(back - weight).mean() / np.square(weight).mean()) < relative_error
    again, scale_again = quantize(back, scale_shape, kind)
    np.testing.assert_allclose(
        dequantize(again, scale_again, jnp.float32), back, rtol=5e-3, atol=1e-6
    )
    nothing = quantize(
        jnp.zeros((2, 4, 64)), scale_shape[:0] + ((2, 4) if kind == "int8" else (2, 4, 1)), kind
    )
    assert (dequantize(*nothing, jnp.float32) == 0).all()


def test_each_code_is_the_nearest():
    weight = jax.random.uniform(jax.random.key(0), (64,), minval=-1)
    codes, scale = quantize(weight, (1,), "nf4")
    nearest = np.abs(np.asarray(weight)[:, None] / np.float32(scale)[0] - nf4_values()).argmin(1)
    np.testing.assert_array_equal(np.asarray(codes).astype(int), nearest)


@pytest.mark.parametrize("scale_shape", [(5,), (5, 3), (2, 5)])
def test_int8_is_the_nearest_of_255_steps_of_each_output(scale_shape):
    """A scale per kept dimension; the largest number of each has the code 127 or -127."""
    rng = np.random.default_rng(0)
    shape = (*scale_shape, 40)
    weight = rng.standard_normal(shape).astype(np.float32) * rng.uniform(
        1e-3, 1e3, (*scale_shape, 1)
    )
    weight = weight.astype(np.float32)
    codes, scale = quantize(jnp.asarray(weight), scale_shape, "int8")
    codes, scale = np.asarray(codes), np.asarray(scale)
    largest = np.abs(weight).max(-1)
    np.testing.assert_allclose(scale, largest / 127, rtol=1e-6)
    assert (np.abs(codes).max(-1) == 127).all() and codes.min() >= -127
    assert (
        np.abs(codes * scale[..., None] - weight) <= largest[..., None] / 254 * (1 + 1e-4)
    ).all()
    assert (np.sign(codes) * np.sign(weight) >= 0).all()


def test_int8_of_several_contracted_dimensions_has_one_scale_for_all():
    """o_proj's inputs are heads and their width: one scale for each output."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 6, 8)).astype(np.float32)
    codes, scale = quantize(jnp.asarray(weight), (4, 3), "int8")
    np.testing.assert_allclose(scale, np.abs(weight).max((2, 3)) / 127, rtol=1e-6)
    np.testing.assert_allclose(
        dequantize(codes, scale, jnp.float32), weight, atol=np.abs(weight).max() / 254 * 1.001
    )


@pytest.mark.parametrize("width", [64, 128, 24])
def test_nf4_takes_the_nearest_value_times_the_scale_that_is_stored(width):
    """The scale is the block's largest number in bfloat16; codes go by that, as does reading."""
    weight = np.random.default_rng(1).standard_normal((50, width)).astype(np.float32)
    blocks = width // block_size(width)
    codes, scale = quantize(jnp.asarray(weight), (50, blocks), "nf4")
    parts = weight.reshape(50, blocks, -1)
    stored = np.asarray(jnp.asarray(np.abs(parts).max(-1)).astype(jnp.bfloat16)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(scale).astype(np.float32), stored)
    values = nf4_values()[None, None, None] * stored[..., None, None]
    nearest = np.abs(parts[..., None] - values).argmin(-1).reshape(50, width)
    np.testing.assert_array_equal(np.asarray(codes).astype(int), nearest)
    back = np.asarray(dequantize(codes, scale, jnp.float32)).reshape(parts.shape)
    expected = np.take_along_axis(
        np.broadcast_to(values, (*parts.shape, 16)), nearest.reshape(parts.shape)[..., None], -1
    )[..., 0]
    np.testing.assert_allclose(back, expected, rtol=1e-6)


def test_blocks_divide_the_width():
    assert [block_size(n) for n in (4096, 64, 128, 24, 8, 96, 67)] == [64, 64, 64, 24, 8, 48, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_over_a_quantized_base_reads_it_and_only_adapters_are_wide(kind):
    lora = Lora(rank=2, modules_to_save=())
    model = make_model(QWEN, lora=lora, frozen_dtype="bfloat16")
    small = quantized_model(model, QWEN, kind, lora=lora)
    # the same numbers, held wide, give the same logits: the product reads what is stored
    wide = make_model(QWEN, lora=lora)
    for path, leaf in nnx.to_flat_state(nnx.state(wide)):
        stored = dict(nnx.to_flat_state(nnx.state(small)))
        value = stored[path].get_value()
        if kind_of(value.dtype):
            value = dequantize(value, stored[(*path[:-1], "scale")].get_value(), jnp.float32)
        leaf.set_value(value.astype(jnp.float32))
    np.testing.assert_allclose(small(TOKENS), wide(TOKENS), atol=1e-3)
    graphdef, trained, frozen = nnx.split(small, lambda path, leaf: "lora" in path[-1], ...)
    stored = {leaf.dtype for leaf in jax.tree.leaves(frozen)}
    assert jnp.dtype(KINDS[kind]) in stored and stored <= {
        jnp.dtype(d) for d in (KINDS[kind], "bfloat16", "float32")
    }
    assert all(leaf.size < 3000 for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.float32)
    grads = jax.grad(lambda t: nnx.merge(graphdef, t, frozen)(TOKENS).var())(trained)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    merged = merge(small)
    assert (
        merged.layers.q_proj.weight.get_value().dtype == jnp.bfloat16
        and merged.layers.q_proj.scale is None
    )
    assert np.abs(merged(TOKENS) - small(TOKENS)).mean() < 0.1 * np.std(small(TOKENS))


@pytest.mark.parametrize("frozen", ["bfloat16", "int8", "nf4"])
def test_the_backward_pass_keeps_no_wide_copy_of_the_frozen_weights(frozen):
    """Between the passes nothing of the size of a stack of weights lives but what is stored."""
    lora = Lora(rank=2, modules_to_save=())
    model = make_model(LLAMA, lora=lora, frozen_dtype=frozen)
    graphdef, trained, rest = nnx.split(model, lambda path, leaf: "lora" in path[-1], ...)
    _, pullback = jax.vjp(lambda t: nnx.merge(graphdef, t, rest)(TOKENS).var(), trained)
    stacks = {
        leaf.shape
        for path, leaf in nnx.to_flat_state(rest)
        if path[-1] == "weight" and len(leaf.shape) > 2
    }
    kept = [leaf for leaf in jax.tree.leaves(pullback) if getattr(leaf, "shape", ()) in stacks]
    assert kept and all(leaf.dtype == jnp.dtype(KINDS.get(frozen, frozen)) for leaf in kept)
