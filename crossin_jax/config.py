"""Every setting of crossin_jax: typed dataclasses, one doc line, unit and check per field.

A configuration is a Python file with `get_config()`; `--config.optim.learning_rate=1e-4` overrides
a field. `None` means "off" or "derived"; a field never hides a meaning in -1.
"""

import dataclasses
import typing
from typing import Any

from crossin_jax.models.modules import KEPT, TARGETS
from crossin_jax.settings import Settings, section, setting
from crossin_jax.settings import UserError as UserError  # most modules know it from here
from crossin_jax.settings import hint as hint
from crossin_jax.settings import iterate_fields as iterate_fields


@dataclasses.dataclass(kw_only=True)
class Architecture(Settings):
    """A Llama-shaped model trained from random weights (used where `model.path` is None)."""

    width: int = setting(128, "model width D", at_least=1)
    ff_width: int = setting(352, "feed-forward width F", at_least=1)
    num_layers: int = setting(2, "decoder layers L", at_least=1, at_most=1000)
    num_heads: int = setting(4, "query heads N", at_least=1)
    num_kv_heads: int = setting(4, "key/value heads K", at_least=1)
    max_length: int = setting(1024, "longest context, tokens", at_least=8)
    tie_embeddings: bool = setting(True, "one matrix for embedding and unembedding")
    vocab_size: int = setting(
        3000,
        "size of the byte-level BPE trained on the text component, tokens",
        at_least=300,
        at_most=1 << 20,
    )


_KEPT = f"({'|'.join(KEPT)})"


@dataclasses.dataclass(kw_only=True)
class Model(Settings):
    """Which weights, in which precision, with which kernels."""

    path: str | None = setting(
        None, "folder in Hugging Face layout or Hub id; None builds `architecture`"
    )
    revision: str | None = setting(None, "Hub revision (branch, tag or commit)")
    tokenizer: str | None = setting(
        None, "tokenizer folder or Hub id; None takes the one in `path`"
    )
    architecture: Architecture | None = setting(
        None, "shape of a model trained from random weights"
    )
    param_dtype: str = setting(
        "float32", "precision of trained weights", choices=("float32", "bfloat16")
    )
    frozen_dtype: str = setting(
        "bfloat16",
        "precision of frozen weights under LoRA",
        choices=("float32", "bfloat16", "int8", "nf4"),
    )
    compute_dtype: str = setting(
        "auto",
        "precision of matrix products; auto: bfloat16 where the device computes it fast",
        choices=("auto", "float32", "bfloat16"),
    )
    attention: str = setting(
        "auto",
        "kernel; splash:1024 sets its tile, tokens",
        choices=("auto", "reference", "blocks", "splash", "cudnn"),
        form=r"splash:[1-9]\d*",
    )
    remat: str = setting(
        "none",
        "what is recomputed, or what is kept of q+k+v+attention+output+gate+up+down",
        choices=("none", "full", "dots", "offload"),
        form=rf"{_KEPT}(\+{_KEPT})*",
    )


@dataclasses.dataclass(kw_only=True)
class Lora(Settings):
    """Low-rank adapters. Defaults are the intended recipe of the CrossIn release."""

    rank: int = setting(64, "rank R", at_least=1)
    alpha: float = setting(128.0, "scale numerator; the update is alpha/rank · BA", above=0)
    dropout: float = setting(0.05, "dropout on the adapter input", at_least=0, at_most=0.9)
    targets: tuple[str, ...] = setting(TARGETS, "projections with an adapter")
    modules_to_save: tuple[str, ...] = setting(
        ("embed_tokens", "lm_head"), "modules trained in full"
    )
    use_rslora: bool = setting(False, "scale by alpha/sqrt(rank)")
    use_dora: bool = setting(False, "train magnitude and direction apart (DoRA)")
    path: str | None = setting(None, "PEFT adapter folder to continue from")
    released_code_compatible: bool = setting(
        False, "reproduce the release's `p_proj` typo: no adapter on q_proj"
    )


@dataclasses.dataclass(kw_only=True)
class Source(Settings):
    """One data set: records that exist in one language or in several under one row id."""

    name: str = setting("", "name that components refer to")
    kind: str = setting(
        "auto",
        "layout; auto goes by the file ending",
        choices=(
            "auto",
            "jsonl",
            "json",
            "parquet",
            "csv",
            "folder",
            "columns",
            "squad",
            "messages",
            "hub",
            "world",
        ),
    )
    path: str = setting("", "file, folder, pattern with {lang}, or Hub id")
    split: str = setting(
        "train", "split of a Hub data set or of the embedded world (see world/facts.py)"
    )
    languages: tuple[str, ...] = setting(
        (), "codes to read; empty takes every language of `data.languages`"
    )
    fields: dict[str, str] = setting(
        {},
        "column names, e.g. {'output': 'answer'}; group: rows that `portion` keeps together; "
        "unread: 'refuse' stops at a field that is not read",
        may_be_empty=True,
    )
    join: str = setting("id", "how rows of several files are joined", choices=("id", "position"))
    portion: tuple[float, ...] = setting(
        (0.0, 1.0),
        "part of the rows, from and to, in hash order of the row id or of fields['group']",
        may_repeat=True,
    )
    limit: int | None = setting(None, "rows that are kept, from the start of that part", at_least=1)


TAGS = ("none", "input", "input_released", "instruction", "sentence")


@dataclasses.dataclass(kw_only=True)
class Component(Settings):
    """One part of the mixture: what is drawn from a source, and how much of it."""

    kind: str = setting("base", "direction of a pair: a name in the table of data/kinds.py")
    source: str = setting("", "name of the source")
    count: int | None = setting(None, "examples; None takes one per row", at_least=1)
    share: float | None = setting(
        None, "share of the examples seen in training", above=0, at_most=1
    )
    languages: dict[str, float] = setting(
        {}, "weight of each non-pivot language; empty weighs all alike", at_least=0
    )
    allow_same: bool = setting(False, "x2x may draw the same language twice")
    translate: str = setting("both", "direction of trans", choices=("both", "x2en", "en2x"))
    translate_what: str = setting(
        "instruction", "text that trans translates", choices=("instruction", "record")
    )
    request: str = setting(
        "english",
        "language in which trans asks; without a sentence in the prompt's language it asks in "
        "English",
        choices=("english", "prompt"),
        is_later=True,
    )
    with_replacement: bool = setting(
        False, "draw rows with replacement, as the released builder does"
    )
    tag: str | None = setting(
        None, "tag style of this component; None takes `data.tag`", choices=TAGS
    )
    template: str | None = setting(
        None, "prompt template of this component; None takes `data.template`"
    )


@dataclasses.dataclass(kw_only=True)
class Data(Settings):
    """Parallel records, the mixture drawn from them, and how it becomes batches."""

    sources: tuple[Source, ...] = setting((), "data sets")
    components: tuple[Component, ...] = setting((), "parts of the mixture")
    eval_sources: tuple[Source, ...] = setting(
        (), "held-out records: loss per language during training"
    )
    languages: tuple[str, ...] = setting(("en", "zh", "vi", "es"), "language codes in use")
    pivot: str = setting("en", "the language of base, en2x and x2en")
    template: str = setting(
        "alpaca", "prompt template: a built-in name or the path of a template file"
    )
    system: str | None = setting(
        None, "system prompt for templates that have one", may_be_empty=True
    )
    tag: str = setting("input", "how a prompt names the wanted language", choices=TAGS)
    tokenization: str = setting(
        "joint",
        "prompt and answer in one piece, or apart as in the release",
        choices=("joint", "apart"),
    )
    length: int = setting(1024, "tokens per row T", at_least=8)
    packing: bool = setting(True, "several examples per row, kept apart by segment ids")
    over_long: str = setting(
        "drop", "what becomes of examples longer than a row", choices=("drop", "shorten_input")
    )
    workers: int = setting(0, "processes that tokenize and pack", at_least=0, at_most=256)


@dataclasses.dataclass(kw_only=True)
class Optim(Settings):
    """Optimizer and schedule (optax)."""

    name: str = setting("adamw", "optimizer", choices=("adamw", "adafactor", "lion", "muon"))
    learning_rate: float = setting(2e-4, "peak learning rate", above=0, at_most=1000)
    schedule: str = setting(
        "cosine", "decay after the warm-up", choices=("cosine", "linear", "constant")
    )
    warmup_share: float = setting(0.03, "share of the steps in warm-up", at_least=0, at_most=0.9)
    final_share: float = setting(
        0.0, "learning rate at the end, as a share of the peak", at_least=0, at_most=1
    )
    weight_decay: float = setting(
        0.01, "decoupled decay; never on norms and biases", at_least=0, at_most=1000
    )
    b1: float = setting(0.9, "decay of the first moment", at_least=0, at_most=0.9999)
    b2: float = setting(0.999, "decay of the second moment", at_least=0, at_most=0.99999)
    clip_norm: float | None = setting(1.0, "global gradient norm limit", above=0)
    moments_dtype: str = setting(
        "float32", "precision of the first moment", choices=("float32", "bfloat16")
    )
    groups: dict[str, dict[str, float]] = setting(
        {},
        "first matching name pattern → rate (a factor), weight_decay, e.g. {'embed_tokens/*': "
        "{'rate': 0.1}}",
        at_least=0,
    )


@dataclasses.dataclass(kw_only=True)
class Mesh(Settings):
    """Device mesh; the product of the axes is the number of devices."""

    data: int | None = setting(
        None, "replicas; None takes the devices the other axes leave", at_least=1
    )
    fsdp: int = setting(1, "shards of parameters and batch", at_least=1)
    tensor: int = setting(1, "shards of heads and feed-forward", at_least=1)


@dataclasses.dataclass(kw_only=True)
class Train(Settings):
    """Length of the run, batch, logging and checkpoints."""

    steps: int | None = setting(None, "optimizer steps; None goes by `epochs`", at_least=1)
    epochs: float = setting(1.0, "passes over the mixture where `steps` is None", above=0)
    batch_size: int = setting(16, "rows per optimizer step over all devices", at_least=1)
    accumulation: int = setting(1, "micro-batches per optimizer step", at_least=1)
    loss_chunk: int = setting(
        512, "positions per row whose logits exist at once, tokens", at_least=1
    )
    log_every: int = setting(10, "steps between log lines", at_least=1)
    eval_every: int | None = setting(
        None, "steps between held-out losses; None only at the end", at_least=1
    )
    benchmark_every: int | None = setting(
        None, "steps between benchmark runs on the training mesh", at_least=1
    )
    checkpoint_every: int | None = setting(
        500, "steps between checkpoints; None only at the end", at_least=1
    )
    checkpoint_minutes: float | None = setting(
        15.0, "minutes between checkpoints where `checkpoint_every` takes longer", above=0
    )
    keep: int = setting(2, "newest checkpoints kept", at_least=1)
    keep_every: int | None = setting(None, "steps whose multiples are kept for good", at_least=1)
    tensorboard: bool = setting(True, "write TensorBoard files")


@dataclasses.dataclass(kw_only=True)
class Evaluation(Settings):
    """Benchmarks and how answers are obtained and scored."""

    benchmarks: tuple[str, ...] = setting(
        (), "short names such as cross_mmlu or global_mmlu, Hub ids, files; see docs/evaluation.md"
    )
    split: str | None = setting(
        None, "split of the benchmarks; None takes the published one", is_later=True
    )
    languages: tuple[str, ...] = setting((), "language codes; empty takes `data.languages`")
    method: str = setting(
        "choices",
        "log-likelihood of choices, free answers, or both",
        choices=("choices", "generate", "both"),
    )
    prompts: tuple[int | str, ...] = setting(
        (1, 2, 3, 4, 5),
        "SeaEval prompts, 1 to 5, harness for its bare form, or files with wordings",
        at_least=1,
        at_most=5,
        choices=("harness",),
        form=r".+\.(toml|json)",
    )
    gap: str = setting(
        "sentence",
        "candidates for the gap of a sentence are scored within the whole sentence, or by the "
        "answer alone, or asked as a question by the prompts",
        choices=("sentence", "answer", "question"),
        is_later=True,
    )
    shots: int = setting(0, "solved examples before the question", at_least=0, at_most=10)
    mode: str = setting(
        "expectation",
        "how ties, empty and unreadable answers count",
        choices=("expectation", "seaeval", "strict"),
    )
    rankc: str = setting(
        "softmax",
        "weights of RankC: those of its paper, or linear (norm1) or squared (norm2) in the rank",
        choices=("softmax", "norm1", "norm2"),
        is_later=True,
    )
    template: str | None = setting(None, "prompt template; None takes `data.template`")
    max_new_tokens: int = setting(128, "longest answer, tokens", at_least=1)
    batch_size: int = setting(16, "prompts decoded at once", at_least=1)
    temperature: float = setting(0.0, "0 is greedy", at_least=0, at_most=100)
    top_k: int | None = setting(None, "sample from the k likeliest tokens", at_least=1)
    top_p: float | None = setting(
        None, "sample from the smallest set of this probability", above=0, at_most=1
    )
    cache_dtype: str = setting(
        "bfloat16", "precision of keys and values", choices=("float32", "bfloat16", "int8")
    )
    limit: int | None = setting(None, "items of each benchmark, from its start", at_least=1)
    over_long: str = setting(
        "refuse",
        "prompts longer than the context of the model: refuse them, or skip and count them",
        choices=("refuse", "skip"),
    )
    untuned: bool = setting(
        False,
        "also ask the model before tuning: the first row of every table and of --compare",
        is_later=True,
    )


@dataclasses.dataclass(kw_only=True)
class Config(Settings):
    """One experiment."""

    name: str = setting("run", "name of the experiment in reports")
    seed: int = setting(42, "seed of every draw", at_least=0, at_most=2**32 - 1)
    output_dir: str = setting("runs/run", "folder for checkpoints, logs and results")
    model: Model = section(Model)
    lora: Lora | None = setting(None, "low-rank adapters; None trains every weight")
    data: Data = section(Data)
    optim: Optim = section(Optim)
    mesh: Mesh = section(Mesh)
    train: Train = section(Train)
    evaluation: Evaluation = section(Evaluation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(Settings):
    """One training run of a study; `needs` names the cells whose exported model it starts from."""

    name: str
    config: Config
    needs: tuple[str, ...] = ()
    # The cell writes output_dir/model in Hugging Face layout, for the cells that need it.
    exports: bool = False
    # Tables of the report that include this cell, as arm `config.name`; empty: the only table.
    tables: tuple[str, ...] = ()
    # "examples=N" or "tokens=N" sets train.steps when the cell runs.
    budget: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast(Settings):
    """A figure: what sets arms apart from a control arm, in several tables."""

    title: str
    arms: tuple[str, ...]
    control: str
    tables: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Settings):
    """Cells in an order in which every cell comes after those it needs, and figures beside the
    tables.
    """

    name: str
    output_dir: str
    cells: tuple[Cell, ...]
    # title, which names x → {x: table}
    curves: dict[str, dict[float, str]] = dataclasses.field(default_factory=dict)
    contrasts: tuple[Contrast, ...] = ()


def to_dict(config: Any, *, complete: bool = False) -> Any:
    """The resolved configuration as plain JSON types.

    A setting that came later is left out where it has its default, so that hashes of earlier runs
    stay the same; `complete` keeps it.
    """
    if isinstance(config, Settings):
        values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
        return {
            field.name: to_dict(value, complete=complete)
            for field, value in values.items()
            if complete or not (field.metadata.get("is_later") and value == field.default)
        }
    if isinstance(config, list | tuple):
        return [to_dict(value, complete=complete) for value in config]
    if isinstance(config, dict):
        return {key: to_dict(value, complete=complete) for key, value in config.items()}
    return config


def from_dict(values: dict[str, Any], cls: type[Settings] = Config, prefix: str = "") -> Any:
    """Rebuilds a configuration saved by `to_dict`; an unknown field names the nearest known one."""
    kwargs = {}
    for name, value in values.items():
        cls.check_name(name, prefix)
        kwargs[name] = _revive(cls.__dataclass_fields__[name].type, value, f"{prefix}{name}.")
    return cls(**kwargs)


def _revive(annotation: Any, value: Any, prefix: str) -> Any:
    options = (
        typing.get_args(annotation) if isinstance(annotation, type(int | None)) else (annotation,)
    )
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return from_dict(value, option, prefix)
        if typing.get_origin(option) is tuple and isinstance(value, list):
            (entry, *_) = typing.get_args(option)
            return tuple(_revive(entry, v, prefix) for v in value)
    return value
