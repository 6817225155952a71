"""HTTP routes for people: give feedback, look a receipt up, read a completion, see what to judge next.

What an event may say is decided in `server.feedback_events`; that it is durable, in `feedback.queue`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from feedback.dead_letters import DeadLetter, DeadLetters
from feedback.events import Event
from feedback.queue import IdempotencyConflict, QueueUnavailable
from feedback.records import Completion
from feedback.store import Query as StoredQuery
from feedback.store import Store, StoredEvent
from feedback.submission import EntryTooLarge, Receipt
from registry.lineage import LEARNED, Lineage
from server.answers import (
    ChoiceAnswer,
    CompletionAnswer,
    EventAnswer,
    GivenFeedback,
    PromptAnswer,
    Queries,
    QueryAnswer,
    QueryChoice,
    ReceiptAnswer,
)
from server.body import parse_object
from server.context import CALLER, Caller
from server.errors import Problem
from server.feedback_events import check_owner, check_recorded, event_from, open_references, rater_of
from server.identity import Identity
from server.limits import Limits
from server.lookups import from_database
from server.metrics import ServerMetrics
from server.openapi import problems, takes_feedback, takes_lines

RETRY_AFTER_SECONDS = 2
_QUARANTINE = ("quarantined", "confirmed")

Line = tuple[Event, str | None] | Problem
"""An event of a batch with its idempotency key, or why it was not taken."""


class EventQueue(Protocol):
    """The part of `feedback.queue.FeedbackQueue` that these routes use."""

    async def submit(self, event: Event, idempotency_key: str | None = None) -> Receipt: ...  # noqa: D102
    async def submit_batch(  # noqa: D102
        self, events: Sequence[Event], idempotency_keys: Sequence[str | None] | None = None
    ) -> list[Receipt]: ...
    async def queued(self, event_id: str) -> str | None: ...  # noqa: D102


class FeedbackRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(
        self,
        *,
        queue: EventQueue,
        store: Store,
        dead_letters: DeadLetters,
        lineage: Lineage,
        identity: Identity,
        limits: Limits,
        metrics: ServerMetrics,
        batch_lines: int,
        gold_share: float,
    ) -> None:
        self._queue = queue
        self._store = store
        self._dead_letters = dead_letters
        self._lineage = lineage
        self._identity = identity
        self._limits = limits
        self._metrics = metrics
        self._batch_lines = batch_lines
        self._gold_share = gold_share

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add(
            "/v1/feedback",
            self.submit,
            methods=["POST"],
            status_code=202,
            response_model=ReceiptAnswer,
            responses=problems(404, 409),
            openapi_extra=takes_feedback(),
        )
        add(
            "/v1/feedback/batch",
            self.submit_batch,
            methods=["POST"],
            response_class=Response,
            responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
            openapi_extra=takes_lines(),
        )
        add("/v1/feedback/{event_id}", self.receipt, methods=["GET"], responses=problems(404, 410))
        add("/v1/completions/{completion_id}", self.completion, methods=["GET"], responses=problems(404, 410))
        add("/v1/queries", self.queries, methods=["GET"])
        return router

    async def submit(self, request: Request) -> Response:
        """Take one event; 202 with its receipt once Redis has it durably."""
        try:
            caller = CALLER.get()
            event, idempotency_key = await self._event(request, caller)
            if idempotency_key is not None and caller.role == "token":
                # End users of one client do not know of each other's keys.
                idempotency_key = f"{event.rater} {idempotency_key}"
            receipt = await self._durably(self._queue.submit(event, idempotency_key))
        except Problem as problem:
            self._metrics.refused.labels(str(problem.status)).inc()
            raise
        if not receipt.duplicate:
            self._metrics.feedback.labels(event.feedback.type).inc()
        return Response(json.dumps(_receipt(receipt)), 202, media_type="application/json")

    async def submit_batch(self, request: Request) -> Response:
        """Take JSON lines; answers one line each: a receipt, or an error for a line that was not taken.

        A line may carry its `idempotency_key` beside the event's own fields.
        """
        lines = [line for line in (await request.body()).splitlines() if line.strip()]
        if not lines:
            raise Problem(422, "no lines were sent")
        if len(lines) > self._batch_lines:
            raise Problem(413, f"a batch may have at most {self._batch_lines} lines")
        caller = CALLER.get()
        taken = await from_database(self._events, lines, caller)
        taken = await self._within_limits(taken, caller)
        accepted = [item for item in taken if not isinstance(item, Problem)]
        receipts: Iterator[Receipt] = iter(())
        if accepted:
            events, keys = zip(*accepted, strict=True)
            receipts = iter(await self._durably(self._queue.submit_batch(events, keys)))
        answers = [
            self._refused(item) if isinstance(item, Problem) else self._taken(item[0], next(receipts))
            for item in taken
        ]
        text = "".join(json.dumps(answer) + "\n" for answer in answers)
        return Response(text, 200, media_type="application/x-ndjson")

    async def receipt(self, event_id: str) -> EventAnswer:
        """Say what became of an event; for who gave it and for operators."""
        caller = CALLER.get()
        found = await from_database(self._remembered, event_id)
        if found is None:
            giver = await self._durably(self._queue.queued(event_id))
            if giver is not None:
                _check_giver(caller, giver)
                return EventAnswer(event_id=event_id, status="queued")
            # It may have left the queue between the two looks.
            found = await from_database(self._remembered, event_id)
        if found is None:
            raise await from_database(self._missing, "event", event_id, f"no such event: {event_id}")
        if isinstance(found, DeadLetter):
            _check_giver(caller, found.key_id, found.rater)
            return EventAnswer(event_id=event_id, status="rejected", reason=found.reason)
        _check_giver(caller, found.event.key_id, found.event.rater)
        return await from_database(self._described, found)

    async def completion(self, completion_id: str) -> CompletionAnswer:
        """Return the record of a completion with the feedback on it; for its client and for operators."""
        caller = CALLER.get()
        if caller.role != "operator":
            check_owner(completion_id, caller, self._identity)
        parts = await from_database(self._store.completion, completion_id)
        if not parts:
            absent = f"no record of {completion_id}, or not yet"
            raise await from_database(self._missing, "completion", completion_id, absent)
        events = await from_database(self._store.events_of, completion_id)
        return _record(parts, events)

    async def queries(self, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Queries:
        """List recorded prompts to judge next: those whose responses the reward model is least sure of first.

        A rater is not asked about what it has judged already, and gold questions are among what it is asked.
        """
        caller = CALLER.get()
        rater = rater_of(caller) if caller.role == "rater" else None
        found = await from_database(self._store.queries, limit, rater, self._gold_share)
        return Queries(queries=[_query(query) for query in found])

    async def _event(self, request: Request, caller: Caller) -> tuple[Event, str | None]:
        """Read the event of a request with its idempotency key, and count the request, whatever it holds."""
        try:
            idempotency_key = _idempotency_key(request)
            event = event_from(parse_object(await request.body()), caller, self._identity)
            if open_references(event.feedback, self._identity):
                await from_database(check_recorded, event.feedback, self._store.completion)
        except Problem:
            await self._limits.request(caller)
            raise
        await self._limits.request_of_event(caller, event.rater)
        return event, idempotency_key

    def _events(self, lines: Sequence[bytes], caller: Caller) -> "list[Line]":
        """Read the lines of a batch; what is wrong with one says nothing of the others."""
        taken: list[Line] = []
        for line in lines:
            try:
                fields = parse_object(line)
                key = _line_key(fields)
                event = event_from(fields, caller, self._identity)
                if open_references(event.feedback, self._identity):
                    check_recorded(event.feedback, self._store.completion)
                taken.append((event, key))
            except Problem as problem:
                taken.append(problem)
        return taken

    async def _within_limits(self, taken: "list[Line]", caller: Caller) -> "list[Line]":
        """Put the refusal in the place of the events of each rater that has given too many."""
        counts = Counter(item[0].rater for item in taken if not isinstance(item, Problem))
        refused: dict[str, Problem] = {}
        for rater, count in counts.items():
            try:
                await self._limits.events(caller, rater, count)
            except Problem as problem:
                refused[rater] = problem
        return [item if isinstance(item, Problem) else refused.get(item[0].rater, item) for item in taken]

    def _missing(self, kind: Literal["completion", "event"], id: str, absent: str) -> Problem:
        """Say of something that is not there whether it was forgotten."""
        if self._store.forgettings.is_forgotten(kind, id):
            return Problem(410, f"{id} was forgotten")
        return Problem(404, absent)

    async def _durably(self, work: Any) -> Any:
        """Await queue work, speaking of its failures over HTTP."""
        try:
            return await work
        except QueueUnavailable as error:
            raise Problem(
                503, f"feedback can't be taken now: {error}", retry_after=RETRY_AFTER_SECONDS
            ) from error
        except IdempotencyConflict as error:
            raise Problem(409, str(error), param="Idempotency-Key") from error
        except EntryTooLarge as error:
            raise Problem(413, str(error)) from error

    def _remembered(self, event_id: str) -> StoredEvent | DeadLetter | None:
        return self._store.event(event_id) or self._dead_letters.of_event(event_id)

    def _described(self, stored: StoredEvent) -> EventAnswer:
        # A round that has published nothing has taught nothing.
        uses = [use for use in self._lineage.uses(stored.event.event_id) if use.version is not None]
        learned = [use for use in uses if use.use in LEARNED]
        return EventAnswer(
            event_id=stored.event.event_id,
            status="queued" if stored.status == "waiting" else stored.status,
            reason=self._reason(stored),
            superseded_by=stored.superseded_by,
            rounds=[use.round_id for use in learned],
            versions=[use.version for use in learned if use.version is not None],
            held_out_rounds=[use.round_id for use in uses if use.use == "held_out"],
        )

    def _reason(self, stored: StoredEvent) -> str | None:
        if stored.status == "stored" and self._store.raters.state(stored.event.rater) in _QUARANTINE:
            return "the rater is in quarantine: this counts in no further round until an operator lifts it"
        return stored.reason

    def _refused(self, problem: Problem) -> dict[str, Any]:
        """Count a line that was not taken, and answer it."""
        self._metrics.refused.labels(str(problem.status)).inc()
        return problem.body()

    def _taken(self, event: Event, receipt: Receipt) -> dict[str, Any]:
        """Count a line's event, if it is new, and answer it."""
        if receipt.conflict:
            conflict = IdempotencyConflict(receipt.event_id)
            return self._refused(Problem(409, str(conflict), param="idempotency_key"))
        if not receipt.duplicate:
            self._metrics.feedback.labels(event.feedback.type).inc()
        return _receipt(receipt)


def _idempotency_key(request: Request) -> str | None:
    return _checked_key(request.headers.get("idempotency-key"), "Idempotency-Key")


def _line_key(fields: dict[str, Any]) -> str | None:
    """Take the idempotency key out of a line's fields; null is none."""
    return _checked_key(fields.pop("idempotency_key", None), "idempotency_key")


def _checked_key(key: Any, param: str) -> str | None:
    if key is not None and not (isinstance(key, str) and 1 <= len(key) <= 200):
        raise Problem(422, "1 to 200 characters are expected", param=param)
    return key


def _receipt(receipt: Receipt) -> dict[str, Any]:
    return {"event_id": receipt.event_id, "status": "queued"}


def _check_giver(caller: Caller, key_id: str | None, rater: str | None = None) -> None:
    """Raise Problem 403 unless `caller` gave the event: by key, or for a token under its very identity.

    An event in the queue is known by key only (`rater` None); of a broken one maybe not even that.
    """
    if caller.role == "operator":
        return
    same_rater = caller.role != "token" or rater is None or rater == rater_of(caller)
    if caller.key_id != key_id or not same_rater:
        raise Problem(403, "this event was given by somebody else")


def _query(query: StoredQuery) -> QueryAnswer:
    completion = query.completion
    # No scores: they would tell a rater what to say.
    spreads = {score.choice: score.spread for score in query.scores}
    return QueryAnswer(
        completion_id=completion.id,
        part=completion.part,
        messages=completion.messages,
        prompt=completion.prompt,
        round=query.round_id,
        spread=query.spread,
        choices=[
            QueryChoice(choice=choice.index, text=choice.text, spread=spreads.get(choice.index))
            for choice in completion.choices
        ],
    )


def _record(parts: list[Completion], events: list[StoredEvent]) -> CompletionAnswer:
    first = parts[0]
    choices = [choice for part in parts for choice in part.choices]
    spans = [span.version for choice in choices for span in choice.weight_spans]
    return CompletionAnswer(
        id=first.id,
        key_id=first.key_id,
        user=first.user,
        source=first.source,
        endpoint=first.endpoint,
        created_at=first.created_at,
        messages=first.messages,
        sampling=first.sampling,
        prompts=[PromptAnswer.model_validate(part, from_attributes=True) for part in parts],
        choices=[ChoiceAnswer.model_validate(choice, from_attributes=True) for choice in choices],
        versions=list(dict.fromkeys(spans)),
        feedback=[_given(item) for item in events],
    )


def _given(item: StoredEvent) -> GivenFeedback:
    return GivenFeedback(
        event_id=item.event.event_id,
        status=item.status,
        reason=item.reason,
        superseded_by=item.superseded_by,
        rater=item.event.rater,
        received_at=item.event.received_at,
        feedback=item.event.feedback.model_dump(mode="json", exclude_none=True),
    )
