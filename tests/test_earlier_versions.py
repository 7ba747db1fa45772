"""What earlier versions wrote is read, continued and counted as before.

golden/make_runs.py made golden/runs.tar.gz. A change that breaks one of these tests breaks the runs
of users: it needs a new format number and a way to go on.
"""

import dataclasses
import gzip
import json
import platform
import re
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from crossin_jax import load_model, score
from crossin_jax.checkpoint.open import open_model
from crossin_jax.config import Cell, Data, Study, from_dict
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.pipeline import load_tokenizer
from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluate import evaluate
from crossin_jax.report.results import read_results, write_results
from crossin_jax.study.run import cell_keys, is_done
from crossin_jax.train import train
from tests.test_train import read_arrays, read_losses

GOLDEN = Path(__file__).parent / "golden/runs.tar.gz"


@pytest.fixture
def golden(tmp_path, monkeypatch) -> Path:
    """The unpacked fixtures; paths in them are relative to this folder."""
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_json(path: str | Path):
    """The content of a JSON file, which may be compressed."""
    content = Path(path).read_bytes()
    return json.loads(gzip.decompress(content) if str(path).endswith(".gz") else content)


def has_the_same_processor() -> bool:
    """Whether this processor is of the kind that the fixtures were made on; others round sums in
    another order.
    """
    made_on = read_json("machine.json")
    flags = next(
        (
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("flags")
        ),
        "",
    )
    return made_on == {"machine": platform.machine(), "flags": sorted(flags.split()[2:])}


@pytest.mark.parametrize("run", ["full", "lora"])
def test_a_run_continues(run, golden):
    """From step 3 to 6: the losses and every stored array of the uninterrupted run, bit for bit
    where it can be.
    """
    expected, losses = read_arrays(golden / run, 6), read_losses(golden / run)
    position = read_json(f"{run}/checkpoints/6/data/metadata")
    shutil.rmtree(f"{run}/checkpoints/6")
    Path(run, "metrics.jsonl").unlink()
    train(from_dict(read_json(f"{run}/config.json")))
    assert sorted(read_losses(golden / run)) == [4, 5, 6]
    assert read_json(f"{run}/checkpoints/6/data/metadata") == position
    found = read_arrays(golden / run, 6)
    assert expected.keys() == found.keys()
    if has_the_same_processor():
        assert read_losses(golden / run) == {step: losses[step] for step in (4, 5, 6)}
        for name, array in expected.items():
            np.testing.assert_array_equal(array, found[name], err_msg=name)
    else:
        for step, loss in read_losses(golden / run).items():
            assert loss == pytest.approx(losses[step], rel=1e-4)
        for name, array in expected.items():
            distance = np.linalg.norm(found[name].astype(np.float64) - array)
            assert distance <= 1e-3 * np.linalg.norm(array.astype(np.float64)), name


# Measures that came later: results of earlier versions lack them.
LATER = re.compile(
    "chances|kind|rankc|agreement_right|(transfer|conductivity)(/.+)?|pairs|measures"
    "|line_pass|word_pass"
)


def assert_same(before, after, place="blocks"):
    """Equal JSON values: numbers up to the order of their sum, and nothing else but measures that
    came later. Proportions of so few items have Wilson's interval since.
    """
    if re.search(r"\.scores\.(accuracy|consistency_|AC3_)[^.]*\.(low|high)$", place):
        return
    if isinstance(before, dict):
        later = after.keys() - before.keys()
        assert before.keys() <= after.keys() and all(map(LATER.fullmatch, later)), (place, later)
        for name in before:
            assert_same(before[name], after[name], f"{place}.{name}")
    elif isinstance(before, list):
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            assert_same(one, other, f"{place}[{i}]")
    elif isinstance(before, float):
        assert after == pytest.approx(before, rel=1e-12, abs=1e-15), place
    else:
        assert before == after, place


def test_an_evaluation_is_read_and_repeated(golden):
    """Its answers come back with the scores of its results.json, and the run still gives the same
    answers.
    """
    runs = read_results("lora/evaluation")
    write_results("again", runs, mode="expectation", title="again")
    before, after = read_json("lora/evaluation/results.json"), read_json("again/results.json")
    assert before["blocks"]
    assert_same(before["blocks"], after["blocks"])
    config = from_dict(read_json("lora/config.json"))
    found, _ = evaluate(config, "lora", golden / "asked")
    assert [p.method for p in found] == [p.method for p in runs[0].predictions]
    for one, other in zip(found, runs[0].predictions, strict=True):
        for mine, theirs in zip(one.items, other.items, strict=True):
            assert (mine.id, mine.gold, mine.tags) == (theirs.id, theirs.gold, theirs.tags)
            for code, answer in mine.answers.items():
                assert answer.candidates == theirs.answers[code].candidates
                if answer.scores is not None:
                    assert answer.scores == pytest.approx(theirs.answers[code].scores, abs=1e-4)


def test_the_cells_of_a_finished_study_are_done(golden):
    """No cell of a study that an earlier version finished runs again."""
    cells = [
        Cell(
            **(
                cell
                | {
                    "config": from_dict(cell["config"]),
                    "needs": tuple(cell["needs"]),
                    "tables": tuple(cell["tables"]),
                }
            )
        )
        for cell in read_json("study/cells.json")
    ]
    study = Study(name="golden", output_dir="study", cells=tuple(cells))
    keys = cell_keys(study)
    assert len(cells) == 3
    assert [is_done(cell, keys) for cell in cells] == [True] * 3
    assert {name: read_json(f"study/{name}/key.json")["key"] for name in keys} == keys


def test_mixtures_draw_the_same_examples_under_the_same_hash(golden):
    for made in read_json("mixtures.json"):
        data = from_dict(made["data"], Data)
        mixture = Mixture(data, load_corpora(data, made["seed"]), made["seed"])
        manifest = json.loads(json.dumps(mixture.manifest()))
        assert manifest == made["manifest"] | {"version": manifest["version"]}
        found = [
            json.loads(json.dumps(dataclasses.asdict(example)))
            for example in mixture.take(np.arange(60))
        ]
        assert found == made["examples"]


def test_prompts_have_the_same_ids_and_hashes(golden):
    tokenizer = load_tokenizer("full/tokenizer")
    made = read_json("renderers.json")
    assert len(made) > 10
    for entry in made:
        renderer = Renderer(
            tokenizer, entry["template"], system=entry["system"], tokenization=entry["tokenization"]
        )
        assert renderer.hash == entry["hash"], entry["template"]
        assert (
            renderer.render_prompt("Name the river.", "It flows through Paris.").tolist()
            == entry["prompt"]
        )


def test_exported_models_and_adapters_load(golden):
    """The exported model computes as its run; the adapter on it as the run that trained it."""
    tokens = np.arange(3, 40, dtype=np.int32)[None]
    adapter = read_json("adapter/adapter_config.json")
    Path("adapter/adapter_config.json").write_text(
        json.dumps(adapter | {"base_model_name_or_path": "model"})
    )
    for export, run in (("model", "full"), ("adapter", "lora")):
        restored = open_model(run)
        with jax.set_mesh(restored.mesh):
            expected = nnx.merge(restored.graphdef, restored.state)(np.repeat(tokens, 8, axis=0))[
                :1
            ]
        np.testing.assert_allclose(load_model(export)(tokens), expected, atol=1e-5)


def test_a_log_is_scored_alike(golden):
    """Scores, intervals and alignments of a log with ties, empty and unreadable answers."""
    options = {
        "log": "log.json",
        "out": "again.json",
        "alignments": "aligned.json",
        "mode": "expectation",
        "rankc": "softmax",
        "few_shot": "auto",
        "seed": 0,
        "format": "text",
    }
    score.main(type("Options", (), options))
    before, after = read_json("score.json"), read_json("again.json")
    for record in (before, after):
        for name in ("commit", "version"):
            record["crossin_jax"].pop(name, None)
    assert_same(before, after, "score")
    assert read_json("alignments.json") == read_json("aligned.json")
