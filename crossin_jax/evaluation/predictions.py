"""What a model answered to a parallel benchmark: the one type that metrics consume and reports
show.
"""

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one item in one language.

    `candidates` are the indices of the choices that it may mean: one, or several among which
    SeaEval tosses a coin. `reason` is "matched", "tie", "empty", "unreadable", or
    "too_long" where the model could not be asked; `text` is what the model wrote, None where
    choices were scored by likelihood, and `scores` are then the log-likelihoods of the choices.
    `own` are the candidates by our own reader.
    """

    candidates: tuple[int, ...]
    reason: str = "matched"
    text: str | None = None
    scores: tuple[float, ...] | None = None
    own: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class ItemAnswers:
    """All answers to one parallel item, by language code (or column name, for a log in other
    languages).
    """

    id: str
    gold: dict[str, int]
    num_choices: int
    answers: dict[str, Answer]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Predictions:
    """Answers to a whole benchmark by one method under one prompt.

    method: "generate", or for scored choices "sum", "mean" (per token), "byte" or "letter", or
    "sentence" for a candidate in the gap of a sentence. prompt: 1 to 5, 0 where the benchmark asks
    its questions bare, or the name of a frame. kind: see `items.KINDS`; of a benchmark that is not
    parallel, an item may have answers in some of the languages only.
    """

    benchmark: str
    method: str
    prompt: int | str
    languages: tuple[str, ...]
    items: tuple[ItemAnswers, ...] = field(repr=False)
    kind: str = "parallel"

    @property
    def prompt_label(self) -> str:
        """The prompt in names of files and scores: p1, or the name of a frame."""
        return f"p{self.prompt}" if isinstance(self.prompt, int) else self.prompt


def encode(predictions: Predictions) -> dict[str, Any]:
    """The predictions as plain JSON types."""

    def shallow(value: Any) -> dict[str, Any]:  # `asdict` copies every tuple: ten times the time
        return {field.name: getattr(value, field.name) for field in fields(value)}

    return shallow(predictions) | {
        "items": [
            shallow(item)
            | {"answers": {code: shallow(answer) for code, answer in item.answers.items()}}
            for item in predictions.items
        ]
    }


def decode(stored: dict[str, Any]) -> Predictions:
    """What `encode` made; raises KeyError or TypeError for anything else."""

    def answer(a: dict[str, Any]) -> Answer:
        scores, own = (
            None if a.get(name) is None else tuple(a[name]) for name in ("scores", "own")
        )
        return Answer(tuple(a["candidates"]), a["reason"], a["text"], scores, own)

    items = tuple(
        ItemAnswers(
            item["id"],
            item["gold"],
            item["num_choices"],
            {code: answer(a) for code, a in item["answers"].items()},
            tuple(item["tags"]),
        )
        for item in stored["items"]
    )
    return Predictions(
        stored["benchmark"],
        stored["method"],
        stored["prompt"],
        tuple(stored["languages"]),
        items,
        stored.get("kind", "parallel"),
    )
