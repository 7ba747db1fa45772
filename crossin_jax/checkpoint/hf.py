"""Hugging Face folders, read strictly: every tensor must fit config.json, and pickle is refused."""

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from crossin_jax.checkpoint.hf_map import ADAPTERS, Key, canonical_name, summarize, weight_keys
from crossin_jax.checkpoint.tensors import Tensor, read_header, same_bytes
from crossin_jax.checkpoint.weights import (
    SINGLE,
    LoadRequest,
    load_arrays,
)
from crossin_jax.config import UserError
from crossin_jax.files import allows, check_fields, join_some, read_json
from crossin_jax.models.modules import OUTER
from crossin_jax.models.quantize import kind_of
from crossin_jax.models.spec import ModelSpec, spec_from_hf
from crossin_jax.paths import as_path, check_finished, is_bucket

INDEX = SINGLE + ".index.json"
# What is downloaded from the Hub: neither pickles nor weights in other formats.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
HUB_NOT = ("consolidated*", "original/*", "onnx/*", "*/*.safetensors")
# What an export of ours knows of itself: its weights by content, and the run that they are of.
ORIGIN = "origin.json"
# How the names of the two ends of a tied matrix end.
_TIED = ("lm_head.weight", "embed_tokens.weight")
# Where our leaf names begin; a state may lie within a tuple or a TrainState.
_ROOTS = ("embed_tokens", "layers", "norm", "lm_head")


def resolve_folder(path: str | os.PathLike, revision: str | None = None) -> Path:
    """A local folder as it is, or a Hub id downloaded (weights, configuration, tokenizer) at a
    revision.
    """
    folder = as_path(path)
    if is_bucket(path):
        check_finished(folder)
    if folder.is_dir():
        return folder
    # "org/name" or "name" may be on the Hub; "./name" and "a/b/c" are places here that do not
    # exist.
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or str(path).startswith("."):
        raise UserError(
            f"{path}: no such folder; pass a folder in Hugging Face layout or a Hub id like "
            "org/name"
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(path),
                revision=revision,
                allow_patterns=list(HUB_FILES),
                ignore_patterns=list(HUB_NOT),
            )
        )
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        at = f" at revision {revision}" if revision else ""
        at_revision = ["--revision", revision] if revision else []
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{path}{at}: not found locally, and the Hub download failed ({reason})\non a "
            f"machine with network run `{shlex.join(['hf', 'download', str(path), *at_revision])}` "
            "and pass the folder that it prints"
        ) from error


def read_model_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder; `UserError` where it is absent or damaged."""
    remedy = "take it from the model's own repository"
    return read_json(file, expect=dict, what="a file of a model", remedy=remedy)


def read_export(folder: Path) -> dict[str, Any]:
    """What `export` wrote of itself into a folder; empty for other folders. Its parts `weights` and
    `base_weights` map the names of arrays to their fingerprints.
    """
    if not (folder / ORIGIN).is_file():
        return {}
    origin = read_model_json(folder / ORIGIN)
    parts = {"weights": dict[str, str], "base_weights": dict[str, str]}
    origin = {**{part: {} for part in parts}, **{k: v for k, v in origin.items() if v is not None}}
    for part, declared in parts.items():
        if not allows(declared, origin[part]):
            raise UserError(
                f"{folder / ORIGIN}: {part} is damaged; delete the file, or export again"
            )
    return origin


def read_spec(folder: str | os.PathLike) -> ModelSpec:
    """The spec in config.json, checked against the folder's tokenizer; reads no weight."""
    folder = as_path(folder)
    spec = spec_from_hf(read_model_json(folder / "config.json"), str(folder / "config.json"))
    if (folder / "tokenizer.json").is_file():
        check_vocabulary(folder / "tokenizer.json", spec, str(folder / "config.json"))
    return spec


def check_vocabulary(file: Path, spec: ModelSpec, place: str) -> None:
    """Refuses a tokenizer.json whose vocabulary has ids beyond the embedding.

    Added tokens may lie beyond it, as in Gemma 3 1B: they are refused where they occur, see
    `Renderer.check_embeddings`.
    """
    tokenizer = read_model_json(file)
    check_fields(tokenizer, {"model": dict, "added_tokens": list[dict]}, str(file))
    model, added = tokenizer.get("model") or {}, tokenizer.get("added_tokens") or []
    check_fields(model, {"vocab": dict | list}, f"{file}: model")
    vocabulary = model.get("vocab") or {}
    ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) else [-1, *vocabulary.values()]
    if not all(type(i) is int for i in (*ids, *(token.get("id") for token in added))):
        raise UserError(
            f"{file}: an id is not a whole number; take it from the model's own repository"
        )
    last = max(ids)  # of the vocabulary that the tokenizer was trained with
    if last >= spec.vocab_size:
        raise UserError(
            f"{place}: vocab_size={spec.vocab_size} is smaller than the tokenizer: the last id "
            f"in {file} is {last}; the tokenizer belongs to another model, or the embedding was "
            "not resized"
        )


def read_tensors(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of a folder by name, from one file or from the shards of its index; headers
    only.
    """
    folder = as_path(folder)
    if (folder / SINGLE).is_file():
        return read_header(str(folder / SINGLE))
    if not (folder / INDEX).is_file():
        raise UserError(_no_weights(folder))
    weight_map = read_model_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise UserError(
            f"{folder / INDEX}: has no weight_map from tensors to files; download it again"
        )
    files = sorted(set(weight_map.values()))
    strange = [name for name in files if "\0" in name or len(name) > 255]
    outside = [
        name for name in files if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name
    ]
    if strange or outside:
        what = "names a file that cannot be" if strange else "points outside its folder"
        raise UserError(f"{folder / INDEX}: {what} ({(strange or outside)[0]}); refused")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{folder}: {len(absent)} of {len(files)} shards that {INDEX} lists are missing: "
            f"{', '.join(absent)}; download them again"
        )
    headers = {file: read_header(str(folder / file)) for file in files}
    tensors = {name: tensor for header in headers.values() for name, tensor in header.items()}
    # Some writers list a tied head or embedding that no shard holds. Whether it is needed is
    # checked with the spec.
    unstored = {name for name in weight_map if name.endswith(_TIED)} - tensors.keys()
    faults = []
    for file, header in headers.items():
        listed = {name for name, shard in weight_map.items() if shard == file} - unstored
        for word, names in (
            ("lacks", listed - header.keys()),
            ("also has", header.keys() - listed),
        ):
            if names:
                faults.append(f"{file} {word} {', '.join(summarize(sorted(names)))}")
    if faults:
        raise UserError(
            f"{folder / INDEX} and its shards disagree: {'; '.join(faults)}; download them again"
        )
    return tensors


def _no_weights(folder: Path) -> str:
    pickles = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f'M.from_pretrained({json.dumps(str(folder))}, dtype="auto")'
        f".save_pretrained({json.dumps(f'{folder}-safetensors')})"
    )
    convert = shlex.join(["python", "-c", code])
    if pickles:
        return (
            f"{folder}: {pickles[0]} is a pickle, which runs code when it is opened; refused\n"
            f"where you trust it and have torch, convert it: {convert}"
        )
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder}: is a PEFT adapter, not a model; set lora.path to it and model.path to its "
            "base model"
        )
    return (
        f"{folder}: holds neither {SINGLE} nor {INDEX}; a repository with only .bin files needs: "
        f"{convert}"
    )


def match_tensors(
    tensors: dict[str, Tensor], spec: ModelSpec, place: str
) -> dict[str, list[Tensor]]:
    """The tensors of every weight of the spec, by path and in layer order; all misfits are listed
    in one error.
    """
    found = {
        name: tensor
        for raw, tensor in tensors.items()
        if (name := canonical_name(raw, spec)) is not None
    }
    # Tied weights come under the embedding's name, under the head's, or twice. Two different
    # matrices mean that the model was untied after config.json was written.
    note = ""
    if spec.tie_embeddings:
        embed, head = (f"{OUTER[name][0]}.weight" for name in ("embed_tokens", "lm_head"))
        if head in found and same_bytes(found.setdefault(embed, found[head]), found[head]):
            del found[head]  # stored twice, or under the head's name alone
        elif head in found:
            note = (
                '\nlm_head differs from embed_tokens: set "tie_word_embeddings": false in '
                "config.json"
            )
    # Strict both ways: a tensor that the spec does not have is a fault too, since the model may be
    # another one.
    keys = weight_keys(spec)
    faults = misfits(
        found, {name: key for key in keys.values() for name in key.names(spec.num_layers)}
    )
    if faults:
        raise UserError(
            f"{place}: its tensors do not fit config.json ({spec.model_type}, {spec.num_layers} "
            "layers)\n" + join_some(faults) + note
        )
    return {
        path: [take_part(found[name], key) for name in key.names(spec.num_layers)]
        for path, key in keys.items()
    }


def take_part(tensor: Tensor, key: Key) -> Tensor:
    """What a leaf has of a tensor in the file, in the leaf's shape."""
    return (tensor if key.rows is None else tensor.rows(*key.rows)).reshape(key.shape)


def misfits(found: dict[str, Tensor], expected: dict[str, Key]) -> list[str]:
    """One line for each kind of missing, unknown and mis-shaped tensor, with shapes; empty where
    all fit.
    """
    # Tensors with the same fault and shape share a line: "missing:
    # model.layers.0-31.mlp.up_proj.weight (344, 128)".
    kinds: dict[tuple[str, Any, Any], list[str]] = {}
    for name, key in expected.items():
        if name not in found:
            kinds.setdefault(("missing", key.file_shape, None), []).append(name)
        elif found[name].shape != key.file_shape:
            kinds.setdefault(("shape", found[name].shape, key.file_shape), []).append(name)
    for name, tensor in found.items():
        if name not in expected:
            kinds.setdefault(("unknown", tensor.shape, None), []).append(name)
    lines = []
    for (kind, shape, wanted), names in sorted(kinds.items(), key=lambda item: item[0][0]):
        lines += [
            f"{kind}: {name} {shape}" + (f" in the file, {wanted} expected" if wanted else "")
            for name in summarize(names)
        ]
    return lines


def leaf_path(path: tuple[Any, ...]) -> str:
    """A key path of a state, or of a tuple of states, as "layers/q_proj/weight"."""
    # JAX writes ".params['layers']['q_proj']['weight'].value" with separators of our choice; what
    # comes before our own names, and the ".value" of nnx, go.
    parts = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").split("/")
    return "/".join(parts[next((i for i, part in enumerate(parts) if part in _ROOTS), 0) :])


def is_adapter(path: str) -> bool:
    """Whether a leaf is part of a low-rank adapter."""
    return path.rsplit("/", 1)[-1] in ADAPTERS


# From a folder to arrays on the mesh; arrays are read only after all names and shapes fit:
#
#     config.json ─ read_spec ─► spec ───────────────┐
#     *.safetensors ─ read_tensors ─► headers ───────┴─ match_tensors ─► the tensors of each leaf
#     the state: shape, dtype, sharding of each leaf ── fill ─► LoadRequests ─ load_arrays ─► arrays
def load_weights(folder: str | os.PathLike, state: Any, *, progress: bool = True) -> Any:
    """`state` (one or several, abstract or not) with every weight of the base model read from the
    folder.

    Shape, dtype and sharding of each array are those of its leaf; a leaf of 8 or 4 bits and the
    `scale` beside it are quantized on the way, a layer at a time; adapters are left as they are. An
    untied `lm_head` over a tied checkpoint starts as a copy of the embedding.
    """
    folder = as_path(folder)
    spec = read_spec(folder)
    matched = match_tensors(read_tensors(folder), spec, str(folder))
    if spec.tie_embeddings:
        matched["lm_head/weight"] = matched["embed_tokens/weight"]
    return fill(state, matched, str(folder), progress=progress, skip=is_adapter)


def fill(
    state: Any,
    matched: dict[str, list[Tensor]],
    place: str,
    *,
    progress: bool,
    skip: Callable[[str], bool],
) -> Any:
    """`state` with the leaves that `skip` does not name read from their tensors."""
    # Requests go to the reader in one list, so that it can say beforehand how much memory the load
    # will take.
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    places = {leaf_path(path): i for i, (path, _) in enumerate(leaves)}
    leaves = [leaf for _, leaf in leaves]
    requests: dict[tuple[int, ...], LoadRequest] = {}
    for path, i in places.items():
        if skip(path) or path.endswith("/scale"):
            continue
        assert path in matched, f"{path}: no weight of this model has that name"
        # A quantized weight and its scales come from one tensor, and fill two leaves.
        at = (i,)
        if kind_of(leaves[i].dtype):
            at = (i, places[path.rsplit("/", 1)[0] + "/scale"])
        requests[at] = LoadRequest(
            _abstract(leaves[i]), matched[path], _abstract(leaves[at[1]]) if at[1:] else None
        )
    for at, arrays in zip(
        requests, load_arrays(list(requests.values()), place, progress=progress), strict=True
    ):
        for i, array in zip(at, arrays, strict=True):
            leaves[i] = array
    return jax.tree.unflatten(structure, leaves)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def state_leaves(state: Any) -> dict[str, Any]:
    """The arrays of one or several states by path."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}
