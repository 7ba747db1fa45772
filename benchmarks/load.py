"""Seconds and peak memory to load a checkpoint: crossin_jax, transformers, and a plain read of the
same bytes.

    python benchmarks/load.py [--gib 2] [--repeats 3] [--cold] [--dtype bfloat16] [--out FILE.json]

Makes a Llama-shaped bfloat16 checkpoint of about that size, then loads it in fresh processes in
turn, so that no loader inherits another's memory. Files come from the page cache; `--cold` drops
them from it before each load. Seconds leave out imports and process start, and end when every page
of every weight has been touched; cpu s adds up all threads. Peak memory is the process's highest
resident size less what it held before the load.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LOADERS = ("plain read", "crossin_jax", "transformers")


def make_checkpoint(folder: Path, gib: float) -> int:
    """Writes a sharded checkpoint of random weights below one in size; returns its bytes."""
    import ml_dtypes

    from crossin_jax.checkpoint.hf_map import weight_keys
    from crossin_jax.checkpoint.save import write_json, write_leaves
    from crossin_jax.models.spec import ModelSpec, Rope, spec_to_hf

    spec = ModelSpec(
        model_type="llama",
        vocab_size=32_000,
        width=2048,
        ff_width=5632,
        num_layers=1,
        num_heads=32,
        num_kv_heads=4,
        head_width=64,
        max_length=2048,
        norm_eps=1e-5,
        rope=Rope(10_000.0),
        query_scale=0.125,
        tie_embeddings=False,
    )
    outer = 2 * spec.vocab_size * spec.width
    layers = max(1, round((gib * 2**29 - outer) / (spec.num_parameters - outer)))
    spec = ModelSpec(
        **{
            **{name: getattr(spec, name) for name in spec.__dataclass_fields__},
            "num_layers": layers,
        }
    )
    rng, keys, leaves = np.random.default_rng(0), weight_keys(spec), {}
    for path, key in keys.items():
        shape = (layers, *key.shape) if key.stacked else key.shape
        leaves[path] = rng.integers(0, 0x3F80, shape, np.uint16).view(ml_dtypes.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    write_leaves(folder, leaves, keys, layers, shard_bytes=1_000_000_000)
    write_json(folder / "config.json", {**spec_to_hf(spec), "torch_dtype": "bfloat16"})
    return spec.num_parameters * 2


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def touch(arrays: Iterator[np.ndarray]) -> int:
    """Reads one byte of every page."""
    return sum(
        int(array.reshape(-1).view(np.uint8)[::4096].sum(dtype=np.int64)) for array in arrays
    )


def measure(loader: str, folder: Path, dtype: str) -> dict[str, float]:
    """Loads once in this process."""
    from crossin_jax.checkpoint.weights import peak_bytes, reset_peak, resident_bytes

    if loader == "plain read":

        def load():
            buffers = [np.empty(file.stat().st_size, np.uint8) for file in weight_files(folder)]
            for file, buffer in zip(weight_files(folder), buffers, strict=True):
                with open(file, "rb", buffering=0) as source:
                    view, done = memoryview(buffer), 0
                    while count := source.readinto(view[done:]):
                        done += count
            return buffers
    elif loader == "crossin_jax":
        import jax

        from crossin_jax import load_model

        jax.devices()

        def load():
            state = load_model(folder, dtype=dtype, progress=False).state
            return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    else:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()

        def load():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
            return [p.detach().view(torch.uint8).numpy() for p in model.parameters()]

    reset_peak()
    before, start, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    touch(load())
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": (peak_bytes() - before) / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint, GiB")
    parser.add_argument(
        "--repeats", type=int, default=3, help="loads of each kind; the median counts"
    )
    parser.add_argument(
        "--cold", action="store_true", help="drop the files from the page cache before each load"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="precision in memory"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON too")
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]), options.dtype)))
        return
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        size = make_checkpoint(folder, options.gib)
        runs: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
        for _ in range(options.repeats):
            for loader in LOADERS:
                for file in weight_files(folder):
                    with open(file, "rb") as source:
                        if options.cold:
                            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        else:
                            while source.read(1 << 24):
                                pass
                command = [
                    sys.executable,
                    __file__,
                    "--dtype",
                    options.dtype,
                    "--measure",
                    loader,
                    str(folder),
                ]
                output = subprocess.run(
                    command, check=True, env=environment, stdout=subprocess.PIPE, text=True
                ).stdout
                runs[loader].append(json.loads(output.splitlines()[-1]))
    plain = statistics.median(run["seconds"] for run in runs["plain read"])
    print(
        f"{size / 2**30:.2f} GiB of bfloat16 as {options.dtype}, "
        f"{'cold' if options.cold else 'warm'}, "
        f"median of {options.repeats}, {os.cpu_count()} cores, {platform.machine()}"
    )
    print(f"{'':14}{'seconds':>9}{'x plain':>9}{'cpu s':>9}{'peak GiB':>10}")
    results = {}
    for loader in LOADERS:
        seconds, cpu, peak = (
            statistics.median(run[name] for run in runs[loader])
            for name in ("seconds", "cpu_seconds", "peak_gib")
        )
        results[loader] = {
            "seconds": seconds,
            "times_plain": seconds / plain,
            "cpu_seconds": cpu,
            "peak_gib": peak,
            "runs": runs[loader],
        }
        print(f"{loader:14}{seconds:9.2f}{seconds / plain:9.2f}{cpu:9.2f}{peak:10.2f}")
    if options.out:
        options.out.write_text(
            json.dumps(
                {
                    "bytes": size,
                    "dtype": options.dtype,
                    "cold": options.cold,
                    "cores": os.cpu_count(),
                    "results": results,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
