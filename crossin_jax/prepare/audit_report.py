"""The report of an audit: tables as text or Markdown, and one figure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crossin_jax.tables import Table, render_parts


def to_markdown(report: dict[str, Any]) -> str:
    """The report as Markdown, for audit.md."""
    lines, _ = render_parts("markdown", list_parts(report))
    return f"# Audit of mixture {report['mixture']}\n\n" + "\n".join(lines)


def list_parts(report: dict[str, Any]) -> Iterator[str | Table]:
    """The tables of a report and the lines between them, for `tables.print_parts`."""
    packing = report["packing"]
    yield (
        f"{report['examples']} examples, rows of {report['length']} tokens, "
        f"over-long: {report['over_long']}. Packed rows are {packing['packed']:.1%} real tokens "
        f"({packing['examples_per_row']:.1f} examples per row), unpacked ones "
        f"{packing['unpacked']:.1%}. Repeated examples: {report['duplicates']['examples']}.\n"
    )
    for rows in (_components, _lengths, _fertility, _languages):
        yield Table(*rows(report), "<<>")
        yield ""
    for name, leakage in report["leakage"].items():
        yield Table(*_leakage(name, leakage), "<<>")
        for e in leakage["strongest"]:
            found = f"{e['share']:.0%} by {e['kind']}, in the {e['side']} of row {e['row']}"
            yield f"- {e['language']} {e['item']} ({e['part']}): {found}"
        yield ""
        contexts = leakage["contexts"]
        if contexts["in_training"]:
            first = contexts["first"][0]
            yield (
                f"{contexts['in_training']} of {contexts['items']} items of {name} ask about a "
                "context "
                f"that training rows hold, e.g. item {first['item']} in row {first['row']}. Split "
                "the "
                "source by group, e.g. fields={'group': 'paragraph'}, to keep contexts apart.\n"
            )
    if report["english_requests"]:
        counts = ", ".join(f"{code} {n}" for code, n in report["english_requests"].items())
        yield f"Asked in English, because the prompt's language has no sentence for it: {counts}"
    for reason, entry in report["refused"].items():
        yield f"Refused, {reason}: {entry['examples']} ({', '.join(entry['first'][:5])})"
    for name, dropped in report["dropped_rows"].items():
        reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        yield f"Dropped from {name}: {reasons}"
    for name, ignored in report["ignored"].items():
        counts = ", ".join(f"{what} ({n} rows)" for what, n in ignored.items())
        yield f"Not read from {name}: {counts}"
    yield ""


# ---- Each table as (head, rows)


def _components(report: dict[str, Any]) -> tuple[tuple, list[tuple]]:
    counts = ("over_long", "shortened", "dropped", "refused")
    head = ("component", "pair", "examples", "tokens", "of tokens", "learned", "of learned")
    rows = [
        (
            group["component"],
            f"{group['prompt']} → {group['answer']}",
            group["examples"],
            group["tokens"],
            f"{group['token_share']:.1%}",
            group["learned"],
            f"{group['learned_share']:.1%}",
            *(group[name] for name in counts),
        )
        for group in report["components"]
    ]
    return (*head, "over-long", *counts[1:]), rows


def _lengths(report: dict[str, Any]) -> tuple[tuple, list[tuple]]:
    head = ("component", "mean tokens", "5 %", "median", "95 %", "99 %", "longest")
    names = ("p5", "p50", "p95", "p99", "max")
    rows = [
        (component, f"{values['mean']:.0f}", *(values[name] for name in names))
        for component, values in report["lengths"].items()
    ]
    return head, rows


def _fertility(report: dict[str, Any]) -> tuple[tuple, list[tuple]]:
    rows = [
        (
            code,
            f"{v['tokens_per_character']:.3f}",
            f"{v['tokens_per_byte']:.3f}",
            f"{v['tokens_per_word']:.2f}" if v["tokens_per_word"] else "–",
        )
        for code, v in report["fertility"].items()
    ]
    return ("language", "tokens per character", "per byte", "per word"), rows


def _languages(report: dict[str, Any]) -> tuple[tuple, list[tuple]]:
    rows = []
    for side, counts in report["languages"].items():
        for code, found in counts.items():
            others = [f"{name} {n}" for name, n in found.items() if name not in (code, "unclear")]
            row = found.get(code, 0), ", ".join(others) or 0, found.get("unclear", 0)
            rows.append((side, code, *row))
    return ("side", "language", "as such", "as another", "unclear"), rows


def _leakage(name: str, leakage: dict[str, Any]) -> tuple[tuple, list[tuple]]:
    rows = [
        (code, v["items"], v["touched"], v["found"]) for code, v in leakage["languages"].items()
    ]
    return (f"leakage: {name}", "items", "touched", "half or more found"), rows


# ---- The figure


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
        shares.barh(
            places + 0.4 * k, [100 * entry[k] for entry in totals.values()], 0.4, label=label
        )
    shares.set_yticks(places + 0.2, list(totals))
    shares.set(xlabel="share of a batch, %", title="What a batch holds")
    shares.legend()
    for name, values in report["lengths"].items():
        lengths.stairs(values["counts"], values["edges"], label=name)
    lengths.axvline(report["length"], color="black", linestyle=":", label="row length")
    lengths.set(xscale="log", xlabel="tokens per example", ylabel="examples", title="Lengths")
    lengths.legend()
    fertility.bar(
        list(report["fertility"]), [v["tokens_per_character"] for v in report["fertility"].values()]
    )
    fertility.set(ylabel="tokens per character", title="Fertility of the tokenizer")
    found = [
        (f"{name} {code}", 100 * v["touched"] / v["items"])
        for name, leak in report["leakage"].items()
        for code, v in leak["languages"].items()
    ]
    leakage.barh([name for name, _ in found], [share for _, share in found])
    leakage.set(
        xlabel="items touched, %",
        xlim=(0, max([5.0, *(1.1 * share for _, share in found)])),
        title="Leakage" if found else "Leakage: no benchmarks configured",
    )
    figure.savefig(path, dpi=120)
