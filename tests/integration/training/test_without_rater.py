"""Rounds without a rater, from before the rater; a round does not learn from what was forgotten."""

import json
from pathlib import Path
from typing import Any

import pytest
from unit.training.installation import EVENTS, Installation

from feedback.events import FEEDBACK, Event
from feedback.queue import Entry
from feedback.tombstones import digest
from registry.lineage import Lineage
from registry.registry import UnknownVersion
from registry.rounds import Round
from training.round import RoundRefused

QUICK: dict[str, Any] = {
    "sft_minimum": 1000,
    "reward_epochs": 1,
    "ppo_updates": 1,
    "ppo_batch": 8,
    "ppo_response_tokens": 4,
    "keep_rounds": 5,
}
TROLL = "k/troll"


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "data")


def troll(installation: Installation, seed: int, count: int = 5) -> None:
    """Let the troll vote on what was asked with this seed."""
    entries = []
    for i in range(count):
        said = {"type": "thumb", "completion_id": f"chatcmpl-{seed}-{i}", "choice": 0, "value": "up"}
        event = Event(
            event_id=f"troll-{seed}-{i}",
            key_id="k",
            rater=TROLL,
            received_at=3.0,
            feedback=FEEDBACK.validate_python(said),
        )
        entries.append(Entry(f"2-{i}", "event", event.model_dump_json().encode(), event.event_id))
    assert installation.store.ingest(entries).stored == count


def once(installation: Installation, **settings: Any) -> Round:
    round_ = installation.trainer(**QUICK | settings).run_once()
    assert round_ is not None
    return round_


def usable(installation: Installation, round_: Round) -> int:
    """How many thumbs and rankings the round had."""
    directory = installation.directory / "rounds" / f"{round_.id:04d}"
    data = json.loads((directory / "dataset.json").read_text())
    return sum(data[side][kind] for side in ("train", "held_out") for kind in ("comparisons", "judgements"))


def promote(installation: Installation, name: str | None) -> None:
    assert name is not None
    if installation.registry.version(name).state == "candidate":
        installation.registry.promote(name, actor="test", reason="test")


def test_a_round_from_before_the_rater_on_all_since_but_the_raters(installation: Installation) -> None:
    installation.give_feedback(seed=1)
    first = once(installation)
    base = installation.registry.version("policy-0000")
    installation.give_feedback(seed=2)
    troll(installation, 2)
    second = once(installation)
    installation.give_feedback(seed=3)
    assert second.state == "done"
    parent = second.config["parent"]
    traces = installation.store.forgettings.traces_of(TROLL)
    lineage, is_it = Lineage(installation.engine), installation.store.forgettings.gave(TROLL)
    touched = [one.version for one in lineage.learned_from(traces, is_it)]
    assert touched == [second.version]

    third = installation.trainer(**QUICK).retrain(TROLL)
    assert (third.state, third.error) == ("done", None)
    assert third.config["parent"] == parent
    # The gate rejected or promoted the first candidate: it decides what "before" is.
    cursor = first.cutoff if parent == first.version else 0
    assert (third.cursor, third.cutoff) == (cursor, 3 * EVENTS + 5)
    assert usable(installation, third) == 2 * (3 * EVENTS - (cursor or 0)) // 3
    assert third.config["without_raters"] == [digest(("rater", TROLL))]
    assert TROLL not in json.dumps(dict(third.config))
    assert third.repeat_of is None
    assert third.verdict is not None
    version = installation.registry.version(third.version or "")
    assert version.state == ("serving" if third.verdict["promote"] else "rejected")
    assert version.manifest.details["without_raters"] == third.config["without_raters"]
    assert version.manifest.parent == parent
    # It is a round like any: the next goes on behind it, and it learned nothing from the troll.
    assert installation.rounds.last_done() == third
    name = digest(("rater", TROLL))
    touched = [one.version for one in lineage.learned_from(traces, is_it, name)]
    assert touched == [second.version]
    assert lineage.learned("troll-2-0") == [second.version]
    use = lineage.uses("troll-2-0")[-1]
    assert (use.round_id, use.use, use.reason) == (third.id, "left_out", "the round does without the rater")
    assert base.state != "pruned"


def test_a_version_can_be_named_but_none_that_learned_from_the_rater(installation: Installation) -> None:
    installation.give_feedback(seed=1)
    troll(installation, 1)
    first = once(installation)
    with pytest.raises(RoundRefused, match=f"{first.version} learned from {TROLL} .round 1 learned from it."):
        installation.trainer(**QUICK).retrain(TROLL, first.version)
    with pytest.raises(UnknownVersion):
        installation.trainer(**QUICK).retrain(TROLL, "policy-0099")
    with pytest.raises(RoundRefused, match="k/nobody has no feedback"):
        installation.trainer(**QUICK).retrain("k/nobody")
    second = installation.trainer(**QUICK).retrain(TROLL, "policy-0000")
    assert (second.state, second.config["parent"], second.cursor) == ("done", "policy-0000", 0)
    assert usable(installation, first) - usable(installation, second) == 5
    # The reward model that learned from the rater is no start either.
    assert second.config["reward_model_from"] is None


def test_it_works_on_after_the_rater_was_forgotten(installation: Installation) -> None:
    installation.give_feedback(seed=1)
    troll(installation, 1)
    first = once(installation)
    promote(installation, first.version)
    forgettings = installation.store.forgettings
    number = forgettings.begin("rater", TROLL, "test")
    forgettings.erase(number)
    assert installation.store.slice(0, installation.store.head()).events != []
    second = installation.trainer(**QUICK).retrain(TROLL)
    assert (second.state, second.config["parent"]) == ("done", "policy-0000")
    assert usable(installation, first) - usable(installation, second) == 5
    # Both rounds have the troll's positions in their slice, but only the first saw anything there.
    lineage = Lineage(installation.engine)
    found = lineage.learned_from(forgettings.traces(number), forgettings.took(number))
    assert [one.version for one in found] == [first.version]


def test_a_repeat_leaves_the_rater_out_as_well(installation: Installation) -> None:
    installation.give_feedback(seed=1)
    troll(installation, 1)
    second = installation.trainer(**QUICK).retrain(TROLL)
    repeat = installation.trainer(**QUICK).repeat(second.id, {})
    assert repeat.state == "done"
    assert installation.weights(repeat.version) == installation.weights(second.version)


@pytest.mark.parametrize("stage", ["sft", "publish"])
def test_a_round_ends_that_had_read_what_is_forgotten(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """As long as there is no version, that is; the next round learns from what is left."""
    installation.give_feedback(seed=1)
    troll(installation, 1)
    forgettings, begin = installation.store.forgettings, installation.rounds.stage

    def forget_at(round_id: int, name: str, state: str, *result: Any) -> None:
        if (name, state) == (stage, "running"):
            forgettings.erase(forgettings.begin("rater", TROLL, "test"))
        begin(round_id, name, state, *result)

    monkeypatch.setattr(installation.rounds, "stage", forget_at)
    failed = once(installation)
    assert failed.state == "failed"
    assert failed.error == (
        f"{stage}: feedback that it had read was forgotten meanwhile: the next round learns from what is left"
    )
    assert [one.name for one in installation.registry.versions()] == ["policy-0000"]
    monkeypatch.undo()
    following = once(installation)
    assert (following.state, following.cursor) == ("done", 0)
    assert usable(installation, following) == 2 * EVENTS // 3


def test_what_is_forgotten_beside_a_round_does_not_end_it(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation.give_feedback(seed=1)
    forgettings, begin = installation.store.forgettings, installation.rounds.stage

    def forget_at(round_id: int, name: str, state: str, *result: Any) -> None:
        if (name, state) == ("sft", "running"):
            installation.give_feedback(seed=2)
            troll(installation, 2)
            forgettings.erase(forgettings.begin("rater", TROLL, "test"))
        begin(round_id, name, state, *result)

    monkeypatch.setattr(installation.rounds, "stage", forget_at)
    assert once(installation).state == "done"


def test_of_a_rounds_files_only_samples_hold_texts(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What forgetting deletes of a round is all that there is: nothing of the data set lies about."""
    installation.give_feedback(seed=1)
    troll(installation, 1)
    prompts = {
        str(one.messages[-1]["content"])
        for parts in installation.store.slice(0, EVENTS).completions.values()
        for one in parts
        if one.messages is not None
    }
    while_it_ran: set[str] = set()
    begin = installation.rounds.stage

    def look(round_id: int, name: str, state: str, *result: Any) -> None:
        while_it_ran.update(files_with(installation.directory / "rounds", prompts))
        begin(round_id, name, state, *result)

    monkeypatch.setattr(installation.rounds, "stage", look)
    settings = {"sft_minimum": 4, "sft_epochs": 2}
    assert once(installation, **settings).state == "done"
    assert while_it_ran == {"0001/samples.jsonl"}
    assert files_with(installation.directory / "rounds", prompts) == {"0001/samples.jsonl"}
    assert files_with(installation.directory / "versions", prompts) == set()


def files_with(directory: Path, texts: set[str]) -> set[str]:
    return {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and any(text.encode() in path.read_bytes() for text in texts)
    }
