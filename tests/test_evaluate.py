"""A checkpoint through the benchmark to its report: cached, honest about the template, in SeaEval's
layout too.
"""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from crossin_jax import provenance
from crossin_jax.checkpoint.open import open_model
from crossin_jax.config import UserError, to_dict
from crossin_jax.data.kinds import add_tag
from crossin_jax.data.pipeline import open_renderer
from crossin_jax.evaluate import evaluate, split_pair, write_run
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.seaeval import predictions_of, read_log
from crossin_jax.generation import batching
from crossin_jax.generation.engine import Engine
from crossin_jax.report.results import read_pair, read_results
from crossin_jax.report.summary import Run
from crossin_jax.train import next_command
from tests.conftest import REPOSITORY
from tests.helpers import as_earlier_version, config_in


@pytest.fixture(scope="module")
def evaluated(adapted, pretrained, tmp_path_factory):
    """(config, folder, predictions, provenance) of the adapted run."""
    config = config_in(adapted, str(pretrained / "model"))
    out = tmp_path_factory.mktemp("evaluation")
    predictions, source = evaluate(config, adapted, out)
    write_run(config, Run("tiny", 1, predictions, source), out)
    return config, out, predictions, source


def test_every_method_answers_every_item_in_every_language(evaluated):
    _, _, predictions, source = evaluated
    assert [p.method for p in predictions] == ["sum", "mean", "byte", "generate"]
    for p in predictions:
        assert len(p.items) == 6 and p.languages == ("en", "es")
        assert all(set(item.answers) == {"en", "es"} for item in p.items)
    assert source["compilations"] > 0 and source["template"]
    assert source["model"]["step"] == 6 and source["model"]["manifest"]


def test_choices_are_scored_with_the_tokens_of_training(evaluated, adapted, pretrained):
    """The likelihood of a choice is the model's own loss on the record that training would see."""
    config, _, predictions, _ = evaluated
    restored = open_model(adapted)
    renderer = open_renderer(config, restored.tokenizer)
    item = load_benchmark("cross_world:dev", ("en", "es"), limit=1, seed=config.seed).items[0]
    version = item.versions["es"]
    with jax.set_mesh(restored.mesh):
        model = nnx.merge(restored.graphdef, restored.state)
        for choice, score in zip(
            version.choices, predictions[0].items[0].answers["es"].scores, strict=True
        ):
            rendered = renderer.render_answer(
                *add_tag(version.question, "", "es", "es", "sentence"), choice[4:]
            )
            logits = np.asarray(model(rendered.ids[None, :-1]), np.float64)[0]
            log_probs = (
                logits
                - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
                - logits.max(-1, keepdims=True)
            )
            taken = np.take_along_axis(log_probs, rendered.ids[1:, None], 1)[:, 0]
            assert score == pytest.approx(taken[rendered.loss_mask[1:]].sum(), abs=2e-4)


def test_finished_parts_are_not_asked_again(evaluated, adapted, monkeypatch):
    config, out, predictions, _ = evaluated
    monkeypatch.setattr(Engine, "score", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: pytest.fail("asked again"))
    assert evaluate(config, adapted, out)[0] == predictions
    changed = dataclasses.replace(config, seed=2)  # other items: nothing of the cache may be used
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        evaluate(changed, adapted, out)


OTHER_FORMS = {"template": "alpaca", "system": "Be brief.", "tokenization": "apart", "tag": "input"}


@pytest.mark.parametrize("field", OTHER_FORMS)
def test_another_form_than_in_training_is_refused(evaluated, adapted, field):
    """A checkpoint is asked with the template, system prompt, tokenization and tag that it
    knows.
    """
    config, out, _, _ = evaluated
    value, trained = OTHER_FORMS[field], getattr(config.data, field)
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, **{field: value}))
    with pytest.raises(
        UserError,
        match=f"data.{field}={value!r}, but the model was trained with "
        f"{trained!r}.*evaluation.template",
    ):
        evaluate(changed, adapted, out)


def test_another_form_is_taken_where_it_is_asked_for(evaluated, adapted, tmp_path, monkeypatch):
    """evaluation.template is the form of every question, whatever the checkpoint was trained
    with.
    """
    config = evaluated[0]
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, tag="none", system="Be brief."),
        evaluation=dataclasses.replace(
            config.evaluation, template="chatml", method="generate", limit=1
        ),
    )
    asked = []
    monkeypatch.setattr(
        Engine, "generate", lambda _, prompts, **__: asked.extend(prompts) or [[], []]
    )
    _, source = evaluate(config, adapted, tmp_path)
    tokenizer = open_model(adapted).tokenizer
    item = load_benchmark("cross_world:dev", ("en", "es"), limit=1, seed=config.seed).items[0]
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in asked] == [
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{version.question}<|im_end|>\n"
        "<|im_start|>assistant\n"
        for version in item.versions.values()
    ]
    assert source["template"] != evaluated[3]["template"]


def test_results_say_what_was_evaluated(evaluated, adapted):
    """Provenance names step, run, template, items and their source; predictions go by these
    names.
    """
    config, out, predictions, source = evaluated
    stored = json.loads((out / "results.json").read_text())["runs"]
    assert stored == [{"name": "tiny", "seed": 1, "provenance": json.loads(json.dumps(source))}]
    assert (source["model"]["step"], source["model"]["run"]) == (6, str(adapted))
    assert source["template"] == open_renderer(config, open_model(adapted).tokenizer).hash
    benchmark = load_benchmark("cross_world:dev", ("en", "es"), limit=6, seed=config.seed)
    assert source["benchmarks"] == {
        "cross_world:dev": {
            "source": benchmark.source,
            "fingerprint": benchmark.fingerprint,
            "items": 6,
            "languages": ["en", "es"],
        }
    }
    other = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, top_k=9))
    again = provenance.describe(to_dict(config))
    assert (
        source["config_hash"]
        == again["config_hash"]
        != provenance.describe(to_dict(other))["config_hash"]
    )
    assert {key: source[key] for key in again} == again
    for p in predictions:
        assert [item.id for item in p.items] == [item.id for item in benchmark.items]
        for item, asked in zip(p.items, benchmark.items, strict=True):
            assert item.gold == {code: version.answer for code, version in asked.versions.items()}
            assert (item.num_choices, item.tags) == (len(asked.versions["en"].choices), asked.tags)


def test_results_come_back_and_logs_have_seaevals_layout(evaluated):
    config, out, predictions, _ = evaluated
    assert read_results(out)[0].predictions == predictions
    results = json.loads((out / "results.json").read_text())
    assert results["runs"][0]["provenance"]["commit"] is not None
    log = read_log(out / "logs" / "cross_world_dev_generate_p0.json")
    again = predictions_of(log) if not hasattr(log, "items") else log
    expected = [item.answers["es"].candidates for item in predictions[3].items]
    assert [item.answers["Spanish"].candidates for item in again.items] == expected
    with pytest.raises(UserError, match="does not exist"):
        read_pair(out, out / "nowhere")


def test_no_benchmark_and_no_checkpoint_are_user_errors(adapted, pretrained, tmp_path):
    config = config_in(adapted, str(pretrained / "model"))
    config.evaluation = dataclasses.replace(config.evaluation, benchmarks=())
    with pytest.raises(UserError, match=r"evaluation.benchmarks is empty"):
        evaluate(config, adapted, tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate(config_in(adapted, str(pretrained / "model")), tmp_path, tmp_path)


def test_the_base_model_can_be_evaluated(pretrained, tmp_path):
    config = config_in(tmp_path, str(pretrained / "model"))
    config.evaluation = dataclasses.replace(config.evaluation, method="choices", limit=2)
    predictions, source = evaluate(config, None, tmp_path / "out")
    assert len(predictions) == 3 and source["model"]["base"] == str(pretrained / "model")


def test_compare_takes_two_folders():
    argv = ["evaluate", "--compare", "a", "b"]
    assert split_pair(argv) and argv == ["evaluate", "--compare", "a", "--after=b"]
    argv = ["evaluate", "--compare=a", "b", "--out=c"]
    assert split_pair(argv) and argv == ["evaluate", "--compare=a", "--after=b", "--out=c"]
    assert not split_pair(["evaluate", "--config=x.py"])


def test_the_border_between_prompt_and_choices_is_shared():
    rows = [np.array([1, 2, 3]), np.array([1, 2]), np.array([1, 2, 4, 5])]
    assert batching.common_prefix(rows) == 2
    assert batching.common_prefix([np.array([1, 2]), np.array([3, 2])]) == 0


def test_the_command_that_train_prints_next_runs(pretrained, adapted, tmp_path):
    """A run with benchmarks is evaluated with its own settings, from wherever it lies; one without
    is talked to.
    """
    for run, variant in ((adapted, str(pretrained / "model")), (pretrained, "pretrain")):
        moved = tmp_path / f"a folder/{run.name}"
        shutil.copytree(run, moved)
        command = next_command(config_in(moved, variant), moved)
        ended = subprocess.run(
            command.replace("python", sys.executable, 1),
            shell=True,
            cwd=REPOSITORY,
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert ended.returncode == 0 and "error" not in ended.stderr, ended.stderr
    results = json.loads(
        (tmp_path / "a folder" / adapted.name / "evaluation/results.json").read_text()
    )
    assert {block["method"] for block in results["blocks"]} == {"sum", "mean", "byte", "generate"}


def replace_weights(folder, factor):
    """Other weights under the same names in the same file."""
    (file,) = folder.glob("*.safetensors")
    (folder / "origin.json").unlink(missing_ok=True)  # it would name the other weights
    save_file(
        {name: array * np.float32(factor) for name, array in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )


def test_other_weights_in_the_same_folder_are_asked_anew(
    pretrained, adapted, tmp_path, monkeypatch
):
    """The cache knows a base model and the base under a run's adapter by their content, not by
    their path.

    A run that knows its base refuses another one; a run of an earlier version does not know it.
    """
    shutil.copytree(pretrained / "model", tmp_path / "base")
    config = config_in(tmp_path / "out", str(tmp_path / "base"))
    asked = []
    score = Engine.score
    monkeypatch.setattr(
        Engine, "score", lambda *args, **options: asked.append(1) or score(*args, **options)
    )
    config.evaluation = dataclasses.replace(config.evaluation, method="choices")
    run = tmp_path / "run"
    as_earlier_version(shutil.copytree(adapted, run))
    for metadata in run.glob("checkpoints/*/config/metadata"):
        metadata.write_text(
            metadata.read_text().replace(str(pretrained / "model"), str(tmp_path / "base"))
        )
    replace_weights(tmp_path / "base", 1.25)
    with pytest.raises(
        UserError, match="model.path=.*base: .*/weight is not what .*/checkpoints/6 was"
    ):
        evaluate(config, run, tmp_path / "out")
    replace_weights(tmp_path / "base", 0.8)
    for metadata in run.glob("checkpoints/*/provenance/metadata"):
        origin = json.loads(metadata.read_text())
        assert origin.pop("base_weights")
        metadata.write_text(json.dumps(origin))
    scores = {}
    for checkpoint in (None, run):
        for factor in (1.0, 1.0, 1.25):
            replace_weights(tmp_path / "base", factor)
            asked.clear()
            predictions, source = evaluate(config, checkpoint, tmp_path / "out")
            seen = scores.setdefault(checkpoint, {})
            assert bool(asked) == (factor not in seen)
            seen[factor] = [
                answer.scores for item in predictions[0].items for answer in item.answers.values()
            ]
            assert source["model"]["weights"]
        assert seen[1.0] != seen[1.25]


def test_sampled_answers_follow_the_seed(adapted, pretrained, tmp_path):
    """The same seed draws the same answers again; another seed draws others, to the same
    questions.
    """
    config = config_in(tmp_path, str(pretrained / "model"))
    config.evaluation = dataclasses.replace(
        config.evaluation,
        method="generate",
        temperature=1.0,
        max_new_tokens=8,
        benchmarks=(str(tmp_path / "questions.json"),),
        prompts=(1,),
    )
    (tmp_path / "questions.json").write_text(
        json.dumps(
            [
                {
                    "id": str(i),
                    **{
                        name: {
                            "question": f"Question {i}?",
                            "choices": [f"({c}) {c}" for c in "ABCD"],
                            "answer": "(A) A",
                        }
                        for name in ("English", "Spanish")
                    },
                }
                for i in range(3)
            ]
        )
    )
    texts = []
    for i, seed in enumerate((1, 1, 2)):
        changed = dataclasses.replace(config, seed=seed)
        changed.evaluation = dataclasses.replace(config.evaluation, template="plain")
        predictions, _ = evaluate(changed, adapted, tmp_path / str(i))
        texts.append(
            [answer.text for item in predictions[0].items for answer in item.answers.values()]
        )
    assert texts[0] == texts[1] != texts[2]
