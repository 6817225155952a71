"""Streams that run while the served weights change, and what became of each.

Owns the small crowd of concurrent streaming clients and the count of failed, cut and divided streams. When
the swap happens is for the round to decide; the crowd just has to be there.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instructloop.demo_client import Server, Stream

STREAM_TOKENS = 400
_RECORD_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Crossing:
    """A stream and the weight versions of its tokens, as `(version, start, end)` spans."""

    stream: Stream
    spans: tuple[tuple[str, int, int], ...]
    recorded: bool

    @property
    def versions(self) -> tuple[str, ...]:
        """The versions that its tokens came from, in order."""
        return tuple(dict.fromkeys(version for version, _, _ in self.spans))

    @property
    def seamless(self) -> bool:
        """Whether the spans attribute each of its tokens to exactly one version."""
        position = 0
        for _, start, end in self.spans:
            if start != position or end <= start:
                return False
            position = end
        return position == self.stream.expected_tokens


class Crowd:
    """`size` clients, each of which streams one answer after the other until the crowd is sent home."""

    def __init__(self, server: Server, texts: Sequence[str], *, size: int) -> None:
        self._server = server
        self._texts = texts
        self._size = size
        self._leaving = asyncio.Event()
        self._tasks: list[asyncio.Task[list[Stream]]] = []

    def start(self) -> None:
        """Let all clients begin; more than once is once."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._client(number)) for number in range(self._size)]

    async def leave(self) -> list[Crossing]:
        """Let each running stream end, start no more, and say where every stream's tokens came from."""
        self._leaving.set()
        streams = [stream for found in await asyncio.gather(*self._tasks) for stream in found]
        return list(await asyncio.gather(*(self._crossing(stream) for stream in streams)))

    def scatter(self) -> None:
        """End all streams at once; for a demo that is broken off."""
        for task in self._tasks:
            task.cancel()

    async def _client(self, number: int) -> list[Stream]:
        streams: list[Stream] = []
        while not self._leaving.is_set():
            text = self._texts[(number + self._size * len(streams)) % len(self._texts)]
            streams.append(await self._server.stream(text, max_tokens=STREAM_TOKENS))
            if streams[-1].error is not None:
                await asyncio.sleep(1)
        return streams

    async def _crossing(self, stream: Stream) -> Crossing:
        """Look the stream up by its id: records reach the store a little after the answer does."""
        if stream.completion_id is None:
            return Crossing(stream, (), recorded=False)
        deadline = asyncio.get_running_loop().time() + _RECORD_SECONDS
        while (record := await self._server.completion(stream.completion_id)) is None:
            if asyncio.get_running_loop().time() > deadline:
                return Crossing(stream, (), recorded=False)
            await asyncio.sleep(1)
        spans = record["choices"][0]["weight_spans"]
        return Crossing(
            stream, tuple((span["version"], span["start"], span["end"]) for span in spans), recorded=True
        )


def summary(crossings: Sequence[Crossing]) -> dict[str, Any]:
    """Return the counts as plain JSON, and each stream that had tokens of more than one version."""
    return {
        "streams": len(crossings),
        "tokens_each": STREAM_TOKENS,
        "failed": sum(crossing.stream.error is not None for crossing in crossings),
        "cut": sum(crossing.stream.cut for crossing in crossings),
        "unrecorded": sum(not crossing.recorded for crossing in crossings),
        "across_the_swap": sum(len(crossing.versions) > 1 for crossing in crossings),
        "every_token_attributed": all(crossing.seamless for crossing in crossings if crossing.recorded),
        "errors": sorted({crossing.stream.error for crossing in crossings if crossing.stream.error}),
        "divided": [
            {"completion_id": crossing.stream.completion_id, "spans": [list(span) for span in crossing.spans]}
            for crossing in crossings
            if len(crossing.versions) > 1
        ],
    }
