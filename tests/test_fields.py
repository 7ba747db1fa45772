"""No field without effect: every setting, changed, gives another result, another program, or an
error.

The table names for each field a changed value and what is looked at: the object that consumes the
field. Nothing is trained. `LORA` adapts the pretrained model, `NEW` trains a small one from random
weights.
"""

import copy
import dataclasses
import hashlib
import types
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossin_jax import evaluate as evaluate_program
from crossin_jax import train as train_program
from crossin_jax.checkpoint.store import Store
from crossin_jax.checks import check
from crossin_jax.config import Component, Config, Data, Source, Train, UserError
from crossin_jax.data import loader as loading
from crossin_jax.data.corpus import load_corpus
from crossin_jax.data.pipeline import open_eval_renderer, open_pipeline, open_tokenizer
from crossin_jax.evaluation import during_training, runner
from crossin_jax.parallel.mesh import leaf_name, make_mesh
from crossin_jax.training.optim import make_optimizer, make_schedule
from crossin_jax.training.state import abstract_model, abstract_state, model_spec
from crossin_jax.training.step import StepSettings, make_train_step
from tests.data.conftest import parallel_rows, write_lines
from tests.helpers import ONE_PROCESS, config_in
from tests.test_config import SECTIONS


def shapes(config: Config) -> dict:
    """The parameters that train and those that are frozen, with shapes and types."""
    model = abstract_model(config, model_spec(config), make_mesh(config.mesh))
    return {
        leaf_name(path): (leaf.shape, leaf.dtype, tree is model.frozen)
        for tree in (model.trainable, model.frozen)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def program(config: Config) -> str:
    """The training step as JAX traces it."""
    mesh, spec = make_mesh(config.mesh), model_spec(config)
    model, optimizer = abstract_model(config, spec, mesh), make_optimizer(config.optim, 6)
    static = StepSettings(
        config.train.accumulation,
        config.train.loss_chunk,
        config.model.remat,
        config.model.attention,
        config.seed,
        2,
    )
    int_BT = jax.ShapeDtypeStruct((16, config.data.length), jnp.int32)
    batch = dict.fromkeys(
        ("tokens_BT", "targets_BT", "segment_ids_BT", "positions_BT", "group_BT"), int_BT
    )
    batch["loss_mask_BT"] = jax.ShapeDtypeStruct(int_BT.shape, bool)
    step = make_train_step(model.graphdef, optimizer, static)
    return str(jax.make_jaxpr(step)(abstract_state(model, optimizer, mesh), batch))


def optimizer(config: Config) -> tuple:
    """The update of three parameters as JAX traces it, and the schedule."""
    params = {"embed_tokens": {"weight": jnp.ones((4, 4))}, "norm": {"scale": jnp.ones(4)}}
    rule = make_optimizer(config.optim, 20)
    schedule = make_schedule(config.optim, 20)
    return (
        str(jax.make_jaxpr(rule.update)(params, jax.eval_shape(rule.init, params), params)),
        [float(schedule(i)) for i in range(20)],
    )


def corpus(config: Config) -> tuple:
    """What is read of the first source."""
    found = load_corpus(config.data.sources[0], config.data.languages, seed=config.seed)
    return len(found), [repr(found[i]) for i in range(len(found))]


def digest(rows: np.ndarray) -> str:
    return f"{rows.shape} {hashlib.sha256(rows.tobytes()).hexdigest()}"


def batches(config: Config) -> list[str]:
    """Three batches of the mixture, and how it is made."""
    data = open_pipeline(config)
    made = loading.make_loader(
        data.mixture, data.renderer, config.data, batch_size=4, seed=config.seed
    )
    texts = [digest(rows) for _ in range(3) for rows in next(made).values()]
    made.close()
    return [*texts, str(made._workers), str(data.held_out is not None), str(made.groups)]


def tokens(config: Config) -> int:
    """The tokenizer's size."""
    return len(open_tokenizer(config))


def mesh(config: Config) -> dict:
    return dict(make_mesh(config.mesh).shape)


def store(config: Config) -> tuple:
    """What is kept of the checkpoints, and where."""
    with Store(config.output_dir, config=config) as opened:
        options = opened._manager._options
        return opened.folder, options.max_to_keep, options.keep_period


class Engine:
    """Writes nothing, knows nothing, remembers how it was made and what it was asked."""

    max_length = 1000

    def __init__(self, *_, **options):
        self.asked = ENGINES
        self.asked.append((options["batch_size"], options["cache_dtype"]))

    def score(self, prompts, continuations, **_):
        self.asked.append([ids.tolist() for ids in prompts])
        # any ranking that differs between languages
        rng = np.random.default_rng(0)
        return [rng.normal(size=len(entry)) for entry in continuations]

    def generate(self, prompts, detokenize, finished, **options):
        self.asked.append(([ids.tolist() for ids in prompts], options))
        return [[] for _ in prompts]


ENGINES: list = []


def benchmark(config: Config) -> tuple:
    """The questions that a model is asked in training and the scores that come of it."""
    ENGINES.clear()
    model = types.SimpleNamespace(graphdef=None, spec=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Engine", Engine)
        patch.setattr(during_training.nnx, "merge_state", lambda *_: None)
        asker = open_eval_renderer(config, pipeline(repr(config.data), config).tokenizer)
        scores = during_training.Benchmarks(config, asker, model, None)(
            types.SimpleNamespace(trainable=0, frozen=0)
        )
    return repr(scores), repr(ENGINES)


def asked_models(config: Config) -> list:
    """The checkpoints that `evaluate` asks; None is the model before tuning."""
    asked: list = []

    def evaluate(_, checkpoint, *__):
        return asked.append(checkpoint) or ([], {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_program, "evaluate", evaluate)
        for name in ("write_run", "load_benchmarks", "list_parts"):
            patch.setattr(evaluate_program, name, lambda *_, **__: [])
        given = dict.fromkeys(("out", "limit", "languages", "prompts", "untuned"))
        given |= ONE_PROCESS
        flags = types.SimpleNamespace(checkpoint=config.output_dir, format="text", **given)
        evaluate_program.main(config, flags)
    return asked


@cache
def opened(data: str, holder: tuple) -> object:
    return open_pipeline(holder[0])


class Held(tuple):
    """Hashes alike, so that the data alone decide what is opened again."""

    def __hash__(self):
        return 0

    def __eq__(self, other):
        return True


def pipeline(data: str, config: Config):
    """The data of a configuration, opened once."""
    return opened(f"{data} {config.seed} {config.model.tokenizer}", Held((config,)))


def run(config: Config) -> list:
    """Everything that the training program does, in order; model, step, sinks and checkpoints are
    stand-ins.
    """
    told = []

    class Recorder:
        """Tells how it is made and called; false where it is asked for something."""

        def __init__(self, *arguments, **options):
            told.append(
                (
                    self.name,
                    [a for a in arguments if isinstance(a, str | tuple | int)],
                    {k: v for k, v in options.items() if isinstance(v, str | int | bool)},
                )
            )

        def __call__(self, *_):
            told.append(self.name)
            return {}

        def __getattr__(self, name):
            def call(*arguments, **_):
                told.append((self.name, name, [a for a in arguments if isinstance(a, int)]))

            return call

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def step(state, batch):
        told.append((state.step, batch["tokens_BT"].shape))
        return types.SimpleNamespace(step=state.step + 1), {}

    stand_ins = {
        name: type(name, (Recorder,), {"name": name})
        for name in ("Telemetry", "HeldOut", "Benchmarks", "Profiler", "Store")
    }
    guest = types.SimpleNamespace(
        Benchmarks=stand_ins.pop("Benchmarks"), check_benchmarks=lambda *_: []
    )
    stand_ins |= {
        "open_guest": lambda _: guest,
        "open_pipeline": lambda config: pipeline(repr(config.data), config),
        "abstract_model": lambda *_: MODEL,
        "abstract_state": lambda *_: None,
        "make_train_step": lambda *_: None,
        "flops_per_token": lambda *_: 1,
        "to_mesh": lambda batch, mesh: batch,
        "open_eval_renderer": lambda *_: types.SimpleNamespace(check_embeddings=lambda *_: None),
        "start_state": lambda *_: types.SimpleNamespace(step=0, trainable={}, frozen={}),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(train_program, name, stand_in)
        patch.setattr(jax, "jit", lambda function, **_: step)
        told.append(train_program.train(config))
    return told


MODEL = types.SimpleNamespace(graphdef=None, spec=None)


# ---- Where each field is looked at: (base, path, changed value, observation)


@pytest.fixture(scope="module")
def bases(pretrained, tmp_path_factory) -> dict[str, Config]:
    """A configuration of each kind, small."""
    folder = tmp_path_factory.mktemp("fields")
    files = {
        "rows": write_lines(folder / "rows.jsonl", parallel_rows(40)),
        "more": write_lines(folder / "more.jsonl", parallel_rows(30, start=100)),
    }
    for code in ("en", "zh"):
        rows = [
            {"id": f"{code}{i}", "instruction": f"{code} {i}", "output": str(i)} for i in range(9)
        ]
        write_lines(folder / f"apart_{code}.jsonl", rows)
    questions = [
        {"id": f"q{i}"}
        | {
            name: {
                "question": f"{name} {i}?",
                "choices": ["(A) one", "(B) two"],
                "answer": "(A) one",
            }
            for name in ("English", "Chinese", "Spanish")
        }
        for i in range(6)
    ]
    files["questions"] = write_lines(folder / "questions.jsonl", questions)
    gap = {"Prompt": "Vienna is in <mask>.", "Ans": "Austria", "Candidate Ans": "Peru, Austria"}
    for code in ("en", "zh"):
        for split, row in {"test": questions[0], "dev": questions[1]}.items():
            write_lines(folder / f"SPLIT_{split}_{code}.jsonl", [row["English"]])
        write_lines(folder / f"GAPS_test_{code}.jsonl", [gap])
    lora = config_in(folder / "lora", str(pretrained / "model"))
    new = config_in(folder / "new")
    new.train = dataclasses.replace(new.train, tensorboard=True)
    parts = Data(
        sources=(Source(name="rows", path=files["rows"]), Source(name="more", path=files["more"])),
        components=(Component(kind="base", source="rows"), Component(kind="x2x", source="rows")),
        length=512,
        languages=("en", "zh", "vi", "es"),
    )
    data = dataclasses.replace(lora, data=parts)
    asks = dataclasses.replace(
        data,
        evaluation=dataclasses.replace(
            lora.evaluation,
            benchmarks=(files["questions"],),
            languages=("en", "zh"),
            prompts=(1, 2),
            method="generate",
        ),
    )
    trains = dataclasses.replace(
        lora,
        train=Train(
            steps=6,
            batch_size=8,
            log_every=2,
            eval_every=2,
            benchmark_every=3,
            checkpoint_every=2,
            tensorboard=False,
        ),
    )

    def component(kind: str) -> Config:
        return dataclasses.replace(
            data,
            data=dataclasses.replace(
                parts,
                components=(
                    Component(kind=kind, source="rows"),
                    Component(kind="base", source="rows"),
                ),
            ),
        )

    return {
        "LORA": lora,
        "NEW": new,
        "DATA": data,
        "ASKS": asks,
        "TRAINS": trains,
        "TRANS": component("trans"),
        "X2X": component("x2x"),
        "WORLD": dataclasses.replace(lora),
        "files": files,
        "folder": str(folder),
    }


ARCHITECTURE = {
    "width": 64,
    "ff_width": 64,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 4,
    "max_length": 64,
    "tie_embeddings": False,
    "vocab_size": 500,
}
TABLE = {
    **{
        f"Architecture.{name}": (
            "NEW",
            f"model.architecture.{name}",
            value,
            lambda c: repr(model_spec(c)),
        )
        for name, value in ARCHITECTURE.items()
    },
    "Model.path": ("LORA", "model.path", "/no/where", shapes),
    "Model.revision": ("HUB", "model.revision", "v2", shapes),
    "Model.tokenizer": ("LORA", "model.tokenizer", "/no/where", tokens),
    "Model.param_dtype": ("LORA", "model.param_dtype", "bfloat16", shapes),
    "Model.frozen_dtype": ("LORA", "model.frozen_dtype", "int8", shapes),
    "Model.compute_dtype": ("LORA", "model.compute_dtype", "bfloat16", program),
    "Model.attention": ("LORA", "model.attention", "splash", program),
    "Model.remat": ("LORA", "model.remat", "full", program),
    "Lora.rank": ("LORA", "lora.rank", 2, shapes),
    "Lora.alpha": ("LORA", "lora.alpha", 2.0, program),
    "Lora.dropout": ("LORA", "lora.dropout", 0.2, program),
    "Lora.targets": ("LORA", "lora.targets", ("q_proj",), shapes),
    "Lora.modules_to_save": ("LORA", "lora.modules_to_save", ("embed_tokens",), shapes),
    "Lora.use_rslora": ("LORA", "lora.use_rslora", True, program),
    "Lora.use_dora": ("LORA", "lora.use_dora", True, shapes),
    "Lora.path": ("LORA", "lora.path", "/no/where", shapes),
    "Lora.released_code_compatible": ("LORA", "lora.released_code_compatible", True, shapes),
    "Source.name": ("DATA", "data.sources.0.name", "other", batches),
    "Source.kind": ("DATA", "data.sources.0.kind", "csv", corpus),
    "Source.path": ("DATA", "data.sources.0.path", "{more}", corpus),
    "Source.split": ("LORA", "data.sources.0.split", "dev", corpus),
    "Source.languages": ("DATA", "data.sources.0.languages", ("en", "zh"), corpus),
    "Source.fields": (
        "DATA",
        "data.sources.0.fields",
        {"output": "instruction", "instruction": "output"},
        corpus,
    ),
    "Source.join": ("APART", "data.sources.0.join", "position", corpus),
    "Source.portion": ("DATA", "data.sources.0.portion", (0.0, 0.5), corpus),
    "Source.limit": ("DATA", "data.sources.0.limit", 7, corpus),
    "Component.kind": ("DATA", "data.components.0.kind", "en2x", batches),
    "Component.source": ("DATA", "data.components.0.source", "more", batches),
    "Component.count": ("DATA", "data.components.0.count", 9, batches),
    "Component.share": ("LORA", "data.components.0.share", 0.25, batches),
    "Component.languages": ("DATA", "data.components.1.languages", {"zh": 1.0, "vi": 1.0}, batches),
    "Component.allow_same": ("X2X", "data.components.0.allow_same", True, batches),
    "Component.translate": ("TRANS", "data.components.0.translate", "x2en", batches),
    "Component.translate_what": ("TRANS", "data.components.0.translate_what", "record", batches),
    "Component.request": ("TRANS", "data.components.0.request", "prompt", batches),
    "Component.with_replacement": ("DATA", "data.components.1.with_replacement", True, batches),
    "Component.tag": ("DATA", "data.components.1.tag", "instruction", batches),
    "Component.template": ("DATA", "data.components.1.template", "plain", batches),
    "Data.languages": ("DATA", "data.languages", ("en", "zh"), batches),
    "Data.pivot": ("DATA", "data.pivot", "zh", batches),
    "Data.template": ("DATA", "data.template", "plain", batches),
    "Data.system": ("DATA", "data.system", "Be brief.", batches),
    "Data.tag": ("DATA", "data.tag", "instruction", batches),
    "Data.tokenization": ("DATA", "data.tokenization", "apart", batches),
    "Data.length": ("DATA", "data.length", 256, batches),
    "Data.packing": ("DATA", "data.packing", False, batches),
    "Data.over_long": ("SHORT", "data.over_long", "shorten_input", batches),
    "Data.workers": ("DATA", "data.workers", 1, batches),
    **{
        f"Optim.{name}": ("NEW", f"optim.{name}", value, optimizer)
        for name, value in {
            "name": "lion",
            "learning_rate": 1e-3,
            "schedule": "linear",
            "warmup_share": 0.5,
            "final_share": 0.5,
            "weight_decay": 0.5,
            "b1": 0.5,
            "b2": 0.5,
            "clip_norm": None,
            "moments_dtype": "bfloat16",
            "groups": {"embed_tokens/*": {"rate": 0.5}},
        }.items()
    },
    "Mesh.data": ("NEW", "mesh.data", 4, mesh),
    "Mesh.fsdp": ("NEW", "mesh.fsdp", 2, mesh),
    "Mesh.tensor": ("NEW", "mesh.tensor", 2, mesh),
    **{
        f"Train.{name}": ("TRAINS", f"train.{name}", value, run)
        for name, value in {
            "steps": 5,
            "batch_size": 16,
            "log_every": 3,
            "eval_every": 3,
            "benchmark_every": 2,
            "checkpoint_every": 3,
            "checkpoint_minutes": 1e-9,
            "tensorboard": True,
        }.items()
    },
    "Train.epochs": ("EPOCHS", "train.epochs", 2.0, run),
    "Train.accumulation": ("LORA", "train.accumulation", 2, program),
    "Train.loss_chunk": ("LORA", "train.loss_chunk", 8, program),
    "Train.keep": ("NEW", "train.keep", 5, store),
    "Train.keep_every": ("NEW", "train.keep_every", 5, store),
    **{
        f"Evaluation.{name}": ("ASKS", f"evaluation.{name}", value, benchmark)
        for name, value in {
            "benchmarks": ("cross_world:dev",),
            "languages": ("en", "es"),
            "method": "both",
            "prompts": (1, 3),
            "shots": 1,
            "mode": "strict",
            "template": "plain",
            "max_new_tokens": 9,
            "batch_size": 4,
            "temperature": 0.5,
            "top_k": 5,
            "top_p": 0.5,
            "cache_dtype": "bfloat16",
            "limit": 3,
        }.items()
    },
    "Evaluation.rankc": ("CHOICES", "evaluation.rankc", "norm1", benchmark),
    "Evaluation.split": ("SPLIT", "evaluation.split", "dev", benchmark),
    "Evaluation.gap": ("GAPS", "evaluation.gap", "answer", benchmark),
    "Evaluation.untuned": ("LORA", "evaluation.untuned", True, asked_models),
    "Evaluation.over_long": ("LONG", "evaluation.over_long", "skip", benchmark),
    "Config.name": ("TRAINS", "name", "other", run),
    "Config.seed": ("DATA", "seed", 7, batches),
    "Config.output_dir": ("NEW", "output_dir", "{folder}/other", store),
}
# what has fields of its own is changed as a whole too
TABLE |= {
    "Model.architecture": ("NEW", "model.architecture", None, shapes),
    "Config.lora": ("LORA", "lora", None, shapes),
    "Data.sources": ("DATA", "data.sources", (), batches),
    "Data.components": ("DATA", "data.components", (), batches),
    "Data.eval_sources": (
        "DATA",
        "data.eval_sources",
        (Source(name="rows", kind="world", split="dev"),),
        batches,
    ),
}
WHOLE = {
    "Config.model",
    "Config.data",
    "Config.optim",
    "Config.mesh",
    "Config.train",
    "Config.evaluation",
}


def test_the_table_is_complete():
    assert TABLE.keys() | WHOLE == {
        f"{cls.__name__}.{field.name}" for cls in SECTIONS for field in dataclasses.fields(cls)
    }


def base_of(name: str, bases: dict) -> Config:
    """A base, or one made of another by what a single field needs to matter."""
    if name == "HUB":
        config = copy.deepcopy(bases["LORA"])
        config.model.path = "org/model"
    elif name == "APART":
        config = copy.deepcopy(bases["DATA"])
        config.data = dataclasses.replace(
            config.data,
            languages=("en", "zh"),
            sources=(Source(name="rows", path=bases["folder"] + "/apart_{lang}.jsonl"),),
        )
    elif name == "SHORT":
        config = copy.deepcopy(bases["DATA"])
        config.data.length = 170
    elif name == "LONG":
        config = copy.deepcopy(bases["ASKS"])
        config.evaluation.max_new_tokens = 1000
    elif name in ("CHOICES", "SPLIT", "GAPS"):
        config = copy.deepcopy(bases["ASKS"])
        if name != "CHOICES":
            path = f"{bases['folder']}/{name}_{{split}}_{{lang}}.jsonl"
            config.evaluation.benchmarks = (path,)
        config.evaluation.method = "choices"
    elif name == "EPOCHS":
        config = copy.deepcopy(bases["TRAINS"])
        config.train.steps = None
        config.data.sources[0].limit = 40
    else:
        config = copy.deepcopy(bases[name])
    return config


def change(config: Config, path: str, value: object) -> None:
    """Sets the field at a dotted path; a number stands for an entry of a list."""
    *parents, last = path.split(".")
    for part in parents:
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    setattr(config, last, value)


def observe(name: str, path: str | None, value: object, look, bases: dict) -> object:
    """What is seen of a configuration, or the error that it raises."""
    config = base_of(name, bases)
    if path:
        value = (
            value.format(**bases["files"], folder=bases["folder"])
            if isinstance(value, str)
            else value
        )
        change(config, path, copy.deepcopy(value))
    try:
        check(config)
        return look(config)
    except (UserError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"


SEEN: dict = {}


@pytest.mark.parametrize("field", TABLE)
def test_a_changed_field_changes_what_comes_of_it(field, bases):
    name, path, value, look = TABLE[field]
    key = (name, look)
    if key not in SEEN:
        SEEN[key] = observe(name, None, None, look, bases)
        # The same twice, else a change says nothing.
        assert observe(name, None, None, look, bases) == SEEN[key]
        assert name in ("HUB", "APART", "LONG") or not str(SEEN[key]).startswith("UserError"), SEEN[
            key
        ]
    changed = observe(name, path, value, look, bases)
    assert changed != SEEN[key]
    assert (
        not isinstance(changed, str)
        or "Error: " not in changed[:30]
        or changed.startswith("UserError")
    ), changed
