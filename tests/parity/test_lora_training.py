"""LoRA training beside peft + torch: ten AdamW steps from the same adapter give the same losses and
weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

from crossin_jax.checkpoint.hf import load_weights, read_spec
from crossin_jax.checkpoint.peft import WEIGHTS, load_adapter, read_adapter
from crossin_jax.checkpoint.save import save_adapter
from crossin_jax.models.lora import is_trainable
from crossin_jax.training.step import StepSettings, init_state, make_train_step
from tests.checkpoint.abstract import abstract_transformer
from tests.parity.adapters import load_peft, make_adapter

STEPS, RATE, DECAY = 10, 3e-3, 0.01
# With a smaller one, Adam would take whole steps by gradients that are rounding alone.
EPS = 1e-6


def batches():
    """Rows with a prompt that is not learned; two batches in turn, so that the loss falls."""
    for step in range(STEPS):
        rng = np.random.default_rng(step % 2)
        tokens = rng.integers(3, 97, (4, 25)).astype(np.int32)
        loss_mask = np.arange(24)[None] >= rng.integers(4, 16, (4, 1))
        yield tokens, loss_mask


def torch_losses(base, adapter, batches):
    """Losses of the steps, one per batch, and the adapter after them."""
    model = load_peft(base, adapter, trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, betas=(0.9, 0.999), eps=EPS, weight_decay=DECAY)
    losses = []
    for tokens, loss_mask in batches:
        tokens, loss_mask = torch.as_tensor(tokens, dtype=torch.long), torch.as_tensor(loss_mask)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits[loss_mask], tokens[:, 1:][loss_mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def our_losses(base, adapter, batches):
    """Losses of the steps, one per batch, the adapter's file and the state after them."""
    file = read_adapter(adapter, read_spec(base))
    graphdef, state = abstract_transformer(file.spec, None, lora=file.lora, frozen_dtype="float32")
    state = load_adapter(file, load_weights(base, state, progress=False), progress=False)
    graphdef, trainable, frozen = nnx.split(
        nnx.merge(graphdef, state), lambda p, v: is_trainable(p, v, file.lora), ...
    )
    optimizer = optax.adamw(RATE, b1=0.9, b2=0.999, eps=EPS, weight_decay=DECAY)
    # Ten tiny steps: compiling is what takes time.
    step = jax.jit(
        make_train_step(
            graphdef,
            optimizer,
            StepSettings(
                accumulation=1,
                loss_chunk=8,
                remat="none",
                attention="reference",
                seed=0,
                num_groups=1,
            ),
        ),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    state, losses = init_state(trainable, frozen, optimizer), []
    for tokens, loss_mask in batches:
        segments = np.ones_like(loss_mask, np.int32)
        batch = {
            "tokens_BT": tokens[:, :-1],
            "targets_BT": tokens[:, 1:],
            "loss_mask_BT": loss_mask,
            "segment_ids_BT": segments,
            "group_BT": 0 * segments,
            "positions_BT": np.cumsum(segments, 1, dtype=np.int32) - 1,
        }
        state, metrics = step(state, jax.tree.map(jnp.asarray, batch))
        losses.append(float(metrics["loss"]))
    return losses, file, (state.trainable, state.frozen)


@pytest.mark.parametrize("name", ["released_recipe", "dora", "tied_kept", "fused"])
def test_ten_steps(tmp_path, name):
    base, adapter = make_adapter(tmp_path, name, lora_dropout=0.0)
    wanted, model = torch_losses(base, adapter, batches())
    losses, file, state = our_losses(base, adapter, batches())
    assert wanted[-1] < wanted[0] - 0.5  # the steps move it
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)

    save_adapter(tmp_path / "ours", file.spec, file.lora, state, base=str(base), progress=False)
    model.save_pretrained(tmp_path / "theirs")
    start, ours, theirs = (
        load_file(tmp_path / folder / WEIGHTS) for folder in ("adapter", "ours", "theirs")
    )
    assert ours.keys() == theirs.keys() == start.keys()
    for tensor in ours:
        moved = np.abs(theirs[tensor] - start[tensor]).mean()
        assert moved > 0 and np.abs(ours[tensor] - theirs[tensor]).mean() < 0.02 * moved, tensor
