"""From a forgotten rater to a version that never learned from it, by the commands that users run."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.round_process import RoundInstallation

from feedback.events import FEEDBACK, Event
from feedback.queue import Entry
from instructloop import redis_process

TROLL = "k/troll"
QUICK = {
    "TRAINING__ROLLOUT_ENGINE": "transformers",
    "TRAINING__SFT_MINIMUM": "1000",
    "TRAINING__REWARD_EPOCHS": "1",
    "TRAINING__PPO_UPDATES": "1",
    "TRAINING__PPO_BATCH": "8",
    "TRAINING__PPO_RESPONSE_TOKENS": "4",
}


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[RoundInstallation]:
    found = RoundInstallation(tmp_path)
    redis = subprocess.Popen(redis_process.prepare(tmp_path), stdout=subprocess.DEVNULL)
    yield found
    redis.terminate()
    redis.wait(timeout=20)


def run(installation: RoundInstallation, *command: str) -> str:
    process = installation.start(*command, **QUICK)
    code = process.wait(timeout=120)
    assert code == 0, installation.log()[-3000:]
    return installation.log()


def test_forget_then_train_from_before(installation: RoundInstallation) -> None:
    installation.give_feedback(seed=1)
    said = {
        "type": "thumb",
        "completion_id": "chatcmpl-1-0",
        "choice": 0,
        "value": "up",
        "comment": "troll-words",
    }
    event = Event(
        event_id="troll",
        key_id="k",
        rater=TROLL,
        received_at=3.0,
        feedback=FEEDBACK.validate_python(said),
    )
    installation.store.ingest([Entry("2-0", "event", event.model_dump_json().encode(), "troll")])
    run(installation, "train", "--once")
    first = installation.rounds.list()[0]
    assert first.version == "policy-0001"

    told = run(installation, "forget", "--rater", TROLL)
    state = installation.registry.version("policy-0001").state
    assert f"  policy-0001 ({state}): round 1 learned from it" in told
    assert f"instructloop train --without-rater {TROLL}" in told
    assert not (installation.directory / "rounds" / "0001" / "samples.jsonl").exists()

    told = run(installation, "train", "--without-rater", TROLL)
    second = installation.rounds.list()[0]
    assert f"round 2 from policy-0000 is done: {second.version}" in told
    assert (second.cursor, second.config["parent"]) == (0, "policy-0000")
    assert "without a rater" in run(installation, "rounds")
    installation.engine.dispose()
    (installation.directory / "trainer.log").unlink()
    holds = [
        path
        for path in installation.directory.rglob("*")
        if path.is_file() and any(text in path.read_bytes() for text in (b"troll-words", TROLL.encode()))
    ]
    assert holds == []
    manifest = json.loads(
        (installation.directory / "versions" / str(second.version) / "manifest.json").read_text()
    )
    assert len(manifest["details"]["without_raters"]) == 1
    assert manifest["details"]["stages"]["dataset"]["replaced"] == {}


def test_train_says_what_it_can_not_do(installation: RoundInstallation) -> None:
    installation.give_feedback(seed=1)
    done = installation.start("train", "--without-rater", "k/nobody")
    assert done.wait(timeout=60) == 2
    assert "k/nobody has no feedback in the store" in installation.log()
    assert "Traceback" not in installation.log()
