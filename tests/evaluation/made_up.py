"""Made-up answers to real questions: models that know a share of the facts, and repeat it in other
languages.
"""

import random
from collections.abc import Sequence

from crossin_jax.evaluation.items import Benchmark
from crossin_jax.evaluation.predictions import Answer, ItemAnswers, Predictions

UNREADABLE = (
    "I cannot say </script><b>sorry</b>",
    "",
    "答案可能是其中之一",
    "It is (A). Or it is (B).",
)


def answer_benchmark(
    benchmark: Benchmark,
    knows: dict[str, float],
    *,
    method: str = "sum",
    prompt: int = 0,
    seed: int = 0,
    unclear: float = 0.0,
) -> Predictions:
    """A language answers right with its probability in `knows`, else like the language before it,
    or at random.
    """
    draw = random.Random(f"{seed}/{method}/{prompt}/{sorted(knows.items())}/0.5")
    items = []
    for item in benchmark.items:
        answers: dict[str, Answer] = {}
        before = None
        for code, version in item.versions.items():
            count = len(version.choices)
            if draw.random() < unclear:
                text = draw.choice(UNREADABLE)
                reason = "empty" if not text else "tie" if "Or" in text else "unreadable"
                answers[code] = Answer(
                    (0, 1) if reason == "tie" else tuple(range(count)), reason, text
                )
                continue
            if draw.random() < knows[code]:
                choice = version.answer
            elif before is not None and draw.random() < 0.5:
                choice = before
            else:
                choice = draw.randrange(count)
            before = choice
            answers[code] = Answer(
                (choice,), text=version.choices[choice] if method == "generate" else None
            )
        gold = {code: version.answer for code, version in item.versions.items()}
        items.append(
            ItemAnswers(
                item.id, gold, len(next(iter(item.versions.values())).choices), answers, item.tags
            )
        )
    return Predictions(benchmark.name, method, prompt, benchmark.languages, tuple(items))


def know(languages: Sequence[str], english: float, others: float) -> dict[str, float]:
    """The same knowledge in every language but English."""
    return {code: english if code == "en" else others for code in languages}
