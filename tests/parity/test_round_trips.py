"""Every family: transformers -> ours -> transformers is bit-exact and leaves the logits as they
were.
"""

import numpy as np
import pytest
import torch
import transformers

from crossin_jax.checkpoint.hf import load_weights, read_spec, read_tensors, same_bytes
from crossin_jax.checkpoint.save import save_model
from crossin_jax.generation.model import load_model
from tests.checkpoint.abstract import abstract_transformer
from tests.parity.families import FAMILIES, quiet, tiny_config, torch_model

# of no effect: provenance, windows that are off, and an activation whose name transformers corrects
UNEQUAL = ("_name_or_path", "transformers_version", "max_window_layers", "hidden_activation")
TOKENS = np.random.default_rng(0).integers(3, 97, (2, 48))


def torch_logits(folder, dtype=torch.float32):
    """Logits of the folder's model in `transformers`, and the model."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = quiet(load, folder, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.float().numpy(), model


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_come_back_bit_by_bit(tmp_path, family):
    torch_model(tiny_config(family)).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    spec = read_spec(tmp_path / "theirs")
    _, state = abstract_transformer(spec, None, param_dtype="bfloat16")
    state = load_weights(tmp_path / "theirs", state, progress=False)
    save_model(
        tmp_path / "ours",
        spec,
        state,
        source=tmp_path / "theirs",
        shard_bytes=50_000,
        progress=False,
    )
    before, after = read_tensors(tmp_path / "theirs"), read_tensors(tmp_path / "ours")
    if spec.tie_embeddings:
        before.pop("lm_head.weight", None)
    assert before.keys() == after.keys()
    assert all(same_bytes(before[name], after[name]) for name in before)

    logits, model = torch_logits(tmp_path / "theirs")
    exported, again = torch_logits(tmp_path / "ours")
    np.testing.assert_array_equal(exported, logits)
    assert type(again) is type(model)
    theirs, ours = model.config.to_dict(), again.config.to_dict()
    assert {name: ours.get(name) for name in theirs if name not in UNEQUAL} == {
        name: value for name, value in theirs.items() if name not in UNEQUAL
    }
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    ours = load_model(tmp_path / "ours", progress=False)
    assert ours.spec == spec
    assert np.abs(np.asarray(ours(TOKENS)) - logits).max() <= 2e-4
