"""Talk to a model.

  python -m crossin_jax.generate --model meta-llama/Llama-2-7b-hf --prompt "What is the capital of Peru?"
  python -m crossin_jax.generate --model models/xquad --temperature 0.7 --seed 3     (reads prompts from the keyboard)
  python -m crossin_jax.generate --model runs/xquad                                  (a run: its newest checkpoint)

An answer appears as it is made. Several --prompt flags are answered together, each after the other on the screen.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from crossin_jax import config as settings
from crossin_jax import program
from crossin_jax.checkpoint.hf import load_weights, read_spec, resolve_folder
from crossin_jax.checkpoint.load import LoadedModel, abstract_transformer, load_model
from crossin_jax.checkpoint.peft import load_adapter, read_adapter
from crossin_jax.checkpoint.restore import restore_params
from crossin_jax.config import UserError
from crossin_jax.data.prompts import Renderer, load_tokenizer
from crossin_jax.generation.engine import Engine
from crossin_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Speaker:
    """An engine with the renderer that turns texts into its ids and back, and the tokenizer beneath it."""

    engine: Engine
    renderer: Renderer
    tokenizer: Any

    def answer(self, prompts: list[tuple[str, str]], write: Callable[[int, str], None] | None = None, *,
               max_new_tokens: int, stop: Sequence[str] = (), **options: Any) -> list[str]:
        """The answers to (instruction, input) pairs; `write(i, text)` is given each answer piece by piece."""
        ids = [self.renderer.render_prompt(*prompt) for prompt in prompts]
        room = [max(1, min(max_new_tokens, self.engine.max_length - len(prompt))) for prompt in ids]
        heard: list[list[int]] = [[] for _ in prompts]
        written = [0] * len(prompts)
        held = max(map(len, stop), default=1) - 1  # characters that may turn out to begin a stop

        def stream(i: int, new: list[int]) -> None:
            heard[i].extend(new)
            text = self.renderer.decode(heard[i]).rstrip("\ufffd")  # the bytes of a character may still be coming
            piece = text[written[i]:max(written[i], len(text) - held)]
            written[i] += len(piece)
            write(i, piece)

        answers = self.engine.generate(ids, max_new_tokens=room, stop=stop, detokenize=self.renderer.decode,
                                       stream=stream if write else None, progress=write is None, **options)
        texts = [_cut(self.renderer.decode(answer), stop) for answer in answers]
        if write:
            for i, text in enumerate(texts):
                write(i, text[written[i]:])
        return texts


def open_speaker(model: str, *, adapter: str | None = None, tokenizer: str | None = None, template: str | None = None,
                 system: str | None = None, dtype: str | None = None, batch_size: int = 1) -> Speaker:
    """A model folder, Hub id, adapter or run, ready to answer.

    `template` None is the run's, else the tokenizer's chat template, else alpaca.
    """
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    mesh = make_mesh(settings.Mesh(fsdp=jax.device_count())) if jax.device_count() > 1 else None
    tokenization = "joint"
    if (Path(model).expanduser() / "checkpoints").is_dir():
        if adapter is not None:
            raise UserError(f"--adapter={adapter}: {model} is a run with weights of its own; export it first")
        loaded = restore_params(model, mesh=mesh, compute_dtype=dtype)
        data, tokens = loaded.config.data, loaded.tokenizer
        template, system, tokenization = template or data.template, system or data.system, data.tokenization
        mesh = loaded.mesh
    else:
        loaded = load_adapted(model, adapter, dtype, mesh) if adapter else load_model(model, dtype=dtype, mesh=mesh)
        tokens = None
    if tokens is None or tokenizer:
        tokens = load_tokenizer(tokenizer or model)
    renderer = Renderer(tokens, template or ("chat" if tokens.chat_template else "alpaca"), system=system,
                        tokenization=tokenization)
    if renderer.vocab_size > loaded.spec.vocab_size:
        raise UserError(f"--tokenizer: {renderer.vocab_size} tokens, but the model has {loaded.spec.vocab_size}; pass "
                        "the tokenizer that belongs to the model")
    return Speaker(Engine(loaded.graphdef, loaded.state, loaded.spec, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id,
                          mesh=mesh, batch_size=batch_size), renderer, tokens)


def load_adapted(model: str, adapter: str, dtype: str, mesh: Any) -> LoadedModel:
    """The model with an adapter on it, whatever base the adapter names."""
    folder = resolve_folder(model)
    read = read_adapter(adapter, read_spec(folder))
    graphdef, state = abstract_transformer(read.spec, mesh, lora=read.lora, param_dtype=dtype, frozen_dtype=dtype,
                                           compute_dtype=dtype)
    return LoadedModel(read.spec, graphdef, load_adapter(read, load_weights(folder, state)), mesh)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop: its last token may reach into one."""
    return text[:min([text.find(stop) for stop in stops if stop in text], default=len(text))]


def read_prompts(is_terminal: bool) -> Iterator[str]:
    """Lines from the keyboard or a pipe, until the end of the input or an empty line at the keyboard."""
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or is_terminal and not line.strip():
            return
        if line.strip():
            yield line.rstrip("\n")


def define_flags() -> None:
    """Flags of this program."""
    flags.DEFINE_string("model", None, "model folder, Hub id, adapter folder, or the output_dir of a run")
    flags.DEFINE_string("adapter", None, "PEFT adapter to put on --model")
    flags.DEFINE_string("tokenizer", None, "tokenizer folder or Hub id; none: the model's")
    flags.DEFINE_string("template", None, "prompt template; none: the run's, else chat where the tokenizer has one, "
                                          "else alpaca")
    flags.DEFINE_string("system", None, "system prompt, for templates that have one")
    flags.DEFINE_multi_string("prompt", [], "what to ask; none reads lines from standard input", short_name="p")
    flags.DEFINE_string("input", "", "input that goes with the prompt, in templates that have a place for it")
    flags.DEFINE_integer("max_new_tokens", 256, "longest answer, tokens", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy", lower_bound=0)
    flags.DEFINE_integer("top_k", None, "sample from the k likeliest tokens", lower_bound=1)
    flags.DEFINE_float("top_p", None, "sample from the smallest set of this probability")
    flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0)
    flags.DEFINE_multi_string("stop", [], "text that ends an answer; may be given several times")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "precision; none: float32 on a CPU, else bfloat16")


def main(arguments: Any) -> None:
    """Answers the prompts of the command line, or those of standard input as they come."""
    if arguments.model is None:
        raise UserError("--model is missing; pass a model folder, a Hub id or the output_dir of a run")
    given = list(arguments.prompt)
    speaker = open_speaker(arguments.model, adapter=arguments.adapter, tokenizer=arguments.tokenizer,
                           template=arguments.template, system=arguments.system, dtype=arguments.dtype,
                           batch_size=min(8, max(1, len(given))))
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")}
    if len(given) > 1:
        answers = speaker.answer([(text, arguments.input) for text in given], seeds=[arguments.seed] * len(given),
                                 **options)
        for text, answer in zip(given, answers, strict=True):
            print(f"> {text}\n{answer}\n")
        return
    for text in given or read_prompts(sys.stdin.isatty()):
        speaker.answer([(text, arguments.input)], lambda _, piece: print(piece, end="", flush=True),
                       seeds=[arguments.seed], **options)
        print(flush=True)


if __name__ == "__main__":
    program.run(main, define=define_flags, takes_config=False)
