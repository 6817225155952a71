"""How far raters can be relied on: from their votes to what is known of each.

Pure: no database, no model. It tells from what several raters judged, and from gold questions, how often each
is right and what speaks for quarantine. Who votes as one with whom is told by `voices`; what follows for a
round is in `influence`.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedback.raters import TIE, Units, units_of
from feedback.settings import RaterSettings
from feedback.voices import voices_of
from feedback.votes import Vote, key_of

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]

_PRIOR = 0.75
"""The accuracy that is expected of somebody of whom nothing is known: votes carry something, but err."""
_TRUSTED_PRIOR = 0.9
_LEAST = 0.05
"""Nobody who is not quarantined weighs less: an estimate is no ban."""
_KNOWN = 10
"""From so many shared verdicts on a rater helps to tell what is usual."""
_SURE = 2.33
"""Standard deviations: one in a hundred who votes at random is taken for contrary."""
_SEVERAL = 3
_STEPS = 200


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a rater.

    Of its `votes`, `judged` verdicts are on what others or a gold question decide, too; `agreement` is the
    share of them that says the same (good and bad responses weighing alike; None without any). `accuracy` is
    the estimate of how often it is right, given how often those others are. `reliability` is what a vote of
    the rater weighs, from 0.05 to 1. `voice` names those with whom it votes as one, else itself. `suspicions`
    are the reasons for quarantine, in sentences.
    """

    rater: str
    votes: int
    judged: int
    agreement: float | None
    accuracy: float
    reliability: float
    gold_asked: int
    gold_right: int
    voice: str
    suspicions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Assessment:
    """`standings` by rater, and the ids of the votes on which others (or a gold question) have a say, too."""

    standings: Mapping[str, Standing]
    corroborable: frozenset[str]
    usual_accuracy: float

    def suspects(self) -> dict[str, str]:
        """Return the raters to quarantine, with the reason."""
        return {
            rater: " ".join(standing.suspicions)
            for rater, standing in sorted(self.standings.items())
            if standing.suspicions
        }

    def voices(self) -> list[list[str]]:
        """Return the raters that vote as one, where there are several."""
        found = defaultdict(list)
        for standing in self.standings.values():
            found[standing.voice].append(standing.rater)
        return sorted(sorted(members) for members in found.values() if len(members) > 1)


def assess(
    votes: Sequence[Vote],
    settings: RaterSettings,
    *,
    gold: Sequence[Vote] = (),
    excluded: Collection[str] = (),
) -> Assessment:
    """Tell from their votes how far raters can be relied on.

    Each rater has an accuracy with a prior, estimated together with what is true of each unit (Dawid and
    Skene 1979 with one parameter a rater); a rater is held against the others only, never against itself or
    those who vote as one with it. Where nearly all responses are called good, agreeing on that says little:
    the true class is weighed to balance. What the votes in `gold` say is known to be true; it tells nothing
    of who gave them. `excluded` raters (those in quarantine) have no say in what is true, but are assessed. A
    tie decides nothing.
    """
    units = units_of(votes)
    decided = _Decided(units, gold, settings)
    voices = voices_of(units, decided.raters)
    usual = _PRIOR
    for _ in range(2):
        # Newcomers are expected to be as good as is usual here, which the first time tells.
        accuracy = decided.estimate(voices, frozenset(excluded), usual, settings.newcomer_judgements)
        usual = decided.usual_accuracy(accuracy, frozenset(excluded))
    cast = Counter(vote.rater for vote in votes)
    standings = {
        rater: decided.standing(
            n, votes=cast[rater], accuracy=float(accuracy[n]), usual=usual, voice=voices[n], settings=settings
        )
        for n, rater in enumerate(decided.raters)
    }
    for rater in cast.keys() - standings.keys():
        # Only ties, so far.
        reliability = 1.0 if is_trusted(rater, settings) else settings.newcomer_weight
        standings[rater] = Standing(rater, cast[rater], 0, None, usual, reliability, 0, 0, rater)
    shared = {
        unit
        for unit, said in units.items()
        if unit in decided.gold
        or len({standings[rater].voice for rater in said if rater not in excluded}) > 1
    }
    corroborable = frozenset(vote.id for vote in votes if not shared.isdisjoint(vote.verdicts))
    return Assessment(standings, corroborable, usual)


def is_trusted(rater: str, settings: RaterSettings) -> bool:
    """Whether the settings name the rater, or its key, as one whose votes need no confirmation."""
    return rater in settings.trusted or key_of(rater) in settings.trusted


class _Decided:
    """The verdicts that are no ties, as arrays (V,): which rater said it of which unit, and whether `+`.

    `pair` tells verdicts on pairs of responses from those on single ones: which response of a pair comes
    first is chance, but most single responses may be good.
    """

    def __init__(self, units: Units, gold: Sequence[Vote], settings: RaterSettings) -> None:
        rows = [
            (unit, rater, label)
            for unit, said in units.items()
            for rater, label in said.items()
            if label != TIE
        ]
        self.raters = sorted({rater for _, rater, _ in rows})
        self.gold = {unit: label for vote in gold for unit, label in vote.verdicts.items() if label != TIE}
        givers = {(vote.rater, unit) for vote in gold for unit in vote.verdicts}
        rater_at = {rater: n for n, rater in enumerate(self.raters)}
        unit_at = {unit: n for n, unit in enumerate(dict.fromkeys(unit for unit, _, _ in rows))}
        self.rater = np.array([rater_at[rater] for _, rater, _ in rows], dtype=np.intp)
        self.unit = np.array([unit_at[unit] for unit, _, _ in rows], dtype=np.intp)
        self.good = np.array([label == "+" for _, _, label in rows], dtype=bool)
        self.pair = np.array([len(unit) == 2 for unit, _, _ in rows], dtype=bool)
        sign = {"+": 1, "-": -1}
        self.known = np.array(
            [
                0 if (rater, unit) in givers else sign.get(self.gold.get(unit, ""), 0)
                for unit, rater, _ in rows
            ],
            dtype=np.intp,
        )
        by_rater = np.argsort(self.rater, kind="stable")
        self.mine = np.split(by_rater, np.cumsum(np.bincount(self.rater, minlength=len(self.raters)))[:-1])
        self.trusted = np.array([is_trusted(rater, settings) for rater in self.raters], dtype=bool)

    def estimate(
        self, voices: Sequence[str], excluded: frozenset[str], usual: float, strength: float
    ) -> Floats:
        """Return each rater's accuracy (R,), a posterior mode: prior `strength` verdicts `usual` right.

        Sets `belief` (V,), the probability by all others that the unit is good, `others` (V,), whether there
        are any, `balance` (V, 2), what a unit that is good or bad counts, and `voice` and `say` (V,).
        """
        voice_at = {voice: n for n, voice in enumerate(dict.fromkeys(voices))}
        self.voice = np.array([voice_at[name] for name in voices], dtype=np.intp)[self.rater]
        in_unit = np.unique(np.stack([self.voice, self.unit]), axis=1, return_inverse=True)[1].reshape(-1)
        heard = np.array([rater not in excluded for rater in self.raters], dtype=float)[self.rater]
        # Those who vote as one have one voice.
        size = np.bincount(in_unit, heard)
        self.say = say = np.divide(heard, size[in_unit], out=np.zeros(len(heard)), where=heard > 0)
        of_others = np.bincount(self.unit, say)[self.unit] - np.bincount(in_unit, say)[in_unit]
        self.others = (of_others > 1e-9) | (self.known != 0)
        prior = np.where(self.trusted, max(usual, _TRUSTED_PRIOR), usual)
        accuracy, good_share = prior.copy(), 0.5
        for _ in range(_STEPS):
            for_good = say * np.where(self.good, 1, -1) * _logit(accuracy)[self.rater]
            rate = np.where(self.pair, 0.5, good_share)
            of_others = np.bincount(self.unit, for_good)[self.unit] - np.bincount(in_unit, for_good)[in_unit]
            self.belief = _expit(of_others + _logit(rate))
            self.belief = np.where(self.known == 0, self.belief, self.known > 0)
            self.balance = np.stack([1 / (2 * rate), 1 / (2 * (1 - rate))], axis=1)
            right = np.where(self.good, accuracy[self.rater], 1 - accuracy[self.rater])
            is_good = self.belief * right / (self.belief * right + (1 - self.belief) * (1 - right))
            masses = np.stack([is_good, 1 - is_good], axis=1) * self.balance * self.others[:, None]
            agreeing = np.where(self.good, masses[:, 0], masses[:, 1])
            before = accuracy
            accuracy = strength * prior + np.bincount(self.rater, agreeing, len(prior))
            accuracy /= strength + np.bincount(self.rater, masses.sum(1), len(prior))
            accuracy = np.clip(accuracy, 0.02, 0.98)
            single = self.others & ~self.pair
            if single.any():
                good_share = float(np.clip(is_good[single].mean(), 0.1, 0.9))
            if np.abs(accuracy - before).max(initial=0.0) < 1e-6:
                break
        return accuracy

    def usual_accuracy(self, accuracy: Floats, excluded: frozenset[str]) -> float:
        """Return the median accuracy of those of whom enough is known, by how much; else what is expected."""
        judged = np.bincount(self.rater, self.others, len(self.raters))
        heard = np.array([rater not in excluded for rater in self.raters], dtype=bool)
        known = (judged >= _KNOWN) & heard
        if known.sum() < 3:
            return _PRIOR
        order = np.argsort(accuracy[known])
        weight = np.cumsum(np.minimum(judged[known], 100)[order])
        median = accuracy[known][order][np.searchsorted(weight, weight[-1] / 2)]
        return float(np.clip(median, 0.55, 0.95))

    def standing(
        self, n: int, *, votes: int, accuracy: float, usual: float, voice: str, settings: RaterSettings
    ) -> Standing:
        """Put together what is known of the rater at `n`."""
        mine = self.mine[n][self.others[self.mine[n]]]
        judged = len(mine)
        agreement, sure = None, 0.0
        if judged:
            good, belief = self.good[mine], self.belief[mine]
            masses = np.stack([belief, 1 - belief], axis=1) * self.balance[mine]
            agreement = float(np.where(good, masses[:, 0], masses[:, 1]).sum() / masses.sum())
            sure = float(np.abs(2 * belief - 1).sum())
        asked = mine[self.known[mine] != 0]
        right = int((self.good[asked] == (self.known[asked] > 0)).sum())
        trusted = bool(self.trusted[n])
        skill = min(1.0, max(0.0, 2 * accuracy - 1) / (2 * usual - 1))
        prior = settings.newcomer_judgements
        known = (sure + prior * settings.newcomer_weight) / (sure + prior) if sure + prior else 1.0
        return Standing(
            rater=self.raters[n],
            votes=votes,
            judged=judged,
            agreement=agreement,
            accuracy=accuracy,
            reliability=1.0 if trusted else max(_LEAST, skill * known),
            gold_asked=len(asked),
            gold_right=right,
            voice=voice,
            suspicions=() if trusted else self._suspicions(mine, agreement, len(asked), right, settings),
        )

    def _suspicions(
        self, mine: Positions, agreement: float | None, asked: int, right: int, settings: RaterSettings
    ) -> tuple[str, ...]:
        """Say what speaks for quarantine: being contrary more often than not, beyond chance.

        It takes several others, or the two accounts of one person could frame a third.
        """
        found = []
        enough = agreement is not None and len(mine) >= settings.quarantine_judgements
        contrary = agreement is not None and enough and _upper_bound(agreement, len(mine)) < 0.5
        if contrary and (others := self._contradicting(mine)) >= _SEVERAL:
            found.append(
                f"It says the contrary of {others} others: it agrees with {agreement:.0%} of what they hold "
                f"on {len(mine)} verdicts."
            )
        if asked and _upper_bound(right / asked, asked) < 0.5:
            found.append(f"It fails gold questions: {right} of {asked} verdicts are right.")
        return tuple(found)

    def _contradicting(self, mine: Positions) -> int:
        """Count the voices that said the contrary of these verdicts of one rater."""
        said = dict(zip(self.unit[mine].tolist(), self.good[mine].tolist(), strict=True))
        common = np.flatnonzero(np.isin(self.unit, self.unit[mine]) & (self.say > 0))
        return len({int(self.voice[i]) for i in common if said[int(self.unit[i])] != self.good[i]})


def _upper_bound(share: float, n: int) -> float:
    """Upper confidence bound of a share of `n` (Wilson 1927, J. American Statistical Association 22)."""
    z2 = _SURE**2
    centre = share + z2 / (2 * n)
    return (centre + _SURE * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)


def _logit(p: Any) -> Floats:
    return np.asarray(np.log(p) - np.log1p(-np.asarray(p)))


def _expit(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -500, 500))))
