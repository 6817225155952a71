"""What the rule decides on a trial, and what it says of it."""

import json

import pytest

from evaluation.canary import Decision, decide
from feedback.trial_votes import ArmVotes, TrialVotes
from registry.registry import Replica, Trial
from registry.settings import RolloutSettings

NOW = 1_000_000.0
CANARY = Trial("new", "canary", 0.5, 7, NOW - 3600)
SHADOW = Trial("new", "shadow", 0.5, 7, NOW - 3600 * 1000)
WORSE = TrialVotes(ArmVotes(40, 60), ArmVotes(70, 30))
EQUAL = TrialVotes(ArmVotes(1400, 600), ArmVotes(1400, 600))
FEW = TrialVotes(ArmVotes(3, 1), ArmVotes(4, 2), {"not the first of its end user or rater": 2})


def replica(
    name: str, state: str, *, age: float = 1.0, desired: str = "new", track: str = "trial"
) -> Replica:
    return Replica(name, desired, "old", state, f"{name} is out of memory", seen_at=NOW - age, track=track)  # type: ignore[arg-type]


def decided(votes: TrialVotes, trial: Trial = CANARY, *replicas: Replica, **settings: float) -> Decision:
    found = decide(
        trial,
        "old",
        votes,
        replicas,
        settings=RolloutSettings(**settings),  # type: ignore[arg-type]
        now=NOW,
        stale_seconds=30,
    )
    json.dumps(found.figures, allow_nan=False)
    return found


def test_users_who_find_it_worse_roll_it_back() -> None:
    found = decided(WORSE)
    assert found.move == "rollback"
    assert found.reason.startswith(
        "Users find it worse: 40 of 100 votes (40%) on new were good, 70 of 100 votes (70%) on old; evidence"
    )
    assert found.figures["e_worse"] > 20 == pytest.approx(found.figures["e_needed"])


def test_users_who_find_it_not_worse_promote_it_from_enough_votes_on() -> None:
    assert decided(EQUAL).move == "promote"
    assert "not worse by 0.1 or more" in decided(EQUAL).reason
    waits = decided(EQUAL, canary_minimum_votes=2001)
    assert waits.move == "keep"
    assert "a promotion takes 2001 votes" in waits.reason
    # What is worse, but less than the margin, goes by the verdict that comes first; both at once: back.
    both = TrialVotes(ArmVotes(66_000, 34_000), ArmVotes(70_000, 30_000))
    assert decided(both).figures["e_not_worse"] > 20
    assert decided(both).move == "rollback"
    assert decided(WORSE, canary_minimum_votes=1000).move == "rollback"


def test_few_votes_decide_nothing_until_time_is_up() -> None:
    found = decided(FEW)
    assert found.move == "keep"
    assert "don't decide yet: 3 of 4 votes (75%) on new were good" in found.reason
    assert found.figures["left_out"] == {"not the first of its end user or rater": 2}
    late = decided(FEW, canary_hours=0.5)
    assert (late.move, late.reason[:38]) == ("rollback", "The votes of 0.5 hours don't decide: 3")
    assert "0 of 0 votes on new" in decided(TrialVotes()).reason


def test_alpha_and_margin_are_honoured() -> None:
    assert decided(WORSE, canary_alpha=1e-9).move == "keep"
    assert decided(EQUAL, canary_margin=0.01).move == "keep"


@pytest.mark.parametrize("trial", [CANARY, SHADOW])
def test_what_no_replica_of_the_trial_can_load_is_rolled_back(trial: Trial) -> None:
    failed = replica("r1", "failed")
    found = decided(EQUAL, trial, failed, replica("r2", "failed"), replica("r0", "serving", track="stable"))
    assert found.move == "rollback"
    assert found.reason == (
        "No replica of the trial can load new: r1: r1 is out of memory; r2: r2 is out of memory."
    )
    for other in (
        replica("r2", "serving"),
        replica("r2", "swapping"),
        replica("r2", "failed", desired="older"),  # from before this trial
    ):
        assert decided(FEW, trial, failed, other).move == "keep"
    # Those that are gone say nothing.
    assert decided(FEW, trial, failed, replica("r2", "serving", age=31)).move == "rollback"
    assert decided(FEW, trial, failed, replica("r2", "stopped")).move == "rollback"
    assert decided(FEW, trial, replica("r1", "failed", age=31)).move == "keep"
    assert decided(FEW, trial, replica("r1", "failed", track="stable")).move == "keep"


def test_a_shadow_goes_on_whatever_the_votes_and_the_time() -> None:
    assert decided(WORSE, SHADOW).move == decided(EQUAL, SHADOW).move == "keep"


def test_overwhelming_evidence_is_a_number_too() -> None:
    crushing = TrialVotes(ArmVotes(0, 10**5), ArmVotes(10**5, 0))
    assert decided(crushing).move == "rollback"
