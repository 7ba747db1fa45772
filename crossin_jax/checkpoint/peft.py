"""PEFT adapters, read: low-rank pairs, DoRA magnitudes and modules that were trained in full."""

import dataclasses
import os
import re
import shlex
from pathlib import Path
from typing import Any

from crossin_jax.checkpoint.hf import (
    fill,
    misfits,
    read_model_json,
    resolve_folder,
    state_leaves,
    take_part,
)
from crossin_jax.checkpoint.hf_map import (
    PEFT_PREFIX,
    adapter_keys,
    canonical_name,
    file_name,
    saved_keys,
    weight_keys,
)
from crossin_jax.checkpoint.tensors import Tensor, read_header, same_bytes
from crossin_jax.config import Lora, UserError
from crossin_jax.files import check_fields, join_some
from crossin_jax.models.modules import OUTER, TARGETS
from crossin_jax.models.rope import drop_nulls
from crossin_jax.models.spec import ModelSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Settings of PEFT that change the model and have no counterpart here; "off" values are accepted.
_REFUSED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Ways to start an adapter that leave the base as it is. Others (pissa, olora, loftq …) change its
# weights too.
_STARTS = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
)
_FIELDS = {
    "peft_type": str,
    "r": (int, {"at_least": 1}),
    "lora_alpha": (float, {"above": 0}),
    "lora_dropout": (float, {"at_least": 0, "at_most": 1}),
    "bias": str,
    "init_lora_weights": bool | str,
    "use_rslora": bool,
    "use_dora": bool,
}
# The name of an adapter within a tensor's name, e.g. lora_A.default.weight.
_ADAPTER_NAME = re.compile(
    r"(?P<kept>\.lora_[AB]|\.lora_magnitude_vector)\.(?P<adapter>(?!weight$)[^.]+)(?=\.weight$|$)"
    r"|\.modules_to_save\.(?P<saved>[^.]+)(?=\.(weight|bias)$)"
)
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
# Where transformers 5 keeps the text part of a multimodal model.
TEXT_PART = "model.language_model."


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """A PEFT adapter whose tensors fit its model: what to build, and where each leaf's tensors lie.

    `spec` is the base model's, untied where the adapter carries an `lm_head` of its own over tied
    embeddings.
    """

    folder: Path
    spec: ModelSpec
    lora: Lora
    tensors: dict[str, list[Tensor]]


def read_adapter(
    folder: str | os.PathLike, spec: ModelSpec, lora: Lora | None = None
) -> AdapterFile:
    """Reads the headers of an adapter (folder or Hub id) for a model of this spec; strict about
    settings and shapes.

    Where `lora` is given, rank, alpha, targets and the like must agree with the adapter; dropout is
    the caller's.
    """
    folder = resolve_folder(folder)
    config = drop_nulls(read_model_json(folder / CONFIG))
    _check_config(config, folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UserError(
                f"{folder}: adapter_model.bin is a pickle, which runs code when it is opened; "
                "refused\n"
                "where you trust it, load it with peft and call "
                f"save_pretrained('{folder}-safetensors')"
            )
        raise UserError(
            f"{folder / WEIGHTS}: no such file; copy it from where the adapter was trained"
        )
    found = _read_tensors(folder / WEIGHTS, spec)
    # What the adapter holds is read from its tensors. `target_modules` may be a pattern, or name
    # what is not there.
    spec = _settle_ties(found, spec, config)
    targets = tuple(
        module
        for module in TARGETS
        if any(f".{file_name(module, spec)}.lora_" in tensor for tensor in found)
    )
    modules = tuple(
        dict.fromkeys(
            path.split("/")[-2]
            for path, key in weight_keys(spec).items()
            if any(PEFT_PREFIX + name in found for name in key.names(spec.num_layers))
        )
    )
    read = dataclasses.replace(
        lora or Lora(dropout=float(config.get("lora_dropout") or 0.0)),
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        targets=targets,
        modules_to_save=modules,
        path=str(folder),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
    )
    if lora is not None:
        _check_same(read, lora, spec, folder)
    # From here on as for a model: what the settings ask for against what the file holds, strict
    # both ways.
    keys = adapter_keys(spec, targets, read.rank, use_dora=read.use_dora) | saved_keys(
        spec, modules
    )
    faults = misfits(
        found, {name: key for key in keys.values() for name in key.names(spec.num_layers)}
    )
    if faults:
        raise UserError(
            f"{folder / WEIGHTS}: its tensors do not fit {CONFIG} and the base model "
            f"({spec.model_type}, {spec.num_layers} layers)\n" + join_some(faults)
        )
    tensors = {
        path: [take_part(found[name], key) for name in key.names(spec.num_layers)]
        for path, key in keys.items()
    }
    return AdapterFile(folder, spec, read, tensors)


def _read_tensors(file: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """The headers of an adapter's file under the names that PEFT saves.

    Trainers that save the state of a PEFT model as it is keep the adapter's name and the weights it
    replaces:

        q_proj.lora_A.default.weight            →  q_proj.lora_A.weight
        lm_head.modules_to_save.default.weight  →  lm_head.weight
        lm_head.original_module.weight          →  left out
    """
    found, adapters = {}, set()
    for raw, tensor in read_header(str(file)).items():
        if ".original_module." in raw:
            continue
        if named := _ADAPTER_NAME.search(raw):
            adapters.add(named["adapter"] or named["saved"])
        name = _ADAPTER_NAME.sub(lambda match: match["kept"] or "", raw)
        name = name.removesuffix(".weight") if "lora_magnitude_vector" in name else name
        if name.startswith(PEFT_PREFIX):
            short = canonical_name(name.removeprefix(PEFT_PREFIX), spec)
            name = name if short is None else PEFT_PREFIX + short
        for module in OUTER:
            if re.search(rf"\b{module}\.(base_layer|lora_)", name):
                raise UserError(
                    f"{file}: a low-rank adapter on {module} is not supported; merge it into the "
                    "base with peft (merge_and_unload), or train it with modules_to_save "
                    "instead of target_modules"
                )
        found[name] = tensor
    if len(adapters) > 1:
        raise UserError(
            f"{file}: holds several adapters ({', '.join(sorted(adapters))}); save one of them by "
            "itself"
        )
    return found


def find_base(folder: Path) -> Path:
    """The folder of the base model that an adapter names; `UserError` with the way to name
    another.
    """
    named = drop_nulls(read_model_json(folder / CONFIG))
    check_fields(named, {"base_model_name_or_path": str, "revision": str}, str(folder / CONFIG))
    base = named.get("base_model_name_or_path")
    remedy = f"--base=BASE {shlex.quote(f'--model={folder}')}"
    if not base:
        raise UserError(
            f"{folder / CONFIG}: base_model_name_or_path is missing; pass the base model: {remedy}"
        )
    try:
        return resolve_folder(base, named.get("revision") or None)
    except UserError as error:
        raise UserError(
            f"{folder / CONFIG} names the base model {base!r}, which cannot be opened here; pass "
            f"its place: {remedy}\n"
            f"{error}"
        ) from error


def _check_config(config: dict[str, Any], file: Path) -> None:
    check_fields(config, _FIELDS, str(file))
    for name in ("peft_type", "r", "lora_alpha"):
        if config.get(name) is None:
            raise UserError(
                f"{file}: the field {name!r} is missing; take the file from where the adapter was "
                "trained"
            )
    if config["peft_type"] != "LORA":
        raise UserError(
            f"{file}: peft_type={config['peft_type']!r} is not supported; supported: LORA"
        )
    for name in _REFUSED:
        if config.get(name):
            raise UserError(
                f"{file}: {name}={config[name]!r} is not supported; merge the adapter with peft"
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{file}: bias={config['bias']!r} is not supported; merge the adapter with peft"
        )
    if config.get("init_lora_weights", True) not in _STARTS:
        raise UserError(
            f"{file}: init_lora_weights={config['init_lora_weights']!r} changes the base weights "
            "too; save it as plain LoRA with peft (path_initial_model_for_weight_conversion)"
        )


def _settle_ties(found: dict[str, Tensor], spec: ModelSpec, config: dict[str, Any]) -> ModelSpec:
    """The spec that the adapter makes of tied embeddings: PEFT unties them unless both halves are
    equal.
    """
    # Over a tied base, PEFT copies each module that it trains in full, and so unties it. Two cases
    # stay tied: both copies are equal, or `ensure_weight_tying` says that the one copy is used for
    # both.
    embed, head = found.get(PEFT_PREFIX + EMBED), found.get(PEFT_PREFIX + HEAD)
    if not spec.tie_embeddings or not (embed or head):
        return spec
    if embed and (same_bytes(embed, head) if head else config.get("ensure_weight_tying")):
        found.pop(PEFT_PREFIX + HEAD, None)
        return spec
    return dataclasses.replace(spec, tie_embeddings=False)


def _check_same(read: Lora, lora: Lora, spec: ModelSpec, folder: Path) -> None:
    """Refuses settings that contradict the adapter, with the overrides that agree with it."""
    wrong = []
    for name in ("rank", "alpha", "targets", "modules_to_save", "use_rslora", "use_dora"):
        stored, asked = getattr(read, name), getattr(lora, name)
        if name == "targets" and lora.released_code_compatible:
            asked = tuple(target for target in asked if target != "q_proj")
        # For tied embeddings, one of the two names means both.
        if (
            name == "modules_to_save"
            and spec.tie_embeddings
            and {"embed_tokens", "lm_head"} & set(asked)
        ):
            asked = (*asked, "embed_tokens", "lm_head")
            stored = (*stored, "lm_head") if "embed_tokens" in stored else stored
        if (set(stored) != set(asked)) if isinstance(stored, tuple) else stored != asked:
            value = ",".join(getattr(read, name)) or "()" if isinstance(stored, tuple) else stored
            wrong.append(f"--config.lora.{name}={value}")
    if wrong:
        raise UserError(
            f"lora.path={folder}: the adapter has other settings than this configuration; use\n"
            + " ".join(wrong)
        )


def load_adapter(adapter: AdapterFile, state: Any, *, progress: bool = True) -> Any:
    """`state` (one or several) with the adapter's leaves: low-rank pairs and the modules trained in
    full.
    """
    paths = {path for path in state_leaves(state)} & adapter.tensors.keys()
    assert paths == adapter.tensors.keys(), (
        f"the model lacks {sorted(adapter.tensors.keys() - paths)}"
    )
    return fill(
        state,
        adapter.tensors,
        str(adapter.folder),
        progress=progress,
        skip=lambda path: path not in paths,
    )
