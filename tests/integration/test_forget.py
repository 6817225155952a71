"""`instructloop forget` on a whole data directory: no file has the text any more, whenever it is killed.

Real processes, an embedded Redis with its log, SQLite; text is looked for byte by byte.
"""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import redis.asyncio
import sqlalchemy as sa
from feedback_samples import completion, entries, event, thumb
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.events import Event
from feedback.forgetting import Forgettings
from feedback.queue import Entry, FeedbackQueue, StreamReader
from feedback.records import Completion
from feedback.settings import QueueSettings
from feedback.spool import Spool
from feedback.store import Store
from instructloop import config as configuration
from instructloop import installation, redis_process
from registry.arena import Arena, OfferedPair
from registry.rounds import Rounds
from training.samples import SampleLog

HERE = Path(__file__).resolve().parent
SECRET = "xyzzy-plugh"
ANN, RITA = "k1/user:ann", "k1/rita"
SETTINGS = QueueSettings(batch=40, claim_after_seconds=1.0)
OTHERS = 200


class Place:
    """A data directory with its Redis, and commands on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {
            "INSTRUCTLOOP_DATA_DIR": str(directory),
            "INSTRUCTLOOP_QUEUE__BATCH": "40",
            "INSTRUCTLOOP_QUEUE__CLAIM_AFTER_SECONDS": "1",
            "PYTHONPATH": str(HERE.parents[1]),
        }
        self.config = configuration.load(environment=self.environment)
        self.engine: Engine = installation.open_database(self.config)
        self.store = Store(self.engine)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.others: list[str] = []
        self.start_redis()

    def start_redis(self) -> None:
        # Without compression, so that a text in a snapshot can be found.
        command = [*redis_process.prepare(self.directory), "--rdbcompression", "no"]
        self.redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: redis_process.failure(self.directory) is None)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.config.queue_url)

    def run(self, *command: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "instructloop.cli", *command],
            env=self.environment,
            cwd=self.directory.parent,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def killed(self, function: str, call: int, *command: str) -> None:
        script = str(HERE / "forget_process.py")
        done = subprocess.run(
            [sys.executable, script, function, str(call), *command],
            env=self.environment,
            cwd=self.directory.parent,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()

    def start_ingest(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "instructloop.cli", "ingest"]
        with (self.directory / "ingest.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, cwd=self.directory.parent, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in [*self.processes, self.redis]:
            process.terminate()
        for process in [*self.processes, self.redis]:
            process.wait(timeout=20)

    def files_with(self, *texts: str) -> set[str]:
        """Names of all files that hold one of the texts."""
        found = set()
        for path in self.directory.rglob("*"):
            if path.is_file() and any(text.encode() in path.read_bytes() for text in texts):
                found.add(path.relative_to(self.directory).as_posix())
        return found


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


@pytest.fixture
def place() -> Iterator[Place]:
    # A short path: Redis listens on a Unix socket below it.
    root = Path(tempfile.mkdtemp(prefix="il-forget-"))
    found = Place(root / "data")
    yield found
    found.end()
    found.engine.dispose()
    shutil.rmtree(root)


def anns(name: str) -> Completion:
    return completion(name, user="ann", messages=[{"role": "user", "content": f"{SECRET} {name}"}])


def comment(event_id: str, of: str, rater: str) -> Event:
    said = {"type": "thumb", "completion_id": of, "value": "up", "comment": f"{SECRET} {event_id}"}
    return event(event_id, said, rater=rater)


def stored_events(engine: Engine) -> list[str]:
    query = sa.select(tables.events.c.event_id).where(tables.events.c.status == "stored")
    with engine.connect() as connection:
        return sorted(connection.execute(query).scalars())


async def queue_up(place: Place) -> None:
    """Ann's and Rita's records among others', with idempotency keys; some of all are pending."""
    client = redis.asyncio.Redis.from_url(place.config.queue_url)
    queue = FeedbackQueue(client, SETTINGS)
    for i in range(OTHERS):
        await queue.record([completion(f"o{i}", n=1, user="bob")])
        receipt = await queue.submit(thumb(f"q{i}", f"o{i}", rater="k1/bob"), f"key {i}")
        place.others.append(receipt.event_id)
        if i % 10 == 0:
            await queue.record([anns(f"a{i}")])
            await queue.submit(comment(f"r{i}", f"o{i}", RITA), f"rita's {i}")
            await queue.submit(thumb(f"b{i}", f"a{i}", rater="k1/bob"))
    await client.aclose()
    with place.client() as other:
        assert len(StreamReader(other, SETTINGS, "dead").read(0)) == SETTINGS.batch


def fill(place: Place) -> None:
    """The same kinds of records everywhere: tables, dead letters, stream, a round's samples."""
    records = [completion(f"s{i}", n=1, user="bob") for i in range(60)]
    records += [anns(f"t{i}") for i in range(0, 60, 5)]
    place.store.ingest(entries(*records))
    place.store.ingest(entries(*[thumb(f"e{i}", f"s{i}", rater="k1/bob") for i in range(60)]))
    place.store.ingest(entries(*[comment(f"f{i}", f"s{i}", RITA) for i in range(0, 60, 5)]))
    place.store.ingest(entries(*[thumb(f"g{i}", f"t{i}", rater="k1/bob") for i in range(0, 60, 5)]))
    broken = f'{{"rater": "{RITA}", "comment": "{SECRET}", broken'.encode()
    place.store.ingest([Entry("1-1", "event", broken)])
    rounds = Rounds(place.engine)
    settings = {"reward_rater_weights": {RITA: 0.5, "k1/bob": 1.0}}
    for cursor, cutoff in ((0, 60), (60, 84)):
        round_ = rounds.begin(cursor, cutoff, {"parent": "policy-0000", "training": settings}, 0)
        rounds.finish(round_.id, "done")
        directory = place.directory / "rounds" / f"{round_.id:04d}"
        (directory / "tracking").mkdir(parents=True)
        (directory / "tracking" / "events").write_text(f"weights: {RITA}")
        (directory / "reward_model.json").write_text(json.dumps({"influence": {"largest": {RITA: 0.5}}}))
        text = SECRET if cursor else "nothing of it"
        SampleLog(directory).keep(1, [{"prompt": text, "response": text, "score": 0.0}])
    place.store.raters.quarantine(RITA, actor="op", reason="contradicts everybody")
    place.store.raters.add_gold("f0", actor="op", reason="")
    arena = Arena(place.engine)
    (pair,) = arena.offer([OfferedPair([{"role": "user", "content": "Hi"}], "one", "another")], wanted=2)
    for rater in (RITA, "k1/bob"):
        arena.vote(pair, rater, "tie")
    waiting = [anns("spooled"), completion("of another", n=1, user="bob")]
    Spool(place.config.spool_file, 2**20).append([one.model_dump_json().encode() for one in waiting])
    asyncio.run(queue_up(place))


def check_forgotten(place: Place) -> None:
    """Of Ann and Rita no byte is left; of the others nothing is missing and nothing there twice."""
    assert Forgettings(place.engine).unfinished() == []
    place.engine.dispose()
    assert place.files_with(SECRET, RITA, "user:ann") == set()
    stored = sorted([f"e{i}" for i in range(60)] + place.others)
    assert stored_events(place.engine) == stored
    assert place.store.counts() == {
        "completions": 60 + OTHERS,
        "waiting": 0,
        "stored": len(stored),
        "superseded": 0,
        "rejected": 0,
        "dead_letters": 0,
    }
    with place.client() as client:
        assert client.xlen(SETTINGS.stream) == 0
        assert client.keys("*receipt*") == client.keys("*aside*") == []
        # The others' idempotency keys still make a retry the same event.
        assert len(client.keys("*idempotency*")) == OTHERS
    assert SampleLog(place.directory / "rounds" / "0001").read() != []
    assert SampleLog(place.directory / "rounds" / "0002").read() == []
    (spooled,) = Spool(place.config.spool_file, 2**20).oldest(10)
    assert Completion.model_validate_json(spooled.data).id == "of another"
    assert [one.rater[:7] for one in place.store.raters.log()] == ["sha256:"]
    assert place.store.raters.gold() == []
    (pair,) = Arena(place.engine).offer([OfferedPair([{"role": "user", "content": "Hi"}], "one", "another")])
    assert [vote.rater for vote in Arena(place.engine).votes([pair])[pair]] == ["k1/bob"]
    weights = [round_.config["training"]["reward_rater_weights"] for round_ in Rounds(place.engine).list()]
    assert [sorted(rater[:7] for rater in one) for one in weights] == [["k1/bob", "sha256:"]] * 2


def test_no_file_has_the_text_any_more_and_what_learned_is_told(place: Place, tmp_path: Path) -> None:
    fill(place)
    place.run("feedback", "export", str(tmp_path / "exported"))
    found = place.files_with(SECRET)
    assert {"redis/appendonly.aof", "rounds/0002/samples.jsonl"} < found
    assert any(name.startswith("store.db") for name in found), "the test would find nothing anyway"

    told = place.run("forget", "--rater", RITA)
    assert (
        f"rater {RITA} is forgotten (number 1): 0 completions, 12 events, 0 cases, "
        "1 dead letters, 20 in the queue" in told
    )
    assert "no version learned from it" in told
    assert f"  {tmp_path / 'exported'} (feedback, " in told
    assert "rounds 2 " in told
    place.run("forget", "--rater", ANN)
    check_forgotten(place)

    listed = place.run("forget", "--list").splitlines()
    assert len(listed) == 3
    assert listed[1].split()[:2] == ["2", "rater"]
    assert listed[1].endswith("-")
    # It also survives that Redis reads its log again.
    place.redis.kill()
    place.redis.wait()
    place.start_redis()
    check_forgotten(place)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("feedback.forgetting:Forgettings.erase", 1),
        ("feedback.forgetting:_delete", 1),
        ("feedback.forgetting:delete_completions", 1),
        ("feedback.queue:QueueCleaning.run", 1),
        ("feedback.queue:QueueCleaning._empty", 2),
        ("feedback.store:Store.ingest", 4),
        ("feedback.queue:QueueCleaning._delete_idempotency_keys", 1),
        ("feedback.queue:QueueCleaning._rewrite_files", 1),
        ("instructloop.upkeep:Upkeep._clean_files", 1),
        ("instructloop.upkeep:Upkeep._compact", 1),
        ("feedback.forgetting:Forgettings.step_done", 3),
    ],
)
def test_a_kill_in_the_middle_is_completed_by_the_next_ingest(place: Place, function: str, call: int) -> None:
    fill(place)
    place.killed(function, call, "forget", "--rater", RITA)
    (left,) = Forgettings(place.engine).unfinished()
    assert left.left
    place.start_ingest()
    wait_until(lambda: not Forgettings(place.engine).unfinished())
    place.run("forget", "--rater", ANN)
    check_forgotten(place)


def test_a_kill_is_completed_by_the_next_command_as_well(place: Place) -> None:
    fill(place)
    place.killed("feedback.queue:QueueCleaning._empty", 2, "forget", "--rater", ANN)
    place.run("forget", "--rater", RITA)
    check_forgotten(place)


def test_ingest_and_givers_at_work_lose_nothing_while_the_stream_is_set_aside(place: Place) -> None:
    place.start_ingest()
    acknowledged: list[str] = []
    stop = threading.Event()

    async def give() -> None:
        client = redis.asyncio.Redis.from_url(place.config.queue_url)
        queue, number = FeedbackQueue(client, SETTINGS), 0
        while not stop.is_set():
            name, number = f"c{number}", number + 1
            await queue.record([completion(name, n=1, user="bob"), anns(f"a{number}")])
            receipt = await queue.submit(thumb(f"e{number}", name, rater="k1/bob"))
            acknowledged.append(receipt.event_id)
            await asyncio.sleep(0.01)
        await client.aclose()

    giver = threading.Thread(target=lambda: asyncio.run(give()))
    giver.start()
    wait_until(lambda: len(acknowledged) > 50)
    for _ in range(4):
        place.run("forget", "--rater", ANN)
    stop.set()
    giver.join()
    place.run("forget", "--rater", ANN)
    with place.client() as client:
        wait_until(lambda: client.xlen(SETTINGS.stream) == 0)
    wait_until(lambda: place.store.counts()["waiting"] == 0)
    assert len(acknowledged) > 200
    assert stored_events(place.engine) == sorted(acknowledged)
    wait_until(lambda: not Forgettings(place.engine).unfinished())
    place.engine.dispose()
    assert place.files_with(SECRET) == set()


def test_without_redis_the_database_forgets_and_the_rest_is_done_later(place: Place) -> None:
    fill(place)
    place.redis.terminate()
    place.redis.wait()
    told = place.run("forget", "--rater", RITA, code=1)
    assert "still to do: queue: " in told
    (left,) = Forgettings(place.engine).unfinished()
    assert left.left == ("queue",)
    place.engine.dispose()
    assert {name.split("/")[0] for name in place.files_with(RITA)} == {"redis"}
    place.start_redis()
    place.run("forget", "--rater", ANN)
    check_forgotten(place)


def test_retention_is_kept_by_ingest(place: Place) -> None:
    now = time.time()
    records = [completion(f"old{i}", created_at=now - 3 * 86_400, prompt=SECRET) for i in range(20)]
    records += [completion("new", created_at=now - 86_400)]
    place.store.ingest(entries(*records))
    place.store.ingest(entries(comment("e1", "old1", RITA), thumb("e2", "new")))
    place.environment["INSTRUCTLOOP_STORE__RETENTION_DAYS"] = "2"
    place.start_ingest()
    wait_until(lambda: place.store.counts()["completions"] == 1)
    assert stored_events(place.engine) == ["e1", "e2"]
    place.engine.dispose()
    wait_until(lambda: place.files_with(SECRET) == set())


def test_wrong_commands_say_what_is_wrong(place: Place) -> None:
    assert "<key id>/<name>" in place.run("forget", "--rater", "ann", code=2)
    assert "required" in place.run("forget", code=2)
    assert "--without-rater" in place.run("train", "--once", "--from", "policy-0001", code=2)
    told = place.run("forget", "--completion", "chatcmpl-unknown")
    assert "0 completions, 0 events" in told


def test_what_is_exported_is_clean_unless_asked_otherwise(place: Place, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "mail ann@example.org"}]
    place.store.ingest(entries(completion("c1", messages=messages), thumb("e1", "c1")))
    place.store.ingest(entries(completion("c2", messages=messages, created_at=0.0), thumb("e2", "c2")))
    told = json.loads(place.run("feedback", "export", str(tmp_path / "clean")))
    assert (told["thumbs"], told["email_replaced"]) == (2, 2)
    assert "<EMAIL>" in (tmp_path / "clean" / "thumbs.jsonl").read_text()
    told = json.loads(place.run("feedback", "export", str(tmp_path / "raw"), "--raw"))
    assert "ann@example.org" in (tmp_path / "raw" / "thumbs.jsonl").read_text()
    assert "email_replaced" not in told
    from feedback.retention import expire

    expire(place.engine, before=1.0)
    told = json.loads(place.run("feedback", "export", str(tmp_path / "later")))
    assert (told["thumbs"], told["without_text"]) == (1, 1)
