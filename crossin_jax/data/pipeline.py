"""From a configuration to the tokenizer, the renderer and the mixture that programs share."""

import dataclasses
import json
import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from crossin_jax.config import Config, UserError
from crossin_jax.data.corpus import Corpus, describe_losses
from crossin_jax.data.kinds import KINDS
from crossin_jax.data.mixture import Mixture, held_out_settings, label_components, load_corpora
from crossin_jax.data.prompts import Renderer
from crossin_jax.data.templates import load_template
from crossin_jax.files import check_fields, read_json, write_whole
from crossin_jax.guests import open_guest
from crossin_jax.paths import as_path, fetch_files, is_bucket

PROMPT_FILE = "prompt.json"  # in an exported folder
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    PROMPT_FILE,
)
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of further chat templates, by name


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What one experiment learns, and the tokenizer and renderer that make tokens of it."""

    tokenizer: Any
    renderer: Renderer
    mixture: Mixture
    held_out: Mixture | None  # every held-out record once in each language


def open_pipeline(config: Config) -> Pipeline:
    """Reads the sources, draws the mixture and loads the tokenizer; a new model's tokenizer is
    trained first.
    """
    corpora = load_corpora(config.data, config.seed)
    mixture = Mixture(config.data, corpora, config.seed)
    tokenizer = open_tokenizer(config, corpora)
    held_out = None
    if config.data.eval_sources:
        settings = held_out_settings(config.data)
        held_out = Mixture(settings, load_corpora(settings, config.seed), config.seed)
    for part in filter(None, (mixture, held_out)):
        for name, corpus in part.corpora.items():
            if losses := describe_losses(corpus):
                logging.warning("source %s is not used as a whole: %s", name, losses)
    return Pipeline(tokenizer, open_renderer(config, tokenizer), mixture, held_out)


def open_mixture(config: Config) -> Mixture:
    """The mixture of a configuration, a sequence of examples as text. No model or tokenizer is
    needed.

    Raises `UserError` where a source cannot be read. Example: `crossin_jax.Mixture(config)[0:10]`.
    """
    return Mixture(config.data, load_corpora(config.data, config.seed), config.seed)


def open_renderer(config: Config, tokenizer: Any) -> Renderer:
    """The one renderer of an experiment, for training and evaluation alike."""
    make = partial(
        Renderer, tokenizer, system=config.data.system, tokenization=config.data.tokenization
    )
    others, components = {}, config.data.components
    for i, (label, component) in enumerate(
        zip(label_components(components), components, strict=True)
    ):
        if component.template is not None:
            # A fault in the template is reported with this place.
            load_template(component.template, f"data.components[{i}].template")
            others[label] = make(component.template)
    return make(config.data.template, others=others)


def open_eval_renderer(config: Config, tokenizer: Any) -> Renderer:
    """The renderer of the benchmarks: training's, or that of `evaluation.template`."""
    data = dataclasses.replace(
        config.data, template=config.evaluation.template or config.data.template
    )
    return open_renderer(dataclasses.replace(config, data=data), tokenizer)


def open_tokenizer(config: Config, corpora: dict[str, Corpus] | None = None) -> Any:
    """The tokenizer of the model; a new model's is trained on its text once and kept in
    `output_dir/tokenizer`.
    """
    if config.model.tokenizer or config.model.path:
        return load_tokenizer(config.model.tokenizer or config.model.path, config.model.revision)
    folder = as_path(config.output_dir) / "tokenizer"
    if not (folder / "tokenizer_config.json").is_file():
        corpora = load_corpora(config.data, config.seed) if corpora is None else corpora
        components = config.data.components
        texts = [each.source for each in components if not KINDS[each.kind].has_prompt]
        if any(source.kind == "world" and source.name in texts for source in config.data.sources):
            lines = open_guest("world").tokenizer_lines(config.data.languages, config.seed)
        else:
            lines = (
                text.output
                for name in texts
                for record in corpora[name]
                for text in record.texts.values()
            )
        train_tokenizer(lines, config.model.architecture.vocab_size, folder)
    return load_tokenizer(str(folder))


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """A fast tokenizer from a folder or the Hub; raises `UserError` where there is none."""
    # transformers would advise to install PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    folder = as_path(path)
    if is_bucket(path):
        names = (*TOKENIZER_FILES, "config.json", "generation_config.json", f"{CHAT_TEMPLATES}/*")
        folder = fetch_files(folder, names)
    name = str(folder) if folder.exists() else path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
        # The library reads tokens and lengths of any type; a wrong one fails at the first use.
        tokenizer(tokenizer.convert_ids_to_tokens(sorted(tokenizer.all_special_ids))[:1])
    except Exception as error:  # the library raises many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.tokenizer={path!r}: no tokenizer can be read there ({reason}); "
            f"give a folder with tokenizer.json or tokenizer.model, or a Hub id"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"model.tokenizer={path!r}: {type(tokenizer).__name__} has no fast version, "
            f"which masks and previews need; convert it to tokenizer.json"
        )
    # `Renderer` reads `answer_ends`, and `generation.chat` reads `prompt`.
    tokenizer.answer_ends = read_answer_ends(name, revision)
    tokenizer.prompt = read_prompt(name, revision)
    return tokenizer


def find_file(path: str | Path, name: str, revision: str | None = None) -> Path | None:
    """A file of a model folder or of a Hub repository; None where it is absent, or unknown without
    a network.
    """
    from transformers.utils import cached_file

    file = cached_file(
        str(path),
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file)


def read_prompt(path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """The settings of an exported model's prompts: template, system prompt and tokenization; empty
    for other models.
    """
    file = find_file(path, PROMPT_FILE, revision)
    if file is None:
        return {}
    values = read_json(file, expect=dict, what="how a model is asked")
    values = {name: values.get(name) for name in ("template", "system", "tokenization")}
    check_fields(
        {name: value for name, value in values.items() if not isinstance(value, dict)},
        {
            "template": str,
            "system": str,
            "tokenization": (str, {"choices": ("joint", "apart")}),
        },
        str(file),
    )
    load_template(values["template"] or "chat", f"{file}: template")
    return values


def read_answer_ends(path: str | Path, revision: str | None = None) -> tuple[int, ...]:
    """The ids that end an answer by a model's own files: generation_config.json, else config.json;
    often several.
    """
    for name in ("generation_config.json", "config.json"):
        file = find_file(path, name, revision)
        if file is None:
            continue
        values = read_json(file, expect=dict, what="a file of a model")
        text = values.get("text_config")  # of a multimodal model
        ids = ((text if isinstance(text, dict) else {}) | values).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if not all(i is None or type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{file}: eos_token_id={ids} are not token ids; use whole numbers")
        if found := tuple(i for i in ids if i is not None):
            return found
    return ()


def train_tokenizer(lines: Iterable[str], vocab_size: int, folder: str | Path) -> None:
    """Trains a byte-level BPE and saves it as a folder that `AutoTokenizer.from_pretrained` loads.

    <pad> 0, <s> 1, </s> 2; `tokenizer(text)` puts <s> before the text once, as Llama's does;
    decoding restores it. A text is read as if a space stood before it, so a name has the same
    tokens at the start of a text and after a space (but others right after a line break or a
    bracket).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    specials = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(specials):
        raise UserError(
            f"vocab_size={vocab_size} is too small for {len(alphabet)} bytes and {len(specials)} "
            f"special tokens; use {len(alphabet) + len(specials)} or more"
        )
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    as_path(folder).mkdir(parents=True, exist_ok=True)
    for file, content in (
        ("tokenizer.json", tokenizer.to_str(pretty=True)),
        ("tokenizer_config.json", json.dumps(settings, indent=2)),
    ):
        write_whole(as_path(folder) / file, content)
