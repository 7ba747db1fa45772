"""Benchmark scores during training, on the training mesh and through the functions that `evaluate`
calls.
"""

from collections.abc import Iterator
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from crossin_jax.config import Config
from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluation.confusion import measure_confusion, measure_off_target
from crossin_jax.evaluation.pairs import measure_pairs
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.runner import load_benchmarks, make_engine, run_benchmarks
from crossin_jax.evaluation.separate import evaluate
from crossin_jax.generation.engine import Engine
from crossin_jax.training.state import AbstractModel


# The engine's programs take the weights as an argument. So a call at a later step only hands over
# other arrays of the same shapes, and nothing is compiled again.
class Benchmarks:
    """Accuracy, consistency, AC3, RankC and transfer of a training state on the benchmarks of the
    configuration.
    """

    def __init__(self, config: Config, renderer: Renderer, model: AbstractModel, mesh: Mesh):
        self._config, self._renderer, self._model, self._mesh = config, renderer, model, mesh
        self._benchmarks = load_benchmarks(config)
        # Made at the first call and kept, so that its programs are compiled once.
        self._engine: Engine | None = None

    def __call__(self, state: Any) -> dict[str, float]:
        """Scores by name, e.g. cross_mmlu/sum/p1/AC3_3."""
        params = nnx.merge_state(state.trainable, state.frozen)
        settings, renderer = self._config.evaluation, self._renderer
        if self._engine is None:
            graphdef, spec = self._model.graphdef, self._model.spec
            self._engine = make_engine(self._config, renderer, graphdef, params, spec, self._mesh)
        self._engine.params = params
        scores = {}
        for predictions in run_benchmarks(
            self._config, self._engine, renderer, self._benchmarks, progress=False
        ):
            name = f"{predictions.benchmark}/{predictions.method}/{predictions.prompt_label}"
            values = evaluate(predictions, settings.mode).flatten()
            pairs = {}
            if predictions.kind == "parallel":
                pairs = measure_pairs(predictions, settings.mode, weights=settings.rankc)
            # of what exists for every language, the mean is enough
            values |= {key: value for key, value in pairs.items() if "/" not in key}
            scores |= {f"{name}/{key}": value for key, value in values.items()}
            scores |= {f"{name}/{key}": value for key, value in _measure_texts(predictions)}
        return scores


def _measure_texts(predictions: Predictions) -> Iterator[tuple[str, float]]:
    """Whether free answers are in the wanted language, e.g. off_target/zh; nothing where the
    language of the answers is unclear.
    """
    for language in predictions.languages:
        answers = [
            item.answers[language].text for item in predictions.items if language in item.answers
        ]
        texts = [text for text in answers if text is not None]
        confusion = measure_confusion(texts, language)
        values = {
            "off_target": measure_off_target(texts, language)[1],
            "line_pass": confusion.line_pass,
            "word_pass": confusion.word_pass,
        }
        yield from ((f"{name}/{language}", v) for name, v in values.items() if v is not None)
