"""How often a key, a rater and an end user may ask: counted in Redis, so over all replicas together.

Owns the counters (of the `limits` library), and what happens when Redis is away: nobody is held up then.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import redis.asyncio
from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage, Storage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from feedback.grouping import Grouped
from server.context import Caller
from server.errors import Problem
from server.feedback_events import rater_of
from server.metrics import ServerMetrics
from server.settings import ServerSettings

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 0.5
_AWAY_SECONDS = 1.0
_COUNTS_AT_ONCE = 100
_WHO = {"key": "this key", "rater": "this rater", "end_user": "this end user"}
_NOT_LOGGED = b"redis.set_repl(redis.REPL_NONE)\n"


class Limits:
    """The three limits of `settings`, each of which may be unset."""

    def __init__(self, storage: Storage, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._metrics = metrics
        self._items: dict[str, RateLimitItem] = {
            name: parse(text)
            for name, text in (
                ("key", settings.rate_per_key),
                ("rater", settings.rate_per_rater),
                ("end_user", settings.rate_per_end_user),
            )
            if text != "none"
        }
        self._grouped = Grouped(self._count_together, limit=_COUNTS_AT_ONCE, at_once=2)
        self._away_until = 0.0

    async def request(self, caller: Caller) -> None:
        """Count one request: under the caller's key, or with a feedback token under its end user.

        Raises Problem 429. An end user does not use up what the client's own requests may be.
        """
        if caller.role == "token":
            await self._count("end_user", rater_of(caller), 1)
        else:
            await self._count("key", caller.key_id, 1)

    async def events(self, caller: Caller, rater: str, count: int = 1) -> None:
        """Count `count` events that a key gives under the identity `rater`, all or none. Raises Problem 429.

        What a client gives under its own name is limited as its requests are, a token's events as its
        end user's requests.
        """
        if caller.role == "rater" or (caller.role == "client" and rater != rater_of(caller)):
            await self._count("rater", rater, count)

    async def _count(self, name: str, identity: str, cost: int) -> None:
        item = self._items.get(name)
        if item is None or time.monotonic() < self._away_until:
            return
        # A digest: names of people stay out of Redis' keys, and so do characters that mean something there.
        counter = _Counter(item, name, hashlib.sha256(identity.encode()).hexdigest()[:32])
        free_at = await self._grouped((counter, cost))
        if free_at is not None:
            self._metrics.limited.labels(name).inc()
            seconds = max(1, math.ceil(free_at - time.time()))
            raise Problem(429, f"{_WHO[name]} may ask {item}", retry_after=seconds)

    async def _count_together(self, asked: "Sequence[tuple[_Counter, int]]") -> list[float | None]:
        """Count what came at the same time: None for what passes, else when there is room again (Unix time).

        When Redis does not answer, all passes, and for a moment nobody waits for it again.
        """
        costs: dict[_Counter, list[int]] = {}
        for counter, cost in asked:
            costs.setdefault(counter, []).append(cost)
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                found = await asyncio.gather(*(self._count_on(*item) for item in costs.items()))
        except (RedisError, OSError) as error:  # OSError: TimeoutError too
            reason = str(error) or "it does not answer"
            logger.warning("rate limits are not kept while Redis is away: %s", reason)
            self._away_until = time.monotonic() + _AWAY_SECONDS
            return [None] * len(asked)
        answers = {counter: iter(answer) for counter, answer in zip(costs, found, strict=True)}
        return [next(answers[counter]) for counter, _ in asked]

    async def _count_on(self, counter: "_Counter", costs: Sequence[int]) -> list[float | None]:
        hit = partial(self._limiter.hit, *counter)
        if await hit(cost=sum(costs)):
            return [None] * len(costs)
        # Not all pass, but some may.
        passed = [len(costs) > 1 and await hit(cost=cost) for cost in costs]
        if all(passed):
            return [None] * len(costs)
        free_at, _ = await self._limiter.get_window_stats(*counter)
        return [None if passes else free_at for passes in passed]


class _Counter(NamedTuple):
    """What is counted: by which limit, its name, and the digest of who asks."""

    item: RateLimitItem
    name: str
    digest: str


def redis_counters(client: redis.asyncio.Redis, prefix: str) -> RedisStorage:
    """Return counters in the Redis of `client`, under keys that begin with `prefix`.

    Their writes stay out of Redis' append-only file and its replicas. This Redis flushes every logged write
    to the disk before it answers, which is for what must last; a count of the last minute need not.
    """
    storage = RedisStorage(
        "async+redis://",
        implementation="redispy",
        key_prefix=prefix,
        connection_pool=client.connection_pool,  # type: ignore[arg-type]  # the library's hint is too narrow
    )
    bridge: Any = storage.bridge
    for script in ("SCRIPT_SLIDING_WINDOW", "SCRIPT_ACQUIRE_SLIDING_WINDOW"):
        setattr(bridge, script, _NOT_LOGGED + getattr(bridge, script))
    bridge.register_scripts()
    # Requests that come at the same time are counted in one round trip.
    counted = Grouped(partial(_count_all, client, bridge.SCRIPT_ACQUIRE_SLIDING_WINDOW), limit=500, at_once=2)
    bridge.lua_acquire_sliding_window = lambda keys, arguments: counted([len(keys), *keys, *arguments])
    return storage


async def _count_all(
    client: Any, script: str | bytes, calls: Sequence[Sequence[str | int]]
) -> Sequence[bool | None]:
    async with client.pipeline(transaction=False) as pipeline:
        for arguments in calls:
            pipeline.eval(script, *arguments)
        return list(await pipeline.execute())
