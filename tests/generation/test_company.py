"""A sampled answer is a function of prompt, seed and settings; nothing else changes it.

Every answer is first drawn alone, by an engine of one row with room for the whole of it. Draws of a
model with soft attention tell a wrong cache sooner than greedy answers do.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from flax import nnx

from crossin_jax.config import UserError
from crossin_jax.generation.engine import Engine
from tests.models.models import LLAMA, make_model

SPEC = dataclasses.replace(LLAMA, num_layers=2)
LONGEST = 96  # tokens of an answer; with the longest prompt as many as the model reads
EOS = (2, 7, 11)
BUCKETS = (16, 32, 64, 128)
LENGTHS = (16, 3, 32, 9, 16, 25, 1, 31, 32, 12, 15, 17)  # some fill their bucket
PREFIX = np.random.default_rng(7).integers(3, SPEC.vocab_size, 40)


@pytest.fixture(scope="module")
def model():
    return make_model(SPEC)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [rng.integers(3, SPEC.vocab_size, n, dtype=np.int32) for n in LENGTHS]


def make_engine(model, **options) -> Engine:
    options = {
        "batch_size": 1,
        "cache_dtype": "float32",
        "max_length": 128,
        "eos_ids": [],
        "length_buckets": BUCKETS,
    } | options
    return Engine(*nnx.split(model), model.spec, pad_id=0, **options)


def draw(engine, prompts, seeds, **options) -> list[list[int]]:
    options = {"max_new_tokens": LONGEST, "temperature": 1.0, "progress": False} | options
    return engine.generate(prompts, seeds=seeds, **options)


@pytest.fixture(scope="module")
def single(model):
    """An engine of one row."""
    return make_engine(model)


@pytest.fixture(scope="module")
def alone(single, prompts):
    """Each prompt's answer by itself; its seed is its number times 100."""
    return [draw(single, [prompt], [100 * i])[0] for i, prompt in enumerate(prompts)]


def cut(answer: list[int], limit: int, eos=()) -> list[int]:
    """What is left of an answer under a limit and with tokens that end it."""
    ends = [i for i, token in enumerate(answer) if token in eos]
    return answer[: min([limit, *ends])]


@pytest.mark.parametrize("order", [0, 1])
def test_neighbours_and_entry_change_no_answer(order, model, alone, prompts, request):
    """Twelve prompts in four rows: eight of them enter when others have ended."""
    engine = request.getfixturevalue("four")
    chosen = np.random.default_rng(order).permutation(12)
    limits = [LONGEST if i % 3 else 1 + 7 * i for i in range(12)]
    found = draw(
        engine,
        [prompts[i] for i in chosen],
        [100 * i for i in chosen],
        max_new_tokens=[limits[i] for i in chosen],
    )
    for i, answer in zip(chosen, found, strict=True):
        assert answer == cut(alone[i], limits[i], EOS), i
    assert len({len(answer) for answer in found}) > 6  # they end at many places


@pytest.fixture(scope="module")
def four(model):
    """An engine of four rows whose answers end at EOS."""
    return make_engine(model, batch_size=4, eos_ids=EOS)


@pytest.fixture(scope="module")
def three(model):
    """An engine of three rows without EOS."""
    return make_engine(model, batch_size=3)


@pytest.mark.parametrize(
    "limits",
    [
        # the first row outgrows a ring of 64 while the fourth has few tokens; that one then fills
        # 128
        pytest.param((96, 31, 39, 96, 96, 20, 96), id="grows"),
        # rows fill a ring of 64 to its last slot, and start in the midst of it
        pytest.param((20, 64, 64, 64, 64, 37, 64, 64), id="comes round"),
    ],
)
def test_a_ring_that_grows_or_comes_round_changes_no_answer(limits, three, single, monkeypatch):
    """Prompts fill their room too: a slot too far in any direction is one that is still needed."""
    monkeypatch.setattr("crossin_jax.generation.decoding.RING", 16)
    rng, seeds = np.random.default_rng(2), range(len(limits))
    prompts = [rng.integers(3, SPEC.vocab_size, 32, dtype=np.int32) for _ in limits]
    before = three.programs.compiled["resize"]
    found = draw(three, prompts, seeds, max_new_tokens=limits)
    assert three.programs.compiled["resize"] - before == (limits[0] == LONGEST)
    monkeypatch.undo()  # alone there is room for everything from the start
    for prompt, seed, limit, answer in zip(prompts, seeds, limits, found, strict=True):
        assert answer == draw(single, [prompt], [seed])[0][:limit], seed


def test_a_shared_prefix_changes_no_draw(model, single, prompts):
    """Positions count from the start of the whole prompt, and so do draws."""
    engine = make_engine(model, batch_size=4)
    longer = [np.concatenate([PREFIX, prompt[:9]]) for prompt in prompts[:6]]
    seeds = list(range(6))
    found = draw(engine, longer, seeds, max_new_tokens=24)
    assert engine.programs.compiled["prefix"]
    for prompt, seed, answer in zip(longer, seeds, found, strict=True):
        assert draw(single, [prompt], [seed], max_new_tokens=24) == [answer]


def test_seeds_that_differ_draw_differently(single, prompts):
    """In whichever of their 32 bits they differ."""
    seeds = [1, 1 + 2**8, 1 + 2**16, 1 + 2**24, 1 + 2**31, 0, 2**32 - 1]
    answers = [draw(single, prompts[:1], [seed])[0] for seed in seeds]
    assert len({tuple(answer) for answer in answers}) == len(seeds)


def test_without_seeds_a_prompts_own_tokens_are_its_seed(four, single, prompts):
    """Equal prompts get equal answers, wherever they stand; others draw by other numbers."""
    found = draw(four, [prompts[3], prompts[5], prompts[3]], None)
    (again,) = draw(single, [prompts[3]], None)
    assert found[0] == found[2] == cut(again, LONGEST, EOS)
    # almost uniform: a common seed would draw the same tokens for prompts of one length
    one, other = (draw(single, [prompts[i]], None, temperature=1e4)[0] for i in (0, 4))
    assert len(prompts[0]) == len(prompts[4])
    assert np.mean([a == b for a, b in zip(one, other, strict=True)]) < 0.3


def test_every_position_draws_by_numbers_of_its_own(four, prompts):
    """Where all tokens are almost equally likely, two places of an answer are seldom equal."""
    answers = draw(four, prompts[:1] * 40, range(40), temperature=1e4)
    for first, second in itertools.combinations(range(6), 2):
        pairs = [(one[first], one[second]) for one in answers if len(one) > second]
        assert len(pairs) > 20
        assert np.mean([a == b for a, b in pairs]) < 0.25, (first, second)


def test_prompts_and_answers_may_fill_the_longest_length_and_no_more(single, alone, prompts):
    assert len(prompts[2]) + len(alone[2]) == single.max_length == 128
    with pytest.raises(UserError, match="prompt 0 has 32 tokens; .* the limit is 31 "):
        draw(single, prompts[2:3], [0], max_new_tokens=LONGEST + 1)
    scored = np.arange(122, dtype=np.int32) % 50 + 3  # the last token of a continuation is not read
    (scores,) = single.score([scored], [[[5] * 7, [5]]], progress=False)
    assert scores[0] < scores[1] < 0
    with pytest.raises(UserError, match="prompt 0 has 122 tokens"):
        single.score([scored], [[[5] * 8]], progress=False)
    assert single.score([scored], [[[5] * 8]], over_long="skip", progress=False) == [None]


@pytest.mark.parametrize("size", [1, 2, 9, 12])
def test_a_stop_ends_an_answer_wherever_it_stands(size, single, alone, prompts):
    """Also where it begins in one look of the host and ends in the next.

    What was streamed by then is the answer and at most a beginning of the stop.
    """
    whole = alone[0]
    for place in range(0, 30, 1 + size // 4):
        stop = whole[place : place + size]
        first = next(i for i in range(place + 1) if whole[i : i + size] == stop)
        heard = []
        (answer,) = draw(
            single,
            prompts[:1],
            [0],
            stop=[stop],
            stream=lambda i, new, heard=heard: heard.extend(new),
        )
        assert answer == whole[:first]
        assert heard[:first] == answer and heard[first:] == stop[: len(heard) - first]


def test_a_stop_that_does_not_come_changes_nothing(single, alone, prompts):
    heard = []
    assert draw(
        single,
        prompts[:1],
        [0],
        stop=[[60] * 5, "never"],
        detokenize=lambda ids: "x",
        stream=lambda i, new: heard.extend(new),
    ) == [alone[0]]
    assert heard == alone[0]


def test_logits_that_stop_being_finite_in_the_midst_of_an_answer_are_told():
    """A token whose embedding is not a number is drawn, and read at the next step.

    An answer that ends with this token never reads it, and a neighbour goes on.
    """
    spec = dataclasses.replace(SPEC, num_layers=1, tie_embeddings=False)
    model = make_model(spec)
    engine = make_engine(model, batch_size=2, length_buckets=(16,), max_length=64)
    prompts = [np.array([5, 9, 4], np.int32), np.array([8, 3], np.int32)]
    limits = [24, 24]
    one, other = draw(engine, prompts, [1, 2], max_new_tokens=limits)
    place = next(
        i
        for i, token in enumerate(one)
        if i > 2 and token not in (*one[:i], *other, *prompts[0], *prompts[1])
    )
    weight = model.embed_tokens.weight
    weight.set_value(weight.get_value().at[one[place]].set(np.nan))
    engine.params = nnx.state(model)
    found = draw(engine, prompts, [1, 2], max_new_tokens=[place + 1, 24])
    assert found == [one[: place + 1], other]
    with pytest.raises(UserError, match="logits are not finite"):
        draw(engine, prompts, [1, 2], max_new_tokens=[place + 2, 24])
