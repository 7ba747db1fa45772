"""How well the language of an answer is told, and whether pass rates equal the published ones, on
real answers.

    python benchmarks/language_confusion.py [--data ../shared/data] [--peer]

Reads the published answers of three models (language_confusion/MODEL.jsonl.gz). First table: of the
answers that fastText's lid.176 puts into one of the candidate languages, how many `detect` puts
there too; of those that it puts elsewhere, how many `detect` takes for a candidate. `--peer` prints
the same for py3langid, if it is installed. Then the pass rates are compared with expected.json,
line by line.
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from crossin_jax.data.langid import detect, find_labels
from crossin_jax.evaluation.confusion import measure_groups
from crossin_jax.tables import format_table

CANDIDATES = ("en", "zh", "vi", "es", "id")
RATES = {"acc": "line_accuracy", "lpr": "line_pass", "wpr": "word_pass"}


def read_answers(folder: Path) -> Iterator[tuple[str, dict]]:
    """(model, row) of every published answer."""
    for path in sorted(folder.glob("*-*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield path.name.removesuffix(".jsonl.gz"), json.loads(line)


def compare(texts: Sequence[str], references: Sequence[str], tell: Callable[[str], str | None]):
    """(agreement in the candidates, others taken for a candidate, cannot be told, answers per
    second).
    """
    start = time.perf_counter()
    found = [tell(text) for text in texts]
    seconds = time.perf_counter() - start
    inside = [(a, b) for a, b in zip(references, found, strict=True) if a in CANDIDATES]
    outside = [b for a, b in zip(references, found, strict=True) if a not in CANDIDATES]
    return (
        f"{sum(a == b for a, b in inside) / len(inside):.2%} of {len(inside)}",
        f"{sum(b in CANDIDATES for b in outside) / len(outside):.2%} of {len(outside)}",
        f"{found.count(None) / len(found):.2%}",
        f"{len(texts) / seconds:,.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--peer", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.data.expanduser() / "language_confusion"
    answers = list(read_answers(folder))
    texts = [row["completion"] for _, row in answers if row["completion"].strip()]
    references = [find_labels(text)[0][0] for text in texts]
    rows = [("detect", *compare(texts, references, detect))]
    if arguments.peer:
        import py3langid

        rows.append(
            ("py3langid", *compare(texts, references, lambda text: py3langid.classify(text)[0]))
        )
    head = ("", "agreement in the candidates", "others taken for one", "not told", "per second")
    print("\n".join(format_table([head, *rows])))

    expected = json.loads((folder / "expected.json").read_text())
    measured = measure_groups(
        ((model, row["task"], row["source"]), row["language"], row["completion"])
        for model, row in answers
        if row["language"] != "ja"  # left out in expected.json: the paper splits it with fugashi
    )
    differ = [
        f"{key} {name}: {value}, published {published.get(name)}"
        for key, published in expected.items()
        for name, rate in RATES.items()
        if (value := getattr(measured[tuple(key.split("|"))], rate)) != published.get(name)
        and (value is None or name not in published or abs(value - published[name]) > 1e-6)
    ]
    print(f"\npass rates: {len(expected)} lines, {len(differ)} values differ from the published")
    print("\n".join(differ))


if __name__ == "__main__":
    main()
