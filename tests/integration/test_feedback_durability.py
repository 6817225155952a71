"""What was acknowledged is stored exactly once, whatever is killed: real processes, kill -9, and counts."""

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
import redis.asyncio
import sqlalchemy as sa
from feedback_samples import completion, thumb
from ingest_process import SETTINGS
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.ingest import run
from feedback.queue import FeedbackQueue, QueueUnavailable, StreamReader
from feedback.store import Store

if TYPE_CHECKING:
    from conftest import RedisServer

_LOG = logging.getLogger(__name__)
HERE = Path(__file__).resolve().parent
Start = Callable[[str], "subprocess.Popen[bytes]"]


@pytest.fixture
def start_ingest(redis_server: "RedisServer", either_database: Engine) -> Iterator[Start]:
    """Starts ingest processes and ends those that still run."""
    processes: list[subprocess.Popen[bytes]] = []
    database_url = either_database.url.render_as_string(hide_password=False)
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}

    def start(name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(HERE / "ingest_process.py"), redis_server.url, database_url, name]
        processes.append(subprocess.Popen(command, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(timeout=10)


def wait_until(condition: Callable[[], bool], seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def stored_ids(engine: Engine) -> list[str]:
    """Of every event that the store has, in order of position; raises if one has none."""
    query = sa.select(tables.events.c.event_id).where(tables.events.c.position.is_not(None))
    with engine.connect() as connection:
        return list(connection.execute(query.order_by(tables.events.c.position)).scalars())


def check_once(engine: Engine, server: "RedisServer", acknowledged: list[str]) -> None:
    """Every acknowledged event is stored, none twice, and nothing of them is left in Redis."""
    stored = stored_ids(engine)
    lost = set(acknowledged) - set(stored)
    doubled = len(stored) - len(set(stored))
    _LOG.info(
        "acknowledged %d, stored %d, doubled %d, lost %d", len(acknowledged), len(stored), doubled, len(lost)
    )
    assert (len(lost), doubled) == (0, 0)
    counts = Store(engine).counts()
    assert (counts["waiting"], counts["rejected"], counts["dead_letters"]) == (0, 0, 0)
    assert Store(engine).head() == len(stored)
    with server.client() as client:
        assert client.xlen(SETTINGS.stream) == 0
        assert client.xpending(SETTINGS.stream, SETTINGS.group)["pending"] == 0
        assert client.keys("*receipt*") == []


async def submit(url: str, count: int) -> list[str]:
    client = redis.asyncio.Redis.from_url(url)
    queue = FeedbackQueue(client, SETTINGS)
    await queue.record([completion(f"c{i}", n=1) for i in range(count)])
    receipts = await queue.submit_batch([thumb(f"e{i}", f"c{i}") for i in range(count)])
    await client.aclose()
    return [receipt.event_id for receipt in receipts]


def test_ingest_killed_in_the_middle_of_batches(
    redis_server: "RedisServer", either_database: Engine, start_ingest: Start
) -> None:
    acknowledged = asyncio.run(submit(redis_server.url, 2000))
    assert len(acknowledged) == 2000
    store, admin = Store(either_database), redis_server.client()

    def done() -> int:
        counts = store.counts()
        return counts["completions"] + counts["stored"] + counts["waiting"]

    for round_number in range(4):
        enough = done() + 40 * (round_number + 1)
        process = start_ingest("worker")
        # Let it store a few batches, then kill it wherever it is.
        wait_until(lambda enough=enough: done() > enough)
        process.kill()
        process.wait()
        assert 0 < admin.xlen(SETTINGS.stream) < 4000, "it was killed with work before and behind it"
    # Another process, not the old one come back: it takes over what the dead one had.
    start_ingest("heir")
    wait_until(lambda: admin.xlen(SETTINGS.stream) == 0)
    admin.close()
    check_once(either_database, redis_server, acknowledged)


def test_two_ingest_processes_at_once_one_of_them_killed(
    redis_server: "RedisServer", either_database: Engine, start_ingest: Start
) -> None:
    processes = [start_ingest("a"), start_ingest("b")]
    admin = redis_server.client()
    wait_until(lambda: bool(admin.exists(SETTINGS.stream)) and len(_consumers(admin)) == 2)
    acknowledged = asyncio.run(submit(redis_server.url, 1000))
    store = Store(either_database)
    wait_until(lambda: store.counts()["completions"] > 100)
    processes[0].kill()
    wait_until(lambda: admin.xlen(SETTINGS.stream) == 0)
    admin.close()
    check_once(either_database, redis_server, acknowledged)


def _consumers(admin: redis.Redis) -> list[object]:
    try:
        return list(admin.xinfo_consumers(SETTINGS.stream, SETTINGS.group))
    except redis.ResponseError:
        return []


def test_redis_killed_during_submits(redis_server: "RedisServer", database: Engine) -> None:
    """Givers retry what was not acknowledged, as clients do; ingest waits for Redis by itself."""
    stop = threading.Event()
    reader = StreamReader(redis_server.client(), SETTINGS, "worker")
    worker = threading.Thread(target=run, args=(reader, Store(database), stop))
    worker.start()
    acknowledged: list[str] = []
    refusals = [0]
    finished = threading.Event()

    async def give(queue: FeedbackQueue, giver: int) -> None:
        for i in range(150):
            while True:
                try:
                    # A retry is a new request: another event id, the same idempotency key.
                    said = thumb(f"e{giver}-{i}-{refusals[0]}", "c0", rater=f"k1/{giver}-{i}")
                    receipt = await queue.submit(said, f"{giver}-{i}")
                    break
                except QueueUnavailable:
                    refusals[0] += 1
                    await asyncio.sleep(0.02)
            acknowledged.append(receipt.event_id)

    async def givers() -> None:
        client = redis.asyncio.Redis.from_url(redis_server.url)
        queue = FeedbackQueue(client, SETTINGS)
        await queue.record([completion("c0", n=1)])
        await asyncio.gather(*[give(queue, giver) for giver in range(8)])
        await client.aclose()
        finished.set()

    submitting = threading.Thread(target=lambda: asyncio.run(givers()))
    submitting.start()
    for target in (200, 500, 800):
        wait_until(lambda target=target: len(acknowledged) > target)
        redis_server.kill()
        time.sleep(0.1)
        redis_server.start()
    submitting.join(timeout=40)
    assert finished.is_set()
    admin = redis_server.client()
    wait_until(lambda: admin.xlen(SETTINGS.stream) == 0)
    admin.close()
    stop.set()
    worker.join(timeout=15)
    assert len(acknowledged) == len(set(acknowledged)) == 1200
    assert refusals[0] > 0, "no submit met a dead Redis: the test shows nothing"
    check_once(database, redis_server, acknowledged)
    # With idempotency keys not even an unacknowledged attempt got in beside its retry.
    assert len(stored_ids(database)) == 1200


def test_nothing_is_acknowledged_before_the_commit(
    redis_server: "RedisServer", database: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """The database is locked away for a while; meanwhile all stays in Redis, and then it is stored."""
    acknowledged = asyncio.run(submit(redis_server.url, 30))
    impatient = sa.create_engine(database.url, connect_args={"timeout": 0.05})
    stop = threading.Event()
    reader = StreamReader(redis_server.client(), SETTINGS, "worker")
    worker = threading.Thread(target=run, args=(reader, Store(impatient), stop))
    admin = redis_server.client()
    with caplog.at_level(logging.WARNING, logger="feedback.ingest"):
        with database.begin():
            worker.start()
            wait_until(lambda: "locked" in caplog.text)
            assert admin.xlen(SETTINGS.stream) == 60
        wait_until(lambda: admin.xlen(SETTINGS.stream) == 0)
    admin.close()
    stop.set()
    worker.join(timeout=15)
    check_once(database, redis_server, acknowledged)
    impatient.dispose()


def test_a_crash_between_commit_and_acknowledgement(redis_server: "RedisServer", database: Engine) -> None:
    acknowledged = asyncio.run(submit(redis_server.url, 15))
    store = Store(database)
    crashed = StreamReader(redis_server.client(), SETTINGS, "worker")
    committed = crashed.read(0)
    store.ingest(committed)
    again = StreamReader(redis_server.client(), SETTINGS, "worker")
    assert again.read(0) == committed
    assert store.ingest(committed).duplicates == len(committed)
    again.done(committed)
    check_once(database, redis_server, acknowledged)
