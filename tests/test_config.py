"""Settings: documented, checked, saved and restored; faults name the field, the value and the
remedy.
"""

import copy
import dataclasses
import pickle
import re
import typing

import pytest

from crossin_jax.checks import check
from crossin_jax.config import (
    Architecture,
    Component,
    Config,
    Data,
    Evaluation,
    Lora,
    Mesh,
    Model,
    Optim,
    Source,
    Train,
    UserError,
    from_dict,
    iterate_fields,
    to_dict,
)
from crossin_jax.settings import Settings

# A study's own classes are frozen; a configuration has none of them.
SECTIONS = [
    cls
    for cls in Settings.__subclasses__()
    if cls.__module__ == Config.__module__ and not cls.__dataclass_params__.frozen
]


def example() -> Config:
    return Config(
        model=Model(path="weights"),
        lora=Lora(),
        data=Data(
            sources=(Source(name="a", path="a.jsonl"), Source(name="b", kind="world")),
            components=(
                Component(source="a", share=0.5),
                Component(kind="x2x", source="b", share=0.5, languages={"zh": 2.0}),
            ),
        ),
    )


def test_there_are_few_settings_and_each_says_what_it_is():
    leaves = [
        f
        for cls in SECTIONS
        for f in dataclasses.fields(cls)
        if not any(s.__name__ in str(f.type) for s in SECTIONS)
    ]
    assert len(leaves) < 110
    assert all(f.metadata.get("doc") for f in leaves)


def test_a_saved_configuration_comes_back_equal():
    assert from_dict(to_dict(example())) == example()


def test_every_limit_is_enforced():
    """Each number one step outside its range, and each choice misspelt, is refused with the field's
    name.
    """
    broken = 0
    for path, _, field in iterate_fields(example()):
        rules = field.metadata
        values = [
            rules[word] + sign for word, sign in (("at_least", -1), ("at_most", 1)) if word in rules
        ]
        values += [rules["above"]] if "above" in rules else []
        values += ["no such thing"] if "choices" in rules else []
        for value in values:
            config = example()
            is_float = "float" in str(field.type) and not isinstance(value, str)
            set_field(config, path, float(value) if is_float else value)
            with pytest.raises(UserError, match=re.escape(path)):
                check(config)
            broken += 1
    assert broken > 40


def set_field(config: Config, path: str, value: object) -> None:
    """Sets one leaf by its path from `iterate_fields`, such as data.components[0].share."""
    *parents, name = path.replace("[", ".[").split(".")
    target = config
    for part in parents:
        target = target[int(part[1:-1])] if part.startswith("[") else getattr(target, part)
    setattr(target, name, value)


def test_a_number_that_is_not_finite_is_refused_in_every_setting():
    """nan and inf pass no bound, also inside tuples and dictionaries."""
    tried = 0
    for path, value, field in iterate_fields(example()):
        if "float" not in str(field.type):
            continue
        for number in (float("nan"), float("inf"), float("-inf")):
            config, wrong = example(), number
            if isinstance(value, tuple):
                wrong = (0.0, number)
            elif isinstance(value, dict):
                wrong = {"*": {"rate": number}} if path == "optim.groups" else {"zh": number}
            set_field(config, path, wrong)
            with pytest.raises(UserError, match=re.escape(path)):
                check(config)
            tried += 1
    assert tried > 50


def test_an_empty_text_is_refused_where_it_means_nothing():
    """An empty choice, path or name is refused by its field; only defaults and the system prompt
    may be empty.
    """
    tried = 0
    for path, value, field in iterate_fields(example()):
        if "str" in str(field.type) and not isinstance(value, tuple | dict) and field.default != "":
            config = example()
            set_field(config, path, "")
            if path == "data.system":
                check(config)
                continue
            with pytest.raises(UserError, match=re.escape(path)):
                check(config)
            tried += 1
    assert tried > 25


@pytest.mark.parametrize("kind", ["base", "en2x", "x2en", "trans", "x2x", "same", "text"])
def test_a_pivot_outside_the_languages_is_refused_where_a_component_needs_it(kind):
    config = Config(
        model=Model(path="weights"),
        data=Data(
            sources=(Source(name="a", path="a.jsonl"),),
            components=(Component(kind=kind, source="a"),),
            languages=("es", "id"),
        ),
    )
    if kind in ("x2x", "same", "text"):
        check(config)
    else:
        with pytest.raises(UserError, match="data.pivot='en' is not in data.languages"):
            check(config)
    config.data.pivot = "es"
    check(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": Data(languages=())}, "data.languages is empty"),
        ({"data": Data(languages=("en", "zh", "en"))}, "names 'en' twice"),
        ({"model": Model()}, "set exactly one"),
        ({"model": Model(path="x", architecture=Architecture())}, "set exactly one"),
        ({"model": Model(architecture=Architecture()), "lora": Lora()}, "lora needs weights"),
        ({"model": Model(path="x", frozen_dtype="int8"), "lora": None}, "needs frozen weights"),
        ({"train": Train(batch_size=10, accumulation=4)}, "not divisible"),
        ({"evaluation": Evaluation(prompts=(6,))}, r"prompts=\(6,\) must be at most 5"),
        ({"data": Data(languages=("en", "zg"))}, "'zg' is not a known language"),
        (
            {"data": Data(sources=(Source(name="facts"),), components=(Component(source="fact"),))},
            "did you mean facts",
        ),
        (
            {
                "data": Data(
                    sources=(Source(name="a"),), components=(Component(source="a", share=0.4),)
                )
            },
            "must sum to 1",
        ),
        (
            {"data": Data(sources=(Source(name="a"), Source(name="a")))},
            "data.sources: names must differ",
        ),
        (
            {"data": Data(eval_sources=(Source(name="a"), Source(name="a")))},
            "data.eval_sources: names must differ, got a, a",
        ),
        ({"train": Train(steps=1.5)}, "train.steps=1.5 is a float"),
        ({"optim": Optim(groups={"*": {"rat": 0.1}})}, "give 'rate'"),
        ({"optim": Optim(groups={"*": {"rate": -0.1}})}, "groups=.* must be at least 0"),
        (
            {"optim": Optim(name="adafactor", moments_dtype="bfloat16")},
            "adafactor keeps no first moment",
        ),
        ({"mesh": Mesh(fsdp=True)}, "mesh.fsdp=True is a bool"),
    ],
)
def test_faults_say_what_and_why(change, words):
    with pytest.raises(UserError, match=words):
        check(dataclasses.replace(example(), **change))


def test_unknown_fields_name_the_nearest():
    values = to_dict(example())
    values["optim"]["learning_rat"] = 1.0
    with pytest.raises(
        UserError, match=r"optim.learning_rat is not a setting; did you mean optim.learning_rate\?"
    ):
        from_dict(values)


def test_annotations_are_types():
    for cls in SECTIONS:
        assert all(not isinstance(hint, str) for hint in typing.get_type_hints(cls).values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": 5}, "data=5 is a int; it takes Data"),
        ({"lora": True}, "lora=True is a bool; it takes Lora | None"),
        ({"data": Data(sources=Source(name="a"))}, "it takes tuple[Source, ...]"),
        ({"data": Data(sources=(Component(),))}, "it takes tuple[Source, ...]"),
        ({"data": Data(sources=(Source(fields={"input": 1}),))}, "fields={'input': 1} is a dict"),
        ({"lora": Lora(targets=("q_proj", "k_proj", "q_proj"))}, "names 'q_proj' twice"),
        ({"evaluation": Evaluation(prompts=(1, 2, 1))}, "names 1 twice"),
        ({"evaluation": Evaluation(languages=("en", "zh", "en"))}, "names 'en' twice"),
        ({"evaluation": Evaluation(languages=("en", ""))}, "is empty"),
        ({"output_dir": ""}, "output_dir='' is empty"),
        ({"output_dir": "a\0b"}, "has a character that cannot be stored in a file"),
        ({"name": "a\ud800"}, "has a character that cannot be stored in a file"),
        ({"seed": 2**32}, f"must be at most {2**32 - 1}"),  # JAX would take it for seed 0
        ({"train": Train(steps=2**31)}, f"must be at most {2**31 - 1}"),
        ({"optim": Optim(clip_norm=1e39)}, "must be at most"),  # infinite in float32
    ],
)
def test_a_value_that_breaks_its_declaration_is_refused(change, words):
    with pytest.raises(UserError, match=re.escape(words)):
        check(dataclasses.replace(example(), **change))


def test_a_message_stays_short_however_long_the_value():
    with pytest.raises(UserError) as error:
        check(dataclasses.replace(example(), model=Model(path="x", attention="v" * 100_000)))
    message = str(error.value)
    assert len(message) < 700 and message.startswith("model.attention=") and "kernel" in message


def test_copies_of_settings_are_settings():
    """Copies and pickles are made without a call of the constructor, which refuses unknown
    names.
    """
    for other in (copy.deepcopy(example()), pickle.loads(pickle.dumps(example()))):
        assert other == example()
        with pytest.raises(
            UserError, match=r"Config\.sede is not a setting; did you mean Config\.seed"
        ):
            other.sede = 3
