"""The gate: what is promoted, what is not, and that the reasons say so."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.comparison import Interval
from evaluation.gate import CONDITIONS, Comparison, Evidence, Verdict, decide, gather, in_words
from evaluation.overoptimisation import Watch
from evaluation.settings import EvaluationSettings
from evaluation.tax import Result, change

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


WINNER = gather([Comparison(str(number), float(number % 4 > 0)) for number in range(40)], 2.0, SETTINGS)


def gain(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 0.95, 12, 24)


def test_gold_that_fell_while_the_proxy_rose_refuses_or_is_reported() -> None:
    fooled = replace(WINNER, watch=Watch(6, 4, 12, False, proxy=gain(0.4, 0.8), gold=gain(-0.5, -0.1)))
    verdict = decide(fooled, SETTINGS)
    assert not verdict.promote
    assert verdict.summary == "Not to be promoted: 1 of 4 conditions failed (gold against proxy)."
    assert "+0.600 [+0.400, +0.800]" in verdict.conditions[3].sentence
    assert "which is over-optimisation" in verdict.conditions[3].sentence
    assert any("after update 6, chosen among 4" in remark for remark in verdict.remarks)
    reporting = EvaluationSettings(kl_budget=10.0, report_only=["gold against proxy"])
    lenient = decide(fooled, reporting)
    assert lenient.promote
    assert lenient.summary == "To be promoted: all 3 conditions hold."
    lines = in_words(json.loads(json.dumps(lenient.as_dict())))
    assert lines[0] == lenient.summary
    assert lines[4].startswith("gold against proxy (fails, reported only): From the SFT policy on")
    nothing_binds = EvaluationSettings(kl_budget=10.0, report_only=list(CONDITIONS))
    assert decide(fooled, nothing_binds).promote
    assert decide(fooled, nothing_binds).summary.startswith("To be promoted: no condition is binding")
    unsure = replace(WINNER, watch=Watch(6, 1, 12, False, proxy=gain(0.4, 0.8), gold=gain(-0.5, 0.1)))
    assert decide(unsure, SETTINGS).promote
    assert not any("chosen among" in remark for remark in decide(unsure, SETTINGS).remarks)


@pytest.mark.parametrize(
    ("lost", "won", "promoted"),
    [(0, 0, True), (4, 4, True), (8, 2, True), (60, 10, False), (12, 2, False)],
)
def test_a_fall_on_benchmarks_has_to_be_ruled_out(lost: int, won: int, promoted: bool) -> None:
    """Of 400 items, of which the version in service had 200 right."""
    before = Result("hellaswag", "acc_norm", "d", tuple(item < 200 for item in range(400)))
    right = tuple((item >= lost) if item < 200 else item < 200 + won for item in range(400))
    evidence = replace(WINNER, tax=(change(before, Result("hellaswag", "acc_norm", "d", right)),))
    verdict = decide(evidence, EvaluationSettings(kl_budget=10.0, tax_bound=0.04))
    assert verdict.promote is promoted
    sentence = next(one.sentence for one in verdict.conditions if one.name == "tax")
    assert f"hellaswag acc_norm 0.500 before, {0.5 + (won - lost) / 400:.3f} now" in sentence
    assert ("is not ruled out on hellaswag" in sentence) is not promoted


def test_a_verdict_from_before_conditions_had_names_is_read_too() -> None:
    assert in_words({"promote": True, "reasons": ["It is better."]}) == ["To be promoted.", "It is better."]
