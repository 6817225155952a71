"""Tests of two shares of good votes that stay valid however often one looks.

Owns the statistics, as pure functions of counts; which votes count is `feedback.trial_votes`' affair, what
follows from them `evaluation.canary`'s. Counts may be numbers or arrays of one shape. The votes of an arm are
taken as independent, each good with the arm's share.

Both functions return the logarithm of an e-process: under its null hypothesis the chance that it ever reaches
1/alpha is at most alpha (Ville's inequality), so one may look after every vote and act at the first crossing.
It is the likelihood of the votes where each arm's share has the prior Beta(1/2, 1/2) (Krichevsky and Trofimov
1981, IEEE Transactions on Information Theory 27), over the greatest likelihood within the null hypothesis:
universal inference (Wasserman, Ramdas and Balakrishnan 2020, PNAS 117, section 8; on validity at any time
Howard et al. 2021, Annals of Statistics 49). Which arm a vote falls to may depend on all votes before it.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_HALVINGS = 50
"""So many narrow an interval within [0, 1] to 1e-15."""


def log_e_worse(
    canary_good: ArrayLike, canary_bad: ArrayLike, stable_good: ArrayLike, stable_bad: ArrayLike
) -> Array:
    """Return the evidence that the canary's share of good votes lies below the stable version's.

    The null hypothesis is that it is the same or greater.
    """
    counts = _counts(canary_good, canary_bad, stable_good, stable_bad)
    canary, stable = _shares(counts)
    return _log_e(counts, within=canary >= stable, distance=0.0)


def log_e_not_worse(
    canary_good: ArrayLike,
    canary_bad: ArrayLike,
    stable_good: ArrayLike,
    stable_bad: ArrayLike,
    margin: float,
) -> Array:
    """Return the evidence that the canary's share lies less than `margin` (0 to 1) below the stable one's.

    The null hypothesis is that it lies `margin` or more below.
    """
    counts = _counts(canary_good, canary_bad, stable_good, stable_bad)
    canary, stable = _shares(counts)
    return _log_e(counts, within=canary <= stable - margin, distance=margin)


def _log_e(counts: list[Array], *, within: NDArray[np.bool_], distance: float) -> Array:
    """Return the log of mixture over maximum; `within` says where the null has the observed shares.

    Elsewhere its maximum lies on its edge, where the canary's share is the stable one's less `distance`: the
    null is convex and the log likelihood concave.
    """
    a, b, c, d = counts
    numerator = _log_mixture(a, b) + _log_mixture(c, d)
    p, q = _shares(counts)
    most = _log_likelihood(a, b, p) + _log_likelihood(c, d, q)
    edge = ~within
    if edge.any():
        most[edge] = _most_on_edge([count[edge] for count in counts], distance)
    found: Array = numerator - most
    return found


def _most_on_edge(counts: list[Array], distance: float) -> Array:
    """Maximise the log likelihood where the canary's share is q - `distance`, over the stable one's, q.

    Without a distance, q is the share of all votes. Else: it is concave in q, so its slope falls; halving the
    interval in which the slope changes its sign finds the maximum, also where that is an end, without ever
    taking the slope at an end, where it may be infinite.
    """
    a, b, c, d = counts
    if distance == 0:
        return _log_likelihood(a + c, b + d, (a + c) / (a + b + c + d))
    low, high = np.full_like(a, distance), np.ones_like(a)
    for _ in range(_HALVINGS):
        q = (low + high) / 2
        # Where rounding has put q onto an end, 1/0 has the sign that it should, and 0/0 none.
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = c / q - d / (1 - q) + a / (q - distance) - b / (1 - q + distance)
        rises = slope > 0
        low, high = np.where(rises, q, low), np.where(rises, high, q)
    q = (low + high) / 2
    return _log_likelihood(a, b, q - distance) + _log_likelihood(c, d, q)


def _log_mixture(good: Array, bad: Array) -> Array:
    """Return the log of the integral of p^good (1 - p)^bad over the prior Beta(1/2, 1/2)."""
    found: Array = (
        _log_gamma(good + 0.5) + _log_gamma(bad + 0.5) - _log_gamma(good + bad + 1) - math.log(math.pi)
    )
    return found


def _log_likelihood(good: Array, bad: Array, p: Array) -> Array:
    """Return good log p + bad log(1 - p), where 0 log 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(good > 0, good * np.log(p), 0) + np.where(bad > 0, bad * np.log1p(-p), 0)
    return found


def _log_gamma(x: Array) -> Array:
    return np.asarray(_LGAMMA(x), dtype=np.float64)


_LGAMMA: Any = np.frompyfunc(math.lgamma, 1, 1)


def _counts(*counts: ArrayLike) -> list[Array]:
    arrays = np.broadcast_arrays(*(np.asarray(count, dtype=np.float64) for count in counts))
    if any((array < 0).any() for array in arrays):
        raise ValueError("a count of votes is not negative")
    return [np.atleast_1d(array) for array in arrays]


def _shares(counts: list[Array]) -> tuple[Array, Array]:
    """Return each arm's share of good votes; 1/2 without votes, which is as likely as any."""
    a, b, c, d = counts
    return (
        np.divide(a, a + b, out=np.full_like(a, 0.5), where=a + b > 0),
        np.divide(c, c + d, out=np.full_like(c, 0.5), where=c + d > 0),
    )
