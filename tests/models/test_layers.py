"""Rotary frequencies, norms and projections in the precision they promise."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from crossin_jax.config import Lora
from crossin_jax.models.cpu import flat_einsum
from crossin_jax.models.layers import (
    Build,
    Linear,
    Norm,
    dropout,
    full_einsum,
    hashed_bits,
)
from crossin_jax.models.rope import Rope, rope_frequencies, rope_tables, rotate
from crossin_jax.models.spec import spec_from_hf
from tests.checkpoint.checkpoints import LLAMA

FLOAT32, BFLOAT16 = (Build(None, None, dtype, dtype, dtype) for dtype in ("float32", "bfloat16"))


@pytest.mark.parametrize(
    "rope",
    [
        Rope(500000.0, "llama3", 8.0),
        Rope(500000.0, "llama3", 32.0),
        Rope(10000.0, "llama3", 4.0, 2.0, 6.0, 256),
        Rope(1e6, "linear", 8.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_width", [64, 128])
def test_scaled_frequencies_are_those_of_transformers(rope, head_width):
    parameters = {"rope_type": rope.kind, "rope_theta": rope.theta, "factor": rope.factor}
    if rope.kind == "llama3":
        parameters |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_length,
        }
    config = LlamaConfig(head_dim=head_width, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS[rope.kind](config, torch.device("cpu"))
    np.testing.assert_allclose(rope_frequencies(rope, head_width), expected.numpy(), rtol=2e-6)


LLAMA_CONFIG = LLAMA | {"head_dim": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}
LISTS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    "values",
    [
        {"rope_type": "yarn"} | YARN,
        {"rope_type": "yarn"} | YARN | {"beta_fast": 24, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn"} | YARN | {"mscale": 0.7, "mscale_all_dim": 0.4},
        {"rope_type": "yarn"} | YARN | {"attention_factor": 1.5},
        {"rope_type": "yarn"} | YARN | {"factor": 1.0, "original_max_position_embeddings": 1 << 30},
        {"type": "yarn", "factor": 8.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "original_max_position_embeddings": 512} | LISTS,
        {"rope_type": "longrope", "original_max_position_embeddings": 512, "factor": 3.0} | LISTS,
        {"rope_type": "longrope", "attention_factor": 1.1} | LISTS,
    ],
    ids=lambda values: ",".join(map(str, values.values()))[:50],
)
@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
def test_a_rope_in_config_json_means_what_it_means_to_transformers(values, layout):
    config = LLAMA_CONFIG | {"max_position_embeddings": 2048, layout: values, "rope_theta": 3e4}
    rope = spec_from_hf(config, "config.json").rope
    theirs = LlamaConfig(**{name: value for name, value in config.items() if name != "model_type"})
    expected, factor = ROPE_INIT_FUNCTIONS[rope.kind](theirs, torch.device("cpu"))
    np.testing.assert_allclose(rope_frequencies(rope, 16), expected.numpy(), rtol=2e-6)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_positions_stay_apart_and_depend_on_distance_only():
    positions = jnp.asarray([[256, 257, 100_000, 100_001]])
    cos, sin = rope_tables(positions, rope_frequencies(Rope(10000.0), 8))
    assert cos.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, :, 0], np.cos(np.float64(positions[0])), atol=1e-6)
    assert (cos[0, 0] != cos[0, 1]).any() and (cos[0, 2] != cos[0, 3]).any()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 1, 8)), jnp.float32)
    q, k = (
        rotate(jnp.repeat(x[:, :1], 4, 1), cos, sin),
        rotate(jnp.repeat(x[:, 1:2], 4, 1), cos, sin),
    )
    products = np.einsum("TH,TH->T", q[0, [1, 3], 0], k[0, [0, 2], 0])
    # float32 angles near 1e5 are off by 4e-3.
    np.testing.assert_allclose(products[0], products[1], atol=2e-2)


def test_norm_is_taken_in_float32_and_gemma_adds_one():
    x = 1000 * jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-6)
    for offset in (False, True):
        norm = Norm("norm", 16, "norm", BFLOAT16, eps=1e-6, offset=offset, rngs=nnx.Rngs(0))
        norm.weight.set_value(jnp.full(16, 0.5, jnp.bfloat16))
        y = norm(x)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            y.astype(jnp.float32), exact * (1.5 if offset else 0.5), rtol=2**-8
        )


def test_projections_of_float32_are_float32_and_carry_their_bias_and_axes():
    sizes, axes = {"D": 512, "N": 2, "H": 4}, {"D": "embed", "N": "heads", "H": "head"}
    layer = Linear("q_proj", "BTD,NHD->BTNH", sizes, axes, FLOAT32, bias=True, rngs=nnx.Rngs(0))
    layer.bias.set_value(jnp.arange(8.0).reshape(2, 4))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 512)), jnp.float32)
    exact = np.einsum(
        "BTD,NHD->BTNH", np.float64(x), np.float64(layer.weight.get_value())
    ) + np.arange(8).reshape(2, 4)
    np.testing.assert_allclose(layer(x, x), exact, atol=1e-5)
    assert layer.weight.axes == ("heads", "head", "embed") and layer.bias.axes == ("heads", "head")


@pytest.mark.parametrize(
    ("name", "equation"),
    [("q_proj", "BTD,NHD->BTNH"), ("o_proj", "BTNH,DNH->BTD"), ("up_proj", "BTD,FD->BTF")],
)
def test_products_of_matrices_are_those_of_the_einsum(name, equation):
    """The same values and gradients, adapter included; flattened, every product is one of two
    matrices.
    """
    sizes, axes = (
        {"D": 24, "N": 2, "H": 8, "F": 40},
        {"D": "embed", "N": "heads", "H": "head", "F": "mlp"},
    )
    lora = Lora(rank=3, dropout=0.0, modules_to_save=())
    x = jax.random.normal(
        jax.random.key(2), (2, 5, *(sizes[c] for c in equation.split(",")[0][2:]))
    )
    results, ranks = {}, {}
    for flattens, einsum in ((False, full_einsum), (True, flat_einsum)):
        build = Build(None, lora, *["float32"] * 3, einsum)
        layer = Linear(name, equation, sizes, axes, build, rngs=nnx.Rngs(0))
        layer.lora_b.set_value(0.01 * jax.random.normal(jax.random.key(1), layer.lora_b.shape))
        graphdef, state = nnx.split(layer)
        results[flattens] = (
            layer(x, x),
            jax.grad(lambda s, x, g=graphdef: jnp.sin(nnx.merge(g, s)(x, x)).sum(), argnums=(0, 1))(
                state, x
            ),
        )
        text = jax.jit(lambda x, layer=layer: layer(x, x)).lower(x).as_text()
        ranks[flattens] = [
            sorted(shape.count("x") for shape in found)
            for found in re.findall(r"dot_general .* : \(tensor<(\S+)>, tensor<(\S+)>\)", text)
        ]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        results[True],
        results[False],
    )
    assert any(leaf.any() for leaf in jax.tree.leaves(results[True][1]))
    assert len(ranks[True]) == 3 and all(pair == [2, 2] for pair in ranks[True])
    assert all(3 in pair or 4 in pair for pair in ranks[False])


def test_hashed_bits_are_even_and_neither_places_nor_keys_are_related():
    shape, n = (16, 64, 96), 16 * 64 * 96
    keys = [
        *jax.random.split(jax.random.key(0), 2),
        jax.random.fold_in(jax.random.key(0), 7),
        jax.random.key(1),
    ]
    drawn = [np.asarray(hashed_bits(key, shape)) for key in keys]
    ones = [((bits >> bit) & 1) * 2.0 - 1 for bits in drawn for bit in range(32)]
    limit = 5 / n**0.5  # five standard deviations
    assert max(abs(one.mean()) for one in ones) < limit
    for axis, step in ((0, 1), (1, 1), (2, 1), (2, 2), (2, 32)):  # neighbours
        assert max(abs((one * np.roll(one, step, axis)).mean()) for one in ones) < limit
    high = np.array([(bits >= 2**31) * 2.0 - 1 for bits in drawn]).reshape(len(keys), -1)
    assert np.abs(high @ high.T / n - np.eye(len(keys))).max() < limit
    kept = np.array([dropout(jnp.ones(shape), 0.05, key) > 0 for key in keys])
    assert abs(kept.mean() - 0.95) < 5 * (0.05 * 0.95 / kept.size) ** 0.5


def test_flat_products_in_bfloat16_sum_in_float32():
    """On CPUs with AMX only such products are quick; what comes out is bfloat16."""

    def total(x, weight):
        return flat_einsum("BTD,FD->BTF", x, weight).astype(jnp.float32).sum()

    x, weight = jnp.ones((2, 3, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, weight).as_text()
    products = re.findall(r"dot_general .* -> tensor<\d+x\d+x(\w+)>", text)
    assert products == ["f32"] * len(products) and len(products) >= 2
    assert flat_einsum("BTD,FD->BTF", x, weight).dtype == jnp.bfloat16
