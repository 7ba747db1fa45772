"""Does training data contain benchmark items? Shared 13-grams, and MinHash for edited copies.

Two searches, each over all passages (questions and contexts) of the benchmarks at once:

- grams: a run of 13 words, or of 20 characters in a script without spaces, that a text and a
  passage have in common. The share of the passage's runs says how much of it was found.
- near-duplicates: texts whose sets of shingles (runs of 3) have a high Jaccard similarity. MinHash
  finds the candidates: two sets have the same minimum under a random hash with a probability equal
  to their similarity. A signature has 24 bands of 3 minima, and texts that agree in all of a band
  are compared exactly.
"""

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from crossin_jax.data.kinds import mix_bits

# 13 words as in GPT-3's study; scripts without spaces count characters
WORDS_PER_GRAM, CHARACTERS_PER_GRAM = 13, 20
# a benchmark text of fewer units is too common to be a leak
SHORTEST = 6
SHINGLE, BANDS, ROWS_PER_BAND = 3, 24, 3
# a text with at least this Jaccard similarity is a near-duplicate
NEAR = 0.6
# Thai and Lao, Khmer, Myanmar, kana, Han
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff"
_UNIT = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_SALTS = mix_bits(np.arange(BANDS * ROWS_PER_BAND, dtype=np.uint64), 0x1EAF)


@dataclass(frozen=True, slots=True)
class Passage:
    """A benchmark text: the question or the context of one item in one language."""

    benchmark: str
    item: str
    language: str
    part: str


@dataclass(frozen=True, slots=True)
class Leak:
    """A passage found in a text.

    `kind` is "gram" or "near". `share` is the part of its grams found, or the similarity.
    """

    passage: Passage
    kind: str
    share: float


def split_units(text: str) -> np.ndarray:
    """Hashes (U,) uint64 of words, or of characters in scripts without spaces.

    Case, width and punctuation do not count.
    """
    units = _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())
    return mix_bits(
        np.array([zlib.crc32(unit.encode("utf-8", "surrogatepass")) for unit in units], np.uint64)
    )


def hash_grams(units: np.ndarray, size: int) -> np.ndarray:
    """Hashes of all runs of `size` units."""
    count = len(units) - size + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for j in range(size):
        # The polynomial of FNV, for all runs at once: uint64 wraps around by itself.
        total = total * np.uint64(0x100000001B3) + units[j : j + count]
    return mix_bits(total)


def sign(shingles: np.ndarray) -> np.ndarray:
    """MinHash signature (BANDS, ROWS_PER_BAND) uint64 of a set of shingle hashes."""
    keyed = (shingles[None, :] ^ _SALTS[:, None]) * np.uint64(0x9E3779B97F4A7C15)
    return (keyed ^ (keyed >> np.uint64(29))).min(axis=1).reshape(BANDS, ROWS_PER_BAND)


def _band_keys(signature: np.ndarray) -> list[int]:
    keys = signature[:, 0]
    for row in range(1, ROWS_PER_BAND):
        keys = mix_bits(keys) ^ signature[:, row]
    return mix_bits(keys ^ np.arange(BANDS, dtype=np.uint64)).tolist()


class LeakIndex:
    """Finds benchmark passages in texts; built once from (passage, text) pairs."""

    def __init__(self, passages: Iterable[tuple[Passage, str]]):
        self.passages: list[Passage] = []
        # by passage: the number of its grams, and its shingles
        self._totals: list[int] = []
        self._shingles: list[np.ndarray] = []
        # by hash of a band of minima: the passages with it
        self._bands: dict[int, list[int]] = defaultdict(list)
        grams: dict[int, list[tuple[np.ndarray, int]]] = defaultdict(list)
        for passage, text in passages:
            units = split_units(text)
            if len(units) < SHORTEST:
                continue
            size = min(len(units), _gram_size(text))
            found = np.unique(hash_grams(units, size))
            index = len(self.passages)
            self.passages.append(passage)
            self._totals.append(len(found))
            grams[size].append((found, index))
            shingles = np.unique(hash_grams(units, SHINGLE))
            self._shingles.append(shingles)
            for key in _band_keys(sign(shingles)):
                self._bands[key].append(index)
        # By size of gram two arrays: all hashes in order, and the passage that each belongs to.
        self._grams = {}
        for size, entries in grams.items():
            hashes = np.concatenate([found for found, _ in entries])
            owners = np.concatenate(
                [np.full(len(found), index, np.int32) for found, index in entries]
            )
            order = np.argsort(hashes, kind="stable")
            self._grams[size] = hashes[order], owners[order]

    def find(self, text: str) -> list[Leak]:
        """The passages that a text contains in whole or in part, or nearly equals."""
        units = split_units(text)
        shares = self._find_grams(units)
        leaks = [Leak(self.passages[i], "gram", share) for i, share in shares.items()]
        if len(units) >= SHORTEST:
            shingles = np.unique(hash_grams(units, SHINGLE))
            near = {i for key in _band_keys(sign(shingles)) for i in self._bands.get(key, ())}
            for i in sorted(near):
                both = len(np.intersect1d(shingles, self._shingles[i], assume_unique=True))
                similarity = both / (len(shingles) + len(self._shingles[i]) - both)
                if similarity >= NEAR and shares.get(i, 0) < 1:
                    leaks.append(Leak(self.passages[i], "near", similarity))
        return leaks

    def _find_grams(self, units: np.ndarray) -> dict[int, float]:
        shares: dict[int, float] = {}
        for size, (hashes, owners) in self._grams.items():
            found = np.unique(hash_grams(units, size))
            # A gram may be in several passages: its entries are hashes[start:stop].
            start = np.searchsorted(hashes, found)
            hit = start < len(hashes)
            hit[hit] = hashes[start[hit]] == found[hit]
            if hit.any():
                stop = np.searchsorted(hashes, found[hit], side="right")
                ranges = [owners[a:b] for a, b in zip(start[hit], stop, strict=True)]
                for i, count in zip(
                    *np.unique(np.concatenate(ranges), return_counts=True), strict=True
                ):
                    shares[int(i)] = float(count) / self._totals[i]
        return shares


def _gram_size(text: str) -> int:
    units = _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())
    single = sum(bool(re.match(f"[{_UNSPACED}]", unit)) for unit in units)
    return CHARACTERS_PER_GRAM if single > len(units) / 2 else WORDS_PER_GRAM


def list_passages(benchmarks: Sequence) -> list[tuple[Passage, str]]:
    """Questions and contexts of benchmarks in all their languages."""
    return [
        (Passage(benchmark.name, item.id, code, part), text)
        for benchmark in benchmarks
        for item in benchmark.items
        for code, version in item.versions.items()
        for part, text in (("question", version.question), ("context", version.context))
        if text
    ]
