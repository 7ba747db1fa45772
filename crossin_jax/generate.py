"""Ask a model, with prompts from the command line or the keyboard.

  python -m crossin_jax.generate --model meta-llama/Llama-2-7b-hf --prompt "Name a river."
  python -m crossin_jax.generate --model models/xquad --temperature 0.7 --seed 3
  python -m crossin_jax.generate --model runs/xquad

Without --prompt it reads prompts from the keyboard. Of a run it takes the newest checkpoint. An
answer appears as it is made. Several --prompt flags are answered together, one after the other on
the screen.
"""

import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from crossin_jax import cli
from crossin_jax.config import UserError
from crossin_jax.generation.batching import check_stops
from crossin_jax.generation.chat import load_chat_model
from crossin_jax.generation.sampling import make_sampling


def read_prompts(is_terminal: bool) -> Iterator[str]:
    """Lines of standard input, until its end; at a keyboard also until an empty line."""
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
    flags.DEFINE_string(
        "model", None, "model folder, Hub id, adapter folder, or the output_dir of a run"
    )
    flags.DEFINE_string("adapter", None, "PEFT adapter to put on --model")
    flags.DEFINE_string("base", None, "base of the adapter --model, in place of the one it names")
    flags.DEFINE_string("tokenizer", None, "tokenizer folder or Hub id; none: the model's")
    flags.DEFINE_string(
        "template",
        None,
        "prompt template; none: the run's, else chat where the tokenizer has one, else alpaca",
    )
    flags.DEFINE_string("system", None, "system prompt, for templates that have one")
    flags.DEFINE_multi_string(
        "prompt", [], "what to ask; none reads lines from standard input", short_name="p"
    )
    flags.DEFINE_string(
        "input", "", "input that goes with the prompt, in templates that have a place for it"
    )
    flags.DEFINE_integer("max_new_tokens", 256, "longest answer, tokens", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy", lower_bound=0)
    flags.DEFINE_integer("top_k", None, "sample from the k likeliest tokens", lower_bound=1)
    flags.DEFINE_float("top_p", None, "sample from the smallest set of this probability")
    flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0)
    flags.DEFINE_multi_string("stop", [], "text that ends an answer; may be given several times")
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "precision; none: float32 on a CPU, else bfloat16"
    )


def main(arguments: Any) -> None:
    """Answers the prompts of the command line, or those of standard input as they come."""
    if arguments.model is None:
        raise UserError(
            "--model is missing; pass a model folder, a Hub id or the output_dir of a run"
        )
    # what can be refused now is not refused after the model is loaded
    make_sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    check_stops(arguments.stop, str)
    model, adapter = arguments.model, arguments.adapter
    if arguments.base:
        if adapter:
            raise UserError(
                "--base and --adapter: pass the base as --model, or the adapter as --model"
            )
        model, adapter = arguments.base, model
    given = list(arguments.prompt)
    speaker = load_chat_model(
        model,
        adapter=adapter,
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        system=arguments.system,
        dtype=arguments.dtype,
        batch_size=min(8, max(1, len(given))),
    )
    options = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")
    }
    if len(given) > 1:
        answers = speaker.answer(
            [(text, arguments.input) for text in given],
            seeds=[arguments.seed] * len(given),
            **options,
        )
        for text, answer in zip(given, answers, strict=True):
            print(f"> {text}\n{answer}\n")
        return
    for text in given or read_prompts(sys.stdin.isatty()):
        speaker.answer(
            [(text, arguments.input)],
            lambda _, piece: print(piece, end="", flush=True),
            seeds=[arguments.seed],
            **options,
        )
        print(flush=True)


if __name__ == "__main__":
    cli.run(main, define=define_flags, takes_config=False)
