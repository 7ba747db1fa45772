"""A model for a notebook: texts and chats in, answers and log-likelihoods out, as the programs
compute them.
"""

import itertools

import numpy as np
import pytest

import crossin_jax
from crossin_jax.config import UserError
from crossin_jax.data.kinds import Example
from crossin_jax.data.prompts import Renderer
from crossin_jax.evaluation.frames import Continuations
from crossin_jax.evaluation.scoring import split_choices


@pytest.fixture(scope="module")
def model(adapted):
    return crossin_jax.load_model(adapted, progress=False)


QUESTION = "What is the currency of Peru?"
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": QUESTION},
]


def test_texts_pairs_and_chats_are_answered_through_the_engine(model):
    """Each as the renderer makes it, whatever stands beside it."""
    prompts = [QUESTION, (QUESTION, "South America"), CHAT, [CHAT[-1]]]
    answers = model.generate(prompts, max_new_tokens=6)
    render = model.chat.renderer
    ids = [
        render.render_prompt(QUESTION),
        render.render_prompt(QUESTION, "South America"),
        render.render_chat([(turn["role"], turn["content"]) for turn in CHAT]),
        render.render_prompt(QUESTION),
    ]
    expected = model.chat.engine.generate(ids, max_new_tokens=6, progress=False)
    assert answers == [render.decode(answer) for answer in expected] and any(answers)
    assert answers[0] == answers[3] and len({tuple(some) for some in ids}) == 3
    assert model.generate([CHAT], max_new_tokens=6) == answers[2:3]
    assert model.generate([]) == []


def test_an_answer_says_whether_it_was_cut(model):
    (cut,) = model.generate([QUESTION], max_new_tokens=1)
    assert cut.is_cut
    (whole,) = model.generate([QUESTION], max_new_tokens=100)
    ids = model.chat.engine.generate(
        [model.chat.render(QUESTION)], max_new_tokens=100, progress=False
    )[0]
    assert whole.is_cut == (len(ids) == 100)
    (stopped,) = model.generate([QUESTION], max_new_tokens=4, stop=[whole[0]])
    assert stopped == "" and not stopped.is_cut


def test_score_is_that_of_the_benchmarks_and_of_the_logits(model):
    options = ["sol", "euro", "the sol of Peru"]
    scores = model.score(QUESTION, options)
    entry = split_choices(model.chat.renderer, QUESTION, "", Continuations(tuple(options)))
    (expected,) = model.chat.engine.score([entry.prompt], [entry.options], progress=False)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    for option, score in zip(options, scores, strict=True):
        ids = model.chat.renderer.render_answer(QUESTION, "", option).ids
        logits = np.asarray(model(ids[None, :-1])[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        learned = np.arange(len(entry.prompt), len(ids))
        assert logprobs[learned - 1, ids[learned]].sum() == pytest.approx(score, abs=1e-3)


def test_a_chat_scores_only_its_last_answer(model):
    """Earlier answers are read: they change the score, and their own likelihood is not in it."""
    scores = model.score(CHAT, ["sol", "euro"])
    longer = [CHAT[0], {"role": "assistant", "content": "Hi there " * 3}, CHAT[2]]
    assert scores.shape == (2,) and not np.allclose(scores, model.score(longer, ["sol", "euro"]))
    ids = model.chat.render_answer(CHAT, "sol").loss_mask
    assert ids.sum() <= len(model.chat.renderer.render_answer("", "", "sol").ids)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.generate("Hello"), "list of prompts"),
        (lambda model: model.generate([7]), "is not a prompt"),
        (lambda model: model.generate([[]]), "is not a prompt"),
        (lambda model: model.generate([CHAT[:2]]), "only a turn of the user"),
        (lambda model: model.generate([[{"role": "bot", "content": "a"}]]), "role='bot'"),
        (lambda model: model.generate([[{"role": "user", "content": 3}]]), "content is a text"),
        (lambda model: model.generate(["a" * 5000]), "prompt 0 has"),
        (lambda model: model.score(QUESTION, "sol"), "list of options"),
        (lambda model: model.score(QUESTION, []), "list of options"),
    ],
)
def test_what_is_no_prompt_is_refused_with_the_remedy(call, words, model):
    with pytest.raises(UserError, match=words):
        call(model)


def test_a_mixture_is_a_sequence_of_examples(adapted):
    from crossin_jax.checkpoint.store import read_config

    mixture = crossin_jax.Mixture(read_config(adapted))
    some = mixture[2:5]
    assert some == [mixture[i] for i in (2, 3, 4)] and some[0].instruction
    assert len(mixture[:10]) == 10 and mixture[-3:] == [
        mixture[len(mixture) - i] for i in (3, 2, 1)
    ]


TURNS = (("user", "Hello"), ("assistant", "Hi there"), ("system", "Be brief."), ("user", "And?"))
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


BUILT_IN = ("plain", "alpaca", "llama", "chatml")


@pytest.mark.parametrize(
    ("template", "tokenization"),
    [*itertools.product(BUILT_IN, ["joint", "apart"]), ("chat", "joint")],  # apart is refused
)
def test_a_conversation_is_asked_as_training_shows_it(template, tokenization, model):
    """The prompt is what training reads before the last answer."""
    tokenizer = model.tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    renderer = Renderer(tokenizer, template, tokenization=tokenization)
    turns = [(role, text) for role, text in TURNS if template != "chat" or role != "system"]
    for count in (1, len(turns)):
        shown = renderer.render(
            Example(*[""] * 7, messages=(*turns[:count], ("assistant", "Of course")))
        )
        first = np.flatnonzero(shown.loss_mask)
        start = first[np.flatnonzero(np.diff(first, prepend=-2) > 1)[-1]]
        asked = renderer.render_chat(turns[:count])
        assert len(asked) - 1 <= start <= len(asked)  # a token may reach over the end of the prompt
        np.testing.assert_array_equal(asked[: start - 1], shown.ids[: start - 1])
