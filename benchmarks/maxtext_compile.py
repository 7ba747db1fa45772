"""MaxText's training step under the TPU compiler on the work of `tpu_compile.py`, for compile times
on one machine.

    python benchmarks/maxtext_compile.py --work W1@v6e:4x4 [--without tensorflow ...] --out FILE
    python benchmarks/maxtext_compile.py --table FILE.jsonl

Runs where MaxText's sources can be imported (`PYTHONPATH=maxtext/src`; tried with e591f30).
`--without` names packages that it imports and that compiling does not use; empty ones stand in for
them. What is compiled is what its own `train_compile` compiles, with the settings of the peers'
rows: FSDP over all chips, scanned layers, full rematerialisation. `train_compile` builds no
adapters: for W2 and W3 MaxText's adapters are attached to the model that it builds, replicated as
MaxText has them, and weights are bfloat16, since its LoRA step refuses float32 ones.

Times move with what else runs on a machine: take turns with `tpu_compile.py` and the same --out.
"""

import abc
import argparse
import importlib.abc
import importlib.machinery
import json
import os
import statistics
import sys
import time
import types
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tpu_compile import PEERS, WORK, run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# MaxText's name, chips.
TOPOLOGIES = {
    "v6e:4x4": ("v6e-16", 16),
    "v5e:4x4": ("v5e-16", 16),
    "v5p:2x2x4": ("v5p-32", 16),
    "v5p:2x2x2": ("v5p-16", 8),
    "v5e:2x4": ("v5e-8", 8),
    "v6e:2x4": ("v6e-8", 8),
}
MODELS = {"W1": "llama2-7b", "W2": "llama2-7b", "W3": "gemma-2b"}


class Empty(abc.ABCMeta):
    """A class whose attributes are such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return empty_class(name)


def empty_class(name: str) -> Any:
    """What can be subclassed, called and used as a decorator, and does nothing."""
    return Empty(
        name,
        (),
        {
            "__new__": lambda cls, *inputs, **_: inputs[0] if inputs else object.__new__(cls),
            "__init__": lambda self, *_, **__: None,
            "__getattr__": lambda self, name: empty_class(name),
        },
    )


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that are only there to be imported."""

    def __init__(self, packages: list[str]):
        self.packages = packages

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__version__, module.__getattr__ = (
            "0.0.0",
            lambda name: getattr(empty_class(spec.name), name),
        )
        return module

    def exec_module(self, module: Any) -> None:
        pass


def attach_adapters(creation: Any) -> None:
    """Makes MaxText's way to a model end with its own adapters, in the places its LoRA training
    puts them.
    """
    import jax
    import qwix
    from flax import nnx
    from maxtext.utils import lora_utils

    get_create = creation.get_nnx_create_model_fn

    def get_create_with_adapters(
        config: Any, mesh: Any = None, *arguments: Any, **options: Any
    ) -> Any:
        create = get_create(config, mesh, *arguments, **options)

        def create_with_adapters() -> Any:
            model = create()
            tokens, positions = lora_utils._prepare_dummy_inputs(mesh)
            model = qwix.apply_lora_to_model(
                model,
                lora_utils._build_lora_provider(config),
                decoder_input_tokens=tokens,
                decoder_positions=positions,
                rngs=model.decoder.rngs,
            )
            for _, node in nnx.graph.iter_graph(model):
                if "qwix_rngs" in getattr(node, "__dict__", ()):
                    del node.qwix_rngs
            graphdef, state = nnx.split(model)

            def replicate(leaf: Any) -> Any:
                is_adapter = isinstance(leaf, nnx.LoRAParam)
                return (
                    leaf.replace(sharding=None, out_sharding=None, sharding_names=None)
                    if is_adapter
                    else leaf
                )

            state = jax.tree.map(
                replicate, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
            )
            return nnx.merge(graphdef, state)

        return create_with_adapters

    creation.get_nnx_create_model_fn = get_create_with_adapters


def measure(work: str) -> dict[str, Any]:
    """Compiles one piece of work with MaxText's `train_compile`; once per process."""
    from maxtext.trainers.pre_train import train_compile
    from maxtext.utils import model_creation_utils

    from crossin_jax.plan.cost import count

    name, _, topology = work.partition("@")
    (_, rows, has_adapters), (known_as, chips) = WORK[name], TOPOLOGIES[topology]
    about = {
        "system": "MaxText",
        "work": work,
        "param_dtype": "bfloat16" if has_adapters else "float32",
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("jax", "libtpu")},
    }
    settings = {
        "model_name": MODELS[name],
        "weight_dtype": about["param_dtype"],
        "dtype": "bfloat16",
        "opt_type": "adamw",
        "compile_topology": known_as,
        "compile_topology_num_slices": 1,
        "per_device_batch_size": rows // chips,
        "max_target_length": 2048,
        "ici_fsdp_parallelism": -1,
        "remat_policy": "full",
        "scan_layers": True,
        "enable_checkpointing": False,
        "dataset_type": "synthetic",
        "run_name": "compile",
        "base_output_directory": "/tmp",
        "skip_jax_distributed_system": True,
        "jax_cache_dir": "",
    }
    base = Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    if has_adapters:
        attach_adapters(model_creation_utils)
        lora = {
            "enable_lora": True,
            "lora_rank": 64,
            "lora_alpha": 128.0,
            "lora_module_path": "",
            "lora_weight_qtype": None,
            "lora_tile_size": None,
            "lora_restore_path": "",
        }
        settings["lora"] = json.dumps(lora)
    compile_step, made = train_compile.jit_and_compile, {}

    def compile_by_the_clock(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        made["compiled"] = compile_step(*arguments, **options)
        made["seconds"] = time.perf_counter() - start  # tracing included, as in ours
        return made["compiled"]

    train_compile.jit_and_compile = compile_by_the_clock
    train_compile.main(
        ["train_compile", str(base), *(f"{key}={value}" for key, value in settings.items())]
    )
    row = about | {
        "peak_bytes": made["compiled"].memory_analysis().peak_memory_in_bytes,
        "compile_seconds": made["seconds"],
    }
    try:
        cost = count(made["compiled"].as_text())
    except Exception as error:  # the text of some programs cannot be had
        print(f"{work}: {str(error)[:100]}", file=sys.stderr)
        return row | {"flops": None, "cycles": None}
    return row | {"flops": cost.flops, "cycles": cost.cycles, "matrix_cycles": cost.matrix_cycles}


def table(rows: list[dict[str, Any]]) -> str:
    """Both systems in Markdown, ours first in each cell; medians."""
    runs: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    for row in rows:
        runs[row["work"]][row.get("system") == "MaxText"].append(row)

    def middle(side: list[dict[str, Any]], name: str, unit: float = 1.0) -> float:
        values = [row[name] / unit for row in side if row[name] is not None]
        return statistics.median(values) if values else float("nan")

    lines = ["| work | runs | compile s | ratio | peak GiB | Mcycles |", "|" + "---|" * 6]
    for work, sides in runs.items():
        ours, theirs = (middle(side, "compile_seconds") for side in sides)
        cells = [
            f"{len(sides[0])}, {len(sides[1])}",
            f"{ours:.0f}, {theirs:.0f}",
            f"{ours / theirs:.2f}",
            ", ".join(f"{middle(side, 'peak_bytes', 2**30):.2f}" for side in sides),
            ", ".join(f"{middle(side, 'cycles', 1e6):.0f}" for side in sides),
        ]
        lines.append(f"| {work} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    # The last is MaxText's own: no Google Cloud clients.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "DECOUPLE_GCLOUD": "TRUE",
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", default="W1@v6e:4x4", choices=list(PEERS), help="one piece of work"
    )
    parser.add_argument(
        "--without", nargs="*", default=[], help="packages that are only there to be imported"
    )

    def make(options: argparse.Namespace) -> list[dict[str, Any]]:
        sys.meta_path.insert(0, StandIn(options.without))
        return [measure(options.work)]

    run(parser, table, make)


if __name__ == "__main__":
    main()
