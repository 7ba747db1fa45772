"""Texts in, texts out: an engine with its tokenizer and template, for any model."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from crossin_jax import config as settings
from crossin_jax.checkpoint.open import LoadedModel, open_model
from crossin_jax.config import UserError
from crossin_jax.data.kinds import Example
from crossin_jax.data.pipeline import read_answer_ends, read_prompt
from crossin_jax.data.prompts import Rendered, Renderer
from crossin_jax.data.records import MASKED
from crossin_jax.generation.batching import common_prefix, cut_at_stop
from crossin_jax.generation.engine import Engine
from crossin_jax.parallel.mesh import make_mesh
from crossin_jax.training.state import describe_precision

ROLES = ("system", "user", "assistant")

# A question, (instruction, input), or the turns of a conversation: {"role": …, "content": …} each.
Prompt = str | tuple[str, str] | Sequence[Mapping[str, str]]


class Text(str):
    """An answer; `is_cut`: it has as many tokens as allowed and did not end by itself."""

    is_cut: bool = False


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """An engine with the renderer that turns texts into its ids and back, and the tokenizer beneath
    it.
    """

    engine: Engine
    renderer: Renderer
    tokenizer: Any

    def render(self, prompt: Prompt) -> np.ndarray:
        """Ids (T,) int32 up to where the answer begins; `UserError` for what is no prompt."""
        if isinstance(prompt, str):
            return self.renderer.render_prompt(prompt)
        if isinstance(prompt, tuple) and [type(part) for part in prompt] == [str, str]:
            return self.renderer.render_prompt(*prompt)
        return self.renderer.render_chat(read_turns(prompt))

    def render_answer(self, prompt: Prompt, text: str) -> Rendered:
        """Prompt, answer and its end as training would see them; earlier answers of a chat are not
        learned.
        """
        if isinstance(prompt, str):
            prompt = (prompt, "")
        if isinstance(prompt, tuple) and [type(part) for part in prompt] == [str, str]:
            return self.renderer.render_answer(*prompt, text)
        turns = [
            (MASKED if role == "assistant" else role, said) for role, said in read_turns(prompt)
        ]
        return self.renderer.render(
            Example(*[""] * 6, text, messages=(*turns, ("assistant", text)))
        )

    def answer(
        self,
        prompts: Sequence[Prompt],
        write: Callable[[int, str], None] | None = None,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> list[Text | None]:
        """The answer to each prompt; `write(i, text)` is given each answer piece by piece.

        `options` go to `Engine.generate`. With over_long="skip" a prompt that the model cannot read
        has the answer None.
        """
        ids = [self.render(prompt) for prompt in prompts]
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
            **{"progress": write is None} | options,
        )
        texts = [
            None if answer is None else self._finish(answer, limit, stop)
            for answer, limit in zip(answers, room, strict=True)
        ]
        if write:
            for i, text in enumerate(texts):
                write(i, (text or "")[written[i] :])
        return texts

    def _finish(self, answer: list[int], limit: int, stop: Sequence[str]) -> Text:
        """The text of an answer; one that was cut loses the bytes of an unfinished character."""
        whole = self.renderer.decode(answer, shown=stop)
        text = cut_at_stop(whole, stop)
        is_cut = len(answer) >= limit and text == whole
        found = Text(text.rstrip("\ufffd") if is_cut else text)
        found.is_cut = is_cut
        return found


def find_border(answers: Sequence[Rendered]) -> int:
    """How many ids of the prompt all answers have in common: these are read once."""
    # Tokens may reach over the end of the prompt: "Answer:" + " (A) Paris" can begin with the token
    # ": (". The border is the first token in which any answer differs from the prompt:
    #
    #     prompt   | Answer | : |                 border: after "Answer"
    #     answer A | Answer | : ( | A | ) Paris
    #     answer B | Answer | : ( | B | ) Lima
    return common_prefix([a.ids[: int(np.argmax(a.loss_mask))] for a in answers])


def read_turns(messages: Any) -> tuple[tuple[str, str], ...]:
    """(role, text) of each turn of a conversation whose answer is asked for; `UserError` for
    anything else.
    """
    is_chat = isinstance(messages, Sequence) and not isinstance(messages, str) and messages
    if not is_chat or not all(isinstance(turn, Mapping) for turn in messages):
        raise UserError(
            f"{str(messages)[:80]!r} is not a prompt; give a text, or a list of turns such as "
            '[{"role": "user", "content": "Hello"}]'
        )
    turns = tuple((turn.get("role"), turn.get("content")) for turn in messages)
    for i, (role, text) in enumerate(turns):
        if role not in ROLES or not isinstance(text, str):
            raise UserError(
                f"turn {i + 1} has role={role!r} and content={str(text)[:40]!r}; a role is one of "
                f"{', '.join(ROLES)}, and the content is a text"
            )
    if turns[-1][0] != "user":
        raise UserError(
            f"the last turn is of role {turns[-1][0]!r}; only a turn of the user can be answered"
        )
    return turns


def load_chat_model(
    model: str,
    *,
    adapter: str | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
    system: str | None = None,
    dtype: str = "auto",
    batch_size: int = 1,
) -> ChatModel:
    """A model folder, Hub id, adapter or run, ready to answer; it computes on all devices.

    `template` None is the run's or that of an exported model, else the tokenizer's chat template,
    else alpaca.
    """
    mesh = make_mesh(settings.Mesh(fsdp=jax.device_count()))
    chosen = {"tokenizer": tokenizer} if tokenizer else {}
    loaded = open_model(model, adapter=adapter, dtype=dtype, mesh=mesh, **chosen)
    print(describe_precision(loaded.config, mesh), file=sys.stderr, flush=True)
    asked = read_prompt(adapter) if adapter else None
    name = tokenizer or model
    return make_chat_model(
        loaded, name, asked, template=template, system=system, batch_size=batch_size
    )


def make_chat_model(
    loaded: LoadedModel,
    name: str,
    asked: dict[str, Any] | None = None,
    *,
    template: str | None = None,
    system: str | None = None,
    batch_size: int = 1,
) -> ChatModel:
    """An opened model, ready to answer; `asked` are the settings of its prompts in training, where
    its own files do not have them.
    """
    tokens = loaded.tokenizer
    # How the model was trained: in the settings of a run, or in the prompt.json of an export.
    if loaded.run:
        asked = dataclasses.asdict(loaded.config.data)
    elif asked is None:
        asked = tokens.prompt
    template = template or asked.get("template") or ("chat" if tokens.chat_template else "alpaca")
    renderer = Renderer(
        tokens,
        template,
        system=system or asked.get("system"),
        tokenization=asked.get("tokenization") or "joint",
    )
    renderer.check_embeddings(loaded.spec.vocab_size, name)
    # The renderer read the tokenizer's files. The model's own may be in another folder.
    ends = (*renderer.eos_ids, *(read_answer_ends(loaded.base) if loaded.base else ()))
    engine = Engine(
        loaded.graphdef,
        loaded.state,
        loaded.spec,
        eos_ids=ends,
        pad_id=renderer.pad_id,
        mesh=loaded.mesh,
        batch_size=batch_size,
    )
    return ChatModel(engine, renderer, tokens)
