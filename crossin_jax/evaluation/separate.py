"""Scores of benchmarks whose languages cannot be compared item by item.

    separate    the items, or the order of their choices, are others in each language: accuracy
    open        prompts without choices: the shares of answers that pass by lines and by words

A score of a language is the mean over its own items, and the overall score is the mean of these
over languages. Shape letters: I items, L languages, R resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from crossin_jax.evaluation import metrics
from crossin_jax.evaluation.confusion import measure_confusion
from crossin_jax.evaluation.metrics import FourScores, Mode, Scores
from crossin_jax.evaluation.pairs import Weighable
from crossin_jax.evaluation.predictions import Predictions

RATES = ("line_pass", "word_pass")


@dataclass(frozen=True, slots=True)
class Rates:
    """Pass rates of free answers by name: line_pass, line_pass/LANGUAGE, word_pass, …"""

    values: dict[str, float]
    language_accuracy: dict[str, float] = field(default_factory=dict)
    coin_share: dict[str, dict[str, float]] = field(default_factory=dict)
    least: None = None
    most: None = None

    def flatten(self) -> dict[str, float]:
        """All rates by name."""
        return self.values


@dataclass(frozen=True, slots=True)
class MeanOfLanguages:
    """The mean over languages of the means over items (I, L), of which NaN ones do not count."""

    values_IL: np.ndarray

    def weigh(self, weights_RI: np.ndarray) -> np.ndarray:
        """The mean under each row of weights, (R,). A resample without any item of a language
        leaves this language out.
        """
        known_IL = np.isfinite(self.values_IL)
        sums_RL = weights_RI @ np.where(known_IL, self.values_IL, 0)
        weight_RL = weights_RI @ known_IL.astype(float)
        means_RL = sums_RL / np.where(weight_RL > 0, weight_RL, 1)
        return means_RL.sum(1) / np.maximum((weight_RL > 0).sum(1), 1)


def evaluate(
    predictions: Predictions, mode: Mode = "expectation", *, seed: int = 0
) -> Scores | Rates:
    """The scores that the kind of a benchmark has."""
    if predictions.kind == "parallel":
        return metrics.evaluate(predictions, mode, seed=seed)
    if predictions.kind == "open":
        even_1I = np.full((1, len(predictions.items)), 1.0)
        scores = item_scores(predictions, mode, seed=seed)
        return Rates({name: float(score.weigh(even_1I)[0]) for name, score in scores.items()})
    parts = {
        language: metrics.evaluate(part, mode, seed=seed) for language, part in _split(predictions)
    }
    shares = [part.coin_share for part in parts.values()]
    whole = _average(parts)
    is_expected = mode == "expectation"
    return Scores(
        whole.accuracy,
        whole.language_accuracy,
        {},
        {},
        predictions.benchmark,
        mode,
        len(predictions.items),
        {},
        {code: share for each in shares for code, share in each.items()},
        _average({code: part.least for code, part in parts.items()}) if is_expected else None,
        _average({code: part.most for code, part in parts.items()}) if is_expected else None,
    )


def item_scores(
    predictions: Predictions,
    mode: Mode = "expectation",
    *,
    seed: int = 0,
    others: Sequence[str] = (),
) -> dict[str, Weighable]:
    """Each score of `evaluate`, and as accuracy/others the mean over some languages, to be
    resampled.
    """
    values = (
        _pass_items(predictions)
        if predictions.kind == "open"
        else _score_items(predictions, mode, seed)
    )
    scores = {}
    for measure in dict.fromkeys(name.partition("/")[0] for name in values):
        languages = {
            name.partition("/")[2]: values_I
            for name, values_I in values.items()
            if name.startswith(f"{measure}/")
        }
        scores[measure] = MeanOfLanguages(np.stack(list(languages.values()), 1))
        if measure == "accuracy" and (some := [c for c in languages if c in others]):
            columns = [languages[code] for code in some]
            scores["accuracy/others"] = MeanOfLanguages(np.stack(columns, 1))
        for code, values_I in languages.items():
            scores[f"{measure}/{code}"] = MeanOfLanguages(values_I[:, None])
    return scores


def _average(levels: dict[str, FourScores]) -> FourScores:
    accuracy = {code: level.accuracy for code, level in levels.items()}
    return FourScores(sum(accuracy.values()) / len(accuracy), accuracy, {}, {})


def _split(predictions: Predictions) -> Iterator[tuple[str, Predictions]]:
    """For each language its own items, as a parallel benchmark in one language."""
    for language in predictions.languages:
        items = tuple(item for item in predictions.items if language in item.answers)
        if items:
            part = replace(predictions, languages=(language,), items=items, kind="parallel")
            yield language, part


def _score_items(predictions: Predictions, mode: Mode, seed: int) -> dict[str, np.ndarray]:
    place = {item.id: i for i, item in enumerate(predictions.items)}
    scores = {}
    for language, part in _split(predictions):
        values_I = np.full(len(place), np.nan)
        found = metrics.item_scores(part, mode, seed=seed)["accuracy"]
        values_I[[place[item.id] for item in part.items]] = found
        scores[f"accuracy/{language}"] = values_I
    return scores


def _pass_items(predictions: Predictions) -> dict[str, np.ndarray]:
    """By rate and language, which answers pass: 1, 0, or NaN for those that do not count."""
    scores = {
        f"{rate}/{language}": np.full(len(predictions.items), np.nan)
        for rate in RATES
        for language in predictions.languages
    }
    for i, item in enumerate(predictions.items):
        for language, answer in item.answers.items():
            found = measure_confusion([answer.text or ""], language)
            if found.line_pass is None:
                continue
            scores[f"line_pass/{language}"][i] = found.line_pass
            # by the definition only the words of an answer count that passes by lines
            if found.line_pass == 1 and found.word_pass is not None:
                scores[f"word_pass/{language}"][i] = found.word_pass
    return {name: values for name, values in scores.items() if np.isfinite(values).any()}
