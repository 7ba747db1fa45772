"""The weights of a run for use: trained ones from its checkpoint, frozen ones from the base model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from crossin_jax import config as settings
from crossin_jax.checkpoint.hf import load_weights, resolve_folder
from crossin_jax.checkpoint.store import find_checkpoint, find_lost, flatten, read_config
from crossin_jax.config import Config, UserError
from crossin_jax.data.pipeline import open_tokenizer
from crossin_jax.models.spec import ModelSpec
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.state import abstract_model, model_spec


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint's model on a mesh, and what it came from."""

    config: Config
    spec: ModelSpec
    graphdef: Any
    state: nnx.State
    mesh: Mesh
    tokenizer: Any
    base: Path | None  # folder of the base model
    run: Path
    step: int
    provenance: dict[str, Any]


def restore_params(path: str | Path, *, mesh: Mesh | None = None, progress: bool = True, **model: Any) -> Restored:
    """The model of a run folder (its newest step) or of one `checkpoints/STEP` folder; moments are not read.

    `mesh` None takes the run's where it fits this machine, else one that shards parameters over all devices. Keywords
    override settings of the model, e.g. `compute_dtype="float32"`.
    """
    run, step = find_checkpoint(path)
    config = read_config(path)
    config.output_dir = str(run)  # the run may have moved; its tokenizer lies beside its checkpoints
    config.model = dataclasses.replace(config.model, **model)
    folder = run / "checkpoints" / str(step)
    if lost := [name for name in find_lost(folder) if name.startswith("state/")]:
        raise UserError(f"{folder}: {len(lost)} files are missing or cut, e.g. {lost[0]}; use another step, or bring "
                        "the folder back from a copy")
    if mesh is None:
        try:
            mesh = make_mesh(config.mesh)
        except UserError:
            mesh = make_mesh(settings.Mesh(fsdp=jax.device_count()))
    tokenizer = open_tokenizer(config)
    spec = model_spec(config)
    abstract = abstract_model(config, spec, mesh)
    wanted = flatten({"trainable": abstract.trainable})
    arrays = _read_arrays(folder / "state", wanted)
    trainable = jax.tree.unflatten(jax.tree.structure(abstract.trainable), [arrays[name] for name in wanted])
    base = resolve_folder(config.model.path, config.model.revision) if config.model.path else None
    frozen = abstract.frozen
    if jax.tree.leaves(frozen):
        frozen = load_weights(base, frozen, progress=progress)
    return Restored(config, spec, abstract.graphdef, nnx.merge_state(trainable, frozen), mesh, tokenizer, base, run,
                    step, _read_provenance(folder))


def _read_arrays(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            stored = checkpointer.metadata(folder).item_metadata.tree
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder}: unreadable checkpoint ({str(error)[:200]}); use another step") from error
        wrong = [f"{name}: checkpoint {tuple(stored[name].shape) if name in stored else 'missing'}, model {leaf.shape}"
                 for name, leaf in wanted.items() if name not in stored or tuple(stored[name].shape) != leaf.shape]
        if wrong:
            raise UserError(f"{folder} does not fit its own configuration: {wrong[0]} ({len(wrong)} in all)")
        try:
            return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True))
        except Exception as error:  # Orbax wraps what it met in errors of many kinds, `Exception` among them
            raise UserError(f"{folder}: unreadable checkpoint ({str(error)[:200]}); use another step") from error


def _read_provenance(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "provenance" / "metadata").read_text())
    except (OSError, ValueError):
        return {}
