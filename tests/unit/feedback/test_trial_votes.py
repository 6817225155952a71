"""Which votes compare a version on trial with the stable one."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.events import Rating, Thumb
from feedback.trial_votes import ArmVotes, GivenVote, TrialVotes, count_votes

NEW, OLD = "policy-0002", "policy-0001"


def vote(user: str | None, said: str | int, *versions: str, rater: str = "", key: str = "k1") -> GivenVote:
    fields: dict[str, Any] = {"completion_id": "c", "choice": 0}
    feedback = (
        Thumb(type="thumb", value=said, **fields)  # type: ignore[arg-type]
        if isinstance(said, str)
        else Rating(type="rating", score=said, **fields)
    )
    return GivenVote(rater or f"{key}/user:{user}", key, user, frozenset(versions or (NEW,)), feedback)


def counted(*votes: GivenVote, quarantined: tuple[str, ...] = ()) -> TrialVotes:
    return count_votes(votes, trial=NEW, stable=OLD, quarantined=quarantined)


def test_thumbs_and_ratings_count_for_the_version_that_they_are_on() -> None:
    found = counted(
        vote("a", "up"), vote("b", "down"), vote("c", 7), vote("d", 1, OLD), vote("e", 5, OLD), vote("f", 4)
    )
    assert (found.trial, found.stable) == (ArmVotes(2, 1), ArmVotes(1, 1))
    assert found.left_out == {"a rating of 4, which is in between": 1}


def test_the_first_vote_of_an_end_user_counts_whoever_else_votes_on_its_answers() -> None:
    found = counted(
        vote("a", "up"),
        vote("a", "down"),  # changed, or another answer
        vote("a", "down", OLD),
        vote("a", "down", rater="r9/labeller"),
        vote("a", "down", key="k2"),  # another client's a
    )
    assert (found.trial, found.stable) == (ArmVotes(1, 1), ArmVotes(0, 0))
    assert found.left_out == {"not the first of its end user or rater": 3}


def test_a_rater_has_one_vote_whomever_it_was_answered() -> None:
    found = counted(*(vote(user, "down", rater="r9/labeller") for user in "abc"))
    assert found.trial == ArmVotes(0, 1)


def test_a_client_that_names_no_rater_hands_on_what_its_end_users_say() -> None:
    unnamed = [vote(user, "up", rater="k1/") for user in "abc"]
    by_token = [vote(user, "up", rater=f"k1/anonymous:{user}") for user in "de"]
    assert counted(*unnamed, *by_token).trial == ArmVotes(5, 0)
    # Another key's unnamed rater is one rater.
    assert counted(*(vote(user, "up", rater="r9/") for user in "abc")).trial == ArmVotes(1, 0)


def test_requests_without_an_end_user_have_one_vote_a_key_as_they_have_one_arm() -> None:
    assert counted(*(vote(None, "up", rater=f"k1/{name}") for name in "abc")).trial == ArmVotes(1, 0)


def test_mixed_and_other_versions_and_quarantined_raters_take_nobodys_turn() -> None:
    found = counted(
        vote("a", "down", NEW, OLD),
        vote("a", "down", "policy-0000"),
        vote("a", "down", rater="k1/eve"),
        vote("a", "up"),
        quarantined=("k1/eve",),
    )
    assert found.trial == ArmVotes(1, 0)
    assert found.left_out == {
        "on a response by several versions or another one": 2,
        "by a rater in quarantine": 1,
    }


def test_a_response_without_a_token_is_by_no_version() -> None:
    nothing = GivenVote("k1/user:a", "k1", "a", frozenset(), vote("a", "up").said)
    assert counted(nothing).trial == ArmVotes(0, 0)


VOTES = st.lists(
    st.builds(
        vote,
        st.sampled_from(["a", "b", "c", None]),
        st.sampled_from(["up", "down", 2, 4, 6]),
        st.sampled_from([NEW, OLD, "policy-0000"]),
        rater=st.sampled_from(["", "k1/", "r9/x", "k1/eve"]),
    ),
    max_size=12,
)


@given(VOTES)
def test_what_was_counted_stays_counted_whatever_comes_later(votes: list[GivenVote]) -> None:
    """A test that is looked at after every vote may not lose or change what it has seen."""
    sizes = []
    for end in range(len(votes) + 1):
        found = counted(*votes[:end], quarantined=("k1/eve",))
        sizes.append((found.trial.good, found.trial.bad, found.stable.good, found.stable.bad))
        assert sum(sizes[-1]) + sum(found.left_out.values()) == end
    for before, after in itertools.pairwise(sizes):
        assert all(x <= y for x, y in zip(before, after, strict=True))
        assert sum(after) - sum(before) <= 1


def test_the_share_of_no_votes_is_none() -> None:
    assert (ArmVotes().share, ArmVotes(3, 1).share) == (None, pytest.approx(0.75))
