"""How settings are declared: a group is a dataclass, and a field has a doc line and the rules of
its values.

The errors that users see come from here too, with their hints, shortened and without secrets.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any


def shorten(text: str, length: int = 600) -> str:
    """A text whose lines are at most `length` characters long: of a longer one, its two ends."""
    half = length // 2
    return "\n".join(
        f"{line[:half]} … {line[-half:]}" if len(line) > length else line
        for line in text.split("\n")
    )


def redact(text: str) -> str:
    """A text without passwords in URLs, and without the tokens and keys of the environment."""
    text = re.sub(r"(\w://)[^/\s@]*:[^/\s@]*@", r"\1***@", text)
    for name, value in os.environ.items():
        if re.search("(TOKEN|KEY|SECRET|PASSWORD)$", name) and len(value) >= 8:
            text = text.replace(value, "***")
    return text


class UserError(ValueError):
    """An error that the user can correct: the message names place, value and remedy; programs print
    it and exit with 2.
    """

    def __init__(self, message: str):
        super().__init__(shorten(redact(message)))


def setting(default: Any, doc: str, **rules: Any) -> Any:
    """A dataclass field that carries its documentation line and the rules of its values.

    Rules hold for every number or text in the value: `above`, `at_least`, `at_most`; `choices`, and
    `form`, a pattern of further ones. `may_repeat`: a sequence may name an entry twice.
    `may_be_empty`: a text may be "". `checks.check` applies them. `is_later`: the setting came when
    runs were already stored, see `to_dict`.
    """
    metadata = {"doc": doc, **({"may_be_empty": True} if default == "" else {}), **rules}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A nested group of settings with its own defaults."""
    return dataclasses.field(
        default_factory=cls, metadata={"doc": (cls.__doc__ or "").strip().split("\n")[0]}
    )


# What other libraries call a setting, for the hint after a name that is unknown here.
OTHER_NAMES = {
    "r": "rank",
    "target_modules": "targets",
    "lr": "learning_rate",
    "beta1": "b1",
    "beta2": "b2",
    "max_grad_norm": "clip_norm",
    "warmup_ratio": "warmup_share",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep",
    "model_name_or_path": "path",
    "max_seq_length": "length",
}


class Settings:
    """A group of settings; a name that it does not have is refused where it is written, with the
    nearest one.
    """

    def __new__(cls, *_: Any, **values: Any) -> Any:
        for name in values:
            cls.check_name(name)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        self.check_name(name)
        super().__setattr__(name, value)

    @classmethod
    def check_name(cls, name: str, prefix: str = "") -> None:
        """Raises `UserError` for a name that is no setting of this group; `prefix` is the path of
        the group.
        """
        known = cls.__dataclass_fields__
        if name not in known:
            prefix = prefix or f"{cls.__name__}."
            raise UserError(
                f"{prefix}{name} is not a setting"
                + hint_setting(prefix + name, [prefix + k for k in known])
            )


def iterate_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yields (dotted path, value, field) of every leaf setting, nested sections and lists of
    sections included.
    """
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from iterate_fields(value, path + ".")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, entry in enumerate(value):
                yield from iterate_fields(entry, f"{path}[{i}].")
        else:
            yield path, value, field


def hint(name: Any, known: Any) -> str:
    """The words "; did you mean X?" where a known name is near, else nothing."""
    near = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def hint_setting(path: str, known: Sequence[str]) -> str:
    """`hint` for the dotted path of a setting, which also knows the names of other libraries."""
    parent, _, name = path.rpartition(".")
    meant = [k for k in known if k.rpartition(".")[2] == OTHER_NAMES.get(name)]
    meant.sort(key=lambda k: k.rpartition(".")[0] != parent)  # the one of the same group first
    return f"; did you mean {meant[0]}?" if meant else hint(path, known)
