"""All that is known of languages: codes, names, and the sentences that no library has.

Any language of ISO 639 goes, in any usual spelling: `canonical("Chinese")`, `canonical("zho_Hans")`
and `canonical("zh-CN")` are all "zh". The libraries langcodes (codes) and Babel (CLDR's names) know
the languages; languages.toml holds only what they lack. They are opened when a language outside it
is first asked for.
"""

import functools
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crossin_jax.config import UserError
from crossin_jax.paths import as_path, find_paths


@dataclass(frozen=True, slots=True)
class Language:
    """An entry of languages.toml, which explains the fields."""

    code: str
    english: str = ""
    request: str = ""
    translation: str = ""
    names: dict[str, str] = field(default_factory=dict)
    lower_names: bool = False
    spellings: Sequence[str] = ()
    announce: Sequence[str] = ()
    option: Sequence[str] = ()
    letters: str = ""
    words: str = ""


ENTRIES: dict[str, Language] = {
    code: Language(code, **entry)
    for code, entry in tomllib.loads(
        Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    ).items()
}
# The English names of the languages that SeaEval's and XQuAD's files have
LANGUAGES: dict[str, str] = {row.code: row.english for row in ENTRIES.values() if row.english}
_SPELLINGS = {
    spelling: row.code for row in ENTRIES.values() for spelling in (row.code, *row.spellings)
}
_SPELLINGS |= {name.lower(): code for code, name in LANGUAGES.items()}
# As published data sets spell them: X-CSQA, P-MMEval, INCLUDE
_SPELLINGS |= {"jap": "ja", "vi-vt": "vi", "north macedonian": "mk"}

# Codes that ISO 639 has and that name no language
_NO_LANGUAGE = re.compile("und|mul|mis|zxx|q[a-t][a-z]")
_TAG = re.compile(r"[a-z]{2,3}([-_][a-z0-9]{2,8})*", re.IGNORECASE)
# Akan and Twi are one language in CLDR, but FLORES has both. MMMLU's LA is Latin America, not Laos.
_KEPT_LANGUAGES = {"tw"}
_REGIONS = {"es-LA": "419"}
# CLDR takes Brazil for granted in Portuguese; but data sets have Brazilian beside European
# Portuguese.
_KEPT_REGIONS = {"pt-BR"}
_UNSPACED = {"Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"}


# ── codes ─────────────────────────────────────────────────────────────────────────────────────────


def canonical(value: str, place: str = "") -> str:
    """The one code of a language, given in any usual spelling; raises UserError for what names no
    language.

    Spellings are codes of two or three letters with script and region ("fra_Latn", "zh-TW"), names
    in English ("ENGLISH", "Simplified Chinese") and in the language itself. The code keeps a script
    or region only where it is not the usual one of the language and makes a difference: "zh_Hans"
    is "zh", "zh-TW" is "zh-Hant", "en-US" is "en", "en-GB" stays. `place` says in the message where
    the value was found.
    """
    code = find_code(value) if isinstance(value, str) else None
    if code is None:
        raise UserError(
            f"{place}{': ' if place else ''}{value!r} is not a known language{_near(value)}; "
            "give a code such as fr or zh-Hant, or an English name"
        )
    return code


@functools.lru_cache(maxsize=4096)
def find_code(value: str) -> str | None:
    """Like `canonical`, but None for what names no language."""
    text = value.strip()
    if known := _SPELLINGS.get(text.lower()):
        return known
    if _TAG.fullmatch(text) and (code := _parse_tag(text)):
        return code
    return _find_name(re.sub(r"[-_\s]+", " ", text))


def canonical_list(values: Iterable[str], place: str) -> tuple[str, ...]:
    """The codes of several languages in their order; raises UserError where two name the same
    language.
    """
    found: dict[str, str] = {}
    for value in values:
        code = canonical(value, place)
        if code in found:
            raise UserError(
                f"{place} names a language twice: {found[code]!r} and {value!r} are both {code}; "
                "name each once"
            )
        found[code] = value
    return tuple(found)


def match(value: str, wanted: Sequence[str]) -> str | None:
    """Which of the wanted codes serves text in the language `value`, or None; raises UserError
    like `canonical`.

    Beside the same language this is the language in general: "en-GB" serves "en", and "zh-TW"
    serves "zh" where "zh-Hant" is not wanted itself. "pt" is Brazilian where nothing else is said,
    so it serves "pt-BR".
    """
    code = canonical(value)
    general = [code, _split_region(code)[0], code.split("-")[0]]
    general += [other for other in sorted(_KEPT_REGIONS) if _split_region(other)[0] == code]
    return next((other for other in general if other in wanted), None)


def _split_region(code: str) -> tuple[str, str]:
    """ "en-GB" → ("en", "GB"), "zh-Hant" → ("zh-Hant", "")."""
    found = re.fullmatch(r"(.+)-([A-Z]{2}|\d{3})", code)
    return (found[1], found[2]) if found else (code, "")


def _parse_tag(text: str) -> str | None:
    import langcodes

    # langcodes corrects what is out of date ("iw" → "he") and takes three letters for two ("fra"
    # → "fr")
    tag = langcodes.Language.get(text)
    if not tag.is_valid() or not tag.language or _NO_LANGUAGE.fullmatch(tag.language):
        return None
    language = tag.language
    # A macrolanguage stands for the member that people mean by it: "arb" (Standard Arabic) → "ar"
    if language not in _KEPT_LANGUAGES:
        language = langcodes.standardize_tag(language, macro=True).split("-")[0]
    return _shorten(language, tag.script, tag.territory)


def _shorten(language: str, script: str | None, region: str | None) -> str:
    """Leaves out a script or region that is the usual one (CLDR's likely subtags)."""
    from langcodes import Language as Tag

    region = _REGIONS.get(f"{language}-{region}", region)
    usual = Tag.make(language).maximize()
    full = Tag.make(language, script=script, territory=region).maximize()
    code = language
    # Of a language that CLDR does not know it says Latn and US: then nothing tells whether
    # the script is the usual one
    is_known = (usual.script, usual.territory) != ("Latn", "US") or language == "en"
    # Hangul alone is how all Korean is written; CLDR's Kore is Hangul with Han
    if is_known and full.script not in (usual.script, "Hang"):
        code += f"-{full.script}"
    likely = Tag.get(code).maximize().territory
    # a region matters where CLDR gives the variety a name of its own: "British English", but not
    # "English (India)"
    is_named = f"{language}_{region}" in _cldr("en").languages and region != "001"
    if f"{language}-{region}" in _KEPT_REGIONS or region != likely and is_named:
        code += f"-{region}"
    return code


def _find_name(text: str) -> str | None:
    # "Chinese (Traditional)", "Portuguese (Brazil)": the text in brackets is a script or a
    # territory
    base, qualifier = re.fullmatch(r"(.*?)\s*(?:[(（](.*)[)）])?", text, re.DOTALL).groups()
    found = _look_up("language", text) or _look_up("language", base)
    if not found or not qualifier or "-" in found:
        return _parse_tag(found) if found else None
    part = _look_up("script", qualifier) or _look_up("territory", qualifier)
    return _parse_tag(f"{found}-{part.removeprefix('und-')}") if part else None


def _look_up(kind: str, name: str) -> str | None:
    """The code of an English name, else of a name in any language. langcodes.find would take
    "Frenchy" for French.
    """
    from language_data.names import get_trie_value, normalize_name

    key = normalize_name(name)
    tries = (_names(kind, language) for language in ("en", "und"))
    return next((get_trie_value(trie, key) for trie in tries if key in trie), None)


@functools.cache
def _names(kind: str, language: str):
    from language_data.names import data_filename, load_trie

    return load_trie(data_filename(f"trie/{language}/name_to_{kind}.marisa"))


def _near(value: str) -> str:
    """The words "; did you mean X?" for an unknown value."""
    import difflib

    from langcodes import Language as Tag

    text = str(value).strip()
    if re.fullmatch("[A-Za-z]{2}", text):  # a country's code instead of a language's: "jp"
        language = Tag.make(territory=text.upper()).maximize().language
        if language and language != "en":
            return f"; did you mean {language} ({name_of(language)})?"
    names = {name.lower(): code for code, name in _cldr("en").languages.items()}
    if near := difflib.get_close_matches(text.lower(), list(names), n=1, cutoff=0.75):
        code = canonical(names[near[0]])
        return f"; did you mean {code} ({name_of(code)})?"
    return ""


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


def name_of(code: str) -> str:
    """The English name of a language, "French" for "fr"; a value that names none comes back as it
    is.
    """
    code = find_code(code) or code
    if code in LANGUAGES or find_code(code) is None:
        return LANGUAGES.get(code, code)
    from langcodes import Language as Tag

    return translate_name(code, "en") or Tag.get(code).display_name("en")


@functools.lru_cache(maxsize=4096)
def translate_name(code: str, into: str) -> str | None:
    """CLDR's name of a language in another one: ("ja", "fr") → "japonais"; None where CLDR has
    none.
    """
    locale = _cldr(into)
    if locale is None:
        return None
    key = code.replace("-", "_")
    if name := locale.languages.get(key):
        return name
    # "Serbian (Latin)": no name of its own, so language and script or region
    language, *parts = key.split("_")
    qualifiers = [locale.scripts.get(part) or locale.territories.get(part) for part in parts]
    if language not in locale.languages or not all(qualifiers):
        return None
    return f"{locale.languages[language]} ({', '.join(qualifiers)})" if parts else None


@functools.lru_cache(maxsize=256)
def _cldr(code: str):
    """CLDR's words in a language, or None where it has none."""
    from babel import Locale, UnknownLocaleError

    try:
        return Locale.parse(code.replace("-", "_"))
    except (UnknownLocaleError, ValueError):
        return None


def request_language(prompt_language: str, answer_language: str) -> tuple[str, bool]:
    """The sentence that asks for an answer's language, and whether it is in the prompt's language.

    It is in English where languages.toml has no sentence in the prompt's language, or CLDR no name
    of the other one.
    """
    own = _fill("request", prompt_language, answer_language)
    return own or ENTRIES["en"].request.format(name_of(answer_language)), own is not None


def request_translation(prompt_language: str, answer_language: str) -> str | None:
    """The sentence in the prompt's language that asks for a translation; None as in
    `request_language`.
    """
    return _fill("translation", prompt_language, answer_language)


def _fill(sentence: str, prompt_language: str, answer_language: str) -> str | None:
    row = ENTRIES.get(prompt_language) or ENTRIES.get(_split_region(prompt_language)[0])
    if row is None or not getattr(row, sentence):
        return None
    name = row.names.get(answer_language) or translate_name(answer_language, row.code)
    if name and row.lower_names:
        name = name[0].lower() + name[1:]
    return name and getattr(row, sentence).format(name)


@functools.lru_cache(maxsize=1024)
def is_spaced(code: str) -> bool:
    """Whether the language puts spaces between words."""
    return find_code(code) is None or script_of(code) not in _UNSPACED


def script_of(code: str) -> str:
    """The script that a language is written in, as a code of ISO 15924: "zh" → "Hans".

    "Zyyy" (undetermined) for a name that is no language's, as columns of a log may have.
    """
    from langcodes import Language as Tag

    found = find_code(code)
    return Tag.get(found).maximize().script if found else "Zyyy"


def name_script(script: str) -> str:
    """The English name of a script, "Cyrillic" for "Cyrl"; simplified and traditional are both
    "Han".
    """
    if script in ("Hans", "Hant"):
        script = "Hani"
    return _cldr("en").scripts.get(script, script)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────


def find_files(
    pattern: str, codes: Sequence[str], endings: Sequence[str] = (), with_varieties: bool = False
) -> dict[str, list[Path]]:
    """For each code the files that a path with {lang}, or a folder, has for it, whatever the
    spelling of the language.

    In a folder these are the files with one of the endings whose names end with the language:
    mmlu_ZH-CN.json. A file that has the code itself in its name goes before others;
    `with_varieties` as in `match_spellings`.
    """
    whole = as_path(pattern)
    if "{lang}" not in pattern:
        named = [
            (path.name[: -len(ending)], path)
            for path in sorted(whole.iterdir())
            if (ending := next((e for e in endings if path.name.endswith(e)), None))
        ]
        languages = {stem: read_ending(stem) for stem, _ in named}
    else:
        parts = [re.escape(part) for part in str(whole).split("{lang}")]
        # each place has the same spelling: {lang}/train.{lang}.jsonl
        form = re.compile(parts[0] + "(?P<lang>[^/]+)" + "(?P=lang)".join(parts[1:]))
        paths = find_paths(pattern.replace("{lang}", "*"))
        named = [(match["lang"], path) for path in paths if (match := form.fullmatch(str(path)))]
        languages = {stem: find_code(stem) for stem, _ in named}
    return {
        code: [path for stem, path in named if stem in stems]
        for code, stems in match_spellings(languages, codes, with_varieties).items()
    }


def match_spellings(
    languages: Mapping[str, str | None], codes: Sequence[str], with_varieties: bool = False
) -> dict[str, list[str]]:
    """For each code the names of that language, of names with their languages.

    A name that has the code itself goes before others. With varieties, one of them serves a
    language that has no name itself: "mmlu_ES-LA" serves "es".
    """
    found: dict[str, list[str]] = {}
    for code in codes:
        mine = [name for name, language in languages.items() if language == code]
        # "train_zh" has the code itself, "train_Chinese" has not
        exact = [name for name in mine if re.search(rf"(^|[-_. ]){code}$", name)]
        varieties = [
            name
            for name, language in languages.items()
            if with_varieties and not mine and language and match(language, [code])
        ]
        found[code] = exact or mine or varieties
    return found


def read_ending(stem: str) -> str | None:
    """The language that a name ends with: "mmlu_ZH-CN" and "dev.zho_Hans" → "zh"; None for none."""
    pieces = re.split(r"([-_.\s])", stem)
    # the longest ending goes first: "zho_Hans" before "Hans"; a code has up to three parts
    for start in range(max(0, len(pieces) - 5) // 2 * 2, len(pieces), 2):
        if code := find_code("".join(pieces[start:])):
            return code
    return None
