"""`instructloop up` as people meet it: an answer, a thumb, three kinds of accident, Ctrl-C.

The tests share one installation and run in their order; each checks the totals that those before it left.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
from running_up import Up, eventually

from feedback.store import Store
from instructloop import database


@dataclass
class Accepted:
    """What the server has acknowledged over all tests of this module."""

    events: set[str] = field(default_factory=set)
    completions: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def accepted() -> Accepted:
    return Accepted()


@pytest.fixture(scope="module")
def store(up: Up) -> Store:
    return Store(database.connect(f"sqlite:///{up.data_dir / 'store.db'}"))


def is_stored(up: Up, event_id: str, key: str) -> bool:
    with up.http(key) as client:
        answer = client.get(f"/v1/feedback/{event_id}")
    assert answer.status_code == 200, answer.text
    return bool(answer.json()["status"] == "stored")


def ask(up: Up, text: str = "Name a fruit.") -> str:
    """One short answer; returns its completion id."""
    with up.http(up.client_key) as client:
        body = {"model": "policy", "max_tokens": 4, "messages": [{"role": "user", "content": text}]}
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["X-Completion-Id"])


def test_the_openai_client_gets_a_streamed_answer(up: Up, accepted: Accepted) -> None:
    client = openai.OpenAI(base_url=f"{up.url}/v1", api_key=up.client_key)
    stream = client.chat.completions.create(
        model="policy",
        messages=[{"role": "user", "content": "Count from one to five."}],
        max_tokens=24,
        stream=True,
        extra_body={"min_tokens": 12},
    )
    pieces = [chunk for chunk in stream if chunk.choices]
    assert len([piece for piece in pieces if piece.choices[0].delta.content]) > 3
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    accepted.completions.add(pieces[0].id)


def test_a_thumb_with_the_token_gets_a_receipt_and_is_stored(up: Up, accepted: Accepted) -> None:
    """As an end user's browser does it: no API key, only the token that came with the answer."""
    with up.http(up.client_key) as client:
        answer = client.post(
            "/v1/chat/completions",
            json={"model": "policy", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello."}]},
        )
    completion_id = answer.headers["X-Completion-Id"]
    with up.http(**{"X-Feedback-Token": answer.headers["X-Feedback-Token"]}) as browser:
        thumb = {"type": "thumb", "completion_id": completion_id, "value": "up"}
        receipt = browser.post("/v1/feedback", json=thumb)
        assert receipt.status_code == 202, receipt.text
        event_id = receipt.json()["event_id"]
        assert receipt.json()["status"] == "queued"
    eventually(lambda: is_stored(up, event_id, up.operator_key), 30, "the thumb is stored")
    accepted.completions.add(completion_id)
    accepted.events.add(event_id)


def test_a_second_up_is_refused(up: Up) -> None:
    command = [sys.executable, "-m", "instructloop.cli", "up"]
    done = subprocess.run(
        command, env=up.environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert up.process is not None
    assert f"process {up.process.pid}" in done.stderr
    assert done.stderr.count("\n") == 1


class Giver(threading.Thread):
    """Gives `count` thumbs in turn, each repeated under its Idempotency-Key until it is accepted."""

    def __init__(self, up: Up, completion_id: str, name: str, count: int) -> None:
        super().__init__(daemon=True)
        self.acknowledged: list[str] = []
        self.refused = 0
        self.mistakes: list[str] = []
        self._up, self._completion_id, self._name, self._count = up, completion_id, name, count

    def run(self) -> None:
        with self._up.http(self._up.client_key) as client:
            for number in range(self._count):
                self._give(client, number)

    def _give(self, client: httpx.Client, number: int) -> None:
        # A rater of its own for each, so that none supersedes another.
        thumb = {
            "type": "thumb",
            "completion_id": self._completion_id,
            "value": "down",
            "rater": f"{self._name}-{number}",
        }
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            try:
                answer = client.post(
                    "/v1/feedback", json=thumb, headers={"Idempotency-Key": f"{self._name}-{number}"}
                )
            except httpx.TransportError:
                self.refused += 1
                time.sleep(0.2)
                continue
            if answer.status_code == 202:
                self.acknowledged.append(answer.json()["event_id"])
                time.sleep(0.005)
                return
            if answer.status_code != 503:
                self.mistakes.append(answer.text)
                return
            self.refused += 1
            time.sleep(0.2)


@pytest.mark.parametrize("victim", ["ingest", "redis", "serve"])
def test_kill_9_loses_and_doubles_nothing(up: Up, accepted: Accepted, store: Store, victim: str) -> None:
    completion_id = ask(up)
    accepted.completions.add(completion_id)
    giver = Giver(up, completion_id, victim, count=300)
    giver.start()
    eventually(lambda: len(giver.acknowledged) > 50, 60, "the first thumbs are accepted")
    before = up.pid_of(victim)
    os.kill(before, signal.SIGKILL)
    giver.join(timeout=300)
    assert not giver.is_alive()
    assert giver.mistakes == []
    assert len(set(giver.acknowledged)) == 300
    if victim != "ingest":
        assert giver.refused > 0, "the accident was not felt: it proves nothing"
    accepted.events.update(giver.acknowledged)

    eventually(up.is_ready, 200, "the server is ready again")
    assert up.pid_of(victim) != before
    assert any(f"{victim} | was killed by SIGKILL" in line for line in up.lines)
    wanted = len(accepted.events)
    eventually(lambda: store.counts()["stored"] >= wanted, 60, f"{wanted} events are stored")
    assert all(is_stored(up, event_id, up.client_key) for event_id in giver.acknowledged[::29])
    events = {stored.event.event_id for stored in store.events_of(completion_id)}
    assert events == set(giver.acknowledged)
    counts = store.counts()
    assert counts["stored"] == wanted
    assert counts["dead_letters"] == 0
    assert counts["completions"] == len(accepted.completions)


def test_versions_on_the_command_line(up: Up) -> None:
    command = [sys.executable, "-m", "instructloop.cli", "versions"]
    done = subprocess.run(command, env=up.environment, capture_output=True, text=True, check=True)
    name, state, *_, replicas = done.stdout.splitlines()[1].split()
    assert (name, state, replicas) == ("policy-0000", "serving", "1")


def test_preferences_go_in_and_out_on_the_command_line(up: Up, store: Store, tmp_path: Path) -> None:
    lines = [
        {"prompt": f"Question {number}?", "chosen": "A good answer.", "rejected": "A bad one."}
        for number in range(7)
    ]
    file = tmp_path / "preferences.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = store.counts()["stored"]

    def command(*arguments: str) -> None:
        called = [sys.executable, "-m", "instructloop.cli", "feedback", *arguments]
        done = subprocess.run(called, env=up.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    for _ in range(2):  # a second import of the same file adds nothing
        command("import", str(file), "--source", "by-hand")
        eventually(lambda: store.counts()["stored"] >= before + 7, 30, "the comparisons are stored")
    time.sleep(2)
    assert store.counts()["stored"] == before + 7
    command("export", str(tmp_path / "out"), "--format", "jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out" / "preferences.jsonl").read_text().splitlines()]
    assert [row["chosen"][0]["content"] for row in rows] == ["A good answer."] * 7
    assert {row["source"] for row in rows} == {"by-hand"}


def test_ctrl_c_leaves_no_process_and_the_next_start_remembers(up: Up) -> None:
    assert any("EngineCore" in command for command in up.processes().values())
    assert up.signal(signal.SIGINT) == 0
    assert up.processes() == {}
    assert "stopped" in up.lines[-1]

    up.start()
    up.wait_for_line("loading the model", 60)
    assert not any("preparing" in line for line in up.lines)
    eventually(lambda: len(up.processes()) >= 5, 30, "all parts are started")


def test_kill_9_of_the_supervisor_leaves_no_process(up: Up) -> None:
    assert up.signal(signal.SIGKILL) == -signal.SIGKILL
    eventually(lambda: up.processes() == {}, 60, "every part has noticed")
