"""A fingerprint is of the bits: every change shows, and neither the mesh nor the order of leaves
does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax.checkpoint import fingerprint as module
from crossin_jax.checkpoint.fingerprint import fingerprint

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.int32, jnp.uint4, jnp.bool_)


def make_tree(dtype=jnp.float32) -> dict[str, jax.Array]:
    """Two matrices and a scalar."""
    draw = np.random.default_rng(0)
    first, second = (
        jnp.asarray(draw.integers(0, 8, shape)).astype(dtype) for shape in ((8, 24), (16, 8))
    )
    return {"a": first, "b": second, "c": jnp.ones((), dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_every_flipped_bit_changes_the_fingerprint(dtype):
    """Any one bit of any one element, in every precision that weights are stored in."""
    tree = make_tree(dtype)
    before = fingerprint(tree)
    assert fingerprint(make_tree(dtype)) == before
    found = {before}
    content = np.asarray(tree["a"])
    bits = {"uint4": 4, "bool": 1}.get(content.dtype.name, 8 * content.dtype.itemsize)
    for place, bit in [(0, 0), (1, 0), (0, bits - 1), (191, bits - 1), (100, bits // 2)]:
        raw = bytearray(content.tobytes())
        raw[place * content.dtype.itemsize + bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(raw), content.dtype).reshape(content.shape)
        found.add(fingerprint(tree | {"a": jnp.asarray(changed)}))
    assert len(found) == len({(0, 0), (1, 0), (0, bits - 1), (191, bits - 1), (100, bits // 2)}) + 1


def test_minus_zero_is_not_zero():
    assert fingerprint([jnp.zeros(3)]) != fingerprint([-jnp.zeros(3)])


def test_names_shapes_types_and_places_count():
    """Swapped elements, swapped arrays, another shape and another type all show."""
    tree = make_tree()
    others = [
        tree | {"a": tree["a"][::-1]},
        tree | {"a": tree["a"].T},
        tree | {"a": tree["a"].reshape(24, 8)},
        tree | {"a": tree["a"].astype(jnp.bfloat16)},
        {"a": tree["a"], "b": tree["b"], "d": tree["c"]},
        {"a": tree["a"], "b": tree["b"]},
        {"x": tree["a"], "a": tree["b"], "c": tree["c"]},
    ]
    assert len({fingerprint(other) for other in [tree, *others]}) == len(others) + 1


def test_the_mesh_does_not_count():
    tree = make_tree()
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    for spec in ((), ("x",), ("x", "y"), ("y", None), (None, ("x", "y"))):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        whole = NamedSharding(mesh, PartitionSpec())
        sharded = {
            name: jax.device_put(leaf, place if name == "a" else whole)
            for name, leaf in tree.items()
        }
        assert fingerprint(sharded) == fingerprint(tree)


def test_a_sum_is_read_before_the_next_one_starts(monkeypatch):
    """Two of them under way at once can wait for each other forever on simulated devices."""
    events = []
    make, get = module._make_program, jax.device_get

    def noted(event, function):
        return lambda *arguments: events.append(event) or function(*arguments)

    monkeypatch.setattr(module, "_make_program", lambda *place: noted("start", make(*place)))
    monkeypatch.setattr(jax, "device_get", noted("read", get))
    fingerprint(make_tree())
    assert events == ["start", "read"] * 3
