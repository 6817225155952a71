"""A serving process of the real routes, gate, queue, recorder and store, with no engine behind them.

Where vLLM's app stands, this one answers at once and hands the recorder a completion, as the engine does. It
reads its configuration as `instructloop serve` does: `python -m tests.benchmarks.feedback_server`.
"""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

import redis.asyncio
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.loops.auto import auto_loop_factory

from feedback.dead_letters import DeadLetters
from feedback.keys import Keys
from feedback.queue import FeedbackQueue
from feedback.records import Choice, Completion, WeightSpan
from feedback.spool import Spool
from feedback.store import Store
from instructloop import config as configuration
from instructloop import installation
from registry.lineage import Lineage
from server.access import Authenticator
from server.app import assemble
from server.context import GENERATION, Generation
from server.identity import Identity
from server.limits import Limits, RedisCounters
from server.metrics import ServerMetrics
from server.recorder import Recorder
from server.routes_feedback import FeedbackRoutes
from server.routes_state import StateRoutes

CHOICES, TOKENS = 3, 60


def generated(generation: Generation) -> Completion:
    """A record as the engine makes one: some choices of some tokens each."""
    return Completion(
        id=generation.completion_id,
        parts=1,
        key_id=generation.key_id,
        user=generation.user,
        endpoint=generation.endpoint,
        created_at=1.0,
        messages=generation.messages,
        prompt_token_ids=list(range(TOKENS)),
        sampling={"n": CHOICES, "temperature": 1.0},
        choices=[
            Choice(
                index=index,
                text=f"answer {index} " * 20,
                token_ids=list(range(TOKENS)),
                logprobs=[-0.1 * token for token in range(TOKENS)],
                finish_reason="stop",
                weight_spans=[WeightSpan(version="policy-0000", start=0, end=TOKENS)],
            )
            for index in range(CHOICES)
        ],
    )


def engine_app(recorder: Recorder) -> ASGIApp:
    """Answer every generation at once and record it."""

    async def generate(request: Request) -> JSONResponse:
        generation = GENERATION.get()
        assert generation is not None
        recorder.record(generated(generation))
        return JSONResponse({"id": generation.completion_id})

    return Starlette(routes=[Route("/v1/chat/completions", generate, methods=["POST"])])


async def serve() -> None:
    """Serve until SIGTERM."""
    config = configuration.load()
    database = installation.open_database(config)
    identity = Identity(installation.ensure_secret(config.data_dir), token_hours=1)
    # As `instructloop.parts` makes it.
    pool: redis.asyncio.ConnectionPool = redis.asyncio.BlockingConnectionPool.from_url(
        config.queue_url, timeout=config.queue.timeout_seconds
    )
    client = redis.asyncio.Redis.from_pool(pool)
    queue = FeedbackQueue(client, config.queue)
    metrics = ServerMetrics(CollectorRegistry())
    store = Store(database)
    recorder = Recorder(
        queue,
        Spool(config.data_dir / "spool.db", int(config.server.spool_mib * 2**20)),
        metrics,
        limit=config.server.recorder_queue,
        batch=config.server.recorder_batch,
    )
    limits = Limits(RedisCounters(client, f"{{{config.queue.stream}}}:limit"), config.server, metrics)
    state = StateRoutes(
        queue=queue,
        metrics=metrics,
        dead=lambda: False,
        obstacle=lambda: None,
        serving=lambda: "policy-0000",
        recording=recorder.trouble,
    )
    feedback = FeedbackRoutes(
        queue=queue,
        store=store,
        dead_letters=DeadLetters(database, config.store.waiting_hours),
        lineage=Lineage(database),
        identity=identity,
        limits=limits,
        metrics=metrics,
        batch_lines=config.server.batch_lines,
        gold_share=config.raters.gold_share,
    )
    app = assemble(
        engine_app(recorder),
        [state.router(), feedback.router()],
        settings=config.server,
        identity=identity,
        authenticator=Authenticator(Keys(database), identity),
        limits=limits,
        obstacle=_no_obstacle,
    )
    recording = asyncio.create_task(recorder.run())
    await listen(app, config.server.port)
    recording.cancel()
    await asyncio.gather(recording, return_exceptions=True)
    await recorder.flush(5.0)
    await client.aclose()


async def _no_obstacle() -> None:
    """Nothing stands in the way of generation."""


async def listen(app: ASGIApp, port: int) -> None:
    """Serve HTTP as `server.app` does."""
    uvicorn_config = uvicorn.Config(
        app, host="127.0.0.1", port=port, lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(uvicorn_config)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.handle_exit, signal.SIGTERM, None)
    await server.serve()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run on the event loop that uvicorn picks, as `instructloop serve` does."""
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(main)


if __name__ == "__main__":
    run(serve())
