"""What votes weigh: nobody beyond its share, as little taken as possible, and a reason for everything."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from unit.feedback.rater_data import mt_bench
from unit.feedback.test_reliability import Crowd, honest

from feedback import influence
from feedback.influence import defended, factors_within, least_limit, weigh
from feedback.raters import units_of
from feedback.reliability import Assessment, assess
from feedback.settings import RaterSettings
from feedback.votes import Vote

NOTHING = Assessment({}, frozenset(), 0.75)
PLAIN = RaterSettings(newcomer_weight=1, lone_weight=1, prompt_votes=100, prompt_share=1, key_share=1)
FIXED = st.one_of(st.just(0.0), st.floats(0.01, 50))
TOTALS = st.lists(st.floats(0.01, 100), min_size=1, max_size=8)


def slow_level(totals: Sequence[float], fixed: float, limit: float) -> float:
    """The level to which the largest are cut, by bisection on its definition."""
    low, high = 0.0, max(totals)
    for _ in range(200):
        level = (low + high) / 2
        within = level <= limit * (fixed + sum(min(total, level) for total in totals))
        low, high = (level, high) if within else (low, level)
    return low


@given(TOTALS, FIXED, st.floats(0.01, 1))
def test_as_little_is_taken_as_keeps_everyone_within_the_limit(
    totals: list[float], fixed: float, limit: float
) -> None:
    assume(abs(len(totals) * limit - 1) > 1e-6)
    factors = factors_within(np.array(totals), fixed, limit)
    left = factors * totals
    whole = fixed + left.sum()
    level = slow_level(totals, fixed, limit)
    if fixed == 0 and len(totals) * limit < 1:  # no whole could hold it
        assert factors.tolist() == [1.0] * len(totals)
        return
    np.testing.assert_allclose(left, np.minimum(totals, level), rtol=1e-6)
    assert left.max() <= limit * whole * (1 + 1e-6)


@given(TOTALS, FIXED, st.floats(0, 1))
def test_the_limit_is_raised_no_further_than_it_takes(
    totals: list[float], fixed: float, share: float
) -> None:
    array = np.array(totals)
    least = share * (fixed + array.sum())
    start = min(1.0, 2 / len(totals))
    limit = least_limit(array, fixed, start, least)
    assert limit >= start

    def left(at: float) -> float:
        return fixed + float((array * factors_within(array, fixed, at)).sum())

    assert left(limit) >= least * (1 - 1e-8)
    if limit > start + 1e-7:
        assert left(limit - 1e-7) <= least * (1 + 1e-6)


def votes(counts: dict[str, int], prompts: int = 10**6) -> list[Vote]:
    made = []
    for rater, count in counts.items():
        for n in range(count):
            made.append(Vote(f"{rater}-{n}", rater, rater.split("/")[0], f"{rater} {n % prompts}", {}))
    return made


def shares(found: influence.Influence, cast: Sequence[Vote], by: str = "rater") -> dict[str, float]:
    totals: Counter[str] = Counter()
    for vote, weighed in zip(cast, found.votes, strict=True):
        totals[getattr(vote, by)] += weighed.weight  # type: ignore[assignment]
    whole = sum(totals.values())
    return {name: total / whole for name, total in totals.items()}


def test_a_flood_of_one_rater_is_held_to_its_share() -> None:
    cast = votes({f"k/r{n}": 10 for n in range(60)} | {"k/flood": 600})
    found = weigh(cast, NOTHING, PLAIN)
    share = shares(found, cast)
    assert share["k/flood"] == pytest.approx(0.05)
    assert found.rater_limit == 0.05
    assert found.set_aside == pytest.approx(1 - 600 / 0.95 / 1200)
    flooded = [w for vote, w in zip(cast, found.votes, strict=True) if vote.rater == "k/flood"]
    assert {w.reasons for w in flooded} == {(influence.RATER_SHARE,)}
    assert {w.weight for vote, w in zip(cast, found.votes, strict=True) if vote.rater != "k/flood"} == {1.0}


def test_with_few_raters_somebody_may_have_two_equal_shares() -> None:
    for counts, expected in (
        ({"k/a": 100}, [1.0]),
        ({"k/a": 100, "k/b": 1}, [100 / 101, 1 / 101]),
        ({"k/a": 100, "k/b": 10, "k/c": 10, "k/d": 10, "k/e": 10}, [0.4, 0.15, 0.15, 0.15, 0.15]),
    ):
        cast = votes(counts)
        found = weigh(cast, NOTHING, PLAIN)
        assert sorted(shares(found, cast).values(), reverse=True) == pytest.approx(expected)


def test_a_limit_that_would_leave_nearly_nothing_is_raised_and_says_so() -> None:
    cast = votes({f"k/r{n}": 1 for n in range(60)} | {"k/most": 940})
    found = weigh(cast, NOTHING, PLAIN)
    assert found.set_aside == pytest.approx(0.75)
    assert found.rater_limit == pytest.approx(190 / 250)
    assert shares(found, cast)["k/most"] == pytest.approx(190 / 250)
    strict = PLAIN.model_copy(update={"most_set_aside": 0.99})
    assert shares(weigh(cast, NOTHING, strict), cast)["k/most"] == pytest.approx(0.05)


def test_a_key_is_held_to_its_share_with_all_who_vote_by_it() -> None:
    counts = {f"big/{n}": 5 for n in range(100)}
    counts |= {f"{key}/{n}": 5 for key in ("a", "b", "c", "d") for n in range(10)}
    cast = votes(counts)
    settings = PLAIN.model_copy(update={"key_share": 0.5})
    found = weigh(cast, NOTHING, settings)
    by_key = shares(found, cast, "key")
    assert by_key["big"] == pytest.approx(0.5)
    assert max(shares(found, cast).values()) <= 0.05
    assert found.key_limit == 0.5
    assert influence.KEY_SHARE in found.votes[0].reasons


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("abcdefg"), st.integers(0, 12)), st.integers(1, 40), min_size=1, max_size=40
    ),
    st.floats(0.05, 1),
    st.floats(0.2, 1),
)
def test_both_limits_hold_together(
    counts: dict[tuple[str, int], int], rater_share: float, key_share: float
) -> None:
    cast = votes({f"{key}/{n}": count for (key, n), count in counts.items()})
    settings = PLAIN.model_copy(update={"rater_share": rater_share, "key_share": key_share})
    found = weigh(cast, NOTHING, settings)
    assert max(shares(found, cast).values()) <= found.rater_limit * (1 + 1e-6)
    assert max(shares(found, cast, "key").values()) <= found.key_limit * (1 + 1e-6)
    assert found.set_aside <= 0.75 + 1e-9
    if found.set_aside < 0.75 - 1e-6:
        raters, keys = len(counts), len({key for key, _ in counts})
        assert found.rater_limit == pytest.approx(min(1.0, max(rater_share, 2 / raters)))
        assert found.key_limit == pytest.approx(min(1.0, max(key_share, 2 / keys)))


def test_many_votes_on_one_prompt_weigh_as_two() -> None:
    cast = votes({"k/a": 30, "k/b": 30, "k/c": 30, "k/d": 30}, prompts=3)
    found = weigh(cast, NOTHING, PLAIN.model_copy(update={"prompt_votes": 2.0}))
    per_prompt: Counter[str] = Counter()
    for vote, weighed in zip(cast, found.votes, strict=True):
        per_prompt[vote.prompt] += weighed.weight  # type: ignore[assignment]
    assert list(per_prompt.values()) == pytest.approx([2.0] * 12)
    assert found.votes[0].reasons == (influence.ONE_PROMPT,)


def test_those_without_a_name_may_all_be_one_person_on_one_prompt() -> None:
    cast = [Vote(f"e{n}", f"k/anonymous:chatcmpl-{n}", "k", "p") for n in range(20)]
    cast += [Vote(f"f{n}", f"j/anonymous:chatcmpl-{n}", "j", f"q{n}") for n in range(20)]
    found = weigh(cast, NOTHING, PLAIN.model_copy(update={"prompt_votes": 2.0}))
    assert sum(found.weights()[:20]) == pytest.approx(2)
    assert found.weights()[20:] == [1.0] * 20


def test_nobody_has_more_than_its_share_of_a_prompt_that_others_judge() -> None:
    cast = [Vote(f"a{n}", "k/a", "k", "p") for n in range(9)]
    cast += [Vote(f"{rater}", f"k/{rater}", "k", "p") for rater in "bcd"]
    found = weigh(cast, NOTHING, PLAIN.model_copy(update={"prompt_share": 0.5, "rater_share": 1.0}))
    assert shares(found, cast)["k/a"] == pytest.approx(0.5)
    assert found.votes[0].reasons == (influence.PROMPT_SHARE,)
    assert found.votes[-1].reasons == ()


def test_what_nobody_else_judged_counts_less_and_trusted_raters_have_no_limits() -> None:
    crowd = Crowd(30)
    for rater in ("k/a", "k/b"):
        crowd.rate(rater, ["p0"], 1.0)
    crowd.rate("k/a", ["p1"], 1.0)
    crowd.rate("import/set", ["p2"], 1.0)
    settings = RaterSettings(newcomer_weight=1.0)
    found = weigh(crowd.votes, assess(crowd.votes, settings), settings)
    both, lone, imported = found.votes[0], found.votes[2], found.votes[3]
    assert lone.weight == pytest.approx(0.5 * both.weight)
    assert lone.reasons == (influence.ALONE,)
    assert (imported.weight, imported.reasons) == (1.0, ())
    cast = votes({f"k/r{n}": 1 for n in range(60)} | {"import/set": 600})
    found = weigh(cast, NOTHING, PLAIN)
    assert found.set_aside == 0
    assert shares(found, cast)["import/set"] == pytest.approx(600 / 660)


def test_accounts_that_vote_as_one_share_one_limit() -> None:
    crowd = Crowd(120, seed=5)
    honest(crowd, raters=45, each=30, accuracy=0.85)
    targets = crowd.some(60)
    for number in range(5):
        crowd.rate(f"k/ring{number}", targets, 0.0)
    assessment = assess(crowd.votes, RaterSettings())
    assert assessment.voices() == [[f"k/ring{n}" for n in range(5)]]
    found = weigh(crowd.votes, assessment, PLAIN.model_copy(update={"rater_share": 0.01}))
    share = shares(found, crowd.votes)
    assert sum(share[f"k/ring{n}"] for n in range(5)) <= found.rater_limit * (1 + 1e-9)


def test_defences_do_by_themselves_what_a_round_does() -> None:
    crowd = Crowd(100, seed=2)
    honest(crowd, raters=20)
    crowd.rate("k/contrary", crowd.some(60), 0.05)
    found = defended(crowd.votes, RaterSettings())
    contrary = [w for vote, w in zip(crowd.votes, found.votes, strict=True) if vote.rater == "k/contrary"]
    assert {(w.weight, w.reasons) for w in contrary} == {(0.0, (influence.QUARANTINED,))}
    assert len(found.weights()) == len(crowd.votes)
    assert found.figures()["reasons"][influence.QUARANTINED] == 60
    assert found.figures()["weight"] == pytest.approx(math.fsum(found.weights()))
    off = defended(crowd.votes, RaterSettings(defend=False))
    assert off.weights() == [1.0] * len(crowd.votes)
    lenient = defended(crowd.votes, RaterSettings(automatic_quarantine=False))
    by_rater = {vote.rater: w.weight for vote, w in zip(crowd.votes, lenient.votes, strict=True)}
    assert 0 < by_rater["k/contrary"] < 0.2 * by_rater["k/honest0"]


def attack(votes: list[Vote], kind: str) -> list[Vote]:
    """Votes against the majority, one in twenty of all, on top of human ones."""
    units = {unit: vote.prompt for vote in votes for unit in vote.verdicts}
    said = units_of(votes)
    majority = {unit: Counter(said[unit].values()).most_common(1)[0][0] for unit in units}
    targets = sorted(unit for unit, label in majority.items() if label != "=")
    generator, count = random.Random(0), len(votes) // 20
    made: list[tuple[str, tuple[str, ...], str]] = []
    if kind == "contrary":
        made = [("x/eve", unit, contrary(majority[unit])) for unit in generator.sample(targets, count)]
    elif kind == "ring":
        common = generator.sample(targets, count // 5)
        made = [(f"x/{n}", unit, contrary(majority[unit])) for n in range(5) for unit in common]
    elif kind == "guesses":
        made = [
            (f"x/{n}", unit, generator.choice("+-"))
            for n in range(5)
            for unit in generator.sample(targets, count // 5)
        ]
    elif kind == "flood":
        made = [("x/eve", (f"own{n}#0",), "+") for n in range(count)]
    return [
        Vote(f"z{n}", rater, "x", units.get(unit, f"own{n % 10}"), {unit: label})  # type: ignore[dict-item]
        for n, (rater, unit, label) in enumerate(made)
    ]


def contrary(label: str) -> str:
    return {"+": "-", "-": "+"}[label]


@pytest.mark.parametrize(
    ("kind", "most"), [("contrary", 0.0), ("ring", 0.0), ("guesses", 0.02), ("flood", 0.005)]
)
def test_one_vote_in_twenty_against_those_of_mt_bench_weighs_little(kind: str, most: float) -> None:
    honest_votes = mt_bench()
    attackers = attack(honest_votes, kind)
    cast = [*honest_votes, *attackers]
    assert len(attackers) / len(cast) == pytest.approx(0.047, abs=0.002)
    found = defended(cast, RaterSettings())
    assert sum(found.weights()[len(honest_votes) :]) <= most * sum(found.weights())
    # The others lose next to nothing by it.
    clean = defended(honest_votes, RaterSettings())
    assert sum(found.weights()[: len(honest_votes)]) == pytest.approx(sum(clean.weights()), rel=0.1)
    assert not any(influence.QUARANTINED in w.reasons for w in found.votes[: len(honest_votes)])


def test_no_votes_are_no_error() -> None:
    assert defended([], RaterSettings()).weights() == []
