"""The report as one HTML page that needs nothing else: no network, no fonts, no libraries.

The template report.html holds style and script; here its parts are filled. Texts of benchmarks and models are escaped,
or sit in a JSON island that the script shows by `textContent` only.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import combinations
from typing import Any

from crossin_jax.evaluation.benchmarks import Benchmark
from crossin_jax.evaluation.figures import NUM_COLOURS, Bar, colour, draw_bars, draw_dots, draw_heat, number
from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.evaluation.readings import Reading
from crossin_jax.evaluation.summary import Block, Estimate, Run
from crossin_jax.evaluation.wording import (
    MODES_IN_WORDS,
    describe_score,
    language_code,
    language_name,
    method_name,
    percent,
)

MAX_ITEMS = 200  # shown in the explorer
MAX_TEXT, MAX_CONTEXT = 400, 1200  # characters of an answer, of a context
MAX_EXAMPLES = 3  # unreadable answers per arm, language and reason
REASONS = {"tie": "tie", "empty": "empty", "unreadable": "not read", "too_long": "question too long"}


def build_page(title: str, blocks: Sequence[Block], runs: Sequence[Run], texts: dict[str, Benchmark], mode: Mode,
               provenance: dict[str, Any]) -> str:
    """The whole page; `texts` are benchmarks by name, for the questions."""
    arms = list(dict.fromkeys(row.arm for block in blocks for row in block.rows))
    colours = {arm: i for i, arm in enumerate(arms)}
    names = list(dict.fromkeys(block.benchmark for block in blocks))
    sections = [_benchmark_section(i, name, [b for b in blocks if b.benchmark == name], colours)
                for i, name in enumerate(names)]
    languages = list(dict.fromkeys(code for block in blocks for code in block.languages))
    seeds = sorted({run.seed for run in runs})
    facts = [f"{len(dict.fromkeys(run.name for run in runs))} models", f"{len(names)} benchmarks",
             f"{len(languages)} languages", f"{len(seeds)} seeds"]
    parts = {
        "title": escape(title),
        "facts": " · ".join(fact[:-1] if fact.startswith("1 ") else fact for fact in facts),
        "links": "".join(f'<a href="#b{i}">{escape(name)}</a>' for i, name in enumerate(names)),
        "legend": "".join(f'<span class="chip"><i style="background:{colour(i)}"></i>{escape(arm)}</span>'
                          for arm, i in colours.items()),
        "how_to_read": _how_to_read(blocks, mode),
        "sections": "".join(sections),
        "unread": _unread_section(blocks, runs),
        "provenance": _provenance_section(runs, provenance),
        "data": _island(_explorer_data(runs, texts, colours)),
    }
    page = files("crossin_jax.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    head, *rest = page.split("{{")
    out = [head]
    for piece in rest:  # in one pass, so that no text can be taken for a placeholder
        key, _, tail = piece.partition("}}")
        out += [parts[key], tail]
    return "".join(out)


def _island(value: Any) -> str:
    """JSON that cannot end its script element."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _how_to_read(blocks: Sequence[Block], mode: Mode) -> str:
    rows = [row for block in blocks for row in block.rows if not row.is_baseline]
    over_seeds = any(len(row.seeds) > 1 for row in rows)
    over_prompts = any(len(row.prompts) > 1 for row in rows)
    text = [MODES_IN_WORDS[mode],
            "Small figures: ± standard deviation over seeds." if over_seeds
            else "Small figures: 95 % interval, by resampling items with all their languages."]
    if over_prompts:
        text.append("Each score is the median over the prompts.")
    if len({row.arm for row in rows}) > 1:
        text.append(f"▲ ▼: above or below <b>{escape(rows[0].arm)}</b>, p &lt; 0.05 by a paired bootstrap over items"
                    + (", with the same sign in every seed." if over_seeds else "."))
    text.append("AC3 is the harmonic mean of accuracy and consistency: a model that always picks the same letter is "
                "consistent too, so read it beside the accuracy.")
    return "".join(f"<li>{line}</li>" for line in text)


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def _benchmark_section(index: int, name: str, blocks: list[Block], colours: dict[str, int]) -> str:
    first = blocks[0]
    languages = ", ".join(language_name(code) for code in first.languages)
    out = [f'<section id="b{index}"><h2>{escape(name)}</h2><p class="sub">{first.num_items} items in '
           f"{escape(languages)}; blind guessing scores {number(first.chance)}</p>"]
    for i, method in enumerate(dict.fromkeys(block.method for block in blocks)):
        same = [block for block in blocks if block.method == method]
        is_open = " open" if i == 0 else ""
        out.append(f'<div class="card"><h3>{escape(method_name(method).capitalize())}</h3>'
                   f"{_headline_table(same, colours)}"
                   f"<details{is_open}><summary>Figures</summary>{_figures(same, colours)}</details>"
                   f"<details><summary>All scores</summary>{_all_scores(same)}</details></div>")
    return "".join(out) + "</section>"


def _headline_table(blocks: list[Block], colours: dict[str, int]) -> str:
    names = blocks[0].headline
    heads = "".join(f'<th scope="col">{escape(describe_score(name))}</th>' for name in names)
    out = [f'<table class="scores"><thead><tr><th scope="col">model</th>{heads}</tr></thead>']
    for block in blocks:
        out.append("<tbody>")
        if len(blocks) > 1:
            what = f"items tagged “{escape(block.tag)}”" if block.tag else "all items"
            out.append(f'<tr class="group"><th colspan="{len(names) + 1}" scope="colgroup">{what} '
                       f"<small>({block.num_items})</small></th></tr>")
        for row in block.rows:
            cells = "".join(_score_cell(name, row.scores.get(name)) for name in names)
            hollow = ' class="hollow"' if row.is_baseline else ""
            hue = f"border-color:{colour(colours[row.arm])}" + ("" if row.is_baseline else
                                                                f";background:{colour(colours[row.arm])}")
            note = "<small>rule, no model</small>" if row.is_baseline else ""
            out.append(f'<tr{hollow}><th scope="row"><div class="name"><i style="{hue}"></i>'
                       f"<span>{escape(row.arm)}{note}</span></div></th>{cells}</tr>")
        out.append("</tbody>")
    return "".join(out) + "</table>"


def _score_cell(name: str, estimate: Estimate | None) -> str:
    label = escape(describe_score(name))
    if estimate is None:
        return f'<td data-label="{label}">–</td>'
    spread = f"± {number(estimate.sd)}" if estimate.sd is not None else \
        f"{number(estimate.low)} to {number(estimate.high)}"
    change, mark = estimate.change, ""
    if change is not None and change.clear:
        mark = '<em class="up">▲</em>' if change.difference > 0 else '<em class="down">▼</em>'
    return (f'<td data-label="{label}" title="{escape(_explain(estimate))}"><b>{number(estimate.value)}</b>{mark}'
            f'<small>{spread}</small><span class="bar">'
            f'<i style="width:{100 * estimate.value:.1f}%"></i></span></td>')


def _explain(estimate: Estimate) -> str:
    """What a score's tooltip says."""
    parts = [f"95 % interval over items {number(estimate.low)} to {number(estimate.high)}"]
    if estimate.least is not None and estimate.most is not None:
        parts.append(f"coins could make it {number(estimate.least)} to {number(estimate.most)}")
    if change := estimate.change:
        sign = "+" if change.difference >= 0 else ""
        parts.append(f"against the first model {sign}{number(change.difference)} "
                     f"[{number(change.low)}, {number(change.high)}], p = {change.p:.3g}")
    return "; ".join(parts)


def _all_scores(blocks: list[Block]) -> str:
    out = []
    for block in blocks:
        heads = "".join(f'<th scope="col">{escape(row.arm)}</th>' for row in block.rows)
        caption = f"<caption>items tagged “{escape(block.tag)}”</caption>" if block.tag else ""
        body = "".join(
            f'<tr><th scope="row">{escape(describe_score(name))}</th>' + "".join(
                _score_cell(row.arm, row.scores.get(name)) for row in block.rows) + "</tr>"
            for name in block.rows[0].scores)
        out.append(f'<table class="scores all">{caption}<thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody>'
                   f"</table>")
    return "".join(out)


def _figures(blocks: list[Block], colours: dict[str, int]) -> str:
    out = []
    for block in blocks:
        if block.tag:
            out.append(f"<h4>Only items tagged “{escape(block.tag)}”</h4>")
        out.append('<div class="panels">')
        for name in dict.fromkeys((block.headline[-1], "accuracy", *_consistency(block))):
            out.append(_bars(block, name, describe_score(name), colours))
        out.append("</div>")
        if len(block.languages) > 1:
            out.append('<h4>Accuracy by language</h4><div class="panels">')
            out += [_bars(block, f"accuracy/{code}", language_name(code), colours) for code in block.languages]
            out.append('</div><h4>Agreement of language pairs: share of items with the same choice</h4>'
                       '<div class="panels">')
            labels = [language_code(code) for code in block.languages]
            out += [draw_heat(row.arm, labels, row.agreement) for row in block.rows
                    if not row.is_baseline]
            out.append("</div>")
        if any(len(row.prompts) > 1 for row in block.rows):
            out.append('<h4>Spread over the prompts: a dot each, the tick is the median</h4><div class="panels">')
            out += [draw_dots(describe_score(name), list(_dots(block, name, colours)))
                    for name in dict.fromkeys(("accuracy", block.headline[-1]))]
            out.append("</div>")
    return "".join(out)


def _consistency(block: Block) -> list[str]:
    return [f"consistency_{block.size}"] if len(block.languages) > 1 else []


def _bars(block: Block, name: str, title: str, colours: dict[str, int]) -> str:
    bars = []
    for row in block.rows:
        if name in row.scores:
            e = row.scores[name]
            mark = "" if e.change is None or not e.change.clear else "▲" if e.change.difference > 0 else "▼"
            bars.append(Bar(row.arm, e.value, e.low, e.high, colours[row.arm], row.is_baseline, mark))
    return draw_bars(title, bars, chance=block.chance if name.startswith("accuracy") else None)


def _dots(block: Block, name: str, colours: dict[str, int]) -> Iterator[tuple[str, dict[str, float], float, int]]:
    for row in block.rows:
        if len(row.prompts) > 1:
            yield (row.arm, {f"prompt {prompt}": scores[name] for prompt, scores in row.prompts.items()},
                   row.scores[name].value, colours[row.arm])


# ── what could not be read ───────────────────────────────────────────────────────────────────────────────────────────

def _unread_section(blocks: Sequence[Block], runs: Sequence[Run]) -> str:
    written = [block for block in blocks if block.tag is None and (block.method == "generate" or any(
        share for row in block.rows if not row.is_baseline for shares in row.coin_share.values()
        for share in shares.values()))]
    if not written:
        return ("<p>Every choice was made by its log-likelihood: there was no text to read, and nothing is left to a "
                "coin.</p>")
    out = []
    for block in written:
        heads = "".join(f'<th scope="col">{escape(language_name(code))}</th>' for code in block.languages)
        body = "".join(f'<tr><th scope="row"><span>{escape(row.arm)}</span></th>' + "".join(
            _share_cell(language_name(code), row.coin_share.get(code, {})) for code in block.languages) + "</tr>"
            for row in block.rows if not row.is_baseline)
        out.append(f'<div class="card"><h3>{escape(block.benchmark)}, {escape(method_name(block.method))}</h3>'
                   f"<h4>Share of answers without one clear choice</h4>"
                   f'<table class="scores shares"><thead><tr><th scope="col">model</th>{heads}</tr></thead>'
                   f"<tbody>{body}</tbody></table>{_examples(block, runs)}{_readings_table(block, heads)}</div>")
    return "".join(out)


def _readings_table(block: Block, heads: str) -> str:
    """In which language the answers are, and what our own reader says."""
    rows = [row for row in block.rows if row.readings]
    if not rows:
        return ""

    def table(title: str, cell: Callable[[Reading], str]) -> str:
        body = "".join(f'<tr><th scope="row"><span>{escape(row.arm)}</span></th>' + "".join(
            f'<td data-label="{escape(language_name(code))}">{cell(row.readings[code])}</td>'
            for code in block.languages) + "</tr>" for row in rows)
        return (f'<h4>{title}</h4><table class="scores shares"><thead><tr><th scope="col">model</th>{heads}</tr>'
                f"</thead><tbody>{body}</tbody></table>")

    return table("Share of answers in another language than the question’s, of those whose language can be told",
                 lambda r: f"<b>{percent(r.off_target)}</b><small>told: {percent(r.identified)}</small>") + table(
        "Agreement of a second, stricter reader with SeaEval’s rules, where both find one choice",
        lambda r: f"<b>{percent(r.agreement)}</b><small>finds one: {percent(r.own_certain)}</small>")


def _share_cell(label: str, shares: dict[str, float]) -> str:
    parts = "".join(f"<small>{escape(REASONS.get(reason, reason))} {share:.1%}</small>"
                    for reason, share in shares.items() if share)
    return f'<td data-label="{escape(label)}"><b>{sum(shares.values()):.1%}</b>{parts}</td>'


def _examples(block: Block, runs: Sequence[Run]) -> str:
    shown: dict[tuple[str, str, str], list[str]] = {}
    for run in runs:
        for predictions in run.predictions:
            if (predictions.benchmark, predictions.method) != (block.benchmark, block.method):
                continue
            for item in predictions.items:
                for code, answer in item.answers.items():
                    found = shown.setdefault((run.name, code, answer.reason), [])
                    if len(answer.candidates) > 1 and answer.text and len(found) < MAX_EXAMPLES:
                        found.append(f'<li><span class="where">{escape(item.id)}</span> '
                                     f'<q dir="auto">{escape(_cut(answer.text, MAX_TEXT))}</q></li>')
    groups = [f"<h5>{escape(arm)}, {escape(language_name(code))}: {escape(REASONS.get(reason, reason))}</h5>"
              f"<ul>{''.join(found)}</ul>" for (arm, code, reason), found in shown.items() if found]
    return f"<details><summary>Examples</summary>{''.join(groups)}</details>" if groups else ""


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length].rstrip() + " …"


# ── items ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _explorer_data(runs: Sequence[Run], texts: dict[str, Benchmark], colours: dict[str, int]) -> dict[str, Any]:
    """The items on which languages disagree most, with what every arm chose: first seed, first prompt."""
    seed = runs[0].seed
    chosen: dict[str, dict[tuple[str, str], Predictions]] = {}
    for run in runs:
        for predictions in run.predictions:
            if run.seed == seed:
                chosen.setdefault(predictions.benchmark, {}).setdefault((run.name, predictions.method), predictions)
    quota = max(1, MAX_ITEMS // max(1, len(chosen)))
    items, total = [], 0
    for benchmark, by_run in chosen.items():
        rows = {key: {item.id: item for item in predictions.items} for key, predictions in by_run.items()}
        first = next(iter(by_run.values()))
        total += len(first.items)
        ranked = sorted(first.items, key=lambda item: -_disagreement([r[item.id] for r in rows.values()]))
        known = {item.id: item for item in texts[benchmark].items} if benchmark in texts else {}
        for item in ranked[:quota]:
            entry: dict[str, Any] = {
                "id": item.id, "b": benchmark, "tags": list(item.tags), "n": item.num_choices, "gold": item.gold,
                "d": round(_disagreement([r[item.id] for r in rows.values()]), 3),
                "runs": [{"arm": arm, "m": method, "a": {code: _answer(a) for code, a in r[item.id].answers.items()}}
                         for (arm, method), r in rows.items()]}
            text = known.get(item.id)
            if text and all(code in text.versions and text.versions[code].answer == gold
                            for code, gold in item.gold.items()):
                entry["text"] = {code: {"q": v.question, "c": list(v.choices)} | (
                    {"x": _cut(v.context, MAX_CONTEXT)} if v.context else {}) for code, v in text.versions.items()}
            items.append(entry)
    methods = list(dict.fromkeys(method for by_run in chosen.values() for _, method in by_run))
    languages = list(dict.fromkeys(c for by_run in chosen.values() for p in by_run.values() for c in p.languages))
    return {"items": items, "total": total, "seed": seed, "benchmarks": list(chosen),
            "arms": [{"name": run, "hue": colours[run] % NUM_COLOURS + 1}
                     for run in dict.fromkeys(r.name for r in runs if r.seed == seed)],
            "methods": [{"id": method, "name": method_name(method)} for method in methods],
            "languages": [{"id": code, "name": language_name(code), "tag": language_code(code)} for code in languages]}


def _disagreement(answers: list[ItemAnswers]) -> float:
    """Mean over runs of the share of language pairs that choose differently, coins in expectation."""
    shares = []
    for item in answers:
        pairs = list(combinations(item.answers.values(), 2))
        same = sum(len(set(a.candidates) & set(b.candidates)) / (len(a.candidates) * len(b.candidates))
                   for a, b in pairs)
        shares.append(1 - same / len(pairs) if pairs else 0.0)
    return sum(shares) / len(shares)


def _answer(answer: Answer) -> dict[str, Any]:
    entry: dict[str, Any] = {"c": list(answer.candidates)}
    if answer.reason != "matched":
        entry["r"] = REASONS.get(answer.reason, answer.reason)
    if answer.text is not None:
        entry["t"] = _cut(answer.text, MAX_TEXT)
    return entry


# ── provenance ───────────────────────────────────────────────────────────────────────────────────────────────────────

def _provenance_section(runs: Sequence[Run], provenance: dict[str, Any]) -> str:
    flat = [dict(_flatten(run.provenance | provenance)) for run in runs]
    common = {key: value for key, value in flat[0].items() if all(key in f and f[key] == value for f in flat)}
    own = [{key: value for key, value in f.items() if key not in common} for f in flat]
    out = [_facts(common)]
    out += [f"<details><summary>{escape(run.name)}, seed {run.seed}</summary>{_facts(facts)}</details>"
            for run, facts in zip(runs, own, strict=True) if facts]
    return "".join(out) if any(flat) else "<p>None was recorded.</p>"


def _facts(facts: dict[str, str]) -> str:
    return '<dl class="facts">' + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
                                          for key, value in facts.items()) + "</dl>" if facts else ""


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
