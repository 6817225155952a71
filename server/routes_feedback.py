"""HTTP routes for people: give feedback, look a receipt up, read a completion, see what to judge next.

What an event may say is decided in `server.feedback_events`; that it is durable, in `feedback.queue`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from feedback.events import Event
from feedback.queue import IdempotencyConflict, QueueUnavailable, Receipt
from feedback.records import Completion
from feedback.store import Query as StoredQuery
from feedback.store import Store, StoredEvent
from registry.rounds import Rounds
from server.context import CALLER, Caller
from server.errors import Problem, parse_object
from server.feedback_events import check_owner, event_from, rater_of
from server.identity import Identity
from server.metrics import ServerMetrics

RETRY_AFTER_SECONDS = 2
_QUARANTINE = ("quarantined", "confirmed")


class EventQueue(Protocol):
    """The part of `feedback.queue.FeedbackQueue` that these routes use."""

    async def submit(self, event: Event, idempotency_key: str | None = None) -> Receipt: ...  # noqa: D102
    async def submit_batch(self, events: Sequence[Event]) -> list[Receipt]: ...  # noqa: D102
    async def queued(self, event_id: str) -> str | None: ...  # noqa: D102


class FeedbackRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(
        self,
        *,
        queue: EventQueue,
        store: Store,
        rounds: Rounds,
        identity: Identity,
        metrics: ServerMetrics,
        batch_lines: int,
        gold_share: float,
    ) -> None:
        self._queue = queue
        self._store = store
        self._rounds = rounds
        self._identity = identity
        self._metrics = metrics
        self._batch_lines = batch_lines
        self._gold_share = gold_share

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/feedback", self.submit, methods=["POST"])
        add("/v1/feedback/batch", self.submit_batch, methods=["POST"])
        add("/v1/feedback/{event_id}", self.receipt, methods=["GET"])
        add("/v1/completions/{completion_id}", self.completion, methods=["GET"])
        add("/v1/queries", self.queries, methods=["GET"])
        return router

    async def submit(self, request: Request) -> Response:
        """Take one event; 202 with its receipt once Redis has it durably."""
        try:
            fields = parse_object(await request.body())
            event = await self._event(fields, CALLER.get())
            receipt = await self._durably(self._queue.submit(event, _idempotency_key(request)))
        except Problem as problem:
            self._metrics.refused.labels(str(problem.status)).inc()
            raise
        if not receipt.duplicate:
            self._metrics.feedback.labels(event.feedback.type).inc()
        return JSONResponse(_receipt(receipt), 202)

    async def submit_batch(self, request: Request) -> Response:
        """Take JSON lines; answers one line each: a receipt, or an error for a line that was not taken."""
        lines = [line for line in (await request.body()).splitlines() if line.strip()]
        if not lines:
            raise Problem(422, "no lines were sent")
        if len(lines) > self._batch_lines:
            raise Problem(413, f"a batch may have at most {self._batch_lines} lines")
        caller = CALLER.get()
        taken: list[Event | Problem] = []
        for line in lines:
            try:
                taken.append(await self._event(parse_object(line), caller))
            except Problem as problem:
                taken.append(problem)
        events = [item for item in taken if isinstance(item, Event)]
        receipts = iter(await self._durably(self._queue.submit_batch(events)) if events else [])
        answers = []
        for item in taken:
            if isinstance(item, Problem):
                self._metrics.refused.labels(str(item.status)).inc()
                answers.append(item.body())
            else:
                self._metrics.feedback.labels(item.feedback.type).inc()
                answers.append(_receipt(next(receipts)))
        text = "".join(json.dumps(answer) + "\n" for answer in answers)
        return Response(text, 200, media_type="application/x-ndjson")

    async def receipt(self, event_id: str) -> dict[str, Any]:
        """Say what became of an event; for who gave it and for operators."""
        caller = CALLER.get()
        stored = await anyio.to_thread.run_sync(self._store.event, event_id)
        if stored is None:
            giver = await self._durably(self._queue.queued(event_id))
            if giver is not None:
                _check_giver(caller, giver)
                return _status(event_id, "queued")
            # It may have moved from the queue to the store between the two looks.
            stored = await anyio.to_thread.run_sync(self._store.event, event_id)
        if stored is None:
            raise Problem(404, f"no such event: {event_id}")
        _check_giver(caller, stored.event.key_id, stored.event.rater)
        return await anyio.to_thread.run_sync(self._described, stored)

    async def completion(self, completion_id: str) -> dict[str, Any]:
        """Return the record of a completion with the feedback on it; for its client and for operators."""
        caller = CALLER.get()
        if caller.role != "operator":
            check_owner(completion_id, caller, self._identity)
        parts = await anyio.to_thread.run_sync(self._store.completion, completion_id)
        if not parts:
            raise Problem(404, f"no record of {completion_id}, or not yet")
        events = await anyio.to_thread.run_sync(self._store.events_of, completion_id)
        return _record(parts, events)

    async def queries(self, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
        """List recorded prompts to judge next: those whose responses the reward model is least sure of first.

        A rater is not asked about what it has judged already, and gold questions are among what it is asked.
        """
        caller = CALLER.get()
        rater = rater_of(caller) if caller.role == "rater" else None
        found = await anyio.to_thread.run_sync(self._store.queries, limit, rater, self._gold_share)
        return {"queries": [_query(query) for query in found]}

    async def _event(self, fields: dict[str, Any], caller: Caller) -> Event:
        return await anyio.to_thread.run_sync(
            event_from, fields, caller, self._identity, self._store.completion
        )

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

    def _described(self, stored: StoredEvent) -> dict[str, Any]:
        status = "queued" if stored.status == "waiting" else stored.status
        answer = _status(stored.event.event_id, status, stored.reason, stored.superseded_by)
        if stored.status == "stored" and self._store.raters.state(stored.event.rater) in _QUARANTINE:
            answer["reason"] = (
                "the rater is in quarantine: this counts in no further round until an operator lifts it"
            )
        if stored.position is not None:
            rounds = self._rounds.learned_from(stored.position, stored.event.rater)
            answer["rounds"] = [item.id for item in rounds]
            answer["versions"] = [item.version for item in rounds if item.version is not None]
        return answer


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= 200:
        raise Problem(422, "1 to 200 characters are expected", param="Idempotency-Key")
    return key


def _receipt(receipt: Receipt) -> dict[str, Any]:
    return {"event_id": receipt.event_id, "status": "queued"}


def _status(
    event_id: str, status: str, reason: str | None = None, superseded_by: str | None = None
) -> dict[str, Any]:
    return {
        "event_id": event_id,
        "status": status,
        "reason": reason,
        "superseded_by": superseded_by,
        "rounds": [],
        "versions": [],
    }


def _check_giver(caller: Caller, key_id: str, rater: str | None = None) -> None:
    """Raise Problem 403 unless `caller` gave the event: by key, or for a token under its very identity.

    An event in the queue is known by key only (`rater` None).
    """
    if caller.role == "operator":
        return
    same_rater = caller.role != "token" or rater is None or rater == rater_of(caller)
    if caller.key_id != key_id or not same_rater:
        raise Problem(403, "this event was given by somebody else")


def _query(query: StoredQuery) -> dict[str, Any]:
    completion = query.completion
    # No scores: they would tell a rater what to say.
    spreads = {score.choice: score.spread for score in query.scores}
    return {
        "completion_id": completion.id,
        "part": completion.part,
        "messages": completion.messages,
        "prompt": completion.prompt,
        "round": query.round_id,
        "spread": query.spread,
        "choices": [
            {"choice": choice.index, "text": choice.text, "spread": spreads.get(choice.index)}
            for choice in completion.choices
        ],
    }


def _record(parts: list[Completion], events: list[StoredEvent]) -> dict[str, Any]:
    first = parts[0].model_dump(mode="json")
    shared = ("id", "key_id", "user", "source", "endpoint", "created_at", "messages", "sampling")
    choices = [choice for part in parts for choice in part.choices]
    spans = [span.version for choice in choices for span in choice.weight_spans]
    return {name: first[name] for name in shared} | {
        "prompts": [
            {
                "part": part.part,
                "prompt": part.prompt,
                "prompt_token_ids": part.prompt_token_ids,
                "latency_seconds": part.latency_seconds,
            }
            for part in parts
        ],
        "choices": [choice.model_dump(mode="json") for choice in choices],
        "versions": list(dict.fromkeys(spans)),
        "feedback": [
            {
                "event_id": item.event.event_id,
                "status": item.status,
                "reason": item.reason,
                "superseded_by": item.superseded_by,
                "rater": item.event.rater,
                "received_at": item.event.received_at,
                "feedback": item.event.feedback.model_dump(mode="json", exclude_none=True),
            }
            for item in events
        ],
    }
