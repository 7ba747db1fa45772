"""A checkpoint through the benchmark to its report: cached, honest about the template, in SeaEval's layout too."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from crossin_jax.checkpoint.restore import restore_params
from crossin_jax.config import UserError
from crossin_jax.data.crosslingual import add_tag
from crossin_jax.data.pipeline import open_renderer
from crossin_jax.evaluate import evaluate, split_pair, write_run
from crossin_jax.evaluation import runner
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.report import Run, read_pair, read_results
from crossin_jax.generation.engine import Engine
from crossin_jax.score import predictions_of, read_log
from tests.helpers import config_in


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
    restored = restore_params(adapted)
    renderer = open_renderer(config, restored.tokenizer)
    item = load_benchmark("cross_world:dev", ("en", "es"), limit=1, seed=config.seed).items[0]
    version = item.versions["es"]
    with jax.set_mesh(restored.mesh):
        model = nnx.merge(restored.graphdef, restored.state)
        for choice, score in zip(version.choices, predictions[0].items[0].answers["es"].scores, strict=True):
            rendered = renderer.render_answer(*add_tag(version.question, "", "es", "es", "sentence"), choice[4:])
            logits = np.asarray(model(rendered.ids[None, :-1]), np.float64)[0]
            log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) \
                - logits.max(-1, keepdims=True)
            taken = np.take_along_axis(log_probs, rendered.ids[1:, None], 1)[:, 0]
            assert score == pytest.approx(taken[rendered.learned[1:]].sum(), abs=2e-4)


def test_finished_parts_are_not_asked_again(evaluated, adapted, monkeypatch):
    config, out, predictions, _ = evaluated
    monkeypatch.setattr(Engine, "score", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr(Engine, "generate", lambda *_, **__: pytest.fail("asked again"))
    assert evaluate(config, adapted, out)[0] == predictions
    changed = dataclasses.replace(config, seed=2)  # other items: nothing of the cache may be used
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        evaluate(changed, adapted, out)


def test_another_template_than_in_training_is_refused(evaluated, adapted):
    config, out, _, _ = evaluated
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, template="alpaca"))
    with pytest.raises(UserError, match="data.template='alpaca', but the checkpoint was trained with 'plain'"):
        evaluate(changed, adapted, out)


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
    assert runner.common_prefix(rows) == 2
    assert runner.common_prefix([np.array([1, 2]), np.array([3, 2])]) == 0
