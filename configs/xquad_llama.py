"""CrossIn's LoRA recipe on real data: XQuAD questions across languages, scored on Cross-MMLU and
Cross-LogiQA.

    python scripts/make_small_llama.py --tokenizer=TOKENIZER --out=models/small-llama
    python -m crossin_jax.train --config configs/xquad_llama.py:DATA
    python -m crossin_jax.evaluate --config configs/xquad_llama.py:DATA \\
        --checkpoint runs/xquad_llama

DATA holds xquad/xquad.LANG.json (google-deepmind/xquad) and seaeval/cross_mmlu.json,
seaeval/cross_logiqa.json (the rows of the Hub data sets SeaEval/cross_mmlu and cross_logiqa). Any
folder of weights in Hugging Face layout takes the place of the small one:
--config.model.path=FOLDER. That one has 2.6 M parameters and random weights, so scores stay at
chance; what the run shows is that the loss on held-out questions falls.
"""

from crossin_jax.config import (
    Component,
    Config,
    Data,
    Evaluation,
    Lora,
    Model,
    Optim,
    Source,
    Train,
)


def get_config(data: str = "data") -> Config:
    """`data` is the folder described above."""
    questions = {"kind": "squad", "path": f"{data}/xquad/xquad.{{lang}}.json"}
    return Config(
        name="xquad_llama",
        output_dir="runs/xquad_llama",
        model=Model(path="models/small-llama"),
        # The paper's: r=64, alpha=128, dropout 0.05, all projections, embeddings and head in full.
        lora=Lora(),
        data=Data(
            sources=(Source(name="xquad", portion=(0.0, 0.9), **questions),),
            components=(
                Component(kind="base", source="xquad"),
                Component(kind="en2x", source="xquad"),
                Component(kind="x2en", source="xquad"),
                Component(kind="x2x", source="xquad"),
            ),
            eval_sources=(Source(name="held_out", portion=(0.9, 1.0), limit=32, **questions),),
            languages=("en", "zh", "vi", "es"),
            template="alpaca",
            length=1024,
        ),
        optim=Optim(learning_rate=2e-4, warmup_share=0.03, weight_decay=0.01),
        train=Train(epochs=1.0, batch_size=16, eval_every=50, checkpoint_every=50),
        evaluation=Evaluation(
            benchmarks=(f"{data}/seaeval/cross_mmlu.json", f"{data}/seaeval/cross_logiqa.json"),
            method="both",
            prompts=(1,),
            max_new_tokens=16,
            batch_size=32,
        ),
    )
