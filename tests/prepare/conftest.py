"""The small corpus and the tokenizer of tests/data."""

from tests.data.conftest import parallel_file, tokenizer  # noqa: F401 - fixtures
