"""The embedded world: facts about 246 territories from CLDR (PyPI package babel).

It is a data set and a benchmark that need no download, parallel in seven languages.

| relation | facts | answers | from CLDR 47 (babel 2.18) |
|---|---|---|---|
| currency | 245 | 153 | legal tender on 1 January 2025; of several, that of the territory's code |
| language | 244 | 85 | official or de facto; of several, CLDR's likeliest, or the most spoken |
| time_zone | 211 | 79 | the name of the zone, if all zones of the territory share one |
| continent | 221 | 5 | prefix of the names of the territory's time zones, if all agree |

A fact is kept only if all seven languages name its territory and its answer. So row ids do not
depend on the languages in use. Not included: week start and script (most territories share one
answer), and containment (babel does not carry it).

Splits: territories are ranked by a hash of (seed, territory). The first 50 % are train, the next
10 % dev, the last 40 % test; "held_out" is dev and test. A split has the relations currency,
language and continent; "train/time_zone" names another one.

`continent` is the shared relation: it is stated in every language, also for held-out territories,
and it is never tested.
"""

import datetime
import functools
import hashlib
import random
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crossin_jax.config import UserError, hint
from crossin_jax.data.corpus import Record, Text
from crossin_jax.data.kinds import add_tag
from crossin_jax.languages import name_of
from crossin_jax.world.phrasings import ASK, LANGUAGE_FORM, TELL, join, with_article

WORLD_LANGUAGES = tuple(TELL)
TESTED = ("currency", "language", "time_zone")
CORE = ("currency", "language", "continent")  # the relations of a split that names none
SHARED = "continent"
PARTS = ("train", "dev", "test", "held_out", "all")
SLICES = ("en", "x", "dict", "cs")
_TEXTS = ("text", *(f"text/{piece}" for piece in SLICES))
_CONTINENTS = {
    "Africa": "002",
    "America": "019",
    "Asia": "142",
    "Europe": "150",
    "Pacific": "009",
    "Australia": "009",
}
# Without a date babel takes today's, and the corpus would change over time.
_TENDER_DATE = datetime.date(2025, 1, 1)


@dataclass(frozen=True, slots=True)
class Fact:
    """A territory's answer under a relation.

    `acceptable` has every true answer, e.g. all official languages.
    """

    relation: str
    territory: str
    answer: str
    acceptable: frozenset[str]

    @property
    def id(self) -> str:
        return f"{self.relation}/{self.territory}"


# ---- Facts and names


@functools.cache
def _names(language: str) -> dict[str, dict[str, str]]:
    """CLDR's names by relation and code; "territory" and "continent" come from the same table."""
    from babel import Locale

    locale = Locale.parse(language)
    # A meta zone is a name such as "Central European Time". Several time zones share it.
    zones = {
        code: zone["long"].get("generic") or zone["long"].get("standard")
        for code, zone in locale.meta_zones.items()
        if "long" in zone
    }
    form = LANGUAGE_FORM[language]
    return {
        "territory": dict(locale.territories),
        "continent": dict(locale.territories),
        "currency": dict(locale.currencies),
        "language": {code: form.format(name) for code, name in locale.languages.items()},
        "time_zone": {code: name for code, name in zones.items() if name},
    }


def name(kind: str, code: str, language: str) -> str:
    """The name of a concept, e.g. ("currency", "EUR", "zh") → 欧元."""
    return _names(language)[kind][code]


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Every fact that all seven languages can name, sorted by relation and territory."""
    from babel.core import get_global

    # babel lists the territories by their time zones: "FR" → ["Europe/Paris"].
    found = []
    for territory, zones in sorted(get_global("territory_zones").items()):
        if territory in ("AQ", "ZZ") or not territory.isalpha():
            continue  # Antarctica, "unknown", and the world as a whole
        for relation, answers in _find_answers(territory, zones).items():
            if answers and all(
                territory in _names(lang)["territory"] and answers[0] in _names(lang)[relation]
                for lang in WORLD_LANGUAGES
            ):
                found.append(Fact(relation, territory, answers[0], frozenset(answers)))
    return tuple(sorted(found, key=lambda fact: fact.id))


def _find_answers(territory: str, zones: Sequence[str]) -> dict[str, list[str]]:
    """By relation every true answer for a territory, the one that we take first."""
    from babel.core import get_global
    from babel.languages import get_official_languages
    from babel.numbers import get_territory_currencies

    # Sorting is stable and False sorts before True: the preferred answer comes first.
    tender = get_territory_currencies(territory, _TENDER_DATE)
    tender.sort(key=lambda code: not code.startswith(territory))
    likely = get_global("likely_subtags").get(f"und_{territory}", "en").split("_")[0]
    official = [code.split("_")[0] for code in get_official_languages(territory, de_facto=True)]
    official.sort(key=lambda code: code != likely)
    time_zones = {get_global("meta_zones").get(zone) for zone in zones}
    continents = {_CONTINENTS.get(zone.split("/")[0]) for zone in zones} - {None}
    if territory == "TR":
        continents = set()  # Turkey is on two; its zone only says where Istanbul lies
    return {
        "currency": tender,
        "language": official,
        "time_zone": list(time_zones) if len(time_zones) == 1 else [],
        "continent": list(continents) if len(continents) == 1 else [],
    }


def _hash(*parts: Any) -> int:
    content = "\t".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


@functools.cache
def territory_parts(seed: int = 0) -> dict[str, str]:
    """The part of each territory: "train" (half), "dev" (a tenth) or "test"."""
    territories = {fact.territory for fact in facts()}
    ranked = sorted(territories, key=lambda territory: _hash(seed, territory))
    train, dev = (round(len(ranked) * share) for share in (0.5, 0.6))
    parts = ["train"] * train + ["dev"] * (dev - train) + ["test"] * (len(ranked) - dev)
    return dict(zip(ranked, parts, strict=True))


def _parse(split: str, known: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The part and the relations of a split.

    "train" → ("train", CORE); "text/en/time_zone" → ("text/en", ("time_zone",)).
    """
    if split in known:
        return split, CORE
    part, _, relation = split.rpartition("/")
    if part in known and relation in (*TESTED, SHARED):
        return part, (relation,)
    raise UserError(
        f"split={split!r} is not a split of the embedded world{hint(split, known)}; "
        f"use {', '.join(known)}, alone or with /{', /'.join((*TESTED, SHARED))}"
    )


def _check_languages(languages: Sequence[str]) -> None:
    for code in languages:
        if code not in WORLD_LANGUAGES:
            raise UserError(
                f"languages: the embedded world has no {code!r}; "
                f"use some of {', '.join(WORLD_LANGUAGES)} (evaluation.languages for the benchmark "
                "alone), or data and benchmarks of your own"
            )


def check_split(split: str, languages: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The part and the tested relations of a split of Cross-World; refuses one without any, and
    languages that the world does not have.
    """
    _check_languages(languages)
    part, relations = _parse(split, PARTS)
    tested = tuple(relation for relation in relations if relation in TESTED)
    if not tested:
        raise UserError(
            f"split={split!r}: {SHARED} is stated in every language and never tested; "
            f"use {', '.join(TESTED)}"
        )
    return part, tested


def _select(part: str, relations: tuple[str, ...], seed: int) -> list[Fact]:
    """The facts of a part. Held-out parts lack the shared relation, which every text states."""
    parts = territory_parts(seed)
    wanted = {"all": ("train", "dev", "test"), "held_out": ("dev", "test")}.get(part, (part,))
    return [
        fact
        for fact in facts()
        if fact.relation in relations
        and parts[fact.territory] in wanted
        and (part in ("train", "all") or fact.relation != SHARED)
    ]


# ---- Instruction records


def question(fact: Fact, language: str) -> str:
    """The fact as an instruction; a hash of its id selects the phrasing, for all languages
    alike.
    """
    phrasings = ASK[language][fact.relation]
    entity = with_article(name("territory", fact.territory, language), language)
    return join(phrasings[_hash(fact.id) % len(phrasings)], e=entity)


def world_records(split: str, languages: Sequence[str], seed: int = 0) -> list[Record]:
    """Instruction records of a split (`PARTS`) in some languages, with ids like "currency/FR"."""
    _check_languages(languages)
    part, relations = _parse(split, PARTS)

    def text(fact: Fact, lang: str) -> Text:
        return Text(question(fact, lang), "", name(fact.relation, fact.answer, lang))

    return [
        Record(fact.id, {lang: text(fact, lang) for lang in languages})
        for fact in _select(part, relations, seed)
    ]


# ---- Text for pretraining


def _tell(fact: Fact, phrasing: int, language: str, entity_language: str) -> str:
    """A statement in one language, with the territory's name in the same or another language."""
    entity = name("territory", fact.territory, entity_language)
    answer = name(fact.relation, fact.answer, language)
    if entity_language == language:  # a name of another language has no article
        entity = with_article(entity, language)
    if fact.relation == "continent":
        answer = with_article(answer, language)
    return join(TELL[language][fact.relation][phrasing], e=entity, a=answer)


@functools.cache
def _text(
    piece: str, relations: tuple[str, ...], languages: tuple[str, ...], seed: int
) -> tuple[Record, ...]:
    """One slice of the text, see `world_text`."""
    # An id names the slice, the fact, the phrasing and the languages: "cs/currency/FR/2/es+zh".
    known = [fact for fact in facts() if fact.relation in relations]
    pairs = [(a, b) for a in languages for b in languages if a != b]
    if piece == "dict":
        concepts = {(fact.relation, fact.answer) for fact in known}
        concepts |= {("territory", fact.territory) for fact in known}
        lines = [
            (f"{kind}/{code}/{a}+{b}", b, f"{name(kind, code, a)} = {name(kind, code, b)}")
            for kind, code in sorted(concepts)
            for a, b in pairs
        ]
    else:
        # (end of the id, language of the sentence, language of the territory's name)
        forms = {
            "en": [("", "en", "en")],
            "x": [(f"/{lang}", lang, lang) for lang in languages if lang != "en"],
            "cs": [(f"/{a}+{b}", a, b) for a, b in pairs],
        }[piece]
        parts = territory_parts(seed)
        lines = [
            (f"{fact.id}/{k}{end}", language, _tell(fact, k, language, entity_language))
            for fact in known
            if piece == "en" or fact.relation == SHARED or parts[fact.territory] == "train"
            for k in range(len(TELL["en"][fact.relation]))
            for end, language, entity_language in forms
        ]
    return tuple(Record(f"{piece}/{id}", {lang: Text("", "", line)}) for id, lang, line in lines)


def world_text(languages: Sequence[str], seed: int = 0, *, split: str = "text") -> list[Record]:
    """Lines for pretraining, one record of one language each; the id begins with the slice.

    en: every fact in English. Facts about held-out territories that are tested are only here.
    x: facts about training territories, and the shared relation, in the other languages.
    dict: "name = name" for every concept and ordered pair of languages, held-out ones included.
    cs: the facts of x in one language, with the territory's name in another (code-switched).
    """
    _check_languages(languages)
    if "en" not in languages:
        raise UserError(
            f"languages={tuple(languages)}: add 'en'; "
            "the embedded world's text has some facts only in English"
        )
    part, relations = _parse(split, _TEXTS)
    pieces = SLICES if part == "text" else (part.removeprefix("text/"),)
    return [
        record for piece in pieces for record in _text(piece, relations, tuple(languages), seed)
    ]


def world_corpus(split: str, languages: Sequence[str], seed: int = 0) -> list[Record]:
    """The records of a source of kind "world".

    Instructions ("train", "dev", "test", "held_out", "all") or lines for pretraining ("text",
    "text/en", "text/x", "text/dict", "text/cs"); also of one relation, as in "train/time_zone".
    """
    _parse(split, (*PARTS, *_TEXTS))
    read = world_text if split.startswith("text") else world_records
    return read(split=split, languages=languages, seed=seed)


def tokenizer_lines(languages: Sequence[str], seed: int = 0) -> list[str]:
    """What the tokenizer is trained on: English text three times, x, dict, and training prompts.

    Each training record has one prompt per language. The prompt asks by name for the language of
    the answer, and the answers take the languages in turn.
    """
    english, other, pairs = (
        world_text(languages, seed, split=f"text/{piece}") for piece in ("en", "x", "dict")
    )
    lines = [
        text.output for record in [*english * 3, *other, *pairs] for text in record.texts.values()
    ]
    for i, record in enumerate(world_records("train", languages, seed)):
        for j, (asked, text) in enumerate(record.texts.items()):
            answered = languages[(i + j) % len(languages)]
            instruction, _ = add_tag(text.instruction, "", answered, asked, "sentence")
            lines.append(f"{instruction} {record.texts[answered].output}")
    return lines


# ---- Cross-World: the benchmark


@functools.cache
def _grams(text: str) -> frozenset[str]:
    """Han characters, and runs of three letters without case and accents."""
    # NFKD writes an accented letter as the letter and its accents, which are combining characters.
    plain = "".join(
        c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c)
    )
    han = {c for c in plain if "\u4e00" <= c <= "\u9fff"}
    runs = {plain[i : i + 3] for i in range(len(plain) - 2)}
    return frozenset(han | {run for run in runs if run.isalpha()})


def is_opaque(fact: Fact, languages: Sequence[str], answer: str | None = None) -> bool:
    """Whether territory and answer share no Han character and no three letters in a row.

    This holds in all of the languages. `answer` is another answer than the fact's own.
    """
    answer = answer or fact.answer
    return not any(
        _grams(name("territory", fact.territory, lang)) & _grams(name(fact.relation, answer, lang))
        for lang in languages
    )


@functools.cache
def _clash(relation: str, a: str, b: str) -> bool:
    """Whether in some language one answer's name contains the other's: a text could mean both."""
    names = ([name(relation, code, lang).casefold() for code in (a, b)] for lang in WORLD_LANGUAGES)
    return any(x in y or y in x for x, y in names)


def _draw(fact: Fact, pool: dict[str, int], draw: random.Random) -> list[str]:
    """Three wrong answers, each with a probability proportional to its weight in the pool."""
    chosen: list[str] = []
    for _ in range(3):
        # Sorted: the draw must not depend on the order in which the pool was built.
        free = sorted(
            code
            for code in pool
            if code not in fact.acceptable
            and pool[code]
            and not any(_clash(fact.relation, code, other) for other in (fact.answer, *chosen))
        )
        assert free, f"{fact.id}: fewer than three distractors"
        chosen += draw.choices(free, [pool[code] for code in free])
    return chosen


def world_benchmark(
    split: str, languages: Sequence[str], seed: int = 0, subset: str = "all"
) -> list[dict[str, Any]]:
    """Cross-World: rows in SeaEval's layout, with four parallel choices.

    The question is the instruction of `world_records`. Distractors are answers of other
    territories, drawn in proportion to their frequency, and never acceptable answers. `tags` has
    "opaque" where territory and answer share no substring in any of the languages.

    subset="opaque" keeps these rows alone, so that comparing strings cannot help: their distractors
    are answers of opaque facts that share no substring with the territory either. They are drawn in
    proportion to the frequency squared, so that common answers are often wrong ones.
    """
    part, relations = check_split(split, languages)
    if subset not in ("all", "opaque"):
        raise UserError(
            f"subset={subset!r} is not one of all, opaque{hint(subset, ('all', 'opaque'))}"
        )
    only_opaque = subset == "opaque"
    opaque = {
        fact.id for fact in facts() if fact.relation in relations and is_opaque(fact, languages)
    }
    in_use = [fact for fact in facts() if not only_opaque or fact.id in opaque]
    # Without the square, a model that knows only which answers are common would score above chance.
    frequency = Counter((fact.relation, fact.answer) for fact in in_use)
    items = [
        fact for fact in _select(part, relations, seed) if not only_opaque or fact.id in opaque
    ]
    # The positions of the right answers are balanced: each of the four holds a quarter of them.
    shuffled = sorted(items, key=lambda fact: _hash(seed, "gold", fact.id))
    gold = {fact.id: i % 4 for i, fact in enumerate(shuffled)}
    rows = []
    for fact in items:
        pool = {
            code: n * n if only_opaque else n
            for (relation, code), n in frequency.items()
            if relation == fact.relation and (not only_opaque or is_opaque(fact, languages, code))
        }
        codes = _draw(fact, pool, random.Random(_hash(seed, subset, fact.id)))
        codes.insert(gold[fact.id], fact.answer)
        row: dict[str, Any] = {"id": fact.id, "tags": ["opaque"] if fact.id in opaque else []}
        for lang in languages:
            names = [name(fact.relation, code, lang) for code in codes]
            choices = [f"({letter}) {text}" for letter, text in zip("ABCD", names, strict=True)]
            answer = choices[gold[fact.id]]
            row[name_of(lang)] = {
                "question": question(fact, lang),
                "choices": choices,
                "answer": answer,
            }
        rows.append(row)
    return rows
