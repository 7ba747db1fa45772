"""The embedded world: facts about 246 territories from CLDR (PyPI package babel), parallel in seven languages.

| relation | facts | answers | from CLDR 47 (babel 2.18) |
|---|---|---|---|
| currency | 245 | 153 | legal tender on 1 January 2025; of several the one whose code begins with the territory's |
| language | 244 | 85 | official or de facto; of several the one CLDR holds likeliest there, else the most spoken |
| time_zone | 211 | 79 | the zone's name, where all zones of the territory share one |
| continent | 221 | 5 | prefix of the names of the territory's time zones, where all agree |

A fact is kept only if all seven languages name its territory and answer, so row ids are the same whichever languages
are used. Left out: week start and script (most territories share one answer); containment (babel does not carry it).

Splits: territories are parted by rank of a hash of (seed, territory): train 50 %, dev 10 %, test 40 %; "held_out" is
dev and test. Relations in use are currency, language and continent; "train/time_zone" asks for another one by name.
`continent` is the shared relation: told in every language, also of held-out territories, and never tested.
"""

import datetime
import functools
import hashlib
import json
import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossin_jax.config import UserError, hint
from crossin_jax.data.corpus import Record, Text
from crossin_jax.data.crosslingual import add_tag
from crossin_jax.data.world_phrasings import ASK, LANGUAGE_FORM, TELL, join, with_article
from crossin_jax.languages import LANGUAGES
from crossin_jax.outputs import write_whole

WORLD_LANGUAGES: tuple[str, ...] = tuple(TELL)
TESTED: tuple[str, ...] = ("currency", "language", "time_zone")
CORE: tuple[str, ...] = ("currency", "language", "continent")
SHARED = "continent"
PARTS: tuple[str, ...] = ("train", "dev", "test", "held_out", "all")
SLICES: tuple[str, ...] = ("en", "x", "dict", "cs")
_TEXTS = ("text", *(f"text/{piece}" for piece in SLICES))
_CONTINENTS = {"Africa": "002", "America": "019", "Asia": "142", "Europe": "150", "Pacific": "009", "Australia": "009"}
_TENDER_DATE = datetime.date(2025, 1, 1)  # without a date babel takes today's, and the corpus would change overnight


@dataclass(frozen=True, slots=True)
class Fact:
    """A territory's answer under a relation; `acceptable` has every true answer, e.g. all official languages."""

    relation: str
    territory: str
    answer: str
    acceptable: frozenset[str]

    @property
    def id(self) -> str:
        return f"{self.relation}/{self.territory}"


# ---------------------------------------------------------------- facts and names


@functools.cache
def _names(language: str) -> dict[str, dict[str, str]]:
    """CLDR's names by relation and code; "territory" and "continent" come from the same table."""
    from babel import Locale

    locale = Locale.parse(language)
    zones = {code: zone["long"].get("generic") or zone["long"].get("standard")
             for code, zone in locale.meta_zones.items() if "long" in zone}
    form = LANGUAGE_FORM.get(language, "{}")
    territories = dict(locale.territories)
    return {"territory": territories, "continent": territories, "currency": dict(locale.currencies),
            "language": {code: form.format(name) for code, name in locale.languages.items()},
            "time_zone": {code: name for code, name in zones.items() if name}}


def name(kind: str, code: str, language: str) -> str:
    """The name of a concept, e.g. ("currency", "EUR", "zh") → 欧元."""
    return _names(language)[kind][code]


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Every fact that can be told in all seven languages, sorted by relation and territory."""
    from babel.core import get_global
    from babel.languages import get_official_languages
    from babel.numbers import get_territory_currencies

    zones_of, likely, meta_zones = get_global("territory_zones"), get_global("likely_subtags"), get_global("meta_zones")
    found = []
    for territory, zones in sorted(zones_of.items()):
        if territory in ("AQ", "ZZ") or not territory.isalpha():
            continue  # Antarctica, "unknown", and the world itself
        tender = get_territory_currencies(territory, _TENDER_DATE)
        tender.sort(key=lambda code, territory=territory: not code.startswith(territory))
        expected = likely.get(f"und_{territory}", "en").split("_")[0]
        official = [code.split("_")[0] for code in get_official_languages(territory, de_facto=True)]
        official.sort(key=lambda code, expected=expected: code != expected)
        shared_zones = {meta_zones.get(zone) for zone in zones}
        continents = {_CONTINENTS.get(zone.split("/")[0]) for zone in zones} - {None}
        if territory == "TR":
            continents = set()  # spans two; the zone only says where Istanbul lies
        for relation, answers in (("currency", tender), ("language", official),
                                  ("time_zone", list(shared_zones) if len(shared_zones) == 1 else []),
                                  ("continent", list(continents) if len(continents) == 1 else [])):
            if answers and all(territory in _names(lang)["territory"] and answers[0] in _names(lang)[relation]
                               for lang in WORLD_LANGUAGES):
                found.append(Fact(relation, territory, answers[0], frozenset(answers)))
    return tuple(sorted(found, key=lambda fact: fact.id))


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b("\t".join(map(str, parts)).encode(), digest_size=8).digest())


@functools.cache
def territory_parts(seed: int = 0) -> dict[str, str]:
    """Territory → "train" (half), "dev" (a tenth) or "test", by rank of the hash of (seed, territory)."""
    ranked = sorted({fact.territory for fact in facts()}, key=lambda territory: _hash(seed, territory))
    ends = round(len(ranked) * 0.5), round(len(ranked) * 0.6)
    return {t: "train" if i < ends[0] else "dev" if i < ends[1] else "test" for i, t in enumerate(ranked)}


def _parse(split: str, known: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """"train" → ("train", CORE); "text/en/time_zone" → ("text/en", ("time_zone",))."""
    for part in known:
        if split == part:
            return part, CORE
        if split.startswith(part + "/") and split[len(part) + 1:] in (*TESTED, SHARED):
            return part, (split[len(part) + 1:],)
    raise UserError(f"split={split!r} is not a split of the embedded world{hint(split, known)}; "
                    f"use {', '.join(known)}, alone or with /{', /'.join((*TESTED, SHARED))}")


def _check_languages(languages: Sequence[str]) -> None:
    for code in languages:
        if code not in WORLD_LANGUAGES:
            raise UserError(f"languages: the embedded world has no {code!r}; use some of {', '.join(WORLD_LANGUAGES)}")


def _select(part: str, relations: tuple[str, ...], seed: int) -> list[Fact]:
    """The facts of a part; held-out parts have no shared facts, for those are known in every language already."""
    of = territory_parts(seed)
    wanted = {"all": ("train", "dev", "test"), "held_out": ("dev", "test")}.get(part, (part,))
    return [fact for fact in facts() if fact.relation in relations and of[fact.territory] in wanted
            and (part in ("train", "all") or fact.relation != SHARED)]


# ---------------------------------------------------------------- instruction records


def question(fact: Fact, language: str) -> str:
    """The fact as an instruction; the phrasing goes by the hash of the row id and is the same one in every language."""
    phrasings = ASK[language][fact.relation]
    entity = with_article(name("territory", fact.territory, language), language)
    return join(phrasings[_hash(fact.id) % len(phrasings)], e=entity)


def world_records(split: str, languages: Sequence[str], seed: int = 0) -> list[Record]:
    """Instruction records of a split (`PARTS`), row ids like "currency/FR", each in every language asked for."""
    _check_languages(languages)
    part, relations = _parse(split, PARTS)
    return [Record(fact.id, {lang: Text(question(fact, lang), "", name(fact.relation, fact.answer, lang))
                             for lang in languages}) for fact in _select(part, relations, seed)]


# ---------------------------------------------------------------- text for pretraining


def _tell(fact: Fact, template: int, language: str, entity_language: str) -> str:
    """A statement in one language; the territory's name in the same or (code-switched, no article) another."""
    entity, answer = name("territory", fact.territory, entity_language), name(fact.relation, fact.answer, language)
    if entity_language == language:
        entity = with_article(entity, language)
    if fact.relation == "continent":
        answer = with_article(answer, language)
    return join(TELL[language][fact.relation][template], e=entity, a=answer)


@functools.cache
def _text(piece: str, relations: tuple[str, ...], languages: tuple[str, ...], seed: int) -> tuple[Record, ...]:
    everything, of = [fact for fact in facts() if fact.relation in relations], territory_parts(seed)
    told = [fact for fact in everything if fact.relation == SHARED or of[fact.territory] == "train"]
    pairs = [(a, b) for a in languages for b in languages if a != b]
    templates = range(len(TELL["en"]["currency"]))
    if piece == "en":
        lines = [(f"{f.id}/{k}", "en", _tell(f, k, "en", "en")) for f in everything for k in templates]
    elif piece == "x":
        lines = [(f"{f.id}/{k}/{lang}", lang, _tell(f, k, lang, lang)) for f in told for k in templates
                 for lang in languages if lang != "en"]
    elif piece == "cs":
        lines = [(f"{f.id}/{k}/{a}+{b}", a, _tell(f, k, a, b)) for f in told for k in templates for a, b in pairs]
    else:
        concepts = sorted({(f.relation, f.answer) for f in everything}
                          | {("territory", f.territory) for f in everything})
        lines = [(f"{kind}/{code}/{a}+{b}", b, f"{name(kind, code, a)} = {name(kind, code, b)}")
                 for kind, code in concepts for a, b in pairs]
    return tuple(Record(f"{piece}/{id}", {lang: Text("", "", line)}) for id, lang, line in lines)


def world_text(languages: Sequence[str], seed: int = 0, *, split: str = "text") -> list[Record]:
    """Lines for pretraining, one record of one language each; the id begins with the slice.

    en: every fact, in English; tested facts about held-out territories stand only here. x: facts about training
    territories, and the shared facts, in the other languages. dict: "name = name" of every concept for every ordered
    pair of languages, held-out territories included. cs: the facts of x, told in one language with the territory's name
    in another.
    """
    _check_languages(languages)
    if "en" not in languages:
        raise UserError(f"languages={tuple(languages)}: the embedded world's text needs 'en', where every fact is told")
    part, relations = _parse(split, _TEXTS)
    pieces = SLICES if part == "text" else (part.removeprefix("text/"),)
    return [record for piece in pieces for record in _text(piece, relations, tuple(languages), seed)]


def world_corpus(split: str, languages: Sequence[str], seed: int = 0) -> list[Record]:
    """What a source of kind "world" reads: instruction records ("train", "dev", "test", "held_out", "all") or lines for
    pretraining ("text", "text/en", "text/x", "text/dict", "text/cs"); also of one relation, as in "train/time_zone"."""
    _parse(split, (*PARTS, *_TEXTS))
    return (world_text if split.startswith("text") else world_records)(split=split, languages=languages, seed=seed)


def tokenizer_lines(languages: Sequence[str], seed: int = 0) -> list[str]:
    """What the tokenizer is trained on: English text three times, x, dict, and the training half's prompts.

    Prompts ask for their answer's language by name; each record has one per prompt language, answered in turn in all.
    """
    english, other, pairs = (world_text(languages, seed, split=f"text/{piece}") for piece in ("en", "x", "dict"))
    lines = [text.output for record in [*english * 3, *other, *pairs] for text in record.texts.values()]
    for i, record in enumerate(world_records("train", languages, seed)):
        for j, (asked, text) in enumerate(record.texts.items()):
            answered = languages[(i + j) % len(languages)]
            instruction, _ = add_tag(text.instruction, "", answered, asked, "sentence")
            lines.append(f"{instruction} {record.texts[answered].output}")
    return lines


def train_tokenizer(lines: Iterable[str], vocab_size: int, folder: str | Path) -> None:
    """Trains a byte-level BPE and saves it as a folder that `AutoTokenizer.from_pretrained` loads.

    <pad> 0, <s> 1, </s> 2; `tokenizer(text)` puts <s> before the text once, as Llama's does; decoding restores it.
    A text is read as if a space stood before it, so a name has the same tokens at the start of a text and after a space
    (but others right after a line break or a bracket).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    specials = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(alphabet) + len(specials):
        raise UserError(f"vocab_size={vocab_size} is too small for {len(alphabet)} bytes and {len(specials)} special "
                        f"tokens; use {len(alphabet) + len(specials)} or more")
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>",
                "eos_token": "</s>", "clean_up_tokenization_spaces": False, "model_max_length": 1_000_000}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file, content in (("tokenizer.json", tokenizer.to_str(pretty=True)),
                          ("tokenizer_config.json", json.dumps(settings, indent=2))):
        write_whole(Path(folder) / file, content)


# ---------------------------------------------------------------- Cross-World


@functools.cache
def _grams(text: str) -> frozenset[str]:
    """Han characters, and runs of three letters without case and accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    han = {c for c in plain if "\u4e00" <= c <= "\u9fff"}
    runs = {plain[i:i + 3] for i in range(len(plain) - 2)}
    return frozenset(han | {run for run in runs if run.isalpha()})


def is_opaque(fact: Fact, languages: Sequence[str], answer: str | None = None) -> bool:
    """Whether territory and answer share no Han character and no three letters in a row in any of the languages."""
    answer = answer or fact.answer
    return not any(_grams(name("territory", fact.territory, lang)) & _grams(name(fact.relation, answer, lang))
                   for lang in languages)


@functools.cache
def _clash(relation: str, a: str, b: str) -> bool:
    """Whether one answer's name holds the other's in some language, so that a text could mean either."""
    pairs = [(name(relation, a, lang).casefold(), name(relation, b, lang).casefold()) for lang in WORLD_LANGUAGES]
    return any(x in y or y in x for x, y in pairs)


def _draw(fact: Fact, pool: Counter, draw: random.Random) -> list[str]:
    """Three wrong answers, each with probability proportional to its weight in the pool."""
    chosen: list[str] = []
    for _ in range(3):
        free = sorted(code for code in pool if code not in fact.acceptable and pool[code]
                      and not any(_clash(fact.relation, code, other) for other in (fact.answer, *chosen)))
        assert free, f"{fact.id}: fewer than three distractors"
        chosen += draw.choices(free, [pool[code] for code in free])
    return chosen


def world_benchmark(split: str, languages: Sequence[str], seed: int = 0, subset: str = "all") -> list[dict[str, Any]]:
    """Cross-World: rows in SeaEval's layout, the instruction of `world_records` as question, four parallel choices.

    Distractors are answers of other territories, as frequent as answers are, and never acceptable. `tags` has "opaque"
    where territory and answer share no substring in any language in use. subset="opaque": these rows alone, with
    distractors from opaque facts (probability ~ frequency squared, so that common answers are often wrong ones) that
    share no substring with the territory either: comparing strings cannot help.
    """
    _check_languages(languages)
    part, relations = _parse(split, PARTS)
    if subset not in ("all", "opaque"):
        raise UserError(f"subset={subset!r} is not one of all, opaque{hint(subset, ('all', 'opaque'))}")
    relations = tuple(relation for relation in relations if relation in TESTED)
    if not relations:
        raise UserError(f"split={split!r}: {SHARED} is told in every language, never tested; use {', '.join(TESTED)}")
    opaque = {fact.id for fact in facts() if fact.relation in relations and is_opaque(fact, languages)}
    pools = {relation: Counter(fact.answer for fact in facts() if fact.relation == relation
                               and (subset == "all" or fact.id in opaque)) for relation in relations}
    if subset == "opaque":
        pools = {relation: Counter({code: n * n for code, n in pool.items()}) for relation, pool in pools.items()}
    items = [fact for fact in _select(part, relations, seed) if subset == "all" or fact.id in opaque]
    places = {fact.id: i % 4 for i, fact in enumerate(sorted(items, key=lambda fact: _hash(seed, "gold", fact.id)))}
    rows = []
    for fact in items:
        pool = pools[fact.relation]
        if subset == "opaque":
            pool = Counter({code: n for code, n in pool.items() if is_opaque(fact, languages, code)})
        codes = _draw(fact, pool, random.Random(_hash(seed, subset, fact.id)))
        codes.insert(places[fact.id], fact.answer)
        row: dict[str, Any] = {"id": fact.id, "tags": ["opaque"] if fact.id in opaque else []}
        for lang in languages:
            choices = [f"({'ABCD'[i]}) {name(fact.relation, code, lang)}" for i, code in enumerate(codes)]
            row[LANGUAGES[lang]] = {"question": question(fact, lang), "choices": choices,
                                    "answer": choices[places[fact.id]]}
        rows.append(row)
    return rows
