"""Before the first step: which prompt languages lose rows to the length, and what keeps them."""

import numpy as np
import pytest

from crossin_jax.config import Data
from crossin_jax.data.kinds import Example
from crossin_jax.data.lengths import describe_lost, propose_length
from crossin_jax.data.prompts import Rendered, RowFault


class Renderer:
    """A token for each letter of the output, and one that ends it."""

    def render_many(self, examples):
        return [
            RowFault("no", example.id)
            if example.output == "fault"
            else Rendered(np.zeros(len(example.output) + 1, np.int32), np.zeros(0, bool))
            for example in examples
        ]


def mixture(**lengths):
    """Examples by prompt language with outputs of these lengths."""
    return [
        Example("", "", language, "en", "", "", size if isinstance(size, str) else "a" * size)
        for language, sizes in lengths.items()
        for size in sizes
    ]


def lost(examples, held_out=None, context=4096, **data):
    return describe_lost(examples, held_out, Renderer(), Data(length=100, **data), context)


def test_a_language_that_loses_more_than_two_percent_is_named_with_the_length_to_set():
    examples = mixture(en=[90] * 98 + [101] * 2, vi=[100] * 19 + [500] * 81, zh=[101, "fault"])
    assert lost(examples) == [
        "prompts in Vietnamese: 81% of 100 are longer than data.length=100 and are dropped",
        "prompts in Chinese: 100% of 1 are longer than data.length=100 and are dropped",
        "data.length=512 keeps 99 % of every language",
    ]
    assert "are shortened or dropped" in lost(examples, over_long="shorten_input")[0]
    assert lost(examples, context=256)[-1] == (
        "data.length=512 would keep 99 % of every language; the model reads 256"
    )
    assert lost(mixture(en=[90] * 98 + [101] * 2)) == []


@pytest.mark.parametrize(
    ("sizes", "length"), [([100] * 99 + [900], 104), ([129] * 99, 256), ([128], 128), ([900], 1024)]
)
def test_the_proposed_length_is_one_that_kernels_take(sizes, length):
    assert propose_length([np.array(sizes)], 4096).startswith(f"data.length={length} keeps")


def test_held_out_losses_say_where_their_questions_differ():
    held_out = mixture(en=[50, 60], vi=[50, 160])
    assert lost(mixture(en=[9]), held_out) == [
        "held-out losses by language are not over the same questions: en 2 of 2, vi 1 of 2"
    ]
    assert lost(mixture(en=[9]), mixture(en=[50, 160], vi=[50, 160])) == []
