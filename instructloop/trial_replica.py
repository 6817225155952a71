"""The second replica that `up` keeps on its machine for as long as a version is on trial.

It owns when that replica starts and stops. Which version it serves it learns from the registry by itself; how
a process is kept alive stands in `processes`.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from instructloop.processes import Child

if TYPE_CHECKING:
    from registry.registry import Registry

NAME = "trial"
LINGER_SECONDS = 120.0
"""How long it stays after a trial: answers that it had begun are given, and the next trial may be near."""

_LOOK_SECONDS = 2.0


class TrialReplica:
    """`make` makes the process anew each time, `say` tells the terminal."""

    def __init__(
        self,
        registry: "Registry",
        make: Callable[[], Child],
        say: Callable[[str], None],
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self._registry = registry
        self._make = make
        self._say = say
        self._linger_seconds = linger_seconds
        self._child: Child | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._wanted_at = 0.0
        self._changing = asyncio.Lock()
        self._ended = False

    async def run(self) -> None:
        """Follow the registry until `end`; a database that is away changes nothing."""
        from sqlalchemy.exc import SQLAlchemyError

        while not self._ended:
            with contextlib.suppress(SQLAlchemyError):
                await self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Start the replica if a version is on trial; stop it when none has been for a while."""
        trial = await asyncio.to_thread(self._registry.trial)
        async with self._changing:
            if trial is not None:
                self._wanted_at = time.monotonic()
            if trial is not None and self._child is None and not self._ended:
                self._say(f"{trial.version} is on trial: starting a replica for it")
                self._child = self._make()
                self._keeping = asyncio.create_task(self._child.keep())
            elif self._child is not None and time.monotonic() > self._wanted_at + self._linger_seconds:
                self._say("no version is on trial any more: stopping its replica")
                await self._stop()

    async def end(self) -> None:
        """Stop the replica, if it runs, and start none any more."""
        self._ended = True
        async with self._changing:
            await self._stop()

    async def _stop(self) -> None:
        if self._child is not None and self._keeping is not None:
            await self._child.stop()
            await self._keeping
        self._child = self._keeping = None
