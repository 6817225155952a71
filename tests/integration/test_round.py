"""Rounds by the command that users run, on the real engine: failures, stops, one at a time.

What survives kill -9 is in `test_round_kills.py`.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from integration.round_process import ENGINE_SECONDS, RoundInstallation


@pytest.fixture
def installation(tmp_path: Path) -> RoundInstallation:
    return RoundInstallation(tmp_path)


def test_a_round_says_why_it_failed_and_its_events_stay_for_the_next(
    installation: RoundInstallation,
) -> None:
    installation.give_feedback(seed=2)
    failed = installation.start(TRAINING__MINIMUM_JUDGED="1000")
    assert failed.wait(timeout=60) == 1
    (round_,) = installation.rounds.list()
    assert round_.state == "failed"
    assert round_.error is not None
    assert round_.error.startswith("dataset: only ")
    assert [version.name for version in installation.registry.versions()] == ["policy-0000"]
    assert installation.rounds.last_done() is None


def test_an_engine_that_finds_no_memory_says_what_to_lower(installation: RoundInstallation) -> None:
    installation.give_feedback(seed=4)
    failed = installation.start(TRAINING__KV_CACHE_GIB="0.00001", TRAINING__REWARD_EPOCHS="1")
    assert failed.wait(timeout=ENGINE_SECONDS) == 1
    (round_,) = installation.rounds.list()
    first, advice = str(round_.error).splitlines()
    assert first.startswith("ppo: the rollout engine did not start: ")
    assert "training.kv_cache_gib" in advice
    assert {path.name for path in (installation.directory / "rounds" / "0001").glob("*/")} == {
        "reward_model",
        "judge",
    }


def test_only_one_trainer_works_at_a_time_and_one_that_is_stopped_is_gone_on_with(
    installation: RoundInstallation,
) -> None:
    installation.give_feedback(seed=3)
    first = installation.start()
    while installation.rounds.unfinished() is None:
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(
        [sys.executable, "-m", "instructloop.cli", "train", "--once"],
        env=os.environ | {"INSTRUCTLOOP_DATA_DIR": str(installation.directory)},
        cwd=installation.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode != 0
    assert "another trainer" in second.stderr
    assert "Traceback" not in second.stderr
    first.terminate()
    assert first.wait(timeout=60) == 128 + 15
    assert "round 1 was stopped: the next trainer goes on with it" in installation.log()
    stopped = installation.rounds.unfinished()
    assert stopped is not None
    assert stopped.id == 1
