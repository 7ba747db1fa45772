"""The differences between model families that a listed checkpoint needs, read from and written to config.json."""

import math
from dataclasses import dataclass
from typing import Any

from crossin_jax.config import Architecture, UserError, hint

FAMILIES = {
    "llama": "Llama 1, 2, 3, 3.1, 3.2 and models built on them (Llama-SEA-LION v3)",
    "mistral": "Mistral 7B v0.1 to v0.3",
    "gemma": "Gemma 1 (SeaLLM v2.5)",
    "gemma2": "Gemma 2 (Gemma-SEA-LION v3)",
    "gemma3_text": "Gemma 3, text",
    "gemma3": "Gemma 3, the text part of a multimodal checkpoint (Gemma-SEA-LION v4)",
    "qwen2": "Qwen 1.5, 2 and 2.5 (Sailor, Sailor2, SeaLLMs v3)",
    "qwen3": "Qwen 3, dense (Qwen-SEA-LION v4)",
}
ROPE_KINDS = ("default", "linear", "llama3")

# What a field means where config.json leaves it out: transformers omits values equal to the class default in nested
# configurations, and older files predate some fields.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "rope_theta": 10_000.0},
    "mistral": {"tie_word_embeddings": False, "rope_theta": 10_000.0, "sliding_window": 4096},
    "gemma": {"tie_word_embeddings": True, "rope_theta": 10_000.0},
    "gemma2": {
        "tie_word_embeddings": True, "rope_theta": 10_000.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {
        "tie_word_embeddings": True, "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6},
    "qwen2": {"tie_word_embeddings": False, "rope_theta": 10_000.0, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"tie_word_embeddings": False, "rope_theta": 10_000.0, "sliding_window": 4096, "max_window_layers": 28,
              "head_dim": 128},
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base and the scaling of its frequencies."""

    theta: float
    kind: str = "default"  # one of ROPE_KINDS
    factor: float = 1.0
    low_freq_factor: float = 1.0  # this and the next two: llama3 only
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and rules of one decoder; every field is there because a checkpoint in `docs/models.md` needs it."""

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
    post_norms: bool = False  # Gemma 2 and 3: norms after attention and feed-forward too
    norm_offset: bool = False  # Gemma: norms multiply by 1 + weight
    scale_embedding: bool = False  # Gemma: embeddings times sqrt(width)
    attention_soft_cap: float | None = None  # Gemma 2
    final_soft_cap: float | None = None  # Gemma 2
    window: int | None = None  # keys a local layer sees, the query's own included
    local_layers: tuple[bool, ...] = ()  # which layers are local; empty: none
    local_rope: Rope | None = None  # Gemma 3: rope of the local layers

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of the model without adapters."""
        D, F, H, N, K = self.width, self.ff_width, self.head_width, self.num_heads, self.num_kv_heads
        layer = D * H * (2 * N + 2 * K) + 3 * D * F + D * (4 if self.post_norms else 2)
        layer += H * (N + 2 * K) * self.qkv_bias + 2 * H * self.qk_norm
        return self.num_layers * layer + self.vocab_size * D * (1 if self.tie_embeddings else 2) + D


def spec_from_hf(config: dict[str, Any], place: str) -> ModelSpec:
    """Reads the content of a config.json in the layout of transformers 4 or 5.

    `place` names the file in errors. Raises `UserError` for an architecture, rope type, activation or bias that is not
    supported, for a quantized checkpoint, and for a missing field, before any weight is read.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{place}: model_type={model_type!r} is not supported{hint(model_type, FAMILIES)}\nsupported: "
                        + "; ".join(f"{name} ({note})" for name, note in FAMILIES.items() if name != "gemma3"))
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{place}: the weights are stored quantized ({method}); use the bf16 checkpoint and set "
                        "model.frozen_dtype to int8 or nf4")
    if model_type == "gemma3":
        config, model_type = _field(config, "text_config", place), "gemma3_text"
    config = {**_DEFAULTS[model_type], **config}
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.get(name):
            raise UserError(f"{place}: {name}=true is not supported for {model_type}; no supported checkpoint has it")

    N, L, D = (_field(config, name, place) for name in ("num_attention_heads", "num_hidden_layers", "hidden_size"))
    K = config.get("num_key_value_heads") or N
    H = config.get("head_dim") or D // N
    if N % K or H % 2:
        raise UserError(f"{place}: {N} attention heads of width {H} over {K} key/value heads; the heads must be a "
                        "multiple of the key/value heads and their width even")
    is_gemma, has_scalar = model_type.startswith("gemma"), model_type in ("gemma2", "gemma3_text")
    rope, local_rope = _read_rope(config, model_type, place)
    local_layers = _read_local_layers(config, model_type, L, place)
    return ModelSpec(
        model_type=model_type, vocab_size=_field(config, "vocab_size", place), width=D,
        ff_width=_field(config, "intermediate_size", place), num_layers=L, num_heads=N, num_kv_heads=K, head_width=H,
        max_length=_field(config, "max_position_embeddings", place), norm_eps=_field(config, "rms_norm_eps", place),
        rope=rope, query_scale=(_field(config, "query_pre_attn_scalar", place) if has_scalar else H) ** -0.5,
        tie_embeddings=bool(config["tie_word_embeddings"]), activation=_read_activation(config, model_type, place),
        qkv_bias=model_type == "qwen2", qk_norm=model_type in ("qwen3", "gemma3_text"), post_norms=has_scalar,
        norm_offset=is_gemma, scale_embedding=is_gemma,
        attention_soft_cap=config["attn_logit_softcapping"] if model_type == "gemma2" else None,
        final_soft_cap=config.get("final_logit_softcapping") if has_scalar else None,
        window=_field(config, "sliding_window", place) if any(local_layers) else None,
        local_layers=local_layers if any(local_layers) else (), local_rope=local_rope if any(local_layers) else None)


def _field(config: dict[str, Any], name: str, place: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"{place}: the field {name!r} is missing; take config.json from the model's own repository")
    return config[name]


def _read_activation(config: dict[str, Any], model_type: str, place: str) -> str:
    name = config.get("hidden_act") or "silu"
    if model_type.startswith("gemma"):  # the first Gemma files say "gelu" in hidden_act and mean the tanh form
        name = config.get("hidden_activation") or "gelu_pytorch_tanh"
    if name not in _ACTIVATIONS:
        raise UserError(f"{place}: activation {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _read_local_layers(config: dict[str, Any], model_type: str, L: int, place: str) -> tuple[bool, ...]:
    if model_type == "mistral":
        return (config["sliding_window"] is not None,) * L
    if model_type in ("llama", "gemma"):
        return (False,) * L
    kinds = config.get("layer_types")
    if kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != L:
            raise UserError(f"{place}: layer_types has {len(kinds)} entries of kinds {', '.join(sorted(set(kinds)))}; "
                            f"it takes num_hidden_layers={L} entries of full_attention or sliding_attention")
        return tuple(kind == "sliding_attention" for kind in kinds)
    if model_type == "gemma2":
        return tuple(i % 2 == 0 for i in range(L))
    if model_type == "gemma3_text":
        return tuple((i + 1) % config["sliding_window_pattern"] != 0 for i in range(L))
    first = config["max_window_layers"] if config.get("use_sliding_window") and config["sliding_window"] else L
    return tuple(i >= first for i in range(L))


def _read_rope(config: dict[str, Any], model_type: str, place: str) -> tuple[Rope, Rope | None]:
    """The rope of global layers, and of local layers where theirs differs."""
    values = config.get("rope_parameters")  # transformers 5; before: rope_theta and rope_scaling
    if values is None:
        full = _parse_rope(config.get("rope_scaling") or {}, config, place)
        return full, Rope(float(config["rope_local_base_freq"])) if model_type == "gemma3_text" else None
    if "full_attention" in values:
        full = _parse_rope(values["full_attention"], config, place)
        local = _parse_rope(_field(values, "sliding_attention", f"{place}, rope_parameters"), config, place)
        if local.kind != "default":  # the layout that an export has for both versions has no place for it
            raise UserError(f"{place}: rope type {local.kind!r} of the local layers is not supported; supported there: "
                            "default")
        return full, local
    return _parse_rope(values, config, place), None


def _parse_rope(values: dict[str, Any], config: dict[str, Any], place: str) -> Rope:
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UserError(f"{place}: rope type {kind!r} is not supported{hint(kind, ROPE_KINDS)}; "
                        f"supported: {', '.join(ROPE_KINDS)}")
    partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if partial != 1.0:
        raise UserError(f"{place}: partial_rotary_factor={partial} is not supported; supported: 1.0")
    theta = float(values.get("rope_theta") or config["rope_theta"])
    if kind == "default":
        return Rope(theta)
    factor = float(_field(values, "factor", f"{place}, rope"))
    if kind == "linear":
        return Rope(theta, kind, factor)
    low, high, original = (_field(values, name, f"{place}, rope") for name in (
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    return Rope(theta, kind, factor, float(low), float(high), int(original))


def spec_to_hf(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a model of this shape, in the layout that transformers 4 and 5 both read."""
    classes = {"llama": "Llama", "mistral": "Mistral", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3",
               "qwen2": "Qwen2", "qwen3": "Qwen3"}
    L = spec.num_layers
    config: dict[str, Any] = {
        "architectures": [classes[spec.model_type] + "ForCausalLM"], "model_type": spec.model_type,
        "vocab_size": spec.vocab_size, "hidden_size": spec.width, "intermediate_size": spec.ff_width,
        "num_hidden_layers": L, "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_width,
        "max_position_embeddings": spec.max_length, "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings, "attention_bias": False, "attention_dropout": 0.0,
        "rope_theta": spec.rope.theta, "rope_scaling": _rope_to_hf(spec.rope), "use_cache": True}
    activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[spec.activation]
    config["hidden_act"] = activation
    kinds = ["sliding_attention" if local else "full_attention" for local in spec.local_layers or (False,) * L]
    if spec.model_type.startswith("gemma"):
        config["hidden_activation"] = activation
    if spec.model_type in ("gemma2", "gemma3_text"):
        config |= {"query_pre_attn_scalar": _whole(spec.query_scale ** -2), "sliding_window": spec.window or 4096,
                   "layer_types": kinds, "attn_logit_softcapping": spec.attention_soft_cap,
                   "final_logit_softcapping": spec.final_soft_cap}
    if spec.local_rope is not None:
        config["rope_local_base_freq"] = spec.local_rope.theta
    if spec.model_type == "mistral":
        config["sliding_window"] = spec.window
    if spec.model_type in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": spec.window is not None, "sliding_window": spec.window or 4096,
                   "max_window_layers": kinds.index("sliding_attention") if spec.window else L, "layer_types": kinds}
    return config


def _whole(value: float) -> int | float:
    """A float that is a whole number up to rounding, as the int it stands for."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    values: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor,
                   "original_max_position_embeddings": rope.original_max_length}
    return values


def spec_from_architecture(architecture: Architecture, vocab_size: int) -> ModelSpec:
    """A Llama of the shape in the configuration; raises `UserError` where heads do not divide the width."""
    a = architecture
    if a.width % a.num_heads or (a.width // a.num_heads) % 2:
        raise UserError(f"model.architecture.width={a.width} does not split into num_heads={a.num_heads} heads of even "
                        "width; use a multiple of twice the heads")
    if a.num_heads % a.num_kv_heads:
        raise UserError(f"model.architecture.num_heads={a.num_heads} is not a multiple of "
                        f"num_kv_heads={a.num_kv_heads}")
    H = a.width // a.num_heads
    return ModelSpec(
        model_type="llama", vocab_size=vocab_size, width=a.width, ff_width=a.ff_width, num_layers=a.num_layers,
        num_heads=a.num_heads, num_kv_heads=a.num_kv_heads, head_width=H, max_length=a.max_length, norm_eps=1e-5,
        rope=Rope(10_000.0), query_scale=H ** -0.5, tie_embeddings=a.tie_embeddings)
