"""The over-optimisation watch: points on the plane, the choice among checkpoints, and what the gate hears."""

import json
import math

import pytest

from evaluation.comparison import Interval, paired_difference
from evaluation.overoptimisation import Point, Scores, Watch, liked_best, point, watch_of
from evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(resamples=500)
PROMPTS = [f"p{i // 2}" for i in range(24)]  # two responses to each of twelve prompts


def interval(estimate: float, half: float = 0.1) -> Interval:
    return Interval(estimate, estimate - half, estimate + half, 0.95, 12, 24)


def at(update: int, gold: float, kl: float = 1.0, proxy: float = 0.0) -> Point:
    return Point(update, kl, interval(proxy), interval(gold))


def test_gains_are_paired_with_the_start_on_the_same_prompts() -> None:
    # Prompts differ by far more than the policies do: without the pairs no gain could be told.
    start = Scores(PROMPTS, [float(10 * i) for i in range(24)], [float(-7 * i) for i in range(24)])
    later = Scores(
        PROMPTS, [10 * i + 1.0 + 0.1 * (i % 3) for i in range(24)], [-7 * i - 0.5 for i in range(24)]
    )
    found = point(3, 4.0, later, start, SETTINGS)
    assert found.distance == 2.0
    assert found.proxy == paired_difference(PROMPTS, start.proxy, later.proxy, resamples=500)
    assert found.proxy.low > 0.9
    assert (found.gold.estimate, found.gold.high) == (-0.5, -0.5)
    origin = point(0, 0.0, start, start, SETTINGS)
    assert (origin.distance, origin.proxy.estimate, origin.gold.low) == (0.0, 0.0, 0.0)
    assert found.figures()["gold/high"] == -0.5


def test_the_best_is_not_the_last_once_gold_has_turned() -> None:
    rising_proxy = [at(2, 0.3, 1, 0.5), at(4, 0.8, 4, 1.0), at(6, 0.5, 9, 1.5), at(8, -0.2, 16, 2.0)]
    assert liked_best(rising_proxy).update == 4
    assert liked_best([at(2, 0.3), at(4, 0.3)]).update == 2  # the nearest of equal ones
    assert liked_best([at(2, math.nan), at(4, -3.0)]).update == 4
    assert liked_best([at(2, math.nan)]).update == 2


@pytest.mark.parametrize(
    ("proxy", "gold", "over"),
    [
        (interval(1.0), interval(-0.5), True),
        (interval(0.05), interval(-0.5), True),  # it rose, if not beyond doubt; gold surely fell
        (interval(1.0), interval(-0.05), False),  # gold's fall is within its interval
        (interval(1.0), interval(0.5), False),
        (interval(-1.0), interval(-0.5), False),  # both fell: no better, but not over-optimised
    ],
)
def test_over_optimised_is_a_proxy_that_rose_and_gold_that_surely_fell(
    proxy: Interval, gold: Interval, over: bool
) -> None:
    assert Watch(4, 4, 12, True, proxy, gold).over_optimised is over


def test_a_stored_result_gives_the_chosen_point_back() -> None:
    points = [at(2, 0.3, math.nan, 0.5), at(4, 0.8, -0.25, 1.0)]
    assert points[1].distance == 0.0  # an estimate of KL may lie below 0
    stored = {"update": 4, "prompts": 12, "held_out": False, "points": [one.as_dict() for one in points]}
    found = watch_of(json.loads(json.dumps(stored, allow_nan=False)))
    assert found == Watch(4, 2, 12, False, points[1].proxy, points[1].gold)
    assert watch_of({"update": 4, "skipped": "there was none"}) is None
