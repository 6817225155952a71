"""From a version to the events behind it and back, on SQLite and on Postgres."""

from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from registry.lineage import LEARNED, Lineage, RoundUse, UsedEvent
from registry.rounds import EventUse, Rounds
from registry.tables import AUDIT_LOG, METADATA


def config(parent: str, reward_model_from: int | None = None, **training: Any) -> dict[str, Any]:
    return {"parent": parent, "reward_model_from": reward_model_from, "training": training}


def run(
    rounds: Rounds,
    settings_: dict[str, Any],
    uses: list[EventUse],
    *,
    older: tuple[str, ...] = (),
    version: str | None = None,
    ends: Any = "done",
    repeat_of: int | None = None,
) -> int:
    """A round from its begin to its end; it publishes `version` also when it then fails."""
    number = rounds.begin(0, 10, settings_, 0, repeat_of=repeat_of).id
    rounds.record_uses(number, uses)
    rounds.record_older(number, older)
    if version is not None:
        rounds.stage(number, "publish", "running")
        rounds.stage(number, "publish", "done", {"version": version})
    rounds.finish(number, ends, version=version if ends == "done" else None)
    return number


@pytest.fixture
def story(either_database: Engine) -> Lineage:
    """Rounds 1 (rejected), 2 (serves), 3 (failed), 4 (serves), 5 (repeats 2), 6 (failed in the gate)."""
    rounds = Rounds(either_database)
    first = [EventUse("a", "trained"), EventUse("b", "held_out"), EventUse("c", "left_out", "tied")]
    second = [EventUse("d", "trained"), EventUse("e", "held_out")]
    run(rounds, config("policy-0000"), first, version="policy-0001")
    run(rounds, config("policy-0000", 1), second, older=("a",), version="policy-0002")
    run(rounds, config("policy-0002", 2), [EventUse("f", "trained")], ends="failed")
    fourth = [EventUse("f", "trained"), EventUse("g", "left_out", "tied"), EventUse("h", "left_out", "empty")]
    run(rounds, config("policy-0002", 2), fourth, older=("d",), version="policy-0003")
    run(rounds, config("policy-0000", 1), second, version="policy-0004", repeat_of=2)
    run(rounds, config("policy-0003", 4), [EventUse("i", "trained")], version="policy-0005", ends="failed")
    return Lineage(either_database)


def test_rounds_behind_a_version_are_its_own_its_parents_and_those_of_its_reward_models(
    story: Lineage,
) -> None:
    def behind(version: str) -> list[tuple[int, str]]:
        return [(found.round_id, found.through) for found in story.behind(version)]

    # Round 1's candidate was rejected, but its reward model went on.
    assert behind("policy-0003") == [(4, "own"), (2, "policy"), (1, "reward_model")]
    assert behind("policy-0002") == [(2, "own"), (1, "reward_model")]
    assert behind("policy-0001") == [(1, "own")]
    # A repeat goes out from where the first run did, and nothing goes on from it.
    assert behind("policy-0004") == [(5, "own"), (1, "reward_model")]
    # A round that failed after it had published left a candidate that anybody may promote.
    assert behind("policy-0005") == [(6, "own"), (4, "policy"), (2, "policy"), (1, "reward_model")]
    assert behind("policy-0000") == behind("policy-0099") == []


def test_a_rounds_events_are_counted_by_use_and_reason(story: Lineage) -> None:
    own, parent, _ = story.behind("policy-0003")
    assert (own.version, own.repeat_of, own.cursor, own.cutoff) == ("policy-0003", None, 0, 10)
    assert own.events == {"trained": 1, "older": 1, "left_out": 2}
    assert own.reasons == {"tied": 1, "empty": 1}
    assert (parent.events, parent.reasons) == ({"trained": 1, "older": 1, "held_out": 1}, {})
    (repeat, _) = story.behind("policy-0004")
    assert (repeat.repeat_of, repeat.events) == (2, {"trained": 1, "held_out": 1})


def test_events_come_in_pages_and_by_use(story: Lineage) -> None:
    everything = story.events([4, 2, 1], limit=100)
    assert [(event.round_id, event.event_id, event.use) for event in everything] == [
        (4, "d", "older"),
        (4, "f", "trained"),
        (4, "g", "left_out"),
        (4, "h", "left_out"),
        (2, "a", "older"),
        (2, "d", "trained"),
        (2, "e", "held_out"),
        (1, "a", "trained"),
        (1, "b", "held_out"),
        (1, "c", "left_out"),
    ]
    assert everything[3].reason == "empty"
    for size in range(1, 12):
        pages: list[UsedEvent] = []
        after = None
        while page := story.events([4, 2, 1], limit=size, after=after):
            assert len(page) <= size
            pages += page
            after = (page[-1].round_id, page[-1].event_id)
        assert pages == everything
    assert [event.event_id for event in story.events([4, 2, 1], limit=9, use="held_out")] == ["e", "b"]
    assert story.events([], limit=1) == []


def test_from_an_event_to_what_rounds_did_with_it_and_to_versions(story: Lineage) -> None:
    assert story.uses("a") == [
        RoundUse(1, "policy-0001", None, "trained", None),
        RoundUse(2, "policy-0002", None, "older", None),
    ]
    assert story.uses("d")[2] == RoundUse(5, "policy-0004", 2, "trained", None)
    # By its own weights, by those that came of them, and by reward models.
    assert story.learned("a") == [f"policy-000{n}" for n in (1, 2, 3, 4, 5)]
    assert story.learned("d") == [f"policy-000{n}" for n in (2, 3, 4, 5)]
    assert story.learned("i") == ["policy-0005"]
    # Round 3 failed before it published: nothing came of it.
    assert [use.round_id for use in story.uses("f")] == [4]
    for event_id in ("b", "c", "nobody's"):
        assert story.learned(event_id) == []


def test_a_reward_model_on_a_trunk_of_its_own_owes_nothing_to_the_policy(either_database: Engine) -> None:
    rounds, lineage = Rounds(either_database), Lineage(either_database)
    run(rounds, config("policy-0000"), [EventUse("a", "trained")], version="policy-0001")
    # It starts anew from round 1's policy (by SFT), and the other from a trunk; both candidates are rejected.
    run(rounds, config("policy-0001", None), [EventUse("b", "trained")], version="policy-0002")
    run(rounds, config("policy-0001", None, reward_backbone="x"), [], version="policy-0003")
    run(rounds, config("policy-0000", 2), [], version="policy-0004")
    run(rounds, config("policy-0000", 3), [], version="policy-0005")
    found = {name: [r.round_id for r in lineage.behind(name)] for name in ("policy-0004", "policy-0005")}
    assert found == {"policy-0004": [4, 2, 1], "policy-0005": [5, 3]}
    assert lineage.learned("a") == ["policy-0001", "policy-0002", "policy-0003", "policy-0004"]


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, int | None, dict[str, str]]]:
    """Of each round its parent's number (0: none), the round of its reward model's start, and its uses."""
    uses = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["trained", "held_out", "left_out"]))
    return [
        (draw(st.integers(0, n)), draw(st.none() | st.integers(1, n)) if n else None, draw(uses))
        for n in range(draw(st.integers(1, 7)))
    ]


@given(histories())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_both_ways_lead_to_the_same(
    either_database: Engine, history: list[tuple[int, int | None, dict[str, str]]]
) -> None:
    with either_database.begin() as connection:
        for table in reversed(METADATA.sorted_tables):
            if table is not AUDIT_LOG:  # which only grows
                connection.execute(sa.delete(table))
    rounds, lineage = Rounds(either_database), Lineage(either_database)
    ids: list[int] = []
    for parent, start, uses in history:
        settings_ = config(f"policy-{parent:04d}", ids[start - 1] if start else None)
        listed = [EventUse(event_id, use) for event_id, use in uses.items()]  # type: ignore[arg-type]
        ids.append(run(rounds, settings_, listed, version=f"policy-{len(ids) + 1:04d}"))
    for event_id in "abcdef":
        forth = set(lineage.learned(event_id))
        back = set()
        for n in range(1, len(history) + 1):
            numbers = [found.round_id for found in lineage.behind(f"policy-{n:04d}")]
            found = lineage.events(numbers, limit=1000)
            if any(event.event_id == event_id and event.use in LEARNED for event in found):
                back.add(f"policy-{n:04d}")
        assert forth == back
