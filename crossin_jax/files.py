"""Files: read with errors that name the remedy, written whole or not at all; checks of fields."""

import contextlib
import gzip
import hashlib
import io
import json
import logging
import math
import operator
import os
import re
import shlex
import time
import types
import typing
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from crossin_jax.paths import as_path, is_bucket
from crossin_jax.process import temporary
from crossin_jax.settings import Settings, UserError, hint, redact

MAX_BYTES = 4 << 30  # of a file that is read whole
PUT_SECONDS = 30.0  # between two puts of a growing object
BLOCK_BYTES = 1 << 20  # that are read at once
MAX_DEPTH = 100  # of lists and objects in a JSON value; Python's own functions fail near 1,000
JSON_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def check_output(flag: str, path: Path) -> None:
    """Refuses a file that cannot be written, before hours are spent on what belongs in it."""
    if path.is_dir():
        raise UserError(f"{flag}={path}: a folder; name a file in it")
    if is_bucket(path):  # it has no folders, and says only at a put whether it may be written
        return
    if path.exists() and not path.is_file():  # replacing /dev/null would break the machine
        raise UserError(f"{flag}={path}: not a regular file; name another")
    if not path.parent.is_dir():
        raise UserError(f"{flag}={path}: the folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag}={path}: the folder {path.parent} is not writable; choose another")


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file, or leaves the old one; several processes and hosts may write the same at
    once.
    """
    content = content.encode() if isinstance(content, str) else content
    if is_bucket(path):
        path.write_bytes(content)
        return
    with temporary(path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")) as part:
        part.write_bytes(content)
        os.replace(part, path)


class Lines:
    """A text file to which lines are added; each is in the file at once.

    A bucket cannot add to an object. There the whole text is put again, at most every `PUT_SECONDS`
    and by `flush`.
    """

    def __init__(self, file: Any):
        self._bucket = file if is_bucket(file) else None
        self._put_at = time.monotonic()
        if self._bucket:
            self._text = [file.read_text()] if file.is_file() else []
            self._is_put = True
        else:
            self._file = file.open("a")

    def write(self, line: str) -> None:
        """Adds a line, without its end."""
        if not self._bucket:
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._text.append(line + "\n")
        self._is_put = False
        if time.monotonic() - self._put_at > PUT_SECONDS:
            try:
                self.flush()
            except OSError as error:  # the text is kept, and the next put has it
                self._put_at = time.monotonic()
                logging.warning(
                    "%s: cannot be written now and is tried again: %s", self._bucket, error.strerror
                )

    def flush(self) -> None:
        """Returns when every line is in the file; raises OSError where it cannot be written."""
        if self._bucket and not self._is_put:
            self._bucket.write_text("".join(self._text))
            self._is_put, self._put_at = True, time.monotonic()

    def close(self) -> None:
        self.flush() if self._bucket else self._file.close()


def read_bytes(path: str | Path, *, remedy: str = "") -> bytes:
    """The content of a file that a user named, unpacked where it is compressed with gzip.

    Raises `UserError` with the path, the reason and `remedy` where it cannot be read.
    """
    content = io.BytesIO()
    with explain_faults(path, remedy), open_unpacked(path) as file:
        # A small file may unpack to any size; and one large read would reserve all of it
        # beforehand.
        while content.tell() <= MAX_BYTES and (block := file.read(BLOCK_BYTES)):
            content.write(block)
    if content.tell() > MAX_BYTES:
        hint = f"; {remedy}" if remedy else ""
        raise UserError(f"{path}: above {MAX_BYTES >> 30} GiB; is this the right file?{hint}")
    return content.getvalue()


def open_unpacked(path: str | Path) -> BinaryIO:
    """Opens a file for reading bytes; gzip is recognised by its first bytes, whatever the file is
    called.
    """
    check_regular(path)
    file = as_path(path).open("rb")
    start = file.read(2)
    file.seek(0)
    if start != b"\x1f\x8b":
        return file
    return typing.cast(BinaryIO, _Unpacked(file))


class _Unpacked(gzip.GzipFile):
    """A compressed file that is closed together with the file below it."""

    def __init__(self, file: BinaryIO):
        super().__init__(fileobj=file)
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


@contextlib.contextmanager
def explain_faults(path: str | Path, remedy: str = "") -> Iterator[None]:
    """Faults while a user's file is read become a `UserError` with path, reason and remedy."""
    hint = f"; {remedy}" if remedy else ""
    try:
        yield
    except FileNotFoundError:
        start = "" if as_path(path).is_absolute() else f"; paths start at {Path.cwd()}"
        raise UserError(f"{path}: no such file{hint}{start}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip ({error}); copy or write the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}){hint}") from None


def read_json(
    path: str | Path, *, expect: type | None = None, what: str = "a JSON file", remedy: str = ""
) -> Any:
    """The value in a JSON file that a user named (UTF-8, with or without byte order mark or gzip).

    Raises `UserError` with path, place and `remedy`, also where the value is no `expect` (dict or
    list); `what` says in a few words what the file should hold.
    """
    hint = f"; {remedy}" if remedy else ""
    text = decode_text(read_bytes(path, remedy=remedy), str(path))
    return parse_json(text, str(path), expect, what, hint)


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(number of the line from 1, its value) of a JSON Lines file; empty lines are left out.

    The file is read line by line. Raises `UserError` with path, line and remedy.
    """
    hint = "; a .jsonl file holds one object per line"
    for number, line in read_lines(path):
        line = line.removeprefix("\ufeff")  # files with a mark may have been joined
        if line.strip():
            yield number, parse_json(line, f"{path}, row {number}", None, "one object", hint)


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line of a UTF-8 file, compressed with gzip or not.

    Lines end at "\\n" only: U+2028, U+2029 and U+0085 are characters of a text, not ends of lines.
    """
    with explain_faults(path), open_unpacked(path) as file:
        for number, line in enumerate(file, 1):
            yield number, decode_text(line, f"{path}, row {number}", has_mark=number == 1)


def decode_text(raw: bytes, place: str, *, has_mark: bool = True) -> str:
    """UTF-8 as text, without a byte order mark if it may have one; `UserError` with `place`, line
    and remedy for other bytes.
    """
    if has_mark:
        refuse_utf16(raw, place)
    try:
        return raw.decode("utf-8-sig" if has_mark else "utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        at = f", line {line}" if b"\n" in raw.rstrip(b"\n") else ""
        raise UserError(
            f"{place}{at}: byte {raw[error.start]:#04x} is not UTF-8; convert the file, e.g. "
            f"{_conversion('latin1', place)}"
        ) from None


def refuse_utf16(raw: bytes, place: str) -> None:
    """Raises `UserError` where the first bytes of a file are those of UTF-16 or UTF-32."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:4]:
        raise UserError(
            f"{place}: UTF-16 or UTF-32, not UTF-8; convert it: {_conversion('utf-16', place)}"
        )


def _conversion(encoding: str, place: str) -> str:
    """The command that converts the file of a place ("FILE" or "FILE, row 3") to UTF-8."""
    file, convert = place.partition(", row ")[0], f"iconv -f {encoding} -t utf-8"
    if not os.path.isfile(file):  # the output of another program
        return convert
    unpack = f"zcat {shlex.quote(file)} | {convert}"
    read = unpack if file.endswith(".gz") else f"{convert} {shlex.quote(file)}"
    return f"{read} > {shlex.quote(f'{file}.utf8')}"


def parse_json(text: str, place: str, expect: type | None, what: str, hint: str) -> Any:
    """The value that a JSON text holds; `UserError` with `place` and `hint` where it holds none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise UserError(
            f"{place}: not JSON at {line}column {error.colno} ({error.msg}){hint}"
        ) from None
    except ValueError as error:  # Python reads no number of more than 4,300 digits
        raise UserError(f"{place}: {str(error).partition(';')[0]}{hint}") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply for {what}{hint}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise UserError(f"{place}: nested too deeply for {what}{hint}")
    if expect is not None and not isinstance(value, expect):
        raise UserError(
            f"{place}: holds {JSON_NAMES[type(value)]}, but {what} is {JSON_NAMES[expect]}{hint}"
        )
    return value


def check_regular(path: str | Path) -> None:
    """Refuses what is there but is no file: a folder, or a pipe or device, which could be read for
    ever.
    """
    path = as_path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: a pipe or device; write its content to a file, and name that")


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested in more than `depth` levels."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        entries = [c.values() if isinstance(c, dict) else c for c in level]
        level = [e for group in entries for e in group if isinstance(e, dict | list)]
    return bool(level)


LARGEST = 2**31 - 1  # devices count in 32 bits; a declaration that goes further says so


def allows(annotation: Any, value: Any) -> bool:
    """Whether a value, with all its entries, has the annotated type; an int is a float, a bool is
    not an int.
    """
    origin, entries = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, types.UnionType):
        return any(allows(option, value) for option in entries)
    if annotation is Any:
        return True
    if annotation in (int, float):
        kinds = (int, float) if annotation is float else (int,)
        return isinstance(value, kinds) and not isinstance(value, bool)
    if not isinstance(value, origin or annotation):
        return False
    if origin is dict:
        key, entry = entries
        return all(allows(key, k) and allows(entry, v) for k, v in value.items())
    return origin not in (tuple, list) or all(allows(entries[0], entry) for entry in value)


def name_type(annotation: Any) -> str:
    """An annotation as a reader writes it: int | None, tuple[Component, ...]."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("crossin_jax.config.", "")


def check_value(path: str, value: Any, annotation: Any, rules: Mapping[str, Any]) -> None:
    """Raises `UserError` with path and value where the value breaks its declaration (see
    `config.setting`).
    """
    if fault := _find_fault(value, annotation, rules):
        known = rules.get("choices", ())
        texts = [entry for entry in _scalars(value) if isinstance(entry, str)]
        wrong = [text for text in texts if text not in known]
        near = hint(wrong[0], known) if wrong else ""
        about = f": {rules['doc']}" if "doc" in rules else ""
        raise UserError(f"{path}={value!r} {fault}{about}{near}")


def check_fields(values: Mapping[str, Any], fields: Mapping[str, Any], place: str) -> None:
    """Checks the fields of an outside file: name → type, or (type, rules of `config.setting`).

    Fields that are absent or null pass, and so do those that are not declared. What is in a table
    passes too: its own fields are declared where they are read. A text may be anything, since many
    fields of such files are read by other programs only. Raises `UserError` with `place`.
    """
    for name, declared in fields.items():
        annotation, rules = declared if isinstance(declared, tuple) else (declared, {})
        rules = {"may_be_empty": True, "may_be_secret": True, **rules}
        value = values.get(name)
        if value is None:
            continue
        entries = value if isinstance(value, list) else [value]
        if allows(annotation, value) and any(isinstance(entry, dict) for entry in entries):
            continue
        check_value(f"{place}: {name}", value, annotation, rules)


def join_some(faults: Sequence[str]) -> str:
    """The first five faults, and how many more there are."""
    more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
    return "; ".join([*faults[:5], *more])


def _find_fault(value: Any, annotation: Any, rules: Mapping[str, Any]) -> str | None:
    if not allows(annotation, value):
        return f"is a {type(value).__name__}; it takes {name_type(annotation)}"
    if isinstance(value, tuple) and not rules.get("may_repeat"):
        for i, entry in enumerate(value):
            if entry in value[:i] and not isinstance(entry, Settings):
                return f"names {entry!r} twice; name each once"
    for entry in _scalars(value):
        if isinstance(entry, str):
            fault = _find_fault_in_text(entry, rules)
        else:
            fault = _find_fault_in_number(entry, rules)
        if fault:
            return fault
    return None


def _scalars(value: Any) -> Iterator[Any]:
    """Every text and number in a value; the keys of a dictionary count too."""
    if isinstance(value, dict | tuple | list):
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _scalars(entry)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value


def _find_fault_in_text(text: str, rules: Mapping[str, Any]) -> str | None:
    if "choices" in rules and text not in rules["choices"]:
        if "form" in rules and re.fullmatch(rules["form"], text):
            return None
        return f"is not one of {', '.join(rules['choices'])}"
    if text == "" and not rules.get("may_be_empty"):
        return "is empty"
    if "\0" in text or not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        return "has a character that cannot be stored in a file"
    # settings are stored beside every checkpoint and result
    if redact(text) != text and not rules.get("may_be_secret"):
        return "has a password or token in it; set that in the environment instead"
    return None


def _find_fault_in_number(number: float, rules: Mapping[str, Any]) -> str | None:
    # A comparison with nan is never true.
    if isinstance(number, float) and not math.isfinite(number):
        return "must be finite"
    choices = [choice for choice in rules.get("choices", ()) if not isinstance(choice, str)]
    if choices and number not in choices:
        return f"is not one of {', '.join(map(str, choices))}"
    limits = {"at_most": LARGEST, **rules}
    for word, breaks in (
        ("above", operator.le),
        ("at_least", operator.lt),
        ("at_most", operator.gt),
    ):
        if word in limits and breaks(number, limits[word]):
            return f"must be {word.replace('_', ' ')} {limits[word]}"
    return None


def content_hash(value: Any) -> str:
    """A short hash of JSON-able content, the same on every machine."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()[:16]
