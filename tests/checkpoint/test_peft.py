"""PEFT adapters: their logits are ours, ours are theirs, and a round trip keeps every bit."""

import dataclasses
import json
import re
import shutil

import huggingface_hub
import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from crossin_jax.checkpoint.hf import load_weights, read_spec, state_leaves
from crossin_jax.checkpoint.hf_map import adapter_keys, saved_keys
from crossin_jax.checkpoint.open import open_model
from crossin_jax.checkpoint.peft import CONFIG, WEIGHTS, load_adapter, read_adapter
from crossin_jax.checkpoint.save import save_adapter
from crossin_jax.config import Config, Lora, Mesh, Model, UserError
from crossin_jax.generation.model import load_model
from crossin_jax.models.lora import resolve
from crossin_jax.models.spec import spec_from_hf
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import abstract_model, abstract_state, model_spec, start_state
from tests.checkpoint.abstract import abstract_transformer
from tests.checkpoint.checkpoints import LLAMA
from tests.parity.adapters import ADAPTERS, load_peft, logits_of, make_adapter
from tests.parity.families import quiet, tiny_config

TOKENS = np.random.default_rng(0).integers(3, 97, (2, 24))


def load_state(base, adapter, lora=None):
    """(adapter file, state) of an adapter on its base."""
    file = read_adapter(adapter, read_spec(base), lora)
    _, state = abstract_transformer(file.spec, None, lora=file.lora, frozen_dtype="float32")
    state = load_weights(base, state, progress=False)
    return file, load_adapter(file, state, progress=False)


def add_base(adapter, base):
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))


@pytest.mark.parametrize("name", ADAPTERS)
def test_both_ways(tmp_path, name):
    base, adapter = make_adapter(tmp_path, name)
    add_base(adapter, base)
    wanted = logits_of(load_peft(base, adapter), TOKENS)
    ours = load_model(adapter, progress=False)
    assert np.abs(np.asarray(ours(TOKENS)) - wanted).max() <= 2e-4
    plain = load_model(base, progress=False)
    assert np.abs(np.asarray(plain(TOKENS)) - wanted).max() > 0.1  # the adapter matters

    file, state = load_state(base, adapter)
    save_adapter(
        tmp_path / "out",
        file.spec,
        file.lora,
        state,
        base=str(base),
        card="# Card\n",
        progress=False,
    )
    before, after = load_file(adapter / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {n: a.shape for n, a in after.items()} == {n: a.shape for n, a in before.items()}
    assert all(after[n].tobytes() == before[n].tobytes() for n in before)
    np.testing.assert_array_equal(logits_of(load_peft(base, tmp_path / "out"), TOKENS), wanted)

    old, new = (json.loads((folder / CONFIG).read_text()) for folder in (adapter, tmp_path / "out"))
    for field in (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "bias",
        "peft_type",
        "task_type",
        "base_model_name_or_path",
    ):
        assert new[field] == old[field], field
    assert sorted(new["target_modules"]) == sorted(old["target_modules"])
    assert new.get("ensure_weight_tying", False) == old["ensure_weight_tying"]


@pytest.mark.parametrize(
    "name, tied",
    [
        ("tied_kept", True),
        ("tied_broken", False),
        ("tied_head_only", False),
        ("tied_embedding_only", False),
        ("tied_frozen", True),
    ],
)
def test_an_adapter_says_whether_tied_embeddings_stay_tied(tmp_path, name, tied):
    base, adapter = make_adapter(tmp_path, name)
    file, state = load_state(base, adapter)
    assert read_spec(base).tie_embeddings and file.spec.tie_embeddings is tied
    leaves = state_leaves(state)
    assert ("lm_head/weight" in leaves) is not tied
    if name == "tied_embedding_only":  # the head stays the base's embedding
        np.testing.assert_array_equal(
            np.asarray(leaves["lm_head/weight"]),
            load_file(base / "model.safetensors")["model.embed_tokens.weight"],
        )


@pytest.mark.parametrize("modules", [("embed_tokens", "norm"), ()])
def test_an_adapter_for_the_text_part_of_a_multimodal_model(tmp_path, modules):
    text = tiny_config("gemma3")
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    quiet(model.save_pretrained, tmp_path / "base")
    plain = load_model(tmp_path / "base", progress=False)
    assert np.abs(np.asarray(plain(TOKENS)) - logits_of(model, TOKENS)).max() <= 2e-4

    lora = resolve(Lora(rank=3, alpha=6.0, modules_to_save=modules), plain.spec)
    _, state = abstract_transformer(plain.spec, None, lora=lora, frozen_dtype="float32")
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: (
            leaf
            if isinstance(leaf, jax.Array)
            else 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
        ),
        load_weights(tmp_path / "base", state, progress=False),
    )
    save_adapter(
        tmp_path / "out",
        plain.spec,
        lora,
        state,
        base=str(tmp_path / "base"),
        multimodal=True,
        progress=False,
    )
    ours = np.asarray(load_model(tmp_path / "out", progress=False)(TOKENS))
    assert np.abs(ours - np.asarray(plain(TOKENS))).max() > 0.01
    with_adapter = quiet(peft.PeftModel.from_pretrained, model, tmp_path / "out")
    assert np.abs(ours - logits_of(with_adapter, TOKENS)).max() <= 2e-4
    assert not any(
        "lora" in name for name, _ in with_adapter.named_parameters() if "vision" in name
    )


@pytest.mark.parametrize("name", ["two_targets", "tied_broken", "dora"])
def test_a_run_continues_from_an_adapter(tmp_path, name):
    base, adapter = make_adapter(tmp_path, name)
    file = read_adapter(adapter, read_spec(base))
    config = Config(
        model=Model(path=str(base), frozen_dtype="float32", compute_dtype="float32"),
        lora=dataclasses.replace(file.lora, dropout=0.2),
    )
    logits = np.asarray(start_model(config)(TOKENS))
    assert np.abs(logits - logits_of(load_peft(base, adapter), TOKENS)).max() <= 2e-4


def test_new_dora_adapters_start_from_the_base(tmp_path):
    base, _ = make_adapter(tmp_path, "dora")
    config = Config(
        model=Model(path=str(base), frozen_dtype="float32", compute_dtype="float32"),
        lora=Lora(rank=2, use_dora=True),
    )
    wanted = np.asarray(load_model(base, progress=False)(TOKENS))
    np.testing.assert_allclose(np.asarray(start_model(config)(TOKENS)), wanted, atol=2e-4)


def start_model(config):
    """The model of a run before its first step."""
    mesh, optimizer = make_mesh(Mesh(), jax.devices()[:1]), make_optimizer(config.optim, 1)
    model = abstract_model(config, model_spec(config), mesh)
    state = start_state(config, model, abstract_state(model, optimizer, mesh), optimizer)
    return nnx.merge(model.graphdef, state.trainable, state.frozen)


def test_settings_that_contradict_the_adapter_come_with_the_ones_that_do_not(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    right = Lora(
        rank=4, alpha=12.0, targets=("down_proj", "q_proj"), modules_to_save=(), dropout=0.3
    )
    file, _ = load_state(base, adapter, right)
    assert file.lora.dropout == 0.3 and file.lora.path == str(adapter)
    with pytest.raises(UserError) as error:
        load_state(base, adapter, Lora())
    assert str(error.value).split("\n")[1] == (
        "--config.lora.rank=4 --config.lora.alpha=12.0 --config.lora.targets=q_proj,down_proj "
        "--config.lora.modules_to_save=()"
    )


def test_tied_modules_count_under_either_name(tmp_path):
    base, adapter = make_adapter(tmp_path, "tied_kept")
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for modules in (("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")):
        load_state(
            base, adapter, Lora(rank=4, alpha=12.0, targets=targets, modules_to_save=modules)
        )


def test_misfits_are_listed_with_shapes(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    tensors = load_file(adapter / WEIGHTS)
    prefix = "base_model.model.model.layers."
    del tensors[prefix + "0.self_attn.q_proj.lora_A.weight"]
    tensors[prefix + "1.mlp.down_proj.lora_B.weight"] = np.zeros((48, 5), np.float32)
    tensors["lm_head.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(UserError) as error:
        load_state(base, adapter)
    assert str(error.value).split("\n")[1:] == [
        f"missing: {prefix}0.self_attn.q_proj.lora_A.weight (4, 48); "
        f"shape: {prefix}1.mlp.down_proj.lora_B.weight (48, 5) in the file, (48, 4) expected; "
        "unknown: lm_head.weight (2, 2)",
    ]


# ---- every key of adapter_config.json

# What peft applies to the model and so do we, or what the tensors in the file say as well.
OBEYED = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "ensure_weight_tying",
    "base_model_name_or_path",
    "revision",
}
# What changes the model in ways that we lack.
REFUSED = {
    "peft_type": ["IA3", "ADALORA"],
    "alora_invocation_tokens": [[1, 2]],
    "alpha_pattern": [{"q_proj": 8}],
    "arrow_config": [{"top_k": 3}],
    "bias": ["all", "lora_only"],
    "fan_in_fan_out": [True],
    "init_lora_weights": ["olora", "pissa", "pissa_niter_16", "corda", "loftq", "lora_ga", "mica"],
    "kasa_config": [{"beta": 1e-4}],
    "layer_replication": [[[0, 2], [1, 3]]],
    "layers_to_transform": [[0], 1],
    "lora_bias": [True],
    "monteclora_config": [{"num_samples": 4}],
    "rank_pattern": [{"q_proj": 8}],
    "target_parameters": [["mlp.experts"]],
    "trainable_token_indices": [[5, 6], {"embed_tokens": [5]}],
    "use_bdlora": [{"nblocks": 2}],
    "use_qalora": [True],
    "velora_config": [{"num_groups": 4}],
}
# What serves the start of training, or other programs: peft's logits do not move.
NO_EFFECT = {
    "task_type": None,
    "auto_mapping": {"base_model_class": "A", "parent_library": "b"},
    "peft_version": "0.1",
    "inference_mode": False,
    "megatron_core": "other.core",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 3.0},
    "corda_config": {"corda_method": "kpm"},
    "lora_ga_config": {"direction": "ArBr"},
    "qalora_group_size": 4,
    "init_lora_weights": "gaussian",
}
# Of layers of Megatron-LM, which no model here has; and of layers_to_transform, which is refused.
ELSEWHERE = {"megatron_config", "layers_pattern"}


RIGHT = Lora(rank=4, alpha=12.0, targets=("q_proj", "down_proj"), modules_to_save=())


@pytest.fixture(scope="module")
def two_targets(tmp_path_factory):
    """(base, adapter) on q_proj and down_proj with rank 4 and alpha 12; do not write into them."""
    base, adapter = make_adapter(tmp_path_factory.mktemp("two_targets"), "two_targets")
    add_base(adapter, base)
    return base, adapter


def changed(adapter, folder, change):
    """A copy of an adapter whose configuration has other values."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    return folder


def test_every_key_that_peft_writes_has_a_place(two_targets):
    """A key that a later peft brings has to be obeyed, refused, or shown to have no effect."""
    written = json.loads((two_targets[1] / CONFIG).read_text()).keys()
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert written == known - {"runtime_config"}
    assert written == OBEYED | REFUSED.keys() | NO_EFFECT.keys() | ELSEWHERE
    assert not OBEYED & (REFUSED.keys() | NO_EFFECT.keys())
    starts = re.findall(r"'(\w+)'", str(peft.LoraConfig.__annotations__["init_lora_weights"]))
    assert "pissa" in starts and {"gaussian", "orthogonal", "eva"} <= set(starts)
    assert set(starts) <= {*REFUSED["init_lora_weights"], "gaussian", "orthogonal", "eva"}


@pytest.mark.parametrize("key, value", [(key, value) for key in REFUSED for value in REFUSED[key]])
def test_a_key_that_we_lack_is_refused_by_name(key, value, two_targets, tmp_path):
    base, adapter = two_targets
    folder = changed(adapter, tmp_path / "adapter", {key: value})
    with pytest.raises(UserError) as error:
        read_adapter(folder, read_spec(base))
    assert str(error.value).startswith(f"{folder / CONFIG}: {key}={value!r} ")


@pytest.mark.parametrize("key", sorted(REFUSED.keys() - {"peft_type"}))
def test_a_key_that_we_lack_is_accepted_where_it_is_off(key, two_targets, tmp_path):
    base, adapter = two_targets
    off = {
        "bias": ["none"],
        "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"],
        "alpha_pattern": [{}, None],
        "rank_pattern": [{}, None],
        "trainable_token_indices": [[], {}, None],
    }
    for number, value in enumerate(off.get(key, [None, False])):
        folder = changed(adapter, tmp_path / str(number), {key: value})
        assert read_adapter(folder, read_spec(base)).lora.alpha == 12


@pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha"])
def test_a_key_that_no_adapter_can_lack_is_named(key, two_targets, tmp_path):
    base, adapter = two_targets
    folder = changed(adapter, tmp_path / "adapter", {})
    config = json.loads((folder / CONFIG).read_text())
    del config[key]
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{CONFIG}: the field {key!r} is missing"):
        read_adapter(folder, read_spec(base))
    # the others may be absent, as in older files
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 12}))
    read = read_adapter(folder, read_spec(base)).lora
    assert read == dataclasses.replace(RIGHT, dropout=0.0, path=str(folder))


@pytest.mark.parametrize(
    "change, moves",
    [
        ({"lora_alpha": 5}, True),
        ({"lora_alpha": 2.5}, True),
        ({"use_rslora": True}, True),
        ({"use_rslora": True, "lora_alpha": 2.5}, True),
        ({"lora_dropout": 0.3}, False),
        ({"target_modules": r".*\.(self_attn\.q_proj|mlp\.down_proj)"}, False),
        (
            {"target_modules": ["q_proj", "down_proj", "up_proj"], "exclude_modules": ["up_proj"]},
            False,
        ),
        (NO_EFFECT, False),
    ],
    ids=str,
)
def test_our_logits_follow_a_changed_key_as_those_of_peft_do(change, moves, two_targets, tmp_path):
    """Both read the same changed file; `moves` says whether the key has an effect on logits."""
    base, adapter = two_targets
    folder = changed(adapter, tmp_path / "adapter", change)
    unchanged, theirs = (logits_of(load_peft(base, path), TOKENS) for path in (adapter, folder))
    assert bool(np.abs(theirs - unchanged).max() > 0.01) is moves
    assert np.abs(np.asarray(load_model(folder, progress=False)(TOKENS)) - theirs).max() <= 2e-4
    read = read_adapter(folder, read_spec(base)).lora
    wanted = json.loads((folder / CONFIG).read_text())
    assert read == dataclasses.replace(
        RIGHT,
        alpha=wanted["lora_alpha"],
        dropout=wanted["lora_dropout"],
        use_rslora=wanted["use_rslora"],
        path=str(folder),
    )


@pytest.mark.parametrize(
    "name, change, words",
    [
        (
            "two_targets",
            {"r": 5},
            r"shape: .*q_proj.lora_A.weight \(4, 48\) in the file, \(5, 48\)",
        ),
        ("two_targets", {"use_dora": True}, "missing: .*q_proj.lora_magnitude_vector"),
        ("dora", {"use_dora": False}, "unknown: .*q_proj.lora_magnitude_vector"),
    ],
)
def test_a_key_that_the_tensors_contradict_is_refused(name, change, words, two_targets, tmp_path):
    base, adapter = two_targets if name == "two_targets" else make_adapter(tmp_path, name)
    folder = changed(adapter, tmp_path / "changed", change)
    with pytest.raises(UserError, match=words):
        read_adapter(folder, read_spec(base))


def test_the_base_is_the_one_that_the_adapter_names_at_its_revision(
    two_targets, tmp_path, monkeypatch
):
    base, adapter = two_targets
    asked = []

    def download(repo_id, *, revision, **_):
        asked.append((repo_id, revision))
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = changed(
        adapter, tmp_path / "adapter", {"base_model_name_or_path": "org/base", "revision": "v1.2"}
    )
    ours = load_model(folder, progress=False)(TOKENS)
    assert asked == [("org/base", "v1.2")]
    np.testing.assert_array_equal(ours, load_model(adapter, progress=False)(TOKENS))


@pytest.mark.parametrize(
    "change, override",
    [
        ({"rank": 8}, "rank=4"),
        ({"alpha": 12.5}, "alpha=12.0"),
        ({"targets": ("q_proj",)}, "targets=q_proj,down_proj"),
        ({"targets": ("q_proj", "down_proj", "up_proj")}, "targets=q_proj,down_proj"),
        ({"modules_to_save": ("lm_head",)}, "modules_to_save=()"),
        ({"use_rslora": True}, "use_rslora=False"),
        ({"use_dora": True}, "use_dora=False"),
        ({"released_code_compatible": True}, "targets=q_proj,down_proj"),
    ],
)
def test_each_setting_that_contradicts_the_adapter_is_named_alone(change, override, two_targets):
    base, adapter = two_targets
    with pytest.raises(UserError) as error:
        read_adapter(adapter, read_spec(base), dataclasses.replace(RIGHT, **change))
    first, second = str(error.value).splitlines()
    assert first.startswith(f"lora.path={adapter}: ") and second == f"--config.lora.{override}"


def test_dropout_and_the_order_of_targets_are_the_callers(two_targets):
    base, adapter = two_targets
    asked = dataclasses.replace(RIGHT, dropout=0.9, targets=("down_proj", "q_proj"), path="other")
    file = read_adapter(adapter, read_spec(base), asked)
    assert file.lora == dataclasses.replace(RIGHT, dropout=0.9, path=str(adapter))


# ---- what is written

SAVED = {
    "fraction": (False, Lora(rank=3, alpha=2.5, dropout=0.0, modules_to_save=()), {}),
    "dropout": (
        False,
        Lora(rank=2, alpha=16.0, dropout=0.25, targets=("v_proj",), modules_to_save=()),
        {},
    ),
    "rslora": (False, Lora(rank=2, alpha=7.0, use_rslora=True, modules_to_save=("lm_head",)), {}),
    "dora": (
        False,
        Lora(rank=2, alpha=4.0, use_dora=True, targets=("o_proj", "gate_proj"), modules_to_save=()),
        {},
    ),
    "norms": (
        False,
        Lora(rank=2, modules_to_save=("embed_tokens", "norm", "input_layernorm")),
        {"modules_to_save": ["embed_tokens", "input_layernorm", "model.norm"]},
    ),
    "tied": (
        True,
        Lora(rank=2, modules_to_save=("embed_tokens",)),
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "tied_frozen": (
        True,
        Lora(rank=2, modules_to_save=("norm",)),
        {"modules_to_save": ["model.norm"]},
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_every_field_that_peft_reads_of_a_saved_adapter(name, tmp_path):
    """Ours where the settings say so, peft's default elsewhere; read back, all is as it was."""
    tied, lora, more = SAVED[name]
    spec = spec_from_hf(LLAMA | {"tie_word_embeddings": tied}, "config.json")
    rng = np.random.default_rng(0)
    keys = adapter_keys(spec, lora.targets, lora.rank, use_dora=lora.use_dora)
    leaves = {
        path: rng.standard_normal(((3,) if key.stacked else ()) + key.shape, np.float32)
        for path, key in (keys | saved_keys(spec, lora.modules_to_save)).items()
    }
    save_adapter(
        tmp_path / "out", spec, lora, leaves, base="org/base", revision="v2", progress=False
    )
    wanted = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
        "target_modules": list(lora.targets),
        "revision": "v2",
        "modules_to_save": list(lora.modules_to_save) or None,
        "inference_mode": True,
        "base_model_name_or_path": "org/base",
        "task_type": "CAUSAL_LM",
    }
    read = peft.PeftConfig.from_pretrained(tmp_path / "out")
    assert dataclasses.asdict(read) == dataclasses.asdict(peft.LoraConfig(**wanted | more))
    alpha = json.loads((tmp_path / "out" / CONFIG).read_text())["lora_alpha"]
    assert isinstance(alpha, int) is lora.alpha.is_integer()  # as peft writes it

    file = read_adapter(tmp_path / "out", spec)
    assert file.spec == spec and set(file.lora.modules_to_save) == set(lora.modules_to_save)
    assert file.lora == dataclasses.replace(
        lora, path=str(tmp_path / "out"), modules_to_save=file.lora.modules_to_save
    )
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert file.tensors.keys() == leaves.keys()
    for path, parts in file.tensors.items():
        written = np.stack([tensors[part.name] for part in parts]).reshape(leaves[path].shape)
        np.testing.assert_array_equal(written, leaves[path])


def rename_tensors(adapter, rename):
    tensors = load_file(adapter / WEIGHTS)
    save_file({rename(name): array for name, array in tensors.items()}, adapter / WEIGHTS)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("model.model.layers", "model.transformer.layers"),
        ("model.model.layers", "model.model.language_model.layers"),
        ("base_model.model.model.", "base_model.model."),
        ("base_model.model.", ""),
    ],
)
def test_an_adapter_whose_names_fit_nothing_is_refused(tmp_path, part, other):
    """Servers that skip such names answer as the base does (vLLM #34186, peft #1579)."""
    base, adapter = make_adapter(tmp_path, "released_recipe")
    rename_tensors(adapter, lambda name: name.replace(part, other))
    with pytest.raises(UserError, match="its tensors do not fit") as error:
        read_adapter(adapter, read_spec(base))
    assert "unknown" in str(error.value) or "missing" in str(error.value)


@pytest.mark.parametrize("name", ["released_recipe", "dora_rslora", "fused"])
@pytest.mark.parametrize("called", ["default", "run-2"])
def test_names_of_a_saved_state_are_those_of_an_adapter(tmp_path, name, called):
    """Some trainers save `model.state_dict()`: with the adapter's name, and with what the adapter
    replaces.
    """
    base, adapter = make_adapter(tmp_path, name)
    wanted = load_state(base, adapter)
    saved = json.loads((adapter / CONFIG).read_text())["modules_to_save"] or []

    def rename(tensor):
        if tensor.endswith(".lora_magnitude_vector"):
            return f"{tensor}.{called}.weight"
        if tensor.split(".")[-2] in saved:
            return tensor.replace(".weight", f".modules_to_save.{called}.weight")
        stem, _, last = tensor.rpartition(".")
        return f"{stem}.{called}.{last}" if "lora_" in tensor else tensor

    rename_tensors(adapter, rename)
    tensors = load_file(adapter / WEIGHTS)
    for module in saved:
        old = next(k for k in tensors if k.endswith(f"{module}.modules_to_save.{called}.weight"))
        tensors[old.replace(f"modules_to_save.{called}", "original_module")] = tensors[old]
    save_file(tensors, adapter / WEIGHTS)
    file, state = load_state(base, adapter)
    assert file.lora == wanted[0].lora
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_file_with_two_adapters_is_refused(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    rename_tensors(
        adapter,
        lambda n: n.replace(".weight", ".one.weight" if "lora_A" in n else ".two.weight"),
    )
    with pytest.raises(UserError, match=r"holds several adapters \(one, two\)"):
        load_state(base, adapter)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_low_rank_adapter_on_an_embedding_is_refused_with_the_remedy(tmp_path, module):
    base, adapter = make_adapter(tmp_path, "two_targets", target_modules=["q_proj", module])
    with pytest.raises(
        UserError, match=f"adapter on {module} is not supported; merge it.*modules_"
    ):
        load_state(base, adapter)


def test_nulls_in_an_adapters_settings_mean_the_default(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    before = read_adapter(adapter, read_spec(base))
    config = json.loads((adapter / CONFIG).read_text())
    nulls = (
        "bias",
        "init_lora_weights",
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "modules_to_save",
    )
    (adapter / CONFIG).write_text(json.dumps(config | dict.fromkeys(nulls)))
    assert read_adapter(adapter, read_spec(base)) == before


def test_a_base_on_another_machine_is_named_with_the_way_to_give_another(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    add_base(adapter, "/data/elsewhere/llama")
    with pytest.raises(
        UserError,
        match="names the base model '/data/elsewhere/llama'.*--base=BASE --model=.*adapter",
    ):
        load_model(adapter, progress=False)
    wanted = logits_of(load_peft(base, adapter), TOKENS)
    ours = open_model(base, adapter=str(adapter), dtype="float32", progress=False)
    assert np.abs(np.asarray(ours(TOKENS)) - wanted).max() <= 2e-4


def test_absent_and_pickled_adapters(tmp_path):
    base, adapter = make_adapter(tmp_path, "two_targets")
    with pytest.raises(UserError, match="base_model_name_or_path is missing"):
        config = json.loads((adapter / CONFIG).read_text())
        (adapter / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
        load_model(adapter)
    with pytest.raises(UserError, match="is a PEFT adapter, not a model; set lora.path"):
        shutil.copyfile(base / "config.json", adapter / "config.json")
        load_model(adapter)
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is a pickle"):
        load_state(base, adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS}: no such file"):
        load_state(base, adapter)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_state(base, tmp_path / "nowhere")
