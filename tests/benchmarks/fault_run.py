"""One run of the fault harness: an installation, the people who use it, and the comparison at the end.

Which faults there are, and in which order they come, is `faults`' affair.
"""

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from feedback import tables
from feedback.events import FEEDBACK, references
from feedback.keys import Keys
from feedback.store import Store
from instructloop import config as configuration
from instructloop import installation
from tests.benchmarks.fault_parts import (
    Part,
    Postgres,
    Proxy,
    Quota,
    RedisServer,
    free_port,
    our_part,
)

GIVERS = 24
POOL = 300
"""Completions that are judged; they are recorded before the first fault."""
TIMEOUT_SECONDS = 8.0
GIVE_UP_SHARE, REPEAT_SHARE = 0.02, 0.05
CALM_EVENTS = 60
"""Events that are accepted between two faults."""

LAYOUTS = ("embedded+sqlite", "embedded+postgres", "replica+sqlite", "replica+postgres")
Fault = Callable[["Run"], Awaitable[None]]


@dataclass
class Given:
    """One event as its giver knows it."""

    giver: int
    number: int
    body: dict[str, Any]
    tries: int = 0
    event_id: str | None = None

    @property
    def key(self) -> str:
        return f"{self.giver}-{self.number}"


@dataclass
class Tally:
    """What a run saw; the figures that are zero in a sound system first."""

    lost: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    half_there: int = 0
    changed: int = 0
    left_in_redis: int = 0
    not_stored: int = 0
    mistakes: list[str] = field(default_factory=list)
    events: int = 0
    requests: int = 0
    refused: int = 0
    acknowledged: int = 0
    repeated: int = 0
    given_up: int = 0
    given_up_but_stored: int = 0
    stored: int = 0
    completions: int = 0
    completions_lost: int = 0
    completions_lost_otherwise: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    cuts: int = 0
    restarts: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        wrong = (self.lost, self.duplicated, self.out_of_order, self.half_there, self.changed)
        return not any(wrong) and not (
            self.left_in_redis or self.not_stored or self.mistakes or self.completions_lost_otherwise
        )


class Run:
    """One layout of parts, its givers and its faults."""

    def __init__(self, layout: str, work: Path, seed: int) -> None:
        self.layout = layout
        self.tally = Tally()
        self.given: list[Given] = []
        self.answered: dict[str, float] = {}
        self.server_deaths: list[float] = []
        self.parts: dict[str, Part] = {}
        self.quotas: list[Quota] = []
        self._work = work
        self._random = random.Random(seed)
        self._stop = asyncio.Event()
        self._pool: list[str] = []
        redis_kind, self.database_kind = layout.split("+")
        self.replicated = redis_kind == "replica"

    # -- the installation

    async def prepare(self, stack: AsyncExitStack) -> None:
        """Start all parts and record the completions that will be judged."""
        data = Quota(self._work / "data", 512)
        self.quotas.append(data)
        stack.callback(data.close)
        await self._start_redis(stack)
        database_url = await self._start_database(stack, data)
        self.to_redis = {name: Proxy(self.primary.upstream) for name in ("server", "ingest")}
        port = free_port()
        self.http = Proxy(("127.0.0.1", port))
        for proxy in (*self.to_redis.values(), self.http):
            await proxy.start()
            stack.callback(proxy.close)
        environment = os.environ | {
            "INSTRUCTLOOP_DATA_DIR": str(data.directory),
            "INSTRUCTLOOP_STORE__URL": database_url,
            "INSTRUCTLOOP_SERVER__PORT": str(port),
            "INSTRUCTLOOP_QUEUE__TIMEOUT_SECONDS": "3",
            "INSTRUCTLOOP_QUEUE__WAIT_REPLICAS": "1" if self.replicated else "0",
            "INSTRUCTLOOP_SERVER__RATE_PER_KEY": "none",
            "INSTRUCTLOOP_SERVER__RATE_PER_RATER": "none",
            "OMP_NUM_THREADS": "1",
        }
        config = configuration.load(environment=environment)
        self.engine = installation.open_database(config)
        stack.callback(self.engine.dispose)
        installation.ensure_secret(config.data_dir)
        self.secret = Keys(self.engine).create("client", "faults").secret
        modules = {
            "server": ["tests.benchmarks.feedback_server"],
            "ingest": ["instructloop.cli", "ingest", "--consumer", "faults"],
        }
        self._server_url = f"http://127.0.0.1:{port}"
        for name, module in modules.items():
            own = environment | {"INSTRUCTLOOP_QUEUE__URL": f"redis://127.0.0.1:{self.to_redis[name].port}/0"}
            ready = self._server_answers if name == "server" else lambda: None
            self.parts[name] = our_part(name, module, own, self._work / f"{name}.log", ready)
            await self.parts[name].start()
            stack.push_async_callback(self.parts[name].kill)
        for part in self.parts.values():
            keeping = asyncio.create_task(part.keep())
            stack.callback(keeping.cancel)
        self._client = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{self.http.port}",
                headers={"Authorization": f"Bearer {self.secret}"},
                timeout=TIMEOUT_SECONDS,
                limits=httpx.Limits(max_connections=200),
            )
        )
        for _ in range(POOL):
            self._pool.append(await self.generated())
        self.answered.clear()

    async def _start_redis(self, stack: AsyncExitStack) -> None:
        ports = [free_port(), free_port()] if self.replicated else [None]
        self.redis = [RedisServer(self._work, "redis", port=ports[0])]
        if self.replicated:
            self.redis.append(RedisServer(self._work, "replica", port=ports[1], replica_of=ports[0]))
        for name, server in zip(("redis", "replica"), self.redis, strict=False):
            stack.callback(server.quota.close)
            self.parts[name] = server.part
            await server.part.start()
            stack.push_async_callback(server.part.kill)

    async def _start_database(self, stack: AsyncExitStack, data: Quota) -> str:
        if self.database_kind == "sqlite":
            return f"sqlite:///{data.directory / 'store.db'}"
        postgres = await asyncio.to_thread(Postgres, self._work)
        stack.callback(postgres.close)
        self.parts["postgres"] = postgres.part
        await postgres.part.start()
        stack.push_async_callback(postgres.part.kill, signal.SIGINT)
        return postgres.url

    @property
    def primary(self) -> RedisServer:
        """The Redis that is written to."""
        return self.redis[0]

    def _server_answers(self) -> None:
        httpx.get(f"{self._server_url}/health", timeout=5).raise_for_status()

    # -- what people do

    async def ready(self) -> httpx.Response:
        """What `/ready` says."""
        return await self._client.get(f"{self._server_url}/ready")

    async def generated(self) -> str:
        """Ask for a completion; returns its id."""
        body = {"model": "policy", "n": 3, "messages": [{"role": "user", "content": "Name a fruit."}]}
        answer = await self._client.post(f"{self._server_url}/v1/chat/completions", json=body)
        answer.raise_for_status()
        id_ = str(answer.headers["X-Completion-Id"])
        self.answered[id_] = time.monotonic()
        return id_

    async def generate(self) -> None:
        """Ask for completions all the time; each that is answered must be recorded."""
        while not self._stop.is_set():
            try:
                await self.generated()
            except httpx.HTTPStatusError as problem:
                if problem.response.status_code != 503:
                    self.tally.mistakes.append(f"generation: {problem.response.text[:200]}")
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)

    async def give(self, giver: int) -> None:
        """Give one event after the other, in the order in which they count."""
        number = 0
        while not self._stop.is_set():
            event = Given(giver, number, self._event(giver, number))
            number += 1
            self.given.append(event)
            patient = self._random.random() > GIVE_UP_SHARE
            while event.event_id is None and (patient or event.tries == 0):
                await self._try(event)
                if event.event_id is None:
                    await asyncio.sleep(0.1)
            if event.event_id is None:
                self.tally.given_up += 1
            elif self._random.random() < REPEAT_SHARE:
                await self._repeat(self._random.choice(self.given[-500:]))

    async def _repeat(self, event: Given) -> None:
        """Send again what was accepted long or shortly before: it must be the same event."""
        if event.event_id is None:
            return
        before, tries = event.event_id, event.tries
        await self._try(event)
        self.tally.repeated += 1
        if event.event_id != before:
            self.tally.mistakes.append(f"{event.key} was {before} and is {event.event_id}")
        event.event_id, event.tries = before, tries

    async def _try(self, event: Given) -> None:
        event.tries += 1
        self.tally.requests += 1
        try:
            answer = await self._client.post(
                "/v1/feedback", json=event.body, headers={"Idempotency-Key": event.key}
            )
        except httpx.TransportError:
            self.tally.refused += 1
            return
        if answer.status_code == 202:
            event.event_id = answer.json()["event_id"]
        elif answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0:
            self.tally.refused += 1
        else:
            self.tally.mistakes.append(f"{answer.status_code} {answer.text[:200]}")
            await asyncio.sleep(1)

    def _event(self, giver: int, number: int) -> dict[str, Any]:
        ref = {"completion_id": self._random.choice(self._pool)}
        more = {"rater": f"rater-{giver}", "context": {"giver": giver, "number": number}}
        match number % 4:
            case 0:
                value = self._random.choice(["up", "down"])
                return {"type": "thumb", **ref, "choice": 1, "value": value, **more}
            case 1:
                return {"type": "rating", **ref, "choice": 2, "score": self._random.randint(1, 7), **more}
            case 2:
                groups = [[ref | {"choice": choice}] for choice in self._random.sample(range(3), 3)]
                return {"type": "ranking", "groups": groups, **more}
            case _:
                return {"type": "demonstration", **ref, "text": f"Better: {number}.", **more}

    def accepted(self) -> int:
        """Count the events that were acknowledged."""
        return sum(event.event_id is not None for event in self.given)

    # -- the run

    async def run(self, faults: Mapping[str, Fault], events: int) -> Tally:
        """Harm the parts in turn while givers give, until all was done and `events` were accepted."""
        began = time.monotonic()
        async with AsyncExitStack() as stack:
            await self.prepare(stack)
            tasks = [asyncio.create_task(self.give(giver)) for giver in range(GIVERS)]
            tasks.append(asyncio.create_task(self.generate()))
            await self._calm(CALM_EVENTS)
            for place, name in enumerate(faults):
                started = time.monotonic()
                await faults[name](self)
                await self._calm(max(CALM_EVENTS, (events - self.accepted()) // (len(faults) - place)))
                self.tally.faults[name] += 1
                took = time.monotonic() - started
                say(f"{self.layout}: {name} took {took:.1f} s; {self.accepted()} accepted")
            self._stop.set()
            await asyncio.gather(*tasks)
            await self._settle()
            self._count()
        self.tally.seconds = round(time.monotonic() - began, 1)
        return self.tally

    async def _calm(self, events: int) -> None:
        """Wait until so many more events are accepted: everything works again."""
        wanted = self.accepted() + events
        deadline = time.monotonic() + 120 + events / 20
        while self.accepted() < wanted:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.layout}: nothing is accepted any more; logs in {self._work}")
            if any(task.done() for task in asyncio.all_tasks() if task.get_name() == "giver"):
                raise RuntimeError("a giver ended")
            await asyncio.sleep(0.1)

    async def _settle(self) -> None:
        """Wait until ingest has stored all that is in Redis, and the spool is empty."""
        spool = self._work / "data" / "spool.db"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with self.primary.client() as client:
                left = client.xlen("instructloop:feed")
            waiting = await asyncio.to_thread(_spooled, spool)
            if left == 0 and waiting == 0:
                return
            await asyncio.sleep(0.3)

    def _count(self) -> None:
        """Compare the store with what was given and acknowledged."""
        tally = self.tally
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(tables.events).order_by(tables.events.c.position)).all()
            targets = connection.execute(sa.select(tables.event_targets)).all()
            parts = set(connection.execute(sa.select(tables.completions.c.id)).scalars())
        store = Store(self.engine)
        judged: dict[str, set[str]] = {}
        for row in targets:
            judged.setdefault(row.event_id, set()).add(row.completion_id)
        by_id = {row.event_id: row for row in rows}
        by_key = Counter(
            (row.feedback["context"]["giver"], row.feedback["context"]["number"]) for row in rows
        )
        acknowledged = [event for event in self.given if event.event_id is not None]
        given_up = {(event.giver, event.number) for event in self.given if event.event_id is None}
        tally.events, tally.acknowledged, tally.stored = len(self.given), len(acknowledged), len(rows)
        tally.lost = sum(event.event_id not in by_id for event in acknowledged)
        tally.duplicated = sum(count - 1 for count in by_key.values())
        tally.given_up_but_stored = sum(key in by_key for key in given_up)
        tally.changed = sum(
            by_id[event.event_id].feedback != _as_stored(event.body)
            for event in acknowledged
            if event.event_id in by_id
        )
        tally.half_there = sum(
            judged.get(row.event_id)
            != {r.completion_id for r in references(FEEDBACK.validate_python(row.feedback))}
            for row in rows
        )
        positions = [row.position for row in rows]
        tally.half_there += positions != list(range(1, len(rows) + 1)) or store.head() != len(rows)
        tally.out_of_order = self._out_of_order(acknowledged, by_id)
        counts = store.counts()
        tally.not_stored = counts["waiting"] + counts["rejected"] + counts["dead_letters"]
        with self.primary.client() as client:
            pending = client.xpending("instructloop:feed", "ingest")["pending"]
            tally.left_in_redis = client.xlen("instructloop:feed") + pending + len(client.keys("*receipt*"))
        lost = [id_ for id_ in self.answered if id_ not in parts]
        tally.completions, tally.completions_lost = len(self.answered), len(lost)
        # A server that is killed takes with it what it held in memory; nothing else may cost a record.
        tally.completions_lost_otherwise = sum(
            not any(-1 < death - self.answered[id_] < 6 for death in self.server_deaths) for id_ in lost
        )
        tally.cuts = sum(proxy.cuts for proxy in (self.http, *self.to_redis.values()))
        tally.restarts = sum(part.starts - 1 for part in self.parts.values())

    def _out_of_order(self, acknowledged: Sequence[Given], by_id: dict[str, Any]) -> int:
        """Count the events that got their position before one that their giver gave earlier."""
        last: dict[int, int] = {}
        wrong = 0
        for event in sorted(acknowledged, key=lambda event: (event.giver, event.number)):
            row = by_id.get(event.event_id or "")
            if row is not None and row.position is not None:
                wrong += row.position < last.get(event.giver, 0)
                last[event.giver] = row.position
        return wrong


def _as_stored(body: dict[str, Any]) -> Any:
    return FEEDBACK.validate_python(body).model_dump(mode="json", exclude_defaults=True)


def _spooled(path: Path) -> int:
    from feedback.spool import Spool

    return Spool(path, 2**30).waiting()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
