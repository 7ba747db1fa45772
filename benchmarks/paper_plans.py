"""What `plan` says of the paper's models on four slices of TPUs: the table of docs/plan.md. No TPU,
no weights.

    python benchmarks/paper_plans.py [--model llama-2-7b ...] [--topology v5e:4x4 ...] [--out FILE]
    python benchmarks/paper_plans.py --table FILE.jsonl

The recipe is that of configs/paper/table2.py; of each model there is only its config.json.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tpu_compile import run

os.environ["JAX_PLATFORMS"] = "cpu"
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

MODELS = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "gemma-2b": "google/gemma-2b",
    "gemma-7b": "google/gemma-7b",
}
TOPOLOGIES = ("v5e:4x4", "v5p:2x2x1", "v6e:4x4", "v4:2x2x2")  # v5e-16, v5p-8, v6e-16, v4-16


def make(model: str, topology: str) -> dict[str, Any]:
    """The plan of one model on one slice: training, prefill and decoding."""
    from crossin_jax.cli import load_config_file
    from crossin_jax.plan.plan import make_plan
    from crossin_jax.plan.topology import open_topology
    from tests.models.published import CHECKPOINTS

    slice_ = open_topology(topology)
    recipe = REPOSITORY / f"configs/paper/table2.py:{model}/x2x/3000/{len(slice_.devices)}"
    config = load_config_file(str(recipe))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CHECKPOINTS[MODELS[model]][0]))
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=folder))
        plan = dataclasses.asdict(make_plan(config, slice_))
    return {
        "model": model,
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("jax", "libtpu")},
        **plan,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The plans in Markdown."""
    heads = (
        "model",
        "slice",
        "fits",
        "HBM peak of limit, GiB: train, prefill, decode",
        "train: TFLOP, Mcycles (matrix work)",
        "train: tokens/s at most",
        "decode: steps/s at most",
        "sent per step, GB",
        "a host reads, writes for a checkpoint, GiB",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        gib, phases = 2**30, row["phases"]
        peaks = ", ".join(
            f"{phases[name]['peak_bytes'] / gib:.1f}" for name in ("train", "prefill", "decode")
        )
        train, decode = phases["train"], phases["decode"]
        if train["flops"] is None:
            cells = ["-"] * 4
        else:
            sent = ", ".join(
                f"{kind} {count / 1e9:.1f}"
                for kind, count in sorted(train["sent_bytes"].items())
                if count >= 5e7
            )
            cells = [
                f"{train['flops'] / 1e12:.0f}, {train['cycles'] / 1e6:,.0f} "
                f"({train['matrix_cycles'] / train['cycles']:.0%})",
                f"{row['tokens_per_step'] / train['floor_seconds']:,.0f}",
                f"{1 / decode['floor_seconds']:,.0f}" if decode["floor_seconds"] else "-",
                sent,
            ]
        lines.append(
            "| "
            + " | ".join(
                [
                    row["model"],
                    f"{row['topology']}, {row['chips']} chips",
                    "yes" if row["fits"] else "no",
                    f"{peaks} of {row['hbm_limit'] / gib:.2f}",
                    *cells,
                    ", ".join(f"{row[name] / gib:.1f}" for name in ("read_bytes", "saved_bytes")),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--topology", nargs="+", default=list(TOPOLOGIES))
    run(
        parser,
        table,
        lambda options: (
            make(model, topology) for topology in options.topology for model in options.model
        ),
    )


if __name__ == "__main__":
    main()
