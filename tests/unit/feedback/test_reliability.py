"""Who can be relied on: contrary, careless, new and colluding raters among others of a known accuracy."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.feedback.rater_data import mt_bench

from feedback.reliability import Assessment, assess
from feedback.settings import RaterSettings
from feedback.votes import Label, Vote, key_of

SETTINGS = RaterSettings()
OTHER: dict[str, Label] = {"+": "-", "-": "+", "=": "="}


class Crowd:
    """Pairs whose better response is known, and raters that find it so often."""

    def __init__(self, pairs: int, seed: int = 0) -> None:
        self.generator = random.Random(seed)
        self.truth: dict[str, Label] = {f"p{n}": self.generator.choice(("+", "-")) for n in range(pairs)}
        self.votes: list[Vote] = []

    def say(self, rater: str, prompt: str, label: Label, single: bool = False) -> None:
        unit = (f"{prompt}#0",) if single else (f"{prompt}#0", f"{prompt}#1")
        number = len(self.votes)
        self.votes.append(Vote(f"e{number}", rater, key_of(rater), prompt, {unit: label}, at=number))

    def rate(self, rater: str, prompts: Sequence[str], accuracy: float, single: bool = False) -> None:
        for prompt in prompts:
            right = self.generator.random() < accuracy
            self.say(rater, prompt, self.truth[prompt] if right else OTHER[self.truth[prompt]], single)

    def some(self, count: int) -> list[str]:
        return self.generator.sample(sorted(self.truth), count)

    def assess(self, **arguments: object) -> Assessment:
        return assess(self.votes, SETTINGS, **arguments)  # type: ignore[arg-type]


def honest(crowd: Crowd, raters: int = 12, each: int = 60, accuracy: float = 0.8) -> None:
    for number in range(raters):
        crowd.rate(f"k/honest{number}", crowd.some(each), accuracy)


def test_accuracies_are_found_without_knowing_the_truth() -> None:
    crowd = Crowd(150, seed=1)
    wanted = {f"k/r{n}": accuracy for n, accuracy in enumerate((0.95, 0.9, 0.8, 0.8, 0.7, 0.6, 0.9, 0.75))}
    for rater, accuracy in wanted.items():
        crowd.rate(rater, sorted(crowd.truth), accuracy)
    found = crowd.assess()
    for rater, accuracy in wanted.items():
        assert found.standings[rater].accuracy == pytest.approx(accuracy, abs=0.07), rater
        assert found.standings[rater].judged == found.standings[rater].votes == 150
    assert found.usual_accuracy == pytest.approx(0.8, abs=0.06)
    assert found.standings["k/r0"].reliability > 0.85
    assert found.standings["k/r5"].reliability < 0.5
    assert found.suspects() == {}
    assert found.voices() == []


def test_who_says_the_contrary_is_suspected_and_who_guesses_hardly_counts() -> None:
    crowd = Crowd(100)
    honest(crowd)
    crowd.rate("k/contrary", crowd.some(60), 0.1)
    crowd.rate("k/guess", crowd.some(60), 0.5)
    found = crowd.assess()
    assert list(found.suspects()) == ["k/contrary"]
    assert found.suspects()["k/contrary"].startswith("It says the contrary of ")
    assert found.standings["k/guess"].reliability < 0.4
    assert all(found.standings[f"k/honest{n}"].reliability > 0.5 for n in range(12))


def test_a_newcomer_is_neither_trusted_nor_silenced_and_earns_its_weight() -> None:
    crowd = Crowd(200, seed=3)
    honest(crowd, each=120)
    counts = {"k/none": 0, "k/few": 8, "k/many": 120}
    for rater, count in counts.items():
        crowd.rate(rater, crowd.some(count), 0.95)
    crowd.truth["alone"] = "+"
    crowd.rate("k/none", ["alone"], 1.0)
    crowd.say("k/undecided", "p0", "=")
    found = crowd.assess().standings
    assert found["k/none"].reliability == pytest.approx(SETTINGS.newcomer_weight, abs=0.02)
    assert (found["k/none"].judged, found["k/none"].agreement) == (0, None)
    assert found["k/undecided"].reliability == SETTINGS.newcomer_weight
    assert 0.5 < found["k/few"].reliability < found["k/many"].reliability
    assert found["k/many"].reliability > 0.85


def test_trusted_raters_count_fully_and_are_never_suspected() -> None:
    crowd = Crowd(100)
    honest(crowd)
    crowd.rate("import/some-set", crowd.some(60), 0.1)
    standing = crowd.assess().standings["import/some-set"]
    assert (standing.reliability, standing.suspicions) == (1.0, ())
    assert standing.agreement is not None
    assert standing.agreement < 0.4


def test_agreeing_that_nearly_everything_is_good_says_little() -> None:
    crowd = Crowd(300, seed=4)
    for number, prompt in enumerate(crowd.truth):
        crowd.truth[prompt] = "+" if number % 10 else "-"
    for number in range(10):
        crowd.rate(f"k/honest{number}", crowd.some(150), 0.85, single=True)
    for prompt in crowd.some(150):
        crowd.say("k/always", prompt, "+", single=True)
    found = crowd.assess().standings
    # It is right on nine of ten, more often than the others.
    assert found["k/always"].reliability < 0.3
    assert min(found[f"k/honest{n}"].reliability for n in range(10)) > 0.5
    assert found["k/always"].suspicions == ()


def test_accounts_that_vote_as_one_have_one_voice_and_cannot_make_the_truth() -> None:
    crowd = Crowd(120, seed=5)
    honest(crowd, raters=16, each=40, accuracy=0.85)
    targets = crowd.some(40)
    for number in range(5):
        crowd.rate(f"k/ring{number}", targets, 0.0)
    ring = [f"k/ring{n}" for n in range(5)]
    found = crowd.assess()
    assert found.voices() == [ring]
    assert {found.standings[rater].voice for rater in ring} == {"k/ring0"}
    assert list(found.suspects()) == ring
    assert min(found.standings[f"k/honest{n}"].reliability for n in range(16)) > 0.4


@pytest.mark.parametrize("elsewhere", [0, 20])
def test_a_ring_that_confirms_itself_where_nobody_looks_has_one_voice(elsewhere: int) -> None:
    """Whether or not its accounts also vote as others do."""
    crowd = Crowd(300, seed=5)
    honest(crowd, raters=40, each=20, accuracy=0.85)
    targets = [f"own{n}" for n in range(8)]
    ring = [f"k/ring{n}" for n in range(8)]
    for rater in ring:
        crowd.rate(rater, crowd.some(elsewhere), 1.0)
    crowd.truth |= dict.fromkeys(targets, "+")
    for rater in ring:
        crowd.rate(rater, targets, 1.0)
    found = crowd.assess()
    assert found.voices() == [ring]
    own = {vote.id for vote in crowd.votes if vote.prompt in targets}
    assert not own & found.corroborable


def test_a_ring_that_is_seen_in_two_ways_has_one_voice() -> None:
    """Three of it have enough in common to be told by that alone."""
    crowd = Crowd(120, seed=5)
    honest(crowd, raters=40, each=40, accuracy=0.85)
    for first, prompts in ((0, 8), (5, 60)):
        own = [f"own{first}-{n}" for n in range(prompts)]
        crowd.truth |= dict.fromkeys(own, "+")
        for number in range(first, 8):
            crowd.rate(f"k/ring{number}", own, 1.0)
    assert crowd.assess().voices() == [[f"k/ring{n}" for n in range(8)]]


@pytest.mark.parametrize("single", [False, True])
def test_a_careful_team_among_careful_raters_is_no_ring(single: bool) -> None:
    crowd = Crowd(300, seed=2)
    for number in range(40):
        crowd.rate(f"k/honest{number}", crowd.some(20), 0.99, single)
    team = [f"own{n}" for n in range(12)]
    crowd.truth |= dict.fromkeys(team, "+")
    for number in range(4):
        crowd.rate(f"k/team{number}", team, 1.0, single)
    assert crowd.assess().voices() == []


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_team_that_judges_alone_and_errs_on_its_own_is_no_ring(seed: int, single: bool) -> None:
    """Where nearly all thumbs are up, as many of a team are, too."""
    crowd = Crowd(300, seed)
    if single:
        crowd.truth = {prompt: crowd.generator.choices("+-", (9, 1))[0] for prompt in crowd.truth}
    for number in range(40):
        crowd.rate(f"k/honest{number}", crowd.some(20), 0.9, single)
    team = [f"own{n}" for n in range(12)]
    crowd.truth |= dict.fromkeys(team, "+")
    for number in range(4):
        crowd.rate(f"k/team{number}", team, 0.9, single)
    assert crowd.assess().voices() == []


def test_where_nobody_else_agrees_on_anything_unanimity_tells_nothing() -> None:
    crowd = Crowd(400, seed=1)
    for number in range(30):
        crowd.rate(f"k/alone{number}", [f"p{10 * number + n}" for n in range(10)], 0.8)
    for number in range(4):
        crowd.rate(f"k/team{number}", [f"p{390 + n}" for n in range(10)], 1.0)
    assert crowd.assess().voices() == []


def test_careful_raters_who_agree_are_no_ring() -> None:
    crowd = Crowd(60, seed=6)
    for number in range(9):
        crowd.rate(f"k/careful{number}", sorted(crowd.truth), 0.98)
    assert crowd.assess().voices() == []


def test_two_accounts_cannot_frame_a_third() -> None:
    crowd = Crowd(60, seed=7)
    crowd.rate("k/victim", sorted(crowd.truth), 0.9)
    for number in range(2):
        crowd.rate(f"k/liar{number}", sorted(crowd.truth), 0.05)
    found = crowd.assess()
    assert found.suspects() == {}
    # Of two that contradict one another nobody can tell who is right.
    crowd = Crowd(60, seed=8)
    crowd.rate("k/victim", sorted(crowd.truth), 1.0)
    crowd.rate("k/liar", sorted(crowd.truth), 0.0)
    found = crowd.assess()
    assert found.suspects() == {}
    assert found.standings["k/victim"].accuracy == pytest.approx(found.standings["k/liar"].accuracy)


def test_gold_questions_tell_who_is_right_where_the_majority_is_wrong() -> None:
    crowd = Crowd(40, seed=9)
    crowd.rate("k/honest", sorted(crowd.truth), 0.95)
    for number in range(4):
        crowd.rate(f"k/wrong{number}", sorted(crowd.truth), 0.05)
    assert crowd.assess().standings["k/honest"].accuracy < 0.5
    before = len(crowd.votes)
    crowd.rate("staff/expert", sorted(crowd.truth)[:20], 1.0)
    gold, crowd.votes = crowd.votes[before:], crowd.votes[:before]
    found = crowd.assess(gold=gold)
    honest_, wrong = found.standings["k/honest"], found.standings["k/wrong0"]
    assert (honest_.gold_asked, wrong.gold_asked) == (20, 20)
    assert honest_.gold_right >= 17
    assert honest_.accuracy > 0.6 > wrong.accuracy
    assert "k/honest" not in found.suspects()
    assert all("gold" in found.suspects()[f"k/wrong{n}"] for n in range(4))


def test_gold_answers_tell_nothing_of_who_gave_them() -> None:
    crowd = Crowd(20, seed=10)
    crowd.rate("k/expert", sorted(crowd.truth), 1.0)
    crowd.rate("k/other", sorted(crowd.truth)[:10], 1.0)
    found = crowd.assess(gold=[vote for vote in crowd.votes if vote.rater == "k/expert"])
    assert found.standings["k/expert"].gold_asked == 0
    assert found.standings["k/other"].gold_right == found.standings["k/other"].gold_asked == 10
    # A verdict is corroborable where the gold answer speaks, also with no other rater.
    other = [vote.id for vote in crowd.votes if vote.rater == "k/other"]
    alone = assess(
        [vote for vote in crowd.votes if vote.rater == "k/other"],
        SETTINGS,
        gold=[vote for vote in crowd.votes if vote.rater == "k/expert"],
    )
    assert alone.corroborable == set(other)


def test_the_excluded_are_assessed_but_have_no_say() -> None:
    crowd = Crowd(50, seed=11)
    crowd.rate("k/one", sorted(crowd.truth), 0.9)
    for number in range(3):
        crowd.rate(f"k/bad{number}", sorted(crowd.truth), 0.1)
    excluded = [f"k/bad{n}" for n in range(3)]
    found = crowd.assess(excluded=excluded)
    assert found.standings["k/one"].judged == 0
    assert found.standings["k/bad0"].judged == 50
    assert found.standings["k/bad0"].accuracy < 0.5
    # Nobody who counts judged the same as `one`; `one` did judge what the bad ones judged.
    assert found.corroborable == frozenset()
    crowd.rate("k/two", sorted(crowd.truth), 0.9)
    assert len(crowd.assess(excluded=excluded).corroborable) == len(crowd.votes)


def test_raters_of_mt_bench_are_all_relied_on_and_a_contrary_one_among_them_is_not() -> None:
    votes = mt_bench()
    clean = assess(votes, SETTINGS)
    assert clean.suspects() == {}
    assert clean.voices() == []
    flipped = [
        Vote(f"z{n}", "x/liar", "x", vote.prompt, {unit: OTHER[said] for unit, said in vote.verdicts.items()})
        for n, vote in enumerate(votes[::20])
    ]
    found = assess([*votes, *flipped], SETTINGS)
    assert list(found.suspects()) == ["x/liar"]
    for rater, standing in clean.standings.items():
        assert found.standings[rater].reliability == pytest.approx(standing.reliability, abs=0.15)


VOTES = st.lists(
    st.tuples(
        st.sampled_from(("k/a", "k/b", "j/c", "import/d")),
        st.integers(0, 3),
        st.sampled_from(("+", "-", "=")),
        st.booleans(),
    ),
    max_size=30,
)


@given(VOTES)
def test_whatever_is_said_everyone_has_a_standing_within_bounds(
    said: list[tuple[str, int, Label, bool]],
) -> None:
    crowd = Crowd(4)
    for rater, prompt, label, single in said:
        crowd.say(rater, f"p{prompt}", label, single)
    found = crowd.assess()
    assert set(found.standings) == {rater for rater, *_ in said}
    for standing in found.standings.values():
        assert 0.05 <= standing.reliability <= 1
        assert 0 < standing.accuracy < 1
        assert standing.agreement is None or 0 <= standing.agreement <= 1
    # The order in which raters came, and how they are called, changes nothing.
    renamed = [
        Vote(vote.id, vote.rater[::-1], vote.key, vote.prompt, vote.verdicts, at=vote.at)
        for vote in crowd.votes
    ]
    settings = RaterSettings(trusted=["d/tropmi"])
    again = assess(renamed[::-1], settings)
    for rater, standing in found.standings.items():
        assert again.standings[rater[::-1]].accuracy == pytest.approx(standing.accuracy, abs=1e-4)
