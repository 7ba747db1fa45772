"""A model for a notebook: it answers, scores and computes logits through the engine of the
programs.

Shape letters: B batch rows · T positions · V vocabulary · C options.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from crossin_jax import config as settings
from crossin_jax.checkpoint.open import LoadedModel, open_model
from crossin_jax.config import UserError
from crossin_jax.generation.chat import ChatModel, Prompt, Text, find_border, make_chat_model
from crossin_jax.parallel.mesh import make_mesh

BATCH_SIZE = 16  # prompts that decode at once


class Model(LoadedModel):
    """An opened model: `model(tokens_BT) -> logits_BTV`, `generate` and `score`.

    It asks as the model was trained to be asked: by the template of its run or export, else by the
    chat template of its tokenizer, else by alpaca. `chat` has the engine and the renderer.
    """

    @functools.cached_property
    def chat(self) -> ChatModel:
        """The engine of this model with its renderer, made at the first use."""
        name = self.config.model.tokenizer or str(self.base or self.run)
        return make_chat_model(self, name, batch_size=BATCH_SIZE)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        progress: bool = False,
    ) -> list[Text]:
        """The answer to each prompt as a text; its `is_cut` says that it reached `max_new_tokens`.

        A prompt is a text, (instruction, input), or a list of turns {"role", "content"}. The answer
        to a prompt depends on that prompt, the settings and the seed alone. Raises `UserError` for
        a prompt that the model cannot read.
        Example: `model.generate(["Name a river."])[0]`.
        """
        if isinstance(prompts, str):
            raise UserError("pass a list of prompts, e.g. model.generate([text])")
        return self.chat.answer(
            list(prompts),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=[seed] * len(prompts),
            stop=stop,
            progress=progress,
        )

    def score(self, prompt: Prompt, options: Sequence[str]) -> np.ndarray:
        """The log-likelihood of each option as the whole answer to the prompt, (C,) float64,
        natural logarithm.

        It is the sum over the tokens of the option and the token that ends an answer, as in the
        benchmarks. Raises `UserError` for a prompt that the model cannot read.
        Example: `options[model.score(prompt, options).argmax()]`.
        """
        if isinstance(options, str) or not len(options):
            raise UserError("pass a list of options, e.g. model.score(prompt, ['Paris', 'Lima'])")
        answers = [self.chat.render_answer(prompt, option) for option in options]
        border = find_border(answers)
        (scores,) = self.chat.engine.score(
            [answers[0].ids[:border]], [[a.ids[border:] for a in answers]], progress=False
        )
        return scores


def load_model(
    path: str | os.PathLike,
    *,
    dtype: str = "auto",
    mesh: Mesh | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Model:
    """A run, a Hugging Face folder, a Hub id or a PEFT adapter (on the base it names).

    `dtype` is the precision of products: "auto" is that of the run, which its exports name too,
    else what the device computes fast. `mesh` None is one device. Raises `UserError` for what
    cannot be loaded.
    Example: `load_model("Qwen/Qwen2.5-0.5B").generate(["Name a river."])`.
    """
    mesh = mesh or make_mesh(settings.Mesh(), jax.local_devices()[:1])
    opened: Any = open_model(path, dtype=dtype, mesh=mesh, revision=revision, progress=progress)
    return Model(**{name: getattr(opened, name) for name in LoadedModel.__dataclass_fields__})
