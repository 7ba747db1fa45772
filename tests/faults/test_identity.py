"""Nothing that was changed behind a run's back is used in silence: checkpoints, bases, tokenizers,
templates.
"""

import dataclasses
import gc
import json
import random
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from crossin_jax import provenance
from crossin_jax.checkpoint.fingerprint import fingerprints
from crossin_jax.checkpoint.hf import ORIGIN
from crossin_jax.checkpoint.open import open_model
from crossin_jax.checkpoint.store import Store, list_steps
from crossin_jax.config import Config, Lora, Mesh, Model, UserError
from crossin_jax.evaluate import find_differences
from crossin_jax.export import export
from crossin_jax.generation.model import load_model
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.train import train
from crossin_jax.training.state import abstract_model, load_base, load_start, model_spec
from crossin_jax.training.step import TrainState
from tests.checkpoint.runs import make_run, write_tokenizer
from tests.checkpoint.test_store import ABSTRACT, assert_step, every_setting, make_state, write_run
from tests.helpers import as_earlier_version, config_in

LORA = Lora(rank=2, targets=("q_proj", "down_proj"), modules_to_save=())


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run with tiny checkpoints of steps 9 and 10; do not write into it."""
    return write_run(tmp_path_factory.mktemp("stored") / "run", every_setting())


def make_config(base):
    """Settings that adapt the weights in a folder."""
    return Config(model=Model(path=str(base), frozen_dtype="float32"), lora=LORA)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A LoRA run on a base, with provenance as `train` writes it; do not write into it."""
    folder = tmp_path_factory.mktemp("identity")
    config = make_run(folder, lora=LORA, steps=(9,))
    opened = open_model(folder / "run", progress=False)
    (frozen,) = load_base(config, abstract_model(config, opened.spec, opened.mesh).frozen)
    for file in folder.glob("run/checkpoints/*/provenance/metadata"):
        known = {
            "base_weights": fingerprints(frozen),
            "tokenizer": provenance.identify_tokenizer(opened.tokenizer),
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | known))
    return as_earlier_version(folder / "run")


# ---- Flipped bits


def flip(file, at, bit):
    """Changes one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(bytes(content))


SMALL = ("data", "config", "provenance", "fingerprints")
FLIPPED = ("state", *(f"{name}/metadata" for name in SMALL))


def list_flips():
    """(name of a file or its folder, where as a share of its size, bit): all kinds of files, all
    parts of them.
    """
    draw = random.Random(3)
    return [(name, draw.random(), draw.randrange(8)) for name in FLIPPED for _ in range(8)]


# Orbax's reading threads outlive its event loop where a read fails, and Python names that when they
# are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_is_found_or_changes_nothing(stored, tmp_path):
    """What is continued is bit for bit a step that was saved, whichever bit of its files has
    flipped.
    """
    found = {}
    for number, (name, share, bit) in enumerate(list_flips()):
        folder = shutil.copytree(stored, tmp_path / f"run{number}")
        file = folder / "checkpoints/10" / name
        if file.is_dir():
            files = sorted(path for path in file.rglob("*") if path.is_file())
            file = files[number % len(files)]
        size = file.stat().st_size
        flip(file, min(size - 1, int(share * size)), bit)
        with Store(folder, config=every_setting()) as store:
            restored = store.restore_newest(ABSTRACT, every_setting())
        step = int(restored[0].step)
        assert_step(restored, step)
        found.setdefault(name, []).append(step)
        shutil.rmtree(folder)
    gc.collect()  # Orbax's, see above: here, and not in another test
    # Of the small files every bit counts. Orbax keeps some of the others twice.
    assert all(found[f"{name}/metadata"] == [9] * 8 for name in SMALL), found


@pytest.mark.parametrize("part", ["w", "b", "m", "step"])
def test_an_array_that_another_program_wrote_is_named(part, stored, tmp_path, caplog):
    """A whole and readable checkpoint with other numbers, also in the moments and the step."""
    other = make_state(10)
    if part == "step":
        other = dataclasses.replace(other, step=jnp.int32(11))
    elif part == "m":
        other.optimizer["m"] = other.optimizer["m"].at[3].add(1)
    else:
        other.trainable[part] = -other.trainable[part]
    folder = shutil.copytree(stored, tmp_path / "run")
    with Store(tmp_path / "other", config=every_setting()) as store:
        store.save(TrainState(**vars(other)), {"row": 100}, {"manifest": "data of 10"})
    source = tmp_path / "other/checkpoints" / str(int(other.step))
    shutil.rmtree(folder / "checkpoints/10/state")
    shutil.copytree(source / "state", folder / "checkpoints/10/state")
    (folder / "checkpoints/files.json").unlink()
    with Store(folder, config=every_setting()) as store:
        assert_step(store.restore_newest(ABSTRACT, every_setting()), 9)
    assert "10 is damaged and is skipped: 1 arrays are not what was saved, e.g. " in caplog.text
    assert f"/{part}" in caplog.text or part == "step"
    assert (folder / "damaged-10").is_dir()


def test_the_programs_refuse_what_train_sets_aside(adapted, tmp_path):
    """One line that names the file, and nothing is written: the small files and the adapter's
    numbers.
    """
    for number, name in enumerate(("config", "data", "provenance", "fingerprints")):
        folder = shutil.copytree(adapted, tmp_path / f"run{number}")
        file = folder / f"checkpoints/6/{name}/metadata"
        file.write_text(file.read_text().replace("1", "2", 1))
        for action in (
            partial(load_model, folder, progress=False),
            partial(export, folder, "peft", tmp_path / "out"),
        ):
            with pytest.raises(UserError) as error:
                action()
            assert len(str(error.value).splitlines()) == 1 and f"{name}/metadata" in str(
                error.value
            )
        assert not (tmp_path / "out").exists()


# ---- Junk beside checkpoints


def test_junk_beside_checkpoints_stops_nothing(stored, tmp_path, caplog):
    """Readers pass over it; a writer moves it out of the way, deletes nothing, and saves later
    steps.
    """
    folder = shutil.copytree(stored, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    (checkpoints / "65").mkdir()
    (checkpoints / "65/notes.txt").write_text("mine")
    (checkpoints / "7").write_text("a file")
    (checkpoints / "notes").mkdir()
    (checkpoints / "007").mkdir()
    for content in ("[]", "{", '{"10": []}', '{"10": 3, "x": {}}', "null"):
        (checkpoints / "files.json").write_text(content)
        assert list_steps(checkpoints) == [9, 10]
        assert_step(Store(folder).restore(10, ABSTRACT), 10)
    with Store(folder, config=every_setting()) as store:
        assert_step(store.restore_newest(ABSTRACT, every_setting()), 10)
        store.save(make_state(11), {"row": 110}, {})
    assert 11 in list_steps(checkpoints)
    assert (folder / "no-checkpoint-65/notes.txt").read_text() == "mine"
    assert (folder / "no-checkpoint-7").read_text() == "a file"
    assert f"65 is not a checkpoint; it was moved to {folder / 'no-checkpoint-65'}" in caplog.text


# ---- Another base, tokenizer or template


def change_base(folder, name, change):
    """Changes one tensor of the base beside a copied run."""
    tensors = load_file(folder / "base/model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "base/model.safetensors", metadata={"format": "pt"})


def flip_last_bit(tensor):
    """The tensor with the lowest bit of its last number flipped."""
    bits = np.ascontiguousarray(tensor).view(np.uint32).copy()
    bits.reshape(-1)[-1] ^= 1
    return bits.view(tensor.dtype).reshape(tensor.shape)


def copy_with_base(run, folder):
    """A run and its base in another place."""
    shutil.copytree(run.parent / "base", folder / "base")
    shutil.copytree(run, folder / "run")
    for file in folder.glob("run/checkpoints/*/config/metadata"):
        file.write_text(file.read_text().replace(str(run.parent / "base"), str(folder / "base")))
    return folder / "run"


CHANGES = {
    "model.embed_tokens.weight": ("embed_tokens/weight", flip_last_bit),
    "model.layers.1.mlp.down_proj.weight": ("layers/down_proj/weight", flip_last_bit),
    "model.layers.0.self_attn.v_proj.weight": ("layers/v_proj/weight", lambda w: w[::-1].copy()),
    "model.norm.weight": ("norm/weight", lambda w: w * 2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_base_is_refused_by_the_name_of_its_first_weight(name, run, tmp_path):
    """One flipped bit is enough; with the old weights back, all is well."""
    folder = copy_with_base(run, tmp_path)
    open_model(folder, progress=False)
    path, change = CHANGES[name]
    before = (tmp_path / "base/model.safetensors").read_bytes()
    change_base(tmp_path, name, change)
    words = (
        f"{re.escape(path)} is not what {re.escape(str(folder / 'checkpoints/9'))} was trained on"
    )
    for action in (
        lambda: open_model(folder, progress=False),
        lambda: export(folder, "merged", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=words):
            action()
    assert not (tmp_path / "out").exists()
    (tmp_path / "base/model.safetensors").write_bytes(before)
    export(folder, "merged", tmp_path / "out")


def test_the_base_is_known_in_other_precisions_and_on_other_meshes(run, tmp_path):
    """What cannot be compared in the precision asked for is read once more, as in training."""
    folder = copy_with_base(run, tmp_path)
    open_model(folder, mesh=make_mesh(Mesh(fsdp=8)), progress=False)
    open_model(folder, frozen_dtype="bfloat16", progress=False)
    change_base(tmp_path, "model.norm.weight", flip_last_bit)
    with pytest.raises(UserError, match="norm/weight is not what"):
        open_model(folder, frozen_dtype="bfloat16", progress=False)


def test_another_tokenizer_is_refused_unless_it_is_asked_for(run, tmp_path):
    folder = copy_with_base(run, tmp_path)
    write_tokenizer(tmp_path / "base", first="x")
    words = f"the tokenizer there is not the one that {re.escape(str(folder))}.*9 was trained with"
    with pytest.raises(UserError, match=words):
        open_model(folder, progress=False)
    asked = open_model(folder, tokenizer=str(tmp_path / "base"), progress=False)
    assert "x1" in asked.tokenizer.get_vocab()


def test_a_run_is_not_continued_on_another_base(pretrained, tmp_path):
    """`train` refuses it before the first step; an earlier version's checkpoint, which knows no
    base, continues.
    """
    shutil.copytree(pretrained / "model", tmp_path / "base")
    config = config_in(tmp_path / "run", str(tmp_path / "base"))
    config.train = dataclasses.replace(config.train, steps=2, checkpoint_every=1)
    train(config)
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    before = (tmp_path / "run/metrics.jsonl").read_text()
    tensors = load_file(tmp_path / "base/model.safetensors")
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] * 2}, tmp_path / "base/model.safetensors")
    with pytest.raises(
        UserError, match="model.path=.*/weight is not what .*checkpoints/1 was trained"
    ):
        train(config)
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    assert not (tmp_path / "run/checkpoints/2").exists()
    jax.clear_caches()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_base_of_a_quantized_run_is_known_in_its_exports(kind, tmp_path):
    """An export reads the base in bfloat16; the base is compared in the precision of the run."""
    config = make_run(tmp_path, lora=LORA, frozen_dtype=kind)
    opened = open_model(tmp_path / "run", progress=False)
    (frozen,) = load_base(config, abstract_model(config, opened.spec, opened.mesh).frozen)
    for file in tmp_path.glob("run/checkpoints/*/provenance/metadata"):
        known = {"base_weights": fingerprints(frozen)}
        file.write_text(json.dumps(json.loads(file.read_text()) | known))
    as_earlier_version(tmp_path / "run")
    export(tmp_path / "run", "merged", tmp_path / "merged")
    change_base(tmp_path, "model.layers.1.mlp.down_proj.weight", lambda w: w * 1.5)
    with pytest.raises(UserError, match=r"layers/down_proj/(weight|scale) is not what .*/0 was"):
        export(tmp_path / "run", "merged", tmp_path / "out")


# ---- Exports


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory):
    """The run's base, and its adapter and merged model as `export` writes them; read only."""
    folder = tmp_path_factory.mktemp("exports")
    shutil.copytree(run.parent / "base", folder / "base")
    export(run, "peft", folder / "adapter")
    export(run, "merged", folder / "merged")
    return folder


def change_tensor(file, change):
    """Changes the last tensor of a safetensors file."""
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: change(tensors[name])}, file, metadata={"format": "pt"})


OPENED = {
    "adapter": lambda folder, **options: open_model(
        folder / "base", adapter=str(folder / "adapter"), progress=False, **options
    ),
    "merged": lambda folder, **options: open_model(folder / "merged", progress=False, **options),
}


@pytest.mark.parametrize(
    ("opened", "file", "words"),
    [
        ("merged", "merged/model.safetensors", "norm/weight is not what was exported"),
        ("adapter", "adapter/adapter_model.safetensors", "lora_b is not what was exported"),
        (
            "adapter",
            "base/model.safetensors",
            "norm/weight of the base model is not what the adapter was trained on",
        ),
    ],
)
def test_a_changed_export_is_named(opened, file, words, exports, tmp_path):
    """One flipped bit, in the weights of the export or in an adapter's base; more in bfloat16."""
    folder = shutil.copytree(exports, tmp_path / "copy")
    for dtype, change in (("float32", flip_last_bit), ("bfloat16", lambda tensor: -tensor)):
        change_tensor(folder / file, change)
        with pytest.raises(UserError, match=words) as error:
            OPENED[opened](folder, dtype=dtype)
        assert len(str(error.value).splitlines()) == 2
    (folder / opened / ORIGIN).unlink()
    OPENED[opened](folder)


def test_what_cannot_be_compared_in_an_export_is_read(exports):
    """And what can be in two precisions is; an export may be adapted again."""
    for opened in OPENED.values():
        for dtype in ("bfloat16", "float32", None):
            opened(exports, dtype=dtype)
        opened(exports, frozen_dtype="nf4", param_dtype="float32")
    config = make_config(exports / "merged")
    abstract = abstract_model(config, model_spec(config), make_mesh(Mesh(), jax.devices()[:1]))
    load_start(config, abstract.trainable, abstract.frozen)


def test_another_tokenizer_in_an_export_is_said(exports, tmp_path, caplog):
    folder = shutil.copytree(exports / "merged", tmp_path / "merged")
    assert open_model(folder, progress=False).tokenizer and "tokenizer there" not in caplog.text
    write_tokenizer(folder, first="x")
    assert open_model(folder, progress=False).tokenizer
    assert f"{folder}: the tokenizer there is not the one that was exported" in caplog.text


@pytest.mark.parametrize("damage", ['{"weights": []}', '{"base_weights": {"a": 1}}', "{", "[]"])
def test_a_damaged_origin_is_refused(damage, exports, tmp_path):
    folder = shutil.copytree(exports / "merged", tmp_path / "merged")
    (folder / ORIGIN).write_text(damage)
    with pytest.raises(UserError, match=re.escape(ORIGIN)):
        open_model(folder, progress=False)


def test_a_run_knows_the_weights_that_it_began_with(pretrained, tmp_path):
    """Where every weight is trained too, and still after it was continued."""
    config = config_in(tmp_path / "run", str(pretrained / "model"))
    config.lora = None
    config.train = dataclasses.replace(config.train, steps=2, checkpoint_every=1)
    train(config)
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    train(config)
    first, second = (
        json.loads((tmp_path / f"run/checkpoints/{step}/provenance/metadata").read_text())
        for step in (1, 2)
    )
    opened = open_model(pretrained / "model", dtype="float32", progress=False)
    assert first["start_weights"] == fingerprints(opened.state)
    assert second["start_weights"] == first["start_weights"] and first["base_weights"] == {}
    jax.clear_caches()


# ---- Results side by side


def test_what_two_results_do_not_share_is_said():
    first = {
        "model": {"tokenizer": "a"},
        "template": "t",
        "commit": "c",
        "versions": {"crossin_jax": "1"},
        "benchmarks": {"cross_mmlu": {"fingerprint": "f"}, "only here": {"fingerprint": "g"}},
    }
    assert find_differences(first, first) == [] and find_differences({}, first) == []
    second = {
        "model": {"tokenizer": "b"},
        "template": "u",
        "commit": "d",
        "versions": {"crossin_jax": "2"},
        "benchmarks": {"cross_mmlu": {"fingerprint": "h"}},
    }
    assert find_differences(first, second) == [
        "another tokenizer (a and b)",
        "another prompt template or tokenizer (t and u)",
        "another version of crossin_jax (1 and 2)",
        "another commit of crossin_jax (c and d)",
        "other questions in cross_mmlu (f and h)",
    ]
