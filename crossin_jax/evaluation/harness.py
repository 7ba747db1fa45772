"""The engine as a model of EleutherAI's lm-evaluation-harness: its tasks run on JAX weights."""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from crossin_jax.config import UserError
from crossin_jax.data.templates import ChatTemplate, open_chat_template
from crossin_jax.data.tokens import find_hidden
from crossin_jax.generation.batching import cut_at_stop
from crossin_jax.generation.chat import load_chat_model
from crossin_jax.generation.engine import Engine

ROWS = 16  # prompts in one program where the harness leaves the choice to the model ("auto")
OURS = ("pretrained", "adapter", "tokenizer", "dtype", "batch_size", "max_length", "max_gen_toks")
SAMPLING = ("temperature", "top_k", "top_p")
# what other generation_kwargs may say: values that change nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "num_return_sequences": (1, None),
    "repetition_penalty": (1, None),
    "length_penalty": (1, None),
    "encoder_repetition_penalty": (1, None),
    "diversity_penalty": (0, None),
    "no_repeat_ngram_size": (0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "min_p": (0, None),
    "typical_p": (1, None),
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "penalty_alpha": (0, None),
    "best_of": (1, None),
    "n": (1, None),
}
# how transformers computes or returns an answer, not which one
IGNORED = ("use_cache", "early_stopping", "cache_implementation", "return_dict_in_generate")


@register_model("crossin_jax")
class EngineLM(TemplateLM):
    """Log-likelihoods and answers of an engine, for texts that `tokenizer` turns into ids.

    Requests with one context are scored from one reading of it; contexts that begin alike share
    that beginning, as the solved examples of a few-shot task do. A context that is too long loses
    its first tokens, as the harness prescribes.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        self.engine, self.tokenizer, self.max_gen_toks = engine, tokenizer, max_gen_toks
        self.max_length = min(max_length or engine.max_length, engine.max_length)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "EngineLM":
        """Opens `pretrained` (a folder, a Hub id, an adapter or a run); takes model_args and flags
        of the harness.
        """
        # model_args win: the harness has a batch size of its own accord.
        given = (additional_config or {}, arg_dict)
        settings = {
            key: value for some in given for key, value in some.items() if value is not None
        }
        # The harness names cuda:0 unasked; JAX finds its devices.
        for name in ("device", "max_batch_size"):
            settings.pop(name, None)
        if unknown := sorted(set(settings) - set(OURS)):
            raise UserError(
                f"--model_args {unknown[0]}={settings[unknown[0]]}: crossin_jax takes "
                f"{', '.join(OURS)}"
            )
        if "pretrained" not in settings:
            raise UserError(
                "--model_args: pretrained is missing; give pretrained=FOLDER, a Hub id or a run"
            )
        rows = settings.get("batch_size", 1)
        chat = load_chat_model(
            settings["pretrained"],
            adapter=settings.get("adapter"),
            template="plain",
            tokenizer=settings.get("tokenizer"),
            dtype=settings.get("dtype") or "auto",
            batch_size=ROWS if str(rows).startswith("auto") or int(rows) == 1 else int(rows),
        )
        limits = {
            key: int(settings[key]) for key in ("max_length", "max_gen_toks") if key in settings
        }
        return cls(chat.engine, chat.tokenizer, **limits)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "EngineLM":
        """As `create_from_arg_obj`, from "pretrained=FOLDER,max_length=2048"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text; BOS is not put first where the text begins with it."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation by the tokenizer's chat template; without a generation prompt
        its last turn is open.

        A template without a place for a system turn is given its text before the first user's.
        """
        turns = [(turn["role"], turn["content"]) for turn in chat_history]
        if add_generation_prompt:
            return self._chat_template.render(turns, True)
        # The content may be empty, or stand in an earlier turn too: a mark shows where it ends. A
        # template that strips contents takes the space after the mark away, and those before it go
        # too.
        (role, content), mark = turns[-1], "<crossin_jax continues here> "
        text = self._chat_template.render([*turns[:-1], (role, content + mark)], False)
        if mark in text:
            return text[: text.rindex(mark)]
        if mark.strip() in text:
            return text[: text.rindex(mark.strip())].rstrip()
        raise UserError("the tokenizer's chat template leaves out the turn that is to be continued")

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return open_chat_template(self.tokenizer)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, each token once, with as much context as fits."""
        # A text longer than the model reads is cut into windows. Each token is scored once, in the
        # window that gives it the most context.
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for window in map(make_disjoint_window, found):
                windows.append((None, *window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm), strict=True
        ):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Iterable[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        # The choices of one question come as requests of their own. They are put together again, so
        # that the engine reads the question once:
        #
        #     ("Q: …", " Paris"), ("Q: …", " Lima")   ->   "Q: …": [" Paris", " Lima"]
        by_context: dict[tuple[int, ...], list[int]] = {}
        requests = list(requests)
        for i, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the model does not read the last token
            if room < 1:
                raise UserError(
                    f"request {i}: a continuation of {len(continuation)} tokens is longer than "
                    f"max_length={self.max_length}"
                )
            by_context.setdefault(tuple(context[-room:]), []).append(i)
        judged = self.engine.score_with_greedy(
            list(by_context),
            [[requests[i][2] for i in members] for members in by_context.values()],
            progress=not disable_tqdm,
        )
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, (scores, best) in zip(by_context.values(), judged, strict=True):
            for i, score, is_best in zip(members, scores, best, strict=True):
                answers[i] = float(score), bool(is_best)
                if requests[i][0] is not None:  # a window of a longer text has no name of its own
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop; requests with the same settings are decoded together."""
        by_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        answers = [""] * len(requests)
        for members in by_settings.values():
            given = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
            until = handle_stop_sequences(
                given.pop("until"), self.tokenizer.decode([self.eot_token_id])
            )
            until = [text for text in until if text]
            room, sampling = given.pop("max_gen_toks"), read_sampling(given)
            if room >= self.max_length:
                raise UserError(
                    f"max_gen_toks={room} leaves no room for a prompt in "
                    f"max_length={self.max_length}"
                )
            prompts = [
                self.tok_encode(requests[i].args[0])[-(self.max_length - room) :] for i in members
            ]
            found = self.engine.generate(
                prompts,
                max_new_tokens=room,
                stop=until,
                detokenize=partial(self._decode, shown=until),
                seeds=_number_repeats(prompts),
                progress=not disable_tqdm,
                **sampling,
            )
            for i, ids in zip(members, found, strict=True):
                answers[i] = cut_at_stop(self._decode(ids, until), until)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _decode(self, ids: Sequence[int], shown: Sequence[str] = ()) -> str:
        """The text of ids, without special tokens but those of the texts in `shown`."""
        hidden = find_hidden(self.tokenizer.added_tokens_decoder, shown)
        return self.tokenizer.decode([i for i in ids if i not in hidden])


def read_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """The engine's settings in the generation_kwargs of a task; `UserError` for what would change
    an answer otherwise.
    """
    # A task may repeat the default of transformers.generate, or set what has no effect on one text.
    sampled = given.pop("do_sample", False)
    sampling = {"temperature": 1.0} | {key: given.pop(key) for key in SAMPLING if key in given}
    if sampling.get("top_k") in (0, -1):  # all tokens, as transformers and vLLM say it
        del sampling["top_k"]
    wrong = [
        key
        for key, value in given.items()
        if key not in IGNORED and value not in NEUTRAL.get(key, ())
    ]
    if wrong:
        name = wrong[0]
        neutral = (
            f"; instead of {name}={given[name]} only the default {NEUTRAL[name][0]} is allowed"
            if name in NEUTRAL
            else ""
        )
        raise UserError(
            f"generation_kwargs {name}: the engine knows do_sample, max_gen_toks, until, "
            f"{', '.join(SAMPLING)}{neutral}"
        )
    if not sampled or not sampling["temperature"]:
        return {}  # greedy, whatever top_k and top_p say
    return {key: value for key, value in sampling.items() if value is not None}


def _number_repeats(prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed for each prompt; a task that asks a prompt several times gets other draws each
    time.
    """
    times: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for prompt in map(tuple, prompts):
        seeds.append(zlib.crc32(np.array(prompt, np.int32).tobytes(), times[prompt]))
        times[prompt] += 1
    return seeds
