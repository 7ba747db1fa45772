"""PEFT adapters in both directions: low-rank pairs, DoRA magnitudes and the modules that were trained in full."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from crossin_jax.checkpoint.hf import (
    atomic_folder,
    copy_tokenizer,
    fill,
    misfits,
    read_json,
    resolve_folder,
    state_leaves,
    write_json,
    write_leaves,
)
from crossin_jax.checkpoint.hf_map import (
    PEFT_PREFIX,
    PROJECTIONS,
    Key,
    adapter_keys,
    canonical_name,
    saved_keys,
    weight_keys,
)
from crossin_jax.checkpoint.tensors import Tensor, read_header, same_bytes
from crossin_jax.config import Lora, UserError
from crossin_jax.models.spec import ModelSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# settings of PEFT that change the model and have no counterpart here; "off" values are accepted
_REFUSED = ("alora_invocation_tokens", "alpha_pattern", "arrow_config", "fan_in_fan_out", "kasa_config",
            "layer_replication", "layers_to_transform", "lora_bias", "monteclora_config", "rank_pattern",
            "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config")
_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others (pissa, olora, loftq …) also change the base weights
_HEAD, _EMBED = "lm_head.weight", "model.embed_tokens.weight"
_TEXT_PART = "model.language_model."  # where transformers 5 keeps the text part of a multimodal model


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """A PEFT adapter whose tensors fit its model: what to build, and where each leaf's tensors lie.

    `spec` is the base model's, untied where the adapter carries an `lm_head` of its own over tied embeddings.
    """

    folder: Path
    spec: ModelSpec
    lora: Lora
    tensors: dict[str, list[Tensor]]


def read_adapter(folder: str | os.PathLike, spec: ModelSpec, lora: Lora | None = None) -> AdapterFile:
    """Reads the headers of an adapter (folder or Hub id) for a model of this spec; strict about settings and shapes.

    Where `lora` is given, rank, alpha, targets and the like must agree with the adapter; dropout is the caller's.
    """
    folder = resolve_folder(folder)
    config = read_json(folder / CONFIG)
    _check_config(config, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(f"{folder}: adapter_model.bin is a pickle, which runs code when it is opened; refused\n"
                            f"where you trust it, load it with peft and call save_pretrained('{folder}-safetensors')")
        raise UserError(f"{folder / WEIGHTS}: no such file; copy it from where the adapter was trained")
    found = {}
    for name, tensor in read_header(str(folder / WEIGHTS)).items():
        short = canonical_name(name.removeprefix(PEFT_PREFIX), spec) if name.startswith(PEFT_PREFIX) else None
        found[name if short is None else PEFT_PREFIX + short] = tensor
    spec = _settle_ties(found, spec, config)
    targets = tuple(module for module, (name, *_) in PROJECTIONS.items()
                    if any(f".{name}.lora_" in tensor for tensor in found))
    modules = tuple(dict.fromkeys(path.split("/")[-2] for path, key in weight_keys(spec).items()
                                  if any(PEFT_PREFIX + name in found for name in key.names(spec.num_layers))))
    read = dataclasses.replace(
        lora or Lora(dropout=float(config.get("lora_dropout") or 0.0)), rank=int(config["r"]),
        alpha=float(config["lora_alpha"]), targets=targets, modules_to_save=modules, path=str(folder),
        use_rslora=bool(config.get("use_rslora")), use_dora=bool(config.get("use_dora")))
    if lora is not None:
        _check_same(read, lora, spec, folder)
    keys = adapter_keys(spec, targets, read.rank, use_dora=read.use_dora) | saved_keys(spec, modules)
    faults = misfits(found, {name: key for key in keys.values() for name in key.names(spec.num_layers)})
    if faults:
        raise UserError(f"{folder / WEIGHTS}: its tensors do not fit {CONFIG} and the base model ({spec.model_type}, "
                        f"{spec.num_layers} layers)\n" + "\n".join(faults))
    tensors = {path: [found[name].reshape(key.shape) for name in key.names(spec.num_layers)]
               for path, key in keys.items()}
    return AdapterFile(folder, spec, read, tensors)


def _check_config(config: dict[str, Any], file: Path) -> None:
    for name in ("peft_type", "r", "lora_alpha"):
        if name not in config:
            raise UserError(f"{file}: the field {name!r} is missing; take the file from where the adapter was trained")
    if config["peft_type"] != "LORA":
        raise UserError(f"{file}: peft_type={config['peft_type']!r} is not supported; supported: LORA")
    for name in _REFUSED:
        if config.get(name):
            raise UserError(f"{file}: {name}={config[name]!r} is not supported; merge the adapter with peft")
    if config.get("bias", "none") != "none":
        raise UserError(f"{file}: bias={config['bias']!r} is not supported; merge the adapter with peft")
    if config.get("init_lora_weights", True) not in _STARTS:
        raise UserError(f"{file}: init_lora_weights={config['init_lora_weights']!r} changes the base weights too; save "
                        "it as plain LoRA with peft (path_initial_model_for_weight_conversion)")


def _settle_ties(found: dict[str, Tensor], spec: ModelSpec, config: dict[str, Any]) -> ModelSpec:
    """The spec that the adapter makes of tied embeddings: PEFT unties them unless both halves are equal."""
    embed, head = found.get(PEFT_PREFIX + _EMBED), found.get(PEFT_PREFIX + _HEAD)
    if not spec.tie_embeddings or not (embed or head):
        return spec
    if embed and (same_bytes(embed, head) if head else config.get("ensure_weight_tying")):
        found.pop(PEFT_PREFIX + _HEAD, None)
        return spec
    return dataclasses.replace(spec, tie_embeddings=False)


def _check_same(read: Lora, lora: Lora, spec: ModelSpec, folder: Path) -> None:
    """Refuses settings that contradict the adapter, with the overrides that agree with it."""
    wrong = []
    for name in ("rank", "alpha", "targets", "modules_to_save", "use_rslora", "use_dora"):
        stored, asked = getattr(read, name), getattr(lora, name)
        if name == "targets" and lora.released_code_compatible:
            asked = tuple(target for target in asked if target != "q_proj")
        if name == "modules_to_save" and spec.tie_embeddings and {"embed_tokens", "lm_head"} & set(asked):
            asked = (*asked, "embed_tokens", "lm_head")
            stored = (*stored, "lm_head") if "embed_tokens" in stored else stored
        if (set(stored) != set(asked)) if isinstance(stored, tuple) else stored != asked:
            value = ",".join(getattr(read, name)) or "()" if isinstance(stored, tuple) else stored
            wrong.append(f"--config.lora.{name}={value}")
    if wrong:
        raise UserError(f"lora.path={folder}: the adapter has other settings than this configuration; use\n"
                        + " ".join(wrong))


def load_adapter(adapter: AdapterFile, state: Any, *, progress: bool = True) -> Any:
    """`state` (one or several) with the adapter's leaves: low-rank pairs and the modules trained in full."""
    paths = {path for path in state_leaves(state)} & adapter.tensors.keys()
    assert paths == adapter.tensors.keys(), f"the model lacks {sorted(adapter.tensors.keys() - paths)}"
    return fill(state, adapter.tensors, str(adapter.folder), progress=progress, skip=lambda path: path not in paths)


def save_adapter(folder: str | os.PathLike, spec: ModelSpec, lora: Lora, state: Any, *, base: str | None,
                 revision: str | None = None, tokenizer: str | os.PathLike | None = None, card: str | None = None,
                 multimodal: bool = False, progress: bool = True) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads onto `base`; whole or not at all.

    `lora` is as `models.lora.resolve` gives it. Tied embeddings that were trained are stored under both names and
    marked, so that PEFT ties them too. `multimodal`: the base is the text part of a larger model.
    """
    keys = adapter_keys(spec, lora.targets, lora.rank, use_dora=lora.use_dora) | saved_keys(spec, lora.modules_to_save)
    leaves = {path: leaf for path, leaf in state_leaves(state).items() if path in keys}
    tied = spec.tie_embeddings and "embed_tokens/weight" in keys
    if tied:
        embed = keys["embed_tokens/weight"]
        keys["lm_head/weight"] = Key("lm_head/weight", PEFT_PREFIX + _HEAD, embed.shape, embed.file_shape)
        leaves["lm_head/weight"] = leaves["embed_tokens/weight"]
    names = {"norm": "model.norm"}  # PEFT goes by the end of a name: "norm" would mean every norm of every layer
    modules = sorted({names.get(module, module) for module in lora.modules_to_save} | (
        {"embed_tokens", "lm_head"} if tied else set()))
    targets: Any = sorted(lora.targets)
    if multimodal:  # the vision tower has projections of the same names
        text = PEFT_PREFIX + _TEXT_PART
        keys = {path: dataclasses.replace(key, name=key.name.replace(PEFT_PREFIX + "model.", text))
                for path, key in keys.items()}
        targets = rf"{re.escape(_TEXT_PART)}layers\..*\.({'|'.join(targets)})"
        modules = [re.sub(r"^model\.", _TEXT_PART, module) for module in modules]
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    config = {
        "alpha_pattern": {}, "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha, "lora_dropout": lora.dropout,
        "modules_to_save": modules or None, "peft_type": "LORA", "r": lora.rank, "rank_pattern": {},
        "revision": revision, "target_modules": targets, "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora, "use_rslora": lora.use_rslora} | ({"ensure_weight_tying": True} if tied else {})
    with atomic_folder(folder) if jax.process_index() == 0 else contextlib.nullcontext(Path(folder)) as target:
        write_leaves(target, leaves, keys, spec.num_layers, name=WEIGHTS, shard_bytes=np.iinfo(np.int64).max,
                     progress=progress)
        if jax.process_index():
            return
        write_json(target / CONFIG, config)
        copy_tokenizer(tokenizer, target)
        if card:
            (target / "README.md").write_text(card, encoding="utf-8")
