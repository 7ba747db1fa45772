"""The program evaluate: short flags, names in the report, before and after."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from crossin_jax import evaluate as program
from crossin_jax.config import UserError
from crossin_jax.generation.engine import Engine
from tests.helpers import ONE_PROCESS, config_in


def flags(**given) -> SimpleNamespace:
    """The command line's flags."""
    return SimpleNamespace(
        **{
            "checkpoint": None,
            "out": None,
            "limit": None,
            "languages": None,
            "prompts": None,
            "untuned": None,
            "format": "text",
            "compare": None,
            "after": None,
            **ONE_PROCESS,
        }
        | given
    )


@pytest.fixture
def own_benchmark(pretrained, tmp_path):
    """A configuration that asks four questions in three languages, by two prompts."""
    rows = [
        {
            "id": f"q{i}",
            **{
                code: {"question": f"{code} {i}?", "choices": ["one", "two"], "answer": i % 2}
                for code in ("en", "es", "vi")
            },
        }
        for i in range(4)
    ]
    (tmp_path / "own.json").write_text(json.dumps(rows))
    config = config_in(tmp_path / "run", str(pretrained / "model"))
    config.evaluation = dataclasses.replace(
        config.evaluation,
        benchmarks=(str(tmp_path / "own.json"),),
        languages=("en", "es", "vi"),
        prompts=(2, 4),
        limit=3,
        method="choices",
        mode="strict",
    )
    return config


def silence(monkeypatch):
    """The engine gives the first choice, at once."""
    monkeypatch.setattr(
        Engine,
        "score",
        lambda _, prompts, choices, **__: [
            -np.arange(len(entry), dtype=float) for entry in choices
        ],
    )
    monkeypatch.setattr(Engine, "generate", lambda _, prompts, **__: [[] for _ in prompts])


ASKED = [  # flags, and the languages, prompts and number of items that they give
    ({}, ("en", "es", "vi"), ("2", "4"), 3),
    ({"languages": ["en"]}, ("en",), ("2", "4"), 3),
    ({"languages": ["Vietnamese", "eng_Latn"]}, ("vi", "en"), ("2", "4"), 3),
    ({"limit": 2}, ("en", "es", "vi"), ("2", "4"), 2),
    ({"prompts": ["5", "1"]}, ("en", "es", "vi"), ("5", "1"), 3),
    ({"limit": 1, "prompts": ["3"], "languages": ["es"]}, ("es",), ("3",), 1),
]


@pytest.mark.parametrize(("given", "languages", "prompts", "num_items"), ASKED)
def test_short_flags_ask_for_less(
    own_benchmark, monkeypatch, capsys, given, languages, prompts, num_items
):
    """--limit, --languages and --prompts narrow what the configuration asks; without them it
    holds.
    """
    silence(monkeypatch)
    program.main(own_benchmark, flags(**given))
    out = Path(own_benchmark.output_dir) / "evaluation-untuned"
    results = json.loads((out / "results.json").read_text())
    assert {block["method"] for block in results["blocks"]} == {"sum", "mean", "byte", "letter"}
    for block in results["blocks"]:
        (row,) = block["rows"]
        assert (tuple(block["languages"]), tuple(row["prompts"])) == (languages, prompts)
        assert row["num_items"] == block["num_items"] == num_items
    assert (results["mode"], results["title"], results["runs"][0]["name"]) == (
        "strict",
        "untuned",
        "untuned",
    )
    assert results["runs"][0]["seed"] == own_benchmark.seed
    logs = {
        f"own_{method}_p{number}.json"
        for method in ("sum", "mean", "byte", "letter")
        for number in prompts
    }
    assert {file.name for file in (out / "logs").iterdir()} == logs
    printed = capsys.readouterr().out
    assert (
        f"{num_items} items, {' '.join(languages)}" in printed
        and str(out / "report.html") in printed
    )


def test_a_comparison_shows_the_questions_that_the_logs_hold(own_benchmark, monkeypatch, capsys):
    """Of every benchmark: the file that it was read from may be gone."""
    silence(monkeypatch)
    program.main(own_benchmark, flags(limit=1))
    out = Path(own_benchmark.output_dir) / "evaluation-untuned"
    Path(own_benchmark.evaluation.benchmarks[0]).unlink()
    pair = {"compare": str(out), "after": str(out), "out": None}
    program.compare(SimpleNamespace(**pair, format="text"))
    html = (out / "comparison/report.html").read_text()
    (item,) = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])["items"]
    (asked,) = json.loads((out / "logs/own_sum_p2.json").read_text())
    for code, language in {"en": "English", "es": "Spanish", "vi": "Vietnamese"}.items():
        assert item["text"][code]["q"] == asked[language]["question"]
    for file in (out / "logs").iterdir():
        file.write_text("[")
    program.compare(SimpleNamespace(**pair, format="text"))
    assert '"text":' not in (out / "comparison/report.html").read_text()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts": ["one"]}, r"evaluation.prompts=\('one',\) is not one of harness"),
        ({"prompts": ["6"]}, r"evaluation.prompts=\(6,\) must be at most 5"),
        ({"limit": 0}, "evaluation.limit=0"),
        (
            {"languages": ["jp"]},
            r"evaluation.languages: 'jp' is not .*; did you mean ja \(Japanese",
        ),
        ({"languages": ["fr", "French"]}, "'fr' and 'French' are both fr"),
    ],
)
def test_short_flags_are_checked_like_settings(own_benchmark, given, words):
    with pytest.raises(UserError, match=words):
        program.main(own_benchmark, flags(**given))
    assert not Path(own_benchmark.output_dir).exists()


def test_a_checkpoint_is_reported_by_the_name_of_its_run(
    adapted, pretrained, tmp_path, monkeypatch, capsys
):
    """The report goes into --out, under the run's name; two reports are compared with --compare."""
    silence(monkeypatch)
    config = config_in(adapted, str(pretrained / "model"))
    for checkpoint, name in ((str(adapted), "tuned"), (None, "base")):
        program.main(config, flags(checkpoint=checkpoint, out=str(tmp_path / name)))
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert (
            results["runs"][0]["name"]
            == results["title"]
            == ("tiny_lora" if checkpoint else "untuned")
        )
    program.compare(flags(compare=str(tmp_path / "base"), after=str(tmp_path / "tuned")))
    results = json.loads((tmp_path / "tuned" / "comparison" / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["untuned", "tiny_lora"]
    assert results["blocks"][0]["rows"][1]["scores"]["accuracy"]["change"]["difference"] == 0
    with pytest.raises(UserError, match="--compare takes two folders"):
        program.compare(flags(compare=str(tmp_path / "base")))


def read(folder):
    return json.loads((folder / "results.json").read_text())


def names(folder):
    return [run["name"] for run in read(folder)["runs"]]


def test_the_untuned_model_is_a_row_by_one_setting(adapted, pretrained, tmp_path, monkeypatch):
    """In the report of a run and in comparisons, where two runs share it."""
    silence(monkeypatch)
    config = config_in(adapted, str(pretrained / "model"))
    config.evaluation = dataclasses.replace(config.evaluation, method="generate")
    for name, given in (("a", {"untuned": True}), ("b", {"untuned": True}), ("c", {})):
        config.name = name
        program.main(config, flags(checkpoint=str(adapted), out=str(tmp_path / name), **given))
    assert names(tmp_path / "a") == ["untuned", "a"] and names(tmp_path / "c") == ["c"]
    weights = [run["provenance"]["model"]["weights"] for run in read(tmp_path / "a")["runs"]]
    assert weights[0] != weights[1]
    for first, second, rows in (
        ("a", "b", ["untuned", "a", "b"]),
        ("a", "c", ["untuned", "a", "c"]),
        ("c", "a", ["c", "untuned", "a"]),
    ):
        program.compare(flags(compare=str(tmp_path / first), after=str(tmp_path / second)))
        assert names(tmp_path / second / "comparison") == rows
    # The setting does not ask the run again: its finished parts stay valid.
    monkeypatch.setattr(Engine, "score", None)
    monkeypatch.setattr(Engine, "generate", None)
    config.name = "a"
    program.main(config, flags(checkpoint=str(adapted), out=str(tmp_path / "a")))
    assert names(tmp_path / "a") == ["a"]


def test_models_without_training_have_no_untuned_row(tmp_path):
    with pytest.raises(UserError, match="untuned=True, but model.path is None"):
        program.main(config_in(tmp_path), flags(untuned=True))


@pytest.mark.parametrize(
    ("checkpoint", "folder"),
    [
        (None, "run/evaluation-untuned"),
        ("run", "run/evaluation"),
        ("run/checkpoints/3", "run/evaluation-step3"),
    ],
)
def test_every_model_has_a_folder_of_its_own(checkpoint, folder, tmp_path):
    config = config_in(tmp_path / "run")
    assert program.default_folder(config, checkpoint) == str(tmp_path / folder)


def test_a_report_of_another_model_is_kept(
    own_benchmark, adapted, pretrained, tmp_path, monkeypatch
):
    """It moves beside the new one; the same model's report is replaced."""
    silence(monkeypatch)
    out = tmp_path / "out"
    config = config_in(adapted, str(pretrained / "model"))
    config.evaluation = dataclasses.replace(config.evaluation, method="generate")
    asked = (own_benchmark, None), (own_benchmark, None), (config, str(adapted / "checkpoints/3"))
    for settings, checkpoint in (*asked, (config, str(adapted)), asked[-1]):
        program.main(settings, flags(checkpoint=checkpoint, out=str(out)))
    found = {folder.name: read(folder)["runs"][0] for folder in tmp_path.glob("out*")}
    steps = {name: run["provenance"]["model"].get("step") for name, run in found.items()}
    (untuned,) = set(steps) - {"out", "out-step3", "out-step6"}
    assert steps == {"out": 3, "out-step3": 3, "out-step6": 6, untuned: None}
    assert found[untuned]["name"] == "untuned"
    assert untuned == f"out-{found[untuned]['provenance']['model']['weights'][:8]}"
    assert (tmp_path / untuned / "logs").is_dir() and (tmp_path / untuned / "report.html").is_file()
