"""Batches: each example once and unchanged, packed tightly, the same on every host, resumed at any point."""

import hashlib
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.config import Component, Data, Source, UserError
from crossin_jax.data import packing
from crossin_jax.data.loader import make_loader
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.packing import pack_rows, shorten_input
from crossin_jax.data.prompts import Renderer, load_tokenizer
from tests.data.conftest import parallel_rows, write_lines

FIELDS = ("tokens_BT", "targets_BT", "segment_ids_BT", "positions_BT", "learned_BT", "group_BT")


@pytest.fixture(scope="module")
def parts(tokenizer, parallel_file):
    """Mixture, renderer and settings of 200 base, 150 x2x and 100 trans examples."""
    components = (Component(kind="base", source="s"), Component(kind="x2x", source="s", count=150),
                  Component(kind="trans", source="s", count=100))
    data = Data(sources=(Source(name="s", path=parallel_file),), components=components, length=160, template="gemma")
    return Mixture(data, load_corpora(data, 0), 0), Renderer(tokenizer, "gemma"), data


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_ROWS", 12)
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 0)


def loader_of(parts, *, batch_size=4, seed=0, num_epochs=None, host=0, hosts=1, **changes):
    mixture, renderer, data = parts
    data = Data(**{**vars(data), **changes})
    return make_loader(mixture, renderer, data, batch_size=batch_size, seed=seed, num_epochs=num_epochs,
                       process_index=host, process_count=hosts)


def segments_of(batch):
    """(ids with the first target appended, learned, group) of every segment in a batch."""
    for r in range(len(batch["tokens_BT"])):
        for s in range(1, batch["segment_ids_BT"][r].max(initial=0) + 1):
            here = np.flatnonzero(batch["segment_ids_BT"][r] == s)
            tokens, targets = batch["tokens_BT"][r, here], batch["targets_BT"][r, here]
            assert np.array_equal(here, np.arange(here[0], here[-1] + 1)), "segments are stretches"
            assert np.array_equal(batch["positions_BT"][r, here], np.arange(len(here))), "positions restart"
            assert np.array_equal(tokens[1:], targets[:-1]), "targets are the next tokens"
            assert len(set(batch["group_BT"][r, here])) == 1
            yield (*tokens, targets[-1]), tuple(batch["learned_BT"][r, here]), int(batch["group_BT"][r, here[0]])


def digest(batch) -> str:
    return hashlib.blake2b(b"".join(batch[name].tobytes() for name in FIELDS), digest_size=8).hexdigest()


def expected_segments(parts, epochs=1) -> Counter:
    mixture, renderer, _ = parts
    examples = mixture.take(np.arange(epochs * len(mixture)))
    return Counter((tuple(r.ids.tolist()), tuple(r.learned[1:].tolist()),
                    mixture.groups.index((e.component, e.answer_language)))
                   for e, r in zip(examples, renderer.render_many(examples), strict=True))


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
        assert not batch["learned_BT"][empty].any() and not batch["positions_BT"][empty].any()
        assert batch["tokens_BT"].dtype == np.int32 and batch["learned_BT"].dtype == bool
        assert batch["tokens_BT"].shape == (4, 160) if packs else batch["tokens_BT"].shape[1] in (40, 80, 160)


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
        assert [digest(next(other)) for _ in range(2)] == hashes[stop:stop + 2]


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
            assert [digest(next(worked)) for _ in range(5)] == hashes[stop:stop + 5]
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
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 50) + 1 or len(rows) <= sum(n > 25 for n in lengths) + 11 / 9 * (
        -(-sum(n for n in lengths if n <= 25) // 50)) + 1


def measure(mixture, renderer, data, **changes) -> float:
    """Share of real tokens in one epoch of batches, without the last one."""
    data = Data(**{**vars(data), **changes})
    loader = make_loader(mixture, renderer, data, batch_size=4, seed=0)
    batches = [next(loader)["segment_ids_BT"] > 0 for _ in range(max(8, int(loader.steps_per_epoch)))]
    return sum(b.sum() for b in batches) / sum(b.size for b in batches)


def test_98_percent_of_packed_tokens_are_real(shared, record_property):
    llama = load_tokenizer(str(shared / "tokenizers" / "llama2"))
    xquad = Source(name="s", path=str(shared / "xquad" / "xquad.{lang}.json"), limit=400)
    alpaca = Source(name="s", path=str(shared / "alpaca" / "seed_tasks.jsonl"), languages=("en",), fields={
        "input": "instances.0.input", "output": "instances.0.output"})
    kinds = {"xquad": ("base", "x2x", "en2x"), "alpaca": ("base",)}
    for name, source in {"xquad": xquad, "alpaca": alpaca}.items():
        data = Data(sources=(source,), length=2048,
                    components=tuple(Component(kind=kind, source="s") for kind in kinds[name]))
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
    data = Data(sources=(Source(name="s", path=path),), components=(Component(kind="x2en", source="s"),), length=160,
                template="gemma", over_long=over_long)
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
    assert sum(found.values()) == 40 and sum(loader.dropped.values()) == loader.dropped["input shortened x2en/en"] > 0
    example = next(e for e in mixture if "河 河" in e.input)
    rendered = shorten_input(example, renderer, 160)
    assert 150 < len(rendered.ids) <= 161 and found[tuple(rendered.ids.tolist())] == 1
    text = renderer._tokenizer.decode(rendered.ids.tolist(), skip_special_tokens=False)
    assert text.endswith(f"[en]\n{example.output}</s>") and "河 河" in text


def test_a_run_without_anything_to_learn_is_refused(parts):
    with pytest.raises(UserError, match=r"none of the first 450 examples can be .*\(450 over-long\); first row"):
        loader_of(parts, length=8)


def test_rows_must_divide_over_hosts(parts):
    with pytest.raises(UserError, match="train.batch_size=5 does not divide over 2 processes; use 4 or 6"):
        loader_of(parts, batch_size=5, hosts=2)


def test_a_checkpoint_of_other_data_is_refused(parts, tokenizer):
    mixture, _, data = parts
    state = loader_of(parts).get_state()
    with pytest.raises(UserError, match="data changed since the checkpoint: length was 160, is 200"):
        loader_of(parts, length=200).set_state(state)
    with pytest.raises(UserError, match="data changed since the checkpoint: template"):
        loader_of((mixture, Renderer(tokenizer, "llama"), data)).set_state(state)
    with pytest.raises(UserError, match="data changed since the checkpoint: mixture"):
        loader_of((Mixture(data, mixture.corpora, 1), *parts[1:])).set_state(state)


@pytest.mark.parametrize("packs", [True, False])
def test_the_examples_of_a_batch_can_be_named(parts, packs, small_windows):
    """The names of each row are those whose ids lie in it, in their order, also where a batch spans two windows."""
    mixture, renderer, _ = parts
    examples = mixture.take(np.arange(len(mixture)))
    ids = {f"{e.id} {e.component} {e.prompt_language}>{e.answer_language}": tuple(r.ids.tolist())
           for e, r in zip(examples, renderer.render_many(examples), strict=True)}
    loader = loader_of(parts, packing=packs, batch_size=5)
    for _ in range(6):
        begin = loader.position
        batch = next(loader)
        names = loader.name_rows(begin)
        assert [[ids[name] for name in row] for row in names] == [
            [segment[0] for segment in segments_of({key: rows[i:i + 1] for key, rows in batch.items()})]
            for i in range(5)]
    loader.go_to(begin)
    assert digest(next(loader)) == digest(batch)
