"""Rounds over a real database: one that waits, one that runs, figures that can be written twice."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from instructloop.database import connect
from registry.rounds import EventUse, RoundConflict, Rounds, UnknownRound, config_hash
from registry.tables import ROUND_EVENTS, ROUNDS


@pytest.fixture
def rounds(engine: sa.Engine) -> Rounds:
    return Rounds(engine)


def test_a_round_from_request_to_end(rounds: Rounds) -> None:
    assert rounds.unfinished() is None
    asked = rounds.request("ann")
    assert rounds.request("bob") == asked
    begun = rounds.begin(0, 40, {"lr": 1e-5, "epochs": 2}, 7)
    assert (begun.id, begun.state, begun.requested_by) == (asked, "running", "ann")
    assert (begun.cursor, begun.cutoff, begun.seed) == (0, 40, 7)
    assert rounds.requested() is None
    running = rounds.unfinished()
    assert running is not None
    assert running.id == asked
    rounds.stage(asked, "dataset", "running")
    rounds.stage(asked, "dataset", "done")
    rounds.stage(asked, "ppo", "running")
    assert rounds.get(asked).stage == "ppo"
    assert {stage.name: stage.state for stage in rounds.stages(asked)} == {
        "dataset": "done",
        "ppo": "running",
    }
    rounds.finish(asked, "done", version="policy-0001", verdict={"promote": True, "reasons": ["better"]})
    ended = rounds.get(asked)
    assert (ended.state, ended.version) == ("done", "policy-0001")
    assert ended.verdict == {"promote": True, "reasons": ["better"]}
    assert ended.ended_at is not None
    assert ended.started_at is not None
    assert ended.ended_at >= ended.started_at
    last = rounds.last_done()
    assert last is not None
    assert last.cutoff == 40
    assert rounds.unfinished() is None


def test_the_next_round_starts_where_the_last_one_that_was_done_ended(rounds: Rounds) -> None:
    rounds.finish(rounds.begin(0, 10, {}, 0).id, "done")
    rounds.finish(rounds.begin(10, 30, {}, 0).id, "failed", error="out of memory")
    last = rounds.last_done()
    assert last is not None
    assert last.cutoff == 10
    assert [item.state for item in rounds.list()] == ["failed", "done"]
    assert rounds.list()[0].error == "out of memory"


def test_no_round_goes_on_from_a_repeat(rounds: Rounds) -> None:
    first = rounds.begin(0, 10, {"a": 1}, 0)
    rounds.finish(first.id, "done")
    waiting = rounds.request("ann")
    again = rounds.begin(0, 10, {"a": 1}, 0, repeat_of=first.id)
    assert again.id not in (first.id, waiting)
    assert (again.repeat_of, again.config_hash) == (first.id, first.config_hash)
    rounds.finish(again.id, "done")
    last = rounds.last_done()
    assert last is not None
    assert last.id == first.id
    assert rounds.begin(10, 12, {}, 0).id == waiting


def test_pins(rounds: Rounds) -> None:
    numbers = []
    for i in range(3):
        numbers.append(rounds.begin(i, i + 1, {}, 0).id)
        rounds.finish(numbers[-1], "done")
    assert rounds.pinned() == []
    rounds.pin(numbers[2])
    rounds.pin(numbers[0])
    assert [item.id for item in rounds.pinned()] == [numbers[0], numbers[2]]
    rounds.pin(numbers[0], False)
    assert [item.pinned for item in rounds.list()] == [True, False, False]
    with pytest.raises(UnknownRound, match="no round 99"):
        rounds.pin(99)


def test_a_stage_keeps_its_last_run_s_times_and_what_it_left(rounds: Rounds) -> None:
    number = rounds.begin(0, 1, {}, 0).id
    before = time.time()
    rounds.stage(number, "sft", "running")
    (killed,) = rounds.stages(number)
    assert killed.started_at is not None
    assert (killed.seconds, killed.result) == (None, None)
    time.sleep(0.05)
    rounds.stage(number, "sft", "running")
    time.sleep(0.02)
    rounds.stage(number, "sft", "done", {"loss": [math.nan, 0.5], "deep": {"high": math.inf, "n": 3}})
    (ended,) = rounds.stages(number)
    assert ended.started_at is not None
    assert ended.started_at >= before + 0.05
    assert ended.seconds is not None
    assert 0.02 <= ended.seconds <= time.time() - before - 0.05
    assert (killed.attempts, ended.attempts) == (1, 2)
    assert ended.result == {"loss": [None, 0.5], "deep": {"high": None, "n": 3}}


def test_one_round_at_a_time(rounds: Rounds) -> None:
    first = rounds.begin(0, 1, {}, 0)
    with pytest.raises(RoundConflict, match="another round"):
        rounds.begin(1, 2, {}, 0)
    waiting = rounds.request("ann")
    assert waiting != first.id
    with pytest.raises(RoundConflict, match="another round"):
        rounds.begin(1, 2, {}, 0)
    assert rounds.get(waiting).state == "requested"
    rounds.finish(first.id, "done")
    assert rounds.begin(1, 2, {}, 0).id == waiting
    with pytest.raises(RoundConflict, match="done already"):
        rounds.finish(first.id, "failed")
    with pytest.raises(RoundConflict, match="not running"):
        rounds.stage(first.id, "ppo", "running")
    with pytest.raises(UnknownRound, match="no round 99"):
        rounds.get(99)


def test_the_database_itself_refuses_a_second_running_round(rounds: Rounds, engine: sa.Engine) -> None:
    rounds.begin(0, 1, {}, 0)
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
        connection.execute(sa.insert(ROUNDS).values(state="running", config={}))


def test_many_who_ask_at_once_get_one_round(engine: sa.Engine, tmp_path: Path) -> None:
    def ask(number: int) -> int:
        own = connect(f"sqlite:///{tmp_path}/store.db")
        try:
            return Rounds(own).request(f"operator {number}")
        finally:
            own.dispose()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(16)))) == 1
    assert len(Rounds(engine).list()) == 1


def test_figures_of_a_step_that_is_run_again_replace_the_first(rounds: Rounds) -> None:
    number = rounds.begin(0, 1, {}, 0).id
    rounds.metric(number, "ppo", 1, {"objective/scores": 0.1, "objective/kl": 0.0})
    rounds.metric(number, "ppo", 2, {"objective/scores": 0.2})
    rounds.metric(number, "ppo", 1, {"objective/scores": 0.3, "loss": math.nan})
    rounds.metric(number, "ppo", 3, {})
    found = {(metric.step, metric.name): metric.value for metric in rounds.metrics(number)}
    assert found == {
        (1, "objective/scores"): 0.3,
        (1, "objective/kl"): 0.0,
        (1, "loss"): None,
        (2, "objective/scores"): 0.2,
    }


def test_the_configs_hash_ignores_order_and_nothing_else() -> None:
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert config_hash({"a": 1}) != config_hash({"a": 1.5})
    with pytest.raises(ValueError):
        config_hash({"a": math.inf})


def test_what_a_failed_round_used_is_forgotten_unless_it_published(rounds: Rounds, engine: sa.Engine) -> None:
    for published in (False, True):
        number = rounds.begin(0, 10, {}, 0).id
        rounds.record_uses(number, [EventUse("a", "trained"), EventUse("b", "left_out", "tied")])
        rounds.record_older(number, ["c", "d"])
        # A stage that is run again replaces what it wrote, and nothing else.
        rounds.record_uses(number, [EventUse("a", "held_out")])
        rounds.record_older(number, ["c"])
        with engine.connect() as connection:
            found = connection.execute(sa.select(ROUND_EVENTS).order_by(ROUND_EVENTS.c.event_id)).all()
        assert found == [(number, "a", "held_out", None), (number, "c", "older", None)]
        if published:
            rounds.stage(number, "publish", "running")
            rounds.stage(number, "publish", "done", {"version": "policy-0001"})
        rounds.finish(number, "failed", error="out of memory")
        with engine.connect() as connection:
            assert len(connection.execute(sa.select(ROUND_EVENTS)).all()) == 2 * published
        with pytest.raises(RoundConflict):
            rounds.record_uses(number, [])
