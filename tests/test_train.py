"""A run from its first step to its last: resumed bit by bit, stopped by a signal, robust against
damage and faults.
"""

import dataclasses
import gc
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from crossin_jax import train as train_program
from crossin_jax.checkpoint.open import open_model
from crossin_jax.checkpoint.store import Store, _saved_part, flatten
from crossin_jax.config import Config, Lora, Mesh, Optim, UserError
from crossin_jax.data.loader import make_loader
from crossin_jax.data.pipeline import open_pipeline
from crossin_jax.evaluate import evaluate as evaluate_run
from crossin_jax.evaluation import metrics
from crossin_jax.evaluation.pairs import measure_pairs
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.train import train
from crossin_jax.training import faults
from crossin_jax.training.optim import make_optimizer
from crossin_jax.training.state import (
    abstract_model,
    abstract_state,
    model_spec,
    start_state,
    to_mesh,
)
from crossin_jax.training.step import StepSettings, make_train_step
from tests.configs import tiny
from tests.helpers import as_earlier_version, config_in


def read_arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Everything a checkpoint holds, as arrays by name."""
    import orbax.checkpoint as ocp

    state = folder / "checkpoints" / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        names = checkpointer.metadata(state).item_metadata.tree
        return checkpointer.restore(
            state,
            args=ocp.args.PyTreeRestore(
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
            ),
        )


def read_losses(folder: Path) -> dict[int, float]:
    """The last recorded loss of every step."""
    losses = {}
    for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "losses" in record:
            first = record["step"] - len(record["losses"]) + 1
            losses |= {first + i: loss for i, loss in enumerate(record["losses"])}
    return losses


def assert_same_state(run: Path, other: Path, step: int) -> None:
    expected, found = read_arrays(run, step), read_arrays(other, step)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(array, found[name], err_msg=name)


def copy_run(run: Path, folder: Path, *, without: int | None = None) -> Path:
    """A copy of a run, as if it had been killed before the checkpoint of a step."""
    shutil.copytree(run, folder)
    if without:
        shutil.rmtree(folder / "checkpoints" / str(without))
    return folder


def test_losses_fall(pretrained, adapted):
    for run, fall in ((pretrained, 0.3), (adapted, 0.1)):
        losses = read_losses(run)
        assert sorted(losses) == [1, 2, 3, 4, 5, 6]
        assert losses[6] < losses[1] - fall
    records = [json.loads(line) for line in (adapted / "metrics.jsonl").read_text().splitlines()]
    held_out = [record for record in records if "held_out/loss" in record]
    assert set(held_out[-1]) == {
        "step",
        "held_out/loss",
        "held_out/loss/dev/en",
        "held_out/loss/dev/es",
    }
    assert records[0].keys() == held_out[-1].keys() and records[0]["step"] == 0
    shares = [value for name, value in records[1].items() if name.startswith("share/")]
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(kind, pretrained, adapted, tmp_path):
    run, variant = (
        (pretrained, "pretrain") if kind == "full" else (adapted, str(pretrained / "model"))
    )
    folder = copy_run(run, tmp_path / "run", without=6)
    (folder / "metrics.jsonl").unlink()
    train(config_in(folder, variant))
    assert_same_state(run, folder, 6)
    assert sorted(read_losses(folder)) == [4, 5, 6]
    assert {s: read_losses(run)[s] for s in (4, 5, 6)} == read_losses(folder)
    positions = [json.loads((f / "checkpoints/6/data/metadata").read_text()) for f in (run, folder)]
    assert positions[0] == positions[1]


# ---- What a run records, beside what is computed from its weights and batches


@pytest.fixture(scope="module")
def recorded(pretrained, tmp_path_factory) -> Config:
    """A run with adapters and dropout in micro-batches; it reports seldom and saves between."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    config = config_in(folder, str(pretrained / "model"), seed=5)
    config.lora.dropout = 0.5
    config.data.sources[0].limit, config.data.eval_sources[0].limit = 60, 25
    config.optim = Optim(learning_rate=2e-2, warmup_share=0.3, schedule="linear", final_share=0.5)
    config.train = dataclasses.replace(
        config.train,
        steps=None,
        epochs=2.7,
        batch_size=16,
        accumulation=2,
        log_every=4,
        eval_every=5,
    )
    train(config)
    return config


def read_records(config: Config, name: str) -> list[dict]:
    """The records of a run that have a field."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if name in record]


def test_epochs_and_periods_give_the_steps_of_a_run(recorded):
    """As many steps as hold the epochs; reports, checkpoints and losses in time and at the end."""
    data = open_pipeline(recorded)
    epoch = make_loader(
        data.mixture, data.renderer, recorded.data, batch_size=16, seed=5, num_epochs=1
    )
    rows = sum(int((batch["segment_ids_BT"][:, 0] > 0).sum()) for batch in epoch)
    assert math.ceil(2.7 * rows / 16) == 7 != round(2.7 * rows / 16)
    # a checkpoint reports what has gathered
    assert [record["step"] for record in read_records(recorded, "losses")] == [1, 3, 4, 6, 7]
    assert [len(record["losses"]) for record in read_records(recorded, "losses")] == [1, 2, 1, 2, 1]
    assert [record["step"] for record in read_records(recorded, "held_out/loss")] == [0, 5, 7]
    assert Store(recorded.output_dir).steps() == [3, 6, 7]


def test_a_run_takes_the_steps_that_its_configuration_says(recorded):
    """Every number is that of the step on these batches, on one device, with this seed and rate."""
    data = open_pipeline(recorded)
    mesh = make_mesh(recorded.mesh, jax.devices()[:1])
    loader = make_loader(data.mixture, data.renderer, recorded.data, batch_size=16, seed=5)
    model = abstract_model(recorded, model_spec(recorded), mesh)
    rule = make_optimizer(recorded.optim, 7)
    state = start_state(recorded, model, abstract_state(model, rule, mesh), rule)
    step = jax.jit(
        make_train_step(
            model.graphdef,
            rule,
            StepSettings(
                accumulation=2,
                loss_chunk=16,
                remat="none",
                attention="auto",
                seed=5,
                num_groups=len(loader.groups),
            ),
        )
    )
    expected = {}
    for i in range(1, 8):
        state, expected[i] = step(state, to_mesh(next(loader), mesh))
    loader.close()
    same = partial(pytest.approx, rel=1e-3)
    rates = {1: 0.01, 3: 0.02, 4: 0.018, 6: 0.014, 7: 0.012}  # warm-up of two steps
    for record in read_records(recorded, "losses"):
        steps = [expected[record["step"] - i] for i in reversed(range(len(record["losses"])))]
        assert record["losses"] == same([float(one["loss"]) for one in steps])
        assert record["grad_norm"] == same(float(steps[-1]["grad_norm"]))
        assert record["learning_rate"] == same(rates[record["step"]])
        losses, counts = (
            np.sum([one[name] for one in steps], 0) for name in ("group_loss", "group_count")
        )
        assert record["loss"] == same(losses.sum() / counts.sum())
        for (component, language), loss, count in zip(loader.groups, losses, counts, strict=True):
            name = f"{component}/{language}"
            assert record.get(f"loss/{name}", 0) == same(loss / max(count, 1))
            assert record.get(f"share/{name}", 0) == same(count / counts.sum())
    ended = read_arrays(Path(recorded.output_dir), 7)
    for name, value in flatten({"trainable": state.trainable}).items():
        np.testing.assert_allclose(ended[name], value, atol=1e-3, err_msg=name)


def test_the_held_out_loss_is_the_mean_over_all_held_out_tokens(recorded):
    """By language and in all, of the last weights, whichever batch an answer is in."""
    data, restored = open_pipeline(recorded), open_model(recorded.output_dir, progress=False)
    examples = list(data.held_out)
    assert len(examples) == 50  # facts in two languages; the last batch has few of them
    tokens, loss_mask = np.zeros((50, 128), np.int32), np.zeros((50, 128), bool)
    for i, example in enumerate(examples):
        rendered = data.renderer.render(example)
        size = len(rendered.ids)
        tokens[i, :size], loss_mask[i, :size] = rendered.ids, rendered.loss_mask
    model = nnx.merge(restored.graphdef, restored.state)
    logits = jax.jit(lambda ids: model(ids))(tokens)[:, :-1]
    scores = np.asarray(jax.nn.log_softmax(logits), np.float64)
    losses = -np.take_along_axis(scores, tokens[:, 1:, None], 2)[..., 0] * loss_mask[:, 1:]
    start, before, record = read_records(recorded, "held_out/loss")
    languages = np.array([example.answer_language for example in examples])
    parts = {"": languages != "", "/dev/en": languages == "en", "/dev/es": languages == "es"}
    for name, chosen in parts.items():
        assert record[f"held_out/loss{name}"] == pytest.approx(
            losses[chosen].sum() / loss_mask[chosen].sum(), rel=1e-5
        ), name
    assert start.keys() == before.keys() == record.keys()
    assert start["held_out/loss"] > before["held_out/loss"] != record["held_out/loss"]


def test_signals_while_compiling_and_while_saving(pretrained, tmp_path, monkeypatch):
    """Two signals each time; every exit leaves a whole checkpoint, and the run ends as if nothing
    had happened.
    """

    def tell(function):
        def then_signal(*arguments):
            result = function(*arguments)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        return then_signal

    for place, name, saved in ((train_program, "to_mesh", [1]), (Store, "save", [1, 3, 4])):
        before = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            # Then comes the compiler; then a save is under way.
            patch.setattr(place, name, tell(getattr(place, name)))
            train(config_in(tmp_path / "run"))
        signal.signal(signal.SIGTERM, before)
        assert stop.value.code == 75
        assert Store(tmp_path / "run").steps() == saved
    train(config_in(tmp_path / "run"))
    assert_same_state(pretrained, tmp_path / "run", 6)
    assert read_losses(pretrained) == read_losses(tmp_path / "run")


@pytest.mark.parametrize("checked", [True, False])
def test_a_damaged_checkpoint_is_named_and_skipped(checked, pretrained, tmp_path, caplog):
    folder = copy_run(pretrained, tmp_path / "run")
    if not checked:  # killed before the sizes were written: reading finds it
        (folder / "checkpoints/files.json").unlink()
    files = sorted(
        (folder / "checkpoints/6/state").rglob("*"),
        key=lambda f: f.stat().st_size if f.is_file() else 0,
    )
    files[-1].write_bytes(files[-1].read_bytes()[:100])
    train(config_in(folder))
    assert "checkpoints/6 is damaged and is skipped" in caplog.text
    named = files[-1].relative_to(folder / "checkpoints/6")
    assert "parts are missing, truncated or changed, e.g. state/" in caplog.text
    assert (f"1 parts are missing, truncated or changed, e.g. {named}" in caplog.text) == checked
    assert (folder / "damaged-6").is_dir()
    assert_same_state(pretrained, folder, 6)
    gc.collect()  # what Orbax left behind is reported here and nowhere else


# A failed read of Orbax leaves threads and coroutines behind; Python warns when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_damage_to_any_file_is_either_found_or_harmless(pretrained, tmp_path):
    """Each file of the newest checkpoint, cut in half and deleted, with its sizes unknown: never a
    third thing.
    """
    config = config_in(pretrained)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    model = abstract_model(config, model_spec(config), mesh)
    abstract = abstract_state(model, make_optimizer(config.optim, 6), mesh)
    whole = [read_arrays(pretrained, step) for step in (3, 6)]
    names = [
        file.relative_to(pretrained)
        for file in (pretrained / "checkpoints/6").rglob("*")
        if file.is_file()
    ]
    found = set()
    for name in names:
        for cut in (True, False):
            folder = copy_run(pretrained, tmp_path / "run")
            (folder / "checkpoints/files.json").unlink()
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(data[: len(data) // 2]) if cut else (folder / name).unlink()
            with Store(folder) as store:
                state, position = store.restore_newest(abstract, config)
            step = int(state.step)
            expected = whole[step // 3 - 1]
            assert all(
                np.array_equal(value, expected[key])
                for key, value in flatten(_saved_part(state)).items()
            ), name
            kept = json.loads((pretrained / f"checkpoints/{step}/data/metadata").read_text())
            assert position == kept, (name, cut)
            found |= {name} if step == 3 else set()
            shutil.rmtree(folder)
    items = {"config", "data", "fingerprints", "provenance", "state"}
    assert items == {name.parts[2] for name in found}
    assert len(names) > len(found) > 5
    gc.collect()


# As above.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_with_nothing_but_damage_is_refused(pretrained, tmp_path):
    folder = copy_run(pretrained, tmp_path / "run", without=6)
    (folder / "checkpoints/3/state/manifest.ocdbt").unlink()
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(3\); nothing was changed"):
        train(config_in(folder))
    assert (folder / "checkpoints/3").is_dir() and not (folder / "damaged-3").exists()
    gc.collect()


def test_the_newest_and_every_so_many_are_kept(pretrained, tmp_path):
    settings = dataclasses.replace(
        tiny.get_config().train, checkpoint_every=1, keep=1, keep_every=2
    )
    train(config_in(tmp_path / "run", train=settings))
    assert Store(tmp_path / "run").steps() == [2, 4, 6]
    assert read_losses(tmp_path / "run") == read_losses(pretrained)
    train(config_in(tmp_path / "run", train=dataclasses.replace(settings, keep_every=None)))
    assert Store(tmp_path / "run").steps() == [2, 4, 6]  # finished: nothing is saved, nothing goes


def count_compiled(caplog) -> int:
    """How often the training step was compiled."""
    return sum(
        "Finished XLA compilation of jit(train_step)" in record.message for record in caplog.records
    )


def test_a_run_continues_on_another_mesh_and_compiles_once(pretrained, tmp_path, caplog):
    """data=8 to fsdp=4 x tensor=2 and back: the losses of the run that stayed, to 1e-5."""
    every = dataclasses.replace(tiny.get_config().train, checkpoint_every=1)
    folder, expected = copy_run(pretrained, tmp_path / "run", without=6), read_losses(pretrained)
    (folder / "metrics.jsonl").unlink()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        train(config_in(folder, mesh=Mesh(fsdp=4, tensor=2), train=every))
    assert count_compiled(caplog) == 1  # for three steps, the first of them on restored arrays
    assert "continues with other settings: mesh.fsdp: 1 -> 4; mesh.tensor: 1 -> 2; " in caplog.text
    there = read_losses(folder)
    shutil.rmtree(folder / "checkpoints/6")
    (folder / "metrics.jsonl").unlink()
    train(config_in(folder))
    back = read_losses(folder)
    assert sorted(there) == [4, 5, 6] and sorted(back) == [6]
    for losses in (there, back):
        np.testing.assert_allclose(list(losses.values()), [expected[s] for s in losses], rtol=1e-5)


def test_an_adapter_in_micro_batches_on_a_mesh_compiles_once(pretrained, tmp_path, caplog):
    parts = dataclasses.replace(tiny.get_config().train, accumulation=2)
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        train(
            config_in(
                tmp_path / "run",
                str(pretrained / "model"),
                mesh=Mesh(fsdp=2, tensor=2),
                train=parts,
            )
        )
    assert count_compiled(caplog) == 1 and len(read_losses(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("words", "steps"), [([], ()), (["10", "12"], (10, 12)), (["0", "1"], (0, 1))]
)
def test_two_steps_make_a_window_of_the_profiler(words, steps):
    assert train_program.read_window(words) == steps


@pytest.mark.parametrize(
    "words",
    [["10"], ["12", "10"], ["10", "10"], ["1", "2", "3"], ["a", "2"], ["1", "b", "2"], ["-1", "3"]],
)
def test_anything_else_is_no_window(words):
    with pytest.raises(UserError, match="give two steps, the first below the second"):
        train_program.read_window(words)


def test_compiled_programs_are_kept_where_nobody_said_where(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    train_program.keep_compiled(str(tmp_path / "other"))
    assert jax.config.jax_compilation_cache_dir == before  # the environment variable goes first
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        train_program.keep_compiled("")
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("HOME", str(tmp_path))
        train_program.keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache/crossin_jax/xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_another_experiment_is_refused(pretrained, adapted, tmp_path):
    changed = dataclasses.replace(tiny.get_config().optim, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"optim.learning_rate: 0.01 -> 0.001"):
        train(config_in(copy_run(pretrained, tmp_path / "a"), optim=changed))
    with pytest.raises(UserError, match="lora.rank: 4 -> 8"):
        train(
            config_in(
                copy_run(adapted, tmp_path / "b"),
                str(pretrained / "model"),
                lora=Lora(rank=8, alpha=8.0, dropout=0.1, modules_to_save=()),
            )
        )


def test_a_checkpoint_of_another_model_is_refused(pretrained, tmp_path):
    """Where the stored configuration does not tell, as after another model was put in the folder of
    the base.
    """
    folder = as_earlier_version(copy_run(pretrained, tmp_path / "run"))
    config = config_in(folder)
    config.model.architecture.ff_width = 64
    for file in folder.glob("checkpoints/*/config/metadata"):
        file.write_text(file.read_text().replace('"ff_width": 48', '"ff_width": 64'))
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        UserError,
        match=r"checkpoints/6 belongs to another model or adapter: .*down_proj/weight: "
        r"checkpoint \(2, 32, 48\), model \(2, 32, 64\) \(and 8 more\)",
    ):
        train(config)
    assert sorted(folder.rglob("*")) == before  # nothing is set aside as damaged


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    place = train_program.to_mesh

    def poison(batch, mesh):  # the embedding of a token outside the vocabulary is NaN
        return place(batch | {"tokens_BT": np.full_like(batch["tokens_BT"], 10_000)}, mesh)

    monkeypatch.setattr(train_program, "to_mesh", poison)
    with pytest.raises(UserError, match=r"step \d is not finite; there is no checkpoint yet"):
        train(config_in(tmp_path / "run"))


def test_a_fault_names_its_rows_and_leaves_the_last_good_state(pretrained, tmp_path, monkeypatch):
    """Two rows of the fifth batch have a token outside the vocabulary: its embedding is NaN.

    The next report, which finds it, is that of the sixth step.
    """
    place, batches = train_program.to_mesh, []

    def poison(batch, mesh):
        batches.append(batch)
        if len(batches) >= 5:  # and again when the rows are looked for
            batch = batch | {
                "tokens_BT": np.where(
                    np.isin(np.arange(8), (2, 7))[:, None], 10_000, batch["tokens_BT"]
                )
            }
        return place(batch, mesh)

    for module in (train_program, faults):
        monkeypatch.setattr(module, "to_mesh", poison)
    with pytest.raises(UserError) as told:
        train(
            config_in(
                tmp_path / "run", train=dataclasses.replace(tiny.get_config().train, log_every=4)
            )
        )
    first, second, third = str(told.value).splitlines()
    assert first.endswith(
        "run: the loss or gradient of step 5 is not finite; checkpoint 3 is the last good state"
    )
    # Of that very step.
    assert all(np.array_equal(batches[4][name], rows) for name, rows in batches[-1].items())
    fault = json.loads((tmp_path / "run/fault.json").read_text())
    assert fault["step"] == 5 and [row["row"] for row in fault["rows"] if not row["finite"]] == [
        2,
        7,
    ]
    examples = [name for i in (2, 7) for name in fault["rows"][i]["examples"]]
    assert second.startswith(f"rows 2, 7 of the batch: {examples[0]}; {examples[1]}")
    assert_same_state(pretrained, tmp_path / "run", 3)


def test_a_tokenizer_of_another_model_is_refused(pretrained, tmp_path):
    config = config_in(tmp_path / "run", str(pretrained / "model"))
    folder = shutil.copytree(pretrained / "tokenizer", tmp_path / "tokenizer")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"new{i}": 400 + i for i in range(30)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config.model.tokenizer = str(folder)
    with pytest.raises(UserError, match="430 tokens, but the model's vocabulary has 400"):
        train(config)


def test_benchmarks_and_profiler_run_during_training(adapted, pretrained, tmp_path):
    config = config_in(tmp_path / "run", str(pretrained / "model"))
    config.train = dataclasses.replace(config.train, benchmark_every=3)
    config.evaluation = dataclasses.replace(config.evaluation, method="choices", limit=40)
    # a process of its own: where another test has loaded libtpu, jax's profiler may end the process
    process = multiprocessing.get_context("spawn").Process(
        target=train, args=(config,), kwargs={"profile_steps": (2, 3)}
    )
    process.start()
    process.join(300)
    assert process.exitcode == 0
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    scored = [record for record in records if "cross_world:dev/sum/p0/AC3_2" in record]
    assert [record["step"] for record in scored] == [3, 6]
    assert all(0 <= record["cross_world:dev/sum/p0/accuracy/es"] <= 1 for record in scored)
    predictions, _ = evaluate_run(config, tmp_path / "run", tmp_path / "evaluation")
    (asked,) = [one for one in predictions if one.method == "sum"]
    # Of the weights of that step; of a measure that every language has, the mean alone
    measured = {k: v for k, v in measure_pairs(asked).items() if "/" not in k}
    assert {"rankc", "agreement_right", "transfer", "conductivity"} == measured.keys()
    measured |= metrics.evaluate(asked, config.evaluation.mode).flatten()
    for key, value in measured.items():
        assert scored[1][f"cross_world:dev/sum/p0/{key}"] == pytest.approx(value, nan_ok=True), key
    assert scored[0] | {"step": 6} != scored[1]
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert read_losses(tmp_path / "run") == read_losses(adapted)  # asking changes nothing


@pytest.mark.parametrize(
    ("every", "minutes", "step", "passed", "is_due"),
    [
        (500, 15.0, 500, 0, True),
        (500, 15.0, 7, 15.5, True),
        (500, 15.0, 7, 14.5, False),
        (500, None, 7, 99, False),
        (None, 15.0, 7, 99, False),  # only at the end
    ],
)
def test_a_step_is_saved_by_its_number_or_by_the_clock(every, minutes, step, passed, is_due):
    settings = dataclasses.replace(
        tiny.get_config().train, checkpoint_every=every, checkpoint_minutes=minutes
    )
    saved_at = time.monotonic() - 60 * passed
    assert train_program.is_save_due(settings, step, saved_at) == is_due


def test_the_command_that_continues_does_not_start_anew(monkeypatch):
    command = ["/usr/bin/python", "-m", "crossin_jax.train", "--config", "my run.py", "--noresume"]
    monkeypatch.setattr(sys, "orig_argv", command)
    assert train_program.describe_command() == (
        "the same command continues: python -m crossin_jax.train --config 'my run.py'"
    )
