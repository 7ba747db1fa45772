"""The commands of `python -m crossin_jax.prepare`."""

import dataclasses
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from crossin_jax.config import Config, Source, UserError, hint
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.records import to_turn
from crossin_jax.files import read_json, write_whole
from crossin_jax.ownership import own, own_output
from crossin_jax.paths import as_path, is_bucket
from crossin_jax.process import temporary
from crossin_jax.tables import Table, print_parts

# examples that are written at once
BATCH = 4096
# columns of a built file beside row_id and messages, named as the fields of an example
TEXTS = ("component", "prompt_language", "answer_language", "instruction", "input", "output")


def build(config: Config, arguments: Any) -> None:
    """Writes one epoch of the mixture and its manifest."""
    mixture = Mixture(config.data, load_corpora(config.data, config.seed), config.seed)
    path = output_path(config, arguments, "data") / f"mixture.{arguments.file_format}"
    refuse_bucket(path.parent)
    manifest_path = path.with_name("manifest.json")
    manifest = mixture.manifest() | {"file": path.name}
    if is_current(path, manifest_path, manifest):
        print(f"{path} is up to date (mixture {manifest['hash']})")
        return
    with own(path.parent), temporary(path.with_suffix(".part")) as part:
        # The manifest is removed first and written last: where there is one, its file is whole.
        manifest_path.unlink(missing_ok=True)
        (write_parquet if arguments.file_format == "parquet" else write_jsonl)(mixture, part)
        os.replace(part, path)
        write_json(manifest_path, manifest)
    last = f"wrote {path} and manifest.json (mixture {manifest['hash']})"
    print_parts(arguments.format, [*describe_manifest(manifest), last])


def is_current(path: Path, manifest_path: Path, manifest: dict[str, Any]) -> bool:
    """Whether the file of an earlier build holds this mixture."""
    if not (path.is_file() and manifest_path.is_file()):
        return False
    earlier = read_json(manifest_path, expect=dict, remedy="delete it, and build again")
    return (earlier.get("hash"), earlier.get("file")) == (manifest["hash"], path.name)


def iterate_rows(mixture: Mixture) -> Iterator[list[dict[str, Any]]]:
    """Batches of plain rows, in stream order."""
    for start in tqdm(range(0, len(mixture), BATCH), desc="build", unit=" batches", delay=2):
        examples = mixture.take(np.arange(start, min(start + BATCH, len(mixture))))
        yield [
            {"row_id": example.id}
            | {name: getattr(example, name) for name in TEXTS}
            | {"messages": [to_turn(*turn) for turn in example.messages or ()]}
            for example in examples
        ]


def write_parquet(mixture: Mixture, path: Path) -> None:
    """One row per example."""
    import pyarrow as pa
    import pyarrow.parquet

    turn = {"role": pa.string(), "content": pa.string()}
    if any(corpus.masked_turns for corpus in mixture.corpora.values()):
        turn["weight"] = pa.int8()  # 0 where a turn is not learned
    turns = pa.list_(pa.struct(turn))
    columns = dict.fromkeys(("row_id", *TEXTS), pa.string())
    schema = pa.schema(columns | {"messages": turns})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for rows in iterate_rows(mixture):
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def write_jsonl(mixture: Mixture, path: Path) -> None:
    """One object per line."""
    with open(path, "w", encoding="utf-8") as file:
        for rows in iterate_rows(mixture):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def describe_manifest(manifest: dict[str, Any]) -> Iterator[str | Table]:
    """Counts per component and language pair, and what was left out, for `tables.print_parts`."""
    rows = []
    for component in manifest["components"]:
        pairs = "  ".join(f"{pair} {n}" for pair, n in component["pairs"].items())
        rows.append((component["name"], component["examples"], pairs))
    yield Table(("component", "examples", "pairs"), rows, "<><")
    for source in manifest["sources"]:
        dropped = ", ".join(f"{n} {reason}" for reason, n in source["dropped"].items()) or "none"
        yield f"source {source['name']}: {source['rows']} rows, texts dropped: {dropped}"
        for what, count in manifest.get("ignored", {}).get(source["name"], {}).items():
            yield f"source {source['name']}: not read: {what} ({count} rows)"


def preview(config: Config, arguments: Any) -> None:
    """Prints the first examples with their learned tokens marked, and the first packed rows."""
    from crossin_jax.data.packing import PackedWindows
    from crossin_jax.data.pipeline import open_pipeline
    from crossin_jax.prepare import preview as view

    data = open_pipeline(config)
    windows = PackedWindows(
        data.mixture,
        data.renderer,
        length=config.data.length,
        packing=config.data.packing,
        over_long=config.data.over_long,
        batch_size=config.train.batch_size,
        seed=config.seed,
        num_epochs=None,
    )
    pairs = view.take(data.mixture, data.renderer, arguments.n)
    rows, length = view.first_rows(windows), config.data.length
    if arguments.html:
        write_whole(as_path(arguments.html), view.to_html(data.renderer, pairs, rows, length))
        print(f"wrote {arguments.html}")
        return
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for example, rendered in pairs:
        print(view.to_terminal(data.renderer, example, rendered, length=length, colour=colour))
    print("first rows of the first batch, one number per segment:")
    print("\n".join(view.row_to_terminal(*row) for row in rows))


def audit(config: Config, arguments: Any) -> None:
    """Writes audit.json, audit.md and audit.png about one epoch as training sees it."""
    from crossin_jax.data.pipeline import open_pipeline
    from crossin_jax.evaluation.benchmarks import load_benchmark
    from crossin_jax.prepare import audit_report
    from crossin_jax.prepare.audit import audit as make_audit

    data = open_pipeline(config)
    languages = config.evaluation.languages or config.data.languages
    benchmarks = [
        load_benchmark(name, languages, seed=config.seed, split=config.evaluation.split)
        for name in config.evaluation.benchmarks
    ]
    report = make_audit(data.mixture, data.renderer, config.data, benchmarks)
    folder = output_path(config, arguments, "audit")
    with own(folder):
        write_json(folder / "audit.json", report)
        write_whole(folder / "audit.md", audit_report.to_markdown(report))
        with io.BytesIO() as image:
            audit_report.draw(report, image)
            write_whole(folder / "audit.png", image.getvalue())
    print_parts(
        arguments.format,
        [
            f"audit of mixture {report['mixture']}\n",
            *audit_report.list_parts(report),
            f"wrote audit.json, audit.md and audit.png in {folder}",
        ],
    )


def translate(config: Config, arguments: Any) -> None:
    """Fills the languages that a source lacks, with the configured model or an external command."""
    from crossin_jax.data.corpus import load_corpus
    from crossin_jax.prepare.translate import fill, run_command

    source = find_source(config, arguments.source)
    out = output_path(config, arguments, f"{source.name}.jsonl")
    refuse_bucket(out)
    corpus = load_corpus(source, config.data.languages, seed=config.seed)
    if arguments.command:
        translator, engine = run_command(arguments.command), arguments.command
    else:
        translator, engine = open_translator(config, arguments.max_new_tokens)
    languages, pivot = config.data.languages, config.data.pivot
    with own_output(out):
        counts = fill(corpus, languages, pivot, translator, out, engine=engine)
    table = Table(("translated", "texts"), sorted(counts.items()), "<>")
    print_parts(arguments.format, [table, f"wrote {out}; suspicious rows have a field `flags`"])


def output_path(config: Config, arguments: Any, default: str) -> Path:
    """What --out names, or else a place in the output folder of the configuration."""
    return as_path(arguments.out or as_path(config.output_dir) / default)


def refuse_bucket(out: Path) -> None:
    """Refuses to write into a bucket what is written piece by piece."""
    if is_bucket(out):
        raise UserError(
            f"{out}: this file is written piece by piece, which a bucket does not allow; name a "
            "folder of this machine with --out, and copy the result into the bucket"
        )


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def find_source(config: Config, name: str | None) -> Source:
    """The source that --source names, or the only one."""
    sources = {source.name: source for source in config.data.sources}
    name = next(iter(sources)) if name is None and len(sources) == 1 else name
    if name not in sources:
        raise UserError(
            f"--source={name}: name one of the sources {', '.join(sources)}{hint(name, sources)}"
        )
    return sources[name]


def cross_xquad(config: Config, arguments: Any) -> None:
    """Writes a benchmark like Cross-XQuAD from an XQuAD source; its choices are not SeaEval's."""
    from crossin_jax.data.corpus import load_corpus
    from crossin_jax.prepare.cross_xquad import build_cross_xquad, file_pattern

    source = find_source(config, arguments.source)
    languages = source.languages or config.data.languages
    # `portion` and `limit` select the same rows as in training, so no question is in both.
    as_corpus = dataclasses.replace(source, kind="squad", path=file_pattern(source.path))
    part = load_corpus(as_corpus, languages, seed=config.seed)
    if not len(part):
        raise UserError(
            f"source {source.name!r}: portion={source.portion} holds no question; widen it"
        )
    rows = build_cross_xquad(source.path, languages, config.seed, ids=set(part.ids()))
    out = output_path(config, arguments, "cross_xquad.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, rows)
    names = f"('{out}',)" if "," in str(out) else f"{out},"
    flag = shlex.quote(f"--config.evaluation.benchmarks={names}")
    print(f"wrote {len(rows)} items to {out}; evaluate with {flag}")


def open_translator(config: Config, max_new_tokens: int) -> tuple[Any, str]:
    """A translator that asks the configured model, and the identity of its answers in a cache."""
    from crossin_jax.checkpoint.open import open_model
    from crossin_jax.data.pipeline import open_renderer
    from crossin_jax.evaluation.runner import make_engine
    from crossin_jax.parallel.mesh import make_mesh
    from crossin_jax.prepare.translate import request

    opened = open_model(dataclasses.replace(config, lora=None), mesh=make_mesh(config.mesh))
    renderer = open_renderer(config, opened.tokenizer)
    renderer.check_embeddings(opened.spec.vocab_size, config.model.tokenizer or config.model.path)
    engine = make_engine(config, renderer, opened.graphdef, opened.state, opened.spec, opened.mesh)

    def translator(texts: list[str], origin: str, target: str) -> list[str]:
        prompts = [renderer.render_prompt(request(origin, target), text) for text in texts]
        answers = engine.generate(
            prompts, max_new_tokens=max_new_tokens, over_long="skip", progress=False
        )
        return [renderer.decode(answer) if answer else "" for answer in answers]

    identity = f"{config.model.path} {config.model.revision} {renderer.hash} {max_new_tokens}"
    return translator, identity


COMMANDS = {
    "build": build,
    "preview": preview,
    "audit": audit,
    "translate": translate,
    "cross_xquad": cross_xquad,
}
