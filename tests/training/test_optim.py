"""Optimizers and schedules beside their formulas in NumPy, for every kind of parameter."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from crossin_jax.config import Lora, Mesh, Optim
from crossin_jax.models.lora import TARGETS
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import leaf_name, make_mesh, shardings
from crossin_jax.training.optim import make_optimizer, make_schedule
from tests.models.models import EVERY_PARAMETER as SPEC

LORA = Lora(rank=5, use_dora=True, modules_to_save=("embed_tokens", "lm_head"))
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "q_norm",
    "k_norm",
    "norm",
)
NUM_STEPS = 6
SCALES = (1.0, 0.01, 3.0)  # of the gradients: the second is not clipped
OPTIM = Optim(
    learning_rate=2e-2,
    warmup_share=0.34,
    schedule="linear",
    final_share=0.2,
    weight_decay=0.3,
    b1=0.7,
    b2=0.8,
    clip_norm=2.0,
)
RATES = (0.01, 0.02, 0.02)  # two steps of warm-up


@cache
def parameters() -> nnx.State:
    """All parameters of a model with adapters, as random numbers."""
    model = nnx.eval_shape(
        lambda: Transformer(
            SPEC, lora=LORA, param_dtype="float32", frozen_dtype="float32", rngs=nnx.Rngs(0)
        )
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        nnx.state(model, nnx.Param),
    )


def flatten(tree) -> dict[str, np.ndarray]:
    """The arrays of a tree by name, in float64."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {leaf_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def gradients() -> list[nnx.State]:
    """Made-up gradients of three steps."""
    rng = np.random.default_rng(1)

    def draw(scale: float) -> nnx.State:
        return jax.tree.map(
            lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32), parameters()
        )

    return [draw(scale) for scale in SCALES]


def test_the_model_has_every_kind_of_parameter():
    """Norms, biases, magnitudes, adapters, embeddings: none of the formulas below is idle."""
    names = flatten(parameters())
    assert {name.split("/")[-2] for name in names} == {*TARGETS, *NORMS, "embed_tokens", "lm_head"}
    assert {name.split("/")[-1] for name in names} == {
        "weight",
        "bias",
        "lora_a",
        "lora_b",
        "magnitude",
    }


# ---- The formulas: each yields the update of one parameter, before rate and decay, step by step


def adamw(name, grads, nesterov=False):
    mean = square = 0
    for t, g in enumerate(grads, 1):
        mean, square = 0.7 * mean + 0.3 * g, 0.8 * square + 0.2 * g**2
        ahead = 0.7 * mean / (1 - 0.7 ** (t + 1)) + 0.3 * g / (1 - 0.7**t)
        length = np.sqrt(square / (1 - 0.8**t)) + 1e-8
        yield (ahead if nesterov else mean / (1 - 0.7**t)) / length


def lion(name, grads):
    mean = 0
    for g in grads:
        yield np.sign(0.7 * mean + 0.3 * g)
        mean = 0.8 * mean + 0.2 * g


def adafactor(name, grads):
    """Of parameters too small to be factored."""
    square = 0
    for t, g in enumerate(grads, 1):
        square = (1 - t**-0.8) * square + t**-0.8 * g**2
        update = g / np.sqrt(square)
        yield update / max(1, np.sqrt((update**2).mean()))


def muon(name, grads):
    """Orthogonalized momentum of the matrices of layers, with the length of AdamW's updates."""
    *_, module, kind = name.split("/")
    if module not in TARGETS or kind in ("bias", "magnitude"):
        yield from adamw(name, grads, nesterov=True)
        return
    momentum, shape = 0, grads[0].shape
    # (L, outputs …, inputs …): where the inputs begin.
    split = {
        "weight": 2 if module == "o_proj" else len(shape) - 1,
        "lora_a": 2,
        "lora_b": len(shape) - 1,
    }[kind]
    rows, columns = math.prod(shape[1:split]), math.prod(shape[split:])
    for t, g in enumerate(grads, 1):
        momentum = 0.95 * momentum + 0.05 * g
        ahead = 0.95 * momentum / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        matrices = [orthogonalize(matrix) for matrix in ahead.reshape(-1, rows, columns)]
        yield 0.2 * max(rows, columns) ** 0.5 * np.stack(matrices).reshape(shape)


def orthogonalize(matrix: np.ndarray) -> np.ndarray:
    """Five iterations of Newton and Schulz (Jordan 2024)."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


@pytest.mark.parametrize("formula", [adamw, lion, adafactor, muon])
def test_every_optimizer_is_its_formula(formula):
    """Three updates of every parameter: clipped together, at their rate, with decay on matrices."""
    rule = make_optimizer(dataclasses.replace(OPTIM, name=formula.__name__), NUM_STEPS)
    params, moments, update = parameters(), jax.jit(rule.init)(parameters()), jax.jit(rule.update)
    found = []
    for gradient in gradients():
        change, moments = update(gradient, moments, params)
        found.append(flatten(change))
    clipped = []
    for gradient in map(flatten, gradients()):
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        clipped.append({name: g * min(1, 2 / norm) for name, g in gradient.items()})
    for name, value in flatten(params).items():
        *_, module, kind = name.split("/")
        decay = 0 if module in NORMS or kind in ("bias", "magnitude") else 0.3 * value
        steps = formula(name, [gradient[name] for gradient in clipped])
        for step, (rate, expected) in enumerate(zip(RATES, steps, strict=True)):
            expected = -rate * (expected + decay)
            difference = np.abs(found[step][name] - expected)
            assert difference.mean() < 1e-5 * np.abs(expected).mean(), (name, step)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_moments_lie_where_their_parameters_lie(optimizer):
    mesh, params = make_mesh(Mesh(fsdp=4, tensor=2)), parameters()
    rule = make_optimizer(Optim(name=optimizer), NUM_STEPS)

    def specs(tree) -> dict:
        arrays = {leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}
        placed = jax.tree_util.tree_flatten_with_path(shardings(tree, mesh))[0]
        return {name: leaf.spec for path, leaf in placed if (name := leaf_name(path)) in arrays}

    moments = specs(jax.eval_shape(rule.init, params))
    for name, spec in specs(params).items():
        mine = {path: value for path, value in moments.items() if path.endswith(f"u/{name}")}
        assert mine and all(value == spec for value in mine.values()), (name, mine)


# ---- Schedules


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_share", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("final_share", [0.0, 0.3, 1.0])
def test_every_step_has_its_rate(schedule, warmup_share, final_share):
    """Linear warm-up from peak / steps to the peak, then the decay to the final share."""
    for num_steps in (1, 10, 40):
        rates = make_schedule(
            Optim(
                learning_rate=3.0,
                schedule=schedule,
                warmup_share=warmup_share,
                final_share=final_share,
            ),
            num_steps,
        )
        warmup = round(warmup_share * num_steps)
        for step in range(num_steps + 1):
            done = min(1, (step - warmup) / max(1, num_steps - warmup))
            left = {
                "cosine": (1 + math.cos(math.pi * done)) / 2,
                "linear": 1 - done,
                "constant": 1,
            }[schedule]
            final = 0 if schedule == "constant" else final_share
            expected = (step + 1) / warmup if step < warmup else final + (1 - final) * left
            assert float(rates(step)) == pytest.approx(3 * expected, rel=1e-5, abs=1e-6), step
