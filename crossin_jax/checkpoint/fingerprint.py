"""A fingerprint of arrays by their content: the same on every mesh, and however many files they came from.

Each element's bits are hashed together with its place in the array, and the hashes are added modulo 2**32, so that
devices can add their shards in any order. Two such sums make 64 bits per array. It finds damage and
mix-ups; it is no protection against somebody who wants two models to look alike.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax.models.layers import element_index, mix
from crossin_jax.parallel.mesh import leaf_name
from crossin_jax.provenance import content_hash

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # bytes of an element → the integer that holds its bits


def fingerprint(tree: Any) -> str:
    """16 hexadecimal digits for the names, shapes, types and bits of all arrays of a tree, computed on device."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = [leaf for _, leaf in named]
    meshes = {leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)}
    everywhere = NamedSharding(meshes.pop(), PartitionSpec()) if len(meshes) == 1 else None  # every host reads the sums
    sums = jax.device_get(jax.jit(_sum_hashes, out_shardings=everywhere)(leaves))
    return content_hash(sorted([leaf_name(path), list(leaf.shape), str(leaf.dtype), *map(int, pair)]
                               for (path, leaf), pair in zip(named, sums, strict=True)))


def _sum_hashes(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """Two uint32 sums for each array.

    One reduction has both results: for two reductions the CPU compiler writes all hashes to memory and takes 12 times
    as long.
    """
    sums = []
    for leaf in leaves:
        index = element_index(leaf.shape)
        first = mix(_bits(leaf) ^ index * np.uint32(0x9E3779B9))
        sums.append(jax.lax.reduce((first, mix(first + index)), (np.uint32(0), np.uint32(0)),
                                   lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(leaf.ndim))))
    return sums


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of each element as uint32."""
    if leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.unsignedinteger):  # also the 4 bits of nf4
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)
