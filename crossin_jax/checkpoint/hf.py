"""Hugging Face folders in both directions: strict, streamed, atomic. Weights are safetensors; pickle is refused."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from crossin_jax.checkpoint.hf_map import ADAPTERS, Key, canonical_name, summarize, weight_keys
from crossin_jax.checkpoint.stream import Wanted, load_arrays
from crossin_jax.checkpoint.tensors import CODES, Tensor, read_header, same_bytes, write_tensors
from crossin_jax.config import UserError
from crossin_jax.models.quantize import kind_of
from crossin_jax.models.spec import ModelSpec, spec_from_hf, spec_to_hf

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt")
HUB_NOT = ("consolidated*", "original/*", "onnx/*", "*/*.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")
SHARD_BYTES = 5_000_000_000
# fields of config.json that the spec does not hold and an export keeps
_KEPT_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
_ROOTS = ("embed_tokens", "layers", "norm", "lm_head")


def resolve_folder(path: str | os.PathLike, revision: str | None = None) -> Path:
    """A local folder as it is, or a Hub id downloaded (weights, configuration, tokenizer) at a revision."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) or str(path).startswith("."):
        raise UserError(f"{path}: no such folder; pass a folder in Hugging Face layout or a Hub id like org/name")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            str(path), revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_NOT)))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{path}{at}: no such folder here, and not to be had from the Hub ({reason})\non a "
                        f"machine with network run `hf download {path}` and pass the folder that it prints") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` where it is absent or damaged."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; take it from the model's own repository") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable ({error}); download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds a {type(values).__name__}, not an object; download it again")
    return values


def read_spec(folder: str | os.PathLike) -> ModelSpec:
    """The spec in config.json, checked against the folder's tokenizer; reads no weight."""
    folder = Path(folder)
    spec = spec_from_hf(read_json(folder / "config.json"), str(folder / "config.json"))
    if (folder / "tokenizer.json").is_file():
        check_vocabulary(folder / "tokenizer.json", spec, str(folder / "config.json"))
    return spec


def check_vocabulary(file: Path, spec: ModelSpec, place: str) -> None:
    """Refuses a tokenizer.json that has ids beyond the embedding."""
    tokenizer = read_json(file)
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    last = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    last = max([last, *(int(token["id"]) for token in tokenizer.get("added_tokens") or ())])
    if last >= spec.vocab_size:
        raise UserError(f"{place}: vocab_size={spec.vocab_size} is smaller than the tokenizer: the last id in {file} "
                        f"is {last}; the tokenizer belongs to another model, or the embedding was not resized")


def read_tensors(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of a folder by name, from one file or from the shards of its index; headers only."""
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        return read_header(str(folder / SINGLE))
    if not (folder / INDEX).is_file():
        raise UserError(_no_weights(folder))
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{folder / INDEX}: has no weight_map from tensors to files; download it again")
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if os.path.isabs(name) or ".." in Path(name).parts or "\\" in name]
    if outside:
        raise UserError(f"{folder / INDEX}: points outside its folder ({outside[0]}); refused")
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder}: {len(absent)} of {len(files)} shards that {INDEX} lists are missing: "
                        f"{', '.join(absent)}; download them again")
    tensors, faults = {}, []
    for file in files:
        header = read_header(str(folder / file))
        listed = {name for name, shard in weight_map.items() if shard == file}
        for word, names in (("lacks", listed - header.keys()), ("also has", header.keys() - listed)):
            if names:
                faults.append(f"{file} {word} {', '.join(summarize(sorted(names)))}")
        tensors |= header
    if faults:
        raise UserError(f"{folder / INDEX} and its shards disagree: {'; '.join(faults)}; download them again")
    return tensors


def _no_weights(folder: Path) -> str:
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    convert = ("python -c \"from transformers import AutoModelForCausalLM as M; "
               f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\"")
    if pickles:
        return (f"{folder}: {pickles[0]} is a pickle, which runs code when it is opened; refused\n"
                f"where you trust it and have torch, convert it: {convert}")
    if (folder / "adapter_config.json").is_file():
        return f"{folder}: is a PEFT adapter, not a model; set lora.path to it and model.path to its base model"
    return f"{folder}: holds neither {SINGLE} nor {INDEX}; a repository with only .bin files needs: {convert}"


def match_tensors(tensors: dict[str, Tensor], spec: ModelSpec, place: str) -> dict[str, list[Tensor]]:
    """The tensors of every weight of the spec, by path and in layer order; all misfits are listed in one error."""
    found = {name: tensor for raw, tensor in tensors.items() if (name := canonical_name(raw, spec)) is not None}
    embed, head = found.get("model.embed_tokens.weight"), found.get("lm_head.weight")
    note = ""
    if spec.tie_embeddings and embed and head:
        if same_bytes(embed, head):
            del found["lm_head.weight"]
        else:
            note = "\nlm_head differs from embed_tokens: set \"tie_word_embeddings\": false in config.json"
    keys = weight_keys(spec)
    faults = misfits(found, {name: key for key in keys.values() for name in key.names(spec.num_layers)})
    if faults:
        raise UserError(f"{place}: its tensors do not fit config.json ({spec.model_type}, {spec.num_layers} layers)\n"
                        + "\n".join(faults) + note)
    return {path: [found[name].reshape(key.shape) for name in key.names(spec.num_layers)] for path, key in keys.items()}


def misfits(found: dict[str, Tensor], expected: dict[str, Key]) -> list[str]:
    """One line for each kind of missing, unknown and mis-shaped tensor, with shapes; empty where all fit."""
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
        lines += [f"{kind}: {name} {shape}" + (f" in the file, {wanted} expected" if wanted else "")
                  for name in summarize(names)]
    return lines


def leaf_path(path: tuple[Any, ...]) -> str:
    """A key path of a state, or of a tuple of states, as "layers/q_proj/weight"."""
    parts = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value").split("/")
    return "/".join(parts[next((i for i, part in enumerate(parts) if part in _ROOTS), 0):])


def is_adapter(path: str) -> bool:
    """Whether a leaf is part of a low-rank adapter."""
    return path.rsplit("/", 1)[-1] in ADAPTERS


def load_weights(folder: str | os.PathLike, state: Any, *, progress: bool = True) -> Any:
    """`state` (one or several, abstract or not) with every weight of the base model read from the folder.

    Shape, dtype and sharding of each array are those of its leaf; a leaf of 8 or 4 bits and the `scale` beside it are
    quantized on the way, a layer at a time; adapters are left as they are. An untied `lm_head`
    over a tied checkpoint starts as a copy of the embedding.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    matched = match_tensors(read_tensors(folder), spec, str(folder))
    if spec.tie_embeddings:
        matched["lm_head/weight"] = matched["embed_tokens/weight"]
    return fill(state, matched, str(folder), progress=progress, skip=is_adapter)


def fill(state: Any, matched: dict[str, list[Tensor]], place: str, *, progress: bool,
         skip: Callable[[str], bool]) -> Any:
    """`state` with the leaves that `skip` does not name read from their tensors."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    places = {leaf_path(path): i for i, (path, _) in enumerate(leaves)}
    leaves = [leaf for _, leaf in leaves]
    wanted: dict[tuple[int, ...], Wanted] = {}
    for path, i in places.items():
        if skip(path) or path.endswith("/scale"):
            continue
        assert path in matched, f"{path}: no weight of this model has that name"
        at = (i,)
        if kind_of(leaves[i].dtype):
            at = (i, places[path.rsplit("/", 1)[0] + "/scale"])
        wanted[at] = Wanted(_abstract(leaves[i]), matched[path], _abstract(leaves[at[1]]) if at[1:] else None)
    for at, arrays in zip(wanted, load_arrays(list(wanted.values()), place, progress=progress), strict=True):
        for i, array in zip(at, arrays, strict=True):
            leaves[i] = array
    return jax.tree.unflatten(structure, leaves)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def check_absent(path: str | os.PathLike) -> Path:
    """The absolute path of a folder to be written; `UserError` where something is there already."""
    target = Path(path).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; delete it or choose another folder")
    return target


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling to write into, which takes the given name when the block ends well and vanishes when not."""
    target = check_absent(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Writes an object as transformers and peft do: sorted, indented by two."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def state_leaves(state: Any) -> dict[str, Any]:
    """The arrays of one or several states by path."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


@jax.jit
def _take_layer(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def fetch(leaf: jax.Array | np.ndarray, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """One tensor of a leaf on the host; every process takes part where the leaf is spread over several."""
    if isinstance(leaf, jax.Array):
        is_view = leaf.is_fully_replicated and next(iter(leaf.devices())).platform == "cpu"
        if layer is not None and not is_view:
            leaf, layer = _take_layer(leaf, layer), None
        if not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.asarray(leaf)  # of a CPU device: a view
    return (array if layer is None else array[layer]).astype(dtype, copy=False)


def write_leaves(folder: Path, leaves: dict[str, jax.Array], keys: dict[str, Key], num_layers: int, *,
                 name: str = SINGLE, dtype: Any = None, shard_bytes: int = SHARD_BYTES, progress: bool = True) -> None:
    """Writes leaves as one safetensors file, or as shards with an index where they pass `shard_bytes`."""
    assert leaves.keys() == keys.keys(), f"weights and table differ: {sorted(leaves.keys() ^ keys.keys())}"
    entries = []  # in reading order: embedding, layer by layer, head
    for i, (path, key) in enumerate(keys.items()):
        kind = np.dtype(dtype or leaves[path].dtype)
        for layer, tensor in enumerate(key.names(num_layers)):
            layer = layer if key.stacked else None
            rank = (-1 if path == "embed_tokens/weight" else num_layers if layer is None else layer, i)
            entries.append((rank, (tensor, CODES[kind], key.file_shape,
                                   lambda path=path, layer=layer, kind=kind: fetch(leaves[path], layer, kind)),
                            int(np.prod(key.file_shape)) * kind.itemsize))
    shards: list[list[Any]] = [[]]
    size = total = 0
    for _, entry, count in sorted(entries, key=lambda item: item[0]):
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size, total = size + count, total + count
    if jax.process_index():
        for entry in (entry for shard in shards for entry in shard):
            entry[-1]()
        return
    stem, suffix = name.rsplit(".", 1)
    files = [name] if len(shards) == 1 else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}"
                                              for i in range(len(shards))]
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress, leave=False) as bar:
        for file, shard in zip(files, shards, strict=True):
            write_tensors(str(folder / file), shard, bar.update)
    if len(shards) > 1:
        weight_map = {entry[0]: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        write_json(folder / f"{name}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def save_model(folder: str | os.PathLike, spec: ModelSpec, state: Any, *, dtype: Any = None,
               source: str | os.PathLike | None = None, tokenizer: str | os.PathLike | None = None,
               token_ids: dict[str, Any] | None = None, card: str | None = None, shard_bytes: int = SHARD_BYTES,
               progress: bool = True) -> None:
    """Writes a folder that `transformers` loads; it appears whole or not at all.

    `state` (one or several) holds the weights without adapters; `dtype` None keeps theirs. From `source`, the folder of
    the base model, come token ids and generation settings, from `tokenizer` (None: `source`) the tokenizer's files.
    `token_ids` ("eos_token_id" …) goes before those of `source`. `card` becomes README.md.
    """
    with atomic_folder(folder) if jax.process_index() == 0 else contextlib.nullcontext(Path(folder)) as target:
        leaves = state_leaves(state)
        write_leaves(target, leaves, weight_keys(spec), spec.num_layers, dtype=dtype, shard_bytes=shard_bytes,
                     progress=progress)
        if jax.process_index():
            return
        old = read_json(Path(source) / "config.json") if source else {}
        old = {**old, **old.get("text_config", {})}
        kept = {name: old[name] for name in _KEPT_FIELDS if old.get(name) is not None} | (token_ids or {})
        stored = np.dtype(dtype or leaves["embed_tokens/weight"].dtype).name
        write_json(target / "config.json", {**spec_to_hf(spec), **kept, "torch_dtype": stored})
        if source and (Path(source) / "generation_config.json").is_file():
            shutil.copyfile(Path(source) / "generation_config.json", target / "generation_config.json")
        else:
            ids = {name: value for name, value in kept.items() if name.endswith("token_id")}
            write_json(target / "generation_config.json", {"_from_model_config": True, **ids})
        copy_tokenizer(tokenizer or source, target)
        if card:
            (target / "README.md").write_text(card, encoding="utf-8")


def copy_tokenizer(source: str | os.PathLike | None, target: Path) -> None:
    """Copies the tokenizer's files of a folder."""
    for name in TOKENIZER_FILES if source else ():
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, target / name)
