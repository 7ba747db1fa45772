"""The miniature study: every arm, several seeds, and the question whether pairing languages is what
helps.

    python -m crossin_jax.study --config configs/mini_study.py --dry_run
    python -m crossin_jax.study --config configs/mini_study.py            (all of PARTS, in order)
    python -m crossin_jax.study --config configs/mini_study.py:question   (one part and its needs)
    python -m crossin_jax.train --config configs/mini_study.py:x2x        (one arm, after its base)

The model, its pretraining and its instruction data are those of configs/quickstart.py; tuning sees
half as many rows a step, so that the whole is affordable on two CPU cores. Scores are those of the
test territories (40 %), which nothing was chosen on; `:tuning` compares learning rates on the
development territories (10 %), which no table shows. docs/mini_study.md has the results, with
seconds per cell.

Parts: main (seven arms by LoRA), tag (pairs and control without one), full (by full fine-tuning),
volumes (25, 50 and 100 % of the pairs, at equal steps), question (how much the base knows of each
language, how strong the bridge between languages is, how long it is tuned), seven (languages),
beyond (what the paper leaves open), tuning (learning rates, on the development territories);
smallest (two languages, under a minute, for the tests) is not among "all". Without --seeds main and
tag have five seeds, the other parts three.
"""

import dataclasses
import re

from crossin_jax.config import (
    Architecture,
    Cell,
    Component,
    Config,
    Contrast,
    Data,
    Evaluation,
    Lora,
    Model,
    Optim,
    Source,
    Study,
    Train,
    UserError,
)
from crossin_jax.data.mixture import temper

FOUR, SEVEN = ("en", "zh", "vi", "es"), ("en", "zh", "vi", "es", "id", "ms", "fil")
# Not 0: the sketch that the settings come from chose them there.
SEEDS, FEWER = (
    (1, 2, 3, 4, 5),
    (1, 2, 3),
)
ROOT = "runs/mini_study"
STEPS = 150


def pairs(kind: str, share: float = 0.5, **more) -> Component:
    """Drawn from the pairs, which `volume` limits; English examples are always drawn from all
    facts.
    """
    return Component(kind=kind, source="pairs", share=share, **more)


ARMS = {
    "english": (),
    "en2x": (pairs("en2x"),),
    "x2en": (pairs("x2en"),),
    "x2x": (pairs("x2x"),),
    "x2x_same": (pairs("x2x", allow_same=True),),
    "trans": (pairs("x2x", 0.25), pairs("trans", 0.25)),
    "mono": (pairs("same"),),
}
SIZES = {"zh": 8.0, "vi": 1.0, "es": 4.0}  # as if one language had eight times the data of another
BEYOND = {  # what the paper leaves open, at equal budgets: options of `tuned`
    "x2x 3 : mono 1": {"components": (pairs("x2x", 0.375), pairs("same", 0.125))},
    "x2x 1 : mono 1": {"components": (pairs("x2x", 0.25), pairs("same", 0.25))},
    "x2x 1 : mono 3": {"components": (pairs("x2x", 0.125), pairs("same", 0.375))},
    "through English": {"components": (pairs("en2x", 0.25), pairs("x2en", 0.25))},
    "past English": {"components": (pairs("x2x", languages={"zh": 1.0, "vi": 1.0, "es": 1.0}),)},
    "mono, temperature 1": {"components": (pairs("same", languages=temper(SIZES, 1.0)),)},
    "mono, temperature 5": {"components": (pairs("same", languages=temper(SIZES, 5.0)),)},
    "x2x, no tag": {"components": ARMS["x2x"], "tag": "none"},
    "x2x, with embeddings": {"components": ARMS["x2x"], "modules": ("embed_tokens", "lm_head")},
    "x2x, full fine-tuning": {"components": ARMS["x2x"], "full": True},
}
CONTROLLED = ("x2x", "x2x_same", "mono")


@dataclasses.dataclass(frozen=True)
class Base:
    """A pretrained model: its languages, the bridge between them, and what it was told in each.

    `bridge`: the share of dictionary and code-switched lines, relative to the quickstart's. `told`:
    the part of the lines about training territories and continents in languages other than English,
    code-switched ones included.
    """

    languages: tuple[str, ...] = FOUR
    bridge: float = 1.0
    told: float = 1.0
    vocab_size: int = 3000

    @property
    def name(self) -> str:
        size = "" if self.languages == FOUR else f"{len(self.languages)}-languages-"
        return f"{size}bridge{round(100 * self.bridge)}-told{round(100 * self.told)}"

    def shares(self) -> dict[str, float]:
        """Of the pretraining lines; what a weaker bridge leaves goes to English and the other
        languages alike.
        """
        shares = (
            {"en": 0.220, "x": 0.130, "dict": 0.432, "cs": 0.218}
            if len(self.languages) <= 4
            else {"en": 0.201, "x": 0.127, "dict": 0.461, "cs": 0.211}
        )
        bridge = {piece: self.bridge * shares[piece] for piece in ("dict", "cs")}
        rest = (1 - sum(bridge.values())) / (shares["en"] + shares["x"])
        return {"en": rest * shares["en"], "x": rest * shares["x"], **bridge}

    def config(self, seed: int, root: str) -> Config:
        """Its pretraining."""
        sources = tuple(
            Source(
                name=piece,
                kind="world",
                split=f"text/{piece}",
                portion=(0.0, self.told if piece in ("x", "cs") else 1.0),
            )
            for piece in self.shares()
        )
        components = tuple(
            Component(kind="text", source=piece, share=share)
            for piece, share in self.shares().items()
        )
        return Config(
            name=self.name,
            seed=seed,
            output_dir=f"{root}/seed{seed}/{self.name}/pretrain",
            model=Model(
                architecture=Architecture(vocab_size=self.vocab_size), compute_dtype="float32"
            ),
            data=Data(sources=sources, components=components, languages=self.languages, length=64),
            optim=Optim(
                learning_rate=4e-3, b2=0.98, weight_decay=0.1, warmup_share=0.05, final_share=0.1
            ),
            train=Train(
                steps=1000,
                batch_size=32,
                log_every=100,
                checkpoint_every=250,
                keep=1,
                tensorboard=False,
            ),
        )


@dataclasses.dataclass(frozen=True)
class Smallest(Base):
    """A pretrained model of seconds: two languages, one relation."""

    languages: tuple[str, ...] = ("en", "zh")
    vocab_size: int = 1200

    @property
    def name(self) -> str:
        return "smallest"

    def shares(self) -> dict[str, float]:
        """More English, since there are few steps to learn it in."""
        return {"en": 0.35, "x": 0.15, "dict": 0.35, "cs": 0.15}

    def config(self, seed: int, root: str) -> Config:
        """Its pretraining."""
        config = super().config(seed, root)
        for source in config.data.sources:
            source.split += "/language"
        config.model.architecture = Architecture(width=96, ff_width=256, vocab_size=self.vocab_size)
        config.optim.learning_rate = 6e-3
        config.train = dataclasses.replace(config.train, steps=300, batch_size=16)
        return config


def tuned(
    arm: str,
    seed: int,
    root: str,
    base: Base = Base(),
    *,
    components: tuple[Component, ...] | None = None,
    full: bool = False,
    volume: float = 1.0,
    steps: int = STEPS,
    tag: str = "sentence",
    rate: float | None = None,
    modules: tuple[str, ...] = (),
    part: str = "test",
) -> Config:
    """An arm on a base model; `volume` is the part of the facts that pairs of languages are drawn
    from, `part` the territories and maybe the one relation that it is asked about."""
    components = ARMS[arm] if components is None else components
    asked, slash, relation = part.partition("/")
    split = f"train{slash}{relation}"
    asked_of = (
        (f"cross_world:{part}",)
        if relation
        else (f"cross_world:{part}", f"cross_world:{part}/opaque")
    )
    english = Component(kind="base", source="facts", share=0.5 if components else 1.0)
    sources = (
        Source(name="facts", kind="world", split=split),
        Source(name="pairs", kind="world", split=split, portion=(0.0, volume)),
    )
    folder = "-".join(
        filter(
            None,
            (
                re.sub("[ :,]+", "_", arm),
                "full" if full else "",
                f"volume{round(100 * volume)}" if volume < 1 else "",
                f"steps{steps}" if steps != STEPS else "",
                "dev" if asked == "dev" else "",
            ),
        )
    )
    return Config(
        name=arm,
        seed=seed,
        output_dir=f"{root}/seed{seed}/{base.name}/{folder}",
        model=Model(
            path=f"{root}/seed{seed}/{base.name}/pretrain/model",
            frozen_dtype="float32",
            compute_dtype="float32",
        ),
        lora=None if full else Lora(rank=16, alpha=32.0, dropout=0.0, modules_to_save=modules),
        data=Data(
            sources=sources,
            components=(english, *components),
            languages=base.languages,
            template="plain",
            tag=tag,
            length=64,
        ),
        optim=Optim(
            learning_rate=rate or (1e-3 if full else 6e-3),
            weight_decay=0.01 if full else 0.0,
            warmup_share=10 / 150,
        ),
        train=Train(
            steps=steps, batch_size=16, log_every=50, checkpoint_every=None, tensorboard=False
        ),
        evaluation=Evaluation(benchmarks=asked_of, method="choices", batch_size=64),
    )


def get_config(variant: str = "x2x", seed: int = SEEDS[0], root: str = ROOT) -> Config:
    """One arm of the main part, or "pretrain"."""
    if variant == "pretrain":
        return Base().config(seed, root)
    if variant not in ARMS:
        raise UserError(
            f"configs/mini_study.py:{variant}: choose pretrain or one of {', '.join(ARMS)}"
        )
    return tuned(variant, seed, root)


VOLUMES = (0.25, 0.5, 1.0)
PARTS = ("main", "tag", "full", "volumes", "question", "seven", "beyond", "tuning")
MORE = ("smallest",)
CONDITIONS = {  # of the question: base model and steps by table
    f"told {told:.0%}, bridge {bridge:.0%}, {steps} steps": (Base(bridge=bridge, told=told), steps)
    for told in (1.0, 0.1)
    for bridge in (1.0, 0.1)
    for steps in (STEPS, 40)
}


def get_study(
    part: str = "all",
    seeds: tuple[int, ...] | None = None,
    languages: tuple[str, ...] | None = None,
    root: str = ROOT,
) -> Study:
    """The parts named, joined by +; "all" are those of PARTS."""
    chosen = PARTS if part == "all" else tuple(part.split("+"))
    for name in chosen:
        if name not in (*PARTS, *MORE):
            raise UserError(
                f"configs/mini_study.py:{name}: choose all or some of {', '.join((*PARTS, *MORE))}"
            )
    cells: dict[str, Cell] = {}
    standard = Base(languages or FOUR)

    def add(table: str, arm: str, seed: int, base: Base = standard, **options) -> None:
        """An arm and the model it starts from; a cell that stands in several tables runs once."""
        start = base.config(seed, root)
        cells.setdefault(
            start.output_dir, Cell(name=f"{base.name}/{seed}", config=start, exports=True)
        )
        config = tuned(arm, seed, root, base, **options)
        name = config.output_dir.removeprefix(f"{root}/seed{seed}/")
        cell = cells.get(config.output_dir) or Cell(
            name=f"{name}/{seed}", config=config, needs=(f"{base.name}/{seed}",)
        )
        cells[config.output_dir] = dataclasses.replace(cell, tables=(*cell.tables, table))

    if "main" in chosen:
        for seed in seeds or SEEDS:
            for arm in ARMS:
                add("LoRA", arm, seed)
    if "tag" in chosen:
        for seed in seeds or SEEDS:
            add("no tag", "english", seed)
            for arm in CONTROLLED:
                add("no tag", f"{arm}, no tag", seed, components=ARMS[arm], tag="none")
    seeds = seeds or FEWER
    if "full" in chosen:
        for seed in seeds:
            for arm in ("english", *CONTROLLED):
                add("full fine-tuning", arm, seed, full=True)
    if "volumes" in chosen:
        for seed in seeds:
            for volume in VOLUMES:
                add(volume_table(volume), "english", seed)
                for arm in CONTROLLED:
                    add(volume_table(volume), arm, seed, volume=volume)
    if "question" in chosen:
        for seed in seeds:
            for table, (base, steps) in CONDITIONS.items():
                for arm in CONTROLLED:
                    add(table, arm, seed, base, steps=steps)
    if "seven" in chosen:
        for seed in seeds:
            for arm in ("english", *CONTROLLED):
                add("seven languages", arm, seed, Base(SEVEN, vocab_size=4000))
    if "smallest" in chosen:
        for seed in seeds:
            for arm in ("english", *CONTROLLED):
                add("smallest", arm, seed, Smallest(), steps=60, part="test/language")
    if "tuning" in chosen:
        for seed in seeds:
            for full, rates in ((False, (3e-3, 6e-3, 1.2e-2)), (True, (5e-4, 1e-3, 2e-3))):
                for rate in rates:
                    add(
                        "tuning, development territories",
                        f"x2x {'full' if full else 'LoRA'} {rate:g}",
                        seed,
                        components=ARMS["x2x"],
                        full=full,
                        rate=rate,
                        part="dev",
                    )
    if "beyond" in chosen:
        for seed in seeds:
            for arm in ("english", *CONTROLLED):
                add("beyond the paper", arm, seed)
            for arm, options in BEYOND.items():
                add("beyond the paper", arm, seed, **options)
    return Study(
        name="The miniature study",
        output_dir=root,
        cells=tuple(cells.values()),
        curves={
            "pairs drawn from this share of the facts, %": {
                100 * v: volume_table(v) for v in VOLUMES
            }
        },
        contrasts=(
            Contrast(
                title="Pairs of languages against translated monolingual data",
                control="mono",
                arms=("x2x", "x2x_same"),
                tables=tuple(CONDITIONS),
            ),
        ),
    )


def volume_table(volume: float) -> str:
    """The name of the table with the arms at this volume."""
    return f"{round(100 * volume)} % of the pairs"
