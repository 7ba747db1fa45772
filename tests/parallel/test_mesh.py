"""The mesh and its one table: what does not fit is refused with a place and a remedy."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from crossin_jax.config import Mesh, UserError
from crossin_jax.parallel.mesh import (
    activation_spec,
    batch_sharding,
    check_batch,
    constrain,
    leaf_name,
    make_mesh,
    parameter_spec,
    shardings,
)


def test_the_free_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(Mesh()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(Mesh(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UserError, match="fsdp=3 x tensor=1 does not match 8 devices"):
        make_mesh(Mesh(fsdp=3))
    with pytest.raises(UserError, match="data=4"):
        make_mesh(Mesh(data=4))


def test_a_batch_that_does_not_divide_names_sizes_that_do():
    mesh = make_mesh(Mesh())
    check_batch(16, 2, mesh)
    with pytest.raises(UserError, match=r"batch_size=12 is not divisible by data\*fsdp=8 .* use 8 or 16"):
        check_batch(12, 1, mesh)
    with pytest.raises(UserError, match="use 16$"):
        check_batch(12, 2, mesh)


def test_dimensions_that_do_not_divide_are_refused_or_replicated_as_documented():
    mesh = make_mesh(Mesh(fsdp=2, tensor=4))
    heads, kv_heads = ("layers", "heads", "head", "embed"), ("layers", "kv_heads", "head", "embed")
    assert parameter_spec("q", (2, 8, 4, 6), heads, mesh) == P(None, "tensor", None, "fsdp")
    assert parameter_spec("k", (2, 2, 4, 6), kv_heads, mesh) == P(None, None, None, "fsdp")
    with pytest.raises(UserError, match="layers/q_proj/weight: dimension heads=6 is not divisible by mesh tensor=4"):
        parameter_spec("layers/q_proj/weight", (2, 6, 4, 6), heads, mesh)
    scale = parameter_spec("layers/down_proj/scale", (2, 6, 43), ("layers", "embed", "mlp"), mesh)
    assert scale == P(None, "fsdp", None)
    assert activation_spec((8, 16, 6), ("batch", "length", "mlp"), mesh) == P(("data", "fsdp"), None, None)


def test_trees_take_the_axes_of_their_parameters():
    mesh = make_mesh(Mesh(fsdp=8))
    state = nnx.State({"w": nnx.Param(jax.ShapeDtypeStruct((3, 16), jnp.float32), axes=("mlp", "embed"))})
    tree = shardings({"moments": state, "factored": state["w"].replace(jax.ShapeDtypeStruct((3,), jnp.float32)),
                      "count": jax.ShapeDtypeStruct((), jnp.int32)}, mesh)
    specs = {leaf_name(path): leaf.spec for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    assert specs == {"moments/w": P("tensor", "fsdp"), "factored": P(), "count": P()}


def test_constrain_does_nothing_without_a_mesh_and_pins_with_one():
    x = jnp.ones((8, 4, 6))
    assert constrain(x, "batch", "length", "embed") is x
    mesh = make_mesh(Mesh())
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "length", "embed"))(x)
    assert y.sharding.is_equivalent_to(batch_sharding(mesh), 3)
