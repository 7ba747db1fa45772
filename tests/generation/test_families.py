"""Greedy answers of every family against `transformers.generate`, token for token, in float32."""

import numpy as np
import pytest
import torch
from flax import nnx

from crossin_jax.generation.engine import Engine
from tests.parity.families import FAMILIES, our_model, tiny_config, torch_model

PROMPTS = 20  # of mixed length
NEW = 128
TIE = 1e-4  # nearer logits may swap places by rounding


def torch_answers(model, prompts):
    """Answers, and how far the best logit stood above the second at every token, both (B, NEW)."""
    longest = max(map(len, prompts))
    tokens, mask = np.zeros((2, len(prompts), longest), np.int64)
    for row, seen, prompt in zip(tokens, mask, prompts, strict=True):
        row[longest - len(prompt) :], seen[longest - len(prompt) :] = prompt, 1
    with torch.no_grad():
        out = model.generate(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(out.logits, dim=1).topk(2, dim=-1).values
    return out.sequences[:, longest:].numpy(), (best[..., 0] - best[..., 1]).numpy()


# One of each kind of attention and rotation; the others share their code.
KINDS = {"llama3.1", "mistral_v0.1", "gemma_2b", "gemma2", "gemma3", "qwen2", "phi4_mini", "qwen3"}


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in KINDS else pytest.mark.long) for f in FAMILIES],
)
def test_greedy_answers_equal_those_of_transformers(family):
    config = tiny_config(family)
    reference = torch_model(config)
    model = our_model(config, reference.state_dict())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, config["vocab_size"], n) for n in rng.integers(1, 60, PROMPTS)]
    expected, gaps = torch_answers(reference, prompts)
    engine = Engine(
        *nnx.split(model),
        model.spec,
        eos_ids=[],
        pad_id=0,
        batch_size=16,
        cache_dtype="float32",
        max_length=256,
    )
    answers = np.array(engine.generate(prompts, max_new_tokens=NEW, progress=False))
    assert len(np.unique(answers)) > 12, "the answers are too alike to tell models apart"
    tied = 0
    for row in np.flatnonzero((answers != expected).any(axis=1)):
        first = np.flatnonzero(answers[row] != expected[row])[0]
        assert gaps[row, first] < TIE, (
            f"prompt {row} differs at token {first}, where the best logit leads by "
            f"{gaps[row, first]:.2g}"
        )
        tied += 1
    assert tied <= 2
