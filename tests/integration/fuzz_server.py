"""Our own routes behind the gate over real HTTP, with a real Redis, SQLite and ingest, but no engine."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
import redis.asyncio
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from evaluation.cases import check_case
from feedback import ingest
from feedback.events import Event, Thumb
from feedback.keys import Keys
from feedback.queue import Entry, FeedbackQueue, StreamReader
from feedback.records import Choice, Completion
from feedback.settings import QueueSettings, RaterSettings
from feedback.store import ResponseScore, Store
from instructloop.canary import Canary
from instructloop.database import connect, migrate
from registry.evaluations import Evaluations
from registry.registry import Registry, Replica
from registry.rounds import Rounds
from registry.settings import RolloutSettings
from server.access import Authenticator
from server.app import assemble
from server.identity import Identity, TokenClaims
from server.limits import Limits, RedisCounters
from server.metrics import ServerMetrics
from server.routes import FromAbove, ReplicaState, all_routers
from server.settings import ServerSettings

QUEUE = QueueSettings(timeout_seconds=1.0)
SECRET = b"s" * 32


@dataclass
class FuzzServer:
    """Where it listens, who may call it, and ids that exist."""

    url: str
    keys: dict[str, str]
    token: str
    completions: list[str]
    events: list[str]
    versions: list[str]


@contextmanager
def running(directory: Path, redis_url: str, settings: ServerSettings) -> Iterator[FuzzServer]:
    """Prepare an installation with something of everything in `directory`, and serve it from a thread."""
    database = connect(f"sqlite:///{directory / 'store.db'}")
    migrate(database)
    registry, rounds, store = Registry(database, directory / "versions"), Rounds(database), Store(database)
    keys = {role: Keys(database).create(role, role) for role in ("client", "rater", "operator")}  # type: ignore[arg-type]
    identity = Identity(SECRET, token_hours=1)
    key_id = keys["client"].id
    completions = [f"chatcmpl-{identity.new_request_id(key_id, 3)}" for _ in range(3)]
    completions += [f"resp_{identity.new_request_id(key_id)}", f"cmpl-{identity.new_request_id('other', 1)}"]
    found = FuzzServer(
        url="",
        keys={role: key.secret for role, key in keys.items()},
        token=identity.new_token(TokenClaims(completions[0], "zoe")),
        completions=completions,
        events=_fill_store(store, completions, key_id),
        versions=_fill_registry(registry, rounds, directory),
    )
    stop = threading.Event()
    reader = StreamReader(redis.Redis.from_url(redis_url), QUEUE, "fuzz")
    moving = threading.Thread(target=ingest.run, args=(reader, store, stop))
    moving.start()
    config = uvicorn.Config(
        _not_yet, host="127.0.0.1", port=0, lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)

    async def serve() -> None:
        pool = redis.asyncio.BlockingConnectionPool.from_url(redis_url, timeout=QUEUE.timeout_seconds)
        async with redis.asyncio.Redis.from_pool(pool) as client:
            metrics = ServerMetrics(CollectorRegistry())
            limits = Limits(RedisCounters(client, "feed:limit"), settings, metrics)
            queue = FeedbackQueue(client, QUEUE)
            routers = all_routers(
                database=database,
                registry=registry,
                queue=queue,
                identity=identity,
                limits=limits,
                metrics=metrics,
                settings=settings,
                raters=RaterSettings(),
                data_dir=directory,
                waiting_hours=24,
                wait_seconds=0.05,
                state=ReplicaState(
                    dead=lambda: False,
                    obstacle=lambda: None,
                    serving=lambda: "policy-0000",
                    recording=lambda: None,
                ),
                above=FromAbove(
                    round_report=lambda number: f"<h1>Round {rounds.get(number).id}</h1>",
                    evaluation_report=lambda number: (
                        f"<h1>Evaluation {Evaluations(database).get(number).id}</h1>"
                    ),
                    trial_report=Canary(database, registry, RolloutSettings()).report,
                    check_case=check_case,
                ),
            )
            config.app = assemble(
                Starlette(),
                routers,
                settings=settings,
                identity=identity,
                authenticator=Authenticator(Keys(database), identity),
                limits=limits,
                obstacle=_no_obstacle,
            )
            await server.serve()

    serving = threading.Thread(target=lambda: asyncio.run(serve()))
    serving.start()
    try:
        while not server.started:
            assert serving.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        found.url = f"http://127.0.0.1:{port}"
        yield found
    finally:
        server.should_exit = True
        stop.set()
        serving.join(20)
        moving.join(20)
        database.dispose()


async def _no_obstacle() -> None:
    """Nothing stands in the way of generation."""


async def _not_yet(scope: object, receive: object, send: object) -> None:
    raise AssertionError("the app is put in before the server starts")


def _fill_store(store: Store, completions: list[str], key_id: str) -> list[str]:
    entries = []
    for number, id_ in enumerate(completions[:2]):
        record = Completion(
            id=id_,
            parts=1,
            key_id=key_id,
            endpoint="/v1/chat/completions",
            created_at=1.0,
            messages=[{"role": "user", "content": "hi"}],
            prompt_token_ids=[1, 2],
            choices=[
                Choice(index=i, text="x", token_ids=[1], logprobs=[float("-inf")], finish_reason="stop")
                for i in range(3)
            ],
        )
        entries.append(Entry(f"{number}-0", "completion", record.model_dump_json().encode()))
    event = Event(
        event_id="fb-" + "0" * 32,
        key_id=key_id,
        rater=f"{key_id}/",
        received_at=1.0,
        feedback=Thumb(type="thumb", completion_id=completions[0], value="up"),
    )
    store.ingest([*entries, Entry("9-0", "event", event.model_dump_json().encode())])
    store.replace_scores(1, [ResponseScore(completions[1], 0, 0, 1.0, 0.5)])
    return [event.event_id]


def _fill_registry(registry: Registry, rounds: Rounds, directory: Path) -> list[str]:
    names = []
    for number in range(3):
        staging = directory / f"staging-{number}"
        staging.mkdir()
        (staging / "model.safetensors").write_bytes(bytes([number]))
        names.append(registry.publish(staging, parent=None, round_id=None, kind="test", details={}).name)
    registry.annotate(names[0], metrics={"kl": float("inf")})
    registry.promote(names[0], actor="test", reason="")
    registry.report(Replica("replica-1", names[0], names[0], "serving", last_swap_seconds=0.5))
    done = rounds.begin(0, 1, {"seed": 1}, 1)
    rounds.stage(done.id, "sft", "running")
    rounds.metric(done.id, "sft", 1, {"loss": float("nan"), "accuracy": 0.5})
    rounds.stage(done.id, "sft", "done", {"demonstrations": 20})
    rounds.finish(done.id, "done", version=names[1], verdict={"promote": False, "reasons": ["too few"]})
    return names
