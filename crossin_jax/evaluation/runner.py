"""Asks a model the questions of a benchmark: free answers, or the likelihood of choices.

The answers of each (benchmark, prompt, method) are kept under a key of weights, template, questions
and settings. With another template they are asked again. Of a part that is interrupted, the answers
so far are kept too (kept.py).
"""

import dataclasses
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from crossin_jax.config import Config, UserError
from crossin_jax.data.kinds import add_tag
from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluation.answers import align, read_choice
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.frames import (
    hash_frame,
    list_continuations,
    make_prompt,
    name_of_prompt,
    show_gap,
)
from crossin_jax.evaluation.items import Benchmark, Item, with_items
from crossin_jax.evaluation.kept import ask_missing
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions, decode, encode
from crossin_jax.evaluation.scoring import choose_likeliest, split_choices, split_gap
from crossin_jax.evaluation.shots import draw_shots, list_shots
from crossin_jax.files import content_hash, write_whole
from crossin_jax.generation.engine import Engine
from crossin_jax.guests import open_guest
from crossin_jax.languages import name_of
from crossin_jax.models.spec import ModelSpec

log = logging.getLogger(__name__)


def load_benchmarks(config: Config) -> list[Benchmark]:
    """The benchmarks that a configuration names."""
    languages = config.evaluation.languages or config.data.languages
    return [
        load_benchmark(
            name,
            languages,
            limit=config.evaluation.limit,
            seed=config.seed,
            split=config.evaluation.split,
            with_shots=config.evaluation.shots > 0,
        )
        for name in config.evaluation.benchmarks
    ]


def make_engine(
    config: Config, renderer: Renderer, graphdef: Any, params: Any, spec: ModelSpec, mesh: Mesh
) -> Engine:
    """The engine for a model, with the settings of a configuration."""
    return Engine(
        graphdef,
        params,
        spec,
        eos_ids=renderer.eos_ids,
        pad_id=renderer.pad_id,
        mesh=mesh,
        batch_size=config.evaluation.batch_size,
        cache_dtype=config.evaluation.cache_dtype,
        attention=config.model.attention,
    )


def describe_benchmarks(config: Config, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """For the provenance: where the items came from, which they are, and the solved examples."""
    shots = config.evaluation.shots

    def has_shots(benchmark: Benchmark) -> bool:
        # Prompts without choices and sentences that are scored whole have none.
        if not shots or benchmark.kind == "open":
            return False
        asked = any(prompt != 0 for prompt, _ in plan_questions(config, benchmark))
        return asked or not _scores_gaps(config, benchmark)

    return {
        benchmark.name: {
            "source": benchmark.source,
            "fingerprint": benchmark.fingerprint,
            "items": len(benchmark.items),
            "languages": list(benchmark.languages),
        }
        | ({"left_out": benchmark.num_left_out} if benchmark.num_left_out else {})
        | ({"note": benchmark.note} if benchmark.note else {})
        | _describe_frames(config, benchmark)
        | ({"shots": list_shots(benchmark, shots, config.seed)} if has_shots(benchmark) else {})
        for benchmark in benchmarks
    }


def _describe_frames(config: Config, benchmark: Benchmark) -> dict[str, Any]:
    """The hash of each prompt's words, so that a changed wording is noticed."""
    prompts = dict.fromkeys(prompt for prompt, _ in plan_questions(config, benchmark) if prompt)
    frames = {str(name_of_prompt(prompt)): hash_frame(prompt) for prompt in prompts}
    return {"frames": frames} if frames else {}


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
    results = []
    for name, benchmark in zip(config.evaluation.benchmarks, benchmarks, strict=True):
        for prompt, method in plan_questions(config, benchmark):
            key = _make_key(config, renderer, name, benchmark, prompt, method, weights)
            file = cache / f"{method}-{key}.json.gz" if cache else None
            parts = load(file) if file else None
            if parts is None:
                ask = score_choices if method == "choices" else generate_answers
                part_file = file and file.with_suffix(".part")
                parts = ask(config, engine, renderer, benchmark, prompt, progress, part_file)
                if file:
                    save(parts, file)
                    part_file.unlink(missing_ok=True)
            results += parts
    return results


def plan_questions(config: Config, benchmark: Benchmark) -> list[tuple[int | str, str]]:
    """The prompts and methods of a benchmark: (1, "choices"), (1, "generate"), (2, …

    Number 0 is a bare question: for Cross-World, which is phrased as the instruction data are, for
    prompts without choices, and for sentences whose candidates are scored in the gap.
    """
    settings = config.evaluation
    methods = ("choices", "generate") if settings.method == "both" else (settings.method,)
    if benchmark.kind == "open":
        return [(0, "generate")]
    if benchmark.name.startswith("cross_world"):
        return [(0, method) for method in methods]
    if not _scores_gaps(config, benchmark):
        return [(prompt, method) for prompt in settings.prompts for method in methods]
    if settings.shots:
        log.warning(
            "%s: its sentences are scored without solved examples; evaluation.shots=%d has no "
            'effect on them (evaluation.gap="question" asks them as questions)',
            benchmark.name,
            settings.shots,
        )
    scored = [(0, "choices")] if "choices" in methods else []
    asked = [(prompt, "generate") for prompt in settings.prompts if "generate" in methods]
    return scored + asked


def count_prompts(config: Config, benchmark: Benchmark) -> dict[str, int]:
    """How many prompts an evaluation asks by each method."""
    asked = sum(len(item.versions) for item in benchmark.items)
    counts: dict[str, int] = {}
    for _, method in plan_questions(config, benchmark):
        counts[method] = counts.get(method, 0) + asked
    return counts


def _scores_gaps(config: Config, benchmark: Benchmark) -> bool:
    return benchmark.is_cloze and config.evaluation.gap != "question"


def _make_key(
    config: Config,
    renderer: Renderer,
    name: str,
    benchmark: Benchmark,
    prompt: int | str,
    method: str,
    weights: str,
) -> str:
    """A short hash of everything that decides the answers."""
    settings = config.evaluation
    asked = dataclasses.asdict(settings) | {
        "benchmarks": name,
        "prompts": prompt,
        "method": method,
    }
    # These do not change the answers.
    del asked["rankc"], asked["untuned"]
    if settings.shots:  # they may be items beyond the limit
        asked["pool"] = with_items(benchmark, benchmark.pool).fingerprint
    if isinstance(prompt, str):  # the file may have other words tomorrow
        asked["frame"] = hash_frame(prompt)
    tag = config.data.tag
    return content_hash([weights, renderer.hash, tag, config.seed, asked, benchmark.fingerprint])


def questions(
    config: Config, benchmark: Benchmark, prompt: int | str
) -> Iterator[tuple[Item, str, str, str]]:
    """(item, language, instruction, input) of every prompt; a bare question (number 0) with choices
    has the tag for its answer's language.
    """
    show = show_gap if benchmark.is_cloze else lambda version: version
    shots = 0 if benchmark.kind == "open" else config.evaluation.shots
    for item in benchmark.items:
        for language, version in item.versions.items():
            solved = draw_shots(benchmark, item, language, shots, config.seed)
            instruction = make_prompt(
                show(version),
                prompt,
                [show(shot) for shot in solved],
                benchmark=benchmark.name,
                language=language,
            )
            tag = config.data.tag if prompt == 0 and benchmark.kind != "open" else "none"
            yield item, language, *add_tag(instruction, "", language, language, tag)


def score_choices(
    config: Config,
    engine: Engine,
    renderer: Renderer,
    benchmark: Benchmark,
    prompt: int | str,
    progress: bool,
    part_file: Path | None = None,
) -> list[Predictions]:
    """The likeliest choices, by methods: summed log-likelihood, per token, per byte, letter alone.

    See `list_continuations` for what is scored after a prompt; candidates for the gap of a sentence
    are scored in it, without EOS.
    """
    if _scores_gaps(config, benchmark):
        asked = [(item, code, "", "") for item in benchmark.items for code in item.versions]
        whole = config.evaluation.gap == "sentence"
        scored = [split_gap(renderer, item.versions[code], whole=whole) for item, code, *_ in asked]
    else:
        asked = list(questions(config, benchmark, prompt))
        scored = [
            split_choices(
                renderer, instruction, input, list_continuations(item.versions[code], prompt, code)
            )
            for item, code, instruction, input in asked
        ]
    needs = [len(entry.prompt) + max(map(len, entry.options)) - 1 for entry in scored]
    check_lengths(config, engine, benchmark, asked, needs)

    def ask(numbers: list[int], finished: Callable[[int, Any], None]) -> list[Any]:
        found = engine.score(
            [scored[i].prompt for i in numbers],
            [scored[i].options for i in numbers],
            over_long="skip",
            finished=lambda k, values: finished(k, values.tolist()),
            progress=progress,
        )
        return [None if values is None else values.tolist() for values in found]

    found = ask_missing(part_file, len(scored), ask)
    methods = scored[0].methods
    answers: dict[str, dict[str, dict[str, Answer]]] = {method: {} for method in methods}
    for (item, language, *_), entry, values in zip(asked, scored, found, strict=True):
        count = len(item.versions[language].choices)
        for method in methods:
            of_item = answers[method].setdefault(item.id, {})
            scores = None if values is None else np.array(values)
            of_item[language] = choose_likeliest(entry, scores, method, count)
    return [_predict(benchmark, method, prompt, answers[method]) for method in methods]


def generate_answers(
    config: Config,
    engine: Engine,
    renderer: Renderer,
    benchmark: Benchmark,
    prompt: int | str,
    progress: bool,
    part_file: Path | None = None,
) -> list[Predictions]:
    """What the model writes, aligned to a choice by SeaEval's rules, or as text if there are none.

    Few-shot answers end at the first line break.
    """
    settings = config.evaluation
    asked = list(questions(config, benchmark, prompt))
    prompts = [renderer.render_prompt(instruction, input) for _, _, instruction, input in asked]
    check_lengths(
        config,
        engine,
        benchmark,
        asked,
        [len(ids) + settings.max_new_tokens for ids in prompts],
    )
    seeds = [
        zlib.crc32(np.asarray(ids, np.int32).tobytes(), config.seed % 2**32) for ids in prompts
    ]
    is_few_shot = bool(settings.shots) and benchmark.kind != "open"

    def ask(numbers: list[int], finished: Callable[[int, Any], None]) -> list[Any]:
        return engine.generate(
            [prompts[i] for i in numbers],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seeds=[seeds[i] for i in numbers],
            over_long="skip",
            stop=("\n",) if is_few_shot else (),
            detokenize=renderer.decode,
            finished=finished,
            progress=progress,
        )

    answers = ask_missing(part_file, len(prompts), ask)
    by_item: dict[str, dict[str, Answer]] = {}
    for (item, language, _, _), ids in zip(asked, answers, strict=True):
        choices = item.versions[language].choices
        if ids is None:
            by_item.setdefault(item.id, {})[language] = Answer(
                tuple(range(len(choices))), "too_long"
            )
            continue
        text = renderer.decode(ids)
        text = text.split("\n")[0] if is_few_shot else text.strip()
        if not choices:
            by_item.setdefault(item.id, {})[language] = Answer((), "open", text)
            continue
        by_item.setdefault(item.id, {})[language] = dataclasses.replace(
            align(choices, text), own=read_choice(choices, text, language).candidates
        )
    return [_predict(benchmark, "generate", prompt, by_item)]


def _predict(
    benchmark: Benchmark,
    method: str,
    prompt: int | str,
    answers: dict[str, dict[str, Answer]],
) -> Predictions:
    """Answers by item and language as predictions."""
    return Predictions(
        benchmark.name,
        method,
        name_of_prompt(prompt),
        tuple(benchmark.languages),
        tuple(collect(item, answers[item.id]) for item in benchmark.items),
        benchmark.kind,
    )


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
    log.warning("%s; %s: skipped; each counts as any of its choices", place, count)


def answer_without_model(config: Config) -> dict[str, list[Predictions]]:
    """The choices of two rules without a model on Cross-World: matching strings, and the most
    frequent training answer.
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
    gold = {code: version.answer for code, version in versions.items() if version.choices}
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
