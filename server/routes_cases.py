"""HTTP routes for operators about cases: add, list, look at and remove them.

What a case is, is `feedback.cases`'; whether it makes sense is decided by what is handed in.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import ValidationError

from feedback.cases import Case, CaseQueue, CaseResult, Cases, UnknownCase, Validate, send
from feedback.new_case import BadCase, NewCase, UnknownOrigin
from feedback.queue import QueueUnavailable
from feedback.store import Store
from registry.audit import AuditLog
from registry.lineage import Lineage
from server.answers import CaseAnswer, CaseList, CaseRemoved, CaseResultAnswer, TaughtAnswer
from server.body import parse_object
from server.context import CALLER
from server.errors import Problem, invalid_field
from server.openapi import problems, takes
from server.routes_feedback import RETRY_AFTER_SECONDS
from server.routes_operator import actor
from server.taught import taught


class CaseRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(
        self,
        *,
        cases: Cases,
        queue: CaseQueue,
        store: Store,
        lineage: Lineage,
        audit: AuditLog,
        validate: Validate,
    ) -> None:
        self._cases = cases
        self._queue = queue
        self._store = store
        self._lineage = lineage
        self._audit = audit
        self._validate = validate

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/cases", self.cases, methods=["GET"])
        add(
            "/v1/cases",
            self.add,
            methods=["POST"],
            status_code=201,
            responses=problems(404),
            openapi_extra=takes(NewCase, required=True),
        )
        add("/v1/cases/{case_id}", self.case, methods=["GET"], responses=problems(404))
        add("/v1/cases/{case_id}", self.remove, methods=["DELETE"], responses=problems(404))
        return router

    async def cases(self, removed: bool = False) -> CaseList:
        """List the cases that candidates are tried on, oldest first; `removed` lists the others too."""
        return await anyio.to_thread.run_sync(self._list, removed)

    async def add(self, request: Request) -> CaseAnswer:
        """Add a case, and with `train` send it as feedback; the same once more is the same case."""
        who = actor(CALLER.get())
        try:
            new = NewCase.model_validate(parse_object(await request.body()))
        except ValidationError as error:
            raise invalid_field(error.errors()[0]) from None

        def add() -> Case:
            with self._audit.refusals(who, "add case"):
                case = self._cases.add(new, actor=who, validate=self._validate)
                if new.train:
                    case = self._cases.begin_training(case.id)
            self._audit.append(who, "add case", case.id)
            return case

        try:
            case = await anyio.to_thread.run_sync(add)
        except BadCase as error:
            status = 404 if isinstance(error, UnknownOrigin) else 422
            raise Problem(status, error.reason, param=error.field) from None
        if new.train:
            try:
                await send(self._queue, case)
            except QueueUnavailable as error:
                raise Problem(
                    503,
                    f"{case.id} is kept, but feedback can't be taken now; the same request sends it: {error}",
                    retry_after=RETRY_AFTER_SECONDS,
                ) from error
        return await anyio.to_thread.run_sync(self._answer, case)

    async def case(self, case_id: str) -> CaseAnswer:
        """One case with what every candidate since answered to it, and what learned from it."""
        return await anyio.to_thread.run_sync(self._known, case_id)

    async def remove(self, case_id: str) -> CaseRemoved:
        """Try no candidate on it any more; says what has learned from it, which stays so."""
        who = actor(CALLER.get())

        def remove() -> CaseRemoved:
            with self._audit.refusals(who, "remove case", case_id):
                case = self._cases.remove(case_id, actor=who)
            self._audit.append(who, "remove case", case_id)
            return CaseRemoved(removed=case_id, taught=self._taught(case))

        try:
            return await anyio.to_thread.run_sync(remove)
        except UnknownCase as error:
            raise Problem(404, str(error)) from None

    def _list(self, removed: bool) -> CaseList:
        found: dict[str, list[CaseResult]] = {}
        for result in self._cases.results():
            found.setdefault(result.case_id, []).append(result)
        cases = self._cases.list(removed=removed)
        # Of each only its last result: the others are told one by one.
        return CaseList(cases=[_answer(case, found.get(case.id, [])[-1:], []) for case in cases])

    def _known(self, case_id: str) -> CaseAnswer:
        try:
            return self._answer(self._cases.get(case_id))
        except UnknownCase as error:
            raise Problem(404, str(error)) from None

    def _answer(self, case: Case) -> CaseAnswer:
        return _answer(case, self._cases.results(case_id=case.id), self._taught(case))

    def _taught(self, case: Case) -> list[TaughtAnswer]:
        return [TaughtAnswer.model_validate(one) for one in taught(case, self._store, self._lineage)]


def _answer(case: Case, results: Sequence[CaseResult], learned: list[TaughtAnswer]) -> CaseAnswer:
    origins: dict[str, list[str]] = {}
    for kind, name in case.origins:
        origins.setdefault(kind, []).append(name)
    told = [CaseResultAnswer(**asdict(result), change=result.change) for result in results]
    fields = asdict(case) | {"origins": origins}
    return CaseAnswer(**fields, results=told, taught=learned)
