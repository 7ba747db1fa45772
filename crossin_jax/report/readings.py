"""Free answers as texts: the language they are in, and what a second reader makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from crossin_jax.evaluation.confusion import measure_confusion, measure_off_target
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.languages import find_code


@dataclass(frozen=True, slots=True)
class Reading:
    """Of the answers in one language: how many there are, and shares of them.

    `identified`: whose language was identified; `off_target`: of those, in any other language than
    the question's; `own_certain`: in which our own reader finds one choice; `agreement`: of those
    in which SeaEval's rules do too, read alike; `line_pass` and `word_pass`: see
    `evaluation.confusion`. None where there is nothing to take a share of.
    """

    num_answers: int
    identified: float | None
    off_target: float | None
    own_certain: float | None
    agreement: float | None
    line_pass: float | None = None
    word_pass: float | None = None


def read_answers(runs: Sequence[Predictions]) -> dict[str, Reading]:
    """By language, over the free answers of all prompts and seeds; empty if choices were scored."""
    readings = {}
    for language in runs[0].languages:
        answers = [
            answer
            for run in runs
            for item in run.items
            if (answer := item.answers.get(language)) and answer.text is not None
        ]
        if not answers:
            continue
        code = find_code(language) or language
        texts = [answer.text for answer in answers]
        confusion = measure_confusion(texts, code)
        own = [answer for answer in answers if answer.own is not None]
        certain = [answer for answer in own if len(answer.own) == 1]
        both = [
            answer.own == answer.candidates for answer in certain if len(answer.candidates) == 1
        ]
        readings[language] = Reading(
            len(answers),
            *measure_off_target(texts, code),
            _share(len(certain), own),
            _share(sum(both), both),
            confusion.line_pass,
            confusion.word_pass,
        )
    return readings


def _share(count: int, of: Sequence) -> float | None:
    return count / len(of) if of else None
