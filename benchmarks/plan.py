"""Our training step under the TPU compiler, on the work that peers were compiled with; no TPU is needed.

    python benchmarks/plan.py [--work W2@v5e:4x4 ...] [--remat full] [--out FILE.jsonl]
    python benchmarks/plan.py --table FILE.jsonl

W1: Llama-2-7B in full, 64 x 2048 tokens. W2: the same with LoRA r=64 on all projections. W3: Gemma-2B with LoRA r=64,
32 x 2048. All with FSDP over every chip and full rematerialisation. Peers' figures come from the same compiler (jax
0.10.2, libtpu 0.0.52), read from MaxText e591f30 and Tunix 0.1.7 as they are, without compiler options of their own.
Cycles are the compiler's estimate and leave out attention kernels, collectives and asynchronous copies: for ratios.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LLAMA2_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
             "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
GEMMA_2B = {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
            "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh"}
WORK = {"W1": (LLAMA2_7B, 64, False), "W2": (LLAMA2_7B, 64, True), "W3": (GEMMA_2B, 32, True)}

# the best peer per work and topology: (system, peak GiB, TFLOP per chip, Mcycles); None: no peer was compiled there
PEERS = {
    "W1@v6e:4x4": ("MaxText, fp32 master", 11.1, 407, 2847), "W1@v5p:2x2x4": ("MaxText, fp32 master", 11.1, 407, 2958),
    "W2@v6e:4x4": ("MaxText", 5.6, 309, 2696), "W2@v5e:4x4": ("MaxText", 5.7, 309, 5500),
    "W2@v5p:2x2x2": ("MaxText", 9.8, 619, 4699), "W3@v5e:2x4": ("MaxText", 6.5, 110, 1998),
    "W3@v6e:2x4": ("MaxText", 6.5, 110, 978),
}


def measure(work: str, options: argparse.Namespace) -> dict[str, Any]:
    """Plans the training step of one piece of work."""
    from crossin_jax.config import Config, Data, Lora, Mesh, Model, Train
    from crossin_jax.parallel.topology import open_topology
    from crossin_jax.plan import make_plan

    name, _, topology = work.partition("@")
    architecture, rows, with_lora = WORK[name]
    slice_ = open_topology(topology)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(architecture))
        config = Config(
            model=Model(path=folder, remat=options.remat, param_dtype=options.param_dtype),
            lora=Lora(rank=64, dropout=options.dropout, modules_to_save=()) if with_lora else None,
            data=Data(length=2048), mesh=Mesh(fsdp=len(slice_.devices)),
            train=Train(batch_size=rows, loss_chunk=options.loss_chunk))
        start = time.perf_counter()
        plan = make_plan(config, slice_, ("train",))
    phase = plan.phases["train"]
    return {"work": work, "remat": options.remat, "param_dtype": options.param_dtype, "loss_chunk": options.loss_chunk,
            "dropout": options.dropout, "fits": plan.fits, "limit": plan.hbm_limit, **vars(phase),
            "seconds": time.perf_counter() - start, "load": os.getloadavg()[0], "cores": os.cpu_count(),
            "machine": platform.machine()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, each beside its peer."""
    lines = ["| work | remat, master, loss chunk | peak GiB | TFLOP per chip | Mcycles (matrix work) | x best peer | "
             "sent, GB | compile s (load) | best peer: GiB, TFLOP, Mcycles |", "|" + "---|" * 9]
    for row in rows:
        peer = PEERS.get(row["work"])
        peak = f"{row['peak_bytes'] / 2**30:.2f}" + ("" if row["fits"] else " does not fit")
        if row["flops"] is None:
            cells = ["-"] * 4
        else:
            tflop, cycles = (row["flops"] - row["kernel_flops"]) / 1e12, row["cycles"] / 1e6
            sent = ", ".join(f"{kind} {count / 1e9:.1f}" for kind, count in sorted(row["sent_bytes"].items()))
            cells = [f"{tflop:.0f}", f"{cycles:.0f} ({row['matrix_cycles'] / 1e6:.0f})",
                     f"{cycles / peer[3]:.2f}" if peer else "-", sent]
        lines.append("| " + " | ".join([
            row["work"], f"{row['remat']}, {row['param_dtype']}, {row['loss_chunk']}", peak, *cells,
            f"{row['seconds']:.0f} ({row['load']:.0f})",
            f"{peer[0]}: {peer[1]}, {peer[2]}, {peer[3]}" if peer else "-"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(PEERS), help="pieces of work, WORK@TOPOLOGY")
    parser.add_argument("--remat", default="full", help="what the backward pass recomputes")
    parser.add_argument("--param_dtype", default="float32", help="precision of trained weights")
    parser.add_argument("--loss_chunk", type=int, default=512, help="positions per row with logits at once")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout of LoRA; peers had none")
    parser.add_argument("--out", type=Path, help="append one JSON line for each")
    parser.add_argument("--table", type=Path, help="print such lines as a table, and compile nothing")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    for work in options.work:
        row = measure(work, options)
        print(table([row]).splitlines()[-1], flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
