"""From a configuration to the mixture and the renderer that training, previews and evaluation share."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from crossin_jax.config import Config
from crossin_jax.data.corpus import Corpus
from crossin_jax.data.mixture import Mixture, held_out, label_components, load_corpora
from crossin_jax.data.prompts import Renderer, load_tokenizer
from crossin_jax.data.templates import load_template
from crossin_jax.data.world import tokenizer_lines, train_tokenizer


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The opened data of one experiment."""

    tokenizer: Any
    renderer: Renderer
    mixture: Mixture
    held_out: Mixture | None  # every held-out record once in each language


def open_pipeline(config: Config) -> Pipeline:
    """Reads the sources, draws the mixture and loads the tokenizer; a new model's tokenizer is trained first."""
    corpora = load_corpora(config.data, config.seed)
    mixture = Mixture(config.data, corpora, config.seed)
    tokenizer = open_tokenizer(config, corpora)
    reserved = held_out(config.data) if config.data.eval_sources else None
    return Pipeline(tokenizer, open_renderer(config, tokenizer), mixture,
                    Mixture(reserved, load_corpora(reserved, config.seed), config.seed) if reserved else None)


def open_renderer(config: Config, tokenizer: Any) -> Renderer:
    """The one renderer of an experiment, for training and evaluation alike."""
    make = partial(Renderer, tokenizer, system=config.data.system, tokenization=config.data.tokenization)
    others, components = {}, config.data.components
    for i, (label, component) in enumerate(zip(label_components(components), components, strict=True)):
        if component.template is not None:
            load_template(component.template, f"data.components[{i}].template")  # a fault names this place
            others[label] = make(component.template)
    return make(config.data.template, others=others)


def open_asker(config: Config, tokenizer: Any) -> Renderer:
    """The renderer of the benchmarks: training's, or that of `evaluation.template`."""
    data = dataclasses.replace(config.data, template=config.evaluation.template or config.data.template)
    return open_renderer(dataclasses.replace(config, data=data), tokenizer)


def open_tokenizer(config: Config, corpora: dict[str, Corpus] | None = None) -> Any:
    """The tokenizer of the model; a new model's is trained on its text once and kept in `output_dir/tokenizer`."""
    if config.model.tokenizer or config.model.path:
        return load_tokenizer(config.model.tokenizer or config.model.path, config.model.revision)
    folder = Path(config.output_dir).expanduser() / "tokenizer"
    if not (folder / "tokenizer_config.json").is_file():
        corpora = load_corpora(config.data, config.seed) if corpora is None else corpora
        texts = [component.source for component in config.data.components if component.kind == "text"]
        if any(source.kind == "world" and source.name in texts for source in config.data.sources):
            lines = tokenizer_lines(config.data.languages, config.seed)
        else:
            lines = (text.output for name in texts for record in corpora[name] for text in record.texts.values())
        train_tokenizer(lines, config.model.architecture.vocab_size, folder)
    return load_tokenizer(str(folder))
