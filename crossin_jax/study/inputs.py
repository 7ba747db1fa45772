"""What a cell read: the files that its settings name, known by their content beside the cell's key.

A key is a hash of settings, and a setting may name a folder that has other weights tomorrow. So
`key.json` and `done.json` also hold, for every path that the settings name, its files:

    {"models/base": {"model.safetensors": [2200119864, 1764255001000000000, 1764255001000000000,
    "5d41402abc4b2a76"]}}

with size, time of the last change of content, time of the last change of any kind, and hash. A file
with the same size and times is not read again. A path that no longer exists counts as
unchanged.
"""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossin_jax.config import Config, iterate_fields
from crossin_jax.paths import as_path, find_paths, is_bucket

Inputs = dict[str, dict[str, list[Any]]]
NAMING = ("path", "tokenizer", "template", "benchmarks")  # the fields whose values may be paths
CHUNK = 4 << 20  # bytes per read


def identify_inputs(config: Config, part: str, known: Inputs | None = None) -> Inputs:
    """The files that settings of a part ("training" or "evaluation") name, with what is needed to
    know them again.

    `known` are inputs of earlier: their unchanged files are not read.
    """
    known = known or {}
    return {
        place: {
            name: _identify(file, known.get(place, {}).get(name))
            for name, file in list_files(place)
        }
        for place in dict.fromkeys(list_places(config, part))
    }


def find_changed_input(config: Config, part: str, known: Any) -> str | None:
    """The first file of a part's inputs that is not what it was in `known`, or None; early versions
    knew none.
    """
    if not isinstance(known, dict):
        return None
    for place, files in identify_inputs(config, part, known).items():
        before = known.get(place)
        if not files or not isinstance(before, dict):
            continue
        for name in sorted(before.keys() | files.keys()):
            if name not in before or name not in files or before[name][-1] != files[name][-1]:
                return str(as_path(place) / name) if name else place
    return None


def list_places(config: Config, part: str) -> Iterator[str]:
    """The values of a part's settings that may name a file, a folder or a pattern of files."""
    for path, value, field in iterate_fields(config):
        is_of_part = path.startswith("evaluation.") == (part == "evaluation")
        if is_of_part and field.name in NAMING:
            yield from (text for text in (value if isinstance(value, tuple) else (value,)) if text)


def list_files(place: str) -> Iterator[tuple[str, Path]]:
    """(name below the place, file) of each file there, in order; nothing for a Hub id or a built-in
    name.

    Hidden files and Markdown are left out: a note beside weights changes no result.
    """
    start = as_path(place)
    if start.is_file():
        yield "", start
    elif start.is_dir():
        for file in sorted(start.rglob("*")):
            name = file.relative_to(start)
            is_hidden = any(part.startswith(".") for part in name.parts)
            if file.is_file() and not is_hidden and file.suffix != ".md":
                yield str(name), file
    elif "{lang}" in place:
        yield from ((str(file), file) for file in find_paths(place.replace("{lang}", "*")))


def _identify(file: Path, known: list[Any] | None) -> list[Any]:
    stat = file.stat()
    seen = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    if is_bucket(file):  # the bucket keeps a checksum of each object
        return [*seen, stat.content]
    is_known = isinstance(known, list) and len(known) == 4 and known[:3] == seen
    return known if is_known else [*seen, _hash_file(file, *seen)]


@functools.lru_cache(maxsize=4096)
def _hash_file(file: Path, *_: int) -> str:
    """A hash of a file's content, read once for each size and time."""
    found = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()[:16]
