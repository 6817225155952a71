"""Intervals against an obvious slow version, known values, and coverage on simulated data."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.comparison import clustered_mean, outcome, paired_difference, wilson, win_rate


def slow_interval(
    clusters: list[str], values: list[float], confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Draw whole clusters, one resample after the other, in plain Python."""
    names = sorted(set(clusters))
    members = {
        name: [value for own, value in zip(clusters, values, strict=True) if own == name] for name in names
    }
    random = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        pool = [
            value for index in random.integers(len(names), size=len(names)) for value in members[names[index]]
        ]
        means.append(sum(pool) / len(pool))
    tail = (1 - confidence) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(-5, 5)), min_size=2, max_size=30).filter(
        lambda rows: len({name for name, _ in rows}) > 1
    ),
    st.sampled_from([0.8, 0.95]),
    st.integers(0, 9),
)
def test_the_interval_is_the_slow_versions(
    rows: list[tuple[str, float]], confidence: float, seed: int
) -> None:
    clusters, values = [name for name, _ in rows], [value for _, value in rows]
    found = clustered_mean(clusters, values, confidence=confidence, resamples=300, seed=seed)
    low, high = slow_interval(clusters, values, confidence, 300, seed)
    assert found.estimate == pytest.approx(sum(values) / len(values))
    assert found.low == pytest.approx(low, abs=1e-9)
    assert found.high == pytest.approx(high, abs=1e-9)
    assert (found.clusters, found.values) == (len(set(clusters)), len(values))


def test_blocks_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = [str(n // 3) for n in range(60)]
    values = np.sin(np.arange(60.0))
    whole = clustered_mean(clusters, values, seed=4)
    monkeypatch.setattr("evaluation.comparison._BLOCK", 70)
    assert clustered_mean(clusters, values, seed=4) == whole


def test_answers_that_move_together_widen_the_interval() -> None:
    """Eight copies of one prompt's answer are one answer, not eight."""
    single = np.random.default_rng(0).integers(0, 2, 40).astype(float)
    once = clustered_mean([str(n) for n in range(40)], single, seed=1)
    copied = clustered_mean([str(n // 8) for n in range(320)], np.repeat(single, 8), seed=1)
    assert (copied.estimate, copied.low, copied.high) == pytest.approx((once.estimate, once.low, once.high))
    naive = clustered_mean([str(n) for n in range(320)], np.repeat(single, 8), seed=1)
    assert naive.high - naive.low < 0.5 * (copied.high - copied.low)


def test_ninety_five_percent_intervals_cover_the_truth_about_that_often() -> None:
    """60 prompts with their own level, 4 answers each, before and after; the true improvement is 0.2."""
    random = np.random.default_rng(3)
    clusters = [str(prompt) for prompt in range(60) for _ in range(4)]
    covered, unclustered = 0, 0
    for trial in range(300):
        effect = np.repeat(random.normal(0.2, 0.3, 60), 4)
        before = random.normal(size=240)
        after = before + effect + random.normal(0, 0.2, 240)
        found = paired_difference(clusters, before, after, resamples=400, seed=trial)
        covered += found.low <= 0.2 <= found.high
        alone = paired_difference([str(n) for n in range(240)], before, after, resamples=400, seed=trial)
        unclustered += alone.low <= 0.2 <= alone.high
    assert 0.90 <= covered / 300 <= 0.985
    assert unclustered / 300 < 0.85, "without clusters the interval is too narrow; the test must see that"


def test_a_paired_difference_is_after_minus_before() -> None:
    found = paired_difference(["a", "a", "b", "b"], [0, 1, 0, 0], [1, 1, 1, 1], seed=0)
    assert found.estimate == 0.75
    assert (found.low, found.high) == (0.5, 1.0)


def test_outcomes() -> None:
    assert [outcome(2, 1), outcome(1, 2), outcome(1, 1)] == [1.0, 0.0, 0.5]
    assert outcome(1.05, 1.0, tie_within=0.1) == 0.5
    assert win_rate(["a", "b"], [1, 0.5]).estimate == 0.75
    with pytest.raises(ValueError, match=r"0, 0\.5 or 1"):
        win_rate(["a", "b"], [1, 0.7])


def test_what_no_interval_can_be_told_from_is_an_error() -> None:
    with pytest.raises(ValueError, match="two clusters"):
        clustered_mean(["a", "a"], [0, 1])
    with pytest.raises(ValueError, match="two clusters"):
        clustered_mean([], [])
    with pytest.raises(ValueError, match="shape"):
        clustered_mean(["a", "b"], [1.0])


def test_wilson_is_the_solution_of_its_equation() -> None:
    """The bounds are where the share lies z standard errors of the bound itself away (Wilson 1927)."""
    for successes, trials in [(7, 10), (1, 30), (450, 1000)]:
        found = wilson(successes, trials)
        for bound in (found.low, found.high):
            error = math.sqrt(bound * (1 - bound) / trials)
            assert abs(found.estimate - bound) == pytest.approx(1.959964 * error, rel=1e-5)
    assert (wilson(0, 5).low, wilson(5, 5).high) == (0.0, 1.0)
    assert wilson(5, 5).low == pytest.approx(0.5655, abs=1e-4)
    for successes, trials in [(0, 0), (3, 2), (-1, 4)]:
        with pytest.raises(ValueError):
            wilson(successes, trials)
