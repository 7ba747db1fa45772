"""The engine against the plain forward pass: answers, scores, stops, programs, meshes."""

import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crossin_jax import config as settings
from crossin_jax.config import UserError
from crossin_jax.generation.batching import cut_at_stop
from crossin_jax.generation.engine import Engine
from crossin_jax.models.spec import spec_from_architecture
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import make_mesh, shardings
from tests.helpers import small_architecture

EOS, VOCAB = 2, 304
NEW = 12


def make_engine(model, **options):
    options = {"batch_size": 8, "cache_dtype": "float32", "max_length": 256} | options
    return Engine(*nnx.split(model), model.spec, eos_ids=[EOS], pad_id=0, **options)


@pytest.fixture(scope="module")
def model():
    """Random weights, large enough that the best logit stands out."""
    spec = spec_from_architecture(small_architecture(max_length=512), VOCAB)
    graphdef, state = nnx.split(Transformer(spec, rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, jax.tree.map(lambda x: x if x.ndim < 3 else 8 * x, state))


@pytest.fixture(scope="module")
def forward(model):
    """log p(next token), (T, V), of one sequence by the forward pass without a cache."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(tokens_1T):
        return jax.nn.log_softmax(nnx.merge(graphdef, state)(tokens_1T)[0])

    def padded(ids):
        tokens = np.zeros((1, 256), np.int32)
        tokens[0, : len(ids)] = ids
        return np.asarray(run(tokens))[: len(ids)]

    return padded


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    return [
        rng.integers(3, VOCAB, n, dtype=np.int32) for n in (5, 60, 17, 33, 1, 90, 48, 16, 70, 29)
    ]


@pytest.fixture(scope="module")
def greedy(forward, prompts):
    """The greedy answers, one forward pass per token; EOS ends them."""

    def answer(prompt):
        ids = list(prompt)
        for _ in range(NEW):
            ids.append(int(forward(ids)[-1].argmax()))
            if ids[-1] == EOS:
                return ids[len(prompt) : -1]
        return ids[len(prompt) :]

    return [answer(prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def engine(model):
    return make_engine(model)


def generate(engine, prompts, **options):
    return engine.generate(prompts, **{"max_new_tokens": NEW, "progress": False} | options)


def test_greedy_answers_are_those_of_the_forward_pass(engine, prompts, greedy):
    assert generate(engine, prompts) == greedy
    assert len({tuple(answer) for answer in greedy}) == len(greedy)


def test_neither_batch_nor_neighbours_nor_order_change_an_answer(model, engine, prompts, greedy):
    order = np.random.default_rng(2).permutation(len(prompts))
    assert generate(engine, [prompts[i] for i in order]) == [greedy[i] for i in order]
    assert generate(engine, prompts[:3]) == greedy[:3]
    for batch_size in (1, 64):
        assert generate(make_engine(model, batch_size=batch_size), prompts[2:8]) == greedy[2:8]


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_answer_and_score_as_one(model, engine, prompts, greedy, forward, shape):
    one, mesh = engine, make_mesh(settings.Mesh(**shape))
    graphdef, state = nnx.split(model)
    state = jax.tree.map(jax.device_put, state, shardings(state, mesh))
    engine = Engine(
        graphdef,
        state,
        model.spec,
        eos_ids=[EOS],
        pad_id=0,
        mesh=mesh,
        batch_size=6,
        cache_dtype="float32",
        max_length=256,
    )
    assert engine.programs.batch_size % 4 == 0
    assert generate(engine, prompts) == greedy
    if "tensor" in shape:  # the vocabulary is divided: a draw must not notice
        assert generate(engine, prompts[:6], temperature=1.0) == generate(
            one, prompts[:6], temperature=1.0
        )
    (scores,) = engine.score(prompts[1:2], [[[5, 6], [7]]], progress=False)
    assert np.abs(scores - reference_scores(forward, prompts[1], [[5, 6], [7]])).max() < 1e-4


def test_a_shared_prefix_is_read_once_and_changes_no_answer(model, forward):
    rng = np.random.default_rng(3)
    prefixes = [rng.integers(3, VOCAB, 70), rng.integers(3, VOCAB, 64)]
    prompts = [
        np.concatenate([prefixes[i % 2], rng.integers(3, VOCAB, 1 + 3 * i)]).astype(np.int32)
        for i in range(12)
    ]
    shared, apart = make_engine(model), make_engine(model, share_prefix=False)
    assert generate(shared, prompts) == generate(apart, prompts)
    # 64 and 96 slots.
    assert shared.programs.compiled["prefix"] == 2 and apart.programs.compiled["prefix"] == 0
    choices = [[[9, 8, 7], [4], [5, 5]]] * 12
    for scores, prompt in zip(shared.score(prompts, choices, progress=False), prompts, strict=True):
        assert np.abs(scores - reference_scores(forward, prompt, choices[0])).max() < 1e-4


def test_samples_depend_on_seed_not_on_company(engine, prompts):
    rules = {"temperature": 1.3, "top_k": 40, "top_p": 0.95}
    seeds = [11 * i for i in range(len(prompts))]
    drawn = generate(engine, prompts, seeds=seeds, **rules)
    assert generate(engine, prompts, seeds=seeds, **rules) == drawn
    order = np.random.default_rng(4).permutation(len(prompts))
    assert generate(
        engine, [prompts[i] for i in order], seeds=[seeds[i] for i in order], **rules
    ) == [drawn[i] for i in order]
    assert generate(engine, prompts[3:4], seeds=seeds[3:4], **rules) == drawn[3:4]
    assert generate(engine, prompts, seeds=[s + 1 for s in seeds], **rules) != drawn
    same = generate(engine, [prompts[0]] * 8, seeds=list(range(8)), **rules)
    assert len({tuple(answer) for answer in same}) == 8
    # Seeded by the prompts themselves.
    assert generate(engine, prompts, **rules) == generate(engine, prompts, **rules)


def test_answers_end_at_eos_at_their_length_and_at_stops(model, engine, prompts, greedy):
    lengths = [1 + i % NEW for i in range(len(prompts))]
    assert generate(engine, prompts, max_new_tokens=lengths) == [
        a[:n] for a, n in zip(greedy, lengths, strict=True)
    ]
    assert generate(engine, prompts[:2], max_new_tokens=0) == [[], []]

    third = greedy[1][3]  # as EOS: the answer ends before it
    ended = Engine(
        *nnx.split(model),
        model.spec,
        eos_ids=[EOS, third],
        pad_id=0,
        cache_dtype="float32",
        max_length=256,
    )
    assert generate(ended, prompts) == [a[: a.index(third)] if third in a else a for a in greedy]

    stop = greedy[5][4:6]
    assert generate(engine, prompts, stop=[stop])[5] == greedy[5][:4]

    def detokenize(ids):
        return "".join(f"<{i}>" for i in ids)

    text = detokenize(greedy[5])[:-3][-9:]
    cut = generate(engine, prompts, stop=[text, "never"], detokenize=detokenize)
    whole = detokenize(greedy[5])
    assert whole.startswith(detokenize(cut[5]))
    assert cut_at_stop(detokenize(cut[5]), [text]) == whole[: whole.index(text)]
    assert cut[0] == greedy[0]
    with pytest.raises(UserError, match="detokenize"):
        generate(engine, prompts, stop=["text"])


def test_answers_longer_than_the_first_ring_go_on(model, forward, monkeypatch):
    monkeypatch.setattr("crossin_jax.generation.decoding.RING", 16)
    engine, limits = make_engine(model, batch_size=2), [100, 40, 3, 60]
    prompts = [np.array([5, 9], np.int32), np.arange(4, 30), np.array([31]), np.arange(90, 80, -1)]
    answers = generate(engine, prompts, max_new_tokens=limits)
    assert [len(answer) for answer in answers] == limits
    assert engine.programs.compiled["resize"] >= 2  # the ring grew more than once
    for prompt, answer in zip(prompts, answers, strict=True):
        assert forward([*prompt, *answer]).argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


@pytest.mark.parametrize(("others", "shrinks"), [(7, True), (2, False)])
def test_the_room_for_prompts_shrinks_sooner_while_many_wait(
    model, forward, monkeypatch, others, shrinks
):
    engine, rooms = make_engine(model, batch_size=2), []
    resize = engine.programs.resize
    monkeypatch.setattr(
        engine.programs,
        "resize",
        lambda state, R, to_R, to_W: rooms.append((R, to_R)) or resize(state, R, to_R, to_W),
    )
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 90, n) for n in (60, *[45] * others)]
    answers = generate(engine, prompts, max_new_tokens=[2, *[20] * others])
    assert rooms == ([(64, 48)] if shrinks else [])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert forward([*prompt, *answer]).argmax(-1)[len(prompt) - 1 : -1].tolist() == answer


def test_streams_what_it_returns(engine, prompts, greedy):
    heard = {i: [] for i in range(len(prompts))}
    generate(engine, prompts, stream=lambda i, ids: heard[i].extend(ids))
    assert [heard[i] for i in range(len(prompts))] == greedy


def reference_scores(forward, prompt, choices):
    result = []
    for choice in choices:
        scores = forward([*prompt, *choice])
        result.append(sum(float(scores[len(prompt) - 1 + i, t]) for i, t in enumerate(choice)))
    return np.array(result)


def test_scores_are_those_of_the_forward_pass_in_any_company(model, engine, prompts, forward):
    rng = np.random.default_rng(5)
    choices = [
        [rng.integers(3, VOCAB, n).tolist() for n in rng.integers(1, 9, 2 + i % 4)]
        for i in range(len(prompts))
    ]
    scores = engine.score(prompts, choices, progress=False)
    for found, prompt, entry in zip(scores, prompts, choices, strict=True):
        assert (
            found.dtype == np.float64
            and np.abs(found - reference_scores(forward, prompt, entry)).max() < 1e-4
        )
    alone = make_engine(model, batch_size=1, cache_dtype="int8").score(
        prompts[3:5], choices[3:5], progress=False
    )
    for found, expected in zip(alone, scores[3:5], strict=True):
        # Scoring does not round keys and values to the cache's precision.
        assert np.abs(found - expected).max() < 1e-4
    letters = engine.score(prompts, [[[7], [8], [9], [10]]] * len(prompts), progress=False)
    assert np.abs(letters[2] - forward(prompts[2])[-1, [7, 8, 9, 10]]).max() < 1e-4


def test_a_continuation_is_told_to_be_what_greedy_decoding_gives(engine, prompts, greedy, forward):
    """Where every token of it is the likeliest; its score is that of `score`."""
    choices = [
        [answer[:n], answer[: n - 1] + [answer[n - 1] % 300 + 3], answer[:1]]
        for answer, n in zip(greedy, (1, 2, 3, 4, 5, 6, 7, 8, 8, 8), strict=True)
    ]
    judged = engine.score_with_greedy(prompts, choices, progress=False)
    for (scores, best), prompt, entry in zip(judged, prompts, choices, strict=True):
        assert best.tolist() == [True, False, True]
        assert np.abs(scores - reference_scores(forward, prompt, entry)).max() < 1e-4


def test_logits_of_few_positions_at_a_time_give_the_same_scores(
    model, prompts, forward, monkeypatch
):
    monkeypatch.setattr("crossin_jax.generation.steps.LOGITS_AT_ONCE", 5 * 2 * VOCAB)
    choices = [[list(range(20, 34)), [5]], [[8] * 9, [3, 4]]]
    scores = make_engine(model).score(prompts[:2], choices, progress=False)
    for found, prompt, entry in zip(scores, prompts, choices, strict=False):
        assert np.abs(found - reference_scores(forward, prompt, entry)).max() < 1e-4


@pytest.mark.parametrize("cache_dtype, same", [("bfloat16", 0.7), ("int8", 0.7)])
def test_narrow_caches_seldom_change_a_token(model, prompts, greedy, cache_dtype, same):
    answers = generate(make_engine(model, cache_dtype=cache_dtype), prompts)
    agree = [
        a == b for x, y in zip(answers, greedy, strict=True) for a, b in zip(x, y, strict=False)
    ]
    assert np.mean(agree) >= same


def test_programs_are_counted_and_bounded_by_the_buckets(model, caplog):
    rng = np.random.default_rng(6)
    engine = make_engine(model, length_buckets=(16, 64, 128), batch_size=4)
    with caplog.at_level(logging.INFO, logger="crossin_jax"):
        for _ in range(5):
            prompts = [rng.integers(3, VOCAB, n) for n in rng.integers(1, 200, 20)]
            generate(engine, prompts, max_new_tokens=rng.integers(1, 40, 20).tolist())
            engine.score(prompts, [[[3, 4], [5]]] * 20, progress=False)
    kinds = engine.programs.compiled
    assert (
        engine.compilations
        == kinds.total()
        == sum("compiled in" in record.message for record in caplog.records)
    )
    assert kinds["prefill"] <= 4 and kinds["decode"] <= 4 and kinds["score"] <= 4
    assert "programs compiled so far" in caplog.text


def test_new_weights_are_used_by_the_same_programs(engine, prompts, greedy):
    assert generate(engine, prompts) == greedy
    before, params = engine.compilations, engine.params
    try:
        engine.params = jax.tree.map(lambda x: -x, params)
        assert generate(engine, prompts) != greedy
        engine.params = jax.tree.map(lambda x: x * jnp.nan, params)
        with pytest.raises(UserError, match="not finite"):
            generate(engine, prompts)
        with pytest.raises(UserError, match="not finite"):
            engine.score(prompts[:1], [[[5]]], progress=False)
    finally:
        engine.params = params
    assert engine.compilations <= before + 1  # at most one of scoring


def test_faults_name_the_prompt(engine, prompts):
    long = [prompts[0], np.full(250, 7)]
    with pytest.raises(
        UserError, match="prompt 1 has 250 tokens; with max_new_tokens = 12 the limit is 244"
    ):
        generate(engine, long)
    answers = generate(engine, long, over_long="skip")
    assert answers[1] is None and answers[0]
    assert engine.score(long, [[[5]], [[5] * 9]], over_long="skip", progress=False)[1] is None
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        generate(engine, [prompts[0], []])
    with pytest.raises(
        UserError, match="prompt 0: token id 304 is outside the model's vocabulary of 304"
    ):
        generate(engine, [[304]])
    with pytest.raises(UserError, match="prompt 0: a continuation without tokens"):
        engine.score(prompts[:1], [[[5], []]])


def test_progress_shows_tokens_per_second(engine, prompts, monkeypatch):
    bar = mock.MagicMock(start_t=100.0)
    monkeypatch.setattr("crossin_jax.generation.progress.tqdm", lambda **options: bar)
    before = engine.programs.compile_seconds
    generate(engine, prompts, progress=True)
    assert bar.update.call_count == len(prompts)
    # The bar estimates from its start, which moves by the time that compiling took.
    assert bar.start_t == pytest.approx(100 + engine.programs.compile_seconds - before)
    assert bar.set_postfix_str.call_args.args[0].endswith(" tokens/s")
