"""Checkpoints: settings that must stay in a continued run, damage, and the step that is read."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from crossin_jax.checkpoint.open import open_model
from crossin_jax.checkpoint.store import Store, find_checkpoint, read_config
from crossin_jax.config import (
    Architecture,
    Component,
    Config,
    Data,
    Lora,
    Model,
    Source,
    UserError,
    iterate_fields,
)
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.train import train
from crossin_jax.training.step import TrainState
from tests.helpers import as_earlier_version, config_in


def named(section: str, names: str) -> set[str]:
    """The settings of a section by these names."""
    return {f"{section}.{name}" for name in names.split()}


# Changed, these settings give other weights than the uninterrupted run: they must stay.
MUST_STAY = {"seed"}
MUST_STAY |= named("model", "path revision tokenizer param_dtype frozen_dtype compute_dtype")
MUST_STAY |= named(
    "model.architecture",
    "width ff_width num_layers num_heads num_kv_heads max_length tie_embeddings vocab_size",
)
MUST_STAY |= named(
    "lora",
    "rank alpha dropout targets modules_to_save use_rslora use_dora path released_code_compatible",
)
MUST_STAY |= named("data.sources", "name kind path split languages fields join portion limit")
MUST_STAY |= named(
    "data.components",
    "kind source count share languages allow_same translate "
    "translate_what with_replacement tag template request",
)
MUST_STAY |= named(
    "data", "languages pivot template system tag tokenization length packing over_long"
)
MUST_STAY |= named(
    "optim",
    "name learning_rate schedule warmup_share final_share weight_decay "
    "b1 b2 clip_norm moments_dtype groups",
)
MUST_STAY |= named("train", "steps epochs batch_size accumulation")
# These say where the run lies, how it is spread and computed, what is reported and kept, and how
# it is evaluated.
MAY_CHANGE = {"name", "output_dir"}
MAY_CHANGE |= named("model", "attention remat") | named("mesh", "data fsdp tensor")
MAY_CHANGE |= named("data", "workers")
MAY_CHANGE |= named("data.eval_sources", "name kind path split languages fields join portion limit")
MAY_CHANGE |= named(
    "train",
    "loss_chunk log_every eval_every benchmark_every checkpoint_every checkpoint_minutes keep "
    "keep_every tensorboard",
)
MAY_CHANGE |= named(
    "evaluation",
    "benchmarks languages method prompts shots split gap mode rankc untuned template "
    "max_new_tokens batch_size temperature top_k top_p cache_dtype limit over_long",
)


def every_setting() -> Config:
    """A configuration in which every section is present, so that every setting has a place."""
    return Config(
        model=Model(path="base", architecture=Architecture()),
        lora=Lora(),
        data=Data(
            sources=(Source(name="a", path="a.jsonl"), Source(name="b", kind="world")),
            components=(
                Component(source="a", languages={"zh": 1.0}),
                Component(kind="x2x", source="b"),
            ),
            eval_sources=(Source(name="dev", kind="world"),),
        ),
    )


def general(path: str) -> str:
    """A setting's name without the place in a list: data.sources[1].path is data.sources.path."""
    return re.sub(r"\[\d+\]", "", path)


def change(config: Config, path: str, value: object) -> None:
    """Sets the field at a path such as data.sources[1].path."""
    *parents, last = path.replace("[", ".[").split(".")
    for part in parents:
        config = config[int(part[1:-1])] if part.startswith("[") else getattr(config, part)
    setattr(config, last, value)


def another(value: object, field: dataclasses.Field) -> object:
    """Some other value of the same kind."""
    if "choices" in field.metadata:
        return next(choice for choice in field.metadata["choices"] if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, tuple):
        return (*value, *(value[-1:] or ("other",)))
    if isinstance(value, dict):
        return {**value, "es": {"rate": 0.5} if field.name == "groups" else 2.0}
    return value + "2" if isinstance(value, str) else 3 if "str" not in str(field.type) else "other"


SETTINGS = {path: (value, field) for path, value, field in iterate_fields(every_setting())}


def make_state(step: int) -> TrainState:
    """A state of two arrays whose numbers tell the step."""
    weights = {"w": step + jnp.arange(8.0), "b": jnp.full((2, 3), step, jnp.bfloat16)}
    return TrainState(jnp.int32(step), jnp.ones((), bool), weights, {}, {"m": -weights["w"]})


def abstract_of(state: TrainState, sharding: object = None) -> TrainState:
    """The shapes of a state on the first device, or as sharded."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=(sharding if sharding and leaf.shape == (8,) else place),
        ),
        state,
    )


ABSTRACT = abstract_of(make_state(0))


def assert_step(restored: tuple | None, step: int) -> None:
    """What was restored is the state and the data position of that step, bit by bit."""
    state, position = restored
    assert position == {"row": 10 * step} and int(state.step) == step and bool(state.finite)
    wanted = make_state(step)
    for part in ("trainable", "optimizer"):
        ours, theirs = getattr(state, part), getattr(wanted, part)
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def write_run(folder, config, steps=(9, 10), **keeping):
    """A run with tiny checkpoints of these steps."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **keeping))
    with Store(folder, config=config) as store:
        for step in steps:
            store.save(make_state(step), {"row": 10 * step}, {"manifest": f"data of {step}"})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints of steps 9 and 10; do not write into it."""
    return write_run(tmp_path_factory.mktemp("store") / "run", every_setting())


@pytest.fixture(scope="module")
def opened(run):
    """Its checkpoints, opened for reading."""
    with Store(run) as store:
        yield store


# ---- continuing with other settings


def test_every_setting_either_must_stay_or_may_change():
    """A new setting has to be placed in one of the two lists."""
    assert {general(path) for path in SETTINGS} == MUST_STAY | MAY_CHANGE
    assert not MUST_STAY & MAY_CHANGE


@pytest.mark.parametrize("path", [path for path in SETTINGS if general(path) in MUST_STAY])
def test_a_changed_setting_that_matters_is_refused_by_name(path, opened):
    """The error names the checkpoint, the setting and both values."""
    before, field = SETTINGS[path]
    config = every_setting()
    change(config, path, another(before, field))
    with pytest.raises(UserError) as error:
        opened.restore_newest(ABSTRACT, config)
    first, remedy = str(error.value).splitlines()
    assert first.startswith(
        f"{opened.folder / '10'}: the configuration changed since this checkpoint: {path}"
    )
    if not isinstance(before, tuple | dict):
        # A setting that came later is not stored where it has its default.
        stored = None if field.metadata.get("is_later") else before
        assert first.endswith(f": {path}: {stored!r} -> {another(before, field)!r}")
    assert "another output_dir" in remedy and "--noresume" in remedy


@pytest.mark.parametrize("path", [path for path in SETTINGS if general(path) in MAY_CHANGE])
def test_a_changed_setting_that_does_not_matter_is_accepted_and_logged(path, opened, caplog):
    before, field = SETTINGS[path]
    config = every_setting()
    change(config, path, another(before, field))
    assert_step(opened.restore_newest(ABSTRACT, config), 10)
    said = [line for line in caplog.messages if "continues with other settings" in line]
    assert len(said) == 1 and str(opened.folder / "10") in said[0] and f": {path}" in said[0]
    if not isinstance(before, tuple | dict):
        assert said[0].endswith(f": {path}: {before!r} -> {another(before, field)!r}")


def test_an_unchanged_configuration_is_not_worth_a_word(opened, caplog):
    """Also where it is read from JSON, in which a tuple is a list."""
    assert_step(opened.restore_newest(ABSTRACT, every_setting()), 10)
    assert_step(opened.restore_newest(ABSTRACT, read_config(opened.folder.parent)), 10)
    assert not caplog.messages


def reorder(config):
    config.data.components = config.data.components[::-1]


def add_component(config):
    config.data.components = (*config.data.components, Component(source="a"))


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda config: setattr(config, "lora", None), "lora.alpha: 128.0 -> None"),
        (
            lambda config: setattr(config.model, "architecture", None),
            "model.architecture.ff_width: 352 -> None",
        ),
        (
            lambda config: setattr(config.data, "sources", config.data.sources[:1]),
            r"data.sources\[1\].join: 'id' -> None",
        ),
        (add_component, r"data.components\[2\].*: None -> "),
        (reorder, r"data.components\[0\].kind: 'base' -> 'x2x'"),
        (
            lambda config: config.data.components[0].languages.update(zh=3.0),
            r"\[0\].languages.zh: 1.0 -> 3.0",
        ),
        (
            lambda config: config.data.components[0].languages.clear(),
            r"\[0\].languages.zh: 1.0 -> None",
        ),
        (
            lambda config: config.optim.groups.update({"norm/*": {"rate": 0.5}}),
            r"optim.groups.norm/\*.rate: None -> 0.5",
        ),
    ],
)
def test_parts_that_come_go_or_change_places_are_refused(edit, words, opened):
    config = every_setting()
    edit(config)
    with pytest.raises(UserError, match=words):
        opened.restore_newest(ABSTRACT, config)


def test_held_out_records_may_come_and_go(opened, caplog):
    for sources in ((), (*every_setting().data.eval_sources, Source(name="more", kind="world"))):
        config = every_setting()
        config.data.eval_sources = sources
        assert_step(opened.restore_newest(ABSTRACT, config), 10)
    assert len(caplog.messages) == 2
    assert all("data.eval_sources" in line for line in caplog.messages)


def test_of_many_changes_the_first_four_are_named(opened):
    """What may change is not among them."""
    config = every_setting()
    config.name = "other"
    config.optim = dataclasses.replace(
        config.optim, b1=0.5, b2=0.5, schedule="linear", weight_decay=0.5
    )
    four = (
        "checkpoint: optim.b1: 0.9 -> 0.5; optim.b2: 0.999 -> 0.5; "
        "optim.schedule: 'cosine' -> 'linear'; optim.weight_decay: 0.01 -> 0.5"
    )
    for seed, end in ((42, four), (7, four + " …")):
        config.seed = seed
        with pytest.raises(UserError) as error:
            opened.restore_newest(ABSTRACT, config)
        assert str(error.value).splitlines()[0].endswith(end)


def test_a_checkpoint_older_than_a_setting_continues_where_the_setting_is_off(run, tmp_path):
    """The stored configuration then lacks the setting, which reads as None."""
    folder = shutil.copytree(run, tmp_path / "run")
    as_earlier_version(folder)
    file = folder / "checkpoints/10/config/metadata"
    stored = json.loads(file.read_text())
    assert stored["data"].pop("system") is None
    file.write_text(json.dumps(stored))
    with Store(folder) as store:
        assert_step(store.restore_newest(ABSTRACT, every_setting()), 10)
        config = every_setting()
        config.data.system = "Be brief."
        with pytest.raises(UserError, match="data.system: None -> 'Be brief.'"):
            store.restore_newest(ABSTRACT, config)


def test_the_program_refuses_another_base_and_another_batch(pretrained, adapted, tmp_path):
    """The same through `train`: both settings are named, and the run stays as it was."""
    folder = shutil.copytree(adapted, tmp_path / "run")
    base = shutil.copytree(pretrained / "model", tmp_path / "base")
    config = config_in(folder, str(base))
    config.train = dataclasses.replace(config.train, batch_size=16)
    checkpoints = sorted((folder / "checkpoints").rglob("*"))
    with pytest.raises(
        UserError,
        match=re.escape(
            f"model.path: {str(pretrained / 'model')!r} -> {str(base)!r}; "
            "train.batch_size: 8 -> 16\n"
        ),
    ):
        train(config)
    assert sorted((folder / "checkpoints").rglob("*")) == checkpoints


def test_a_run_that_starts_anew_keeps_its_own_checkpoints_and_the_earlier_ones(
    pretrained, tmp_path, caplog
):
    """--noresume: the new run's weights are saved, and nothing of the earlier run is deleted."""
    folder = shutil.copytree(pretrained, tmp_path / "run")
    config = config_in(folder, seed=5)
    train(config, resume=False)
    for path, seed in ((folder, 5), (folder / "earlier-1", 1)):
        assert Store(path).steps() == [3, 6] and read_config(path).seed == seed
        assert (path / "checkpoints/files.json").is_file()
    assert f"its earlier checkpoints (3, 6) are now in {folder / 'earlier-1'}" in caplog.text
    caplog.clear()
    train(config)  # the same command continues: there is nothing left to do
    assert Store(folder).steps() == [3, 6] and "earlier" not in caplog.text
    new, old = (
        np.asarray(open_model(path, progress=False).state["norm"]["weight"].get_value())
        for path in (folder, pretrained)
    )
    assert not np.array_equal(new, old)
    with Store(folder, config=config) as store:
        store.set_aside()
        assert store.steps() == []
        store.set_aside()
    assert not (folder / "earlier-3").exists() and Store(folder / "earlier-2").steps() == [3, 6]


# ---- which step


def test_the_newest_step_is_the_largest_number_and_any_step_can_be_asked_for(opened):
    assert opened.steps() == [9, 10]
    assert_step(opened.restore_newest(ABSTRACT, every_setting()), 10)
    for step in (9, 10):
        assert_step(opened.restore(step, ABSTRACT, every_setting()), step)
        assert_step(opened.restore(step, ABSTRACT), step)
        assert opened.read_json(step, "provenance") == {"manifest": f"data of {step}"}
        assert opened.read_json(step, "data") == {"row": 10 * step}
    config = every_setting()
    config.seed = 7
    with pytest.raises(UserError, match="checkpoints/9: the configuration changed"):
        opened.restore(9, ABSTRACT, config)
    assert_step(opened.restore(9, ABSTRACT), 9)  # without a configuration nothing is compared


def test_a_step_is_read_onto_the_shardings_asked_for_and_takes_the_frozen_part_as_it_is(opened):
    sharding = NamedSharding(make_mesh(Config().mesh), PartitionSpec("data"))
    abstract = abstract_of(make_state(0), sharding)
    abstract.frozen = {"base": "as it was"}
    state, position = opened.restore(9, abstract)
    assert_step((state, position), 9)
    assert state.trainable["w"].sharding == sharding and state.optimizer["m"].sharding == sharding
    assert len(state.trainable["b"].devices()) == 1 and state.frozen == {"base": "as it was"}


def test_a_folder_without_checkpoints_has_nothing_to_continue(tmp_path):
    with Store(tmp_path / "run", config=every_setting()) as store:
        assert store.restore_newest(ABSTRACT, every_setting()) is None and store.steps() == []


def test_run_folders_and_step_folders_are_found(run, tmp_path):
    assert find_checkpoint(run) == (run, 10)
    for step in (9, 10):
        assert find_checkpoint(run / f"checkpoints/{step}") == (run, step)
    for path, fault in (
        (tmp_path, "holds no checkpoint"),
        (run / "checkpoints", "holds no checkpoint"),
        (run / "checkpoints/8", "does not exist"),
        (tmp_path / "nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=f"{re.escape(str(path))} {fault}; pass a run folder"):
            find_checkpoint(path)


def test_each_step_has_its_own_configuration(tmp_path):
    folder = write_run(tmp_path / "run", every_setting(), steps=(9,))
    config = every_setting()
    config.train.log_every = 7
    write_run(folder, config, steps=(10,))
    paths = ("checkpoints/9", "checkpoints/10", "")
    assert [read_config(folder / path).train.log_every for path in paths] == [
        every_setting().train.log_every,
        7,
        7,
    ]
    assert dataclasses.replace(read_config(folder), train=every_setting().train) == every_setting()
    file = folder / "checkpoints/10/config/metadata"
    for damage in (lambda: file.write_text(file.read_text()[:-9]), file.unlink):
        damage()
        with pytest.raises(UserError, match=f"{re.escape(str(file))}: unreadable config "):
            read_config(folder)


# ---- saving


@pytest.mark.parametrize(
    "keeping, kept",
    [
        ({"keep": 2}, [5, 6]),
        ({"keep": 1}, [6]),
        ({"keep": 9}, [1, 2, 3, 4, 5, 6]),
        ({"keep": 1, "keep_every": 3}, [3, 6]),
        ({"keep": 1, "keep_every": 4}, [4, 6]),
    ],
)
def test_the_newest_and_every_so_many_are_kept_with_their_sizes(keeping, kept, tmp_path):
    """files.json knows every file of every checkpoint that is kept, and no other."""
    run = write_run(tmp_path / "run", every_setting(), steps=range(1, 7), **keeping)
    folder = run / "checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir() if path.is_dir()) == kept
    sizes = {str(step): {} for step in kept}
    for file in folder.glob("*/**/*"):
        if file.is_file():
            step, _, name = str(file.relative_to(folder)).partition("/")
            sizes[step][name] = file.stat().st_size
    assert json.loads((folder / "files.json").read_text()) == sizes


def test_a_step_is_saved_once(tmp_path):
    folder = write_run(tmp_path / "run", every_setting(), steps=(9,))
    files = folder / "checkpoints/9"
    before = {file: file.stat().st_mtime_ns for file in files.rglob("*")}
    with Store(folder, config=every_setting()) as store:
        store.save(make_state(9), {"row": -1}, {})
        assert_step(store.restore(9, ABSTRACT), 9)
    assert before == {file: file.stat().st_mtime_ns for file in files.rglob("*")}


def test_what_changes_after_a_save_has_begun_is_not_in_it(tmp_path):
    """Training gives its buffers away to the next step while the checkpoint is being written."""
    with Store(tmp_path / "run", config=every_setting()) as store:
        state = make_state(9)
        store.save(state, {"row": 90}, {})
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    with Store(tmp_path / "run") as store:
        assert_step(store.restore(9, ABSTRACT), 9)


def test_a_full_disk_is_told_before_anything_is_written(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    # all but the flag `finite`, which is not saved
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(make_state(11))) - 1
    usage = shutil.disk_usage(tmp_path)
    with Store(folder, config=every_setting()) as store:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(UserError) as error:
            store.save(make_state(11), {}, {})
        first, second, third = str(error.value).splitlines()
        assert first.endswith("could not be written; step 10 is the newest whole one")
        assert second.endswith(f"needs {needed} bytes, {needed - 1} are free")
        assert third.startswith("free disk space")
        assert store.steps() == [9, 10]
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        store.save(make_state(11), {}, {})
    assert (folder / "checkpoints/11").is_dir()


# ---- damage


FILES = (
    "_CHECKPOINT_METADATA",
    "config/metadata",
    "data/metadata",
    "provenance/metadata",
    "state/_METADATA",
    "state/manifest.ocdbt",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "largest",
)


def find_file(folder, name):
    """A file of a checkpoint; the largest of the arrays has a drawn name."""
    if name == "largest":
        return max((folder / "state").glob("*/d/*"), key=lambda file: file.stat().st_size)
    return folder / name


@pytest.mark.parametrize("damage", ["cut", "grown", "deleted", "emptied"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_size_sets_the_checkpoint_aside(name, damage, run, tmp_path, caplog):
    """One byte less or more is found by the sizes alone; the checkpoint before is continued."""
    folder = shutil.copytree(run, tmp_path / "run")
    file = find_file(folder / "checkpoints/10", name)
    data = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes({"cut": data[:-1], "grown": data + b"\0", "emptied": b""}[damage])
    with Store(folder, config=every_setting()) as store:
        assert_step(store.restore_newest(ABSTRACT, every_setting()), 9)
        assert store.steps() == [9]
    (said,) = [line for line in caplog.messages if "damaged" in line]
    place = file.relative_to(folder / "checkpoints/10")
    assert said == (
        f"checkpoint {folder / 'checkpoints/10'} is damaged and is skipped: "
        f"1 parts are missing, truncated or changed, e.g. {place}"
    )
    assert (folder / "damaged-10").is_dir() and not (folder / "checkpoints/10").exists()
    assert sorted(json.loads((folder / "checkpoints/files.json").read_text())) == ["9"]


def test_sizes_are_noted_when_a_checkpoint_is_written_and_not_again(tmp_path):
    """A file that is cut later does not become right when the next checkpoint is written."""
    folder = write_run(tmp_path / "run", every_setting(), steps=(9,), keep=3)
    file = find_file(folder / "checkpoints/9", "largest")
    file.write_bytes(file.read_bytes()[:-1])
    write_run(folder, every_setting(), steps=(10,), keep=3)
    file = find_file(folder / "checkpoints/10", "largest")
    file.write_bytes(file.read_bytes()[:-1])
    with Store(folder) as store, pytest.raises(UserError, match=r"is damaged \(10, 9\)"):
        store.restore_newest(ABSTRACT, every_setting())


def test_where_every_checkpoint_is_damaged_nothing_is_touched(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    for step in (9, 10):
        (folder / f"checkpoints/{step}/data/metadata").unlink()
    before = sorted(folder.rglob("*"))
    with (
        Store(folder, config=every_setting()) as store,
        pytest.raises(
            UserError, match=r"every checkpoint is damaged \(10, 9\); nothing was changed"
        ),
    ):
        store.restore_newest(ABSTRACT, every_setting())
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda state: state.trainable.pop("b"), "trainable/b: only in the checkpoint"),
        (
            lambda state: state.trainable.update(c=state.trainable["b"]),
            r"trainable/c: checkpoint missing, model \(2, 3\)",
        ),
        (
            lambda state: state.optimizer.update(m=state.trainable["b"]),
            r"optimizer/m: checkpoint \(8,\), model \(2, 3\)",
        ),
        (
            lambda state: state.trainable.update(
                b=ABSTRACT.trainable["w"], w=ABSTRACT.trainable["b"]
            ),
            r"trainable/b: checkpoint \(2, 3\), model \(8,\) \(and 1 more\)",
        ),
        (
            lambda state: state.trainable.update(c=state.trainable.pop("b")),
            r"trainable/c: checkpoint missing, model \(2, 3\) \(and 1 more\)",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_not_taken_for_damage(edit, words, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    abstract = abstract_of(make_state(0))
    edit(abstract)
    with (
        Store(folder, config=every_setting()) as store,
        pytest.raises(
            UserError, match=f"checkpoints/10 belongs to another model or adapter: {words}"
        ),
    ):
        store.restore_newest(abstract, every_setting())
    assert Store(folder).steps() == [9, 10]
