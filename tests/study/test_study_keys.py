"""What makes a study's cell run again, and what its report holds; nothing is trained, and answers
are made up.
"""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from crossin_jax.config import Cell, Component, Config, Data, Source, Study, UserError
from crossin_jax.evaluation import metrics
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.study import run as program
from crossin_jax.study.run import (
    cell_keys,
    is_done,
    parse_budget,
    run_study,
    with_budget,
    write_report,
)
from tests.evaluation.made_up import answer_benchmark, know
from tests.helpers import config_in
from tests.test_fields import TABLE, change

# ── keys ─────────────────────────────────────────────────────────────────────────────────────────

# Settings that change nothing that is learned: where results go, how fast and how often, and the
# evaluation
FREE = {
    "Config.name",
    "Config.output_dir",
    "Data.eval_sources",
    "Data.workers",
    "Model.attention",
    "Model.remat",
    *(f"Mesh.{name}" for name in ("data", "fsdp", "tensor")),
    *(
        f"Train.{name}"
        for name in (
            "log_every",
            "eval_every",
            "benchmark_every",
            "checkpoint_every",
            "checkpoint_minutes",
            "keep",
            "keep_every",
            "tensorboard",
            "loss_chunk",
        )
    ),
    *(name for name in TABLE if name.startswith("Evaluation.")),
}
# values that are allowed where those of the table need a real folder or another setting
VALUES = {
    "Source.name": ("data.sources.1.name", "third"),
    "Model.architecture": ("model.architecture.width", 64),
    "Component.share": (
        "data.components",
        (
            Component(kind="base", source="facts", share=0.25),
            Component(kind="x2x", source="facts", share=0.75),
        ),
    ),
    "Data.sources": ("data.sources", (Source(name="rows", path="rows.jsonl"),)),
}


def base_of(name: str) -> Config:
    """A configuration in which the field of the table matters."""
    if name in ("NEW", "Model.architecture"):
        return config_in(Path("new"))
    config = config_in(Path("tuned"), "model")
    if name not in ("LORA", "TRAINS", "EPOCHS", "HUB"):
        kind = {"TRANS": "trans", "X2X": "x2x"}.get(name, "base")
        config.data = Data(
            languages=("en", "zh", "vi", "es"),
            components=(Component(kind=kind, source="rows"), Component(kind="x2x", source="rows")),
            sources=(
                Source(name="rows", path="rows.jsonl"),
                Source(name="more", path="more.jsonl"),
            ),
        )
    return config


def key_of(config: Config, **cell) -> str:
    return cell_keys(
        Study(name="one", output_dir="out", cells=(Cell(name="cell", config=config, **cell),))
    )["cell"]


@pytest.mark.parametrize("field", TABLE)
def test_every_setting_that_is_learned_from_is_part_of_the_key(field):
    """A cell trains again after a change of each setting but the free ones."""
    base, path, value, _ = TABLE[field]
    path, value = VALUES.get(field, (path, value))
    config = base_of(field if field == "Model.architecture" else base)
    before = key_of(config)
    assert key_of(copy.deepcopy(config)) == before
    change(config, path, copy.deepcopy(value))
    assert (key_of(config) == before) == (field in FREE)


def test_keys_follow_what_a_cell_needs_and_its_budget(monkeypatch):
    """A base's key reaches every cell above it; a budget counts; names, tables and exports do
    not.
    """

    def keys(change=None, **last):
        configs = [config_in(Path(name), "model") for name in "abc"]
        if change:
            configs[change[0]].optim.learning_rate = change[1]
        return cell_keys(
            Study(
                name="three",
                output_dir="out",
                cells=(
                    Cell(name="a", config=configs[0]),
                    Cell(name="b", config=configs[1], needs=("a",)),
                    Cell(name="c", config=configs[2], **{"needs": ("b",)} | last),
                ),
            )
        )

    before = keys()
    differ = {
        name: {cell for cell in "abc" if told[cell] != before[cell]}
        for name, told in {
            "a": keys((0, 1e-3)),
            "b": keys((1, 1e-3)),
            "c": keys((2, 1e-3)),
            "budget": keys(budget="tokens=5"),
            "needs": keys(needs=("a",)),
            "both": keys(needs=("a", "b")),
            "nothing": keys(needs=()),
            "tables": keys(tables=("1",)),
            "exports": keys(exports=True),
        }.items()
    }
    assert differ == {
        "a": {"a", "b", "c"},
        "b": {"b", "c"},
        "c": {"c"},
        "budget": {"c"},
        "needs": {"c"},
        "both": {"c"},
        "nothing": {"c"},
        "tables": set(),
        "exports": set(),
    }
    assert (
        keys(budget="tokens=5")["c"] != keys(budget="tokens=6")["c"] != keys(budget="steps=6")["c"]
    )
    monkeypatch.setattr(program, "FORMAT", program.FORMAT + 1)
    assert all(keys()[cell] != before[cell] for cell in "abc")


# ── what runs ────────────────────────────────────────────────────────────────────────────────────

LANGUAGES = ("en", "es")


def answer(config: Config, seed: int):
    """Made-up free answers of an arm to the configuration's benchmarks, some of them unclear."""
    skills = know(LANGUAGES, 0.8, {"mono": 0.2, "pairs": 0.7}.get(config.name, 0.4))
    return [
        answer_benchmark(
            load_benchmark(name, LANGUAGES, limit=config.evaluation.limit, seed=config.seed),
            skills,
            method="generate",
            seed=seed,
            unclear=0.3,
        )
        for name in config.evaluation.benchmarks
    ]


@pytest.fixture
def done(monkeypatch):
    """Every action of the study's programs, in order; training, export and evaluation are
    stand-ins.
    """
    actions = []

    def train(config):
        actions.append(("train", config.name, config.train.steps))
        (Path(config.output_dir) / "weights").touch()

    def export(folder, kind, out):
        assert (kind, out) == ("hf", folder / "model")
        actions.append(("export", json.loads((folder / "key.json").read_text())["key"]))

    def evaluate(config, checkpoint, out, benchmarks):
        assert checkpoint == Path(config.output_dir) and out == checkpoint / "evaluation"
        actions.append(("evaluate", config.name, config.evaluation.shots))
        return answer(config, config.seed), {}

    for name, stand_in in (("train", train), ("export", export), ("evaluate", evaluate)):
        monkeypatch.setattr(program, name, stand_in)
    return actions


@pytest.fixture
def make_study(tmp_path, pretrained):
    """A base without benchmarks, and the given arms on it: (arm, seed, tables)."""

    def make(*arms, mode="expectation", budget=None, **changes):
        base = config_in(tmp_path / "start", str(pretrained / "model"), name="start")
        base.evaluation = dataclasses.replace(base.evaluation, benchmarks=())
        cells = [Cell(name="start", config=base, exports=True)]
        for arm, seed, *tables in arms or (("pairs", 1), ("mono", 1)):
            config = config_in(
                tmp_path / f"{arm}{seed}", str(pretrained / "model"), name=arm, seed=seed
            )
            config.evaluation = dataclasses.replace(
                config.evaluation, method="generate", mode=mode, limit=8
            )
            cells.append(
                Cell(
                    name=f"{arm}/{seed}",
                    config=config,
                    needs=("start",),
                    tables=tuple(tables),
                    budget=budget,
                )
            )
        for path, value in changes.items():
            number, path = path.split("__", 1)
            change(cells[int(number[1:])].config, path.replace("__", "."), value)
        return Study(name="Made up", output_dir=str(tmp_path / "report"), cells=tuple(cells))

    return make


START = [("train", "start", 6), ("export",)]
PAIRS, MONO = ([("train", arm, 6), ("evaluate", arm, 0)] for arm in ("pairs", "mono"))
RERUNS = {  # a change of one cell → what runs, and the cells whose folder is made anew
    "nothing": ({}, [], ()),
    "log_every": ({"_1__train__log_every": 99}, [], ()),
    "learning rate": ({"_1__optim__learning_rate": 9e-3}, PAIRS, (1,)),
    "the seed": ({"_2__seed": 9}, MONO, (2,)),
    "the base": ({"_0__optim__learning_rate": 9e-3}, START + PAIRS + MONO, (0, 1, 2)),
    "shots": ({"_1__evaluation__shots": 2}, [("train", "pairs", 6), ("evaluate", "pairs", 2)], ()),
    "limit": ({"_2__evaluation__limit": 5}, MONO, ()),
}


@pytest.mark.parametrize("what", RERUNS)
def test_a_changed_cell_runs_again_and_no_other(what, make_study, done):
    """Weights of other settings are removed; a changed evaluation keeps the weights and is made
    again.
    """
    changes, actions, anew = RERUNS[what]
    run_study(make_study())
    assert [a[:1] if a[0] == "export" else a for a in done] == START + PAIRS + MONO
    marks = [Path(cell.config.output_dir) / "metrics.jsonl" for cell in make_study().cells]
    for mark in marks:
        mark.touch()
    done.clear()
    changed = make_study(**changes)
    runs = run_study(changed)
    assert [a[:1] if a[0] == "export" else a for a in done] == actions
    assert tuple(i for i, mark in enumerate(marks) if not mark.exists()) == anew
    assert [(run.name, run.seed, run.predictions) for run in runs] == [
        (cell.config.name, cell.config.seed, answer(cell.config, cell.config.seed))
        for cell in changed.cells[1:]
    ]
    done.clear()
    run_study(changed)
    assert not done


def test_every_setting_of_the_evaluation_makes_its_cell_stale(make_study, done):
    """A cell is done with the settings that it was evaluated with, and with no others."""
    run_study(make_study())
    fields = [
        name for name in TABLE if name.startswith("Evaluation.") and name != "Evaluation.batch_size"
    ]
    for field in ("nothing", *fields):
        study = make_study()
        if field != "nothing":
            value = ("cross_world:test",) if field == "Evaluation.benchmarks" else TABLE[field][2]
            change(study.cells[1].config, TABLE[field][1], value)
        keys = cell_keys(study)
        assert [is_done(cell, keys) for cell in study.cells] == [True, field == "nothing", True], (
            field
        )


def test_a_cell_is_not_done_before_it_is_evaluated(make_study, done, monkeypatch):
    """Where the evaluation was interrupted, the cell is trained to its end and evaluated again."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(program, "evaluate", interrupt)
        run_study(make_study())
    keys = cell_keys(make_study())
    assert [is_done(cell, keys) for cell in make_study().cells] == [True, False, False]
    assert write_report(make_study()) is None
    done.clear()
    run_study(make_study())
    assert done == PAIRS + MONO


def test_a_budget_reaches_training_and_spares_the_base(make_study, done):
    """--budget sets the steps of the cells that are evaluated; the model that they start from keeps
    its own.
    """
    study = make_study(("pairs", 1))
    given = with_budget(study, "steps=3")
    assert given.cells[0] == study.cells[0]
    assert given.cells[1] == dataclasses.replace(study.cells[1], budget="steps=3")
    assert (given.name, given.output_dir) == (study.name, study.output_dir)
    run_study(given)
    assert [a for a in done if a[0] == "train"] == [("train", "start", 6), ("train", "pairs", 3)]
    assert cell_keys(given)["start"] == cell_keys(study)["start"]


@pytest.mark.parametrize(
    "text",
    ["steps", "steps=", "steps=0", "tokens=-1", "examples=1.5", "epochs=3", "=4", "tokens=1e6"],
)
def test_a_budget_is_a_kind_and_a_whole_number(text, make_study):
    with pytest.raises(UserError, match="steps, examples or tokens and a number"):
        with_budget(make_study(), text)


def test_budgets_as_they_are_written():
    assert [parse_budget(f"{kind}=12") for kind in ("steps", "examples", "tokens")] == [
        ("steps", 12),
        ("examples", 12),
        ("tokens", 12),
    ]


# ── the report ───────────────────────────────────────────────────────────────────────────────────


def scores_of(config: Config, mode: metrics.Mode) -> dict[str, float]:
    (predictions,) = answer(config, config.seed)
    return metrics.evaluate(predictions, mode, seed=config.seed).flatten()


@pytest.mark.parametrize("mode", metrics.MODES)
def test_a_report_scores_by_the_mode_of_its_cells(mode, make_study, done, capsys):
    """evaluation.mode decides files and printed tables; answers without a model stand beside the
    arms.
    """
    study = make_study(mode=mode)
    run_study(study)
    page = write_report(study)
    assert page == Path(study.output_dir) / "report.html" and page.exists()
    results = json.loads((page.parent / "results.json").read_text())
    assert (results["mode"], results["title"]) == (mode, "Made up")
    (block,) = [b for b in results["blocks"] if b["tag"] is None]
    assert [row["arm"] for row in block["rows"]] == [
        "pairs",
        "mono",
        "matching strings",
        "commonest answer",
    ]
    assert [row["is_baseline"] for row in block["rows"]] == [False, False, True, True]
    values = {"expectation": set(), "seaeval": set(), "strict": set()}
    printed = capsys.readouterr().out
    for cell, row in zip(study.cells[1:], block["rows"], strict=False):
        for name, value in scores_of(cell.config, mode).items():
            assert row["scores"][name]["value"] == pytest.approx(value)
        for other in metrics.MODES:
            values[other].add(round(scores_of(cell.config, other)["accuracy"], 3))
        assert f"{row['scores']['accuracy']['value']:.3f}".lstrip("0") in printed
    assert values["expectation"] != values["strict"] != values["seaeval"]


def arms_by_table(study: Study) -> dict[str, list[tuple[str, list[str]]]]:
    """{table: [(arm, its seeds)]} of the report, rules left out."""
    results = json.loads((Path(study.output_dir) / "results.json").read_text())
    assert results["mode"] == study.cells[1].config.evaluation.mode
    return {
        name: [(arm["arm"], list(arm["seeds"])) for arm in blocks[0]["arms"] if not arm["rule"]]
        for name, blocks in results["tables"].items()
    }


def test_a_table_holds_its_own_cells(make_study, done, capsys):
    """Cells stand in the tables that they name, in the study's order; one may stand in several."""
    study = make_study(
        ("pairs", 1, "25 %"),
        ("pairs", 2, "25 %"),
        ("mono", 1, "25 %", "100 %"),
        ("base", 2, "100 %"),
        mode="strict",
    )
    run_study(study)
    write_report(study)
    assert arms_by_table(study) == {
        "25 %": [("pairs", ["1", "2"]), ("mono", ["1"])],
        "100 %": [("mono", ["1"]), ("base", ["2"])],
    }
    printed = capsys.readouterr().out.split("== ")[1:]
    assert [part.splitlines()[0] for part in printed] == ["25 %", "100 %"]
    assert "base" not in printed[0] and "pairs" not in printed[1]
    for table in ("25-percent", "100-percent"):
        own = json.loads((Path(study.output_dir) / "tables" / table / "results.json").read_text())
        assert own["mode"] == "strict" and own["title"].startswith("Made up: ")
    results = json.loads((Path(study.output_dir) / "results.json").read_text())
    for cell, table, place in ((study.cells[3], "25 %", 1), (study.cells[4], "100 %", 1)):
        scores = results["tables"][table][0]["arms"][place]["scores"]
        for name, value in scores_of(cell.config, "strict").items():
            assert scores[name]["value"] == pytest.approx(value, abs=1e-6)


def test_a_report_leaves_out_what_is_not_done(make_study, done):
    """Stale cells, cells that did not run and the base are not in the report."""
    arms = (("pairs", 1, "one"), ("mono", 1, "one"), ("base", 2, "two"))
    assert write_report(make_study(*arms)) is None
    run_study(make_study(*arms), slice(0, 3))
    study = make_study(*arms, _2__evaluation__limit=5)
    assert write_report(study)
    assert arms_by_table(study) == {"one": [("pairs", ["1"])]}
    assert [run.name for run in run_study(study, slice(0, 0))] == ["pairs"]
