"""The always-valid tests: against an obvious numerical version, at their edges, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.sequential import log_e_not_worse, log_e_worse
from tests.benchmarks.canary_errors import first_alarms, not_worse, worse, z_test

COUNTS = st.tuples(*[st.integers(0, 30)] * 4)
GRID = np.linspace(0, 1, 401)
MARGIN = 0.1


def slow_mixture(good: int, bad: int) -> float:
    """The mean likelihood over Beta(1/2, 1/2): p is sin² of an angle that is equally likely everywhere."""
    angle = (np.arange(2000) + 0.5) / 2000 * math.pi / 2
    p = np.sin(angle) ** 2
    return float(np.mean(p**good * (1 - p) ** bad))


def slow_log_e(counts: tuple[int, int, int, int], null: np.ndarray) -> float:
    """`null` (401, 401) says which pairs of shares (canary's by row, stable's by column) it allows."""
    a, b, c, d = counts
    likelihood = np.outer(GRID**a * (1 - GRID) ** b, GRID**c * (1 - GRID) ** d)
    return math.log(slow_mixture(a, b) * slow_mixture(c, d) / likelihood[null].max())


# A grid misses the maximum by a little: its e is too great by a little.


@given(COUNTS)
def test_worse_is_the_mixture_over_the_maximum(counts: tuple[int, int, int, int]) -> None:
    slow = slow_log_e(counts, GRID[:, None] >= GRID[None, :] - 1e-9)
    assert slow - 0.01 <= log_e_worse(*counts).item() <= slow + 1e-6


@given(COUNTS)
def test_not_worse_is_the_mixture_over_the_maximum(counts: tuple[int, int, int, int]) -> None:
    slow = slow_log_e(counts, GRID[:, None] <= GRID[None, :] - MARGIN + 1e-9)
    assert slow - 0.01 <= log_e_not_worse(*counts, MARGIN).item() <= slow + 1e-6


@given(st.lists(COUNTS, min_size=1, max_size=5))
def test_arrays_give_what_numbers_give(many: list[tuple[int, int, int, int]]) -> None:
    columns = [list(column) for column in zip(*many, strict=True)]
    assert log_e_worse(*columns).tolist() == [log_e_worse(*one).item() for one in many]
    assert log_e_not_worse(*columns, MARGIN).tolist() == [
        log_e_not_worse(*one, MARGIN).item() for one in many
    ]


@pytest.mark.parametrize(
    "counts", [(0, 0, 0, 0), (10**6, 0, 10**6, 0), (0, 10**6, 0, 10**6), (3, 0, 0, 10**6), (0, 10**6, 5, 0)]
)
def test_extreme_counts_give_numbers(counts: tuple[int, int, int, int]) -> None:
    assert np.isfinite(log_e_worse(*counts)).all()
    assert np.isfinite(log_e_not_worse(*counts, MARGIN)).all()


def test_no_votes_are_no_evidence_and_a_negative_count_is_refused() -> None:
    assert log_e_worse(0, 0, 0, 0).item() == pytest.approx(0, abs=1e-9)
    assert log_e_not_worse(0, 0, 0, 0, MARGIN).item() == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="not negative"):
        log_e_worse(1, -1, 0, 0)


def test_each_says_what_it_is_named_for() -> None:
    assert log_e_worse(40, 60, 70, 30).item() > math.log(20) > log_e_not_worse(40, 60, 70, 30, MARGIN).item()
    assert log_e_not_worse(700, 300, 700, 300, MARGIN).item() > math.log(20) > log_e_worse(700, 300, 700, 300)


def test_looking_after_every_vote_errs_in_at_most_alpha_of_all_runs() -> None:
    """A small version of `make bench-canary`. The z-test shows that the harness finds what errs too often."""
    runs, until = 1000, 200
    same = first_alarms({"e": worse(), "z": z_test()}, 0.6, 0.6, 0.5, runs=runs, until=until, seed=1)
    assert (same["e"] > 0).mean() <= 0.05
    assert (same["z"] > 0).mean() > 0.15
    edge = first_alarms({"e": not_worse()}, 0.6, 0.7, 0.5, runs=runs, until=until, seed=2)
    assert (edge["e"] > 0).mean() <= 0.05


def test_what_is_clearly_worse_is_found_and_what_is_better_is_passed() -> None:
    bad = first_alarms({"e": worse()}, 0.3, 0.8, 0.5, runs=200, until=150, seed=3)["e"]
    assert (bad > 0).mean() > 0.95
    good = first_alarms({"e": not_worse()}, 0.9, 0.7, 0.5, runs=200, until=200, seed=4)["e"]
    assert (good > 0).mean() > 0.9
