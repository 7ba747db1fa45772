"""Where benchmarks are read from: files of every format, folders, and the Hub's own code with a
local folder in its layout.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from crossin_jax.config import UserError
from crossin_jax.evaluation import registry
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.layouts import COPA
from crossin_jax.evaluation.registry import KNOWN, find_known
from crossin_jax.evaluation.shots import draw_shot_items

WORDS = {"en": ["one", "two", "three"], "es": ["uno", "dos", "tres"], "zh": ["一", "二", "三"]}
LANGUAGES = tuple(WORDS)


def mmmlu(code: str, i: int) -> dict:
    columns = dict(zip("ABC", WORDS[code], strict=True))
    return {"Question": f"{code} {i}?", **columns, "Answer": "ABC"[i % 3], "Subject": "maths"}


def rows_of(code: str, count: int = 4, make=mmmlu) -> list[dict]:
    return [make(code, i) for i in range(count)]


def write(path, rows):
    """Rows in the format that the ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("\r\n".join(mark.join(map(str, line)) for line in lines) + "\r\n")
    else:
        path.write_text("\n".join(map(json.dumps, rows)))


def check(benchmark, count=4):
    """Every item has its languages, its choices and its gold answer."""
    assert len(benchmark.items) == count and benchmark.kind == "parallel"
    for i, item in enumerate(benchmark.items):
        for code, words in WORDS.items():
            version = item.versions[code]
            assert version.question == f"{code} {i}?" and version.answer == i % 3
            assert [choice[4:] for choice in version.choices] == words


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_a_file_per_language_in_every_format(tmp_path, ending):
    names = {"en": "EN-US", "es": "ES-LA", "zh": "ZH-CN"}
    for code, name in names.items():
        rows = rows_of(code)
        path = tmp_path / f"mmlu_{name}.{ending}"
        write(path, rows)
        if ending == "json":
            path.write_text(json.dumps(rows))
    check(load_benchmark(str(tmp_path), LANGUAGES))
    check(load_benchmark(f"{tmp_path}/mmlu_{{lang}}.{ending}", LANGUAGES))
    check(load_benchmark(f"mmmlu:{tmp_path}", LANGUAGES))
    assert load_benchmark(f"mmmlu:{tmp_path}", LANGUAGES).name == "mmmlu"


def test_one_file_whose_rows_name_their_language(tmp_path):
    rows = [{"language": code} | row for code in LANGUAGES for row in rows_of(code)]
    write(tmp_path / "all.parquet", rows)
    check(load_benchmark(str(tmp_path / "all.parquet"), LANGUAGES))


def test_the_split_is_a_folder_or_stands_in_the_path(tmp_path):
    for split, count in {"test": 4, "validation": 2}.items():
        for code in LANGUAGES:
            write(tmp_path / split / f"{code}.jsonl", rows_of(code, count))
    for path in (str(tmp_path), f"{tmp_path}/{{split}}/{{lang}}.jsonl"):
        check(load_benchmark(path, LANGUAGES))
        check(load_benchmark(path, LANGUAGES, split="validation"), 2)
        benchmark = load_benchmark(path, LANGUAGES, with_shots=True)
        assert [item.id for item in benchmark.pool] == ["validation: 1", "validation: 2"]
        # the first two questions are the same in both files
        drawn = draw_shot_items(benchmark, benchmark.items[3], 2, seed=1)
        assert {item.id for item in drawn} == {"validation: 1", "validation: 2"}
    with pytest.raises(UserError, match=r"no file .*train.*'en'"):
        load_benchmark(f"{tmp_path}/{{split}}/{{lang}}.jsonl", LANGUAGES, split="train")


def test_shots_of_the_same_subject_go_first(tmp_path):
    def make(code, i):
        return mmmlu(code, i) | {"Question": f"{code} {i}?", "Subject": f"subject {i % 4}"}

    def make_shot(code, i):
        return make(code, i) | {"Question": f"shot {code} {i}?"}

    for code in LANGUAGES:
        write(tmp_path / "test" / f"{code}.jsonl", rows_of(code, 8, make))
        write(tmp_path / "dev" / f"{code}.jsonl", rows_of(code, 20, make_shot))
    benchmark = load_benchmark(str(tmp_path), LANGUAGES, with_shots=True)
    for item in benchmark.items:
        drawn = draw_shot_items(benchmark, item, 5, seed=3)
        assert all(shot.tags == item.tags for shot in drawn) and len(drawn) == 5
        assert all(shot.id.startswith("dev: ") for shot in drawn)


def test_rows_meet_by_position_only_where_all_languages_have_them(tmp_path):
    for code in LANGUAGES:
        write(tmp_path / f"{code}.jsonl", rows_of(code, 5 if code == "zh" else 4))
    with pytest.raises(UserError, match=r"item '5': no English \(en\) version"):
        load_benchmark(str(tmp_path), LANGUAGES)


def test_choices_in_another_order_in_each_language_leave_accuracy_alone(tmp_path, caplog):
    """X-CSQA: the same choices, shuffled for each language."""

    def make(code, i):
        turn = i + LANGUAGES.index(code)
        texts = WORDS[code][turn % 3 :] + WORDS[code][: turn % 3]
        choices = {"label": list("ABC"), "text": texts}
        answer = "ABC"[texts.index(WORDS[code][0])]
        return {"id": f"q{i}", "question": {"stem": "?", "choices": choices}, "answerKey": answer}

    for code in LANGUAGES:
        write(tmp_path / f"{code}.jsonl", rows_of(code, 4, make))
    benchmark = load_benchmark(str(tmp_path), LANGUAGES)
    assert benchmark.kind == "separate" and "another order" in benchmark.note
    assert all(set(item.versions) == set(LANGUAGES) for item in benchmark.items)
    assert "4 of 4 gold answers" in caplog.text
    assert load_benchmark(str(tmp_path), ("es",)).kind == "parallel"


# ── the Hub ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a folder in the Hub's layout, {configuration: {split: rows}}, that the real code of
    `datasets` reads.
    """
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name, configurations):
        lines = ["---", "configs:"]
        for configuration, splits in configurations.items():
            lines += [f"- config_name: {configuration}", "  data_files:"]
            for split, rows in splits.items():
                write(tmp_path / name / configuration / f"{split}.jsonl", rows)
                lines += [f"  - split: {split}", f"    path: {configuration}/{split}.jsonl"]
        (tmp_path / name / "README.md").write_text("\n".join([*lines, "---", ""]))
        return str(tmp_path / name)

    return make


def option_rows(code, names, **labels):
    return [
        {"question": f"{code} {i}?", "sample_id": f"s{i}"}
        | dict(zip(names, WORDS[code], strict=True))
        | {"answer": "ABC"[i % 3]}
        | labels
        for i in range(4)
    ]


def xcsqa_rows(code):
    return [
        {
            "id": f"q{i}",
            "lang": code,
            "question": {
                "stem": f"{code} {i}?",
                "choices": {"label": list("ABC"), "text": WORDS[code]},
            },
            "answerKey": "ABC"[i % 3],
        }
        for i in range(4)
    ]


def belebele_rows(code):
    return [
        {
            "link": f"http://{i}",
            "question_number": 1,
            "flores_passage": "Read.",
            "question": f"{code} {i}?",
            **{f"mc_answer{n}": word for n, word in enumerate(WORDS[code], 1)},
            "correct_answer_num": str(i % 3 + 1),
        }
        for i in range(4)
    ]


def prox_rows(code):
    missing = dict.fromkeys([f"option_{i}" for i in range(3, 10)])
    names = [f"option_{i}" for i in range(3)]
    return [
        {"question_id": 70 + i, "answer_index": i % 3, "category": "law"} | missing | row
        for i, row in enumerate(option_rows(code, names))
    ]


LETTERS = ("option_a", "option_b", "option_c")
PUBLISHED = {
    "global_mmlu": (
        {"en": "en", "es": "es", "zh": "zh"},
        lambda code: option_rows(code, LETTERS, subject_category="STEM"),
        "category: STEM",
    ),
    "global_mmlu_lite": (
        {"en": "en", "es": "es", "zh": "zh"},
        lambda code: option_rows(code, LETTERS, cultural_sensitivity_label="CS"),
        "culture: sensitive",
    ),
    "mmlu_prox": ({"en": "en", "es": "es", "zh": "zh"}, prox_rows, "category: law"),
    "mmlu_prox_lite": ({"en": "en", "es": "es", "zh": "zh"}, prox_rows, "category: law"),
    "xcsqa": ({code: f"X-CSQA-{code}" for code in LANGUAGES}, xcsqa_rows, None),
    "belebele": ({"en": "eng_Latn", "es": "spa_Latn", "zh": "zho_Hans"}, belebele_rows, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_short_names_find_the_configuration_of_each_language(hub, monkeypatch, name):
    spellings, make, tag = PUBLISHED[name]
    split = KNOWN[name].split
    others = {"zho_Hant": {split: []}, "X-CODAH-en": {split: []}, "default": {split: []}}
    parts = {spellings[code]: {split: make(code), "dev": make(code)[:2]} for code in LANGUAGES}
    folder = hub(name, others | parts)
    pattern = KNOWN[name].hub.partition(":")[2]
    known = replace(KNOWN[name], hub=f"{folder}:{pattern}")
    monkeypatch.setitem(registry.KNOWN, name, known)
    benchmark = load_benchmark(name, LANGUAGES, with_shots=True)
    check(benchmark)
    assert benchmark.name == name and (tag is None or benchmark.items[0].tags == (tag,))
    assert len(benchmark.pool) == 2 and benchmark.has_own_pool
    with pytest.raises(UserError, match="no configuration for language 'vi'"):
        load_benchmark(name, ("en", "vi"))


@pytest.mark.parametrize("name", ["bmlama17", "bmlama53"])
def test_bmlama_meets_by_row_and_has_a_gap(hub, monkeypatch, name):
    def make(code):
        words = WORDS[code]
        # gold is the last candidate of every row
        orders = [words[i % 3 + 1 :] + words[: i % 3 + 1] for i in range(4)]
        return [
            {"Prompt": f"{code} {i}: <mask>.", "Ans": order[-1], "Candidate Ans": ", ".join(order)}
            for i, order in enumerate(orders)
        ]

    folder = hub(name, {code: {"test": make(code)} for code in LANGUAGES})
    monkeypatch.setitem(registry.KNOWN, name, replace(KNOWN[name], hub=f"{folder}:{{lang}}"))
    benchmark = load_benchmark(name, LANGUAGES)
    assert (benchmark.name, benchmark.kind, benchmark.is_cloze) == (name, "parallel", True)
    assert [item.id for item in benchmark.items] == ["1", "2", "3", "4"]
    for i, item in enumerate(benchmark.items):
        for code, version in item.versions.items():
            assert version.question == f"{code} {i}: <mask>."
            assert version.choices[version.answer][4:] == WORDS[code][i % 3]


def test_xcopa_meets_by_row_and_has_examples(hub, monkeypatch):
    def make(code, start=0):
        return [
            {
                "premise": f"{code} {i}.",
                "choice1": WORDS[code][0],
                "choice2": WORDS[code][1],
                "question": ("cause", "effect")[i % 2],
                "label": i % 2,
                "idx": 100 - i,
                "changed": False,
            }
            for i in range(start, start + 3)
        ]

    parts = {code: {"test": make(code), "validation": make(code, 3)} for code in ("es", "zh")}
    folder = hub("xcopa", parts | {"translation-es": {"test": make("en")}})
    # Spanish takes the place of one of its languages.
    ours = replace(KNOWN["xcopa"], hub=f"{folder}:{{lang}}", languages="es zh")
    monkeypatch.setitem(registry.KNOWN, "xcopa", ours)
    benchmark = load_benchmark("xcopa", ("es", "zh"), with_shots=True)
    assert (benchmark.kind, len(benchmark.items), len(benchmark.pool)) == ("parallel", 3, 3)
    for i, item in enumerate(benchmark.items):
        for code, version in item.versions.items():
            assert version.context == f"{code} {i}." and version.answer == i % 2
            assert version.question == list(COPA.values())[i % 2]
            assert [choice[4:] for choice in version.choices] == WORDS[code][:2]


def test_mmmlu_takes_english_from_mmlu(hub, monkeypatch):
    mmlu = [
        {"question": f"en {i}?", "choices": WORDS["en"], "answer": i % 3, "subject": "maths"}
        for i in range(4)
    ]
    english = hub("mmlu", {"all": {"test": mmlu, "dev": mmlu[:1]}, "anatomy": {"test": mmlu[:1]}})
    others = {"ES_LA": {"test": rows_of("es")}, "ZH_CN": {"test": rows_of("zh")}}
    known = replace(
        KNOWN["mmmlu"], hub=f"{hub('mmmlu', others)}:{{lang}}", english=f"{english}:all"
    )
    monkeypatch.setitem(registry.KNOWN, "mmmlu", known)
    check(load_benchmark("MMMLU", LANGUAGES))
    assert load_benchmark("mmmlu", ("es", "zh")).items[1].tags == ("subject: maths",)


def test_pmmeval_reads_files_of_the_repository(tmp_path, monkeypatch):
    spellings = {"en": "EN-US", "es": "ES-LA", "zh": "ZH-CN"}
    for code, spelling in spellings.items():
        write(tmp_path / "mlogiqa/test" / f"{code}.jsonl", rows_of(code))
        for part in ("easy", "hard"):
            write(tmp_path / f"mmmlu/{part}/test/mmlu_{spelling}.jsonl", rows_of(code))
    for name in ("pmmeval_mlogiqa", "pmmeval_mmmlu"):
        pattern = KNOWN[name].hub.partition(":")[2]
        known = replace(KNOWN[name], hub=f"{tmp_path}:{pattern}")
        monkeypatch.setitem(registry.KNOWN, name, known)
    check(load_benchmark("pmmeval_mlogiqa", LANGUAGES))
    both = load_benchmark("pmmeval_mmmlu", LANGUAGES)
    assert [item.id for item in both.items] == [
        f"{p}/{i}" for p in ("easy", "hard") for i in "1234"
    ]
    assert both.items[0].tags == ("subject: maths", "difficulty: easy")


def test_include_is_not_parallel(hub, monkeypatch):
    def make(code, count):
        return [
            {"language": name, "domain": "STEM"} | row
            for row in option_rows(code, LETTERS)[:count]
            for name in ["Spanish" if code == "es" else "Chinese"]
        ]

    folder = hub("x", {"Spanish": {"test": make("es", 4)}, "Chinese": {"test": make("zh", 3)}})
    monkeypatch.setitem(
        registry.KNOWN, "include", replace(KNOWN["include"], hub=f"{folder}:{{lang}}")
    )
    benchmark = load_benchmark("include", ("es", "zh"))
    assert benchmark.kind == "separate" and "its own" in benchmark.note
    assert [item.id for item in benchmark.items] == [f"es/{i}" for i in range(1, 5)] + [
        f"zh/{i}" for i in range(1, 4)
    ]
    limited = load_benchmark("include", ("es", "zh"), limit=2)
    assert [item.id for item in limited.items] == ["es/1", "es/2", "zh/1", "zh/2"]


def test_a_hub_data_set_without_a_short_name(hub):
    """Configurations are found by their language; without any the rows say it."""
    folder = hub("own", {code: {"test": rows_of(code)} for code in LANGUAGES})
    check(load_benchmark(folder, LANGUAGES))
    rows = [{"language": code} | row for code in LANGUAGES for row in rows_of(code)]
    check(load_benchmark(hub("one", {"whole": {"test": rows}}), LANGUAGES))
    check(load_benchmark(hub("two", {"a": {"test": rows}, "b": {"test": rows}}) + ":a", LANGUAGES))


def test_a_few_faulty_items_of_published_data_are_left_out(hub, monkeypatch, caplog):
    def make(code, faults):
        rows = option_rows(code, LETTERS) * 10
        return [
            row | {"sample_id": f"s{i}"} | ({"option_b": ""} if code == "es" and i < faults else {})
            for i, row in enumerate(rows)
        ]

    for faults in (2, 3):
        folder = hub(f"x{faults}", {code: {"test": make(code, faults)} for code in ("en", "es")})
        known = replace(KNOWN["global_mmlu"], hub=f"{folder}:{{lang}}")
        monkeypatch.setitem(registry.KNOWN, "global_mmlu", known)
        if faults == 2:  # 5 %
            benchmark = load_benchmark("global_mmlu", ("en", "es"))
            assert (len(benchmark.items), benchmark.num_left_out) == (38, 2)
            assert benchmark.items[0].id == "s2" and "2 of 40 items are left out" in caplog.text
        else:
            with pytest.raises(UserError, match="item 's0', Spanish: choices must be a list"):
                load_benchmark("global_mmlu", ("en", "es"))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Global-MMLU-Lite", "global_mmlu_lite"),
        ("MMLU-ProX", "mmlu_prox"),
        ("X-CSQA", "xcsqa"),
        ("BMLAMA-17", "bmlama17"),
        ("Belebele", "belebele"),
        ("INCLUDE", "include"),
        ("mmlu", None),
    ],
)
def test_short_names_in_usual_spellings(name, short):
    assert find_known(name) == short


def test_the_documentation_names_every_short_name():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    table = page.split("| short name |")[1].split("\n\n")[0]
    named = re.findall(
        r"`([a-z_0-9]+)", "".join(line.split("|")[1] for line in table.split("\n")[2:])
    )
    assert set(named) == {*KNOWN, "cross_world"}


def test_names_that_cannot_be_read():
    with pytest.raises(UserError, match=r"not on the Hub: git clone .*language_confusion:"):
        load_benchmark("language_confusion", ("en",))
    with pytest.raises(UserError, match="/nowhere does not exist"):
        load_benchmark("bmlama17:/nowhere", ("en",))
    with pytest.raises(UserError, match="did you mean global_mmlu"):
        load_benchmark("globl_mmlu", ("en",))
    with pytest.raises(UserError, match="check the name and the connection"):
        load_benchmark("nobody/nothing:{lang}", ("en",))
