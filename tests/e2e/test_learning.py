"""The whole loop under a real `up`: feedback, a round whose trainer is killed, the swap, the receipt."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from running_up import Up, eventually

QUICK = {
    "TRAINING__MINIMUM_JUDGED": "2",
    "TRAINING__SFT_MINIMUM": "4",
    "TRAINING__SFT_EPOCHS": "1",
    # Both versions are sampled with the same seeds: one that is hardly changed gives mostly the same answers.
    "TRAINING__SFT_LEARNING_RATE": "0.001",
    "TRAINING__REWARD_EPOCHS": "1",
    "TRAINING__PPO_UPDATES": "3",
    "TRAINING__PPO_BATCH": "4",
    "TRAINING__PPO_MINI_BATCHES": "1",
    "TRAINING__PPO_EPOCHS": "1",
    "TRAINING__PPO_RESPONSE_TOKENS": "16",
    "TRAINING__PPO_CHECKPOINT_UPDATES": "1",
    "TRAINING__KV_CACHE_GIB": "0.25",
    "EVALUATION__PROMPTS": "8",
    "EVALUATION__SAMPLES_PER_PROMPT": "2",
    "EVALUATION__MAX_TOKENS": "16",
    # What is tested here is that a verdict moves the served version, not that so small a round is any good.
    "EVALUATION__WIN_RATE_BOUND": "0",
    "EVALUATION__DECIDED_PROMPTS": "2",
    "EVALUATION__KL_BUDGET": "10000",
}
ROUND_SECONDS = 600.0


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    return QUICK


def test_votes_become_a_served_version_although_the_trainer_is_killed(up: Up) -> None:
    events = _give_feedback(up)
    first = events[0]
    eventually(lambda: all(_receipt(up, id)["status"] == "stored" for id in events), 60, "feedback is stored")
    assert _receipt(up, first)["versions"] == []

    with up.http(up.operator_key) as http:
        started = http.post("/v1/rounds")
        assert started.status_code in (200, 202), started.text

        def round_() -> dict[str, Any]:
            found: dict[str, Any] = http.get("/v1/rounds/1").json()
            return found

        eventually(lambda: _reached(round_(), "ppo"), ROUND_SECONDS, "the round reaches PPO")
        killed = up.pid_of("train")
        subprocess.run(["kill", "-9", str(killed)], check=True)
        eventually(lambda: round_()["state"] in ("done", "failed"), ROUND_SECONDS, "the round ends")
        ended = round_()
        assert ended["state"] == "done", ended
        assert ended["verdict"]["promote"], ended["verdict"]
        assert ended["version"] == "policy-0001"
        steps = {m["step"] for m in ended["metrics"] if m["stage"] == "ppo"}
        assert steps == {1, 2, 3}

        eventually(lambda: _served(http) == {"policy-0001"}, 90, "the candidate serves")
        versions = {version["name"]: version for version in http.get("/v1/versions").json()["versions"]}
        assert set(versions) == {"policy-0000", "policy-0001"}
        assert versions["policy-0001"]["parent"] == "policy-0000"

    # What is said of held-out prompts, or beyond a rater's share, teaches nothing, and no receipt says so.
    receipts = [_receipt(up, id) for id in events]
    taught = [receipt for receipt in receipts if receipt["rounds"]]
    assert taught
    assert all((one["rounds"], one["versions"]) == ([1], ["policy-0001"]) for one in taught)
    assert all(one["versions"] == [] for one in receipts if not one["rounds"])

    completion, _ = _ask(up, "What is a lake?", n=1)
    eventually(lambda: _versions_of(up, completion) == {"policy-0001"}, 30, "answers carry the new version")


def test_operators_roll_back_and_forward_on_the_command_line(up: Up) -> None:
    assert "policy-0001" in _command(up, "versions")
    _command(up, "rollback", "--reason", "an end-to-end test")
    with up.http(up.operator_key) as http:
        eventually(lambda: _served(http) == {"policy-0000"}, 90, "the version before serves again")
        answer = http.post("/v1/versions/policy-0001/promote?wait=true", json={"reason": "and forward"})
        assert answer.status_code == 200, answer.text
        assert _served(http) == {"policy-0001"}


def _ask(up: Up, text: str, n: int) -> tuple[str, list[str]]:
    body = {
        "model": "policy",
        "messages": [{"role": "user", "content": text}],
        "n": n,
        "max_tokens": 16,
        "temperature": 1.0,
    }
    with up.http(up.client_key) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Completion-Id"], [c["message"]["content"] for c in answer.json()["choices"]]


def _give_feedback(up: Up) -> list[str]:
    """Rank two answers to each of 24 questions, with a demonstration; returns the event ids."""
    things = "frogs rain bread moon trees cars books music snow fire boats cheese"
    questions = [f"{verb} {thing}." for verb in ("Describe", "Praise") for thing in things.split()]

    def rate(question: str) -> list[str]:
        completion, texts = _ask(up, question, n=2)
        order = sorted(range(2), key=lambda choice: len(texts[choice]))
        groups = [[{"completion_id": completion, "choice": choice}] for choice in order]
        said = [
            {"type": "ranking", "groups": groups},
            {"type": "thumb", "completion_id": completion, "choice": order[0], "value": "up"},
            {"type": "demonstration", "completion_id": completion, "text": "It is nice."},
        ]
        with up.http(up.client_key) as http:
            answers = [http.post("/v1/feedback", json=event) for event in said]
        assert [answer.status_code for answer in answers] == [202] * 3, [a.text for a in answers]
        return [answer.json()["event_id"] for answer in answers]

    with ThreadPoolExecutor(8) as pool:
        return [id for ids in pool.map(rate, questions) for id in ids]


def _receipt(up: Up, event_id: str) -> dict[str, Any]:
    with up.http(up.client_key) as http:
        found: dict[str, Any] = http.get(f"/v1/feedback/{event_id}").json()
    return found


def _reached(round_: dict[str, Any], stage: str) -> bool:
    assert round_["state"] in ("requested", "running"), round_
    return round_["stage"] == stage


def _served(http: Any) -> set[str | None]:
    replicas = http.get("/v1/replicas").json()["replicas"]
    return {replica["actual"] for replica in replicas if replica["state"] == "serving"}


def _versions_of(up: Up, completion: str) -> set[str]:
    with up.http(up.operator_key) as http:
        answer = http.get(f"/v1/completions/{completion}")
    if answer.status_code != 200:
        return set()
    return set(answer.json()["versions"])


def _command(up: Up, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "instructloop.cli", *arguments],
        env=up.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
