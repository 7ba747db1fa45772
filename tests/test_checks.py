"""Every refused combination of settings is named, and its neighbours are accepted."""

import copy
import itertools

import pytest

from crossin_jax.checks import check
from crossin_jax.config import (
    TAGS,
    Architecture,
    Component,
    Config,
    Data,
    Lora,
    Model,
    Source,
    UserError,
    iterate_fields,
)

KINDS = ("base", "en2x", "x2en", "x2x", "same", "trans", "text")


def put(config: Config, changes: dict[str, object]) -> Config:
    """A copy with the fields at dotted paths set; numbers stand for entries of a list."""
    config = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.split(".")
        target = config
        for part in parents:
            target = target[int(part)] if part.isdigit() else getattr(target, part)
        setattr(target, last, value)
    return config


def adapts(changes: dict[str, object] | None = None) -> Config:
    """An adapter on weights in a folder, with changes by dotted path."""
    data = Data(
        sources=(Source(name="rows", path="rows.jsonl"),),
        eval_sources=(Source(name="dev", path="dev.jsonl"),),
        components=(Component(source="rows"), Component(kind="x2x", source="rows")),
    )
    return put(Config(model=Model(path="weights"), lora=Lora(), data=data), changes or {})


def new(changes: dict[str, object] | None = None) -> Config:
    """A new model from random weights."""
    return adapts(
        {"model.path": None, "model.architecture": Architecture(), "lora": None} | (changes or {})
    )


# ---- Single fields

FIELDS = {path: field for config in (adapts(), new()) for path, _, field in iterate_fields(config)}
LIMITED = [
    path
    for path, field in FIELDS.items()
    if {"above", "at_least", "at_most"} & field.metadata.keys()
]
CHOICES = [path for path, field in FIELDS.items() if "choices" in field.metadata]


def filled(field, number: float) -> object:
    """A value of the field with this number in it, however deep."""
    annotation = str(field.type)
    if annotation.startswith("tuple"):
        return (number,)
    if annotation.startswith("dict"):
        return {"*": {"rate": number}} if "dict" in annotation[4:] else {"zh": number}
    return number


def numbered(path: str) -> str:
    return path.replace("[", ".").replace("]", "")


@pytest.mark.parametrize("path", LIMITED)
def test_a_limit_is_the_last_value_that_is_allowed(path):
    """`at_least` and `at_most` allow their number, `above` only what is more."""
    field, config = FIELDS[path], new() if path.startswith("model.architecture") else adapts()
    is_whole = "float" not in str(field.type)
    step = 1 if is_whole else 1e-9
    for word, allowed, refused in (
        ("at_least", 0, -step),
        ("at_most", 0, step),
        ("above", step, 0),
    ):
        if word not in field.metadata:
            continue
        limit = field.metadata[word]
        value = filled(field, limit + refused)
        with pytest.raises(UserError) as error:
            check(put(config, {numbered(path): value}))
        assert str(error.value).startswith(
            f"{path}={value} must be {word.replace('_', ' ')} {limit}: "
        )
        assert str(error.value).endswith(field.metadata["doc"])
        try:
            check(put(config, {numbered(path): filled(field, limit + allowed)}))
        except UserError as combination:  # of several fields
            assert "must be" not in str(combination) or "must sum" in str(combination)


@pytest.mark.parametrize("path", CHOICES)
def test_every_choice_is_allowed_and_no_other(path):
    field = FIELDS[path]
    for choice in field.metadata["choices"]:
        try:
            check(adapts({numbered(path): filled(field, choice)}))
        except UserError as combination:
            assert "is not one of" not in str(combination)
        for wrong in (choice + "x", choice.upper(), f"{choice} "):
            with pytest.raises(UserError, match="is not one of") as error:
                check(adapts({numbered(path): filled(field, wrong)}))
            listed = ", ".join(field.metadata["choices"])
            start = f"{path}={filled(field, wrong)!r} is not one of {listed}"
            assert str(error.value).startswith(start)
    first = field.metadata["choices"][0]
    with pytest.raises(UserError, match=f"did you mean {first}"):
        check(adapts({numbered(path): filled(field, first + "x")}))


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("model.attention", "splash:1024", True),
        ("model.attention", "splash:1", True),
        ("model.attention", "splash:0", False),
        ("model.attention", "splash:", False),
        ("model.attention", "splash:1024x", False),
        ("model.attention", "cudnn:8", False),
        ("model.remat", "q", True),
        ("model.remat", "q+k+v+attention+output+gate+up+down", True),
        ("model.remat", "q+", False),
        ("model.remat", "q+full", False),
        ("model.remat", "qk", False),
        ("model.remat", "x+q", False),
    ],
)
def test_some_choices_have_a_form(path, value, allowed):
    config = adapts({path: value})
    if allowed:
        assert check(config) is config
    else:
        with pytest.raises(UserError, match="is not one of"):
            check(config)


# A field of each type that settings have
TYPED = {
    int: "train.log_every",
    int | None: "train.eval_every",
    float: "optim.learning_rate",
    float | None: "optim.clip_norm",
    bool: "train.tensorboard",
    str: "name",
    str | None: "data.system",
    tuple[str, ...]: "evaluation.benchmarks",
    tuple[int | str, ...]: "evaluation.prompts",
    tuple[float, ...]: "data.sources[0].portion",
    dict[str, float]: "data.components[1].languages",
}
# A value → the types whose fields take it
VALUES = [
    (1, [int, int | None, float, float | None]),
    (0.5, [float, float | None]),
    (True, [bool]),
    (None, [int | None, float | None, str | None]),
    ("a", [str, str | None]),
    ((), [tuple[str, ...], tuple[int | str, ...], tuple[float, ...]]),
    (("a", "b"), [tuple[str, ...], tuple[int | str, ...]]),
    ((1, 2), [tuple[int | str, ...], tuple[float, ...]]),
    ((1, 2.5), [tuple[float, ...]]),
    ((1, "a"), [tuple[int | str, ...]]),
    ((True,), []),
    ((None,), []),
    (["a"], []),
    ({}, [dict[str, float]]),
    ({"zh": 1.0}, [dict[str, float]]),
]


@pytest.mark.parametrize(("value", "takers"), VALUES, ids=[repr(value) for value, _ in VALUES])
@pytest.mark.parametrize("path", TYPED.values())
def test_a_field_takes_values_of_its_type_alone(path, value, takers):
    """A whole number counts as a number, a truth value as neither."""
    assert TYPED[FIELDS[path].type] == path
    annotation = FIELDS[path].type
    name = annotation.__name__ if annotation in (int, float, bool, str) else str(annotation)
    doc = FIELDS[path].metadata["doc"]
    refusal = f"{path}={value!r} is a {type(value).__name__}; it takes {name}: {doc}"
    try:
        check(adapts({numbered(path): value}))
    except UserError as error:  # also where a value of the right type is not allowed
        assert (str(error) == refusal) == (annotation not in takers)
    else:
        assert annotation in takers


# ---- Fields together


def refuse(changes: dict, message: str, *allowed: dict, base=adapts) -> tuple:
    """(the refused configuration, words of the message, its allowed neighbours)."""
    return base(changes), message, [base(changes | neighbour) for neighbour in allowed]


def component(**settings) -> dict:
    return {"data.components": (Component(source="rows", **settings),)}


def shares(*values: float | None) -> dict:
    return {"data.components": tuple(Component(source="rows", share=share) for share in values)}


def two_sources(field: str) -> tuple:
    return refuse(
        {f"data.{field}": (Source(name="rows"), Source(name="rows"))},
        f"data.{field}: names must differ, got rows, rows",
        {f"data.{field}": (Source(name="rows"), Source(name="other"))},
    )


def portion(field: str, name: str, value: tuple) -> tuple:
    path = f"data.{field}.0.portion"
    return refuse(
        {path: value},
        rf"source '{name}': portion=\(.*\) is not a range; give two shares",
        *({path: kept} for kept in ((0.0, 1.0), (0, 1), (0.0, 1e-9), (0.5, 0.75), (0.999, 1.0))),
    )


def groups(values: object, words: str) -> tuple:
    return refuse(
        {"optim.groups": {"*": values}},
        rf"optim.groups.*{words}",
        *(
            {"optim.groups": {"*": kept}}
            for kept in ({"rate": 0.0}, {"weight_decay": 1}, {"rate": 2.5, "weight_decay": 0})
        ),
    )


def adafactor(name: str, value: object, default: object) -> tuple:
    return refuse(
        {"optim.name": "adafactor", f"optim.{name}": value},
        f"optim.{name}={value}: adafactor keeps no first moment",
        {f"optim.{name}": default},
        *({"optim.name": other} for other in ("adamw", "lion", "muon")),
    )


def quantized(name: str) -> tuple:
    return refuse(
        {"lora": None, "model.frozen_dtype": name},
        f"model.frozen_dtype={name} needs frozen weights",
        {"lora": Lora()},
        {"model.frozen_dtype": "float32"},
        {"model.frozen_dtype": "bfloat16"},
    )


PORTIONS = (
    (0.5, 0.5),
    (0.9, 0.5),
    (-0.1, 0.5),
    (0.5, 1.1),
    (0.0, 0.0),
    (1.0, 1.0),
    (0.5,),
    (),
    (0.1, 0.2, 0.3),
)
TOGETHER = {
    "no weights": refuse(
        {"model.path": None},
        "model.path and model.architecture: set exactly one",
        {"model.path": "x"},
        {"model.architecture": Architecture(), "lora": None},
    ),
    "two kinds of weights": refuse(
        {"model.architecture": Architecture()}, "set exactly one", {"model.architecture": None}
    ),
    "adapter on a new model": refuse(
        {"lora": Lora()}, "lora needs weights to adapt", {"lora": None}, base=new
    ),
    "heads": refuse(
        {"model.architecture.num_kv_heads": 3},
        "num_heads=4 is not a multiple of num_kv_heads=3",
        *({"model.architecture.num_kv_heads": n} for n in (1, 2, 4)),
        base=new,
    ),
    "int8": quantized("int8"),
    "nf4": quantized("nf4"),
    "batch": refuse(
        {"train.batch_size": 10, "train.accumulation": 4},
        "train.batch_size=10 is not divisible by train.accumulation=4",
        *({"train.accumulation": n} for n in (1, 2, 5, 10)),
    ),
    "no benchmarks": refuse(
        {"train.benchmark_every": 5},
        "train.benchmark_every=5, but evaluation.benchmarks is empty",
        {"train.benchmark_every": None},
        {"evaluation.benchmarks": ("cross_mmlu",)},
    ),
    **{
        f"prompt {n}": refuse(
            {"evaluation.prompts": (1, n)},
            rf"prompts=\(1, {n!r}\) (must be at (least 1|most 5)|is not one of harness): SeaEval",
            {"evaluation.prompts": (1, 2, 3, 4, 5, "harness", "own.toml", "a/own.json")},
        )
        for n in (0, 6, -1, "harnes", "own.txt")
    },
    "language": refuse(
        {"data.languages": ("en", "zg")},
        "data.languages: 'zg' is not a known language; give a code such as fr",
        {"data.languages": ("en", "tr")},
    ),
    "sources": two_sources("sources"),
    "held-out sources": two_sources("eval_sources"),
    "source of a component": refuse(
        {"data.components.1.source": "rosw"},
        r"data.components\[1\].source='rosw' is not among the sources rows; did you mean rows\?",
        {"data.components.1.source": "rows"},
    ),
    "training on held-out rows": refuse(
        {"data.components.1.source": "dev"}, "'dev' is not among the sources rows"
    ),
    "language of a component": refuse(
        {"data.components.1.languages": {"zh": 1.0, "th": 1.0}},
        r"data.components\[1\].languages: 'th' is not in data.languages",
        {"data.components.1.languages": {"zh": 1.0, "vi": 0.0}},
        {"data.languages": ("en", "zh", "th")},
    ),
    **{
        f"portion of {field} {value}": portion(field, name, value)
        for value in PORTIONS
        for field, name in (("sources", "rows"), ("eval_sources", "dev"))
    },
    "template of text": refuse(
        component(kind="text", template="plain"),
        r"data.components\[0\].template has no effect on kind 'text'",
        *(component(kind=kind, template="plain") for kind in KINDS if kind != "text"),
    ),
    "some shares": refuse(
        shares(1.0, None), "give every component a share, or none", shares(None, None), shares(1.0)
    ),
    **{
        f"shares {values}": refuse(
            shares(*values),
            f"data.components: shares sum to {sum(values):.6g}; they must sum to 1",
            *(
                shares(*kept)
                for kept in ((1.0,), (0.1, 0.2, 0.7), (1 / 3,) * 3, (0.333333, 0.333333, 0.333334))
            ),
        )
        for values in ((0.5,), (0.5, 0.6), (0.5, 0.4), (0.9999,), (0.5, 0.50001))
    },
    **{
        f"optim.groups {values}": groups(values, words)
        for values, words in (
            ({}, "give 'rate'"),
            ({"rates": 1.0}, "give 'rate'"),
            ({"rate": -0.1}, "must be at least 0"),
            ({"weight_decay": -1}, "must be at least 0"),
            ({"rate": True}, r"it takes dict\[str, dict\[str, float\]\]"),
            ({"rate": "1"}, r"it takes dict\[str, dict\[str, float\]\]"),
            (1.0, r"it takes dict\[str, dict\[str, float\]\]"),
        )
    },
    "b1": adafactor("b1", 0.8, 0.9),
    "b2": adafactor("b2", 0.99, 0.999),
    "moments_dtype": adafactor("moments_dtype", "bfloat16", "float32"),
}


@pytest.mark.parametrize("fault", TOGETHER)
def test_settings_that_do_not_fit_are_refused_and_their_neighbours_are_not(fault):
    refused, message, allowed = TOGETHER[fault]
    for config in allowed:
        before = copy.deepcopy(config)
        assert check(config) is config and config == before
    with pytest.raises(UserError, match=message):
        check(refused)


@pytest.mark.parametrize(("kind", "tag"), [*itertools.product(KINDS, (None, *TAGS))])
def test_a_tag_is_refused_where_it_has_no_effect(kind, tag):
    """`trans` and `text` have none; of a base row only the sentence is a part."""
    config = adapts(component(kind=kind, tag=tag))
    if (
        tag is None
        or kind in ("en2x", "x2en", "x2x", "same")
        or kind == "base"
        and tag in ("none", "sentence")
    ):
        assert check(config) is config
    else:
        with pytest.raises(
            UserError, match=rf"components\[0\].tag='{tag}' has no effect on kind '{kind}'"
        ):
            check(config)


def test_programs_that_read_no_data_need_no_sources():
    assert check(Config(model=Model(path="weights"))) == Config(model=Model(path="weights"))
