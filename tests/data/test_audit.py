"""Audits: planted leaks are found in every language, counts are those of the mixture, reports are whole."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.config import Component, Data, Source
from crossin_jax.data.audit import audit, draw, measure_fertility, to_markdown
from crossin_jax.data.leakage import NEAR, LeakIndex, Passage, hash_grams, sign, split_units
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluation.benchmarks import Benchmark, Item, Version, load_benchmark
from tests.data.conftest import parallel_rows, write_lines

CODES = ("en", "zh", "vi", "es")
QUESTIONS = {
    "en": "Which of the old harbour towns along the northern coast kept its own silver coinage until the great fire "
          "of 1743?",
    "zh": "北方海岸的旧港口城镇之中，哪一座城镇直到一七四三年的大火之前都一直保留着自己的银币铸造权利？",
    "vi": "Thị trấn cảng cổ nào dọc theo bờ biển phía bắc vẫn giữ tiền bạc đúc riêng cho đến trận hỏa hoạn lớn "
          "năm 1743?",
    "es": "¿Cuál de las antiguas ciudades portuarias de la costa norte conservó su propia moneda de plata hasta el "
          "gran incendio de 1743?"}
EDITS = {"en": ("old harbour", "ancient port"), "zh": ("大火", "火灾"), "vi": ("trận hỏa hoạn", "vụ cháy"),
         "es": ("gran incendio", "enorme fuego")}


def make_benchmark(questions=QUESTIONS) -> Benchmark:
    filler = [Item(f"q{i}", {code: Version(f"{row[code]['instruction']} {row[code]['output']} and nothing else {i}",
                                           ("(A) a", "(B) b"), 0) for code in CODES})
              for i, row in enumerate(parallel_rows(20, start=900))]
    item = Item("leaky", {code: Version(text, ("(A) a", "(B) b"), 0) for code, text in questions.items()})
    return Benchmark("bench", (item, *filler), CODES, "test")


def open_rows(tokenizer, tmp_path, rows, *components, **settings):
    components = components or (Component(kind="x2x", source="s", allow_same=True),)
    data = Data(sources=(Source(name="s", path=write_lines(tmp_path / "rows.jsonl", rows)),), components=components,
                **{"length": 512, "template": "gemma"} | settings)
    return Mixture(data, load_corpora(data, 0), 0), Renderer(tokenizer, data.template), data


@pytest.mark.parametrize("form", ["verbatim", "embedded", "edited"])
def test_planted_leaks_are_found_in_each_of_four_languages(tokenizer, tmp_path, form):
    rows = parallel_rows(60)
    for code in CODES:
        text = QUESTIONS[code]
        if form == "embedded":
            text = f"{rows[1][code]['instruction']} {text.upper()} {rows[2][code]['instruction']}"
        if form == "edited":
            assert EDITS[code][0] in text
            text = text.replace(*EDITS[code])
        for row in rows[7:11]:  # whichever languages are drawn
            row[code]["instruction"] = text
    components = [Component(kind="same", source="s", languages={code: 1.0}) for code in CODES]
    report = audit(*open_rows(tokenizer, tmp_path, rows, *components), [make_benchmark()])["leakage"]["bench"]
    for code in CODES:
        assert report["languages"][code]["found"] == 1, (form, code, report["strongest"])
    assert {entry["item"] for entry in report["strongest"]} == {"leaky"}
    assert all(entry["row"] in {"r7", "r8", "r9", "r10"} for entry in report["strongest"])
    assert {entry["kind"] for entry in report["strongest"]} == ({"near"} if form == "edited" else {"gram"}) or (
        form == "edited" and all(entry["share"] >= 0.5 for entry in report["strongest"]))


def test_clean_data_show_no_leak(tokenizer, tmp_path):
    report = audit(*open_rows(tokenizer, tmp_path, parallel_rows(60)), [make_benchmark()])["leakage"]["bench"]
    assert report["strongest"] == [] and all(v["touched"] == 0 for v in report["languages"].values())


def test_leaks_in_answers_and_contexts_count(tokenizer, tmp_path):
    rows = parallel_rows(10)
    rows[3]["en"]["output"] = QUESTIONS["en"]
    item = Item("i", {"en": Version("Why?", ("(A) a", "(B) b"), 0, "Before. " + QUESTIONS["en"] + " After.")})
    report = audit(*open_rows(tokenizer, tmp_path, rows, Component(source="s")),
                   [Benchmark("bench", (item,), ("en",), "test")])
    (entry,) = report["leakage"]["bench"]["strongest"]
    assert (entry["side"], entry["part"], entry["row"]) == ("answer", "context", "r3") and entry["share"] > 0.7


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_minhash_finds_what_is_near_and_nothing_else(seed, edits):
    rng = random.Random(seed)
    words = [f"w{rng.randrange(500)}" for _ in range(40)]
    changed = list(words)
    for i in rng.sample(range(40), edits):
        changed[i] = f"x{i}"
    index = LeakIndex([(Passage("b", "1", "en", "question"), " ".join(words))])
    grams = [set(hash_grams(split_units(" ".join(w)), 3).tolist()) for w in (words, changed)]
    similarity = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
    found = index.find(" ".join(changed))
    if similarity > 0.8 or edits == 0:
        assert found
    assert all(leak.share >= NEAR or leak.kind == "gram" for leak in found)
    assert not index.find(" ".join(f"y{i}" for i in range(40)))


def test_signatures_estimate_similarity():
    a, b = np.arange(300, dtype=np.uint64) * np.uint64(7919), np.arange(100, 400, dtype=np.uint64) * np.uint64(7919)
    assert abs((sign(a) == sign(b)).mean() - 0.5) < 0.2


def test_case_width_and_punctuation_do_not_hide_a_text():
    one, two = "The River, flows through Paris 2024!", "the river flows\nthrough PARIS ２０２４"
    assert np.array_equal(split_units(one), split_units(two))


def test_counts_are_those_of_the_mixture(tokenizer, tmp_path):
    rows = parallel_rows(80)
    rows[5]["zh"]["input"] = "河 " * 2000
    mixture, renderer, data = open_rows(tokenizer, tmp_path, rows, Component(source="s"),
                                        Component(kind="x2en", source="s"))
    report = json.loads(json.dumps(audit(mixture, renderer, data)))
    assert report["examples"] == 160 == sum(g["examples"] for g in report["components"])
    by_pair = {(g["component"], g["prompt"], g["answer"]): g["examples"] for g in report["components"]}
    assert by_pair == {("base", "en", "en"): 80} | {("x2en", *pair): n for pair, n in mixture.count_pairs(1).items()}
    zh = sum(e.id == "r5" and e.prompt_language == "zh" for e in mixture)
    assert sum(g["dropped"] for g in report["components"]) == zh
    tokens = sum(len(r.ids) - 1 for e, r in zip(mixture, renderer.render_many(list(mixture)), strict=True)
                 if len(r.ids) - 1 <= 512)
    assert sum(g["tokens"] for g in report["components"]) == tokens
    assert abs(sum(g["token_share"] for g in report["components"]) - 1) < 1e-9
    assert sum(report["lengths"]["base"]["counts"]) == 80
    assert report["packing"]["packed"] > report["packing"]["unpacked"]


def test_over_long_and_refused_rows_are_listed_by_language(tokenizer, tmp_path):
    rows = parallel_rows(20)
    for row in rows[:4]:
        row["zh"]["input"] = "河 " * 900
    rows[10]["en"]["instruction"] = "forge <|im_end|>"
    parts = open_rows(tokenizer, tmp_path, rows, Component(kind="same", source="s", languages={"zh": 1.0}),
                      Component(source="s"), over_long="shorten_input", template="chatml")
    report = audit(*parts)
    zh = next(g for g in report["components"] if g["component"] == "same")
    assert (zh["over_long"], zh["shortened"], zh["dropped"]) == (4, 4, 0)
    assert report["refused"] == {"special token in the text: it would forge a turn": {"examples": 1, "first": ["r10"]}}


def test_wrong_languages_and_duplicates_show(tokenizer, tmp_path):
    rows = parallel_rows(40)
    for row in rows:
        row["es"]["output"] = f"la respuesta de la pregunta {row['id']}"
    for row in rows[:10]:
        row["es"]["output"] = "This is not what the user wanted to have"
        row["es"]["instruction"], row["es"]["input"] = "¿Qué es lo que se ve?", ""
    report = audit(*open_rows(tokenizer, tmp_path, rows, Component(kind="same", source="s", languages={"es": 1.0})))
    assert report["languages"]["answer"]["es"]["en"] == 10 and report["languages"]["prompt"]["es"]["es"] == 40
    assert report["duplicates"] == {"examples": 9, "texts": 1}


def test_fertility_counts_tokens_per_character_and_word(tokenizer, tmp_path):
    mixture, renderer, _ = open_rows(tokenizer, tmp_path, parallel_rows(30))
    fertility = measure_fertility(mixture.corpora, renderer)
    assert set(fertility) == set(CODES) and fertility["zh"]["tokens_per_word"] is None
    spanish = [record.texts["es"] for record in mixture.corpora["s"]]
    texts = [part for t in spanish for part in (t.instruction, t.input, t.output) if part]
    expected = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts) / sum(map(len, texts))
    assert fertility["es"]["tokens_per_character"] == pytest.approx(expected)


def test_tables_and_figures_are_written(tokenizer, tmp_path):
    report = audit(*open_rows(tokenizer, tmp_path, parallel_rows(30)), [make_benchmark()])
    table = to_markdown(report)
    assert "| leakage: bench |" in table and "tokens per character" in table and report["mixture"] in table
    draw(report, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes()[:4] == b"\x89PNG"


def test_a_real_leak_cross_mmlu_hidden_in_alpaca(shared, tokenizer, tmp_path):
    benchmark = load_benchmark(str(shared / "seaeval" / "cross_mmlu.json"), CODES)
    seeds = [json.loads(line) for line in (shared / "alpaca" / "seed_tasks.jsonl").read_text().splitlines()]
    rows = [{"id": seed["id"], "instruction": seed["instruction"], "output": seed["instances"][0]["output"]}
            for seed in seeds]
    planted = {code: benchmark.items[10 + k] for k, code in enumerate(CODES)}
    for k, (code, item) in enumerate(planted.items()):
        rows[k]["instruction"] = f"Read this. {item.versions[code].question} Think first."
    parts = open_rows(tokenizer, tmp_path, rows, Component(source="s"), languages=("en",), length=2048)
    leakage = audit(*parts, [benchmark])["leakage"]["cross_mmlu"]
    for code, item in planted.items():
        assert leakage["languages"][code]["found"] == 1
        assert any(e["item"] == item.id and e["language"] == code for e in leakage["strongest"])
