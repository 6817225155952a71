"""One serving replica, put together: vLLM's app behind our gate, our routes, and the tasks in between.

It wires and supervises; every part's behaviour is in its own module. vLLM and torch are imported only once
`serve` runs.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import anyio.to_thread
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import REGISTRY
from sqlalchemy import Engine as Database
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from feedback.keys import Keys
from feedback.queue import FeedbackQueue
from feedback.settings import RaterSettings
from feedback.spool import Spool
from registry.registry import BrokenVersion, Registry, Replica, Track, Version
from registry.settings import RolloutSettings
from server.access import Authenticator
from server.errors import DATABASE_AWAY, Problem, invalid_field
from server.identity import Identity
from server.limits import Counters, Limits
from server.metrics import ServerMetrics
from server.middleware import Gate
from server.openapi import document
from server.recorder import Recorder
from server.routes import FromAbove, ReplicaState, all_routers
from server.routing import Router
from server.settings import ServerSettings
from server.shortcut import Shortcut
from server.swap import Swapper, is_proven

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 5.0
_DRAIN_SECONDS = 10
_WATCHDOG_SECONDS = 0.5
_ASKED_MOST = (("POST", "/v1/feedback"),)


class NothingToServe(RuntimeError):  # noqa: N818
    """No version is wanted, or none that was ever served is whole; the message says which."""


async def serve(
    settings: ServerSettings,
    rollout: RolloutSettings,
    *,
    queue: FeedbackQueue,
    counters: Counters,
    database: Database,
    versions: Path,
    spool: Path,
    secret: bytes,
    replica_id: str,
    waiting_hours: float,
    raters: RaterSettings,
    above: FromAbove,
) -> None:
    """Serve the registry's desired version until SIGINT or SIGTERM, following the registry meanwhile.

    `counters` hold what `server.limits` counts, `spool` is the file for completions while Redis is away.
    Raises NothingToServe, and RuntimeError if the engine's process ends by itself.
    """
    registry = Registry(database, versions)
    identity = Replica(
        replica_id, None, None, "starting", pid=os.getpid(), url=address(settings), track=settings.track
    )
    version = await anyio.to_thread.run_sync(first_whole, registry, settings.track)
    await anyio.to_thread.run_sync(registry.report, identity)
    prepare_environment()
    signal.signal(signal.SIGTERM, _end_start)
    # Not before: it takes seconds, and reads the environment that was just prepared.
    from server.engine import Engine

    metrics = ServerMetrics(REGISTRY)
    recorder = Recorder(
        queue,
        Spool(spool, int(settings.spool_mib * 2**20)),
        metrics,
        limit=settings.recorder_queue,
        batch=settings.recorder_batch,
    )
    engine = await Engine.start(settings, version.path, version.name, recorder)
    try:
        swapper = Swapper(
            engine,
            registry,
            metrics,
            identity,
            watch_seconds=rollout.watch_seconds,
            retry_seconds=settings.swap_retry_seconds,
            max_unavailable=rollout.max_unavailable,
        )
        await swapper.begin(version)
        # A version that no engine has held before is not started on, but swapped to, where it can be refused.
        await swapper.step()
        ids = Identity(secret, token_hours=settings.token_hours)
        routing = Router(
            registry,
            ids,
            metrics,
            replica_id=replica_id,
            track=settings.track,
            watch_seconds=rollout.watch_seconds,
            copies=rollout.shadow_copies,
        )
        limits = Limits(counters, settings, metrics)
        routers = all_routers(
            database=database,
            registry=registry,
            queue=queue,
            identity=ids,
            limits=limits,
            metrics=metrics,
            settings=settings,
            raters=raters,
            data_dir=versions.parent,
            waiting_hours=waiting_hours,
            wait_seconds=rollout.wait_seconds,
            state=ReplicaState(
                dead=lambda: engine.dead,
                obstacle=swapper.obstacle,
                serving=lambda: swapper.status.serving,
                recording=recorder.trouble,
            ),
            above=above,
        )
        app = assemble(
            engine.app,
            routers,
            settings=settings,
            identity=ids,
            authenticator=Authenticator(Keys(database), ids),
            limits=limits,
            obstacle=swapper.obstacle_at_rest,
            routing=routing,
        )
        async with engine.lifespan():
            tasks = [recorder.run, swapper.run, routing.run]
            await _run(app, settings, engine_dead=lambda: engine.dead, tasks=tasks)
        await recorder.flush(_FLUSH_SECONDS)
        await swapper.stop()
    finally:
        engine.close()


def first_whole(registry: Registry, track: Track) -> Version:
    """Pick the version to start on: the one that `track` wants, if an engine has held it before.

    Else, or if its files are broken, one that an engine has held: the stable one or one that served before.
    From there the wanted one is swapped to, which can be refused without an end. Only where no engine has
    held any, as at the very first start, is it the first that is whole. Raises NothingToServe.
    """
    stable, desired = registry.desired(), registry.desired(track)
    if stable is None or desired is None:
        raise NothingToServe("no version has been promoted yet")
    retired = [version.name for version in reversed(registry.versions()) if version.state == "retired"]
    whole: list[Version] = []
    for name in dict.fromkeys((desired.name, stable.name, *retired)):
        try:
            registry.verify(name)
            whole.append(registry.version(name))
        except (BrokenVersion, KeyError) as error:
            logger.error("can't start on %s: %s", name, error)
            continue
        if is_proven(whole[-1]):
            return whole[-1]
    if not whole:
        raise NothingToServe(f"{desired.name} is broken, and so is every version that served before it")
    return whole[0]


def address(settings: ServerSettings) -> str:
    """Return where other replicas reach this one, without a slash at the end."""
    if settings.url is not None:
        return settings.url.rstrip("/")
    host = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def prepare_environment() -> None:
    """Set what vLLM reads from the environment: no development routes, no telemetry, no downloads."""
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE"):
        os.environ.pop(name, None)
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def assemble(
    engine_app: ASGIApp,
    routers: Sequence[APIRouter],
    *,
    settings: ServerSettings,
    identity: Identity,
    authenticator: Authenticator,
    limits: Limits,
    obstacle: Callable[[], Awaitable[str | None]],
    routing: Router | None = None,
) -> ASGIApp:
    """Our routes, behind them the engine's app, in front of both the gate, and CORS where it is wanted."""
    inner = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    for router in routers:
        inner.include_router(router)
    ours = tuple(inner.routes)
    # When it is first asked for, and in a thread, as a plain function: it takes a while.
    described = cache(lambda: document(ours))
    inner.add_api_route("/v1/openapi.json", lambda: JSONResponse(described()))
    inner.mount("/", engine_app)
    inner.add_exception_handler(Problem, _problem)
    inner.add_exception_handler(RequestValidationError, _invalid)
    for away in DATABASE_AWAY:
        inner.add_exception_handler(away, _database_away)
    inner.add_exception_handler(Exception, _internal)
    app: ASGIApp = Gate(
        Shortcut(inner, _ASKED_MOST),
        authenticator=authenticator,
        identity=identity,
        limits=limits,
        max_body_bytes=settings.max_body_bytes,
        obstacle=obstacle,
        router=routing,
    )
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Completion-Id", "X-Feedback-Token", "Retry-After"],
        )
    return app


async def _run(
    app: ASGIApp,
    settings: ServerSettings,
    *,
    engine_dead: Callable[[], bool],
    tasks: Sequence[Callable[[], Awaitable[None]]],
) -> None:
    """Serve HTTP beside the background tasks until a signal comes or one of them fails."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.handle_exit, number, None)
    async with asyncio.TaskGroup() as group:
        background = [group.create_task(_forever(task)) for task in tasks]
        background.append(group.create_task(_watch(engine_dead)))
        try:
            await server.serve()
            if not server.started:
                raise RuntimeError(f"can't listen on {settings.host}:{settings.port}")
        finally:
            for task in background:
                task.cancel()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would end the process before records are flushed."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _end_start(number: int, frame: object) -> None:
    """End a start, which blocks the event loop, so that the engine's processes end with it."""
    raise SystemExit(128 + number)


async def _forever(task: Callable[[], Awaitable[None]]) -> None:
    await task()
    raise RuntimeError("a background task ended")


async def _watch(dead: Callable[[], bool]) -> None:
    while not dead():
        await asyncio.sleep(_WATCHDOG_SECONDS)
    raise RuntimeError("the engine's process has ended")


async def _problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return invalid_field(error.errors()[0], skip=1).response()


async def _database_away(request: Request, error: Exception) -> Response:
    logger.error("the database is away: %s", error)
    return Problem(503, "the database is away", retry_after=5).response()


async def _internal(request: Request, error: Exception) -> Response:
    # Starlette raises it again behind this answer, so it stands in the log.
    return Problem(500, "something went wrong in this server; its log says what").response()
