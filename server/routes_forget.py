"""HTTP routes for operators by which a rater or a completion is forgotten.

The database forgets at once; ingest does the rest (queue, files) and a later look tells when it is done.
"""

from collections.abc import Callable
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from feedback.forgetting import Forgettings, NotARater, Subject
from registry.audit import AuditLog
from registry.lineage import Lineage
from registry.registry import Registry
from server.body import parse_object
from server.context import CALLER
from server.errors import Problem
from server.forgotten import describe
from server.openapi import problems, takes
from server.routes_operator import actor

_FIELDS: dict[str, Subject] = {"rater": "rater", "completion_id": "completion"}


class Forget(BaseModel):
    """Whom or what to forget: one of both."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"oneOf": [{"required": ["rater"]}, {"required": ["completion_id"]}]},
    )

    rater: str = Field(default="", min_length=1, max_length=500)
    completion_id: str = Field(default="", min_length=1, max_length=500)


class ForgetRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(
        self, *, forgettings: Forgettings, registry: Registry, lineage: Lineage, audit: AuditLog
    ) -> None:
        self._audit = audit
        self._forgettings = forgettings
        self._registry = registry
        self._lineage = lineage

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add(
            "/v1/forget",
            self.forget,
            methods=["POST"],
            status_code=202,
            responses=problems(404),
            openapi_extra=takes(Forget, required=True),
        )
        add("/v1/forget", self.all, methods=["GET"])
        add("/v1/forget/{forgetting_id}", self.one, methods=["GET"], responses=problems(404))
        return router

    async def forget(self, request: Request) -> Response:
        """Forget a `rater` or a `completion_id`; 202 once the database has erased all of it."""
        kind, id = _subject(parse_object(await request.body()))
        who = actor(CALLER.get())

        def erase() -> Any:
            number = self._forgettings.begin(kind, id, who)
            self._forgettings.erase(number)
            # By number: who was forgotten must not stand in a log that only grows.
            self._audit.append(who, "forget", f"{kind} of forgetting {number}")
            return self._described(number)

        try:
            return JSONResponse(await anyio.to_thread.run_sync(erase), 202)
        except NotARater as error:
            raise Problem(404, str(error), param=kind) from None

    async def all(self) -> dict[str, Any]:
        """List the latest forgettings, newest first."""
        return {"forgettings": await anyio.to_thread.run_sync(self._list)}

    async def one(self, forgetting_id: int) -> Any:
        """Say how far one forgetting is, and what learned from what was forgotten."""
        try:
            return await anyio.to_thread.run_sync(self._described, forgetting_id)
        except KeyError:
            raise Problem(404, f"there is no forgetting {forgetting_id}") from None

    def _list(self) -> list[Any]:
        return [self._described(one.id) for one in self._forgettings.list()]

    def _described(self, id: int) -> Any:
        return describe(self._forgettings, self._registry, self._lineage, id)


def _subject(fields: dict[str, Any]) -> tuple[Subject, str]:
    """Read which one is meant; raises Problem 422."""
    given = [name for name in _FIELDS if name in fields]
    if len(given) != 1 or len(fields) != 1:
        raise Problem(422, "give either rater or completion_id", param=given[0] if given else None)
    value = fields[given[0]]
    if not isinstance(value, str) or not 1 <= len(value) <= 500:
        raise Problem(422, "an id of 1 to 500 characters is expected", param=given[0])
    return _FIELDS[given[0]], value
