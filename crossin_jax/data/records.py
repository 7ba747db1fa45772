"""Rows of any layout become texts by language: from which columns, with which id, or why not."""

import array
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from crossin_jax.config import Source, UserError, hint
from crossin_jax.data.readers import (
    ALIASES,
    EMPTY,
    SQUAD,
    Fields,
    File,
    first_answer,
    is_chat,
    parse_list,
    parse_pairs,
    read_rows,
)
from crossin_jax.files import JSON_NAMES
from crossin_jax.languages import find_code, match

# Longer texts are dropped and counted: one would hold a tokenizing worker for seconds.
MAX_CHARACTERS = 1_000_000
MAX_REASONS = 1000
UNREAD = "unread"  # the key of `source.fields` that says what happens to columns that are not read
NOT_KNOWN = ", which is not a known language"
TEXTS = ("instruction", "input", "output")


@dataclass(frozen=True, slots=True)
class Text:
    """One language's version of a record; `messages` is the chat as (role, text) where the source
    has turns.

    Roles are system, user, assistant, and `MASKED`: an assistant's turn that the model reads but
    does not learn.
    """

    instruction: str
    input: str
    output: str
    messages: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """The versions of one row, by language code."""

    id: str
    texts: dict[str, Text]


class TextRow(NamedTuple):
    """A row of the Arrow file: the text of one record in one language."""

    key: int  # hash of the id
    group: int  # hash of the value that keeps rows together; 0: none
    language: int  # index in the codes of the source
    file: int  # index in the files of the source
    number: int  # of the row in its file, from 1
    fault: int  # `TextReader.reasons` of why the text cannot be used, and is blank here; 0: it can
    id: str
    instruction: str
    input: str
    output: str
    messages: str | None  # JSON


def digest(text: str, size: int = 16) -> bytes:
    """`size` bytes of BLAKE2b."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size).digest()


def hash_key(text: str) -> int:
    """8 bytes of `digest` as an integer: the identity of a row id in every draw."""
    return int.from_bytes(digest(text, 8), "little")


class Unusable(Exception):
    """A text that cannot be used: its record is dropped, and counted under this reason."""


class TextReader:
    """Iterates the texts of a source as rows of the Arrow file.

    After the pass `reasons` has the index of each reason why a text cannot be used. `ignored`
    counts rows by what was not read of them ("field 'topic'", "rows in 'de', …"), and
    `ignored_rows` names the first place of each.
    """

    def __init__(self, source: Source, codes: Sequence[str], files: list[File]):
        self.source, self.codes, self.files = source, tuple(codes), files
        self.named_by_content: bool | None = None
        self._columns: dict[tuple[str, ...], dict] = {}  # `_assign_columns` of each set of columns
        self.reasons: dict[str | None, int] = {None: 0}
        self.ignored: Counter[str] = Counter()
        self.ignored_rows: dict[str, str] = {}
        self.unknown: dict[str, str] = {}  # value of the language column that is none → first place
        self.masked_turns = 0
        self._unread: set[str] = set()  # fields of the current row
        self._place = f"data source {source.name or source.path!r}"
        for name in source.fields.keys() - {UNREAD}:
            if name not in ALIASES:
                raise UserError(
                    f"{self._place}: fields has no {name!r}{hint(name, ALIASES)}; "
                    f"it maps {', '.join(ALIASES)}"
                )
        if source.fields.get(UNREAD, "count") not in ("count", "refuse"):
            raise UserError(
                f"{self._place}: fields[{UNREAD!r}]={source.fields[UNREAD]!r} is not one of "
                "count, refuse"
            )

    # A row may hold one language or several; a row of the Arrow file holds one:
    #
    #     {"id": 7, "en": {…}, "zh": {…}}       → (7, en, …), (7, zh, …)
    #     xquad.en.json and xquad.zh.json       → (7, en, …) … (7, zh, …)
    #     {"id": 7, "language": "zh", …}        → (7, zh, …)
    #
    # The corpus joins them by id. An unusable text still has its row there, blank and with its
    # reason: the corpus then drops the record in all its languages.
    def __iter__(self) -> Iterator[TextRow]:
        positions, counts = array.array("Q"), []
        for f, file in enumerate(self.files):
            count = 0
            for number, row in read_rows(file, self.source.split):
                place = f"{file.path}, row {number}"
                fields = Fields(row, self.source.fields, file.layout == "csv")
                texts = self._split_languages(file, fields, place)
                count += 1
                # Joined by position, a row is named after the content of the first file's row.
                if self.source.join == "position" and len(self.files) > 1:
                    if f == 0:
                        positions.append(hash_key(_content(texts)))
                    row_id = f"{positions[count - 1]:016x}" if count <= len(positions) else ""
                    self.named_by_content = True
                else:
                    row_id = self._identify(fields, place, texts)
                group = self._find_group(fields, place) if texts else 0
                for code, (text, fault) in texts.items():
                    body = ("", "", "", None) if fault else as_row(text)
                    language, reason = self.codes.index(code), self._number_reason(fault)
                    yield TextRow(
                        hash_key(row_id), group, language, f, number, reason, row_id, *body
                    )
                for what in fields.missing_cells():
                    self._ignore(what, place)
                for name in sorted(self._unread.union(fields.unread() if texts else ())):
                    self._ignore(f"field {name!r}", place)
                self._unread.clear()
            counts.append(count)
            if self.source.join == "position" and count != counts[0]:
                sizes = zip(self.files, counts, strict=False)
                listed = ", ".join(f"{Path(file.path).name}: {n}" for file, n in sizes)
                raise UserError(
                    f"{self._place}: joined by position, but the files disagree in their number "
                    f"of rows ({listed}); correct the files, or give the rows ids and join by them"
                )
        self._refuse_unknown_languages()  # after the last row, to say how many rows there are

    def _refuse_unknown_languages(self) -> None:
        if self.unknown and self.source.fields.get(UNREAD) != "count":
            mark, place = next(iter(self.unknown.items()))
            count = sum(n for what, n in self.ignored.items() if what.endswith(NOT_KNOWN))
            marks = ", ".join(repr(mark[:40]) for mark in [*self.unknown][:5])
            raise UserError(
                f"{place}: {mark!r} is not a known language ({count} rows in all, "
                f"marked {marks})\n"
                "give codes such as fr or zh-Hant, or English names; "
                f"fields={{{UNREAD!r}: 'count'}} leaves these rows out and counts them"
            )

    def _ignore(self, what: str, place: str) -> None:
        self.ignored[what] += 1
        self.ignored_rows.setdefault(what, place)

    def _number_reason(self, fault: str | None) -> int:
        """The index of a reason. Reasons quote values of the data, so there is a limit to them."""
        if fault not in self.reasons and len(self.reasons) >= MAX_REASONS:
            fault = "another fault"
        return self.reasons.setdefault(fault, len(self.reasons))

    def _identify(self, fields: Fields, place: str, texts: dict) -> str:
        """The id of a row: the one in its columns, else the hash of its content."""
        row_id = fields.find("id")
        # An object under "id" is the Indonesian version of the record.
        by_content = row_id is None or row_id == "" or isinstance(row_id, dict)
        if by_content and len(self.files) > 1:
            raise UserError(
                f"{place}: no id to join the languages by; "
                f"set fields={{'id': COLUMN}}, or join='position' where the files are parallel"
            )
        if self.named_by_content not in (None, by_content):
            raise UserError(
                f"{place}: {'no id' if by_content else 'an id'}, "
                f"unlike the rows before it; give every row an id, or none"
            )
        self.named_by_content = by_content
        return f"{hash_key(_content(texts)):016x}" if by_content else str(row_id)

    def _find_group(self, fields: Fields, place: str) -> int:
        """The hash of the value that keeps rows together, e.g. of SQuAD's "paragraph"; 0: none."""
        name = self.source.fields.get("group")
        if not name:
            return 0
        value = fields.find("group")
        value = fields.get(SQUAD + name) if value is None else value
        if value is None or isinstance(value, dict):
            raise UserError(
                f"{place}: no value under {name!r}, the field of the group; columns: "
                f"{', '.join(fields.row)}"
            )
        return hash_key(str(value))

    def _split_languages(
        self, file: File, fields: Fields, place: str
    ) -> dict[str, tuple[Text, str | None]]:
        """The text of each language in a row, with the reason why it cannot be used or None."""
        self._check_kind(fields, place)
        if file.language:
            return {file.language: self._read_text(fields, place)}
        mark = fields.find("language")
        if isinstance(mark, str):
            if find_code(mark) is None:
                self.unknown.setdefault(mark, place)
                self._ignore(f"rows in {mark[:40]!r}{NOT_KNOWN}", place)
            elif code := match(mark, self.codes):
                return {code: self._read_text(fields, place)}
            else:
                self._ignore(f"rows in {mark[:40]!r}, which the source does not read", place)
            return {}
        parts = {code: part for code in self.codes if (part := self._part(fields, code))}
        if parts:
            texts = {}
            for code, part in parts.items():
                own = Fields(part, fields.mapped, fields.is_csv)
                texts[code] = self._read_text(own, place)
                self._unread.update(own.unread())
            return texts
        if len(self.codes) != 1:
            raise UserError(
                f"{place}: columns {', '.join(fields.row)} name no language; for one language set "
                f"languages=('{self.codes[0]}',), for several give one column group per language"
            )
        return {self.codes[0]: self._read_text(fields, place)}

    def _check_kind(self, fields: Fields, place: str) -> None:
        """Refuses rows that are not of the kind that the source claims."""
        kind, why = self.source.kind, None
        if kind == "messages" and not isinstance(fields.find("messages"), (list, str)):
            why = "it has no list messages or conversations"
        elif kind == "columns" and not any(self._part(fields, code) for code in self.codes):
            why = f"it has no column group for any of {', '.join(self.codes)}"
        elif kind == "squad" and None in map(fields.find, ("id", "instruction", "input")):
            why = "it has no question and context"
        if why:
            raise UserError(
                f"{place}: kind={kind!r}, but {why}; columns: {', '.join(fields.row)}; "
                f"set kind='auto' or name the columns in fields"
            )

    def _part(self, fields: Fields, code: str) -> dict | None:
        """One language's columns of a row: "zh", "Chinese", "instruction_zh", "zh_instruction" …"""
        row, columns = fields.row, tuple(fields.row)
        if columns not in self._columns:
            self._columns[columns] = self._assign_columns(columns)
        part = {}
        for name, column in self._columns[columns].get(code, ()):
            value, whole = row[column], None
            if name:
                fields.read.add(column)
                part.setdefault(name, value)
                continue
            if isinstance(value, dict):
                whole = value
            elif isinstance(value, list):
                whole = {"messages": value}
            # A column "id" of strings holds row ids, not Indonesian.
            elif isinstance(value, str) and (column != "id" or "id" in fields.mapped):
                whole = {"output": value}
            if whole is not None:
                fields.read.add(column)
                return whole
        return part or None

    def _assign_columns(self, columns: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
        """By language its columns as (field, column), the preferred ones first; a column of a whole
        text has the field "".

        "zh", "question_fra_Latn" → {"zh": [("", "zh")], "fr": [("question", "question_fra_Latn")]}
        """
        forms = [("", "{lang}")]
        for field in (*TEXTS, "messages", "system", "history"):
            mapped = self.source.fields.get(field)
            if mapped and "{lang}" in mapped:
                forms.append((mapped, mapped))
            for name in () if mapped else ALIASES[field]:
                forms += [
                    (name, form.format(name, "{lang}"))
                    for form in ("{0}_{1}", "{1}_{0}", "{0}.{1}", "{1}.{0}")
                ]
        assigned: dict[str, list[tuple[str, str]]] = {}
        for name, form in forms:
            before, _, after = form.partition("{lang}")
            found = []
            for column in columns:
                spelling = column.removeprefix(before).removesuffix(after)
                code = find_code(spelling) if before + spelling + after == column else None
                if code:
                    found.append((spelling != code, code, column))
            # a column with the code itself goes before one with the language's name
            for _, code, column in sorted(found):
                assigned.setdefault(code, []).append((name, column))
        return assigned

    def _read_text(self, fields: Fields, place: str) -> tuple[Text, str | None]:
        """The text of one language; and why it cannot be used, or None."""
        try:
            text = self._join_fields(fields, place)
        except Unusable as fault:
            return Text("", "", ""), str(fault)
        return text, find_fault(text)

    def _join_fields(self, fields: Fields, place: str) -> Text:
        """The text that the fields of one language make: a chat where there are turns."""
        # messages                              → its turns
        # prompt and completion with turns      → their turns
        # instruction, input, output            → a text
        # the same with system S and history    → a chat: S, q → a, instruction + input → output
        turns = parse_list(fields.find("messages"))
        if isinstance(turns, str):
            raise UserError(
                f"{place}: messages is a text that is neither JSON nor a Python list; write a "
                "list of turns"
            )
        system = _as_text(fields.find("system"), "system")
        values: list[Any] = [None] * len(TEXTS)
        if not isinstance(turns, list) or not turns:
            values = [fields.find(field) for field in TEXTS]
            # The prompt and its completion may be lists of turns.
            turns = [turn for part in (values[0], values[2]) if is_chat(part) for turn in part]
        if turns:
            return _chat_as_text([self._read_turn(turn) for turn in turns], system)
        names = [name for field in ("instruction", "output") for name in fields.columns(field)]
        if values[0] is None and values[2] is None and not fields.row.keys() & {*names}:
            raise UserError(
                f"{place}: no instruction and no output among the columns "
                f"{', '.join(fields.row) or '(none)'}; "
                f"set fields={{'instruction': COLUMN, 'output': COLUMN}}"
            )
        if "answers" in fields.read:
            values[2] = first_answer(values[2])
        for field, value in zip(TEXTS, values, strict=True):
            if isinstance(value, (list, dict)):
                raise UserError(
                    f"{place}: {field} is a {type(value).__name__}, not text; "
                    f"reach into it with a dotted path, e.g. fields={{'{field}': "
                    f"'instances.0.{field}'}}"
                )
        instruction, input, output = map(_as_text, values, TEXTS)
        history = parse_pairs(fields.find("history"))
        if history is None:  # a column of another meaning, which is not read
            fields.read.difference_update(fields.columns("history"))
        if not system and not history:
            return Text(instruction, input, output)
        request = f"{instruction}\n{input}" if input else instruction
        return _chat_as_text([*(history or ()), ("user", request), ("assistant", output)], system)

    def _read_turn(self, turn: Any) -> tuple[str, str]:
        """(role, text) of a chat turn."""
        if not isinstance(turn, dict):
            raise Unusable("chat turn that is not an object with role and content")
        name = turn.get("role") or turn.get("from")
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise Unusable(f"chat turn with role {str(name)[:40]!r}")
        content = turn.get("content")
        text = _turn_text(turn.get("value") if content is None else content, role)
        for key, value in turn.items():
            if key in TURN_KEYS or value in EMPTY or value != value:
                continue
            if key in TOOL_KEYS:
                raise Unusable("tool call in a chat turn")
            if key not in LEARN_KEYS:
                self._unread.add(f"messages[].{key}")
            elif value not in (0, 1):
                shown = str(value)[:40]
                raise Unusable(f"chat turn with {key} {shown!r}, which is neither 0 nor 1")
            elif not value and role == "assistant":
                role = MASKED
                self.masked_turns += 1
        return role, text


# ---- Chats

MASKED = "masked assistant"  # an assistant's turn that is read, but not learned
ANSWERING = ("assistant", MASKED)
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot"), "assistant"),
}
TURN_KEYS = ("role", "from", "content", "value")
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
LEARN_KEYS = ("weight", "train", "training", "loss")  # 0 or False: the turn is not learned


def to_turn(role: str, text: str) -> dict[str, Any]:
    """A chat turn as rows have it; `TextReader` reads it back."""
    if role == MASKED:
        return {"role": "assistant", "content": text, "weight": 0}
    return {"role": role, "content": text}


def _turn_text(value: Any, role: str) -> str:
    """The text of a turn; of a list of texts or {"type": "text", "text": …}, one line for each."""
    if value is None and role != "assistant":
        raise Unusable("chat turn without content")
    if not isinstance(value, list):
        return _as_text(value, "content of a chat turn")
    texts = [part.get("text") if isinstance(part, dict) else part for part in value]
    kinds = [part.get("type", "text") for part in value if isinstance(part, dict)]
    if not all(isinstance(text, str) for text in texts) or {*kinds} - {"text"}:
        raise Unusable("chat turn with parts that are not text")
    return "\n".join(texts)


# Kinds that need one prompt and one answer take the last exchange that is learned.
def _chat_as_text(turns: list[tuple[str, str]], system: str) -> Text:
    """A chat, with the system prompt first, as `Text`."""
    if system and turns[0] != ("system", system):
        if turns[0][0] == "system":
            raise Unusable("two system prompts that differ")
        turns = [("system", system), *turns]
    instruction = question = output = ""
    for role, text in turns:
        if role == "user":
            question = text
        elif role == "assistant":
            instruction, output = question, text
    if MASKED in dict(turns) and "assistant" not in dict(turns):
        raise Unusable("chat of which no turn is learned")
    return Text(instruction, "", output, tuple(turns))


# ---- Values and faults


def _as_text(value: Any, what: str) -> str:
    """A value as text: texts, whole numbers and null only; `Unusable` for others."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise Unusable(f"{what} is {JSON_NAMES.get(type(value), 'not text')}, not text")


def find_fault(text: Text) -> str | None:
    """Why a text cannot be used; None where it can."""
    # The order decides which reason is counted where a text has several faults.
    whole = text.instruction + text.input + text.output
    if text.messages:
        whole = "".join(content for _, content in text.messages)  # output is one of the turns
        roles = [role for role, _ in text.messages if role != "system"]
        turns = ["user", "assistant"] * (len(roles) // 2)
        if not roles or ["assistant" if role == MASKED else role for role in roles] != turns:
            return "chat turns out of order"
    if not text.output.strip():
        return "empty output"
    if any(role == "assistant" and not turn.strip() for role, turn in text.messages or ()):
        return "empty assistant turn"
    if "\0" in whole:
        return "NUL character"
    if len(whole) > MAX_CHARACTERS:
        return f"over {MAX_CHARACTERS} characters"
    try:
        whole.encode()
    except UnicodeEncodeError:
        return "lone surrogate"
    return None


def as_row(text: Text) -> tuple:
    """The columns of a text in the Arrow file."""
    messages = json.dumps(text.messages, ensure_ascii=False) if text.messages else None
    return text.instruction, text.input, text.output, messages


def _content(texts: dict[str, tuple[Text, str | None]]) -> str:
    """All texts of a row as one text, whose hash is the id of a row that has none."""
    return json.dumps([[code, *as_row(text)] for code, (text, _) in sorted(texts.items())])
