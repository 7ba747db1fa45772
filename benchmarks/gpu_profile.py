"""Where a GPU's time goes: full fine-tuning of a 1B Llama and decoding of an 8B one, by kind of
kernel.

    python benchmarks/gpu_profile.py [--only train,decode] [--out FILE.json]
    python benchmarks/gpu_profile.py --quick     (tiny shapes on any machine)

On a CPU it sums up host events.
Prints the busy time of the device, the time between kernels, and the kernels that take the most,
grouped by name without numbers. The three largest that are not matrix products are the losses to
look at.
"""

import argparse
import collections
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gpu import SHAPES, attempt, open_decoder, train_ours
from record import write_record

SHOWN = 12
Event = tuple[str, float, float]
PRODUCTS = re.compile(r"gemm|cutlass|nvjet|cublas|xmma|dot", re.IGNORECASE)


@contextlib.contextmanager
def traced(events: list[Event]) -> Iterator[None]:
    """Adds (name, start, nanoseconds) of everything that the device does inside."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            yield
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    planes = planes or [plane for plane in data.planes if plane.name == "/host:CPU"]
    events += [
        (event.name, event.start_ns, event.duration_ns)
        for plane in planes
        for line in plane.lines
        if "Stream" in line.name or not plane.name.startswith("/device")
        for event in line.events
        if not event.name.startswith(("$", "Memset"))
    ]


def summarize(events: list[Event]) -> dict[str, Any]:
    """Busy and idle share of the time, and the kernels that take the most."""
    starts = np.array([start for _, start, _ in events])
    ends = starts + np.array([duration for *_, duration in events])
    whole = float(ends.max() - starts.min())
    busy, reached = 0.0, -np.inf
    for i in np.argsort(starts):  # kernels on two streams may run side by side
        busy += max(0.0, ends[i] - max(starts[i], reached))
        reached = max(reached, ends[i])
    kinds: collections.Counter = collections.Counter()
    for name, _, duration in events:
        kinds[re.sub(r"[\d_.]+", "_", name)[:90]] += duration
    total = sum(kinds.values())
    return {
        "seconds": whole / 1e9,
        "busy": busy / whole,
        "products": sum(t for name, t in kinds.items() if PRODUCTS.search(name)) / total,
        "kernels": {name: t / total for name, t in kinds.most_common(SHOWN)},
        "largest_losses": [name for name, _ in kinds.most_common() if not PRODUCTS.search(name)][
            :3
        ],
    }


def profile_training(is_quick: bool) -> dict[str, Any]:
    """Two compiled steps."""
    shape, rows, length = (SHAPES["tiny"], 2, 128) if is_quick else (SHAPES["1B"], 16, 2048)
    events: list[Event] = []
    train_ours(shape, None, length, rows, 2, "dots", 2, traced(events))
    return summarize(events)


def profile_decoding(is_quick: bool) -> dict[str, Any]:
    """Compiled decoding, with the prefill of short prompts."""
    shape, rows, length, drawn = (
        (SHAPES["tiny"], 2, 16, 16) if is_quick else (SHAPES["8B"], 16, 128, 128)
    )
    events: list[Event] = []
    decode, _ = open_decoder(shape, rows, length, drawn)
    decode(drawn)  # compiles
    with traced(events):
        decode(drawn)
    return summarize(events)


def main() -> int:
    """Prints and writes both profiles; 1 where one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="train,decode")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    parts = {"train": profile_training, "decode": profile_decoding}
    results = {
        part: attempt(arguments.quick, parts[part], arguments.quick)
        for part in arguments.only.split(",")
    }
    print(json.dumps(results, indent=1))
    if arguments.out:
        write_record(arguments.out, arguments, results=results)
    return int(any(isinstance(result, str) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
