"""To find changed weights: fingerprints of arrays, sizes and hashes of a checkpoint's files.

A fingerprint of an array depends on its content alone. It is the same on every mesh and however
many files the array came from. Each element's bits are hashed together with its place in the array,
and the hashes are added modulo 2**32, so that devices can add their shards in any order:

    bits   0x3f800000 ─┐
    place  17 ─────────┴─► hash ─► + all other elements' hashes ─► "float32[8, 24]:5d41402abc4b2a76"

Two such sums make 64 bits per array. They find damage and mix-ups; they are no protection against
somebody who wants two models to look alike.
"""

import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax.files import content_hash
from crossin_jax.models.layers import element_index
from crossin_jax.parallel.mesh import leaf_name
from crossin_jax.paths import is_bucket, measure_files

# bytes of an element → the integer that holds its bits
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
SEPARATOR = " or "  # of the fingerprints of one array in two precisions
SEAL = "fingerprints"  # the item of a checkpoint that holds the fingerprints of all others
SMALL_ITEMS = ("data", "config", "provenance")  # the items that are one JSON file each


# ---- Arrays


def fingerprint(tree: Any) -> str:
    """16 hexadecimal digits for the names, shapes, types and bits of all arrays of a tree, computed
    on device.
    """
    leaves = flatten(tree)
    sums = _read_sums(leaves)
    return content_hash(
        sorted(
            [name, list(leaf.shape), str(leaf.dtype), *sums[name]] for name, leaf in leaves.items()
        )
    )


def fingerprints(tree: Any) -> dict[str, str]:
    """The fingerprint of each array of a tree, by name: "TYPE[SHAPE]:" and 16 hexadecimal
    digits.
    """
    leaves = flatten(tree)
    sums = _read_sums(leaves)
    return {name: _describe(leaf.dtype, leaf.shape, sums[name]) for name, leaf in leaves.items()}


def fingerprints_to_read(tree: Any) -> dict[str, str]:
    """`fingerprints` for readers of another precision: float32 arrays also have that of their
    rounding to bfloat16.
    """
    leaves = flatten(tree)
    wide = {name: leaf for name, leaf in leaves.items() if leaf.dtype == jnp.float32}
    rounded = _read_sums(wide, wide)
    return {
        name: SEPARATOR.join(
            [
                known,
                *(
                    [_describe(jnp.bfloat16, wide[name].shape, rounded[name])]
                    if name in wide
                    else []
                ),
            ]
        )
        for name, known in fingerprints(leaves).items()
    }


def find_unlike(expected: Mapping[str, str], leaves: Mapping[str, Any]) -> list[str]:
    """The names of arrays that are not what `fingerprints_to_read` saw, in whatever precision they
    can be compared.
    """
    read = {
        name: {known.partition("[")[0]: known for known in expected[name].split(SEPARATOR)}
        for name in expected.keys() & leaves.keys()
    }
    chosen = {
        name: known.get(str(leaves[name].dtype)) or next(iter(known.values()), "")
        for name, known in read.items()
    }
    return find_changed(chosen, {name: leaves[name] for name in chosen})[0]


def find_changed(expected: Mapping[str, str], tree: Any) -> tuple[list[str], list[str]]:
    """The names of arrays whose content is not the expected one, and of those that cannot be
    compared.

    An array that was stored in bfloat16 and is read in float32 is compared in bfloat16. Other
    pairs of types cannot be compared.
    """
    leaves = flatten(tree)
    widened, skipped = set(), []
    for name, leaf in leaves.items():
        stored, now = expected.get(name, "").partition("[")[0], str(leaf.dtype)
        if (stored, now) == ("bfloat16", "float32"):
            widened.add(name)
        elif stored not in ("", now):
            skipped.append(name)
    # The scales of a quantized weight go with it: only one of both precisions has them.
    scales = {name.removesuffix("weight") + "scale" for name in skipped}
    skipped += sorted((expected.keys() | leaves.keys()) & scales - set(skipped))
    compared = {name: leaf for name, leaf in leaves.items() if name not in skipped}
    found = {
        name: _describe(
            jnp.bfloat16 if name in widened else compared[name].dtype, compared[name].shape, sums
        )
        for name, sums in _read_sums(compared, widened).items()
    }
    names = (expected.keys() | found.keys()) - set(skipped)
    return sorted(name for name in names if expected.get(name) != found.get(name)), skipped


def flatten(tree: Any) -> dict[str, Any]:
    """A tree as {"a/b/c": leaf}; the paths are the names inside a checkpoint."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {leaf_name(path): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves share a path"
    return flat


def _describe(dtype: Any, shape: Iterable[int], sums: tuple[int, int]) -> str:
    return f"{jnp.dtype(dtype)}{list(shape)}:{sums[0]:08x}{sums[1]:08x}"


def _read_sums(
    leaves: dict[str, jax.Array], widened: Collection[str] = ()
) -> dict[str, tuple[int, int]]:
    """The two sums of each array, on the host; those of `widened` are summed as bfloat16."""
    sums = {}
    for name, leaf in leaves.items():
        place = leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
        pair = _make_program(place, name in widened)(leaf)
        # Each program ends before the next one starts. No array depends on another, so devices that
        # share few cores would meet in the sums of two arrays in different orders, and wait
        # forever.
        sums[name] = tuple(map(int, jax.device_get(pair)))
    return sums


@functools.lru_cache(maxsize=64)
def _make_program(place: NamedSharding | None, is_widened: bool) -> Any:
    """The program for arrays in a place: both sums, (2,) uint32, on every device."""
    # One small program for each shape: a weight and its moments share it. One program for all
    # arrays of a run would compile several times as long.
    if place is None:
        return jax.jit(lambda leaf: _sum_hashes(leaf, leaf.shape, (), is_widened))
    axes = [(names,) if isinstance(names, str) else names or () for names in place.spec]

    # Each device sums its shard, and one exchange adds both sums. The compiler's own partition has
    # an exchange for each sum, which simulated devices may run in different orders and never end.
    def program(leaf):
        def sum_shard(part):
            axes_of = [*axes, *[()] * (leaf.ndim - len(axes))]
            start = [
                jax.lax.axis_index(names) * size if names else 0
                for names, size in zip(axes_of, part.shape, strict=True)
            ]
            sums = _sum_hashes(part, leaf.shape, start, is_widened)
            used = tuple(name for names in axes for name in names)
            return jax.lax.psum(sums, used) if used else sums

        return jax.shard_map(
            sum_shard,
            mesh=place.mesh,
            in_specs=place.spec,
            out_specs=PartitionSpec(),
            check_vma=False,
        )(leaf)

    return jax.jit(program)


def _sum_hashes(
    part: jax.Array, whole: tuple[int, ...], start: Sequence[Any], is_widened: bool
) -> jax.Array:
    """Two uint32 sums of the hashes of a part of an array of shape `whole`, which begins at
    `start`; `is_widened`: of float32 rounded to bfloat16.

    One reduction has both results: for two reductions the CPU compiler writes all hashes to memory
    and takes 12 times as long.
    """
    bits = _bits(part)
    # A float32 rounded to bfloat16, to the nearest and if in doubt to the even one. A cast would do
    # the same, but devices may flush the smallest numbers to zero.
    bits = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16 if is_widened else bits
    mixed = bits ^ element_index(part.shape, whole, start) * np.uint32(0x9E3779B9)
    # One round of MurmurHash3's finalizer. Each step can be undone, so that one changed element
    # always shows.
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    hashes = mixed ^ (mixed >> 13)
    sums = jax.lax.reduce(
        (hashes, hashes * (hashes | np.uint32(1))),
        (np.uint32(0), np.uint32(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(part.ndim)),
    )
    return jnp.stack(sums)


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of each element as uint32."""
    # unsigned integers include the 4 bits of nf4
    if leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.unsignedinteger):
        return leaf.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, WORDS[leaf.dtype.itemsize]).astype(jnp.uint32)


# ---- The files of a checkpoint, a folder checkpoints/STEP


# A seal of a checkpoint; "self" is the hash of the rest, so that a damaged seal is not believed:
#
#     {"arrays": {"trainable/layers/q_proj/lora_a": "float32[32, 64, 4096]:5d41402abc4b2a76", …},
#      "items": {"data": "…", "config": "…", "provenance": "…"}, "self": "…"}
def make_seal(arrays: Any, items: dict[str, Any]) -> dict[str, Any]:
    """What is stored beside a checkpoint's arrays and small items, to know later that they are as
    they were saved.
    """
    plain = json.loads(json.dumps(items))  # tuples become lists, as they will when they are read
    seal = {
        "arrays": fingerprints(arrays),
        "items": {name: content_hash(value) for name, value in plain.items()},
    }
    return seal | {"self": content_hash(seal)}


def read_seal(folder: Path) -> dict[str, Any] | None:
    """What `make_seal` made; None for a checkpoint of an earlier version. Raises ValueError where
    it is damaged.
    """
    try:
        seal = json.loads((folder / SEAL / "metadata").read_text())
        if content_hash({name: seal[name] for name in ("arrays", "items")}) == seal["self"]:
            return seal
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise ValueError(f"{SEAL}/metadata")


def find_damage(folder: Path) -> list[str]:
    """The files of a checkpoint that are missing, truncated or changed.

    The sizes that were noted when it was written decide first. If none were noted, every stored
    value is read once: Orbax reads many arrays at a time, and its threads print tracebacks if it
    meets the damage itself. Then the small items are compared with their hashes. Arrays are
    compared when they are read.
    """
    noted = read_sizes(folder.parent).get(folder.name)
    if noted is None:
        lost = find_unreadable(folder / "state")
    else:
        found = measure_files(folder)
        lost = [name for name, size in noted.items() if found.get(name) != size]
    return sorted(lost) or [
        name for item in SMALL_ITEMS if (name := find_changed_item(folder, item))
    ]


def find_changed_item(folder: Path, item: str) -> str | None:
    """The file of a small item, where it or the hash that belongs to it is not what was saved; else
    None.
    """
    try:
        seal = read_seal(folder)
    except ValueError as damage:
        return str(damage)
    file = folder / item / "metadata"
    try:
        same = seal is None or content_hash(json.loads(file.read_text())) == seal["items"][item]
    except (OSError, ValueError, LookupError):
        same = False
    return None if same else str(file.relative_to(folder))


def read_sizes(checkpoints: Path) -> dict[str, dict[str, int]]:
    """{step: {path below its folder: bytes}} as noted when they were written; empty where nothing
    was noted.
    """
    try:
        noted = json.loads((checkpoints / "files.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(noted, dict):
        return {}
    return {step: sizes for step, sizes in noted.items() if isinstance(sizes, dict)}


def find_unreadable(state: Path) -> list[str]:
    """The values below a checkpoint's `state` folder that cannot be read; empty if there is no such
    folder.
    """
    if not (state / "manifest.ocdbt").is_file():
        return []
    base: Any = {"driver": "file", "path": f"{state.resolve()}/"}
    if is_bucket(state):
        base = f"{state}/"
    try:
        values = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        keys = values.list().result()
    except ValueError as error:
        return [f"{state.name}: {str(error).splitlines()[0][:120]}"]
    lost = []
    for i in range(0, len(keys), 16):  # a few at a time, since a value can be large
        reads = {key: values.read(key) for key in keys[i : i + 16]}
        for key, read in reads.items():
            try:
                is_there = bool(read.result().value)  # a value whose file is missing is empty
            except ValueError:
                is_there = False
            if not is_there:
                lost.append(f"{state.name}/{key.decode()}")
    return sorted(lost)
