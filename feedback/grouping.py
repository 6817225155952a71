"""Calls of many tasks made together, as databases commit in groups: one costly call instead of many.

It knows nothing of what is called.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Grouped(Generic[K, V]):
    """Answers single calls by `work`, which answers a list of them in order.

    At most `at_once` calls of `work` are under way, each with up to `limit` arguments; what comes meanwhile
    goes with the next. If `work` raises, so do all calls that it was to answer and all that wait: nobody
    waits longer than once for something that is away. A caller that is cancelled leaves its argument behind;
    it may still be passed to `work`.
    """

    def __init__(
        self, work: Callable[[Sequence[K]], Awaitable[Sequence[V]]], *, limit: int, at_once: int
    ) -> None:
        self._work = work
        self._limit = limit
        self._at_once = at_once
        self._waiting: list[tuple[K, asyncio.Future[V]]] = []
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, argument: K) -> V:
        """Return what `work` answers to `argument`."""
        answer: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._waiting.append((argument, answer))
        if self._running < self._at_once:
            self._running += 1
            task = asyncio.create_task(self._run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await answer

    async def _run(self) -> None:
        try:
            await self._work_off()
        finally:
            # Here and not when the task is done, which is later: who comes in between would wait for nobody.
            self._running -= 1

    async def _work_off(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
            try:
                found = await self._work([argument for argument, _ in group])
                answered = list(zip(group, found, strict=True))
            except Exception as problem:
                failed, self._waiting = group + self._waiting, []
                for _, answer in failed:
                    if not answer.done():
                        answer.set_exception(problem)
                continue
            for (_, answer), value in answered:
                if not answer.done():
                    answer.set_result(value)
