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
_NOT_LOGGED = "redis.set_repl(redis.REPL_NONE)\n"

_Wanted = tuple[str, int, int, int]
"""A counter, what it allows in how many seconds, and how much of it is to be taken."""


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
            if await self._limiter.hit(item, name, digest, cost=count):
                return
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                free_at, _ = await self._limiter.get_window_stats(item, name, digest)
        except (RedisError, OSError) as error:  # OSError: TimeoutError too
            logger.warning("limits are not kept while Redis is away: %s", str(error) or "it does not answer")
            self._away_until = time.monotonic() + _AWAY_SECONDS
            return
        self._metrics.limited.labels(name).inc()
        who = {"key": "this key", "rater": "this rater", "end_user": "this end user"}[name]
        raise Problem(429, f"{who} may ask {item}", retry_after=max(1, math.ceil(free_at - time.time())))


class RedisCounters(RedisStorage):
    """Counters in the Redis of `client`, under keys that begin with `prefix`.

    On a cluster the prefix must have a hash tag (`{…}`), so that they lie together. Requests that come at the
    same time are counted in one command. Its writes stay out of Redis' append-only file and its replicas:
    this Redis flushes every logged write to the disk before it answers, which is for what must last; a count
    of the last minute need not.
    """

    def __init__(self, client: redis.asyncio.Redis, prefix: str) -> None:
        super().__init__(
            "async+redis://",
            implementation="redispy",
            key_prefix=prefix,
            connection_pool=client.connection_pool,  # type: ignore[arg-type]  # the hint is too narrow
        )
        self._client: Any = client
        bridge: Any = self.bridge
        self._script = _together(_text(bridge.SCRIPT_ACQUIRE_SLIDING_WINDOW))
        bridge.SCRIPT_SLIDING_WINDOW = _NOT_LOGGED + _text(bridge.SCRIPT_SLIDING_WINDOW)
        bridge.register_scripts()
        self._grouped = Grouped(self._take_all)

    async def acquire_sliding_window_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        """Take `amount` of what the counter `key` still allows, all or none of it.

        `limit` is what it allows in `expiry` seconds. Raises RedisError, and OSError if Redis doesn't answer.
        """
        return await self._grouped((key, limit, expiry, amount))

    async def _take_all(self, wanted: Sequence[_Wanted]) -> list[bool]:
        """Take what each wants: of one counter together, and only if that is too much, each for itself."""
        together = Counter[tuple[str, int, int]]()
        for *counter, amount in wanted:
            together[tuple(counter)] += amount
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            taken = await self._evaluate([(*counter, amount) for counter, amount in together.items()])
            passed = dict(zip(together, taken, strict=True))
            answers = [passed[one[:-1]] for one in wanted]
            alone = [place for place, passes in enumerate(answers) if not passes]
            found = await self._evaluate([wanted[place] for place in alone]) if alone else []
        for place, passes in zip(alone, found, strict=True):
            answers[place] = passes
        return answers

    async def _evaluate(self, wanted: Sequence[_Wanted]) -> list[bool]:
        keys: list[str] = []
        arguments: list[int] = []
        for key, *numbers in wanted:
            current = f"{self.bridge.key_prefix}:{{{key}}}"  # as the library names them
            keys += (f"{current}/-1", current)
            arguments += numbers
        answer = await self._client.eval(self._script, len(keys), *keys, *arguments)
        return [digit == "1" for digit in _text(answer)]


def _together(script: str) -> str:
    """Make of a script on one counter one that runs it on several; it answers a digit for each."""
    return f"""
{_NOT_LOGGED}
local function take(KEYS, ARGV)
{script}
end
local taken = {{}}
for i = 1, #KEYS / 2 do
  local passes = take({{KEYS[2 * i - 1], KEYS[2 * i]}}, {{ARGV[3 * i - 2], ARGV[3 * i - 1], ARGV[3 * i]}})
  table.insert(taken, passes and '1' or '0')
end
return table.concat(taken)
"""


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
