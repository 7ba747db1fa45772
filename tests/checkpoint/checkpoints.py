"""Small checkpoints on disk, written without torch."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from crossin_jax.checkpoint.hf_map import weight_keys
from crossin_jax.checkpoint.save import write_json, write_leaves
from crossin_jax.models.spec import ModelSpec, spec_from_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def write_checkpoint(
    folder: Path,
    dtype: Any = ml_dtypes.bfloat16,
    *,
    shard_bytes: int = 1 << 40,
    seed: int = 0,
    **changes: Any,
) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """A Llama folder of random weights; returns its spec and the arrays as our leaves should hold
    them.
    """
    config = {**LLAMA, **changes}
    spec, rng = spec_from_hf(config, "config.json"), np.random.default_rng(seed)
    keys = weight_keys(spec)
    leaves = {
        path: (
            0.2 * rng.standard_normal(((spec.num_layers,) if key.stacked else ()) + key.shape)
        ).astype(dtype)
        for path, key in keys.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_leaves(folder, leaves, keys, spec.num_layers, shard_bytes=shard_bytes, progress=False)
    write_json(folder / "config.json", config)
    return spec, leaves


def edit_header(file: Path, edit: Any) -> None:
    """Rewrites a safetensors file with its header passed through `edit`; the data stay."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header = edit(header) or header
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
