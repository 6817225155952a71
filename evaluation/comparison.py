"""Estimates with confidence intervals: paired differences, win rates, accuracies.

Owns the statistics, as pure functions of numbers; what is compared and what follows from it is elsewhere.
Several answers to one prompt are not independent, so the bootstrap draws whole prompts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK = 4_000_000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between `low` and `high` at `confidence`, from `values` numbers on `clusters` prompts."""

    estimate: float
    low: float
    high: float
    confidence: float
    clusters: int
    values: int

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def figures(self) -> dict[str, Any]:
        """Return the interval as plain JSON."""
        return asdict(self)


def clustered_mean(
    clusters: Sequence[str],
    values: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `values` (N,) with a percentile bootstrap interval over their `clusters` (N names).

    Each resample draws as many clusters as there are, with replacement, and takes the mean over all values
    in those drawn (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13).
    Raises ValueError with fewer than two clusters: no interval can be told from one.
    """
    flat = np.asarray(values, dtype=np.float64)
    if flat.shape != (len(clusters),):
        raise ValueError(f"{len(clusters)} clusters for values of shape {flat.shape}")
    names, member = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    count = len(names)  # C
    if count < 2:
        raise ValueError(f"an interval needs at least two clusters, not {count}")
    sums = np.bincount(member, weights=flat, minlength=count).astype(np.float64)  # (C,)
    sizes = np.bincount(member, minlength=count).astype(np.float64)  # (C,)
    means = _resampled_means(sums, sizes, resamples, np.random.default_rng(seed))
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(flat.mean()), float(low), float(high), confidence, count, len(flat))


def _resampled_means(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], resamples: int, random: np.random.Generator
) -> NDArray[np.float64]:
    count = len(sums)
    means = np.empty(resamples)
    step = max(1, _BLOCK // count)  # resamples a block: bounds the memory of the drawn indices
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = random.integers(count, size=(stop - start, count))
        means[start:stop] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    return means


def paired_difference(
    clusters: Sequence[str],
    before: ArrayLike,
    after: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `after - before`, each (N,) and paired by position, clustered as in `clustered_mean`."""
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return clustered_mean(clusters, difference, confidence=confidence, resamples=resamples, seed=seed)


def outcome(candidate: float, incumbent: float, tie_within: float = 0.0) -> float:
    """1 where the candidate scores higher, 0 where lower, 0.5 where they differ by `tie_within` at most."""
    if abs(candidate - incumbent) <= tie_within:
        return 0.5
    return 1.0 if candidate > incumbent else 0.0


def win_rate(
    clusters: Sequence[str],
    outcomes: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of `outcomes` (N values of 0, 0.5 or 1), clustered as in `clustered_mean`."""
    flat = np.asarray(outcomes, dtype=np.float64)
    if not np.isin(flat, (0.0, 0.5, 1.0)).all():
        raise ValueError("an outcome is 0, 0.5 or 1")
    return clustered_mean(clusters, flat, confidence=confidence, resamples=resamples, seed=seed)


def wilson(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a share of independent trials (Wilson 1927, JASA 22).

    Raises ValueError without trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = (z / (1 + z * z / trials)) * float(
        np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    )
    # At 0 and at `trials` one bound is exact; rounding must not push it past the share.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return Interval(share, low, high, confidence, trials, trials)
