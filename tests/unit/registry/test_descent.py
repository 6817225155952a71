"""Which versions learned from an event: those of its round, and what began with them."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from registry.lineage import Lineage, Trace
from registry.registry import Registry
from registry.rounds import EventUse, Rounds


class History:
    """Rounds that publish a version each, on ten positions more than the last."""

    def __init__(self, engine: sa.Engine, directory: Path) -> None:
        self.rounds, self.registry = Rounds(engine), Registry(engine, directory / "versions")
        self.lineage, self.directory = Lineage(engine), directory
        self._publish(None, None)

    def _publish(self, parent: str | None, round_id: int | None) -> str:
        staging = self.directory / f"staging-{round_id}"
        staging.mkdir()
        (staging / "model.safetensors").write_text(f"weights of {round_id}")
        return self.registry.publish(staging, parent=parent, round_id=round_id, kind="ppo", details={}).name

    def round(
        self, parent: str, cursor: int, cutoff: int, *, erasures: int = 0, older: float = 0.0, **config: Any
    ) -> str:
        settings = {"parent": parent, "training": {"reward_older_share": older}, **config}
        id = self.rounds.begin(cursor, cutoff, settings, 0).id
        self.rounds.stage(id, "dataset", "running")
        self.rounds.stage(id, "dataset", "done", {"erasures": erasures})
        name = self._publish(parent, id)
        self.rounds.finish(id, "done", version=name)
        return name

    def learned(self, *traces: Trace, without: str | None = None) -> dict[str, str]:
        found = self.lineage.learned_from(traces, lambda event_id: event_id == "it", without)
        return {one.version: one.how for one in found}


@pytest.fixture
def history(engine: sa.Engine, tmp_path: Path) -> History:
    return History(engine, tmp_path)


def test_a_round_also_learns_from_what_a_lifted_quarantine_gives_back(history: History) -> None:
    history.round("policy-0000", 0, 10, standing={"held": {"k/x": [[0, 10]]}, "returned": {}})
    history.round("policy-0000", 10, 20, standing={"held": {}, "returned": {"k/x": [[2, 6]]}})
    assert history.learned((4, None))["policy-0002"] == "round 2 learned from it"
    assert "policy-0002" not in history.learned((8, None))


def test_the_versions_of_its_rounds_and_their_descendants(history: History) -> None:
    history.round("policy-0000", 0, 10)
    history.round("policy-0001", 10, 20)
    history.round("policy-0002", 20, 30)
    history.round("policy-0001", 30, 40)  # after a rollback: not from policy-0002
    assert history.learned((11, None)) == {
        "policy-0002": "round 2 learned from it",
        "policy-0003": "descends from policy-0002",
    }
    assert history.learned((10, None))["policy-0004"] == "descends from policy-0001"
    assert list(history.learned((20, None), (25, None))) == ["policy-0002", "policy-0003"]
    assert history.learned((41, None)) == history.learned() == {}


def test_reward_models_and_older_feedback_carry_it_on(history: History) -> None:
    history.round("policy-0000", 0, 10)
    history.round("policy-0000", 10, 20, reward_model_from=1)
    history.round("policy-0000", 20, 30, older=0.25)
    history.round("policy-0000", 30, 40, reward_model_from=3)
    history.round("policy-0000", 40, 50)
    assert history.learned((5, None)) == {
        "policy-0001": "round 1 learned from it",
        "policy-0002": "its reward model began as that of round 1",
        "policy-0003": "round 3 drew from older feedback, perhaps from it",
        "policy-0004": "its reward model began as that of round 3",
    }


def test_a_round_that_came_after_the_erasure_or_left_the_rater_out_did_not(history: History) -> None:
    history.round("policy-0000", 0, 10, erasures=0)
    history.round("policy-0000", 0, 10, erasures=1, older=0.5)
    history.round("policy-0000", 0, 10, without_raters=["ann"], older=0.5)
    assert list(history.learned((5, 1))) == ["policy-0001", "policy-0003"]
    assert list(history.learned((5, 1), without="ann")) == ["policy-0001"]
    assert list(history.learned((5, 2), without="bob")) == ["policy-0001", "policy-0002", "policy-0003"]
    # Of two events one was erased before the second round began.
    assert list(history.learned((5, 1), (6, None), without="ann")) == ["policy-0001", "policy-0002"]


def test_rounds_over_positions_whatever_became_of_them(history: History) -> None:
    history.round("policy-0000", 0, 10)
    failed = history.rounds.begin(10, 20, {"parent": "policy-0000"}, 0)
    history.rounds.finish(failed.id, "failed")
    history.rounds.request("ann")
    assert history.lineage.over([10, 11]) == [1, 2]
    assert history.lineage.over([20]) == [2]
    assert history.lineage.over([]) == history.lineage.over([0, 21]) == []


def test_a_rater_is_renamed_in_the_settings_of_rounds(history: History) -> None:
    weights = {"k/ann": 0.5, "k/bob": 2.0}
    training = {"reward_rater_weights": weights, "seed": 3}
    ids = [history.rounds.begin(0, 1, {"parent": "policy-0000", "training": training}, 0).id]
    history.rounds.finish(ids[0], "done")
    history.round("policy-0000", 0, 10)
    before = history.rounds.get(ids[0])
    assert history.rounds.rename_rater(lambda id: id == "k/ann", "sha256:x") == ids
    after = history.rounds.get(ids[0])
    expected = {"sha256:x": 0.5, "k/bob": 2.0}
    assert after.config["training"] == {"reward_rater_weights": expected, "seed": 3}
    assert after.config_hash == before.config_hash
    assert history.rounds.rename_rater(lambda id: id == "k/ann", "sha256:x") == []


def test_what_a_round_wrote_down_is_believed_and_nothing_else(history: History) -> None:
    def round_(uses: list[EventUse], older: list[str], cursor: int, **config: Any) -> None:
        id = history.rounds.begin(cursor, cursor + 10, {"parent": "policy-0000", **config}, 0).id
        history.rounds.record_uses(id, uses)
        history.rounds.record_older(id, older)
        history.rounds.finish(id, "done", version=history._publish("policy-0000", id))

    older = {"training": {"reward_older_share": 0.5}}
    round_([EventUse("it", "trained"), EventUse("other", "trained")], [], 0)
    round_([EventUse("other", "trained"), EventUse("it", "left_out", "quarantined")], [], 0)
    round_([EventUse("it", "held_out")], ["other"], 0, **older)
    round_([EventUse("new", "trained")], ["it"], 10, **older)
    round_([EventUse("new", "trained")], ["other"], 10, **older)
    round_([EventUse("it", "unrecorded")], [], 0)
    history.round("policy-0000", 0, 10)
    expected = [f"policy-{number:04d}" for number in (1, 4, 6, 7)]
    # Also once it is erased: what rounds wrote down stays.
    assert list(history.learned((5, None))) == expected
    assert list(history.learned((5, 1))) == expected
    # At a position that no slice has, nothing is looked for.
    assert history.learned((25, None)) == {}


def test_a_reward_model_that_began_with_a_policy_carries_it_on(history: History) -> None:
    history.round("policy-0000", 0, 10)
    history.round("policy-0001", 10, 20)
    history.round("policy-0000", 20, 30, reward_model_from=2)
    history.round("policy-0000", 30, 40, reward_model_from=3)
    assert history.learned((5, None)) == {
        "policy-0001": "round 1 learned from it",
        "policy-0002": "descends from policy-0001",
        "policy-0003": "its reward model began as that of round 2",
        "policy-0004": "its reward model began as that of round 3",
    }


def test_a_round_that_was_asked_for_early_may_begin_with_what_a_later_one_made(history: History) -> None:
    assert history.rounds.request("ann") == 1
    repeat = history.rounds.begin(0, 10, {"parent": "policy-0000"}, 0, repeat_of=9).id
    history.rounds.finish(repeat, "done", version=history._publish("policy-0000", repeat))
    history.round("policy-0001", 20, 30)
    assert history.learned((5, None)) == {
        "policy-0002": "descends from policy-0001",
        "policy-0001": f"round {repeat} learned from it",
    }
