"""Where an artefact came from: versions, commit, configuration, data, template and device, in every
one of them.
"""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from crossin_jax import __version__
from crossin_jax.files import content_hash

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")


# Texts whose token ids tell two tokenizers of one vocabulary apart: case, spaces, digits, scripts,
# rare letters.
PROBE = "Hello, wORLD!  1234567 naïve\tstraße\n你好，世界 مرحبا नमस्ते đường ไทย 😀 <s></s>"


def identify_tokenizer(tokenizer: Any) -> str:
    """A hash of what a tokenizer does: its vocabulary, its special tokens, and how it cuts a text.

    A hash of its files would differ for one tokenizer, which libraries write in more than one way.
    """
    return content_hash(
        [
            sorted(tokenizer.get_vocab().items()),
            sorted(tokenizer.all_special_ids),
            [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
            tokenizer(PROBE).input_ids,
        ]
    )


@cache
def commit() -> str | None:
    """The git commit of this checkout, with "+" where files differ from it; None for an installed
    package.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def describe(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The provenance record: versions, commit, device, hash of the configuration, and what the
    caller adds.
    """
    versions = {"crossin_jax": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = jax.devices()[0]
    return {
        "versions": versions,
        "commit": commit(),
        "config_hash": content_hash(config),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        **more,
    }
