"""Draws are hashes: sizes nest, orders do not matter, counts are exact, every fault names its component."""

import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.checks import check
from crossin_jax.config import Component, Data, Source, UserError
from crossin_jax.data.corpus import Corpus, Record, Text
from crossin_jax.data.mixture import Mixture, held_out, load_corpora, mix_bits, temper
from tests.data.conftest import parallel_rows, write_lines

CODES = ("en", "zh", "vi", "es")


def make_records(count: int, languages=CODES) -> list[Record]:
    rows = parallel_rows(count, languages)
    return [Record(row["id"], {code: Text(**row[code]) for code in languages}) for row in rows]


def make_mixture(*components: Component, rows: int = 500, seed: int = 0, order=None, **data) -> Mixture:
    records = make_records(rows)
    if order is not None:
        random.Random(order).shuffle(records)
    corpora = {"s": Corpus("s", records), "t": Corpus("t", make_records(60))}
    for component in components:
        component.source = component.source or "s"
    return Mixture(Data(sources=(Source(name="s"), Source(name="t")), components=components, **data), corpora, seed)


def as_set(mixture: Mixture) -> set:
    return {(e.component, e.id, e.prompt_language, e.answer_language) for e in mixture}


KINDS = ["base", "en2x", "x2en", "x2x", "same", "trans"]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_nest_with_their_languages(kind):
    small, middle, large = (as_set(make_mixture(Component(kind=kind, count=n))) for n in (100, 200, 450))
    assert small < middle < large and len(small) == 100
    assert len({row for _, row, *_ in large}) == 450  # no row twice


@settings(max_examples=25, deadline=None)
@given(order=st.integers(0, 10**6), seed=st.integers(0, 2**40), kind=st.sampled_from(KINDS), count=st.integers(1, 80))
def test_row_order_changes_nothing(order, seed, kind, count):
    one, two = (make_mixture(Component(kind=kind, count=count), rows=80, seed=seed, order=o) for o in (None, order))
    assert list(one) == list(two)
    assert one.manifest()["hash"] == two.manifest()["hash"]


@pytest.mark.parametrize("kind", ["x2x", "same"])
def test_the_pivot_need_not_be_a_language_where_no_example_has_a_side_in_it(kind):
    """The default pivot is English; a mixture of Spanish and Vietnamese draws both, and nothing else."""
    pairs = Counter((e.prompt_language, e.answer_language)
                    for e in make_mixture(Component(kind=kind), languages=("es", "vi")))
    expected = {("es", "vi"), ("vi", "es")} if kind == "x2x" else {("es", "es"), ("vi", "vi")}
    assert pairs.keys() == expected and min(pairs.values()) > 200


def test_draws_are_pinned_across_machines_and_releases():
    example = make_mixture(Component(kind="x2x", count=3))[0]
    assert (example.id, example.prompt_language, example.answer_language) == PINNED
    assert [int(w) for w in mix_bits(np.array([0, 1], np.uint64), 7)] == PINNED_BITS


PINNED = ("r384", "vi", "es")
PINNED_BITS = [7191089600892374487, 13647215125184110592]


def test_other_seeds_and_components_draw_others():
    sets = [as_set(make_mixture(Component(kind="x2x", count=100), seed=seed)) for seed in (0, 1)]
    assert len(sets[0] & sets[1]) < 30
    other = {row for _, row, *_ in as_set(make_mixture(Component(kind="en2x", count=100)))}
    assert len({row for _, row, *_ in sets[0]} & other) < 50  # about 100 * 100/500


@pytest.mark.parametrize(("component", "pairs"), [
    (Component(kind="base"), {("en", "en")}),
    (Component(kind="en2x"), {("en", x) for x in ("zh", "vi", "es")}),
    (Component(kind="x2en"), {(x, "en") for x in ("zh", "vi", "es")}),
    (Component(kind="x2x"), {(a, b) for a in CODES for b in CODES if a != b}),
    (Component(kind="x2x", allow_same=True), {(a, b) for a in CODES for b in CODES}),
    (Component(kind="x2x", languages={"zh": 1.0, "vi": 1.0}), {("zh", "vi"), ("vi", "zh")}),
    (Component(kind="same"), {(x, x) for x in ("zh", "vi", "es")}),
    (Component(kind="same", languages={"en": 1.0, "zh": 1.0}), {("en", "en"), ("zh", "zh")}),
    (Component(kind="trans"), {(x, "en") for x in ("zh", "vi", "es")} | {("en", x) for x in ("zh", "vi", "es")}),
    (Component(kind="trans", translate="x2en"), {(x, "en") for x in ("zh", "vi", "es")}),
    (Component(kind="trans", translate="en2x"), {("en", x) for x in ("zh", "vi", "es")}),
])
def test_each_kind_draws_its_pairs_evenly(component, pairs):
    mixture = make_mixture(component, rows=2000)
    counts = Counter((e.prompt_language, e.answer_language) for e in mixture)
    assert counts == mixture.count_pairs(0) and set(counts) == pairs
    expected = 2000 / len(pairs)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values()), counts


def test_language_weights_are_followed():
    counts = make_mixture(Component(kind="en2x", languages={"zh": 3.0, "es": 1.0}), rows=4000).count_pairs(0)
    assert set(counts) == {("en", "zh"), ("en", "es")} and abs(counts["en", "zh"] - 3000) < 150


def test_positions_are_a_pure_function_and_epochs_reshuffle():
    mixture = make_mixture(Component(kind="base"), Component(kind="x2x", count=50))
    assert len(mixture) == 550 and [mixture[i] for i in (5, 3, 549)] == mixture.take(np.array([5, 3, 549]))
    first, second = ([mixture[i] for i in range(e * 550, (e + 1) * 550)] for e in (0, 1))
    assert first != second and Counter(first) == Counter(second)
    assert pickle.loads(pickle.dumps(mixture))[777] == mixture[777]
    with pytest.raises(IndexError):
        mixture[-1]


def test_counted_sets_are_fixed_and_open_ones_redraw_their_pairs():
    def pairs(mixture, epoch):
        examples = mixture.take(np.arange(len(mixture)) + epoch * len(mixture))
        return {e.id: (e.prompt_language, e.answer_language) for e in examples}
    fixed, free = make_mixture(Component(kind="x2x", count=300)), make_mixture(Component(kind="x2x"))
    assert pairs(fixed, 0) == pairs(fixed, 3)
    again = pairs(free, 1)
    assert sum(pairs(free, 0)[row] == pair for row, pair in again.items()) < 100  # one in twelve of 500


def test_shares_divide_the_examples_seen():
    mixture = make_mixture(Component(kind="base", share=0.5), Component(kind="x2x", share=0.3, source="t"),
                           Component(kind="same", share=0.2))
    assert len(mixture) == 1060
    seen = Counter(e.component for e in mixture.take(np.arange(1060)))
    assert seen == {"base": 530, "x2x": 318, "same": 212}
    rows = Counter(e.id for e in mixture.take(np.arange(1060)) if e.component == "x2x")
    assert set(rows.values()) <= {5, 6} and len(rows) == 60  # 318 draws from 60 rows, in turn
    both = Counter(e.id for e in mixture.take(np.arange(2120)) if e.component == "same")
    assert set(both.values()) == {1} and len(both) == 424  # the second epoch goes on where the first stopped


def test_draws_with_replacement_share_rows_across_directions():
    mixture = make_mixture(*(Component(kind=kind, count=900, with_replacement=True, translate="x2en")
                             for kind in ("en2x", "x2en", "trans")))
    by_kind = {kind: Counter((e.id, e.prompt_language if kind != "en2x" else e.answer_language)
                             for e in mixture if e.component == kind) for kind in ("en2x", "x2en", "trans")}
    assert by_kind["en2x"] == by_kind["x2en"] == by_kind["trans"]
    rows = Counter(row for row, _ in by_kind["en2x"].elements())
    assert len(rows) < 450 and max(rows.values()) > 3  # 900 draws from 500 rows: 1 - exp(-1.8) of them
    small = make_mixture(Component(kind="en2x", count=300, with_replacement=True))
    assert as_set(small) <= {(c, *rest) for c, *rest in as_set(mixture)}


def test_text_takes_each_row_in_a_language_it_has():
    records = [Record(f"t{i}", {CODES[i % 4]: Text("", "", f"line {i}")}) for i in range(40)]
    data = Data(sources=(Source(name="s"),), components=(Component(kind="text", source="s"),))
    examples = list(Mixture(data, {"s": Corpus("s", records)}, 0))
    assert {(e.id, e.answer_language) for e in examples} == {(f"t{i}", CODES[i % 4]) for i in range(40)}
    assert all(e.instruction == e.input == "" for e in examples)


def test_manifest_is_json_and_its_hash_follows_every_draw():
    def manifest(**changes):
        settings = {"count": 40} | changes
        return make_mixture(Component(kind="x2x", **{k: v for k, v in settings.items() if k not in ("seed", "tag")}),
                            seed=settings.get("seed", 0), tag=settings.get("tag", "input")).manifest()
    base = manifest()
    assert json.loads(json.dumps(base)) == base and base["examples"] == 40
    assert sum(base["components"][0]["pairs"].values()) == 40
    others = [manifest(count=41), manifest(seed=1), manifest(tag="none"), manifest(allow_same=True),
              manifest(languages={"en": 1.0, "zh": 2.0})]
    assert len({m["hash"] for m in [base, *others]}) == 6


def test_labels_tell_components_apart():
    mixture = make_mixture(Component(kind="x2x"), Component(kind="x2x", source="t"), Component(kind="base"))
    assert mixture.labels == ["x2x:s", "x2x:t", "base"]
    assert ("x2x:t", "vi") in mixture.groups
    twice = make_mixture(Component(kind="x2x", count=200), Component(kind="x2x", count=200))
    assert twice.labels == ["x2x:s", "x2x:s#2"]
    assert {e.id for e in twice if e.component == "x2x:s"} != {e.id for e in twice if e.component == "x2x:s#2"}


@pytest.mark.parametrize(("component", "message"), [
    (Component(kind="x2x", count=501), r"components\[0\].count=501 is above the 500 rows of 's'.*with_replacement"),
    (Component(kind="en2x", languages={"en": 1.0}), "needs a language besides 'en' of positive weight"),
    (Component(kind="x2x", languages={"zh": 1.0}), "x2x needs two languages"),
    (Component(kind="x2x", languages={"zh": -1.0, "vi": 1.0}), "weights are not negative"),
])
def test_impossible_components_are_refused(component, message):
    with pytest.raises(UserError, match=message):
        make_mixture(component)


def test_missing_languages_name_the_first_row(tmp_path):
    rows = parallel_rows(5)
    del rows[2]["vi"]
    data = Data(sources=(Source(name="s", path=write_lines(tmp_path / "rows.jsonl", rows)),),
                components=(Component(kind="x2x", source="s"),))
    with pytest.raises(UserError, match=r"rows.jsonl, row 3: no 'vi' version \(nor in 0 other rows\).*translate"):
        Mixture(data, load_corpora(data, 0), 0)
    data.languages = ("en", "zh", "id")
    with pytest.raises(UserError, match="x2x needs 'id', but 's' has only en, zh"):
        Mixture(data, load_corpora(data, 0), 0)
    data.languages, data.components[0].kind = ("en", "vi"), "base"  # base asks for the pivot alone
    assert len(Mixture(data, load_corpora(data, 0), 0)) == 5


def test_shares_that_do_not_sum_are_refused_before_loading():
    from crossin_jax.config import Config
    config = Config()
    config.model.path = "x"
    config.data = Data(sources=(Source(name="s", path="x"),),
                       components=(Component(source="s", share=0.5), Component(source="s", share=0.3)))
    with pytest.raises(UserError, match="shares sum to 0.8"):
        check(config)


def test_temperature_evens_out_weights():
    assert temper({"zh": 100.0, "vi": 1.0}, 1) == {"zh": 100, "vi": 1}
    assert temper({"zh": 100.0, "vi": 1.0}, 2) == {"zh": 10, "vi": 1}


def test_held_out_reads_every_record_in_every_language(parallel_file):
    data = held_out(Data(eval_sources=(Source(name="dev", path=parallel_file, limit=20),)))
    mixture = Mixture(data, load_corpora(data, 0), 0)
    assert len(mixture) == 80 and len({(e.id, e.answer_language) for e in mixture}) == 80
    assert all(e.prompt_language == e.answer_language for e in mixture)
