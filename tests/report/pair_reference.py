"""The measures of language pairs, computed once more from their definitions in
docs/evaluation.md.
"""

import itertools
import math

import numpy as np


def shared(a, b):
    """RankC of one item: what the first j of both rankings have in common, with softmax weights."""
    if a.scores is None or b.scores is None:
        return None
    count = len(a.scores)
    orders = [sorted(range(count), key=lambda c, x=x: -x.scores[c]) for x in (a, b)]
    weights = [math.exp(count - j) for j in range(count)]
    common = [
        len(set(orders[0][: j + 1]) & set(orders[1][: j + 1])) / (j + 1) for j in range(count)
    ]
    return np.dot(weights, common) / sum(weights)


def parts_of_pairs(predictions, p):
    """{measure: {(k, l): (part, whole)}}, both by item; p are the chances of the choices."""
    found, codes = {"rankc": {}, "agreement": {}, "agreement_right": {}}, predictions.languages
    for k, l in itertools.combinations(range(len(codes)), 2):
        rankc, same, right, whole = [], [], [], []
        for item, chances in zip(predictions.items, p, strict=True):
            gold = [item.gold[codes[n]] for n in (k, l)]
            both = [a * b for a, b in zip(chances[k], chances[l], strict=True)]
            rankc.append(shared(item.answers[codes[k]], item.answers[codes[l]]))
            same.append(sum(both))
            right.append(sum(both[c] for c in set(gold)))
            whole.append(1 - (1 - chances[k][gold[0]]) * (1 - chances[l][gold[1]]))
        ones = np.ones(len(p))
        if None not in rankc:
            found["rankc"][k, l] = np.array(rankc), ones
        found["agreement"][k, l] = np.array(same), ones
        found["agreement_right"][k, l] = np.array(right), np.array(whole)
    return {name: parts for name, parts in found.items() if parts}


def parts_of_scores(predictions, p):
    """{score: [(part, whole), …]}: a score is the mean of the quotients."""
    codes = predictions.languages
    scores = {
        name: list(parts.values())
        for name, parts in parts_of_pairs(predictions, p).items()
        if name != "agreement"
    }
    right = {
        code: np.array([p[i][k][item.gold[code]] for i, item in enumerate(predictions.items)])
        for k, code in enumerate(codes)
    }
    chance = np.array([1 / item.num_choices for item in predictions.items])
    for name, guessed in (("transfer", 0), ("conductivity", right["en"] * chance)):
        for code in codes:
            if code != "en":
                both = right["en"] * right[code] - guessed, right["en"] - guessed
                scores[f"{name}/{code}"] = [both]
                scores.setdefault(name, []).append(both)
    return scores


def weigh(parts, weights):
    """The mean of the quotients on weighted items, for every row of weights."""
    values = []
    for part, whole in parts:
        over = weights @ whole
        values.append(np.where(over > 1e-9, weights @ part / np.maximum(over, 1e-9), 0))
    return np.mean(values, axis=0)


def matrix(values, diagonal, order):
    """{(k, l): value} as a symmetric list of lists, languages in the given order."""
    return [[diagonal if a == b else values[min(a, b), max(a, b)] for b in order] for a in order]
