"""From the mesh to files: model folders that transformers reads, and adapters that PEFT reads.

A folder appears whole or not at all. All processes take part in the transfers, and the first one
writes.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from crossin_jax.checkpoint.hf import ORIGIN, read_model_json, state_leaves
from crossin_jax.checkpoint.hf_map import (
    PEFT_PREFIX,
    Key,
    adapter_keys,
    file_name,
    saved_keys,
    weight_keys,
)
from crossin_jax.checkpoint.peft import CONFIG, HEAD, TEXT_PART, WEIGHTS
from crossin_jax.checkpoint.tensors import CODES, write_tensors
from crossin_jax.checkpoint.weights import SINGLE
from crossin_jax.config import Lora, UserError
from crossin_jax.data.pipeline import CHAT_TEMPLATES, TOKENIZER_FILES
from crossin_jax.models.spec import ModelSpec, spec_to_hf
from crossin_jax.ownership import own_output
from crossin_jax.paths import UNFINISHED, as_path, is_bucket, marked_folder
from crossin_jax.process import remove, temporary

SHARD_BYTES = 5_000_000_000
# Fields of config.json that the spec does not hold and an export keeps.
_KEPT_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")


# ---- Tensors


@jax.jit
def _take_layer(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def fetch(leaf: jax.Array | np.ndarray, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """One tensor of a leaf on the host; every process takes part where the leaf is spread over
    several.
    """
    if isinstance(leaf, jax.Array):
        # A replicated array on a CPU device is memory of the host already: a layer of it is a view,
        # not a copy.
        is_view = leaf.is_fully_replicated and next(iter(leaf.devices())).platform == "cpu"
        if layer is not None and not is_view:
            leaf, layer = _take_layer(leaf, layer), None
        if not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.asarray(leaf)
    return (array if layer is None else array[layer]).astype(dtype, copy=False)


@dataclasses.dataclass
class _Output:
    """A tensor to be written: the leaves below one another that it consists of, and their layer."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    layer: int | None
    leaves: list[Any]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def fetch(self) -> np.ndarray:
        """The tensor on the host; every process takes part."""
        parts = [fetch(leaf, self.layer, self.dtype) for leaf in self.leaves]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([part.reshape(-1, *self.shape[1:]) for part in parts])


def _list_outputs(
    leaves: dict[str, jax.Array], keys: dict[str, Key], num_layers: int, dtype: Any
) -> list[_Output]:
    """The tensors in the order in which a reader needs them: embedding, layer by layer, head."""
    outputs: dict[str, _Output] = {}
    for path, key in keys.items():
        kind = np.dtype(dtype or leaves[path].dtype)
        for layer, name in enumerate(key.names(num_layers)):
            layer = layer if key.stacked else None
            output = outputs.setdefault(name, _Output(name, key.file_shape, kind, layer, []))
            output.leaves.append(leaves[path])

    # A stack gives one tensor per layer. Sorted by layer, a reader finds a whole layer in one
    # place.
    def rank(output: _Output) -> int:
        if output.layer is not None:
            return output.layer
        return -1 if output.name.endswith("embed_tokens.weight") else num_layers

    return sorted(outputs.values(), key=rank)


def write_leaves(
    folder: Path,
    leaves: dict[str, jax.Array],
    keys: dict[str, Key],
    num_layers: int,
    *,
    name: str = SINGLE,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes leaves as one safetensors file, or as shards with an index where they pass
    `shard_bytes`.
    """
    assert leaves.keys() == keys.keys(), (
        f"weights and table differ: {sorted(leaves.keys() ^ keys.keys())}"
    )
    outputs = _list_outputs(leaves, keys, num_layers, dtype)
    # The first process writes. The others take part in every transfer, in the same order, and write
    # nothing.
    if jax.process_index():
        for output in outputs:
            output.fetch()
        return
    shards: list[list[_Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(o.nbytes for o in (*shards[-1], output)) > shard_bytes:
            shards.append([])
        shards[-1].append(output)
    files = [name]
    if len(shards) > 1:
        stem, suffix = name.rsplit(".", 1)
        files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
    total = sum(output.nbytes for output in outputs)
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="writing", disable=not progress, leave=False
    ) as bar:
        for file, shard in zip(files, shards, strict=True):
            entries = [(o.name, CODES[o.dtype], o.shape, o.fetch) for o in shard]
            write_tensors(str(folder / file), entries, bar.update)
    if len(shards) > 1:
        weight_map = {
            o.name: file for file, shard in zip(files, shards, strict=True) for o in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{name}.index.json", index)


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Writes an object as transformers and peft do: sorted, indented by two."""
    file.write_text(
        json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


# ---- Folders


def check_absent(path: str | os.PathLike) -> Path:
    """The absolute path of a folder to be written; `UserError` where something is there already."""
    target = as_path(path).absolute()
    if is_bucket(target) and (target / UNFINISHED).exists():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; delete it or choose another folder")
    return target


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling to write into, which takes the given name when the block ends well and
    vanishes when not.
    """
    target = check_absent(path)
    with own_output(target):
        if is_bucket(target):
            with marked_folder(target):
                yield target
            return
        part = target.with_name(f".{target.name}.partial")
        remove(part)  # of a process that was killed
        part.mkdir()
        with temporary(part):
            yield part
            os.rename(part, target)


def save_model(
    folder: str | os.PathLike,
    spec: ModelSpec,
    state: Any,
    *,
    dtype: Any = None,
    source: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    token_ids: dict[str, Any] | None = None,
    answer_ends: Sequence[int] = (),
    card: str | None = None,
    origin: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Writes a folder that `transformers` loads; it appears whole or not at all.

    `state` (one or several) holds the weights without adapters; `dtype` None keeps theirs. Token
    ids and generation settings come from `source`, the folder of the base model; `token_ids` and
    the ids that end an answer, `answer_ends`, go before them. `tokenizer` None is that of `source`.
    `origin` is for `read_export`.
    """
    with (
        atomic_folder(folder)
        if jax.process_index() == 0
        else contextlib.nullcontext(as_path(folder)) as target
    ):
        leaves = state_leaves(state)
        write_leaves(
            target,
            leaves,
            weight_keys(spec),
            spec.num_layers,
            dtype=dtype,
            shard_bytes=shard_bytes,
            progress=progress,
        )
        if jax.process_index():
            return
        # The rest of the base's config.json describes the base; what the spec says of the model may
        # differ.
        old = read_model_json(as_path(source) / "config.json") if source else {}
        old = {**old, **old.get("text_config", {})}
        kept = {name: old[name] for name in _KEPT_FIELDS if old.get(name) is not None} | (
            token_ids or {}
        )
        known = np.atleast_1d(kept.get("eos_token_id", [])).tolist()
        if set(answer_ends) - set(known):
            kept["eos_token_id"] = [*dict.fromkeys((*known, *answer_ends))]
        stored = np.dtype(dtype or leaves["embed_tokens/weight"].dtype).name
        write_json(target / "config.json", {**spec_to_hf(spec), **kept, "torch_dtype": stored})
        ids = {name: value for name, value in kept.items() if name.endswith("token_id")}
        generation = {"_from_model_config": True, **ids}
        if source and (as_path(source) / "generation_config.json").is_file():
            generation = read_model_json(as_path(source) / "generation_config.json")
        if answer_ends:
            generation["eos_token_id"] = list(answer_ends) if answer_ends[1:] else answer_ends[0]
        write_json(target / "generation_config.json", generation)
        copy_tokenizer(tokenizer or source, target)
        describe(target, card, origin)


def describe(target: Path, card: str | None, origin: dict[str, Any] | None) -> None:
    """Describes an export: README.md for people, origin.json for programs."""
    if card:
        (target / "README.md").write_text(card, encoding="utf-8")
    if origin:
        write_json(target / ORIGIN, origin)


def copy_tokenizer(source: str | os.PathLike | None, target: Path) -> None:
    """Copies the tokenizer's files of a folder."""
    for file in [as_path(source) / name for name in TOKENIZER_FILES] if source else ():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    if source and (folder := as_path(source) / CHAT_TEMPLATES).is_dir():
        (target / CHAT_TEMPLATES).mkdir()
        for file in folder.iterdir():
            (target / CHAT_TEMPLATES / file.name).write_bytes(file.read_bytes())


def save_adapter(
    folder: str | os.PathLike,
    spec: ModelSpec,
    lora: Lora,
    state: Any,
    *,
    base: str | None,
    revision: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    card: str | None = None,
    origin: dict[str, Any] | None = None,
    multimodal: bool = False,
    progress: bool = True,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads onto `base`; whole or not at
    all.

    `lora` is as `models.lora.resolve` gives it. Tied embeddings that were trained are stored under
    both names and marked, so that PEFT ties them too. `multimodal`: the base is the text part of a
    larger model. `origin` is for `hf.read_export`.
    """
    # 1. What the file holds: low-rank pairs, and whole modules
    keys = adapter_keys(spec, lora.targets, lora.rank, use_dora=lora.use_dora) | saved_keys(
        spec, lora.modules_to_save
    )
    leaves = {path: leaf for path, leaf in state_leaves(state).items() if path in keys}
    ties = spec.tie_embeddings and "embed_tokens/weight" in keys
    if ties:
        head = dataclasses.replace(keys["embed_tokens/weight"], name=PEFT_PREFIX + HEAD)
        keys["lm_head/weight"] = head
        leaves["lm_head/weight"] = leaves["embed_tokens/weight"]
    # 2. The names: in a multimodal model the text part lies one level deeper
    if multimodal:
        text = PEFT_PREFIX + TEXT_PART
        keys = {
            path: dataclasses.replace(key, name=key.name.replace(PEFT_PREFIX + "model.", text))
            for path, key in keys.items()
        }
    config = _config_for_peft(spec, lora, ties=ties, multimodal=multimodal)
    config |= {"base_model_name_or_path": base, "revision": revision}
    # 3. Every process takes part in the transfers; the first one writes
    with (
        atomic_folder(folder)
        if jax.process_index() == 0
        else contextlib.nullcontext(as_path(folder)) as target
    ):
        write_leaves(
            target,
            leaves,
            keys,
            spec.num_layers,
            name=WEIGHTS,
            shard_bytes=np.iinfo(np.int64).max,
            progress=progress,
        )
        if jax.process_index():
            return
        write_json(target / CONFIG, config)
        copy_tokenizer(tokenizer, target)
        describe(target, card, origin)


def _config_for_peft(
    spec: ModelSpec, lora: Lora, *, ties: bool, multimodal: bool
) -> dict[str, Any]:
    """The settings in adapter_config.json that do not depend on the base's place."""
    # PEFT goes by the end of a name: "norm" alone would mean every norm of every layer.
    modules = {
        "model.norm" if module == "norm" else file_name(module, spec)
        for module in lora.modules_to_save
    }
    targets: Any = sorted({file_name(module, spec) for module in lora.targets})
    modules = sorted(modules | ({"embed_tokens", "lm_head"} if ties else set()))
    # In a multimodal model the vision tower has projections of the same names: a pattern keeps to
    # the text part.
    if multimodal:
        targets = rf"{re.escape(TEXT_PART)}layers\..*\.({'|'.join(targets)})"
        modules = [re.sub(r"^model\.", TEXT_PART, module) for module in modules]
    return {
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": modules or None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    } | ({"ensure_weight_tying": True} if ties else {})
