"""Translates what records lack: can be interrupted, caches by content, checks the results."""

import hashlib
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from crossin_jax.config import UserError
from crossin_jax.data.corpus import Corpus, Record, Text
from crossin_jax.data.langid import identify
from crossin_jax.data.records import to_turn
from crossin_jax.files import decode_text
from crossin_jax.languages import name_of
from crossin_jax.process import temporary

# Characters that a language needs for one character of English, measured on XQuAD. Other languages
# need about as many as English.
DENSITY: dict[str, float] = {
    "zh": 0.32,
    "ar": 0.87,
    "de": 1.14,
    "el": 1.14,
    "es": 1.13,
    "ro": 1.12,
    "ru": 1.08,
}
# A translation is flagged if it is longer or shorter than expected by more than this factor.
MAX_RATIO = 3.0
# Shorter texts are not checked: names and numbers are alike in many languages and vary in length.
CHECKED_CHARACTERS = 20
# texts that are translated at once
BATCH = 128

# (texts, source code, target code) → translations
Translate = Callable[[list[str], str, str], list[str]]


def request(source: str, target: str) -> str:
    """The instruction that an instruction-tuned model gets, with the text as its input."""
    return (
        f"Translate the following text from {name_of(source)} into {name_of(target)}. "
        f"Answer with the translation only."
    )


def find_flags(text: str, translation: str, source: str, target: str) -> list[str]:
    """What looks wrong: "empty", "copied source", "length ratio 4.2", "language en"."""
    if not text.strip():
        return []
    if not translation.strip():
        return ["empty"]
    flags = []
    if len(text) >= CHECKED_CHARACTERS:
        if translation.strip() == text.strip():
            return ["copied source"]
        ratio = len(translation) / len(text) / (DENSITY.get(target, 1.0) / DENSITY.get(source, 1.0))
        if not 1 / MAX_RATIO <= ratio <= MAX_RATIO:
            flags.append(f"length ratio {ratio:.2g}")
        seen = identify(translation, target)
        if seen not in (None, target) and {seen, target} != {"id", "ms"}:
            flags.append(f"language {seen}")
    return flags


class Cache:
    """Translations by content hash in an append-only file; a line that a crash cut is ignored."""

    def __init__(self, path: Path, engine: str):
        self.path, self.engine = path, engine
        self.entries: dict[str, str] = {}
        if path.is_file():
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    self.entries[entry["key"]] = entry["text"]
                except (ValueError, KeyError, TypeError):
                    continue

    def key(self, text: str, source: str, target: str) -> str:
        """The identity of a translation: by which engine, between which languages, of what."""
        content = json.dumps([self.engine, source, target, text])
        return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def add(self, entries: Sequence[tuple[str, str]]) -> None:
        """Appends, so that an interrupted run goes on here."""
        self.entries.update(entries)
        with open(self.path, "a", encoding="utf-8") as file:
            # A line that a crash cut short is closed, so that the next entry has a line of its own.
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write("\n")
            file.writelines(
                json.dumps({"key": k, "text": t}, ensure_ascii=False) + "\n" for k, t in entries
            )


def _parts(text: Text) -> list[str]:
    return (
        [content for _, content in text.messages]
        if text.messages
        else [text.instruction, text.input, text.output]
    )


def _join(parts: list[str], like: Text) -> dict[str, Any]:
    if like.messages:
        return {
            "messages": [
                to_turn(role, part) for (role, _), part in zip(like.messages, parts, strict=True)
            ]
        }
    return dict(zip(("instruction", "input", "output"), parts, strict=True))


def fill(
    corpus: Corpus,
    languages: Sequence[str],
    pivot: str,
    translate: Translate,
    out: Path,
    *,
    engine: str,
) -> Counter[str]:
    """Writes the corpus with every language to a JSONL file, and returns counts.

    Texts that a record has stay; those that it lacks are translated from `pivot`. Suspicious
    translations are kept, and listed in `flags` of the row. The cache is a file beside the output,
    and the output appears when it is complete.
    """
    if not all(corpus.has.get(pivot, [False])):
        raise UserError(
            f"{corpus.place}: some rows have no {pivot!r} to translate from; "
            f"set data.pivot to a language that all rows have, of {', '.join(corpus.languages)}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = Cache(out.with_name(out.name + ".cache.jsonl"), engine)
    counts: Counter[str] = Counter()
    for target in languages:
        if target != pivot:
            _fill_cache(corpus, pivot, target, translate, cache, counts)
    with temporary(out.with_name(out.name + ".part")) as part:
        with open(part, "w", encoding="utf-8") as file:
            for record in corpus:
                row = _complete(record, languages, pivot, cache, counts)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(part, out)
    return counts


def _missing(corpus: Corpus, pivot: str, target: str) -> Iterator[str]:
    for record in corpus:
        if target not in record.texts:
            yield from (part for part in _parts(record.texts[pivot]) if part.strip())


def _fill_cache(
    corpus: Corpus, pivot: str, target: str, translate: Translate, cache: Cache, counts: Counter
) -> None:
    texts = {cache.key(text, pivot, target): text for text in _missing(corpus, pivot, target)}
    todo = [(key, text) for key, text in texts.items() if key not in cache.entries]
    counts[f"{target}: texts from the cache"] += len(texts) - len(todo)
    counts[f"{target}: texts translated"] += len(todo)
    # Texts of about the same length share a batch, so that little of it is padding.
    todo.sort(key=lambda entry: len(entry[1]))
    for start in tqdm(
        range(0, len(todo), BATCH), desc=f"translate {pivot}→{target}", unit=" batches", delay=2
    ):
        batch = todo[start : start + BATCH]
        results = translate([text for _, text in batch], pivot, target)
        if len(results) != len(batch):
            raise UserError(
                f"the translator gave {len(results)} translations for {len(batch)} texts; "
                f"it must answer line by line"
            )
        cache.add([(key, result.strip()) for (key, _), result in zip(batch, results, strict=True)])


def _complete(
    record: Record, languages: Sequence[str], pivot: str, cache: Cache, counts: Counter
) -> dict[str, Any]:
    row: dict[str, Any] = {"id" if "id" not in languages else "row_id": record.id}
    flags: dict[str, list[str]] = {}
    for code in languages:
        if code in record.texts:
            row[code] = _join(_parts(record.texts[code]), record.texts[code])
            continue
        source = record.texts[pivot]
        parts = [
            cache.entries[cache.key(part, pivot, code)] if part.strip() else part
            for part in _parts(source)
        ]
        row[code] = _join(parts, source)
        counts[f"{code}: records filled"] += 1
        found = [
            flag
            for text, part in zip(_parts(source), parts, strict=True)
            for flag in find_flags(text, part, pivot, code)
        ]
        if found:
            flags[code] = found
            counts.update({f"{code}: flagged {flag.split(' ')[0]}": 1 for flag in found})
    return row | ({"flags": flags} if flags else {})


def run_command(command: str) -> Translate:
    """A translator that runs a shell command per batch.

    The command reads JSON lines {"text", "source", "target"} and writes a JSON text per line.
    """

    def translate(texts: list[str], source: str, target: str) -> list[str]:
        lines = "".join(
            json.dumps({"text": text, "source": source, "target": target}, ensure_ascii=False)
            + "\n"
            for text in texts
        )
        result = subprocess.run(command, shell=True, input=lines.encode(), capture_output=True)
        if result.returncode:
            said = result.stderr.decode(errors="replace").strip() or "no message"
            reason = said.splitlines()[-1]
            raise UserError(f"--command={command!r} ended with code {result.returncode}: {reason}")
        # Only "\n" ends a line: U+2028 and the like are characters of a translation.
        text = decode_text(result.stdout, f"--command={command!r}").removesuffix("\n")
        answers = [_read_answer(line.removesuffix("\r")) for line in text.split("\n") if text]
        return [answer["text"] if isinstance(answer, dict) else answer for answer in answers]

    return translate


def _read_answer(line: str) -> Any:
    """A line of a command's output: JSON, or the translation itself."""
    return json.loads(line) if line[:1] in ('"', "{") else line
