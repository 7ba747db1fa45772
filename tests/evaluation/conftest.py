"""The tokenizer of the tests that ask an engine."""

import json

import pytest

from crossin_jax.data.pipeline import load_tokenizer, train_tokenizer
from tests.evaluation.asking import rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer that was trained on the questions."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([json.dumps(rows(), ensure_ascii=False)] * 3, 500, folder)
    return load_tokenizer(str(folder))
