"""Asks a model the questions of a benchmark: free answers, or the likelihood of choices.

Each finished (benchmark, prompt, method) is kept under a key made of weights, template, questions
and settings, so an interrupted evaluation goes on where it stopped and a changed template starts
anew.
"""

import dataclasses
import gzip
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossin_jax.config import Config, UserError
from crossin_jax.data.kinds import add_tag
from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluation.answers import align, read_choice
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.frames import make_prompt
from crossin_jax.evaluation.items import Benchmark, Item, with_items
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions, decode, encode
from crossin_jax.evaluation.shots import draw_shots, list_shots
from crossin_jax.files import content_hash, write_whole
from crossin_jax.generation.chat import find_border
from crossin_jax.generation.engine import Engine
from crossin_jax.guests import open_guest
from crossin_jax.languages import name_of

LETTER = re.compile(r"^\([A-J]\) ")

log = logging.getLogger(__name__)


def load_benchmarks(config: Config) -> list[Benchmark]:
    """The benchmarks that a configuration names."""
    languages = config.evaluation.languages or config.data.languages
    return [
        load_benchmark(name, languages, limit=config.evaluation.limit, seed=config.seed)
        for name in config.evaluation.benchmarks
    ]


def describe_benchmarks(config: Config, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """For the record: where the items came from, which they are, and which were shown solved."""
    shots = config.evaluation.shots
    return {
        benchmark.name: {
            "source": benchmark.source,
            "fingerprint": benchmark.fingerprint,
            "items": len(benchmark.items),
            "languages": list(benchmark.languages),
        }
        | ({"shots": list_shots(benchmark, shots, config.seed)} if shots else {})
        for benchmark in benchmarks
    }


# From items to scores:
#
#     Benchmark ─ questions ─► texts ─ Renderer ─► ids ─ Engine ─┬─ score ─► log-likelihoods ─┐
#                                                                └─ generate ─► text ─ align ─┤
#     scores ◄─ metrics.evaluate ─ Predictions ◄─ collect ─ Answer ◄──────────────────────────┘
def run_benchmarks(
    config: Config,
    engine: Engine,
    renderer: Renderer,
    benchmarks: Sequence[Benchmark],
    *,
    cache: Path | None = None,
    weights: str = "",
    progress: bool = True,
) -> list[Predictions]:
    """Answers to every benchmark of the configuration, by every prompt and method that it asks for.

    `renderer` is the one that training used, `benchmarks` are those of the configuration. `cache`
    is a folder for finished parts, valid for the `weights` named.
    """
    settings, results = config.evaluation, []
    for name, benchmark in zip(settings.benchmarks, benchmarks, strict=True):
        # Its questions are phrased as in the instruction data.
        bare = benchmark.name.startswith("cross_world")
        for number in (0,) if bare else settings.prompts:
            for method in (
                ("choices", "generate") if settings.method == "both" else (settings.method,)
            ):
                asked = dataclasses.asdict(settings) | {
                    "benchmarks": name,
                    "prompts": number,
                    "method": method,
                }
                del asked["rankc"]  # it decides how answers are counted, not what they are
                if settings.shots:  # they may be items beyond the limit
                    asked["pool"] = with_items(benchmark, benchmark.pool).fingerprint
                key = content_hash(
                    [
                        weights,
                        renderer.hash,
                        config.data.tag,
                        config.seed,
                        asked,
                        benchmark.fingerprint,
                    ]
                )
                file = cache / f"{method}-{key}.json.gz" if cache else None
                parts = load(file) if file else None
                if parts is None:
                    ask = score_choices if method == "choices" else generate_answers
                    parts = ask(config, engine, renderer, benchmark, number, progress)
                    if file:
                        save(parts, file)
                results += parts
    return results


def questions(
    config: Config, benchmark: Benchmark, number: int
) -> Iterator[tuple[Item, str, str, str]]:
    """(item, language, instruction, input) of every prompt; a bare question (number 0) names the
    answer's language.
    """
    for item in benchmark.items:
        for language, version in item.versions.items():
            shots = draw_shots(benchmark, item, language, config.evaluation.shots, config.seed)
            instruction = make_prompt(version, number, shots, benchmark=benchmark.name)
            tag = config.data.tag if number == 0 else "none"
            yield item, language, *add_tag(instruction, "", language, language, tag)


def score_choices(
    config: Config,
    engine: Engine,
    renderer: Renderer,
    benchmark: Benchmark,
    number: int,
    progress: bool,
) -> list[Predictions]:
    """The likeliest choice by summed log-likelihood, per token and per byte, and of the letter
    alone.

    A bare question has no letters: its choices are scored by their text, as the instruction data
    has it. The likelihood covers the answer and EOS; that of a letter the letter alone.
    """
    asked = list(questions(config, benchmark, number))
    scored = [
        split_choices(renderer, instruction, input, item.versions[language].choices, number)
        for item, language, instruction, input in asked
    ]
    needs = [len(entry.prompt) + max(map(len, entry.options)) - 1 for entry in scored]
    check_lengths(config, engine, benchmark, asked, needs)
    found = engine.score(
        [entry.prompt for entry in scored],
        [entry.options for entry in scored],
        over_long="skip",
        progress=progress,
    )
    methods = ("sum", "mean", "byte", *(("letter",) if number else ()))
    answers: dict[str, dict[str, dict[str, Answer]]] = {method: {} for method in methods}
    for (item, language, *_), entry, values in zip(asked, scored, found, strict=True):
        for method in methods:
            of_item = answers[method].setdefault(item.id, {})
            of_item[language] = choose_likeliest(entry, values, method)
    return [
        Predictions(
            benchmark.name,
            method,
            number,
            tuple(benchmark.languages),
            tuple(collect(item, answers[method][item.id]) for item in benchmark.items),
        )
        for method in methods
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredChoices:
    """A question as it is scored: ids of the prompt, and of each choice after it; letters come
    after the texts.
    """

    prompt: np.ndarray
    options: list[np.ndarray]
    num_bytes: tuple[int, ...]  # of each text


def split_choices(
    renderer: Renderer, instruction: str, input: str, choices: Sequence[str], number: int
) -> ScoredChoices:
    """Splits the rendered answers where the prompt ends; each choice is scored after the same
    prompt ids.
    """
    texts = choices if number else [LETTER.sub("", text) for text in choices]
    answers = [renderer.render_answer(instruction, input, text) for text in texts]
    letters = [renderer.render_answer(instruction, input, text[:3]) for text in texts if number]
    border = find_border([*answers, *letters])
    options = [a.ids[border:] for a in answers]
    options += [a.ids[border:-1] for a in letters]  # without EOS
    num_bytes = tuple(len(text.encode()) for text in texts)
    return ScoredChoices(answers[0].ids[:border], options, num_bytes)


# The sum favours short choices; per token and per byte correct for it in two ways:
#
#                   sum    tokens    per token    bytes    per byte
#     Rome          −6     2         −3.0         4        −1.5         chosen by the sum
#     Montevideo    −8     4         −2.0         10       −0.8         chosen by both others
def choose_likeliest(entry: ScoredChoices, values: np.ndarray | None, method: str) -> Answer:
    """The likeliest choice by a method; `values` are the summed log-likelihoods of all options,
    None: too long.
    """
    count = len(entry.num_bytes)
    if values is None:
        return Answer(tuple(range(count)), "too_long")
    sums = values[:count]
    if method == "letter":
        scores = values[count:]
    elif method == "mean":
        scores = sums / [len(option) for option in entry.options[:count]]
    else:
        scores = sums / entry.num_bytes if method == "byte" else sums
    return Answer((int(np.argmax(scores)),), scores=tuple(float(score) for score in scores))


def generate_answers(
    config: Config,
    engine: Engine,
    renderer: Renderer,
    benchmark: Benchmark,
    number: int,
    progress: bool,
) -> list[Predictions]:
    """What the model writes, aligned to a choice by SeaEval's rules; few-shot answers end at the
    first line break.
    """
    settings = config.evaluation
    asked = list(questions(config, benchmark, number))
    prompts = [renderer.render_prompt(instruction, input) for _, _, instruction, input in asked]
    check_lengths(
        config,
        engine,
        benchmark,
        asked,
        [len(prompt) + settings.max_new_tokens for prompt in prompts],
    )
    seeds = [
        zlib.crc32(np.asarray(prompt, np.int32).tobytes(), config.seed % 2**32)
        for prompt in prompts
    ]
    answers = engine.generate(
        prompts,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seeds=seeds,
        over_long="skip",
        stop=("\n",) if settings.shots else (),
        detokenize=renderer.decode,
        progress=progress,
    )
    by_item: dict[str, dict[str, Answer]] = {}
    for (item, language, _, _), ids in zip(asked, answers, strict=True):
        choices = item.versions[language].choices
        if ids is None:
            by_item.setdefault(item.id, {})[language] = Answer(
                tuple(range(len(choices))), "too_long"
            )
            continue
        text = renderer.decode(ids)
        text = text.split("\n")[0] if settings.shots else text.strip()
        by_item.setdefault(item.id, {})[language] = dataclasses.replace(
            align(choices, text), own=read_choice(choices, text, language).candidates
        )
    items = tuple(collect(item, by_item[item.id]) for item in benchmark.items)
    return [Predictions(benchmark.name, "generate", number, tuple(benchmark.languages), items)]


def check_lengths(
    config: Config,
    engine: Engine,
    benchmark: Benchmark,
    asked: Sequence[tuple[Item, str, str, str]],
    needs: Sequence[int],
) -> None:
    """Refuses prompts that need more tokens than the model reads, or says how many are skipped."""
    long = [i for i, need in enumerate(needs) if need > engine.max_length]
    if not long:
        return
    (item, language, *_), need = asked[long[0]], needs[long[0]]
    place = (
        f"{benchmark.name}, item {item.id!r}, {name_of(language)}: {need} tokens with the answer"
    )
    count = (
        f"the model reads {engine.max_length} ({len(long)} of {len(needs)} prompts are too long)"
    )
    if config.evaluation.over_long == "refuse":
        raise UserError(
            f"{place}; {count}\n"
            "set evaluation.over_long=skip to count them as unanswered, or lower "
            f"evaluation.shots={config.evaluation.shots} or evaluation.max_new_tokens"
        )
    log.warning("%s; %s: skipped, each counts as any of its choices", place, count)


def answer_without_model(config: Config) -> dict[str, list[Predictions]]:
    """What two rules without knowledge choose on Cross-World: matching strings, and the commonest
    training answer.
    """
    languages = config.evaluation.languages or config.data.languages
    results: dict[str, list[Predictions]] = {"matching strings": [], "commonest answer": []}
    for name in config.evaluation.benchmarks:
        if not name.startswith("cross_world"):
            continue
        benchmark = load_benchmark(name, languages, limit=config.evaluation.limit, seed=config.seed)
        rows = [
            {"id": item.id}
            | {
                name_of(code): {"choices": version.choices}
                for code, version in item.versions.items()
            }
            for item in benchmark.items
        ]
        rules = open_guest("world baselines")
        chosen = (
            rules.choose_by_string(rows, languages),
            rules.choose_by_frequency(rows, languages, config.seed),
        )
        for label, choices in zip(results, chosen, strict=True):
            items = tuple(
                collect(
                    item,
                    {
                        code: Answer(picked[code], "matched" if len(picked[code]) == 1 else "tie")
                        for code in languages
                    },
                )
                for item, picked in zip(benchmark.items, choices, strict=True)
            )
            results[label].append(Predictions(benchmark.name, "rule", 0, tuple(languages), items))
    return results


def collect(item: Item, answers: dict[str, Answer]) -> ItemAnswers:
    """The answers to one item beside its gold choices."""
    versions = item.versions
    gold = {language: version.answer for language, version in versions.items()}
    return ItemAnswers(
        item.id, gold, len(next(iter(versions.values())).choices), answers, item.tags
    )


def save(parts: list[Predictions], file: Path) -> None:
    """Writes finished predictions whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(
        file,
        gzip.compress(json.dumps([encode(p) for p in parts], ensure_ascii=False).encode(), mtime=0),
    )


def load(file: Path) -> list[Predictions] | None:
    """Predictions written by `save`; None where there are none that can be read."""
    try:
        return [decode(stored) for stored in json.loads(gzip.decompress(file.read_bytes()))]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error):
        return None
