"""Does the cuDNN kernel compute what the reference computes? Values and gradients, on one NVIDIA
GPU.

    python benchmarks/gpu_kernel.py [--out FILE.json]
    python benchmarks/gpu_kernel.py --quick     (small shapes)

Without a GPU, `--quick` runs the kernel's options through XLA.
Each case has rows of one text or of several packed texts, with or without a local window. Both
kernels get the same bfloat16 inputs; the reference in float32 is the truth. A kernel passes a case
where its error is at most twice that of the reference in bfloat16. Shapes with a soft cap must be
refused by name. Exit code 1 where a case fails.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import jax
import jax.numpy as jnp
import numpy as np
from record import write_record

from crossin_jax.config import UserError
from crossin_jax.models.attention import Kernel, attend, choose_kernel
from crossin_jax.models.spec import ModelSpec

ROUNDING = 2.0  # how many times the reference's own rounding error a kernel may have
# name: heads N, key/value heads K, head width H, window, texts per row
CASES = {
    "one text": (32, 8, 128, None, 1),
    "packed": (32, 8, 128, None, 5),
    "packed, one key/value head": (8, 1, 256, None, 5),
    "packed, window": (32, 8, 128, 512, 5),
    "one text, window": (16, 16, 64, 512, 1),
}


def make_inputs(B: int, T: int, N: int, K: int, H: int, texts: int) -> dict[str, Any]:
    """Random queries (B, T, N, H), keys and values (B, T, K, H), and the texts of each row."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, T), (texts - 1,), replace=False))
    segments_T = 1 + np.searchsorted(cuts, np.arange(T), side="right")
    starts_T = np.concatenate([[0], cuts])[segments_T - 1]
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    return {
        "q": draw((B, T, N, H)) / np.sqrt(H),
        "k": draw((B, T, K, H)),
        "v": draw((B, T, K, H)),
        "positions": np.tile(np.arange(T) - starts_T, (B, 1)).astype(np.int32),
        "segments": np.tile(segments_T, (B, 1)).astype(np.int32),
    }


def run(inputs: dict[str, Any], kernel: Kernel, window: int | None, dtype: Any) -> list[np.ndarray]:
    """The context and the gradients of q, k and v, as float32."""
    fixed = [jnp.asarray(inputs[name]) for name in ("positions", "segments")]

    @jax.jit
    def compute(q, k, v):
        def context(q, k, v):
            return attend(
                q, k, v, *fixed, kernel=kernel, window=window, is_local=None, soft_cap=None
            )

        out, pull = jax.vjp(context, q, k, v)
        return out, *pull(
            jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
        )

    found = compute(*(jnp.asarray(inputs[name], dtype) for name in "qkv"))
    return [np.asarray(array, np.float32) for array in found]


def error(found: list[np.ndarray], truth: list[np.ndarray]) -> list[float]:
    """Root mean square of the difference over that of the truth, for the context and each
    gradient.
    """
    return [
        float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
        for a, b in zip(found, truth, strict=True)
    ]


def refuses_soft_caps() -> bool:
    """Whether cuDNN is refused, with the reason, where a model caps its scores."""
    spec = ModelSpec.__new__(ModelSpec)
    for name, value in {
        "attention_soft_cap": 50.0,
        "model_type": "gemma2",
        "head_width": 128,
    }.items():
        object.__setattr__(spec, name, value)
    try:
        choose_kernel("cudnn", spec, 2048, "bfloat16", "gpu")
    except UserError as reason:
        return "soft cap" in str(reason)
    return False


def main() -> int:
    """Prints one line per case and writes all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    is_gpu = jax.default_backend() in ("gpu", "cuda")
    if not (is_gpu or arguments.quick):
        raise SystemExit("error: no GPU here; --quick runs the kernel's options through XLA")
    kernel = Kernel("cudnn", interpret=not is_gpu)
    B, T = (1, 256) if arguments.quick else (2, 2048)
    results: dict[str, Any] = {"soft cap refused": refuses_soft_caps()}
    for name, (N, K, H, window, texts) in CASES.items():
        if arguments.quick:
            N, K, H, window = 4, max(1, 4 * K // N), 32, window and 64
        inputs = make_inputs(B, T, N, K, H, texts)
        truth = run(inputs, Kernel("reference"), window, jnp.float32)
        rounded = error(run(inputs, Kernel("reference"), window, jnp.bfloat16), truth)
        try:
            found = error(run(inputs, kernel, window, jnp.bfloat16), truth)
        except Exception as reason:  # the other cases are still worth their time
            results[name] = {
                "failure": f"{type(reason).__name__}: {str(reason)[:300]}",
                "passes": False,
            }
        else:
            passes = all(a <= ROUNDING * b for a, b in zip(found, rounded, strict=True))
            results[name] = {"cudnn": found, "reference in bfloat16": rounded, "passes": passes}
        print(name, results[name], flush=True)
    results["device"] = jax.devices()[0].device_kind
    if arguments.out:
        write_record(arguments.out, arguments, results=results)
    passed = [results[name]["passes"] for name in CASES]
    print(f"{sum(passed)} of {len(passed)} cases pass on {results['device']}")
    return int(not (all(passed) and results["soft cap refused"]))


if __name__ == "__main__":
    sys.exit(main())
