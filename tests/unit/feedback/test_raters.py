"""Statistics on raters against slow statements of them, published examples and public votes."""

import math
import random
from collections import defaultdict
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.feedback.rater_data import mt_bench, rows

from feedback.raters import (
    agreement,
    agreement_by_task,
    agreement_over_time,
    comparisons_of,
    crowd_bradley_terry,
    dawid_skene,
    krippendorff_alpha,
    mutual_agreement,
    units_of,
)
from feedback.votes import Vote

UNITS = st.dictionaries(
    st.sampled_from([("a", "b"), ("b", "c"), ("c",), ("d",)]),
    st.dictionaries(st.sampled_from("wxyz"), st.sampled_from("+-="), min_size=1),
)


def vote(number: int, rater: str, label: str, unit: tuple[str, ...] = ("a", "b"), at: float = 0.0) -> Vote:
    return Vote(f"e{number}", rater, "k", "p", {unit: label}, at=at)  # type: ignore[dict-item]


@given(UNITS)
def test_agreement_is_that_of_all_pairs_of_raters_on_all_units(
    units: dict[tuple[str, ...], dict[str, str]],
) -> None:
    found = agreement(units)
    pairs = [pair for said in units.values() for pair in combinations(said.values(), 2)]
    decided = [pair for pair in pairs if "=" not in pair]
    assert (found.pairs, found.decided_pairs) == (len(pairs), len(decided))
    if pairs:
        assert found.share == pytest.approx(np.mean([a == b for a, b in pairs]))
    if decided:
        assert found.decided_share == pytest.approx(np.mean([a == b for a, b in decided]))
    common, equal = mutual_agreement(units, ["w", "x", "y"])
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 1)):
        both = [(s["wxy"[i]], s["wxy"[j]]) for s in units.values() if "wxy"[i] in s and "wxy"[j] in s]
        both = [pair for pair in both if "=" not in pair]
        assert (common[i, j], equal[i, j]) == (len(both), sum(a == b for a, b in both))


def test_alpha_is_that_of_krippendorff_s_example() -> None:
    """Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, gaps, 0.743."""
    observers = (
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    )
    units = [
        [label for label in column if label != "."]
        for column in zip(*(o.split() for o in observers), strict=True)
    ]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["1", "1"], ["1"]]) is None
    assert krippendorff_alpha([["1", "1"], ["2", "2"]]) == 1


def test_the_last_word_of_a_rater_on_a_unit_counts() -> None:
    votes = [vote(1, "x", "+", at=2), vote(2, "x", "-", at=1), vote(3, "y", "+", at=0)]
    assert units_of(votes) == {("a", "b"): {"x": "+", "y": "+"}}


def test_agreement_over_time_is_told_for_the_period_of_the_last_word() -> None:
    day = 86_400.0
    votes = [
        vote(1, "x", "+", ("a",), at=0),
        vote(2, "y", "-", ("a",), at=6.9 * day),
        vote(3, "x", "+", ("b",), at=6.9 * day),
        vote(4, "y", "+", ("b",), at=7 * day),
        vote(5, "x", "+", ("c",), at=8 * day),
    ]
    found = agreement_over_time(votes, days=7)
    assert {start: (own.share, own.pairs) for start, own in found.items()} == {
        "1970-01-01": (0.0, 1),
        "1970-01-08": (1.0, 1),
    }


def test_agreement_on_mt_bench_is_what_is_published() -> None:
    """Zheng et al. 2023 (arXiv 2306.05685): 0.63 with ties and 0.81 without, on all of their votes."""
    found = agreement_by_task(mt_bench())
    first = found["turn 1"]
    assert (first.pairs, first.decided_pairs, first.raters) == (1198, 772, 65)
    assert first.share == pytest.approx(0.641, abs=5e-4)
    assert first.decided_share == pytest.approx(0.820, abs=5e-4)
    assert first.alpha == pytest.approx(0.477, abs=5e-4)


RATINGS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30
)


@given(RATINGS, st.integers(1, 6))
def test_dawid_skene_is_the_em_of_the_paper(ratings: list[tuple[int, int, int]], steps: int) -> None:
    found = dawid_skene(ratings, tolerance=-math.inf, most_steps=steps)
    posterior, errors, prior, likelihood = slow_dawid_skene(ratings, steps)
    assert found.labels == sorted({label for _, _, label in ratings})
    assert found.log_likelihood == pytest.approx(likelihood)
    np.testing.assert_allclose(found.prior, prior, atol=1e-9)
    for item, expected in posterior.items():
        np.testing.assert_allclose(found.posterior[item], expected, atol=1e-6)
    for rater, rates in errors.items():
        np.testing.assert_allclose(found.errors[rater], rates, atol=1e-9)


@given(RATINGS)
def test_the_likelihood_of_dawid_skene_never_falls(ratings: list[tuple[int, int, int]]) -> None:
    likelihoods = [
        dawid_skene(ratings, tolerance=-math.inf, most_steps=n).log_likelihood for n in range(1, 8)
    ]
    assert all(after >= before - 1e-9 for before, after in pairwise(likelihoods))


# Of each observer a row for each true class: how often it is called what. These are the results of Dawid and
# Skene 1979 as github.com/x-lin/consensusalgorithms has transcribed them (DawidSkeneAlgorithmTest, commit
# 4cc5af5), a repository that has nothing to do with this one; the paper itself was not at hand.
ANAESTHETISTS = {
    1: [[0.89, 0.11, 0, 0], [0.07, 0.88, 0.05, 0], [0, 0.34, 0.66, 0], [0, 0, 0.56, 0.44]],
    2: [[0.83, 0.17, 0, 0], [0.05, 0.63, 0.31, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    3: [[1, 0, 0, 0], [0.11, 0.79, 0.11, 0], [0, 0.40, 0.20, 0.40], [0, 0, 0.67, 0.33]],
    4: [[0.94, 0.06, 0, 0], [0.05, 0.84, 0.10, 0], [0, 0, 0.80, 0.20], [0, 0, 0.33, 0.67]],
    5: [[1, 0, 0, 0], [0.16, 0.73, 0.11, 0], [0, 0.21, 0.79, 0], [0, 0, 0.33, 0.67]],
}


def test_dawid_skene_on_the_anaesthetists_is_what_others_say_was_published() -> None:
    """Class marginals, and error rates of five observers, of whom the first saw each patient thrice.

    The file has one rating (patient 7) otherwise than that transcription of the paper's table 1 (and others);
    with the rating that they have, all figures are theirs to two digits.
    """
    ratings = [(row["item"], row["rater"], row["rating"]) for row in rows("dawid-skene/anesthesia.jsonl.gz")]
    marginals = [0.40, 0.42, 0.11, 0.07]
    found = dawid_skene(ratings)
    np.testing.assert_allclose(found.prior, marginals, atol=0.005)
    for observer, rates in ANAESTHETISTS.items():
        np.testing.assert_allclose(found.errors[observer], rates, atol=0.025)
    ratings.remove((7, 1, 1))
    found = dawid_skene([*ratings, (7, 1, 2)])
    np.testing.assert_allclose(found.prior, marginals, atol=0.005)
    for observer, rates in ANAESTHETISTS.items():
        np.testing.assert_allclose(found.errors[observer], rates, atol=0.0075)
    # Patients whose class is not certain: given as .98, .95 and .98.
    likeliest = {item: max(found.posterior[item]) for item in found.posterior}
    unsure = {item: round(share, 2) for item, share in likeliest.items() if share < 0.985}
    assert unsure == {7: 0.98, 35: 0.95, 38: 0.98}


def test_crowd_bradley_terry_is_at_the_mode_of_its_posterior() -> None:
    generator = random.Random(1)
    names, raters = "abcde", "xyz"
    rows_ = []
    for _ in range(120):
        one, other = generator.sample(names, 2)
        rater = generator.choice(raters)
        right = generator.random() < {"x": 0.9, "y": 0.8, "z": 0.2}[rater]
        rows_.append((rater, *(sorted((one, other), reverse=not right))))
    found = crowd_bradley_terry(rows_, tolerance=1e-12, most_steps=100_000)
    at = {**found.scores, **found.reliability}
    for name, value in at.items():
        step = 1e-4
        up, down = (log_posterior(rows_, {**at, name: value + change}, names) for change in (step, -step))
        assert (up - down) / (2 * step) == pytest.approx(0, abs=1e-3), name
    assert sorted(found.scores, key=lambda name: -found.scores[name]) == list(names)
    assert found.reliability["x"] > found.reliability["y"] > 0.5 > found.reliability["z"]


def test_crowd_bradley_terry_ranks_the_models_of_mt_bench() -> None:
    votes = comparisons_of(mt_bench())
    # Over all questions: the model alone is compared.
    by_model = [(rater, better.split("/")[2], worse.split("/")[2]) for rater, better, worse in votes]
    found = crowd_bradley_terry(by_model)
    best_first = sorted(found.scores, key=lambda name: -found.scores[name])
    assert best_first[0] == "gpt-4"
    assert set(best_first[1:3]) == {"claude-v1", "gpt-3.5-turbo"}
    assert best_first[3:] == ["vicuna-13b-v1.2", "alpaca-13b", "llama-13b"]
    # One who says the contrary of what it said does not move the order, but is found out.
    liar = [("liar", worse, better) for _, better, worse in by_model[:150]]
    spoilt = crowd_bradley_terry([*by_model, *liar])
    assert sorted(spoilt.scores, key=lambda name: -spoilt.scores[name]) == best_first
    assert spoilt.reliability["liar"] < 0.3
    assert min(found.reliability.values()) > 0.6


def test_nothing_is_no_error() -> None:
    assert agreement({}).share is None
    assert crowd_bradley_terry([]).scores == {}
    assert agreement_over_time([], days=7) == {}


def log_posterior(rows_: list[tuple[str, str, str]], at: dict[str, float], names: str) -> float:
    """Chen et al. 2013 (equations 3 and 8) with half a win and half a loss against a thing of score 0."""

    def follows(difference: float) -> float:
        return 1 / (1 + math.exp(-difference))

    total = 0.0
    for rater, better, worse in rows_:
        ahead = follows(at[better] - at[worse])
        total += math.log(at[rater] * ahead + (1 - at[rater]) * (1 - ahead))
    total += sum(0.5 * math.log(follows(at[name]) * follows(-at[name])) for name in names)
    return total + sum(7 * math.log(at[rater]) + math.log(1 - at[rater]) for rater in "xyz")


def slow_dawid_skene(ratings: list[tuple[int, int, int]], steps: int):  # type: ignore[no-untyped-def]
    labels = sorted({label for _, _, label in ratings})
    items = sorted({item for item, _, _ in ratings})
    raters = sorted({rater for _, rater, _ in ratings})
    counts: dict[tuple[int, int, int], int] = defaultdict(int)
    for rating in ratings:
        counts[rating] += 1
    posterior = {}
    for item in items:
        votes = [sum(counts[item, rater, label] for rater in raters) for label in labels]
        posterior[item] = [count / sum(votes) for count in votes]
    for _ in range(steps):
        prior = [sum(posterior[item][j] for item in items) / len(items) for j in range(len(labels))]
        errors = {}
        for rater in raters:
            table = []
            for j in range(len(labels)):
                row = [sum(posterior[i][j] * counts[i, rater, label] for i in items) for label in labels]
                table.append([cell / sum(row) if sum(row) > 1e-250 else 0.0 for cell in row])
            errors[rater] = table
        likelihood = 0.0
        for item in items:
            joint = []
            for j in range(len(labels)):
                p = prior[j]
                for rater in raters:
                    for column, label in enumerate(labels):
                        p *= errors[rater][j][column] ** counts[item, rater, label]
                joint.append(p)
            likelihood += math.log(sum(joint))
            posterior[item] = [p / sum(joint) for p in joint]
    return posterior, errors, prior, likelihood
