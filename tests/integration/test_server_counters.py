"""Rate limits in a real Redis: counted over replicas, kept off its disk, and out of the way when it is."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import redis.asyncio
from prometheus_client import CollectorRegistry

from server.context import Caller
from server.errors import Problem
from server.limits import Limits, RedisCounters
from server.metrics import ServerMetrics
from server.settings import ServerSettings

if TYPE_CHECKING:
    from conftest import RedisServer

CLIENT = Caller("client", "442f048282d1", "app")
ZOE = Caller("token", "442f048282d1", "feedback token", "chatcmpl-1", "zoë}{\0/")


def replica(client: redis.asyncio.Redis, prefix: str = "feed:limit", **rates: str) -> Limits:
    metrics = ServerMetrics(CollectorRegistry())
    return Limits(RedisCounters(client, prefix), ServerSettings(**rates), metrics)


@pytest.fixture
async def client(redis_server: "RedisServer") -> AsyncIterator[redis.asyncio.Redis]:
    pool = redis.asyncio.BlockingConnectionPool.from_url(redis_server.url)
    async with redis.asyncio.Redis.from_pool(pool) as client:
        yield client


async def passed(limits: Limits, caller: Caller, times: int) -> int:
    """How many of so many requests pass."""
    found = await asyncio.gather(*(limits.request(caller) for _ in range(times)), return_exceptions=True)
    assert all(item is None or isinstance(item, Problem) for item in found), found
    return found.count(None)


async def test_replicas_count_together_and_installations_apart(client: redis.asyncio.Redis) -> None:
    rates = {"rate_per_key": "20/minute", "rate_per_end_user": "5/minute"}
    one, other = replica(client, **rates), replica(client, **rates)
    counts = await asyncio.gather(passed(one, CLIENT, 15), passed(other, CLIENT, 15))
    assert sum(counts) == 20
    assert await passed(one, ZOE, 9) == 5
    assert await passed(replica(client, "another:limit", **rates), CLIENT, 3) == 3
    keys = [key.decode() for key in await client.keys("*")]
    assert all(key.startswith(("feed:limit:", "another:limit:")) for key in keys)
    assert not any("zo" in key or CLIENT.key_id in key for key in keys)
    for key in keys:
        assert 0 < await client.ttl(key) <= 120


async def test_retry_after_is_when_it_works_again(client: redis.asyncio.Redis) -> None:
    limits = replica(client, rate_per_key="3/second")
    assert await passed(limits, CLIENT, 4) == 3
    with pytest.raises(Problem) as refused:
        await limits.request(CLIENT)
    assert (refused.value.status, refused.value.retry_after) == (429, 1)
    await asyncio.sleep(1.0 + refused.value.retry_after)
    await limits.request(CLIENT)


async def test_counting_does_not_write_to_redis_disk(client: redis.asyncio.Redis) -> None:
    limits = replica(client, rate_per_key="100/hour", rate_per_end_user="1/hour")
    # Once each, Redis keeps the scripts themselves.
    await limits.request(ZOE)
    with pytest.raises(Problem):
        await limits.request(ZOE)
    before = (await client.info("persistence"))["aof_current_size"]
    assert await passed(limits, CLIENT, 300) == 100
    assert (await client.info("persistence"))["aof_current_size"] == before
    # What is recorded otherwise still is.
    await client.set("x", "1")
    assert (await client.info("persistence"))["aof_current_size"] > before


async def test_nobody_is_held_up_while_redis_is_away(
    redis_server: "RedisServer", client: redis.asyncio.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    limits = replica(client, rate_per_key="2/hour")
    assert await passed(limits, CLIENT, 3) == 2
    redis_server.kill()
    assert await passed(limits, CLIENT, 50) == 50
    assert "limits are not kept" in caplog.text
    assert len(caplog.records) <= 50
    redis_server.start()
    await asyncio.sleep(1.1)
    assert await passed(limits, CLIENT, 3) == 2  # the counts began anew


async def test_a_redis_that_hangs_costs_half_a_second_now_and_then(
    redis_server: "RedisServer", client: redis.asyncio.Redis
) -> None:
    limits = replica(client, rate_per_key="1000/hour")
    await limits.request(CLIENT)
    assert redis_server.process is not None
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        await limits.request(CLIENT)
        assert 0.4 < time.monotonic() - began < 2
        began = time.monotonic()
        assert await passed(limits, CLIENT, 100) == 100
        assert time.monotonic() - began < 0.4
    finally:
        os.kill(redis_server.process.pid, signal.SIGCONT)
    await asyncio.sleep(1.1)
    await limits.request(CLIENT)
