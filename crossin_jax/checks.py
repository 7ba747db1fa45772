"""Whether a configuration is allowed: types, limits and choices of every field, then what fields mean together."""

import math
import operator
import re
import typing
from collections.abc import Iterator
from typing import Any

from crossin_jax.config import Config, Data, Optim, UserError, hint, iterate_fields
from crossin_jax.languages import LANGUAGES

MAY_BE_EMPTY = ("data.system",)  # an empty system prompt replaces the one that a chat template has by default
PIVOT_KINDS = ("base", "en2x", "x2en", "trans")  # their examples have a side in `data.pivot`


def _allows(annotation: Any, value: Any) -> bool:
    """Whether a value, and each entry of a tuple, has the annotated type; an int is a float, a bool is not an int."""
    options = typing.get_args(annotation) if isinstance(annotation, type(int | None)) else (annotation,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return True
        if origin is int and isinstance(value, bool):
            continue
        if isinstance(value, origin):
            return origin is not tuple or all(_allows(typing.get_args(option)[0], entry) for entry in value)
    return False


def _numbers(value: Any) -> Iterator[float]:
    """Every float in a setting, also inside tuples and dictionaries."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple | list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _numbers(entry)


def check(config: Config) -> Config:
    """Returns the configuration if every field and combination is allowed; raises `UserError` at the first fault."""
    for path, value, field in iterate_fields(config):
        rules = field.metadata
        if not _allows(field.type, value):
            expected = field.type if typing.get_args(field.type) else field.type.__name__
            expected = str(expected).replace("crossin_jax.config.", "")
            raise UserError(f"{path}={value!r} is a {type(value).__name__}; it takes {expected}: {rules['doc']}")
        if value is None:
            continue
        if not all(map(math.isfinite, _numbers(value))):  # a comparison with nan is never true
            raise UserError(f"{path}={value!r} must be finite: {rules['doc']}")
        if value == "" and field.default != "" and path not in MAY_BE_EMPTY:
            raise UserError(f"{path} is empty: {rules['doc']}")
        for word, breaks in (("above", operator.le), ("at_least", operator.lt), ("at_most", operator.gt)):
            if word in rules and breaks(value, rules[word]):
                raise UserError(f"{path}={value} must be {word.replace('_', ' ')} {rules[word]}: {rules['doc']}")
        fits_form = "form" in rules and re.fullmatch(rules["form"], value)
        if "choices" in rules and value not in rules["choices"] and not fits_form:
            known = rules["choices"]
            raise UserError(f"{path}={value!r} is not one of {', '.join(known)}{hint(value, known)}"
                            + (f": {rules['doc']}" if "form" in rules else ""))
    _check_model(config)
    _check_data(config.data)
    for names, values in config.optim.groups.items():
        if not isinstance(values, dict) or not values or any(
                key not in ("rate", "weight_decay") or isinstance(value, bool) or not isinstance(value, int | float)
                or value < 0 for key, value in values.items()):
            raise UserError(f"optim.groups[{names!r}]={values!r}: give 'rate' (a factor on the learning rate), "
                            "'weight_decay', or both, not negative")
    if config.optim.name == "adafactor":
        for name in ("b1", "b2", "moments_dtype"):
            if getattr(config.optim, name) != getattr(Optim(), name):
                raise UserError(f"optim.{name}={getattr(config.optim, name)}: adafactor keeps no first moment and has "
                                "a decay of its own; leave it out, or use adamw")
    if config.train.batch_size % config.train.accumulation:
        raise UserError(f"train.batch_size={config.train.batch_size} is not divisible by "
                        f"train.accumulation={config.train.accumulation}; use a multiple of it")
    if config.train.benchmark_every and not config.evaluation.benchmarks:
        raise UserError(f"train.benchmark_every={config.train.benchmark_every}, but evaluation.benchmarks is empty")
    for number in config.evaluation.prompts:
        if number not in range(1, 6):
            raise UserError(f"evaluation.prompts={config.evaluation.prompts} names prompt {number}; SeaEval has 1 to 5")
    return config


def _check_model(config: Config) -> None:
    model = config.model
    if (model.path is None) == (model.architecture is None):
        raise UserError("model.path and model.architecture: set exactly one, "
                        "a folder of weights or the shape of a new model")
    if model.architecture and config.lora:
        raise UserError("lora needs weights to adapt: set model.path, or lora=None to train a new model")
    if model.architecture and model.architecture.num_heads % model.architecture.num_kv_heads:
        raise UserError(f"model.architecture.num_heads={model.architecture.num_heads} is not a multiple of "
                        f"num_kv_heads={model.architecture.num_kv_heads}")
    if config.lora is None and model.frozen_dtype in ("int8", "nf4"):
        raise UserError(f"model.frozen_dtype={model.frozen_dtype} needs frozen weights: set lora, or use bfloat16")


def _check_data(data: Data) -> None:
    if not data.languages:
        raise UserError("data.languages is empty: name at least one language code, e.g. en")
    if len(set(data.languages)) < len(data.languages):
        raise UserError(f"data.languages={data.languages} names a language twice; name each once")
    for code in data.languages:
        if code not in LANGUAGES:
            raise UserError(f"data.languages: {code!r} is not a known code{hint(code, LANGUAGES)}; "
                            f"known: {', '.join(LANGUAGES)}")
    for source in (*data.sources, *data.eval_sources):
        if len(source.portion) != 2 or not 0 <= source.portion[0] < source.portion[1] <= 1:
            raise UserError(f"source {source.name!r}: portion={source.portion} is no part; give two shares, "
                            "e.g. (0.0, 0.9) to train on and (0.9, 1.0) to hold out")
    for field, sources in (("eval_sources", data.eval_sources), ("sources", data.sources)):
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise UserError(f"data.{field}: names must differ, got {', '.join(names)}")
    for i, component in enumerate(data.components):
        if component.source not in names:
            raise UserError(f"data.components[{i}].source={component.source!r} is not among the sources "
                            f"{', '.join(names) or '(none)'}{hint(component.source, names)}")
        if component.kind in PIVOT_KINDS and data.pivot not in data.languages:
            raise UserError(f"data.components[{i}]: kind {component.kind!r} needs the pivot language, but "
                            f"data.pivot={data.pivot!r} is not in data.languages={data.languages}\n"
                            "add it to data.languages, or set data.pivot to one of them")
        for code in component.languages:
            if code not in data.languages:
                raise UserError(f"data.components[{i}].languages: {code!r} is not in data.languages={data.languages}")
        if component.tag is not None and (component.kind in ("trans", "text") or component.kind == "base" and
                                          component.tag not in ("none", "sentence")):
            raise UserError(f"data.components[{i}].tag={component.tag!r} has no effect on kind {component.kind!r}; "
                            "leave it out")
        if component.template is not None and component.kind == "text":
            raise UserError(f"data.components[{i}].template has no effect on kind 'text', which has no prompt; "
                            "leave it out")
    shares = [component.share for component in data.components]
    if any(share is not None for share in shares):
        if any(share is None for share in shares):
            raise UserError("data.components: give every component a share, or none of them")
        if abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"data.components: shares sum to {sum(shares):.6g}; they must sum to 1")
