"""HTTP routes for operators: versions and their moves, replicas, rounds.

They record a wish in the registry and read what became of it; every replica swaps itself (`server.swap`).
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from registry.audit import AuditLog
from registry.evaluations import EvaluationConflict, UnknownEvaluation
from registry.registry import (
    STALE_SECONDS,
    BrokenVersion,
    IllegalTransition,
    Registry,
    Replica,
    UnknownVersion,
    Version,
)
from registry.rounds import Rounds, UnknownRound
from server.answers import (
    Audit,
    Move,
    Moved,
    Replicas,
    RoundDetail,
    RoundList,
    RoundRequest,
    VersionAnswer,
    Versions,
    VersionSummary,
)
from server.body import parse_object
from server.context import CALLER, Caller
from server.errors import Problem
from server.openapi import problems, takes

_Found = TypeVar("_Found")
RoundId = Annotated[int, Path(ge=1, lt=2**31)]


class OperatorRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(
        self,
        *,
        registry: Registry,
        rounds: Rounds,
        audit: AuditLog,
        wait_seconds: float,
        round_report: Callable[[int], str],
        poll_seconds: float = 0.2,
    ) -> None:
        self._registry = registry
        self._rounds = rounds
        self._audit = audit
        self._wait_seconds = wait_seconds
        self._round_report = round_report
        self._poll_seconds = poll_seconds

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/versions", self.versions, methods=["GET"])
        add("/v1/versions/{name}", self.version, methods=["GET"], responses=problems(404))
        move = {"methods": ["POST"], "response_model": Moved, "openapi_extra": takes(Move)}
        # 202 at once; 200, 500 and 504 with `wait`.
        waited = {202: {"model": Moved}} | problems(404, 409, 500, 504)
        add("/v1/versions/{name}/promote", self.promote, responses=waited, **move)
        add("/v1/versions/{name}/reject", self.reject, responses=problems(404, 409), **move)
        add("/v1/rollback", self.rollback, responses=waited, **move)
        add("/v1/replicas", self.replicas, methods=["GET"])
        add("/v1/rounds", self.rounds, methods=["GET"])
        add("/v1/rounds", self.request_round, methods=["POST"], status_code=202)
        add("/v1/rounds/{round_id}", self.round, methods=["GET"], responses=problems(404))
        add(
            "/v1/rounds/{round_id}/report",
            self.round_report,
            methods=["GET"],
            response_class=HTMLResponse,
            responses=problems(404),
        )
        add("/v1/audit", self.audit, methods=["GET"])
        return router

    async def versions(self) -> Versions:
        """All versions, oldest first, and the one that should serve."""
        found = await anyio.to_thread.run_sync(self._registry.versions)
        desired = await anyio.to_thread.run_sync(self._registry.desired)
        return Versions(
            desired=desired.name if desired else None, versions=[_summary(version) for version in found]
        )

    async def version(self, name: str) -> VersionAnswer:
        """One version with its whole manifest."""
        version = await known(self._registry.version, name)
        return VersionAnswer(name=version.name, state=version.state, manifest=version.manifest)

    async def promote(self, name: str, request: Request, wait: bool = False) -> Response:
        """Make a version the one that should serve."""
        await self._move("promote", name, await reason_of(request))
        return await self._moved("promoted", name, wait)

    async def reject(self, name: str, request: Request) -> Response:
        """Rule a version out."""
        await self._move("reject", name, await reason_of(request))
        return JSONResponse({"action": "rejected", "version": name})

    async def rollback(self, request: Request, wait: bool = False) -> Response:
        """Go back to the version that served before."""
        name = await self._move("rollback", "", await reason_of(request))
        return await self._moved("rolled_back", name, wait)

    async def replicas(self) -> Replicas:
        """Return what each replica last said of itself."""
        return Replicas(replicas=await anyio.to_thread.run_sync(self._registry.replicas))

    async def rounds(self) -> RoundList:
        """List the latest rounds, newest first."""
        return RoundList(rounds=await anyio.to_thread.run_sync(self._rounds.list))

    async def request_round(self) -> RoundRequest:
        """Ask for a round now; 202 with its id (that of the one asked for already, if one waits)."""
        request = partial(self._rounds.request, actor(CALLER.get()))
        return RoundRequest(id=await anyio.to_thread.run_sync(request), state="requested")

    async def round(self, round_id: RoundId) -> RoundDetail:
        """One round with the state of its stages, their seconds and results, and its figures."""
        found = await known(self._rounds.get, round_id)
        stages = await anyio.to_thread.run_sync(self._rounds.stages, round_id)
        metrics = await anyio.to_thread.run_sync(self._rounds.metrics, round_id)
        return RoundDetail(
            **asdict(found),
            stages={stage.name: stage.state for stage in stages},
            seconds={stage.name: stage.seconds for stage in stages},
            results={stage.name: stage.result for stage in stages},
            metrics=list(metrics),
        )

    async def round_report(self, round_id: RoundId) -> Response:
        """Return the page about one round, as far as it is."""
        return page(await known(self._round_report, round_id))

    async def audit(
        self,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[float | None, Query(ge=0, allow_inf_nan=False)] = None,
    ) -> Audit:
        """List what operators did or were refused, newest first; `before` (Unix seconds) pages back."""
        found = await anyio.to_thread.run_sync(self._audit.entries, limit, before)
        return Audit(entries=found)

    async def _move(self, action: Literal["promote", "reject", "rollback"], name: str, reason: str) -> str:
        """Carry out what is written down in either case; returns the name of the version that it is about."""
        who = actor(CALLER.get())

        def move() -> str:
            with self._audit.refusals(who, action, name):
                match action:
                    case "promote":
                        self._registry.promote(name, actor=who, reason=reason)
                    case "reject":
                        self._registry.reject(name, actor=who, reason=reason)
                    case "rollback":
                        return self._registry.rollback(actor=who, reason=reason)
            return name

        moved: str = await known(move)
        return moved

    async def _moved(self, action: str, name: str, wait: bool) -> Response:
        """Answer a move: 202 at once, or with `wait` 200 when all live replicas serve `name`."""
        if not wait:
            return JSONResponse({"action": action, "version": name}, 202)
        deadline = time.monotonic() + self._wait_seconds
        while True:
            replicas = await anyio.to_thread.run_sync(self._registry.replicas)
            match progress(replicas, name, now=time.time()):
                case "served":
                    found = [asdict(replica) for replica in replicas]
                    return JSONResponse({"action": action, "version": name, "replicas": found})
                case "failed":
                    reasons = "; ".join(item.detail for item in replicas if item.state == "failed")
                    raise Problem(500, f"{name} was wanted, but a replica could not load it: {reasons}")
            if time.monotonic() > deadline:
                raise Problem(504, f"{name} is wanted, but not all replicas serve it yet")
            await anyio.sleep(self._poll_seconds)


def actor(caller: Caller) -> str:
    """Return who acts, as logs name it: by the id of the key, since anybody may have its name."""
    return f"key {caller.key_id} ({caller.name})"[:200]


def page(html: str) -> Response:
    """Answer with a report."""
    # Responses of models stand in it: escaped, and with nothing that a browser would run or fetch.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return Response(html, media_type="text/html", headers={"Content-Security-Policy": policy})


def progress(replicas: list[Replica], name: str, *, now: float) -> Literal["served", "failed", "pending"]:
    """How far the stable replicas are with serving `name`; those that stopped or fell silent don't count.

    `now` is in Unix seconds.
    """
    live = [
        replica
        for replica in replicas
        if replica.track == "stable" and replica.state != "stopped" and now - replica.seen_at < STALE_SECONDS
    ]
    if any(replica.state == "failed" and replica.desired == name for replica in live):
        return "failed"
    done = [replica.state == "serving" and replica.actual == name for replica in live]
    return "served" if done and all(done) else "pending"


async def known(function: Callable[..., _Found], *arguments: Any) -> _Found:
    """Ask the registry in a thread, speaking of what it refuses over HTTP."""
    try:
        return await anyio.to_thread.run_sync(function, *arguments)
    except (UnknownVersion, UnknownRound, UnknownEvaluation) as error:
        raise Problem(404, str(error)) from error
    except (IllegalTransition, BrokenVersion, EvaluationConflict) as error:
        raise Problem(409, str(error)) from error


async def reason_of(request: Request) -> str:
    """Read the `reason` of a move from its body, which may be left out."""
    raw = await request.body()
    reason = parse_object(raw).get("reason", "") if raw.strip() else ""
    if not isinstance(reason, str) or len(reason) > 1000 or "\0" in reason:
        raise Problem(422, "a text of at most 1000 characters without NUL is expected", param="reason")
    return reason


def _summary(version: Version) -> VersionSummary:
    manifest = version.manifest
    return VersionSummary(
        name=version.name,
        state=version.state,
        kind=manifest.kind,
        parent=manifest.parent,
        round=manifest.round_id,
        created_at=manifest.created_at,
        metrics=manifest.metrics,
        verdict=manifest.verdict,
    )
