"""Where an artefact came from: versions, commit, configuration, data, template and device, in every one of them."""

import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")


def content_hash(value: Any) -> str:
    """A short hash of JSON-able content, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


@cache
def commit() -> str | None:
    """The git commit of this checkout, with "+" where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def describe(config: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The provenance record: versions, commit, device, hash of the configuration, and what the caller adds."""
    import jax

    from crossin_jax import __version__
    versions = {"crossin_jax": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = jax.devices()[0]
    return {"versions": versions, "commit": commit(), "config_hash": content_hash(config),
            "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})", **more}
