"""The paper's question asked of a small real model: which pairs of languages help, on XQuAD?

    scripts/real_models.sh smollm2-135m
    python -m crossin_jax.prepare preview --config configs/real_study.py
    python -m crossin_jax.prepare cross_xquad --config configs/real_study.py --source test \\
        --out data/real_study/cross_xquad.json
    python -m crossin_jax.train --config configs/real_study.py          (the arm x2x alone)
    python -m crossin_jax.study --config configs/real_study.py:smollm2-135m --seeds 1 --dry_run
    python -m crossin_jax.study --config configs/real_study.py:smollm2-135m --seeds 1

The study's argument is MODEL or MODEL,DATA. DATA is a folder (default "data/real_study") with
xquad/xquad.LANG.json (google-deepmind/xquad), cross_xquad.json (made by the command above),
bmlama17/LANG.tsv (Betswish/Cross-Lingual-Consistency), and seaeval/cross_mmlu.json,
seaeval/cross_logiqa.json (rows of the Hub data sets SeaEval/cross_mmlu and SeaEval/cross_logiqa).

XQuAD is split by article, so that no paragraph is on both sides: 70 % train, 10 % are for choosing
settings, 20 % are the benchmark. All arms see the same number of tokens; half of them are English,
except in `english`, where all are. The untuned model is a row of every table.
"""

from crossin_jax.config import (
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

LANGUAGES = ("en", "zh", "vi", "es")
# model: its template. SmolLM2 is tuned to chat, Gemma 3 270M is a base model.
MODELS = {"smollm2-135m": "chat", "gemma-3-270m": "alpaca"}
DATA = "data/real_study"
ROOT = "runs/real_study"
PORTIONS = {"train": (0.0, 0.7), "dev": (0.7, 0.8), "test": (0.8, 1.0)}
SEEDS = (1, 2, 3)


def pairs(kind: str, share: float = 0.5, **more) -> Component:
    """Examples of one direction; the rest of the arm is English."""
    return Component(kind=kind, source="train", share=share, **more)


# The first four are the smallest study that can answer the question: `--cells 0:4`.
ARMS = {
    "english": (),
    "x2x": (pairs("x2x"),),
    "mono": (pairs("same"),),
    "x2x_same": (pairs("x2x", allow_same=True),),
    "en2x": (pairs("en2x"),),
    "x2en": (pairs("x2en"),),
    "x2x_trans": (pairs("x2x", 0.25), pairs("trans", 0.25)),
}


def xquad(name: str, data: str, limit: int | None = None) -> Source:
    """A part of XQuAD, of whole articles; `limit`: how many of its questions."""
    return Source(
        name=name,
        kind="squad",
        path=f"{data}/xquad/xquad.{{lang}}.json",
        portion=PORTIONS[name],
        limit=limit,
        fields={"group": "article"},
    )


def get_config(
    model: str = "smollm2-135m",
    data: str = DATA,
    *,
    arm: str = "x2x",
    seed: int = SEEDS[0],
    root: str = ROOT,
) -> Config:
    """One arm on one of the models."""
    if model not in MODELS:
        raise UserError(f"configs/real_study.py:{model}: choose one of {', '.join(MODELS)}")
    english = Component(kind="base", source="train", share=0.5 if ARMS[arm] else 1.0)
    files = ("cross_xquad.json", "bmlama17", "seaeval/cross_mmlu.json", "seaeval/cross_logiqa.json")
    return Config(
        name=arm,
        seed=seed,
        output_dir=f"{root}/{model}/seed{seed}/{arm}",
        model=Model(path=f"models/{model}"),
        lora=Lora(rank=16, alpha=32.0, modules_to_save=()),
        data=Data(
            # `test` is only named for `prepare cross_xquad`: no component draws from it.
            sources=(xquad("train", data), xquad("test", data)),
            components=(english, *ARMS[arm]),
            eval_sources=(xquad("dev", data, limit=16),),
            languages=LANGUAGES,
            template=MODELS[model],
            length=1024,
        ),
        optim=Optim(learning_rate=5e-4, warmup_share=0.1),
        train=Train(steps=60, batch_size=2, log_every=5, checkpoint_every=None, tensorboard=False),
        evaluation=Evaluation(
            benchmarks=tuple(f"{data}/{file}" for file in files),
            method="choices",
            prompts=(1,),
            limit=100,
            batch_size=16,
            over_long="skip",
            untuned=True,
        ),
    )


def get_study(
    model: str = "smollm2-135m",
    data: str = DATA,
    *,
    seeds: tuple[int, ...] | None = None,
    root: str = ROOT,
) -> Study:
    """All arms; `--seeds 1` and `--cells` choose fewer."""
    return Study(
        name=f"Pairs of languages on XQuAD, {model}",
        output_dir=f"{root}/{model}",
        cells=tuple(
            Cell(
                name=f"{arm}/{seed}",
                config=get_config(model, data, arm=arm, seed=seed, root=root),
                tables=("main",),
            )
            for seed in seeds or SEEDS
            for arm in ARMS
        ),
        contrasts=(
            Contrast(
                title="Pairs of languages against monolingual data",
                control="mono",
                arms=("x2x", "x2x_same"),
                tables=("main",),
            ),
        ),
    )
