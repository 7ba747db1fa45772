"""Tokens per second of the data pipeline beside `datasets.map` and a plain collator, and the memory
of a large corpus.

    python benchmarks/data.py [--data ../shared/data] [--tokenizer FOLDER] [--workers 2]
                              [--repeats 3] [--step] [--rows 1000000] [--out FILE.json]

Both read the same instruction examples, made from XQuAD in `--data`, use the same tokenizer, mask
the prompt and give batches of 16 rows of at most 2048 tokens; both start from text and count real
tokens, not padding. The peer tokenizes prompt and answer of each example in `datasets.map`, as
instruction-tuning scripts do, with `num_proc` workers, and pads each batch to its longest row;
"batched" is the same with 1,000 examples per call, which few scripts do. Ours draws languages,
tokenizes jointly, packs, shards and keeps an exact position. Each figure is the difference between
a long and a short run, so that the start of processes is left out; runs alternate, and the best of
the repeats counts, since other work on the machine only ever slows one down. Tokens per CPU second,
children included, are what a busy machine does not change. `--step` also times the quickstart's
training step. `--rows` writes that many parallel rows to disk and reports what opening and reading
them adds to the process's memory.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
BATCH, LENGTH = 16, 2048


def make_parts(data: Path, tokenizer_folder: str, workers: int):
    """Mixture, renderer, settings and tokenizer of the XQuAD examples."""
    from crossin_jax.config import Component, Data, Source
    from crossin_jax.data.mixture import Mixture, load_corpora
    from crossin_jax.data.pipeline import load_tokenizer
    from crossin_jax.data.prompts import Renderer

    source = Source(name="xquad", path=str(data / "xquad" / "xquad.{lang}.json"))
    kinds = ("base", "en2x", "x2en", "x2x", "trans")
    settings = Data(
        sources=(source,),
        components=tuple(Component(kind=kind, source="xquad") for kind in kinds),
        length=LENGTH,
        workers=workers,
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    return (
        Mixture(settings, load_corpora(settings, 0), 0),
        Renderer(tokenizer, "alpaca"),
        settings,
        tokenizer,
    )


class Clock:
    """Wall and CPU seconds of a block, those of child processes that ended in it included."""

    def __enter__(self) -> "Clock":
        self.start = time.perf_counter(), self._cpu()
        return self

    def __exit__(self, *_) -> None:
        self.wall, self.cpu = time.perf_counter() - self.start[0], self._cpu() - self.start[1]

    @staticmethod
    def _cpu() -> float:
        return sum(
            sum(resource.getrusage(who)[:2])
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )


def time_ours(parts, epochs: int) -> tuple[int, Clock]:
    """Real tokens and time of whole epochs; nothing is remembered between examples."""
    from crossin_jax.data import packing
    from crossin_jax.data.loader import make_loader

    packing.MEMORY_EXAMPLES = 0
    mixture, renderer, settings, _ = parts
    tokens = 0
    with Clock() as clock:
        loader = make_loader(
            mixture, renderer, settings, batch_size=BATCH, seed=0, num_epochs=epochs
        )
        for batch in loader:
            tokens += int((batch["segment_ids_BT"] > 0).sum())
        loader.close()
    return tokens, clock


def time_peer(parts, epochs: int, workers: int, batched: bool) -> tuple[int, Clock]:
    """Real tokens and time of datasets.map over the examples' texts, and of padding every batch."""
    import datasets

    datasets.disable_progress_bars()
    mixture, renderer, _, tokenizer = parts
    texts = [
        (renderer.template.fill(e.instruction, e.input, None), e.output)
        for e in mixture.take(np.arange(epochs * len(mixture)))
    ]
    rows = datasets.Dataset.from_dict(
        {"prompt": [p for p, _ in texts], "answer": [a for _, a in texts]}
    )
    eos = tokenizer.eos_token_id

    def encode_one(row):
        prompt = tokenizer(row["prompt"]).input_ids
        answer = [*tokenizer(row["answer"], add_special_tokens=False).input_ids, eos]
        return {
            "input_ids": (prompt + answer)[:LENGTH],
            "labels": ([-100] * len(prompt) + answer)[:LENGTH],
        }

    def encode(batch):
        prompts = tokenizer(batch["prompt"]).input_ids
        answers = tokenizer(batch["answer"], add_special_tokens=False).input_ids
        return {
            "input_ids": [(p + a + [eos])[:LENGTH] for p, a in zip(prompts, answers, strict=True)],
            "labels": [
                ([-100] * len(p) + a + [eos])[:LENGTH]
                for p, a in zip(prompts, answers, strict=True)
            ],
        }

    with tempfile.TemporaryDirectory() as folder, Clock() as clock:
        encoded = rows.map(
            encode if batched else encode_one,
            batched=batched,
            num_proc=workers or None,
            remove_columns=["prompt", "answer"],
            cache_file_name=f"{folder}/encoded.arrow",
            load_from_cache_file=False,
        )
        tokens, order = 0, np.random.default_rng(0).permutation(len(encoded))
        for i in range(0, len(order), BATCH):
            batch = encoded[order[i : i + BATCH].tolist()]
            longest = max(map(len, batch["input_ids"]))
            ids, labels = (
                np.zeros((BATCH, longest), np.int32),
                np.full((BATCH, longest), -100, np.int32),
            )
            for r, (row, label) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
                ids[r, : len(row)], labels[r, : len(row)] = row, label
                tokens += len(row)
    return tokens, clock


def time_quickstart(config_file: Path) -> dict[str, float]:
    """Tokens per second of the quickstart's pretraining step, and of its pipeline alone."""
    from crossin_jax.cli import load_config_file
    from crossin_jax.data.loader import make_loader
    from crossin_jax.data.pipeline import open_pipeline

    with tempfile.TemporaryDirectory() as folder:
        config = load_config_file(f"{config_file}:pretrain")
        config.output_dir, config.train.steps, config.train.log_every = folder, 60, 20
        data = open_pipeline(config)
        loader = make_loader(
            data.mixture, data.renderer, config.data, batch_size=config.train.batch_size, seed=0
        )
        slots = config.train.batch_size * config.data.length
        start = time.perf_counter()
        for _ in range(1000):  # the whole of its pretraining
            next(loader)
        pipeline = 1000 * slots / (time.perf_counter() - start)
        code = (
            "import sys, time\nfrom crossin_jax import cli, train\n"
            "config = cli.load_config_file(sys.argv[1])\nconfig.output_dir = sys.argv[2]\n"
            "config.train.steps, config.train.log_every = int(sys.argv[3]), 1000\n"
            "start = time.perf_counter()\ntrain.train(config)\nprint('SECONDS', "
            "time.perf_counter() - start)\n"
        )
        seconds = []
        for steps in (50, 250):  # their difference leaves out compilation and start
            command = [
                sys.executable,
                "-c",
                code,
                f"{config_file}:pretrain",
                f"{folder}/{steps}",
                str(steps),
            ]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds.append(float(out.split("SECONDS")[1]))
        return {"pipeline": pipeline, "step": 200 * slots / (seconds[1] - seconds[0])}


def measure_memory(rows: int) -> dict[str, float]:
    """MiB that opening a corpus of many parallel rows and reading some of it adds, in a fresh
    process; and its size.
    """
    code = """
import json, os, resource, sys
from crossin_jax.config import Component, Data, Source
from crossin_jax.data import corpus
from crossin_jax.data.mixture import Mixture
import pyarrow, numpy, tqdm
def used(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) / 1024
before = used()
found = corpus.load_corpus(Source(name='big', path=sys.argv[1]), ('en', 'es'), cache=sys.argv[2])
opened = used()
components = (Component(kind='x2x', source='big'),)
data = Data(sources=(Source(name='big'),), components=components, languages=('en', 'es'))
mixture = Mixture(data, {'big': found}, 0)
mixture.take(numpy.arange(20_000))
print(json.dumps({'rows': len(found), 'open_mib': opened - before, 'mixture_mib': used() - before}))
"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "big.jsonl"
        filler = "The quick brown fox jumps over the lazy dog. " * 8
        with open(path, "w") as file:
            for i in range(rows):
                row = {
                    code: {"instruction": f"{i} {filler}", "output": f"{code} {i}"}
                    for code in ("en", "es")
                }
                file.write(json.dumps({"id": f"row-{i}", **row}) + "\n")
        size, report = path.stat().st_size / 2**20, {}
        for name in ("first", "cached"):  # the first opening converts, later ones map
            start = time.perf_counter()
            command = [sys.executable, "-c", code, str(path), folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            report[name] = json.loads(done.stdout) | {"seconds": time.perf_counter() - start}
        return report | {"file_mib": size}


def compare(parts, workers: int, options) -> dict[str, dict[str, float]]:
    """Speeds of the systems, printed and returned."""
    systems = {
        "ours": lambda n: time_ours(parts, n),
        "map": lambda n: time_peer(parts, n, workers, False),
        "batched map": lambda n: time_peer(parts, n, workers, True),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for _ in range(options.repeats):
        for name, system in systems.items():
            (less, short), (more, long) = system(1), system(1 + options.epochs)
            found[name].append(
                ((more - less) / (long.wall - short.wall), (more - less) / (long.cpu - short.cpu))
            )
    report = {}
    for name, values in found.items():
        wall, cpu = max(w for w, _ in values), max(c for _, c in values)
        report[name] = {"tokens_per_second": wall, "tokens_per_cpu_second": cpu}
        print(
            f"{workers} workers, {name:<12} {wall:>12,.0f} tokens/s {cpu:>12,.0f} tokens per CPU "
            "second",
            flush=True,
        )
    return report


def main() -> None:
    """Runs what was asked and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = Path(__file__).resolve().parents[1]
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data")
    parser.add_argument("--tokenizer", default=None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    folder = options.tokenizer or str(options.data / "tokenizers" / "llama2")
    for workers in sorted({0, options.workers}) if options.repeats else ():
        report[f"workers={workers}"] = compare(
            make_parts(options.data, folder, workers), workers, options
        )
    if options.step:
        report["quickstart"] = found = time_quickstart(root / "configs" / "quickstart.py")
        print(
            f"quickstart: pipeline {found['pipeline']:,.0f} tokens/s, training step "
            f"{found['step']:,.0f} tokens/s, ratio {found['pipeline'] / found['step']:.1f}",
            flush=True,
        )
    if options.rows:
        report["memory"] = found = measure_memory(options.rows)
        for name in ("first", "cached"):
            entry = found[name]
            print(
                f"{options.rows:,} rows, {found['file_mib']:,.0f} MiB of JSON, {name} opening: "
                f"{entry['seconds']:.0f} s, {entry['open_mib']:.0f} MiB; with the mixture "
                f"{entry['mixture_mib']:.0f} MiB"
            )
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
