"""Whether a configuration is allowed: types, limits and choices of every field, then what fields
mean together.
"""

import dataclasses

from crossin_jax.config import Config, Data, Optim, Settings, Source, UserError, hint
from crossin_jax.data.kinds import KINDS
from crossin_jax.files import check_value
from crossin_jax.languages import canonical, canonical_list


def check(config: Config) -> Config:
    """The configuration with canonical language codes; raises `UserError` at the first fault
    in it.
    """
    _check_settings(config)
    named = _name_languages(config)
    config = named if named != config else config
    _check_model(config)
    _check_data(config.data)
    for pattern, values in config.optim.groups.items():
        if not values or values.keys() - {"rate", "weight_decay"}:
            raise UserError(
                f"optim.groups[{pattern!r}]={values!r}: give 'rate' (a factor on the learning "
                "rate), 'weight_decay', or both, not negative"
            )
    if config.optim.name == "adafactor":
        for name in ("b1", "b2", "moments_dtype"):
            if getattr(config.optim, name) != getattr(Optim(), name):
                raise UserError(
                    f"optim.{name}={getattr(config.optim, name)}: adafactor keeps no first "
                    "moment and has a decay of its own; leave it out, or use adamw"
                )
    if config.train.batch_size % config.train.accumulation:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is not divisible by "
            f"train.accumulation={config.train.accumulation}; use a multiple of it"
        )
    if config.evaluation.untuned and config.model.path is None:
        raise UserError(
            "evaluation.untuned=True, but model.path is None: a model from random weights knows "
            "nothing before training\nleave evaluation.untuned out"
        )
    if config.train.benchmark_every and not config.evaluation.benchmarks:
        raise UserError(
            f"train.benchmark_every={config.train.benchmark_every}, but evaluation.benchmarks is "
            "empty"
        )
    return config


def _check_settings(section: Settings, prefix: str = "") -> None:
    """Every setting of a section, and of the sections in it, by its declaration."""
    for field in dataclasses.fields(section):
        path, value = f"{prefix}{field.name}", getattr(section, field.name)
        check_value(path, value, field.type, field.metadata)
        if isinstance(value, Settings):
            _check_settings(value, f"{path}.")
        elif isinstance(value, tuple):
            for i, entry in enumerate(value):
                if isinstance(entry, Settings):
                    _check_settings(entry, f"{path}[{i}].")


def _name_languages(config: Config) -> Config:
    """The configuration with each language by its one code: "English", "eng_Latn" and "en-US"
    become "en".
    """

    def rename(source: Source) -> Source:
        return dataclasses.replace(
            source, languages=canonical_list(source.languages, f"source {source.name!r}, languages")
        )

    data, evaluation = config.data, config.evaluation
    components = [
        dataclasses.replace(
            component,
            languages=dict(
                zip(
                    canonical_list(component.languages, f"data.components[{i}].languages"),
                    component.languages.values(),
                    strict=True,
                )
            ),
        )
        for i, component in enumerate(data.components)
    ]
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            languages=canonical_list(data.languages, "data.languages"),
            pivot=canonical(data.pivot, "data.pivot"),
            sources=tuple(map(rename, data.sources)),
            eval_sources=tuple(map(rename, data.eval_sources)),
            components=tuple(components),
        ),
        evaluation=dataclasses.replace(
            evaluation,
            languages=canonical_list(evaluation.languages, "evaluation.languages"),
        ),
    )


def _check_model(config: Config) -> None:
    model = config.model
    if (model.path is None) == (model.architecture is None):
        raise UserError(
            "model.path and model.architecture: set exactly one, "
            "a folder of weights or the shape of a new model"
        )
    if model.architecture and config.lora:
        raise UserError(
            "lora needs weights to adapt: set model.path, or lora=None to train a new model"
        )
    if model.architecture and model.architecture.num_heads % model.architecture.num_kv_heads:
        raise UserError(
            f"model.architecture.num_heads={model.architecture.num_heads} is not a multiple of "
            f"num_kv_heads={model.architecture.num_kv_heads}"
        )
    if config.lora is None and model.frozen_dtype in ("int8", "nf4"):
        raise UserError(
            f"model.frozen_dtype={model.frozen_dtype} needs frozen weights: set lora, or use "
            "bfloat16"
        )


def _check_data(data: Data) -> None:
    if not data.languages:
        raise UserError("data.languages is empty: name at least one language code, e.g. en")
    for source in (*data.sources, *data.eval_sources):
        if len(source.portion) != 2 or not 0 <= source.portion[0] < source.portion[1] <= 1:
            raise UserError(
                f"source {source.name!r}: portion={source.portion} is not a range; give two "
                "shares, e.g. (0.0, 0.9) to train on and (0.9, 1.0) to hold out"
            )
    for field, sources in (("eval_sources", data.eval_sources), ("sources", data.sources)):
        names = [source.name for source in sources]
        if len(set(names)) != len(names):
            raise UserError(f"data.{field}: names must differ, got {', '.join(names)}")
    for i, component in enumerate(data.components):
        if component.source not in names:
            raise UserError(
                f"data.components[{i}].source={component.source!r} is not among the sources "
                f"{', '.join(names) or '(none)'}{hint(component.source, names)}"
            )
        if component.kind not in KINDS:
            raise UserError(
                f"data.components[{i}].kind={component.kind!r} is not one of {', '.join(KINDS)}"
                f"{hint(component.kind, KINDS)}"
            )
        kind = KINDS[component.kind]
        if kind.needs_pivot and data.pivot not in data.languages:
            raise UserError(
                f"data.components[{i}]: kind {component.kind!r} needs the pivot language, but "
                f"data.pivot={data.pivot!r} is not in data.languages={data.languages}\n"
                "add it to data.languages, or set data.pivot to one of them"
            )
        for code in component.languages:
            if code not in data.languages:
                raise UserError(
                    f"data.components[{i}].languages: {code!r} is not in "
                    f"data.languages={data.languages}"
                )
        if component.tag is not None and component.tag not in kind.tags:
            raise UserError(
                f"data.components[{i}].tag={component.tag!r} has no effect on kind "
                f"{component.kind!r}; leave it out"
            )
        if component.template is not None and not kind.has_prompt:
            raise UserError(
                f"data.components[{i}].template has no effect on kind {component.kind!r}, which "
                "has no prompt; leave it out"
            )
    shares = [component.share for component in data.components]
    if any(share is not None for share in shares):
        if any(share is None for share in shares):
            raise UserError("data.components: give every component a share, or none of them")
        if abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"data.components: shares sum to {sum(shares):.6g}; they must sum to 1")
