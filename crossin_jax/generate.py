"""Ask a model, with prompts from the command line or the keyboard.

  python -m crossin_jax.generate --model meta-llama/Llama-2-7b-hf --prompt "Name a river."
  python -m crossin_jax.generate --model models/mine --temperature 0.7 --seed 3
  python -m crossin_jax.generate --model runs/mine

  python -m crossin_jax.generate --model runs/mine --chat
  python -m crossin_jax.generate --model runs/mine --messages conversation.json
  python -m crossin_jax.generate --model runs/mine --prompts questions.jsonl --out answers.jsonl

Without --prompt it reads prompts from the keyboard, each by itself; with --chat they are turns of
one conversation. Of a run it takes the newest checkpoint. An answer appears as it is made. Several
--prompt flags are answered together, one after the other on the screen. --prompts answers a file of
rows {"prompt": …} (or "instruction" and "input", or "messages"); the same command continues it.
"""

import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from crossin_jax import cli
from crossin_jax.config import UserError
from crossin_jax.files import check_output
from crossin_jax.generation.batching import check_stops
from crossin_jax.generation.chat import ChatModel, Prompt, load_chat_model
from crossin_jax.generation.prompts_file import answer_file, read_messages, read_rows
from crossin_jax.generation.sampling import make_sampling
from crossin_jax.ownership import own_output
from crossin_jax.paths import as_path, is_bucket

RESET = "/reset"


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
    flags.DEFINE_string(
        "base", None, "base model of the adapter --model, instead of the one that it names"
    )
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
    flags.DEFINE_bool("chat", False, f"keep the turns of a conversation; {RESET} forgets them")
    flags.DEFINE_string(
        "messages",
        None,
        "JSON file of turns to answer, e.g. [{'role': 'user', 'content': 'Hello'}]",
    )
    flags.DEFINE_string("prompts", None, "JSON Lines file of prompts to answer into --out")
    flags.DEFINE_string("out", None, "JSON Lines file for the rows of --prompts with their answers")
    flags.DEFINE_integer(
        "batch_size", 16, "prompts of --prompts that are decoded at once", lower_bound=1
    )
    flags.DEFINE_integer("max_new_tokens", 256, "longest answer, tokens", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy", lower_bound=0)
    flags.DEFINE_integer("top_k", None, "sample from the k likeliest tokens", lower_bound=1)
    flags.DEFINE_float("top_p", None, "sample from the smallest set of this probability")
    flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0)
    flags.DEFINE_multi_string("stop", [], "text that ends an answer; may be given several times")
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "precision; auto: the run's (its exports name it), else what the device computes fast",
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
    check_ways(arguments)
    model, adapter = arguments.model, arguments.adapter
    if arguments.base:
        if adapter:
            raise UserError(
                "--base and --adapter: pass the base as --model, or the adapter as --model"
            )
        model, adapter = arguments.base, model
    given = list(arguments.prompt)
    many = arguments.prompts is not None
    speaker = load_chat_model(
        model,
        adapter=adapter,
        tokenizer=arguments.tokenizer,
        template=arguments.template,
        system=arguments.system,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size if many else min(8, max(1, len(given))),
    )
    options = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")
    }
    if many:
        out = as_path(arguments.out)
        with own_output(out):
            count = answer_file(
                speaker,
                as_path(arguments.prompts),
                out,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                **options,
            )
        print(f"{count} answers: {out}")
    elif arguments.chat or arguments.messages:
        messages = read_messages(arguments.messages) if arguments.messages else []
        converse(speaker, messages, arguments, options)
    elif len(given) > 1:
        answers = speaker.answer(
            [(text, arguments.input) for text in given],
            seeds=[arguments.seed] * len(given),
            **options,
        )
        for text, answer in zip(given, answers, strict=True):
            print(f"> {text}\n{answer}\n")
            say_cut(answer)
    else:
        for text in given or read_prompts(sys.stdin.isatty()):
            tell(speaker, (text, arguments.input), arguments.seed, options)


def check_ways(arguments: Any) -> None:
    """Refuses several ways of asking at once, and one that lacks its other half."""
    asked = {
        "--prompt": bool(arguments.prompt),
        "--prompts": arguments.prompts is not None,
        "--chat or --messages": bool(arguments.chat or arguments.messages),
    }
    if len(ways := [name for name, is_given in asked.items() if is_given]) > 1:
        raise UserError(f"{' and '.join(ways)} are different ways of asking; choose one")
    if (arguments.prompts is None) != (arguments.out is None):
        raise UserError("--prompts FILE.jsonl needs --out FILE.jsonl, and --out needs --prompts")
    if arguments.input and ways and ways != ["--prompt"]:
        raise UserError(f"--input goes with --prompt, not with {ways[0]}")
    if arguments.prompts:
        read_rows(arguments.prompts)
        if is_bucket(arguments.out):  # it grows by one answer at a time
            raise UserError(
                f"--out={arguments.out}: answers go to a file of this machine; name one"
            )
        check_output("--out", as_path(arguments.out))
    if arguments.messages:
        read_messages(arguments.messages)


def tell(speaker: ChatModel, prompt: Prompt, seed: int, options: dict[str, Any]) -> str:
    """Prints an answer as it is made, says where it was cut, and returns it."""
    (answer,) = speaker.answer(
        [prompt], lambda _, piece: print(piece, end="", flush=True), seeds=[seed], **options
    )
    print(flush=True)
    say_cut(answer)
    return answer


def say_cut(answer: str) -> None:
    """Marks an answer that was as long as allowed; the mark is not part of the answer."""
    if getattr(answer, "is_cut", False):
        print("[cut here; --max_new_tokens allows more]", file=sys.stderr, flush=True)


def converse(
    speaker: ChatModel, messages: list[dict[str, str]], arguments: Any, options: dict[str, Any]
) -> None:
    """A conversation that keeps its turns: first the one of --messages, then lines of standard
    input.

    The oldest exchange is forgotten where the model cannot read all of them.
    """

    def answer() -> None:
        while len(messages) > 2 and len(speaker.render(messages)) >= speaker.engine.max_length:
            first = int(messages[0]["role"] == "system")
            del messages[first : first + 2]
            print("[the oldest exchange is forgotten: it is too long]", file=sys.stderr)
        text = tell(speaker, messages, arguments.seed, options)
        messages.append({"role": "assistant", "content": str(text)})

    if messages:
        answer()
    if not arguments.chat:
        return
    if sys.stdin.isatty():
        print(f"{RESET} forgets the conversation; an empty line ends it", file=sys.stderr)
    for line in read_prompts(sys.stdin.isatty()):
        if line.strip() == RESET:
            messages.clear()
            print("[the conversation is forgotten]", file=sys.stderr, flush=True)
            continue
        messages.append({"role": "user", "content": line})
        answer()


if __name__ == "__main__":
    cli.run(main, define=define_flags, takes_config=False)
