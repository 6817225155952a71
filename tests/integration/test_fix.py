"""`instructloop fix` from a misbehaviour to an answer of the server: a real Redis, ingest and trainer.

The server is a thread that says of itself what a replica says, and answers as the version would.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import redis
from integration.conftest import RedisServer
from integration.round_process import SETTINGS, RoundInstallation

from feedback import ingest
from feedback.cases import Cases
from feedback.keys import Keys
from feedback.queue import StreamReader
from feedback.settings import QueueSettings
from registry.registry import Registry, Replica

PATIENCE_SECONDS = 240
GATE = ["decided prompts", "win rate", "KL", "gold against proxy"]
ENVIRONMENT = {f"INSTRUCTLOOP_{name}": value for name, value in SETTINGS.items()} | {
    "INSTRUCTLOOP_TRAINING__ROLLOUT_ENGINE": "transformers",
    "INSTRUCTLOOP_TRAINING__SFT_LEARNING_RATE": "5e-3",
    "INSTRUCTLOOP_TRAINING__SFT_CASE_REPEATS": "40",
    "INSTRUCTLOOP_TRAINING__SFT_CHECKPOINTS": "1",
    "INSTRUCTLOOP_TRAINING__REWARD_EPOCHS": "2",
    "INSTRUCTLOOP_TRAINING__PPO_UPDATES": "1",
    "INSTRUCTLOOP_TRAINING__PPO_LEARNING_RATE": "1e-5",
    "INSTRUCTLOOP_EVALUATION__REPORT_ONLY": json.dumps(GATE),
    "INSTRUCTLOOP_EVALUATION__CASE_TOKENS": "8",
    "OMP_NUM_THREADS": "1",
}
CASE = ("--prompt", "w50 w51", "--check", '{"kind":"required_words","words":["w20"]}')
ANSWER = ("--answer", "w20 w21 w22 w23")


class Place(RoundInstallation):
    """An installation on which `fix` runs in a process of its own."""

    redis_url = ""

    def fix(self, *arguments: str) -> "subprocess.Popen[str]":
        environment = os.environ | ENVIRONMENT
        environment |= {
            "INSTRUCTLOOP_DATA_DIR": str(self.directory),
            "INSTRUCTLOOP_QUEUE__URL": self.redis_url,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "instructloop.cli", "fix", *arguments],
            env=environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def fixed(self, *arguments: str) -> tuple[int, str]:
        process = self.fix(*arguments)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, output


@pytest.fixture
def place(tmp_path: Path, redis_server: RedisServer) -> Iterator[Place]:
    found = Place(tmp_path / "place")
    found.redis_url = redis_server.url
    stop = threading.Event()
    reader = StreamReader(redis.Redis.from_url(redis_server.url), QueueSettings(), "test")
    moving = threading.Thread(target=ingest.run, args=(reader, found.store, stop))
    moving.start()
    yield found
    stop.set()
    moving.join()


class Serving:
    """A replica that serves what it should at once, and says `text`; only to who has a client's key."""

    def __init__(self, registry: Registry, keys: Keys, text: str) -> None:
        self.asked: list[dict[str, object]] = []
        serving = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = keys.verify(self.headers["Authorization"].removeprefix("Bearer "))
                serving.asked.append(body)
                self.send_response(200 if key is not None and key.role == "client" else 401)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._registry = registry
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._server.serve_forever),
            threading.Thread(target=self._report),
        ]
        for thread in self._threads:
            thread.start()

    def _report(self) -> None:
        url = f"http://127.0.0.1:{self._server.server_port}"
        while not self._stop.wait(0.1):
            desired = self._registry.desired()
            assert desired is not None
            self._registry.report(Replica("r", desired.name, desired.name, "serving", url=url))

    def close(self) -> None:
        self._stop.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join()
        self._server.server_close()


def test_the_way_from_a_misbehaviour_to_a_served_version_is_timed_and_can_be_gone_on_with(
    place: Place,
) -> None:
    # Too little feedback: the round says what is missing, and the case stays.
    code, output = place.fixed(*CASE, *ANSWER)
    assert code == 1, output
    assert "no trainer is at work here" in output
    (case,) = Cases(place.engine).list()
    assert f"noted: {case.id} (w50 w51)" in output
    assert "queued: demonstration" in output
    assert "not fixed: round 1 failed: dataset: only 0 usable rankings" in output
    assert f"`instructloop fix {case.id}` asks for it" in output

    place.give_feedback(seed=4)
    interrupted = place.fix(case.id)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(one.id == 2 and one.state == "running" for one in place.rounds.list()):
        assert interrupted.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    interrupted.send_signal(signal.SIGINT)
    told, _ = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130, told
    assert "round 1 failed: dataset: only" in told
    unfinished = place.rounds.unfinished()
    assert unfinished is not None
    assert unfinished.id == 2

    server = Serving(place.registry, Keys(place.engine), "w20 w21 w22 w23")
    try:
        code, output = place.fixed(*CASE, *ANSWER)
        assert code == 0, output
        for step in ("noted", "stored", "round began", "  sft", "  gate", "serving", "first good answer"):
            assert f" s  {step}: " in output, step
        assert "round 2, took" in output
        assert "fixed in " in output
        assert place.registry.version("policy-0001").state == "serving"
        assert [result.change for result in Cases(place.engine).results(case_id=case.id)] == ["fixed"]
        # It was asked for greedily, with a key that ended with it.
        assert server.asked[-1]["temperature"] == 0.0
        assert all(key.revoked_at is not None for key in Keys(place.engine).list())
        # The same once more changes nothing.
        assert place.fixed(case.id)[0] == 0
        assert Cases(place.engine).get(case.id).trainings == 1
        assert len(place.rounds.list()) == 2
    finally:
        server.close()

    # What the server says is what counts.
    server = Serving(place.registry, Keys(place.engine), "w7 w7")
    try:
        code, output = place.fixed(case.id)
        assert code == 1
        assert "what it serves does not: w7 w7" in output
    finally:
        server.close()
