"""A tuned way to run a configuration: `plan --tune` writes it, `train --tuned` takes it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from crossin_jax.checks import check
from crossin_jax.config import Config, UserError, to_dict
from crossin_jax.files import check_fields, read_json, write_whole
from crossin_jax.paths import as_path
from crossin_jax.training.state import model_spec

# Settings that decide the memory and the time of a step, beside the model and the tuned settings. A
# proposal is refused if one of them differs.
SIZES = (
    "lora",
    "model.param_dtype",
    "model.frozen_dtype",
    "model.compute_dtype",
    "data.length",
    "train.batch_size",
    "optim.name",
    "optim.moments_dtype",
)
# Settings that a proposal may change.
TUNED = (
    "model.remat",
    "model.attention",
    "train.accumulation",
    "train.loss_chunk",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


def replace_settings(config: Config, change: dict[str, Any]) -> Config:
    """The configuration with some settings replaced, e.g. {"model.remat": "full"}."""
    for name, value in change.items():
        section, field = name.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config


def write_proposal(path: str | Path, config: Config, change: dict[str, Any], **about: Any) -> None:
    """Writes the settings that `config` should run with, and what they were tuned for."""
    made_for = {"model": _describe_model(config)} | {
        name: _value(config, name) for name in (*SIZES, *TUNED)
    }
    write_whole(
        as_path(path),
        json.dumps({"settings": change, "made_for": made_for, **about}, indent=1) + "\n",
    )


def apply_proposal(path: str | Path, config: Config) -> Config:
    """The configuration with the settings of a proposal; `UserError` if it was made for another."""
    remedy = "give the file of plan --tune --out FILE"
    proposal = read_json(path, expect=dict, what="a proposal", remedy=remedy)
    change, made_for = proposal.get("settings"), proposal.get("made_for")
    is_proposal = isinstance(change, dict) and isinstance(made_for, dict)
    if not is_proposal or made_for.keys() - {"model", *SIZES, *TUNED}:
        raise UserError(
            f"--tuned={path}: not a proposal; give a file that `python -m crossin_jax.plan "
            "--tune --out FILE` wrote"
        )
    if set(change) - set(TUNED):
        raise UserError(
            f"--tuned={path} sets {', '.join(sorted(set(change) - set(TUNED)))}, which is not tuned"
        )
    model, wanted = _describe_model(config), made_for.pop("model", None) or {}
    check_fields({"model": wanted}, {"model": dict}, f"--tuned={path}")
    faults = [
        f"{name}={model.get(name)!r}, tuned for {wanted.get(name)!r}"
        for name in sorted({*model, *wanted})
        if model.get(name) != wanted.get(name)
    ]
    for name, value in made_for.items():
        mine = _value(config, name)
        if mine != value and not (name in change and mine == change[name]):
            faults.append(f"{name}={mine!r}, tuned for {value!r}")
    if faults:
        raise UserError(
            f"--tuned={path} was made for another run: {'; '.join(faults[:3])}\n"
            "tune this configuration (plan --tune, with the same --config), or leave --tuned out"
        )
    return check(replace_settings(config, change))


def _describe_model(config: Config) -> dict[str, Any]:
    """The architecture as plain JSON types."""
    # Not the path: the same model may be in another folder on another machine.
    return json.loads(json.dumps(dataclasses.asdict(model_spec(config)), default=str))


def _value(config: Config, name: str) -> Any:
    value: Any = to_dict(config)
    for part in name.split("."):
        value = value[part]
    return value
