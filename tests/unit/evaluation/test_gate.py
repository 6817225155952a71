"""The gate: what is promoted, what is not, and that the reasons say so."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.gate import Comparison, Evidence, Verdict, decide, gather
from evaluation.settings import EvaluationSettings

SETTINGS = EvaluationSettings(kl_budget=10.0)


def judged(outcomes: list[float], *, checks: list[float] | None = None, kl: float | None = 2.0) -> Verdict:
    """The verdict on one comparison a prompt."""
    comparisons = [
        Comparison(str(number), value, checks[number] if checks else None)
        for number, value in enumerate(outcomes)
    ]
    return decide(gather(comparisons, kl, SETTINGS), SETTINGS)


def test_a_clear_winner_within_budget_is_promoted() -> None:
    verdict = judged([1.0] * 30 + [0.0] * 10)
    assert verdict.promote
    assert "40 of 40 held-out prompts" in verdict.reasons[0]
    assert "win rate is 0.750, 95% interval [" in verdict.reasons[1]
    assert "reaches the 0.5" in verdict.reasons[1]
    assert "2.00 nats a response" in verdict.reasons[2]


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        (judged([]), "no comparison"),
        (judged([1.0]), "fewer than two held-out prompts"),
        (judged([0.5] * 50), "Only 0 of 50"),
        (judged([1.0] * 5 + [0.5] * 45), "Only 5 of 50"),
        (judged([1.0] * 21 + [0.0] * 19), "below the 0.5"),
        (judged([0.0] * 40), "below the 0.5"),
        (judged([1.0] * 40, kl=10.01), "over the budget of 10"),
        (judged([1.0] * 40, kl=math.nan), "over the budget"),
        (judged([1.0] * 40, kl=math.inf), "over the budget"),
        (judged([1.0] * 40, kl=None), "was not measured"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_promoted_says_why(verdict: Verdict, says: str) -> None:
    assert not verdict.promote
    assert any(says in reason for reason in verdict.reasons), verdict.reasons


def test_checks_decide_where_the_prompt_has_some() -> None:
    assert Comparison("p", judge=1.0).combined == 1.0
    assert Comparison("p", judge=1.0, checks=0.5).combined == 0.5
    assert Comparison("p", judge=1.0, checks=0.0).combined == 0.0
    assert Comparison("p", judge=0.0, checks=1.0).combined == 1.0
    # A judge that PPO fooled likes every answer; the checks see that they got worse.
    fooled = judged([1.0] * 40, checks=[0.0] * 30 + [0.5] * 10)
    assert not fooled.promote
    assert fooled.figures["judge"]["estimate"] == 1.0
    assert fooled.figures["checks"]["estimate"] == 0.125
    assert fooled.figures["combined"]["estimate"] == 0.125
    assert "By the checks alone, on the 40 prompts" in fooled.reasons[-1]


def test_several_answers_to_one_prompt_are_one_prompt() -> None:
    comparisons = [Comparison("one prompt", 1.0)] * 200
    verdict = decide(gather(comparisons, 1.0, SETTINGS), SETTINGS)
    assert not verdict.promote
    balanced = [Comparison(str(prompt), value) for prompt in range(10) for value in (0.0, 1.0)]
    assert gather(balanced, 1.0, SETTINGS).decided_prompts == 0


def test_prompts_without_checks_leave_no_interval_by_checks() -> None:
    evidence = gather([Comparison("a", 1.0), Comparison("b", 0.0)], 1.0, SETTINGS)
    assert evidence.checks is None
    assert evidence.judge is not None
    assert (evidence.prompts, evidence.comparisons, evidence.decided_prompts) == (2, 2, 2)


def test_a_verdict_is_plain_json() -> None:
    stored = json.loads(json.dumps(judged([1.0] * 30 + [0.0] * 10).as_dict()))
    assert stored["promote"] is True
    assert stored["figures"]["win_rate_bound"] == 0.5
    assert stored["figures"]["combined"]["clusters"] == 40
    # Not even the figures of a model that came apart may break who reads them as JSON.
    json.dumps(judged([1.0] * 40, kl=math.nan).as_dict(), allow_nan=False)


def test_a_bound_below_a_half_admits_a_candidate_that_is_no_worse() -> None:
    comparisons = [Comparison(str(number), float(number % 2)) for number in range(400)]
    lenient = EvaluationSettings(win_rate_bound=0.4)
    assert decide(gather(comparisons, 1.0, lenient), lenient).promote
    assert not decide(gather(comparisons, 1.0, SETTINGS), SETTINGS).promote


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), max_size=60), st.floats(0, 20), st.integers(0, 3))
def test_promotion_is_exactly_its_conditions(outcomes: list[float], kl: float, seed: int) -> None:
    settings = EvaluationSettings(kl_budget=10.0, resamples=200)
    evidence: Evidence = gather(
        [Comparison(str(number), value) for number, value in enumerate(outcomes)], kl, settings, seed=seed
    )
    expected = (
        sum(value != 0.5 for value in outcomes) >= 6
        and evidence.combined is not None
        and evidence.combined.low >= 0.5
        and kl <= 10.0
    )
    assert decide(evidence, settings).promote == expected
