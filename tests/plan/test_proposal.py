"""A tuned proposal serves the run that it was tuned for, and no other."""

import copy
import json
from pathlib import Path

import pytest

from crossin_jax.config import Config, Data, Lora, Model, Optim, Train, UserError
from crossin_jax.models.spec import spec_from_architecture, spec_to_hf
from crossin_jax.plan.proposal import apply_proposal, write_proposal
from tests.helpers import config_in, small_architecture

# every setting that decides about the memory or time of a step, and another value of it
DECISIVE = {
    "lora.rank": 8,
    "lora.alpha": 3.0,
    "lora.dropout": 0.5,
    "lora.targets": ("q_proj",),
    "lora.modules_to_save": (),
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.released_code_compatible": True,
    "lora": None,
    "model.param_dtype": "bfloat16",
    "model.frozen_dtype": "float32",
    "model.compute_dtype": "float32",
    "data.length": 64,
    "train.batch_size": 32,
    "optim.name": "lion",
    "optim.moments_dtype": "bfloat16",
}
# every part of the architecture, as config.json has it
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "vocab_size": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5e5,
    "hidden_act": "gelu_pytorch_tanh",
    "model_type": "qwen2",
}
# what is tuned: (a value that the proposal sets, one that neither it nor the tuned run has)
TUNED = {
    "model.remat": ("full", "dots"),
    "model.attention": ("reference", "blocks"),
    "train.accumulation": (2, 4),
    "train.loss_chunk": (32, 64),
    "mesh.data": (4, 2),
    "mesh.fsdp": (4, 8),
    "mesh.tensor": (2, 8),
}
# what may differ: nothing of it changes the compiled step's size
FREE = {
    "name": "other",
    "seed": 9,
    "output_dir": "elsewhere",
    "optim.learning_rate": 0.5,
    "optim.weight_decay": 0.5,
    "optim.warmup_share": 0.5,
    "train.steps": 99,
    "train.log_every": 7,
    "train.keep": 9,
    "data.languages": ("en", "vi"),
    "data.tag": "none",
    "evaluation.shots": 3,
    "evaluation.batch_size": 3,
}


@pytest.fixture
def config(tmp_path) -> Config:
    """A run with adapters on a model of which there is config.json alone."""
    write_model(tmp_path / "model")
    return config_in(
        tmp_path,
        lora=Lora(rank=4),
        optim=Optim(),
        data=Data(length=128),
        train=Train(batch_size=16, steps=6),
        model=Model(path=str(tmp_path / "model")),
    )


def write_model(folder: Path, **changes) -> None:
    """Writes the shape of a small model."""
    folder.mkdir(exist_ok=True)
    values = spec_to_hf(spec_from_architecture(small_architecture(), 300)) | changes
    (folder / "config.json").write_text(json.dumps(values))


def change(config: Config, name: str, value: object) -> Config:
    """A copy with one setting changed."""
    config = copy.deepcopy(config)
    *parents, last = name.split(".")
    place = config
    for part in parents:
        place = getattr(place, part)
    setattr(place, last, value)
    return config


@pytest.fixture
def proposal(config, tmp_path):
    """Writes what the configuration should run with."""

    def write(settings: dict) -> str:
        write_proposal(tmp_path / "p.json", config, settings)
        return str(tmp_path / "p.json")

    return write


@pytest.mark.parametrize("name", DECISIVE)
def test_a_proposal_is_refused_where_a_decisive_setting_differs(name, config, proposal):
    path = proposal({"model.remat": "full"})
    assert apply_proposal(path, config).model.remat == "full"
    with pytest.raises(UserError, match=f"for another run: {name.partition('.')[0]}"):
        apply_proposal(path, change(config, name, DECISIVE[name]))


@pytest.mark.parametrize("name", SHAPE)
def test_a_proposal_is_refused_where_the_model_differs(name, config, proposal, tmp_path):
    path = proposal({"model.remat": "full"})
    write_model(tmp_path / "model", **{name: SHAPE[name]})
    with pytest.raises(UserError, match="was made for another run: [a-z_]*="):
        apply_proposal(path, config)


@pytest.mark.parametrize("name", FREE)
def test_a_setting_that_does_not_change_the_step_may_differ(name, config, proposal):
    """The configuration keeps it and takes the tuned settings."""
    other = change(config, name, FREE[name])
    assert apply_proposal(proposal({"model.remat": "full"}), other) == change(
        other, "model.remat", "full"
    )


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_setting_is_set_and_must_be_as_it_was_or_as_it_is_proposed(name, config, proposal):
    proposed, another = TUNED[name]
    path = proposal({name: proposed})
    tuned = change(config, name, proposed)
    assert tuned != config
    assert apply_proposal(path, config) == tuned  # nothing else changes
    assert apply_proposal(path, tuned) == tuned
    with pytest.raises(UserError, match=f"{name}={another!r}, tuned for"):
        apply_proposal(path, change(config, name, another))
    with pytest.raises(UserError, match=f"{name}={proposed!r}, tuned for"):
        apply_proposal(proposal({}), tuned)  # tuned as it was: another value is another run


def test_a_proposal_sets_all_that_it_holds(config, proposal):
    settings = {"model.remat": "full", "train.accumulation": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    expected = config
    for name, value in settings.items():
        expected = change(expected, name, value)
    assert apply_proposal(proposal(settings), config) == expected


def test_the_same_model_may_lie_in_another_folder(config, proposal, tmp_path):
    """What counts is the shape in config.json, not its place."""
    path = proposal({"model.remat": "full"})
    write_model(tmp_path / "moved")
    moved = change(config, "model.path", str(tmp_path / "moved"))
    assert apply_proposal(path, moved) == change(moved, "model.remat", "full")


@pytest.mark.parametrize("name", ["optim.learning_rate", "data.length", "seed", "lora.rank"])
def test_a_file_may_set_nothing_but_what_is_tuned(name, config, tmp_path):
    """An edited proposal cannot change the experiment."""
    write_proposal(tmp_path / "p.json", config, {name: 1})
    with pytest.raises(UserError, match=f"sets {name}, which is not tuned"):
        apply_proposal(tmp_path / "p.json", config)


def test_a_file_that_is_missing_is_named(config, tmp_path):
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        apply_proposal(tmp_path / "nowhere.json", config)


def test_a_proposal_that_makes_a_faulty_configuration_is_refused(config, proposal):
    """Settings are checked after they are set."""
    with pytest.raises(UserError, match=r"model\.remat"):
        apply_proposal(proposal({"model.remat": "everything"}), config)
