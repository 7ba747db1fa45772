"""Runs with tiny checkpoints whose trained weights all moved, made without training."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tokenizers
import transformers

from crossin_jax import config as settings
from crossin_jax.checkpoint.store import Store
from crossin_jax.config import Architecture, Component, Config, Model, Source
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.state import abstract_model, load_base, model_spec
from crossin_jax.training.step import TrainState
from tests.helpers import as_earlier_version
from tests.parity.families import quiet, tiny_config, torch_model

PROVENANCE = {
    "versions": {"jax": "1.2.3"},
    "manifest": "cafe0123",
    "template": "beef4567",
    "commit": "0a1b2c",
    "device": "8 x cpu (cpu)",
}
NEW = Architecture(
    width=32, ff_width=48, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64, vocab_size=300
)


def write_tokenizer(folder: Path, first: str = "w") -> Path:
    """A tokenizer of 60 words: w0, w1, … after three special tokens."""
    words = ["<pad>", "<s>", "</s>", *(f"{first}{i}" for i in range(57))]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(words)}, unk_token=f"{first}0"
        )
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def write_base(folder: Path, family: str) -> Path:
    """A base model of a family, with a tokenizer and settings of generation."""
    quiet(torch_model(tiny_config(family)).save_pretrained, folder)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 7}')
    return folder


def make_run(
    folder: Path,
    family: str | None = "llama3.1",
    lora: settings.Lora | None = None,
    *,
    steps: tuple[int, ...] = (0,),
    architecture: Architecture = NEW,
    **model,
) -> Config:
    """A run in `folder/run`, on a base in `folder/base` or (family None) from random weights.

    Every step has other weights and another data manifest. Returns the configuration.
    """
    if family:
        base = model.pop("path", None) or str(write_base(folder / "base", family))
        model = Model(path=base, **{"frozen_dtype": "float32", "compute_dtype": "float32"} | model)
    else:
        write_tokenizer(folder / "run/tokenizer")
        model = Model(compute_dtype="float32", architecture=architecture)
    config = Config(
        name="tiny",
        output_dir=str(folder / "run"),
        model=model,
        lora=lora,
    )
    config.train.keep = len(steps)
    config.data.sources = (Source(name="world"),)
    config.data.components = (Component(source="world", kind="x2x"),)
    devices, rng = make_mesh(settings.Mesh(), jax.devices()[:1]), np.random.default_rng(3)
    abstract = abstract_model(config, model_spec(config), devices)
    start = load_base(config, abstract.trainable)[0] if family else abstract.trainable

    def train(path, leaf):
        noise = 0.1 * rng.standard_normal(leaf.shape).astype(leaf.dtype)
        center = 1.0 if "norm" in str(path) or "magnitude" in str(path) else 0.0
        fresh = isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.device_put(noise + (center if fresh else np.asarray(leaf)))

    with Store(config.output_dir, config=config) as store:
        for step in steps:
            trainable = jax.tree_util.tree_map_with_path(train, start)
            state = TrainState(
                jax.numpy.int32(step), jax.numpy.bool_(True), trainable, abstract.frozen, {}
            )
            more = {"manifest": f"data-of-{step}"} if step else {}
            store.save(state, {}, PROVENANCE | more)
    return config


def read_trained(run: Path, step: int) -> dict[str, np.ndarray]:
    """The trained arrays that a checkpoint holds, by path, as Orbax alone reads them."""
    folder = run / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(folder).item_metadata.tree
        arrays = checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            ),
        )
    return {
        name.removeprefix("trainable/"): array
        for name, array in arrays.items()
        if name.startswith("trainable/")
    }


def edit_config(run: Path, step: int, section: str, **changes) -> None:
    """Changes settings in the configuration that a checkpoint stores, and takes its fingerprints
    away.
    """
    file = run / "checkpoints" / str(step) / "config/metadata"
    config = json.loads(file.read_text())
    config[section].update(changes)
    file.write_text(json.dumps(config))
    as_earlier_version(run)
