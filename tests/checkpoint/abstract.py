"""Models without arrays, for tests that fill them."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from crossin_jax.models.cpu import model_options
from crossin_jax.models.spec import ModelSpec
from crossin_jax.models.transformer import Transformer
from crossin_jax.training.state import on_mesh


def abstract_transformer(spec: ModelSpec, mesh: Mesh | None, **settings: Any) -> tuple[Any, Any]:
    """(graphdef, abstract state with shardings) of a Transformer with these settings."""
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    settings = model_options(devices[0].platform, len(devices)) | settings
    model = nnx.eval_shape(lambda: Transformer(spec, **settings, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    return graphdef, state if mesh is None else on_mesh(state, mesh)
