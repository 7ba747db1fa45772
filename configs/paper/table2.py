"""The paper's comparison of mixtures on four base models, with translated monolingual data as the
control it lacks.

    python -m crossin_jax.study --config configs/paper/table2.py:16 --dry_run --topology=v5e:4x4
    python -m crossin_jax.study --config configs/paper/table2.py:16  (on every host of a v5e-16)
    python -m crossin_jax.study --config configs/paper/table2.py:4 --cells 0:33  (Llama 2, v5p-8)
    python -m crossin_jax.train --config configs/paper/table2.py:llama-2-7b/x2x/3000/16

The text after the colon is the number of chips: 16 for v5e-16 (v5e:4x4), 4 for v5p-8 (v5p:2x2x1; a
v5p-8 has eight cores on four chips). Needed beside it: models/Llama-2-7b-hf,
models/Mistral-7B-v0.1, models/gemma-2b, models/gemma-7b (for a dry run a folder with config.json is
enough); data/alpaca/alpaca_{en,zh,vi,es}.json, parallel by position;
data/platypus/platypus_en.json; the benchmarks come from the Hub.

Recipe of the release: LoRA r=64, alpha=128, dropout 0.05 on all seven projections, embed_tokens and
lm_head in full, AdamW, cosine, 3 % warm-up, weight decay 0.01, 16 examples a step of at most 4096
tokens, seed 42. Every arm has the English data whole, and "english" nothing else; an arm named
after a direction adds that many examples of it, "+trans" as many of translation, and mono as many
in the language of their question. So arms of one volume have equal examples but not more English
than "english"; --budget=examples=N or tokens=N gives every arm the same amount instead.

What `plan` computes per cell (jax 0.10.2, libtpu 0.0.52): HBM per chip with the longest rows, and
hours to train, from english to x2x+trans-all, if all rows were of the shortest bucket (1,024
tokens) and the chips at their peak: no run is as fast, and benchmarks come on top.

              v5e-16 (15.75 GiB)      v5p-8 (95.73 GiB)
  llama-2-7b  3.3 GiB, 0.09 to 0.47   11.9 GiB, 0.16 to 0.80
  mistral-7b  3.3 GiB, 0.10 to 0.49   12.4 GiB, 0.16 to 0.85
  gemma-2b    5.6 GiB, 0.03 to 0.18    8.7 GiB, 0.06 to 0.30
  gemma-7b    9.9 GiB, 0.11 to 0.59   15.6 GiB, 0.20 to 1.01

All 132 cells: 22.2 hours at least on a v5e-16, 38.1 on a v5p-8. Checkpoints take 14 to 33 GiB a
cell, 2.6 TiB in all.
"""

import math

from crossin_jax.config import (
    Cell,
    Component,
    Config,
    Data,
    Evaluation,
    Lora,
    Mesh,
    Model,
    Optim,
    Source,
    Study,
    Train,
    UserError,
)

LANGUAGES = ("en", "zh", "vi", "es")
MODELS = {  # folder and prompt template
    "llama-2-7b": ("models/Llama-2-7b-hf", "llama"),
    "mistral-7b": ("models/Mistral-7B-v0.1", "alpaca"),
    "gemma-2b": ("models/gemma-2b", "gemma"),
    "gemma-7b": ("models/gemma-7b", "gemma"),
}
VOLUMES = ("3000", "6000", "15000", "all")
# Of the published sets: one pass over the mixture is as many steps.
PLATYPUS_ROWS, ALPACA_ROWS = (
    24_926,
    52_002,
)
ARMS = {  # what is added to the English data
    "english": (),
    "english+trans": ("trans",),
    "en2x": ("en2x",),
    "x2en": ("x2en",),
    "x2x": ("x2x",),
    "en2x+trans": ("en2x", "trans"),
    "x2en+trans": ("x2en", "trans"),
    "x2x+trans": ("x2x", "trans"),
    "mono": ("same",),
}
ROOT = "runs/table2"


def get_config(variant: str = "llama-2-7b/x2x/3000/16") -> Config:
    """MODEL/ARM/VOLUME/CHIPS."""
    parts = variant.split("/")
    for part, known in zip(parts, (MODELS, ARMS, VOLUMES), strict=False):
        if part not in known:
            raise UserError(
                f"configs/paper/table2.py:{variant}: {part!r} is not one of {', '.join(known)}"
            )
    if len(parts) != 4 or not parts[3].isdigit():
        raise UserError(
            f"configs/paper/table2.py:{variant}: give MODEL/ARM/VOLUME/CHIPS, e.g. "
            "llama-2-7b/x2x/3000/16"
        )
    model, arm, volume, chips = parts
    count = None if volume == "all" else int(volume)
    folder, template = MODELS[model]
    examples = PLATYPUS_ROWS + len(ARMS[arm]) * (count or ALPACA_ROWS)
    name = f"{model}/{arm}" if arm == "english" else f"{model}/{arm}-{volume}"
    added = tuple(
        Component(kind=kind, source="alpaca", count=count, translate="x2en") for kind in ARMS[arm]
    )
    return Config(
        name=arm,
        seed=42,
        output_dir=f"{ROOT}/{name}",
        model=Model(path=folder, remat="full"),
        lora=Lora(),
        mesh=Mesh(fsdp=int(chips)),
        data=Data(
            sources=(
                Source(name="platypus", path="data/platypus/platypus_en.json", languages=("en",)),
                Source(name="alpaca", path="data/alpaca", kind="folder", join="position"),
            ),
            components=(Component(kind="base", source="platypus"), *added),
            languages=LANGUAGES,
            template=template,
            length=4096,
            packing=False,
        ),
        optim=Optim(learning_rate=2e-4, schedule="cosine", warmup_share=0.03, weight_decay=0.01),
        train=Train(steps=math.ceil(examples / 16), batch_size=16, checkpoint_every=100),
        evaluation=Evaluation(
            benchmarks=("cross_mmlu", "cross_logiqa", "cross_xquad"),
            method="generate",
            prompts=(1, 2, 3, 4, 5),
            batch_size=64,
        ),
    )


def get_study(chips: str = "16", seeds: tuple[int, ...] = (42,)) -> Study:
    """Every model, arm and volume; english stands in the table of every volume, trained once."""
    if not chips.isdigit():
        raise UserError(f"configs/paper/table2.py:{chips}: give the number of chips, 16 or 4")
    cells = []
    for model in MODELS:
        for seed in seeds:
            for arm in ARMS:
                for volume in VOLUMES if arm != "english" else ("all",):
                    config = get_config(f"{model}/{arm}/{volume}/{chips}")
                    config.seed = seed
                    if len(seeds) > 1:
                        config.output_dir += f"/seed{seed}"
                    stands = VOLUMES if arm == "english" else (volume,)
                    cells.append(
                        Cell(
                            name=config.output_dir.removeprefix(f"{ROOT}/"),
                            config=config,
                            tables=tuple(f"{model}, {each}" for each in stands),
                        )
                    )
    amounts = {volume: float(ALPACA_ROWS if volume == "all" else volume) for volume in VOLUMES}
    curves = {
        f"{model}, examples of each added kind": {
            amounts[volume]: f"{model}, {volume}" for volume in VOLUMES
        }
        for model in MODELS
    }
    return Study(
        name="Mixtures on four base models", output_dir=ROOT, cells=tuple(cells), curves=curves
    )
