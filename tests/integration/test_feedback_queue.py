"""The queue against a real redis-server: once, durable, in order, and honest when it can't be."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest
import redis
import redis.asyncio
from feedback_samples import completion, event, thumb

from feedback.entries import parse
from feedback.queue import (
    Entry,
    FeedbackQueue,
    IdempotencyConflict,
    QueueUnavailable,
    StreamReader,
)
from feedback.settings import QueueSettings
from feedback.submission import EntryTooLarge

if TYPE_CHECKING:
    from conftest import RedisServer

SETTINGS = QueueSettings(claim_after_seconds=0.2, timeout_seconds=1.0, durability_check_seconds=0)


@pytest.fixture
async def queue(redis_server: "RedisServer") -> AsyncIterator[FeedbackQueue]:
    client = redis.asyncio.Redis.from_url(redis_server.url)
    yield FeedbackQueue(client, SETTINGS)
    await client.aclose()


@pytest.fixture
def admin(redis_server: "RedisServer") -> Iterator[redis.Redis]:
    with redis_server.client() as client:
        yield client


def reader(client: redis.Redis, consumer: str = "a", **changes: object) -> StreamReader:
    return StreamReader(client, SETTINGS.model_copy(update=changes), consumer)


async def test_entries_come_out_in_order_and_leave_when_done(
    queue: FeedbackQueue, admin: redis.Redis
) -> None:
    await queue.record([completion("c1"), completion("c2")])
    receipt = await queue.submit(thumb("e1", "c1"))
    await queue.record([completion("c3")])
    assert (receipt.event_id, receipt.duplicate) == ("e1", False)
    assert await queue.queued("e1") == "k1"
    assert await queue.depth() == 4
    stream = reader(admin)
    found = stream.read(0)
    assert [(entry.kind, entry.event_id) for entry in found] == [
        ("completion", None),
        ("completion", None),
        ("event", "e1"),
        ("completion", None),
    ]
    assert found[2].data == thumb("e1", "c1").model_dump_json().encode()
    assert [(entry.key_id, entry.schema) for entry in found[1:3]] == [(None, "1"), ("k1", "1")]
    stream.done(found)
    stream.done([])
    assert await queue.depth() == 0
    assert await queue.queued("e1") is None
    assert admin.keys("*receipt*") == []
    assert stream.read(0) == []


async def test_the_same_event_is_queued_once(queue: FeedbackQueue, admin: redis.Redis) -> None:
    first, second = await queue.submit(thumb("e1")), await queue.submit(thumb("e1"))
    assert (first.duplicate, second.duplicate) == (False, True)
    receipts = await queue.submit_batch([thumb("e1"), thumb("e2"), thumb("e2")])
    assert [(r.event_id, r.duplicate) for r in receipts] == [("e1", True), ("e2", False), ("e2", True)]
    assert await queue.depth() == 2


async def test_an_idempotency_key_names_one_event(queue: FeedbackQueue, admin: redis.Redis) -> None:
    answers = await asyncio.gather(*[queue.submit(thumb(f"e{i}"), "key") for i in range(50)])
    names = {answer.event_id for answer in answers}
    assert len(names) == 1
    assert sum(not answer.duplicate for answer in answers) == 1
    assert await queue.depth() == 1
    # It still does after ingest, and other givers' keys are their own.
    stream = reader(admin)
    stream.done(stream.read(0))
    assert (await queue.submit(thumb("e99"), "key")).event_id in names
    other = await queue.submit(thumb("f1", key_id="k2"), "key")
    assert not other.duplicate
    assert other.event_id not in names
    with pytest.raises(IdempotencyConflict, match=names.pop()):
        await queue.submit(thumb("e100", value="down"), "key")
    assert await queue.depth() == 1
    lifetimes = [admin.ttl(name) for name in admin.keys("*idempotency*")]
    assert len(lifetimes) == 2
    assert all(86_000 < seconds <= 86_400 for seconds in lifetimes)


async def test_each_event_of_a_batch_may_have_its_key(queue: FeedbackQueue, admin: redis.Redis) -> None:
    events = [thumb("e1"), thumb("e2"), thumb("e3", value="down"), thumb("e4"), thumb("e5")]
    receipts = await queue.submit_batch(events, ["a", "a", "a", None, "b"])
    assert [(r.duplicate, r.conflict) for r in receipts] == [
        (False, False),
        (True, False),
        (False, True),
        (False, False),
        (False, False),
    ]
    # A key decides its event's id, with what was said.
    a, b = receipts[0].event_id, receipts[4].event_id
    assert [r.event_id for r in receipts] == [a, a, a, "e4", b]
    assert len({"e1", "e4", a, b}) == 4
    assert await queue.depth() == 3
    assert (await queue.submit(thumb("e6"), "b")).event_id == b
    again = await queue.submit_batch([thumb("f1"), thumb("f2")], ["a", "b"])
    assert [receipt.event_id for receipt in again] == [a, b]
    assert await queue.depth() == 3


async def test_a_retry_is_the_same_event_though_redis_remembers_nothing(
    queue: FeedbackQueue, admin: redis.Redis
) -> None:
    """A replica that takes over may lack what was not acknowledged, and ingest may have stored just that."""
    first = await queue.submit(thumb("e1"), "key")
    admin.flushall()
    again = await queue.submit(thumb("e2"), "key")
    assert (again.event_id, again.duplicate) == (first.event_id, False)
    others = [
        await queue.submit(thumb("e3", value="down"), "other key"),
        await queue.submit(thumb("e4"), "other key of it"),
        await queue.submit(thumb("e5", key_id="k2"), "key"),
    ]
    assert len({receipt.event_id for receipt in (first, *others)}) == 4


async def test_a_crowd_shares_few_connections(queue: FeedbackQueue, admin: redis.Redis) -> None:
    receipts = await asyncio.gather(*(queue.submit(thumb(f"e{i}")) for i in range(3000)))
    assert [receipt.event_id for receipt in receipts] == [f"e{i}" for i in range(3000)]
    assert [e.event_id for e in reader(admin, batch=3000).read(0)] == [f"e{i}" for i in range(3000)]
    assert len(admin.client_list()) <= 4


async def test_an_event_beyond_what_an_entry_may_be_is_refused(
    queue: FeedbackQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = thumb("e1", rater="é" * 300)
    size = len(said.model_dump_json().encode())
    monkeypatch.setattr("feedback.submission.LARGEST_ENTRY_BYTES", size - 1)
    for attempt in (queue.submit(said), queue.submit_batch([thumb("e2"), said])):
        with pytest.raises(EntryTooLarge, match=f"at most {size - 1} bytes"):
            await attempt
    assert await queue.depth() == 0
    monkeypatch.setattr("feedback.submission.LARGEST_ENTRY_BYTES", size)
    await queue.submit(said)


async def test_a_record_with_half_of_a_surrogate_pair_is_queued_without_it(
    queue: FeedbackQueue, admin: redis.Redis
) -> None:
    await queue.record([completion(messages=[{"role": "user", "content": "hi", "name": "a\ud800"}])])
    (found,) = parse(reader(admin).read(0)).completions
    assert found == completion(messages=[{"role": "user", "content": "hi", "name": "a?"}])


async def test_a_long_batch_is_whole(queue: FeedbackQueue, admin: redis.Redis) -> None:
    receipts = await queue.submit_batch([thumb(f"e{i}") for i in range(1201)])
    assert [receipt.event_id for receipt in receipts] == [f"e{i}" for i in range(1201)]
    stream = reader(admin, batch=500)
    sizes = []
    while found := stream.read(0):
        sizes.append(len(found))
        stream.done(found)
    assert sizes == [500, 500, 201]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("appendonly", "no"),
        ("appendfsync", "everysec"),
        ("no-appendfsync-on-rewrite", "yes"),
        ("maxmemory-policy", "allkeys-lru"),
    ],
)
async def test_settings_that_lose_data_refuse_feedback(
    queue: FeedbackQueue, admin: redis.Redis, name: str, value: str
) -> None:
    assert await queue.durability() is None
    admin.config_set(name, value)
    reason = await queue.durability()
    assert reason is not None and name in reason and value in reason
    for attempt in (queue.submit(thumb("e1")), queue.submit_batch([thumb("e1")])):
        with pytest.raises(QueueUnavailable, match=name):
            await attempt
    assert await queue.depth() == 0


async def test_redis_without_memory_refuses_and_forgets_the_attempt(
    queue: FeedbackQueue, admin: redis.Redis
) -> None:
    admin.config_set("maxmemory", "1")
    with pytest.raises(QueueUnavailable, match="memory"):
        await queue.submit(thumb("e1"), "key")
    admin.config_set("maxmemory", "0")
    assert await queue.depth() == 0
    # Neither the event nor the key counts as used.
    assert not (await queue.submit(thumb("e1"), "key")).duplicate


async def test_redis_that_hangs_or_is_away_is_said_in_time(
    queue: FeedbackQueue, redis_server: "RedisServer"
) -> None:
    await queue.submit(thumb("e1"))
    assert redis_server.process is not None
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    started = time.monotonic()
    try:
        with pytest.raises(QueueUnavailable):
            await queue.submit(thumb("e2"))
        assert time.monotonic() - started < 3
    finally:
        os.kill(redis_server.process.pid, signal.SIGCONT)
    redis_server.kill()
    with pytest.raises(QueueUnavailable):
        await queue.submit(thumb("e3"))
    reason = await queue.durability()
    assert reason is not None and reason.startswith("Redis")
    redis_server.start()
    assert not (await queue.submit(thumb("e3"))).duplicate
    assert (await queue.submit(thumb("e1"))).duplicate


def test_a_reader_finds_its_own_unfinished_entries_first(admin: redis.Redis) -> None:
    settings = {"batch": 2}
    for i in range(5):
        admin.xadd(SETTINGS.stream, {"kind": "completion", "data": str(i)})
    first = reader(admin, **settings).read(0)
    assert [entry.data for entry in first] == [b"0", b"1"]
    # The process dies and comes back under its name.
    stream = reader(admin, **settings)
    assert stream.read(0) == first
    stream.done(first)
    assert [entry.data for entry in stream.read(0)] == [b"2", b"3"]


def test_entries_of_a_silent_reader_are_taken_over_and_those_of_a_live_one_are_not(
    admin: redis.Redis,
) -> None:
    for i in range(3):
        admin.xadd(SETTINGS.stream, {"kind": "completion", "data": str(i)})
    dead, heir = reader(admin, "dead"), reader(admin, "heir")
    taken = dead.read(0)
    assert len(taken) == 3
    assert heir.read(0) == []
    time.sleep(0.3)
    assert heir.read(0) == taken
    assert dead.read(0) == []
    heir.done(taken)
    dead.done(taken)  # it was only slow: to finish twice is harmless
    assert admin.xlen(SETTINGS.stream) == 0


def test_a_lost_group_and_deleted_entries_do_not_stop_the_reader(admin: redis.Redis) -> None:
    stream = reader(admin)
    assert stream.read(0) == []
    gone = admin.xadd(SETTINGS.stream, {"kind": "completion", "data": "0"})
    stream.read(0)
    admin.xdel(SETTINGS.stream, gone)
    assert stream.read(0) == []
    assert admin.xpending(SETTINGS.stream, SETTINGS.group)["pending"] == 0
    admin.flushall()
    admin.xadd(SETTINGS.stream, {"junk": "1"})
    (junk,) = stream.read(0)
    assert junk == Entry(junk.id, "", b"{b'junk': b'1'}")
    assert junk.schema == "1", "entries of before had none"


async def test_what_is_stored_takes_no_memory_whoever_reads_and_dies(
    queue: FeedbackQueue, admin: redis.Redis
) -> None:
    """Five megabytes pass through two readers, while a third has died with the first entries in hand."""
    await queue.record([completion(f"dead-{i}") for i in range(20)])
    dead = reader(admin, "dead", batch=20).read(0)
    said_at_length = {"type": "demonstration", "completion_id": "c", "text": "x" * 900}
    readers = [reader(admin, name, batch=100, claim_after_seconds=3600.0) for name in "ab"]
    for wave in range(10):
        said = [event(f"{wave}-{i}", said_at_length) for i in range(500)]
        await queue.submit_batch(said, [f"key-{wave}-{i}" if i % 100 == 0 else None for i in range(500)])
        assert admin.memory_usage(SETTINGS.stream, samples=0) > 400_000
        for turn in range(5):
            for stream in readers[turn % 2 :] + readers[: turn % 2]:
                stream.done(stream.read(0))
        assert await queue.depth() == len(dead)
        assert admin.memory_usage(SETTINGS.stream, samples=0) < 40_000
    heir = reader(admin, "heir", batch=100)
    time.sleep(0.3)
    assert heir.read(0) == dead
    heir.done(dead)
    assert admin.memory_usage(SETTINGS.stream, samples=0) < 10_000
    assert _pending(admin) == []
    # What is left besides are the idempotency keys, each until its time is up.
    kept = [name for name in admin.keys("*") if name != SETTINGS.stream.encode()]
    assert len(kept) == 50
    assert all(admin.ttl(name) > 0 for name in kept)


def test_consumers_that_are_long_gone_are_forgotten(
    admin: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has a name of its own; one that still holds an entry is never forgotten."""

    def names() -> set[bytes]:
        return {consumer["name"] for consumer in admin.xinfo_consumers(SETTINGS.stream, SETTINGS.group)}

    reader(admin).read(0)
    for number in range(20):
        reader(admin, f"gone-{number}").read(0)
    admin.xadd(SETTINGS.stream, {"kind": "completion", "data": "0"})
    assert len(reader(admin, "dead").read(0)) == 1
    assert len(names()) == 21
    quick = reader(admin, "heir", claim_after_seconds=3600.0)
    assert quick.read(0.001) == []
    assert len(names()) == 22, "a day is not over"
    monkeypatch.setattr("feedback.queue._FORGET_CONSUMERS_AFTER_SECONDS", 0.05)
    time.sleep(0.1)
    assert reader(admin, "heir", claim_after_seconds=3600.0).read(0.001) == []
    assert names() == {b"dead", b"heir"}
    # One that was meant by mistake only has to read again.
    admin.xadd(SETTINGS.stream, {"kind": "completion", "data": "1"})
    assert [entry.data for entry in reader(admin, "gone-3", claim_after_seconds=3600.0).read(0)] == [b"1"]
    assert {entry["consumer"] for entry in _pending(admin)} == {b"dead", b"gone-3"}


def _pending(admin: redis.Redis) -> list[dict[str, object]]:
    return list(admin.xpending_range(SETTINGS.stream, SETTINGS.group, "-", "+", 10))


def test_a_read_waits_for_an_entry_and_no_longer_than_asked(
    redis_server: "RedisServer", admin: redis.Redis
) -> None:
    stream = reader(admin)
    stream.read(0)
    started = time.monotonic()
    assert stream.read(0.3) == []
    assert 0.25 < time.monotonic() - started < 2
    # A wait longer than the socket's own limit must not be taken for an outage.
    hasty = redis.Redis.from_url(redis_server.url, socket_timeout=0.4)
    assert reader(hasty, "b").read(5) == []
    hasty.close()


def test_a_client_that_decodes_is_refused(redis_server: "RedisServer") -> None:
    with pytest.raises(ValueError, match="bytes"):
        reader(redis.Redis.from_url(redis_server.url, decode_responses=True))
