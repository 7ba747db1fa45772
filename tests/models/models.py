"""Small models of three kinds, and rows of packed documents."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossin_jax.models.spec import ModelSpec, Rope
from crossin_jax.models.transformer import Transformer

LLAMA = ModelSpec(
    model_type="llama",
    vocab_size=61,
    width=24,
    ff_width=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    max_length=512,
    norm_eps=1e-5,
    rope=Rope(10_000.0),
    query_scale=8**-0.5,
    tie_embeddings=True,
)
MISTRAL = dataclasses.replace(
    LLAMA, model_type="mistral", window=5, local_layers=(True,) * 3, tie_embeddings=False
)
GEMMA = dataclasses.replace(
    LLAMA,
    model_type="gemma3_text",
    activation="gelu_tanh",
    qk_norm=True,
    post_norms=True,
    norm_offset=True,
    scale_embedding=True,
    attention_soft_cap=4.0,
    final_soft_cap=6.0,
    window=5,
    local_layers=(True, False, True),
    local_rope=Rope(1000.0),
    rope=Rope(10_000.0, "linear", 2.0),
    num_kv_heads=1,
)
QWEN = dataclasses.replace(LLAMA, model_type="qwen2", qkv_bias=True)
# Every kind of parameter there is, and no two dimensions of one size
EVERY_PARAMETER = dataclasses.replace(
    GEMMA,
    vocab_size=64,
    width=24,
    num_heads=6,
    num_kv_heads=2,
    head_width=10,
    ff_width=40,
    num_layers=3,
    local_layers=(),
    local_rope=None,
    window=None,
    qkv_bias=True,
    tie_embeddings=False,
)
SPECS = {spec.model_type: spec for spec in (LLAMA, MISTRAL, GEMMA, QWEN)}


def make_model(spec: ModelSpec, seed: int = 0, **options) -> Transformer:
    """A model whose weights are large enough to tell right from wrong, norms, biases and adapters
    included.
    """
    options = {"frozen_dtype": "float32"} | options
    model = nnx.eval_shape(lambda: Transformer(spec, rngs=nnx.Rngs(0), **options))
    rng = np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        center = 1.0 if "norm" in path[-2] and not spec.norm_offset else 0.0
        noise = 0.3 * rng.standard_normal(leaf.shape)
        leaf.set_value(jnp.asarray(center + noise, leaf.dtype))
    return model


def make_tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    """Random tokens of the small vocabulary, (B, T) int32."""
    return np.random.default_rng(seed).integers(
        1, LLAMA.vocab_size, (batch, length), dtype=np.int32
    )


def make_rows(batch: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions and segment ids of rows packed with documents of random length; some end in
    padding.
    """
    rng = np.random.default_rng(seed)
    positions, segments = np.zeros((2, batch, length), np.int32)
    for row in range(batch):
        start, segment = 0, 1
        while start < length - row:
            n = int(min(rng.integers(1, length // 2), length - row - start))
            positions[row, start : start + n], segments[row, start : start + n] = (
                np.arange(n),
                segment,
            )
            start, segment = start + n, segment + 1
    return positions, segments
