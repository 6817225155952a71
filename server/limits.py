"""How often a key, a rater and an end user may ask: counted in Redis, so over all replicas together.

Owns the counters (of the `limits` library), and what happens when Redis is away: nobody is held up then.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import redis.asyncio
from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage
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
_NOT_LOGGED = "redis.set_repl(redis.REPL_NONE)\n"

_Name = Literal["key", "rater", "end_user"]
_WHO: dict[_Name, str] = {"key": "this key", "rater": "this rater", "end_user": "this end user"}


class Wanted(NamedTuple):
    """So much is wanted of what `item` allows `digest`, which is a `name`."""

    item: RateLimitItem
    name: _Name
    digest: str
    amount: int


class Counters(Protocol):
    """Where is counted. Both raise RedisError, and OSError where Redis does not answer."""

    async def take(self, wanted: Sequence[Wanted]) -> int | None:
        """Take of one counter after the other; return the place of the first that does not allow it."""

    async def free_at(self, wanted: Wanted) -> float:
        """When this counter may allow more, in Unix seconds."""


class Limits:
    """The three limits of `settings`, each of which may be unset."""

    def __init__(self, counters: Counters, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self._counters = counters
        self._metrics = metrics
        rates: dict[_Name, str] = {
            "key": settings.rate_per_key,
            "rater": settings.rate_per_rater,
            "end_user": settings.rate_per_end_user,
        }
        self._items = {name: parse(text) for name, text in rates.items() if text != "none"}
        self._away_until = 0.0

    async def request(self, caller: Caller) -> None:
        """Count one request: under the caller's key, or with a feedback token under its end user.

        Raises Problem 429. An end user does not use up what the client's own requests may be.
        """
        await self._count(self._request(caller))

    async def events(self, caller: Caller, rater: str, count: int = 1) -> None:
        """Count `count` events that a key gives under the identity `rater`, all or none. Raises Problem 429.

        What a client gives under its own name is limited as its requests are, a token's events as its
        end user's requests.
        """
        await self._count(self._events(caller, rater, count))

    async def request_of_event(self, caller: Caller, rater: str) -> None:
        """Count a request and the one event that it gives, as `request` and `events` do, at once.

        Raises Problem 429; an event of a request that is one too many does not count.
        """
        await self._count(self._request(caller) + self._events(caller, rater, 1))

    def _request(self, caller: Caller) -> list[Wanted]:
        if caller.role == "token":
            return self._wanted("end_user", rater_of(caller), 1)
        return self._wanted("key", caller.key_id, 1)

    def _events(self, caller: Caller, rater: str, count: int) -> list[Wanted]:
        if caller.role == "rater" or (caller.role == "client" and rater != rater_of(caller)):
            return self._wanted("rater", rater, count)
        return []

    def _wanted(self, name: _Name, identity: str, count: int) -> list[Wanted]:
        item = self._items.get(name)
        if item is None:
            return []
        # A digest: names of people stay out of Redis' keys, and so do characters that mean something there.
        return [Wanted(item, name, hashlib.sha256(identity.encode()).hexdigest()[:32], count)]

    async def _count(self, wanted: Sequence[Wanted]) -> None:
        if not wanted or time.monotonic() < self._away_until:
            return
        try:
            place = await self._counters.take(wanted)
            if place is None:
                return
            refused = wanted[place]
            free_at = await self._counters.free_at(refused)
        except (RedisError, OSError) as error:  # OSError: TimeoutError too
            logger.warning("limits are not kept while Redis is away: %s", str(error) or "it does not answer")
            self._away_until = time.monotonic() + _AWAY_SECONDS
            return
        self._metrics.limited.labels(refused.name).inc()
        text = f"{_WHO[refused.name]} may ask {refused.item}"
        raise Problem(429, text, retry_after=max(1, math.ceil(free_at - time.time())))


class RedisCounters:
    """Counters in the Redis of `client`, under keys that begin with `prefix`.

    On a cluster the prefix must have a hash tag (`{…}`), so that they lie together. Requests that come at the
    same time are counted in one command. Its writes stay out of Redis' append-only file and its replicas:
    this Redis flushes every logged write to the disk before it answers, which is for what must last; a count
    of the last minute need not.
    """

    def __init__(self, client: redis.asyncio.Redis, prefix: str) -> None:
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=prefix,
            connection_pool=client.connection_pool,  # type: ignore[arg-type]  # the hint is too narrow
        )
        bridge: Any = storage.bridge
        self._script = _together(_text(bridge.SCRIPT_ACQUIRE_SLIDING_WINDOW))
        bridge.SCRIPT_SLIDING_WINDOW = _NOT_LOGGED + _text(bridge.SCRIPT_SLIDING_WINDOW)
        bridge.register_scripts()
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._client: Any = client
        self._prefix = prefix
        self._grouped = Grouped(self._take_all)

    async def take(self, wanted: Sequence[Wanted]) -> int | None:
        """Take of one counter after the other; return the place of the first that does not allow it."""
        return await self._grouped(wanted)

    async def free_at(self, wanted: Wanted) -> float:
        """When this counter may allow more, in Unix seconds."""
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            stats = await self._limiter.get_window_stats(wanted.item, wanted.name, wanted.digest)
        return stats.reset_time

    async def _take_all(self, requests: Sequence[Sequence[Wanted]]) -> list[int | None]:
        """As `take` of each, in one command."""
        keys: list[str] = []
        arguments: list[str] = []
        for wanted in requests:
            for place, (item, name, digest, amount) in enumerate(wanted):
                keys.append(f"{self._prefix}:{{{item.key_for(name, digest)}}}")  # as the library names it
                arguments.append(f"{place} {item.amount} {item.get_expiry()} {amount}")
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            answer = await self._client.eval(self._script, len(keys), *keys, *arguments)
        passed = iter(_text(answer))
        found = ["".join(next(passed) for _ in wanted).find("0") for wanted in requests]
        return [None if place < 0 else place for place in found]


def _together(script: str) -> str:
    """Make of a script that takes of one counter one that does so for many requests.

    KEYS are the counters; ARGV, for each, its place among those of its request (of which none is taken behind
    one that does not allow it) and the script's own arguments. Answers 1 or 0 for each counter.
    """
    return f"""
{_NOT_LOGGED}
local function take(KEYS, ARGV)
{script}
end
local answer, allowed = {{}}, true
for i, key in ipairs(KEYS) do
  local place, limit, expiry, amount = string.match(ARGV[i], '(%d+) (%d+) (%d+) (%d+)')
  if place == '0' or allowed then
    allowed = take({{key .. '/-1', key}}, {{limit, expiry, amount}})
  end
  answer[i] = allowed and '1' or '0'
end
return table.concat(answer)
"""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
