"""How a model is asked: prompts, shots and settings of a benchmark, and how its answers become
choices.
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from crossin_jax.config import Model
from crossin_jax.data.kinds import request_language
from crossin_jax.data.pipeline import load_tokenizer, open_eval_renderer
from crossin_jax.evaluate import evaluate
from crossin_jax.evaluation.answers import align, read_choice
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.frames import make_prompt
from crossin_jax.evaluation.runner import describe_benchmarks, load_benchmarks, run_benchmarks
from crossin_jax.generation.engine import Engine
from crossin_jax.generation.model import load_model
from tests.evaluation.asking import LANGUAGES, ask, make_config, rows


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """The path of a benchmark file."""
    file = tmp_path_factory.mktemp("questions") / "own.json"
    file.write_text(json.dumps(rows(), ensure_ascii=False))
    return str(file)


# ── prompts ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("template", ["plain", "alpaca"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_every_item_is_asked_in_every_language_by_its_prompt(
    questions, tokenizer, number, template
):
    """Prompts follow items and languages; they have the template and no request for a language."""
    config = make_config(questions, prompts=(number,), template=template)
    _, engine = ask(config, tokenizer)
    renderer, benchmark = (
        open_eval_renderer(config, tokenizer),
        load_benchmark(questions, LANGUAGES),
    )
    expected = [
        renderer.render_prompt(make_prompt(item.versions[code], number))
        for item in benchmark.items
        for code in LANGUAGES
    ]
    assert [ids.tolist() for ids in engine.prompts] == [ids.tolist() for ids in expected]


@pytest.mark.parametrize("tag", ["sentence", "none", "instruction", "input", "input_released"])
def test_bare_questions_ask_for_their_language_as_in_training(tokenizer, tag):
    """Cross-World's questions have the tag that training uses, each for its own language."""
    _, engine = ask(make_config("cross_world:dev", limit=2, tag=tag), tokenizer)
    items = load_benchmark("cross_world:dev", LANGUAGES, limit=2, seed=1).items
    texts = [engine.renderer.decode(ids) for ids in engine.prompts]
    for text, (item, code) in zip(texts, ((i, c) for i in items for c in LANGUAGES), strict=True):
        question = item.versions[code].question
        asked = {"none": "", "sentence": request_language(code, code)[0]}.get(tag, f"[{code}]")
        body = "".join(text.split()).removeprefix("".join(question.split()))
        assert body == "".join(asked.split()), (tag, code)


def test_cross_xquad_asks_for_the_choice(tmp_path, tokenizer):
    """SeaEval's prompt 1 has another word for this benchmark; the file's name says which it is."""
    texts = {}
    for name in ("cross_xquad", "cross_mmlu"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows(1)))
        _, engine = ask(make_config(str(tmp_path / f"{name}.json")), tokenizer)
        texts[name] = engine.renderer.decode(engine.prompts[0])
    assert "Simply select the choice" in texts["cross_xquad"]
    assert "Simply select the answer" in texts["cross_mmlu"]


@pytest.mark.parametrize("method", ["choices", "generate"])
def test_the_shots_on_record_are_those_in_the_prompts(questions, tokenizer, method):
    """The seed draws the shots; each language has its own text of them, solved; the record names
    them.
    """
    drawn = []
    for seed in (1, 2):
        config = make_config(questions, shots=2, seed=seed, method=method)
        _, engine = ask(config, tokenizer, lambda text: "0")
        benchmark = load_benchmark(questions, LANGUAGES)
        record = describe_benchmarks(config, [benchmark])[benchmark.name]["shots"]
        by_id = {item.id: item for item in benchmark.items}
        texts = iter(engine.renderer.decode(ids) for ids in engine.prompts)
        for item in benchmark.items:
            shots = record["others"].get(item.id, record["usual"])
            assert len(shots) == 2 and item.id not in shots
            for code in LANGUAGES:
                versions = [by_id[shot].versions[code] for shot in shots]
                wanted = make_prompt(item.versions[code], 1, versions).strip()
                assert next(texts).strip() == wanted
                assert all(v.choices[v.answer] in wanted for v in versions)
        drawn.append((record["usual"], [ids.tolist() for ids in engine.prompts]))
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]


def test_what_is_asked_for_comes_in_order(questions, tokenizer):
    """Benchmark by benchmark, prompt by prompt, scored choices before free answers."""
    config = make_config(questions, "cross_world:dev", method="both", prompts=(2, 4), limit=2)
    predictions, _ = ask(config, tokenizer, lambda text: "0")
    scored = ["sum", "mean", "byte", "letter", "generate"]
    assert [(p.benchmark, p.method, p.prompt) for p in predictions] == [
        *(("own", method, number) for number in (2, 4) for method in scored),
        *(("cross_world:dev", method, 0) for method in scored if method != "letter"),
    ]
    assert all(p.languages == LANGUAGES and len(p.items) == 2 for p in predictions)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def number_in(text):
    """The number of the question that a prompt ends with, and its language's place."""
    number, code = text.rsplit("Question ", 1)[1].split("?")[0].split(" in ")
    return int(number), LANGUAGES.index(code)


@pytest.mark.parametrize("shots", [0, 2])
def test_every_answer_belongs_to_its_item_and_language(questions, tokenizer, shots):
    """Free answers and scored choices are kept with the question that they answer."""

    def choose(text):
        item, language = number_in(text)
        return (item + language) % (2 + item % 2)

    config = make_config(questions, method="both", shots=shots)
    predictions, _ = ask(config, tokenizer, lambda text: str(choose(text)))
    for p in predictions[:-1]:
        assert p.method in ("sum", "mean", "byte", "letter")
        for i, item in enumerate(p.items):
            picks = {code: (choose(f"Question {i} in {code}?"),) for code in LANGUAGES}
            if p.method != "letter":
                assert {code: a.candidates for code, a in item.answers.items()} == picks
            assert all(len(a.scores) == 2 + i % 2 and a.text is None for a in item.answers.values())
    written, _ = ask(
        make_config(questions, shots=shots), tokenizer, lambda text: f"({'ABC'[choose(text)]})"
    )
    for i, (item, row) in enumerate(zip(written[0].items, rows(), strict=True)):
        assert (item.id, item.num_choices, item.tags) == (row["id"], 2 + i % 2, tuple(row["tags"]))
        assert item.gold == {code: i % (2 + i % 2) for code in LANGUAGES}
        for code, answer in item.answers.items():
            assert answer.candidates == answer.own == (choose(f"Question {i} in {code}?"),)


WRITTEN = [  # what the model writes, and what counts of it without and with shots
    ("B", "B", "B"),
    ("B \n", "B", "B "),
    ("B\nQuestion:\nAnd A?", "B\nQuestion:\nAnd A?", "B"),
    ("\n(B)", "(B)", ""),
    ("(A) Paris\n\n(B). (B). (B).", "(A) Paris\n\n(B). (B). (B).", "(A) Paris"),
    ("", "", ""),
]


@pytest.mark.parametrize("shots", [0, 1, 2])
@pytest.mark.parametrize(("written", "whole", "first_line"), WRITTEN)
def test_an_answer_after_shots_ends_at_its_first_line_break(
    questions, tokenizer, shots, written, whole, first_line
):
    """Without shots the whole answer counts; the engine is told to stop early only with them."""
    (predictions,), engine = ask(
        make_config(questions, shots=shots), tokenizer, lambda text: written
    )
    assert tuple(engine.options["stop"]) == (("\n",) if shots else ())
    for item, version in zip(
        predictions.items, load_benchmark(questions, LANGUAGES).items, strict=True
    ):
        for code, answer in item.answers.items():
            choices, text = version.versions[code].choices, first_line if shots else whole
            expected = align(choices, text)
            assert (answer.text, answer.candidates, answer.reason) == (
                text,
                expected.candidates,
                expected.reason,
            )
            assert answer.own == read_choice(choices, text, code).candidates


def test_the_second_reader_knows_the_language_of_the_answer(questions, tokenizer):
    """A choice that is named as Chinese does is found in Chinese answers alone."""
    (predictions,), _ = ask(make_config(questions), tokenizer, lambda text: "乙")
    owns = {code: {len(item.answers[code].own) for item in predictions.items} for code in LANGUAGES}
    assert owns["zh"] == {1} and owns["en"] == owns["es"] == {2, 3}


def test_every_setting_of_generation_reaches_the_engine(questions, tokenizer):
    """Length, temperature, top k and top p are those of the configuration."""
    given = {"max_new_tokens": 17, "temperature": 0.6, "top_k": 5, "top_p": 0.9}
    _, engine = ask(make_config(questions, **given), tokenizer)
    assert {name: engine.options[name] for name in given} == given
    assert engine.options["over_long"] == "skip" and engine.options["progress"] is False


# ── scores of choices ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def log_probs(pretrained):
    """Sequences of ids → log-softmax of the model's logits at every position, in float64."""
    loaded = load_model(str(pretrained / "model"), dtype="float32")
    model = nnx.merge(loaded.graphdef, loaded.state)
    forward = jax.jit(lambda tokens: model(tokens))

    def read(sequences, length=320):
        ids = np.zeros((-(-len(sequences) // 8) * 8, length), np.int32)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = sequence
        logits = np.concatenate(
            [np.asarray(forward(ids[i : i + 8]), np.float64) for i in range(0, len(ids), 8)]
        )[: len(sequences)]
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return read


@pytest.mark.parametrize(
    ("name", "shots"), [("questions", 0), ("questions", 1), ("cross_world:dev", 0)]
)
def test_scores_of_choices_are_those_of_numpy(
    name, shots, questions, pretrained, log_probs, tmp_path
):
    """Sum, mean, byte and letter equal their formulas over the log-softmax of the model's logits.

    The choices have unequal numbers of tokens, of bytes and of characters, also in Chinese.
    """
    name = questions if name == "questions" else name
    config = make_config(name, method="choices", limit=2, shots=shots)
    config.model = Model(
        path=str(pretrained / "model"), compute_dtype="float32", frozen_dtype="float32"
    )
    config.evaluation.cache_dtype = "float32"
    predictions, _ = evaluate(config, None, tmp_path / "out")
    by_method = {p.method: p for p in predictions}
    bare = not name.endswith(".json")
    assert list(by_method) == ["sum", "mean", "byte"] + ["letter"] * (not bare)

    renderer = open_eval_renderer(config, load_tokenizer(str(pretrained / "model")))
    benchmark = load_benchmark(name, LANGUAGES, limit=config.evaluation.limit, seed=config.seed)
    record = describe_benchmarks(config, [benchmark])[benchmark.name].get("shots")
    pool = {item.id: item for item in benchmark.pool}
    places, sequences = [], []
    for i, item in enumerate(benchmark.items):
        shown = record["others"].get(item.id, record["usual"]) if record else []
        for code, version in item.versions.items():
            text = make_prompt(version, 0 if bare else 1, [pool[s].versions[code] for s in shown])
            if bare:
                text += ("" if text.endswith("？") else " ") + request_language(code, code)[0]
            for c, choice in enumerate(version.choices):
                choice = choice[4:] if bare else choice
                for kind, answer in (("whole", choice), ("letter", choice[:3])):
                    rendered = renderer.render_answer(text, "", answer)
                    places.append((i, code, c, kind, len(choice.encode("utf-8")), rendered))
                    sequences.append(rendered.ids)
    found = log_probs(sequences)
    for (i, code, c, kind, num_bytes, rendered), log_p in zip(places, found, strict=True):
        values = [log_p[t - 1, rendered.ids[t]] for t in np.flatnonzero(rendered.loss_mask)]
        assert rendered.ids[-1] == renderer.eos_ids[0] and rendered.loss_mask[-1]
        wanted = {
            "sum": sum(values),
            "mean": sum(values) / len(values),
            "byte": sum(values) / num_bytes,
        }
        if kind == "letter":
            wanted = {} if bare else {"letter": sum(values[:-1])}
        for method, value in wanted.items():
            answer = by_method[method].items[i].answers[code]
            assert answer.scores[c] == pytest.approx(value, abs=2e-4), (method, i, code, c)
            assert answer.candidates == (int(np.argmax(answer.scores)),)
    assert len({len(r.ids) for *_, kind, _, r in places if kind == "whole"}) > 3


# ── sampled answers ──────────────────────────────────────────────────────────────────────────────


def test_sampled_answers_follow_the_seed(pretrained, questions):
    """With a temperature, one seed gives the same answers twice, and another seed others."""
    loaded, tokenizer = (load(str(pretrained / "model")) for load in (load_model, load_tokenizer))
    texts, engine = [], None
    for seed in (1, 1, 2):
        config = make_config(questions, seed=seed, temperature=1.0, max_new_tokens=6, limit=2)
        renderer = open_eval_renderer(config, tokenizer)
        engine = engine or Engine(
            loaded.graphdef,
            loaded.state,
            loaded.spec,
            pad_id=renderer.pad_id,
            eos_ids=renderer.eos_ids,
            batch_size=8,
            cache_dtype="float32",
        )
        (predictions,) = run_benchmarks(
            config, engine, renderer, load_benchmarks(config), progress=False
        )
        texts.append([a.text for item in predictions.items for a in item.answers.values()])
    assert texts[0] == texts[1] and len(set(texts[0])) == len(texts[0])
    assert all(one != other for one, other in zip(texts[0], texts[2], strict=True))
