"""Takes finished completions from the engine to the queue without ever making a request wait or fail.

Owns a bounded buffer in memory and the one task that empties it. When Redis is away the buffer fills, and
what comes after is dropped and counted. What is in a record is decided in `server.recording`.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from feedback.queue import QueueUnavailable
from feedback.records import Completion
from server.metrics import ServerMetrics

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0


class CompletionQueue(Protocol):
    """Where records go: `feedback.queue.FeedbackQueue`."""

    async def record(self, completions: Sequence[Completion]) -> None:
        """Queue the records; raises QueueUnavailable to be tried again later."""


class Recorder:
    """A buffer of at most `limit` completions, sent `batch` at a time, in order."""

    def __init__(self, queue: CompletionQueue, metrics: ServerMetrics, *, limit: int, batch: int) -> None:
        self._queue = queue
        self._metrics = metrics
        self._limit = limit
        self._batch = batch
        self._buffer: deque[Completion] = deque()
        self._arrived = asyncio.Event()

    def record(self, completion: Completion) -> None:
        """Take one completion; returns at once. Called on the event loop's thread."""
        if len(self._buffer) >= self._limit:
            self._metrics.dropped.labels("full").inc()
            return
        self._buffer.append(completion)
        self._metrics.waiting.set(len(self._buffer))
        self._arrived.set()

    def lost(self) -> None:
        """Count a completion of which no record could be made."""
        self._metrics.dropped.labels("error").inc()

    async def run(self) -> None:
        """Send what arrives, until cancelled."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            await self._arrived.wait()
            try:
                await self._send()
                pause = _FIRST_PAUSE_SECONDS
            except QueueUnavailable as error:
                logger.warning("%d completions wait for the queue: %s", len(self._buffer), error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    async def flush(self, timeout_seconds: float) -> None:
        """Send what is left before the server ends; what can't be sent in time is counted as dropped."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._buffer:
                    await self._send()
        except (QueueUnavailable, TimeoutError):
            logger.error("%d completions were not recorded: the queue is away", len(self._buffer))
            self._metrics.dropped.labels("shutdown").inc(len(self._buffer))

    async def _send(self) -> None:
        """Send one batch. It leaves the buffer only once it is queued, so a failed try loses nothing."""
        batch = [self._buffer[i] for i in range(min(self._batch, len(self._buffer)))]
        await self._queue.record(batch)
        for _ in batch:
            self._buffer.popleft()
        self._metrics.recorded.inc(len(batch))
        self._metrics.waiting.set(len(self._buffer))
        if not self._buffer:
            self._arrived.clear()
