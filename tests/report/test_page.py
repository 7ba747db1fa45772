"""What the pages show: outside text as text, the first seed's answers, and the numbers of
results.json.
"""

import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from crossin_jax.config import Contrast, Study
from crossin_jax.evaluation.items import Benchmark, Item, Version
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.report.results import write_results
from crossin_jax.report.summary import Run, summarise
from crossin_jax.study.report import Table, write_study
from tests.helpers import print_table


class Page(HTMLParser):
    """The tags of a page with their attributes, the text that a reader sees, and the JSON
    island.
    """

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.island, self._inside = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside.append(dict(attributes).get("id") if tag == "script" else tag)

    def handle_endtag(self, tag):
        if self._inside:
            self._inside.pop()

    def handle_data(self, data):
        if self._inside and self._inside[-1] == "data":
            self.island += data
        elif self._inside and self._inside[-1] not in ("style", None):
            self.texts.append(data)


PLACES = (
    "title",
    "arm",
    "rule",
    "bench",
    "tag",
    "lang",
    "item",
    "answer",
    "question",
    "choice",
    "context",
    "fact",
    "value",
    "common",
    "method",
    "reason",
)


def evil(place):
    """A text that would make an element of its place's name, an attribute and a script if it
    could.
    """
    return f"\"'><evil-{place} onclick=x></script>&amp;{{{{title}}}}"


def short(place):
    """The same, as long as a figure has room for."""
    return f"\"'><evil-{place}>"


def find_evil(page):
    """Places whose text became markup."""
    return {tag for tag, _ in page.tags if tag.startswith("evil")} | {
        name
        for _, attributes in page.tags
        for name in attributes
        if name.startswith(("on", "evil")) or "evil" in name
    }


@pytest.fixture(scope="module")
def evil_report(tmp_path_factory):
    """The page of a report in which every outside text would like to be markup."""
    folder = tmp_path_factory.mktemp("evil")
    languages = ("en", evil("lang"))
    items, answers = [], {}
    for i in range(4):
        version = Version(evil("question"), (f"(A) {evil('choice')}", "(B) ok"), 0, evil("context"))
        items.append(
            Item(f"{evil('item')} {i}", dict.fromkeys(languages, version), (evil("tag"),) * (i < 2))
        )
    for arm, seed in ((0, 1), (1, 1), (1, 2)):
        answers[arm, seed] = Predictions(
            evil("bench"),
            evil("method"),
            1,
            languages,
            tuple(
                ItemAnswers(
                    item.id,
                    dict.fromkeys(languages, 0),
                    2,
                    dict.fromkeys(
                        languages,
                        Answer(
                            *(((0, 1), evil("reason")) if i % 2 == arm else ((i % 2,), "matched")),
                            evil("answer"),
                            own=(0,),
                        ),
                    ),
                    item.tags,
                )
                for i, item in enumerate(items)
            ),
        )
    runs = [
        Run(
            f"{evil('arm')} {arm}",
            seed,
            [p, replace(p, prompt=2)],
            {evil("fact"): f"{evil('value')} {arm}", "nested": {evil("fact"): seed}},
        )
        for (arm, seed), p in answers.items()
    ]
    benchmark = Benchmark(evil("bench"), tuple(items), languages, "made up")
    write_results(
        folder,
        runs,
        {"common": evil("common")},
        title=evil("title"),
        benchmarks=[benchmark],
        baselines={evil("rule"): [replace(answers[0, 1], method="rule", prompt=0)]},
    )
    return (folder / "report.html").read_text()


def test_no_outside_text_becomes_markup(evil_report):
    """Names, answers, tags, languages and provenance are text, in elements and in attributes."""
    page = Page(evil_report)
    assert find_evil(page) == set()
    assert [tag for tag, _ in page.tags].count("script") == 2 == evil_report.count("</script>")
    # {{title}} in a text is no placeholder
    assert evil_report.count(evil("title").replace("{{title}}", "")) == 0


@pytest.mark.parametrize("place", PLACES)
def test_outside_text_is_shown_as_it_is(evil_report, place):
    """Each text stands in the page word for word: nothing is lost by making it harmless."""
    page = Page(evil_report)
    assert evil(place) in "\n".join(page.texts) or evil(place) in json.dumps(
        json.loads(page.island)
    ).replace('\\"', '"')


# ── the study's page ─────────────────────────────────────────────────────────────────────────────


def make(seed, others, languages=("en", "zh", "es"), name="made", method="sum", count=30):
    """Answers that are right in English and with a given probability elsewhere."""
    rng = random.Random(f"{seed}/{others}")
    return Predictions(
        name,
        method,
        1,
        languages,
        tuple(
            ItemAnswers(
                f"q{i}",
                dict.fromkeys(languages, 0),
                3,
                {
                    code: Answer((0 if rng.random() < (0.9 if code == "en" else others) else 1,))
                    for code in languages
                },
            )
            for i in range(count)
        ),
    )


def test_no_outside_text_becomes_markup_in_a_study(tmp_path):
    """The study's name, tables, arms, benchmarks, languages and figures are text in its page."""
    languages = ("en", short("lang"))
    arms, asked = {name: short(name) for name in ("base", "pairs")}, (languages, short("bench"))
    tables = [
        Table(
            f"{short('table')} {i}",
            [
                Run(arm, seed, [make(seed, 0.3 + i / 9, *asked, method=short("method"))])
                for arm in arms.values()
                for seed in (1, 2)
            ],
            {short("rule"): [replace(make(0, 0.2, *asked), method="rule")]},
        )
        for i in range(2)
    ]
    names = tuple(table.name for table in tables)
    study = Study(
        name=short("study"),
        output_dir=str(tmp_path),
        cells=(),
        curves={short("curve"): dict(zip((1.0, 2.0), names, strict=True))},
        contrasts=(
            Contrast(
                title=short("contrast"), arms=(arms["pairs"],), control=arms["base"], tables=names
            ),
        ),
    )
    write_study(tmp_path, study, tables, "expectation")
    page = Page((tmp_path / "report.html").read_text())
    assert find_evil(page) == set() and "script" not in {tag for tag, _ in page.tags}
    text = "\n".join(page.texts)
    for place in (
        "study",
        "table",
        "method",
        "base",
        "pairs",
        "rule",
        "bench",
        "lang",
        "curve",
        "contrast",
    ):
        assert short(place) in text, place
    for folder in (tmp_path / "tables").iterdir():
        assert find_evil(Page((folder / "report.html").read_text())) == set()


# ── the item list ────────────────────────────────────────────────────────────────────────────────


def test_the_item_list_shows_the_first_seed_and_prompt(tmp_path):
    """Of an arm with several seeds and prompts, the answers of the first run's seed by its first
    prompt.
    """
    answers = {
        (arm, seed, prompt): replace(make(f"{arm}{seed}{prompt}", 0.5), prompt=prompt)
        for arm in ("base", "pairs")
        for seed in (1, 2)
        for prompt in (3, 1)
    }
    order = [("base", 2), ("pairs", 1), ("pairs", 2), ("base", 1)]
    runs = [
        Run(arm, seed, [answers[arm, seed, prompt] for prompt in (3, 1)]) for arm, seed in order
    ]
    runs.append(Run("late", 1, [make("late", 0.5)]))  # was not trained with the first seed
    write_results(tmp_path, runs)
    data = json.loads(Page((tmp_path / "report.html").read_text()).island)
    assert (data["seed"], data["total"], len(data["items"])) == (2, 30, 30)
    assert [arm["name"] for arm in data["arms"]] == ["base", "pairs"]
    for item in data["items"]:
        assert [entry["arm"] for entry in item["runs"]] == ["base", "pairs"]
        shown = []
        for entry in item["runs"]:
            (answer,) = [i for i in answers[entry["arm"], 2, 3].items if i.id == item["id"]]
            assert {code: told["c"] for code, told in entry["a"].items()} == {
                code: list(a.candidates) for code, a in answer.answers.items()
            }
            pairs = [("en", "zh"), ("en", "es"), ("zh", "es")]
            shown.append(1 - sum(answer.answers[a] == answer.answers[b] for a, b in pairs) / 3)
            assert (item["gold"], item["n"], item["b"]) == (answer.gold, 3, "made")
        assert item["d"] == pytest.approx(sum(shown) / 2, abs=1e-3)
    assert [item["d"] for item in data["items"]] == sorted(
        (i["d"] for i in data["items"]), reverse=True
    )


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


def number(value):
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0.") else text.replace("-0.", "-.")


def show(estimate, with_range=True):
    """A score as tables have it: value, interval or deviation, and a mark where it is clearly
    different.
    """
    sd, change = estimate["sd"], estimate["change"]
    spread = (
        f" ± {number(sd)}"
        if sd is not None
        else f" [{number(estimate['low'])}, {number(estimate['high'])}]"
    )
    clear = change is not None and change["clear"]
    return (
        number(estimate["value"])
        + spread * with_range
        + (("▲" if change["difference"] > 0 else "▼") if clear else "")
    )


HEADS = {
    "accuracy": "Accuracy",
    "accuracy/en": "English",
    "accuracy/others": "Other languages",
    "consistency_3": "Consistency_3",
    "AC3_3": "AC3_3",
}


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
@pytest.mark.parametrize("others", [0.9, 0.1])
def test_tables_show_the_numbers_of_results_json(tmp_path, capsys, seeds, others):
    """results.md, the terminal's table and the page have the same values, ranges and marks."""
    runs = [
        Run(arm, seed, [make(seed, value)])
        for arm, value in (("base", 0.5), ("pairs", others))
        for seed in seeds
    ]
    rules = {"strings": [replace(make(0, 0.3), method="rule")]}
    write_results(tmp_path, runs, baselines=rules)
    (block,) = json.loads((tmp_path / "results.json").read_text())["blocks"]
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "| | " + " | ".join(HEADS.values()) + " |" in lines
    rows = {
        row["arm"] + (" (rule)" if row["is_baseline"] else ""): row["scores"]
        for row in block["rows"]
    }
    assert list(rows) == ["base", "pairs", "strings (rule)"]
    for arm, scores in rows.items():
        assert f"| {arm} | " + " | ".join(show(scores[name]) for name in HEADS) + " |" in lines
    for name, label in {
        "accuracy/zh": "Chinese",
        "consistency_2": "Consistency_2",
        "AC3_2": "AC3_2",
    }.items():
        cells = " | ".join(show(scores[name], with_range=False) for scores in rows.values())
        assert f"| {label} | {cells} |" in lines
    marks = {show(rows["pairs"][name])[-1] for name in ("accuracy/others", "AC3_3")}
    assert marks == {"▲" if others > 0.5 else "▼"}

    table = [re.split(r"  +", line) for line in print_table(summarise(runs, rules)).splitlines()]
    assert table[1] == ["", *HEADS.values()]
    for told, (arm, scores) in zip(table[2:5], rows.items(), strict=True):
        assert told == [
            arm,
            *(show(scores[name], with_range=name in ("accuracy", "AC3_3")) for name in HEADS),
        ]

    text = (tmp_path / "report.html").read_text()
    for scores in rows.values():
        for name, score in scores.items():
            spread = (
                f"± {number(score['sd'])}"
                if score["sd"] is not None
                else f"{number(score['low'])} to {number(score['high'])}"
            )
            cell = re.search(
                rf'title="([^"]*)"><b>{re.escape(number(score["value"]))}</b>'
                rf"(<em[^>]*>[▲▼]</em>)?<small>{re.escape(spread)}</small>",
                text,
            )
            assert cell, name
            assert f"{number(score['low'])} to {number(score['high'])}" in cell[1]
    change = rows["pairs"]["AC3_3"]["change"]
    assert f"[{number(change['low'])}, {number(change['high'])}], p = {change['p']:.3g}" in text


def test_unread_answers_are_counted_and_some_are_shown(tmp_path):
    """The page has the share of unread answers by language and reason, and three examples of each
    at most.
    """

    def answer(i, code):
        if code == "en":
            return Answer((0,), "matched", "(A)", own=(0,))
        if i < 5:
            return Answer((0, 1, 2), "unreadable", f"nothing {code} {i}", own=(0, 1, 2))
        if i < 7:
            return Answer((0, 1), "tie", f"both {code} {i}", own=(0, 1))
        return Answer((1,), "matched", "B", own=(1,))

    items = tuple(
        ItemAnswers(
            f"q{i}",
            dict.fromkeys(("en", "zh"), 0),
            3,
            {code: answer(i, code) for code in ("en", "zh")},
        )
        for i in range(10)
    )
    write_results(
        tmp_path, [Run("base", 1, [Predictions("made", "generate", 1, ("en", "zh"), items)])]
    )
    page = Page((tmp_path / "report.html").read_text())
    text = "|".join(page.texts)
    assert "70.0%|tie 20.0%|not read 50.0%" in text and "Chinese: not read" in text
    shown = [t for t in page.texts if t.startswith(("nothing", "both"))]
    assert shown == ["nothing zh 0", "nothing zh 1", "nothing zh 2", "both zh 5", "both zh 6"]
