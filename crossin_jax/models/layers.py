"""Parameters (shape, logical axes, initializer: declared once) and the layers made of them.

Weights keep the orientation of the safetensors file with heads split out, so that an import is a
reshape. A stacked layer has a leading L on every parameter; the transformer's scan gives each step
one slice.

Shape letters: B batch rows · T query positions · S key positions · D model width · N query heads ·
K key/value heads · H head width · V vocabulary · L layers · R LoRA rank.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crossin_jax.config import Lora
from crossin_jax.models.quantize import KINDS, block_size, dequantize, kind_of

# Finite, so that the softmax of a row without any visible key stays finite.
MASKED = -1e30


class Weight(nnx.Param):
    """A parameter of the base model; metadata `axes` names its logical axes."""


class Adapter(nnx.Param):
    """A parameter of a LoRA adapter; what trains beside `modules_to_save`."""


def precision(dtype: Any) -> jax.lax.Precision:
    """Full precision for float32; the default would be bfloat16 passes on TPU and TF32 on GPU."""
    is_float32 = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if is_float32 else jax.lax.Precision.DEFAULT


def full_einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """The product of a projection, e.g. "BTD,NHD->BTNH"."""
    return jnp.einsum(equation, x, weight, precision=precision(x.dtype))


@dataclass(frozen=True, slots=True)
class Build:
    """How the layers of a model declare their parameters."""

    num_layers: int | None  # L of stacked layers; None: a single layer
    lora: Lora | None
    param_dtype: Any
    frozen_dtype: Any
    compute_dtype: Any
    einsum: Callable[..., jax.Array] = full_einsum

    def trains(self, name: str) -> bool:
        """Whether the weights of the module `name` train."""
        return self.lora is None or name in self.lora.modules_to_save

    def dtype(self, name: str) -> Any:
        """Storage precision of the module `name`."""
        # Beside quantized projections, other frozen weights are bfloat16.
        if self.trains(name):
            return self.param_dtype
        return "bfloat16" if self.frozen_dtype in KINDS else self.frozen_dtype

    def stack(
        self, shape: tuple[int, ...], axes: tuple[str, ...]
    ) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Shape and axes with the leading L of stacked layers."""
        if self.num_layers is None:
            return shape, axes
        return (self.num_layers, *shape), ("layers", *axes)


def normal(std: float) -> Any:
    """N(0, std) initializer."""
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(
        dtype
    )


def uniform(bound: float) -> Any:
    """U(-bound, bound) initializer."""
    return lambda key, shape, dtype: jax.random.uniform(
        key, shape, jnp.float32, -bound, bound
    ).astype(dtype)


def constant(value: float) -> Any:
    """Initializer of one value everywhere."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def declare(
    kind: type, shape: tuple[int, ...], axes: tuple[str, ...], dtype: Any, init: Any, rngs: nnx.Rngs
) -> Any:
    """A parameter with its logical axes."""
    assert len(shape) == len(axes), (shape, axes)
    return kind(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes)


# A bias (N, H) for y (B, T, N, H) becomes (1, 1, N, H).
def over_last(vector: jax.Array, y: jax.Array) -> jax.Array:
    """A vector, or an array of heads, in the shape that broadcasts over all dimensions of y before
    its own.
    """
    return vector.reshape((1,) * (y.ndim - vector.ndim) + vector.shape)


class Linear(nnx.Module):
    """A projection given by its einsum, e.g. "BTD,NHD->BTNH"; LoRA follows from the same string.

    A frozen weight may be quantized; then `scale` is a parameter beside it. With DoRA (arXiv
    2402.09353) the weight and the update together give the direction of each output, and
    `magnitude` its length.
    """

    # The letters of a weight are those that the product adds, then those that it contracts:
    #
    #   BTD,NHD->BTNH    weight NHD = added NH + contracted D
    #   LoRA             down BTD,RD->BTR  (lora_a is R + contracted)
    #                    up   BTR,NHR->BTNH (lora_b is added + R)

    def __init__(
        self,
        name: str,
        equation: str,
        sizes: dict[str, int],
        axes: dict[str, str],
        build: Build,
        *,
        bias: bool = False,
        std: float = 0.02,
        rngs: nnx.Rngs,
    ):
        inputs, weight, outputs = equation.replace("->", ",").split(",")
        added = "".join(c for c in weight if c in outputs)
        contracted = "".join(c for c in weight if c in inputs)
        assert weight == added + contracted and outputs.endswith(added)
        self.equation, self.letters = equation, (weight, added, contracted)
        self.compute_dtype = jnp.dtype(build.compute_dtype)
        self.einsum = build.einsum

        def parameter(kind, letters, dtype, init):
            shape, names = build.stack(
                tuple(sizes[c] for c in letters), tuple(axes[c] for c in letters)
            )
            return declare(kind, shape, names, dtype, init, rngs)

        kind, last, scale = build.frozen_dtype, weight[-1], None
        if build.trains(name) or kind not in KINDS:
            self.weight = parameter(Weight, weight, build.dtype(name), normal(std))
        else:
            # Placeholder values: quantized weights always come from a checkpoint.
            self.weight = parameter(Weight, weight, KINDS[kind], constant(0))
            sizes = {**sizes, "b": sizes[last] // block_size(sizes[last])}  # blocks, for nf4
            axes = {**axes, "b": axes[last]}
            letters, dtype = {
                "int8": (added, jnp.float32),
                "nf4": (weight[:-1] + "b", jnp.bfloat16),
            }[kind]
            scale = parameter(Weight, letters, dtype, constant(1.0))
        self.scale = scale
        self.bias = parameter(Weight, added, build.dtype(name), constant(0.0)) if bias else None
        # A starts like the weights of torch.nn.Linear, B at zero: the update starts at zero, as in
        # peft.
        lora = build.lora
        if lora is None or name not in lora.targets:
            self.lora_a = self.lora_b = self.magnitude = None
            return
        sizes, axes = {**sizes, "R": lora.rank}, {**axes, "R": "rank"}
        fan_in = math.prod(sizes[c] for c in contracted)
        self.lora_a = parameter(Adapter, "R" + contracted, build.param_dtype, uniform(fan_in**-0.5))
        self.lora_b = parameter(Adapter, added + "R", build.param_dtype, constant(0.0))
        self.magnitude = (
            parameter(Adapter, added, build.param_dtype, constant(1.0)) if lora.use_dora else None
        )
        self.down, self.up = f"{inputs},R{contracted}->BTR", f"BTR,{added}R->{outputs}"
        self.factor = lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank)

    # y = W x + factor · B (A x) + bias. With DoRA, each output of the first two terms is multiplied
    # by magnitude / |its row of W + factor · B A|.
    def __call__(self, x: jax.Array, adapter_input: jax.Array) -> jax.Array:
        """Projects x; the adapter reads `adapter_input`, which is x after dropout."""
        # The update goes through R numbers per token; BA itself is never formed.
        dtype = self.compute_dtype
        y = self._product(x)
        if self.lora_a is not None:
            update = self.factor * self._einsum(self.down, adapter_input, self.lora_a.get_value())
            y += self._einsum(self.up, update, self.lora_b.get_value())
        if self.magnitude is not None:
            # The length of the direction counts as a constant, as in the paper and in peft.
            stretch = self.magnitude.get_value().astype(jnp.float32) / jax.lax.stop_gradient(
                self.lengths()
            )
            y *= over_last(stretch, y).astype(dtype)
        if self.bias is not None:
            y += over_last(self.bias.get_value(), y).astype(dtype)
        return y

    def _product(self, x: jax.Array) -> jax.Array:
        """The product with the stored weight."""
        dtype, weight = self.compute_dtype, self.weight.get_value()
        scale = None if self.scale is None else self.scale.get_value()

        def product(x, weight, scale):
            if kind_of(weight.dtype) == "int8":
                # One scale per output: it is applied to the result, so the product reads the 8 bits
                # as they are.
                y = jnp.einsum(
                    self.equation,
                    x.astype(dtype),
                    weight.astype(dtype),
                    precision=precision(dtype),
                    preferred_element_type=jnp.float32,
                )
                return (y * over_last(scale, y)).astype(dtype)
            return self._einsum(
                self.equation, x, weight if scale is None else dequantize(weight, scale, dtype)
            )

        if weight.dtype == dtype:
            return product(x, weight, scale)
        # The backward pass converts the weight again. If the converted copies of all layers were
        # kept, they would be as large as the model.
        return jax.checkpoint(product, prevent_cse=False)(x, weight, scale)

    def _einsum(self, equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        dtype = self.compute_dtype
        return self.einsum(equation, x.astype(dtype), weight.astype(dtype))

    def _adapter(self) -> tuple[jax.Array, jax.Array]:
        """A and factor · B in float32."""
        a, b = (leaf.get_value().astype(jnp.float32) for leaf in (self.lora_a, self.lora_b))
        return a, self.factor * b

    def lengths(self) -> jax.Array:
        """Euclidean length of each output's row of W + factor · BA in float32."""
        # |w + ba|² = |w|² + 2 w·(ba) + |ba|², so that the sum itself, as large as W, is never
        # formed.
        weight_letters, added, contracted = self.letters
        einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        weight, (a, b) = self.wide_weight(), self._adapter()
        squares = einsum(f"{weight_letters},{weight_letters}->{added}", weight, weight)
        cross = einsum(
            f"{added}R,{added}R->{added}",
            einsum(f"{weight_letters},R{contracted}->{added}R", weight, a),
            b,
        )
        gram = einsum(f"R{contracted},S{contracted}->RS", a, a)
        update = einsum(f"{added}R,{added}R->{added}", einsum(f"{added}S,RS->{added}R", b, gram), b)
        return jnp.sqrt(squares + 2 * cross + update)

    def merged_weight(self) -> jax.Array:
        """W + factor · BA in float32, with DoRA at the trained lengths; one layer, not a stack."""
        weight_letters, added, contracted = self.letters
        a, b = self._adapter()
        merged = self.wide_weight() + jnp.einsum(
            f"{added}R,R{contracted}->{weight_letters}", b, a, precision=jax.lax.Precision.HIGHEST
        )
        if self.magnitude is None:
            return merged
        stretch = self.magnitude.get_value().astype(jnp.float32) / self.lengths()
        return merged * stretch.reshape(stretch.shape + (1,) * len(contracted))

    def wide_weight(self) -> jax.Array:
        """The frozen weight in float32."""
        weight = self.weight.get_value()
        if self.scale is None:
            return weight.astype(jnp.float32)
        return dequantize(weight, self.scale.get_value(), jnp.float32)


class Norm(nnx.Module):
    """Root-mean-square norm over the last dimension, in float32; `offset` is Gemma's 1 + weight."""

    def __init__(
        self,
        name: str,
        width: int,
        axis: str,
        build: Build,
        *,
        eps: float,
        offset: bool,
        rngs: nnx.Rngs,
    ):
        shape, axes = build.stack((width,), (axis,))
        self.weight = declare(
            Weight, shape, axes, build.dtype(name), constant(0.0 if offset else 1.0), rngs
        )
        self.eps, self.offset = eps, float(offset)

    def __call__(self, x: jax.Array) -> jax.Array:
        # A mean of squares in bfloat16 would lose the small ones.
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        weight = over_last(self.weight.get_value().astype(jnp.float32), x)
        return (wide * (weight + self.offset)).astype(x.dtype)


class Embedding(nnx.Module):
    """A (V, D) matrix: rows by token id, and the product with its transpose."""

    def __init__(self, name: str, vocab_size: int, width: int, build: Build, *, rngs: nnx.Rngs):
        self.weight = declare(
            Weight, (vocab_size, width), ("vocab", "embed"), build.dtype(name), normal(0.02), rngs
        )
        self.compute_dtype = jnp.dtype(build.compute_dtype)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """(B, T, D); an id outside the vocabulary gives NaN, which is refused later."""
        return jnp.take(self.weight.get_value(), tokens_BT, axis=0, mode="fill").astype(
            self.compute_dtype
        )

    def unembed(self, hidden_BTD: jax.Array, weight_VD: jax.Array | None = None) -> jax.Array:
        """(B, T, V) in float32: bfloat16 steps near a logit of 20 are 0.125."""
        dtype = self.compute_dtype
        weight_VD = self.weight.get_value() if weight_VD is None else weight_VD
        return jnp.einsum(
            "BTD,VD->BTV",
            hidden_BTD.astype(dtype),
            weight_VD.astype(dtype),
            precision=precision(dtype),
            preferred_element_type=jnp.float32,
        )


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; the identity where there is no key."""
    if key is None or rate == 0:
        return x
    # A uint32 is below rate · 2³² with probability rate.
    kept = hashed_bits(key, x.shape) >= np.uint32(round(rate * 2**32))
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 random bits per element: hash of (index, key), two rounds of MurmurHash3's finalizer.

    `jax.random.bits` mixes each number twenty times: beside it the step of Llama-2-7B with LoRA
    compiles for v5e 4x4 in four times the time and has a fifth more cycles. Masks need no more than
    this, and every sharding gives the same.
    """
    first, second = jax.random.key_data(key).reshape(-1)[:2].astype(jnp.uint32)
    return mix(mix(element_index(shape) ^ first) ^ second)


def element_index(
    shape: tuple[int, ...], whole: tuple[int, ...] | None = None, start: Sequence[Any] = ()
) -> jax.Array:
    """The row-major index of each element modulo 2**32, uint32.

    For a part of an array, `whole` is the shape of the array, and the part begins at `start`.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(whole or shape):
        index = index * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        if start:
            index += jnp.asarray(start[axis], jnp.uint32)
    return index


def mix(h: jax.Array) -> jax.Array:
    """Hashes each uint32 to another: the last step of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return h ^ (h >> 16)


def attention_mask(
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    window: jax.Array | int | None,
) -> jax.Array:
    """True where query t may attend to key s, (B, T, S)."""
    # How many positions the key lies behind the query: below 0 it is the future.
    back = query_positions_BT[:, :, None] - key_positions_BS[:, None]
    mask = (back >= 0) & (query_segments_BT[:, :, None] == key_segments_BS[:, None])
    return mask if window is None else mask & (back < window)
