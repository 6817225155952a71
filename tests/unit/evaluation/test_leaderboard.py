"""Leaderboards against an obvious slow fit, known strengths, and the published order of MT-Bench's models."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from evaluation.leaderboard import (
    SCALE,
    Leaderboard,
    Match,
    Style,
    bradley_terry,
    style_controlled,
    style_of,
)

ROOT = Path(__file__).resolve().parents[3]
VOTES = Path(os.environ.get("INSTRUCTLOOP_DATA", ROOT.parent / "shared" / "data"))
VOTES = VOTES / "mt-bench" / "human_votes.jsonl.gz"


def played(
    strengths: dict[str, float],
    prompts: int,
    *,
    a_prompt: int = 3,
    seed: int = 0,
    ties: float = 0.1,
    by_length: float = 0.0,
    lengths: dict[str, int] | None = None,
) -> list[Match]:
    """Matches between random contestants, won by strength and, `by_length`, by being longer."""
    random = np.random.default_rng(seed)
    names = list(strengths)
    matches = []
    for at in range(prompts * a_prompt):
        first, second = random.choice(names, 2, replace=False)
        styles = [
            Style(int((lengths or {}).get(name, 200) * random.lognormal(0, 0.4)), bold=int(random.poisson(2)))
            for name in (first, second)
        ]
        difference = (styles[0].length - styles[1].length) / (styles[0].length + styles[1].length)
        logit = strengths[first] - strengths[second] + by_length * difference
        won = float(random.random() < 1 / (1 + np.exp(-logit)))
        outcome = 0.5 if random.random() < ties else won
        matches.append(Match(f"p{at % prompts}", str(first), str(second), outcome, *styles))
    return matches


def order(board: Leaderboard) -> list[str]:
    return [rating.contestant for rating in board.ratings]


def estimates(board: Leaderboard) -> dict[str, float]:
    return {rating.contestant: rating.rating.estimate for rating in board.ratings}


def slowly(matches: list[Match]) -> dict[str, float]:
    """The same likelihood, written down and handed to a general optimiser."""
    names = sorted({name for match in matches for name in (match.first, match.second)})

    def loss(strengths: np.ndarray) -> float:
        total = 0.0
        *own, imagined = strengths
        by_name = dict(zip(names, own, strict=True))
        games = [(by_name[m.first], by_name[m.second], m.outcome) for m in matches]
        games += [(value, imagined, 0.5) for value in own]
        for first, second, outcome in games:
            total -= outcome * -np.logaddexp(0, second - first)
            total -= (1 - outcome) * -np.logaddexp(0, first - second)
        return total

    found = minimize(loss, np.zeros(len(names) + 1), method="BFGS", options={"gtol": 1e-6}).x[:-1]
    found = 1000 + SCALE * (found - found.mean())
    return dict(zip(names, found.tolist(), strict=True))


def test_ratings_are_those_of_a_slow_fit() -> None:
    matches = played({"a": 0.0, "b": 0.8, "c": -0.5, "d": 0.1}, 40)
    found = estimates(bradley_terry(matches, resamples=10))
    assert found == pytest.approx(slowly(matches), abs=0.05)


def test_known_strengths_are_found_and_doubts_said() -> None:
    strengths = {"a": 0.0, "b": 1.2, "c": -1.0, "d": 0.05}
    board = bradley_terry(played(strengths, 400), resamples=300)
    centre = np.mean(list(strengths.values()))
    assert order(board)[0] == "b"
    assert order(board)[-1] == "c"
    for rating in board.ratings:
        true = 1000 + SCALE * (strengths[rating.contestant] - centre)
        assert rating.rating.low - 10 < true < rating.rating.high + 10
        assert rating.rating.high - rating.rating.low < 120
    ranks = {rating.contestant: rating.rank for rating in board.ratings}
    assert ranks == {"b": 1, "a": 2, "d": 2, "c": 4}
    assert sum(rating.matches for rating in board.ratings) == 2 * 1200


@pytest.mark.parametrize("rate", [bradley_terry, style_controlled])
def test_asking_the_same_again_makes_nothing_surer(rate: Callable[..., Leaderboard]) -> None:
    matches = played({"a": 0.0, "b": 0.6}, 30)
    once, thrice = rate(matches, resamples=100), rate(matches * 3, resamples=100)

    def width(board: Leaderboard) -> float:
        return board.ratings[0].rating.high - board.ratings[0].rating.low

    assert width(thrice) == pytest.approx(width(once), rel=0.15)


def test_who_wins_everything_has_a_finite_rating() -> None:
    matches = [Match(f"p{i}", "best", "worst", 1.0, Style(10), Style(20)) for i in range(20)]
    for board in (bradley_terry(matches, resamples=20), style_controlled(matches, resamples=20)):
        assert order(board) == ["best", "worst"]
        assert 1000 < board.ratings[0].rating.estimate < 2000
        assert board.ratings[0].rating.low == pytest.approx(board.ratings[0].rating.estimate, abs=1)


def test_style_control_sees_through_length() -> None:
    """The longer contestant wins more, though at equal length it would lose."""
    strengths = {"long": -0.5, "short": 0.5}
    matches = played(
        strengths, 1000, a_prompt=4, ties=0.0, by_length=6.0, lengths={"long": 400, "short": 150}
    )
    plain, controlled = bradley_terry(matches, resamples=50), style_controlled(matches, resamples=50)
    assert order(plain) == ["long", "short"]
    assert order(controlled) == ["short", "long"]
    found = estimates(controlled)
    assert found["short"] - found["long"] == pytest.approx(SCALE * 1.0, abs=0.2 * SCALE)
    assert controlled.style["length"].low > 0
    assert controlled.style["bold"].low < 0 < controlled.style["bold"].high
    assert controlled.style["headers"].estimate == pytest.approx(0, abs=0.1)


def test_without_differences_in_style_both_agree() -> None:
    matches = [
        Match(m.prompt, m.first, m.second, m.outcome, Style(9), Style(9))
        for m in played({"a": 0.0, "b": 0.7, "c": 0.3}, 100)
    ]
    plain, controlled = bradley_terry(matches, resamples=10), style_controlled(matches, resamples=10)
    assert estimates(plain) == pytest.approx(estimates(controlled), abs=1.0)


def test_what_no_leaderboard_can_be_made_of_is_refused() -> None:
    with pytest.raises(ValueError, match="two prompts"):
        bradley_terry([Match("p", "a", "b", 1.0)])
    with pytest.raises(ValueError, match="two contestants"):
        bradley_terry([])
    with pytest.raises(ValueError, match="itself"):
        bradley_terry([Match("p", "a", "b", 1.0), Match("q", "a", "a", 1.0)])
    with pytest.raises(ValueError, match="outcome"):
        bradley_terry([Match("p", "a", "b", 0.7), Match("q", "a", "b", 1.0)])
    with pytest.raises(ValueError, match="style"):
        style_controlled([Match("p", "a", "b", 1.0), Match("q", "a", "b", 1.0)])


def test_markdown_is_counted() -> None:
    text = "# Title\n\nSome **bold** and __more__ words, 2 * 3 * 4.\n- one\n  2. two\n* three\n#hash\n-dash"
    assert style_of(text) == Style(len(text), headers=1, list_items=3, bold=2)


def test_mt_bench_models_stand_in_the_published_order() -> None:
    if not VOTES.exists():
        pytest.skip(f"{VOTES} is absent: set INSTRUCTLOOP_DATA to the folder that holds mt-bench/")
    outcomes = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}
    with gzip.open(VOTES, "rt") as lines:
        votes = [json.loads(line) for line in lines]
    matches = [Match(str(v["question_id"]), v["model_a"], v["model_b"], outcomes[v["winner"]]) for v in votes]
    board = bradley_terry(matches, resamples=200)
    # Zheng et al. 2023 (arXiv 2306.05685): claude-v1 and gpt-3.5-turbo are as good as each other.
    published = ["gpt-4", "claude-v1", "gpt-3.5-turbo", "vicuna-13b-v1.2", "alpaca-13b", "llama-13b"]
    assert order(board) == published
    assert [rating.rank for rating in board.ratings] == [1, 2, 2, 4, 5, 6]
    assert board.ratings[0].rating.clusters == 80
