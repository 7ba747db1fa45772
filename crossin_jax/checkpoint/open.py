"""Open a model: the one way from a run, a folder of weights, a Hub id, an adapter or a
configuration to its arrays.

Whatever is opened becomes a configuration first. Weights then come from up to three places:

    config.model.path ──► every weight of the base model
    config.lora.path  ──► the adapter's weights, on top of the base
    checkpoints/STEP  ──► the trained weights of a run; its frozen ones come from the base

Shape letters: B batch rows · T positions · V vocabulary.
"""

import dataclasses
import functools
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from crossin_jax import config as settings
from crossin_jax.checkpoint import peft
from crossin_jax.checkpoint.fingerprint import find_changed, find_damage, flatten, read_seal
from crossin_jax.checkpoint.hf import read_export, read_spec, resolve_folder
from crossin_jax.checkpoint.store import (
    USE_ANOTHER,
    describe_damage,
    find_checkpoint,
    is_run,
    read_config,
    read_origin,
)
from crossin_jax.config import Config, UserError
from crossin_jax.data.pipeline import open_tokenizer
from crossin_jax.models.spec import ModelSpec
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.paths import as_path
from crossin_jax.provenance import identify_tokenizer
from crossin_jax.training.state import (
    AbstractModel,
    abstract_model,
    check_base,
    load_base,
    load_start,
    model_spec,
    resolve_precision,
)

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to call, `model(tokens_BT) -> logits_BTV` in float32, and what it came from.

    `config` is the configuration of the run, or one that says what was opened. `base` is the folder
    of the base model, None for a run that started from random weights. `run`, `step` and
    `provenance` belong to a run.
    """

    config: Config
    spec: ModelSpec
    graphdef: Any
    state: nnx.State
    mesh: Mesh
    base: Path | None
    run: Path | None = None
    step: int | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    opened_tokenizer: Any = None

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the model; `UserError` where there is none."""
        if self.opened_tokenizer is not None:
            return self.opened_tokenizer
        tokenizer = open_tokenizer(self.config)
        if place := self.config.model.tokenizer or self.base:
            warn_of_changed_tokenizer(as_path(place), tokenizer)
        return tokenizer

    @functools.cached_property
    def _logits(self) -> Any:
        return jax.jit(lambda state, *inputs: nnx.merge(self.graphdef, state)(*inputs))

    def __call__(
        self, tokens_BT: Any, positions_BT: Any = None, segment_ids_BT: Any = None
    ) -> jax.Array:
        """Logits (B, T, V) for token ids (B, T); segment 0 is padding. Compiled once per shape."""
        tokens_BT = np.asarray(tokens_BT, np.int32)
        is_in_vocabulary = not tokens_BT.size or (
            tokens_BT.min() >= 0 and tokens_BT.max() < self.spec.vocab_size
        )
        if tokens_BT.ndim != 2 or not is_in_vocabulary:
            raise UserError(
                f"tokens of shape {tokens_BT.shape}: pass (rows, tokens) of ids from 0 to "
                f"{self.spec.vocab_size - 1}"
            )
        with jax.set_mesh(self.mesh):
            return self._logits(self.state, tokens_BT, positions_BT, segment_ids_BT)


def open_model(
    source: str | os.PathLike | Config,
    *,
    adapter: str | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    progress: bool = True,
    **model: Any,
) -> LoadedModel:
    """The model of a run (its newest step), of one `checkpoints/STEP`, of a folder, Hub id, adapter
    or configuration.

    `dtype` is the precision of products, and for weights that belong to no run their own too;
    "auto" is that of the run, which its exports name too, else what the device computes fast.
    `mesh` None takes the configuration's where it fits this machine, else one that shards
    parameters over all devices. Other keywords override settings of `config.model`, e.g.
    `frozen_dtype="float32"`. Raises `UserError` for what cannot be opened.
    """
    if dtype not in (None, "auto", "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}: models compute in auto, float32 or bfloat16")
    config, run, step = _find_source(source, adapter, revision)
    origin, tokenizer = {}, None
    if run is None and not isinstance(source, Config):
        if dtype == "auto":
            device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
            dtype = resolve_precision(config, device).model.compute_dtype
        if dtype:
            model = {"param_dtype": dtype, "frozen_dtype": dtype} | model
    if dtype and dtype != "auto":  # "auto": a run computes as it did in training
        model = {"compute_dtype": dtype} | model
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    if run is not None:
        folder = run / "checkpoints" / str(step)
        origin = read_origin(folder)
        tokenizer = open_tokenizer(config)
        if "tokenizer" not in model:  # else the caller names another one on purpose
            check_same_tokenizer(config, tokenizer, origin, folder)
    mesh = mesh or fit_mesh(config.mesh)
    config = resolve_precision(config, mesh.devices.flat[0])
    base, local = None, config
    if config.model.path:
        # A Hub id is looked up once. The configuration keeps the name for those who record it.
        base = resolve_folder(config.model.path, config.model.revision)
        at_base = dataclasses.replace(config.model, path=str(base), revision=None)
        local = dataclasses.replace(config, model=at_base)
    spec = model_spec(local)
    abstract = abstract_model(config, spec, mesh)
    if run is None:
        state = load_start(local, abstract.trainable, abstract.frozen, progress=progress)
        return LoadedModel(config, spec, abstract.graphdef, nnx.merge_state(*state), mesh, base)
    trainable, frozen = read_trained(folder, abstract), abstract.frozen
    if jax.tree.leaves(frozen):
        (frozen,) = load_base(local, frozen, progress=progress)
        if not check_base(config, frozen, origin, folder):
            # Compared as it was in training, which takes another reading.
            as_trained = abstract_model(read_config(source), spec, mesh).frozen
            check_base(config, load_base(local, as_trained, progress=False)[0], origin, folder)
    state = nnx.merge_state(trainable, frozen)
    return LoadedModel(
        config, spec, abstract.graphdef, state, mesh, base, run, step, origin, tokenizer
    )


def _find_source(
    source: str | os.PathLike | Config, adapter: str | None, revision: str | None
) -> tuple[Config, Path | None, int | None]:
    """A configuration, and the run with its newest or the named step, where it is one."""
    if isinstance(source, Config):
        return source, None, None
    if not is_run(source):
        return describe_weights(source, adapter, revision), None, None
    if adapter is not None:
        raise UserError(
            f"--adapter={adapter}: {source} is a run with weights of its own; export it first"
        )
    run, step = find_checkpoint(source)
    # The run may have moved. Its tokenizer lies beside its checkpoints.
    return dataclasses.replace(read_config(source), output_dir=str(run)), run, step


def describe_weights(
    source: str | os.PathLike, adapter: str | os.PathLike | None, revision: str | None
) -> Config:
    """The configuration of weights that no run of ours wrote: a folder or Hub id, and maybe an
    adapter on it.

    Where `source` itself is an adapter, its base is the one that it names.
    """
    folder = resolve_folder(source, revision)
    tokenizer = None
    if adapter is None and is_adapter_folder(folder):
        adapter = folder
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = str(folder)
        folder = peft.find_base(folder)
    lora = peft.read_adapter(adapter, read_spec(folder)).lora if adapter else None
    model = settings.Model(path=str(folder), tokenizer=tokenizer)
    # An export of ours computes as its run did.
    recorded = read_export(as_path(adapter or folder)).get("precision")
    if recorded in ("float32", "bfloat16"):
        model.compute_dtype = recorded
    return Config(model=model, lora=lora)


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file()


def check_same_tokenizer(
    config: Config, tokenizer: Any, origin: dict[str, Any], place: Path
) -> None:
    """Refuses a tokenizer that is not the one which the checkpoint in `place`, of provenance
    `origin`, was trained with.
    """
    if origin.get("tokenizer") not in (None, identify_tokenizer(tokenizer)):
        name = config.model.tokenizer or config.model.path or f"{config.output_dir}/tokenizer"
        raise UserError(
            f"{name}: the tokenizer there is not the one that {place} was trained with\n"
            "bring that tokenizer back; its files are beside the base model or in the run's folder"
        )


def warn_of_changed_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Says where the tokenizer in a folder that `export` wrote is not the one that it wrote."""
    # No error: another version of transformers may list other special tokens.
    if read_export(folder).get("tokenizer") not in (None, identify_tokenizer(tokenizer)):
        logging.warning(
            "%s: the tokenizer there is not the one that was exported; texts may have other tokens "
            "than in training",
            folder,
        )


def fit_mesh(mesh: settings.Mesh) -> Mesh:
    """The mesh of a configuration where it fits this machine, else one with parameters sharded over
    all devices.
    """
    try:
        return make_mesh(mesh)
    except UserError:
        return make_mesh(settings.Mesh(fsdp=jax.device_count()))


def read_trained(folder: Path, model: AbstractModel) -> nnx.State:
    """The trained weights in a folder checkpoints/STEP; moments are not read."""
    if lost := find_damage(folder):
        raise UserError(f"{folder}: {describe_damage(lost)}; {USE_ANOTHER}")
    wanted = flatten({"trainable": model.trainable})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            stored = checkpointer.metadata(folder / "state").item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise _unreadable(folder, error) from error
        shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
        wrong = [
            f"{name}: checkpoint {shapes.get(name, 'missing')}, model {leaf.shape}"
            for name, leaf in wanted.items()
            if shapes.get(name) != leaf.shape
        ]
        if wrong:
            raise UserError(
                f"{folder / 'state'} does not fit its own configuration: {wrong[0]} ({len(wrong)} "
                "in all)"
            )
        try:
            arrays = checkpointer.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
        except Exception as error:  # Orbax wraps what it met in errors of many kinds
            raise _unreadable(folder, error) from error
    seal = read_seal(folder)
    if seal is not None:
        expected = {name: print for name, print in seal["arrays"].items() if name in wanted}
        if changed := find_changed(expected, arrays)[0]:
            raise UserError(
                f"{folder / 'state'}: {len(changed)} arrays are not what was saved, e.g. "
                f"{changed[0]}; {USE_ANOTHER}"
            )
    return jax.tree.unflatten(
        jax.tree.structure(model.trainable), [arrays[name] for name in wanted]
    )


def _unreadable(folder: Path, error: Exception) -> UserError:
    said = str(error).strip().split("\n")[0][:200]
    return UserError(f"{folder / 'state'}: unreadable checkpoint ({said}); {USE_ANOTHER}")
