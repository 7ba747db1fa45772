"""What one decoding step sends between TPU chips on meshes that were made for training.

    python benchmarks/decode_plans.py [--rows 128] [--model gemma-2b] [--out FILE.jsonl]

It compiles prefill and decoding with LoRA for absent TPUs, as `plan` does: no weights are needed.
Beside the sent bytes stands what it would take to gather all weights for every token.
"""

import argparse
import json
import tempfile
from pathlib import Path

from crossin_jax.config import (
    Component,
    Config,
    Data,
    Evaluation,
    Lora,
    Mesh,
    Model,
    Source,
    Train,
)
from crossin_jax.models.spec import spec_from_hf
from crossin_jax.plan.plan import make_plan

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
# name: (config.json, TPU slice, shards of fsdp)
MODELS = {
    "gemma-2b": (
        {
            "model_type": "gemma",
            "vocab_size": 256_000,
            "hidden_size": 2048,
            "intermediate_size": 16_384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
        },
        "v5e:2x4",
        8,
    ),
    "llama-2-7b": (
        LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        "v5e:4x4",
        16,
    ),
    "llama-2-70b": (
        LLAMA
        | {
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        "v6e:8x8",
        64,
    ),
}


def plan_decoding(name: str, rows: int) -> dict:
    """Bytes per chip and decoding step of one model."""
    config, topology, shards = MODELS[name]
    spec = spec_from_hf(config, name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        plan = make_plan(
            Config(
                model=Model(path=folder),
                lora=Lora(modules_to_save=()),
                data=Data(
                    sources=(Source(name="rows", path="rows.jsonl"),),
                    components=(Component(kind="x2x", source="rows"),),
                ),
                mesh=Mesh(data=1, fsdp=shards),
                train=Train(steps=1, batch_size=shards),
                evaluation=Evaluation(
                    benchmarks=("cross_mmlu",), batch_size=rows, max_new_tokens=256
                ),
            ),
            topology,
            ("decode",),
        )
    decode = plan.phases["decode"]
    return {
        "model": name,
        "topology": topology,
        "fsdp": shards,
        "rows": rows,
        "sent_gb": round(sum(decode.sent_bytes.values()) / 1e9, 3),
        "by_kind_gb": {kind: round(sent / 1e9, 3) for kind, sent in decode.sent_bytes.items()},
        "gathering_gb": round(2 * spec.num_parameters * (shards - 1) / shards / 1e9, 2),
        "peak_gib": round(decode.peak_bytes / 2**30, 2),
        "mcycles": round(decode.cycles / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=128, help="rows that decode together")
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--out", type=Path, help="JSON Lines file that the results are added to")
    arguments = parser.parse_args()
    for name in arguments.model or MODELS:
        result = plan_decoding(name, arguments.rows)
        print(json.dumps(result), flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
