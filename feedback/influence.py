"""How much each of a round's votes counts, with the reasons.

Pure: no database, no model. By what is known of the raters (`reliability`), and so that no rater and no key
has more than its share. What is weighed is a vote, whatever a model makes of it.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedback.reliability import Assessment, assess, is_trusted
from feedback.settings import RaterSettings
from feedback.votes import Vote, person_of

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]

NEWCOMER = "little is known of the rater"
UNRELIABLE = "the rater agrees less with others than most do"
ALONE = "nobody else judged it"
ONE_PROMPT = "many votes of one rater on one prompt"
PROMPT_SHARE = "the rater's share of the prompt"
RATER_SHARE = "the rater's share of the round"
KEY_SHARE = "the key's share of the round"
QUARANTINED = "the rater is quarantined"

_FAIR_SHARES = 2
"""A share never binds below so many equal shares: with few raters or keys, somebody has to have more."""
_STEPS = 200


@dataclass(frozen=True, slots=True)
class Weighed:
    """What a vote weighs, and why it is not its full weight."""

    weight: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Influence:
    """The weights of a round's votes, in their order, and what the limits did.

    `rater_limit` and `key_limit` are the shares that held: larger than configured where there are too few
    raters or keys, or where `set_aside` would have passed what is allowed. `set_aside` is the share of all
    weight that the two limits took.
    """

    votes: list[Weighed]
    rater_limit: float
    key_limit: float
    set_aside: float

    def weights(self) -> list[float]:
        """Return the weights alone."""
        return [vote.weight for vote in self.votes]

    def figures(self) -> dict[str, Any]:
        """Return what the limits did and how many votes have each reason, as plain JSON."""
        return {
            "votes": len(self.votes),
            "weight": math.fsum(self.weights()),
            "rater_limit": self.rater_limit,
            "key_limit": self.key_limit,
            "set_aside": self.set_aside,
            "reasons": dict(Counter(reason for vote in self.votes for reason in vote.reasons)),
        }


def defended(votes: Sequence[Vote], settings: RaterSettings, *, gold: Sequence[Vote] = ()) -> Influence:
    """Do to votes, all of one round, what a round does by itself: assess, quarantine whom it must, and weigh.

    The votes of who is quarantined get the weight 0.
    """
    suspects = assess(votes, settings, gold=gold).suspects() if settings.automatic_quarantine else {}
    if not settings.defend:
        suspects = {}
    kept = [vote for vote in votes if vote.rater not in suspects]
    influence = weigh(kept, assess(votes, settings, gold=gold, excluded=suspects.keys()), settings)
    weighed = iter(influence.votes)
    everyone = [Weighed(0.0, (QUARANTINED,)) if vote.rater in suspects else next(weighed) for vote in votes]
    return replace(influence, votes=everyone)


def weigh(votes: Sequence[Vote], assessment: Assessment, settings: RaterSettings) -> Influence:
    """Give each of a round's votes its weight.

    First by what is known of its rater, and by less where nobody else judged the same. Then a rater's votes
    on one prompt, those of a rater and those of a key are scaled down until none has more than its share;
    those who vote as one are one rater here. Raters whom the settings trust are not limited, but count in the
    whole.
    """
    if not settings.defend or not votes:
        return Influence([Weighed(vote.weight) for vote in votes], 1.0, 1.0, 0.0)
    scale = _Scale(votes, assessment, settings)
    scale.limit_prompts(settings)
    whole = scale.whole
    least = whole * (1 - settings.most_set_aside)
    rater_limit = key_limit = 1.0
    # Each limit changes the whole that the other one is a share of.
    for _ in range(_STEPS):
        before = scale.whole
        rater_limit = scale.limit(scale.voices, settings.rater_share, least, RATER_SHARE)
        key_limit = scale.limit(scale.keys, settings.key_share, least, KEY_SHARE)
        if scale.whole >= before * (1 - 1e-12):
            break
    return Influence(
        votes=[
            Weighed(weight, tuple(reasons))
            for weight, reasons in zip(scale.weights.tolist(), scale.reasons, strict=True)
        ],
        rater_limit=rater_limit,
        key_limit=key_limit,
        set_aside=1 - scale.whole / whole if whole else 0.0,
    )


class _Scale:
    """The weights (N,) of N votes on their way down, and the reasons."""

    def __init__(self, votes: Sequence[Vote], assessment: Assessment, settings: RaterSettings) -> None:
        self.weights = np.zeros(len(votes))
        self.reasons: list[list[str]] = [[] for _ in votes]
        standings = assessment.standings
        self._trusted = np.array([is_trusted(vote.rater, settings) for vote in votes], dtype=bool)
        for n, vote in enumerate(votes):
            standing = standings.get(vote.rater)
            weight = vote.weight
            if not self._trusted[n]:
                known = settings.newcomer_weight if standing is None else standing.reliability
                if known < 1:
                    judged = 0 if standing is None else standing.judged
                    newcomer = judged < settings.newcomer_judgements
                    self.reasons[n].append(NEWCOMER if newcomer else UNRELIABLE)
                weight *= known
                if vote.id not in assessment.corroborable and settings.lone_weight < 1:
                    self.reasons[n].append(ALONE)
                    weight *= settings.lone_weight
            self.weights[n] = weight
        names = [standings[vote.rater].voice if vote.rater in standings else vote.rater for vote in votes]
        # On one prompt, those without a name may all be one person.
        self._persons = np.array([person_of(name) for name in names], dtype=object)
        self.voices, self.keys = _groups(names), _groups([vote.key for vote in votes])
        self._prompts = _groups([vote.prompt for vote in votes])
        self._raw = np.array([vote.weight for vote in votes])

    @property
    def whole(self) -> float:
        return float(self.weights.sum())

    def limit_prompts(self, settings: RaterSettings) -> None:
        """Keep each rater within so many votes, and within its share, on each prompt."""
        for prompt in self._prompts:
            voices = [prompt[own] for own in _groups(self._persons[prompt])]
            for own in voices:
                if not self._trusted[own].any() and self._raw[own].sum() > settings.prompt_votes:
                    self._scale(own, settings.prompt_votes / self._raw[own].sum(), ONE_PROMPT)
            self.limit(voices, settings.prompt_share, 0.0, PROMPT_SHARE)

    def limit(self, groups: Sequence[Positions], share: float, least: float, why: str) -> float:
        """Scale groups down to `share` of the whole of all groups; returns the share that held.

        With few groups it is two equal shares. It is raised until `least` is left of the whole.
        """
        limited = [group for group in groups if not self._trusted[group].all()]
        totals = np.array([self.weights[group].sum() for group in limited])
        fixed = math.fsum(self.weights[group].sum() for group in groups if self._trusted[group].all())
        limit = least_limit(totals, fixed, min(1.0, max(share, _FAIR_SHARES / len(groups))), least)
        for group, factor in zip(limited, factors_within(totals, fixed, limit).tolist(), strict=True):
            if factor < 1 - 1e-12:
                self._scale(group, factor, why)
        return limit

    def _scale(self, positions: Positions, factor: float, why: str) -> None:
        self.weights[positions] *= factor
        for n in positions.tolist():
            if why not in self.reasons[n]:
                self.reasons[n].append(why)


def factors_within(totals: Floats, fixed: float, limit: float) -> Floats:
    """Return the factors, at most 1, by which no total is more than `limit` of the whole after them.

    The whole is `fixed` and what is left of all `totals`; as little as possible is taken. Without a whole
    that could hold it (fewer than 1 / `limit` totals and nothing fixed) nothing is taken.
    """
    ordered = np.sort(totals)[::-1]
    for above in range(len(ordered) + 1):
        # The largest `above` are cut to one level, which is `limit` of the whole.
        rest = fixed + float(ordered[above:].sum())
        if above * limit >= 1 or rest <= 0:
            break
        level = limit * rest / (1 - above * limit)
        if above == len(ordered) or ordered[above] <= level * (1 + 1e-12):
            factors = np.divide(level, totals, out=np.ones(len(totals)), where=totals > 0)
            return np.asarray(np.minimum(1.0, factors))
    return np.ones(len(totals))


def least_limit(totals: Floats, fixed: float, limit: float, least: float) -> float:
    """Return the smallest limit from `limit` on that leaves at least `least` of the whole, by bisection."""

    def left(at: float) -> float:
        # What earlier limits left is `least` but for rounding.
        return (fixed + float((totals * factors_within(totals, fixed, at)).sum())) * (1 + 1e-9)

    if left(limit) >= least:
        return limit
    low, high = limit, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) >= least else (middle, high)
    return high


def _groups(names: Iterable[Hashable]) -> list[Positions]:
    """Return the positions of each name, in the order in which the names first come."""
    found: dict[Hashable, list[int]] = {}
    for n, name in enumerate(names):
        found.setdefault(name, []).append(n)
    return [np.array(positions, dtype=np.intp) for positions in found.values()]
