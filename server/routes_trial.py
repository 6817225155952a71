"""HTTP routes for operators about the trial: canary, shadow, withdraw, and how it does.

They record what an operator decides and show what the rule makes of it; replicas follow the registry, and the
rule acts beside ingest.
"""

from collections.abc import Callable
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request

from registry.audit import AuditLog
from registry.registry import Registry
from registry.states import Mode
from server.answers import Move, Moved, TrialAnswer, Try
from server.body import parse_object
from server.context import CALLER
from server.errors import Problem
from server.openapi import problems, takes
from server.routes_operator import actor, known, reason_of


class TrialRoutes:
    """The handlers and what they work on; `router()` binds them to their paths.

    `report` tells of the trial as plain JSON; it may block, on the database.
    """

    def __init__(self, *, registry: Registry, audit: AuditLog, report: Callable[[], dict[str, Any]]) -> None:
        self._registry = registry
        self._audit = audit
        self._report = report

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        body = takes(Try, required=True)
        for path, handler in (("canary", self.canary), ("shadow", self.shadow)):
            add(
                f"/v1/versions/{{name}}/{path}",
                handler,
                methods=["POST"],
                response_model=Moved,
                responses=problems(404, 409),
                openapi_extra=body,
            )
        add(
            "/v1/withdraw",
            self.withdraw,
            methods=["POST"],
            responses=problems(409),
            openapi_extra=takes(Move),
        )
        add("/v1/trial", self.trial, methods=["GET"])
        return router

    async def canary(self, name: str, request: Request) -> Moved:
        """Let a version answer a share of the end users beside the one that serves."""
        return await self._try("canary", name, request)

    async def shadow(self, name: str, request: Request) -> Moved:
        """Let a version answer copies of a share of the requests, which nobody sees."""
        return await self._try("shadow", name, request)

    async def withdraw(self, request: Request) -> Moved:
        """End the trial; its version is again what it was before."""
        who, reason = actor(CALLER.get()), await reason_of(request)

        def act() -> str:
            with self._audit.refusals(who, "withdraw"):
                return self._registry.withdraw(actor=who, reason=reason)

        return Moved(action="withdrawn", version=await known(act))

    async def trial(self) -> TrialAnswer:
        """Tell what is on trial, the votes on both versions, and what the rule makes of them."""
        return TrialAnswer.model_validate(await anyio.to_thread.run_sync(self._report))

    async def _try(self, mode: Mode, name: str, request: Request) -> Moved:
        who, reason, share = actor(CALLER.get()), await reason_of(request), _share(await request.body())

        def act() -> None:
            with self._audit.refusals(who, mode, name):
                match mode:
                    case "canary":
                        self._registry.canary(name, share, actor=who, reason=reason)
                    case "shadow":
                        self._registry.shadow(name, share, actor=who, reason=reason)

        await known(act)
        return Moved(action=mode, version=name)


def _share(raw: bytes) -> float:
    """Read the `share` of a trial from its body. Raises Problem 422."""
    share = parse_object(raw).get("share")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise Problem(422, "a number above 0 and at most 1 is expected", param="share")
    return float(share)
