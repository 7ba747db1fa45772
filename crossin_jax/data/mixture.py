"""The mixture: stream position → example, a pure function of (configuration, corpora, seed).

Every draw is a hash of (seed, component, row id). So 3,000 examples are a subset of 6,000, and the
order of files and the number of workers or hosts change nothing. How stream position 7 becomes an
example:

    7 ─ order of the epoch ─► entry 12 of the epoch ─► component x2x, its draw number 4
      ─ order of the pass ──► unit (hash of a row's id), row 31 of the corpus, pass 0
      ─ Kind.draw ──────────► prompt language zh, answer language en
      ─ Kind.make ──────────► Example

An epoch is a shuffled list of entries: first all of component 0, then all of component 1, and so
on. A pass goes once over the rows of a component, which may take several epochs or less than one.
New language pairs are drawn at each pass, except for components with a `count`.

Shape letters: N examples that are drawn together · C languages of data.languages.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from crossin_jax import __version__
from crossin_jax.config import Component, Data, UserError, to_dict
from crossin_jax.data.corpus import Corpus, describe_losses, hash_key, load_corpus
from crossin_jax.data.kinds import (
    KINDS,
    Draws,
    Example,
    Kind,
    asks_in_english,
    make_example,
    mix_bits,
)

FORMAT = 1  # raised when the same settings would draw other examples
CHUNK = 1 << 16  # draws that are counted at once


class PermutationCache:
    """The last two permutations: one epoch and the next."""

    def __init__(self):
        self.orders: dict[int, np.ndarray] = {}

    def get(self, number: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        order = self.orders.get(number)
        if order is None:
            order = make()
            # One assignment, so that a concurrent reader never sees a half-updated dict.
            self.orders = dict([*self.orders.items()][-1:]) | {number: order}
        return order

    def __getstate__(self) -> dict[str, Any]:  # workers make their own
        return {"orders": {}}


# A component with count=2 over a corpus of three rows, whose ids are a, b and c, has two units:
#
#     rows     2       0          indices in the corpus, in the order of the hashes
#     units    h(c)    h(a)       their keys; languages are drawn by hashes of these
#
# With replacement there are as many units as examples. Unit i is a hash of i, and it picks a row.
class Pool:
    """The rows that one component draws from, and for each the unit of which draws are hashes."""

    def __init__(
        self, component: Component, corpus: Corpus, data: Data, seed: int, number: int, place: str
    ):
        self.component, self.corpus, self.place = component, corpus, place
        self._orders = PermutationCache()
        self.languages = tuple(data.languages)
        # A kind that needs no pivot accepts a pivot that is not among the languages.
        self.pivot = self.languages.index(data.pivot) if data.pivot in self.languages else None
        suffix = f"#{number}" if number else ""
        self.key = hash_key(f"{seed}/{component.kind}/{component.source}{suffix}")
        self.draw_key = self.key
        self.fixed = component.count is not None
        self.weights = self._weigh_languages()
        self.has_NC = None
        if self.kind.fills_gaps:
            self.has_NC = np.stack(
                [corpus.has.get(code, np.zeros(len(corpus), bool)) for code in self.languages], 1
            )
            rows = np.flatnonzero((self.has_NC * self.weights).any(1))
        else:
            rows = np.arange(len(corpus))
            if len(rows):
                self._refuse_gaps()
        if not len(rows):
            losses = describe_losses(corpus)
            raise UserError(
                f"{place}: source {component.source!r} has no rows in {', '.join(self.languages)}"
                + (f" ({losses})" if losses else "")
            )
        if component.with_replacement:
            # The key has no kind in it. As in the release, all kinds draw the same rows and
            # languages.
            self.draw_key = hash_key(f"{seed}/again/{component.source}{suffix}")
            numbers = np.arange(component.count or len(rows), dtype=np.uint64)
            self.units = mix_bits(numbers, self.draw_key)
            by_key = rows[np.argsort(corpus.keys[rows])]
            self.rows = by_key[self.units % np.uint64(len(rows))]
            return
        if self.fixed and component.count > len(rows):
            raise UserError(
                f"{place}.count={component.count} is above the {len(rows)} rows of "
                f"{component.source!r}; lower it, or set with_replacement=True"
            )
        # lexsort sorts by its last argument first: by the hash, and by the key where hashes are
        # equal.
        keys = corpus.keys[rows]
        order = np.lexsort((keys, mix_bits(keys, self.key)))[: component.count]
        self.rows, self.units = rows[order], keys[order]

    @property
    def kind(self) -> Kind:
        """The entry of this component's kind."""
        return KINDS[self.component.kind]

    def __len__(self) -> int:
        return len(self.rows)

    def _weigh_languages(self) -> np.ndarray:
        """Weight (C,) of each language in the draws of this kind."""
        named, kind = self.component.languages, self.kind
        weights = np.array([named.get(code, 0.0) if named else 1.0 for code in self.languages])
        leaves_out_pivot = kind.drawn == "others" or kind.drawn == "named" and not named
        if leaves_out_pivot and self.pivot is not None:
            weights[self.pivot] = 0.0
        if (weights < 0).any():
            raise UserError(f"{self.place}.languages={named}: weights are not negative")
        draws_two = kind.draws_two and not self.component.allow_same
        if kind.drawn != "none" and np.count_nonzero(weights) < 1 + draws_two:
            least = "two languages" if kind.draws_two else "a language"
            if self.pivot is not None and not kind.draws_two:
                least += f" besides {self.languages[self.pivot]!r}"
            raise UserError(
                f"{self.place}: {self.component.kind} needs {least} of positive weight; "
                f"languages={named or self.languages}"
            )
        return weights

    def _refuse_gaps(self) -> None:
        """Refuses a corpus where a record lacks a language that an example may need."""
        kind = self.component.kind
        needed = set(np.flatnonzero(self.weights)) if self.kind.drawn != "none" else set()
        if self.kind.needs_pivot:
            needed.add(self.pivot)
        for code in (self.languages[j] for j in sorted(needed)):
            has = self.corpus.has.get(code)
            if has is None:
                raise UserError(
                    f"{self.place}: {kind} needs {code!r}, but {self.component.source!r} has only "
                    f"{', '.join(self.corpus.languages)}; take {code!r} out, or add its texts: "
                    f"prepare translate, with the same --config"
                )
            if not has.all():
                gaps = np.flatnonzero(~has)
                raise UserError(
                    f"{self.corpus.describe_origin(int(gaps[0]))}: no {code!r} version (nor in "
                    f"{len(gaps) - 1} other rows), but {self.place} ({kind}) needs it; "
                    f"take {code!r} out, or add its texts: prepare translate, with the same "
                    "--config"
                )

    def draw_pairs(
        self, units: np.ndarray, rows: np.ndarray, passes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and answer languages (indices); a counted set has the same pairs in each pass."""
        weights_NC = np.broadcast_to(self.weights, (len(units), len(self.languages)))
        if self.has_NC is not None:
            weights_NC = weights_NC * self.has_NC[rows]
        drawn_at = np.zeros_like(passes) if self.fixed else passes
        words = mix_bits(units, self.draw_key) ^ mix_bits(drawn_at, 1)
        return self.kind.draw(Draws(self.component, words, weights_NC, self.pivot))

    def _order(self, pass_number: int) -> np.ndarray:
        """The order of the units in a pass."""
        return self._orders.get(
            pass_number,
            lambda: np.lexsort(
                (self.units, mix_bits(self.units, self.key ^ hash_key(f"pass {pass_number}")))
            ),
        )

    # A component of 3 rows whose order is 2 0 1 in pass 0 and 1 2 0 in pass 1:
    #
    #     draws    0 1 2 │ 3 4 5
    #     passes   0 0 0 │ 1 1 1
    #     rows     2 0 1 │ 1 2 0
    def locate(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(units, rows, passes) of draws by number."""
        passes, spots = np.divmod(draws, len(self))
        index = np.empty(len(draws), np.int64)
        for pass_number in np.unique(passes):
            here = passes == pass_number
            index[here] = self._order(int(pass_number))[spots[here]]
        return self.units[index], self.rows[index], passes.astype(np.uint64)


def label_components(components: Sequence[Component]) -> list[str]:
    """The name of each component in logs and reports: its kind, with its source if kinds repeat."""
    kinds = [component.kind for component in components]
    names = [f"{component.kind}:{component.source}" for component in components]
    return [
        kind
        if kinds.count(kind) == 1
        else name + (f"#{names[:i].count(name) + 1}" if name in names[:i] else "")
        for i, (kind, name) in enumerate(zip(kinds, names, strict=True))
    ]


class Mixture(Sequence):
    """Examples by stream position; positions from `len` on are further epochs, each in a new order.

    An epoch has as many examples as the components have rows (or `count`). Without shares each
    component gives all of its own once per epoch; with shares they divide the epoch, and a
    component continues with the row at which the last epoch ended. A component with `count` is a
    fixed set of examples; one without draws new language pairs at each pass. Raises `UserError`
    where a component needs what its corpus lacks.
    """

    def __init__(self, data: Data, corpora: dict[str, Corpus], seed: int):
        if not data.components:
            raise UserError("data.components is empty: name at least one component and its source")
        self.data, self.corpora, self.seed = data, corpora, seed
        names = [f"{c.kind}/{c.source}" for c in data.components]
        self.labels = label_components(data.components)
        self.pools = [
            Pool(
                component,
                corpora[component.source],
                data,
                seed,
                names[:i].count(names[i]),
                f"data.components[{i}]",
            )
            for i, component in enumerate(data.components)
        ]
        self.sizes = self._divide([component.share for component in data.components])
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._orders, self._manifest = PermutationCache(), None

    def _divide(self, shares: list[float | None]) -> np.ndarray:
        """Examples of each component per epoch, at least one; rounded by largest remainders."""
        lengths = np.array([len(pool) for pool in self.pools])
        if shares[0] is None:
            return lengths
        exact = np.array(shares, float) * lengths.sum()
        sizes = np.floor(exact).astype(np.int64)
        # Shares of .5, .5 of 5 examples: floors 2 and 2, and the largest remainder gets the fifth.
        sizes[np.argsort(sizes - exact, kind="stable")[: lengths.sum() - sizes.sum()]] += 1
        return np.maximum(sizes, 1)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def groups(self) -> list[tuple[str, str]]:
        """(component, answer language) of every kind of example that can occur."""
        return [(label, code) for label in self.labels for code in self.data.languages]

    def _order(self, epoch: int) -> np.ndarray:
        """The order of the entries in an epoch."""
        return self._orders.get(
            epoch,
            lambda: np.argsort(
                np.concatenate(
                    [
                        mix_bits(
                            np.arange(size, dtype=np.uint64), pool.key ^ hash_key(f"epoch {epoch}")
                        )
                        for pool, size in zip(self.pools, self.sizes, strict=True)
                    ]
                ),
                kind="stable",
            ),
        )

    def __getitem__(self, i: int | slice) -> Any:
        """The example at a position, or the list of a slice; positions go on into later epochs."""
        if isinstance(i, slice):
            return self.take(np.arange(*i.indices(len(self))))
        return self.take(np.array([i]))[0]

    # Two components with sizes 3 and 2 have the entries 0 1 2 │ 3 4 in every epoch (`_starts` is
    # 0 3 5). Component 1 has two draws per epoch: entry 4 of epoch 1 is its draw 1·2 + 4 − 3 = 3.
    def draw(self, positions: np.ndarray) -> np.ndarray:
        """(N, 4) int64 of component, row, prompt language, answer language at stream positions."""
        positions = np.asarray(positions, np.int64)
        if (positions < 0).any():
            raise IndexError(f"stream position {positions.min()} is negative")
        epochs, spots = np.divmod(positions, len(self))
        entries = np.empty(len(spots), np.int64)
        for epoch in np.unique(epochs):
            entries[epochs == epoch] = self._order(int(epoch))[spots[epochs == epoch]]
        owners = np.searchsorted(self._starts, entries, side="right") - 1
        draws = np.empty((len(spots), 4), np.int64)
        for c in np.unique(owners):
            here = np.flatnonzero(owners == c)
            numbers = epochs[here] * self.sizes[c] + entries[here] - self._starts[c]
            units, rows, passes = self.pools[c].locate(numbers)
            pairs = self.pools[c].draw_pairs(units, rows, passes)
            draws[here] = np.stack([np.full(len(here), c), rows, *pairs], axis=1)
        return draws

    def make(self, component: int, row: int, prompt: int, answer: int) -> Example:
        """The example of one row of `draw`."""
        pool, codes = self.pools[component], self.data.languages
        record = pool.corpus.pick(
            row, (codes[prompt], codes[answer]) if prompt != answer else (codes[prompt],)
        )
        return make_example(
            record,
            pool.component.kind,
            codes[prompt],
            codes[answer],
            tag=pool.component.tag or self.data.tag,
            component=self.labels[component],
            translate_what=pool.component.translate_what,
            request=pool.component.request,
        )

    def take(self, positions: np.ndarray) -> list[Example]:
        """The examples at these stream positions, in their order."""
        return [self.make(*draw) for draw in self.draw(positions).tolist()]

    def count_pairs(self, c: int) -> Counter[tuple[str, str]]:
        """Counts of (prompt language, answer language) of component c in the first epoch."""
        counts: Counter[tuple[str, str]] = Counter()
        codes = self.data.languages
        for start in range(0, int(self.sizes[c]), CHUNK):
            numbers = np.arange(start, min(start + CHUNK, int(self.sizes[c])))
            prompt, answer = self.pools[c].draw_pairs(*self.pools[c].locate(numbers))
            pairs, occurs = np.unique(prompt * len(codes) + answer, return_counts=True)
            for pair, count in zip(pairs.tolist(), occurs.tolist(), strict=True):
                counts[codes[pair // len(codes)], codes[pair % len(codes)]] += count
        return counts

    def count_english_requests(self) -> dict[str, int]:
        """Examples of the first epoch that ask in English, by the language of their prompt.

        Those are prompts in languages without a request sentence of their own.
        """
        counts: Counter[str] = Counter()
        entries = self.manifest()["components"]
        for component, entry in zip(self.data.components, entries, strict=True):
            for pair, count in entry["pairs"].items():
                languages = pair.split(">")
                if asks_in_english(component, self.data.tag, tuple(languages)):
                    counts[languages[0]] += count
        return dict(counts)

    def manifest(self) -> dict[str, Any]:
        """Sources with fingerprints, counts per component and language pair, seed, and hash.

        The hash covers everything that decides the stream, and neither paths nor the version of the
        code.
        """
        if self._manifest is not None:
            return self._manifest
        sources = {source.name: source for source in self.data.sources}
        used = dict.fromkeys(component.source for component in self.data.components)
        components = []
        for c, (label, pool, size) in enumerate(
            zip(self.labels, self.pools, self.sizes, strict=True)
        ):
            chosen = to_dict(pool.component)
            del chosen["template"]  # it does not change the texts, and `Renderer.hash` has it
            if chosen["tag"] is None:  # then `data.tag` below decides
                del chosen["tag"]
            components.append(
                {
                    "name": label,
                    **chosen,
                    "rows": len(pool),
                    "examples": int(size),
                    "pairs": {f"{a}>{b}": n for (a, b), n in sorted(self.count_pairs(c).items())},
                }
            )
        decides = {
            "format": FORMAT,
            "seed": self.seed,
            "languages": list(self.data.languages),
            "pivot": self.data.pivot,
            "tag": self.data.tag,
            "components": components,
            "sources": [
                {
                    "name": name,
                    "fingerprint": self.corpora[name].fingerprint,
                    "rows": len(self.corpora[name]),
                    "dropped": dict(self.corpora[name].dropped),
                }
                for name in used
            ],
        }
        digest = hashlib.blake2b(
            json.dumps(decides, sort_keys=True).encode(), digest_size=16
        ).hexdigest()
        paths = {
            name: {"path": sources[name].path, "split": sources[name].split}
            for name in used
            if name in sources
        }
        self._manifest = {
            "hash": digest,
            "version": __version__,
            "examples": len(self),
            **decides,
            "paths": paths,
        }
        # What was not read decides nothing, so it is no part of the hash.
        if ignored := {n: dict(self.corpora[n].ignored) for n in used if self.corpora[n].ignored}:
            self._manifest["ignored"] = ignored
        return self._manifest


def temper(sizes: dict[str, float], temperature: float) -> dict[str, float]:
    """Language weights in proportion to size ** (1 / temperature).

    Temperature 1 keeps the proportions; a higher one makes them more even.
    """
    return {code: size ** (1 / temperature) for code, size in sizes.items()}


def load_corpora(data: Data, seed: int) -> dict[str, Corpus]:
    """The corpora of all sources in use, by name; the embedded world is halved by the seed."""
    used = {component.source for component in data.components}
    return {
        source.name: load_corpus(source, data.languages, seed=seed)
        for source in data.sources
        if source.name in used
    }


def held_out_settings(data: Data) -> Data:
    """Settings of a mixture that has every held-out record once in each language."""
    components = tuple(
        Component(kind="same", source=source.name, languages={code: 1.0})
        for source in data.eval_sources
        for code in source.languages or data.languages
    )
    return dataclasses.replace(data, sources=data.eval_sources, components=components)
