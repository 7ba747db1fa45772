"""Our training step under the TPU compiler, on the work that peers were compiled with; no TPU is
needed.

    python benchmarks/tpu_compile.py [--work W2@v5e:4x4 ...] [--remat full] [--tune] [--out FILE]
    python benchmarks/tpu_compile.py --table FILE.jsonl

W1: Llama-2-7B in full, 64 x 2048 tokens. W2: the same with LoRA r=64 on all projections. W3:
Gemma-2B with LoRA r=64, 32 x 2048. All with FSDP over every chip and full rematerialisation. Peers'
figures come from the same compiler (jax 0.10.2, libtpu 0.0.52), read from MaxText e591f30 and Tunix
0.1.7 as they are, without compiler options of their own. Cycles are the compiler's estimate and
leave out attention kernels, collectives and asynchronous copies: for ratios. Compile times are
compared by `maxtext_compile.py`, which takes turns with this program.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LLAMA2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
}
WORK = {"W1": (LLAMA2_7B, 64, False), "W2": (LLAMA2_7B, 64, True), "W3": (GEMMA_2B, 32, True)}

# the best figures of any peer per work and topology: (peak GiB, Mcycles); W1 by precision of
# trained weights, in the order of PRECISIONS, where peers were compiled with both
PRECISIONS = ("float32", "bfloat16")
PEERS = {
    "W1@v6e:4x4": ((11.1, 2814), (6.8, 2814)),
    "W1@v5p:2x2x4": ((11.1, 2955),) * 2,
    "W2@v6e:4x4": ((5.6, 2667),) * 2,
    "W2@v5e:4x4": ((5.7, 5500),) * 2,
    "W2@v5p:2x2x2": ((9.8, 4699),) * 2,
    "W3@v5e:2x4": ((6.5, 1998),) * 2,
    "W3@v6e:2x4": ((6.5, 978),) * 2,
}


def measure(work: str, options: argparse.Namespace) -> dict[str, Any]:
    """Plans the training step of one piece of work, as it is or tuned."""
    from crossin_jax.config import Config, Data, Lora, Mesh, Model, Optim, Train
    from crossin_jax.plan.plan import describe_change, make_plan
    from crossin_jax.plan.topology import open_topology
    from crossin_jax.plan.tune import tune

    name, _, topology = work.partition("@")
    architecture, rows, with_lora = WORK[name]
    slice_ = open_topology(topology)
    about = {
        "work": work,
        "remat": options.remat,
        "param_dtype": options.param_dtype,
        "dropout": options.dropout,
        "loss_chunk": options.loss_chunk,
        "limit": slice_.hbm_limit,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "libtpu")},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(architecture))
        config = Config(
            model=Model(path=folder, remat=options.remat, param_dtype=options.param_dtype),
            lora=Lora(rank=64, dropout=options.dropout, modules_to_save=()) if with_lora else None,
            data=Data(length=2048),
            mesh=Mesh(fsdp=len(slice_.devices)),
            optim=Optim(moments_dtype=options.param_dtype),
            train=Train(batch_size=rows, loss_chunk=options.loss_chunk),
        )
        start = time.process_time()
        if options.tune:
            best, trials = tune(config, slice_, lambda line: print(f"  {work} {line}", flush=True))
            about |= {
                "tuned": describe_change(best.change) or "nothing changed",
                "trials": len(trials),
            }
            phase, fits = best.phase, best.fits
        else:
            plan = make_plan(config, slice_, ("train",))
            phase, fits = plan.phases["train"], plan.fits
    return about | {"fits": fits, **vars(phase), "processor_seconds": time.process_time() - start}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, each beside the best of its peers."""
    lines = [
        "| work | remat, master, loss chunk | peak GiB (peers' best) | TFLOP per chip | "
        "Mcycles (matrix work) | peers' best | ratio | sent, GB | compile s |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        peak, cycles = PEERS[row["work"]][PRECISIONS.index(row["param_dtype"])]
        tuned = f"; tuned in {row['trials']} trials: {row['tuned']}" if "tuned" in row else ""
        mine = f"{row['peak_bytes'] / 2**30:.2f} ({peak})" + (
            "" if row["fits"] else " does not fit"
        )
        if row["flops"] is None:
            cells = ["-"] * 5
        else:
            sent = ", ".join(
                f"{kind} {count / 1e9:.1f}" for kind, count in sorted(row["sent_bytes"].items())
            )
            cells = [
                f"{(row['flops'] - row['kernel_flops']) / 1e12:.0f}",
                f"{row['cycles'] / 1e6:.0f} ({row['matrix_cycles'] / 1e6:.0f})",
                f"{cycles}",
                f"{row['cycles'] / 1e6 / cycles:.2f}",
                sent,
            ]
        lines.append(
            "| "
            + " | ".join(
                [
                    row["work"],
                    f"{row['remat']}, {row['param_dtype']}, {row['loss_chunk']}{tuned}",
                    mine,
                    *cells,
                    f"{row['compile_seconds']:.0f}",
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def run(
    parser: argparse.ArgumentParser,
    table: Callable[[list], str],
    make: Callable[[Any], Iterable[dict]],
) -> None:
    """Prints what is made row by row and appends it to --out; or prints the table of rows made
    before.
    """
    parser.add_argument("--out", type=Path, help="append one JSON line for each")
    parser.add_argument(
        "--table", type=Path, help="print such lines as a table, and compile nothing"
    )
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    for row in make(options):
        print(table([row]).splitlines()[-1], flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", nargs="+", default=list(PEERS), help="pieces of work, WORK@TOPOLOGY"
    )
    parser.add_argument("--remat", default="full", help="what the backward pass recomputes")
    parser.add_argument(
        "--param_dtype", default="float32", help="precision of trained weights and of their moments"
    )
    parser.add_argument(
        "--loss_chunk", type=int, default=512, help="positions per row with logits at once"
    )
    parser.add_argument(
        "--dropout", type=float, default=0.0, help="dropout of LoRA; peers had none"
    )
    parser.add_argument(
        "--tune", action="store_true", help="search as plan --tune does, from these settings on"
    )
    run(parser, table, lambda options: (measure(work, options) for work in options.work))


if __name__ == "__main__":
    main()
