"""Write a trained model as a Hugging Face folder or a PEFT adapter.

  python -m crossin_jax.export --checkpoint runs/mine --format merged --out models/mine

The folder appears whole or not at all. `hf` is for runs that trained every weight, `peft` and
`merged` for LoRA runs; `transformers` and `peft` load the results.
"""

import dataclasses
import json
import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from crossin_jax.config import Config, UserError, hint
from crossin_jax.data.pipeline import PROMPT_FILE
from crossin_jax.data.prompts import Renderer
from crossin_jax.data.template_export import pin_chat_template, write_chat_template
from crossin_jax.data.templates import TEMPLATES
from crossin_jax.paths import as_path
from crossin_jax.tables import format_markdown

FORMATS = ("hf", "peft", "merged")
DTYPES = ("float32", "bfloat16", "float16")
MAX_ROUNDING = 0.1  # of the update: what a merged model may lose by itself

log = logging.getLogger(__name__)


def export(checkpoint: str | Path, format: str, out: str | Path, dtype: str | None = None) -> Path:
    """Writes the checkpoint's model in a format and returns the folder.

    `dtype` None keeps the precision of trained weights (hf, peft). A merged model keeps that of the
    frozen base where this rounds away little of the update, and is float32 elsewhere.
    """
    import jax

    from crossin_jax.checkpoint import save
    from crossin_jax.checkpoint.fingerprint import fingerprint
    from crossin_jax.checkpoint.open import open_model
    from crossin_jax.checkpoint.store import find_checkpoint, read_config
    from crossin_jax.data.kinds import KINDS
    from crossin_jax.data.pipeline import open_renderer

    check_format(read_config(checkpoint), format, dtype, find_checkpoint(checkpoint)[0])
    save.check_absent(out)
    frozen = read_config(checkpoint).model.frozen_dtype
    if format == "merged":  # the base is read in what is written: the sum is rounded once
        written = dtype or ("float32" if frozen == "float32" else "bfloat16")
        frozen = "bfloat16" if written == "bfloat16" else "float32"
    elif frozen in ("int8", "nf4"):  # the adapter's users read its base in full precision
        frozen = "bfloat16"
    restored = open_model(checkpoint, frozen_dtype=frozen)
    config = restored.config
    renderer = open_renderer(config, restored.tokenizer)
    origin = restored.provenance | {"weights": fingerprint(restored.state)}
    card = model_card(config, format, restored.step, origin, read_scores(restored.run))
    state = restored.state
    if format == "merged":
        state, dtype = merge_adapter(restored, dtype, written)
    if dtype is not None:  # now, so that what is written is what is identified
        state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)
    # The tokenizer's files are prepared beside the export, which then copies them in one go:
    #
    #     tokenizer of the run ─► copy ─► + prompt.json, chat_template, eos_token ─► out
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder)
        save.copy_tokenizer(tokenizer_folder(config, restored), tokenizer)
        # A run on plain text alone never asked anything: its model has no prompt of its own.
        if any(KINDS[component.kind].has_prompt for component in config.data.components):
            write_prompt(tokenizer, config, renderer)
        identity = identify(restored, state, format, tokenizer, dtype)
        if format == "peft":
            write_adapter(out, restored, tokenizer, card, identity)
        else:
            ids = {
                name: value
                for name in ("bos_token_id", "eos_token_id", "pad_token_id")
                if (value := getattr(restored.tokenizer, name, None)) is not None
            }
            save.save_model(
                out,
                restored.spec,
                state,
                dtype=dtype,
                source=restored.base,
                tokenizer=tokenizer,
                token_ids=None if restored.base else ids,
                answer_ends=renderer.eos_ids,
                card=card,
                origin=identity,
            )
    return as_path(out)


def identify(
    restored: Any, state: Any, format: str, tokenizer: Path, stored: str | None
) -> dict[str, Any]:
    """The provenance of an export, with its weights and those of an adapter's base by content, and
    the precision in which it answers as the run did.
    """
    from flax import nnx

    from crossin_jax.checkpoint.fingerprint import fingerprints_to_read
    from crossin_jax.checkpoint.hf import state_leaves
    from crossin_jax.data.pipeline import load_tokenizer
    from crossin_jax.models.lora import is_trainable, resolve
    from crossin_jax.provenance import identify_tokenizer

    config, base = restored.config, nnx.State({})
    if format == "peft":
        lora = resolve(config.lora, restored.spec)
        state, base = nnx.split_state(state, lambda path, leaf: is_trainable(path, leaf, lora), ...)
    return restored.provenance | {
        "step": restored.step,
        "base": config.model.path,
        # Products in bfloat16 would round a merged sum again, which may lose the update.
        "precision": "float32"
        if format == "merged" and stored == "float32"
        else config.model.compute_dtype,
        "tokenizer": identify_tokenizer(load_tokenizer(str(tokenizer))),
        "weights": fingerprints_to_read(state_leaves(state)),
        "base_weights": fingerprints_to_read(state_leaves(base)),
    }


def write_adapter(
    out: str | Path, restored: Any, tokenizer: Path, card: str, origin: dict[str, Any]
) -> None:
    """Writes the adapter of a run in PEFT's layout."""
    from crossin_jax.checkpoint.hf import read_model_json
    from crossin_jax.checkpoint.save import save_adapter
    from crossin_jax.models.lora import resolve

    config = restored.config
    base = read_model_json(restored.base / "config.json")
    save_adapter(
        out,
        restored.spec,
        resolve(config.lora, restored.spec),
        restored.state,
        base=config.model.path,  # as given: no path of this machine goes with the adapter
        multimodal=base.get("model_type") == "gemma3",
        revision=config.model.revision,
        tokenizer=tokenizer,
        card=card,
        origin=origin,
    )


def merge_adapter(restored: Any, dtype: str | None, stored: str) -> tuple[Any, str]:
    """The weights with the adapter merged in, rounded once, and the precision they are stored in.

    `dtype` is what the user asked for; None: float32 where `stored` would lose too much.
    """
    import jax
    from flax import nnx

    from crossin_jax.models.lora import measure_rounding, merge

    with jax.set_mesh(restored.mesh):
        model = nnx.merge(restored.graphdef, restored.state)
        ratio = measure_rounding(model, stored, load_starts(restored))
        print(f"merged into {stored}: the rounding error is {ratio:.3f} of the update (rms)")
        # A run keeps the adapter in float32 beside the weights. Rounding the sum can take most of a
        # small update away, and the merged model then answers as the base does.
        if ratio > MAX_ROUNDING and dtype is None:
            stored = "float32"
            print(
                f"that is above {MAX_ROUNDING}, so the model is written as float32; "
                "--dtype overrides this"
            )
        elif ratio > MAX_ROUNDING:
            log.warning(
                "--dtype=%s loses much of what was trained: answers differ from the run's; "
                "use --dtype=float32, or --format=peft",
                stored,
            )
        return nnx.state(merge(model, stored)), stored


def load_starts(restored: Any) -> list[tuple[Any, Any]]:
    """The weights trained in full beside the adapter: each as it is, and as in the base."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from crossin_jax.checkpoint.hf import load_weights
    from crossin_jax.models.layers import Adapter
    from crossin_jax.models.lora import is_trainable, resolve

    lora = resolve(restored.config.lora, restored.spec)
    saved = nnx.filter_state(
        restored.state,
        lambda path, leaf: is_trainable(path, leaf, lora) and not isinstance(leaf, Adapter),
    )
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), saved
    )
    starts = load_weights(restored.base, wanted, progress=False) if jax.tree.leaves(saved) else {}
    return list(zip(jax.tree.leaves(saved), jax.tree.leaves(starts), strict=True))


def write_prompt(folder: Path, config: Config, renderer: Renderer) -> None:
    """Adds to a tokenizer's files how the model was asked, and where its answers end."""
    write_json = partial(json.dumps, indent=2, ensure_ascii=False)
    data = config.data
    named = data.template in (*TEMPLATES, "chat")  # the fields of a user's file go with the model
    prompt = {
        "template": data.template if named else dataclasses.asdict(renderer.template),
        "system": data.system,
        "tokenization": data.tokenization,
    }
    (folder / PROMPT_FILE).write_text(write_json(prompt) + "\n", encoding="utf-8")
    end = renderer.id_to_token(renderer.end_id)
    if renderer.template is None:
        chat = renderer.chat_template
        source = pin_chat_template(chat, data.system)
        if source == chat.source:
            source = None  # the tokenizer's own files say it already
    else:
        source = write_chat_template(
            renderer.template,
            data.system,
            bos=renderer.bos_id is not None,
            end=end,
            apart=renderer.apart,
        )
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if source is not None:
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        (folder / "chat_template.json").unlink(missing_ok=True)
        # Newer programs read the file, older ones the configuration; both say the same.
        named = settings.get("chat_template")
        if isinstance(named, list):
            rest = [entry for entry in named if entry.get("name") != "default"]
            settings["chat_template"] = [{"name": "default", "template": source}, *rest]
        else:
            settings["chat_template"] = source
    # Servers stop at the tokenizer's EOS. It becomes the token that ended answers in training, for
    # example "<|im_end|>" where a base model has "<|endoftext|>".
    if _content(settings.get("eos_token")) != end:
        settings["eos_token"] = end
        _set_eos(folder / "special_tokens_map.json", end)
    file.write_text(write_json(settings) + "\n", encoding="utf-8")


def _content(token: Any) -> Any:
    """The text of a token in a tokenizer's configuration, which may be an object."""
    return token.get("content") if isinstance(token, dict) else token


def _set_eos(file: Path, end: str) -> None:
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8")) | {"eos_token": end}
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_format(config: Config, format: str, dtype: str | None, run: Path) -> None:
    """Refuses a format that does not suit what the run trained."""
    if format not in FORMATS:
        raise UserError(
            f"--format={format} is not one of {', '.join(FORMATS)}{hint(format, FORMATS)}"
        )
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is not one of {', '.join(DTYPES)}{hint(dtype, DTYPES)}")
    if config.lora is None and format != "hf":
        raise UserError(
            f"--format={format}: {run} trained every weight and has no adapter; use --format=hf"
        )
    if config.lora is not None and format == "hf":
        raise UserError(
            f"--format=hf: {run} trained an adapter; use --format=merged for a full model, or peft"
        )
    if dtype is not None and format == "peft":
        raise UserError(
            "--dtype goes with hf and merged; an adapter keeps the precision it was trained in"
        )


def tokenizer_folder(config: Config, restored: Any) -> Path | None:
    """The folder of the tokenizer's files."""
    from crossin_jax.checkpoint.hf import resolve_folder

    if config.model.tokenizer:
        return resolve_folder(config.model.tokenizer)
    return restored.base or restored.run / "tokenizer"


def read_scores(run: Path) -> list[dict[str, Any]]:
    """The headline scores in every results.json below the run, by benchmark and way of
    answering.
    """
    rows = []
    for file in sorted(run.glob("**/results.json")):
        try:
            results = json.loads(file.read_text())
            steps = {
                run["name"]: ((run.get("provenance") or {}).get("model") or {}).get("step")
                for run in results["runs"]
            }
            for block in results["blocks"]:
                size = min(3, len(block["languages"]))
                names = {
                    "accuracy": "accuracy",
                    "consistency": f"consistency_{size}",
                    "AC3": f"AC3_{size}",
                }
                shown = {
                    "benchmark": block["benchmark"],
                    "answers": block["method"],
                    "languages": block["languages"],
                    "items": block["num_items"],
                }
                for row in block["rows"] if block["tag"] is None else ():
                    if not row["is_baseline"]:
                        rows.append(
                            {
                                **shown,
                                "arm": row["arm"],
                                "step": steps.get(row["arm"]),
                                **{name: row["scores"].get(key) for name, key in names.items()},
                            }
                        )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # written by another version: the card then says less, the model is the same
    return rows


def model_card(
    config: Config, format: str, step: int, provenance: dict[str, Any], scores: list[dict[str, Any]]
) -> str:
    """README.md: what the model is, what it learned from, how, and how it scored."""
    front = {
        "library_name": "peft" if format == "peft" else "transformers",
        "language": list(config.data.languages),
        "tags": ["crossin_jax", *(["lora"] if config.lora else [])],
    }
    if config.model.path:
        front["base_model"] = config.model.path
    kind = {
        "hf": "A model",
        "peft": "A LoRA adapter",
        "merged": "A model with its LoRA adapter merged in",
    }[format]
    lines = [
        "---",
        *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in front.items()),
        "---",
        "",
        f"# {config.name}",
        "",
        f"{kind}, trained with crossin_jax.",
        "",
        *format_markdown(("", ""), list(describe_origin(config, step, provenance).items())),
        "",
        "## Recipe",
        "",
        *format_markdown(
            ("setting", "value"),
            [(name, _cell(value)) for name, value in describe_recipe(config).items()],
        ),
        "",
        "## Scores",
        "",
    ]
    if scores:
        lines += [
            "Estimate and 95 % interval; consistency and AC3 over combinations of three "
            "languages, or of all where there are fewer.",
            "",
            *format_markdown(list(scores[0]), [list(map(_cell, row.values())) for row in scores]),
        ]
    else:
        lines.append("None recorded with this checkpoint.")
    return "\n".join(lines) + "\n"


def describe_origin(config: Config, step: int, provenance: dict[str, Any]) -> dict[str, Any]:
    """Where the model comes from: base, data, template, versions; only what is known."""
    base = config.model.path or "none: trained from random weights"
    facts = {
        "base model": base + (f" at {config.model.revision}" if config.model.revision else ""),
        "weights": provenance.get("weights"),
        "weights of the base model": ", ".join(
            f"{name} {content}" for name, content in provenance.get("base_weights", {}).items()
        ),
        "tokenizer": provenance.get("tokenizer"),
        "data manifest": provenance.get("manifest"),
        "prompt template": f"{config.data.template} ({provenance.get('template')})",
        "languages": ", ".join(config.data.languages),
        "components": ", ".join(f"{c.kind} of {c.source}" for c in config.data.components),
        "configuration": provenance.get("config_hash"),
        "commit": provenance.get("commit"),
        "device": provenance.get("device"),
        "versions": ", ".join(
            f"{name} {value}" for name, value in (provenance.get("versions") or {}).items() if value
        ),
        "step": step,
    }
    return {name: value for name, value in facts.items() if value}


def describe_recipe(config: Config) -> dict[str, Any]:
    """The settings that decide what is learned, as "section.name"."""
    train = dataclasses.asdict(config.train)
    names = ("steps" if train["steps"] else "epochs", "batch_size")
    sections = {
        "lora": dataclasses.asdict(config.lora) if config.lora else {},
        "optim": dataclasses.asdict(config.optim),
        "train": {name: train[name] for name in names}
        | {"length": config.data.length, "packing": config.data.packing, "seed": config.seed},
    }
    return {
        f"{title}.{name}": value
        for title, section in sections.items()
        for name, value in section.items()
        if value is not None
    }


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "low" in value:
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    return (
        ", ".join(map(str, value))
        if isinstance(value, (tuple, list))
        else ""
        if value is None
        else str(value)
    )


def define() -> None:
    """Command-line flags."""
    from absl import flags

    from crossin_jax.parallel import roll_call

    flags.DEFINE_string(
        "checkpoint", None, "run folder, or one of its checkpoints/STEP folders", required=True
    )
    flags.DEFINE_string("format", None, "hf, peft or merged", required=True)
    flags.DEFINE_string("out", None, "folder to write; must not exist", required=True)
    flags.DEFINE_string(
        "dtype",
        None,
        "precision of the weights: float32, bfloat16 or float16; default: as trained, "
        "and float32 for a merged model that would lose much of its update",
    )
    roll_call.define_flags()


def main(options: Any) -> None:
    """Joins the processes of the run, and exports what the flags ask for."""
    import jax

    from crossin_jax.parallel import hosts

    with hosts.joined(options):
        folder = export(options.checkpoint, options.format, options.out, options.dtype)
        if jax.process_index() == 0:
            print(f"wrote {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


if __name__ == "__main__":
    from crossin_jax import cli

    cli.run(main, define=define, takes_config=False)
