"""The report of one or several runs as one HTML page that loads nothing from the network.

Jinja2 fills `report.html` and escapes every text. The list of items is JSON inside the page, and
a script shows it only by `textContent`. So no text of a benchmark or a model can become markup.
"""

import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from crossin_jax.evaluation.items import Benchmark
from crossin_jax.evaluation.metrics import Mode
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.report import figures, heat_maps, wording
from crossin_jax.report.summary import Block, Run
from crossin_jax.report.text import group_ways

HERE = Path(__file__).parent
# items in the list, and their questions: 200 items in 7 languages, 33 in 42
MAX_ITEMS, MAX_QUESTIONS = 200, 1400
# characters of an answer and of a context
MAX_TEXT, MAX_CONTEXT = 400, 1200
# Blocks with figures, by benchmark and method; with more tags, only the whole benchmark has some
MAX_DRAWN = 8
# The heat maps of language pairs. Only the primary way of choosing has them on the page.
PAIR_HEADINGS = {
    "rankc": "RankC of language pairs: how alike they rank the choices",
    "agreement": "Agreement of language pairs: share of items with the same choice",
    "agreement_right": "Agreement where one is right, of language pairs",
}
# answers without a clear choice that are shown per arm, language and reason
MAX_EXAMPLES = 3


def build_page(
    title: str,
    blocks: Sequence[Block],
    runs: Sequence[Run],
    texts: dict[str, Benchmark],
    mode: Mode,
    provenance: dict[str, Any],
) -> str:
    """The whole page; `texts` are benchmarks by name, for the questions."""
    arms = list(dict.fromkeys(row.arm for block in blocks for row in block.rows))
    models = [row for block in blocks for row in figures.models_of(block)]
    primary = [way for way, _ in group_ways(blocks)]
    return render(
        "report.html",
        title=title,
        facts=count_facts(blocks, runs),
        hues={arm: hue(i) for i, arm in enumerate(arms)},
        mode=wording.MODES_IN_WORDS[mode],
        first_arm=models[0].arm,
        several_arms=len({row.arm for row in models}) > 1,
        over_seeds=any(len(row.seeds) > 1 for row in models),
        over_prompts=any(len(row.prompts) > 1 for row in models),
        benchmarks=group(blocks, lambda block: block.benchmark),
        by_method=lambda several: group(several, lambda block: block.method),
        draw=lambda block: draw_block(block, arms, any(block is way for way in primary)),
        drawn=lambda several: several if len(several) <= MAX_DRAWN else several[:1],
        shown=wording.group_scores,
        unread=[block for block in blocks if has_unread(block)],
        examples=lambda block: find_examples(block, runs),
        provenance=split_provenance(runs, provenance),
        data=list_items(runs, texts, arms),
    )


# ---- Templates


@cache
def environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder, and the words that they may use."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words = ("number", "percent", "describe_score", "language_name", "method_name", "reason_name")
    for name in (*words, "mark", "spread", "explain"):
        templates.filters[name] = getattr(wording, name)
    templates.filters["kind_in_words"] = wording.KINDS_IN_WORDS.__getitem__
    # The items are written with `tojson`, which escapes <, > and & inside of strings.
    templates.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    return templates


def render(template: str, folder: Path = HERE, /, **values: Any) -> str:
    """A page from a template in a folder, by default that of the reports."""
    return environment(folder).get_template(template).render(**values)


def inline(figure: Any) -> Markup:
    """A figure as markup for a page; matplotlib has escaped its texts."""
    svg = figures.to_svg(figure)
    return Markup(svg[svg.index("<svg") :])


def group(blocks: Sequence[Block], key: Any) -> dict[str, list[Block]]:
    """The blocks by a name, in their order."""
    grouped: dict[str, list[Block]] = {}
    for block in blocks:
        grouped.setdefault(key(block), []).append(block)
    return grouped


def hue(index: int) -> str:
    """The CSS variable with an arm's colour."""
    return f"var(--c{index % len(figures.COLOURS) + 1})"


def count_facts(blocks: Sequence[Block], runs: Sequence[Run]) -> str:
    """Numbers of models, benchmarks, languages and seeds in one line."""
    counts = {
        "models": len({run.name for run in runs}),
        "benchmarks": len({block.benchmark for block in blocks}),
        "languages": len({code for block in blocks for code in block.languages}),
        "seeds": len({run.seed for run in runs}),
    }
    return " · ".join(f"{n} {what[:-1] if n == 1 else what}" for what, n in counts.items())


def draw_block(block: Block, arms: list[str], has_pairs: bool) -> list[tuple[str, Markup]]:
    """(heading, figure) of one block; `has_pairs`: with the maps of its language pairs."""
    if block.kind == "open":
        names = [name for name in block.headline if name in block.rows[0].scores]
        return [("Scores", inline(figures.draw_scores(block, names, arms)))] if names else []
    last, several = block.main_score, len(block.languages) > 1 and block.kind == "parallel"
    consistency = [f"consistency_{block.size}"] if several else []
    drawn = {"Scores": figures.draw_scores(block, unique(last, "accuracy", *consistency), arms)}
    if several:
        drawn["Accuracy by language"] = heat_maps.draw_languages({"": block})
        drawn |= draw_pairs(block) if has_pairs else {}
    elif block.kind == "separate" and all(
        f"accuracy/{code}" in row.scores for row in block.rows for code in block.languages
    ):  # a subset may have no items of a language
        drawn["Accuracy by language"] = heat_maps.draw_languages({"": block})
    if any(len(row.prompts) > 1 for row in block.rows):
        heading = "Spread over the prompts: a dot each, the tick is the median"
        drawn[heading] = figures.draw_prompts(block, unique("accuracy", last), arms)
    return [(heading, inline(figure)) for heading, figure in drawn.items()]


def draw_pairs(block: Block) -> dict[str, Any]:
    """(heading, figure) of the measures of language pairs that the arms have, and of changes."""
    drawn = {}
    for name, heading in PAIR_HEADINGS.items():
        if name == "agreement" or any(name in row.pairs for row in figures.models_of(block)):
            drawn[heading] = heat_maps.draw_pairs(block, name)
        if name != "agreement" and heat_maps.find_changed(block, name):
            title = f"{wording.describe_score(name)}: change from the first model; a dot: p < 0.05"
            drawn[title] = heat_maps.draw_pair_changes(block, name)
    return drawn


def unique(*names: str) -> list[str]:
    """The names without repetition, in their order."""
    return list(dict.fromkeys(names))


# ---- Answers without a clear choice


def has_unread(block: Block) -> bool:
    """Whether a block of all items has free answers, or answers that fit several choices."""
    rows = figures.models_of(block)
    shares = [
        share for row in rows for reasons in row.coin_share.values() for share in reasons.values()
    ]
    return (
        block.tag is None and block.kind != "open" and (block.method == "generate" or any(shares))
    )


def find_examples(
    block: Block, runs: Sequence[Run]
) -> dict[tuple[str, str, str], list[tuple[str, str]]]:
    """(item, text) of some answers without a clear choice, by (arm, language, reason)."""
    shown: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    answers = (
        (run.name, item, code, answer)
        for run in runs
        for predictions in run.predictions
        if (predictions.benchmark, predictions.method) == (block.benchmark, block.method)
        for item in predictions.items
        for code, answer in item.answers.items()
    )
    for arm, item, code, answer in answers:
        if len(answer.candidates) > 1 and answer.text:
            found = shown.setdefault((arm, code, answer.reason), [])
            if len(found) < MAX_EXAMPLES:
                found.append((item.id, cut(answer.text, MAX_TEXT)))
    return shown


def cut(text: str, length: int) -> str:
    """The text in at most so many characters."""
    return text if len(text) <= length else text[:length].rstrip() + " …"


# ---- The list of items


def list_items(runs: Sequence[Run], texts: dict[str, Benchmark], arms: list[str]) -> dict[str, Any]:
    """The items on which languages disagree most, with the choices of every arm."""
    # Of each arm only the first seed and the first prompt: the page must stay small.
    seed = runs[0].seed
    chosen: dict[str, dict[tuple[str, str], Predictions]] = {}
    for run in runs:
        for predictions in run.predictions if run.seed == seed else ():
            if predictions.kind != "parallel":  # there is nothing to disagree on
                continue
            by_run = chosen.setdefault(predictions.benchmark, {})
            by_run.setdefault((run.name, predictions.method), predictions)
    everything = [p for by_run in chosen.values() for p in by_run.values()]
    languages = unique(*(code for p in everything for code in p.languages))
    most = max(1, min(MAX_ITEMS, MAX_QUESTIONS // max(1, len(languages))))
    quota = max(1, most // max(1, len(chosen)))
    return {
        "items": [
            item
            for name, by_run in chosen.items()
            for item in rank_items(name, by_run, texts.get(name))[:quota]
        ],
        "total": sum(len(next(iter(by_run.values())).items) for by_run in chosen.values()),
        "seed": seed,
        "benchmarks": list(chosen),
        "arms": [
            {"name": arm, "hue": hue(arms.index(arm))}
            for arm in unique(*(run.name for run in runs if run.seed == seed))
        ],
        "methods": [
            {"id": method, "name": wording.method_name(method)}
            for method in unique(*(p.method for p in everything))
        ],
        "languages": [
            {"id": code, "name": wording.language_name(code), "tag": wording.language_code(code)}
            for code in languages
        ],
    }


def rank_items(
    name: str, by_run: dict[tuple[str, str], Predictions], benchmark: Benchmark | None
) -> list[dict[str, Any]]:
    """The entries of a benchmark's items, those with the most disagreement first."""
    answered = {key: {item.id: item for item in p.items} for key, p in by_run.items()}
    questions = {item.id: item for item in benchmark.items} if benchmark else {}
    entries = []
    # b: benchmark, n: number of choices, d: disagreement, m: method, a: answers by language.
    # Keys are short because the page has thousands of them.
    for item in next(iter(by_run.values())).items:
        entry = {
            "id": item.id,
            "b": name,
            "tags": list(item.tags),
            "n": item.num_choices,
            "gold": item.gold,
            "d": disagreement([items[item.id] for items in answered.values()]),
            "runs": [
                {
                    "arm": arm,
                    "m": method,
                    "a": {code: describe(a) for code, a in items[item.id].answers.items()},
                }
                for (arm, method), items in answered.items()
            ],
        }
        if item.id in questions and (text := describe_question(questions[item.id], item)):
            entry["text"] = text
        entries.append(entry)
    entries.sort(key=lambda entry: -entry["d"])
    return [entry | {"d": round(entry["d"], 3)} for entry in entries]


def describe_question(question: Any, item: ItemAnswers) -> dict[str, Any] | None:
    """The texts of an item by language; None if its gold answers are not those of the run."""
    # The file may have changed since the run: then its questions would be shown with other answers.
    versions = question.versions
    if any(
        code not in versions or versions[code].answer != gold for code, gold in item.gold.items()
    ):
        return None
    return {
        code: {"q": version.question, "c": list(version.choices)}
        | ({"x": cut(version.context, MAX_CONTEXT)} if version.context else {})
        for code, version in versions.items()
    }


def describe(answer: Answer) -> dict[str, Any]:
    """An answer: its candidates, the reason if they are several, and its text if it has one."""
    entry: dict[str, Any] = {"c": list(answer.candidates)}
    if answer.reason != "matched":
        entry["r"] = wording.reason_name(answer.reason)
    if answer.text is not None:
        entry["t"] = cut(answer.text, MAX_TEXT)
    return entry


def disagreement(answers: list[ItemAnswers]) -> float:
    """The share of language pairs that choose differently, averaged over runs."""
    shares = []
    for item in answers:
        # Each candidate is drawn with the same probability: {A, B} and {A} agree in half of the
        # draws. Over all pairs of languages l < m, Σ p_l p_m = ((Σ p_l)² − Σ p_l²) / 2.
        sums, squares = [0.0] * item.num_choices, [0.0] * item.num_choices
        for answer in item.answers.values():
            p = 1 / len(answer.candidates)
            for c in answer.candidates:
                sums[c] += p
                squares[c] += p * p
        same = sum(s * s - q for s, q in zip(sums, squares, strict=True)) / 2
        num_pairs = math.comb(len(item.answers), 2)
        shares.append(1 - same / num_pairs if num_pairs else 0.0)
    return sum(shares) / len(shares)


# ---- Provenance


def split_provenance(
    runs: Sequence[Run], provenance: dict[str, Any]
) -> list[tuple[str, dict[str, str]]]:
    """(heading, facts): first the facts that all runs share, then each run's own."""
    # {"model": {"path": "x"}} → {"model.path": "x"}, so that single facts can be compared.
    flat = [dict(flatten(run.provenance | provenance)) for run in runs]
    common = {
        key: value for key, value in flat[0].items() if all(f.get(key) == value for f in flat)
    }
    own = [
        (f"{run.name}, seed {run.seed}", {key: f[key] for key in f if key not in common})
        for run, f in zip(runs, flat, strict=True)
    ]
    return [(heading, facts) for heading, facts in [("", common), *own] if facts]


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """("a.b", text) of every value in nested objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        is_text = isinstance(value, str)
        yield path, value if is_text else json.dumps(value, ensure_ascii=False, default=str)
