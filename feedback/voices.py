"""Who votes as one with whom: accounts that one hand steers have one voice.

Pure: no database, no model. What one voice may weigh is decided in `reliability` and `influence`.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

from feedback.raters import TIE, Units, mutual_agreement

_ALIKE = 0.95
_COMMON = 20
"""From so many common verdicts on two raters can be told to be alike by themselves."""
_MET = 5
"""From so many on they may be part of a group that is."""
_CHANCE = 1e-3


def voices_of(units: Units, raters: Sequence[str]) -> list[str]:
    """Name the voice of each of `raters`: those who vote as one share one, the others have their own.

    Raters who say the same on 95 % of at least 20 common verdicts are alike. They vote as one where that is
    more than chance, as raters usually agree here, or where others say the contrary more often than usual:
    accounts that one hand steers look like that. Twins who are merely careful do, too, at times; they lose
    little. Three and more who have less in common vote as one where so much unanimity is more than chance.
    A third of all raters is no ring, but an opinion.
    """
    said = Counter(rater for verdicts in units.values() for rater, label in verdicts.items() if label != TIE)
    rings: list[frozenset[str]] = []
    for least, find in ((_COMMON, _alike), (_MET, _unanimous)):
        known = [rater for rater in raters if said[rater] >= least]
        rings += find(units, known)
    voice = {rater: rater for rater in raters}
    # One hand may be seen in two ways.
    for hand in _joined((min(ring), rater) for ring in rings for rater in ring):
        voice |= dict.fromkeys(hand, min(hand))
    return [voice[rater] for rater in raters]


def _alike(units: Units, known: Sequence[str]) -> list[frozenset[str]]:
    """Return the groups of those who, two by two, are alike beyond chance or against all others."""
    common, equal = mutual_agreement(units, known)
    share = np.divide(equal, common, out=np.zeros(common.shape), where=common > 0)
    met = share[common >= _MET]
    usual = min(max(float(np.median(met)), 0.5), 0.99) if len(met) else 0.5
    alike = np.triu((common >= _COMMON) & (share >= _ALIKE) & (share > usual), 1)
    rings = _joined((known[a], known[b]) for a, b in np.argwhere(alike))
    chance = math.log(_CHANCE / max(1, int((np.triu(common, 1) >= _COMMON).sum())))
    beyond = {
        frozenset((known[a], known[b]))
        for a, b in np.argwhere(alike)
        if -common[a, b] * _divergence(share[a, b], usual) < chance
    }
    found: list[frozenset[str]] = []
    for ring, (agreed, asked) in zip(rings, _seen_by_others(units, rings), strict=True):
        contrary = asked > 0 and agreed / asked < usual
        contrary = contrary and -asked * _divergence(agreed / asked, usual) < math.log(_CHANCE)
        if len(ring) <= len(known) / 3:
            found += [ring] if contrary else _joined(tuple(pair) for pair in beyond if pair <= ring)
    return found


def _unanimous(units: Units, known: Sequence[str]) -> list[frozenset[str]]:
    """Return the groups of three and more, each of them like half of it, whose unanimity is beyond chance.

    Raters who are right with probability q, each on its own, agree with q^2 + (1 - q)^2; how often that is,
    all others show. m of them say the same with q^m + (1 - q)^m. Most single responses may be good, so they
    are looked at apart from pairs.
    """
    common, equal = mutual_agreement(units, known)
    alike = np.triu((common >= _MET) & (equal >= _ALIKE * common), 1)
    pairs = [(known[a], known[b]) for a, b in np.argwhere(alike)]
    met = Counter(rater for pair in pairs for rater in pair)
    # Whoever is alike with few of a group is so by chance.
    groups = [frozenset(one for one in group if 2 * met[one] >= len(group) - 1) for group in _joined(pairs)]
    groups = [group for group in groups if 2 < len(group) <= len(known) / 3]
    group_of = {rater: n for n, group in enumerate(groups) for rater in group}
    chances = [0.0] * len(groups)
    agreed, compared = [0] * len(groups), [0] * len(groups)
    for kind in (1, 2):
        of_kind = {unit: verdicts for unit, verdicts in units.items() if len(unit) == kind}
        right = _usually_right(of_kind, group_of)
        for verdicts in of_kind.values():
            labels: dict[int, list[str]] = defaultdict(list)
            for rater, label in verdicts.items():
                if label != TIE and rater in group_of:
                    labels[group_of[rater]].append(label)
            for n, said in labels.items():
                if len(set(said)) == 1:
                    chances[n] += math.log(right ** len(said) + (1 - right) ** len(said))
                compared[n] += math.comb(len(said), 2)
                agreed[n] += sum(math.comb(count, 2) for count in Counter(said).values())
    bound = math.log(_CHANCE / max(1, len(groups)))
    return [
        group for n, group in enumerate(groups) if chances[n] < bound and agreed[n] >= _ALIKE * compared[n]
    ]


def _usually_right(units: Units, group_of: Mapping[str, int]) -> float:
    """Tell how often a rater is right by how often those agree who are in no group together; 1 if unknown."""
    asked = equal = 0
    for verdicts in units.values():
        said = [(rater, label) for rater, label in verdicts.items() if label != TIE]
        for (one, label), (other, theirs) in combinations(said, 2):
            if one not in group_of or group_of[one] != group_of.get(other):
                asked += 1
                equal += label == theirs
    if asked < _COMMON:
        return 1.0
    return (1 + math.sqrt(max(0.0, 2 * equal / asked - 1))) / 2


def _joined(pairs: Iterable[tuple[str, ...]]) -> list[frozenset[str]]:
    """Return the groups that pairs connect, in the order of their first members."""
    group: dict[str, set[str]] = {}
    for one, other in pairs:
        merged = group.get(one, {one}) | group.get(other, {other})
        group |= dict.fromkeys(merged, merged)
    return sorted({frozenset(members) for members in group.values()}, key=min)


def _seen_by_others(units: Units, rings: Sequence[frozenset[str]]) -> list[tuple[float, float]]:
    """Count, for each ring, the verdicts of others where two of it say the same, and those that say it, too.

    Others who are in a ring together are one there.
    """
    ring_of = {rater: n for n, ring in enumerate(rings) for rater in ring}
    counts = [(0.0, 0.0)] * len(rings)
    for said in units.values():
        voices: dict[Hashable, list[str]] = defaultdict(list)
        for rater, label in said.items():
            if label != TIE:
                voices[ring_of.get(rater, rater)].append(label)
        for n, labels in voices.items():
            if isinstance(n, int) and len(labels) > 1 and len(set(labels)) == 1:
                others = [own for name, own in voices.items() if name != n]
                agreed = sum(own.count(labels[0]) / len(own) for own in others)
                counts[n] = (counts[n][0] + agreed, counts[n][1] + len(others))
    return counts


def _divergence(p: float, q: float) -> float:
    """Relative entropy of two coins, in nats."""
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)
