"""Small things that several tests build."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from crossin_jax.config import Architecture, Config
from crossin_jax.report.summary import Block
from crossin_jax.report.text import list_parts
from crossin_jax.tables import render_parts
from tests.configs import tiny

# what programs that may be several processes are given where they are one
ONE_PROCESS = {
    **dict.fromkeys(("coordinator", "num_processes", "process_id")),
    "start_timeout": 300,
    "loss_timeout": 60,
}


def small_architecture(**changes) -> Architecture:
    """A two-layer Llama with grouped queries; every width divides over eight devices."""
    return Architecture(
        **{
            "width": 32,
            "ff_width": 48,
            "num_layers": 2,
            "num_heads": 8,
            "num_kv_heads": 2,
            "max_length": 64,
            "vocab_size": 300,
        }
        | changes
    )


def as_earlier_version(run: Path) -> Path:
    """The run without what earlier versions did not write: a test may then change what its
    checkpoints store.
    """
    (run / "checkpoints/files.json").unlink(missing_ok=True)
    for seal in run.glob("checkpoints/*/fingerprints"):
        shutil.rmtree(seal)
    return run


def config_in(folder: Path, variant: str = "pretrain", **changes) -> Config:
    """The tiny configuration with its output in a folder."""
    return dataclasses.replace(tiny.get_config(variant), output_dir=str(folder), **changes)


def study_flags(**given) -> SimpleNamespace:
    """The flags of a study's dry run, with those that are given."""
    usual = {
        "seeds": None,
        "languages": None,
        "budget": None,
        "cells": None,
        "report_only": False,
        "dry_run": True,
        "topology": None,
        "time": False,
        "format": "text",
    }
    return SimpleNamespace(**usual | given)


def print_table(blocks: Sequence[Block], style: str = "text") -> str:
    """What `evaluate` prints of a report on standard output."""
    return "\n".join(render_parts(style, list_parts({"": blocks}, style))[0])
