"""Score a SeaEval log, or tell whether free answers are in their language.

Of a log: accuracy by language, consistency, AC3, what is right in English and then in another
language, and RankC where it has log-likelihoods of the choices.

    python -m crossin_jax.score --log zero_shot_p1.json.gz --out score.json \\
        --alignments aligned.json
    python -m crossin_jax.score --answers answers.jsonl --out rates.json

The log is a list of parallel items: {"id": …, "English": {"question", "choices", "answer",
"model_prediction" and maybe "log_likelihoods", one for each choice}, …}. A five-shot answer counts
up to its first line break, as in SeaEval; the log's name says what it is (five_shot_p1.json). --out
gets SeaEval's own keys, and ours under "crossin_jax"; above 12 languages
detailed_consistency_score is empty, since the sets of languages are too many to list. --alignments
gets the choice of every answer, or those among which SeaEval would toss a coin. --answers takes
rows with a language and a text, as JSON Lines, JSON, CSV, TSV or Parquet; see docs/evaluation.md.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from crossin_jax import __version__
from crossin_jax.cli import run
from crossin_jax.config import UserError, hint
from crossin_jax.data import readers
from crossin_jax.evaluation.answers import compare_readers
from crossin_jax.evaluation.confusion import measure_groups
from crossin_jax.evaluation.metrics import MODES, Scores, evaluate, pair_agreement
from crossin_jax.evaluation.pair_tables import tabulate_pairs
from crossin_jax.evaluation.pairs import WEIGHTS, measure_pairs, pair_scores
from crossin_jax.evaluation.predictions import Predictions
from crossin_jax.evaluation.seaeval import Row, answers_in, predictions_of, read_rows, write_json
from crossin_jax.evaluation.stats import bootstrap
from crossin_jax.files import check_output
from crossin_jax.languages import canonical
from crossin_jax.paths import as_path
from crossin_jax.provenance import commit
from crossin_jax.tables import FORMAT_FLAG, Table, print_parts

# What a row of --answers may have: who wrote it, and the text
GROUP_COLUMNS = ("model", "task", "source")
# Sizes of sets of languages in the printed table
MAX_PRINTED = 12
TEXT_COLUMNS = ("completion", "model_prediction", "response", "output", "answer", "text")


def define_flags() -> None:
    flags.DEFINE_string("log", None, "the log to score, FILE.json or FILE.json.gz")
    flags.DEFINE_string(
        "answers", None, "free answers, to measure their line and word pass rates: .jsonl, .csv, …"
    )
    flags.DEFINE_string(
        "mode",
        "expectation",
        "answers that fit several choices: expectation (exact), seaeval (tossed) or strict "
        "(no answer)",
    )
    flags.DEFINE_string(
        "rankc",
        "softmax",
        "weights of RankC: softmax, norm1 (linear in the rank) or norm2 (squared)",
    )
    flags.DEFINE_string("out", None, "file for the scores, JSON")
    flags.DEFINE_string("alignments", None, "file for the choice of every answer, JSON")
    flags.DEFINE_enum(
        "few_shot",
        "auto",
        ["auto", "yes", "no"],
        "answers end at their first line break; auto: where the log's name holds few_shot or "
        "five_shot",
    )
    flags.DEFINE_integer(
        "seed", 0, "seed of the tosses of mode seaeval, and of the intervals' resamples"
    )
    flags.DEFINE_enum(*FORMAT_FLAG)
    flags.mark_flags_as_mutual_exclusive(["log", "answers"])


def main(options: Any) -> int:
    if not options.log and options.answers:
        if options.alignments:
            raise UserError("--alignments has no effect on --answers; leave it out")
        return score_answers(as_path(options.answers), options.out, options.format)
    if not options.log:
        raise UserError(
            "--log is missing; name the log to score, FILE.json or FILE.json.gz, or --answers"
        )
    for flag, value, known in (("mode", options.mode, MODES), ("rankc", options.rankc, WEIGHTS)):
        if value not in known:
            raise UserError(f"--{flag}={value}: not one of {', '.join(known)}{hint(value, known)}")
    log, out, alignments = (
        as_path(path) if path else None for path in (options.log, options.out, options.alignments)
    )
    assert log is not None
    check_outputs(log, {"--out": out, "--alignments": alignments})

    rows = read_rows(log, few_shot={"auto": None, "yes": True, "no": False}[options.few_shot])
    predictions = predictions_of(rows, str(log))
    mode, seed, rankc = options.mode, options.seed, options.rankc
    scores = evaluate(predictions, mode, seed=seed)
    measures = measure_pairs(predictions, mode, seed=seed, weights=rankc)
    intervals = bootstrap(predictions, mode, seed=seed)
    intervals |= bootstrap(predictions, mode, seed=seed, scores=partial(pair_scores, weights=rankc))
    if alignments:
        write_json(alignments, list_alignments(rows, predictions))
    if out:
        pairs = tabulate_pairs({seed: [predictions]}, mode=mode, weights=rankc)
        ours = {
            "version": __version__,
            "commit": commit(),
            "log": log.name,
            "mode": scores.mode,
            "seed": seed,
            "num_items": scores.num_items,
            "languages": list(predictions.languages),
            "intervals_95": intervals,
            "least": scores.least.flatten() if scores.least else None,
            "most": scores.most.flatten() if scores.most else None,
            "coin_sd": scores.coin_sd,
            "coin_share": scores.coin_share,
            "pair_agreement": pair_agreement(predictions, mode, seed=seed).tolist(),
            "measures": measures,
            "rankc": rankc,
            "pairs": {
                name: {"value": table.value, "low": table.low, "high": table.high}
                for name, table in pairs.items()
            },
            "readers": {
                language: asdict(compare_readers(answers_in(rows, language)))
                for language in predictions.languages
            },
        }
        write_json(out, seaeval_scores(scores) | {"crossin_jax": ours})
    written = [f"wrote {path}" for path in (out, alignments) if path]
    print_parts(
        options.format,
        [
            f"{log}: {scores.num_items} items, {len(scores.language_accuracy)} languages, mode "
            f"{scores.mode}\n",
            tabulate(scores, measures, intervals),
            *written,
        ],
    )
    return 0


def score_answers(path: Path, out: str | None, style: str = "text") -> int:
    """Prints and writes the pass rates of free answers, by whatever of model, task and source the
    rows have.
    """
    target = as_path(out) if out else None
    check_outputs(path, {"--out": target})
    columns, answers = read_free_answers(path)
    rates = measure_groups(answers)
    head = (*columns, "language", "answers", "counted", "lines", "line pass", "word pass")
    rows = [(*key, *map(_show, astuple(rate))) for key, rate in sorted(rates.items())]
    parts: list[str | Table] = [Table(head, rows, "<" * (len(columns) + 1) + ">")]
    if target:
        write_json(
            target,
            {
                "version": __version__,
                "answers": path.name,
                "groups": [*columns, "language"],
                "rates": [dict(zip(head, key, strict=False)) | asdict(rates[key]) for key in rates],
            },
        )
        parts.append(f"wrote {target}")
    print_parts(style, parts)
    return 0


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}" if isinstance(value, float) else str(value)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def read_free_answers(path: Path) -> tuple[list[str], list[tuple[tuple[str, ...], str, str]]]:
    """The grouping columns of a file, and its answers as (group, language, text)."""
    layout = readers.ENDINGS.get(Path(path.name.removesuffix(".gz")).suffix)
    if layout is None or not path.is_file():
        raise UserError(
            f"--answers={path}: {'no such file' if layout else 'not a known ending'}; "
            f"give a file that ends in {', '.join(readers.ENDINGS)}"
        )
    columns: list[str] = []
    answers = []
    for number, row in readers.read_rows(readers.File(str(path), None, layout)):
        place = f"{path}, row {number}"
        if not answers:
            columns = [name for name in GROUP_COLUMNS if name in row]
        language = row.get("language", row.get("lang"))
        text = next((row[name] for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
        if language is None or text is None:
            raise UserError(
                f"{place}: no {'language' if language is None else 'text'}; columns: "
                f"{', '.join(row)}; a row has a language, and one of {', '.join(TEXT_COLUMNS)}"
            )
        group = tuple(str(row.get(name)) for name in columns)
        answers.append((group, canonical(language, place), text))
    if not answers:
        raise UserError(f"{path}: no answers in it")
    return columns, answers


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


def check_outputs(log: Path, outputs: dict[str, Path | None]) -> None:
    """Refuses, before any work, outputs that cannot be written or that would replace the log or
    each other.
    """
    taken = {log.resolve(): "--log"}
    for flag, path in outputs.items():
        if path is None:
            continue
        if other := taken.get(path.resolve()):
            raise UserError(f"{flag}={path}: the same file as {other}; name another")
        taken[path.resolve()] = flag
        check_output(flag, path)


def list_alignments(rows: Sequence[Row], predictions: Predictions) -> list[Row]:
    """Item by item, the index of each language's choice, or the sorted indices that SeaEval tosses
    a coin between.
    """
    return [
        {"id": row.get("id", item.id)}
        | {
            language: answer.candidates[0]
            if len(answer.candidates) == 1
            else list(answer.candidates)
            for language, answer in item.answers.items()
        }
        for row, item in zip(rows, predictions.items, strict=True)
    ]


def seaeval_scores(scores: Scores) -> Row:
    """The scores under SeaEval's keys, in its order."""
    return (
        {"overall_acc": scores.accuracy, "language_acc": scores.language_accuracy}
        | {f"consistency_score_{s}": value for s, value in scores.consistency.items()}
        | {
            "detailed_consistency_score": {
                f"{s}_combine": {",".join(names): value for names, value in sets.items()}
                for s, sets in scores.combinations.items()
            }
        }
        | {f"AC3_{s}": value for s, value in scores.ac3.items()}
    )


def tabulate(
    scores: Scores, measures: dict[str, float], intervals: dict[str, tuple[float, float]]
) -> Table:
    """The scores as a table: value, 95 % interval over items, least and most over the coins, share
    of coins. Consistency of more than MAX_PRINTED languages is left to --out.
    """
    flat = {
        name: value
        for name, value in (scores.flatten() | measures).items()
        if not (size := re.fullmatch(r"(?:consistency|AC3)_(\d+)", name))
        or int(size[1]) <= MAX_PRINTED
    }
    least, most = (level.flatten() if level else {} for level in (scores.least, scores.most))
    num_languages = len(scores.coin_share)
    reasons = dict.fromkeys(reason for share in scores.coin_share.values() for reason in share)
    overall = {
        reason: sum(share.get(reason, 0.0) for share in scores.coin_share.values()) / num_languages
        for reason in reasons
    }
    rows = []
    for name, value in flat.items():
        numbers = [value, *intervals[name]]
        if scores.least:
            numbers += [level.get(name) for level in (least, most)]
        coins, parts = "", ""
        if name.startswith("accuracy"):
            share = scores.coin_share.get(name.removeprefix("accuracy/"), overall)
            coins = f"{sum(share.values()):.1%}"
            parts = ", ".join(f"{reason} {part:.1%}" for reason, part in share.items() if part)
        cells = ["" if number is None else f"{number:.3f}" for number in numbers]
        rows.append((name, *cells, coins, parts))
    by_coin = ("least", "most") if scores.least else ()
    head = ("", "score", "95 %: low", "high", *by_coin, "by a coin", "reasons")
    return Table(head, rows, "<" + ">" * (len(head) - 2) + "<")


if __name__ == "__main__":
    run(main, define=define_flags, takes_config=False)
