"""The miniature study: does cross-lingual instruction tuning make a small model answer alike in
every language?

    ./scripts/quickstart.sh                                         (all of it, on a laptop)
    python -m crossin_jax.study --config configs/quickstart.py      (the same, installed)
    python -m crossin_jax.train --config configs/quickstart.py:x2x  (one arm, after the base model)
    python -m crossin_jax.study --config configs/quickstart.py --languages=en,zh,vi,es,id,ms,fil

A 0.8 M parameter Llama is pretrained from random weights on English-heavy text about the world's
territories; facts about half of them are stated in English only. The same base is then tuned by
LoRA at equal steps on English questions (english), on pairs of languages (x2x, and x2x_same where a
pair may be twice the same language), and on translated monolingual questions as control (mono).
Every arm answers the questions about the other territories in every language.
"""

from crossin_jax.config import (
    Architecture,
    Cell,
    Component,
    Config,
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
ROOT = "runs/quickstart"
ARMS = {
    "english": (),
    "x2x": (Component(kind="x2x", source="facts", share=0.5),),
    "x2x_same": (Component(kind="x2x", source="facts", share=0.5, allow_same=True),),
    "mono": (Component(kind="same", source="facts", share=0.5),),
}
# Shares of the pretraining lines; of its tokens they are .25, .15, .35 and .25, with four languages
# and with seven.
SLICES = {"en": 0.220, "x": 0.130, "dict": 0.432, "cs": 0.218}
SLICES_OF_SEVEN = {"en": 0.201, "x": 0.127, "dict": 0.461, "cs": 0.211}


def get_config(
    variant: str = "x2x", languages: tuple[str, ...] = LANGUAGES, seed: int = 0, root: str = ROOT
) -> Config:
    """One cell of the study: "pretrain" or an arm."""
    if variant == "pretrain":
        return pretraining(languages, seed, root)
    if variant not in ARMS:
        raise UserError(
            f"configs/quickstart.py:{variant}: choose pretrain or one of {', '.join(ARMS)}"
        )
    pairs = ARMS[variant]
    english = Component(kind="base", source="facts", share=0.5 if pairs else 1.0)
    return Config(
        name=variant,
        seed=seed,
        output_dir=f"{root}/seed{seed}/{variant}",
        model=Model(
            path=f"{root}/seed{seed}/pretrain/model",
            frozen_dtype="float32",
            compute_dtype="float32",
        ),
        lora=Lora(rank=16, alpha=32.0, dropout=0.0, modules_to_save=()),
        data=Data(
            sources=(Source(name="facts", kind="world", split="train"),),
            components=(english, *pairs),
            languages=languages,
            template="plain",
            tag="sentence",
            length=64,
        ),
        optim=Optim(learning_rate=6e-3, weight_decay=0.0, warmup_share=10 / 150),
        train=Train(
            steps=150, batch_size=32, log_every=50, checkpoint_every=None, tensorboard=False
        ),
        evaluation=Evaluation(
            benchmarks=("cross_world:held_out", "cross_world:held_out/opaque"),
            method="choices",
            batch_size=64,
        ),
    )


def get_study(
    languages: tuple[str, ...] = LANGUAGES, seeds: tuple[int, ...] = (0,), root: str = ROOT
) -> Study:
    """The base model and every arm, for every seed."""
    cells = []
    for seed in seeds:
        base = f"pretrain/{seed}"
        cells.append(Cell(name=base, config=pretraining(languages, seed, root), exports=True))
        cells += [
            Cell(name=f"{arm}/{seed}", config=get_config(arm, languages, seed, root), needs=(base,))
            for arm in ARMS
        ]
    return Study(name="The miniature study", output_dir=root, cells=tuple(cells))


def pretraining(languages: tuple[str, ...], seed: int, root: str) -> Config:
    """The base model, from random weights."""
    sources = tuple(Source(name=piece, kind="world", split=f"text/{piece}") for piece in SLICES)
    slices, vocab_size = (SLICES, 3000) if len(languages) <= 4 else (SLICES_OF_SEVEN, 4000)
    components = tuple(
        Component(kind="text", source=piece, share=share) for piece, share in slices.items()
    )
    return Config(
        name="pretrain",
        seed=seed,
        output_dir=f"{root}/seed{seed}/pretrain",
        model=Model(architecture=Architecture(vocab_size=vocab_size), compute_dtype="float32"),
        data=Data(sources=sources, components=components, languages=languages, length=64),
        optim=Optim(
            learning_rate=4e-3, b2=0.98, weight_decay=0.1, warmup_share=0.05, final_share=0.1
        ),
        train=Train(
            steps=1000, batch_size=32, log_every=100, checkpoint_every=None, tensorboard=False
        ),
    )
