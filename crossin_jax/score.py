"""Scores a SeaEval log: accuracy by language, consistency and AC3, with the coins of unclear answers as probabilities.

    python -m crossin_jax.score --log zero_shot_p1.json.gz --out score.json --alignments aligned.json

The log is a list of parallel items: {"id": …, "English": {"question", "choices", "answer", "model_prediction"}, …}.
A five-shot answer counts up to its first line break, as in SeaEval; the log's name says what it is (five_shot_p1.json).
--out gets SeaEval's own keys, and ours under "crossin_jax"; --alignments the choice of every answer, or those among
which SeaEval would toss a coin.
"""

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from absl import flags

from crossin_jax import __version__
from crossin_jax.config import UserError, hint
from crossin_jax.evaluation.answers import LETTERS, align, compare_readers
from crossin_jax.evaluation.benchmarks import Item
from crossin_jax.evaluation.intervals import bootstrap
from crossin_jax.evaluation.metrics import MODES, Scores, evaluate, pair_agreement
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions
from crossin_jax.languages import CODES, LANGUAGES
from crossin_jax.outputs import check_output, write_whole
from crossin_jax.program import run
from crossin_jax.provenance import commit

Row = dict[str, Any]


def define_flags() -> None:
    flags.DEFINE_string("log", None, "the log to score, FILE.json or FILE.json.gz")
    flags.DEFINE_string("mode", "expectation", "coins: expectation (exact), seaeval (tossed) or strict (no answer)")
    flags.DEFINE_string("out", None, "file for the scores, JSON")
    flags.DEFINE_string("alignments", None, "file for the chosen choices, JSON")
    flags.DEFINE_enum("few_shot", "auto", ["auto", "yes", "no"],
                      "answers end at their first line break; auto: where the log's name holds few_shot or five_shot")
    flags.DEFINE_integer("seed", 0, "seed of the tosses of mode seaeval, and of the intervals' resamples")


def main(options: Any) -> int:
    if not options.log:
        raise UserError("--log is missing; name the log to score, FILE.json or FILE.json.gz")
    if options.mode not in MODES:
        raise UserError(f"--mode={options.mode}: not one of {', '.join(MODES)}{hint(options.mode, MODES)}")
    log, out, alignments = (Path(path).expanduser() if path else None
                            for path in (options.log, options.out, options.alignments))
    assert log is not None
    check_outputs(log, {"--out": out, "--alignments": alignments})

    rows = read_rows(log, few_shot={"auto": None, "yes": True, "no": False}[options.few_shot])
    predictions = predictions_of(rows, str(log))
    scores = evaluate(predictions, options.mode, seed=options.seed)
    intervals = bootstrap(predictions, options.mode, seed=options.seed)
    if alignments:
        write_json(alignments, list_alignments(rows, predictions))
    if out:
        write_json(out, seaeval_scores(scores) | {"crossin_jax": {
            "version": __version__, "commit": commit(), "log": log.name, "mode": scores.mode, "seed": options.seed,
            "num_items": scores.num_items, "languages": list(predictions.languages), "intervals_95": intervals,
            "least": scores.least.flatten() if scores.least else None,
            "most": scores.most.flatten() if scores.most else None,
            "coin_sd": scores.coin_sd, "coin_share": scores.coin_share,
            "pair_agreement": pair_agreement(predictions, options.mode, seed=options.seed).tolist(),
            "readers": {language: asdict(compare_readers(answers_in(rows, language)))
                        for language in predictions.languages}}})
    print(format_table(scores, intervals, str(log)))
    for path in filter(None, (out, alignments)):
        print(f"wrote {path}")
    return 0


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def read_log(path: str | Path, benchmark: str | None = None) -> Predictions:
    """The answers in a log of SeaEval's layout, aligned by its rules; languages are its columns, in its order.

    Raises UserError, with file, item and language, for what is damaged or incomplete.
    """
    return predictions_of(read_rows(path), str(path), benchmark)


def read_rows(path: str | Path, *, few_shot: bool | None = None) -> list[Row]:
    """The rows of a log, a JSON list of objects that may be compressed with gzip.

    A few-shot answer is cut at its first line break: the model goes on with questions of its own. `few_shot` None goes
    by the file's name.
    """
    path = Path(path)
    if few_shot is None:
        few_shot = bool(re.search(r"(few|five)[-_ ]?shot", path.name.lower()))
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b" or path.suffix == ".gz":
            raw = gzip.decompress(raw)
        rows = json.loads(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; paths start at {Path.cwd()}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip ({error}); copy the file again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that can be read") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the log as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno}, column {error.colno} ({error.msg}); "
                        "a log is one JSON list") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a log is one JSON list of items") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds a JSON {type(rows).__name__}; a log is a list of items")
    if not rows:
        raise UserError(f"{path}: an empty list; there is no item to score")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: {row!r:.60} is no object; "
                            'an item is {"id": …, "English": {…}, …}')
        for version in filter(lambda value: few_shot and isinstance(value, dict), row.values()):
            if isinstance(text := version.get("model_prediction"), str):
                version["model_prediction"] = text.split("\n")[0]
    return rows


def predictions_of(rows: Sequence[Row], place: str, benchmark: str | None = None) -> Predictions:
    """Aligned answers of a log's rows; a column is a language where it holds an object in any row."""
    languages = list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, dict)))
    if not languages:
        raise UserError(f"{place}: no row has a language; an item is {{\"id\": …, \"English\": {{…}}, …}}")
    items = []
    for number, row in enumerate(rows, 1):
        item = f"{place}, item {row['id']!r}" if "id" in row else f"{place}, row {number}"
        if missing := [language for language in languages if not isinstance(row.get(language), dict)]:
            raise UserError(f"{item}: {', '.join(missing)} missing; every item needs all languages "
                            f"({', '.join(languages)}): add it, or leave the item or the language out")
        gold = {language: _read_gold(row[language], f"{item}, {language}") for language in languages}
        sizes = {language: len(row[language]["choices"]) for language in languages}
        if len(set(sizes.values())) > 1:
            raise UserError(f"{item}: languages differ in their number of choices "
                            f"({', '.join(f'{name} {size}' for name, size in sizes.items())}); they must be parallel")
        answers = {language: align(row[language]["choices"], _read_answer(row[language], f"{item}, {language}"))
                   for language in languages}
        tags = row.get("tags")
        items.append(ItemAnswers(str(row.get("id", number)), gold, sizes[languages[0]], answers,
                                 tuple(map(str, tags)) if isinstance(tags, list) else ()))
    name = benchmark or Path(place).name.split(".")[0]
    return Predictions(name, "generate", 0, tuple(languages), tuple(items))


def _read_gold(version: Row, place: str) -> int:
    choices, answer = version.get("choices"), version.get("answer")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{place}: choices={choices!r:.60}; give a list of texts \"(A) …\"")
    if not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{place}: {len(choices)} choices; an item has 2 to {len(LETTERS)}")
    if answer is None:
        raise UserError(f"{place}: no gold; \"answer\" must repeat one of the choices")
    if answer not in choices:
        raise UserError(f"{place}: gold {answer!r:.80} is not among the choices; \"answer\" must repeat one of them, "
                        f"such as {choices[0]!r:.80}")
    return choices.index(answer)


def _read_answer(version: Row, place: str) -> str:
    if "model_prediction" not in version:
        raise UserError(f"{place}: no model_prediction; a benchmark file becomes a log when every language has one "
                        '("" where the model wrote nothing)')
    if not isinstance(text := version["model_prediction"], str):
        raise UserError(f"{place}: model_prediction={text!r:.60} is no text; write \"\" where there is no answer")
    return text


def answers_in(rows: Sequence[Row], language: str) -> list[tuple[list[str], str, str]]:
    """(choices, answer text, language code) of every row, for `compare_readers`."""
    return [(row[language]["choices"], row[language]["model_prediction"], CODES.get(language, language))
            for row in rows]


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def check_outputs(log: Path, outputs: dict[str, Path | None]) -> None:
    """Refuses, before any work, outputs that cannot be written or that would replace the log or each other."""
    taken = {log.resolve(): "--log"}
    for flag, path in outputs.items():
        if path is None:
            continue
        if other := taken.get(path.resolve()):
            raise UserError(f"{flag}={path}: the same file as {other}; name another")
        taken[path.resolve()] = flag
        check_output(flag, path)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a JSON file whole or not at all, compressed where its name ends in .gz."""
    path = Path(path)
    raw = json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", errors="surrogatepass") + b"\n"
    try:
        write_whole(path, gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); nothing was kept") from None


def write_log(path: str | Path, items: Sequence[Item], predictions: Predictions) -> None:
    """Writes a benchmark's items with their answers as a log of SeaEval's layout, columns by English name.

    An answer that was scored rather than written stands as its label, "(B)".
    """
    answers = {item.id: item.answers for item in predictions.items}
    rows = []
    for item in items:
        row: Row = {"id": item.id}
        if item.tags:
            row["tags"] = list(item.tags)
        for language in predictions.languages:
            version = item.versions[language]
            row[LANGUAGES.get(language, language)] = {
                "question": version.question, **({} if version.context is None else {"context": version.context}),
                "choices": list(version.choices), "answer": version.choices[version.answer],
                "model_prediction": _written(answers[item.id][language])}
        rows.append(row)
    write_json(path, rows)


def _written(answer: Answer) -> str:
    if answer.text is not None:
        return answer.text
    return f"({LETTERS[answer.candidates[0]]})" if len(answer.candidates) == 1 else ""


def list_alignments(rows: Sequence[Row], predictions: Predictions) -> list[Row]:
    """Item by item, the index of each language's choice, or the sorted indices that SeaEval tosses a coin between."""
    return [{"id": row.get("id", item.id)} | {
        language: answer.candidates[0] if len(answer.candidates) == 1 else list(answer.candidates)
        for language, answer in item.answers.items()} for row, item in zip(rows, predictions.items, strict=True)]


def seaeval_scores(scores: Scores) -> Row:
    """The scores under SeaEval's keys, in its order."""
    return ({"overall_acc": scores.accuracy, "language_acc": scores.language_accuracy}
            | {f"consistency_score_{s}": value for s, value in scores.consistency.items()}
            | {"detailed_consistency_score": {f"{s}_combine": {",".join(names): value for names, value in sets.items()}
                                              for s, sets in scores.combinations.items()}}
            | {f"AC3_{s}": value for s, value in scores.ac3.items()})


def format_table(scores: Scores, intervals: dict[str, tuple[float, float]], title: str) -> str:
    """The scores as text: value, 95 % interval over items, least and most over the coins, share of coins."""
    flat = scores.flatten()
    least, most = (level.flatten() if level else None for level in (scores.least, scores.most))
    width = max(18, *(len(name) for name in flat))
    lines = [f"{title}: {scores.num_items} items, {len(scores.language_accuracy)} languages, mode {scores.mode}", "",
             f"{'':{width}}   score   95 % interval" + ("    least to most" if least else "") + "    by a coin"]
    num_languages = len(scores.coin_share)
    overall = {reason: sum(share.get(reason, 0.0) for share in scores.coin_share.values()) / num_languages
               for reason in dict.fromkeys(reason for share in scores.coin_share.values() for reason in share)}
    for name, value in flat.items():
        low, high = intervals[name]
        line = f"{name:{width}}   {value:.3f}   {low:.3f} to {high:.3f}"
        if least and most:
            line += f"   {least[name]:.3f} to {most[name]:.3f}"
        if name.startswith("accuracy"):
            share = scores.coin_share.get(name.removeprefix("accuracy/"), overall)
            parts = ", ".join(f"{reason} {part:.1%}" for reason, part in share.items() if part)
            line += f"   {sum(share.values()):6.1%}" + (f" ({parts})" if parts else "")
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, define=define_flags, takes_config=False)
