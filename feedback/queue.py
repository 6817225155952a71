"""The Redis stream between those who produce records (asyncio) and ingest, which stores them (blocking).

One stream carries completions and events, so that their order is kept. It owns the promise that an accepted
event is on disk in Redis exactly once, and has reached as many replicas as `wait_replicas` says; moving it on
is `ingest`, remembering it `store`. Every auxiliary key lies in the stream's hash slot (`{stream}:…`), so
that the script also runs on a cluster.

What was not acknowledged may be there all the same: Redis may have been cut off, or too few replicas reached,
after it was written. The same event id, or the same idempotency key, then finds it and adds nothing. If not
even Redis remembers it (a replica took over), the store knows it by the event id, which an idempotency key
and what was said decide alone.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import redis
import redis.asyncio
from pydantic_core import PydanticSerializationError
from redis.exceptions import RedisError

from feedback.events import Event
from feedback.grouping import Grouped
from feedback.records import SCHEMA, Completion
from feedback.settings import QueueSettings
from feedback.submission import (
    SUBMIT,
    Receipt,
    Submission,
    arguments_of,
    divided,
    receipt_key,
    receipts_of,
    submission,
)

# Forgets consumers that hold no entry and whose process is long gone: each process has a name of its own. A
# live one that were meant by mistake would be made anew when it next reads.
# KEYS: stream. ARGV: group, silence in milliseconds.
_FORGET_CONSUMERS = """
for _, found in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #found, 2 do consumer[found[i]] = found[i + 1] end
  if consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer['name'])
  end
end
"""
_FORGET_CONSUMERS_AFTER_SECONDS = 24 * 3600

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
_DURABLE = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "maxmemory-policy": "noeviction",
}


class QueueUnavailable(Exception):  # noqa: N818
    """Redis is away, or its settings can't promise durability; the message says which."""


class IdempotencyConflict(Exception):  # noqa: N818
    """The idempotency key was used for another event."""

    def __init__(self, event_id: str) -> None:
        super().__init__(f"the idempotency key was used for another event, {event_id}")


class Entry(NamedTuple):
    """One record as it comes out of the stream.

    `id` is Redis' (`<milliseconds>-<n>`), `kind` is `completion` or `event` (anything else is a dead letter),
    `data` its JSON in version `schema`, `event_id` the receipt that is due once it is stored, `key_id` whose.
    """

    id: str
    kind: str
    data: bytes
    event_id: str | None = None
    key_id: str | None = None
    schema: str = SCHEMA


class FeedbackQueue:
    """Puts completions and feedback onto the stream. Safe to share between tasks of one event loop.

    Tasks that submit at the same time share round trips: what comes while Redis writes one batch to its disk
    goes with the next.
    """

    def __init__(self, client: redis.asyncio.Redis, settings: QueueSettings) -> None:
        self._client: Any = client
        self._settings = settings
        self._durable_until = 0.0
        self._check: asyncio.Task[str | None] | None = None
        self._grouped = Grouped(self._submit_all, limit=_PIPELINE)

    async def submit(self, event: Event, idempotency_key: str | None = None) -> Receipt:
        """Queue one event; when it returns, Redis has it on disk.

        A second submit of the same event id, or with the same idempotency key of the same giver (`key_id`),
        adds nothing and names the first event. With a key the event's id is made from it and from what was
        said. Raises QueueUnavailable (the event may or may not be queued: submit it again),
        IdempotencyConflict and EntryTooLarge.
        """
        given = submission(self._settings, event, idempotency_key)
        await self._require_durability()
        receipt = await self._grouped(given)
        if receipt.conflict:
            raise IdempotencyConflict(receipt.event_id)
        return receipt

    async def submit_batch(
        self, events: Sequence[Event], idempotency_keys: Sequence[str | None] | None = None
    ) -> list[Receipt]:
        """Queue many events with few round trips; one receipt each, in order.

        `idempotency_keys` has one for each event, or None where its giver sent none; a key that was used for
        another event, also earlier in this batch, is a receipt of a conflict.
        Raises QueueUnavailable, after which any of them may be queued: submit them again under the same ids
        or keys. Raises EntryTooLarge, after which none is.
        """
        await self._require_durability()
        named = [None] * len(events) if idempotency_keys is None else idempotency_keys
        given = [submission(self._settings, event, key) for event, key in zip(events, named, strict=True)]
        receipts: list[Receipt] = []
        for start in range(0, len(given), _PIPELINE):
            receipts += await self._submit_all(given[start : start + _PIPELINE])
        return receipts

    async def record(self, completions: Sequence[Completion]) -> None:
        """Queue what was generated. Raises QueueUnavailable; recording again is harmless."""
        await self.record_encoded([encoded(completion) for completion in completions])

    async def record_encoded(self, records: Sequence[bytes], schema: str = SCHEMA) -> None:
        """As `record`, of completions that `encoded` has made bytes of, maybe under an older `schema`."""
        for start in range(0, len(records), _PIPELINE):
            async with self._pipeline() as pipeline:
                for data in records[start : start + _PIPELINE]:
                    fields = {"kind": "completion", "data": data, "schema": schema}
                    pipeline.xadd(self._settings.stream, fields)
                await self._execute(pipeline)

    async def queued(self, event_id: str) -> str | None:
        """Return the key id of the event's giver while the event waits in the queue, else None."""
        async with self._redis():
            giver = await self._client.get(receipt_key(self._settings, event_id))
        return None if giver is None else _text(giver)

    async def durability(self) -> str | None:
        """Return None if an acknowledged write survives a crash of Redis, else the reason why it need not."""
        try:
            async with self._pipeline() as pipeline:
                pipeline.config_get("*append*")
                pipeline.config_get("maxmemory-policy")
                append, policy = await pipeline.execute()
                needed = self._settings.wait_replicas
                online = _online(await self._client.info("replication")) if needed else 0
        except QueueUnavailable as problem:
            return str(problem)
        found = {_text(key): _text(value) for key, value in {**append, **policy}.items()}
        for name, wanted in _DURABLE.items():
            if found.get(name) != wanted:
                return f"Redis has {name} {found.get(name, 'unknown')}; feedback needs {name} {wanted}"
        if online < needed:
            return f"Redis has {online} of the {needed} replicas that must have feedback"
        return None

    async def depth(self) -> int:
        """Count the entries that are not stored yet."""
        async with self._redis():
            return int(await self._client.xlen(self._settings.stream))

    async def _submit_all(self, given: Sequence[Submission]) -> list[Receipt]:
        if not given:
            return []
        commands = divided(given)
        async with self._pipeline() as pipeline:
            for command in commands:
                # The whole text, not its digest: a Redis that was restarted would not know the digest.
                pipeline.eval(SUBMIT, *arguments_of(self._settings, command))
            answers = await self._execute(pipeline)
        return [
            receipt
            for command, (letters, *earlier) in zip(commands, answers, strict=True)
            for receipt in receipts_of(command, _text(letters), map(_text, earlier))
        ]

    async def _execute(self, pipeline: Any) -> list[Any]:
        """Send a pipeline of writes; returns their answers once as many replicas have them as must."""
        needed = self._settings.wait_replicas
        if needed == 0:
            return list(await pipeline.execute())
        # Half of the time that the whole may take, so that Redis answers before it is given up.
        pipeline.wait(needed, int(self._settings.timeout_seconds * 500))
        answers = list(await pipeline.execute())
        reached = answers.pop()
        if reached < needed:
            self._durable_until = 0.0
            raise QueueUnavailable(f"{reached} of {needed} Redis replicas have it in time")
        return answers

    async def _require_durability(self) -> None:
        """Check Redis' settings unless it was done lately; tasks that come meanwhile share one check."""
        if time.monotonic() < self._durable_until:
            return
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._checked())
        reason = await asyncio.shield(self._check)
        if reason is not None:
            raise QueueUnavailable(reason)

    async def _checked(self) -> str | None:
        reason = await self.durability()
        if reason is None:
            self._durable_until = time.monotonic() + self._settings.durability_check_seconds
        return reason

    @asynccontextmanager
    async def _pipeline(self) -> AsyncIterator[Any]:
        async with self._redis(), self._client.pipeline(transaction=False) as pipeline:
            yield pipeline

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
        receipts = [receipt_key(self._settings, entry.event_id) for entry in entries if entry.event_id]
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
            stream, group = self._settings.stream, self._settings.group
            self._client.eval(_FORGET_CONSUMERS, 1, stream, group, 1000 * _FORGET_CONSUMERS_AFTER_SECONDS)
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
                        pipeline.delete(receipt_key(self._settings, entry.event_id))
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


def encoded(completion: Completion) -> bytes:
    """Make the bytes that the stream carries of a completion.

    What no text may hold (half of a surrogate pair) becomes `?`.
    """
    try:
        return completion.model_dump_json(exclude_defaults=True).encode()
    except PydanticSerializationError:
        text = json.dumps(completion.model_dump(exclude_defaults=True), ensure_ascii=False)
        return text.encode("utf-8", "replace")


def _online(replication: Mapping[str, Any]) -> int:
    """Count the replicas that Redis' INFO lists as online."""
    found = [replication.get(f"slave{i}") for i in range(int(replication.get("connected_slaves", 0)))]
    return sum(isinstance(item, Mapping) and item.get("state") == "online" for item in found)


def _entry(id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    event_id, key_id, schema = fields.get(b"event"), fields.get(b"key"), fields.get(b"schema")
    data = fields.get(b"data")
    return Entry(
        id.decode(),
        _text(fields.get(b"kind", b"")),
        repr(dict(fields)).encode() if data is None else data,
        None if event_id is None else _text(event_id),
        None if key_id is None else _text(key_id),
        SCHEMA if schema is None else _text(schema),
    )


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
