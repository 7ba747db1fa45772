"""The differences between model families that a listed checkpoint needs, read from and written to
config.json.

Shape letters: N query heads · K key/value heads · H head width · L layers · D model width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from crossin_jax.config import Architecture, UserError, hint
from crossin_jax.models.fields import check_types
from crossin_jax.models.modules import Scale, layer_modules
from crossin_jax.models.rope import Rope, drop_nulls, need, read_rope, rope_to_hf

# How layers see a window: whether layer i is local, from its config.json.
Local = Callable[[dict[str, Any], int], bool]


@dataclass(frozen=True, slots=True)
class Family:
    """A model_type of config.json, by what sets its models apart from a Llama.

    `defaults` are what the class in transformers takes for fields that a file leaves out. A field
    that only some families have is read and written where it is among the defaults.
    """

    note: str
    class_name: str  # in transformers, without "ForCausalLM"
    flags: dict[str, Any] = field(default_factory=dict)  # fields of ModelSpec, for all its models
    defaults: dict[str, Any] = field(default_factory=dict)
    local: Local | None = None  # None: every layer sees everything
    lists_layers: bool = False  # a field layer_types may say which layers are local
    rope_aliases: dict[str, str] = field(default_factory=dict)  # other names of rope types
    text_model: str | None = None  # the model_type of its text part, under `text_config`


def _has_window(config: dict[str, Any], _: int) -> bool:
    return config["sliding_window"] is not None


def _is_late(config: dict[str, Any], layer: int) -> bool:
    return _uses_window(config) and layer >= config["max_window_layers"]


def _uses_window(config: dict[str, Any]) -> bool:
    return bool(config["use_sliding_window"] and config["sliding_window"])


# What rows of the table share.
_GEMMA = {"norm_offset": True, "scale_embedding": True}
_GEMMA_ACTIVATION = {"hidden_activation": "gelu_pytorch_tanh"}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {
    # The yardstick: rope, RMS norms, gated feed-forward with SiLU, no bias, every layer sees
    # everything.
    "llama": Family(
        "Llama 1, 2, 3, 3.1, 3.2 and models built on them (Llama-SEA-LION v3)", "Llama"
    ),
    # All layers share one window, or there is none: v0.1 has 4096 keys, later ones see everything.
    "mistral": Family(
        "Mistral 7B v0.1 to v0.3",
        "Mistral",
        defaults={"sliding_window": 4096},
        local=_has_window,
    ),
    # Norms of 1 + weight, scaled embeddings, GELU, heads wider than the model's width divided by
    # their number.
    "gemma": Family(
        "Gemma 1 (SeaLLM v2.5)",
        "Gemma",
        flags=_GEMMA,
        defaults={"tie_word_embeddings": True} | _GEMMA_ACTIVATION,
    ),
    # As Gemma, with norms after attention and feed-forward too, soft caps, and a window in every
    # second layer.
    "gemma2": Family(
        "Gemma 2 (Gemma-SEA-LION v3)",
        "Gemma2",
        flags=_GEMMA | {"post_norms": True},
        defaults={
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
        | _GEMMA_ACTIVATION,
        local=lambda _, layer: layer % 2 == 0,
        lists_layers=True,
    ),
    # As Gemma 2 with norms of queries and keys instead of soft caps. Five local layers, with a rope
    # of their own, then a global one. Multimodal files leave out every field that has the default
    # of its class.
    "gemma3_text": Family(
        "Gemma 3, text",
        "Gemma3",
        flags=_GEMMA | {"post_norms": True, "qk_norm": True},
        defaults={
            "tie_word_embeddings": True,
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
        }
        | _GEMMA_ACTIVATION,
        local=lambda config, layer: (layer + 1) % config["sliding_window_pattern"] != 0,
        lists_layers=True,
    ),
    "gemma3": Family(
        "Gemma 3, the text part of a multimodal checkpoint (Gemma-SEA-LION v4)",
        "Gemma3",
        text_model="gemma3_text",
    ),
    # Biases on q, k and v. Where a window is switched on, the layers from `max_window_layers` on
    # have it.
    "qwen2": Family(
        "Qwen 1.5, 2 and 2.5 (Sailor, Sailor2, SeaLLMs v3)",
        "Qwen2",
        flags={"qkv_bias": True},
        defaults=_QWEN,
        local=_is_late,
        lists_layers=True,
    ),
    # Norms of queries and keys instead of biases.
    "qwen3": Family(
        "Qwen 3, dense (Qwen-SEA-LION v4)",
        "Qwen3",
        flags={"qk_norm": True},
        defaults=_QWEN | {"head_dim": 128},
        local=_is_late,
        lists_layers=True,
    ),
    # Every fourth layer has no rope.
    "smollm3": Family(
        "SmolLM3 3B",
        "SmolLM3",
        defaults={
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        local=lambda config, layer: _uses_window(config) and not config["no_rope_layers"][layer],
        lists_layers=True,
    ),
    # q, k and v are one weight in the file, gate and up another. Phi-4-mini rotates three quarters
    # of each head.
    "phi3": Family(
        "Phi-3 mini and medium, Phi-4, Phi-4-mini",
        "Phi3",
        flags={"fused_weights": True},
        defaults={
            "sliding_window": None,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
        },
        local=_has_window,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
}
_LLAMA_DEFAULTS = {"tie_word_embeddings": False, "rope_theta": 10_000.0}
# What config.json and ModelSpec both have, under these names.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "ff_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_width",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
# The soft caps, in the families that have them among their defaults.
_SOFT_CAPS = {
    "attn_logit_softcapping": "attention_soft_cap",
    "final_logit_softcapping": "final_soft_cap",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and rules of one decoder; each field is needed by a model in `docs/models.md`."""

    model_type: str
    vocab_size: int
    width: int
    ff_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    max_length: int
    norm_eps: float
    rope: Rope
    query_scale: float  # factor on the scores before soft cap and softmax
    tie_embeddings: bool
    activation: str = "silu"  # or gelu_tanh
    qkv_bias: bool = False  # Qwen 2
    qk_norm: bool = False  # Gemma 3, Qwen 3
    fused_weights: bool = False  # Phi-3: files hold q, k, v as one weight, gate and up as one
    post_norms: bool = False  # Gemma 2 and 3: norms after attention and feed-forward too
    norm_offset: bool = False  # Gemma: norms multiply by 1 + weight
    scale_embedding: bool = False  # Gemma: embeddings times sqrt(width)
    attention_soft_cap: float | None = None  # Gemma 2
    final_soft_cap: float | None = None  # Gemma 2
    window: int | None = None  # keys a local layer sees, the query's own included
    local_layers: tuple[bool, ...] = ()  # which layers are local; empty: none
    local_rope: Rope | None = None  # Gemma 3: rope of the local layers
    unrotated_layers: tuple[bool, ...] = ()  # SmolLM3: layers that know nothing of positions

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the letters of `models/modules.py` stand for."""
        return {
            "V": self.vocab_size,
            "D": self.width,
            "F": self.ff_width,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_width,
        }

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of the model without adapters."""
        layer = 0
        for _, part in layer_modules(self):
            if isinstance(part, Scale):
                layer += self.sizes[part.letter]
                continue
            layer += math.prod(self.sizes[letter] for letter in part.outputs + part.inputs)
            if part.bias is not None and getattr(self, part.bias):
                layer += math.prod(self.sizes[letter] for letter in part.outputs)
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + embeddings + self.width


def spec_from_hf(config: dict[str, Any], place: str) -> ModelSpec:
    """Reads a config.json in the layout of transformers 4 or 5; a field that is null is absent.

    `place` names the file in errors. Raises `UserError` for an architecture, rope type, activation
    or bias that is not supported, for a quantized checkpoint, and for a missing field, before any
    weight is read.
    """
    config, model_type = _find_family(config, place)
    family = FAMILIES[model_type]
    # Two fields that most families leave out where they follow from others.
    N, L, D = (
        need(config, name, place)
        for name in ("num_attention_heads", "num_hidden_layers", "hidden_size")
    )
    config = {"num_key_value_heads": N, "head_dim": D // N, **config}
    K, H = config["num_key_value_heads"], config["head_dim"]
    if N % K or H % 2 or not H:
        raise UserError(
            f"{place}: {N} attention heads of width {H} over {K} key/value heads; the heads must "
            "be a multiple of the key/value heads and their width even"
        )
    # Scores are divided by the root of the head width, or of a number that the file gives.
    has_scalar = "query_pre_attn_scalar" in family.defaults
    scalar = config["query_pre_attn_scalar"] if has_scalar else H
    has_local_rope = "rope_local_base_freq" in family.defaults
    rope, local_rope = read_rope(
        config,
        place,
        local_theta=config["rope_local_base_freq"] if has_local_rope else None,
        aliases=family.rope_aliases,
        partial="partial_rotary_factor" in family.defaults,
    )
    fields = {ours: need(config, theirs, place) for theirs, ours in _FIELDS.items()}
    # Beyond the original context longrope depends on the batch, see Rope.
    if rope.kind == "longrope":
        fields["max_length"] = min(fields["max_length"], rope.original_max_length)
    if "no_rope_layers" in family.defaults:
        config["no_rope_layers"] = config["no_rope_layers"] or [
            (layer + 1) % config["no_rope_layer_interval"] for layer in range(L)
        ]
        fields["unrotated_layers"] = tuple(not turns for turns in config["no_rope_layers"][:L])
    # A window that no layer uses is left out, so that equal models have equal specs.
    local_layers = _read_local_layers(config, family, L, place)
    if any(local_layers):
        fields |= {"local_layers": local_layers, "local_rope": local_rope}
        fields["window"] = need(config, "sliding_window", place)
    fields |= {
        ours: config[theirs] for theirs, ours in _SOFT_CAPS.items() if theirs in family.defaults
    }
    return ModelSpec(
        model_type=model_type,
        rope=rope,
        query_scale=scalar**-0.5,
        activation=_read_activation(config, family, place),
        **fields,
        **family.flags,
    )


def _find_family(config: dict[str, Any], place: str) -> tuple[dict[str, Any], str]:
    """The checked fields of the text model, with the family's defaults; and its model_type."""
    own = {
        name: family.defaults.keys() - _FIELDS.keys()
        for name, family in FAMILIES.items()
        if not family.text_model
    }
    check_types(config, place, own)
    config = drop_nulls(config)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(
            f"{place}: model_type={model_type!r} is not supported{hint(model_type, FAMILIES)}\n"
            "supported: "
            + "; ".join(f"{name} ({f.note})" for name, f in FAMILIES.items() if not f.text_model)
        )
    _check_supported(config, place)
    if text_model := FAMILIES[model_type].text_model:
        config, model_type = drop_nulls(need(config, "text_config", place)), text_model
    config = {**_LLAMA_DEFAULTS, **FAMILIES[model_type].defaults, **config}
    _check_supported(config, place)
    return config, model_type


def _check_supported(config: dict[str, Any], place: str) -> None:
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"{place}: the weights are stored quantized ({method}); use the bf16 checkpoint and "
            "set model.frozen_dtype to int8 or nf4"
        )
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.get(name):
            raise UserError(
                f"{place}: {name}=true is not supported for {config['model_type']}; no supported "
                "checkpoint has it"
            )


def _read_activation(config: dict[str, Any], family: Family, place: str) -> str:
    # The first Gemma files say "gelu" in hidden_act and mean the tanh form, so theirs is
    # hidden_activation.
    is_gemma = "hidden_activation" in family.defaults
    name = config["hidden_activation"] if is_gemma else config.get("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise UserError(
            f"{place}: activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _read_local_layers(
    config: dict[str, Any], family: Family, L: int, place: str
) -> tuple[bool, ...]:
    if family.local is None:
        return ()
    if not family.lists_layers or "layer_types" not in config:
        return tuple(family.local(config, layer) for layer in range(L))
    kinds = config["layer_types"]
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != L:
        raise UserError(
            f"{place}: layer_types has {len(kinds)} entries of kinds "
            f"{', '.join(sorted(set(kinds)))}; it takes num_hidden_layers={L} entries of "
            "full_attention or sliding_attention"
        )
    return tuple(kind == "sliding_attention" for kind in kinds)


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a model, in the layout that transformers 4 and 5 both read."""
    family, L = FAMILIES[spec.model_type], spec.num_layers
    activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[spec.activation]
    config: dict[str, Any] = {
        "architectures": [family.class_name + "ForCausalLM"],
        "model_type": spec.model_type,
        **{theirs: getattr(spec, ours) for theirs, ours in _FIELDS.items()},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": activation,
        "rope_theta": spec.rope.theta,
        "rope_scaling": rope_to_hf(spec.rope),
        "use_cache": True,
    }
    # Both versions of transformers read this layout: rope_theta and rope_scaling on top,
    # layer_types as a list.
    kinds = [
        "sliding_attention" if local else "full_attention"
        for local in spec.local_layers or (False,) * L
    ]
    # Fields that only some families have; see `Family.defaults`.
    own = {
        "hidden_activation": activation,
        "query_pre_attn_scalar": _whole(spec.query_scale**-2),
        "sliding_window": spec.window
        or (family.lists_layers and family.defaults["sliding_window"])
        or None,
        "max_window_layers": kinds.index("sliding_attention") if spec.window else L,
        "use_sliding_window": spec.window is not None,
        "partial_rotary_factor": spec.rope.fraction,
        "no_rope_layers": [int(not unrotated) for unrotated in spec.unrotated_layers],
        **{theirs: getattr(spec, ours) for theirs, ours in _SOFT_CAPS.items()},
    }
    config |= {name: value for name, value in own.items() if name in family.defaults}
    if family.lists_layers:
        config["layer_types"] = kinds
    if spec.local_rope is not None:
        config["rope_local_base_freq"] = spec.local_rope.theta
    if spec.rope.kind == "longrope":
        config["original_max_position_embeddings"] = spec.rope.original_max_length
        config["max_position_embeddings"] = spec.rope.extended_length
    return config


def _whole(value: float) -> int | float:
    """A float that is a whole number up to rounding, as the int it stands for."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def spec_from_architecture(architecture: Architecture, vocab_size: int) -> ModelSpec:
    """A Llama of a configured shape; raises `UserError` where heads do not divide the width."""
    a = architecture
    if a.width % a.num_heads or (a.width // a.num_heads) % 2:
        raise UserError(
            f"model.architecture.width={a.width} does not split into num_heads={a.num_heads} "
            "heads of even width; use a multiple of twice the heads"
        )
    if a.num_heads % a.num_kv_heads:
        raise UserError(
            f"model.architecture.num_heads={a.num_heads} is not a multiple of "
            f"num_kv_heads={a.num_kv_heads}"
        )
    H = a.width // a.num_heads
    return ModelSpec(
        model_type="llama",
        vocab_size=vocab_size,
        width=a.width,
        ff_width=a.ff_width,
        num_layers=a.num_layers,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        head_width=H,
        max_length=a.max_length,
        norm_eps=1e-5,
        rope=Rope(10_000.0),
        query_scale=H**-0.5,
        tie_embeddings=a.tie_embeddings,
    )
