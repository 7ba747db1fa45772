"""The fields of a config.json that are read: their types and limits."""

from collections.abc import Mapping, Set
from typing import Any

from crossin_jax.files import check_fields

COUNT, POSITIVE = (int, {"at_least": 1}), (float, {"above": 0, "at_most": 1e15})
# Types and limits of the fields that are read, at any level; other fields are ignored.
PARTS = ("text_config", "rope_scaling", "rope_parameters", "full_attention", "sliding_attention")
TYPES = {
    "model_type": str,
    "layer_types": list[str],
    "no_rope_layers": (list[int], {"may_repeat": True}),
    "no_rope_layer_interval": (int, {"at_least": 1}),
    "quantization_config": dict,
    "num_hidden_layers": (int, {"at_least": 1, "at_most": 10_000}),
    "max_window_layers": (int, {"at_least": 0}),
    "rope_type": str,
    "type": str,
    **dict.fromkeys(PARTS, dict),
    **dict.fromkeys(("hidden_act", "hidden_activation"), str),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), COUNT),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), COUNT),
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), COUNT),
    **dict.fromkeys(("sliding_window_pattern", "original_max_position_embeddings"), COUNT),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "rope_local_base_freq"), POSITIVE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), POSITIVE),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), POSITIVE),
    **dict.fromkeys(("partial_rotary_factor", "query_pre_attn_scalar"), POSITIVE),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), bool),
    **dict.fromkeys(("use_sliding_window", "truncate"), bool),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), POSITIVE),
    **dict.fromkeys(("mscale", "mscale_all_dim"), (float, {"at_least": 0})),
    **dict.fromkeys(
        ("short_factor", "long_factor"), (list[float], {"above": 0, "may_repeat": True})
    ),
}
# Rope reads these in every family.
OF_ALL = {"rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def check_types(config: Any, place: str, families: Mapping[str, Set[str]]) -> None:
    """Raises `UserError` for a value of the wrong type or size, also in the parts of a config.json.

    `families`: the fields of each model_type that not all have. What only other families read is
    not looked at: transformers passes over it too.
    """
    check_fields(config, {"model_type": str}, place)
    own = families.get(config.get("model_type"))
    unread = set() if own is None else set().union(*families.values()) - own - OF_ALL
    check_fields(config, {name: TYPES[name] for name in TYPES if name not in unread}, place)
    for name in PARTS:
        if isinstance(part := config.get(name), dict):
            check_types(part, f"{place}: {name}", families)
