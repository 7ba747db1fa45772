"""Logs of SeaEval's layout: items with a model's answers, read with complaints that name the item,
and written.
"""

import gzip
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError
from crossin_jax.evaluation.answers import LETTERS, align
from crossin_jax.evaluation.items import Item
from crossin_jax.evaluation.layouts import LABEL
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.files import read_json, write_whole
from crossin_jax.languages import find_code, name_of
from crossin_jax.paths import as_path

Row = dict[str, Any]


# A row of a log:
#
#     {"id": "7", "English": {"question": "…", "choices": ["(A) Rome", "(B) Lima"],
#                             "answer": "(B) Lima", "model_prediction": "I think (B)."},
#      "Chinese": {…}}
def read_log(path: str | Path, benchmark: str | None = None) -> Predictions:
    """The answers in a log of SeaEval's layout, aligned by its rules; languages are its columns, in
    its order.

    Raises UserError, with file, item and language, for what is damaged or incomplete.
    """
    return predictions_of(read_rows(path), str(path), benchmark)


def read_rows(path: str | Path, *, few_shot: bool | None = None) -> list[Row]:
    """The rows of a log, a JSON list of objects that may be compressed with gzip.

    A few-shot answer is cut at its first line break: the model goes on with questions of its own.
    `few_shot` None goes by the file's name.
    """
    path = as_path(path)
    if few_shot is None:
        few_shot = bool(re.search(r"(few|five)[-_ ]?shot", path.name.lower()))
    rows = read_json(path, expect=list, what="a log")
    if not rows:
        raise UserError(f"{path}: an empty list; there is no item to score")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, row {number}: {row!r:.60} is not an object; "
                'an item is {"id": …, "English": {…}, …}'
            )
        for version in filter(lambda value: few_shot and isinstance(value, dict), row.values()):
            if isinstance(text := version.get("model_prediction"), str):
                version["model_prediction"] = text.split("\n")[0]
    return rows


def predictions_of(rows: Sequence[Row], place: str, benchmark: str | None = None) -> Predictions:
    """Aligned answers of a log's rows; a column is a language where it holds an object in any
    row.
    """
    languages = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict))
    )
    if not languages:
        raise UserError(
            f'{place}: no row has a language; an item is {{"id": …, "English": {{…}}, …}}'
        )
    items = []
    for number, row in enumerate(rows, 1):
        item = f"{place}, item {row['id']!r}" if "id" in row else f"{place}, row {number}"
        if missing := [
            language for language in languages if not isinstance(row.get(language), dict)
        ]:
            raise UserError(
                f"{item}: {', '.join(missing)} missing; every item needs all languages "
                f"({', '.join(languages)}): add it, or leave the item or the language out"
            )
        gold = {
            language: _read_gold(row[language], f"{item}, {language}") for language in languages
        }
        sizes = {language: len(row[language]["choices"]) for language in languages}
        if len(set(sizes.values())) > 1:
            raise UserError(
                f"{item}: languages differ in their number of choices "
                f"({', '.join(f'{name} {size}' for name, size in sizes.items())}); they must be "
                "parallel"
            )
        answers = {
            language: _read_answer(row[language], f"{item}, {language}") for language in languages
        }
        tags = row.get("tags")
        items.append(
            ItemAnswers(
                str(row.get("id", number)),
                gold,
                sizes[languages[0]],
                answers,
                tuple(map(str, tags)) if isinstance(tags, list) else (),
            )
        )
    name = benchmark or Path(place).name.split(".")[0]
    return Predictions(name, "generate", 0, tuple(languages), tuple(items))


def _read_gold(version: Row, place: str) -> int:
    choices, answer = version.get("choices"), version.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f'{place}: choices={choices!r:.60}; give a list of texts "(A) …"')
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{place}: {len(choices)} choices; an item has 2 to {len(LETTERS)}")
    if answer is None:
        raise UserError(f'{place}: no gold; "answer" must repeat one of the choices')
    if answer not in choices:
        raise UserError(
            f'{place}: gold {answer!r:.80} is not among the choices; "answer" must repeat one of '
            "them, "
            f"such as {choices[0]!r:.80}"
        )
    return choices.index(answer)


def _read_answer(version: Row, place: str) -> Answer:
    """The answer by its text, else by the likeliest choice; with the log-likelihoods, if any."""
    scores = _read_scores(version, place)
    if scores and "model_prediction" not in version:
        # Choices of equal text are equally likely, as in `choose_likeliest`.
        texts = [LABEL.sub("", choice, count=1) for choice in version["choices"]]
        best = texts[scores.index(max(scores))]
        same = tuple(i for i, text in enumerate(texts) if text == best)
        return Answer(same, "matched" if len(same) == 1 else "tie", scores=scores)
    return replace(align(version["choices"], _read_text(version, place)), scores=scores)


def _read_scores(version: Row, place: str) -> tuple[float, ...] | None:
    scores = version.get("log_likelihoods")
    if scores is None:
        return None
    count = len(version["choices"])
    is_number = isinstance(scores, list) and all(
        isinstance(score, int | float) and score == score for score in scores
    )
    if not is_number or len(scores) != count:
        raise UserError(
            f"{place}: log_likelihoods={scores!r:.60}; give {count} numbers, one for each choice"
        )
    return tuple(map(float, scores))


def _read_text(version: Row, place: str) -> str:
    if "model_prediction" not in version:
        raise UserError(
            f"{place}: no model_prediction; a benchmark file becomes a log when every language "
            "has one "
            '("" where the model wrote nothing)'
        )
    if not isinstance(text := version["model_prediction"], str):
        raise UserError(
            f"{place}: model_prediction={text!r:.60} is not a text; "
            'write "" where there is no answer'
        )
    return text


def answers_in(rows: Sequence[Row], language: str) -> list[tuple[list[str], str, str]]:
    """(choices, answer text, language code) of every row, for `compare_readers`."""
    return [
        (
            row[language]["choices"],
            row[language].get("model_prediction", ""),
            find_code(language) or language,
        )
        for row in rows
    ]


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, compressed where its name ends in .gz."""
    path = as_path(path)
    raw = (
        json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", errors="surrogatepass")
        + b"\n"
    )
    try:
        write_whole(path, gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); nothing was kept") from None


def write_log(path: str | Path, items: Sequence[Item], predictions: Predictions) -> None:
    """Writes a benchmark's items with their answers as a log of SeaEval's layout, columns by
    English name.

    An answer that was scored rather than written stands as its label, "(B)", beside the
    log-likelihoods of the choices. Where these fit two choices of equal text there is no label, so
    no model_prediction: `read_log` finds both in the log-likelihoods.
    """
    answers = {item.id: item.answers for item in predictions.items}
    rows = []
    for item in items:
        row: Row = {"id": item.id}
        if item.tags:
            row["tags"] = list(item.tags)
        for language in predictions.languages:
            version = item.versions[language]
            row[name_of(language)] = {
                "question": version.question,
                **({} if version.context is None else {"context": version.context}),
                "choices": list(version.choices),
                "answer": version.choices[version.answer],
                **_describe(answers[item.id][language]),
            }
        rows.append(row)
    write_json(path, rows)


def _describe(answer: Answer) -> Row:
    scores = {} if answer.scores is None else {"log_likelihoods": list(answer.scores)}
    is_open = scores and answer.text is None and len(answer.candidates) > 1
    return scores if is_open else {"model_prediction": _written(answer)} | scores


def write_rows(path: str | Path, items: Sequence[Item], predictions: Predictions) -> None:
    """Writes the answers to a benchmark that is not parallel as JSON Lines, one per language of an
    item. `score --answers` reads the pass rates of them.
    """
    answers = {item.id: item.answers for item in predictions.items}
    lines = []
    for item in items:
        labels = dict(tag.split(": ", 1) for tag in item.tags if ": " in tag)
        for language, version in item.versions.items():
            row = {"id": item.id, "language": language} | labels
            row |= {"question": version.question}
            if version.choices:
                row |= {"choices": list(version.choices), "answer": version.choices[version.answer]}
            row |= {"model_prediction": _written(answers[item.id][language])}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(as_path(path), "".join(lines).encode("utf-8", "surrogatepass"))


def _written(answer: Answer) -> str:
    if answer.text is not None:
        return answer.text
    return f"({LETTERS[answer.candidates[0]]})" if len(answer.candidates) == 1 else ""
