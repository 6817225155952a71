"""Three real replicas: two of the stable version, one on trial; what users get while versions come and go.

The tests run in order: each goes on from what the one before left in service. The second stable replica is
started late, as one that is added to a running fleet is.
"""

import contextlib
import json
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
import sqlalchemy as sa
from safetensors.torch import load_file, save_file
from server_fixture import Installation, free_port, test_model, wait_for_record
from test_server_hot_swap import perturbed

from feedback import tables
from feedback.records import Completion
from registry.registry import Replica, Trial
from server.routing import chosen

SHARE = 0.3
USERS = 200


@dataclass
class Fleet:
    """One installation with its replicas' ports; users come in through the first."""

    installation: Installation
    trial_port: int = field(default_factory=free_port)
    second_port: int = field(default_factory=free_port)
    versions: list[str] = field(default_factory=list)

    @property
    def registry(self):  # type: ignore[no-untyped-def]
        return self.installation.registry

    @property
    def key_id(self) -> str:
        return self.installation.client_key.split("_")[2]

    def replica(self, port: int) -> Replica:
        (found,) = [one for one in self.registry.replicas() if one.url == f"http://127.0.0.1:{port}"]
        return found

    @property
    def on_trial(self) -> Replica:
        return self.replica(self.trial_port)

    def canary(self, name: str, share: float = SHARE) -> Trial:
        self.registry.canary(name, share, actor="test", reason="")
        return self._tried()

    def shadow(self, name: str, share: float) -> Trial:
        self.registry.shadow(name, share, actor="test", reason="")
        return self._tried()

    def _tried(self) -> Trial:
        trial = self.registry.trial()
        assert trial is not None
        until(lambda: self.on_trial.actual == trial.version, "the version on trial is loaded")
        time.sleep(1)  # more than a watch interval: the first replica knows of it
        return trial

    def ask(self, user: str, max_tokens: int = 2, port: int | None = None) -> httpx.Response:
        body = {
            "model": "policy",
            "messages": [{"role": "user", "content": "Hi."}],
            "max_tokens": max_tokens,
            "user": user,
        }
        url = f"http://127.0.0.1:{port or self.installation.port}/v1/chat/completions"
        headers = {"Authorization": f"Bearer {self.installation.client_key}"}
        return httpx.post(url, json=body, headers=headers, timeout=120)

    def ask_all(self, users: list[str]) -> dict[str, Completion]:
        """Ask once for each; returns the records of what they got."""
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(self.ask, users))
        assert Counter(answer.status_code for answer in answers) == {200: len(users)}
        ids = [answer.headers["x-completion-id"] for answer in answers]
        records = [wait_for_record(self.installation, id_)[0] for id_ in ids]
        return dict(zip(users, records, strict=True))

    def chosen_user(self, trial: Trial) -> str:
        return next(user for user in map(str, range(10_000)) if chosen(trial, self.key_id, user))


def version_of(record: Completion) -> str:
    (span,) = record.choices[0].weight_spans
    return span.version


def until(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    # A short path: Redis listens on a Unix socket below it.
    # Otherwise vLLM would bind the engine of each replica to the same core.
    unbound = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    found = Fleet(Installation(Path(tempfile.mkdtemp(prefix="il-fleet-")), free_port(), unbound))
    one = found.installation
    try:
        one.prepare(test_model())
        one.start_redis()
        one.start_part("ingest")
        one.start_part("serve")
        one.wait_until_ready()
        one.start_replica("trial", found.trial_port, "--track", "trial")
        one.wait_until_ready("trial", found.trial_port)
        base = one.registry.version("policy-0000").path
        for seed in (1, 2):
            made = perturbed(base, tmp_path_factory.mktemp(f"version-{seed}"), scale=0.02, seed=seed)
            found.versions.append(one.publish(made))
        yield found
    finally:
        one.stop_all()
        shutil.rmtree(one.data_dir, ignore_errors=True)


@contextlib.contextmanager
def load(fleet: Fleet, *ports: int) -> Iterator[list[int]]:
    """Users who keep asking; yields the list of the statuses that they have got so far."""
    statuses: list[int] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        while not stop.is_set():
            port = ports[number % len(ports)] if ports else None
            statuses.append(fleet.ask(f"steady-{number}", 4, port).status_code)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_share_of_the_users_meets_the_canary_each_time(fleet: Fleet) -> None:
    trial = fleet.canary(fleet.versions[0])
    users = [f"user-{number}" for number in range(USERS)]
    records = fleet.ask_all(users)
    by = {user: version_of(record) for user, record in records.items()}
    expected = {user: trial.version if chosen(trial, fleet.key_id, user) else "policy-0000" for user in users}
    assert by == expected
    share = Counter(by.values())[trial.version] / USERS
    assert 0.2 < share < 0.4
    again = fleet.ask_all(users[:20])
    assert {user: version_of(record) for user, record in again.items()} == {u: by[u] for u in users[:20]}
    assert {record.source for record in records.values()} == {"serving"}


def test_a_stream_and_its_feedback_go_through_the_first_replica(fleet: Fleet) -> None:
    trial = fleet.registry.trial()
    user = fleet.chosen_user(trial)
    one = fleet.installation
    with openai.OpenAI(base_url=f"{one.url}/v1", api_key=one.client_key, max_retries=0) as client:
        ask = {"model": "policy", "prompt": "Once", "user": user, "extra_body": {"ignore_eos": True}}
        raw = client.completions.with_raw_response.create(**ask, max_tokens=40, stream=True)
        arrived = [(time.monotonic(), chunk) for chunk in raw.parse()]
        assert len(arrived) > 10
        assert arrived[-1][0] - arrived[0][0] > 0.05, "piece by piece, not all at the end"
        (record,) = wait_for_record(one, raw.headers["x-completion-id"])
        assert (version_of(record), record.user) == (trial.version, user)
        assert record.choices[0].text == "".join(chunk.choices[0].text for _, chunk in arrived)

        thumb = {"type": "thumb", "completion_id": record.id, "value": "down"}
        token = {"X-Feedback-Token": raw.headers["x-feedback-token"]}
        assert httpx.post(f"{one.url}/v1/feedback", json=thumb, headers=token).status_code == 202

        left = client.completions.create(**ask, max_tokens=900, stream=True)
        first = next(iter(left))
        left.close()
    (record,) = wait_for_record(one, first.id)
    assert version_of(record) == trial.version
    assert (record.choices[0].finish_reason, len(record.choices[0].token_ids) < 800) == ("abort", True)


def nan(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.7.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def truncated(directory: Path) -> None:
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(100_000_000)


def other_heads(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_attention_heads": 18}))


def unknown_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.29.self_attn.another.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_what_can_not_be_served_is_refused_with_its_reason_and_no_request_fails(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.registry.withdraw(actor="test", reason="")
    base = fleet.registry.version("policy-0000").path
    until(lambda: fleet.on_trial.actual == "policy-0000", "the trial's replica follows the stable version")
    broken: list[tuple[Callable[[Path], None], str]] = [
        (nan, "model.layers.7.mlp.up_proj.weight holds a NaN"),
        (truncated, "model.safetensors can't be read"),
        (other_heads, "num_attention_heads is 18, not 9"),
        (unknown_tensor, "another"),
    ]
    with load(fleet) as statuses:
        for spoil, because in broken:
            made = perturbed(base, tmp_path / spoil.__name__, scale=0.02, seed=3)
            spoil(made)
            refused(fleet, fleet.installation.publish(made), because)
        torn = fleet.installation.publish(perturbed(base, tmp_path / "torn", scale=0.02, seed=4))
        with (fleet.registry.version(torn).path / "model.safetensors").open("r+b") as weights:
            # Whole when it was tried, torn when it is read.
            fleet.installation.processes["trial"].send_signal(signal.SIGSTOP)
            fleet.registry.canary(torn, SHARE, actor="test", reason="")
            weights.seek(-1000, 2)
            weights.write(b"\xff" * 500)
        fleet.installation.processes["trial"].send_signal(signal.SIGCONT)
        refused(fleet, torn, "model.safetensors", begin=False)
        before = len(statuses)
        until(lambda: len(statuses) > before + 5, "requests go on")
    assert Counter(statuses) == {200: len(statuses)}
    records = fleet.ask_all([f"user-{number}" for number in range(5)])
    assert {version_of(record) for record in records.values()} == {"policy-0000"}


def refused(fleet: Fleet, name: str, because: str, *, begin: bool = True) -> None:
    """Put `name` on trial; its replica keeps the stable version and says why, and the trial ends for that."""
    if begin:
        fleet.registry.canary(name, SHARE, actor="test", reason="")
    until(lambda: fleet.registry.trial() is None, f"{name} is withdrawn")
    last = fleet.registry.log()[-1]
    assert (last.action, last.version) == ("withdrawn", name)
    assert because in last.reason
    assert fleet.on_trial.actual == "policy-0000"
    until(lambda: fleet.on_trial.state == "serving", "its replica is there for the next trial")


def test_a_shadow_is_recorded_and_users_see_the_stable_version_only(fleet: Fleet) -> None:
    trial = fleet.shadow(fleet.versions[0], 1.0)
    users = [f"shadowed-{number}" for number in range(12)]
    records = fleet.ask_all(users)
    assert {version_of(record) for record in records.values()} == {"policy-0000"}

    def copies() -> list[sa.Row]:  # type: ignore[type-arg]
        columns = tables.completions.c
        query = sa.select(columns.id, columns.user).where(columns.source == "shadow")
        with fleet.installation.database.connect() as connection:
            return list(connection.execute(query))

    until(lambda: len(copies()) == len(users), "each request has its copy")
    assert {row.user for row in copies()} == set(users)
    with fleet.installation.http(fleet.installation.client_key) as http:
        for row in copies():
            (copy,) = fleet.installation.store.completion(row.id)
            assert version_of(copy) == trial.version
            assert copy.messages == records[row.user].messages
            thumb = {"type": "thumb", "completion_id": row.id, "value": "up"}
            assert http.post("/v1/feedback", json=thumb).status_code == 404
    # Who asks the shadow's own replica is answered by the other.
    answer = fleet.ask("direct", port=fleet.trial_port)
    (record,) = wait_for_record(fleet.installation, answer.headers["x-completion-id"])
    assert version_of(record) == "policy-0000"
    fleet.registry.withdraw(actor="test", reason="")


def test_a_replica_that_is_started_later_has_the_right_version(fleet: Fleet) -> None:
    fleet.registry.promote(fleet.versions[0], actor="test", reason="")
    first = fleet.installation.port
    until(lambda: fleet.replica(first).actual == fleet.versions[0], "the first replica swaps")
    fleet.installation.start_replica("second", fleet.second_port)
    fleet.installation.wait_until_ready("second", fleet.second_port)
    answer = fleet.ask("anybody", port=fleet.second_port)
    (record,) = wait_for_record(fleet.installation, answer.headers["x-completion-id"])
    assert version_of(record) == fleet.versions[0]
    assert fleet.replica(fleet.second_port).actual == fleet.versions[0]


def test_two_stable_replicas_never_swap_at_once(fleet: Fleet) -> None:
    ports = (fleet.installation.port, fleet.second_port)
    seen: list[tuple[str, ...]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            # In one look: between two a replica may have given its turn to the other.
            found = {one.url: one.state for one in fleet.registry.replicas()}
            states = tuple(found[f"http://127.0.0.1:{port}"] for port in ports)
            if not seen or seen[-1] != states:
                seen.append(states)
            time.sleep(0.002)

    with load(fleet, *ports) as statuses:
        watching = threading.Thread(target=watch)
        watching.start()
        try:
            fleet.registry.promote(fleet.versions[1], actor="test", reason="")
            until(lambda: {fleet.replica(port).actual for port in ports} == {fleet.versions[1]}, "both swap")
        finally:
            done.set()
            watching.join()
    assert Counter(statuses) == {200: len(statuses)}
    assert ("swapping", "swapping") not in seen, seen
    assert {("swapping", "serving"), ("serving", "swapping")} <= set(seen), seen


def test_a_killed_canary_is_stood_in_for(fleet: Fleet) -> None:
    trial = fleet.canary("policy-0000", 1.0)
    one = fleet.installation
    records = fleet.ask_all(["before"])
    assert version_of(records["before"]) == "policy-0000"
    with openai.OpenAI(base_url=f"{one.url}/v1", api_key=one.client_key, max_retries=0) as client:
        stream = client.completions.create(
            model="policy", prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        pieces = iter(stream)
        next(pieces)
        one.stop("trial", signal.SIGKILL)
        with pytest.raises((openai.APIError, httpx.TransportError)):
            for _ in pieces:
                pass
    assert fleet.registry.trial() == trial
    records = fleet.ask_all([f"after-{number}" for number in range(20)])
    assert {version_of(record) for record in records.values()} == {fleet.versions[1]}
