"""Checkpoints (Orbax): trained weights, optimizer moments, data position, configuration and
provenance.

Frozen weights are not stored; they come from `model.path` again. Orbax writes a checkpoint under a
temporary name and renames it when it is whole, so a killed run leaves nothing that looks like a
checkpoint. Whether a checkpoint is still what was saved is known by two things:
`checkpoints/files.json` keeps the sizes of all files, so that one that lost some is found before
several hosts begin to read it, and the item `fingerprints` knows every array and every small item.

    checkpoints/files.json
    checkpoints/500/state/          arrays: step, trainable/…, optimizer/…
    checkpoints/500/data/metadata   also config/, provenance/ and fingerprints/: one JSON file each
"""

import contextlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from crossin_jax import config as settings
from crossin_jax.checkpoint.fingerprint import (
    SEAL,
    SMALL_ITEMS,
    find_changed,
    find_changed_item,
    find_damage,
    fingerprints,
    flatten,
    make_seal,
    read_seal,
    read_sizes,
)
from crossin_jax.config import Config, UserError
from crossin_jax.files import write_whole
from crossin_jax.parallel import hosts
from crossin_jax.paths import absolute, as_path, is_bucket, measure_files, move
from crossin_jax.training.step import TrainState

# fields that may differ between a checkpoint and the run that continues it
MAY_CHANGE = (
    "name",
    "output_dir",
    "mesh.",
    "train.log_every",
    "train.eval_every",
    "train.benchmark_every",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep",
    "train.tensorboard",
    "train.loss_chunk",
    "evaluation.",
    "data.workers",
    "data.eval_sources",
    "model.attention",
    "model.remat",
)


COMMITTED = "commit_success.txt"  # what Orbax writes last into a checkpoint in a bucket
USE_ANOTHER = "use another step, or bring the folder back from a copy"


def _saved_part(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "trainable": state.trainable, "optimizer": state.optimizer}


class Store:
    """The checkpoints of one run, in `output_dir/checkpoints/STEP`."""

    def __init__(self, output_dir: str | Path, *, config: Config | None = None):
        """Opens the checkpoints for reading, or with a configuration for writing too."""
        self.folder = absolute(output_dir) / "checkpoints"
        self._config = config
        writes = (
            {"max_to_keep": config.train.keep, "keep_period": config.train.keep_every}
            if config
            else {}
        )
        json_items = {name: ocp.JsonCheckpointHandler() for name in (*SMALL_ITEMS, SEAL)}
        if config is not None:
            move_junk(self.folder)
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={"state": ocp.StandardCheckpointHandler(), **json_items},
            options=ocp.CheckpointManagerOptions(
                create=config is not None, cleanup_tmp_directories=config is not None, **writes
            ),
        )

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, state: TrainState, data_position: dict[str, Any], provenance: dict[str, Any]
    ) -> None:
        """Starts an asynchronous save; the arrays are copied before this returns."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self.wait()  # for the one before: its failure belongs to it
        arrays = flatten(_saved_part(state))
        items = {
            "data": data_position,
            "config": settings.to_dict(self._config),
            "provenance": provenance,
        }
        needed = sum(
            shard.data.nbytes
            for leaf in arrays.values()
            for shard in leaf.addressable_shards
            if shard.replica_id == 0
        )
        free = math.inf if is_bucket(self.folder) else shutil.disk_usage(self.folder).free
        if hosts.any_process(needed > free):
            self._raise_unwritten(OSError(f"it needs {needed:,} bytes, {free:,} are free"))
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    **{name: ocp.args.JsonSave(value) for name, value in items.items()},
                    **{SEAL: ocp.args.JsonSave(make_seal(arrays, items))},
                ),
            )
        except OSError as error:
            self._raise_unwritten(error)

    def wait(self) -> None:
        """Blocks until every started save is on disk; `UserError` where one could not be
        written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:  # Orbax wraps what the file system said in errors of many kinds
            self._raise_unwritten(error)
        if jax.process_index() == 0 and self._config:
            known = read_sizes(self.folder)
            sizes = {
                str(step): known.get(str(step)) or measure_files(self.folder / str(step))
                for step in self.steps()
            }
            if sizes != known:
                write_whole(self.folder / "files.json", json.dumps(sizes))

    def _raise_unwritten(self, error: Exception) -> None:
        whole = max(list_steps(self.folder), default=None)
        kept = f"step {whole} is the newest whole one" if whole else "there is none yet"
        said = str(error).splitlines()[0][-200:]
        raise UserError(
            f"{self.folder}: a checkpoint could not be written; {kept}\n{said}\n"
            "free disk space or name another output_dir; the same command continues"
        ) from error

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Finishes saves and releases the manager's threads; it does not mask an exception that is
        being raised.
        """
        if kind is None:
            self.wait()
        with contextlib.suppress(Exception):  # nothing is lost: the saves are finished
            self._manager.close()

    def restore(
        self, step: int, abstract: TrainState, config: Config | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and data position of a step, on the shardings of `abstract`; `frozen` is taken
        from `abstract`.

        Raises OSError where an array is not what was saved.
        """
        if config is not None:
            check_same_experiment(self.read_json(step, "config"), config, self.folder / str(step))
        part = _saved_part(abstract)
        flat = flatten(part)
        self._check_shapes(step, flat)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(flat), data=ocp.args.JsonRestore()
            ),
        )
        seal = read_seal(self.folder / str(step))
        if seal is None:
            logging.warning(
                "%s: an earlier version wrote it without fingerprints; only the sizes of its files "
                "can be checked",
                self.folder / str(step),
            )
        elif changed := find_changed(seal["arrays"], restored["state"])[0]:
            raise OSError(f"{len(changed)} arrays are not what was saved, e.g. {changed[0]}")
        part = jax.tree.unflatten(
            jax.tree.structure(part), [restored["state"][name] for name in flat]
        )
        finite = jax.numpy.ones((), bool)
        state = TrainState(
            part["step"], finite, part["trainable"], abstract.frozen, part["optimizer"]
        )
        return state, restored["data"]

    # Each process reads only its own shards, so one process may meet damage that the others do not
    # see. But all must continue from the same step. So for every step they ask each other twice,
    # with `any_process`: is the step damaged for anybody, and could anybody not read it?
    #
    #     step 900    process 0: read     process 1: cannot read    → all skip it
    #     step 800    process 0: read     process 1: read           → all continue from 800
    def restore_newest(
        self, abstract: TrainState, config: Config
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that reads whole; damaged ones are named and set aside. None where
        there is none.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                lost = find_damage(self.folder / str(step))
                if hosts.any_process(bool(lost)):
                    raise OSError(describe_damage(lost) if lost else "see process 0")
                restored, fault = self.restore(step, abstract, config), None
            except UserError:
                raise
            except Exception as error:
                fault = error
            if not hosts.any_process(fault is not None):
                for bad in damaged if jax.process_index() == 0 else []:
                    place = self.folder.parent / f"damaged-{bad}"
                    move(self.folder / str(bad), place, marker=COMMITTED)
                hosts.barrier("damaged checkpoints are set aside")
                self._manager.reload()
                return restored
            logging.warning(
                "checkpoint %s is damaged and is skipped: %s",
                self.folder / str(step),
                str(fault).split("\n")[0][:200],
            )
            damaged.append(step)
        if damaged:
            raise UserError(
                f"{self.folder}: every checkpoint is damaged ({', '.join(map(str, damaged))}); "
                "nothing was changed\n"
                "bring the folder back from a copy, or start over with another output_dir"
            )
        return None

    def set_aside(self) -> None:
        """Moves all checkpoints and their curves to `output_dir/earlier-N`: a run that starts over
        writes its own.
        """
        steps = self.steps()
        if steps and jax.process_index() == 0:
            run, number = self.folder.parent, 1
            while (run / f"earlier-{number}").exists():
                number += 1
            place = run / f"earlier-{number}" / "checkpoints"
            place.mkdir(parents=True)
            for name in (*map(str, steps), "files.json"):
                if (self.folder / name).exists():
                    move(self.folder / name, place / name, marker=COMMITTED)
            for name in ("metrics.jsonl", "tensorboard"):
                if (run / name).exists():
                    move(run / name, place.parent / name)
            logging.warning(
                "%s: starts from the beginning; its earlier checkpoints (%s) are now in %s",
                run,
                ", ".join(map(str, steps)),
                place.parent,
            )
        hosts.barrier("earlier checkpoints are set aside")
        self._manager.reload()

    def read_json(self, step: int, item: str) -> dict[str, Any]:
        """The stored configuration, data position or provenance of a step."""
        return self._manager.restore(
            step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()})
        )[item]

    def _check_shapes(self, step: int, flat: dict[str, Any]) -> None:
        stored = self._manager.item_metadata(step)["state"]
        if stored is None:
            raise OSError("its list of arrays is gone")
        stored = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        wrong = [
            f"{name}: checkpoint {stored.get(name, 'missing')}, model {tuple(np.shape(leaf))}"
            for name, leaf in flat.items()
            if stored.get(name) != tuple(np.shape(leaf))
        ]
        wrong += [f"{name}: only in the checkpoint" for name in stored if name not in flat]
        if wrong:
            raise UserError(
                f"{self.folder / str(step)} belongs to another model or adapter: {wrong[0]}"
                + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            )


def describe_damage(lost: list[str]) -> str:
    """What `find_damage` found, in a few words."""
    return f"{len(lost)} parts are missing, truncated or changed, e.g. {lost[0]}"


def list_steps(checkpoints: Path) -> list[int]:
    """The steps in a folder of checkpoints, damaged ones included, oldest first."""
    return sorted(
        int(path.name)
        for path in checkpoints.glob("*")
        if is_step(path) and not is_junk(path) and is_committed(path)
    )


def is_step(path: Path) -> bool:
    """Whether a name is that of a step, as this module writes it."""
    return path.name.isdecimal() and path.name.isascii() and path.name == str(int(path.name))


def is_committed(path: Path) -> bool:
    """Whether a checkpoint was written to its end: a folder has its name only then, in a bucket an
    object says so.
    """
    return not is_bucket(path) or (path / COMMITTED).exists()


def is_junk(path: Path) -> bool:
    """Whether something with the name of a step holds no part of a checkpoint."""
    parts = ("state", "_CHECKPOINT_METADATA", *SMALL_ITEMS)
    return not any((path / part).exists() for part in parts)


def move_junk(checkpoints: Path) -> None:
    """Moves what has the name of a step and is no checkpoint to `output_dir`: Orbax would count it
    as the newest one.
    """
    junk = [path for path in checkpoints.glob("*") if is_step(path) and is_junk(path)]
    for path in junk if jax.process_index() == 0 else []:
        place = checkpoints.parent / f"no-checkpoint-{path.name}"
        while place.exists():
            place = place.with_name(place.name + "+")
        move(path, place)
        logging.warning("%s is not a checkpoint; it was moved to %s", path, place)
    if hosts.any_process(bool(junk)):
        hosts.barrier("what is no checkpoint is moved")


def check_same_experiment(stored: dict[str, Any], config: Config, place: Path) -> None:
    """Refuses to continue a checkpoint whose configuration differs in a field that changes what is
    learned; other fields that differ are logged."""
    # Later settings are not stored where they have their default.
    defaults = flatten_dict(settings.to_dict(settings.Config(), complete=True))
    later = defaults.keys() - flatten_dict(settings.to_dict(settings.Config())).keys()
    before, now = (
        {name: defaults[name] for name in later} | flatten_dict(values)
        for values in (stored, settings.to_dict(config))
    )
    differ = [
        name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    changed = [name for name in differ if not name.startswith(MAY_CHANGE)]

    def describe(names: list[str]) -> str:
        return "; ".join(f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names)

    if changed:
        raise UserError(
            f"{place}: the configuration changed since this checkpoint: {describe(changed[:4])}"
            f"{' …' if len(changed) > 4 else ''}\n"
            "use another output_dir, delete the checkpoint, or say --noresume"
        )
    if differ and jax.process_index() == 0:
        logging.warning("%s: continues with other settings: %s", place, describe(differ))


def flatten_dict(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested JSON as {"a.b[0].c": value}."""
    if isinstance(values, dict) and values:
        parts = [(f"{prefix}.{name}".lstrip("."), value) for name, value in values.items()]
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        parts = [(f"{prefix}[{i}]", value) for i, value in enumerate(values)]
    else:
        return {prefix: values}
    return {name: leaf for path, value in parts for name, leaf in flatten_dict(value, path).items()}


def check_place(path: str | Path, name: str = "") -> None:
    """Refuses places for checkpoints of which Orbax has no driver: s3:// and other addresses."""
    if "://" in str(path) and not str(path).startswith("gs://"):
        raise UserError(
            f"{name}{path}: checkpoints can be in a folder or in gs:// only; name one of these "
            "(docs/tpu.md has the reason)"
        )


def is_run(path: str | Path) -> bool:
    """Whether a path is a run folder or one of its `checkpoints/STEP` folders."""
    folder = as_path(path)
    return (folder / "checkpoints").is_dir() or (
        folder.name.isdigit() and folder.resolve().parent.name == "checkpoints"
    )


def find_checkpoint(path: str | Path) -> tuple[Path, int]:
    """(run folder, step) for a run folder or for one of its `checkpoints/STEP` folders."""
    check_place(path)
    folder = absolute(path)
    if folder.name.isdigit() and folder.parent.name == "checkpoints":
        run = folder.parent.parent
        steps = [step for step in list_steps(folder.parent) if step == int(folder.name)]
    else:
        run = folder
        steps = list_steps(folder / "checkpoints")
    if not steps:
        fault = "holds no checkpoint" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{path} {fault}; pass a run folder with checkpoints/STEP, or such a STEP folder"
        )
    return run, max(steps)


def read_config(path: str | Path) -> Config:
    """The configuration stored in a checkpoint."""
    run, step = find_checkpoint(path)
    return settings.from_dict(read_item(run / "checkpoints" / str(step), "config"))


def read_item(folder: Path, item: str) -> dict[str, Any]:
    """A small item of a checkpoint; `UserError` where it cannot be read or is not what was
    saved.
    """
    file = folder / item / "metadata"
    try:
        value = json.loads(file.read_text())
        if changed := find_changed_item(folder, item):
            raise ValueError(f"{changed} is not what was saved")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: unreadable {item} ({error}); {USE_ANOTHER}") from error
    return value


def read_origin(folder: Path) -> dict[str, Any]:
    """The provenance of a checkpoint; empty where an early version wrote none."""
    is_there = (folder / "provenance" / "metadata").is_file() or (folder / SEAL).is_dir()
    return read_item(folder, "provenance") if is_there else {}


def identify_start(store: Store, state: TrainState, is_resumed: bool) -> dict[str, str]:
    """What a run began to train, by content: weights of a base, of an adapter, or random ones."""
    if not is_resumed:
        return fingerprints(state.trainable)
    # Empty where an earlier version began the run.
    return read_origin(store.folder / str(int(state.step))).get("start_weights", {})
