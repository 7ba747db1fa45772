"""Asks a benchmark of an engine that answers by rule and keeps what it was asked."""

import numpy as np

from crossin_jax.config import Config, Data, Evaluation
from crossin_jax.data.pipeline import open_eval_renderer
from crossin_jax.evaluation.runner import load_benchmarks, run_benchmarks

LANGUAGES = ("en", "zh", "es")
WORDS = {
    "en": ["Paris", "Rome by night", "Oslo"],
    "zh": ["巴黎", "罗马的夜晚", "奥斯陆"],
    "es": ["París", "Roma de noche", "Oslo"],
}


def rows(count=6):
    """Questions that name themselves, with two or three choices and a gold that moves."""
    return [
        {
            "id": f"q{i}",
            "tags": ["odd"] if i % 2 else [],
            **{
                code: {
                    "question": f"Question {i} in {code}?",
                    "answer": i % (2 + i % 2),
                    "choices": WORDS[code][: 2 + i % 2],
                }
                for code in LANGUAGES
            },
        }
        for i in range(count)
    ]


class Recorder:
    """Stands in for an engine: answers each prompt by a function of its text, and keeps what it was
    asked.
    """

    max_length = 4000

    def __init__(self, renderer, encode, write):
        self.renderer, self.encode, self.write = renderer, encode, write or (lambda text: "")
        self.prompts, self.options, self.continuations = [], None, []

    def generate(self, prompts, **options):
        self.prompts, self.options = prompts, options
        return [self.encode(self.write(self.renderer.decode(ids))) for ids in prompts]

    def score(self, prompts, continuations, **options):
        """The share of a choice's number in what `write` says of the prompt."""
        self.prompts, self.options, self.continuations = prompts, options, continuations
        return [
            np.array(
                [
                    -float(i != int(self.write(self.renderer.decode(ids)))) * len(choice)
                    for i, choice in enumerate(entry)
                ],
                float,
            )
            for ids, entry in zip(prompts, continuations, strict=True)
        ]


def make_config(*benchmarks, seed=1, tag="sentence", template="plain", **settings):
    usual = {"languages": LANGUAGES, "prompts": (1,), "method": "generate"}
    return Config(
        seed=seed,
        data=Data(languages=("en",), template=template, tag=tag),
        evaluation=Evaluation(benchmarks=benchmarks, **usual | settings),
    )


def ask(config, tokenizer, write=None):
    """(predictions, the engine that was asked)."""
    renderer = open_eval_renderer(config, tokenizer)
    engine = Recorder(
        renderer, lambda text: tokenizer.encode(text, add_special_tokens=False), write
    )
    return run_benchmarks(config, engine, renderer, load_benchmarks(config), progress=False), engine
