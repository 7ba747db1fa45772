"""Write a trained model for others: a Hugging Face model, a PEFT adapter, or the adapter merged into its base.

  python -m crossin_jax.export --checkpoint runs/xquad --format merged --out models/xquad

The folder appears whole or not at all. `hf` is for runs that trained every weight, `peft` and `merged` for LoRA runs;
`transformers` and `peft` load the results.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from crossin_jax.config import Config, UserError, hint

FORMATS = ("hf", "peft", "merged")
DTYPES = ("float32", "bfloat16", "float16")


def export(checkpoint: str | Path, format: str, out: str | Path, dtype: str | None = None) -> Path:
    """Writes the checkpoint's model in a format and returns the folder.

    `dtype` None keeps the precision of trained weights (hf, peft) or of the frozen base (merged).
    """
    from crossin_jax.checkpoint import hf, peft
    from crossin_jax.checkpoint.restore import restore_params
    from crossin_jax.checkpoint.store import find_checkpoint, read_config
    from crossin_jax.models.lora import resolve

    check_format(read_config(checkpoint), format, dtype, find_checkpoint(checkpoint)[0])
    hf.check_absent(out)
    frozen = read_config(checkpoint).model.frozen_dtype
    if format == "merged":  # W + BA is rounded once, to what is written
        dtype = dtype or ("float32" if frozen == "float32" else "bfloat16")
        frozen = "bfloat16" if dtype == "bfloat16" else "float32"
    restored = restore_params(checkpoint, frozen_dtype=frozen)
    config = restored.config
    card = model_card(config, format, restored.step, restored.provenance, read_scores(restored.run))
    tokenizer = tokenizer_folder(config, restored)
    if format == "peft":
        lora = resolve(config.lora, restored.spec)
        multimodal = hf.read_json(restored.base / "config.json").get("model_type") == "gemma3"
        peft.save_adapter(out, restored.spec, lora, restored.state, base=base_name(config), multimodal=multimodal,
                          revision=config.model.revision, tokenizer=tokenizer, card=card)
        return Path(out)
    ids = {name: value for name in ("bos_token_id", "eos_token_id", "pad_token_id")
           if (value := getattr(restored.tokenizer, name, None)) is not None}
    hf.save_model(out, restored.spec, merged_state(restored) if format == "merged" else restored.state, dtype=dtype,
                  source=restored.base, tokenizer=tokenizer, token_ids=None if restored.base else ids, card=card)
    return Path(out)


def check_format(config: Config, format: str, dtype: str | None, run: Path) -> None:
    """Refuses a format that does not suit what the run trained."""
    if format not in FORMATS:
        raise UserError(f"--format={format} is not one of {', '.join(FORMATS)}{hint(format, FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(DTYPES)}{hint(dtype, DTYPES)}")
    if config.lora is None and format != "hf":
        raise UserError(f"--format={format}: {run} trained every weight and has no adapter; use --format=hf")
    if config.lora is not None and format == "hf":
        raise UserError(f"--format=hf: {run} trained an adapter; use --format=merged for a full model, or peft")
    if dtype is not None and format == "peft":
        raise UserError("--dtype goes with hf and merged; an adapter keeps the precision it was trained in")


def merged_state(restored: Any) -> Any:
    """The weights with the adapter merged in, summed in float32."""
    import jax
    from flax import nnx

    from crossin_jax.models.lora import merge

    with jax.set_mesh(restored.mesh):
        return nnx.state(merge(nnx.merge(restored.graphdef, restored.state)))


def base_name(config: Config) -> str | None:
    """What an adapter names as its base: an absolute folder, or a Hub id."""
    path = config.model.path
    return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().is_dir() else path


def tokenizer_folder(config: Config, restored: Any) -> Path | None:
    """Where the tokenizer's files lie."""
    from crossin_jax.checkpoint.hf import resolve_folder

    if config.model.tokenizer:
        return resolve_folder(config.model.tokenizer)
    return restored.base or restored.run / "tokenizer"


def read_scores(run: Path) -> list[dict[str, Any]]:
    """The headline scores in every results.json below the run: one row for a benchmark and a way of answering."""
    rows = []
    for file in sorted(run.glob("**/results.json")):
        try:
            results = json.loads(file.read_text())
            steps = {told["name"]: ((told.get("provenance") or {}).get("model") or {}).get("step")
                     for told in results["runs"]}
            for block in results["blocks"]:
                size = min(3, len(block["languages"]))
                names = {"accuracy": "accuracy", "consistency": f"consistency_{size}", "AC3": f"AC3_{size}"}
                shown = {"benchmark": block["benchmark"], "answers": block["method"], "languages": block["languages"],
                         "items": block["num_items"]}
                for row in block["rows"] if block["tag"] is None else ():
                    if not row["is_baseline"]:
                        rows.append({**shown, "arm": row["arm"], "step": steps.get(row["arm"]),
                                     **{name: row["scores"].get(key) for name, key in names.items()}})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # written by another version: the card then says less, the model is the same
    return rows


def model_card(config: Config, format: str, step: int, provenance: dict[str, Any], scores: list[dict[str, Any]]) -> str:
    """README.md: what the model is, what it learned from, how, and how it scored."""
    base = config.model.path or "none: trained from random weights"
    front = {"library_name": "peft" if format == "peft" else "transformers", "language": list(config.data.languages),
             "tags": ["crossin_jax", *(["lora"] if config.lora else [])]}
    if config.model.path and not Path(config.model.path).expanduser().exists():
        front["base_model"] = config.model.path
    kind = {"hf": "A model", "peft": "A LoRA adapter", "merged": "A model with its LoRA adapter merged in"}[format]
    versions = ", ".join(f"{name} {value}" for name, value in (provenance.get("versions") or {}).items() if value)
    facts = {
        "base model": base + (f" at {config.model.revision}" if config.model.revision else ""),
        "data manifest": provenance.get("manifest"), "prompt template": f"{config.data.template} "
        f"({provenance.get('template')})", "languages": ", ".join(config.data.languages),
        "components": ", ".join(f"{c.kind} of {c.source}" for c in config.data.components),
        "configuration": provenance.get("config_hash"), "commit": provenance.get("commit"),
        "device": provenance.get("device"), "versions": versions, "step": step}
    lines = ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()), "---", "",
             f"# {config.name}", "", f"{kind}, trained with crossin_jax.", "",
             "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value), "",
             "## Recipe", "", "| setting | value |", "|---|---|"]
    for title, section in (("lora", config.lora), ("optim", config.optim), ("train", config.train)):
        shown = dataclasses.asdict(section) if section else {}
        if title == "train":
            shown = {name: shown[name] for name in ("steps" if shown["steps"] else "epochs", "batch_size")} | {
                "length": config.data.length, "packing": config.data.packing, "seed": config.seed}
        lines += [f"| {title}.{name} | {_cell(value)} |" for name, value in shown.items() if value is not None]
    lines += ["", "## Scores", ""]
    if scores:
        lines += ["Estimate and 95 % interval; consistency and AC3 over combinations of three languages, or of all "
                  "where there are fewer.", "", f"| {' | '.join(scores[0])} |", "|" + "---|" * len(scores[0])]
    lines += [f"| {' | '.join(map(_cell, row.values()))} |" for row in scores]
    return "\n".join(lines + ([] if scores else ["None recorded with this checkpoint."])) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "low" in value:
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else "" if value is None else str(value)


def define() -> None:
    """Command-line flags."""
    from absl import flags

    flags.DEFINE_string("checkpoint", None, "run folder, or one of its checkpoints/STEP folders", required=True)
    flags.DEFINE_string("format", None, "hf, peft or merged", required=True)
    flags.DEFINE_string("out", None, "folder to write; must not exist", required=True)
    flags.DEFINE_string("dtype", None, "precision of the weights: float32, bfloat16 or float16; default: as trained")


def main(options: Any) -> None:
    """Exports what the flags ask for."""
    folder = export(options.checkpoint, options.format, options.out, options.dtype)
    print(f"wrote {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


if __name__ == "__main__":
    from crossin_jax import program

    program.run(main, define=define, takes_config=False)
