"""HTTP routes for operators to ask for evaluations, see how far they are and what came of them, cancel them.

They write requests down and read; the trainer's process carries them out.
"""

from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter
from pydantic import ValidationError
from starlette.responses import HTMLResponse, Response

from feedback.cases import Cases
from registry.audit import AuditLog
from registry.evaluation_request import EvaluationRequest, UnsuitableRequest, resolve
from registry.evaluations import Evaluation, Evaluations
from registry.registry import Registry
from server.answers import EvaluationCancelled, EvaluationList, EvaluationRequested, Move
from server.body import parse_object
from server.context import CALLER
from server.errors import Problem, invalid_field
from server.openapi import problems, takes
from server.routes_operator import actor, known, page, reason_of

EvaluationId = Annotated[int, PathParameter(ge=1, lt=2**31)]


class EvaluationRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(
        self,
        *,
        evaluations: Evaluations,
        registry: Registry,
        cases: Cases,
        audit: AuditLog,
        data_dir: FilePath,
        report: Callable[[int], str],
    ) -> None:
        self._evaluations = evaluations
        self._registry = registry
        self._cases = cases
        self._audit = audit
        self._data_dir = data_dir
        self._report = report

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/evaluations", self.list, methods=["GET"])
        add(
            "/v1/evaluations",
            self.request,
            methods=["POST"],
            status_code=202,
            openapi_extra=takes(EvaluationRequest, required=True),
        )
        add("/v1/evaluations/{evaluation_id}", self.one, methods=["GET"], responses=problems(404))
        add(
            "/v1/evaluations/{evaluation_id}/report",
            self.report,
            methods=["GET"],
            response_class=HTMLResponse,
            responses=problems(404),
        )
        add(
            "/v1/evaluations/{evaluation_id}/cancel",
            self.cancel,
            methods=["POST"],
            responses=problems(404, 409),
            openapi_extra=takes(Move),
        )
        return router

    async def list(self, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> EvaluationList:
        """List the latest evaluations, newest first."""
        return EvaluationList(evaluations=await anyio.to_thread.run_sync(self._evaluations.list, limit))

    async def request(self, request: Request) -> EvaluationRequested:
        """Ask for an evaluation; 202 with its id. Prompt files lie in the data directory's `prompts`."""
        try:
            wanted = EvaluationRequest.model_validate(parse_object(await request.body()))
        except ValidationError as error:
            raise invalid_field(error.errors(include_url=False)[0]) from None
        who = actor(CALLER.get())

        def ask() -> Evaluation:
            with self._audit.refusals(who, "request_evaluation"):
                found = self._within_prompts(wanted)
                whole = resolve(found, self._registry, self._data_dir, cases=self._cases.list)
                return self._evaluations.request(whole, who)

        try:
            asked = await anyio.to_thread.run_sync(ask)
        except UnsuitableRequest as error:
            raise Problem(422, error.problem, param=error.field) from error
        return EvaluationRequested(id=asked.id, state="requested")

    async def one(self, evaluation_id: EvaluationId) -> Evaluation:
        """Return one evaluation: how far it is, and its result or why it failed."""
        return await known(self._evaluations.get, evaluation_id)

    async def report(self, evaluation_id: EvaluationId) -> Response:
        """Return the page about one evaluation, as far as it is."""
        return page(await known(self._report, evaluation_id))

    async def cancel(self, evaluation_id: EvaluationId, request: Request) -> EvaluationCancelled:
        """End one that waits or runs, which then stops at its next step; 409 if it has ended."""
        who, reason = actor(CALLER.get()), await reason_of(request)

        def cancel() -> Evaluation:
            with self._audit.refusals(who, "cancel_evaluation", f"evaluation {evaluation_id}"):
                return self._evaluations.cancel(evaluation_id, who, reason)

        cancelled = await known(cancel)
        return EvaluationCancelled(id=cancelled.id, state="cancelled")

    def _within_prompts(self, request: EvaluationRequest) -> EvaluationRequest:
        """Look a file up in the one directory that is for them: no other one is to be read for a request."""
        if not request.files:
            return request
        root = (self._data_dir / "prompts").resolve()
        path = (root / request.prompts).resolve()
        if not path.is_relative_to(root):
            raise UnsuitableRequest("prompts", f"a file's name below {root} is expected")
        return request.model_copy(update={"prompts": str(path)})
