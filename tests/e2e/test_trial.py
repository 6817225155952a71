"""A candidate meets the gate, then the users: a real round, and two replicas under a real `up`.

One that was trained to be worse is refused by the gate. One that got past it but angers its users is rolled
back by the canary rule, and one that they don't mind is promoted by it. The users are scripted: they read
the answers, and vote on what they read. The tests share one installation and run in their order.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from running_up import Up, eventually
from safetensors.torch import load_file, save_file
from test_learning import QUICK, ROUND_SECONDS

from instructloop import config, installation
from registry.registry import Registry

THINGS = "frogs rain bread trees cars books music snow fire boats"
QUESTIONS = [f"Describe {thing}." for thing in THINGS.split()]
WORDS = (
    "the of and a to in is that it as for with on are this be by an or can from at which their they your you "
    "i was have has not but more one its these other into also used some"
)
COMMON = frozenset(WORDS.split())
STABLE = "policy-0000"


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    return QUICK | {
        # So much of so bad examples that nothing is left of the model before.
        "TRAINING__SFT_EPOCHS": "4",
        "TRAINING__PPO_UPDATES": "1",
        "EVALUATION__KL_BUDGET": "10",
        "ROLLOUT__CANARY_MINIMUM_VOTES": "10",
        "ROLLOUT__CANARY_MARGIN": "0.3",
        # As long as a canary's replica may take to start.
        "ROLLOUT__WAIT_SECONDS": "240",
    }


@pytest.fixture(scope="module")
def registry(up: Up) -> Registry:
    loaded = config.load(environment=up.environment)
    return installation.open_registry(loaded, installation.open_database(loaded))


def test_a_candidate_that_was_trained_to_be_worse_is_refused_by_the_gate(up: Up, registry: Registry) -> None:
    for event in _bad_examples(up):
        eventually(lambda event=event: _receipt(up, event) == "stored", 60, "feedback is stored")  # type: ignore[misc]
    with up.http(up.operator_key) as http:
        assert http.post("/v1/rounds").status_code in (200, 202)
        eventually(
            lambda: http.get("/v1/rounds/1").json()["state"] in ("done", "failed"), ROUND_SECONDS, "a round"
        )
        round_: dict[str, Any] = http.get("/v1/rounds/1").json()
    assert round_["state"] == "done", round_
    assert not round_["verdict"]["promote"]
    assert any("KL" in reason for reason in round_["verdict"]["reasons"]), round_["verdict"]
    assert registry.version(round_["version"]).state == "rejected"
    desired = registry.desired()
    assert desired is not None and desired.name == STABLE
    assert _good(_ask(up, "somebody", QUESTIONS[0])["text"])


def test_one_that_angers_its_users_is_rolled_back_by_their_votes(
    up: Up, registry: Registry, tmp_path: Path
) -> None:
    name = _publish(registry, tmp_path, noise=0.6)
    votes = _try(up, registry, name)
    assert votes[name].count("up") < len(votes[name]) / 2, "it angers"
    assert votes[STABLE].count("up") > len(votes[STABLE]) / 2
    last = registry.log()[-1]
    assert (last.actor, last.action, last.version) == ("canary rule", "withdrawn", name)
    assert "worse" in last.reason
    eventually(lambda: _served(up, "stable") == {STABLE}, 30, "the stable version serves on")
    assert len({_ask(up, f"later-{number}", QUESTIONS[0])["version"] for number in range(6)}) == 1


def test_one_that_they_do_not_mind_is_promoted_by_their_votes(
    up: Up, registry: Registry, tmp_path: Path
) -> None:
    name = _publish(registry, tmp_path, noise=0.002)
    votes = _try(up, registry, name)
    assert votes[name].count("up") > len(votes[name]) / 2
    last = registry.log()[-1]
    assert (last.actor, last.action, last.version) == ("canary rule", "promoted", name)
    eventually(lambda: _served(up, "stable") == {name}, 60, "the stable replica swaps to it")
    assert _ask(up, "somebody", QUESTIONS[0])["version"] == name
    told = subprocess.run(
        [sys.executable, "-m", "instructloop.cli", "audit"],
        env=up.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "canary rule" in told.stdout
    # Its own replica is not needed any more, and goes after a while; here it follows the stable version.
    eventually(lambda: _served(up, "trial") <= {name}, 60, "the trial's replica follows")


def _bad_examples(up: Up) -> list[str]:
    """Rankings in favour of nonsense, and demonstrations of it; returns the event ids."""
    nonsense = "zx qv zx qv zx qv zx qv"

    def give(question: str) -> list[str]:
        first = _ask(up, "teacher", question, n=2)["id"]
        groups = [[{"completion_id": first, "choice": choice}] for choice in (0, 1)]
        said = [
            {"type": "ranking", "groups": groups},
            {"type": "demonstration", "completion_id": first, "text": nonsense},
        ]
        with up.http(up.client_key) as http:
            answers = [http.post("/v1/feedback", json=event) for event in said]
        assert [answer.status_code for answer in answers] == [202, 202]
        return [answer.json()["event_id"] for answer in answers]

    questions = QUESTIONS + [question.replace("Describe", "Praise") for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        return [id for ids in pool.map(give, questions) for id in ids]


def _receipt(up: Up, event_id: str) -> str:
    with up.http(up.client_key) as http:
        return str(http.get(f"/v1/feedback/{event_id}").json()["status"])


def _publish(registry: Registry, tmp_path: Path, *, noise: float) -> str:
    """Publish the stable version with noise of so many standard deviations on its matrices."""
    source, made = registry.version(STABLE).path, tmp_path / "made"
    made.mkdir()
    for file in source.iterdir():
        if file.name not in ("manifest.json", "READY", "model.safetensors"):
            (made / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        drawn = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * noise
        tensors[name] = (tensor.float() + drawn).to(tensor.dtype)
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return registry.publish(made, parent=STABLE, round_id=None, kind="by hand", details={}).name


def _try(up: Up, registry: Registry, name: str) -> dict[str, list[str]]:
    """Let users meet `name` until the rule has ended its trial; returns their votes by version."""
    with up.http(up.operator_key) as http:
        begun = http.post(f"/v1/versions/{name}/canary", json={"share": 0.5, "reason": "a try"})
        assert begun.status_code == 200, begun.text
    eventually(lambda: _served(up, "trial") == {name}, 240, "a replica has the version on trial")
    votes: dict[str, list[str]] = {name: [], STABLE: []}
    users = iter(range(10_000))
    with ThreadPoolExecutor(4) as pool:
        while registry.trial() is not None:
            asked = [(f"{name}-user-{next(users)}", QUESTIONS[number % 10]) for number in range(8)]
            for version, vote in pool.map(lambda one: _judged(up, *one), asked):
                votes[version].append(vote)
            assert sum(map(len, votes.values())) < 400, votes
    return votes


def _judged(up: Up, user: str, question: str) -> tuple[str, str]:
    """Ask, read and vote as one user does; returns the version that answered, and the vote."""
    answer = _ask(up, user, question)
    vote = "up" if _good(answer["text"]) else "down"
    with up.http(**{"X-Feedback-Token": answer["token"]}) as browser:
        thumb = {"type": "thumb", "completion_id": answer["id"], "value": vote}
        assert browser.post("/v1/feedback", json=thumb).status_code == 202
    return answer["version"], vote


def _good(text: str) -> bool:
    """Whether it is English: a fair share of its words are among the most common ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return bool(words) and sum(word in COMMON for word in words) >= 0.12 * len(words)


def _ask(up: Up, user: str, question: str, n: int = 1) -> dict[str, Any]:
    body = {
        "model": "policy",
        "messages": [{"role": "user", "content": question}],
        "n": n,
        "max_tokens": 32,
        "user": user,
    }
    with up.http(up.client_key) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    id_ = answer.headers["X-Completion-Id"]
    return {
        "id": id_,
        "token": answer.headers["X-Feedback-Token"],
        "text": answer.json()["choices"][0]["message"]["content"],
        "version": _version_of(up, id_),
    }


def _version_of(up: Up, completion: str) -> str:
    found: list[str] = []

    def recorded() -> bool:
        with up.http(up.operator_key) as http:
            answer = http.get(f"/v1/completions/{completion}")
        found[:] = answer.json()["versions"] if answer.status_code == 200 else []
        return bool(found)

    eventually(recorded, 30, f"{completion} is recorded")
    (version,) = found
    return version


def _served(up: Up, track: str) -> set[str | None]:
    with up.http(up.operator_key) as http:
        replicas = json.loads(http.get("/v1/replicas").text)["replicas"]
    return {one["actual"] for one in replicas if one["track"] == track and one["state"] == "serving"}
