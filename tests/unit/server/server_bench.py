"""The assembled server without an engine: real SQLite, the queue in memory behind its protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import sqlalchemy as sa
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from evaluation.cases import check_case
from feedback.events import Event
from feedback.keys import Keys
from feedback.queue import Entry, IdempotencyConflict, QueueUnavailable
from feedback.records import SCHEMA, Choice, Completion
from feedback.settings import RaterSettings
from feedback.store import Store
from feedback.submission import Receipt
from instructloop.canary import Canary
from registry.evaluations import Evaluations
from registry.registry import Registry
from registry.rounds import Rounds
from registry.settings import RolloutSettings
from server.access import Authenticator
from server.app import assemble
from server.identity import Identity, TokenClaims
from server.limits import Limits, Wanted
from server.metrics import ServerMetrics
from server.routes import FromAbove, ReplicaState, all_routers
from server.routing import Router
from server.settings import ServerSettings


@dataclass
class MemoryQueue:
    """Keeps what is submitted in memory; `away` makes it refuse, `bodies` is what idempotency keys hold."""

    away: str | None = None
    events: list[Event] = field(default_factory=list)
    recorded: list[Completion] = field(default_factory=list)
    bodies: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def _check(self) -> None:
        if self.away is not None:
            raise QueueUnavailable(self.away)

    async def submit(self, event: Event, idempotency_key: str | None = None) -> Receipt:
        self._check()
        body = event.feedback.model_dump_json()
        if idempotency_key is not None:
            name = (event.key_id, idempotency_key)
            first_id, first_body = self.bodies.setdefault(name, (event.event_id, body))
            if first_body != body:
                raise IdempotencyConflict(first_id)
            if first_id != event.event_id:
                return Receipt(first_id, True)
        self.events.append(event)
        return Receipt(event.event_id, False)

    async def submit_batch(
        self, events: Sequence[Event], idempotency_keys: Sequence[str | None] | None = None
    ) -> list[Receipt]:
        receipts = []
        for event, key in zip(events, idempotency_keys or [None] * len(events), strict=True):
            try:
                receipts.append(await self.submit(event, key))
            except IdempotencyConflict:
                receipts.append(Receipt(self.bodies[event.key_id, str(key)][0], False, conflict=True))
        self._check()
        return receipts

    async def record(self, completions: Sequence[Completion]) -> None:
        self._check()
        self.recorded += completions

    async def record_encoded(self, records: Sequence[bytes], schema: str = SCHEMA) -> None:
        self._check()
        self.recorded += [Completion.model_validate_json(data) for data in records]

    async def queued(self, event_id: str) -> str | None:
        self._check()
        return next((event.key_id for event in self.events if event.event_id == event_id), None)

    async def durability(self) -> str | None:
        return self.away

    def drain_into(self, store: Store) -> None:
        """What ingest does: move everything to the store."""
        completions = [
            Entry(str(i), "completion", c.model_dump_json().encode()) for i, c in enumerate(self.recorded)
        ]
        events = [Entry(f"e{i}", "event", e.model_dump_json().encode()) for i, e in enumerate(self.events)]
        store.ingest(completions + events)
        self.recorded.clear()
        self.events.clear()


class MemoryCounters:
    """Counters in memory: those in Redis are tested with a real one."""

    def __init__(self) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    async def take(self, wanted: Sequence[Wanted]) -> int | None:
        for place, (item, name, digest, amount) in enumerate(wanted):
            if not await self._limiter.hit(item, name, digest, cost=amount):
                return place
        return None

    async def free_at(self, wanted: Wanted) -> float:
        return (await self._limiter.get_window_stats(wanted.item, wanted.name, wanted.digest)).reset_time


@dataclass
class Bench:
    """The assembled app with an engine's app behind it that answers with what it was asked."""

    database: sa.Engine
    queue: MemoryQueue
    store: Store
    registry: Registry
    rounds: Rounds
    identity: Identity
    metrics: ServerMetrics
    keys: dict[str, str]
    key_ids: dict[str, str]
    data_dir: Path
    obstacle: str | None = None
    dead: bool = False
    raters: RaterSettings = field(default_factory=RaterSettings)
    recording: str | None = None
    settings: ServerSettings = field(
        default_factory=lambda: ServerSettings(max_body_bytes=4096, batch_lines=5)
    )
    routing: Router | None = None
    engine: ASGIApp | None = None
    counters: MemoryCounters = field(default_factory=MemoryCounters)

    def __post_init__(self) -> None:
        limits = Limits(self.counters, self.settings, self.metrics)
        routers = all_routers(
            database=self.database,
            registry=self.registry,
            queue=self.queue,
            identity=self.identity,
            limits=limits,
            metrics=self.metrics,
            settings=self.settings,
            raters=self.raters,
            data_dir=self.data_dir,
            waiting_hours=24,
            wait_seconds=0.5,
            state=ReplicaState(
                dead=lambda: self.dead,
                obstacle=lambda: self.obstacle,
                serving=lambda: "policy-0000",
                recording=lambda: self.recording,
            ),
            above=FromAbove(
                round_report=lambda number: f"<h1>Round {self.rounds.get(number).id}</h1>",
                evaluation_report=lambda number: (
                    f"<h1>Evaluation {Evaluations(self.database).get(number).id}</h1>"
                ),
                trial_report=Canary(self.database, self.registry, RolloutSettings()).report,
                check_case=check_case,
            ),
        )
        self.app = assemble(
            self.engine or engine_app(),
            routers,
            settings=self.settings,
            identity=self.identity,
            authenticator=Authenticator(Keys(self.database), self.identity),
            limits=limits,
            obstacle=self._obstacle,
            routing=self.routing,
        )

    async def _obstacle(self) -> str | None:
        return self.obstacle

    def http(self, who: str | None = None, **headers: str) -> httpx.AsyncClient:
        """A client with the key of `who` (client, other, rater, operator) or with none."""
        if who is not None:
            headers["Authorization"] = f"Bearer {self.keys[who]}"
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)

    def completion(
        self, *, who: str = "client", choices: int = 1, stored: bool = True, counted: bool = True
    ) -> str:
        """Issue a completion id to `who` and store its record; returns the id.

        Without `counted` the id does not say how many choices there are, as that of a response does not.
        """
        count = choices if counted else None
        id_ = "chatcmpl-" + self.identity.new_request_id(self.key_ids[who], count)
        record = Completion(
            id=id_,
            parts=1,
            key_id=self.key_ids[who],
            endpoint="/v1/chat/completions",
            created_at=1.0,
            messages=[{"role": "user", "content": "hi"}],
            prompt_token_ids=[1, 2],
            choices=[Choice(index=i, text=f"answer {i}") for i in range(choices)],
        )
        if stored:
            self.store.ingest([Entry("1-0", "completion", record.model_dump_json().encode())])
        return id_

    def count(self, name: str, **labels: str) -> float | None:
        """The value of one of our counters."""
        return self.metrics.registry.get_sample_value(f"instructloop_{name}_total", labels)

    def token(self, completion_id: str, user: str | None = None) -> str:
        return self.identity.new_token(TokenClaims(completion_id, user))


def engine_app() -> Starlette:
    """Stands where vLLM's app does: it answers with the request as it arrived."""

    async def echo(request: Request) -> JSONResponse:
        body = (await request.body()).decode()
        status = 400 if "refuse me" in body else 200
        return JSONResponse(
            {"path": request.url.path, "headers": dict(request.headers), "body": body}, status
        )

    return Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
