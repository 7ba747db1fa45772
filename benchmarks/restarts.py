"""Restarts at random points: does the data stream go on with the identical batches, whatever hosts
and workers?

    python benchmarks/restarts.py [--points 500] [--with_workers 60] [--out FILE.json]

The points are divided over 1 and 2 hosts, packing on; `--with_workers` of them start two worker
processes, the rest none, and the uninterrupted stream is that of no workers. The position passes
through JSON, a new loader takes it, and the next two batches must have the hashes that the
uninterrupted stream had. Exits with 1 at the first difference. A start of worker processes takes
seconds, so this is a command and not a test; the test suite does 500 points without workers and a
few with them.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
BATCHES = 120


def make_parts(folder: Path):
    """Mixture, renderer and a loader factory over embedded facts, in three directions and four
    languages.
    """
    from crossin_jax.config import Component, Data, Source
    from crossin_jax.data import packing
    from crossin_jax.data.loader import make_loader
    from crossin_jax.data.mixture import Mixture, load_corpora
    from crossin_jax.data.pipeline import load_tokenizer, train_tokenizer
    from crossin_jax.data.prompts import Renderer
    from crossin_jax.world.facts import tokenizer_lines

    # Many small windows: more borders to stop at.
    packing.WINDOW_ROWS, packing.WINDOW_TOKENS = (
        12,
        0,
    )
    components = tuple(Component(kind=kind, source="facts") for kind in ("base", "x2x", "trans"))
    data = Data(
        sources=(Source(name="facts", kind="world", split="train"),),
        components=components,
        length=96,
    )
    mixture = Mixture(data, load_corpora(data, 0), 0)
    train_tokenizer(tokenizer_lines(data.languages, 0), 2000, folder)
    renderer = Renderer(load_tokenizer(str(folder)), "plain")

    def loader_of(host: int, hosts: int, workers: int):
        settings = Data(**{**vars(data), "workers": workers})
        return make_loader(
            mixture,
            renderer,
            settings,
            batch_size=4,
            seed=0,
            process_index=host,
            process_count=hosts,
        )

    return loader_of


def digest(batch) -> str:
    """A hash of every array of a batch."""
    return hashlib.blake2b(
        b"".join(batch[name].tobytes() for name in sorted(batch)), digest_size=8
    ).hexdigest()


def check(loader_of, hosts: int, workers: int, points: int, rng: random.Random) -> int:
    """Restarts at `points` random batches; returns how many went on with other batches."""
    plain, states, hashes = loader_of(hosts - 1, hosts, 0), [], []
    for _ in range(BATCHES):
        states.append(json.dumps(plain.get_state()))
        hashes.append(digest(next(plain)))
    wrong = 0
    for _ in range(points):
        stop = rng.randrange(BATCHES - 1)
        loader = loader_of(hosts - 1, hosts, workers)
        loader.set_state(json.loads(states[stop]))
        wrong += [digest(next(loader)) for _ in range(2)] != hashes[stop : stop + 2]
        loader.close()
    return wrong


def main() -> int:
    """Checks the four combinations and prints a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=500)
    parser.add_argument("--with_workers", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report, rng = [], random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        loader_of = make_parts(Path(folder))
        for hosts, workers in itertools.product((1, 2), (0, 2)):
            start = time.perf_counter()
            points = (
                options.with_workers if workers else options.points - options.with_workers
            ) // 2
            wrong = check(loader_of, hosts, workers, points, rng)
            report.append(
                {"hosts": hosts, "workers": workers, "points": points, "different": wrong}
            )
            print(
                f"{hosts} hosts, {workers} workers: {points} restarts, {wrong} with other batches "
                f"({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(entry["different"] for entry in report))


if __name__ == "__main__":
    sys.exit(main())
