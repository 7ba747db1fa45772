"""The device mesh and the one table from logical axes to mesh axes.

Shape letters: B batch rows · T positions · D model width.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crossin_jax import config as settings
from crossin_jax.config import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# A dimension has a logical axis, and this table gives the mesh axis over which it is split: first
# for parameters, then for activations. The weight of q_proj, on a mesh of fsdp=2 and tensor=2:
#
#     letter          N          H        D
#     logical axis    heads      head     embed
#     mesh axis       tensor     none     fsdp      each device holds (N / 2, H, D / 2)
#
# data and fsdp split the rows of a batch. fsdp also splits what is stored: the compiler gathers a
# weight before its product. tensor splits the product itself: each device has some of the heads.
RULES: dict[str, tuple[Any, Any]] = {
    "batch": (None, BATCH),
    "length": (None, None),
    "layers": (None, None),
    "embed": ("fsdp", None),
    "norm": (None, None),  # vectors of width D: a gather would cost more than the bytes it saves
    "vocab": ("tensor", "tensor"),
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "head": (None, None),
    "mlp": ("tensor", "tensor"),
    "rank": ("fsdp", None),
    # Activations where weights stay, see `weights_stay`.
    "whole_batch": (None, "data"),
    "cut_embed": (None, "fsdp"),
    "cut_mlp": (None, ("tensor", "fsdp")),
}
# Takes its mesh axis where no other dimension does: the half of a LoRA pair without "embed".
WHERE_FREE = ("rank",)
REPLICATED_WHERE_UNEVEN = ("kv_heads",)  # grouped queries: fewer key/value heads than tensor shards


def make_mesh(mesh: settings.Mesh, devices: list[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; raises `UserError` where the axes do not
    multiply to them.
    """
    devices = jax.devices() if devices is None else devices
    rest = mesh.fsdp * mesh.tensor
    data = mesh.data or max(1, len(devices) // rest)
    if data * rest != len(devices):
        raise UserError(
            f"mesh data={mesh.data} x fsdp={mesh.fsdp} x tensor={mesh.tensor} does not match "
            f"{len(devices)} devices; the product must be {len(devices)}"
        )
    shape, axis_types = (data, mesh.fsdp, mesh.tensor), (AxisType.Auto,) * len(AXES)
    if (slices := count_slices(devices)) > 1:
        return Mesh(_join_slices(shape, slices, devices), AXES, axis_types=axis_types)
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)


def count_slices(devices: Sequence[Any]) -> int:
    """In how many slices the devices are: within one they have links, between them a network."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _join_slices(shape: tuple[int, ...], slices: int, devices: list[Any]) -> np.ndarray:
    """The devices of several slices in the shape of the mesh: only data crosses the network."""
    # data=4, fsdp=2 on two slices of four chips:
    #
    #     data   0      1      2      3
    #     fsdp  [a b]  [c d]  [e f]  [g h]
    #            slice 0       slice 1
    if shape[0] % slices:
        if devices[0].platform == "tpu":
            raise UserError(
                f"mesh data={shape[0]} does not divide over {slices} slices: only data may cross "
                f"the slow network between them; set mesh.data to a multiple of {slices}"
            )
        # The "slices" of GPUs are the machines, between which fsdp is common.
        return np.array(devices).reshape(shape)
    inside = (shape[0] // slices, *shape[1:])
    # as jax.make_mesh does: two sides of a v5e slice may be one axis of the mesh
    split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    return mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices, allow_split_physical_axes=split
    )


def fast_dtype(device: Any) -> str:
    """The precision in which a device multiplies matrices fast: the meaning of "auto".

    TPUs, and NVIDIA GPUs from compute capability 8.0 on, have units for bfloat16. CPUs and earlier
    GPUs emulate it, at half the speed of float32 or less.
    """
    if device.platform == "cpu":
        return "float32"
    capability = str(getattr(device, "compute_capability", None) or "8.0")
    is_number = capability.replace(".", "", 1).isdigit()
    return "float32" if is_number and float(capability) < 8 else "bfloat16"


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Refuses a batch that does not divide over the mesh, and names the nearest sizes that do."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = shards * accumulation
    if batch_size % unit:
        lower, upper = batch_size // unit * unit, (batch_size // unit + 1) * unit
        remedy = f"use {lower} or {upper}" if lower else f"use {upper}"
        raise UserError(
            f"train.batch_size={batch_size} is not divisible by data*fsdp={shards} x "
            f"train.accumulation={accumulation}; {remedy}"
        )


# A LoRA pair of q_proj: A is (R, D) and B is (N, H, R). D takes fsdp in A. B has no D, so there the
# rank takes fsdp (WHERE_FREE): both halves are split.
def parameter_spec(
    path: str, shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh
) -> PartitionSpec:
    """The partition of one parameter; an axis used twice or a dimension that does not divide raises
    with its path.
    """
    assert len(shape) == len(axes), f"{path}: shape {shape} but logical axes {axes}"
    used, spec = set(), []
    first = {RULES[axis][0] for axis in axes if axis not in WHERE_FREE}
    for dim, axis in zip(shape, axes, strict=True):
        mesh_axis = RULES[axis][0]
        if axis in WHERE_FREE and (mesh_axis in first or dim % mesh.shape[mesh_axis]):
            mesh_axis = None
        if mesh_axis is not None and dim % mesh.shape[mesh_axis]:
            # The scales of nf4 belong to blocks of 64 inputs, which may not divide evenly.
            if axis not in REPLICATED_WHERE_UNEVEN and not path.endswith("/scale"):
                raise UserError(
                    f"{path}: dimension {axis}={dim} is not divisible by mesh {mesh_axis}="
                    f"{mesh.shape[mesh_axis]}; choose a mesh.{mesh_axis} that divides it"
                )
            mesh_axis = None
        assert mesh_axis is None or mesh_axis not in used, (
            f"{path}: mesh axis {mesh_axis} used twice in {axes}"
        )
        used.add(mesh_axis)
        spec.append(mesh_axis)
    return PartitionSpec(*spec)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf from its tree path, e.g. "layers/q_proj/weight"."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of arrays: by logical axes where a leaf is a parameter that has
    them, else replicated.

    Optimizer moments keep the metadata of their parameter, so they are sharded alike; factored
    moments, whose shape differs, are replicated.
    """

    def assign(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        value, axes = leaf.get_raw_value(), leaf.get_metadata().get("axes")
        shape = getattr(value, "shape", ())
        if axes is None or len(shape) != len(axes):
            spec = PartitionSpec()
        else:
            spec = parameter_spec(leaf_name(path), shape, axes, mesh)
        return leaf.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(
        assign, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def activation_spec(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Any) -> PartitionSpec:
    """The partition of an activation; a dimension that does not divide over its mesh axes stays
    whole.
    """
    assert len(shape) == len(axes), f"activation of shape {shape} but logical axes {axes}"
    spec = []
    for dim, axis in zip(shape, axes, strict=True):
        mesh_axes = RULES[axis][1] or ()
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
        is_whole = dim % math.prod(mesh.shape[name] for name in names)
        spec.append(None if is_whole else mesh_axes or None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an activation to the mesh by its logical axes; does nothing where no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, axes, mesh))


def weights_stay(num_tokens: int, width: int) -> bool:
    """Whether the weights of a product stay where they lie, and the tokens travel instead.

    The layouts are the weight-stationary ones of Pope et al., arXiv 2211.05102.
    """
    # A weight (X, D) is cut along D over fsdp. For its product with M tokens every chip
    #
    #     gathers the weight:   it receives X · D numbers, and computes M / fsdp tokens,
    #     or keeps its columns: it computes parts of sums for all M tokens, which are added over
    #                           the chips: it receives up to 2 · M · X numbers.
    #
    # So the weights stay up to M = D / 2 tokens. Decoding has one token per row. The stream
    # between the layers is then cut along D, as the weights are:
    #
    #     x [M, D/fsdp] ─ q, k, v ───► added [M/fsdp, N H]    attention is by rows
    #     y [M, D/fsdp] ◄─ o ───────── gathered [M, N H]      no sum: each chip has its columns
    #     y [M, D/fsdp] ─ gate, up ──► added [M, F/fsdp]
    #     x [M, D/fsdp] ◄─ down ────── gathered [M, F]
    return 2 * num_tokens <= width


def constrain_residual(x_BTD: jax.Array, stay: bool) -> jax.Array:
    """Pins the stream between layers: cut by rows, or along D where the weights stay."""
    if stay:
        return constrain(x_BTD, "whole_batch", "length", "cut_embed")
    return constrain(x_BTD, "batch", "length", "embed")


def constrain_parameter(x: jax.Array, *axes: str) -> jax.Array:
    """Pins an array that belongs to a parameter, such as a gradient, as the parameter is."""
    mesh = jax.sharding.get_abstract_mesh()
    return (
        x
        if mesh.empty
        else jax.lax.with_sharding_constraint(
            x, parameter_spec("/".join(axes), x.shape, axes, mesh)
        )
    )
