"""Decoding where the weights stay on their shards: answers and scores are those of one device."""

from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx

from crossin_jax import config as settings
from crossin_jax.config import Lora
from crossin_jax.generation import programs
from crossin_jax.generation.engine import Engine
from crossin_jax.models.layers import Adapter
from crossin_jax.models.spec import spec_from_hf
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import make_mesh, shardings, weights_stay
from tests.parity.families import tiny_config

ROWS, NEW = 8, 12


def random_model(family: str, lora: Lora | None) -> Transformer:
    """A tiny model of a family whose adapters, too, are random."""
    spec = spec_from_hf(tiny_config(family) | {"vocab_size": 96}, "config.json")
    model = Transformer(spec, lora=lora, frozen_dtype="float32", rngs=nnx.Rngs(3))
    keys = iter(jax.random.split(jax.random.key(5), 1000))

    def stir(leaf):
        value = leaf.get_value()
        scale = 0.3 if isinstance(leaf, Adapter) else 6.0 if value.ndim > 2 else 1.0
        noise = jax.random.normal(next(keys), value.shape) if isinstance(leaf, Adapter) else value
        return leaf.replace(scale * noise)

    graphdef, state = nnx.split(model)
    state = jax.tree.map(stir, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.merge(graphdef, state)


def ask(model: Transformer, shape: dict[str, int]) -> tuple[list, list]:
    """Greedy answers and log-likelihoods of options, computed on a mesh of that shape."""
    graphdef, state = nnx.split(model)
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    mesh = make_mesh(settings.Mesh(**shape), devices)
    state = jax.tree.map(jax.device_put, state, shardings(state, mesh))
    engine = Engine(
        graphdef,
        state,
        model.spec,
        eos_ids=[],
        pad_id=0,
        mesh=mesh,
        batch_size=ROWS,
        cache_dtype="float32",
        max_length=128,
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.spec.vocab_size, n) for n in rng.integers(1, 40, ROWS)]
    answers = engine.generate(prompts, max_new_tokens=NEW, progress=False)
    options = [[[5, 6, 7], [8]]] * ROWS
    return answers, engine.score(prompts, options, progress=False)


# One key/value head, windows with soft caps, two ropes with norms of queries and keys, a bias.
@pytest.mark.parametrize(
    ("family", "lora", "unrolled", "shape"),
    [
        ("gemma_2b", None, 16, {"fsdp": 2, "tensor": 2}),
        ("gemma2", None, 0, {"data": 2, "fsdp": 2}),
        ("gemma3", Lora(rank=4, modules_to_save=()), 0, {"fsdp": 4}),
        ("qwen2", Lora(rank=4, use_dora=True, modules_to_save=()), 16, {"fsdp": 2, "tensor": 2}),
    ],
)
def test_a_mesh_answers_and_scores_as_one_device(family, lora, unrolled, shape):
    model = random_model(family, lora)
    assert weights_stay(ROWS, model.spec.width)
    with mock.patch.object(programs, "UNROLLED_LAYERS", unrolled):
        answers, scores = ask(model, {"data": 1})
        assert len({tuple(answer) for answer in answers}) > 1
        found, its_scores = ask(model, shape)
    assert found == answers
    for one, other in zip(its_scores, scores, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
