"""Benchmarks: layouts, faults by name, SeaEval's prompts letter by letter, shots."""

import gzip
import json
from pathlib import Path

import pytest

from crossin_jax.config import Config, Evaluation, UserError
from crossin_jax.evaluation.benchmarks import check_benchmarks, load_benchmark
from crossin_jax.evaluation.frames import make_prompt
from crossin_jax.evaluation.items import Version
from crossin_jax.evaluation.shots import draw_shot_items, draw_shots, list_shots

LANGUAGES = ("en", "zh")
CITY = Version("Which city?", ("(A) Rome", "(B) Oslo"), 1)
STORY = Version("Who came?", ("(A) Ann", "(B) Bo"), 0, "Ann came.")


def row(id: str, **changes) -> dict:
    english = {"question": "Which?", "choices": ["(A) one", "(B) two"], "answer": "(B) two"}
    chinese = {"question": "哪个？", "choices": ["(A) 一", "(B) 二"], "answer": "(B) 二"}
    return {"id": id, "English": english | changes, "Chinese": chinese}


def write(path: Path, rows: list) -> str:
    text = "\n".join(map(json.dumps, rows)) if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl", "mine.json.gz", "mine.jsonl.gz"])
def test_a_file_in_any_wrapping_gives_the_same_items(tmp_path, name):
    benchmark = load_benchmark(write(tmp_path / name, [row("a"), row("b")]), LANGUAGES)
    assert (benchmark.name, [item.id for item in benchmark.items]) == ("mine", ["a", "b"])
    assert benchmark.items[0].versions["zh"] == Version("哪个？", ("(A) 一", "(B) 二"), 1)
    plain = load_benchmark(write(tmp_path / "plain.json", [row("a"), row("b")]), LANGUAGES)
    other = load_benchmark(
        write(tmp_path / "other.json", [row("a"), row("b", question="What?")]), LANGUAGES
    )
    assert benchmark.fingerprint == plain.fingerprint != other.fingerprint


CHANGED = {
    "id": lambda rows: rows[0].update(id="c"),
    "question": lambda rows: rows[1]["Chinese"].update(question="谁？"),
    "choice": lambda rows: rows[1]["Chinese"].update(choices=["(A) 三", "(B) 二"]),
    "gold": lambda rows: rows[0]["English"].update(answer="(A) one"),
    "context": lambda rows: rows[0]["English"].update(context="Once."),
    "tag": lambda rows: rows[0].update(tags=["x"]),
    "order": lambda rows: rows.reverse(),
    "fewer items": lambda rows: rows.pop(),
}


@pytest.mark.parametrize("part", CHANGED)
def test_every_part_of_an_item_changes_the_fingerprint(tmp_path, part):
    """Results with other items do not belong into one table; the fingerprint tells them apart."""
    rows = [row("a"), row("b")]
    before = load_benchmark(write(tmp_path / "f.json", rows), LANGUAGES).fingerprint
    assert load_benchmark(write(tmp_path / "g.json", rows), LANGUAGES).fingerprint == before
    assert load_benchmark(str(tmp_path / "f.json"), ("en",)).fingerprint != before
    assert load_benchmark(str(tmp_path / "f.json"), LANGUAGES, limit=1).fingerprint != before
    CHANGED[part](rows)
    assert load_benchmark(write(tmp_path / "f.json", rows), LANGUAGES).fingerprint != before


@pytest.mark.parametrize(
    ("answer", "index"),
    [(1, 1), ("1", 1), ("B", 1), ("(B)", 1), ("two", 1), ("(B) two", 1), (0, 0)],
)
def test_gold_may_be_index_letter_or_text(tmp_path, answer, index):
    file = write(
        tmp_path / "f.json",
        [{"id": 1, "en": {"question": "?", "choices": ["one", "two"], "answer": answer}}],
    )
    version = load_benchmark(file, ["en"]).items[0].versions["en"]
    assert (version.answer, version.choices) == (index, ("(A) one", "(B) two"))


def test_real_rows_of_seaeval(shared):
    languages = ("en", "zh", "vi", "es", "id", "ms", "fil")
    for name, size, has_context in (("cross_mmlu", 150, False), ("cross_logiqa", 176, True)):
        file = shared / "seaeval" / f"{name}.json"
        benchmark, rows = load_benchmark(str(file), languages), json.loads(file.read_text())
        assert len(benchmark.items) == size
        for item, raw in zip(benchmark.items, rows, strict=True):
            version = item.versions["fil"]
            assert version.choices[version.answer] == raw["Filipino"]["answer"]
            assert (version.context is not None) is has_context


def test_cross_world_and_its_opaque_subset():
    whole, opaque = (
        load_benchmark(f"cross_world{part}", LANGUAGES) for part in ("", ":test/opaque")
    )
    assert (whole.name, opaque.name) == ("cross_world:test", "cross_world:test/opaque")
    assert 40 < len(opaque.items) < len(whole.items)
    assert all("opaque" in item.tags for item in opaque.items)
    assert whole.fingerprint != load_benchmark("cross_world", LANGUAGES, seed=1).fingerprint
    assert len(load_benchmark("cross_world", LANGUAGES, limit=7).items) == 7


def test_one_file_per_language_meets_by_id_or_position(tmp_path):
    for ids in (True, False):
        folder = tmp_path / f"ids_{ids}"
        folder.mkdir()
        for code, words in {"en": ["one", "two"], "zh": ["一", "二"]}.items():
            rows = [{"id": f"q{i}"} if ids else {} for i in range(3)]
            rows = [
                r | {"question": f"{code} {i}", "choices": words, "answer": i % 2}
                for i, r in enumerate(rows)
            ]
            write(folder / f"mmlu_{code}.json", rows[::-1] if ids and code == "zh" else rows)
        for path in (str(folder), str(folder / "mmlu_{lang}.json")):
            benchmark = load_benchmark(path, LANGUAGES)
            assert [i.versions["en"].question[-1] for i in benchmark.items] == ["0", "1", "2"]
            assert all(
                i.versions["en"].question[-1] == i.versions["zh"].question[-1]
                for i in benchmark.items
            )
            assert [i.versions["zh"].answer for i in benchmark.items] == [0, 1, 0]
        assert load_benchmark(str(folder / "mmlu_{lang}.json"), LANGUAGES).name == "mmlu"
    with pytest.raises(UserError, match=r"mmlu_vi\.json for language 'vi'"):
        load_benchmark(str(folder / "mmlu_{lang}.json"), ["en", "vi"])
    with pytest.raises(UserError, match="NAME_vi"):
        load_benchmark(str(folder), ["vi"])


def test_belebele_rows(tmp_path):
    rows = [
        {
            "link": "http://x",
            "question_number": n,
            "flores_passage": f"{dialect} text",
            "question": f"{dialect}?",
            **{f"mc_answer{i}": f"{dialect} {i}" for i in (1, 2, 3, 4)},
            "correct_answer_num": "3",
            "dialect": dialect,
        }
        for dialect in ("eng_Latn", "zho_Hans", "ell_Grek")
        for n in (1, 2)
    ]
    benchmark = load_benchmark(write(tmp_path / "belebele.jsonl", rows), LANGUAGES)
    assert len(benchmark.items) == 2
    assert benchmark.items[1].versions["zh"] == Version(
        "zho_Hans?",
        ("(A) zho_Hans 1", "(B) zho_Hans 2", "(C) zho_Hans 3", "(D) zho_Hans 4"),
        2,
        "zho_Hans text",
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row("a"), row("b", answer=None)], ["'b'", "English", "no gold answer"]),
        (
            [row("b", answer="(B) three")],
            ["'b'", "English", "'(B) three' is not among the choices"],
        ),
        ([row("b", answer=2)], ["not among the choices"]),
        ([row("b", choices=["(A) one"])], ["'b'", "English", "1 choices", "2 to 10"]),
        ([row("b", choices=[str(i) for i in range(11)], answer=1)], ["11 choices"]),
        ([row("b", choices=["1", "2", "3"], answer=1)], ["'b'", "en: 3, zh: 2"]),
        ([row("b", choices=["two", "two"], answer="two")], ["'b'", "twice"]),
        ([row("b", choices="one two")], ["'b'", "list of texts"]),
        ([row("b", question="  ")], ["'b'", "no question"]),
        (
            [{"id": "b", "English": row("b")["English"]}],
            ["'b'", "no Chinese (zh) version", "has en"],
        ),
        ([row("a"), row("a")], ["two items have the id 'a'"]),
        ([], ["no items"]),
        ([3], ["row 1", "rows are objects"]),
    ],
)
def test_faults_name_file_item_and_language(tmp_path, rows, words):
    with pytest.raises(UserError) as error:
        load_benchmark(write(tmp_path / "bad.json", rows), LANGUAGES)
    assert all(word in str(error.value) for word in ["bad.json", *words]), error.value


def test_damaged_files_and_unknown_names(tmp_path):
    whole = Path(write(tmp_path / "f.json.gz", [row("a")] * 9))
    (tmp_path / "cut.json.gz").write_bytes(whole.read_bytes()[:-20])
    (tmp_path / "text.json").write_text('[{"id": 1,]')
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    for name, words in {
        "cut.json.gz": "damaged gzip",
        "text.json": "not JSON",
        "latin.json": "not UTF-8",
        "f.jsn": "did you mean f.json.gz",
    }.items():
        with pytest.raises(UserError, match=words):
            load_benchmark(str(tmp_path / name), LANGUAGES)
    with pytest.raises(UserError, match="did you mean cross_mmlu"):
        load_benchmark("cross_mlu", LANGUAGES)
    with pytest.raises(UserError, match="no languages"):
        load_benchmark("cross_world", [])


def test_hub_names_and_configurations(monkeypatch):
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, configuration, split))
        return [row("a")]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_benchmark("cross_mmlu", LANGUAGES).name == "cross_mmlu"
    assert load_benchmark("SeaEval/SeaEval_datasets:cross_logiqa", LANGUAGES).name == "cross_logiqa"
    assert asked == [
        ("SeaEval/cross_mmlu", None, "test"),
        ("SeaEval/SeaEval_datasets", "cross_logiqa", "test"),
    ]


# The wording of SeaEval v0.1, written out once more by hand.
ZERO_SHOT = {
    1: "Respond to the question by selecting the most appropriate answer. Simply select the "
    "answer, no explanations required.\n"
    "\n"
    "Question:\n"
    "Which city?\n"
    "\n"
    "Choices:\n"
    "(A) Rome\n"
    "(B) Oslo",
    2: "Kindly choose the correct answer from the options provided for the multiple-choice "
    "question. Simply select the answer, no explanations required.\n"
    "Question:\n"
    "Which city?\n"
    "Choices:\n"
    "(A) Rome\n"
    "(B) Oslo",
    3: "Solve the multi-choice question by selecting the accurate answer. Simply select the "
    "answer, no explanations required.\n"
    "Question:\n"
    "Which city?\n"
    "Choices:\n"
    "(A) Rome\n"
    "(B) Oslo",
    4: "Please answer the following multiple-choice question by selecting the correct option. "
    "Simply select the answer, no explanations required.\n"
    "\n"
    "Question:\n"
    "Which city?\n"
    "\n"
    "Choices:\n"
    "(A) Rome\n"
    "(B) Oslo",
    5: "As an expert, your task is to solve the following multiple-choice question. Identify the "
    "correct response among the given choices. Simply select the answer, no explanations "
    "required.\n"
    "\n"
    "Question:\n"
    "Which city?\n"
    "\n"
    "Choices:\n"
    "(A) Rome\n"
    "(B) Oslo",
}


@pytest.mark.parametrize(
    ("name", "languages", "fault"),
    [
        ("cross_world:held_out/opaque", ("en", "fil"), None),
        ("cross_world", ("en", "ko"), "'cross_world': .* has no 'ko'"),
        ("cross_world:held_in", ("en",), "split='held_in' .* did you mean held_out"),
        ("cross_world:dev/continent", ("en",), "never tested"),
        ("Cross-MMLU", ("en", "fil"), None),
        ("cross_mmlu", ("en", "fr"), r"'cross_mmlu' has no French \(fr\), only en, zh"),
        ("xcopa", ("en", "zh"), r"no English \(en\), only et, "),
        ("mmmlu", ("es", "pt", "zh"), None),
        ("belebele", ("en", "ko"), None),  # read from the Hub, by `evaluate`
        ("someone/else", ("en",), None),
        ("someone/else.json", ("en",), "no such file"),
        ("cross_mmlu:{folder}/nowhere", ("en",), "does not exist"),
        ("{folder}/f.json", ("en", "zh"), None),
        ("{folder}/f.json", ("en", "fr"), r"no French \(fr\) version"),
        ("language_confusion", ("en",), "not on the Hub"),
    ],
)
def test_what_cannot_be_evaluated_is_known_before_training(name, languages, fault, tmp_path):
    """Without the network: what is on the Hub is not read, and files are."""
    write(tmp_path / "f.json", [row("a")])
    asked = (name.replace("{folder}", str(tmp_path)),)
    config = Config(evaluation=Evaluation(benchmarks=asked, languages=languages))
    if fault is None:
        check_benchmarks(config)
    else:
        with pytest.raises(UserError, match=fault):
            check_benchmarks(config)


def test_a_file_that_only_evaluate_needs_may_come_later():
    """But a name without a folder may be misspelt, and languages are refused at once."""

    def check(*names):
        evaluation = Evaluation(benchmarks=names, languages=("en", "es"))
        return check_benchmarks(Config(evaluation=evaluation), True)

    assert check("cross_mmlu", "data/none.json", "/none/{lang}.csv") == [
        "data/none.json",
        "/none/{lang}.csv",
    ]
    for name, fault in (("cros_mmlu", "did you mean cross_mmlu"), ("xcopa", "has no English")):
        with pytest.raises(UserError, match=fault):
            check("data/none.json", name)


def test_prompts_are_seaevals():
    assert {number: make_prompt(CITY, number) for number in range(1, 6)} == ZERO_SHOT
    assert make_prompt(STORY, 3).endswith(
        "required.\nContext:\nAnn came.\nQuestion:\nWho came?\nChoices:\n(A) Ann\n(B) Bo"
    )
    assert make_prompt(STORY, 1, benchmark="cross_xquad").startswith(
        "Respond to the question by selecting the most appropriate answer. Simply select the "
        "choice, no"
    )
    assert make_prompt(CITY, 2, [STORY, CITY]) == (
        "Context:\nAnn came.\n\nQuestion:\nWho came?\n\nChoices:\n(A) Ann\n(B) Bo\n\nAnswer:\n(A) "
        "Ann\n\n"
        "Question:\nWhich city?\n\nChoices:\n(A) Rome\n(B) Oslo\n\nAnswer:\n(B) Oslo\n\n"
        "Question:\nWhich city?\n\nChoices:\n(A) Rome\n(B) Oslo\n\nAnswer:\n"
    )
    assert make_prompt(CITY, 0) == "Which city?"
    assert make_prompt(STORY, 0) == "Ann came.\n\nWho came?"
    with pytest.raises(UserError, match="prompt 6"):
        make_prompt(CITY, 6)
    with pytest.raises(UserError, match="shots"):
        make_prompt(CITY, 0, [STORY])


def test_shots_are_the_same_items_in_every_language(tmp_path):
    rows = [row(str(i), question=f"q{i // 2}", context=f"text {i // 2}") for i in range(12)]
    for i, r in enumerate(rows):
        r["Chinese"]["context"] = f"文 {i // 2}"
    benchmark = load_benchmark(write(tmp_path / "f.json", rows), LANGUAGES, limit=4)
    for item in benchmark.items:
        drawn = draw_shot_items(benchmark, item, 5, seed=3)
        assert len({shot.id for shot in drawn} - {item.id}) == 5
        assert all(shot.versions["en"].context != item.versions["en"].context for shot in drawn)
        for code in LANGUAGES:
            assert draw_shots(benchmark, item, code, 5, 3) == tuple(
                shot.versions[code] for shot in drawn
            )
    first = benchmark.items[0]
    assert draw_shot_items(benchmark, first, 5, 3) != draw_shot_items(benchmark, first, 5, 4)
    drawn = {
        item.id: [shot.id for shot in draw_shot_items(benchmark, item, 5, 3)]
        for item in benchmark.items
    }
    record = list_shots(benchmark, 5, 3)
    assert {key: record["others"].get(key, record["usual"]) for key in drawn} == drawn
    for one in drawn.values():  # one order for all: what two items share comes in the same order
        for other in drawn.values():
            assert [key for key in one if key in other] == [key for key in other if key in one]
    whole = load_benchmark(str(tmp_path / "f.json"), LANGUAGES)
    # --limit changes no prompt.
    assert draw_shot_items(whole, first, 5, 3) == draw_shot_items(benchmark, first, 5, 3)
    with pytest.raises(UserError, match=r"'0'.*only 10 other items"):
        draw_shots(benchmark, first, "en", 11, 3)


def test_the_example_of_the_documentation_loads(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (tmp_path / "own.json").write_text(page.split("```json\n")[1].split("```")[0])
    item = load_benchmark(str(tmp_path / "own.json"), ("en", "es")).items[0]
    assert item.versions["es"] == Version("¿Qué río pasa por Viena?", ("(A) Rin", "(B) Danubio"), 1)
    assert item.tags == ("geography",)
