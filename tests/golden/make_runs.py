"""Writes runs.tar.gz: what earlier versions wrote, for the tests that it is read, continued and
counted as before.

    PYTHONPATH=CHECKOUT python tests/golden/make_runs.py FOLDER

It was run at commit 4a0ee87. Run it again only with a version whose files users have; old fixtures
stay.
"""

import dataclasses
import json
import os
import platform
import sys
import tarfile
from pathlib import Path

import tests.conftest  # noqa: F401 - sets the suite's devices and compiler settings
from crossin_jax.config import Cell, Component, Config, Data, Source, Study, to_dict
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.pipeline import load_tokenizer
from crossin_jax.data.prompts import Renderer
from crossin_jax.data.templates import TEMPLATES
from crossin_jax.evaluate import evaluate, write_run
from crossin_jax.export import export
from crossin_jax.report.summary import Run
from crossin_jax.study.run import run_study, write_report
from crossin_jax.train import train
from tests.configs import tiny


def configure(variant: str, folder: str) -> Config:
    """The tiny configuration; all paths are relative to the folder of the fixtures."""
    return dataclasses.replace(tiny.get_config(variant), output_dir=folder)


def make_study() -> Study:
    """Two evaluated arms and a base model that they need."""
    start = configure("pretrain", "study/start")
    start.train = dataclasses.replace(start.train, steps=2, checkpoint_every=None)
    arms = [configure("study/start/model", f"study/{name}") for name in ("one", "two")]
    for config, name in zip(arms, ("one", "two"), strict=True):
        config.name = name
        config.train = dataclasses.replace(config.train, steps=1, checkpoint_every=None)
        config.evaluation = dataclasses.replace(config.evaluation, method="choices", limit=2)
    arms[1].optim = dataclasses.replace(arms[1].optim, learning_rate=1e-3)
    return Study(
        name="golden",
        output_dir="study",
        cells=(
            Cell(name="start", config=start, exports=True),
            *(Cell(name=config.name, config=config, needs=("start",)) for config in arms),
        ),
    )


def make_mixtures() -> list[dict]:
    """The manifest and the first examples of mixtures with every kind of component."""
    world = Source(name="facts", kind="world", split="train")
    text = Source(name="text", kind="world", split="text/en")
    every = tuple(
        Component(kind=kind, source="facts", count=40)
        for kind in ("base", "en2x", "x2en", "x2x", "same")
    )
    found = []
    for data in (
        Data(
            sources=(world, text),
            components=(*every, Component(kind="text", source="text", count=40)),
        ),
        Data(
            sources=(world,),
            components=(
                Component(kind="base", source="facts", share=0.5),
                Component(kind="trans", source="facts", share=0.5),
            ),
        ),
        Data(
            sources=(world,),
            components=(
                Component(
                    kind="x2x",
                    source="facts",
                    allow_same=True,
                    languages={"zh": 2.0, "vi": 1.0, "en": 1.0},
                ),
                Component(kind="en2x", source="facts", with_replacement=True, count=50),
            ),
        ),
        Data(
            sources=(world,),
            components=(
                Component(
                    kind="trans",
                    source="facts",
                    translate="x2en",
                    count=30,
                    translate_what="record",
                ),
            ),
            tag="sentence",
        ),
    ):
        mixture = Mixture(data, load_corpora(data, 3), 3)
        found.append(
            {
                "data": to_dict(data),
                "seed": 3,
                "manifest": mixture.manifest(),
                "examples": [
                    dataclasses.asdict(example) for example in mixture.take(list(range(60)))
                ],
            }
        )
    return found


def make_renderers() -> list[dict]:
    """Hashes and ids of every built-in template."""
    tokenizer = load_tokenizer("full/tokenizer")
    found = []
    for template in TEMPLATES:
        for system, tokenization in ((None, "joint"), ("Be brief.", "joint"), (None, "apart")):
            try:
                renderer = Renderer(tokenizer, template, system=system, tokenization=tokenization)
                ids = [
                    int(i)
                    for i in renderer.render_prompt("Name the river.", "It flows through Paris.")
                ]
            except ValueError:  # templates without a system prompt refuse one
                continue
            found.append(
                {
                    "template": template,
                    "system": system,
                    "tokenization": tokenization,
                    "hash": renderer.hash,
                    "prompt": ids,
                }
            )
    return found


def make_log() -> list[dict]:
    """Answers in SeaEval's layout: clear ones, ties, empty ones and unreadable ones."""
    answers = [
        "(A) red",
        "The answer is (B).",
        "",
        "blue, I think",
        "(C) green or (D) white",
        "no idea",
    ]
    languages = ("English", "Chinese", "Spanish")
    return [
        {
            "id": str(i),
            **{
                language: {
                    "question": f"Which colour has thing {i}?",
                    "choices": ["(A) red", "(B) blue", "(C) green", "(D) white"],
                    "answer": "(B) blue",
                    "model_prediction": answers[(i * (j + 1) + j) % len(answers)],
                }
                for j, language in enumerate(languages)
            },
        }
        for i in range(12)
    ]


def main(folder: Path) -> None:
    """Makes everything in the folder and packs it."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    full = train(configure("pretrain", "full"))
    export(full, "hf", "model")
    lora = train(configure("model", "lora"))
    export(lora, "peft", "adapter")
    config = configure("model", "lora")
    predictions, source = evaluate(config, lora, Path("lora/evaluation"))
    write_run(config, Run(config.name, config.seed, predictions, source), Path("lora/evaluation"))
    study = make_study()
    run_study(study)
    write_report(study)
    Path("study/cells.json").write_text(
        json.dumps(
            [dataclasses.asdict(cell) | {"config": to_dict(cell.config)} for cell in study.cells]
        )
    )
    Path("mixtures.json").write_text(json.dumps(make_mixtures(), ensure_ascii=False))
    Path("renderers.json").write_text(json.dumps(make_renderers()))
    Path("log.json").write_text(json.dumps(make_log()))
    code = os.system(
        f"{sys.executable} -m crossin_jax.score --log log.json --out score.json "
        "--alignments alignments.json > score.txt 2> errors.txt"
    )
    assert code == 0, Path("errors.txt").read_text()
    flags = next(
        (
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("flags")
        ),
        "",
    )
    Path("machine.json").write_text(
        json.dumps({"machine": platform.machine(), "flags": sorted(flags.split()[2:])})
    )
    with tarfile.open("runs.tar.gz", "w:gz") as archive:
        for path in sorted(Path().iterdir()):
            if path.name not in ("runs.tar.gz", "errors.txt"):
                archive.add(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
