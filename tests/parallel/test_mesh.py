"""The mesh and its one table: what does not fit is refused with a place and a remedy."""

import dataclasses
import itertools
import types

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from crossin_jax.config import Lora, Mesh, Optim, UserError
from crossin_jax.models.transformer import Transformer
from crossin_jax.parallel.mesh import (
    activation_spec,
    batch_sharding,
    check_batch,
    constrain,
    constrain_parameter,
    fast_dtype,
    leaf_name,
    make_mesh,
    parameter_spec,
    shardings,
)
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.step import StepSettings, init_state, make_train_step
from tests.models.models import EVERY_PARAMETER as SPEC


def test_the_free_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(Mesh()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(Mesh(fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(UserError, match="fsdp=3 x tensor=1 does not match 8 devices"):
        make_mesh(Mesh(fsdp=3))
    with pytest.raises(UserError, match="data=4"):
        make_mesh(Mesh(data=4))


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A chip of one of several slices, or a GPU of one of several machines."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0


def stand_ins(**changes) -> list[StandIn]:
    """Two slices of 2 x 2 chips, in no order."""
    chips = [StandIn(i, i // 4, (i % 2, i // 2 % 2, 0)) for i in (6, 1, 0, 7, 4, 3, 2, 5)]
    return [dataclasses.replace(chip, **changes) for chip in chips]


@pytest.mark.parametrize(
    "mesh", [Mesh(fsdp=4), Mesh(fsdp=2, tensor=2), Mesh(fsdp=2), Mesh(data=4, tensor=2), Mesh()]
)
def test_only_data_crosses_from_slice_to_slice(mesh):
    """The first half of data is one slice, the second half the other."""
    devices = make_mesh(mesh, stand_ins()).devices
    halves = np.split(devices, 2)
    assert [{chip.slice_index for chip in half.flat} for half in halves] == [{0}, {1}]
    assert devices.shape == (mesh.data or 8 // (mesh.fsdp * mesh.tensor), mesh.fsdp, mesh.tensor)
    assert {chip.id for chip in devices.flat} == set(range(8))


@pytest.mark.parametrize("mesh", [Mesh(fsdp=8), Mesh(data=1, fsdp=2, tensor=4)])
def test_an_axis_over_the_slow_network_is_refused_for_tpus(mesh):
    with pytest.raises(UserError, match="data=1 does not divide over 2 slices.* multiple of 2"):
        make_mesh(mesh, stand_ins())
    gpus = stand_ins(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    assert make_mesh(mesh, gpus).devices.size == 8


def test_a_batch_that_does_not_divide_names_sizes_that_do():
    mesh = make_mesh(Mesh())
    check_batch(16, 2, mesh)
    with pytest.raises(
        UserError, match=r"batch_size=12 is not divisible by data\*fsdp=8 .* use 8 or 16"
    ):
        check_batch(12, 1, mesh)
    with pytest.raises(UserError, match="use 16$"):
        check_batch(12, 2, mesh)


def test_dimensions_that_do_not_divide_are_refused_or_replicated_as_documented():
    mesh = make_mesh(Mesh(fsdp=2, tensor=4))
    heads, kv_heads = ("layers", "heads", "head", "embed"), ("layers", "kv_heads", "head", "embed")
    assert parameter_spec("q", (2, 8, 4, 6), heads, mesh) == P(None, "tensor", None, "fsdp")
    assert parameter_spec("k", (2, 2, 4, 6), kv_heads, mesh) == P(None, None, None, "fsdp")
    with pytest.raises(
        UserError, match="layers/q_proj/weight: dimension heads=6 is not divisible by mesh tensor=4"
    ):
        parameter_spec("layers/q_proj/weight", (2, 6, 4, 6), heads, mesh)
    scale = parameter_spec("layers/down_proj/scale", (2, 6, 43), ("layers", "embed", "mlp"), mesh)
    assert scale == P(None, "fsdp", None)
    assert activation_spec((8, 16, 6), ("batch", "length", "mlp"), mesh) == P(
        ("data", "fsdp"), None, None
    )


def test_trees_take_the_axes_of_their_parameters():
    mesh = make_mesh(Mesh(fsdp=8))
    state = nnx.State(
        {"w": nnx.Param(jax.ShapeDtypeStruct((3, 16), jnp.float32), axes=("mlp", "embed"))}
    )
    tree = shardings(
        {
            "moments": state,
            "factored": state["w"].replace(jax.ShapeDtypeStruct((3,), jnp.float32)),
            "count": jax.ShapeDtypeStruct((), jnp.int32),
        },
        mesh,
    )
    specs = {
        leaf_name(path): leaf.spec for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    assert specs == {"moments/w": P("tensor", "fsdp"), "factored": P(), "count": P()}


def test_constrain_does_nothing_without_a_mesh_and_pins_with_one():
    x = jnp.ones((8, 4, 6))
    assert constrain(x, "batch", "length", "embed") is x
    mesh = make_mesh(Mesh())
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "length", "embed"))(x)
    assert y.sharding.is_equivalent_to(batch_sharding(mesh), 3)


# ---- Which device holds which part of what

F, T = "fsdp", "tensor"
# the mesh axis that divides each dimension; parameters of layers have one more in front
OF_OUTPUTS = {
    "weight": (T, F),
    "lora_a": (None, F),
    "lora_b": (T, F),
    "magnitude": (T,),
    "scale": (T,),
}
OF_HEADS = {
    "weight": (T, None, F),
    "bias": (T, None),
    "lora_a": (None, F),
    "lora_b": (T, None, F),
    "magnitude": (T, None),
    "scale": (T, None),
}
PLACES = {
    "embed_tokens": {"weight": (T, F)},
    "lm_head": {"weight": (T, F)},
    "norm": {"weight": (None,)},
    "q_proj": OF_HEADS,
    "k_proj": OF_HEADS,
    "v_proj": OF_HEADS,
    "o_proj": {
        "weight": (F, T, None),
        "lora_a": (F, T, None),
        "lora_b": (F, None),
        "magnitude": (F,),
        "scale": (F,),
    },
    "gate_proj": OF_OUTPUTS,
    "up_proj": OF_OUTPUTS,
    "down_proj": {
        "weight": (F, T),
        "lora_a": (F, T),
        "lora_b": (F, None),
        "magnitude": (F,),
        "scale": (F,),
    },
    **{
        name: {"weight": (None,)}
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "q_norm",
            "k_norm",
        )
    },
}


def make_parameters(rank: int = 4, **options) -> nnx.State:
    """All parameters of a model with adapters, without bytes."""
    lora = Lora(rank=rank, use_dora=True, modules_to_save=())
    return nnx.state(
        nnx.eval_shape(lambda: Transformer(SPEC, lora=lora, rngs=nnx.Rngs(0), **options))
    )


def parts_of(sharding: NamedSharding, shape: tuple[int, ...]) -> dict:
    """{device: ((first, last), …)}: the part of an array that each device holds."""
    return {
        device: tuple(index.indices(size)[:2] for index, size in zip(part, shape, strict=True))
        for device, part in sharding.devices_indices_map(shape).items()
    }


def expected_parts(mesh, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> dict:
    """The same by hand: along each dimension the block of the device's place on the mesh axis."""
    found = {}
    for place in itertools.product(*map(range, mesh.devices.shape)):
        at = dict(zip(("data", "fsdp", "tensor"), place, strict=True))
        steps = [
            size // mesh.shape[axis] if axis else size
            for size, axis in zip(shape, axes, strict=True)
        ]
        starts = [at[axis] * step if axis else 0 for step, axis in zip(steps, axes, strict=True)]
        found[mesh.devices[place]] = tuple(
            (start, start + step) for start, step in zip(starts, steps, strict=True)
        )
    return found


@pytest.mark.parametrize("frozen", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "axes",
    [{}, {"fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=str,
)
def test_every_parameter_is_divided_as_the_table_says(axes, frozen):
    mesh, params = make_mesh(Mesh(**axes)), make_parameters(frozen_dtype=frozen)
    shapes = {
        leaf_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    placed = {
        leaf_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(shardings(params, mesh))[0]
    }
    seen = set()
    for name, shape in shapes.items():
        module, kind = name.split("/")[-2:]
        expected = (None,) * name.startswith("layers/") + PLACES[module][kind]
        assert parts_of(placed[name], shape) == expected_parts(mesh, shape, expected), name
        seen.add((module, kind))
    every = {(module, kind) for module, kinds in PLACES.items() for kind in kinds}
    assert seen == {(module, kind) for module, kind in every if kind != "scale" or frozen == "int8"}


def test_what_may_be_whole_is_whole_where_it_does_not_divide():
    """Two heads of keys over four shards, a rank of three over two; everything else is divided."""
    mesh, params = make_mesh(Mesh(fsdp=2, tensor=4)), make_parameters(rank=3)
    spec = {
        leaf_name(path): tuple(leaf.spec)
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            shardings(
                {"k_proj": params["layers"]["k_proj"], "down_proj": params["layers"]["down_proj"]},
                mesh,
            )
        )[0]
    }
    assert spec == {
        "k_proj/weight": (None, None, None, F),
        "k_proj/bias": (None, None, None),
        "k_proj/magnitude": (None, None, None),
        "k_proj/lora_a": (None, None, F),
        "k_proj/lora_b": (None, None, None, None),
        "down_proj/weight": (None, F, T),
        "down_proj/lora_a": (None, None, T),
        "down_proj/lora_b": (None, F, None),
        "down_proj/magnitude": (None, F),
    }


@pytest.mark.parametrize(
    ("axis", "mesh_axis"), [("embed", F), ("vocab", T), ("heads", T), ("mlp", T)]
)
def test_what_must_be_divided_is_refused_where_it_does_not_divide(axis, mesh_axis):
    mesh = make_mesh(Mesh(fsdp=4, tensor=2))
    with pytest.raises(
        UserError,
        match=f"here/weight: dimension {axis}=7 is not divisible by mesh "
        f"{mesh_axis}={mesh.shape[mesh_axis]}",
    ):
        parameter_spec("here/weight", (3, 7), ("layers", axis), mesh)


@pytest.mark.parametrize(
    ("axis", "mesh_axes"),
    [
        ("batch", ("data", "fsdp")),
        ("length", ()),
        ("layers", ()),
        ("embed", ()),
        ("norm", ()),
        ("head", ()),
        ("vocab", (T,)),
        ("heads", (T,)),
        ("kv_heads", (T,)),
        ("mlp", (T,)),
    ],
)
def test_every_activation_is_divided_as_the_table_says(axis, mesh_axes):
    """Over its mesh axes where it divides over all of them, else not at all."""
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    shards = 2 ** len(mesh_axes)
    whole = NamedSharding(mesh, P())
    for size in (shards, 3 * shards, 3 * shards + 1):
        spec = activation_spec((5, size), ("length", axis), mesh)
        found = NamedSharding(mesh, spec).shard_shape((5, size))
        assert found == ((5, size // shards) if size % shards == 0 else (5, size)), size
        if size % shards or not mesh_axes:
            assert NamedSharding(mesh, spec).is_equivalent_to(whole, 2)
        else:
            assert NamedSharding(mesh, spec).is_equivalent_to(
                NamedSharding(mesh, P(None, mesh_axes)), 2
            )


@pytest.mark.parametrize(
    "axes",
    [{}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8}],
    ids=str,
)
def test_rows_of_a_batch_are_divided_over_data_and_fsdp(axes):
    """In the order of data, then fsdp; shards of tensor have the same rows."""
    mesh = make_mesh(Mesh(**axes))
    rows = 16 // (mesh.shape["data"] * mesh.shape["fsdp"])
    found = parts_of(batch_sharding(mesh), (16, 3))
    for data, fsdp, tensor in itertools.product(*map(range, mesh.devices.shape)):
        first = (data * mesh.shape["fsdp"] + fsdp) * rows
        assert found[mesh.devices[data, fsdp, tensor]] == ((first, first + rows), (0, 3))


def test_a_mesh_has_every_device_once_in_three_named_axes():
    mesh = make_mesh(Mesh(fsdp=4))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == (2, 4, 1)
    assert set(mesh.devices.flat) == set(jax.devices())
    few = make_mesh(Mesh(tensor=2), jax.devices()[:2])
    assert few.devices.shape == (1, 1, 2) and set(few.devices.flat) == set(jax.devices()[:2])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.integers(1, 5), st.sampled_from([(8, 1, 1), (2, 2, 2), (1, 1, 8)]))
def test_a_batch_is_taken_where_every_micro_batch_divides_over_the_mesh(size, parts, shape):
    """The remedy names the nearest sizes below and above."""
    data, fsdp, tensor = shape
    mesh = make_mesh(Mesh(data=data, fsdp=fsdp, tensor=tensor))
    fits = [n for n in range(1, 200) if n % parts == 0 and (n // parts) % (data * fsdp) == 0]
    if size in fits:
        check_batch(size, parts, mesh)
        return
    below = [str(n) for n in fits if n < size][-1:]
    above = [str(n) for n in fits if n > size][:1]
    with pytest.raises(UserError, match=f"; use {' or '.join(below + above)}$"):
        check_batch(size, parts, mesh)


def test_an_array_of_a_parameter_is_pinned_as_the_parameter_is():
    """Such as a gradient: divided over both axes, not whole on every device."""
    mesh, x = make_mesh(Mesh(fsdp=4, tensor=2)), jnp.ones((6, 8))
    assert constrain_parameter(x, "vocab", "embed") is x  # where there is no mesh
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain_parameter(x * 2, "vocab", "embed"))(x)
    assert parts_of(y.sharding, (6, 8)) == expected_parts(mesh, (6, 8), (T, F))


def constraints(jaxpr) -> dict[tuple[int, ...], set]:
    """{shape: shardings} of everything that a program pins to the mesh."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "sharding_constraint":
            shape = equation.outvars[0].aval.shape
            found.setdefault(shape, set()).add(tuple(equation.params["sharding"].spec))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            for shape, specs in constraints(inner).items():
                found.setdefault(shape, set()).update(specs)
    return found


def test_activations_of_a_step_and_the_heads_gradient_are_pinned_to_the_mesh():
    """Rows over data and fsdp, heads, feed-forward and logits over tensor."""
    model = nnx.eval_shape(lambda: Transformer(SPEC, rngs=nnx.Rngs(0)))
    graphdef, trainable, frozen = nnx.split(model, nnx.Param, ...)
    rule = make_optimizer(Optim(), 10)
    state = jax.eval_shape(lambda t, f: init_state(t, f, rule), trainable, frozen)
    ids = jax.ShapeDtypeStruct((8, 12), jnp.int32)
    names = ("tokens_BT", "targets_BT", "segment_ids_BT", "positions_BT", "group_BT")
    batch = dict.fromkeys(names, ids) | {"loss_mask_BT": jax.ShapeDtypeStruct((8, 12), bool)}
    static = StepSettings(
        accumulation=1, loss_chunk=4, remat="none", attention="reference", seed=0, num_groups=1
    )
    with jax.set_mesh(make_mesh(Mesh(data=2, fsdp=2, tensor=2))):
        jaxpr = jax.make_jaxpr(make_train_step(graphdef, rule, static))(state, batch)
    rows = ("data", "fsdp")
    assert constraints(jaxpr.jaxpr) == {
        (8, 12, 24): {(rows, None, None)},
        (8, 12, 6, 10): {(rows, None, T, None)},
        (8, 12, 2, 10): {(rows, None, T, None)},
        (8, 12, 40): {(rows, None, T)},
        (8, 4, 64): {(rows, None, T)},
        (64, 24): {(T, F)},
    }


@pytest.mark.parametrize(
    ("platform", "capability", "dtype"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "7.0", "float32"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),
    ],
)
def test_the_fast_precision_is_that_of_the_device(platform, capability, dtype):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    assert fast_dtype(device) == dtype
