"""HTTP routes for operators: from a version to the events behind it, and from an event to its versions.

What the lineage is, is `registry.lineage`'s.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query

from feedback.store import Store
from registry.lineage import Lineage, UsedEvent
from registry.registry import Registry, UnknownVersion
from registry.rounds import Use
from server.errors import Problem
from server.openapi import problems


class LineageRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(self, *, lineage: Lineage, registry: Registry, store: Store) -> None:
        self._lineage = lineage
        self._registry = registry
        self._store = store

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/versions/{name}/lineage", self.version, methods=["GET"], responses=problems(404))
        add("/v1/feedback/{event_id}/lineage", self.event, methods=["GET"], responses=problems(404))
        return router

    async def version(
        self,
        name: str,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
        after: Annotated[str | None, Query(pattern=r"^\d{1,9}:[^\x00]+$")] = None,
        round: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
        use: Use | None = None,
    ) -> dict[str, Any]:
        """Return the rounds behind a version and a page of their events; `next` is the next page's `after`.

        `round` and `use` leave out the events of others. Later pages come without the rounds.
        """
        work = partial(self._version, name, limit, after, round, use)
        return await anyio.to_thread.run_sync(work)

    async def event(self, event_id: str) -> dict[str, Any]:
        """Return what rounds did with an event, and every version that learned from it."""
        return await anyio.to_thread.run_sync(self._event, event_id)

    def _version(
        self, name: str, limit: int, after: str | None, round_id: int | None, use: Use | None
    ) -> dict[str, Any]:
        states = self._registry.states()
        if name not in states:
            raise Problem(404, str(UnknownVersion(f"there is no version {name}")))
        behind = self._lineage.behind(name, counted=after is None)
        numbers = [found.round_id for found in behind if round_id in (None, found.round_id)]
        if round_id is not None and not numbers:
            raise Problem(404, f"round {round_id} is not behind {name}", param="round")
        start = None if after is None else _position(after, numbers)
        events = self._lineage.events(numbers, limit=limit, after=start, use=use)
        answer: dict[str, Any] = {"version": name, "state": states[name]}
        if after is None:
            answer["rounds"] = [
                asdict(found) | {"state": states.get(found.version or "")} for found in behind
            ]
        return answer | {
            "events": [asdict(event) for event in events],
            "next": _after(events[-1]) if len(events) == limit else None,
        }

    def _event(self, event_id: str) -> dict[str, Any]:
        uses = self._lineage.uses(event_id)
        if not uses and self._store.event(event_id) is None:
            raise Problem(404, f"no such event: {event_id}, or it is not stored yet")
        states = self._registry.states()
        versions = self._lineage.learned(event_id)
        return {
            "event_id": event_id,
            "rounds": [asdict(use) for use in uses],
            "versions": [{"version": name, "state": states.get(name)} for name in versions],
        }


def _after(event: UsedEvent) -> str:
    return f"{event.round_id}:{event.event_id}"


def _position(after: str, rounds: list[int]) -> tuple[int, str]:
    """Read a page's `after`. Raises Problem 404."""
    number, _, event_id = after.partition(":")
    if not number.isdecimal() or int(number) not in rounds:
        raise Problem(404, "the `next` of the page before is expected", param="after")
    return int(number), event_id
