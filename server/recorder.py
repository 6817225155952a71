"""Takes finished completions from the engine to the queue without ever making a request wait or fail.

Owns a bounded buffer in memory and the tasks that empty it: into the queue, or while Redis is away into the
spool on disk, and from there into the queue when it is back, also that of a server before this one. What the
bounds drop is counted, logged and told at `/ready`. What is in a record is decided in `server.recording`.
"""

import asyncio
import contextlib
import logging
import sqlite3
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

import anyio.to_thread

from feedback.queue import QueueUnavailable, encoded
from feedback.records import SCHEMA, Completion
from feedback.spool import Spool
from server.metrics import ServerMetrics

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_LOOK_SECONDS = 10.0
"""How often an idle replica looks for what another one, which is gone, has left in the spool."""


class CompletionQueue(Protocol):
    """Where records go: `feedback.queue.FeedbackQueue`."""

    async def record_encoded(self, records: Sequence[bytes], schema: str = SCHEMA) -> None:
        """Queue the records; raises QueueUnavailable to be tried again later."""


class Recorder:
    """A buffer of at most `limit` completions, sent `batch` at a time, in order.

    Once a batch has gone to the spool, everything goes through it until it is empty: so order is kept. If the
    disk fails, completions wait in the buffer, and go to the queue as soon as it takes them.
    """

    def __init__(
        self,
        queue: CompletionQueue,
        spool: Spool,
        metrics: ServerMetrics,
        *,
        limit: int,
        batch: int,
    ) -> None:
        self._queue = queue
        self._spool = spool
        self._metrics = metrics
        self._limit = limit
        self._batch = batch
        self._buffer: deque[bytes] = deque()
        self._arrived = asyncio.Event()
        # Set until the spool was found empty: a server before this one may have left something.
        self._spooling = asyncio.Event()
        self._spooling.set()
        self._saving = asyncio.Lock()
        self._replayed = 0
        self._spooled = 0
        self._dropped = 0

    def record(self, completion: Completion) -> None:
        """Take one completion; returns at once. Called on the event loop's thread."""
        if len(self._buffer) >= self._limit:
            self._drop(1, "full")
            return
        self._buffer.append(encoded(completion))
        self._metrics.waiting.set(len(self._buffer))
        self._arrived.set()

    def lost(self) -> None:
        """Count a completion of which no record could be made."""
        self._drop(1, "error")

    def trouble(self) -> str | None:
        """Say what waits on disk and what was dropped since this server started; None if nothing is."""
        found = []
        if self._spooled:
            found.append(f"{self._spooled} completions wait on disk")
        if self._dropped:
            found.append(f"{self._dropped} completions were dropped")
        return " and ".join(found) or None

    async def run(self) -> None:
        """Send what arrives and what the spool holds, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take())
            group.create_task(self._replay())

    async def flush(self, timeout_seconds: float) -> None:
        """Send or save what is left before the server ends; what can't be is counted as dropped."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._buffer and not self._spooling.is_set():
                    await self._send()
        except (QueueUnavailable, TimeoutError) as error:
            logger.warning("%d completions go to the spool: %s", len(self._buffer), error)
        if self._buffer and not await self._save():
            self._drop(len(self._buffer), "shutdown")

    async def _take(self) -> None:
        """Send what arrives, or save it while the spool is not empty."""
        while True:
            await self._arrived.wait()
            if not self._spooling.is_set():
                try:
                    await self._send()
                    continue
                except QueueUnavailable as error:
                    logger.warning("completions go to the spool: %s", error)
            if not await self._save():
                await asyncio.sleep(_LONGEST_PAUSE_SECONDS)

    async def _replay(self) -> None:
        """Send what the spool holds, as soon as the queue takes it."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                while await self._replay_batch():
                    pause = _FIRST_PAUSE_SECONDS
            except QueueUnavailable:
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
                continue
            except (sqlite3.Error, OSError) as error:
                logger.error("the spool can't be read: %s", error)
                self._spooling.clear()
                await asyncio.sleep(_LONGEST_PAUSE_SECONDS)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._spooling.wait(), _LOOK_SECONDS)

    async def _replay_batch(self) -> bool:
        """Send the oldest of the spool; returns whether there was something. Raises QueueUnavailable."""
        async with self._saving:
            found = await anyio.to_thread.run_sync(self._spool.oldest, self._batch, self._replayed)
            self._note_spooled(await anyio.to_thread.run_sync(self._spool.waiting) if found else 0)
            if not found:
                self._spooling.clear()
                return False
        # What a server before an upgrade left is sent as what it is.
        schema = found[0].schema
        found = list(takewhile(lambda record: record.schema == schema, found))
        await self._queue.record_encoded([record.data for record in found], schema)
        self._metrics.recorded.inc(len(found))
        self._replayed = found[-1].id
        try:
            await anyio.to_thread.run_sync(self._spool.remove, self._replayed)
            self._replayed = 0
        except (sqlite3.Error, OSError) as error:
            logger.error("what was replayed stays in the spool for now: %s", error)
        return True

    async def _save(self) -> bool:
        """Move the buffer to the spool; returns whether the disk took it."""
        async with self._saving:
            batch = list(self._buffer)
            try:
                kept = await anyio.to_thread.run_sync(self._spool.append, batch)
                self._note_spooled(await anyio.to_thread.run_sync(self._spool.waiting))
            except (sqlite3.Error, OSError) as error:
                logger.error("the spool takes nothing, %d completions wait in memory: %s", len(batch), error)
                return False
            self._release(len(batch))
            self._drop(len(batch) - kept, "spool_full")
            self._spooling.set()
        return True

    async def _send(self) -> None:
        """Send one batch. It leaves the buffer only once it is queued, so a failed try loses nothing."""
        batch = [self._buffer[i] for i in range(min(self._batch, len(self._buffer)))]
        await self._queue.record_encoded(batch)
        self._release(len(batch))
        self._metrics.recorded.inc(len(batch))

    def _release(self, count: int) -> None:
        for _ in range(count):
            self._buffer.popleft()
        self._metrics.waiting.set(len(self._buffer))
        if not self._buffer:
            self._arrived.clear()

    def _note_spooled(self, count: int) -> None:
        self._spooled = count
        self._metrics.spooled.set(count)

    def _drop(self, count: int, reason: str) -> None:
        if count:
            if not self._dropped:
                logger.error(
                    "completions are being dropped (%s); see instructloop_completions_dropped", reason
                )
            self._dropped += count
            self._metrics.dropped.labels(reason).inc(count)
