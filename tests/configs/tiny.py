"""A run of seconds: a tiny Llama from random weights, or an adapter on weights in a folder."""

from crossin_jax.config import (
    Architecture,
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


def get_config(variant: str = "pretrain") -> Config:
    """ "pretrain", or a folder of weights to adapt."""
    train = Train(
        steps=6,
        batch_size=8,
        log_every=1,
        checkpoint_every=3,
        keep=3,
        tensorboard=False,
        loss_chunk=16,
    )
    optim = Optim(learning_rate=1e-2, warmup_share=0.0)
    if variant == "pretrain":
        return Config(
            name="tiny",
            output_dir="runs/tiny",
            seed=1,
            train=train,
            optim=optim,
            model=Model(
                architecture=Architecture(
                    width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=400
                ),
                compute_dtype="float32",
            ),
            data=Data(
                sources=(Source(name="en", kind="world", split="text/en"),),
                length=32,
                languages=("en", "es"),
                components=(Component(kind="text", source="en"),),
            ),
        )
    return Config(
        name="tiny_lora",
        output_dir="runs/tiny_lora",
        seed=1,
        train=train,
        optim=optim,
        model=Model(path=variant, compute_dtype="float32", frozen_dtype="float32"),
        lora=Lora(rank=4, alpha=8.0, dropout=0.1, modules_to_save=()),
        data=Data(
            sources=(Source(name="facts", kind="world", split="train"),),
            length=128,
            languages=("en", "es"),
            components=(
                Component(kind="base", source="facts", share=0.5),
                Component(kind="x2x", source="facts", share=0.5),
            ),
            eval_sources=(Source(name="dev", kind="world", split="dev", limit=8),),
            template="plain",
            tag="sentence",
        ),
        evaluation=Evaluation(
            benchmarks=("cross_world:dev",),
            limit=6,
            batch_size=8,
            cache_dtype="float32",
            max_new_tokens=4,
            method="both",
        ),
    )
