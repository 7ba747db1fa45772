"""Audits: planted leaks are found in every language, counts are those of the mixture, reports are
whole.
"""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.config import Component, Data, Source
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.packing import pack_rows
from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.items import Benchmark, Item, Version
from crossin_jax.prepare.audit import audit, measure_fertility
from crossin_jax.prepare.audit_report import draw, list_parts, to_markdown
from crossin_jax.prepare.leakage import NEAR, LeakIndex, Passage, hash_grams, sign, split_units
from crossin_jax.tables import render_parts
from tests.data.conftest import parallel_rows, write_lines

CODES = ("en", "zh", "vi", "es")
QUESTIONS = {
    "en": "Which of the old harbour towns along the northern coast kept its own silver coinage "
    "until the great fire of 1743?",
    "zh": "北方海岸的旧港口城镇之中，哪一座城镇直到一七四三年的大火之前"
    "都一直保留着自己的银币铸造权利？",
    "vi": "Thị trấn cảng cổ nào dọc theo bờ biển phía bắc vẫn giữ tiền bạc đúc riêng cho đến "
    "trận hỏa hoạn lớn năm 1743?",
    "es": "¿Cuál de las antiguas ciudades portuarias de la costa norte conservó su propia moneda "
    "de plata hasta el gran incendio de 1743?",
}
EDITS = {
    "en": ("old harbour", "ancient port"),
    "zh": ("大火", "火灾"),
    "vi": ("trận hỏa hoạn", "vụ cháy"),
    "es": ("gran incendio", "enorme fuego"),
}


def make_benchmark() -> Benchmark:
    filler = [
        Item(
            f"q{i}",
            {
                code: Version(
                    f"{row[code]['instruction']} {row[code]['output']} and nothing else {i}",
                    ("(A) a", "(B) b"),
                    0,
                )
                for code in CODES
            },
        )
        for i, row in enumerate(parallel_rows(20, start=900))
    ]
    item = Item(
        "leaky", {code: Version(text, ("(A) a", "(B) b"), 0) for code, text in QUESTIONS.items()}
    )
    return Benchmark("bench", (item, *filler), CODES, "test")


def open_rows(tokenizer, tmp_path, rows, *components, **settings):
    components = components or (Component(kind="x2x", source="s", allow_same=True),)
    data = Data(
        sources=(Source(name="s", path=write_lines(tmp_path / "rows.jsonl", rows)),),
        components=components,
        **{"length": 512, "template": "gemma"} | settings,
    )
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
    report = audit(*open_rows(tokenizer, tmp_path, rows, *components), [make_benchmark()])[
        "leakage"
    ]["bench"]
    for code in CODES:
        assert report["languages"][code]["found"] == 1, (form, code, report["strongest"])
    assert {entry["item"] for entry in report["strongest"]} == {"leaky"}
    assert all(entry["row"] in {"r7", "r8", "r9", "r10"} for entry in report["strongest"])
    assert {entry["kind"] for entry in report["strongest"]} == (
        {"near"} if form == "edited" else {"gram"}
    ) or (form == "edited" and all(entry["share"] >= 0.5 for entry in report["strongest"]))


def test_clean_data_show_no_leak(tokenizer, tmp_path):
    report = audit(*open_rows(tokenizer, tmp_path, parallel_rows(60)), [make_benchmark()])[
        "leakage"
    ]["bench"]
    assert report["strongest"] == [] and all(
        v["touched"] == 0 for v in report["languages"].values()
    )


def test_leaks_in_answers_and_contexts_count(tokenizer, tmp_path):
    rows = parallel_rows(10)
    rows[3]["en"]["output"] = QUESTIONS["en"]
    item = Item(
        "i",
        {"en": Version("Why?", ("(A) a", "(B) b"), 0, "Before. " + QUESTIONS["en"] + " After.")},
    )
    report = audit(
        *open_rows(tokenizer, tmp_path, rows, Component(source="s")),
        [Benchmark("bench", (item,), ("en",), "test")],
    )
    (entry,) = report["leakage"]["bench"]["strongest"]
    assert (entry["side"], entry["part"], entry["row"]) == ("answer", "context", "r3") and entry[
        "share"
    ] > 0.7


def test_items_whose_context_is_in_training_are_named(tokenizer, tmp_path):
    """Their questions are not: two questions on one paragraph share its text."""
    context = "The " + " ".join(f"word{i}" for i in range(40))
    items = tuple(
        Item(
            f"q{i}",
            {
                code: Version(f"Other question {i}?", ("a", "b"), 0, f"{code} {place}{context}")
                for code in ("en", "es")
            },
        )
        for i, place in enumerate(("", "", " ".join(f"other{i}" for i in range(60)) + " "))
    )
    rows = parallel_rows(9, ("en", "es"))
    rows[4]["en"]["input"] = f"en {context}"
    report = audit(
        *open_rows(tokenizer, tmp_path, rows, Component(source="s"), languages=("en", "es")),
        [Benchmark("bench", items, ("en", "es"), "test")],
    )
    found = report["leakage"]["bench"]["contexts"]
    assert (found["items"], found["in_training"]) == (3, 2)
    assert found["first"] == [{"item": i, "row": rows[4]["id"]} for i in ("q1", "q0")]
    said = "2 of 3 items of bench ask about a context that training rows hold, e.g. item q1 in row"
    assert said in to_markdown(report)
    clean = audit(
        *open_rows(tokenizer, tmp_path, parallel_rows(9), Component(source="s")),
        [Benchmark("bench", items, ("en", "es"), "test")],
    )
    assert "ask about a context" not in to_markdown(clean)


def test_leaks_in_earlier_turns_of_a_chat_count(tokenizer, tmp_path):
    turns = [("user", QUESTIONS["en"]), ("assistant", "a"), ("user", "and?"), ("assistant", "b")]
    chat = [{"role": role, "content": text} for role, text in turns]
    report = audit(
        *open_rows(
            tokenizer, tmp_path, [{"id": "c", "en": chat}], Component(source="s"), languages=("en",)
        ),
        [make_benchmark()],
    )
    assert report["leakage"]["bench"]["languages"]["en"]["found"] == 1


@pytest.mark.parametrize(("unit", "joint", "size"), [("w{}", " ", 13), ("{}", "", 20)])
def test_a_leak_is_a_run_of_13_words_or_20_characters(unit, joint, size):
    """One fewer is none; the share is that of the passage's runs that are found."""

    def units(start, count) -> list[str]:
        return [unit.format(n if joint else chr(0x4E00 + n)) for n in range(start, start + count)]

    passage = Passage("b", "1", "zh", "question")
    index = LeakIndex([(passage, joint.join(units(0, size + 9)))])
    for shared, runs in ((size + 9, 10), (size + 8, 9), (size, 1), (size - 1, 0)):
        text = joint.join([*units(200, 40), *units(0, shared), *units(300, 40)])
        leaks = [leak for leak in index.find(text) if leak.kind == "gram"]
        assert [(leak.passage, leak.share) for leak in leaks] == (
            [(passage, runs / 10)] if runs else []
        ), shared


def test_a_passage_shorter_than_a_run_must_be_there_whole():
    """And one of fewer than six words is too common to count."""
    words = [f"w{i}" for i in range(12)]
    for count in (5, 6, 12):
        index = LeakIndex([(Passage("b", "1", "en", "question"), " ".join(words[:count]))])
        around = [f"x{i}" for i in range(30)]
        found = [leak.share for leak in index.find(" ".join([*around, *words[:count], *around]))]
        assert found == ([1.0] if count >= 6 else [])
        assert not index.find(" ".join([*around, *words[: count - 1], *around]))


def test_an_item_is_touched_by_a_run_and_found_by_half_of_its_runs(tokenizer, tmp_path):
    """Of 28 words, 16 runs: 13 words are one of them, 20 are eight."""
    words = [f"word{i}" for i in range(28)]
    benchmark = Benchmark(
        "bench",
        tuple(
            Item(
                f"i{k}",
                {"en": Version(" ".join(f"{word}n{k}" for word in words), ("(A) a", "(B) b"), 0)},
            )
            for k in range(4)
        ),
        ("en",),
        "test",
    )
    around = " ".join(f"other{i}" for i in range(40))  # else they would be near-duplicates
    rows = [
        {
            "id": f"r{k}",
            "en": {
                "instruction": " ".join([around, *(f"{word}n{k}" for word in words[:n])]),
                "output": "a",
            },
        }
        for k, n in enumerate((12, 13, 19, 20))
    ]
    parts = open_rows(tokenizer, tmp_path, rows, Component(source="s"), languages=("en",))
    report = audit(*parts, [benchmark])["leakage"]["bench"]
    assert report["languages"] == {"en": {"items": 4, "touched": 3, "found": 1}}
    assert [(entry["item"], entry["row"], entry["share"]) for entry in report["strongest"]] == [
        ("i3", "r3", 0.5),
        ("i2", "r2", round(7 / 16, 3)),
        ("i1", "r1", round(1 / 16, 3)),
    ]


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
    a, b = (
        np.arange(300, dtype=np.uint64) * np.uint64(7919),
        np.arange(100, 400, dtype=np.uint64) * np.uint64(7919),
    )
    assert abs((sign(a) == sign(b)).mean() - 0.5) < 0.2


def test_case_width_and_punctuation_do_not_hide_a_text():
    one, two = "The River, flows through Paris 2024!", "the river flows\nthrough PARIS ２０２４"
    assert np.array_equal(split_units(one), split_units(two))


def test_counts_are_those_of_the_mixture(tokenizer, tmp_path):
    rows = parallel_rows(80)
    rows[5]["zh"]["input"] = "河 " * 2000
    mixture, renderer, data = open_rows(
        tokenizer, tmp_path, rows, Component(source="s"), Component(kind="x2en", source="s")
    )
    report = json.loads(json.dumps(audit(mixture, renderer, data)))
    assert report["examples"] == 160 == sum(g["examples"] for g in report["components"])
    by_pair = {
        (g["component"], g["prompt"], g["answer"]): g["examples"] for g in report["components"]
    }
    assert by_pair == {("base", "en", "en"): 80} | {
        ("x2en", *pair): n for pair, n in mixture.count_pairs(1).items()
    }
    zh = sum(e.id == "r5" and e.prompt_language == "zh" for e in mixture)
    assert sum(g["dropped"] for g in report["components"]) == zh
    tokens = sum(
        len(r.ids) - 1
        for e, r in zip(mixture, renderer.render_many(list(mixture)), strict=True)
        if len(r.ids) - 1 <= 512
    )
    assert sum(g["tokens"] for g in report["components"]) == tokens
    assert abs(sum(g["token_share"] for g in report["components"]) - 1) < 1e-9
    assert sum(report["lengths"]["base"]["counts"]) == 80
    assert report["packing"]["packed"] > report["packing"]["unpacked"]


def test_lengths_and_shares_are_those_of_the_tokens(tokenizer, tmp_path):
    """Against NumPy; an example of T + 1 ids has T tokens."""
    parts = mixture, renderer, data = open_rows(
        tokenizer,
        tmp_path,
        parallel_rows(60),
        Component(source="s"),
        Component(kind="x2en", source="s"),
    )
    report = audit(*parts)
    rendered = renderer.render_many([*mixture])
    total = sum(len(r.ids) - 1 for r in rendered)
    loss_mask = sum(int(r.loss_mask[1:].sum()) for r in rendered)
    for name in ("base", "x2en"):
        lengths = [
            len(r.ids) - 1 for e, r in zip(mixture, rendered, strict=True) if e.component == name
        ]
        told = report["lengths"][name]
        assert told["mean"] == pytest.approx(np.mean(lengths)) and told["max"] == max(lengths)
        assert [told[f"p{q}"] for q in (5, 50, 95, 99)] == [
            int(np.percentile(lengths, q)) for q in (5, 50, 95, 99)
        ]
        assert told["counts"] == [
            sum(low <= n < high for n in lengths) for low, high in itertools.pairwise(told["edges"])
        ]
    for group in report["components"]:
        mine = [
            r
            for e, r in zip(mixture, rendered, strict=True)
            if (e.component, e.prompt_language, e.answer_language)
            == tuple(group[key] for key in ("component", "prompt", "answer"))
        ]
        tokens, answers = (
            sum(len(r.ids) - 1 for r in mine),
            sum(int(r.loss_mask[1:].sum()) for r in mine),
        )
        assert (group["examples"], group["tokens"], group["learned"]) == (
            len(mine),
            tokens,
            answers,
        )
        assert group["token_share"] == pytest.approx(tokens / total)
        assert group["learned_share"] == pytest.approx(answers / loss_mask)
        assert group["over_long"] == group["shortened"] == group["dropped"] == group["refused"] == 0
    rows = len(pack_rows([len(r.ids) - 1 for r in rendered], data.length))
    assert report["packing"] == {
        "packed": pytest.approx(total / rows / 512),
        "examples_per_row": 120 / rows,
        "unpacked": pytest.approx(total / 120 / 512),
    }


def test_the_longest_row_is_not_over_long(tokenizer, tmp_path):
    mixture, renderer, data = open_rows(
        tokenizer, tmp_path, parallel_rows(20), Component(source="s")
    )
    longest = max(len(rendered.ids) - 1 for rendered in renderer.render_many([*mixture]))
    for length, over in ((longest, False), (longest - 1, True)):
        (group,) = audit(mixture, renderer, replace(data, length=length))["components"]
        assert bool(group["over_long"]) == over and group["over_long"] == group["dropped"]


def test_an_audit_may_stop_early(tokenizer, tmp_path):
    mixture, renderer, data = open_rows(
        tokenizer, tmp_path, parallel_rows(20), Component(source="s")
    )
    report = audit(mixture, renderer, data, limit=7)
    assert report["examples"] == 7 == report["components"][0]["examples"]
    assert report["components"][0]["tokens"] == sum(
        len(rendered.ids) - 1 for rendered in renderer.render_many(mixture.take(np.arange(7)))
    )


def test_dropped_and_refused_rows_are_named(tokenizer, tmp_path):
    rows = parallel_rows(40)
    for row in rows[:30]:
        row["en"]["instruction"] += " <s>"
    rows[39]["es"]["output"] = ""
    rows[5]["topic"] = rows[6]["topic"] = "rivers"
    report = audit(*open_rows(tokenizer, tmp_path, rows, Component(source="s"), template="chatml"))
    (refused,) = report["refused"].values()
    assert refused["examples"] == 30 and len(set(refused["first"])) == 20 == len(refused["first"])
    assert (
        report["dropped_rows"] == {"s": {"empty output": 1}}
        and report["components"][0]["refused"] == 30
    )
    table = to_markdown(report)
    assert "Refused, special token in the text: it would forge a turn: 30 (" in table
    assert "Dropped from s: 1 empty output" in table
    assert "Not read from s: field 'topic' (2 rows)" in table


def test_prompts_and_answers_are_told_apart_without_tags_and_requests(tokenizer, tmp_path):
    """A translation's prompt is the text to translate; a text that says too little is unclear."""
    rows = parallel_rows(12)
    for row in rows:
        row["es"] = {
            "instruction": "¿Qué es lo que se ve en la ciudad?",
            "input": "",
            "output": "12",
        }
        row["en"] = {
            "instruction": "What is the name of the city?",
            "input": "",
            "output": "the city is on the river",
        }
    parts = open_rows(
        tokenizer,
        tmp_path,
        rows,
        Component(kind="en2x", source="s", languages={"es": 1.0}),
        Component(kind="trans", source="s", translate="x2en", languages={"es": 1.0}),
    )
    assert audit(*parts)["languages"] == {
        "prompt": {"en": {"en": 12}, "es": {"es": 12}},
        "answer": {"es": {"unclear": 12}, "en": {"en": 12}},
    }


def test_over_long_and_refused_rows_are_listed_by_language(tokenizer, tmp_path):
    rows = parallel_rows(20)
    for row in rows[:4]:
        row["zh"]["input"] = "河 " * 900
    rows[10]["en"]["instruction"] = "forge <|im_end|>"
    parts = open_rows(
        tokenizer,
        tmp_path,
        rows,
        Component(kind="same", source="s", languages={"zh": 1.0}),
        Component(source="s"),
        over_long="shorten_input",
        template="chatml",
    )
    report = audit(*parts)
    zh = next(g for g in report["components"] if g["component"] == "same")
    assert (zh["over_long"], zh["shortened"], zh["dropped"]) == (4, 4, 0)
    assert report["refused"] == {
        "special token in the text: it would forge a turn": {"examples": 1, "first": ["r10"]}
    }


def test_wrong_languages_and_duplicates_show(tokenizer, tmp_path):
    rows = parallel_rows(40)
    for row in rows:
        row["es"]["output"] = f"la respuesta de la pregunta {row['id']}"
    for row in rows[:10]:
        row["es"]["output"] = "This is not what the user wanted to have"
        row["es"]["instruction"], row["es"]["input"] = "¿Qué es lo que se ve?", ""
    report = audit(
        *open_rows(
            tokenizer, tmp_path, rows, Component(kind="same", source="s", languages={"es": 1.0})
        )
    )
    assert (
        report["languages"]["answer"]["es"]["en"] == 10
        and report["languages"]["prompt"]["es"]["es"] == 40
    )
    assert report["duplicates"] == {"examples": 9, "texts": 1}


def test_fertility_counts_tokens_per_character_and_word(tokenizer, tmp_path):
    mixture, renderer, _ = open_rows(tokenizer, tmp_path, parallel_rows(30))
    fertility = measure_fertility(mixture.corpora, renderer)
    assert set(fertility) == set(CODES) and fertility["zh"]["tokens_per_word"] is None
    for code in CODES:
        parallel = [record.texts[code] for record in mixture.corpora["s"]]
        texts = [part for t in parallel for part in (t.instruction, t.input, t.output) if part]
        tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
        words = sum(len(text.split()) for text in texts)
        assert fertility[code] == {
            "tokens_per_character": pytest.approx(tokens / sum(map(len, texts))),
            "texts": len(texts),
            "tokens_per_byte": pytest.approx(tokens / sum(len(text.encode()) for text in texts)),
            "tokens_per_word": None if code == "zh" else pytest.approx(tokens / words),
        }


def test_tables_and_figures_are_written(tokenizer, tmp_path):
    report = audit(*open_rows(tokenizer, tmp_path, parallel_rows(30)), [make_benchmark()])
    table = to_markdown(report)
    assert (
        "| leakage: bench |" in table
        and "tokens per character" in table
        and report["mixture"] in table
    )
    lines, _ = render_parts("text", list_parts(report))
    assert all(len(line) < 140 for line in lines[2:])
    draw(report, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes()[:4] == b"\x89PNG"


def test_a_real_leak_cross_mmlu_hidden_in_alpaca(shared, tokenizer, tmp_path):
    benchmark = load_benchmark(str(shared / "seaeval" / "cross_mmlu.json"), CODES)
    seeds = [
        json.loads(line)
        for line in (shared / "alpaca" / "seed_tasks.jsonl").read_text().splitlines()
    ]
    rows = [
        {
            "id": seed["id"],
            "instruction": seed["instruction"],
            "output": seed["instances"][0]["output"],
        }
        for seed in seeds
    ]
    planted = {code: benchmark.items[10 + k] for k, code in enumerate(CODES)}
    for k, (code, item) in enumerate(planted.items()):
        rows[k]["instruction"] = f"Read this. {item.versions[code].question} Think first."
    parts = open_rows(
        tokenizer, tmp_path, rows, Component(source="s"), languages=("en",), length=2048
    )
    leakage = audit(*parts, [benchmark])["leakage"]["cross_mmlu"]
    for code, item in planted.items():
        assert leakage["languages"][code]["found"] == 1
        assert any(e["item"] == item.id and e["language"] == code for e in leakage["strongest"])
