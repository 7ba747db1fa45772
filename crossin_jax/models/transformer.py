"""One decoder for all families: training, prefill and decoding are the same forward pass.

All layers are one `Block` whose parameters have a leading L. A scan runs it L times, each time with
one slice of the parameters, so that the compiled program does not grow with the number of layers:

    tokens_BT ─ embed ─► x_BTD ─┬─ layer 0 ─ layer 1 ─ … ─ layer L-1 ─► norm ─► hidden_BTD
                                └─ scan: carry (x, cache), slices {parameters, key, is_local}
    hidden_BTD ─ unembed ─► logits_BTV      (training computes these chunk by chunk: training/step)

Shape letters: B batch rows · T query positions · D model width · F feed-forward width · N query
heads · K key/value heads · H head width · V vocabulary · L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from crossin_jax.config import Lora, UserError, hint
from crossin_jax.models.attention import Kernel, attend, attend_cached, choose_kernel
from crossin_jax.models.cache import (
    Cache,
    init_cache,
    layer_arrays,
    read_layer,
    write_layer,
    write_positions,
)
from crossin_jax.models.cpu import flat_einsum, unroll
from crossin_jax.models.layers import (
    Build,
    Embedding,
    Linear,
    Norm,
    dropout,
    full_einsum,
)
from crossin_jax.models.lora import resolve
from crossin_jax.models.modules import AXES, KEPT, Projection, fused_parts, layer_modules
from crossin_jax.models.rope import rope_frequencies, rope_tables, rotate
from crossin_jax.models.spec import ModelSpec
from crossin_jax.parallel.mesh import constrain, constrain_residual, weights_stay

REMAT = ("none", "full", "dots", "offload")


class Block(nnx.Module):
    """Attention and feed-forward with their norms; parameters are stacked over L layers."""

    def __init__(self, spec: ModelSpec, build: Build, *, rngs: nnx.Rngs):
        self.spec, self.rate = spec, build.lora.dropout if build.lora else 0.0
        residual_std = 0.02 / math.sqrt(2 * spec.num_layers)  # smaller: layers add up their results
        linear = functools.partial(Linear, sizes=spec.sizes, axes=AXES, build=build, rngs=rngs)
        norm = functools.partial(
            Norm, build=build, eps=spec.norm_eps, offset=spec.norm_offset, rngs=rngs
        )
        for name, part in layer_modules(spec):
            if isinstance(part, Projection):
                bias = part.bias is not None and getattr(spec, part.bias)
                std = residual_std if part.to_residual else 0.02
                module = linear(name, part.equation, bias=bias, std=std)
            else:
                module = norm(name, spec.sizes[part.letter], part.axis)
            setattr(self, name, module)
        for first, *others in fused_parts(spec).values():
            for other in others:  # as in peft: the adapter of a fused weight has one A
                getattr(self, other).lora_a = getattr(self, first).lora_a

    def queries_keys_values(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated and scaled queries (B, T, N, H), rotated keys and values (B, T, K, H)."""
        # One mask for the adapters of q, k and v: they read the same input.
        dropped = dropout(x, self.rate, key)
        q, k, v = self.q_proj(x, dropped), self.k_proj(x, dropped), self.v_proj(x, dropped)
        # A remat policy keeps "q" and "k" where the backward pass reads them: the input of their
        # norm, or, without a norm, the rotated result.
        if self.spec.qk_norm:
            q, k = self.q_norm(checkpoint_name(q, "q")), self.k_norm(checkpoint_name(k, "k"))
        q = constrain(
            rotate(q, cos, sin, self.spec.query_scale), "batch", "length", "heads", "head"
        )
        k = constrain(rotate(k, cos, sin), "batch", "length", "kv_heads", "head")
        v = checkpoint_name(constrain(v, "batch", "length", "kv_heads", "head"), "v")
        if not self.spec.qk_norm:
            q, k = checkpoint_name(q, "q"), checkpoint_name(k, "k")
        return q, k, v

    def feed_forward(self, x: jax.Array, key: jax.Array | None, stay: bool) -> jax.Array:
        """Gated feed-forward, (B, T, D)."""
        keys = (None, None) if key is None else jax.random.split(key)
        dropped = dropout(x, self.rate, keys[0])
        gate = checkpoint_name(self.gate_proj(x, dropped), "gate")
        up = checkpoint_name(self.up_proj(x, dropped), "up")
        if stay:
            gate, up = (constrain(y, "whole_batch", "length", "cut_mlp") for y in (gate, up))
        act = (
            jax.nn.silu(gate)
            if self.spec.activation == "silu"
            else jax.nn.gelu(gate, approximate=True)
        )
        inner = constrain(act * up, "whole_batch" if stay else "batch", "length", "mlp")
        return self.down_proj(inner, dropout(inner, self.rate, keys[1]))

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        attend: Callable[..., jax.Array],
        key: jax.Array | None,
        stay: bool = False,
    ) -> jax.Array:
        """One layer, (B, T, D); `attend` maps q, k, v to the context (B, T, N, H).

        `stay`: the weights stay where they lie, see `mesh.weights_stay`.
        """
        # Keys of dropout: attention inputs, attention output, feed-forward. A resumed run draws the
        # same masks.
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        context = attend(*self.queries_keys_values(self.input_layernorm(x), cos, sin, keys[0]))
        context = constrain(context, "batch", "length", "heads", "head")
        if stay:
            context = constrain(context, "whole_batch", "length", "heads", "head")
        y = checkpoint_name(self.o_proj(context, dropout(context, self.rate, keys[1])), "output")
        # x ──norm─ attention ─(norm)─ + ──norm─ feed-forward ─(norm)─ +      (norm): Gemma 2 and 3
        # └────────────────────────────┘ └─────────────────────────────┘
        if self.spec.post_norms:
            x = constrain_residual(x + self.post_attention_layernorm(y), stay)
            y = self.feed_forward(self.pre_feedforward_layernorm(x), keys[2], stay)
            y = self.post_feedforward_layernorm(checkpoint_name(y, "down"))
        else:
            x = constrain_residual(x + y, stay)
            y = self.feed_forward(self.post_attention_layernorm(x), keys[2], stay)
        return constrain_residual(x + y, stay)


class Transformer(nnx.Module):
    """A decoder of the given spec, with adapters where `lora` is set.

    `param_dtype` stores what trains, `frozen_dtype` what does not, `compute_dtype` is the precision
    of products. Norms, rotary angles, softmax and logits are float32 whatever the precision.
    `flat_products` takes projections as products of two matrices, `skip_masked_logits` leaves out
    the logits of tokens outside the loss mask: see `cpu.model_options`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        lora: Lora | None = None,
        param_dtype: Any = "float32",
        frozen_dtype: Any = "bfloat16",
        compute_dtype: Any = "float32",
        flat_products: bool = False,
        skip_masked_logits: bool = False,
        rngs: nnx.Rngs,
    ):
        lora = resolve(lora, spec)
        build = Build(
            None,
            lora,
            param_dtype,
            frozen_dtype,
            compute_dtype,
            flat_einsum if flat_products else full_einsum,
        )
        stacked = dataclasses.replace(build, num_layers=spec.num_layers)
        # The order of these lines is the order in which parameters are drawn.
        self.spec, self.compute_dtype = spec, jnp.dtype(compute_dtype)
        self.skip_masked_logits = skip_masked_logits
        self.embed_tokens = Embedding("embed_tokens", spec.vocab_size, spec.width, build, rngs=rngs)
        self.layers = Block(spec, stacked, rngs=rngs)
        self.norm = Norm(
            "norm", spec.width, "norm", build, eps=spec.norm_eps, offset=spec.norm_offset, rngs=rngs
        )
        self.lm_head = (
            None
            if spec.tie_embeddings
            else Embedding("lm_head", spec.vocab_size, spec.width, build, rngs=rngs)
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Logits (B, T, V) in float32."""
        return self.unembed(self.hidden(tokens_BT, positions_BT, segment_ids_BT, **options)[0])

    # The three uses of the forward pass:
    #
    #     training    T tokens, no cache        attention within the row, by a fused kernel
    #     prefill     T tokens, empty cache     the same; keys and values are written to the cache
    #     decoding    1 token, filled cache     attention to the cache, which has the new token too
    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        cache: Cache | None = None,
        cache_is_empty: bool = False,
        dropout_key: jax.Array | None = None,
        remat: str = "none",
        attention: str | Kernel = "reference",
        unrolled: list[nnx.State] | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states (B, T, D) for `unembed`, and the cache with these tokens written.

        Positions count within a segment and default to 0, 1, … (after the tokens in the cache).
        Tokens see only their own segment; segment 0 is padding. With a cache they also see all its
        tokens, whatever their segment. `cache_is_empty`: the caller guarantees it, so that only the
        new tokens are visible and a fused kernel can be used. Dropout needs a `dropout_key`.
        `remat`: see `with_remat`. `attention`: a name for `choose_kernel`, or the kernel itself.
        `unrolled`: the parameters of each layer, for a cache with as many arrays.
        """
        spec, (B, T) = self.spec, tokens_BT.shape
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        if positions_BT is None:
            start = 0 if cache is None else cache["next_slot"].reshape(-1, 1)
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None] + start, (B, T))
        if isinstance(attention, str):
            # A kernel that cannot compute rows of this length is an error in training, where the
            # user chose the length. Prompts have any length: there the reference takes its place.
            platform, required = jax.default_backend(), cache is None
            attention = choose_kernel(
                attention, spec, T, self.compute_dtype, platform, required=required
            )
        if cache is not None:
            cache = write_positions(cache, positions_BT, segment_ids_BT)
        elif spec.rope.kind in ("dynamic", "longrope") and spec.max_length < T:
            raise UserError(
                f"rows of {T} tokens: a rope of type {spec.rope.kind} is supported within the "
                f"original context of {spec.max_length} tokens; set data.length to that or less"
            )

        x = self.embed_tokens.embed(tokens_BT)
        # The factor is rounded to the precision of the weights, as in the published models.
        if spec.scale_embedding:
            x *= jnp.asarray(math.sqrt(spec.width), x.dtype)
        stay = cache is not None and weights_stay(B * T, spec.width)
        x = constrain_residual(x, stay)

        # The entries that the scan gives to each layer, beside its parameters.
        per_layer: dict[str, Any] = {"index": jnp.arange(spec.num_layers)}
        if spec.local_layers and not all(spec.local_layers):
            per_layer["is_local"] = jnp.asarray(spec.local_layers)
        if any(spec.unrotated_layers):
            per_layer["is_unrotated"] = jnp.asarray(spec.unrotated_layers)
        if dropout_key is not None and self.layers.rate:
            per_layer["key"] = jax.random.split(dropout_key, spec.num_layers)

        step = self._make_step(positions_BT, segment_ids_BT, attention, cache, cache_is_empty)
        stored = None if cache is None else layer_arrays(cache)
        if unrolled is None:
            per_layer["layers"] = nnx.state(self.layers)
            (x, stored), _ = jax.lax.scan(with_remat(step, remat), (x, stored), per_layer)
        else:
            x, stored = unroll(step, x, stored, per_layer, unrolled)
        if cache is not None:
            cache = {**cache, **stored, "next_slot": cache["next_slot"] + T}
        return self.norm(x), cache

    def _make_step(
        self,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        kernel: Kernel,
        cache: Cache | None,
        cache_is_empty: bool,
    ) -> Callable[..., Any]:
        """The body of the scan: ((x, caches of all layers), entries of one layer) → carry.

        One program serves every layer, so all that differs is a traced array: a layer's parameters,
        its number in the caches, whether it is local, and its dropout key.
        """
        spec, graphdef = self.spec, nnx.graphdef(self.layers)
        stay = cache is not None and weights_stay(positions_BT.size, spec.width)

        def angles(rope):
            frequencies = rope_frequencies(rope, spec.head_width)
            return rope_tables(positions_BT, frequencies, rope.attention_factor)

        tables = angles(spec.rope)
        local_tables = angles(spec.local_rope) if spec.local_rope else None

        def step(carry, layer):
            x, stored = carry
            is_local = layer.get("is_local")
            cos, sin = tables
            if local_tables is not None:
                choose_local = True if is_local is None else is_local
                cos, sin = (
                    jnp.where(choose_local, a, b) for a, b in zip(local_tables, tables, strict=True)
                )
            if "is_unrotated" in layer:
                cos = jnp.where(layer["is_unrotated"], 1.0, cos)
                sin = jnp.where(layer["is_unrotated"], 0.0, sin)
            rules = {
                "window": spec.window,
                "is_local": is_local,
                "soft_cap": spec.attention_soft_cap,
            }

            # Called by the block. Keys and values are written before they are read, since a token
            # attends to itself.
            def attend_here(q, k, v):
                nonlocal stored
                if cache is not None:
                    stored = write_layer(stored, layer["index"], cache["next_slot"], k, v)
                if cache is None or cache_is_empty:
                    return attend(q, k, v, positions_BT, segment_ids_BT, kernel=kernel, **rules)
                keys_values = read_layer(stored, layer["index"], q.dtype)
                return attend_cached(q, *keys_values, positions_BT, cache["positions"], **rules)

            block = nnx.merge(graphdef, layer["layers"])
            return (block(x, cos, sin, attend_here, layer.get("key"), stay), stored), None

        return step

    @property
    def head(self) -> Embedding:
        """The matrix that gives logits."""
        return self.lm_head or self.embed_tokens

    def unembed(self, hidden_BTD: jax.Array, weight_VD: jax.Array | None = None) -> jax.Array:
        """Logits (B, T, V) in float32; `weight_VD` takes the place of the head's own weight."""
        logits = self.head.unembed(hidden_BTD, weight_VD)
        if self.spec.final_soft_cap is not None:
            logits = self.spec.final_soft_cap * jnp.tanh(logits / self.spec.final_soft_cap)
        return constrain(logits, "batch", "length", "vocab")

    def init_cache(
        self, batch: int, length: int, dtype: Any = "bfloat16", *, stacked: bool = True
    ) -> Cache:
        """An empty cache of `length` slots per row: see `cache.init_cache`."""
        return init_cache(self.spec, batch, length, dtype, stacked=stacked)


# What a layer keeps for the backward pass, for Llama-2-7B with 2048 tokens in bfloat16:
#
#     full     x                                             16 MiB
#     dots     x, q, k, v, attention, output, gate, up      182 MiB, and no product is repeated
#     none     the above, norms, rotations, activations …    still more
def with_remat(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The scan body under a rematerialisation policy.

    none keeps everything; full keeps only the residual stream between layers; dots keeps the
    results of products; offload keeps the same in host memory. Names of `KEPT` joined by + keep
    just those, e.g. "attention+output". Everything else is computed again in the backward pass.
    """
    policies, kept = jax.checkpoint_policies, name.split("+")
    if name == "none":
        return body
    if name == "full":
        policy = policies.nothing_saveable
    elif name == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(KEPT),
            offload_src="device",
            offload_dst="pinned_host",
        )
    elif name == "dots" or set(kept) <= set(KEPT):
        policy = policies.save_only_these_names(*(KEPT if name == "dots" else kept))
    else:
        raise UserError(f"model.remat={name!r} is not one of {', '.join(REMAT)}{hint(name, REMAT)}")
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
