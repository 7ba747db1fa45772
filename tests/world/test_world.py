"""The embedded world: parallel facts, splits, slices, Cross-World, tokenizer."""

import hashlib
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter

import pytest

from crossin_jax.config import UserError
from crossin_jax.data import pipeline
from crossin_jax.data.kinds import make_example
from crossin_jax.data.pipeline import load_tokenizer
from crossin_jax.data.prompts import Renderer
from crossin_jax.languages import LANGUAGES
from crossin_jax.world import facts as world
from crossin_jax.world.baselines import choose_by_frequency, choose_by_string
from crossin_jax.world.facts import (
    WORLD_LANGUAGES,
    facts,
    name,
    world_benchmark,
    world_corpus,
    world_records,
    world_text,
)
from crossin_jax.world.phrasings import ASK, TELL

FOUR = ("en", "zh", "vi", "es")


def lines_of(records):
    return [text.output for record in records for text in record.texts.values()]


def gold(row, language):
    version = row[LANGUAGES[language]]
    return version["choices"].index(version["answer"])


def test_counts_are_those_of_the_docstring():
    counted = {
        relation: (
            sum(fact.relation == relation for fact in facts()),
            len({fact.answer for fact in facts() if fact.relation == relation}),
        )
        for relation in (*world.TESTED, world.SHARED)
    }
    stated = {
        relation: (int(n), int(answers))
        for relation, n, answers in re.findall(r"\| (\w+) \| (\d+) \| (\d+) \|", world.__doc__)
    }
    assert counted == stated  # setup.py holds babel at the release that has just these
    assert len({fact.territory for fact in facts()}) == 246


def test_known_facts():
    told = {record.id: record.texts for record in world_records("all", WORLD_LANGUAGES)}
    assert told["currency/JP"]["zh"].output == "日元"
    assert told["language/BR"]["es"].output == "portugués"
    assert told["language/FR"]["id"].output == "bahasa Prancis"
    # The Indian rupee is tender there too.
    assert told["currency/BT"]["en"].output == "Bhutanese Ngultrum"
    assert told["language/SD"]["en"].output == "Arabic"
    assert told["continent/KE"]["vi"].output == "Châu Phi"
    assert "the United States" in told["currency/US"]["en"].instruction
    assert "La moneda del Reino Unido se llama libra esterlina." in lines_of(
        world_text(("en", "es")) + world_text(("en", "es"), seed=1)
    )
    zones = {record.id: record.texts for record in world_records("all/time_zone", FOUR)}
    assert zones["time_zone/FR"]["zh"].output == "中欧时间"


def test_phrasings_are_parallel_and_go_from_entity_to_answer():
    assert set(TELL) == set(ASK) == set(WORLD_LANGUAGES)
    for table, names in ((TELL, ["e", "a"]), (ASK, ["e"])):
        for language in WORLD_LANGUAGES:
            assert {r: len(p) for r, p in table[language].items()} == {
                r: len(p) for r, p in table["en"].items()
            }
            for phrasings in table[language].values():
                assert len(set(phrasings)) == len(phrasings)
                assert all(re.findall(r"\{(\w)\}", phrasing) == names for phrasing in phrasings)
    for language in WORLD_LANGUAGES:  # every phrasing is used, and the same one in every language
        for relation in ASK["en"]:
            of_relation = [fact for fact in facts() if fact.relation == relation]
            used = {
                fact.id: [
                    k
                    for k, phrasing in enumerate(ASK[language][relation])
                    if re.fullmatch(
                        re.escape(phrasing).replace(r"\{e\}", ".+").replace("de\\ .+", "del?\\ .+"),
                        world.question(fact, language),
                    )
                ]
                for fact in of_relation
            }
            expected = {
                fact.id: world._hash(fact.id) % len(ASK["en"][relation]) for fact in of_relation
            }
            assert all(expected[id] in matches for id, matches in used.items())
            assert set(expected.values()) == set(range(len(ASK["en"][relation])))


def test_a_name_in_chinese_touches_no_other_han_character():
    for fact in facts():
        entity, answer = (
            name("territory", fact.territory, "zh"),
            name(fact.relation, fact.answer, "zh"),
        )
        for text in (
            world.question(fact, "zh"),
            *(world._tell(fact, k, "zh", "zh") for k in range(3)),
        ):
            assert re.search(rf"(^|[ ，]){re.escape(entity)}( |，)", text)
            assert text == world.question(fact, "zh") or re.search(
                rf" {re.escape(answer)}( |。$)", text
            )


@pytest.mark.parametrize("seed", range(3))
def test_splits_part_the_territories(seed):
    parts = Counter(world.territory_parts(seed).values())
    total = sum(parts.values())
    assert abs(parts["train"] / total - 0.5) < 0.01 and abs(parts["dev"] / total - 0.1) < 0.01
    ids = {part: {record.id for record in world_records(part, FOUR, seed)} for part in world.PARTS}
    assert 240 <= sum(not id.startswith("continent") for id in ids["train"]) <= 250
    assert ids["held_out"] == ids["dev"] | ids["test"] and not ids["dev"] & ids["test"]
    assert not any(id.startswith("continent") for id in ids["held_out"])
    territories = {part: {id.split("/")[1] for id in ids[part]} for part in ids}
    assert not territories["train"] & territories["held_out"]
    asked = {
        row["id"].split("/")[1]
        for part in ("dev", "test")
        for row in world_benchmark(part, FOUR, seed)
    }
    assert asked and not asked & territories["train"]
    assert ids["train"] < ids["all"]


def test_another_seed_is_another_split():
    assert {r.id for r in world_records("train", FOUR, 0)} != {
        r.id for r in world_records("train", FOUR, 1)
    }


def test_records_are_parallel():
    for record in world_records("all", WORLD_LANGUAGES):
        relation, territory = record.id.split("/")
        (fact,) = (fact for fact in facts() if fact.id == record.id)
        assert tuple(record.texts) == WORLD_LANGUAGES
        for language, text in record.texts.items():
            assert (
                name("territory", territory, language) in text.instruction
                and "{" not in text.instruction
            )
            assert text.output == name(relation, fact.answer, language) and text.input == ""


@pytest.mark.parametrize("seed", range(2))
def test_held_out_facts_are_told_in_english_only(seed):
    text = {
        piece: world_text(WORLD_LANGUAGES, seed, split=f"text/{piece}") for piece in world.SLICES
    }
    english, other = set(lines_of(text["en"])), set(lines_of(text["x"])) | set(lines_of(text["cs"]))
    parts = world.territory_parts(seed)
    assert all(record.texts.keys() == {"en"} for record in text["en"])
    assert all("en" not in record.texts for record in text["x"])
    for fact in facts():
        if fact.relation not in ("currency", "language"):
            continue
        lines = {
            (k, a, b): world._tell(fact, k, a, b)
            for k in range(3)
            for a in WORLD_LANGUAGES
            for b in WORLD_LANGUAGES
        }
        assert all(line in english for (_, a, b), line in lines.items() if a == b == "en")
        if parts[fact.territory] == "train":
            assert all(line in other for (_, a, b), line in lines.items() if a != b or a != "en")
        else:
            assert not any(line in other for line in lines.values())


@pytest.mark.parametrize("languages", [("en", "zh"), FOUR, WORLD_LANGUAGES])
def test_sizes_of_the_slices(languages):
    n, parts = len(languages), world.territory_parts(0)
    core = [fact for fact in facts() if fact.relation in world.CORE]
    told = [
        fact for fact in core if fact.relation == "continent" or parts[fact.territory] == "train"
    ]
    concepts = {(fact.relation, fact.answer) for fact in core} | {fact.territory for fact in core}
    sizes = [len(world_text(languages, split=f"text/{piece}")) for piece in world.SLICES]
    assert sizes == [
        3 * len(core),
        3 * len(told) * (n - 1),
        len(concepts) * n * (n - 1),
        3 * len(told) * n * (n - 1),
    ]
    everything = world_text(languages)
    assert len(everything) == sum(sizes) == len({record.id for record in everything})
    assert Counter(record.id.split("/")[0] for record in everything) == dict(
        zip(world.SLICES, sizes, strict=True)
    )


def test_dictionary_names_every_concept_both_ways():
    lines = lines_of(world_text(FOUR, split="text/dict"))
    assert (
        "France = 法国" in lines
        and "法国 = France" in lines
        and "Euro = 欧元" in lines
        and "África = 非洲" in lines
    )
    assert all(line.count(" = ") == 1 for line in lines)


def test_corpus_dispatches_and_relations_come_by_name():
    assert world_corpus("dev", FOUR, 3) == world_records("dev", FOUR, 3)
    assert world_corpus("text/cs", FOUR, 3) == world_text(FOUR, 3, split="text/cs")
    assert world_corpus("text", ("en", "zh")) == world_text(("en", "zh"))
    for split, prefix in (("train/time_zone", "time_zone/"), ("text/x/time_zone", "x/time_zone/")):
        records = world_corpus(split, FOUR)
        assert records and all(record.id.startswith(prefix) for record in records)
    assert all(
        row["id"].startswith("time_zone/") for row in world_benchmark("test/time_zone", FOUR)
    )


@pytest.mark.parametrize("subset", ["all", "opaque"])
@pytest.mark.parametrize("split", ["dev", "held_out", "test/time_zone"])
def test_benchmark_is_parallel_and_unambiguous(split, subset):
    by_id = {fact.id: fact for fact in facts()}
    rows = world_benchmark(split, WORLD_LANGUAGES, 1, subset)
    instructions = {record.id: record.texts for record in world_records(split, WORLD_LANGUAGES, 1)}
    assert subset == "opaque" or instructions.keys() == {row["id"] for row in rows}
    for row in rows:
        fact = by_id[row["id"]]
        codes = {
            code for other in facts() if other.relation == fact.relation for code in (other.answer,)
        }
        picked = set()
        for language in WORLD_LANGUAGES:
            version = row[LANGUAGES[language]]
            code_of = {name(fact.relation, code, language): code for code in codes}
            assert [choice[:4] for choice in version["choices"]] == ["(A) ", "(B) ", "(C) ", "(D) "]
            picked.add(tuple(code_of[choice[4:]] for choice in version["choices"]))
            names = [choice[4:].casefold() for choice in version["choices"]]
            assert not any(a in b for a in names for b in names if a is not b)
            assert version["question"] == instructions[row["id"]][language].instruction
        assert len({gold(row, language) for language in WORLD_LANGUAGES}) == 1
        (concepts,) = picked  # the same concepts in the same order in every language
        assert concepts[gold(row, "en")] == fact.answer
        assert fact.acceptable & set(concepts) == {fact.answer}
    places = Counter(gold(row, "en") for row in rows)
    assert max(places.values()) - min(places[i] for i in range(4)) <= 1


def shares_a_substring(a, b):
    """Written apart from the package: any common run of three letters, or any common Han
    character.
    """
    a, b = (
        "".join(
            c
            for c in unicodedata.normalize("NFKD", text.casefold())
            if not unicodedata.combining(c)
        )
        for text in (a, b)
    )
    return any(a[i : i + 3] in b for i in range(len(a) - 2) if a[i : i + 3].isalpha()) or any(
        c in b for c in a if unicodedata.name(c, "").startswith("CJK UNIFIED")
    )


@pytest.mark.parametrize("languages", [FOUR, WORLD_LANGUAGES])
def test_opaque_items_share_no_substring(languages):
    rows, opaque = (
        world_benchmark("held_out", languages, 0, subset) for subset in ("all", "opaque")
    )
    for row in rows + opaque:
        versions = [
            (name("territory", row["id"].split("/")[1], lang), row[LANGUAGES[lang]])
            for lang in languages
        ]
        shared = any(
            shares_a_substring(entity, version["answer"][4:]) for entity, version in versions
        )
        assert (row["tags"] == ["opaque"]) != shared
    for row in opaque:
        for lang in languages:
            entity = name("territory", row["id"].split("/")[1], lang)
            assert not any(
                shares_a_substring(entity, choice[4:]) for choice in row[LANGUAGES[lang]]["choices"]
            )
    assert [row["id"] for row in opaque] == [row["id"] for row in rows if row["tags"]]
    assert 90 <= len(opaque) <= 135


def test_more_languages_change_nothing_in_those_there_are():
    few, many = (
        world_benchmark("dev", languages, 2) for languages in (("en", "zh"), WORLD_LANGUAGES)
    )
    assert [{key: row[key] for key in ("id", "English", "Chinese")} for row in few] == [
        {key: row[key] for key in ("id", "English", "Chinese")} for row in many
    ]
    records = {
        languages: world_records("train", languages, 2)
        for languages in (("zh", "fil"), WORLD_LANGUAGES)
    }
    assert [(r.id, r.texts) for r in records["zh", "fil"]] == [
        (r.id, {lang: r.texts[lang] for lang in ("zh", "fil")}) for r in records[WORLD_LANGUAGES]
    ]
    assert set(lines_of(world_text(FOUR, 2))) <= set(lines_of(world_text(WORLD_LANGUAGES, 2)))


EVERYTHING = """
import time, hashlib, json
start = time.process_time()
from crossin_jax.world import facts as world
L = world.WORLD_LANGUAGES
splits, subsets = ("all", "train", "text", "all/time_zone"), ("all", "opaque")
parts = [repr(world.world_corpus(split, L, 7)) for split in splits]
parts += [json.dumps(world.world_benchmark("held_out", L, 7, subset)) for subset in subsets]
print(hashlib.sha256("".join(parts).encode()).hexdigest(), time.process_time() - start)
"""


def test_every_process_builds_the_same_in_less_than_five_seconds():
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        answer = subprocess.run(
            [sys.executable, "-c", EVERYTHING],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        digest, seconds = answer.stdout.split()
        digests.add(digest)
        assert float(seconds) < 5
    assert len(digests) == 1


def test_callers_cannot_spoil_the_cache():
    world_text(FOUR).clear()
    world_records("dev", FOUR).clear()
    assert world_text(FOUR) and world_records("dev", FOUR)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    pipeline.train_tokenizer(world.tokenizer_lines(FOUR), 3000, folder)
    return folder


@pytest.mark.parametrize("seed", [0, 5])
def test_the_tokenizer_reads_the_slices_and_every_kind_of_prompt(seed):
    """English three times, the other slices once, and requests for every language."""
    lines = Counter(world.tokenizer_lines(FOUR, seed))
    expected: Counter = Counter()
    for piece, times in (("en", 3), ("x", 1), ("dict", 1)):
        for line in lines_of(world_text(FOUR, seed, split=f"text/{piece}")):
            expected[line] += times
    prompts = lines - expected
    assert lines == expected + prompts  # nothing of the slices is missing
    records = world_records("train", FOUR, seed)
    assert sum(prompts.values()) == 4 * len(records)
    forms = {
        f"{make_example(record, 'x2x', asked, answered, tag='sentence').instruction} "
        f"{record.texts[answered].output}": (record.id, asked, answered)
        for record in records
        for asked in FOUR
        for answered in FOUR
    }
    found = Counter(forms[line] for line in prompts.elements())
    assert {(row, asked) for row, asked, _ in found} == {
        (record.id, asked) for record in records for asked in FOUR
    }
    assert all(
        len({answered for row, _, answered in found if row == record.id}) == 4
        for record in records[:9]
    )
    pairs = Counter((asked, answered) for _, asked, answered in found.elements())
    # All languages, in turn.
    assert len(pairs) == 16 and max(pairs.values()) - min(pairs.values()) <= 1


def test_the_tokenizer_s_lines_are_those_of_its_seed_and_languages():
    assert world.tokenizer_lines(FOUR, 1) != world.tokenizer_lines(FOUR, 2)
    assert not any("法国" in line for line in world.tokenizer_lines(("en", "es")))


def test_tokenizer_loads_and_round_trips(tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert len(tokenizer) == 3000
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    texts = random.Random(0).sample(lines_of(world_text(WORLD_LANGUAGES)), 200)
    for text in [*texts, "Name it.\n\nA (B) «ñ» 日本語 🙂", ""]:
        ids = tokenizer(text)["input_ids"]
        assert ids.count(1) == 1 and ids[0] == 1  # BOS once, by the post-processor
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
    assert tokenizer("Hi</s>")["input_ids"][-1] == 2


def test_tokenizer_gives_a_name_the_same_tokens_everywhere(tokenizer_folder):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    count = {}
    for language in FOUR:
        for fact in facts():
            entity = name("territory", fact.territory, language)
            ids = tokenizer.encode(entity, add_special_tokens=False).ids
            for text in (world.question(fact, language), f"{entity} = ?"):
                inside = tokenizer.encode(text, add_special_tokens=False).ids
                assert any(inside[i : i + len(ids)] == ids for i in range(len(inside))), text
            count.setdefault(language, {})[entity] = len(ids)
    mean = {language: sum(counts.values()) / len(counts) for language, counts in count.items()}
    for language, expected in {"en": 1.6, "zh": 2.8, "vi": 2.1, "es": 2.5}.items():
        assert abs(mean[language] - expected) < 0.4, mean


def test_an_answer_has_the_tokens_of_its_name(tokenizer_folder):
    """Through the real renderer: what training learns is the name as pretraining writes it, then
    EOS.
    """
    tokenizer = load_tokenizer(str(tokenizer_folder))
    renderer = Renderer(tokenizer, "alpaca")
    for record in world_records("dev", FOUR):
        for language in FOUR:
            rendered = renderer.render(make_example(record, "x2x", "en", language, tag="sentence"))
            answer = tokenizer(record.texts[language].output, add_special_tokens=False)["input_ids"]
            assert (
                rendered.ids[rendered.loss_mask].tolist() == [*answer, 2]
                and (rendered.ids == 1).sum() == 1
            )


def test_tokenizer_is_deterministic_and_leaves_no_parts(tokenizer_folder, tmp_path):
    pipeline.train_tokenizer(iter(world.tokenizer_lines(FOUR)), 3000, tmp_path / "new")
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (tokenizer_folder, tmp_path / "new")
    ]
    assert digests[0] == digests[1] and digests[0].keys() == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def expected_accuracy(rows, choices, language):
    return sum(
        (gold(row, language) in choice[language]) / len(choice[language])
        for row, choice in zip(rows, choices, strict=True)
    ) / len(rows)


def test_baselines_without_knowledge():
    for seed in range(3):
        rows, opaque = (
            world_benchmark("held_out", FOUR, seed, subset) for subset in ("all", "opaque")
        )
        for language in FOUR:
            assert 0.45 < expected_accuracy(rows, choose_by_string(rows, FOUR), language) < 0.65
            assert 0.15 < expected_accuracy(opaque, choose_by_string(opaque, FOUR), language) < 0.32
            assert (
                0.2 < expected_accuracy(rows, choose_by_frequency(rows, FOUR, seed), language) < 0.4
            )
            assert (
                0.3
                < expected_accuracy(opaque, choose_by_frequency(opaque, FOUR, seed), language)
                < 0.55
            )


def test_baselines_on_a_row_by_hand():
    choices = ["(A) Euro", "(B) US Dollar", "(C) Japanese Yen", "(D) Swiss Franc"]
    row = {
        "id": "currency/JP",
        "English": {"question": "?", "choices": choices, "answer": "(C) Japanese Yen"},
    }
    assert choose_by_string([row], ["en"]) == [{"en": (2,)}]
    euro, dollar = (
        sum(
            record.texts["en"].output == answer
            for record in world_records("train/currency", ["en"])
        )
        for answer in ("Euro", "US Dollar")
    )
    assert euro > dollar > 1 and choose_by_frequency([row], ["en"]) == [{"en": (0,)}]


@pytest.mark.parametrize("seed", range(3))
def test_the_commonest_answer_is_counted_among_training_territories_alone(seed):
    """For each question: the choices that the training split gives most often, and no territory of
    the test.
    """
    rows = world_benchmark("held_out", FOUR, seed, "all")
    counts = Counter(
        (record.id.split("/")[0], record.texts["es"].output)
        for record in world_records("train", FOUR, seed)
    )
    for row, chosen in zip(rows, choose_by_frequency(rows, FOUR, seed), strict=True):
        numbers = [
            counts[row["id"].split("/")[0], choice[4:]] for choice in row["Spanish"]["choices"]
        ]
        assert chosen["es"] == tuple(i for i, n in enumerate(numbers) if n == max(numbers))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: world_corpus("trian", FOUR), "did you mean train"),
        (lambda: world_corpus("text/xx", FOUR), "did you mean text/x"),
        (lambda: world_corpus("train/capital", FOUR), "time_zone"),
        (lambda: world_records("text/en", FOUR), "text/en"),
        (lambda: world_records("train", ("en", "de")), "'de'"),
        (lambda: world_text(("zh", "vi")), "'en'"),
        (lambda: world_benchmark("test/continent", FOUR), "never tested"),
        (lambda: world_benchmark("test", FOUR, subset="opaqe"), "did you mean opaque"),
        (lambda: pipeline.train_tokenizer([], 200, "unused"), "259"),
    ],
)
def test_faults_name_the_remedy(call, says):
    with pytest.raises(UserError, match=re.escape(says)):
        call()
