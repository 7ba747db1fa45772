"""Where an artefact came from: hash of the configuration, versions, device and commit."""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

import crossin_jax
from crossin_jax import provenance
from crossin_jax.config import to_dict
from crossin_jax.provenance import content_hash, describe
from tests.test_checks import adapts, new


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of everything in a configuration's dict that holds nothing else."""
    entries = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [leaf for key, entry in entries for leaf in leaves(entry, (*path, key))] or [path]


def other(value: object) -> object:
    if isinstance(value, bool) or value is None:
        return 7 if value is None else not value
    return (
        value + 1
        if isinstance(value, int | float)
        else value + "x"
        if isinstance(value, str)
        else [9]
    )


@pytest.mark.parametrize("base", [adapts, new])
def test_every_setting_is_in_the_configuration_s_hash(base):
    """Also the entries of lists and tables."""
    config = to_dict(
        base({"data.components.1.languages": {"zh": 1.0, "vi": 2.0}, "evaluation.prompts": (1, 2)})
    )
    hashes = {(): describe(config)["config_hash"]}
    for path in leaves(config):
        changed = json.loads(json.dumps(config))
        target = changed
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = other(target[path[-1]])
        hashes[path] = describe(changed)["config_hash"]
    assert len(hashes) > 90 and len(set(hashes.values())) == len(hashes)
    assert describe(config)["config_hash"] == hashes[()]


def test_a_hash_is_that_of_the_content_as_json():
    """The same on every machine and for every order of keys, but not of entries."""
    content = {"b": [1, 2.5, None, True], "a": {"é": "河", "d": ""}}
    text = '{"a": {"d": "", "é": "河"}, "b": [1, 2.5, null, true]}'
    assert content_hash(content) == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert (
        content_hash(dict(reversed(content.items())))
        == content_hash(content)
        == content_hash(json.loads(text))
    )
    others = [
        content | {"b": [2.5, 1, None, True]},
        content | {"b": [1, 2.5, None, False]},
        content | {"c": 1},
        {"a": content["a"]},
        content | {"a": {"é": "河", "d": " "}},
        [content],
    ]
    assert len({content_hash(value) for value in [content, *others]}) == 7


def test_a_record_names_versions_device_and_what_its_caller_adds():
    told = describe({}, template="abc", model={"step": 3})
    versions = told["versions"]
    assert (
        versions["crossin_jax"] == crossin_jax.__version__
        and versions["python"] == platform.python_version()
    )
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")
    assert {name: versions[name] for name in packages} == {
        name: importlib.metadata.version(name) for name in packages
    }
    assert (
        told["device"]
        == f"{jax.device_count()} x {jax.devices()[0].device_kind} ({jax.default_backend()})"
    )
    assert told["template"] == "abc" and told["model"] == {"step": 3} and "commit" in told


def test_the_commit_is_that_of_the_checkout_with_a_plus_where_files_differ(tmp_path):
    folder = tmp_path / "crossin_jax"
    folder.mkdir()
    shutil.copy(provenance.__file__, folder / "provenance.py")

    def commit() -> str | None:
        spec = importlib.util.spec_from_file_location("copied_provenance", folder / "provenance.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.commit()

    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *names, *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert commit() is None  # an installed package
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert commit() == head[:12]
    Path(tmp_path / "new.txt").write_text("a file that git does not know")
    assert commit() == head[:12]
    (folder / "provenance.py").write_text((folder / "provenance.py").read_text() + "\n")
    assert commit() == head[:12] + "+"
