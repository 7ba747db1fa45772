"""The report: numbers that agree with the metrics, texts that cannot break the page, filters that
filter.
"""

import gzip
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from crossin_jax.config import UserError
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.items import Benchmark, Item, Version
from crossin_jax.evaluation.metrics import evaluate
from crossin_jax.evaluation.stats import bootstrap, restrict
from crossin_jax.report import figures, heat_maps, wording
from crossin_jax.report.results import read_pair, read_results, write_results
from crossin_jax.report.summary import OTHERS, Run, summarise
from crossin_jax.tables import text_width
from tests.evaluation.made_up import answer_benchmark, know
from tests.evaluation.test_metrics import compare
from tests.helpers import print_table

LANGUAGES = ("en", "zh", "vi", "es")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{title}} & \u2028"


@pytest.fixture(scope="module")
def world():
    return load_benchmark("cross_world:test/currency", LANGUAGES, limit=80)


def make_runs(
    benchmark,
    *,
    arms=(("base", 0.2), ("x2x", 0.6)),
    seeds=(0,),
    method="generate",
    prompts=(1,),
    unclear=0.05,
):
    return [
        Run(
            name,
            seed,
            [
                answer_benchmark(
                    benchmark,
                    know(LANGUAGES, 0.8, others),
                    method=method,
                    prompt=prompt,
                    seed=seed,
                    unclear=unclear,
                )
                for prompt in prompts
            ],
            {"device": "cpu"},
        )
        for name, others in arms
        for seed in seeds
    ]


def nasty() -> Benchmark:
    version = Version(EVIL, (f"(A) {EVIL}", "(B) ok"), 0, EVIL)
    items = tuple(Item(f"{EVIL}{i}", dict.fromkeys(LANGUAGES, version)) for i in range(6))
    return Benchmark(f"b{EVIL}", items, LANGUAGES, "made up")


# ── numbers ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["expectation", "seaeval", "strict"])
def test_one_run_one_prompt_is_what_the_metrics_say(world, mode):
    runs = make_runs(world)
    block = summarise(runs, mode=mode)[0]
    for run, row in zip(runs, block.rows, strict=True):
        predictions = run.predictions[0]
        scores, intervals = evaluate(predictions, mode).flatten(), bootstrap(predictions, mode)
        for name, value in scores.items():
            estimate = row.scores[name]
            assert estimate.value == pytest.approx(value, abs=1e-12)
            assert (estimate.low, estimate.high) == pytest.approx(intervals[name], abs=1e-9), name
            assert estimate.sd is None
        assert row.scores[OTHERS].value == pytest.approx(
            np.mean([scores[f"accuracy/{c}"] for c in LANGUAGES[1:]])
        )
    difference = compare(runs[0].predictions[0], runs[1].predictions[0], mode)
    for name, change in (
        (name, e.change) for name, e in block.rows[1].scores.items() if name in difference
    ):
        assert change.difference == pytest.approx(difference[name].difference, abs=1e-12)
        assert change.p == pytest.approx(difference[name].p, abs=0.02)
        assert change.clear == (change.p < 0.05)
    assert block.rows[0].scores["accuracy"].change is None
    assert block.rows[1].scores["accuracy"].change.clear
    if mode == "expectation":
        scores = evaluate(runs[0].predictions[0])
        assert (
            block.rows[0].scores["AC3_3"].least,
            block.rows[0].scores["AC3_3"].most,
        ) == pytest.approx((scores.least.ac3[3], scores.most.ac3[3]))


def test_over_prompts_the_median_and_over_seeds_the_mean(world):
    runs = make_runs(world, seeds=(0, 1, 2), prompts=(1, 2, 3))
    row = summarise(runs)[0].rows[1]
    ac3 = np.array(
        [[evaluate(p).ac3[3] for p in run.predictions] for run in runs if run.name == "x2x"]
    )
    assert row.scores["AC3_3"].value == pytest.approx(np.median(ac3, axis=1).mean())
    assert row.scores["AC3_3"].sd == pytest.approx(np.median(ac3, axis=1).std(ddof=1))
    assert [row.prompts[p]["AC3_3"] for p in (1, 2, 3)] == pytest.approx(ac3.mean(0))
    assert [row.seed_scores[s]["AC3_3"] for s in (0, 1, 2)] == pytest.approx(np.median(ac3, axis=1))


def test_a_difference_is_clear_only_if_every_seed_agrees(world):
    base = make_runs(world, arms=(("base", 0.4),), seeds=(0, 1), method="sum", unclear=0)
    better = [
        Run(
            "x",
            run.seed,
            [answer_benchmark(world, know(LANGUAGES, 0.95, value), method="sum", seed=9)],
        )
        for run, value in zip(base, (0.95, 0.3), strict=True)
    ]
    rows = summarise([*base, *better])[0].rows
    change = rows[1].scores[OTHERS].change
    assert change.p < 0.05
    assert not change.clear
    assert summarise([base[0], better[0]])[0].rows[1].scores[OTHERS].change.clear


def test_tags_and_baselines_are_rows_of_their_own():
    world = load_benchmark("cross_world:test", LANGUAGES)
    runs = make_runs(world, method="sum", unclear=0) + make_runs(world, arms=(), unclear=0)
    runs = [
        replace(
            run,
            predictions=run.predictions + make_runs(world, method="mean", unclear=0)[0].predictions,
        )
        for run in runs
    ]
    rule = {"strings": [answer_benchmark(world, know(LANGUAGES, 0.3, 0.3), method="rule")]}
    blocks = summarise(runs, rule)
    assert [(b.method, b.tag) for b in blocks] == [
        ("sum", None),
        ("sum", "opaque"),
        ("mean", None),
        ("mean", "opaque"),
    ]
    assert all([row.is_baseline for row in b.rows] == [False, False, True] for b in blocks)
    part = restrict(runs[1].predictions[0], "opaque")
    assert blocks[1].num_items == len(part.items) < len(world.items)
    assert blocks[1].rows[1].scores["AC3_3"].value == pytest.approx(evaluate(part).ac3[3])


def test_faults(world, tmp_path):
    runs = make_runs(world)
    with pytest.raises(UserError, match="no answers"):
        summarise([])
    with pytest.raises(UserError, match="two sets of answers"):
        summarise([runs[0], runs[0]])
    fewer = load_benchmark("cross_world:test/currency", LANGUAGES, limit=70)
    with pytest.raises(UserError, match="10 items are in one run only"):
        summarise([runs[0], *make_runs(fewer, arms=(("x", 0.5),))])
    with pytest.raises(UserError, match="mode"):
        summarise(runs, mode="exact")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_results(tmp_path / "file" / "out", runs)
    with pytest.raises(UserError, match="does not exist"):
        read_results(tmp_path)
    for raw in (
        b"x",
        gzip.compress(b"[]"),
        gzip.compress(b'{"format": 1}'),
        gzip.compress(b'{"format": 1}')[:-9],
    ):
        (tmp_path / "answers.json.gz").write_bytes(raw)
        with pytest.raises(UserError, match="damaged"):
            read_results(tmp_path)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def test_files_hold_the_same_numbers_and_answers_come_back(world, tmp_path):
    runs = make_runs(world, prompts=(1, 2))
    blocks = write_results(tmp_path, runs, {"data": "abc"}, benchmarks=[world])
    assert {p.name for p in tmp_path.iterdir()} == {
        "answers.json.gz",
        "report.html",
        "results.json",
        "results.md",
    }
    results = json.loads((tmp_path / "results.json").read_text())
    ac3 = blocks[0].rows[1].scores["AC3_3"].value
    assert results["blocks"][0]["rows"][1]["scores"]["AC3_3"]["value"] == ac3
    assert results["provenance"] == {"data": "abc"}
    assert results["runs"][0] == {"name": "base", "seed": 0, "provenance": {"device": "cpu"}}
    for text in (
        (tmp_path / "results.md").read_text(),
        (tmp_path / "report.html").read_text(),
        print_table(summarise(runs)),
    ):
        assert wording.number(ac3) in text
    assert read_results(tmp_path) == runs
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_results(tmp_path, read_results(tmp_path), {"data": "abc"}, benchmarks=[world])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_two_folders_side_by_side(world, tmp_path):
    before, after = make_runs(world)
    write_results(tmp_path / "a", [before])
    write_results(tmp_path / "b", [replace(after, name="base")])
    pair = read_pair(tmp_path / "a", tmp_path / "b")
    assert [run.name for run in pair] == [f"base ({tmp_path / 'a'})", f"base ({tmp_path / 'b'})"]
    assert summarise(pair)[0].rows[1].scores["AC3_3"].change.clear
    write_results(tmp_path / "c", make_runs(world, method="sum", unclear=0))
    with pytest.raises(UserError, match=r"nothing to compare.*generate"):
        read_pair(tmp_path / "a", tmp_path / "c")


def test_terminal_table_is_aligned_whatever_the_names(world):
    lines = print_table(
        summarise(make_runs(world, arms=(("基线", 0.2), ("x2x ＋ é", 0.6))))
    ).splitlines()
    accuracy = [
        text_width(line[: re.search(r"Accuracy|\.\d", line).start()]) for line in lines[1:4]
    ]
    assert len(set(accuracy)) == 1
    assert "▲" in lines[3] and "基线, p < 0.05" in lines[-1]
    assert "p <" not in print_table(summarise(make_runs(world, arms=(("one", 0.5),))))


class Page(HTMLParser):
    """Tags, attributes and the JSON island of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.island, self._in_island = "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in_island = dict(attributes).get("id") == "data"

    def handle_data(self, data):
        self.island += data if self._in_island else ""

    def handle_endtag(self, tag):
        self._in_island = False


def test_page_needs_nothing_else_and_no_text_breaks_out(tmp_path):
    benchmark = nasty()
    runs = [
        replace(run, name=f"arm {i} {EVIL}", provenance={EVIL: EVIL})
        for i, run in enumerate(make_runs(benchmark, unclear=0.6))
    ]
    write_results(tmp_path, runs, title=f"t {EVIL}", benchmarks=[benchmark])
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2
    assert {"img", "link", "iframe", "object"}.isdisjoint(names)
    assert not [
        a
        for _, attributes in page.tags
        for a in attributes
        if a in ("src", "srcset") or a.startswith("on")
    ]
    assert all(a["href"].startswith("#") for tag, a in page.tags if "href" in a)
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    data = json.loads(page.island)
    assert data["items"][0]["text"]["zh"]["q"] == EVIL  # shown as it is, by textContent
    assert data["arms"][0]["name"] == f"arm 0 {EVIL}"


def test_explorer_shows_the_items_that_disagree_most_and_their_texts(world, tmp_path):
    runs = make_runs(world, method="sum", unclear=0)
    data = explorer(tmp_path, runs, [world])
    levels = [item["d"] for item in data["items"]]
    assert levels == sorted(levels, reverse=True) and len(levels) == data["total"] == 80
    shown = {item["id"]: item for item in data["items"]}
    for answers, item in zip(runs[1].predictions[0].items, world.items, strict=True):
        entry = shown[item.id]
        assert entry["text"]["es"]["q"] == item.versions["es"].question
        chosen = next(r for r in entry["runs"] if r["arm"] == "x2x")["a"]["vi"]["c"]
        assert chosen == list(answers.answers["vi"].candidates)
    whole = load_benchmark("cross_world:held_out", LANGUAGES)
    # Finds Cross-World's texts by itself.
    data = explorer(tmp_path, make_runs(whole, method="sum", unclear=0), [])
    assert len(data["items"]) == 200 < data["total"] == len(whole.items)
    assert "text" in data["items"][0]
    renamed = [
        replace(run, predictions=[replace(p, benchmark="other") for p in run.predictions])
        for run in runs
    ]
    assert "text" not in explorer(tmp_path, renamed, [])["items"][0]


def explorer(folder: Path, runs, benchmarks) -> dict:
    write_results(folder, runs, benchmarks=benchmarks)
    return json.loads(Page((folder / "report.html").read_text()).island)


def test_one_language_has_an_accuracy_and_no_pairs(tmp_path):
    alone = load_benchmark("cross_world:test/currency", ("zh",), limit=5)
    block = write_results(tmp_path, [Run("x", 0, [answer_benchmark(alone, {"zh": 0.5})])])[0]
    assert block.headline == ("accuracy",)


def test_numbers_and_names_are_short():
    assert [wording.number(value) for value in (0.5126, 1.0, -0.04)] == [".513", "1.000", "-.040"]
    assert wording.shorten("越南语越南语", 7) == "越南语…"


def test_bars_show_scores_intervals_and_marks(world):
    """A bar per arm as long as its score, with its interval, its number and its mark; rules are
    hollow.
    """
    rules = {"rule": [answer_benchmark(world, dict.fromkeys(world.languages, 0.3), method="rule")]}
    (block, *_) = summarise(make_runs(world, arms=(("$a$", 0.2), ("<b>", 0.9))), rules)
    arms = [row.arm for row in block.rows]
    figure = figures.draw_scores(block, ["AC3_3", "accuracy"], arms)
    for panel, name in zip(figure.axes, ("AC3_3", "accuracy"), strict=True):
        scores = [row.scores[name] for row in block.rows[::-1]]
        assert [bar.get_width() for bar in panel.patches] == [score.value for score in scores]
        assert [text.get_text() for text in panel.texts] == [
            wording.number(score.value) + wording.mark(score) for score in scores
        ]
        assert [bar.get_facecolor()[3] for bar in panel.patches] == [0, 1, 1]  # the rule is hollow
        bars = panel.containers[1::2] if len(panel.containers) > 3 else panel.containers
        assert bars and len(panel.collections) == 3
        for lines, score in zip(panel.collections, scores, strict=True):
            assert lines.get_segments()[0][:, 0] == pytest.approx([score.low, score.high])
        dashed = [line for line in panel.lines if line.get_linestyle() == "--"]
        assert [line.get_xdata()[0] for line in dashed] == [block.chance] * (name == "accuracy")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == arms[::-1]
    svg = figures.to_svg(figure)
    assert "$a$" in svg and "&lt;b&gt;" in svg and "<b>" not in svg


def test_agreement_leaves_the_diagonal_blank(world):
    (block, *_) = summarise(make_runs(world))
    figure = heat_maps.draw_pairs(block, "agreement")
    for panel, row in zip(figure.axes, block.rows, strict=True):
        shown = np.asarray(panel.images[0].get_array().filled(np.nan))
        assert np.isnan(np.diag(shown)).all() and len(panel.texts) == 4 * 3
        assert shown[0, 1] == row.agreement[0][1]


# ── in a browser ──────────────────────────────────────────────────────────────────────────────────

PROBE = """<script>
const choose = values => { for (const [id, value] of Object.entries(values)) {
  const field = document.getElementById("f-" + id) || document.querySelector("#filters input");
  field.value = value;
  field.dispatchEvent(new Event(field.tagName === "INPUT" ? "input" : "change")); } };
const count = () => parseInt(document.getElementById("count").textContent);
const all = {benchmark: "", arm: "", language: "", outcome: "any", text: ""};
const results = {};
for (const [name, values] of Object.entries(PROBES)) {
  choose({...all, ...values});
  results[name] = count(); }
choose(all);
results.cards = document.querySelectorAll(".item").length;
document.getElementById("more").click();
results.more = document.querySelectorAll(".item").length;
results.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
results.line = document.querySelector(".version li").textContent;
const node = document.createElement("pre");
node.id = "probe";
node.textContent = JSON.stringify(results);
document.body.append(node);
</script>"""
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.mark.skipif(
    BROWSER is None, reason="no chromium on this machine: the page's filters are not tried"
)
def test_filters_in_a_browser(world, tmp_path):
    runs = make_runs(world, unclear=0.1)
    write_results(tmp_path, runs, benchmarks=[world])
    probes = {
        "any": {},
        "x2x right": {"arm": "x2x", "outcome": "right"},
        "vi wrong": {"language": "vi", "outcome": "wrong"},
        "alike": {"arm": "base", "outcome": "alike"},
        "pivot": {"arm": "base", "outcome": "pivot"},
        "coin": {"outcome": "coin"},
        "differ": {"arm": "x2x", "outcome": "disagree"},
        "models": {"language": "vi", "outcome": "differ"},
        "text": {"text": world.items[3].versions["zh"].choices[0][4:]},
        "none": {"text": "no such words"},
    }
    page = (tmp_path / "report.html").read_text()
    probe = PROBE.replace("PROBES", json.dumps(probes))
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe + "</body>"))
    dom = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--dump-dom",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=500,900",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"file://{tmp_path / 'probe.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    results = json.loads(
        re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)[1].replace("&amp;", "&")
    )

    def right(a, gold):
        return a.candidates == (gold,)

    base, x2x = ({item.id: item for item in run.predictions[0].items} for run in runs)
    expected = {"any": 80, "none": 0}
    expected["x2x right"] = sum(
        all(right(i.answers[c], i.gold[c]) for c in LANGUAGES) for i in x2x.values()
    )
    expected["vi wrong"] = sum(
        not all(right(run[id].answers["vi"], run[id].gold["vi"]) for run in (base, x2x))
        for id in base
    )
    expected["alike"] = sum(
        {len(a.candidates) for a in i.answers.values()} == {1}
        and len({a.candidates for a in i.answers.values()}) == 1
        and not right(i.answers["en"], i.gold["en"])
        for i in base.values()
    )
    expected["pivot"] = sum(
        right(i.answers["en"], i.gold["en"])
        and not any(right(i.answers[c], i.gold[c]) for c in LANGUAGES[1:])
        for i in base.values()
    )
    expected["coin"] = sum(
        any(len(a.candidates) > 1 for i in (base[id], x2x[id]) for a in i.answers.values())
        for id in base
    )
    expected["differ"] = sum(
        len({a.candidates for a in i.answers.values()}) > 1 for i in x2x.values()
    )
    expected["models"] = sum(
        base[id].answers["vi"].candidates != x2x[id].answers["vi"].candidates for id in base
    )
    assert {name: results[name] for name in expected} == expected
    assert 0 < results["text"] < 80
    assert results["line"].startswith("(A) ")
    assert (results["cards"], results["more"]) == (15, 30)
    assert results["overflow"] <= 0  # no page scroll to the side at phone width
