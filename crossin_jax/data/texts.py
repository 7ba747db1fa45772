"""Rows of any layout become texts by language: which columns, which id, and which faults drop a row."""

import array
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossin_jax.config import Source, UserError, hint
from crossin_jax.data.readers import File, read_rows
from crossin_jax.languages import CODES, LANGUAGES

MAX_CHARACTERS = 1_000_000  # longer texts are dropped and counted: one would hold a tokenizing worker for seconds
ALIASES = {"id": ("id",), "language": ("language", "lang"), "messages": ("messages", "conversations"),
           "instruction": ("instruction", "question", "prompt", "query"), "input": ("input", "context"),
           "output": ("output", "response", "answer", "completion", "text")}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True, slots=True)
class Text:
    """One language's version of a record; `messages` is the chat as (role, text) where the source has turns."""

    instruction: str
    input: str
    output: str
    messages: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One row: `texts` maps a language code to that language's version."""

    id: str
    texts: dict[str, Text]


def hash_key(text: str) -> int:
    """The first 8 bytes of BLAKE2b as an integer: the identity of a row id in every draw."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class TextReader:
    """Iterates the texts of a source as rows of the Arrow file; faulty texts come blank, with their fault."""

    def __init__(self, source: Source, codes: Sequence[str], files: list[File]):
        self.source, self.codes, self.files = source, tuple(codes), files
        self.named_by_content: bool | None = None
        self._place = f"data source {source.name or source.path!r}"
        for name in source.fields:
            if name not in ALIASES:
                raise UserError(f"{self._place}: fields has no {name!r}{hint(name, ALIASES)}; "
                                f"it maps {', '.join(ALIASES)}")

    def __iter__(self) -> Iterator[tuple]:
        positions, counts = array.array("Q"), []
        for f, file in enumerate(self.files):
            count = 0
            for number, row in read_rows(file, self.source.split):
                texts = self._split_languages(file, number, row)
                count += 1
                if self.source.join == "position" and len(self.files) > 1:
                    if f == 0:
                        positions.append(hash_key(_content(texts)))
                    row_id = f"{positions[count - 1]:016x}" if count <= len(positions) else ""
                    self.named_by_content = True
                else:
                    row_id = self._identify(file, number, row, texts)
                for code, text in texts.items():
                    fault = find_fault(text)
                    body = ("", "", "", None) if fault else as_row(text)
                    yield hash_key(row_id), self.codes.index(code), f, number, FAULTS.index(fault), row_id, *body
            counts.append(count)
            if self.source.join == "position" and count != counts[0]:
                listed = ", ".join(f"{Path(g.path).name}: {n}" for g, n in zip(self.files, counts, strict=False))
                raise UserError(f"{self._place}: joined by position, but the files disagree in their number of rows "
                                f"({listed}); mend the files, or give the rows ids and join by them")

    def _identify(self, file: File, number: int, row: dict, texts: dict[str, Text]) -> str:
        row_id = self._find(row, "id")
        by_content = row_id is None or row_id == "" or isinstance(row_id, dict)  # a dict is the Indonesian version
        if by_content and len(self.files) > 1:
            raise UserError(f"{file.path}, row {number}: no id to join the languages by; "
                            f"set fields={{'id': COLUMN}}, or join='position' where the files are parallel")
        if self.named_by_content not in (None, by_content):
            raise UserError(f"{file.path}, row {number}: {'no id' if by_content else 'an id'}, "
                            f"unlike the rows before it; give every row an id, or none")
        self.named_by_content = by_content
        return f"{hash_key(_content(texts)):016x}" if by_content else str(row_id)

    def _split_languages(self, file: File, number: int, row: dict) -> dict[str, Text]:
        place = f"{file.path}, row {number}"
        self._check_kind(row, place)
        if file.language:
            return {file.language: self._read_text(row, file.language, place)}
        language = self._find(row, "language")
        if isinstance(language, str):
            code = CODES.get(language, language.lower())
            code = code if code in LANGUAGES else code.replace("_", "-").split("-")[0]
            return {code: self._read_text(row, code, place)} if code in self.codes else {}
        groups = {code: group for code in self.codes if (group := self._group(row, code))}
        if groups:
            return {code: self._read_text(group, code, place) for code, group in groups.items()}
        if len(self.codes) != 1:
            raise UserError(f"{place}: columns {', '.join(row)} name no language; for one language set "
                            f"languages=('{self.codes[0]}',), for several give one column group per language")
        return {self.codes[0]: self._read_text(row, self.codes[0], place)}

    def _check_kind(self, row: dict, place: str) -> None:
        """Refuses rows that are not of the kind that the source claims."""
        kind, why = self.source.kind, None
        if kind == "messages" and not isinstance(self._find(row, "messages"), (list, str)):
            why = "it has no list messages or conversations"
        elif kind == "columns" and not any(self._group(row, code) for code in self.codes):
            why = f"it has no column group for any of {', '.join(self.codes)}"
        elif kind == "squad" and not {"id", "instruction", "input"} <= row.keys() | self._aliased(row):
            why = "it has no question and context"
        if why:
            raise UserError(f"{place}: kind={kind!r}, but {why}; columns: {', '.join(row)}; "
                            f"set kind='auto' or name the columns in fields")

    def _aliased(self, row: dict) -> set[str]:
        return {field for field in ALIASES if self._find(row, field) is not None}

    def _group(self, row: dict, code: str) -> dict | None:
        """One language's columns of a row: row["zh"], row["Chinese"], "instruction_zh", "zh_instruction" ..."""
        for name in (code, LANGUAGES[code]):
            if isinstance(row.get(name), dict):
                return row[name]
            if isinstance(row.get(name), str) and (name != "id" or "id" in self.source.fields):
                return {"output": row[name]}  # a column "id" of strings holds row ids, not Indonesian
        group = {}
        for field in ("instruction", "input", "output", "messages"):
            mapped = self.source.fields.get(field)
            names = (mapped,) if mapped else ALIASES[field]
            for name in names:
                for column in ([name.replace("{lang}", code)] if mapped else
                               (f"{name}_{code}", f"{code}_{name}", f"{name}.{code}", f"{code}.{name}")):
                    if column in row and (not mapped or "{lang}" in name):
                        group.setdefault(name, row[column])
        return group or None

    def _find(self, row: dict, field: str) -> Any:
        """The value of a field: a mapped column (a dotted path reaches into it; "" means none), or the first alias."""
        mapped = self.source.fields.get(field)
        if mapped is None:
            return next((row[name] for name in ALIASES[field] if row.get(name) is not None), None)
        value: Any = row.get(mapped)
        if value is None and "." in mapped:
            value = row
            for part in mapped.split("."):
                index = int(part) if isinstance(value, list) and part.isdigit() else part
                try:
                    value = value[index]
                except (KeyError, IndexError, TypeError):
                    return None
        return value

    def _read_text(self, row: dict, code: str, place: str) -> Text:
        messages = self._find(row, "messages")
        if isinstance(messages, str):
            messages = json.loads(messages)
        if isinstance(messages, list) and messages:
            return _read_chat(messages, place)
        values = [self._find(row, field) for field in ("instruction", "input", "output")]
        if values[0] is None and values[2] is None:
            raise UserError(f"{place}: no instruction and no output among the columns {', '.join(row) or '(none)'}; "
                            f"set fields={{'instruction': COLUMN, 'output': COLUMN}}")
        for field, value in zip(("instruction", "input", "output"), values, strict=True):
            if isinstance(value, (list, dict)):
                raise UserError(f"{place}: {field} is a {type(value).__name__}, not text; "
                                f"reach into it with a dotted path, e.g. fields={{'{field}': 'instances.0.{field}'}}")
        return Text(*("" if value is None else str(value) for value in values))


def _read_chat(messages: list, place: str) -> Text:
    turns = []
    for turn in messages:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        if role not in ROLES:
            raise UserError(f"{place}: chat turn with role {role!r}; roles are {', '.join(ROLES)}")
        turns.append((ROLES[role], str(turn.get("content", turn.get("value")) or "")))
    last = {role: text for role, text in turns}
    return Text(last.get("user", ""), "", last.get("assistant", ""), tuple(turns))


# Faults of a text: its whole record is dropped and counted
FAULTS = (None, "empty output", "NUL character", f"over {MAX_CHARACTERS} characters", "lone surrogate",
          "chat turns out of order")


def find_fault(text: Text) -> str | None:
    whole = "" if text.messages else text.instruction + text.input + text.output  # of a chat they are two of the turns
    if text.messages:
        whole += "".join(content for _, content in text.messages)
        roles = [role for role, _ in text.messages if role != "system"]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
            return FAULTS[5]
    if not text.output.strip():
        return FAULTS[1]
    if "\0" in whole:
        return FAULTS[2]
    if len(whole) > MAX_CHARACTERS:
        return FAULTS[3]
    try:
        whole.encode()
    except UnicodeEncodeError:
        return FAULTS[4]
    return None


def as_row(text: Text) -> tuple:
    messages = json.dumps(text.messages, ensure_ascii=False) if text.messages else None
    return text.instruction, text.input, text.output, messages


def _content(texts: dict[str, Text]) -> str:
    return json.dumps([[code, *as_row(text)] for code, text in sorted(texts.items())])


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
