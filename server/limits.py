"""How often a key, a rater and an end user may ask: counted in Redis, so over all replicas together.

Owns the counters (of the `limits` library), and what happens when Redis is away: nobody is held up then.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

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

    async def _count(self, name: str, identity: str, count: int) -> None:
        item = self._items.get(name)
        if item is None or time.monotonic() < self._away_until:
            return
        # A digest: names of people stay out of Redis' keys, and so do characters that mean something there.
        digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                if await self._limiter.hit(item, name, digest, cost=count):
                    return
                free_at, _ = await self._limiter.get_window_stats(item, name, digest)
        except (RedisError, OSError) as error:  # OSError: TimeoutError too
            logger.warning("limits are not kept while Redis is away: %s", str(error) or "it does not answer")
            self._away_until = time.monotonic() + _AWAY_SECONDS
            return
        self._metrics.limited.labels(name).inc()
        who = {"key": "this key", "rater": "this rater", "end_user": "this end user"}[name]
        raise Problem(429, f"{who} may ask {item}", retry_after=max(1, math.ceil(free_at - time.time())))


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
    counted = Grouped(partial(_count_all, client, bridge.SCRIPT_ACQUIRE_SLIDING_WINDOW))
    bridge.lua_acquire_sliding_window = lambda keys, arguments: counted((len(keys), *keys, *arguments))
    return storage


async def _count_all(client: Any, script: str | bytes, calls: Sequence[tuple[Any, ...]]) -> list[bool]:
    """Count in one round trip; `calls` are arguments of EVAL, of which the last is how much is taken.

    What is taken of one counter is taken together, and only if that is too much, each for itself.
    """
    together = Counter[tuple[Any, ...]]()
    for *counter, amount in calls:
        together[tuple(counter)] += amount
    taken = await _evaluate(client, script, [(*counter, amount) for counter, amount in together.items()])
    passed = dict(zip(together, taken, strict=True))
    answers = [bool(passed[call[:-1]]) for call in calls]
    alone = [place for place, passes in enumerate(answers) if not passes]
    found = await _evaluate(client, script, [calls[place] for place in alone]) if alone else []
    for place, passes in zip(alone, found, strict=True):
        answers[place] = bool(passes)
    return answers


async def _evaluate(client: Any, script: str | bytes, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    async with client.pipeline(transaction=False) as pipeline:
        for arguments in calls:
            pipeline.eval(script, *arguments)
        return list(await pipeline.execute())
