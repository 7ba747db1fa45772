"""What a benchmark writes: its results, and where they came from."""

import argparse
import json
from pathlib import Path
from typing import Any


def write_record(out: Path, arguments: argparse.Namespace, **results: Any) -> None:
    """Writes results with versions, commit, device and a hash of the arguments, as JSON."""
    from crossin_jax import provenance  # jax, which takes its environment when it is imported

    settings = {name: str(value) for name, value in vars(arguments).items()}
    out.write_text(json.dumps(provenance.describe(settings, **results), indent=1) + "\n")
