"""The data and recipe that the CrossIn release's own code builds, traps included, for comparison
with ours.

    python -m crossin_jax.prepare build --config configs/paper/released_code.py:3000
    python -m crossin_jax.train --config configs/paper/released_code.py:3000 \\
        --config.model.path=FOLDER

The variant is the number of samples per mode: 3000, 6000, 15000, or all (as many as there are
rows). Needed beside it: data/alpaca/alpaca_{en,zh,vi,es}.json, parallel by position, and
data/platypus/platypus_en.json. What the released code does, each a setting here: rows drawn with
replacement, and the same rows and languages in all modes; no x2x; translation of the instruction
alone and only into English; the tag "\\n[zh]" made an input of its own where there is none; prompt
and answer tokenized apart; no adapter on q_proj. What stays ours: rows with an empty output are
dropped and counted, and examples over 4096 tokens are dropped instead of cut, since a cut one loses
its EOS or all of its answer. Rows are packed; what products give is kept for the backward pass, the
rest computed again. Scores of a 7B run were not repeated here.

What `plan` computes (jax 0.10.2, libtpu 0.0.52): with --config.mesh.fsdp=16 on a v5e-16 (v5e:4x4)
13.6 of 15.75 GiB per chip, at least 0.19 hours per 1,000 steps; with --config.mesh.fsdp=4 on a
v5p-8 (v5p:2x2x1) 52.2 of 95.73 GiB, 0.33.
"""

from crossin_jax.config import Component, Config, Data, Lora, Model, Optim, Source, Train, UserError


def get_config(size: str = "all") -> Config:
    """One data size of the release."""
    if size != "all" and not size.isdigit():
        raise UserError(
            f"configs/paper/released_code.py:{size}: give the samples per mode (3000, 6000, "
            "15000) or all"
        )
    count = None if size == "all" else int(size)
    drawn = {"source": "alpaca", "count": count, "with_replacement": True}
    return Config(
        name=f"released_code_{size}",
        seed=42,
        output_dir=f"runs/released_code_{size}",
        model=Model(path="models/Llama-2-7b-hf", remat="dots"),
        lora=Lora(released_code_compatible=True),
        data=Data(
            sources=(
                Source(name="platypus", path="data/platypus/platypus_en.json", languages=("en",)),
                Source(name="alpaca", path="data/alpaca", kind="folder", join="position"),
            ),
            components=(
                Component(kind="base", source="platypus"),
                Component(kind="en2x", **drawn),
                Component(kind="x2en", **drawn),
                Component(kind="trans", translate="x2en", **drawn),
            ),
            languages=("en", "zh", "vi", "es"),
            template="alpaca",
            tag="input_released",
            tokenization="apart",
            length=4096,
        ),
        optim=Optim(learning_rate=2e-4, schedule="cosine", warmup_share=0.03, weight_decay=0.01),
        train=Train(epochs=1.0, batch_size=16, checkpoint_every=100, keep=5),
    )
