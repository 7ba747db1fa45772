"""Prepare data: everything between a parallel data set and a training run.

  python -m crossin_jax.prepare build       --config FILE [--out DIR] [--format parquet|jsonl]   write the mixture
  python -m crossin_jax.prepare preview     --config FILE [-n 5] [--html PAGE]      what is learned, token by token
  python -m crossin_jax.prepare audit       --config FILE [--out DIR]               languages, lengths, leakage
  python -m crossin_jax.prepare translate   --config FILE [--command CMD] [--out FILE]           fill missing languages
  python -m crossin_jax.prepare cross_xquad --config FILE [--out FILE]              Cross-XQuAD's questions from XQuAD
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from crossin_jax import program
from crossin_jax.config import Config, Source, UserError, hint
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.outputs import write_whole

BATCH = 4096


def define_flags() -> None:
    """Flags beside --config."""
    flags.DEFINE_string("out", None, "folder or file to write; by default inside output_dir")
    flags.DEFINE_enum("format", "parquet", ["parquet", "jsonl"], "file format of build")
    flags.DEFINE_integer("n", 5, "examples in preview", lower_bound=1)
    flags.DEFINE_string("html", None, "page that preview writes")
    flags.DEFINE_string("source", None, "source that translate and cross_xquad read; needed where there are several")
    flags.DEFINE_string("command", None, "shell command that translates; without it the configured model does")
    flags.DEFINE_integer("max_new_tokens", 512, "longest translation of a text, tokens", lower_bound=1)


def build(config: Config, arguments: Any) -> None:
    """Writes one epoch of the mixture and its manifest; the manifest comes last, so its presence means: whole."""
    mixture = Mixture(config.data, load_corpora(config.data, config.seed), config.seed)
    folder = Path(arguments.out or Path(config.output_dir) / "data").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    manifest_path, path = folder / "manifest.json", folder / f"mixture.{arguments.format}"
    manifest = mixture.manifest() | {"file": path.name}
    earlier = json.loads(manifest_path.read_text()) if manifest_path.is_file() and path.is_file() else {}
    if (earlier.get("hash"), earlier.get("file")) == (manifest["hash"], path.name):
        print(f"{path} is up to date (mixture {manifest['hash']})")
        return
    manifest_path.unlink(missing_ok=True)
    part = path.with_suffix(".part")
    try:
        (write_parquet if arguments.format == "parquet" else write_jsonl)(mixture, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    write_whole(manifest_path, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    print(describe_manifest(manifest))
    print(f"wrote {path} and manifest.json (mixture {manifest['hash']})")


def iterate_rows(mixture: Mixture) -> Any:
    """Batches of plain rows, in stream order."""
    for start in tqdm(range(0, len(mixture), BATCH), desc="build", unit=" batches", delay=2):
        yield [{"row_id": e.id, "component": e.component, "prompt_language": e.prompt_language,
                "answer_language": e.answer_language, "instruction": e.instruction, "input": e.input,
                "output": e.output, "messages": [{"role": role, "content": text} for role, text in e.messages or ()]}
               for e in mixture.take(np.arange(start, min(start + BATCH, len(mixture))))]


def write_parquet(mixture: Mixture, path: Path) -> None:
    """One row per example."""
    import pyarrow as pa
    import pyarrow.parquet
    texts = ("row_id", "component", "prompt_language", "answer_language", "instruction", "input", "output")
    turns = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    schema = pa.schema(dict.fromkeys(texts, pa.string()) | {"messages": turns})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for rows in iterate_rows(mixture):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def write_jsonl(mixture: Mixture, path: Path) -> None:
    """One object per line."""
    with open(path, "w", encoding="utf-8") as file:
        for rows in iterate_rows(mixture):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def describe_manifest(manifest: dict[str, Any]) -> str:
    """Counts per component and language pair, as a table."""
    lines = [f"{'component':<20} {'examples':>9}  pairs"]
    for component in manifest["components"]:
        pairs = "  ".join(f"{pair} {n}" for pair, n in component["pairs"].items())
        lines.append(f"{component['name']:<20} {component['examples']:>9}  {pairs}")
    for source in manifest["sources"]:
        dropped = ", ".join(f"{n} {reason}" for reason, n in source["dropped"].items()) or "none"
        lines.append(f"source {source['name']}: {source['rows']} rows, texts dropped: {dropped}")
    return "\n".join(lines)


def preview(config: Config, arguments: Any) -> None:
    """Prints the first examples of the stream with what is learned of them, and how the first rows are packed."""
    from crossin_jax.data import preview as view
    from crossin_jax.data.packing import Windows
    from crossin_jax.data.pipeline import open_pipeline
    data = open_pipeline(config)
    windows = Windows(data.mixture, data.renderer, length=config.data.length, packing=config.data.packing,
                      over_long=config.data.over_long, batch_size=config.train.batch_size, seed=config.seed,
                      num_epochs=None)
    pairs = view.take(data.mixture, data.renderer, arguments.n)
    window = windows[0]
    rows = [view.describe_row({name: window[name][r] for name in ("segment_ids",)})
            for r in range(min(4, len(window["tokens"])))]
    if arguments.html:
        write_whole(Path(arguments.html), view.to_html(data.renderer, pairs, rows, config.data.length))
        print(f"wrote {arguments.html}")
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example, rendered in pairs:
        print(view.to_terminal(data.renderer, example, rendered, length=config.data.length, colour=colour))
    print("first rows of the first batch, one number per segment:")
    print("\n".join(view.row_to_terminal(*row) for row in rows))


def audit(config: Config, arguments: Any) -> None:
    """Writes audit.json, audit.md and audit.png: one epoch as training sees it, against the configured benchmarks."""
    from crossin_jax.data import audit as auditing
    from crossin_jax.data.pipeline import open_pipeline
    from crossin_jax.evaluation.benchmarks import load_benchmark
    data = open_pipeline(config)
    languages = config.evaluation.languages or config.data.languages
    benchmarks = [load_benchmark(name, languages, seed=config.seed) for name in config.evaluation.benchmarks]
    report = auditing.audit(data.mixture, data.renderer, config.data, benchmarks)
    folder = Path(arguments.out or Path(config.output_dir) / "audit").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    table = auditing.to_markdown(report)
    write_whole(folder / "audit.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / "audit.md", table)
    auditing.draw(report, folder / "audit.png")
    print(table)
    print(f"wrote audit.json, audit.md and audit.png in {folder}")


def translate(config: Config, arguments: Any) -> None:
    """Fills the languages that a source lacks, with the configured model or an external command."""
    from crossin_jax.data.corpus import load_corpus
    from crossin_jax.data.translate import fill, run_command
    source = find_source(config, arguments.source)
    out = Path(arguments.out or Path(config.output_dir) / f"{source.name}.jsonl").expanduser()
    corpus = load_corpus(source, config.data.languages, seed=config.seed)
    if arguments.command:
        translator, engine = run_command(arguments.command), arguments.command
    else:
        translator, engine = open_translator(config, arguments.max_new_tokens)
    counts = fill(corpus, config.data.languages, config.data.pivot, translator, out, engine=engine)
    print("\n".join(f"{name:<36} {n:>8}" for name, n in sorted(counts.items())))
    print(f"wrote {out}; suspicious rows carry a field flags")


def find_source(config: Config, name: str | None) -> Source:
    """The source that --source names, or the only one."""
    sources = {source.name: source for source in config.data.sources}
    name = next(iter(sources)) if name is None and len(sources) == 1 else name
    if name not in sources:
        raise UserError(f"--source={name}: name one of the sources {', '.join(sources)}{hint(name, sources)}")
    return sources[name]


def cross_xquad(config: Config, arguments: Any) -> None:
    """Writes a benchmark in Cross-XQuAD's form from an XQuAD source; its choices are not those of SeaEval."""
    from crossin_jax.data.corpus import load_corpus
    from crossin_jax.evaluation.cross_xquad import build_cross_xquad, file_pattern
    source = find_source(config, arguments.source)
    languages = source.languages or config.data.languages
    # The part that `portion` and `limit` name is the one that training would read: a question is on one side only.
    part = load_corpus(dataclasses.replace(source, kind="squad", path=file_pattern(source.path)), languages,
                       seed=config.seed)
    rows = build_cross_xquad(source.path, languages, config.seed, ids=set(part.ids()))
    out = Path(arguments.out or Path(config.output_dir) / "cross_xquad.json").expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {len(rows)} items to {out}; evaluate with --config.evaluation.benchmarks={out},")


def open_translator(config: Config, max_new_tokens: int) -> tuple[Any, str]:
    """The configured model behind our engine, asked by a translation prompt; and the identity of its answers."""
    from flax import nnx

    from crossin_jax.data.pipeline import open_renderer, open_tokenizer
    from crossin_jax.data.translate import request
    from crossin_jax.generation.engine import Engine
    from crossin_jax.parallel.mesh import make_mesh
    from crossin_jax.training.state import abstract_model, load_base, model_spec
    config = dataclasses.replace(config, lora=None)
    mesh, spec = make_mesh(config.mesh), model_spec(config)
    tokenizer = open_tokenizer(config)
    renderer = open_renderer(config, tokenizer)
    model = abstract_model(config, spec, mesh)
    state = nnx.merge_state(*load_base(config, model.trainable, model.frozen))
    engine = Engine(model.graphdef, state, spec, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id, mesh=mesh,
                    batch_size=config.evaluation.batch_size, cache_dtype=config.evaluation.cache_dtype,
                    attention=config.model.attention)

    def translator(texts: list[str], origin: str, target: str) -> list[str]:
        prompts = [renderer.render_prompt(request(origin, target), text) for text in texts]
        answers = engine.generate(prompts, max_new_tokens=max_new_tokens, over_long="skip", progress=False)
        return [renderer.decode(answer) if answer else "" for answer in answers]
    return translator, f"{config.model.path} {config.model.revision} {renderer.hash} {max_new_tokens}"


COMMANDS = {"build": build, "preview": preview, "audit": audit, "translate": translate, "cross_xquad": cross_xquad}


def main() -> None:
    """Takes the command's name off the command line and runs it."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
    if name is None and not {"-h", "--help", "-help"} & set(sys.argv):
        program.fail(f"name a command: {', '.join(COMMANDS)}")
    if name is not None and name not in COMMANDS:
        program.fail(f"{name!r} is no command of prepare{hint(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    program.run(COMMANDS.get(name), define=define_flags)


if __name__ == "__main__":
    main()
