"""Arms, peers and copies: two assembled servers that talk over real sockets; no engine, real SQLite."""

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from server_bench import Bench
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from feedback.records import Choice, Completion
from registry.registry import Replica, Track, Trial
from server.context import GENERATION
from server.identity import SHADOW_OWNER
from server.metrics import ServerMetrics
from server.routing import ERRAND_HEADER, Router, arm_of, chosen, peers_of

TRIAL = Trial("policy-0001", "canary", 0.1, 3, 0.0)
ALL = replace(TRIAL, share=1.0)
CHAT = "/v1/chat/completions"


# -- pure


def test_a_share_of_the_users_is_chosen_the_same_each_time_and_grows() -> None:
    users = [f"user-{number}" for number in range(4000)]
    some = {user for user in users if chosen(TRIAL, "key", user)}
    assert 0.08 < len(some) / len(users) < 0.12
    assert some == {user for user in users if chosen(replace(TRIAL, sequence=9), "key", user)}
    assert some < {user for user in users if chosen(replace(TRIAL, share=0.3), "key", user)}
    other_key = {user for user in users if chosen(TRIAL, "another", user)}
    other_version = {user for user in users if chosen(replace(TRIAL, version="policy-0002"), "key", user)}
    for other in (other_key, other_version):
        assert len(some & other) < len(some) / 2, "not always the same people"
    assert all(chosen(ALL, "key", user) for user in users)


def test_only_a_canary_answers() -> None:
    assert arm_of(None, "key", "user") is None
    assert arm_of(ALL, "key", "user") == "trial"
    assert arm_of(replace(ALL, mode="shadow"), "key", "user") == "stable"


GOOD = Replica("peer", "policy-0001", "policy-0001", "serving", url="http://p", seen_at=990.0, track="trial")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({"id": "me"}, False),
        ({"track": "stable"}, False),
        ({"actual": "policy-0000", "state": "failed"}, False),
        ({"actual": None}, False),
        ({"state": "stopped"}, False),
        ({"seen_at": 960.0}, False),
        ({"url": None}, False),
    ],
)
def test_a_peer_of_the_trial_is_alive_and_has_its_version(changes: dict[str, str], found: bool) -> None:
    peers = peers_of([replace(GOOD, **changes)], TRIAL, "trial", own_id="me", now=1000.0)  # type: ignore[arg-type]
    assert bool(peers) == found


def test_a_stable_peer_may_lag_behind_but_never_has_the_trials_weights() -> None:
    old = replace(GOOD, track="stable", actual="policy-0000", state="swapping")
    assert peers_of([old], TRIAL, "stable", own_id="me", now=1000.0) == [old]
    assert peers_of([replace(old, actual="policy-0001")], TRIAL, "stable", own_id="me", now=1000.0) == []


# -- servers


@dataclass
class Book:
    """What the registry would say."""

    current: Trial | None = ALL
    known: list[Replica] = field(default_factory=list)

    def trial(self) -> Trial | None:
        return self.current

    def replicas(self) -> list[Replica]:
        return self.known


@dataclass
class Engine:
    """Stands where vLLM's app does, and keeps what it was asked and whether a stream was cut off."""

    name: str
    source: list[str] = field(default_factory=list)
    asked: list[dict[str, str]] = field(default_factory=list)
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    status: int = 200
    hold: asyncio.Event = field(default_factory=asyncio.Event)

    def app(self) -> Starlette:
        return Starlette(routes=[Route("/{path:path}", self.answer, methods=["POST"])])

    async def answer(self, request: Request) -> Response:
        generation = GENERATION.get()
        assert generation is not None
        self.source.append(generation.source)
        self.asked.append(dict(request.headers))
        fields = await request.json()
        if self.status != 200:
            return JSONResponse({"error": {"message": f"{self.name} says no"}}, self.status)
        if fields.get("stream"):
            return StreamingResponse(self.pieces(), media_type="text/event-stream")
        return JSONResponse({"by": self.name, "user": fields.get("user")})

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            yield f"data: {self.name}\n\n".encode()
            await self.hold.wait()
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cut.set()
            raise


@dataclass
class Node:
    """One replica: its bench, engine and server on a port of its own."""

    bench: Bench
    engine: Engine
    router: Router
    url: str
    server: uvicorn.Server

    def count(self, name: str, **labels: str) -> float:
        return self.bench.count(name, **labels) or 0

    def http(self, who: str | None = "client", **headers: str) -> httpx.AsyncClient:
        if who is not None:
            headers["Authorization"] = f"Bearer {self.bench.keys[who]}"
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=10)

    async def crash(self) -> None:
        """What the others see when a replica is killed: its connections and its port are gone."""
        for listener in self.server.servers:
            listener.close()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]


@dataclass
class Fleet:
    book: Book
    stable: Node
    trial: Node

    async def look(self) -> None:
        for node in (self.stable, self.trial):
            await node.router.look()


class QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


@pytest.fixture
async def fleet(bench: Bench) -> AsyncIterator[Fleet]:
    book = Book()
    async with contextlib.AsyncExitStack() as stack:

        async def node(track: Track) -> Node:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            metrics, engine = ServerMetrics(CollectorRegistry()), Engine(track)
            router = Router(
                book, bench.identity, metrics, replica_id=track, track=track, watch_seconds=60, copies=2
            )
            own = replace(bench, metrics=metrics, routing=router, engine=engine.app())
            config = uvicorn.Config(own.app, lifespan="off", log_level="critical", access_log=False)
            server = QuietServer(config)
            serving = asyncio.create_task(server.serve([listener]))

            async def stop() -> None:
                server.should_exit = server.force_exit = True
                await asyncio.wait([serving], timeout=5)

            stack.push_async_callback(stop)
            while not server.started:
                await asyncio.sleep(0.005)
            version = "policy-0001" if track == "trial" else "policy-0000"
            book.known.append(
                Replica(track, version, version, "serving", url=url, seen_at=time.time(), track=track)
            )
            return Node(own, engine, router, url, server)

        found = Fleet(book, await node("stable"), await node("trial"))
        await found.look()
        yield found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def test_the_canarys_users_are_answered_by_its_replica_and_nobody_notices(fleet: Fleet) -> None:
    fleet.book.current = replace(TRIAL, share=0.4)
    await fleet.look()
    users = [f"user-{number}" for number in range(40)]
    async with fleet.stable.http() as http:
        answers = {user: await http.post(CHAT, json={"user": user}) for user in users}
        again = {user: (await http.post(CHAT, json={"user": user})).json()["by"] for user in users}
    by = {user: answer.json()["by"] for user, answer in answers.items()}
    assert by == again
    key_id = fleet.stable.bench.key_ids["client"]
    assert {user for user in users if by[user] == "trial"} == {
        user for user in users if chosen(fleet.book.current, key_id, user)
    }
    for answer in answers.values():
        (completion_id,) = answer.headers.get_list("x-completion-id")
        (token,) = answer.headers.get_list("x-feedback-token")
        assert len(answer.headers.get_list("date")) == 1
        assert fleet.stable.bench.identity.owner(completion_id) == key_id
        claims = fleet.stable.bench.identity.read_token(token)
        assert claims is not None and claims.completion_id == completion_id
    counts = Counter(by.values())
    assert fleet.stable.count("requests_routed", arm="trial", where="peer") == 2 * counts["trial"]
    assert fleet.stable.count("requests_routed", arm="stable", where="here") == 2 * counts["stable"]
    # The peer neither routes what was routed nor shows its engine how it came.
    assert fleet.trial.count("requests_routed", arm="trial", where="here") == 0
    assert all(ERRAND_HEADER not in headers for headers in fleet.trial.engine.asked)
    assert set(fleet.trial.engine.source) == {"serving"}


async def test_who_asks_the_trials_replica_is_passed_to_a_stable_one(fleet: Fleet) -> None:
    fleet.book.current = replace(TRIAL, mode="shadow", share=1.0)
    await fleet.look()
    async with fleet.trial.http() as http:
        assert (await http.post(CHAT, json={})).json()["by"] == "stable"
        await fleet.stable.crash()
        refused = await http.post(CHAT, json={})
    assert refused.status_code == 503, "better no answer than one that nobody is to see"
    assert fleet.trial.engine.asked == []


async def test_a_request_is_counted_once(fleet: Fleet) -> None:
    for node in (fleet.stable, fleet.trial):
        node.bench.settings = node.bench.settings.model_copy(update={"rate_per_key": "5/hour"})
        node.bench.counters = fleet.stable.bench.counters
        node.bench.__post_init__()
        node.server.config.loaded_app.app = node.bench.app  # type: ignore[union-attr]
    async with fleet.stable.http() as http:
        statuses = [(await http.post(CHAT, json={})).status_code for _ in range(6)]
    assert statuses == [200] * 5 + [429]


async def test_the_mark_of_replicas_can_not_be_forged(fleet: Fleet) -> None:
    bench, body = fleet.trial.bench, b'{"user": "x"}'
    key_id = bench.key_ids["client"]
    seal = bench.identity.seal("shadow", key_id, CHAT, body)
    forged = [
        "serve",
        "serve.",
        "serve." + "0" * 64,
        seal.replace("shadow", "serve"),
        bench.identity.seal("shadow", bench.key_ids["other"], CHAT, body),
        bench.identity.seal("shadow", key_id, "/v1/completions", body),
        bench.identity.seal("shadow", key_id, CHAT, b"{}"),
    ]
    for mark in forged:
        async with fleet.trial.http(**{ERRAND_HEADER: mark}) as http:
            refused = await http.post(CHAT, content=body)
            assert (refused.status_code, refused.json()["error"]["type"]) == (403, "forbidden"), mark
    assert fleet.trial.engine.asked == []
    async with fleet.trial.http(None, **{ERRAND_HEADER: seal}) as http:
        assert (await http.post(CHAT, content=body)).status_code == 401, "it stands for no key"


async def test_a_stream_comes_through_as_it_is_made(fleet: Fleet) -> None:
    async with fleet.stable.http() as http, http.stream("POST", CHAT, json={"stream": True}) as answer:
        pieces = answer.aiter_bytes()
        assert await anext(pieces) == b"data: trial\n\n"
        assert answer.headers["x-completion-id"].startswith("chatcmpl-")
        fleet.trial.engine.hold.set()
        assert b"".join([piece async for piece in pieces]) == b"data: [DONE]\n\n"


async def test_who_hangs_up_stops_the_peer(fleet: Fleet) -> None:
    async with fleet.stable.http() as http, http.stream("POST", CHAT, json={"stream": True}) as answer:
        await anext(answer.aiter_bytes())
    async with asyncio.timeout(5):
        await fleet.trial.engine.cut.wait()


async def test_refusals_of_the_peers_engine_come_through_unchanged(fleet: Fleet) -> None:
    fleet.trial.engine.status = 400
    async with fleet.stable.http() as http:
        refused = await http.post(CHAT, json={})
    assert (refused.status_code, refused.json()) == (400, {"error": {"message": "trial says no"}})
    assert "x-completion-id" not in refused.headers
    assert fleet.stable.engine.asked == []


async def test_a_peer_that_can_not_generate_is_stood_in_for(fleet: Fleet) -> None:
    fleet.trial.bench.obstacle = "the weights in memory are not those of any version"
    async with fleet.stable.http() as http:
        assert (await http.post(CHAT, json={})).json()["by"] == "stable"


async def test_a_response_goes_on_where_it_was_given(fleet: Fleet) -> None:
    """vLLM keeps responses in the process that made them: here one from before the trial."""
    fleet.trial.engine.status = 404
    mine = "resp_" + fleet.stable.bench.identity.new_request_id(fleet.stable.bench.key_ids["client"])
    async with fleet.stable.http() as http:
        answer = await http.post("/v1/responses", json={"input": "x", "previous_response_id": mine})
    assert answer.json()["by"] == "stable"
    assert len(fleet.trial.engine.asked) == 1


async def test_a_crash_cuts_what_runs_and_is_stood_in_for_afterwards(fleet: Fleet) -> None:
    async with fleet.stable.http() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            async with http.stream("POST", CHAT, json={"stream": True}) as answer:
                pieces = answer.aiter_bytes()
                await anext(pieces)
                await fleet.trial.crash()
                await anext(pieces)
        for _ in range(3):
            assert (await http.post(CHAT, json={})).json()["by"] == "stable"
    assert fleet.stable.count("requests_routed", arm="trial", where="no_peer") == 3


async def test_a_shadow_answers_copies_that_nobody_sees(fleet: Fleet) -> None:
    fleet.book.current = replace(TRIAL, mode="shadow", share=0.4)
    await fleet.look()
    key_id = fleet.stable.bench.key_ids["client"]
    users = [f"user-{number}" for number in range(20)]
    copied = [user for user in users if chosen(fleet.book.current, key_id, user)]
    async with fleet.stable.http() as http:
        for user in users:
            answer = await http.post(CHAT, json={"user": user})
            assert answer.json() == {"by": "stable", "user": user}
            await until(lambda: not fleet.stable.router._copies)
    assert fleet.stable.count("shadow_copies", outcome="sent") == len(copied) > 0
    assert fleet.trial.engine.source == ["shadow"] * len(copied)
    for headers in fleet.trial.engine.asked:
        made = "chatcmpl-" + headers["x-request-id"]
        assert fleet.trial.bench.identity.owner(made) == SHADOW_OWNER


async def test_copies_are_bounded_and_never_hold_a_user_up(fleet: Fleet) -> None:
    fleet.book.current = replace(TRIAL, mode="shadow", share=1.0)
    await fleet.look()
    fleet.stable.engine.hold.set()
    async with fleet.stable.http() as http:
        for _ in range(5):
            answer = await http.post(CHAT, json={"stream": True})
            assert b"data: stable" in answer.content
    assert fleet.stable.count("shadow_copies", outcome="dropped") == 3
    fleet.trial.engine.hold.set()
    await until(lambda: fleet.stable.count("shadow_copies", outcome="sent") == 2)


@pytest.mark.parametrize("who", ["client", "rater"])
async def test_what_a_shadow_said_can_not_be_judged_nor_read(bench: Bench, who: str) -> None:
    made = "chatcmpl-" + bench.identity.new_request_id(SHADOW_OWNER, 1)
    record = Completion(
        id=made,
        parts=1,
        key_id=bench.key_ids["client"],
        source="shadow",
        endpoint=CHAT,
        created_at=1.0,
        messages=[{"role": "user", "content": "hi"}],
        choices=[Choice(index=0, text="unseen")],
    )
    bench.queue.recorded.append(record)
    bench.queue.drain_into(bench.store)
    async with bench.http(who) as http:
        vote = await http.post("/v1/feedback", json={"type": "thumb", "completion_id": made, "value": "up"})
        assert (vote.status_code, vote.json()["error"]["type"]) == (404, "not_found")
        if who == "client":
            assert (await http.get(f"/v1/completions/{made}")).status_code == 404
    async with bench.http("operator") as http:
        assert (await http.get(f"/v1/completions/{made}")).json()["source"] == "shadow"
    assert bench.store.unjudged(10) == []
