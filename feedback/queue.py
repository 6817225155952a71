"""The Redis stream between those who produce records (asyncio) and ingest, which stores them (blocking).

One stream carries completions and events, so that their order is kept. It owns the promise that an accepted
event is on disk in Redis exactly once; moving it on is `ingest`, remembering it `store`. Every auxiliary key
lies in the stream's hash slot (`{stream}:…`), so that the script also runs on a cluster.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import redis
import redis.asyncio
from redis.exceptions import RedisError

from feedback.events import Event, body_digest
from feedback.records import Completion
from feedback.settings import QueueSettings

# KEYS: stream, receipt, and where the giver sent one the idempotency key.
# ARGV: event id, key id, event as JSON, digest of what was said, lifetime of the idempotency key in seconds.
# The entry comes before any key: if Redis refuses it for lack of memory, nothing claims that it is there.
_SUBMIT = """
if KEYS[3] then
  local seen = redis.call('GET', KEYS[3])
  if seen then
    local same = string.sub(seen, 1, 64) == ARGV[4]
    return {string.sub(seen, 66), same and 'duplicate' or 'conflict'}
  end
end
if redis.call('EXISTS', KEYS[2]) == 1 then
  return {ARGV[1], 'duplicate'}
end
redis.call('XADD', KEYS[1], '*', 'kind', 'event', 'data', ARGV[3], 'event', ARGV[1])
redis.call('SET', KEYS[2], ARGV[2])
if KEYS[3] then
  redis.call('SET', KEYS[3], ARGV[4] .. ':' .. ARGV[1], 'EX', ARGV[5])
end
return {ARGV[1], 'queued'}
"""

# Takes the stream out of the way, with all that is in it, and goes on with an empty one. Ids go on from where
# they were: who took an entry before and acknowledges it now must not hit a new one of the same id.
# KEYS: stream, where to. ARGV: group.
_SET_ASIDE = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 1 end
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('XLEN', KEYS[1]) == 0 then return 0 end
local info, last = redis.call('XINFO', 'STREAM', KEYS[1]), nil
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then last = info[i + 1] end
end
redis.call('RENAME', KEYS[1], KEYS[2])
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], last, 'MKSTREAM')
redis.call('XSETID', KEYS[1], last)
return 1
"""
_PIPELINE = 500
_SAVE_SECONDS = 600.0
_TURN_SECONDS = 10.0
_DURABLE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}


class QueueUnavailable(Exception):  # noqa: N818
    """Redis is away, or its settings can't promise durability; the message says which."""


class IdempotencyConflict(Exception):  # noqa: N818
    """The idempotency key was used for another event."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """An event that is durably queued. `duplicate`: it was already, under this id."""

    event_id: str
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One record as it comes out of the stream.

    `id` is Redis' (`<milliseconds>-<n>`), `kind` is `completion` or `event` (anything else is a dead letter),
    `data` its JSON, `event_id` the receipt that is due once it is stored.
    """

    id: str
    kind: str
    data: bytes
    event_id: str | None = None


class FeedbackQueue:
    """Puts completions and feedback onto the stream. Safe to share between tasks of one event loop."""

    def __init__(self, client: redis.asyncio.Redis, settings: QueueSettings) -> None:
        self._client: Any = client
        self._settings = settings
        self._script: Any = client.register_script(_SUBMIT)
        self._durable_until = 0.0

    async def submit(self, event: Event, idempotency_key: str | None = None) -> Receipt:
        """Queue one event; when it returns, Redis has it on disk.

        A second submit of the same event id, or with the same idempotency key of the same giver (`key_id`),
        adds nothing and names the first event. Raises QueueUnavailable (the event may or may not be queued:
        submit it again) and IdempotencyConflict.
        """
        await self._require_durability()
        keys, arguments = self._call(event, idempotency_key)
        async with self._redis():
            answer = await self._script(keys=keys, args=arguments)
        return _receipt(answer)

    async def submit_batch(self, events: Sequence[Event]) -> list[Receipt]:
        """Queue many events with few round trips; one receipt each, in order.

        Raises QueueUnavailable, after which any of them may be queued: submit them again under the same ids.
        """
        await self._require_durability()
        answers: list[Any] = []
        for start in range(0, len(events), _PIPELINE):
            async with self._redis(), self._client.pipeline(transaction=False) as pipeline:
                for event in events[start : start + _PIPELINE]:
                    keys, arguments = self._call(event, None)
                    await self._script(keys=keys, args=arguments, client=pipeline)
                answers += await pipeline.execute()
        return [_receipt(answer) for answer in answers]

    async def record(self, completions: Sequence[Completion]) -> None:
        """Queue what was generated. Raises QueueUnavailable; recording again is harmless."""
        for start in range(0, len(completions), _PIPELINE):
            async with self._redis(), self._client.pipeline(transaction=False) as pipeline:
                for completion in completions[start : start + _PIPELINE]:
                    data = completion.model_dump_json(exclude_defaults=True).encode()
                    pipeline.xadd(self._settings.stream, {"kind": "completion", "data": data})
                await pipeline.execute()

    async def queued(self, event_id: str) -> str | None:
        """Return the key id of the event's giver while the event waits in the queue, else None."""
        async with self._redis():
            giver = await self._client.get(_receipt_key(self._settings, event_id))
        return None if giver is None else _text(giver)

    async def durability(self) -> str | None:
        """Return None if an acknowledged write survives a crash of Redis, else the reason why it need not."""
        try:
            async with self._redis(), self._client.pipeline(transaction=False) as pipeline:
                pipeline.config_get("append*")
                pipeline.config_get("maxmemory-policy")
                append, policy = await pipeline.execute()
        except QueueUnavailable as problem:
            return str(problem)
        found = {_text(key): _text(value) for key, value in {**append, **policy}.items()}
        for name, wanted in _DURABLE.items():
            if found.get(name) != wanted:
                return f"Redis has {name} {found.get(name, 'unknown')}; feedback needs {name} {wanted}"
        return None

    async def depth(self) -> int:
        """Count the entries that are not stored yet."""
        async with self._redis():
            return int(await self._client.xlen(self._settings.stream))

    def _call(self, event: Event, idempotency_key: str | None) -> tuple[list[str], list[str | int]]:
        keys = [self._settings.stream, _receipt_key(self._settings, event.event_id)]
        if idempotency_key is not None:
            keys.append(_idempotency_key(self._settings, event.key_id, idempotency_key))
        lifetime_seconds = max(1, round(self._settings.idempotency_hours * 3600))
        data = event.model_dump_json()
        return keys, [event.event_id, event.key_id, data, body_digest(event), lifetime_seconds]

    async def _require_durability(self) -> None:
        if time.monotonic() < self._durable_until:
            return
        reason = await self.durability()
        if reason is not None:
            raise QueueUnavailable(reason)
        self._durable_until = time.monotonic() + self._settings.durability_check_seconds

    @asynccontextmanager
    async def _redis(self) -> AsyncIterator[None]:
        """Bound the wait and speak of one failure; a Redis that went away is checked anew when it is back."""
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                yield
        except TimeoutError as problem:
            self._durable_until = 0.0
            raise QueueUnavailable(
                f"Redis did not answer in {self._settings.timeout_seconds:g} s"
            ) from problem
        except (RedisError, OSError) as problem:
            self._durable_until = 0.0
            raise QueueUnavailable(f"Redis: {problem}") from problem


class StreamReader:
    """Takes entries from the stream for one ingest process; gives them up only when told that they are done.

    `consumer` must differ between processes that run at once; a process that comes back under its old name
    finds its own unfinished entries first. The client must not decode responses.
    """

    def __init__(self, client: redis.Redis, settings: QueueSettings, consumer: str) -> None:
        if client.get_encoder().decode_responses:
            raise ValueError(
                "the stream carries bytes: give StreamReader a client with decode_responses=False"
            )
        self._client: Any = client
        self._settings = settings
        self._consumer = consumer
        self._next_claim = 0.0

    def read(self, block_seconds: float) -> list[Entry]:
        """Take own unfinished entries, else those of processes that fell silent, else new ones.

        Waits up to `block_seconds` for new ones; [] if there are none. Raises redis.RedisError and OSError.
        """
        try:
            return self._own() or self._claimed() or self._new(block_seconds)
        except redis.ResponseError as problem:
            if not str(problem).startswith("NOGROUP"):
                raise
        # From the start of the stream: entries may have come before the first ingest process did.
        self._create_group()
        return self._new(block_seconds)

    def done(self, entries: Sequence[Entry]) -> None:
        """Acknowledge and delete stored entries and their receipts, all or nothing."""
        if not entries:
            return
        ids = [entry.id for entry in entries]
        receipts = [_receipt_key(self._settings, entry.event_id) for entry in entries if entry.event_id]
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.xack(self._settings.stream, self._settings.group, *ids)
            pipeline.xdel(self._settings.stream, *ids)
            if receipts:
                pipeline.delete(*receipts)
            pipeline.execute()

    def _own(self) -> list[Entry]:
        return self._group_read("0", None)

    def _new(self, block_seconds: float) -> list[Entry]:
        block_ms = int(block_seconds * 1000)
        limit_seconds = self._client.get_connection_kwargs().get("socket_timeout")
        if limit_seconds is not None:
            # Redis must answer before the socket gives up on it.
            block_ms = min(block_ms, int(limit_seconds * 500))
        return self._group_read(">", block_ms if block_ms > 0 else None)

    def _claimed(self) -> list[Entry]:
        """Take over what another consumer took and then said nothing about for `claim_after_seconds`."""
        if time.monotonic() < self._next_claim:
            return []
        answer = self._client.xautoclaim(
            self._settings.stream,
            self._settings.group,
            self._consumer,
            min_idle_time=int(self._settings.claim_after_seconds * 1000),
            count=self._settings.batch,
        )
        entries = self._entries(answer[1])
        if not entries:
            # Nobody is silent now: look again when someone may have become so.
            self._next_claim = time.monotonic() + self._settings.claim_after_seconds / 2
        return entries

    def _group_read(self, start: str, block_ms: int | None) -> list[Entry]:
        answer = self._client.xreadgroup(
            self._settings.group,
            self._consumer,
            {self._settings.stream: start},
            count=self._settings.batch,
            block=block_ms,
        )
        if not answer:
            return []
        streams = next(iter(answer.values())) if isinstance(answer, Mapping) else answer[0][1]
        return self._entries(streams)

    def _entries(self, raw: Any) -> list[Entry]:
        """Turn Redis' answer into entries; what was deleted by hand comes empty and is acknowledged."""
        gone = [id for id, fields in raw if not fields]
        if gone:
            self._client.xack(self._settings.stream, self._settings.group, *gone)
        return [_entry(id, fields) for id, fields in raw if fields]

    def _create_group(self) -> None:
        try:
            self._client.xgroup_create(self._settings.stream, self._settings.group, id="0", mkstream=True)
        except redis.ResponseError as problem:
            if not str(problem).startswith("BUSYGROUP"):  # another process was quicker
                raise


class QueueCleaning:
    """Gets what was forgotten out of Redis, its files too. The client must not decode responses.

    `store` takes entries into the store, which leaves out what was forgotten; `forgotten` returns those of
    some event ids whose events were. Killed anywhere, all of it can be done again.
    """

    def __init__(
        self,
        client: redis.Redis,
        settings: QueueSettings,
        store: Callable[[Sequence[Entry]], object],
        forgotten: Callable[[Sequence[str]], set[str]],
    ) -> None:
        self._client: Any = client
        self._settings = settings
        self._store = store
        self._forgotten = forgotten
        self._aside = f"{{{settings.stream}}}:aside"
        self._turn = self._client.lock(f"{{{settings.stream}}}:cleaning", timeout=_TURN_SECONDS)

    def run(self) -> None:
        """Clean stream, receipts, idempotency keys and files; raises redis.RedisError and OSError.

        Waits for another process that is at it; for one that was killed, ten seconds.

        Deleting an entry only marks it where its neighbours in Redis' memory stay, and a snapshot then still
        has its text. So the stream is set aside as a whole, emptied into the store and deleted.
        """
        with self._turn:
            self._empty()  # what one that was killed had set aside
            if self._client.eval(_SET_ASIDE, 2, self._settings.stream, self._aside, self._settings.group):
                self._empty()
            self._delete_idempotency_keys()
            self._rewrite_files()

    def _empty(self) -> None:
        while raw := self._client.xrange(self._aside, count=self._settings.batch):
            entries = [_entry(id, fields) for id, fields in raw]
            self._store(entries)
            self._turn.reacquire()
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.xdel(self._aside, *(entry.id for entry in entries))
                for entry in entries:
                    if entry.event_id is not None:
                        pipeline.delete(_receipt_key(self._settings, entry.event_id))
                pipeline.execute()
        self._client.delete(self._aside)

    def _delete_idempotency_keys(self) -> None:
        literal = re.sub(r"([*?\[\]^\\-])", r"\\\1", self._settings.stream)
        pattern = f"{{{literal}}}:idempotency:*"
        keys = list(self._client.scan_iter(match=pattern, count=_PIPELINE))
        for start in range(0, len(keys), _PIPELINE):
            chunk = keys[start : start + _PIPELINE]
            # What was said as a digest of 64 digits, a colon, the event's id.
            ids = {
                key: _text(value)[65:]
                for key, value in zip(chunk, self._client.mget(chunk), strict=True)
                if value
            }
            gone = self._forgotten(sorted(ids.values()))
            if found := [key for key, event_id in ids.items() if event_id in gone]:
                self._client.delete(*found)

    def _rewrite_files(self) -> None:
        """Write the log of commands anew, and the snapshot where Redis is set up to make some."""
        snapshots = [_text(value) for value in self._client.config_get("save").values()]
        self._save("bgrewriteaof", "aof_last_bgrewrite_status")
        if any(snapshots):
            self._save("bgsave", "rdb_last_bgsave_status")

    def _save(self, command: str, status: str) -> None:
        deadline = time.monotonic() + _SAVE_SECONDS
        self._wait_until_saved(deadline)  # one that runs began before
        getattr(self._client, command)()
        if self._wait_until_saved(deadline).get(status) != "ok":
            raise redis.RedisError(f"{command.upper()} failed: see Redis' own log")

    def _wait_until_saved(self, deadline: float) -> Mapping[str, Any]:
        names = ("aof_rewrite_in_progress", "aof_rewrite_scheduled", "rdb_bgsave_in_progress")
        while True:
            found: Mapping[str, Any] = self._client.info("persistence")
            if not any(found.get(name) for name in names):
                return found
            if time.monotonic() > deadline:
                raise redis.RedisError(f"Redis has been writing its files for {_SAVE_SECONDS:g} s")
            self._turn.reacquire()
            time.sleep(0.05)


def _entry(id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    event_id = fields.get(b"event")
    return Entry(
        id=_text(id),
        kind=_text(fields.get(b"kind", b"")),
        data=fields[b"data"] if b"data" in fields else repr(dict(fields)).encode(),
        event_id=None if event_id is None else _text(event_id),
    )


def _receipt(answer: Sequence[str | bytes]) -> Receipt:
    event_id, outcome = map(_text, answer)
    if outcome == "conflict":
        raise IdempotencyConflict(f"the idempotency key was used for another event, {event_id}")
    return Receipt(event_id=event_id, duplicate=outcome == "duplicate")


def _receipt_key(settings: QueueSettings, event_id: str) -> str:
    return f"{{{settings.stream}}}:receipt:{event_id}"


def _idempotency_key(settings: QueueSettings, key_id: str, idempotency_key: str) -> str:
    digest = hashlib.sha256(f"{key_id}\0{idempotency_key}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{{{settings.stream}}}:idempotency:{digest}"


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
