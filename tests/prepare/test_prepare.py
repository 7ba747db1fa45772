"""The prepare programs: what they write, that it is whole, and what they say about faults."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest

from crossin_jax.config import Component, Config, Data, Model, Source, UserError
from crossin_jax.data.corpus import load_corpus
from crossin_jax.data.kinds import Example
from crossin_jax.data.loader import make_loader
from crossin_jax.data.mixture import Mixture, load_corpora
from crossin_jax.data.pipeline import load_tokenizer, open_pipeline
from crossin_jax.data.prompts import Renderer, RowFault
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.prepare import __main__ as program
from crossin_jax.prepare import commands as prepare
from crossin_jax.prepare import preview
from crossin_jax.tables import STYLES
from tests.data.conftest import parallel_rows, write_lines


@pytest.fixture
def config(tokenizer, tmp_path):
    """An experiment on 50 rows whose model folder holds a tokenizer only."""
    tokenizer.save_pretrained(tmp_path / "model")
    source = Source(name="rows", path=write_lines(tmp_path / "rows.jsonl", parallel_rows(50)))
    components = Component(source="rows"), Component(kind="x2x", source="rows", count=30)
    data = Data(sources=(source,), components=components, length=128, template="gemma")
    return Config(
        output_dir=str(tmp_path / "run"), model=Model(path=str(tmp_path / "model")), data=data
    )


def arguments(**changes):
    return SimpleNamespace(
        **{
            "out": None,
            "format": "text",
            "file_format": "parquet",
            "n": 3,
            "html": None,
            "source": None,
            "command": None,
            "max_new_tokens": 8,
        }
        | changes
    )


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_build_writes_the_stream_and_its_manifest(config, tmp_path, form, capsys):
    prepare.build(config, arguments(file_format=form))
    folder = tmp_path / "run" / "data"
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / manifest["file"]
    rows = (
        pyarrow.parquet.read_table(path).to_pylist()
        if form == "parquet"
        else [json.loads(line) for line in path.read_text().splitlines()]
    )
    mixture = Mixture(config.data, load_corpora(config.data, config.seed), config.seed)
    assert (
        manifest["hash"] == mixture.manifest()["hash"] and len(rows) == 80 == manifest["examples"]
    )
    assert [(r["row_id"], r["instruction"], r["input"], r["output"]) for r in rows] == [
        (e.id, e.instruction, e.input, e.output) for e in mixture
    ]
    stamp = path.stat().st_mtime_ns
    prepare.build(config, arguments(file_format=form))
    assert path.stat().st_mtime_ns == stamp and "up to date" in capsys.readouterr().out
    config.data.components[1].count = 20
    prepare.build(config, arguments(file_format=form))
    assert json.loads((folder / "manifest.json").read_text())["examples"] == 70
    # What was built can be read again.
    source = Source(name="built", path=str(path), languages=("en",))
    assert len(load_corpus(source, ("en",))) > 0


COLUMNS = {
    "row_id": "id",
    "component": "component",
    "prompt_language": "prompt_language",
    "answer_language": "answer_language",
    "instruction": "instruction",
    "input": "input",
    "output": "output",
}


def read_built(config, form) -> list[dict]:
    """The rows of the built file that the manifest names."""
    folder = Path(config.output_dir) / "data"
    path = folder / json.loads((folder / "manifest.json").read_text())["file"]
    assert path.suffix == f".{form}"
    if form == "parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_built_row_is_the_whole_example(config, tmp_path, form):
    """With languages, component and turns of a chat; and it reads again as the same text."""

    def chat(code):
        return {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": f"{code} hi"},
                {"role": "assistant", "content": f"{code} «ho»\n"},
                {"role": "user", "content": "and?"},
                {"role": "assistant", "content": f"{code} so"},
            ]
        }

    rows = [
        {"id": f"chat{i}", **{code: chat(code) for code in ("en", "zh", "vi", "es")}}
        for i in range(3)
    ]
    config.data.sources[0].path = write_lines(tmp_path / "mixed.jsonl", [*parallel_rows(9), *rows])
    config.data.components = tuple(
        Component(kind=kind, source="rows") for kind in ("base", "x2x", "x2x", "trans")
    )
    config.data.tag = "sentence"
    prepare.build(config, arguments(file_format=form))
    mixture = Mixture(config.data, load_corpora(config.data, config.seed), config.seed)
    built = read_built(config, form)
    assert built == [
        {column: getattr(e, field) for column, field in COLUMNS.items()}
        | {"messages": [{"role": role, "content": text} for role, text in e.messages or ()]}
        for e in mixture
    ]
    assert sum(len(row["messages"]) == 5 for row in built) == 9  # of base and twice x2x
    assert {row["component"] for row in built} == {"base", "x2x:rows", "x2x:rows#2", "trans"}
    again = {"id": "row_id", "language": "answer_language"}
    base = [row for row in built if row["component"] == "base"]
    source = Source(name="s", path=write_lines(tmp_path / "again.jsonl", base), fields=again)
    for record, row in zip(load_corpus(source, ("en",)), base, strict=True):
        text = record.texts["en"]
        assert (record.id, text.output) == (row["row_id"], row["output"])
        assert [{"role": role, "content": words} for role, words in text.messages or ()] == row[
            "messages"
        ]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_turn_that_is_not_learned_keeps_its_weight_in_a_built_file(
    config, tmp_path, form, capsys
):
    turns = [("user", "q"), ("assistant", "five"), ("user", "?"), ("assistant", "four")]
    chat = [{"role": role, "content": text} for role, text in turns]
    chat[1] |= {"weight": 0, "note": "wrong"}
    config.data.sources[0].path = write_lines(tmp_path / "chat.jsonl", [{"id": "1", "en": chat}])
    config.data.components = (Component(kind="base", source="rows"),)
    config.data.languages = ("en",)
    prepare.build(config, arguments(file_format=form))
    (row,) = read_built(config, form)
    assert [turn.get("weight") for turn in row["messages"]] == [None, 0, None, None]
    assert [turn["role"] for turn in row["messages"]] == [role for role, _ in turns]
    assert "source rows: not read: field 'messages[].note' (1 rows)" in capsys.readouterr().out


@pytest.mark.parametrize("count", [prepare.BATCH - 1, prepare.BATCH, prepare.BATCH + 1])
def test_every_example_is_built_once_in_its_order(config, count):
    config.data.components = (
        Component(kind="x2x", source="rows", count=count, with_replacement=True),
    )
    prepare.build(config, arguments(file_format="jsonl"))
    mixture = Mixture(config.data, load_corpora(config.data, config.seed), config.seed)
    draws = mixture.draw(np.arange(count))
    codes, ids = config.data.languages, [*mixture.corpora["rows"].ids()]
    assert [
        (row["row_id"], row["prompt_language"], row["answer_language"])
        for row in read_built(config, "jsonl")
    ] == [(ids[row], codes[prompt], codes[answer]) for _, row, prompt, answer in draws]


def test_a_built_file_counts_as_current_only_while_it_is_that_of_the_manifest(config, capsys):
    """Whichever other file lies beside it, and from whenever it is."""

    def build(form) -> bool:
        prepare.build(config, arguments(file_format=form))
        assert len(read_built(config, form)) == 50 + config.data.components[1].count
        return "up to date" not in capsys.readouterr().out

    folder = Path(config.output_dir) / "data"
    assert build("parquet") and not build("parquet")
    config.data.components[1].count = 20
    assert build("jsonl") and not build("jsonl")
    assert build("parquet") and not build("parquet")  # not the one of 30 examples
    (folder / "mixture.parquet").unlink()
    assert build("parquet")
    (folder / "manifest.json").unlink()
    assert build("parquet")
    config.seed += 1
    assert build("parquet") and not build("parquet")


def test_the_table_of_a_build_counts_pairs_and_dropped_texts(config, tmp_path, capsys):
    rows = parallel_rows(12)
    rows[3]["zh"]["output"] = rows[4]["es"]["output"] = " "
    config.data.sources[0].path = write_lines(tmp_path / "faulty.jsonl", rows)
    config.data.components = (
        Component(source="rows"),
        Component(kind="en2x", source="rows", languages={"es": 1.0}),
    )
    prepare.build(config, arguments(out=str(tmp_path / "out")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["component", "examples", "pairs"],
        ["base", "10", "en>en", "10"],
        ["en2x", "10", "en>es", "10"],
    ]
    assert lines[3] == "source rows: 10 rows, texts dropped: 2 empty output"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "mixture.parquet",
    ]


def test_a_stopped_build_leaves_nothing_whole(config, tmp_path, monkeypatch):
    prepare.build(config, arguments())
    config.data.components[1].count = 20

    def stopped(mixture, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_parquet", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare.build(config, arguments())
    # No manifest: not whole.
    assert [p.name for p in (tmp_path / "run" / "data").iterdir()] == ["mixture.parquet"]
    monkeypatch.undo()
    prepare.build(config, arguments())
    assert len(pyarrow.parquet.read_table(tmp_path / "run" / "data" / "mixture.parquet")) == 70


def test_preview_marks_exactly_what_is_learned(config, capsys):
    prepare.preview(config, arguments(n=4))
    out = capsys.readouterr().out
    mixture = Mixture(config.data, load_corpora(config.data, config.seed), config.seed)
    tokenizer = load_tokenizer(config.model.path)
    renderer = Renderer(tokenizer, "gemma")
    for example in mixture.take(np.arange(4)):
        rendered = renderer.render(example)
        assert f"«{example.output}</s>»" in out and example.id in out
        assert (
            " ".join(
                f"{i}*" if loss_mask else str(i)
                for i, loss_mask in zip(rendered.ids, rendered.loss_mask, strict=True)
            )
            in out
        )
    assert re.search(r"^\|\d+(\|\d+)*\|\d+ free\| \d+\.\d% of 128 tokens real$", out, re.M)


@pytest.mark.parametrize("packing", [True, False])
def test_preview_shows_the_first_rows_of_training(config, capsys, packing):
    """As the loader of a run with these settings gives them."""
    config.data.packing, config.train.batch_size, config.seed = packing, 8, 5
    prepare.preview(config, arguments(n=1))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    data = open_pipeline(config)
    batch = next(make_loader(data.mixture, data.renderer, config.data, batch_size=8, seed=5))[
        "segment_ids_BT"
    ]
    rows = []
    for segments in batch[:4]:
        lengths = np.bincount(segments)[1:]
        free = 128 - lengths.sum()
        rows.append(
            f"|{'|'.join(map(str, lengths))}|{free} free| "
            f"{lengths.sum() / 128:.1%} of 128 tokens real"
        )
    assert shown == rows


def test_preview_in_colour_and_as_a_page(config, tmp_path, capsys):
    prepare.preview(config, arguments(html=str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="t l"') > 5 and '<div class="bar">' in page and "<script" not in page
    renderer = Renderer(load_tokenizer(config.model.path), "gemma")
    example = Example("i<d", "x2x", "en", "zh", "<b>bold</b>", "", "塞纳河")
    rendered = renderer.render(example)
    text = preview.to_terminal(renderer, example, rendered, length=128, colour=True)
    assert preview.LEARNED in text and "塞纳河" in re.sub(r"\x1b\[[\d;]*m", "", text)
    pairs = [(example, rendered), (example, RowFault("nothing to learn", "x"))]
    page = preview.to_html(renderer, pairs, [([5], 3)], 128)
    assert "<b>" not in page and "i&lt;d" in page and "refused: nothing to learn" in page
    assert preview.describe(example, rendered, 128) == (
        f"i<d  x2x  en → zh  {len(rendered.ids)} tokens, {rendered.loss_mask.sum()} learned"
    )
    for length, over in ((len(rendered.ids) - 1, False), (len(rendered.ids) - 2, True)):
        assert (
            f"over-long for length {length}" in preview.describe(example, rendered, length)
        ) == over


def test_a_page_shows_every_token_once(config, tmp_path):
    """With its id, learned ones apart; and each row as wide as its segments."""
    renderer = Renderer(load_tokenizer(config.model.path), "gemma")
    examples = [Example(f"i{k}", "x2x", "en", "zh", "Name <it>", "", "塞纳河") for k in range(2)]
    pairs = [(example, renderer.render(example)) for example in examples]
    page = preview.to_html(renderer, pairs, [([32, 64], 32)], 128)
    shown = re.findall(r'<span class="(t l|t s|t)" title="(\d+)">', page)
    expected = [
        ("t l" if loss_mask else "t s" if i in renderer.special_ids else "t", str(i))
        for _, rendered in pairs
        for i, loss_mask in zip(rendered.ids, rendered.loss_mask, strict=True)
    ]
    assert shown == expected and renderer.hash in page and "Template gemma" in page
    assert re.findall(r"width:([\d.]+)%", page) == ["25.00", "50.00", "25.00"]
    assert preview.describe_row(np.array([1, 1, 2, 2, 2, 0, 0])) == ([2, 3], 2)


@pytest.mark.parametrize("name", ["small", "llama2"])
def test_pieces_join_to_the_text(name, tokenizer, shared):
    tokenizer = (
        tokenizer if name == "small" else load_tokenizer(str(shared / "tokenizers" / "llama2"))
    )
    renderer = Renderer(tokenizer, "gemma")
    rendered = renderer.render(Example("i", "x2x", "en", "zh", "麤 ¿Qué? Ở", "", "麤 河 ñ"))
    assert (
        "".join(preview.show_pieces(renderer, rendered)).replace("<s>", "").lstrip()
        == "麤 ¿Qué? Ở\n麤 河 ñ</s>"
    )


def test_audit_writes_table_json_and_figure(config, tmp_path, capsys):
    prepare.audit(config, arguments())
    folder = tmp_path / "run" / "audit"
    report = json.loads((folder / "audit.json").read_text())
    assert report["examples"] == 80 and (folder / "audit.png").stat().st_size > 10_000
    written = (folder / "audit.md").read_text().lower()  # the same words, in another form
    shown = capsys.readouterr().out.lower().split()
    words = [word for word in written.split() if not re.fullmatch(r"[#|:-]+", word)]
    assert words == shown[: len(words)]


def leaky_benchmark(folder, rows) -> str:
    """A benchmark in four languages, each of which asks the questions of these rows."""
    names = {"en": "English", "zh": "Chinese", "vi": "Vietnamese", "es": "Spanish"}
    return write_lines(
        folder / "leaky.jsonl",
        [
            {
                "id": row["id"],
                **{
                    names[code]: {
                        "question": row[code]["instruction"],
                        "choices": ["(A) a", "(B) b"],
                        "answer": "(A) a",
                    }
                    for code in names
                },
            }
            for row in rows
        ],
    )


@pytest.mark.parametrize(
    ("asked", "audited"), [((), ("en", "zh", "vi", "es")), (("es", "zh"), ("es", "zh"))]
)
def test_the_audit_looks_for_the_benchmarks_in_the_languages_of_the_evaluation(
    config, tmp_path, asked, audited
):
    """Without languages of its own an evaluation has those of the data."""
    rows = parallel_rows(50)
    config.evaluation.benchmarks = leaky_benchmark(tmp_path, rows[:5]), "cross_world:dev"
    config.evaluation.languages = asked
    config.data.components = tuple(
        Component(kind="same", source="rows", languages={code: 1.0}) for code in ("en", "es")
    )
    prepare.audit(config, arguments(out=str(tmp_path / "audit")))
    leakage = json.loads((tmp_path / "audit" / "audit.json").read_text())["leakage"]
    assert leakage.keys() == {"leaky", "cross_world:dev"}
    assert leakage["leaky"]["languages"].keys() == set(audited)
    assert {code: found["found"] for code, found in leakage["leaky"]["languages"].items()} == {
        code: 5 if code in ("en", "es") else 0 for code in audited
    }


def test_the_audit_parts_the_embedded_world_as_training_does(tokenizer, tmp_path):
    """By the seed: no question of the test territories is one of the training half."""
    tokenizer.save_pretrained(tmp_path / "model")
    data = Data(
        sources=(Source(name="facts", kind="world"),),
        components=(Component(source="facts"),),
        languages=("en",),
        template="gemma",
    )
    config = Config(seed=5, model=Model(path=str(tmp_path / "model")), data=data)
    config.evaluation.benchmarks = ("cross_world:test",)
    prepare.audit(config, arguments(out=str(tmp_path / "audit")))
    report = json.loads((tmp_path / "audit" / "audit.json").read_text())
    items = len(load_benchmark("cross_world:test", ("en",), seed=5).items)
    assert report["leakage"]["cross_world:test"]["languages"]["en"]["items"] == items
    assert all(entry["share"] < 1 for entry in report["leakage"]["cross_world:test"]["strongest"])


@pytest.mark.parametrize("style", STYLES)
def test_the_counts_of_a_mixture_are_printed_in_every_style(config, style, capsys):
    prepare.build(config, arguments(format=style))
    said = capsys.readouterr()
    head = {
        "text": "component  examples  pairs",
        "markdown": "| component | examples | pairs |",
        "latex": r"component & examples & pairs \\",
        "csv": "component,examples,pairs",
    }[style]
    assert head in said.out.splitlines()
    assert ("manifest.json" in said.err) == (style == "csv") != ("manifest.json" in said.out)
    prepare.audit(config, arguments(format=style))
    mark = {"text": "mean tokens", "markdown": "|--:|", "latex": r"\midrule", "csv": "tokens,5 %,"}
    assert mark[style] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["build", "--format", "jsonl"], ["--file_format", "jsonl"]),
        (["build", "--format=parquet"], ["--file_format=parquet"]),
        (["build", "--format=csv"], ["--format=csv"]),
        (["audit", "--format", "jsonl"], ["--format", "jsonl"]),  # refused when flags are read
    ],
)
def test_the_former_flag_of_the_file_format_is_read(given, read, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare", *given])
    monkeypatch.setattr(program.cli, "run", lambda *_, **__: None)
    program.main()
    assert sys.argv == ["prepare", *read]


def test_translate_fills_a_source_through_a_command(config, tmp_path, capsys):
    rows = parallel_rows(3)
    del rows[1]["es"]
    config.data.sources[0].path = write_lines(tmp_path / "gaps.jsonl", rows)
    with pytest.raises(UserError, match="no 'es' version.*prepare translate"):
        Mixture(config.data, load_corpora(config.data, 0), 0)
    script = (
        "import json,sys; [print(json.dumps('es ' + json.loads(l)['text'])) for l in sys.stdin]"
    )
    prepare.translate(config, arguments(command=f'{sys.executable} -c "{script}"'))
    config.data.sources[0].path = str(tmp_path / "run" / "rows.jsonl")
    config.data.components[1].count = 3
    assert len(Mixture(config.data, load_corpora(config.data, 0), 0)) == 6
    with pytest.raises(
        UserError, match="--source=rwos: name one of the sources rows; did you mean rows"
    ):
        prepare.translate(config, arguments(source="rwos"))


def test_translate_with_a_model_of_our_own(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = Source(name="s", path=write_lines(tmp_path / "rows.jsonl", parallel_rows(2, ("en",))))
    model = Model(path=str(tmp_path / "model"), compute_dtype="float32")
    config = Config(
        output_dir=str(tmp_path / "run"),
        model=model,
        data=Data(sources=(source,), languages=("en", "es"), template="gemma"),
    )
    config.evaluation.batch_size = 8
    prepare.translate(config, arguments(max_new_tokens=4))
    full = load_corpus(Source(name="s", path=str(tmp_path / "run" / "s.jsonl")), ("en", "es"))
    assert [set(record.texts) for record in full] == [{"en", "es"}] * len(full)
    stamp = (tmp_path / "run" / "s.jsonl.cache.jsonl").stat().st_size
    prepare.translate(config, arguments(max_new_tokens=4))
    assert (
        tmp_path / "run" / "s.jsonl.cache.jsonl"
    ).stat().st_size == stamp  # nothing was asked twice
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    engines = [prepare.open_translator(config, 4)[1], prepare.open_translator(config, 5)[1]]
    for change in (
        {"data": replace(config.data, template="plain")},
        {"model": replace(model, path=str(tmp_path / "other"))},
        {"model": replace(model, revision="v2")},
    ):
        engines.append(prepare.open_translator(replace(config, **change), 4)[1])
    # Cached under these.
    assert len(set(engines)) == 5 and engines[0] == prepare.open_translator(config, 4)[1]


def test_cross_xquad_writes_a_benchmark_that_loads(config, shared, tmp_path):
    config.data.sources[0].path = str(shared / "xquad")
    prepare.cross_xquad(config, arguments())
    benchmark = load_benchmark(str(tmp_path / "run" / "cross_xquad.json"), config.data.languages)
    assert len(benchmark.items) == 1190 and len(benchmark.items[0].versions) == 4


@pytest.mark.parametrize("portion", [(0.0, 0.5), (0.5, 1.0), (0.9, 1.0)])
def test_cross_xquad_asks_what_its_portion_holds(portion, config, shared, tmp_path):
    """Questions of the benchmark are exactly the rows that a source of this portion has, and none
    of the others.
    """
    pattern = str(shared / "xquad" / "xquad.{lang}.json")
    source = Source(name="held_out", kind="squad", path=pattern, portion=portion, limit=200)
    config.data.sources = (source,)
    prepare.cross_xquad(config, arguments())
    rows = json.loads((tmp_path / "run" / "cross_xquad.json").read_text())
    expected = set(load_corpus(source, config.data.languages).ids())
    training = dataclasses.replace(source, portion=(0.0, portion[0] or 0.1), limit=None)
    assert {row["id"] for row in rows} == expected and len(rows) == min(
        200, round(1190 * (portion[1] - portion[0]))
    )
    if portion[0]:
        assert not expected & set(load_corpus(training, config.data.languages).ids())
    letters = Counter(row["English"]["answer"][1] for row in rows)
    assert max(letters.values()) - min(letters.values()) <= 1


def test_a_benchmark_and_training_split_by_paragraph_share_no_context(config, shared, tmp_path):
    pattern = str(shared / "xquad" / "xquad.{lang}.json")
    source = Source(name="x", path=pattern, portion=(0.8, 1.0), fields={"group": "paragraph"})
    config.data.sources = (source,)
    prepare.cross_xquad(config, arguments())
    rows = json.loads((tmp_path / "run" / "cross_xquad.json").read_text())
    training = load_corpus(dataclasses.replace(source, portion=(0.0, 0.8)), config.data.languages)
    asked = {row["English"]["context"] for row in rows}
    learned = {record.texts["en"].input for record in training}
    assert asked and learned and not asked & learned
    assert len(asked) + len(learned) == 240 and len(rows) + len(training) == 1190
    config.data.sources[0].portion = (0.0, 0.001)
    with pytest.raises(UserError, match="portion=.* holds no question"):
        prepare.cross_xquad(config, arguments())


def run(*words):
    command = [sys.executable, "-m", "crossin_jax.prepare", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_lines(tmp_path / "rows.jsonl", parallel_rows(20))
    (tmp_path / "c.py").write_text(
        "from crossin_jax.config import *\ndef get_config():\n    return Config(output_dir='run', "
        "model=Model(path="
        f"{str(tmp_path / 'model')!r}), data=Data(sources=(Source(name='s', path={path!r}),), "
        "components=(Component(kind='x2x', source='s', count=9),), length=128, template='gemma'))\n"
    )
    done = run(
        "build",
        "--config",
        str(tmp_path / "c.py"),
        "--out",
        str(tmp_path / "out"),
        "--config.seed=3",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 3
    done = run("preview", "-n", "2", "--config", str(tmp_path / "c.py"))
    assert done.returncode == 0 and done.stdout.count("x2x") == 2, done.stderr
    broken = run("build", "--config", str(tmp_path / "c.py"), f"--out={path}/x")
    assert broken.returncode == 2 and "Traceback" not in broken.stderr and path in broken.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("biuld",), "'biuld' is not a command of prepare; did you mean build?"),
        ((), "name a command: build, preview"),
    ],
)
def test_unknown_commands_name_the_known(words, message):
    done = run(*words)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_help_names_every_flag_with_its_default():
    done = run("preview", "--help")
    told = dict(re.findall(r"^  --(\w+)  .*?(?:\(default: (.*)\))?$", done.stdout, re.M))
    assert done.returncode == 0 and told == {
        "out": "",
        "format": "text",
        "file_format": "parquet",
        "n": "5",
        "html": "",
        "source": "",
        "command": "",
        "max_new_tokens": "512",
    }
