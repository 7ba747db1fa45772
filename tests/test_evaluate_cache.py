"""Finished parts of an evaluation: asked again after every change that could give other answers,
else not.
"""

import copy
import dataclasses
import functools
import json
import shutil
from contextlib import suppress

import numpy as np
import pytest

from crossin_jax.config import Config, Data, Evaluation, Lora, Model
from crossin_jax.data.pipeline import train_tokenizer
from crossin_jax.evaluate import evaluate
from crossin_jax.export import export
from crossin_jax.generation.engine import Engine
from tests.helpers import config_in

LANGUAGES = {"en": "English", "zh": "Chinese", "es": "Spanish"}


def questions() -> list[dict]:
    """Six items in three languages; the first four are asked, all six may be shots."""
    return [
        {
            "id": f"q{i}",
            "tags": ["first"] if i < 2 else [],
            **{
                name: {
                    "question": f"{name} {i}?",
                    "context": f"{name} text {i}",
                    "answer": i % 2,
                    "choices": [f"(A) {code} {i}", f"(B) {code} no"],
                }
                for code, name in LANGUAGES.items()
            },
        }
        for i in range(6)
    ]


class Place:
    """A benchmark file, a folder of results of each base, and the configurations that made them."""

    def __init__(self, folder, pretrained, adapted):
        self.folder, self.file, self.adapted = folder, folder / "own.json", adapted
        self.other_file, self.adapters = (
            folder / "more.json",
            [folder / "adapter6", folder / "adapter3"],
        )
        self.restore_file()
        self.other_file.write_text(json.dumps(questions()))
        for adapter, run in zip(
            self.adapters, (adapted, adapted / "checkpoints" / "3"), strict=True
        ):
            export(run, "peft", adapter)
        train_tokenizer(["Another text for another tokenizer"] * 3, 300, folder / "tokenizer")
        self.model = str(pretrained / "model")
        asks = Config(
            name="cached",
            seed=1,
            output_dir=str(folder / "unused"),
            model=Model(path=self.model, compute_dtype="float32"),
            data=Data(languages=("en", "es"), template="llama", system="Be brief."),
            evaluation=Evaluation(
                benchmarks=(str(self.file),),
                method="both",
                prompts=(1,),
                limit=4,
                temperature=0.7,
                max_new_tokens=4,
            ),
        )
        bare, shots = copy.deepcopy(asks), copy.deepcopy(asks)
        bare.evaluation = dataclasses.replace(bare.evaluation, benchmarks=("cross_world:dev",))
        shots.evaluation = dataclasses.replace(shots.evaluation, shots=1, temperature=0.0)
        run = config_in(adapted, self.model)
        run.evaluation = dataclasses.replace(run.evaluation, limit=2, method="generate")
        self.bases = {
            "ASKS": (asks, None),
            "BARE": (bare, None),
            "SHOTS": (shots, None),
            "RUN": (run, adapted),
            "BASE": (run, None),
        }

    def restore_file(self):
        self.file.write_text(json.dumps(questions()))


@pytest.fixture(scope="module")
def place(tmp_path_factory, pretrained, adapted):
    """Every base evaluated once."""
    found = Place(tmp_path_factory.mktemp("cache"), pretrained, adapted)
    for name, (config, checkpoint) in found.bases.items():
        assert count_asked(copy.deepcopy(config), checkpoint, found.folder / name) > 0
    return found


def count_asked(config, checkpoint, out, fails=()) -> int:
    """How many prompts the engine gets in an evaluation into a folder."""
    asked = []

    def score(engine, prompts, continuations, **_):
        asked.extend(prompts)
        return [np.arange(len(entry), dtype=float) for entry in continuations]

    def generate(engine, prompts, **_):
        if "generate" in fails:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return [[5] for _ in prompts]

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Engine, "score", score)
        patch.setattr(Engine, "generate", generate)
        evaluate(config, checkpoint, out)
    return len(asked)


@pytest.fixture
def asks_again(place, tmp_path):
    """(base, change) → the number of prompts asked after the change, in a copy of the base's
    results.
    """

    def run(base, change):
        config, checkpoint = copy.deepcopy(place.bases[base])
        shutil.copytree(place.folder / base, tmp_path / "out")
        try:
            checkpoint = change(place, config) or checkpoint
            return count_asked(config, checkpoint, tmp_path / "out")
        finally:
            place.restore_file()

    return run


def edit(**fields):
    """Changes the benchmark file: fields of the Spanish version of item `at`, or of the item
    itself.
    """

    def change(place, config):
        rows, changes = questions(), dict(fields)
        row = rows[changes.pop("at", 0)]
        row.update({key: changes.pop(key) for key in ("id", "tags") if key in changes})
        row["Spanish"].update(changes)
        place.file.write_text(json.dumps(rows))

    return change


def put(path, value):
    """Sets one field of the configuration; {file}, {other_file} and {tokenizer} are paths."""

    def change(place, config):
        *parents, last = path.split(".")
        section = functools.reduce(getattr, parents, config)
        setattr(section, last, fill(value, place))

    return change


def fill(value, place):
    """The value with the paths of the place in it."""
    if isinstance(value, tuple):
        return tuple(fill(entry, place) for entry in value)
    return (
        value.format(
            file=place.file, other_file=place.other_file, tokenizer=place.folder / "tokenizer"
        )
        if isinstance(value, str)
        else value
    )


def adapt(number):
    """Puts one of two adapters on the base."""

    def change(place, config):
        config.lora = Lora(rank=4, alpha=8.0, modules_to_save=(), path=str(place.adapters[number]))

    return change


def turn_around(place, config):
    """The benchmark file with its items in another order."""
    place.file.write_text(json.dumps(questions()[::-1]))


def edit_shots(place, config):
    """Another text of both items that are not asked: one of them is a shot of somebody."""
    rows = questions()
    for row in rows[4:]:
        row["Spanish"]["question"] = "¿Otra?"
    place.file.write_text(json.dumps(rows))


def merge(place, config):
    """The base with the adapter merged into it, in another folder."""
    model = place.folder / "merged"
    if not model.exists():
        export(place.adapted, "merged", model)
        (
            model / "prompt.json"
        ).unlink()  # it names the form of training, and these questions have another
    config.model.path = str(model)


ANEW = {
    # what answers
    "the precision of products": ("ASKS", put("model.compute_dtype", "bfloat16")),
    "the precision of weights": ("ASKS", put("model.param_dtype", "bfloat16")),
    # what the model is asked
    "a question": ("ASKS", edit(question="¿Otra?")),
    "a context": ("ASKS", edit(context="Otro.")),
    "a choice": ("ASKS", edit(choices=["(A) otra", "(B) es no"])),
    "the gold": ("ASKS", edit(answer=1)),
    "the last item's question": ("ASKS", edit(at=3, question="¿Otra?")),
    "an id": ("ASKS", edit(id="q9")),
    "tags": ("ASKS", edit(tags=["second"])),
    "the order of items": ("ASKS", turn_around),
    "a shot": ("SHOTS", edit(question="¿Otra?")),
    "a shot beyond the limit": ("SHOTS", edit_shots),
    "seed, which draws shots": ("SHOTS", put("seed", 2)),
    "seed of Cross-World": ("BARE", put("seed", 2)),
    "seed, which draws tokens": ("ASKS", put("seed", 2)),
    "data.tag": ("BARE", put("data.tag", "sentence")),
    "data.template": ("ASKS", put("data.template", "chatml")),
    "data.system": ("ASKS", put("data.system", "Be long.")),
    "no data.system": ("ASKS", put("data.system", None)),
    "data.tokenization": ("ASKS", put("data.tokenization", "apart")),
    "data.languages": ("ASKS", put("data.languages", ("en", "zh"))),
    "model.tokenizer": ("ASKS", put("model.tokenizer", "{tokenizer}")),
    # how it is asked
    **{
        f"evaluation.{name}": ("ASKS", put(f"evaluation.{name}", value))
        for name, value in {
            "benchmarks": ("{other_file}",),
            "languages": ("zh", "es"),
            "prompts": (2,),
            "shots": 1,
            "limit": 3,
            "max_new_tokens": 5,
            "temperature": 0.9,
            "top_k": 5,
            "top_p": 0.5,
            "cache_dtype": "float32",
        }.items()
    },
    "evaluation.template": ("ASKS", put("evaluation.template", "chatml")),
    # who is asked
    "an adapter on the base": ("ASKS", adapt(0)),
    "another base": ("ASKS", merge),
    "a run on the base": ("BASE", lambda place, config: place.adapted),
    "another step of the run": ("RUN", lambda place, config: place.adapted / "checkpoints" / "3"),
}


@pytest.mark.parametrize("what", ANEW)
def test_the_model_is_asked_anew_after_a_change(what, asks_again):
    """Answers are taken from an earlier evaluation only where they would come out the same."""
    assert asks_again(*ANEW[what]) > 0


def test_two_adapters_do_not_share_answers(place, tmp_path):
    """Base, first adapter, second adapter, into one folder: each is asked; a second time none."""
    counts = []
    for change in (None, adapt(0), adapt(1), None, adapt(0), adapt(1)):
        config = copy.deepcopy(place.bases["ASKS"][0])
        if change:
            change(place, config)
        counts.append(count_asked(config, None, tmp_path / "out"))
    assert min(counts[:3]) == max(counts[:3]) > 0 and counts[3:] == [0, 0, 0]


KEPT = {
    "nothing": lambda place, config: None,
    "name": put("name", "other"),
    "output_dir": put("output_dir", "runs/other"),
    "learning rate": put("optim.learning_rate", 1.0),
    "batch size of training": put("train.batch_size", 64),
    "held-out records": put("data.eval_sources", ()),
    "only one of the methods": put("evaluation.method", "generate"),
}


@pytest.mark.parametrize(
    ("base", "what"),
    [
        *(("ASKS", what) for what in KEPT),
        ("BARE", "nothing"),
        ("RUN", "nothing"),
        ("RUN", "output_dir"),
    ],
)
def test_what_is_finished_is_not_asked_again(base, what, asks_again):
    """A change that no answer depends on costs nothing."""
    assert asks_again(base, KEPT[what]) == 0


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [("prompts", (3, 1), 2), ("benchmarks", ("{other_file}", "{file}"), 2), ("method", "both", 1)],
)
def test_only_what_is_new_is_asked(field, value, parts, place, tmp_path):
    """Another prompt, benchmark or method is asked beside what is finished: 4 items in 2
    languages.
    """
    config = copy.deepcopy(place.bases["ASKS"][0])
    if field == "method":
        config.evaluation.method = "choices"
    count_asked(copy.deepcopy(config), None, tmp_path / "out")
    put(f"evaluation.{field}", value)(place, config)
    assert count_asked(config, None, tmp_path / "out") == parts * 4 * 2


def test_an_interrupted_evaluation_goes_on(place, tmp_path):
    """The choices were scored before the free answers were interrupted: only the latter are
    asked.
    """
    config = place.bases["ASKS"][0]
    assert count_asked(copy.deepcopy(config), None, tmp_path / "out", fails=("generate",)) == 8
    assert count_asked(copy.deepcopy(config), None, tmp_path / "out") == 8
    assert count_asked(copy.deepcopy(config), None, tmp_path / "out") == 0


@pytest.mark.parametrize("content", [b"", b"not gzip", None], ids=["empty", "text", "cut"])
def test_a_damaged_part_is_asked_again(content, place, tmp_path):
    """A file that does not read whole counts as not there, and is replaced."""
    shutil.copytree(place.folder / "ASKS", tmp_path / "out")
    for file in (tmp_path / "out" / "predictions").iterdir():
        file.write_bytes(file.read_bytes()[:-20] if content is None else content)
    config = place.bases["ASKS"][0]
    assert count_asked(copy.deepcopy(config), None, tmp_path / "out") == 16
    assert count_asked(copy.deepcopy(config), None, tmp_path / "out") == 0
