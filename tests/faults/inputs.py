"""Bad input, generated: values of settings, and files of every kind that a program reads, each with
one thing wrong.

    python -m tests.faults.inputs [--cases 2000] [--seed 0] [KIND ...]

A kind is a valid file and the function of the package that reads it. A case changes one place of
it: a value of another type or size, a missing or an added field, or bytes that are cut, flipped or
replaced. The reader must return, or raise a `UserError` of at most three lines and 1,000 characters
per line, within half a minute. Exit code 1 where one does not; the table that is printed counts the
cases.
"""

import argparse
import contextlib
import copy
import dataclasses
import gzip
import json
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from absl import flags
from hypothesis import strategies as st

from crossin_jax import cli
from crossin_jax.checkpoint.hf import match_tensors, read_spec, read_tensors
from crossin_jax.checkpoint.peft import read_adapter
from crossin_jax.checks import check
from crossin_jax.config import Config, Source, UserError, from_dict, iterate_fields, to_dict
from crossin_jax.data.corpus import load_corpus
from crossin_jax.data.pipeline import load_tokenizer
from crossin_jax.data.prompts import Renderer
from crossin_jax.data.templates import load_template
from crossin_jax.evaluation.benchmarks import load_benchmark
from crossin_jax.evaluation.frames import make_prompt
from crossin_jax.evaluation.metrics import evaluate
from crossin_jax.evaluation.predictions import encode
from crossin_jax.evaluation.seaeval import read_log
from crossin_jax.files import read_json
from crossin_jax.plan.proposal import apply_proposal, write_proposal
from crossin_jax.report.results import read_results
from tests.models.published import CHECKPOINTS

SECONDS = 30  # a case takes milliseconds; other work may share the processors
ODD_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    1e39,
    float("nan"),
    float("inf"),
    "",
    "abc",
    "1",
    "a\0b",
    "\ud800",
    "x" * 100_000,
    "../x",
    [],
    [1],
    [None],
    ["a", "b"],
    [[]],
    {},
    {"a": 1},
    {"": None},
    {"factor": "x", "rope_type": "linear"},
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """`make` gives the valid value, `write` puts a value where `read` reads it."""

    make: Callable[[], Any]
    write: Callable[[Path, Any], None]
    read: Callable[[Path], object]


# ---- what is written


def write_json_in(name: str, pack: Callable[[bytes], bytes] = bytes) -> Callable[[Path, Any], None]:
    def write(folder: Path, value: Any) -> None:
        (folder / name).write_bytes(pack(value if isinstance(value, bytes) else dump(value)))

    return write


def write_lines_in(name: str) -> Callable[[Path, Any], None]:
    def write(folder: Path, value: Any) -> None:
        rows = value if isinstance(value, list) else [value]
        raw = value if isinstance(value, bytes) else b"\n".join(map(dump, rows)) + b"\n"
        (folder / name).write_bytes(raw)

    return write


def dump(value: Any) -> bytes:
    """JSON as a careless program writes it: NaN, Infinity and lone surrogates included."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def pack_header(header: Any, size: int) -> bytes:
    raw = header if isinstance(header, bytes) else dump(header)
    return struct.pack("<Q", len(raw)) + raw + bytes(size)


# ---- the kinds


def parallel_rows() -> list[dict[str, Any]]:
    text = {"instruction": "Ask {}?", "input": "", "output": "yes"}
    return [{"id": f"r{i}", "en": dict(text), "zh": dict(text)} for i in range(3)]


def chats() -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return [{"id": f"r{i}", "language": "en", "messages": copy.deepcopy(turns)} for i in range(3)]


def squad() -> dict[str, Any]:
    answer = {"text": "river", "answer_start": 2}
    question = {"id": "q1", "question": "What?", "answers": [answer]}
    return {
        "version": "1.1",
        "data": [{"title": "t", "paragraphs": [{"context": "A river.", "qas": [question]}]}],
    }


def items() -> list[dict[str, Any]]:
    version = {
        "question": "Which?",
        "context": "Text.",
        "choices": ["(A) a", "(B) b"],
        "answer": "(A) a",
    }
    return [
        {"id": str(i), "tags": ["t"], "English": dict(version), "Chinese": dict(version)}
        for i in range(3)
    ]


def flat_items() -> list[dict[str, Any]]:
    """Rows of one language each, as MMLU's are."""
    return [
        {
            "id": str(i),
            "language": code,
            "question": "Which?",
            "choices": ["a", "b"],
            "answer": i % 2,
        }
        for i in range(2)
        for code in ("en", "zh")
    ]


def belebele() -> list[dict[str, Any]]:
    row = {
        "link": "l",
        "question_number": 1,
        "flores_passage": "P",
        "question": "Q",
        "correct_answer_num": "1",
    }
    return [
        row | {f"mc_answer{n}": str(n) for n in range(1, 5)} | {"dialect": dialect}
        for dialect in ("eng_Latn", "zho_Hans")
    ]


def log() -> list[dict[str, Any]]:
    rows = items()
    for row in rows:
        for name in ("English", "Chinese"):
            row[name]["model_prediction"] = "(A) a"
    return rows


def read_items(file: Path) -> None:
    benchmark = load_benchmark(str(file), ("en", "zh"))
    for item in benchmark.items:
        for version in item.versions.values():
            make_prompt(version, 1)


def read_source(file: Path, **settings: Any) -> None:
    corpus = load_corpus(Source(name="s", path=str(file), **settings), ("en", "zh"), seed=0)
    for i in range(len(corpus)):
        _ = corpus[i]


def model_config(number: int) -> dict[str, Any]:
    return copy.deepcopy(list(CHECKPOINTS.values())[number][0])


def tiny_config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }


def header() -> dict[str, Any]:
    shapes = {"model.embed_tokens.weight": [300, 8], "model.norm.weight": [8]}
    layer = "model.layers.0."
    shapes |= {f"{layer}self_attn.{p}_proj.weight": [8, 8] for p in "qkvo"}
    shapes |= {f"{layer}mlp.{p}_proj.weight": [8, 8] for p in ("gate", "up", "down")}
    shapes |= {f"{layer}{p}_layernorm.weight": [8] for p in ("input", "post_attention")}
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    return entries


SIZE = header()["model.layers.0.post_attention_layernorm.weight"]["data_offsets"][1]


def write_model(folder: Path, changed_header: Any) -> None:
    write_json_in("config.json")(folder, tiny_config())
    (folder / "model.safetensors").write_bytes(pack_header(changed_header, SIZE))


def read_weights(folder: Path) -> None:
    match_tensors(read_tensors(folder), read_spec(folder), str(folder))


def index() -> dict[str, Any]:
    return {
        "metadata": {"total_size": SIZE},
        "weight_map": dict.fromkeys(list(header())[1:], "a.safetensors"),
    }


def write_index(folder: Path, value: Any) -> None:
    write_json_in("config.json")(folder, tiny_config())
    (folder / "a.safetensors").write_bytes(pack_header(header(), SIZE))
    write_json_in("model.safetensors.index.json")(folder, value)


def adapter() -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj"],
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "base_model_name_or_path": "base",
        "alpha_pattern": {},
        "rank_pattern": {},
    }


def write_adapter(folder: Path, value: Any) -> None:
    write_json_in("config.json")(folder, tiny_config())
    write_json_in("adapter_config.json")(folder, value)
    entries, name = {}, "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    entries[f"{name}A.weight"] = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
    entries[f"{name}B.weight"] = {"dtype": "F32", "shape": [8, 2], "data_offsets": [64, 128]}
    (folder / "adapter_model.safetensors").write_bytes(pack_header(entries, 128))


def tokenizer() -> dict[str, Any]:
    letters = {letter: i for i, letter in enumerate(["<s>", "</s>", "<pad>", *"abcdefgh "])}
    added = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": t} | added for i, t in enumerate(("<s>", "</s>", "<pad>"))
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": letters,
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}</s>{% endfor %}",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
    }


def write_tokenizer(folder: Path, changed: dict[str, Any]) -> None:
    write_json_in("config.json")(folder, tiny_config())
    for name, make in (("tokenizer.json", tokenizer), ("tokenizer_config.json", tokenizer_config)):
        write_json_in(name)(folder, changed.get(name, make()))


def warm_up() -> None:
    """Imports what the first tokenizer would import, which takes longer than a case may."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), {})
        read_tokenizer(Path(folder))


def read_tokenizer(folder: Path) -> None:
    read_spec(folder)
    opened = load_tokenizer(str(folder))
    Renderer(opened, "plain").render_prompt("abc")
    if opened.chat_template:
        Renderer(opened, "chat").render_prompt("abc")


def settings() -> Config:
    from tests.test_config import example

    return example()


def proposal(folder: Path, value: Any) -> None:
    write_json_in("proposal.json")(folder, value)


def proposed() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_proposal(f"{folder}/p.json", with_model(Path(folder)), {"model.remat": "full"})
        return read_json(f"{folder}/p.json")


def with_model(folder: Path) -> Config:
    write_json_in("config.json")(folder, tiny_config())
    config = settings()
    config.model.path = str(folder)
    return config


def read_proposal(folder: Path) -> None:
    apply_proposal(folder / "proposal.json", with_model(folder))


def results() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_json_in("log.json")(Path(folder), log())
        stored = encode(read_log(f"{folder}/log.json"))
    return {
        "format": 1,
        "runs": [{"name": "a", "seed": 0, "provenance": {}, "predictions": [stored]}],
    }


def template() -> dict[str, Any]:
    return {
        "description": "a template",
        "prompt_input": "{instruction}\n{input}\n",
        "prompt_no_input": "{instruction}\n",
        "answer_prefix": "",
        "system_form": "{system}",
        "system": None,
        "end": "</s>",
    }


KINDS = {
    **{
        f"config.json of {model_config(n)['model_type']} {n}": Kind(
            lambda n=n: model_config(n), write_json_in("config.json"), read_spec
        )
        for n in range(0, len(CHECKPOINTS), 3)
    },
    "config.json, small": Kind(tiny_config, write_json_in("config.json"), read_spec),
    "safetensors header": Kind(header, write_model, read_weights),
    "safetensors index": Kind(index, write_index, read_weights),
    "adapter_config.json": Kind(
        adapter, write_adapter, lambda folder: read_adapter(folder, read_spec(folder))
    ),
    "tokenizer.json": Kind(
        tokenizer,
        lambda folder, value: write_tokenizer(folder, {"tokenizer.json": value}),
        read_tokenizer,
    ),
    "tokenizer_config.json": Kind(
        tokenizer_config,
        lambda folder, value: write_tokenizer(folder, {"tokenizer_config.json": value}),
        read_tokenizer,
    ),
    "prompt template": Kind(
        template,
        write_json_in("t.json"),
        lambda folder: load_template(str(folder / "t.json")).fill("a", "b", None),
    ),
    "parallel rows": Kind(
        parallel_rows, write_lines_in("r.jsonl"), lambda folder: read_source(folder / "r.jsonl")
    ),
    "chats": Kind(chats, write_lines_in("c.jsonl"), lambda folder: read_source(folder / "c.jsonl")),
    "SQuAD": Kind(
        squad,
        write_json_in("s.en.json"),
        lambda folder: read_source(folder / "s.en.json", kind="squad", languages=("en",)),
    ),
    "benchmark": Kind(items, write_json_in("b.json"), lambda folder: read_items(folder / "b.json")),
    "benchmark rows": Kind(
        flat_items, write_json_in("b.json"), lambda folder: read_items(folder / "b.json")
    ),
    "Belebele": Kind(
        belebele, write_lines_in("b.jsonl"), lambda folder: read_items(folder / "b.jsonl")
    ),
    "SeaEval log": Kind(
        log, write_json_in("l.json"), lambda folder: evaluate(read_log(folder / "l.json"))
    ),
    "proposal": Kind(proposed, proposal, read_proposal),
    "results": Kind(results, write_json_in("answers.json.gz", gzip.compress), read_results),
    "saved settings": Kind(
        lambda: to_dict(settings()),
        write_json_in("config.json"),
        lambda folder: check(from_dict(read_json(folder / "config.json", expect=dict))),
    ),
}


# ---- what is changed


def walk(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a value, itself included: keys and indices."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from walk(value[key], (*path, key))


def put(value: Any, path: tuple, new: Any) -> Any:
    """The value with another one at a path; a function there is called with (container, key)."""
    if not path:
        return new
    *parents, last = path
    place = value
    for key in parents:
        place = place[key]
    if callable(new):
        new(place, last)
    else:
        place[last] = new
    return value


def remove(container: Any, key: Any) -> None:
    del container[key]


def rename(container: Any, key: Any) -> None:
    if isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)


@st.composite
def changed_values(draw: Any, kind: Kind) -> tuple[str, Any]:
    """(what was changed, the changed value) of a kind of file."""
    value = kind.make()
    path = draw(st.sampled_from(list(walk(value))))
    new = draw(st.sampled_from([*ODD_VALUES, remove, rename]))
    if not path and callable(new):
        new = None
    return f"{path} → {getattr(new, '__name__', repr(new))[:60]}", put(value, path, new)


DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {
    "empty": lambda raw, at: b"",
    "cut": lambda raw, at: raw[:at],
    "flipped bit": lambda raw, at: raw[:at] + bytes([raw[at] ^ 16]) + raw[at + 1 :],
    "not UTF-8": lambda raw, at: raw[:at] + b"\xff\xfe" + raw[at:],
    "zeros": lambda raw, at: raw[:at] + bytes(8) + raw[at + 8 :],
    "deep": lambda raw, at: b"[" * 100_000,
    "deep object": lambda raw, at: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "5,000 digits": lambda raw, at: b'{"id": ' + b"9" * 5000 + b"}",
    "twice": lambda raw, at: raw + raw,
    "UTF-16": lambda raw, at: raw.decode("utf-8", "replace").encode("utf-16"),
    "huge line": lambda raw, at: b'"' + b"x" * 1_000_000 + b'"',
}


@st.composite
def damaged_bytes(draw: Any, kind: Kind) -> tuple[str, bytes]:
    value = kind.make()
    raw = b"\n".join(map(dump, value)) if isinstance(value, list) else dump(value)
    name = draw(st.sampled_from(list(DAMAGE)))
    at = draw(st.integers(0, len(raw) - 1))
    return f"{name} at {at}", DAMAGE[name](raw, at)


# ---- settings and command lines, from their declarations

SETTINGS = [path for path, _, _ in iterate_fields(settings())]


@st.composite
def changed_settings(draw: Any) -> tuple[str, Config]:
    """A configuration with one to three settings changed to odd values, at their limits, or
    beyond.
    """
    from tests.test_config import set_field

    config, said = settings(), []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(SETTINGS))
        field = {p: f for p, _, f in iterate_fields(config)}.get(path)
        limits = (
            [field.metadata[k] for k in ("above", "at_least", "at_most") if k in field.metadata]
            if field
            else []
        )
        near = [limit + step for limit in limits for step in (-1, -1e-9, 0, 1e-9, 1)]
        value = draw(
            st.sampled_from([*ODD_VALUES, *near, (), (1,), ("a",), ("a", "a"), (float("nan"),)])
        )
        with contextlib.suppress(AttributeError, TypeError, IndexError):  # its section was replaced
            set_field(config, path, value)
            said.append(f"{path}={value!r:.60}")
    return ", ".join(said), config


@st.composite
def command_lines(draw: Any) -> tuple[str, list[str]]:
    """Overrides of settings as texts."""
    words = ["program", "--config=tests/configs/tiny.py"]
    texts = [
        "",
        "none",
        "1",
        "-1",
        "1e9",
        "nan",
        "abc",
        "a,b",
        "a,b,",
        ",",
        "(",
        "[1",
        "('a',)",
        "{",
        "=",
        "0x1",
        "true",
        "é",
        "x" * 5000,
    ]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(
            st.sampled_from(
                [*SETTINGS, "lora", "data", "mesh.x", "", "lora.rank.x", "train.steps."]
            )
        )
        words.append(
            f"--config.{name}{draw(st.sampled_from(['=', '']))}{draw(st.sampled_from(texts))}"
        )
    return " ".join(words[2:])[:200], words


def parse(words: list[str]) -> None:
    values = flags.FlagValues()
    try:
        config = cli.define_config(words, values)
        values(words)
    except flags.Error as error:
        raise UserError(str(error)) from None
    check(config())


# ---- how a case ends


class TooLong(Exception):
    """The reader did not end in time."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(read: Callable[[], object]) -> str:
    """ "read" or "refused", or what is wrong with how the reader ended."""
    try:
        with time_limit(SECONDS):
            read()
    except UserError as error:
        lines = str(error).split("\n")
        if len(lines) > 3:
            return f"FAIL: {len(lines)} lines: {lines[0][:200]}"
        longest = max(map(len, lines))
        return (
            f"FAIL: a line of {longest} characters: {lines[0][:200]}"
            if longest > 1000
            else "refused"
        )
    except (TooLong, Exception) as error:
        place = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in place if "crossin_jax/" in frame.filename] or place
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return f"FAIL: {type(error).__name__} at {where}: {str(error)[:150]}"
    return "read"


def run_kind(name: str, cases: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """(how many cases ended how, the failures) of one kind."""
    counts: Counter = Counter()
    failures: list[str] = []
    warm_up()

    def record(said: str, read: Callable[[], object]) -> None:
        verdict = judge(read)
        counts[verdict.partition(":")[0]] += 1
        if verdict.startswith("FAIL"):
            failures.append(f"{name}: {said}: {verdict}")

    def try_file(case: tuple[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            KINDS[name].write(Path(folder), case[1])
            record(case[0], lambda: KINDS[name].read(Path(folder)))

    if name == "settings":
        strategy, attempt = changed_settings(), lambda case: record(case[0], lambda: check(case[1]))
    elif name == "command line":
        strategy, attempt = command_lines(), lambda case: record(case[0], lambda: parse(case[1]))
    else:
        kind = KINDS[name]
        strategy, attempt = (
            st.one_of(changed_values(kind), changed_values(kind), damaged_bytes(kind)),
            try_file,
        )
    quick = hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.seed(seed)(quick(hypothesis.given(strategy)(attempt)))()
    return counts, failures


ALL = ("settings", "command line", *KINDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="*", default=ALL)
    parser.add_argument("--cases", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total: Counter = Counter()
    failed = []
    print(f"{'kind':32} {'read':>6} {'refused':>8} {'FAIL':>6}")
    for name in options.kinds:
        counts, failures = run_kind(name, -(-options.cases // len(options.kinds)), options.seed)
        total += counts
        failed += failures
        print(f"{name:32} {counts['read']:6} {counts['refused']:8} {counts['FAIL']:6}", flush=True)
    print(f"{'all':32} {total['read']:6} {total['refused']:8} {total['FAIL']:6}")
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
