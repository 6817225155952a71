"""HTTP routes that say how this replica is: `/health`, `/ready`, `/metrics`."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import anyio.to_thread
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from server.answers import Health, Ready
from server.errors import Problem
from server.metrics import ServerMetrics
from server.openapi import problems


class Durability(Protocol):
    """The part of `feedback.queue.FeedbackQueue` that says whether feedback can be taken."""

    async def durability(self) -> str | None: ...  # noqa: D102


class StateRoutes:
    """`dead` tells whether the engine ended, `obstacle` why it may not generate, `serving` its version.

    `recording` says what became of completions that did not go straight to the queue, or None.
    """

    def __init__(
        self,
        *,
        queue: Durability,
        metrics: ServerMetrics,
        dead: Callable[[], bool],
        obstacle: Callable[[], str | None],
        serving: Callable[[], str],
        recording: Callable[[], str | None],
    ) -> None:
        self._queue = queue
        self._metrics = metrics
        self._dead = dead
        self._obstacle = obstacle
        self._serving = serving
        self._recording = recording

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/health", self.health, methods=["GET"], responses=problems(503))
        add("/ready", self.ready, methods=["GET"], response_model=Ready, responses={503: {"model": Ready}})
        text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
        add("/metrics", self.metrics, methods=["GET"], response_class=Response, responses={200: text})
        return router

    async def health(self) -> Health:
        """200 while the engine lives."""
        if self._dead():
            raise Problem(503, "the engine has ended")
        return Health(status="alive")

    async def ready(self) -> Response:
        """200 when this replica can generate and take feedback, else 503 with what is wrong."""
        try:
            feedback = await asyncio.wait_for(self._queue.durability(), timeout=3)
        except TimeoutError:
            feedback = "Redis does not answer"
        generation = "the engine has ended" if self._dead() else self._obstacle()
        body: dict[str, Any] = {
            "ready": feedback is None and generation is None,
            "version": self._serving(),
            "generation": generation or "ok",
            "feedback": feedback or "ok",
            "recording": self._recording() or "ok",
        }
        return JSONResponse(body, 200 if body["ready"] else 503)

    async def metrics(self) -> Response:
        """All figures, vLLM's too, in Prometheus' text format."""
        text = await anyio.to_thread.run_sync(generate_latest, self._metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)
