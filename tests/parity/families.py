"""Tiny configurations of every family, and the same random weights in `transformers` and in
ours.
"""

import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from crossin_jax.checkpoint.hf_map import weight_keys
from crossin_jax.models.spec import spec_from_hf
from crossin_jax.models.transformer import Transformer

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attention_dropout": 0.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name: (model_type, changes to TINY in the layout of transformers 4)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 6, "head_dim": 8, "rope_theta": 10000.0}),
    "llama3.1": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama3.2_tied": (
        "llama",
        {
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3 | {"factor": 32.0},
            "tie_word_embeddings": True,
            "head_dim": 20,
        },
    ),
    "mistral_v0.1": ("mistral", {"sliding_window": 40, "rope_theta": 10000.0}),
    "mistral_v0.3": (
        "mistral",
        {"sliding_window": None, "rope_theta": 1e6, "num_key_value_heads": 3},
    ),
    "gemma_2b": (
        "gemma",
        {"num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu", "hidden_activation": None},
    ),
    "gemma_7b": ("gemma", {"num_key_value_heads": 6, "hidden_activation": "gelu_pytorch_tanh"}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "num_hidden_layers": 4,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 7,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "num_key_value_heads": 1,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "qwen2": (
        "qwen2",
        {"rope_theta": 1e6, "head_dim": 8, "use_sliding_window": False, "sliding_window": 32},
    ),
    "qwen2.5_tied": (
        "qwen2",
        {"rope_theta": 1e6, "head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "smollm3": (
        "smollm3",
        {"head_dim": 8, "num_hidden_layers": 5, "tie_word_embeddings": True, "rope_theta": 5e6},
    ),
    "phi3_mini": ("phi3", {"num_key_value_heads": 6, "head_dim": 8, "sliding_window": 40}),
    "phi4_mini": (
        "phi3",
        {
            "hidden_size": 96,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 10_000,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.05, 1.1, 1.2, 1.5, 2.0],
                "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
            },
        },
    ),
    "qwen3_yarn": (
        "qwen3",
        {
            "rope_theta": 1e6,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "qwen3": ("qwen3", {"rope_theta": 1e6, "head_dim": 20}),
    "qwen3_tied": (
        "qwen3",
        {"rope_theta": 1e6, "tie_word_embeddings": True, "num_key_value_heads": 6},
    ),
}


def tiny_config(family: str) -> dict[str, Any]:
    """The content of a config.json of the family."""
    model_type, changes = FAMILIES[family]
    return {**TINY, "model_type": model_type, **changes}


def quiet(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls peft or transformers without their warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def torch_model(config: dict[str, Any], *, peaked: bool = False) -> Any:
    """The model of `transformers` with random weights large enough that logits spread over several
    units.

    `peaked` ties the unembedding loosely to the embedding, so that the best logit stands out as in
    a trained model; without it one position in twenty has its two best logits within the noise of
    bfloat16.
    """
    model_type = config["model_type"]
    hf_config = transformers.AutoConfig.for_model(**config)
    hf_config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(0.2 * noise + (0.0 if model_type.startswith("gemma") else 1.0))
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * ((0.7 if peaked else 1.5) / parameter.shape[1] ** 0.5))
        if peaked:
            embedding, unembedding = (
                model.get_input_embeddings().weight,
                model.get_output_embeddings().weight,
            )
            embedding.mul_(4.0)
            if unembedding is not embedding:
                unembedding.add_(embedding.roll(1, 0))
    return model


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with parameters of that precision; `model.to` would round the rope
    frequencies too.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def our_model(
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    *,
    dtype: str = "float32",
    **options: Any,
) -> Transformer:
    """Our model with the weights of a `transformers` state dict; layers stacked, heads split
    out.
    """
    spec = spec_from_hf(config, "config.json")
    model = Transformer(spec, param_dtype=dtype, compute_dtype=dtype, rngs=nnx.Rngs(0), **options)
    state = nnx.to_flat_state(nnx.state(model))
    leaves = {"/".join(map(str, path)): leaf for path, leaf in state}
    for path, key in weight_keys(spec).items():
        arrays = [
            weights[name][slice(*(key.rows or (None,)))].float().numpy().reshape(key.shape)
            for name in key.names(spec.num_layers)
        ]
        value = jnp.asarray(
            np.stack(arrays) if key.stacked else arrays[0], leaves[path].get_value().dtype
        )
        assert value.shape == leaves[path].get_value().shape, path
        leaves[path].set_value(value)
    return model
