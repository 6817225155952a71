"""HTTP routes for operators about raters: who they are, how far they agree, quarantine, gold questions.

They record what an operator decides and show what is known; rounds act on it.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request

from feedback.rater_records import Gold, RaterConflict, UnknownRater, UnsuitableGold
from feedback.rater_report import agreement_report, raters_report
from feedback.settings import RaterSettings
from feedback.store import Store
from server.context import CALLER
from server.errors import Problem, parse_object

_MOVES = ("quarantine", "confirm", "lift")


class RaterRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(self, *, store: Store, settings: RaterSettings) -> None:
        self._store = store
        self._records = store.raters
        self._settings = settings

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/raters", self.raters, methods=["GET"])
        add("/v1/raters/log", self.log, methods=["GET"])
        add("/v1/raters/agreement", self.agreement, methods=["GET"])
        # A rater's id has slashes in it, so it stands in the body.
        for move in _MOVES:
            add(f"/v1/raters/{move}", partial(self._move, move), methods=["POST"])
        add("/v1/gold", self.gold, methods=["GET"])
        add("/v1/gold", self.add_gold, methods=["POST"])
        add("/v1/gold/{event_id}", self.remove_gold, methods=["DELETE"])
        return router

    async def raters(self, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        """List raters with their state and figures; those that wait for an operator come first."""
        found = await anyio.to_thread.run_sync(self._report)
        return {"total": len(found), "raters": found[:limit]}

    async def log(
        self,
        rater: Annotated[str | None, Query(max_length=500)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> dict[str, Any]:
        """Return what was done about raters, or one rater, and why; oldest first."""
        entries = await anyio.to_thread.run_sync(self._records.log, rater, limit)
        return {"entries": [asdict(entry) for entry in entries]}

    async def agreement(self, days: Annotated[int, Query(ge=1, le=3650)] = 7) -> dict[str, Any]:
        """Tell how far raters agree: on all they judged, by task, and in periods of `days`."""
        return await anyio.to_thread.run_sync(self._agreement, days)

    async def _move(self, move: str, request: Request) -> dict[str, Any]:
        """Put a rater into quarantine, or confirm or lift it."""
        fields = _fields(await request.body(), "rater")
        act = partial(
            getattr(self._records, move), fields["rater"], actor=CALLER.get().name, reason=fields["reason"]
        )
        try:
            entry = await anyio.to_thread.run_sync(act)
        except UnknownRater as error:
            raise Problem(404, str(error), param="rater") from error
        except RaterConflict as error:
            raise Problem(409, str(error)) from error
        return {"rater": entry.rater, "state": entry.state, "reason": entry.reason}

    async def gold(self) -> dict[str, Any]:
        """List the gold questions."""
        return {"gold": [_gold(item) for item in await anyio.to_thread.run_sync(self._records.gold)]}

    async def add_gold(self, request: Request) -> dict[str, Any]:
        """Say that an event's verdict is right."""
        fields = _fields(await request.body(), "event_id")
        add = partial(
            self._records.add_gold, fields["event_id"], actor=CALLER.get().name, reason=fields["reason"]
        )
        try:
            return _gold(await anyio.to_thread.run_sync(add))
        except UnsuitableGold as error:
            raise Problem(409, str(error), param="event_id") from error

    async def remove_gold(self, event_id: str) -> dict[str, Any]:
        """Measure nobody by this event any more."""
        if not await anyio.to_thread.run_sync(self._records.remove_gold, event_id):
            raise Problem(404, f"{event_id} is no gold question")
        return {"removed": event_id}

    def _report(self) -> list[dict[str, Any]]:
        return raters_report(self._records, self._store.head(), self._settings)

    def _agreement(self, days: int) -> dict[str, Any]:
        return agreement_report(self._records, self._store.head(), self._settings, days)


def _fields(raw: bytes, name: str) -> dict[str, str]:
    """Read `name`, which has to be there, and `reason` from a body. Raises Problem 422."""
    given = parse_object(raw)
    fields = {name: given.get(name), "reason": given.get("reason", "")}
    for key, value in fields.items():
        longest, shortest = (1000, 0) if key == "reason" else (500, 1)
        if not isinstance(value, str) or not shortest <= len(value) <= longest:
            raise Problem(422, f"a text of {shortest} to {longest} characters is expected", param=key)
    return {key: str(value) for key, value in fields.items()}


def _gold(item: Gold) -> dict[str, Any]:
    return {
        "event_id": item.event.event_id,
        "rater": item.event.rater,
        "feedback": item.event.feedback.model_dump(mode="json", exclude_none=True),
        "at": item.at,
        "actor": item.actor,
        "reason": item.reason,
    }
