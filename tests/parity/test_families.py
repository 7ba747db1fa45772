"""Logits of every family against `transformers` in float32 and bfloat16: plain, padded, packed, far
positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.parity.families import FAMILIES, cast, our_model, tiny_config, torch_model

LENGTH = 512
DOCUMENTS = (210, 37, 253)  # 12 tokens of padding complete the row
LIMIT = 2e-4


def forward(model):
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return lambda *inputs: np.asarray(run(state, *inputs))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    config = tiny_config(request.param)
    reference = torch_model(config)
    return config, reference, our_model(config, reference.state_dict())


def torch_logits(model, tokens, **inputs):
    with torch.no_grad():
        return (
            model(torch.as_tensor(tokens, dtype=torch.long), use_cache=False, **inputs)
            .logits.float()
            .numpy()
        )


def test_float32_logits_agree_over_512_tokens_packed_padded_and_at_far_positions(pair):
    config, reference, model = pair
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, config["vocab_size"], (1, LENGTH), dtype=np.int32)
    run = forward(model)

    positions, segments = np.arange(LENGTH, dtype=np.int32)[None], np.ones((1, LENGTH), np.int32)
    expected = torch_logits(reference, tokens)
    assert np.ptp(expected) > 2, "logits too flat to tell models apart"
    assert np.abs(run(tokens, positions, segments) - expected).max() <= LIMIT

    far = positions + 9000  # beyond every original rope range in the configurations
    expected = torch_logits(reference, tokens, position_ids=torch.as_tensor(far, dtype=torch.long))
    assert np.abs(run(tokens, far, segments) - expected).max() <= LIMIT

    # documents side by side in one of our rows; one below the other, right-padded, in transformers
    padded = np.zeros((len(DOCUMENTS), max(DOCUMENTS)), np.int64)
    packed_positions, packed_segments = np.zeros_like(positions), np.zeros_like(segments)
    starts = np.cumsum((0, *DOCUMENTS))
    for i, n in enumerate(DOCUMENTS):
        row = slice(starts[i], starts[i] + n)
        padded[i, :n], packed_positions[0, row], packed_segments[0, row] = (
            tokens[0, row],
            np.arange(n),
            i + 1,
        )
    mask = torch.as_tensor(
        np.arange(max(DOCUMENTS)) < np.array(DOCUMENTS)[:, None], dtype=torch.long
    )
    expected = torch_logits(reference, padded, attention_mask=mask)
    packed = run(tokens, packed_positions, packed_segments)
    for i, n in enumerate(DOCUMENTS):
        assert np.abs(packed[0, starts[i] : starts[i] + n] - expected[i, :n]).max() <= LIMIT, (
            f"document {i}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_argmax_agrees_on_99_percent_and_error_is_no_larger(family):
    config = tiny_config(family)
    if family == "gemma2":
        config["final_logit_softcapping"] = 30.0  # as published; 3.0 saturates with these logits
    tokens = np.random.default_rng(1).integers(3, config["vocab_size"], (2, LENGTH), dtype=np.int32)
    reference = cast(torch_model(config, peaked=True), torch.bfloat16)
    theirs, weights = torch_logits(reference, tokens), reference.state_dict()
    exact = torch_logits(cast(reference, torch.float32), tokens)
    ours = forward(our_model(config, weights, dtype="bfloat16"))(tokens)
    assert ours.dtype == jnp.float32
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.99
    assert len(np.unique(exact.argmax(-1))) > 20
    assert np.abs(ours - exact).mean() <= np.abs(theirs - exact).mean()


GLOBAL, LOCAL = "full_attention", "sliding_attention"
# name: (family, changes to its configuration): what no family has as it is published
VARIANTS = {
    "gemma3_local_layers_alone": ("gemma3", {"layer_types": [LOCAL] * 3}),
    "gemma3_global_layers_alone": ("gemma3", {"layer_types": [GLOBAL] * 3}),
    "gemma3_with_final_soft_cap": (
        "gemma3",
        {"layer_types": [GLOBAL, LOCAL, LOCAL], "final_logit_softcapping": 2.0},
    ),
    "gemma2_without_soft_caps": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2_global_first": ("gemma2", {"layer_types": [GLOBAL, LOCAL, LOCAL]}),
    "qwen2_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3_windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
    "qwen2_windows_off": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
    ),
    "mistral_window_of_two": ("mistral_v0.1", {"sliding_window": 2}),
    "llama_with_gelu_and_a_large_epsilon": (
        "llama2",
        {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.5},
    ),
    "qwen3_with_a_large_epsilon": ("qwen3", {"rms_norm_eps": 0.5}),
    "gemma2_with_a_large_epsilon": ("gemma2", {"rms_norm_eps": 0.5}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_logits_agree_under_rules_that_a_file_may_set(name):
    """Windows of some, of all and of no layers, soft caps on and off, epsilons that matter."""
    family, changes = VARIANTS[name]
    plain = tiny_config(family) | {"num_hidden_layers": 3}
    if "layer_types" in changes:
        plain |= {"sliding_window": 8, "sliding_window_pattern": 2}
    config = plain | changes
    tokens = np.random.default_rng(2).integers(3, config["vocab_size"], (1, 40), dtype=np.int32)
    reference = torch_model(config)
    expected = torch_logits(reference, tokens)
    if name != "qwen2_windows_off":
        assert np.abs(expected - torch_logits(torch_model(plain), tokens)).max() > 0.05
    ours = forward(our_model(config, reference.state_dict()))(tokens)
    assert np.abs(ours - expected).max() <= LIMIT
