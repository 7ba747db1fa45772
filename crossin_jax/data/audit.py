"""What a mixture holds, before a TPU hour is spent: lengths, languages, duplicates and benchmark leakage."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crossin_jax.config import Data
from crossin_jax.data.corpus import Corpus, hash_key
from crossin_jax.data.crosslingual import Example
from crossin_jax.data.langid import identify
from crossin_jax.data.leakage import Leak, LeakIndex, list_passages
from crossin_jax.data.mixture import Mixture
from crossin_jax.data.packing import pack_rows, shorten_input
from crossin_jax.data.prompts import Renderer, RowFault

CHUNK = 2048
UNSPACED = ("zh", "th")  # languages written without spaces have no words to count
FERTILITY_ROWS = 500  # records per source whose texts are measured
SHOWN = 20  # leaks and duplicates that a report names


def audit(mixture: Mixture, renderer: Renderer, data: Data, benchmarks: Sequence = (), *,
          limit: int | None = None) -> dict[str, Any]:
    """Reads one epoch (or its first `limit` examples) as training would and reports on it (JSON types)."""
    count = min(len(mixture), limit or len(mixture))
    index = LeakIndex(list_passages(benchmarks))
    groups: dict[tuple[str, str, str], Counter] = defaultdict(Counter)
    lengths: dict[str, list[int]] = defaultdict(list)
    sides: dict[str, dict[str, Counter]] = {"prompt": defaultdict(Counter), "answer": defaultdict(Counter)}
    leaks: dict[tuple, tuple[Leak, str, str]] = {}
    seen: Counter[int] = Counter()
    scanned: set[int] = set()
    refused: dict[str, list[str]] = defaultdict(list)
    for start in tqdm(range(0, count, CHUNK), desc="audit", unit=" chunks", delay=2):
        examples = mixture.take(np.arange(start, min(start + CHUNK, count)))
        for example, rendered in zip(examples, renderer.render_many(examples), strict=True):
            group = groups[example.component, example.prompt_language, example.answer_language]
            group["examples"] += 1
            seen[hash_key("\0".join((example.instruction, example.input, example.output)))] += 1
            if isinstance(rendered, RowFault):
                group["refused"] += 1
                refused[rendered.reason].append(example.id)
                continue
            if len(rendered.ids) - 1 > data.length:
                group["over-long"] += 1
                short = shorten_input(example, renderer, data.length) if data.over_long == "shorten_input" else None
                group["shortened" if short else "dropped"] += 1
                if not short:
                    continue
                rendered = short
            group["tokens"] += len(rendered.ids) - 1
            group["learned"] += int(rendered.learned[1:].sum())
            lengths[example.component].append(len(rendered.ids) - 1)
            _check_languages(example, data.languages, sides)
            _find_leaks(example, index, scanned, leaks)
    return {"mixture": mixture.manifest()["hash"], "template": renderer.hash, "examples": count, "length": data.length,
            "over_long": data.over_long, "components": _list_groups(groups), "lengths": _summarize(lengths),
            "packing": _measure_packing([n for values in lengths.values() for n in values], data.length),
            "fertility": measure_fertility(mixture.corpora, renderer),
            "languages": {side: {code: dict(found.most_common()) for code, found in sorted(counts.items())}
                          for side, counts in sides.items()},
            "duplicates": {"examples": sum(n - 1 for n in seen.values()), "texts": sum(n > 1 for n in seen.values())},
            "refused": {reason: {"examples": len(ids), "first": ids[:SHOWN]} for reason, ids in refused.items()},
            "dropped_rows": {name: dict(corpus.dropped) for name, corpus in mixture.corpora.items() if corpus.dropped},
            "leakage": _list_leaks(leaks, benchmarks)}


def _check_languages(example: Example, candidates: Sequence[str], sides: dict[str, dict[str, Counter]]) -> None:
    """Counts what language each side of a pair seems to be in; "unclear" where the text says too little."""
    prompt = example.input if example.component.split(":")[0] == "trans" else (
        f"{example.instruction}\n{example.input.removesuffix(f'[{example.answer_language}]')}")
    if prompt.strip():
        sides["prompt"][example.prompt_language][identify(prompt, candidates) or "unclear"] += 1
    sides["answer"][example.answer_language][identify(example.output, candidates) or "unclear"] += 1


def _find_leaks(example: Example, index: LeakIndex, scanned: set[int], leaks: dict) -> None:
    """Looks for benchmark passages in each text of an example, once per distinct text; keeps the strongest find."""
    for side, text in (("prompt", example.instruction), ("prompt", example.input), ("answer", example.output)):
        key = hash_key(text)
        if not index.passages or key in scanned:
            continue
        scanned.add(key)
        for leak in index.find(text):
            if leak.passage not in leaks or leaks[leak.passage][0].share < leak.share:
                leaks[leak.passage] = leak, side, example.id


def _list_groups(groups: dict[tuple[str, str, str], Counter]) -> list[dict[str, Any]]:
    tokens, learned = (max(1, sum(group[name] for group in groups.values())) for name in ("tokens", "learned"))
    return [{"component": component, "prompt": prompt, "answer": answer, "examples": group["examples"],
             "tokens": group["tokens"], "learned": group["learned"], "token_share": group["tokens"] / tokens,
             "learned_share": group["learned"] / learned, "over_long": group["over-long"],
             "shortened": group["shortened"], "dropped": group["dropped"], "refused": group["refused"]}
            for (component, prompt, answer), group in sorted(groups.items())]


def _summarize(lengths: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Percentiles and a histogram of the tokens per example."""
    report = {}
    for component, values in sorted(lengths.items()):
        edges = np.unique(np.geomspace(min(values), max(values) + 1, 40).astype(int))
        report[component] = {"mean": float(np.mean(values)), **{f"p{q}": int(np.percentile(values, q))
                             for q in (5, 50, 95, 99)}, "max": max(values), "edges": edges.tolist(),
                             "counts": np.histogram(values, edges)[0].tolist()}
    return report


def _measure_packing(lengths: list[int], length: int) -> dict[str, float]:
    """Share of real tokens in packed rows, and in rows of one example each, over up to 20,000 examples."""
    sample = lengths[:20_000]
    rows = len(pack_rows(sample, length))
    return {"packed": sum(sample) / max(1, rows * length), "unpacked": sum(sample) / max(1, len(sample) * length),
            "examples_per_row": len(sample) / max(1, rows)}


def measure_fertility(corpora: dict[str, Corpus], renderer: Renderer) -> dict[str, dict[str, float | None]]:
    """Tokens per character, per UTF-8 byte and per word of each language, from the first records by hash order."""
    texts: dict[str, list[str]] = defaultdict(list)
    for corpus in corpora.values():
        for i in np.argsort(corpus.keys)[:FERTILITY_ROWS]:
            for code, text in corpus[int(i)].texts.items():
                texts[code] += [part for part in (text.instruction, text.input, text.output) if part]
    report = {}
    for code, parts in sorted(texts.items()):
        tokens = sum(renderer.count_tokens(parts))
        characters, data = sum(map(len, parts)), sum(len(part.encode()) for part in parts)
        words = None if code in UNSPACED else sum(len(part.split()) for part in parts)
        report[code] = {"tokens_per_character": tokens / characters, "tokens_per_byte": tokens / data,
                        "tokens_per_word": tokens / words if words else None, "texts": len(parts)}
    return report


def _list_leaks(leaks: dict, benchmarks: Sequence) -> dict[str, Any]:
    """Items touched and items mostly found, by benchmark and language, and the strongest finds."""
    report: dict[str, Any] = {}
    for benchmark in benchmarks:
        by_language = {}
        for code in benchmark.languages:
            mine = [leak for leak, _, _ in leaks.values()
                    if leak.passage.benchmark == benchmark.name and leak.passage.language == code]
            by_language[code] = {"items": len(benchmark.items), "touched": len({leak.passage.item for leak in mine}),
                                 "found": len({leak.passage.item for leak in mine if leak.share >= 0.5})}
        strongest = sorted((entry for entry in leaks.values() if entry[0].passage.benchmark == benchmark.name),
                           key=lambda entry: (-entry[0].share, entry[0].passage.item, entry[0].passage.language))
        report[benchmark.name] = {"languages": by_language, "strongest": [
            {"item": leak.passage.item, "language": leak.passage.language, "part": leak.passage.part, "kind": leak.kind,
             "share": round(leak.share, 3), "row": row, "side": side} for leak, side, row in strongest[:SHOWN]]}
    return report


# ---- Tables and figures

def to_markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    packing = report["packing"]
    lines = [f"# Audit of mixture {report['mixture']}", "", f"{report['examples']} examples, rows of "
             f"{report['length']} tokens, over-long: {report['over_long']}. Packed rows are {packing['packed']:.1%} "
             f"real tokens ({packing['examples_per_row']:.1f} examples per row), unpacked ones "
             f"{packing['unpacked']:.1%}. Repeated examples: {report['duplicates']['examples']}.", ""]
    lines += _table(("component", "pair", "examples", "tokens", "share", "learned", "share", "over-long", "shortened",
                     "dropped", "refused"),
                    [(g["component"], f"{g['prompt']} → {g['answer']}", g["examples"], g["tokens"],
                      f"{g['token_share']:.1%}", g["learned"], f"{g['learned_share']:.1%}", g["over_long"],
                      g["shortened"], g["dropped"], g["refused"]) for g in report["components"]])
    lines += _table(("component", "mean tokens", "5 %", "median", "95 %", "99 %", "longest"),
                    [(name, f"{v['mean']:.0f}", v["p5"], v["p50"], v["p95"], v["p99"], v["max"])
                     for name, v in report["lengths"].items()])
    lines += _table(("language", "tokens per character", "per byte", "per word"),
                    [(code, f"{v['tokens_per_character']:.3f}", f"{v['tokens_per_byte']:.3f}",
                      f"{v['tokens_per_word']:.2f}" if v["tokens_per_word"] else "–")
                     for code, v in report["fertility"].items()])
    lines += _table(("side", "language", "as such", "as another", "unclear"),
                    [(side, code, found.get(code, 0), ", ".join(f"{other} {n}" for other, n in found.items()
                      if other not in (code, "unclear")) or 0, found.get("unclear", 0))
                     for side, counts in report["languages"].items() for code, found in counts.items()])
    for name, leak in report["leakage"].items():
        lines += _table((f"leakage: {name}", "items", "touched", "half or more found"),
                        [(code, v["items"], v["touched"], v["found"]) for code, v in leak["languages"].items()])
        lines += [f"- {e['language']} {e['item']} ({e['part']}): {e['share']:.0%} by {e['kind']}, in the {e['side']} "
                  f"of row {e['row']}" for e in leak["strongest"]] + [""]
    for reason, entry in report["refused"].items():
        lines.append(f"Refused, {reason}: {entry['examples']} ({', '.join(entry['first'][:5])})")
    for name, dropped in report["dropped_rows"].items():
        lines.append(f"Dropped from {name}: {', '.join(f'{n} {reason}' for reason, n in dropped.items())}")
    return "\n".join(lines) + "\n"


def _table(head: tuple, rows: list[tuple]) -> list[str]:
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]

    def line(row: tuple) -> str:
        return "| " + " | ".join(str(v).ljust(w) if i < 2 else str(v).rjust(w)
                                 for i, (v, w) in enumerate(zip(row, widths, strict=True))) + " |"
    return [line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows), ""]


def draw(report: dict[str, Any], path: Path) -> None:
    """Four panels: token shares, lengths, fertility and leakage, as one PNG."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 8), layout="constrained")
    shares, lengths, fertility, leakage = figure.subplots(2, 2).flat
    names = [f"{g['component']} → {g['answer']}" for g in report["components"]]
    totals: dict[str, list[float]] = {}
    for name, group in zip(names, report["components"], strict=True):
        entry = totals.setdefault(name, [0.0, 0.0])
        entry[0] += group["token_share"]
        entry[1] += group["learned_share"]
    places = np.arange(len(totals))
    for k, label in enumerate(("all tokens", "learned tokens")):
        shares.barh(places + 0.4 * k, [100 * entry[k] for entry in totals.values()], 0.4, label=label)
    shares.set_yticks(places + 0.2, list(totals))
    shares.set(xlabel="share of a batch, %", title="What a batch holds")
    shares.legend()
    for name, values in report["lengths"].items():
        lengths.stairs(values["counts"], values["edges"], label=name)
    lengths.axvline(report["length"], color="black", linestyle=":", label="row length")
    lengths.set(xscale="log", xlabel="tokens per example", ylabel="examples", title="Lengths")
    lengths.legend()
    fertility.bar(list(report["fertility"]), [v["tokens_per_character"] for v in report["fertility"].values()])
    fertility.set(ylabel="tokens per character", title="Fertility of the tokenizer")
    found = [(f"{name} {code}", 100 * v["touched"] / v["items"]) for name, leak in report["leakage"].items()
             for code, v in leak["languages"].items()]
    leakage.barh([name for name, _ in found], [share for _, share in found])
    leakage.set(xlabel="items touched, %", xlim=(0, max([5.0, *(1.1 * share for _, share in found)])),
                title="Leakage" if found else "Leakage: no benchmarks configured")
    figure.savefig(path, dpi=120)
