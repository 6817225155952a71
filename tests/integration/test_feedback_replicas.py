"""Feedback that must reach a replica of a real Redis: acknowledged only once it has, also when repeated."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis.asyncio
from conftest import RedisServer, free_port
from feedback_samples import completion, thumb

from feedback.queue import FeedbackQueue, QueueUnavailable
from feedback.settings import QueueSettings

SETTINGS = QueueSettings(timeout_seconds=1.0, durability_check_seconds=0, wait_replicas=1)


def follow(replica: RedisServer, primary: RedisServer) -> None:
    """Make one server the replica of the other, and wait until it is."""
    with replica.client() as copy, primary.client() as admin:
        copy.config_set("repl-diskless-sync-delay", 0)
        copy.replicaof("127.0.0.1", str(primary.port))
        deadline = time.monotonic() + 15
        while (found := admin.info("replication").get("slave0")) is None or found["state"] != "online":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # Until it has written its first log, it does not end when it is asked to.
        while any(copy.info("persistence")[f"aof_rewrite_{state}"] for state in ("in_progress", "scheduled")):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def replica(redis_server: RedisServer, tmp_path: Path) -> Iterator[RedisServer]:
    directory = tmp_path / "replica"
    directory.mkdir()
    with redis_server.client() as admin:
        admin.config_set("repl-diskless-sync-delay", 0)
    server = RedisServer(directory, free_port())
    server.start()
    follow(server, redis_server)
    yield server
    server.stop()


@pytest.fixture
async def queue(redis_server: RedisServer, replica: RedisServer) -> AsyncIterator[FeedbackQueue]:
    client = redis.asyncio.Redis.from_url(redis_server.url)
    yield FeedbackQueue(client, SETTINGS)
    await client.aclose()


async def test_what_is_acknowledged_is_in_the_replica(queue: FeedbackQueue, replica: RedisServer) -> None:
    with replica.client() as copy:
        for number in range(20):
            await asyncio.gather(*(queue.submit(thumb(f"e{number}-{i}")) for i in range(5)))
            assert copy.xlen(SETTINGS.stream) == 5 * (number + 1)
        await queue.submit_batch([thumb(f"f{i}") for i in range(700)])
        await queue.record([completion("c1")])
        assert copy.xlen(SETTINGS.stream) == 801


async def test_a_replica_that_hangs_refuses_also_what_is_there_already(
    queue: FeedbackQueue, replica: RedisServer
) -> None:
    """A retry finds the event in the primary; that the replica has it is another question."""
    await queue.submit(thumb("e0"))
    assert replica.process is not None
    os.kill(replica.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        for _ in range(3):
            with pytest.raises(QueueUnavailable, match="0 of 1"):
                await queue.submit(thumb("e1"), "key")
            with pytest.raises(QueueUnavailable):
                await queue.submit_batch([thumb("e2")])
            with pytest.raises(QueueUnavailable):
                await queue.record([completion("c1")])
        assert time.monotonic() - began < 9 * SETTINGS.timeout_seconds
    finally:
        os.kill(replica.process.pid, signal.SIGCONT)
    assert (await queue.submit(thumb("e1"), "key")).duplicate
    assert [receipt.duplicate for receipt in await queue.submit_batch([thumb("e2")])] == [True]
    with replica.client() as copy:
        kinds = [fields[b"kind"] for _, fields in copy.xrange(SETTINGS.stream)]
        assert kinds.count(b"event") == 3


async def test_a_replica_that_is_away_is_said_and_its_return_is_noticed(
    queue: FeedbackQueue, redis_server: RedisServer, replica: RedisServer
) -> None:
    replica.kill()
    deadline = time.monotonic() + 5
    while (reason := await queue.durability()) is None:
        assert time.monotonic() < deadline
    assert reason == "Redis has 0 of the 1 replicas that must have feedback"
    with pytest.raises(QueueUnavailable, match="0 of the 1"):
        await queue.submit(thumb("e1"))
    replica.start()
    follow(replica, redis_server)
    assert not (await queue.submit(thumb("e1"))).duplicate
