"""A tuned way to run a configuration: `plan --tune` writes it, `train --tuned` takes it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from crossin_jax.checks import check
from crossin_jax.config import Config, UserError, replace_settings, to_dict
from crossin_jax.outputs import write_whole
from crossin_jax.training.state import model_spec

# what decides how much memory and time a step takes, beside the model itself and what was tuned
SIZES = ("lora", "model.param_dtype", "model.frozen_dtype", "model.compute_dtype", "data.length", "train.batch_size",
         "optim.name", "optim.moments_dtype")
TUNED = ("model.remat", "model.attention", "train.accumulation", "train.loss_chunk", "mesh.data", "mesh.fsdp",
         "mesh.tensor")


def write_proposal(path: str | Path, config: Config, change: dict[str, Any], **about: Any) -> None:
    """Writes settings that `config` should run with, and what it was that they were tuned for."""
    made_for = {"model": _describe_model(config)} | {name: _value(config, name) for name in (*SIZES, *TUNED)}
    write_whole(Path(path), json.dumps({"settings": change, "made_for": made_for, **about}, indent=1) + "\n")


def apply_proposal(path: str | Path, config: Config) -> Config:
    """The configuration with the settings of a proposal; `UserError` where it was made for another one."""
    try:
        proposal = json.loads(Path(path).read_text())
        change, made_for = dict(proposal["settings"]), dict(proposal["made_for"])
    except OSError as error:
        raise UserError(f"--tuned={path}: {error.strerror}; give the file of plan --tune --out FILE") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"--tuned={path}: not a proposal; give a file that `python -m crossin_jax.plan --tune --out "
                        "FILE` wrote") from None
    if set(change) - set(TUNED):
        raise UserError(f"--tuned={path} sets {', '.join(sorted(set(change) - set(TUNED)))}, which is not tuned")
    model, wanted = _describe_model(config), made_for.pop("model", {})
    faults = [f"{name}={model.get(name)!r}, tuned for {wanted.get(name)!r}" for name in sorted({*model, *wanted})
              if model.get(name) != wanted.get(name)]
    for name, value in made_for.items():
        mine = _value(config, name)
        if mine != value and not (name in change and mine == change[name]):
            faults.append(f"{name}={mine!r}, tuned for {value!r}")
    if faults:
        raise UserError(f"--tuned={path} was made for another run: {'; '.join(faults[:3])}\n"
                        "tune this configuration: python -m crossin_jax.plan --tune, or leave --tuned out")
    return check(replace_settings(config, change))


def _describe_model(config: Config) -> dict[str, Any]:
    """The architecture as plain JSON types: the same model may lie in another folder on another machine."""
    return json.loads(json.dumps(dataclasses.asdict(model_spec(config)), default=str))


def _value(config: Config, name: str) -> Any:
    value: Any = to_dict(config)
    for part in name.split("."):
        value = value[part]
    return value
