"""One NVIDIA H100 or H200: training and decoding of ours beside `transformers` + `peft`, random
weights.

    python benchmarks/gpu.py [--only full,lora,decode] [--out benchmarks/results/DATE-gpu.json]
    python benchmarks/gpu.py --quick    (tiny shapes on any machine, to see that everything works)

  full    full fine-tuning of a 1B Llama at length 2048: tokens/s and model FLOPs utilisation (MFU)
  lora    LoRA r=64 on all projections of an 8B Llama at length 2048: the same
  decode  greedy decoding of the 8B Llama: bytes read per second, of weights and of stored keys
          and values

The peer computes with SDPA and `torch.compile`, in bfloat16 (full: float32 weights under autocast,
as ours). Every setting of a side runs in a process of its own, so that none finds memory taken;
each side's best counts, and a setting that does not fit is named. Without a CUDA build of torch
ours runs alone, and the output says so. Needs scripts/setup.sh cuda test. MFU counts what the model
needs, not what rematerialisation repeats.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
from record import write_record
from train_vs_peft import ALPHA, RANK, RATE, TARGETS, Ours, Theirs

SHAPES = {  # those of Llama 3.2 1B and Llama 3.1 8B
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
MORE = {
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
# Bytes per second, from the maker's data sheets (SXM).
HBM = {
    "NVIDIA H100": 3.35e12,
    "NVIDIA H200": 4.8e12,
}


def attempt(is_quick: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own, or the last line of what went wrong
    there.
    """
    if is_quick:  # starting processes would take longer than their work
        return function(*arguments)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply(function, arguments)
        except Exception as error:  # out of memory, as a rule: the next setting may fit
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"


def our_side(shape: dict[str, Any], rank: int | None, length: int, remat: str = "none") -> Ours:
    """Our model of random weights on one device."""
    from crossin_jax.config import Config, Data, Lora, Model, Optim, Train

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MORE | shape))
        return Ours(
            Config(
                model=Model(path=folder, remat=remat),
                data=Data(length=length),
                train=Train(),
                lora=rank and Lora(rank=rank, alpha=ALPHA, dropout=0.0, modules_to_save=()),
                optim=Optim(learning_rate=RATE, weight_decay=0.0, clip_norm=None),
            ),
            is_random=True,
        )


def their_side(shape: dict[str, Any], rank: int | None, device: str, backend: str) -> Any:
    """Their model of random weights, compiled."""
    import peft
    import torch
    import transformers

    dtype = torch.bfloat16 if rank else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**MORE, **shape), attn_implementation="sdpa", dtype=dtype
        )
    if rank:
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=rank,
                lora_alpha=ALPHA,
                lora_dropout=0.0,
                target_modules=list(TARGETS),
                task_type="CAUSAL_LM",
            ),
        )
    return torch.compile(model, backend=backend)


def tokens_of(shape: dict[str, Any], rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape["vocab_size"], (rows, length))


def train_ours(
    shape: dict,
    rank: int | None,
    length: int,
    rows: int,
    steps: int,
    remat: str,
    parts: int,
    around: Any = None,
) -> dict[str, Any]:
    """Tokens per second and MFU of our step; `around` is entered for the compiled steps alone."""
    import jax

    from crossin_jax.training.state import flops_per_token
    from crossin_jax.training.telemetry import peak_flops

    side, ids = (
        our_side(shape, rank, length, remat),
        tokens_of(shape, rows, length).astype(np.int32),
    )
    batch = {
        "tokens_BT": ids,
        "targets_BT": np.roll(ids, -1, 1),
        "segment_ids_BT": np.ones_like(ids),
        "positions_BT": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "group_BT": np.zeros_like(ids),
        "loss_mask_BT": np.ones(ids.shape, bool),
    }
    seconds, _ = side.run([batch] * steps, parts, around)
    rate, flops = rows * length * steps / seconds, flops_per_token(side.model, length)
    peak = peak_flops(jax.devices()[0])
    return {
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "mfu": peak and rate * flops / peak,
        "device": jax.devices()[0].device_kind,
    }


def train_theirs(
    shape: dict,
    rank: int | None,
    length: int,
    rows: int,
    steps: int,
    size: int,
    device: str,
    backend: str,
) -> dict[str, Any]:
    """Tokens per second of theirs; its MFU follows from our count of FLOPs."""
    import torch

    side = Theirs(their_side(shape, rank, device, backend), device=device, fused=device == "cuda")
    ids = tokens_of(shape, rows, length)
    step = [{"input_ids": part, "labels": part} for part in np.array_split(ids, rows // size)]
    with torch.autocast(device, torch.bfloat16):
        side.run([step], None)  # compiles
        seconds, _ = side.run([step] * steps, None)
    return {"tokens_per_second": rows * length * steps / seconds}


def open_decoder(shape: dict, rows: int, length: int, drawn: int) -> tuple[Callable, float]:
    """What decodes a number of tokens with our engine, and the bytes that a step reads on average
    where it is `drawn`.
    """
    import jax
    from flax import nnx

    from crossin_jax.generation.engine import Engine

    # LoRA keeps the weights frozen, in bfloat16; rank 1 costs next to nothing.
    side = our_side(shape, 1, length)
    state = side.start()
    engine = Engine(
        side.model.graphdef,
        nnx.merge_state(state.trainable, state.frozen),
        side.spec,
        eos_ids=[],
        pad_id=0,
        mesh=side.mesh,
        batch_size=rows,
        attention="auto",
    )
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.frozen))
    heads, layers, width = side.spec.num_kv_heads, side.spec.num_layers, side.spec.head_width
    # Keys and values, bfloat16, on average.
    stored = 2 * 2 * layers * heads * width * rows * (length + drawn / 2)
    prompts = list(tokens_of(shape, rows, length).astype(np.int32))

    def decode(count: int) -> None:
        engine.generate(prompts, max_new_tokens=count, progress=False)

    return decode, weights + stored


def decode_ours(shape: dict, rows: int, length: int, drawn: int) -> dict[str, Any]:
    """Decoding steps per second of our engine, and the bytes that each reads."""
    decode, read = open_decoder(shape, rows, length, drawn)
    return rates(decode, drawn, read)


def decode_theirs(
    shape: dict, rows: int, length: int, drawn: int, read: float, device: str, backend: str
) -> dict[str, Any]:
    """The same of `generate` with a static cache and a compiled step."""
    import torch

    model = their_side(shape, 1, device, backend).eval()
    ids = torch.from_numpy(tokens_of(shape, rows, length)).to(device)

    def run(count):
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
            )
        if device == "cuda":
            torch.cuda.synchronize()

    return rates(run, drawn, read)


def rates(run: Callable[[int], Any], drawn: int, read: float) -> dict[str, Any]:
    """Steps and bytes per second: the time of many tokens less that of few, so that prefill does
    not count.
    """
    few, seconds = drawn // 4, []
    for count in (few, drawn):
        run(count)  # compiles
        tries = []
        for _ in range(3):
            start = time.perf_counter()
            run(count)
            tries.append(time.perf_counter() - start)
        seconds.append(min(tries))
    if seconds[1] <= seconds[0]:
        raise RuntimeError(f"{drawn} tokens took no longer than {few}: {seconds}")
    steps = (drawn - few) / (seconds[1] - seconds[0])
    return {"steps_per_second": steps, "bytes_per_step": read, "bytes_per_second": steps * read}


def best(results: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The result that is highest in `key`, with its settings; failures are printed."""
    for name, result in results.items():
        print(
            f"  {name}: {result if isinstance(result, str) else f'{result[key]:,.1f} {key}'}",
            flush=True,
        )
    done = [
        result | {"settings": name}
        for name, result in results.items()
        if not isinstance(result, str)
    ]
    return max(done, key=lambda result: result[key], default=None)


def find_torch_device(quick: bool) -> str | None:
    """Where the peer can run; None: nowhere."""
    try:
        import torch
    except ImportError:
        return None
    return "cpu" if quick else "cuda" if torch.cuda.is_available() else None


def main() -> int:
    """Prints both sides of every part and writes them; 1 where ours could not do one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="full,lora,decode")
    parser.add_argument("--rows", type=int, default=16, help="rows per optimizer step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: benchmarks/results/DATE-gpu.json"
    )
    arguments = parser.parse_args()
    quick, device = arguments.quick, find_torch_device(arguments.quick)
    length, rows, steps = (128, 2, 1) if quick else (2048, arguments.rows, arguments.steps)
    backend = "eager" if quick else "inductor"
    ours = (
        [("none", 1)]
        if quick
        else [("none", 4), ("dots", 2), ("dots", 4), ("full", 1), ("full", 2)]
    )
    sizes = [1] if quick else [1, 2, 4]
    if device is None:
        print("no CUDA build of torch here: ours runs alone")
    results: dict[str, Any] = {}
    for part in arguments.only.split(","):
        shape, rank = (
            SHAPES["tiny" if quick else "1B" if part == "full" else "8B"],
            None if part == "full" else RANK,
        )
        print(f"{part}:")
        if part == "decode":
            batch, prompt, drawn = (2, 16, 256) if quick else (16, 512, 256)
            key, sizes_here = "steps_per_second", (shape, batch, prompt)
            found = best(
                {f"ours, batch {batch}": attempt(quick, decode_ours, *sizes_here, drawn)}, key
            )
            drawn = 32 if quick else drawn  # a step of theirs takes much longer on a CPU
            theirs = (
                {
                    f"transformers, batch {batch}": attempt(
                        quick,
                        decode_theirs,
                        *sizes_here,
                        drawn,
                        found["bytes_per_step"],
                        device,
                        backend,
                    )
                }
                if device and found
                else {}
            )
        else:
            key = "tokens_per_second"
            found = best(
                {
                    f"ours, remat {remat}, {parts} micro-batches": attempt(
                        quick, train_ours, shape, rank, length, rows, steps, remat, parts
                    )
                    for remat, parts in ours
                },
                key,
            )
            theirs = {
                f"transformers, micro-batch {size}": attempt(
                    quick, train_theirs, shape, rank, length, rows, steps, size, device, backend
                )
                for size in sizes
                if device
            }
        peer = best(theirs, key)
        if peer and found and found.get("mfu"):
            peer["mfu"] = found["mfu"] * peer[key] / found[key]
        for result in filter(None, (found, peer)):
            limit = next(
                (rate for name, rate in HBM.items() if name in str(results.get("device"))), None
            )
            if part == "decode" and limit:
                result["of_hbm"] = result["bytes_per_second"] / limit
        results |= {part: {"ours": found, "theirs": peer}}
        results.setdefault("device", found and found.get("device"))
        if found:
            share = "".join(
                f", {name} {found[name]:.1%}" for name in ("mfu", "of_hbm") if found.get(name)
            )
            print(
                f"  best: ours {found[key]:,.1f} {key}{share}"
                + (
                    f"; transformers {peer[key]:,.1f}: {found[key] / peer[key]:.2f} x"
                    if peer
                    else ""
                )
            )
    out = arguments.out or Path(__file__).parent / "results" / f"{datetime.date.today()}-gpu.json"
    write_record(out, arguments, results=results)
    print(f"written: {out}")
    return int(any(results[part]["ours"] is None for part in arguments.only.split(",")))


if __name__ == "__main__":
    sys.exit(main())
