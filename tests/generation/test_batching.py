"""Buckets, groups with a common prefix, and where an answer stops."""

import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossin_jax.generation.batching import (
    LENGTH_BUCKETS,
    MIN_SHARED,
    PROGRAM_COST,
    bucket,
    choose_buckets,
    common_length,
    cut_at_stop,
    drop_prefix_choices,
    find_stop,
    pad,
    power_of_two,
    share_prefixes,
)


def test_buckets_round_up_and_refuse_what_no_bucket_holds():
    assert [bucket(n, (16, 24, 32)) for n in (1, 16, 17, 24, 25)] == [16, 16, 24, 24, 32]
    assert [power_of_two(n) for n in (0, 1, 2, 3, 8, 9)] == [0, 1, 2, 4, 8, 16]
    assert all(b / a <= 1.25 for a, b in zip(LENGTH_BUCKETS, LENGTH_BUCKETS[1:], strict=False))
    with pytest.raises(AssertionError):
        bucket(33, (16, 32))


def test_a_bucket_is_used_where_it_saves_enough_padding():
    few, many = [10] * 3 + [500] * 20, [10] * 400 + [500] * 20
    assert choose_buckets(few, (16, 512)) == [512] * 23
    assert (
        PROGRAM_COST < 400 * (512 - 16)
        and choose_buckets(many, (16, 512)) == [16] * 400 + [512] * 20
    )
    assert choose_buckets([], (16,)) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 600), max_size=12), st.integers(1, 300))
def test_no_choice_of_buckets_costs_less(sizes, cost):
    buckets = (16, 48, 100, 260, 600)

    def total(chosen):
        return sum(chosen) + cost * len(set(chosen))

    with mock.patch("crossin_jax.generation.batching.PROGRAM_COST", cost):
        found = choose_buckets(sizes, buckets)
    assert all(size <= size_bucket for size, size_bucket in zip(sizes, found, strict=True))
    subsets = [
        (*subset, 600) for n in range(5) for subset in itertools.combinations(buckets[:-1], n)
    ]
    subsets += [subset for n in range(1, 5) for subset in itertools.combinations(buckets[:-1], n)]
    assert total(found) == min(
        (
            total([bucket(size, subset) for size in sizes])
            for subset in subsets
            if not sizes or subset[-1] >= max(sizes)
        ),
        default=0,
    )


def rows(*sizes, start=0):
    return [np.arange(start, start + n, dtype=np.int32) for n in sizes]


def test_prompts_share_the_prefix_that_saves_most_tokens():
    rng = np.random.default_rng(0)
    preamble = rng.integers(3, 99, 40)
    shots = [np.concatenate([preamble, rng.integers(3, 99, 300)]) for _ in range(2)]
    prompts = [
        np.concatenate([shots[i % 2], [100 + i], rng.integers(3, 99, 5)]).astype(np.int32)
        for i in range(20)
    ]
    prompts += [np.concatenate([preamble, [200 + i]]).astype(np.int32) for i in range(3)]
    groups = share_prefixes(prompts)
    assert sorted((len(group.prefix), len(group.members)) for group in groups) == [
        (0, 3),
        (340, 10),
        (340, 10),
    ]
    for group in groups:
        for i in group.members:
            assert (prompts[i][: len(group.prefix)] == group.prefix).all() and len(
                prompts[i]
            ) > len(group.prefix)


def test_equal_prompts_keep_a_token_of_their_own_and_short_beginnings_are_not_shared():
    (group,) = share_prefixes(rows(50, 50, 50, 50))
    assert len(group.prefix) == 49
    (group,) = share_prefixes(
        [np.r_[np.arange(MIN_SHARED - 1), 1000 + i].astype(np.int32) for i in range(9)]
    )
    assert len(group.prefix) == 0 and len(group.members) == 9
    assert share_prefixes([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), max_size=25))
def test_every_prompt_is_in_one_group_and_begins_with_its_prefix(shapes):
    prompts = [
        np.r_[np.full(kind * 33, kind), np.arange(size) % 7].astype(np.int32)
        for kind, size in shapes
    ]
    groups = share_prefixes(prompts)
    assert sorted(i for group in groups for i in group.members) == list(range(len(prompts)))
    for group in groups:
        for i in group.members:
            assert common_length(prompts[i], group.prefix) == len(group.prefix) < len(prompts[i])


def test_padding_is_on_the_right():
    assert pad(rows(2, 3), 4, 9).tolist() == [[0, 1, 9, 9], [0, 1, 2, 9]]


def test_stops_by_ids_and_by_text():
    words = ["<pad>", "Par", "is", "\n", "is.\nQ", ": no"]

    def text(ids):
        return "".join(words[i] for i in ids)

    assert find_stop([1, 2, 3, 1], 1, (), None) is None
    # Begins in what is old, ends in what is new.
    assert find_stop([1, 2, 3, 1], 2, ([2, 3],), None) == 1
    assert find_stop([1, 2, 3, 1], 1, ([2, 3],), None) is None  # was looked for before
    # the tokens that hold a stop text are kept whole: it is cut from the decoded text
    assert find_stop([1, 2, 3, 1], 4, ("\n",), text) == 3
    assert find_stop([1, 4, 5], 3, ("\n", "Q:"), text) == 2
    assert find_stop([1, 4, 5, 1], 4, ("\nQ: n",), text) == 3
    assert find_stop([1, 4, 5], 3, ("\n", [1]), text) == 0
    assert find_stop([1, 2], 2, ("\n",), text) is None


def test_no_part_of_a_stop_text_stays_in_an_answer():
    """However tokens and stop overlap, the text before the first stop is the answer."""
    words = ["Par", "is", ".\nQ", ": no", "\n\nQ", "uestion", " is.", "<end>"]

    def text(ids):
        return "".join(words[i] for i in ids)

    for answer, stops, expected in (
        ([0, 1, 2, 3], ["\nQ:"], "Paris."),
        ([0, 1, 2, 3], ["\n"], "Paris."),
        ([0, 1, 4, 5], ["\n\nQuestion"], "Paris"),
        ([0, 1, 4, 5], ["Question", "\n\n"], "Paris"),
        ([0, 6, 7, 0], ["<end>"], "Par is."),
        ([0, 6, 7, 0], [".<end>"], "Par is"),
        ([0, 1], ["Paris"], ""),
    ):
        kept = answer[: find_stop(answer, len(answer), stops, text)]
        assert cut_at_stop(text(kept), stops) == expected, (answer, stops)
    assert cut_at_stop("Paris", ["Q"]) == "Paris"


WORDS = ("a", "ab", "bc", "")  # a token may be no text at all


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=5),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=2),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=2),
)
def test_a_stop_is_found_as_soon_as_it_is_there_wherever_it_began(parts, ids, texts):
    """An answer grows part by part; the first stop in what there is then is where it ends."""

    def text(tokens):
        return "".join(WORDS[token] for token in tokens)

    def hold(answer, size):
        """As few tokens as hold so many characters."""
        lengths = [len(text(answer[:n])) for n in range(len(answer) + 1)]
        return next(n for n, length in enumerate(lengths) if length >= size)

    def expected(answer):
        ends = []  # (tokens before the stop, tokens kept)
        for stop in ids:
            places = [i for i in range(len(answer)) if answer[i : i + len(stop)] == stop]
            ends += [(i, i) for i in places[:1]]
        whole = text(answer)
        found = [(whole.index(stop), stop) for stop in texts if stop in whole]
        if found:  # a stop text is kept whole
            start, stop = min(found)
            ends.append((hold(answer, start), hold(answer, start + len(stop))))
        return min(ends)[1] if ends else None

    answer = []
    for part in parts:
        answer += part
        found = find_stop(answer, len(part), (*texts, *ids), text)
        assert found == expected(answer)
        if found is not None:
            return


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=8))
def test_of_choices_that_begin_alike_the_longest_is_read(choices):
    """Every choice is the beginning of the one it is read off; none of those begins another."""
    kept, places = drop_prefix_choices([np.array(choice) for choice in choices])
    assert kept == sorted(set(kept))
    for i in kept:
        assert not any(choices[j][: len(choices[i])] == choices[i] for j in kept if j != i)
    assert len(places) == len(choices)
    for choice, place in zip(choices, places, strict=True):
        assert choices[kept[place]][: len(choice)] == choice


def test_a_short_prefix_or_few_prompts_are_not_worth_a_pass_of_their_own():
    """Thirty-two tokens of four prompts are; thirty-one, or three prompts, are not."""
    for length, count, shared in ((32, 4, 32), (31, 4, 0), (32, 3, 0), (33, 5, 33)):
        prompts = [np.r_[np.arange(length), 1000 + i].astype(np.int32) for i in range(count)]
        (group,) = share_prefixes(prompts)
        assert len(group.prefix) == shared and len(group.members) == count
