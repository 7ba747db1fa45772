"""One decoder for all families: training, prefill and decoding are the same forward pass."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from crossin_jax.config import Lora, UserError, hint
from crossin_jax.models.attention import SAVED, Kernel, attend, attend_cached, choose_kernel
from crossin_jax.models.cache import Cache, init_cache, is_stacked, load, note_positions, stacks, store
from crossin_jax.models.layers import Build, Embedding, Linear, Norm, dropout, rope_frequencies, rope_tables, rotate
from crossin_jax.models.lora import resolve
from crossin_jax.models.spec import ModelSpec
from crossin_jax.parallel.mesh import constrain

# tensors that a remat policy may keep, by checkpoint_name; with all of them no product is taken twice
NAMED = ("q", "k", "v", SAVED, "output", "gate", "up", "down")
REMAT = ("none", "full", "dots", "offload")


class Block(nnx.Module):
    """Attention and feed-forward with their norms; parameters are stacked over L layers."""

    def __init__(self, spec: ModelSpec, build: Build, *, rngs: nnx.Rngs):
        self.spec, self.rate = spec, build.lora.dropout if build.lora else 0.0
        sizes = {"D": spec.width, "F": spec.ff_width, "N": spec.num_heads, "K": spec.num_kv_heads, "H": spec.head_width}
        axes = {"D": "embed", "F": "mlp", "N": "heads", "K": "kv_heads", "H": "head"}
        linear = functools.partial(Linear, sizes=sizes, axes=axes, build=build, rngs=rngs)
        norm = functools.partial(Norm, build=build, eps=spec.norm_eps, offset=spec.norm_offset, rngs=rngs)
        last = 0.02 / math.sqrt(2 * spec.num_layers)  # what adds to the residual stream starts smaller

        self.input_layernorm = norm("input_layernorm", spec.width, "norm")
        self.q_proj = linear("q_proj", "BTD,NHD->BTNH", bias=spec.qkv_bias)
        self.k_proj = linear("k_proj", "BTD,KHD->BTKH", bias=spec.qkv_bias)
        self.v_proj = linear("v_proj", "BTD,KHD->BTKH", bias=spec.qkv_bias)
        self.q_norm = norm("q_norm", spec.head_width, "head") if spec.qk_norm else None
        self.k_norm = norm("k_norm", spec.head_width, "head") if spec.qk_norm else None
        self.o_proj = linear("o_proj", "BTNH,DNH->BTD", std=last)
        self.post_attention_layernorm = norm("post_attention_layernorm", spec.width, "norm")
        if spec.post_norms:
            self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm", spec.width, "norm")
            self.post_feedforward_layernorm = norm("post_feedforward_layernorm", spec.width, "norm")
        self.gate_proj = linear("gate_proj", "BTD,FD->BTF")
        self.up_proj = linear("up_proj", "BTD,FD->BTF")
        self.down_proj = linear("down_proj", "BTF,DF->BTD", std=last)

    def queries_keys_values(self, x: jax.Array, cos: jax.Array, sin: jax.Array,
                            key: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated and scaled queries (B, T, N, H), rotated keys and values (B, T, K, H)."""
        dropped = dropout(x, self.rate, key)
        q, k, v = self.q_proj(x, dropped), self.k_proj(x, dropped), self.v_proj(x, dropped)
        if self.q_norm is not None:  # the backward pass of a norm asks for its input
            q, k = self.q_norm(checkpoint_name(q, "q")), self.k_norm(checkpoint_name(k, "k"))
        q = constrain(rotate(q, cos, sin, self.spec.query_scale), "batch", "length", "heads", "head")
        k = constrain(rotate(k, cos, sin), "batch", "length", "kv_heads", "head")
        v = checkpoint_name(constrain(v, "batch", "length", "kv_heads", "head"), "v")
        return (q, k, v) if self.q_norm is not None else (checkpoint_name(q, "q"), checkpoint_name(k, "k"), v)

    def feed_forward(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Gated feed-forward, (B, T, D)."""
        keys = (None, None) if key is None else jax.random.split(key)
        dropped = dropout(x, self.rate, keys[0])
        gate = checkpoint_name(self.gate_proj(x, dropped), "gate")
        up = checkpoint_name(self.up_proj(x, dropped), "up")
        act = jax.nn.silu(gate) if self.spec.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        inner = constrain(act * up, "batch", "length", "mlp")
        return self.down_proj(inner, dropout(inner, self.rate, keys[1]))

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Callable[..., jax.Array],
                 key: jax.Array | None) -> jax.Array:
        """One layer, (B, T, D); `attend` maps q, k, v to the context (B, T, N, H)."""
        keys = (None, None, None) if key is None else jax.random.split(key, 3)
        context = attend(*self.queries_keys_values(self.input_layernorm(x), cos, sin, keys[0]))
        context = constrain(context, "batch", "length", "heads", "head")
        y = checkpoint_name(self.o_proj(context, dropout(context, self.rate, keys[1])), "output")
        if self.spec.post_norms:
            x = constrain(x + self.post_attention_layernorm(y), "batch", "length", "embed")
            y = checkpoint_name(self.feed_forward(self.pre_feedforward_layernorm(x), keys[2]), "down")
            y = self.post_feedforward_layernorm(y)
        else:
            x = constrain(x + y, "batch", "length", "embed")
            y = self.feed_forward(self.post_attention_layernorm(x), keys[2])
        return constrain(x + y, "batch", "length", "embed")


class Transformer(nnx.Module):
    """A decoder of the given spec, with adapters where `lora` is set.

    `param_dtype` stores what trains, `frozen_dtype` what does not, `compute_dtype` is the precision of products.
    Norms, rotary angles, softmax and logits are float32 whatever the precision.
    """

    def __init__(self, spec: ModelSpec, *, lora: Lora | None = None, param_dtype: Any = "float32",
                 frozen_dtype: Any = "bfloat16", compute_dtype: Any = "float32", rngs: nnx.Rngs):
        lora = resolve(lora, spec)
        build = Build(None, lora, param_dtype, frozen_dtype, compute_dtype)
        stacked = Build(spec.num_layers, lora, param_dtype, frozen_dtype, compute_dtype)
        self.spec, self.compute_dtype = spec, jnp.dtype(compute_dtype)
        self.skips_unlearned = False  # whether the loss leaves out the logits of what is not learned, see training/step
        self.apart = None  # or the parameters of each layer: the loop over cached layers is then unrolled
        self.embed_tokens = Embedding("embed_tokens", spec.vocab_size, spec.width, build, rngs=rngs)
        self.layers = Block(spec, stacked, rngs=rngs)
        self.norm = Norm("norm", spec.width, "norm", build, eps=spec.norm_eps, offset=spec.norm_offset, rngs=rngs)
        self.lm_head = None if spec.tie_embeddings else Embedding(
            "lm_head", spec.vocab_size, spec.width, build, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
                 segment_ids_BT: jax.Array | None = None, **options: Any) -> jax.Array:
        """Logits (B, T, V) in float32."""
        return self.unembed(self.hidden(tokens_BT, positions_BT, segment_ids_BT, **options)[0])

    def hidden(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
               segment_ids_BT: jax.Array | None = None, *, cache: Cache | None = None, fresh: bool = False,
               dropout_key: jax.Array | None = None, remat: str = "none",
               attention: str | Kernel = "reference") -> tuple[jax.Array, Cache | None]:
        """Final hidden states (B, T, D), ready for `unembed`, and the cache with these tokens written.

        Positions count within a segment and default to 0, 1, … (after what the cache holds). Tokens see only their own
        segment; segment 0 is padding. With a cache they also see what it holds, padding excepted, whatever the
        segment; `fresh` promises an empty cache, so that only the new tokens are looked at and a kernel can serve.
        Dropout acts only where `dropout_key` is given. `remat`: see `with_remat`. `attention`: a name for
        `choose_kernel`, or the kernel itself.
        """
        spec, (B, T) = self.spec, tokens_BT.shape
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        if positions_BT is None:
            start = jnp.zeros((1, 1), jnp.int32) if cache is None else cache["length"].reshape(-1, 1)
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None] + start, (B, T))
        if isinstance(attention, str):
            # prompts are cut into lengths that nobody chose; rows of training are the user's to mend
            attention = choose_kernel(attention, spec, T, self.compute_dtype, jax.default_backend(),
                                      required=cache is None)

        x = self.embed_tokens.embed(tokens_BT)
        if spec.scale_embedding:  # rounded like the weights it meets, as in the published models
            x *= jnp.asarray(math.sqrt(spec.width), x.dtype)
        x = constrain(x, "batch", "length", "embed")

        tables = rope_tables(positions_BT, rope_frequencies(spec.rope, spec.head_width))
        local_tables = None
        if spec.local_rope is not None:
            local_tables = rope_tables(positions_BT, rope_frequencies(spec.local_rope, spec.head_width))
        if cache is not None:
            cache = note_positions(cache, positions_BT, segment_ids_BT)

        graphdef, stacked = nnx.split(self.layers)
        per_layer: dict[str, Any] = {"index": jnp.arange(spec.num_layers)}
        if spec.local_layers and not all(spec.local_layers):
            per_layer["is_local"] = jnp.asarray(spec.local_layers)
        if dropout_key is not None and self.layers.rate:
            per_layer["key"] = jax.random.split(dropout_key, spec.num_layers)

        def body(carry, layer):
            x, stored = carry
            is_local = layer.get("is_local")
            cos, sin = tables
            if local_tables is not None:
                choose_local = True if is_local is None else is_local
                cos, sin = (jnp.where(choose_local, a, b) for a, b in zip(local_tables, tables, strict=True))

            def attend_here(q, k, v):
                nonlocal stored
                rules = {"window": spec.window, "is_local": is_local, "soft_cap": spec.attention_soft_cap}
                if cache is not None:
                    stored = store(stored, layer["index"], cache["length"], k, v)
                if cache is None or fresh:
                    return attend(q, k, v, positions_BT, segment_ids_BT, kernel=attention, **rules)
                keys_values = load(stored, layer["index"], q.dtype)
                return attend_cached(q, *keys_values, positions_BT, cache["positions"], **rules)

            x = nnx.merge(graphdef, layer["layers"])(x, cos, sin, attend_here, layer.get("key"))
            return (x, stored), None

        if cache is None or is_stacked(cache):
            carry = (x, None if cache is None else stacks(cache))
            (x, stored), _ = jax.lax.scan(with_remat(body, remat), carry, per_layer | {"layers": stacked})
        else:
            x, stored = _unroll(body, x, stacks(cache), per_layer, self.apart)
        if cache is not None:
            cache = {**cache, **stored, "length": cache["length"] + T}
        return self.norm(x), cache

    def flatten_products(self) -> None:
        """Takes every projection as a product of two matrices.

        On CPUs XLA would otherwise copy the weights of heads into another order at each product. On TPUs it need not:
        Gemma-2B's LoRA step on v5e:2x4 takes 1,563 instead of 1,521 Mcycles when heads are joined.
        """
        for part in vars(self.layers).values():
            if isinstance(part, Linear):
                part.flattens = True

    def unstack(self) -> list[nnx.State]:
        """The parameters of each layer, for `apart`."""
        stacked = nnx.state(self.layers)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(self.spec.num_layers)]

    @property
    def head(self) -> Embedding:
        """The matrix that gives logits."""
        return self.lm_head or self.embed_tokens

    def unembed(self, hidden_BTD: jax.Array, weight_VD: jax.Array | None = None) -> jax.Array:
        """Logits (B, T, V) in float32, with the final soft cap; `weight_VD` in place of the head's own."""
        logits = self.head.unembed(hidden_BTD, weight_VD)
        if self.spec.final_soft_cap is not None:
            logits = self.spec.final_soft_cap * jnp.tanh(logits / self.spec.final_soft_cap)
        return constrain(logits, "batch", "length", "vocab")

    def init_cache(self, batch: int, length: int, dtype: Any = "bfloat16") -> Cache:
        """An empty cache of `length` slots per row: see `cache.init_cache`."""
        return init_cache(self.spec, batch, length, dtype, stacked=self.apart is None)


def _unroll(body: Callable[..., Any], x: jax.Array, caches: Cache, per_layer: dict[str, Any],
            layers: list[Any]) -> tuple[Any, Cache]:
    """The layers one after the other; each is, for `body`, the only one of its stack."""
    stored: dict[str, list[jax.Array]] = {name: [] for name in caches}
    for i, layer in enumerate(layers):
        here = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
        here |= {"layers": layer, "index": jnp.zeros((), jnp.int32)}
        (x, one), _ = body((x, {name: arrays[i][None] for name, arrays in caches.items()}), here)
        for name, stack in one.items():
            stored[name].append(stack[0])
    return x, {name: tuple(arrays) for name, arrays in stored.items()}


def with_remat(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The scan body under a rematerialisation policy.

    none keeps everything, full nothing but the residual stream between layers, dots the results of products, offload
    the same in host memory; names of `NAMED` joined by + keep just those, e.g. "attention+output".
    """
    policies, kept = jax.checkpoint_policies, name.split("+")
    if name == "none":
        return body
    if name == "full":
        policy = policies.nothing_saveable
    elif name == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(NAMED), offload_src="device",
            offload_dst="pinned_host")
    elif name == "dots" or set(kept) <= set(NAMED):
        policy = policies.save_only_these_names(*(NAMED if name == "dots" else kept))
    else:
        raise UserError(f"model.remat={name!r} is not one of {', '.join(REMAT)}{hint(name, REMAT)}")
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
