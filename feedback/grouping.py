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

    One call of `work` is under way at a time, with up to `limit` arguments; what comes meanwhile goes with
    the next. If `work` raises, so do all calls that it was to answer and all that wait: nobody waits longer
    than once for something that is away. A caller that is cancelled leaves its argument behind; it may still
    be passed to `work`.
    """

    def __init__(self, work: Callable[[Sequence[K]], Awaitable[Sequence[V]]], *, limit: int = 500) -> None:
        self._work = work
        self._limit = limit
        self._waiting: list[tuple[K, asyncio.Future[V]]] = []
        self._working: asyncio.Task[None] | None = None

    async def __call__(self, argument: K) -> V:
        """Return what `work` answers to `argument`."""
        answer: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._waiting.append((argument, answer))
        if self._working is None:
            self._working = asyncio.create_task(self._work_off())
        return await answer

    async def _work_off(self) -> None:
        try:
            while self._waiting:
                await self._answer_next()
        finally:
            # Here and not when the task is done, which is later: who comes in between would wait for nobody.
            self._working = None

    async def _answer_next(self) -> None:
        group, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
        try:
            found = await self._work([argument for argument, _ in group])
            answered = list(zip(group, found, strict=True))
        except Exception as problem:
            failed, self._waiting = group + self._waiting, []
            for _, answer in failed:
                if not answer.done():
                    answer.set_exception(problem)
            return
        for (_, answer), value in answered:
            if not answer.done():
                answer.set_result(value)
