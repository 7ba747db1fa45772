"""Hugging Face folders: onto any mesh bit by bit, strict both ways, one clear error for each kind
of damage.
"""

import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import crossin_jax
from crossin_jax.checkpoint import hf, save
from crossin_jax.checkpoint import weights as stream
from crossin_jax.checkpoint.hf import (
    load_weights,
    read_spec,
    read_tensors,
    resolve_folder,
    state_leaves,
)
from crossin_jax.checkpoint.hf_map import summarize, weight_keys
from crossin_jax.checkpoint.save import save_model
from crossin_jax.checkpoint.tensors import read_header
from crossin_jax.config import Lora, Mesh, UserError
from crossin_jax.generation.model import load_model
from crossin_jax.parallel.mesh import make_mesh
from tests.checkpoint.abstract import abstract_transformer
from tests.checkpoint.checkpoints import LLAMA, write_checkpoint
from tests.conftest import REPOSITORY

MESHES = {
    "data8": Mesh(),
    "fsdp8": Mesh(fsdp=8),
    "grid": Mesh(data=2, fsdp=2, tensor=2),
    "tensor4": Mesh(tensor=4),
}


def load_state(folder, mesh=None, dtype="float32", **settings):
    """The state of a Llama folder on a mesh, by path."""
    _, state = abstract_transformer(
        read_spec(folder), mesh, param_dtype=dtype, frozen_dtype=dtype, **settings
    )
    return state_leaves(load_weights(folder, state, progress=False))


def assert_same_bits(loaded, expected):
    """Equal paths, dtypes and bits on every device."""
    assert loaded.keys() == expected.keys()
    for path, array in loaded.items():
        assert array.dtype == expected[path].dtype, path
        for shard in array.addressable_shards:
            got = np.asarray(shard.data)
            assert got.tobytes() == expected[path][shard.index].tobytes(), (
                f"{path} on {shard.device}"
            )


@pytest.mark.parametrize("staged", [False, True], ids=["adopted", "staged"])
@pytest.mark.parametrize("name", MESHES)
def test_every_device_holds_its_slice(tmp_path, name, staged, monkeypatch):
    if staged:
        monkeypatch.setattr(stream, "is_on_host", lambda boxes: False)
    _, leaves = write_checkpoint(tmp_path / "m", shard_bytes=5000)
    mesh = make_mesh(MESHES[name])
    loaded = load_state(tmp_path / "m", mesh, "bfloat16")
    assert_same_bits(loaded, leaves)
    embed = loaded["embed_tokens/weight"].sharding
    assert embed.mesh == mesh and (name == "data8" or not embed.is_fully_replicated)


@pytest.mark.parametrize("staged", [False, True], ids=["adopted", "staged"])
@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_stored_precision_is_cast_to_the_one_asked_for(
    tmp_path, source, target, staged, monkeypatch
):
    if staged:
        monkeypatch.setattr(stream, "is_on_host", lambda boxes: False)
    _, leaves = write_checkpoint(tmp_path / "m", np.dtype(source))
    loaded = load_state(tmp_path / "m", dtype=target)
    assert_same_bits(loaded, {path: leaf.astype(target) for path, leaf in leaves.items()})


def test_a_stack_of_mixed_precision(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m", np.float32)
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, file)
    for staged in (False, True):
        if staged:
            monkeypatch.setattr(stream, "is_on_host", lambda boxes: False)
        stack = np.asarray(load_state(tmp_path / "m")["layers/up_proj/weight"])
        for layer in range(3):
            np.testing.assert_array_equal(
                stack[layer], tensors[name.replace("1", str(layer))].astype(np.float32)
            )


def test_replicas_share_one_read(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "m")
    counts, read = [], stream.Reader._read
    monkeypatch.setattr(
        stream.Reader, "_read", lambda *args: counts.append(read(*args)) or counts[-1]
    )
    load_state(tmp_path / "m", make_mesh(Mesh()))
    assert sum(counts) == sum(tensor.nbytes for tensor in read_tensors(tmp_path / "m").values())


def test_adapters_are_left_and_several_states_are_filled_at_once(tmp_path):
    _, leaves = write_checkpoint(tmp_path / "m")
    _, state = abstract_transformer(
        read_spec(tmp_path / "m"), None, lora=Lora(rank=2), frozen_dtype="bfloat16"
    )
    loaded = state_leaves(load_weights(tmp_path / "m", (state, {"other": {}}), progress=False))
    for path, leaf in loaded.items():
        if path.endswith(("lora_a", "lora_b")):
            assert isinstance(leaf, jax.ShapeDtypeStruct)
        else:  # modules trained in full are float32, what is frozen bfloat16
            trained = path.startswith(("embed_tokens", "lm_head"))
            assert leaf.dtype == (jnp.float32 if trained else jnp.bfloat16)
            np.testing.assert_array_equal(
                np.asarray(leaf, np.float32), leaves[path].astype(np.float32)
            )


def test_memory_and_bytes_are_announced(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(stream, "WORTH_TELLING", 0)
    write_checkpoint(tmp_path / "m")
    load_model(tmp_path / "m")
    text = capfd.readouterr().err
    assert re.search(r"reading 0 MiB; host memory will peak at about \d", text)
    assert re.search(r"host memory peaked at \d", text)


@pytest.mark.parametrize("kind, mesh", [("int8", None), ("nf4", "grid")])
def test_a_frozen_base_is_quantized_as_it_is_read(tmp_path, kind, mesh):
    from crossin_jax.models.quantize import dequantize, quantize

    # Two blocks of nf4.
    _, leaves = write_checkpoint(tmp_path / "m", hidden_size=128, intermediate_size=128)
    _, state = abstract_transformer(
        read_spec(tmp_path / "m"),
        MESHES.get(mesh) and make_mesh(MESHES[mesh]),
        lora=Lora(rank=2),
        frozen_dtype=kind,
    )
    loaded = state_leaves(load_weights(tmp_path / "m", state, progress=False))
    wanted = {path.removesuffix("/scale") for path in loaded if path.endswith("/scale")}
    assert len(wanted) == 7
    for path in wanted:
        codes, scale = quantize(
            jnp.asarray(leaves[f"{path}/weight"]), loaded[f"{path}/scale"].shape, kind
        )
        np.testing.assert_array_equal(np.asarray(loaded[f"{path}/weight"]), np.asarray(codes))
        np.testing.assert_array_equal(np.asarray(loaded[f"{path}/scale"]), np.asarray(scale))
        assert (
            jnp.abs(
                dequantize(codes, scale, jnp.float32) - leaves[f"{path}/weight"].astype(np.float32)
            ).max()
            < 0.2
        )
    for path in ("norm/weight", "layers/input_layernorm/weight"):
        np.testing.assert_array_equal(np.asarray(loaded[path]), leaves[path])


# ---- ties


def test_a_tied_checkpoint_that_repeats_its_embedding_loads(tmp_path):
    _, leaves = write_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "m/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "m/model.safetensors")
    assert_same_bits(load_state(tmp_path / "m", dtype="bfloat16"), leaves)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][::-1].copy()
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(
        UserError, match='(?s)unknown: lm_head.weight .48, 32..*"tie_word_embeddings": false'
    ):
        load_state(tmp_path / "m")


@pytest.mark.parametrize("listed", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_tied_matrix_is_stored_under_one_name_and_listed_under_two(tmp_path, listed, stored):
    """Which of the two is stored does not matter, nor whether an index lists the other one, which
    no shard holds.
    """
    _, leaves = write_checkpoint(tmp_path / "m", tie_word_embeddings=True, shard_bytes=8000)
    folder, names = tmp_path / "m", {"model.embed_tokens.weight": stored}
    weight_map = json.loads((folder / hf.INDEX).read_text())["weight_map"]
    for file in set(weight_map.values()):
        tensors = load_file(folder / file)
        save_file({names.get(name, name): array for name, array in tensors.items()}, folder / file)
    weight_map = {names.get(name, name): file for name, file in weight_map.items()}
    weight_map.setdefault(listed, max(weight_map.values()))
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_same_bits(load_state(folder, dtype="bfloat16"), leaves)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    missing = "model.embed_tokens.weight" if stored == "lm_head.weight" else "lm_head.weight"
    with pytest.raises(UserError, match=f"missing: {missing}"):
        load_state(folder)


def test_an_untied_head_over_a_tied_checkpoint_starts_as_the_embedding(tmp_path):
    spec, leaves = write_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    untied = read_spec(tmp_path / "m").__class__(
        **{**{f: getattr(spec, f) for f in spec.__dataclass_fields__}, "tie_embeddings": False}
    )
    _, state = abstract_transformer(untied, None, param_dtype="bfloat16")
    loaded = state_leaves(load_weights(tmp_path / "m", state, progress=False))
    assert_same_bits(loaded, {**leaves, "lm_head/weight": leaves["embed_tokens/weight"]})


# ---- strictness


def test_all_misfits_are_in_one_error_with_shapes(tmp_path):
    write_checkpoint(tmp_path / "m", np.float32)
    file = tmp_path / "m/model.safetensors"
    tensors = load_file(file)
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = np.zeros((50, 32), np.float32)
    # Known to carry nothing.
    tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_state(tmp_path / "m")
    assert str(error.value).split("\n") == [
        f"{tmp_path / 'm'}: its tensors do not fit config.json (llama, 3 layers)",
        "missing: model.layers.0,2.mlp.up_proj.weight (24, 32); "
        "shape: lm_head.weight (50, 32) in the file, (48, 32) expected; "
        "unknown: model.layers.0-2.self_attn.q_proj.bias (32,)",
    ]


def test_the_text_part_of_a_multimodal_checkpoint_is_found_under_both_names(tmp_path):
    text = {
        **LLAMA,
        "model_type": "gemma3_text",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    }
    _, leaves = write_checkpoint(tmp_path / "m", **text)
    tensors = load_file(tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text})
    )
    # As transformers 5 saves.
    for prefix, vision in (
        ("language_model.model.", "vision_tower."),  # on the Hub
        ("model.language_model.", "model.vision_tower."),
    ):
        renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
        save_file(
            {**renamed, f"{vision}embeddings.weight": np.zeros(3, np.float32)},
            tmp_path / "m/model.safetensors",
        )
        assert_same_bits(load_state(tmp_path / "m", dtype="bfloat16"), leaves)


def test_the_table_covers_every_parameter_of_the_model():
    from crossin_jax.models.spec import spec_from_hf

    for changes in (
        {},
        {"tie_word_embeddings": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": 8},
    ):
        spec = spec_from_hf({**LLAMA, **changes}, "config.json")
        _, state = abstract_transformer(spec, None)
        shapes = {path: leaf.shape for path, leaf in state_leaves(state).items()}
        assert shapes == {
            path: ((3,) if key.stacked else ()) + key.shape
            for path, key in weight_keys(spec).items()
        }


def test_summaries_fold_layers():
    names = [f"model.layers.{i}.a" for i in (0, 1, 2, 5, 7, 8)] + ["model.norm.weight"]
    assert summarize(names) == ["model.layers.0-2,5,7-8.a", "model.norm.weight"]


# ---- damage


def damaged(tmp_path, **changes):
    """A sharded folder to damage."""
    write_checkpoint(tmp_path / "m", shard_bytes=8000, **changes)
    return tmp_path / "m"


def rewrite_index(folder, edit):
    index = json.loads((folder / hf.INDEX).read_text())
    edit(index["weight_map"])
    (folder / hf.INDEX).write_text(json.dumps(index))


def test_a_missing_shard_is_named(tmp_path):
    folder = damaged(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"1 of .* shards .* missing: {shard.name}"):
        load_state(folder)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, name):
    folder = damaged(tmp_path)
    rewrite_index(folder, lambda names: names.update({"lm_head.weight": name}))
    with pytest.raises(UserError, match="points outside its folder"):
        load_state(folder)


def test_an_index_that_disagrees_with_its_shards_names_the_tensors(tmp_path):
    folder = damaged(tmp_path)
    first, last = (sorted(folder.glob("*.safetensors"))[i].name for i in (0, -1))
    rewrite_index(folder, lambda names: names.update({"model.embed_tokens.weight": last}))
    with pytest.raises(UserError) as error:
        load_state(folder)
    assert f"{first} also has model.embed_tokens.weight" in str(error.value)
    assert f"{last} lacks model.embed_tokens.weight" in str(error.value)
    (folder / hf.INDEX).write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        load_state(folder)


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m/model.safetensors").rename(tmp_path / "m/pytorch_model.bin")
    with pytest.raises(
        UserError, match=r'(?s)pytorch_model.bin is a pickle.*save_pretrained\(".*-safetensors"\)'
    ):
        load_model(tmp_path / "m")
    (tmp_path / "m/pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        load_model(tmp_path / "m")


def test_nan_is_a_warning_that_names_the_tensors(tmp_path):
    _, leaves = write_checkpoint(tmp_path / "m", np.float32)
    tensors = load_file(tmp_path / "m/model.safetensors")
    for layer in (1, 2):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][3, 4] = -np.nan
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.warns(UserWarning, match=r"NaN in model.layers.1-2.mlp.down_proj.weight;"):
        load_state(tmp_path / "m")


def tokenizer_json(last, added=None):
    added = [] if added is None else [{"id": added, "content": "<x>"}]
    return json.dumps({"model": {"vocab": {"a": 0, "b": last}}, "added_tokens": added})


def test_a_tokenizer_as_it_is_published(tmp_path):
    """Empty texts and nested settings are usual in tokenizer.json; they are not ours to judge."""
    write_checkpoint(tmp_path / "m")
    model = {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": "",
        "merges": [["a", "b"]],
    }
    added = {"id": 2, "content": "", "special": True}
    tokenizer = {"model": {**model, "vocab": {"": 0, "https://user:pass@host": 1}}}
    (tmp_path / "m/tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": [added]}))
    load_state(tmp_path / "m")


def test_a_vocabulary_smaller_than_the_tokenizer(tmp_path):
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").write_text(tokenizer_json(47))
    load_state(tmp_path / "m")
    (tmp_path / "m/tokenizer.json").write_text(tokenizer_json(47, added=48))
    load_state(tmp_path / "m")  # as Gemma 3 1B is published
    (tmp_path / "m/tokenizer.json").write_text(tokenizer_json(48))
    with pytest.raises(
        UserError, match="vocab_size=48 is smaller than the tokenizer: the last id in .* is 48"
    ):
        load_state(tmp_path / "m")
    # Unigram: a list.
    (tmp_path / "m/tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0]] * 49}}))
    with pytest.raises(UserError, match="is 48"):
        load_state(tmp_path / "m")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "config.json: not JSON"),
        ("[]", "holds a list"),
        (None, "no such file"),
        (
            json.dumps({k: v for k, v in LLAMA.items() if k != "hidden_size"}),
            "'hidden_size' is missing",
        ),
    ],
)
def test_a_damaged_config(tmp_path, text, words):
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m/config.json").unlink()
    if text is not None:
        (tmp_path / "m/config.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_model(tmp_path / "m")
    assert "config.json" in str(error.value)


# ---- where folders come from


def test_a_hub_id_without_network_says_what_to_do():
    with pytest.raises(
        UserError,
        match=r"(?s)nobody/nothing at revision v1: .*`hf download nobody/nothing --revision v1`",
    ):
        resolve_folder("nobody/nothing", "v1")
    for path in ("./nothing", "/nothing/at/all", "a/b/c", "some where"):
        with pytest.raises(UserError, match="no such folder; pass"):
            resolve_folder(path)


def test_a_hub_id_downloads_weights_but_no_pickles(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    write_checkpoint(tmp_path / "snapshot")
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = crossin_jax.load_model("org/name", revision="abc")
    assert (asked["repo_id"], asked["revision"]) == ("org/name", "abc")
    assert model(np.zeros((1, 4), int)).shape == (1, 4, 48)
    files = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "tokenizer.json",
        "chat_template.jinja",
        "onnx/model.onnx",
        "README.md",
    ]
    kept = list(
        filter_repo_objects(
            files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
    )
    assert kept == [files[i] for i in (0, 1, 2, 3, 7, 8)]


# ---- the loaded model


def test_load_model_gives_equal_logits_on_a_mesh_and_refuses_bad_input(tmp_path):
    write_checkpoint(tmp_path / "m", np.float32)
    tokens = np.random.default_rng(0).integers(0, 48, (8, 16))
    model = load_model(tmp_path / "m", progress=False)
    logits = model(tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (8, 16, 48)
    on_mesh = load_model(tmp_path / "m", mesh=make_mesh(MESHES["grid"]), progress=False)
    np.testing.assert_allclose(np.asarray(on_mesh(tokens)), np.asarray(logits), atol=2e-5)
    assert (
        load_model(tmp_path / "m", dtype="bfloat16", progress=False)(tokens.tolist()).dtype
        == jnp.float32
    )
    with pytest.raises(UserError, match="ids from 0 to 47"):
        model([[48]])
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        model([1, 2, 3])
    with pytest.raises(UserError, match="float32 or bfloat16"):
        load_model(tmp_path / "m", dtype="float16")


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, crossin_jax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules), "
        "crossin_jax.__version__"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)
    assert crossin_jax.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        crossin_jax.load_modle  # noqa: B018 - the access itself must fail


# ---- saving


def test_a_saved_folder_is_whole_or_absent(tmp_path, monkeypatch):
    spec, leaves = write_checkpoint(tmp_path / "m")
    monkeypatch.setattr(save, "copy_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(tmp_path / "out/new", spec, leaves, progress=False)
    assert list(tmp_path.glob("out/*")) == []
    monkeypatch.undo()
    save_model(tmp_path / "out/new", spec, leaves, progress=False)
    with pytest.raises(UserError, match="exists already"):
        save_model(tmp_path / "out/new", spec, leaves, progress=False)
    (tmp_path / "out/empty").mkdir()
    save_model(tmp_path / "out/empty", spec, leaves, progress=False)
    assert_same_bits(load_state(tmp_path / "out/empty", dtype="bfloat16"), leaves)


@pytest.mark.parametrize("name", ["grid", "fsdp8"])
def test_saving_from_a_mesh_gives_the_bits_that_were_loaded(tmp_path, name):
    spec, _ = write_checkpoint(tmp_path / "m", bos_token_id=1, eos_token_id=[2, 3])
    (tmp_path / "m/tokenizer.json").write_text(tokenizer_json(9))
    (tmp_path / "m/generation_config.json").write_text('{"temperature": 0.7}')
    state = load_state(tmp_path / "m", make_mesh(MESHES[name]), "bfloat16")
    save_model(
        tmp_path / "out",
        spec,
        state,
        source=tmp_path / "m",
        card="# Card\n",
        shard_bytes=6000,
        progress=False,
    )
    before, after = (read_tensors(tmp_path / folder) for folder in ("m", "out"))
    assert before.keys() == after.keys()
    assert all(hf.same_bytes(before[name], after[name]) for name in before)
    index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    assert len(set(index["weight_map"].values())) > 3
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (
        1,
        [2, 3],
        "bfloat16",
    )
    assert (tmp_path / "out/README.md").read_text() == "# Card\n"
    texts = {folder: (tmp_path / folder / "tokenizer.json").read_text() for folder in ("m", "out")}
    assert texts["out"] == texts["m"]
    settings = (tmp_path / "out/generation_config.json").read_text()
    assert json.loads(settings) == {"temperature": 0.7}


def test_saving_in_another_precision(tmp_path):
    spec, leaves = write_checkpoint(tmp_path / "m", np.float32)
    save_model(tmp_path / "out", spec, leaves, dtype=ml_dtypes.bfloat16, progress=False)
    cast = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in leaves.items()}
    assert_same_bits(load_state(tmp_path / "out", dtype="bfloat16"), cast)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(AssertionError, match="norm/weight"):
        save_model(
            tmp_path / "out",
            spec,
            {p: a for p, a in leaves.items() if p != "norm/weight"},
            progress=False,
        )


FILES_OF_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@pytest.mark.parametrize("own", [True, False], ids=["own_tokenizer", "tokenizer_of_the_source"])
def test_every_file_of_the_tokenizer_is_carried_and_no_other(own, tmp_path):
    """The tokenizer comes from its own folder where one is given, else from the base's."""
    spec, leaves = write_checkpoint(tmp_path / "base")
    others = ("notes.txt", "training_args.bin", "preprocessor_config.json")
    for folder in ("base", "own"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for name in (*FILES_OF_TOKENIZERS, *others):
            (tmp_path / folder / name).write_text(f"{name} of {folder}")
    save_model(
        tmp_path / "out",
        spec,
        leaves,
        source=tmp_path / "base",
        tokenizer=tmp_path / "own" if own else None,
        progress=False,
    )
    carried = {
        file.name: file.read_text()
        for file in (tmp_path / "out").iterdir()
        if file.suffix != ".safetensors"
    }
    assert carried.keys() == {*FILES_OF_TOKENIZERS, "config.json", "generation_config.json"}
    for name in FILES_OF_TOKENIZERS:
        assert carried[name] == f"{name} of {'own' if own else 'base'}"


def test_token_ids_that_are_given_go_before_those_of_the_base(tmp_path):
    """Of a multimodal base the ids of the text part count."""
    spec, leaves = write_checkpoint(tmp_path / "m")
    old = {"eos_token_id": 1, "bos_token_id": 4, "text_config": {"eos_token_id": [2, 3]}}
    (tmp_path / "m/config.json").write_text(json.dumps(old))
    for name, given, eos in (("a", None, [2, 3]), ("b", {"eos_token_id": 7, "pad_token_id": 0}, 7)):
        save_model(
            tmp_path / name, spec, leaves, source=tmp_path / "m", token_ids=given, progress=False
        )
        wanted = {"bos_token_id": 4, "eos_token_id": eos} | ({"pad_token_id": 0} if given else {})
        config = json.loads((tmp_path / name / "config.json").read_text())
        generation = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {key: value for key, value in config.items() if key.endswith("token_id")} == wanted
        assert generation == {"_from_model_config": True} | wanted


@pytest.mark.parametrize("limit", [1, 3072, 3073, 6144, 1 << 40])
def test_shards_are_as_large_as_allowed_and_not_larger(limit, tmp_path):
    """Tensors of 3,072 bytes: the embedding, the head and each product of the feed-forward."""
    spec, leaves = write_checkpoint(tmp_path / "m", np.float32, hidden_size=32, vocab_size=24)
    save_model(tmp_path / "out", spec, leaves, shard_bytes=limit, progress=False)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = [[tensor.nbytes for tensor in read_header(str(file)).values()] for file in files]
    for shard, after in zip(sizes, [*sizes[1:], None], strict=True):
        assert len(shard) == 1 or sum(shard) <= limit
        assert after is None or sum(shard) + after[0] > limit  # the next tensor had no room
    names = {name for file in files for name in read_header(str(file))}
    assert names == read_tensors(tmp_path / "m").keys()
    assert [file.name for file in files] == (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(map(sum, sizes))
        assert index["weight_map"] == {
            name: file.name for file in files for name in read_header(str(file))
        }
