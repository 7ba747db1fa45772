"""Where the rows of a benchmark are: a file, a folder, a file per language, or the Hub."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crossin_jax.config import UserError
from crossin_jax.data.readers import ENDINGS, File, read_rows
from crossin_jax.evaluation.layouts import Row
from crossin_jax.evaluation.registry import AbsentBenchmark
from crossin_jax.languages import find_code, find_files, match_spellings, read_ending
from crossin_jax.paths import as_path

NAMES = tuple(ending + packed for ending in ENDINGS for packed in ("", ".gz"))


@dataclass(slots=True)
class Rows:
    """Rows in the order of the source, each with its language where the place of the row says it.

    A row is (language or None, part, columns); `part` names one of several files of a language.
    `is_published`: the user cannot correct a faulty row.
    """

    label: str
    place: str
    is_published: bool = False
    rows: list[tuple[str | None, str, Row]] = field(default_factory=list)

    def add(self, code: str | None, part: str, rows: Iterator[tuple[int, Row]]) -> None:
        """Adds the rows of one file."""
        self.rows += [(code, part, row) for _, row in rows]


def is_hub_name(name: str) -> bool:
    """Whether a name looks like a Hub id: OWNER/NAME, maybe with a configuration."""
    return "/" in name and not name.startswith((".", "/", "~")) and not name.endswith(NAMES)


def needs_network(name: str) -> bool:
    """Whether a name is a Hub id of which nothing is here."""
    return is_hub_name(name) and not as_path(name.partition(":")[0]).exists()


# What a name may be, and what is read for the language zh and the split test:
#
#     items.jsonl              that file, whose rows or columns say their language
#     data/mmlu_{lang}.json    data/mmlu_zh.json
#     data, a folder           data/test/NAME_zh.csv, data/NAME_zh.csv or data/TASK/SOURCE/zh.csv
#     data, a clone            the configuration zh of the data set that its README describes
def read_path(name: str, codes: Sequence[str], split: str) -> Rows | None:
    """The rows of a file, of a folder, or of a path with {lang} and maybe {split}.

    A folder holds a file per language (mmlu_zh.parquet), in a folder named like the split where
    there is one, or in folders of tasks and sources (monolingual/aya/zh.csv). A folder that was
    cloned from the Hub is read as the Hub is. None where nothing has that name.
    """
    if "{lang}" in name.partition(":")[2]:
        return read_hub(name, codes, split)
    path = as_path(name.replace("{split}", split))
    if "{lang}" in name:
        label = path.stem.replace("{lang}", "").rstrip("_-. ") or path.parent.name
        if label == split:
            label = path.parent.parent.name
        return _read_each(name, str(path), label, codes)
    if path.is_file():
        found = Rows(path.name.split(".")[0], str(path))
        found.add(None, "", read_rows(File(str(path), None, _layout_of(path))))
        return found
    if not path.is_dir():
        folder, _, configuration = name.rpartition(":")
        return read_hub(name, codes, split) if configuration and _is_clone(folder) else None
    if _is_clone(str(path)):
        return read_hub(name, codes, split)
    inner = path / split
    if inner.is_dir():
        return _read_each(name, str(inner), path.name, codes)
    if any(read_ending(file.name.split(".")[0]) for file in path.iterdir() if file.is_file()):
        return _read_each(name, str(path), path.name, codes)
    return _read_tree(name, path, codes)


def read_hub(name: str, codes: Sequence[str], split: str, parts: Sequence[str] = ("",)) -> Rows:
    """The rows of a Hub data set, or of a folder in its layout: ID, ID:CONFIGURATION or ID:FILE.

    {lang} in the configuration is the language as the data set spells it. Without a configuration,
    those that are named like the wanted languages are read; a data set without any is read whole,
    as "ID:" is.
    """
    place, colon, configuration = name.partition(":")
    label = (configuration if "{" not in configuration else "").split("/")[-1]
    found = Rows(label or place.rstrip("/").split("/")[-1], name.removesuffix(":"), True)
    if configuration.endswith(NAMES):
        for part in parts:
            pattern = configuration.replace("{part}", part).replace("{split}", split)
            for code, file in _find_hub_files(place, pattern, codes).items():
                found.add(code, part, read_rows(File(str(file), code, _layout_of(file))))
        return found
    if colon and "{lang}" not in configuration:
        found.add(None, "", read_rows(File(name, None, "hub"), split))
        return found
    chosen = _find_configurations(place, configuration or "{lang}", codes)
    if not chosen and not configuration:
        found.add(None, "", read_rows(File(place, None, "hub"), split))
    for code, each in chosen.items():
        found.add(code, "", read_rows(File(f"{place}:{each}", code, "hub"), split))
    return found


def has_split(name: str, codes: Sequence[str], split: str) -> bool:
    """Whether a source has another split, such as the examples for few-shot prompts."""
    import datasets

    place, _, configuration = name.partition(":")
    path = as_path(name)
    if "{split}" in name or (path / split).is_dir():
        # a file of the first language stands for all
        try:
            return read_path(name, codes[:1], split) is not None
        except UserError:
            return False
    if not (_is_clone(place) or is_hub_name(name)):
        return False
    if configuration.endswith(NAMES):
        return False
    if not configuration or "{lang}" in configuration:
        chosen = _find_configurations(place, configuration or "{lang}", codes[:1])
        configuration = next(iter(chosen.values()), "")
    try:
        return split in datasets.get_dataset_split_names(place, configuration or None)
    except Exception:  # the library raises many kinds; the rows themselves have been read
        return False


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def _layout_of(path: Path) -> str:
    ending = Path(path.name.removesuffix(".gz")).suffix
    if ending not in ENDINGS:
        raise UserError(f"{path}: the ending {ending!r} is not one of {', '.join(ENDINGS)}")
    return ENDINGS[ending]


def _read_each(name: str, place: str, label: str, codes: Sequence[str]) -> Rows:
    """The file of each language, whose name has the language in any spelling: mmlu_zh.json,
    mmlu_ZH-CN.json.
    """
    rows = Rows(label, name)
    for code, found in find_files(place, codes, NAMES, True).items():
        if not found:
            expected = f"{place}/NAME_{code}.json"
            if "{lang}" in place:
                expected = place.replace("{lang}", code)
            raise AbsentBenchmark(
                f"benchmark {name!r}: no file {expected} for language {code!r}; "
                f"add it, or leave {code!r} out of the languages"
            )
        if len(found) > 1:
            raise UserError(
                f"benchmark {name!r}: {', '.join(p.name for p in found)} could all be {code!r}; "
                "keep one file per language"
            )
        rows.add(code, "", read_rows(File(str(found[0]), code, _layout_of(found[0]))))
    return rows


def _read_tree(name: str, path: Path, codes: Sequence[str]) -> Rows:
    """The files of folders in folders: TASK/SOURCE/LANGUAGE.csv. Not every source has every
    language.
    """
    rows = Rows(path.name, name)
    for file in sorted(path.glob("*/*/*")):
        if not file.name.endswith(NAMES) or find_code(file.name.split(".")[0]) not in codes:
            continue
        task, source = file.parts[-3:-1]
        labels = {"task": task, "source": source}
        for number, row in read_rows(File(str(file), None, _layout_of(file))):
            part = f"{task}/{source}"
            rows.add(find_code(file.name.split(".")[0]), part, iter([(number, labels | row)]))
    if not rows.rows:
        raise UserError(
            f"benchmark {name!r}: no file {path}/NAME_{codes[0]}.json for language {codes[0]!r}, "
            f"and no TASK/SOURCE/{codes[0]}.csv; add it, or leave {codes[0]!r} out"
        )
    return rows


# ── the Hub, and folders in its layout ────────────────────────────────────────────────────────────


def _is_clone(place: str) -> bool:
    """Whether a folder is a data set in the Hub's layout: its README lists configurations."""
    readme = as_path(place) / "README.md"
    return readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace")


def _find_configurations(place: str, pattern: str, codes: Sequence[str]) -> dict[str, str]:
    """The configuration of each language; none where none is named like a language."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(place)
    except Exception as error:  # as in `read_rows`: whatever it is, the name cannot be read
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Hub data set {place!r}: {reason}; check the name and the connection"
        ) from None
    chosen = _by_language(names, pattern, codes)
    if missing := [code for code in codes if code not in chosen]:
        if pattern == "{lang}" and not any(map(find_code, names)):
            return {}
        raise UserError(
            f"Hub data set {place!r}: no configuration for language {missing[0]!r}; it has "
            f"{', '.join(names[:50])}; leave {missing[0]!r} out of the languages"
        )
    return {code: chosen[code] for code in codes}


def _find_hub_files(place: str, pattern: str, codes: Sequence[str]) -> dict[str, Path]:
    import huggingface_hub

    folder = as_path(place)
    try:
        if folder.is_dir():
            names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        else:
            names = huggingface_hub.HfApi().list_repo_files(place, repo_type="dataset")
        chosen = _by_language(names, pattern, codes)
        if missing := [code for code in codes if code not in chosen]:
            raise UserError(
                f"Hub data set {place!r}: no file {pattern.replace('{lang}', missing[0])}; "
                f"leave {missing[0]!r} out of the languages"
            )
        if folder.is_dir():
            return {code: folder / chosen[code] for code in codes}
        get = huggingface_hub.hf_hub_download
        return {code: Path(get(place, chosen[code], repo_type="dataset")) for code in codes}
    except UserError:
        raise
    except Exception as error:  # as in `read_rows`
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Hub data set {place!r}, {pattern}: {reason}; check the name and the connection"
        ) from None


def _by_language(names: Sequence[str], pattern: str, codes: Sequence[str]) -> dict[str, str]:
    """The name for each language among names that follow a pattern with {lang}."""
    form = re.compile("(.+)".join(map(re.escape, pattern.split("{lang}"))))
    spellings = {found[1]: name for name in names if (found := form.fullmatch(name))}
    languages = {spelling: find_code(spelling) for spelling in spellings}
    matched = match_spellings(languages, codes, with_varieties=True)
    return {code: spellings[found[0]] for code, found in matched.items() if found}
