"""Texts in, texts out: an engine with its tokenizer and template, for whatever model."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from crossin_jax import config as settings
from crossin_jax.checkpoint.open import open_model
from crossin_jax.data.pipeline import read_answer_ends, read_prompt
from crossin_jax.data.prompts import Renderer
from crossin_jax.generation.batching import cut_at_stop
from crossin_jax.generation.engine import Engine
from crossin_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """An engine with the renderer that turns texts into its ids and back, and the tokenizer beneath
    it.
    """

    engine: Engine
    renderer: Renderer
    tokenizer: Any

    def answer(
        self,
        prompts: list[tuple[str, str]],
        write: Callable[[int, str], None] | None = None,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> list[str]:
        """The answers to (instruction, input) pairs; `write(i, text)` is given each answer piece by
        piece.
        """
        ids = [self.renderer.render_prompt(*prompt) for prompt in prompts]
        room = [max(1, min(max_new_tokens, self.engine.max_length - len(prompt))) for prompt in ids]
        heard: list[list[int]] = [[] for _ in prompts]
        written = [0] * len(prompts)
        # The last characters may turn out to begin a stop: "\n" of the stop "\nQ:" waits for what
        # follows.
        held = max(map(len, stop), default=1) - 1

        def stream(i: int, new: list[int]) -> None:
            heard[i].extend(new)
            text = self.renderer.decode(heard[i], shown=stop)
            # "\ufffd": more bytes of a character are still to come
            text = cut_at_stop(text, stop).rstrip("\ufffd")
            piece = text[written[i] : max(written[i], len(text) - held)]
            written[i] += len(piece)
            write(i, piece)

        answers = self.engine.generate(
            ids,
            max_new_tokens=room,
            stop=stop,
            detokenize=partial(self.renderer.decode, shown=stop),
            stream=stream if write else None,
            progress=write is None,
            **options,
        )
        texts = [cut_at_stop(self.renderer.decode(answer, shown=stop), stop) for answer in answers]
        if write:
            for i, text in enumerate(texts):
                write(i, text[written[i] :])
        return texts


def load_chat_model(
    model: str,
    *,
    adapter: str | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    system: str | None = None,
    dtype: str | None = None,
    batch_size: int = 1,
) -> ChatModel:
    """A model folder, Hub id, adapter or run, ready to answer.

    `template` None is the run's or that of an exported model, else the tokenizer's chat template,
    else alpaca.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    mesh = make_mesh(settings.Mesh(fsdp=jax.device_count()))
    chosen = {"tokenizer": tokenizer} if tokenizer else {}
    loaded = open_model(model, adapter=adapter, dtype=dtype, mesh=mesh, **chosen)
    tokens = loaded.tokenizer
    # How the model was trained: a run says so itself, an exported model in its prompt.json.
    if loaded.run:
        asked = dataclasses.asdict(loaded.config.data)
    else:
        asked = read_prompt(adapter) if adapter else tokens.prompt
    template = template or asked.get("template") or ("chat" if tokens.chat_template else "alpaca")
    renderer = Renderer(
        tokens,
        template,
        system=system or asked.get("system"),
        tokenization=asked.get("tokenization") or "joint",
    )
    renderer.fit_model(loaded.spec.vocab_size, tokenizer or model)
    # The renderer knows the files of the tokenizer. The model's own may stand in another folder.
    ends = (*renderer.eos_ids, *(read_answer_ends(loaded.base) if loaded.base else ()))
    return ChatModel(
        Engine(
            loaded.graphdef,
            loaded.state,
            loaded.spec,
            eos_ids=ends,
            pad_id=renderer.pad_id,
            mesh=loaded.mesh,
            batch_size=batch_size,
        ),
        renderer,
        tokens,
    )
