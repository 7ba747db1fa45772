"""Batches: each example once and unchanged, packed tightly, the same on every host, resumed at any
point.
"""

import dataclasses
import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.config import Component, Config, Data, Source, UserError
from crossin_jax.data import packing
from crossin_jax.data.corpus import Corpus, Record, Text
from crossin_jax.data.kinds import Example
from crossin_jax.data.loader import make_loader
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.packing import pack_rows, shorten_input
from crossin_jax.data.pipeline import load_tokenizer, open_renderer
from crossin_jax.data.prompts import Renderer
from tests.data.conftest import parallel_rows, write_lines

FIELDS = ("tokens_BT", "targets_BT", "segment_ids_BT", "positions_BT", "loss_mask_BT", "group_BT")


@pytest.fixture(scope="module")
def parts(tokenizer, parallel_file):
    """Mixture, renderer and settings of 200 base, 150 x2x and 100 trans examples."""
    components = (
        Component(kind="base", source="s"),
        Component(kind="x2x", source="s", count=150),
        Component(kind="trans", source="s", count=100),
    )
    data = Data(
        sources=(Source(name="s", path=parallel_file),),
        components=components,
        length=160,
        template="gemma",
    )
    return Mixture(data, load_corpora(data, 0), 0), Renderer(tokenizer, "gemma"), data


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_ROWS", 12)
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 0)


def loader_of(parts, *, batch_size=4, seed=0, num_epochs=None, host=0, hosts=1, **changes):
    mixture, renderer, data = parts
    data = Data(**{**vars(data), **changes})
    return make_loader(
        mixture,
        renderer,
        data,
        batch_size=batch_size,
        seed=seed,
        num_epochs=num_epochs,
        process_index=host,
        process_count=hosts,
    )


def segments_of(batch):
    """(ids with the first target appended, learned, group) of every segment in a batch."""
    for r in range(len(batch["tokens_BT"])):
        for s in range(1, batch["segment_ids_BT"][r].max(initial=0) + 1):
            here = np.flatnonzero(batch["segment_ids_BT"][r] == s)
            tokens, targets = batch["tokens_BT"][r, here], batch["targets_BT"][r, here]
            assert np.array_equal(here, np.arange(here[0], here[-1] + 1)), "segments are stretches"
            assert np.array_equal(batch["positions_BT"][r, here], np.arange(len(here))), (
                "positions restart"
            )
            assert np.array_equal(tokens[1:], targets[:-1]), "targets are the next tokens"
            assert len(set(batch["group_BT"][r, here])) == 1
            yield (
                (*tokens, targets[-1]),
                tuple(batch["loss_mask_BT"][r, here]),
                int(batch["group_BT"][r, here[0]]),
            )


def digest(batch) -> str:
    return hashlib.blake2b(
        b"".join(batch[name].tobytes() for name in FIELDS), digest_size=8
    ).hexdigest()


def expected_segments(parts, epochs=1) -> Counter:
    mixture, renderer, _ = parts
    examples = mixture.take(np.arange(epochs * len(mixture)))
    return Counter(
        (
            tuple(r.ids.tolist()),
            tuple(r.loss_mask[1:].tolist()),
            mixture.groups.index((e.component, e.answer_language)),
        )
        for e, r in zip(examples, renderer.render_many(examples), strict=True)
    )


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("tiny", [True, False])
def test_every_example_comes_once_per_epoch_with_its_mask(parts, epochs, packs, tiny, request):
    if tiny:
        request.getfixturevalue("small_windows")
    batches = list(loader_of(parts, num_epochs=epochs, packing=packs))
    found = Counter(segment for batch in batches for segment in segments_of(batch))
    assert found == expected_segments(parts, epochs)
    for batch in batches:
        empty = batch["segment_ids_BT"] == 0
        assert not batch["loss_mask_BT"][empty].any() and not batch["positions_BT"][empty].any()
        assert batch["tokens_BT"].dtype == np.int32 and batch["loss_mask_BT"].dtype == bool
        assert (
            batch["tokens_BT"].shape == (4, 160)
            if packs
            else batch["tokens_BT"].shape[1] in (40, 80, 160)
        )


def test_one_host_and_many_see_the_same_rows(parts, small_windows):
    whole = loader_of(parts)
    halves = [loader_of(parts, host=h, hosts=2) for h in (0, 1)]
    for _ in range(40):
        batch, pieces = next(whole), [next(half) for half in halves]
        for name in FIELDS:
            assert np.array_equal(batch[name], np.concatenate([piece[name] for piece in pieces]))
    assert whole.get_state() == halves[0].get_state() == halves[1].get_state()


@pytest.mark.parametrize("hosts", [1, 2])
def test_restart_at_250_random_points_gives_the_identical_next_batches(parts, small_windows, hosts):
    loader, hashes, states = loader_of(parts, host=hosts - 1, hosts=hosts), [], []
    for _ in range(120):
        states.append(json.loads(json.dumps(loader.get_state())))
        hashes.append(digest(next(loader)))
    assert len(set(hashes)) == 120 and states[-1]["window"] > 8
    other = loader_of(parts, host=hosts - 1, hosts=hosts)
    for stop in random.Random(0).choices(range(118), k=250):
        other.set_state(states[stop])
        assert other.get_state() == states[stop]
        assert [digest(next(other)) for _ in range(2)] == hashes[stop : stop + 2]


def test_workers_change_nothing_and_resume_exactly(parts, small_windows):
    plain = loader_of(parts, host=1, hosts=2)
    states, hashes = [], []
    for _ in range(60):
        states.append(plain.get_state())
        hashes.append(digest(next(plain)))
    worked = loader_of(parts, host=1, hosts=2, workers=2)
    try:
        assert [digest(next(worked)) for _ in range(60)] == hashes
        assert worked.get_state() == plain.get_state()
        for stop in (37, 4):
            worked.set_state(states[stop])
            assert [digest(next(worked)) for _ in range(5)] == hashes[stop : stop + 5]
    finally:
        worked.close()


def test_unpacked_batches_resume_and_hold_like_lengths(parts, small_windows):
    loader = loader_of(parts, packing=False)
    for _ in range(37):
        next(loader)
    state, spreads = loader.get_state(), []
    expected = [digest(next(loader)) for _ in range(6)]
    other = loader_of(parts, packing=False)
    other.set_state(state)
    assert [digest(next(other)) for _ in range(6)] == expected
    for _ in range(30):
        lengths = (next(loader)["segment_ids_BT"] > 0).sum(1)
        spreads.append(np.ptp(lengths[lengths > 0]))
    assert np.mean(spreads) < 20  # of lengths between 15 and 110


def test_unpacked_batches_come_in_any_order(parts, small_windows):
    """In windows of three whole batches, that of the longest examples is first, second and last."""
    loader, places = loader_of(parts, packing=False), Counter()
    for _ in range(30):
        window = loader.position[0]
        longest = []
        while loader.position[0] == window:
            lengths = (next(loader)["segment_ids_BT"] > 0).sum(1)
            longest.append((lengths.max(), lengths.min() > 0))
        if len(longest) == 3 and all(whole for _, whole in longest):
            places[int(np.argmax([length for length, _ in longest]))] += 1
    assert len(places) == 3, places


def test_steps_per_epoch_counts_the_batches(parts):
    for packs in (True, False):
        steps = loader_of(parts, packing=packs).steps_per_epoch
        batches = len(list(loader_of(parts, packing=packs, num_epochs=1)))
        assert abs(batches - steps) <= 1


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("rows", [1000, 150, 100])
def test_epochs_are_counted_by_what_lies_in_their_windows(parts, monkeypatch, packs, rows):
    """Batches and real tokens of an epoch in one, three or four windows, without making it."""
    monkeypatch.setattr(packing, "WINDOW_ROWS", rows)
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 0)
    loader = loader_of(parts, packing=packs, num_epochs=1)
    batches = list(loader)
    assert loader.position[0] == (1 if packs or rows == 1000 else 450 // rows)  # windows
    tokens = sum(int((batch["segment_ids_BT"] > 0).sum()) for batch in batches)
    fresh = loader_of(parts, packing=packs)
    assert fresh.tokens_per_epoch == pytest.approx(tokens)
    assert len(batches) - 1 < fresh.steps_per_epoch - 1e-9 <= len(batches)


@pytest.mark.parametrize(("length", "widths"), [(160, (40, 80, 160)), (150, (38, 75, 150))])
def test_unpacked_batches_are_as_wide_as_their_longest_row_needs(parts, length, widths):
    """A quarter, half or all of the length; every batch is the narrowest that holds its rows."""
    loader, seen = loader_of(parts, packing=False, length=length, num_epochs=1), Counter()
    for batch in loader:
        longest = int((batch["segment_ids_BT"] > 0).sum(1).max())
        seen[batch["tokens_BT"].shape[1]] += 1
        assert batch["tokens_BT"].shape[1] == min(width for width in widths if width >= longest)
        assert all(batch[name].shape == batch["tokens_BT"].shape for name in FIELDS)
    assert len(seen) > 1


def test_what_is_dropped_is_counted_in_every_window(tokenizer, tmp_path, small_windows):
    """Over all windows and epochs, as often as it comes; a loader that goes on counts its own."""
    parts = long_row_parts(tokenizer, tmp_path, "drop")
    zh = sum(e.prompt_language == "zh" and "河 河" in e.input for e in parts[0])
    assert zh > 0
    for epochs in (1, 3):
        loader = loader_of(parts, num_epochs=epochs, batch_size=2)
        segments = [segment for batch in loader for segment in segments_of(batch)]
        assert sum(loader.dropped.values()) == 40 * epochs - len(segments)
    assert loader.position[0] > 1  # there were several windows


def test_other_seeds_shuffle_rows_otherwise(parts):
    assert digest(next(loader_of(parts))) != digest(next(loader_of(parts, seed=1)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=120))
def test_packing_uses_every_example_once_and_few_rows(lengths):
    rows = pack_rows(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 50 and row == sorted(row) for row in rows)
    assert (
        len(rows) <= 11 / 9 * -(-sum(lengths) // 50) + 1
        or len(rows)
        <= sum(n > 25 for n in lengths)
        + 11 / 9 * (-(-sum(n for n in lengths if n <= 25) // 50))
        + 1
    )


def pack_slowly(lengths, capacity) -> list[int]:
    """Free space of each row: the longest example first, into the row that it leaves fullest."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [space for space in free if space >= length]
        if fits:
            free[free.index(min(fits))] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 60).flatmap(
        lambda capacity: st.tuples(
            st.just(capacity), st.lists(st.integers(1, capacity), max_size=80)
        )
    )
)
def test_packing_fills_rows_as_best_fit_does(case):
    capacity, lengths = case
    rows = pack_rows(lengths, capacity)
    assert sorted(capacity - sum(lengths[i] for i in row) for row in rows) == pack_slowly(
        lengths, capacity
    )
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


def test_examples_of_one_length_are_packed_in_their_order():
    """So that every machine packs alike, whichever way it sorts."""
    assert pack_rows([1] * 400, 4) == [[*range(i, i + 4)] for i in range(0, 400, 4)]
    alone = [[i] for i in range(0, 200, 2)] + [[i] for i in range(1, 200, 2)]
    assert pack_rows([7, 6] * 100, 10) == alone


def sized_parts(tokenizer, length, **changes):
    """Three examples: one position shorter than a row, as long, and one longer."""
    renderer = Renderer(tokenizer, "gemma")
    bare = len(renderer.render_answer("a", "", "b").ids) - 1
    words = "a" + "&" * (length - bare - 1)  # no two of these make a token
    records = [Record(f"r{n}", {"en": Text(words + "&" * n, "", "b")}) for n in range(3)]
    data = Data(
        sources=(Source(name="s"),),
        components=(Component(source="s"),),
        languages=("en",),
        length=length,
        template="gemma",
        **changes,
    )
    assert [
        len(renderer.render_answer(record.texts["en"].instruction, "", "b").ids) - 1 - length
        for record in records
    ] == [-1, 0, 1]
    return Mixture(data, {"s": Corpus("s", records)}, 0), renderer, data


@pytest.mark.parametrize("packs", [True, False])
def test_an_example_as_long_as_a_row_is_kept_whole(tokenizer, packs):
    """A row of T positions holds T + 1 ids, since the last one is only a target."""
    mixture, renderer, data = parts = sized_parts(tokenizer, 40)
    loader = loader_of(parts, num_epochs=1, packing=packs)
    found = sorted(segment[0] for batch in loader for segment in segments_of(batch))
    ids = [tuple(rendered.ids.tolist()) for rendered in renderer.render_many([*mixture])]
    assert found == sorted(entry for entry in ids if len(entry) <= 41) and len(found) == 2
    assert loader.dropped == {"over-long base/en": 1}


def test_every_reason_is_counted_by_component_and_language(tokenizer, tmp_path, caplog):
    """And told once, with the first batch that lacks an example."""
    bos = tmp_path / "bos.json"
    bos.write_text(
        json.dumps(
            {
                "prompt_input": "<s><s>{instruction} {input}\n",
                "prompt_no_input": "<s><s>{instruction}\n",
            }
        )
    )
    rows = parallel_rows(20)
    rows[1]["en"]["instruction"] += " <|im_end|>"  # in all three
    rows[2]["zh"]["instruction"] = ""  # nothing to translate into
    rows[3]["en"]["input"] = "river " * 300  # in base alone
    rows[4]["zh"]["instruction"] = "河 " * 300  # the answer of trans
    components = (
        Component(kind="base", source="s"),
        Component(kind="trans", source="s", translate="en2x", languages={"zh": 1.0}),
        Component(kind="en2x", source="s", languages={"es": 1.0}, template=str(bos)),
    )
    data = Data(
        sources=(Source(name="s", path=write_lines(tmp_path / "rows.jsonl", rows)),),
        length=160,
        components=components,
        template="chatml",
    )
    renderer = open_renderer(Config(data=data), tokenizer)
    parts = Mixture(data, load_corpora(data, 0), 0), renderer, data
    expected = {
        "special token in the text base/en": 1,
        "over-long base/en": 1,
        "special token in the text trans/zh": 1,
        "over-long trans/zh": 1,
        "special token in the text en2x/es": 1,
        "nothing to learn trans/zh": 1,
        "double BOS en2x/es": 19,
    }
    for epochs in (1, 2):
        loader = loader_of(parts, num_epochs=epochs)
        segments = [segment for batch in loader for segment in segments_of(batch)]
        assert loader.dropped == {reason: n * epochs for reason, n in expected.items()}
        assert len(segments) == epochs * (60 - sum(expected.values()))
    warnings = [
        record.message
        for record in caplog.records
        if "some examples cannot be used" in record.message
    ]
    assert len(warnings) == 2 and "19 double BOS en2x/es" in warnings[0]  # one per loader


def test_windows_without_a_usable_example_are_passed_over(tokenizer, tmp_path, monkeypatch):
    """The names of a batch's examples leave out those that are dropped."""
    monkeypatch.setattr(packing, "WINDOW_ROWS", 1)
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 0)
    rows = parallel_rows(60)
    for row in rows[:45]:
        row["en"]["instruction"] += " <|im_end|>"
    data = Data(
        sources=(Source(name="s", path=write_lines(tmp_path / "rows.jsonl", rows)),),
        length=64,
        components=(Component(source="s"),),
        template="chatml",
    )
    mixture, renderer = Mixture(data, load_corpora(data, 0), 0), Renderer(tokenizer, "chatml")
    usable = [e for e in mixture if int(e.id[1:]) >= 45]
    ids = {tuple(renderer.render(e).ids.tolist()): f"{e.id} base en>en" for e in usable}
    for packs in (True, False):
        loader = loader_of((mixture, renderer, data), num_epochs=1, packing=packs)
        found = []
        while (batch := next(loader, None)) is not None:
            rows = [
                [
                    ids[segment[0]]
                    for segment in segments_of({k: v[i : i + 1] for k, v in batch.items()})
                ]
                for i in range(4)
            ]
            found += [(rows, loader.position)]
        assert sorted(name for rows, _ in found for row in rows for name in row) == sorted(
            ids.values()
        )
        assert loader.dropped == {"special token in the text base/en": 45}
        begins = [(0, 0), *(position for _, position in found[:-1])]
        for begin, (rows, _) in zip(begins, found, strict=True):
            assert [row for row in loader.name_rows(begin) if row] == [row for row in rows if row]


@settings(max_examples=30, deadline=None)
@given(
    body=st.text(st.sampled_from("ab c\n[]河é"), max_size=120),
    length=st.integers(8, 90),
    tag=st.sampled_from(["\n[zh]", ""]),
)
def test_a_shortened_input_is_a_beginning_of_it(tokenizer, body, length, tag):
    renderer = Renderer(tokenizer, "gemma")
    whole = Example("r", "x2x", "en", "zh", "Name it.", body + tag, "塞纳河")

    def ids_of(input) -> list[int]:
        return renderer.render(dataclasses.replace(whole, input=input)).ids.tolist()

    shortened = shorten_input(whole, renderer, length)
    if len(ids_of(body + tag)) - 1 <= length:
        assert shortened.ids.tolist() == ids_of(body + tag)
    elif len(ids_of(tag)) - 1 > length:  # not even without
        assert shortened is None
    else:
        ids = shortened.ids.tolist()
        assert len(ids) - 1 <= length and ids in [
            ids_of(body[:k].rstrip() + tag) for k in range(len(body))
        ]


def test_a_chat_is_never_shortened(tokenizer):
    turns = (("user", "one " * 50), ("assistant", "Seine"))
    chat = Example("r", "x2x", "en", "zh", "one " * 50, "in " * 50, "Seine", turns)
    assert shorten_input(chat, Renderer(tokenizer, "gemma"), 30) is None
    assert shorten_input(chat, Renderer(tokenizer, "gemma"), 300) is not None


def measure(mixture, renderer, data, **changes) -> float:
    """Share of real tokens in one epoch of batches, without the last one."""
    data = Data(**{**vars(data), **changes})
    loader = make_loader(mixture, renderer, data, batch_size=4, seed=0)
    batches = [
        next(loader)["segment_ids_BT"] > 0 for _ in range(max(8, int(loader.steps_per_epoch)))
    ]
    return sum(b.sum() for b in batches) / sum(b.size for b in batches)


def test_98_percent_of_packed_tokens_are_real(shared, record_property):
    llama = load_tokenizer(str(shared / "tokenizers" / "llama2"))
    xquad = Source(name="s", path=str(shared / "xquad" / "xquad.{lang}.json"), limit=400)
    alpaca = Source(
        name="s",
        path=str(shared / "alpaca" / "seed_tasks.jsonl"),
        languages=("en",),
        fields={"input": "instances.0.input", "output": "instances.0.output"},
    )
    kinds = {"xquad": ("base", "x2x", "en2x"), "alpaca": ("base",)}
    for name, source in {"xquad": xquad, "alpaca": alpaca}.items():
        data = Data(
            sources=(source,),
            length=2048,
            components=tuple(Component(kind=kind, source="s") for kind in kinds[name]),
        )
        parts = Mixture(data, load_corpora(data, 0), 0), Renderer(llama, "alpaca"), data
        packed, unpacked = measure(*parts), measure(*parts, packing=False)
        record_property(name, f"{packed:.4f} packed, {unpacked:.4f} unpacked")
        assert packed >= 0.98 > unpacked


def test_98_percent_on_short_instructions_with_any_tokenizer(parts):
    mixture, renderer, data = parts
    assert measure(mixture, renderer, data, length=2048) >= 0.98


def long_row_parts(tokenizer, tmp_path, over_long):
    rows = parallel_rows(40)
    for i in range(0, 40, 4):
        rows[i]["zh"]["input"] = "河 " * 400
    path = write_lines(tmp_path / "rows.jsonl", rows)
    data = Data(
        sources=(Source(name="s", path=path),),
        components=(Component(kind="x2en", source="s"),),
        length=160,
        template="gemma",
        over_long=over_long,
    )
    return Mixture(data, load_corpora(data, 0), 0), Renderer(tokenizer, "gemma"), data


def test_over_long_examples_are_dropped_and_counted_by_language(tokenizer, tmp_path):
    parts = long_row_parts(tokenizer, tmp_path, "drop")
    loader = loader_of(parts, num_epochs=1)
    segments = [segment for batch in loader for segment in segments_of(batch)]
    zh = sum(e.prompt_language == "zh" and "河 河" in e.input for e in parts[0])
    assert len(segments) == 40 - zh and zh > 0 and loader.dropped == {"over-long x2en/en": zh}


def test_over_long_inputs_are_shortened_never_the_answer(tokenizer, tmp_path):
    parts = long_row_parts(tokenizer, tmp_path, "shorten_input")
    mixture, renderer, _ = parts
    loader = loader_of(parts, num_epochs=1)
    found = Counter(segment[0] for batch in loader for segment in segments_of(batch))
    assert (
        sum(found.values()) == 40
        and sum(loader.dropped.values()) == loader.dropped["input shortened x2en/en"] > 0
    )
    example = next(e for e in mixture if "河 河" in e.input)
    rendered = shorten_input(example, renderer, 160)
    assert 150 < len(rendered.ids) <= 161 and found[tuple(rendered.ids.tolist())] == 1
    text = renderer._tokenizer.decode(rendered.ids.tolist(), skip_special_tokens=False)
    assert text.endswith(f"[en]\n{example.output}</s>") and "河 河" in text


def test_a_run_without_anything_to_learn_is_refused(parts):
    with pytest.raises(
        UserError, match=r"none of the first 450 examples can be .*\(450 over-long\); first row"
    ):
        loader_of(parts, length=8)


def test_rows_must_divide_over_hosts(parts):
    with pytest.raises(
        UserError, match="train.batch_size=5 does not divide over 2 processes; use 4 or 6"
    ):
        loader_of(parts, batch_size=5, hosts=2)


def test_a_checkpoint_of_other_data_is_refused(parts, tokenizer):
    mixture, _, data = parts
    state = loader_of(parts).get_state()
    with pytest.raises(UserError, match="data changed since the checkpoint: template"):
        loader_of((mixture, Renderer(tokenizer, "llama"), data)).set_state(state)
    with pytest.raises(UserError, match="data changed since the checkpoint: mixture"):
        loader_of((Mixture(data, mixture.corpora, 1), *parts[1:])).set_state(state)


# What differs from the checkpoint's data → (settings of the loader then, now, what is named)
REFUSED = {
    "length": ({}, {"length": 200}, "length was 160, is 200"),
    "packing": ({}, {"packing": False}, "packing was True, is False"),
    "over_long": ({}, {"over_long": "shorten_input"}, "shortens was False, is True"),
    "seed": ({}, {"seed": 1}, "seed was 0, is 1"),
    "batch_size": (
        {"packing": False},
        {"packing": False, "batch_size": 8},
        "batch_size was 4, is 8",
    ),
}


@pytest.mark.parametrize("part", REFUSED)
def test_a_position_in_other_rows_is_refused(parts, part):
    before, after, words = REFUSED[part]
    state = json.loads(json.dumps(loader_of(parts, **before).get_state()))
    loader_of(parts, **before).set_state(state)
    with pytest.raises(
        UserError,
        match=f"data changed since the checkpoint: {words}; restore the settings, or start",
    ):
        loader_of(parts, **after).set_state(state)


@pytest.mark.parametrize("changes", [{"batch_size": 8}, {"host": 1, "hosts": 2}])
def test_a_position_does_not_depend_on_how_rows_are_dealt_out(parts, small_windows, changes):
    """Packed rows are the same for any number of hosts and rows per batch."""
    whole, other = loader_of(parts), loader_of(parts, **changes)
    for _ in range(3):
        next(whole)
    other.set_state(whole.get_state())
    rows, batches = [next(whole) for _ in range(4)], [next(other) for _ in range(2)]
    size = changes.get("batch_size", 4)
    mine = slice(2, 4) if "hosts" in changes else slice(0, size)
    for name in FIELDS:
        stream = np.concatenate([batch[name] for batch in rows])
        assert all(
            np.array_equal(batch[name], stream[k * size : (k + 1) * size][mine])
            for k, batch in enumerate(batches)
        )


def test_unpacked_rows_are_padded_to_the_smallest_of_three_widths(parts):
    widths = Counter()
    for batch in loader_of(parts, packing=False, num_epochs=1):
        longest = (batch["segment_ids_BT"] > 0).sum(1).max()
        assert batch["tokens_BT"].shape[1] == min(
            width for width in (40, 80, 160) if width >= longest
        )
        widths[batch["tokens_BT"].shape[1]] += 1
    assert len(widths) > 1


@pytest.mark.parametrize("packs", [True, False])
def test_tokens_and_steps_per_epoch_are_those_of_one_epoch(parts, packs):
    """Exact for a mixture that a few windows hold."""
    mixture, renderer, _ = parts
    tokens = sum(len(rendered.ids) - 1 for rendered in renderer.render_many([*mixture]))
    for epochs in (1, None):
        loader = loader_of(parts, packing=packs, num_epochs=epochs)
        assert loader.tokens_per_epoch == pytest.approx(tokens, abs=1e-6)
    batches = [*loader_of(parts, packing=packs, num_epochs=1)]
    rows = sum((batch["segment_ids_BT"] > 0).any(1).sum() for batch in batches)
    steps = loader_of(parts, packing=packs, num_epochs=1).steps_per_epoch
    assert rows / 4 <= steps <= len(batches)


@pytest.mark.parametrize("packs", [True, False])
def test_the_examples_of_a_batch_can_be_named(parts, packs, small_windows):
    """The names of each row are those whose ids lie in it, in their order, also where a batch spans
    two windows.
    """
    mixture, renderer, _ = parts
    examples = mixture.take(np.arange(len(mixture)))
    ids = {
        f"{e.id} {e.component} {e.prompt_language}>{e.answer_language}": tuple(r.ids.tolist())
        for e, r in zip(examples, renderer.render_many(examples), strict=True)
    }
    loader = loader_of(parts, packing=packs, batch_size=5)
    for _ in range(6):
        begin = loader.position
        batch = next(loader)
        names = loader.name_rows(begin)
        assert [[ids[name] for name in row] for row in names] == [
            [
                segment[0]
                for segment in segments_of({key: rows[i : i + 1] for key, rows in batch.items()})
            ]
            for i in range(5)
        ]
    loader.go_to(begin)
    assert digest(next(loader)) == digest(batch)
