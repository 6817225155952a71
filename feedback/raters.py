"""Statistics on raters: how far they agree, how often each one errs, who is better by their comparisons.

Pure functions on plain data: no database, no settings. What a round makes of raters is in `influence`.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedback.votes import Unit, Vote

Units = Mapping[Unit, Mapping[str, str]]
"""Unit judged -> rater -> label, each rater's last word."""

TIE = "="
_SECONDS_A_DAY = 86_400
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far raters agree on what several of them judged; None where nothing was.

    `share` is the share of equal verdicts among all `pairs` of raters on all units, `decided_share` that
    among the `decided_pairs` in which neither calls a tie, `alpha` Krippendorff's for nominal labels (1 is
    perfect agreement, 0 what chance would give).
    """

    raters: int
    units: int
    share: float | None
    pairs: int
    decided_share: float | None
    decided_pairs: int
    alpha: float | None

    def figures(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return asdict(self)


def units_of(votes: Iterable[Vote]) -> dict[Unit, dict[str, str]]:
    """Collect what each rater says of each unit; where one spoke of it twice, the later vote counts."""
    units: dict[Unit, dict[str, str]] = defaultdict(dict)
    for vote in sorted(votes, key=lambda vote: (vote.at, vote.id)):
        for unit, label in vote.verdicts.items():
            units[unit][vote.rater] = label
    return units


def agreement(units: Units) -> Agreement:
    """Measure agreement over all units that at least two raters judged."""
    shared = [list(verdicts.values()) for verdicts in units.values() if len(verdicts) > 1]
    equal, pairs = _pairwise(shared)
    decided, decided_pairs = _pairwise([[label for label in labels if label != TIE] for labels in shared])
    return Agreement(
        raters=len({rater for verdicts in units.values() if len(verdicts) > 1 for rater in verdicts}),
        units=len(shared),
        share=equal / pairs if pairs else None,
        pairs=pairs,
        decided_share=decided / decided_pairs if decided_pairs else None,
        decided_pairs=decided_pairs,
        alpha=krippendorff_alpha(shared),
    )


def agreement_by_task(votes: Sequence[Vote]) -> dict[str, Agreement]:
    """Measure agreement within each task, by its name."""
    tasks = sorted({vote.task for vote in votes})
    return {task: agreement(units_of(vote for vote in votes if vote.task == task)) for task in tasks}


def agreement_over_time(votes: Sequence[Vote], days: int) -> dict[str, Agreement]:
    """Measure agreement in periods of so many days (UTC), by the date of their first day, oldest first.

    A unit belongs to the period of the last word on it: raters need not judge it at the same time.
    """
    seconds = days * _SECONDS_A_DAY
    last: dict[Unit, float] = {}
    for vote in votes:
        for unit in vote.verdicts:
            last[unit] = max(vote.at, last.get(unit, -math.inf))
    periods: dict[int, dict[Unit, Mapping[str, str]]] = defaultdict(dict)
    for unit, verdicts in units_of(votes).items():
        periods[math.floor(last[unit] / seconds)][unit] = verdicts
    return {
        time.strftime("%Y-%m-%d", time.gmtime(period * seconds)): agreement(periods[period])
        for period in sorted(periods)
    }


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal labels of any number of raters with gaps; None where undefined.

    `units` has each unit's labels. 1 - D_o / D_e with the observed disagreement within units and the expected
    one among all labels that stand in a unit with another (Krippendorff 2011, Computing Krippendorff's
    Alpha-Reliability, section D). Undefined unless two labels occur.
    """
    observed, totals = 0.0, Counter[Hashable]()
    for labels in units:
        if len(labels) < 2:
            continue
        counts = Counter(labels)
        totals += counts
        equal = sum(count * (count - 1) for count in counts.values())
        observed += len(labels) - equal / (len(labels) - 1)
    n = sum(totals.values())
    expected = n * n - sum(count * count for count in totals.values())
    return 1 - (n - 1) * observed / expected if expected else None


def _pairwise(units: Iterable[Sequence[str]]) -> tuple[int, int]:
    """Count the pairs of labels within units that are equal, and all pairs."""
    equal = pairs = 0
    for labels in units:
        equal += sum(count * (count - 1) // 2 for count in Counter(labels).values())
        pairs += len(labels) * (len(labels) - 1) // 2
    return equal, pairs


# -- error rates


@dataclass(frozen=True, slots=True)
class ErrorRates:
    """Dawid and Skene's estimates. `labels` names the J classes in the order of all arrays.

    `prior` (J,) is how frequent each class is, `errors` by rater (J, J) the probability of each label
    (column) given the true class (row), `posterior` by item (J,) the probability of each class.
    """

    labels: list[Hashable]
    prior: NDArray[np.float64]
    errors: Mapping[Hashable, NDArray[np.float64]]
    posterior: Mapping[Hashable, NDArray[np.float64]]
    log_likelihood: float


def dawid_skene(
    ratings: Iterable[tuple[Hashable, Hashable, Hashable]], *, tolerance: float = 1e-9, most_steps: int = 1000
) -> ErrorRates:
    """Estimate raters' error rates by EM (Dawid and Skene 1979, Applied Statistics 28, equations 2.3 to 2.5).

    `ratings` are (item, rater, label); a rater may rate an item several times. It starts from the share of
    each label among an item's ratings and ends when a step adds less than `tolerance` to the log likelihood,
    which never falls. Maximum likelihood, without a prior: of a rater with few ratings it says little.
    """
    rows = list(ratings)
    items, raters = list(dict.fromkeys(r[0] for r in rows)), list(dict.fromkeys(r[1] for r in rows))
    labels = sorted({r[2] for r in rows}, key=lambda label: (str(type(label)), label))
    i = np.array([{item: n for n, item in enumerate(items)}[r[0]] for r in rows])
    k = np.array([{rater: n for n, rater in enumerate(raters)}[r[1]] for r in rows])
    j = np.array([{label: n for n, label in enumerate(labels)}[r[2]] for r in rows])
    posterior = np.zeros((len(items), len(labels)))
    np.add.at(posterior, (i, j), 1.0)
    posterior /= posterior.sum(1, keepdims=True)
    likelihood = -math.inf
    for _ in range(most_steps):
        prior = posterior.mean(0)
        errors = np.zeros((len(raters), len(labels), len(labels)))  # rater, label, true class
        np.add.at(errors, (k, j), posterior[i])
        errors /= np.maximum(errors.sum(1, keepdims=True), _TINY)
        with np.errstate(divide="ignore"):  # what never happened is impossible, as in the paper
            logs = np.tile(np.log(prior), (len(items), 1))
            np.add.at(logs, i, np.log(errors[k, j]))
        evidence = np.logaddexp.reduce(logs, axis=1)
        posterior = np.exp(logs - evidence[:, None])
        before, likelihood = likelihood, float(evidence.sum())
        if likelihood - before < tolerance:
            break
    return ErrorRates(
        labels=labels,
        prior=prior,
        errors={rater: errors[n].T for n, rater in enumerate(raters)},
        posterior={item: posterior[n] for n, item in enumerate(items)},
        log_likelihood=likelihood,
    )


# -- comparisons


@dataclass(frozen=True, slots=True)
class CrowdBradleyTerry:
    """Scores of what was compared, around 0, and how often each rater follows them, not the contrary."""

    scores: Mapping[str, float]
    reliability: Mapping[str, float]


def crowd_bradley_terry(
    comparisons: Iterable[tuple[str, str, str]],
    *,
    prior: tuple[float, float] = (8.0, 2.0),
    virtual: float = 0.5,
    tolerance: float = 1e-6,
    most_steps: int = 2000,
) -> CrowdBradleyTerry:
    """Fit a Bradley-Terry model in which each rater follows the scores or says the contrary.

    `comparisons` are (rater, better, worse). P(rater k prefers i to j) = e_k s(r_i - r_j) + (1 - e_k)
    s(r_j - r_i) with the logistic s (Chen et al. 2013, Pairwise Ranking Aggregation in a Crowdsourced
    Setting, WSDM, equation 3); e_k has the Beta distribution `prior`, and each thing also won and lost
    `virtual` comparisons with one of score 0, as the paper's virtual node. The posterior mode by EM: whether
    a rater followed the scores is the hidden variable; the scores' step is Hunter's (2004, Annals of
    Statistics 32, equation 3).
    """
    rows = list(comparisons)
    raters, names = sorted({row[0] for row in rows}), sorted({name for row in rows for name in row[1:]})
    at = {name: n for n, name in enumerate(names)}
    k = np.array([{rater: n for n, rater in enumerate(raters)}[row[0]] for row in rows], dtype=np.intp)
    better = np.array([at[row[1]] for row in rows], dtype=np.intp)
    worse = np.array([at[row[2]] for row in rows], dtype=np.intp)
    said = np.bincount(k, minlength=len(raters))
    followed = prior[0] / sum(prior) * np.ones(len(raters))
    worth = np.ones(len(names))  # e to the score
    for _ in range(most_steps):
        ahead = worth[better] / (worth[better] + worth[worse])
        honest = followed[k] * ahead
        honest /= honest + (1 - followed[k]) * (1 - ahead)
        followed = (prior[0] - 1 + np.bincount(k, honest, len(raters))) / (sum(prior) - 2 + said)
        wins = virtual + np.bincount(better, honest, len(names)) + np.bincount(worse, 1 - honest, len(names))
        rate = 1 / (worth[better] + worth[worse])
        met = 2 * virtual / (worth + 1)
        met += np.bincount(better, rate, len(names)) + np.bincount(worse, rate, len(names))
        before, worth = worth, wins / met
        if np.abs(np.log(worth / before)).max(initial=0.0) < tolerance:
            break
    return CrowdBradleyTerry(
        scores=dict(zip(names, np.log(worth).tolist(), strict=True)),
        reliability=dict(zip(raters, followed.tolist(), strict=True)),
    )


def comparisons_of(votes: Iterable[Vote]) -> list[tuple[str, str, str]]:
    """Return the decided pairs of all votes as (rater, better, worse)."""
    found = []
    for unit, verdicts in units_of(votes).items():
        if len(unit) != 2:
            continue
        first, second = unit
        for rater, label in verdicts.items():
            if label != TIE:
                found.append((rater, first, second) if label == "+" else (rater, second, first))
    return found


def mutual_agreement(units: Units, raters: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count, for each two of `raters` (R, R), what both decided, and on what of it they said the same."""
    at = {rater: n for n, rater in enumerate(raters)}
    common = np.zeros((len(raters), len(raters)), dtype=np.int64)
    equal = np.zeros_like(common)
    for verdicts in units.values():
        mine = [(at[rater], label) for rater, label in verdicts.items() if rater in at and label != TIE]
        for (a, said), (b, other) in combinations(mine, 2):
            common[a, b] += 1
            equal[a, b] += said == other
    return common + common.T, equal + equal.T
