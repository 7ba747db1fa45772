"""Adapters made by `peft` on tiny models, with every trained number away from its start."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.parity.families import quiet, tiny_config, torch_model

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "gate_up_proj"]
# name: (family, settings of peft.LoraConfig)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "released_recipe": ("llama3.1", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "two_targets": ("mistral_v0.1", {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": ("qwen2", {"use_rslora": True, "modules_to_save": ["lm_head"]}),
    "norms": ("qwen3", {"modules_to_save": ["model.norm", "q_norm", "input_layernorm"]}),
    "dora": ("llama2", {"use_dora": True}),
    "dora_rslora": (
        "qwen2",
        {
            "use_dora": True,
            "use_rslora": True,
            "modules_to_save": ["o_proj"],
            "target_modules": ["q_proj", "up_proj"],
        },
    ),
    "tied_kept": (
        "gemma_2b",
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tied_broken": ("gemma3", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied_head_only": ("llama3.2_tied", {"modules_to_save": ["lm_head"]}),
    "tied_embedding_only": ("qwen2.5_tied", {"modules_to_save": ["embed_tokens"]}),
    "tied_frozen": ("gemma2", {}),
    "fused": (
        "phi4_mini",
        {"target_modules": [*FUSED, "o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
        | {"ensure_weight_tying": True},
    ),
    "fused_dora": (
        "phi3_mini",
        {"target_modules": FUSED, "modules_to_save": ["down_proj"], "use_dora": True},
    ),
}


def make_adapter(folder: Path, name: str, **changes: Any) -> tuple[Path, Path]:
    """Writes a base model and a randomized adapter of it; returns both folders."""
    family, settings = ADAPTERS[name]
    base, adapter = folder / "base", folder / "adapter"
    quiet(torch_model(tiny_config(family)).save_pretrained, base)
    options = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": LINEAR,
        "task_type": "CAUSAL_LM",
        **settings,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)  # peft draws the first matrices
        model = quiet(peft.get_peft_model, load_base(base), peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    quiet(model.save_pretrained, adapter)
    return base, adapter


def load_base(base: Path) -> Any:
    """The base model in float32."""
    return quiet(
        transformers.AutoModelForCausalLM.from_pretrained,
        base,
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()


def load_peft(base: Path, adapter: Path, *, trainable: bool = False) -> Any:
    """The adapter on its base."""
    return quiet(peft.PeftModel.from_pretrained, load_base(base), adapter, is_trainable=trainable)


def logits_of(model: Any, tokens: Any) -> Any:
    """Logits as a numpy array."""
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()
