"""Measures a mixture before training: lengths, languages, duplicates and benchmark leakage."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from crossin_jax.config import Data
from crossin_jax.data.corpus import Corpus, hash_key
from crossin_jax.data.kinds import KINDS, Example
from crossin_jax.data.langid import identify
from crossin_jax.data.mixture import Mixture
from crossin_jax.data.packing import pack_rows, shorten_input
from crossin_jax.data.prompts import Rendered, Renderer, RowFault
from crossin_jax.data.records import ANSWERING
from crossin_jax.languages import is_spaced
from crossin_jax.prepare.leakage import Leak, LeakIndex, list_passages

# examples that are rendered at once
CHUNK = 2048
# records per source whose texts are measured
FERTILITY_ROWS = 500
# examples from whose lengths the filling of rows is computed
PACKING_ROWS = 20_000
# leaks and refused rows that a report names
FOUND = 0.5  # share of a passage from which it counts as found
MAX_LISTED = 20


def audit(
    mixture: Mixture,
    renderer: Renderer,
    data: Data,
    benchmarks: Sequence = (),
    *,
    limit: int | None = None,
) -> dict[str, Any]:
    """Reads one epoch, or its first `limit` examples, as training would; reports in JSON types."""
    count = min(len(mixture), limit or len(mixture))
    counts = _Counts(renderer, data, benchmarks)
    for start in tqdm(range(0, count, CHUNK), desc="audit", unit=" chunks", delay=2):
        examples = mixture.take(np.arange(start, min(start + CHUNK, count)))
        for example, rendered in zip(examples, renderer.render_many(examples), strict=True):
            counts.add(example, rendered)
    return {
        "mixture": mixture.manifest()["hash"],
        "template": renderer.hash,
        "examples": count,
        "length": data.length,
        "over_long": data.over_long,
        **counts.report(),
        "fertility": measure_fertility(mixture.corpora, renderer),
        "english_requests": mixture.count_english_requests(),
        "dropped_rows": {
            name: dict(corpus.dropped) for name, corpus in mixture.corpora.items() if corpus.dropped
        },
        "ignored": mixture.manifest().get("ignored", {}),
    }


class _Counts:
    """What one pass over the examples of a mixture counts."""

    def __init__(self, renderer: Renderer, data: Data, benchmarks: Sequence):
        self.renderer, self.data, self.benchmarks = renderer, data, benchmarks
        self.index = LeakIndex(list_passages(benchmarks))
        # by (component, language of the prompt, language of the answer)
        self.groups: dict[tuple[str, str, str], Counter] = defaultdict(Counter)
        self.lengths: dict[str, list[int]] = defaultdict(list)
        # {"prompt" or "answer": {the language that it should be in: languages that it seems to be
        # in}}
        self.languages: dict[str, dict[str, Counter]] = {
            "prompt": defaultdict(Counter),
            "answer": defaultdict(Counter),
        }
        self.repeats: Counter[int] = Counter()  # by a hash of the example's texts
        self.refused: dict[str, list[str]] = defaultdict(list)
        self.scanned: set[int] = set()  # hashes of texts in which leaks have been looked for
        self.leaks: dict[tuple, tuple[Leak, str, str]] = {}  # passage → (leak, side, row)

    def add(self, example: Example, rendered: Rendered | RowFault) -> None:
        """Counts one example; tokens, languages and leaks only if training would use it."""
        group = self.groups[example.component, example.prompt_language, example.answer_language]
        group["examples"] += 1
        texts = (example.instruction, example.input, example.output)
        self.repeats[hash_key("\0".join(texts))] += 1
        if isinstance(rendered, RowFault):
            group["refused"] += 1
            self.refused[rendered.reason].append(example.id)
            return
        # A row holds the tokens except the last one: that one is only a target.
        if len(rendered.ids) - 1 > self.data.length:
            group["over_long"] += 1
            shortens = self.data.over_long == "shorten_input"
            rendered = shortens and shorten_input(example, self.renderer, self.data.length)
            group["shortened" if rendered else "dropped"] += 1
            if not rendered:
                return
        group["tokens"] += len(rendered.ids) - 1
        group["learned"] += int(rendered.loss_mask[1:].sum())
        self.lengths[example.component].append(len(rendered.ids) - 1)
        self._count_languages(example)
        self._find_leaks(example)

    def _count_languages(self, example: Example) -> None:
        """Counts the language that each side seems to be in; "unclear" if the text is too short."""
        if KINDS[example.component.split(":")[0]].own_request:
            prompt = example.input
        else:
            tag = f"[{example.answer_language}]"
            prompt = f"{example.instruction}\n{example.input.removesuffix(tag)}"
        for side, language, text in (
            ("prompt", example.prompt_language, prompt),
            ("answer", example.answer_language, example.output),
        ):
            if text.strip():
                seen = identify(text, language) or "unclear"
                self.languages[side][language][seen] += 1

    def _find_leaks(self, example: Example) -> None:
        """Looks for benchmark passages in each distinct text; keeps the strongest find of each."""
        if not self.index.passages:
            return
        turns = [
            ("answer" if role in ANSWERING else "prompt", text)
            for role, text in example.messages or ()
        ]
        for side, text in (
            ("prompt", example.instruction),
            ("prompt", example.input),
            ("answer", example.output),
            *turns,
        ):
            key = hash_key(text)
            if key in self.scanned:
                continue
            self.scanned.add(key)
            for leak in self.index.find(text):
                best = self.leaks.get(leak.passage)
                if best is None or best[0].share < leak.share:
                    self.leaks[leak.passage] = leak, side, example.id

    def report(self) -> dict[str, Any]:
        """The counts as JSON types."""
        every_length = [n for values in self.lengths.values() for n in values]
        return {
            "components": _list_groups(self.groups),
            "lengths": _summarize(self.lengths),
            "packing": _measure_packing(every_length, self.data.length),
            "languages": {
                side: {code: dict(found.most_common()) for code, found in sorted(counts.items())}
                for side, counts in self.languages.items()
            },
            "duplicates": {
                "examples": sum(n - 1 for n in self.repeats.values()),
                "texts": sum(n > 1 for n in self.repeats.values()),
            },
            "refused": {
                reason: {"examples": len(ids), "first": ids[:MAX_LISTED]}
                for reason, ids in self.refused.items()
            },
            "leakage": {
                benchmark.name: _list_leaks(benchmark, self.leaks.values())
                for benchmark in self.benchmarks
            },
        }


def _list_groups(groups: dict[tuple[str, str, str], Counter]) -> list[dict[str, Any]]:
    """By component and language pair: counts, and shares of all tokens and of the learned ones."""
    tokens, learned = (
        max(1, sum(group[name] for group in groups.values())) for name in ("tokens", "learned")
    )
    return [
        {"component": component, "prompt": prompt, "answer": answer}
        | {name: group[name] for name in ("examples", "tokens", "learned")}
        | {"token_share": group["tokens"] / tokens, "learned_share": group["learned"] / learned}
        | {name: group[name] for name in ("over_long", "shortened", "dropped", "refused")}
        for (component, prompt, answer), group in sorted(groups.items())
    ]


def _summarize(lengths: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Percentiles and a histogram of the tokens per example."""
    report = {}
    for component, values in sorted(lengths.items()):
        # Bins of a logarithmic scale. Among small numbers, several edges are the same integer.
        edges = np.unique(np.geomspace(min(values), max(values) + 1, 40).astype(int))
        report[component] = {
            "mean": float(np.mean(values)),
            **{f"p{q}": int(np.percentile(values, q)) for q in (5, 50, 95, 99)},
            "max": max(values),
            "edges": edges.tolist(),
            "counts": np.histogram(values, edges)[0].tolist(),
        }
    return report


def _measure_packing(lengths: list[int], length: int) -> dict[str, float]:
    """Share of real tokens in packed rows, and in rows of one example each."""
    sample = lengths[:PACKING_ROWS]
    rows = len(pack_rows(sample, length))
    return {
        "packed": sum(sample) / max(1, rows * length),
        "unpacked": sum(sample) / max(1, len(sample) * length),
        "examples_per_row": len(sample) / max(1, rows),
    }


def measure_fertility(
    corpora: dict[str, Corpus], renderer: Renderer
) -> dict[str, dict[str, float | None]]:
    """Tokens per character, per UTF-8 byte and per word of each language.

    The sample is the first records in the order of their hashes, whatever the order of the file.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for corpus in corpora.values():
        for i in np.argsort(corpus.keys)[:FERTILITY_ROWS]:
            for code, text in corpus[int(i)].texts.items():
                texts[code] += [
                    part for part in (text.instruction, text.input, text.output) if part
                ]
    report = {}
    for code, parts in sorted(texts.items()):
        tokens = sum(renderer.count_tokens(parts))
        characters, data = sum(map(len, parts)), sum(len(part.encode()) for part in parts)
        # a language that is written without spaces has no words to count
        words = sum(len(part.split()) for part in parts) if is_spaced(code) else None
        report[code] = {
            "tokens_per_character": tokens / characters,
            "tokens_per_byte": tokens / data,
            "tokens_per_word": tokens / words if words else None,
            "texts": len(parts),
        }
    return report


def _list_leaks(benchmark: Any, leaks: Iterable[tuple[Leak, str, str]]) -> dict[str, Any]:
    """Items of a benchmark that were touched or found, by language, and the strongest finds."""
    mine = [entry for entry in leaks if entry[0].passage.benchmark == benchmark.name]
    by_language = {}
    for code in benchmark.languages:
        found = [leak for leak, _, _ in mine if leak.passage.language == code]
        by_language[code] = {
            "items": len(benchmark.items),
            "touched": len({leak.passage.item for leak in found}),
            "found": len({leak.passage.item for leak in found if leak.share >= FOUND}),
        }
    mine.sort(key=lambda entry: (-entry[0].share, entry[0].passage.item, entry[0].passage.language))
    strongest = [
        {
            "item": leak.passage.item,
            "language": leak.passage.language,
            "part": leak.passage.part,
            "kind": leak.kind,
            "share": round(leak.share, 3),
            "row": row,
            "side": side,
        }
        for leak, side, row in mine[:MAX_LISTED]
    ]
    # Two questions on one paragraph share its text, so that an item may be known without its
    # question.
    shared = {
        leak.passage.item: row
        for leak, _, row in reversed(mine)
        if leak.passage.part == "context" and leak.share >= FOUND
    }
    contexts = {
        "items": sum(any(v.context for v in item.versions.values()) for item in benchmark.items),
        "in_training": len(shared),
        "first": [{"item": item, "row": row} for item, row in [*shared.items()][:MAX_LISTED]],
    }
    return {"languages": by_language, "strongest": strongest, "contexts": contexts}
