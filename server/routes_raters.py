"""HTTP routes for operators about raters: who they are, how far they agree, quarantine, gold questions.

They record what an operator decides and show what is known; rounds act on it.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from feedback.rater_records import Gold, RaterConflict, RaterLogEntry, UnknownRater, UnsuitableGold
from feedback.rater_report import agreement_report, raters_report
from feedback.settings import RaterSettings
from feedback.store import Store
from registry.audit import AuditLog
from server.answers import NO_NUL, Reason
from server.body import parse_object
from server.context import CALLER
from server.errors import Problem
from server.openapi import problems, takes
from server.routes_operator import actor

_MOVES = ("quarantine", "confirm", "lift")


class RaterMove(BaseModel):
    """Whom a move is about, and why it is made."""

    rater: str = Field(min_length=1, max_length=500, pattern=NO_NUL)
    reason: Reason = ""


class GoldQuestion(BaseModel):
    """The event whose verdict is right, and why that is known."""

    event_id: str = Field(min_length=1, max_length=500, pattern=NO_NUL)
    reason: Reason = ""


class RaterRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(self, *, store: Store, settings: RaterSettings, audit: AuditLog) -> None:
        self._audit = audit
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
            add(
                f"/v1/raters/{move}",
                partial(self._move, move),
                methods=["POST"],
                responses=problems(404, 409),
                openapi_extra=takes(RaterMove, required=True),
            )
        add("/v1/gold", self.gold, methods=["GET"])
        add(
            "/v1/gold",
            self.add_gold,
            methods=["POST"],
            responses=problems(409),
            openapi_extra=takes(GoldQuestion, required=True),
        )
        add("/v1/gold/{event_id}", self.remove_gold, methods=["DELETE"], responses=problems(404))
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
        who = actor(CALLER.get())

        def act() -> RaterLogEntry:
            # Without the rater's id, which stands in the raters' own log: the audit log forgets nothing.
            with self._audit.refusals(who, f"{move} rater"):
                entry: RaterLogEntry = getattr(self._records, move)(
                    fields["rater"], actor=who, reason=fields["reason"]
                )
            self._audit.append(who, f"{move} rater", f"entry {entry.sequence} of the raters' log")
            return entry

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
        who = actor(CALLER.get())

        def add() -> Gold:
            with self._audit.refusals(who, "add gold", fields["event_id"]):
                found = self._records.add_gold(fields["event_id"], actor=who, reason=fields["reason"])
            self._audit.append(who, "add gold", fields["event_id"], detail=fields["reason"])
            return found

        try:
            return _gold(await anyio.to_thread.run_sync(add))
        except UnsuitableGold as error:
            raise Problem(409, str(error), param="event_id") from error

    async def remove_gold(self, event_id: str) -> dict[str, Any]:
        """Measure nobody by this event any more."""
        who = actor(CALLER.get())

        def remove() -> bool:
            found = self._records.remove_gold(event_id)
            self._audit.append(who, "remove gold", event_id, outcome="done" if found else "refused")
            return found

        if not await anyio.to_thread.run_sync(remove):
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
        if not isinstance(value, str) or not shortest <= len(value) <= longest or "\0" in value:
            message = f"a text of {shortest} to {longest} characters without NUL is expected"
            raise Problem(422, message, param=key)
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
