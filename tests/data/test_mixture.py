"""Draws are hashes: sizes nest, orders do not matter, counts are exact, every fault names its
component.
"""

import hashlib
import json
import math
import pickle
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.checks import check
from crossin_jax.config import Component, Data, Source, UserError
from crossin_jax.data.corpus import Corpus, Record, Text
from crossin_jax.data.mixture import Mixture, held_out_settings, load_corpora, mix_bits, temper
from tests.data.conftest import parallel_rows, write_lines

CODES = ("en", "zh", "vi", "es")


def make_records(count: int, languages=CODES) -> list[Record]:
    rows = parallel_rows(count, languages)
    return [Record(row["id"], {code: Text(**row[code]) for code in languages}) for row in rows]


def make_mixture(
    *components: Component, rows: int = 500, seed: int = 0, order=None, **data
) -> Mixture:
    records = make_records(rows)
    if order is not None:
        random.Random(order).shuffle(records)
    corpora = {"s": Corpus("s", records), "t": Corpus("t", make_records(60))}
    for component in components:
        component.source = component.source or "s"
    return Mixture(
        Data(sources=(Source(name="s"), Source(name="t")), components=components, **data),
        corpora,
        seed,
    )


def as_set(mixture: Mixture) -> set:
    return {(e.component, e.id, e.prompt_language, e.answer_language) for e in mixture}


KINDS = ["base", "en2x", "x2en", "x2x", "same", "trans"]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_nest_with_their_languages(kind):
    small, middle, large = (
        as_set(make_mixture(Component(kind=kind, count=n))) for n in (100, 200, 450)
    )
    assert small < middle < large and len(small) == 100
    assert len({row for _, row, *_ in large}) == 450  # no row twice


@settings(max_examples=25, deadline=None)
@given(
    order=st.integers(0, 10**6),
    seed=st.integers(0, 2**40),
    kind=st.sampled_from(KINDS),
    count=st.integers(1, 80),
    again=st.booleans(),
)
def test_row_order_changes_nothing(order, seed, kind, count, again):
    one, two = (
        make_mixture(
            Component(kind=kind, count=count, with_replacement=again), rows=80, seed=seed, order=o
        )
        for o in (None, order)
    )
    assert list(one) == list(two)
    assert one.manifest()["hash"] == two.manifest()["hash"]


@pytest.mark.parametrize("kind", ["x2x", "same"])
def test_the_pivot_need_not_be_a_language_where_no_example_has_a_side_in_it(kind):
    """The default pivot is English; a mixture of Spanish and Vietnamese draws both, and nothing
    else.
    """
    pairs = Counter(
        (e.prompt_language, e.answer_language)
        for e in make_mixture(Component(kind=kind), languages=("es", "vi"))
    )
    expected = {("es", "vi"), ("vi", "es")} if kind == "x2x" else {("es", "es"), ("vi", "vi")}
    assert pairs.keys() == expected and min(pairs.values()) > 200


def test_draws_are_pinned_across_machines_and_releases():
    """Where this fails on purpose, raise mixture.FORMAT, so that no run goes on with other data."""
    assert [int(w) for w in mix_bits(np.array([0, 1], np.uint64), 7)] == PINNED_BITS
    base = Component(kind="base")
    mixtures = {kind: make_mixture(Component(kind=kind), base, rows=40) for kind in KINDS}
    mixtures |= {
        "count": make_mixture(Component(kind="x2x", count=7), Component(kind="x2x", count=9)),
        "again": make_mixture(Component(kind="en2x", count=50, with_replacement=True)),
        "weights": make_mixture(Component(kind="same", languages={"en": 1, "zh": 0.5})),
        "shares": make_mixture(*(Component(kind=kind, share=0.5) for kind in ("x2x", "same"))),
        "seed": make_mixture(Component(kind="x2x"), seed=2**40 + 3),
    }
    digests = {}
    for name, mixture in mixtures.items():
        examples = [
            (e.id, e.component, e.prompt_language, e.answer_language)
            for e in mixture.take(np.arange(3 * len(mixture)))
        ]
        digests[name] = hashlib.blake2b(json.dumps(examples).encode(), digest_size=4).hexdigest()
    assert digests == PINNED


PINNED = {
    "base": "008d1e5f",
    "en2x": "9ad135b0",
    "x2en": "f9cf9f73",
    "x2x": "1f05c4f9",
    "same": "644f1e88",
    "trans": "ed882a49",
    "count": "72c98eff",
    "again": "b5c429b4",
    "weights": "e2f6b0e5",
    "shares": "48decd0c",
    "seed": "cff8d160",
}
PINNED_BITS = [7191089600892374487, 13647215125184110592]


def test_other_seeds_and_components_draw_others():
    sets = [as_set(make_mixture(Component(kind="x2x", count=100), seed=seed)) for seed in (0, 1)]
    assert len(sets[0] & sets[1]) < 30
    other = {row for _, row, *_ in as_set(make_mixture(Component(kind="en2x", count=100)))}
    assert len({row for _, row, *_ in sets[0]} & other) < 50  # about 100 * 100/500


@pytest.mark.parametrize(
    ("component", "pairs"),
    [
        (Component(kind="base"), {("en", "en")}),
        (Component(kind="en2x"), {("en", x) for x in ("zh", "vi", "es")}),
        (Component(kind="x2en"), {(x, "en") for x in ("zh", "vi", "es")}),
        (Component(kind="x2x"), {(a, b) for a in CODES for b in CODES if a != b}),
        (Component(kind="x2x", allow_same=True), {(a, b) for a in CODES for b in CODES}),
        (Component(kind="x2x", languages={"zh": 1.0, "vi": 1.0}), {("zh", "vi"), ("vi", "zh")}),
        (Component(kind="same"), {(x, x) for x in ("zh", "vi", "es")}),
        (Component(kind="same", languages={"en": 1.0, "zh": 1.0}), {("en", "en"), ("zh", "zh")}),
        (
            Component(kind="trans"),
            {(x, "en") for x in ("zh", "vi", "es")} | {("en", x) for x in ("zh", "vi", "es")},
        ),
        (Component(kind="trans", translate="x2en"), {(x, "en") for x in ("zh", "vi", "es")}),
        (Component(kind="trans", translate="en2x"), {("en", x) for x in ("zh", "vi", "es")}),
    ],
)
def test_each_kind_draws_its_pairs_evenly(component, pairs):
    mixture = make_mixture(component, rows=2000)
    counts = Counter((e.prompt_language, e.answer_language) for e in mixture)
    assert counts == mixture.count_pairs(0) and set(counts) == pairs
    expected = 2000 / len(pairs)
    assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values()), counts


def test_language_weights_are_followed():
    counts = make_mixture(
        Component(kind="en2x", languages={"zh": 3.0, "es": 1.0}), rows=4000
    ).count_pairs(0)
    assert set(counts) == {("en", "zh"), ("en", "es")} and abs(counts["en", "zh"] - 3000) < 150


def test_positions_are_a_pure_function_and_epochs_reshuffle():
    mixture = make_mixture(Component(kind="base"), Component(kind="x2x", count=50))
    assert len(mixture) == 550 and [mixture[i] for i in (5, 3, 549)] == mixture.take(
        np.array([5, 3, 549])
    )
    first, second = ([mixture[i] for i in range(e * 550, (e + 1) * 550)] for e in (0, 1))
    assert first != second and Counter(first) == Counter(second)
    assert pickle.loads(pickle.dumps(mixture))[777] == mixture[777]
    stream = mixture.take(np.arange(5 * 550))
    places = random.Random(0).choices(range(5 * 550), k=300)
    assert (
        mixture.take(np.array(places))
        == [stream[i] for i in places]
        == [mixture[i] for i in places]
    )
    with pytest.raises(IndexError):
        mixture[-1]


def components_of(mixture: Mixture, epoch: int) -> list[str]:
    return [e.component for e in mixture.take(np.arange(len(mixture)) + epoch * len(mixture))]


def test_each_epoch_interleaves_the_components_anew():
    parts = Component(kind="base", count=60), Component(kind="x2x", count=40)
    mixture, again = make_mixture(*parts, rows=60), make_mixture(*parts, rows=60)
    orders = [components_of(mixture, epoch) for epoch in range(4)]
    assert len(set(map(tuple, orders))) == 4
    assert orders == [components_of(again, epoch) for epoch in range(4)]
    assert components_of(make_mixture(*parts, rows=60, seed=1), 0) != orders[0]
    for order in orders:  # both are all over the epoch: of 40, half in each half, up to chance
        assert Counter(order) == {"base": 60, "x2x": 40} and 10 < order[:50].count("x2x") < 30


def test_each_pass_over_a_component_has_its_own_order():
    """With 25 of 100 rows per epoch, the first quarter of a pass is other rows in the next pass."""
    mixture = make_mixture(
        Component(kind="base", share=0.25), Component(kind="x2x", share=0.75), rows=50
    )
    assert len(mixture) == 100
    rows = [
        {e.id for e in mixture.take(np.arange(100) + 100 * epoch) if e.component == "base"}
        for epoch in range(6)
    ]
    assert all(len(found) == 25 for found in rows)
    for first, second in (rows[:2], rows[2:4], rows[4:]):  # two epochs are one pass
        assert not first & second
    assert rows[0] not in (rows[2], rows[3]) and rows[2] != rows[4]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=2, max_size=3),
    weights=st.lists(st.integers(1, 30), min_size=3, max_size=3),
    epochs=st.integers(1, 4),
)
def test_shares_are_exact_and_rows_come_in_turn(lengths, weights, epochs):
    """Sizes by largest remainders; no row comes twice more often than another of its component."""
    weights = weights[: len(lengths)]
    names = [f"s{i}" for i in range(len(lengths))]
    data = Data(
        sources=tuple(map(lambda name: Source(name=name), names)),
        components=tuple(
            Component(kind="base", source=name, share=weight / sum(weights))
            for name, weight in zip(names, weights, strict=True)
        ),
    )
    mixture = Mixture(
        data,
        {
            name: Corpus(name, make_records(n, ("en",)))
            for name, n in zip(names, lengths, strict=True)
        },
        0,
    )
    total = sum(lengths)
    exact = [Fraction(weight, sum(weights)) * total for weight in weights]
    first = Counter(components_of(mixture, 0))
    sizes = [first[f"base:{name}"] for name in names]
    assert min(sizes) >= 1 and len(mixture) == sum(sizes)
    if all(share >= 1 for share in exact):
        assert sum(sizes) == total
    for size, share in zip(sizes, exact, strict=True):
        assert size == 1 or abs(size - share) < 1
        for other, its_share in zip(sizes, exact, strict=True):  # who is rounded up had more left
            if size > share and size > 1 and other < its_share:
                assert share - math.floor(share) >= its_share - math.floor(its_share)
    seen = Counter((e.component, e.id) for e in mixture.take(np.arange(epochs * len(mixture))))
    for name, n, size in zip(names, lengths, sizes, strict=True):
        counts = [seen[f"base:{name}", f"r{i}"] for i in range(n)]
        assert sum(counts) == epochs * size and max(counts) - min(counts) <= 1


def test_a_tiny_share_has_an_example_in_each_epoch():
    mixture = make_mixture(
        Component(kind="base", share=1 - 1e-6), Component(kind="x2x", share=1e-6)
    )
    assert all(Counter(components_of(mixture, epoch))["x2x"] == 1 for epoch in range(3))


def test_every_row_is_as_likely_as_another():
    """As the first of an epoch, in a counted set, and in draws with replacement; within 5 sigma."""
    open_set = make_mixture(Component(kind="base"), rows=8)
    first = Counter(open_set[epoch * 8].id for epoch in range(400))
    assert len(first) == 8 and all(abs(n - 50) < 5 * (400 / 8) ** 0.5 for n in first.values())
    chosen = Counter(
        row
        for seed in range(200)
        for _, row, *_ in as_set(make_mixture(Component(kind="base", count=2), rows=8, seed=seed))
    )
    assert len(chosen) == 8 and all(abs(n - 50) < 5 * 50**0.5 for n in chosen.values())
    again = make_mixture(Component(kind="en2x", count=70_000, with_replacement=True), rows=20)
    draws = again.draw(np.arange(70_000))
    assert (abs(np.bincount(draws[:, 1], minlength=20) - 3500) < 5 * 3500**0.5).all()
    # A row drawn twice may have another language.
    pairs = Counter(map(tuple, draws[:, 1:].tolist()))
    assert len(pairs) == 60 and all(
        abs(n - 70_000 / 60) < 5 * (70_000 / 60) ** 0.5 for n in pairs.values()
    )
    counted = Counter((CODES[a], CODES[b]) for a, b in draws[:, 2:].tolist())
    assert counted == again.count_pairs(0)


def test_counted_sets_are_fixed_and_open_ones_redraw_their_pairs():
    def pairs(mixture, epoch):
        examples = mixture.take(np.arange(len(mixture)) + epoch * len(mixture))
        return {e.id: (e.prompt_language, e.answer_language) for e in examples}

    fixed, free = (
        make_mixture(Component(kind="x2x", count=300)),
        make_mixture(Component(kind="x2x")),
    )
    assert pairs(fixed, 0) == pairs(fixed, 3)
    again = pairs(free, 1)
    # One in twelve of 500.
    assert sum(pairs(free, 0)[row] == pair for row, pair in again.items()) < 100


def test_shares_divide_the_examples_seen():
    mixture = make_mixture(
        Component(kind="base", share=0.5),
        Component(kind="x2x", share=0.3, source="t"),
        Component(kind="same", share=0.2),
    )
    assert len(mixture) == 1060
    seen = Counter(e.component for e in mixture.take(np.arange(1060)))
    assert seen == {"base": 530, "x2x": 318, "same": 212}
    rows = Counter(e.id for e in mixture.take(np.arange(1060)) if e.component == "x2x")
    assert set(rows.values()) <= {5, 6} and len(rows) == 60  # 318 draws from 60 rows, in turn
    both = Counter(e.id for e in mixture.take(np.arange(2120)) if e.component == "same")
    # The second epoch goes on where the first stopped.
    assert set(both.values()) == {1} and len(both) == 424


def test_draws_with_replacement_share_rows_across_directions():
    mixture = make_mixture(
        *(
            Component(kind=kind, count=900, with_replacement=True, translate="x2en")
            for kind in ("en2x", "x2en", "trans")
        )
    )
    by_kind = {
        kind: Counter(
            (e.id, e.prompt_language if kind != "en2x" else e.answer_language)
            for e in mixture
            if e.component == kind
        )
        for kind in ("en2x", "x2en", "trans")
    }
    assert by_kind["en2x"] == by_kind["x2en"] == by_kind["trans"]
    rows = Counter(row for row, _ in by_kind["en2x"].elements())
    # 900 draws from 500 rows: 1 - exp(-1.8) of them.
    assert len(rows) < 450 and max(rows.values()) > 3
    small = make_mixture(Component(kind="en2x", count=300, with_replacement=True))
    assert as_set(small) <= {(c, *rest) for c, *rest in as_set(mixture)}


def test_text_takes_each_row_in_a_language_it_has():
    records = [Record(f"t{i}", {CODES[i % 4]: Text("", "", f"line {i}")}) for i in range(40)]
    data = Data(sources=(Source(name="s"),), components=(Component(kind="text", source="s"),))
    examples = list(Mixture(data, {"s": Corpus("s", records)}, 0))
    assert {(e.id, e.answer_language) for e in examples} == {
        (f"t{i}", CODES[i % 4]) for i in range(40)
    }
    assert all(e.instruction == e.input == "" for e in examples)


def test_text_draws_by_weight_among_the_languages_that_a_row_has():
    texts = {code: Text("", "", f"{code} line") for code in CODES}
    records = [
        Record(f"t{i}", {code: texts[code] for code in (("en", "zh", "vi"), ("en", "es"))[i % 2]})
        for i in range(600)
    ]

    def draw(**weights) -> Counter:
        component = Component(kind="text", source="s", languages=weights)
        data = Data(sources=(Source(name="s"),), components=(component,))
        mixture = Mixture(data, {"s": Corpus("s", records)}, 0)
        assert len({e.id for e in mixture}) == len(mixture)
        assert all(
            e.prompt_language == e.answer_language and e.output == f"{e.answer_language} line"
            for e in mixture
        )
        return Counter((int(e.id[1:]) % 2, e.answer_language) for e in mixture)

    for weights, expected in (
        ({}, {(0, "en"): 100, (0, "zh"): 100, (0, "vi"): 100, (1, "en"): 150, (1, "es"): 150}),
        ({"en": 1.0, "zh": 3.0}, {(0, "en"): 75, (0, "zh"): 225, (1, "en"): 300}),
        ({"es": 2.0}, {(1, "es"): 300}),
        ({"zh": 1.0, "vi": 1.0}, {(0, "zh"): 150, (0, "vi"): 150}),
    ):
        found = draw(**weights)
        assert found.keys() == expected.keys(), weights
        assert all(abs(found[key] - n) < 5 * n**0.5 for key, n in expected.items()), weights


def test_a_source_without_rows_is_refused():
    records = [Record("t", {"vi": Text("", "", "line")})]
    for component, corpus in (
        (Component(kind="text", source="s", languages={"zh": 1.0, "en": 2.0}), records),
        (Component(kind="base", source="s"), []),
    ):
        data = Data(sources=(Source(name="s"),), components=(component,))
        with pytest.raises(
            UserError, match=r"components\[0\]: source 's' has no rows in en, zh, vi, es"
        ):
            Mixture(data, {"s": Corpus("s", corpus)}, 0)


@pytest.mark.parametrize(
    ("component", "needed"),
    [
        (Component(kind="base"), {"en"}),
        (Component(kind="en2x", languages={"zh": 1.0}), {"en", "zh"}),
        (Component(kind="x2en", languages={"zh": 1.0}), {"en", "zh"}),
        (Component(kind="trans", languages={"zh": 1.0}), {"en", "zh"}),
        (Component(kind="x2x", languages={"zh": 1.0, "vi": 2.0}), {"zh", "vi"}),
        (Component(kind="same", languages={"es": 1.0, "vi": 0.0}), {"es"}),
        (Component(kind="same", languages={"en": 1.0}), {"en"}),
        (Component(kind="same"), {"zh", "vi", "es"}),
        (Component(kind="x2x"), set(CODES)),
        (Component(kind="en2x"), set(CODES)),
    ],
)
def test_a_component_needs_the_texts_of_its_languages_and_no_others(component, needed):
    for code in CODES:
        gaps = [
            replace(record, texts={k: v for k, v in record.texts.items() if k != code})
            if record.id in ("r1", "r3")
            else record
            for record in make_records(4)
        ]
        data = Data(sources=(Source(name="s"),), components=(replace(component, source="s"),))
        if code in needed:
            message = rf"s, row 2: no '{code}' version \(nor in 1 other rows\)"
            with pytest.raises(UserError, match=message):
                Mixture(data, {"s": Corpus("s", gaps)}, 0)
        else:
            assert len(Mixture(data, {"s": Corpus("s", gaps)}, 0)) == 4


def test_the_manifest_is_json_and_counts_the_first_epoch():
    mixture = make_mixture(Component(kind="x2x", count=40), Component(kind="base", source="t"))
    manifest = mixture.manifest()
    assert json.loads(json.dumps(manifest)) == manifest and manifest["examples"] == 100 == len(
        mixture
    )
    for component in manifest["components"]:
        mine = [e for e in mixture if e.component == component["name"]]
        assert component["pairs"] == Counter(
            f"{e.prompt_language}>{e.answer_language}" for e in mine
        )
        assert component["examples"] == len(mine)
    assert [component["rows"] for component in manifest["components"]] == [40, 60]
    assert [(s["name"], s["rows"], s["dropped"]) for s in manifest["sources"]] == [
        ("s", 500, {}),
        ("t", 60, {}),
    ]


def change_text(field: str):
    """Changes one field of one text of the first record."""

    def change(records):
        texts = records[0].texts | {"zh": replace(records[0].texts["zh"], **{field: "other"})}
        return [replace(records[0], texts=texts), *records[1:]]

    return change


# What is different → (two lists of components, two sets of further settings of `mix`)
STREAMS = {
    "seed": ([Component(kind="x2x")] * 2, {"seed": 0}, {"seed": 1000}),
    "languages": ([Component(kind="x2x")] * 2, {}, {"languages": ("en", "zh", "vi")}),
    "order of languages": ([Component(kind="x2x")] * 2, {}, {"languages": CODES[::-1]}),
    "pivot": ([Component(kind="same")] * 2, {}, {"pivot": "zh"}),
    "tag": ([Component(kind="x2x")] * 2, {}, {"tag": "instruction"}),
    "component.kind": ([Component(kind="x2en"), Component(kind="trans", translate="x2en")], {}, {}),
    "component.languages": (
        [Component(kind="en2x", languages={"zh": 1.0, "vi": weight}) for weight in (1.0, 3.0)],
        {},
        {},
    ),
    **{
        f"component.{field}": (
            [Component(kind=kind), Component(kind=kind, **{field: value})],
            {},
            {},
        )
        for field, kind, value in (
            ("source", "x2x", "t"),
            ("count", "x2x", 2),
            ("allow_same", "x2x", True),
            ("translate", "trans", "x2en"),
            ("translate_what", "trans", "record"),
            ("with_replacement", "x2x", True),
            ("tag", "x2x", "sentence"),
        )
    },
    "one tag or another": (
        [Component(kind="x2x", tag=tag) for tag in ("instruction", "sentence")],
        {},
        {},
    ),
    "ids": (
        [Component(kind="base")] * 2,
        {},
        {"change": lambda records: [replace(records[0], id="x"), records[1]]},
    ),
    **{
        field: ([Component(kind="same")] * 2, {}, {"change": change_text(field)})
        for field in ("instruction", "input", "output")
    },
}


def mix(*components: Component, seed: int = 0, change=list, **data) -> Mixture:
    """A mixture of two rows in each of two sources."""
    corpora = {"s": Corpus("s", change(make_records(2))), "t": Corpus("t", make_records(4)[2:])}
    data = Data(
        sources=(Source(name="s"), Source(name="t")),
        **data,
        components=tuple(
            replace(component, source=component.source or "s") for component in components
        ),
    )
    return Mixture(data, corpora, seed)


@pytest.mark.parametrize("part", STREAMS)
def test_two_streams_never_have_the_same_hash(part):
    """The hash differs even where the first epoch happens to have the same language pairs."""
    (one, other), settings, changes = STREAMS[part]
    for seed in range(300):
        a, b = (
            mix(component, **{**more, "seed": more.get("seed", 0) + seed})
            for component, more in ((one, settings), (other, settings | changes))
        )
        first = np.arange(10 * len(a))
        if a.count_pairs(0) == b.count_pairs(0) and a.take(first) != b.take(first):
            assert a.manifest()["hash"] != b.manifest()["hash"]
            return
    pytest.fail("no seed gives two streams with the same pairs")


def test_what_stands_in_the_manifest_is_in_its_hash():
    """Also where it changes neither the pairs nor, in this mixture, the stream."""
    base, x2x = Component(kind="base"), Component(kind="x2x", source="t")
    dropped = mix(base, x2x)
    dropped.corpora["t"].dropped["empty output"] += 1
    mixtures = [
        mix(base, x2x),
        dropped,
        mix(base),
        mix(x2x),
        mix(x2x, base),
        mix(x2x, pivot="zh"),
        mix(replace(base, share=0.25), replace(x2x, share=0.75)),
    ]
    assert len({mixture.manifest()["hash"] for mixture in mixtures}) == len(mixtures)


def test_the_hash_ignores_what_does_not_decide_the_stream(parallel_file, tmp_path):
    """Paths, the order of rows and sources, unused sources, and how a text is laid out."""
    lines = Path(parallel_file).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "copy.jsonl").write_text("".join(lines[::-1]), encoding="utf-8")

    def hash_of(path=parallel_file, others=(), template=None, **changes) -> str:
        data = Data(
            sources=(Source(name="s", path=str(path)), *others),
            **changes,
            components=(Component(kind="x2x", source="s", template=template),),
        )
        return Mixture(data, load_corpora(data, 0), 0).manifest()["hash"]

    unused = Source(name="t", path=parallel_file, limit=3)
    assert (
        hash_of()
        == hash_of(tmp_path / "copy.jsonl")
        == hash_of(others=(unused,))
        == hash_of(template="plain", length=99, packing=False, over_long="shorten_input")
    )


def test_requests_in_english_are_counted_by_the_language_of_the_prompt():
    """Xhosa has no sentence of its own: 9 x2x examples are asked in it or not, and 6 translations
    all the same.
    """
    records = [
        Record(f"r{i}", {code: Text(f"Q{i}", "", f"A{i}") for code in ("en", "fr", "xh")})
        for i in range(6)
    ]
    corpora = {"s": Corpus("s", records)}

    def count(tag, *components):
        data = Data(languages=("en", "fr", "xh"), components=components, tag=tag)
        mixture = Mixture(data, corpora, 0)
        asked = [mixture.take(np.array([i]))[0] for i in range(len(mixture))]
        return mixture.count_english_requests(), asked

    same = [Component(kind="same", source="s", languages={code: 1.0}) for code in ("fr", "xh")]
    counts, examples = count("sentence", *same)
    assert (
        counts
        == {"xh": 6}
        == Counter(
            e.prompt_language
            for e in examples
            if e.prompt_language != "en" and "Answer in" in e.instruction
        )
    )
    assert count("input", *same)[0] == {} == count("sentence", same[0])[0]
    trans = {"kind": "trans", "source": "s", "languages": {"xh": 1.0}, "translate": "x2en"}
    assert count("sentence", Component(**trans))[0] == {}  # English is what was asked for
    assert count("input", Component(**trans, request="prompt"))[0] == {"xh": 6}


def test_labels_tell_components_apart():
    mixture = make_mixture(
        Component(kind="x2x"), Component(kind="x2x", source="t"), Component(kind="base")
    )
    assert mixture.labels == ["x2x:s", "x2x:t", "base"]
    assert ("x2x:t", "vi") in mixture.groups
    twice = make_mixture(Component(kind="x2x", count=200), Component(kind="x2x", count=200))
    assert twice.labels == ["x2x:s", "x2x:s#2"]
    assert {e.id for e in twice if e.component == "x2x:s"} != {
        e.id for e in twice if e.component == "x2x:s#2"
    }
    again = make_mixture(
        *(Component(kind="x2x", count=40, with_replacement=True) for _ in range(2))
    )
    assert Counter(e.id for e in again if e.component == "x2x:s") != Counter(
        e.id for e in again if e.component == "x2x:s#2"
    )
    seeds = [
        make_mixture(Component(kind="x2x", count=40, with_replacement=True), seed=seed)
        for seed in (0, 1)
    ]
    assert Counter(e.id for e in seeds[0]) != Counter(e.id for e in seeds[1])


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (
            Component(kind="x2x", count=501),
            r"components\[0\].count=501 is above the 500 rows of 's'.*with_replacement",
        ),
        (
            Component(kind="en2x", languages={"en": 1.0}),
            "needs a language besides 'en' of positive weight",
        ),
        (Component(kind="x2x", languages={"zh": 1.0}), "x2x needs two languages"),
        (Component(kind="x2x", languages={"zh": -1.0, "vi": 1.0}), "weights are not negative"),
    ],
)
def test_impossible_components_are_refused(component, message):
    with pytest.raises(UserError, match=message):
        make_mixture(component)


def test_x2x_with_the_same_language_on_both_sides_needs_one(tmp_path):
    mixture = make_mixture(Component(kind="x2x", allow_same=True, languages={"zh": 1.0}), rows=5)
    assert mixture.count_pairs(0) == {("zh", "zh"): 5}


def test_missing_languages_name_the_first_row(tmp_path):
    rows = parallel_rows(5)
    del rows[2]["vi"]
    data = Data(
        sources=(Source(name="s", path=write_lines(tmp_path / "rows.jsonl", rows)),),
        components=(Component(kind="x2x", source="s"),),
    )
    with pytest.raises(
        UserError, match=r"rows.jsonl, row 3: no 'vi' version \(nor in 0 other rows\).*translate"
    ):
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
    config.data = Data(
        sources=(Source(name="s", path="x"),),
        components=(Component(source="s", share=0.5), Component(source="s", share=0.3)),
    )
    with pytest.raises(UserError, match="shares sum to 0.8"):
        check(config)


def test_temperature_evens_out_weights():
    assert temper({"zh": 100.0, "vi": 1.0}, 1) == {"zh": 100, "vi": 1}
    assert temper({"zh": 100.0, "vi": 1.0}, 2) == {"zh": 10, "vi": 1}


def test_held_out_reads_the_languages_of_each_source(parallel_file):
    data = held_out_settings(
        Data(
            eval_sources=(
                Source(name="dev", path=parallel_file, limit=5, languages=("zh", "es")),
                Source(name="more", path=parallel_file, limit=2),
            ),
            languages=("en", "zh", "es"),
            components=(Component(kind="x2x", source="other"),),
        )
    )
    mixture = Mixture(data, load_corpora(data, 0), 0)
    assert Counter(
        (e.component.split("#")[0], e.prompt_language, e.answer_language) for e in mixture
    ) == {
        ("same:dev", "zh", "zh"): 5,
        ("same:dev", "es", "es"): 5,
        **{("same:more", code, code): 2 for code in ("en", "zh", "es")},
    }


def test_the_seed_parts_the_embedded_world():
    data = Data(
        sources=(Source(name="s", kind="world"), Source(name="unused", path="/no/where")),
        components=(Component(source="s"),),
    )
    one, other = (load_corpora(data, seed) for seed in (0, 1))
    assert one.keys() == {"s"} and set(one["s"].ids()) != set(other["s"].ids())
    assert one["s"].fingerprint != other["s"].fingerprint


def test_a_held_out_source_may_have_the_name_of_a_source(parallel_file, tmp_path):
    """Each of the two mixtures reads its own."""
    more = write_lines(tmp_path / "more.jsonl", parallel_rows(3, start=500))
    data = Data(
        sources=(Source(name="s", path=parallel_file, limit=5),),
        eval_sources=(Source(name="s", path=more),),
        components=(Component(source="s"),),
    )
    assert len(Mixture(data, load_corpora(data, 0), 0)) == 5
    reserved = held_out_settings(data)
    mixture = Mixture(reserved, load_corpora(reserved, 0), 0)
    assert {e.id for e in mixture} == {"r500", "r501", "r502"}


def test_held_out_reads_every_record_in_every_language(parallel_file):
    data = held_out_settings(Data(eval_sources=(Source(name="dev", path=parallel_file, limit=20),)))
    mixture = Mixture(data, load_corpora(data, 0), 0)
    assert len(mixture) == 80 and len({(e.id, e.answer_language) for e in mixture}) == 80
    assert all(e.prompt_language == e.answer_language for e in mixture)
