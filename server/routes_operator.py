"""HTTP routes for operators: versions and their moves, replicas, rounds.

They record a wish in the registry and read what became of it; every replica swaps itself (`server.swap`).
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from registry.registry import BrokenVersion, IllegalTransition, Registry, Replica, UnknownVersion, Version
from registry.rounds import Rounds, UnknownRound
from server.context import CALLER
from server.errors import Problem, parse_object

STALE_SECONDS = 30.0
"""A replica that has said nothing for so long is not waited for."""


class OperatorRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(
        self,
        *,
        registry: Registry,
        rounds: Rounds,
        wait_seconds: float,
        round_report: Callable[[int], str],
        poll_seconds: float = 0.2,
    ) -> None:
        self._registry = registry
        self._rounds = rounds
        self._wait_seconds = wait_seconds
        self._round_report = round_report
        self._poll_seconds = poll_seconds

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/versions", self.versions, methods=["GET"])
        add("/v1/versions/{name}", self.version, methods=["GET"])
        add("/v1/versions/{name}/promote", self.promote, methods=["POST"])
        add("/v1/versions/{name}/reject", self.reject, methods=["POST"])
        add("/v1/rollback", self.rollback, methods=["POST"])
        add("/v1/replicas", self.replicas, methods=["GET"])
        add("/v1/rounds", self.rounds, methods=["GET"])
        add("/v1/rounds", self.request_round, methods=["POST"])
        add("/v1/rounds/{round_id}", self.round, methods=["GET"])
        add("/v1/rounds/{round_id}/report", self.round_report, methods=["GET"])
        return router

    async def versions(self) -> dict[str, Any]:
        """All versions, oldest first, and the one that should serve."""
        found = await anyio.to_thread.run_sync(self._registry.versions)
        desired = await anyio.to_thread.run_sync(self._registry.desired)
        return {
            "desired": desired.name if desired else None,
            "versions": [_summary(version) for version in found],
        }

    async def version(self, name: str) -> dict[str, Any]:
        """One version with its whole manifest."""
        version = await _known(self._registry.version, name)
        return {
            "name": version.name,
            "state": version.state,
            "manifest": version.manifest.model_dump(mode="json"),
        }

    async def promote(self, name: str, request: Request, wait: bool = False) -> Response:
        """Make a version the one that should serve."""
        move = partial(self._registry.promote, name, actor=CALLER.get().name, reason=await reason_of(request))
        await _known(move)
        return await self._moved("promoted", name, wait)

    async def reject(self, name: str, request: Request) -> Response:
        """Rule a version out."""
        move = partial(self._registry.reject, name, actor=CALLER.get().name, reason=await reason_of(request))
        await _known(move)
        return JSONResponse({"action": "rejected", "version": name})

    async def rollback(self, request: Request, wait: bool = False) -> Response:
        """Go back to the version that served before."""
        move = partial(self._registry.rollback, actor=CALLER.get().name, reason=await reason_of(request))
        name: str = await _known(move)
        return await self._moved("rolled_back", name, wait)

    async def replicas(self) -> dict[str, Any]:
        """Return what each replica last said of itself."""
        found = await anyio.to_thread.run_sync(self._registry.replicas)
        return {"replicas": [asdict(replica) for replica in found]}

    async def rounds(self) -> dict[str, Any]:
        """List the latest rounds, newest first."""
        return {"rounds": [asdict(item) for item in await anyio.to_thread.run_sync(self._rounds.list)]}

    async def request_round(self) -> Response:
        """Ask for a round now; 202 with its id (that of the one asked for already, if one waits)."""
        request = partial(self._rounds.request, CALLER.get().name)
        return JSONResponse({"id": await anyio.to_thread.run_sync(request), "state": "requested"}, 202)

    async def round(self, round_id: int) -> dict[str, Any]:
        """One round with the state of its stages, their seconds and results, and its figures."""
        found = await _known(self._rounds.get, round_id)
        stages = await anyio.to_thread.run_sync(self._rounds.stages, round_id)
        metrics = await anyio.to_thread.run_sync(self._rounds.metrics, round_id)
        return asdict(found) | {
            "stages": {stage.name: stage.state for stage in stages},
            "seconds": {stage.name: stage.seconds for stage in stages},
            "results": {stage.name: stage.result for stage in stages},
            "metrics": [asdict(metric) for metric in metrics],
        }

    async def round_report(self, round_id: int) -> Response:
        """Return the page about one round, as far as it is."""
        page = await _known(self._round_report, round_id)
        # Responses of models stand in it: escaped, and with nothing that a browser would run or fetch.
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})

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


def progress(replicas: list[Replica], name: str, *, now: float) -> Literal["served", "failed", "pending"]:
    """How far the replicas are with serving `name`; those that stopped or fell silent don't count.

    `now` is in Unix seconds.
    """
    live = [
        replica
        for replica in replicas
        if replica.state != "stopped" and now - replica.seen_at < STALE_SECONDS
    ]
    if any(replica.state == "failed" and replica.desired == name for replica in live):
        return "failed"
    done = [replica.state == "serving" and replica.actual == name for replica in live]
    return "served" if done and all(done) else "pending"


async def _known(function: Callable[..., Any], *arguments: Any) -> Any:
    """Ask the registry in a thread, speaking of what it refuses over HTTP."""
    try:
        return await anyio.to_thread.run_sync(function, *arguments)
    except (UnknownVersion, UnknownRound) as error:
        raise Problem(404, str(error)) from error
    except (IllegalTransition, BrokenVersion) as error:
        raise Problem(409, str(error)) from error


async def reason_of(request: Request) -> str:
    """Read the `reason` of a move from its body, which may be left out."""
    raw = await request.body()
    reason = parse_object(raw).get("reason", "") if raw.strip() else ""
    if not isinstance(reason, str) or len(reason) > 1000:
        raise Problem(422, "a text of at most 1000 characters is expected", param="reason")
    return reason


def _summary(version: Version) -> dict[str, Any]:
    manifest = version.manifest
    return {
        "name": version.name,
        "state": version.state,
        "kind": manifest.kind,
        "parent": manifest.parent,
        "round": manifest.round_id,
        "created_at": manifest.created_at,
        "metrics": manifest.metrics,
        "verdict": manifest.verdict,
    }
