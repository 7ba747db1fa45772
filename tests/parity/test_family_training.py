"""One training step of every family beside transformers and torch: the same loss and the same
gradient.
"""

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from crossin_jax.config import Optim
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.step import StepSettings, init_state, make_train_step
from tests.parity.families import FAMILIES, our_model, tiny_config, torch_model


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_those_of_torch(family):
    config = tiny_config(family)
    reference = torch_model(config)
    tokens = np.random.default_rng(1).integers(3, config["vocab_size"], (2, 25)).astype(np.int32)
    graphdef, state, nothing = nnx.split(our_model(config, reference.state_dict()), nnx.Param, ...)
    optimizer = make_optimizer(Optim(learning_rate=1e-3, warmup_share=0.0, clip_norm=None), 2)
    settings = StepSettings(
        accumulation=1, loss_chunk=8, remat="full", attention="reference", seed=0, num_groups=1
    )
    ones = np.ones((2, 24), np.int32)
    batch = {
        "tokens_BT": tokens[:, :-1],
        "targets_BT": tokens[:, 1:],
        "segment_ids_BT": ones,
        "loss_mask_BT": ones > 0,
        "positions_BT": np.arange(24, dtype=np.int32)[None].repeat(2, 0),
        "group_BT": 0 * ones,
    }
    step = jax.jit(make_train_step(graphdef, optimizer, settings))
    after, metrics = step(init_state(state, nothing, optimizer), batch)

    reference.train()
    ids = torch.from_numpy(tokens.astype(np.int64))
    loss = reference(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
        loss.reshape(-1, loss.shape[-1]), ids[:, 1:].reshape(-1)
    )
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in reference.parameters()))
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(after.trainable), strict=True)
    assert not any(np.array_equal(a, b) for a, b in leaves)
