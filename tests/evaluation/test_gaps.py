"""BMLAMA: candidates in the gap of a sentence, scored as its authors do, by answer, or asked."""

from pathlib import Path

import numpy as np
import pytest

from crossin_jax.data.pipeline import open_eval_renderer
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.frames import GAP, hash_frame
from crossin_jax.evaluation.items import MASK
from crossin_jax.evaluation.runner import describe_benchmarks, load_benchmarks, run_benchmarks
from crossin_jax.evaluation.scoring import ScoredChoices, choose_likeliest
from tests.evaluation.asking import ask, make_config

LANGUAGES = ("en", "zh", "vi", "es")
HEAD = "Prompt\tAns\tCandidate Ans\tSubject"
ROWS = {
    "en": [
        "Vienna lies on the <mask> river.\tDanube\tRhine, Danube",
        "<mask> is the capital of Peru.\tLima\tRome, Oslo, Lima",
        "Ann was born in <mask>.\tWashington, D.C.\tRome, Washington, D.C.",
    ],
    "zh": [
        "维也纳位于<mask>。\t多瑙河\t莱茵河, 多瑙河",
        "秘鲁的首都是<mask>。\t利马\t罗马, 奥斯陆, 利马",
        "安出生于<mask>。\t华盛顿\t罗马, 华盛顿",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a file per language; the Chinese one has the header of the published one."""
    path = tmp_path_factory.mktemp("bmlama")
    for code, rows in ROWS.items():
        head = HEAD if code == "en" else HEAD.replace("Candidate Ans", "Candidate\tAns")
        lines = [head, *(f"{row}\tX" for row in rows)]
        (path / f"{code}.tsv").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return path


class Counting:
    """Stands in for an engine: the log-likelihood of a token is known by its id."""

    max_length = 4000

    def score(self, prompts, continuations, **_):
        return [
            np.array([self.of(ids) for ids in entry], np.float64)
            for prompt, entry in zip(prompts, continuations, strict=True)
            if len(prompt)
        ]

    @staticmethod
    def of(ids) -> float:
        return -float(sum(int(i) % 13 + 1 for i in ids))


def score(folder, tokenizer, **settings):
    config = make_config(str(folder), languages=("en", "zh"), method="choices", **settings)
    renderer = open_eval_renderer(config, tokenizer)
    benchmarks = load_benchmarks(config)
    found = run_benchmarks(config, Counting(), renderer, benchmarks, progress=False)
    return {p.method: p for p in found}, benchmarks[0], renderer


# ── the real file ─────────────────────────────────────────────────────────────────────────────────


def test_the_published_rows_are_read_whole(shared):
    """6,792 facts in four languages; gold is last in every row, and must not be known by that."""
    benchmark = load_benchmark(str(shared / "bmlama17"), LANGUAGES)
    assert (len(benchmark.items), benchmark.kind, benchmark.is_cloze) == (6792, "parallel", True)
    lines = {
        code: (shared / "bmlama17" / f"{code}.tsv").read_bytes().decode().split("\r\n")[1:-1]
        for code in LANGUAGES
    }
    golds = np.zeros(10, int)
    for i, item in enumerate(benchmark.items):
        golds[item.versions["en"].answer] += 1
        for code, version in item.versions.items():
            prompt, gold, candidates, _ = lines[code][i].split("\t")
            shown = [choice[4:] for choice in version.choices]
            assert version.question == prompt and shown[version.answer] == gold
            assert sorted(shown) == sorted(candidates.split(", "))
            if i % 10:
                continue
            # the same order of candidates in every language
            order = [candidates.split(", ").index(choice) for choice in shown]
            assert order == [
                lines["en"][i].split("\t")[2].split(", ").index(choice[4:])
                for choice in item.versions["en"].choices
            ]
    sizes = [len(item.versions["en"].choices) for item in benchmark.items]
    assert {size: sizes.count(size) for size in set(sizes)} == {
        **{2: 23, 3: 47, 5: 11},
        **{6: 258, 8: 150, 9: 85, 10: 6218},
    }
    assert golds.min() > 500 and golds.max() < 900
    named = load_benchmark(f"bmlama17:{shared / 'bmlama17'}", ("en", "es"), limit=9)
    assert named.name == "bmlama17" and named.items[8].versions == {
        code: benchmark.items[8].versions[code] for code in ("en", "es")
    }


# ── scores ────────────────────────────────────────────────────────────────────────────────────────


def test_whole_sentences_are_compared_per_token(folder, tokenizer):
    found, benchmark, renderer = score(folder, tokenizer)
    assert list(found) == ["sentence"]
    for item, answers in zip(benchmark.items, found["sentence"].items, strict=True):
        for code, version in item.versions.items():
            expected = []
            for choice in version.choices:
                ids = renderer.encode_text(version.question.replace(MASK, choice[4:]))
                rest = ids[1:]  # without BOS, or without the first token
                if version.question.startswith(MASK) and renderer.bos_id is None:
                    rest = ids
                expected.append(Counting.of(rest) / len(rest))
            answer = answers.answers[code]
            assert answer.scores == pytest.approx(expected)
            assert answer.candidates == (int(np.argmax(expected)),)
    assert found["sentence"].items[2].num_choices == 2  # "Washington, D.C." is one candidate


def test_by_answer_only_the_candidate_counts(folder, tokenizer):
    found, benchmark, renderer = score(folder, tokenizer, gap="answer")
    assert list(found) == ["sum", "mean", "byte"]
    for item, answers in zip(benchmark.items, found["sum"].items, strict=True):
        for code, version in item.versions.items():
            before = version.question.split(MASK)[0].rstrip(" ")
            gap = "" if code == "zh" or not before else " "
            known = renderer.encode_text(before)
            expected = []
            for choice in version.choices:
                ids = renderer.encode_text(f"{before}{gap}{choice[4:]}")
                assert list(ids[: len(known)]) == list(known)
                expected.append(Counting.of(ids[len(known) :]))
            assert answers.answers[code].scores == pytest.approx(expected)
    sums, bytes_ = (found[method].items[0].answers["zh"].scores for method in ("sum", "byte"))
    choices = benchmark.items[0].versions["zh"].choices
    sizes = [len(choice[4:].encode()) for choice in choices]
    assert bytes_ == pytest.approx([s / n for s, n in zip(sums, sizes, strict=True)])


def test_as_questions_they_have_prompts_letters_and_shots(folder, tokenizer):
    config = make_config(
        str(folder), languages=("en", "zh"), method="choices", gap="question", shots=1, prompts=(2,)
    )
    predictions, engine = ask(config, tokenizer, write=lambda text: "0")
    assert [p.method for p in predictions] == ["sum", "mean", "byte", "letter"]
    texts = [engine.renderer.decode(ids) for ids in engine.prompts]
    assert all(GAP in text and MASK not in text and "Choices:" in text for text in texts)


def test_free_answers_are_asked_as_questions(folder, tokenizer):
    config = make_config(str(folder), languages=("en", "zh"), method="both")
    predictions, engine = ask(config, tokenizer, write=lambda text: "0")
    assert [(p.method, p.prompt) for p in predictions] == [("sentence", 0), ("generate", 1)]
    assert all(GAP in engine.renderer.decode(ids) for ids in engine.prompts)


def test_shots_have_no_effect_on_sentences_and_that_is_said(folder, tokenizer, caplog):
    found, *_ = score(folder, tokenizer, shots=2)
    assert "evaluation.shots=2 has no effect" in caplog.text
    plain, *_ = score(folder, tokenizer)
    assert found["sentence"].items == plain["sentence"].items


def test_equal_candidates_are_equally_likely():
    """Rounding must not decide between two candidates that are one word after translation."""
    entry = ScoredChoices(np.array([1]), [np.array([2])] * 3, ("Rom", "Oslo", "Rom"), ("sum",))
    answer = choose_likeliest(entry, np.array([-2.0, -3.0, -2.0000001]), "sum", 3)
    assert (answer.candidates, answer.reason) == ((0, 2), "tie")
    assert answer.scores == (-2.0, -3.0, -2.0)  # nor between their ranks
    answer = choose_likeliest(entry, np.array([-2.0, -1.0, -2.0]), "sum", 3)
    assert (answer.candidates, answer.reason) == ((1,), "matched")
    assert choose_likeliest(entry, None, "sum", 3).candidates == (0, 1, 2)


# ── frames in a run ───────────────────────────────────────────────────────────────────────────────


def test_frames_are_asked_beside_seaevals_and_recorded(folder, tokenizer, tmp_path):
    own = tmp_path / "mine.toml"
    own.write_text('[default]\nprompt = "{question} {choices}"\nanswer = "{text}"\n')
    config = make_config(
        str(folder),
        languages=("en", "zh"),
        method="choices",
        gap="question",
        prompts=(1, "harness", str(own)),
    )
    predictions, engine = ask(config, tokenizer, write=lambda text: "0")
    assert [(p.prompt, p.method) for p in predictions] == [
        *((1, method) for method in ("sum", "mean", "byte", "letter")),
        ("harness", "letter"),
        *(("mine", method) for method in ("sum", "mean", "byte")),
    ]
    assert predictions[0].prompt_label == "p1" and predictions[-1].prompt_label == "mine"
    record = describe_benchmarks(config, load_benchmarks(config))[Path(folder).name]
    assert record["frames"] == {
        "1": hash_frame(1),
        "harness": hash_frame("harness"),
        "mine": hash_frame(str(own)),
    }


def test_the_letters_of_the_harness_are_scored_alone(folder, tokenizer):
    """One token after "Answer:", as the harness scores " A"."""
    config = make_config(
        str(folder), languages=("en",), method="choices", gap="question", prompts=("harness",)
    )
    _, engine = ask(config, tokenizer, write=lambda text: "0")
    for prompt, options in zip(engine.prompts, engine.continuations, strict=True):
        shown = [engine.renderer.decode([*prompt, *ids]) for ids in options]
        assert [text.rsplit("Answer:")[1].strip() for text in shown] == list("ABC"[: len(shown)])


def test_a_changed_frame_is_asked_again(folder, tokenizer, tmp_path):
    own = tmp_path / "mine.toml"
    kept = set()
    for words in ("Q: {question}", "F: {question}", "Q: {question}"):
        own.write_text(f'[default]\nprompt = "{words}"\n')
        config = make_config(
            str(folder), languages=("en",), method="choices", gap="question", prompts=(str(own),)
        )
        renderer = open_eval_renderer(config, tokenizer)
        run_benchmarks(
            config,
            Counting(),
            renderer,
            load_benchmarks(config),
            cache=tmp_path / "cache",
            progress=False,
        )
        kept |= {file.name for file in (tmp_path / "cache").iterdir()}
    assert len(kept) == 2
