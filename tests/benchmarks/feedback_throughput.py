"""What the promises cost: giving and storing feedback beside bare loops that promise nothing.

`submit`: `POST /v1/feedback` beside a FastAPI route that only does the same durable XADD. `ingest`: storing a
backlog beside a loop that reads the same entries and inserts the same rows in the same batches. Each pair on
one Redis (`appendfsync always`), in turn, slice by slice, each in a process of its own; the ratio is the
median over the slices. `backlog`: 200,000 events stored by `instructloop ingest`, with its memory. Prints
JSON. Run it with `make bench-feedback`; some minutes on two cores.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis
import redis.asyncio
import sqlalchemy as sa

from feedback import ingest, tables
from feedback.events import FEEDBACK, Event
from feedback.keys import Keys
from feedback.queue import Entry, FeedbackQueue, StreamReader
from feedback.settings import QueueSettings
from feedback.store import Store
from instructloop import config as configuration
from instructloop import database, installation, redis_process
from tests.benchmarks.fault_parts import ROOT, free_port
from tests.benchmarks.feedback_server import generated, listen, run

QUEUE = QueueSettings()
COMPLETIONS = 2000
WORKERS = 32


def main() -> None:
    """Measure and print, or be one of the contenders (`--child`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["submit", "ingest", "backlog"])
    parser.add_argument("--slices", type=int, default=12)
    parser.add_argument("--requests", type=int, default=2000, help="in a slice of submit")
    parser.add_argument("--events", type=int, default=10_000, help="in a slice of ingest")
    parser.add_argument("--backlog", type=int, default=200_000)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        CHILDREN[options.child[0]](*options.child[1:])
        return
    found = {}
    with installed() as place:
        if "submit" in options.what:
            found["submit"] = asyncio.run(submit(place, options.slices, options.requests))
        if "ingest" in options.what:
            found["ingest"] = storing(place, options.slices, options.events)
        if "backlog" in options.what:
            found["backlog"] = backlog(place, options.backlog)
    print(json.dumps(found, indent=1))


class Place:
    """A data directory with a running embedded Redis and the completions that are judged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {
            "INSTRUCTLOOP_DATA_DIR": str(directory),
            # Counted as always, and never reached.
            "INSTRUCTLOOP_SERVER__RATE_PER_KEY": "100000000/minute",
            "OMP_NUM_THREADS": "1",
        }
        self.redis_url = redis_process.url(directory)

    def spawn(self, *arguments: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Start `python -m …` in this installation."""
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], env=self.environment | variables, cwd=ROOT
        )

    def child(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start a contender."""
        return self.spawn("tests.benchmarks.feedback_throughput", "--child", *arguments)


@contextmanager
def installed() -> Iterator[Place]:
    """A fresh installation with its Redis."""
    place = Place(Path(tempfile.mkdtemp(prefix="il-b-")))
    server = subprocess.Popen(redis_process.prepare(place.directory), stdout=subprocess.DEVNULL)
    try:
        while redis_process.failure(place.directory):
            time.sleep(0.05)
        yield place
    finally:
        server.terminate()
        server.wait()
        shutil.rmtree(place.directory)


def said(number: int, completion_id: str) -> dict[str, Any]:
    """One event of the mix: thumbs, ratings, rankings of three and demonstrations, each of another rater."""
    rater = {"rater": f"rater-{number}"}
    match number % 4:
        case 0:
            return {"type": "thumb", "completion_id": completion_id, "choice": 1, "value": "up", **rater}
        case 1:
            return {"type": "rating", "completion_id": completion_id, "choice": 2, "score": 5, **rater}
        case 2:
            groups = [[{"completion_id": completion_id, "choice": choice}] for choice in range(3)]
            return {"type": "ranking", "groups": groups, **rater}
        case _:
            text = "This is what it should have said. " * 5
            return {"type": "demonstration", "completion_id": completion_id, "text": text, **rater}


# -- giving


async def submit(place: Place, slices: int, requests: int) -> dict[str, Any]:
    """Load both servers in turn."""
    config = configuration.load(environment=place.environment)
    engine = installation.open_database(config)
    key = Keys(engine).create("client", "benchmark").secret
    engine.dispose()
    ports = {"ours": free_port(), "bare": free_port()}
    processes = {
        "ours": place.spawn("tests.benchmarks.feedback_server", INSTRUCTLOOP_SERVER__PORT=str(ports["ours"])),
        "bare": place.child("bare_route", str(ports["bare"]), place.redis_url),
    }
    try:
        for port in ports.values():
            await _listening(port)
        ids = await _completions(ports["ours"], key)
        slices_of: dict[str, list[dict[str, float]]] = {name: [] for name in ports}
        number = 0
        for _ in range(slices + 1):
            for name, port in ports.items():
                bodies = [said(number + i, random.choice(ids)) for i in range(requests)]
                number += requests
                process = psutil.Process(processes[name].pid)
                slices_of[name].append(await _load(port, key, bodies, process))
        # The first ones warm up.
        return _compared({name: found[1:] for name, found in slices_of.items()})
    finally:
        for process in processes.values():
            process.terminate()
            process.wait()


async def _load(
    port: int, key: str, bodies: Sequence[dict[str, Any]], process: psutil.Process
) -> dict[str, float]:
    """Send the events over some connections, as fast as they are answered."""
    waiting = iter([_request(key, body) for body in bodies])

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in waiting:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            if not head.startswith(b"http/1.1 202"):
                raise RuntimeError(f"{head!r} {body!r}")
        writer.close()

    cpu, own, began = sum(process.cpu_times()[:2]), time.process_time(), time.perf_counter()
    await asyncio.gather(*(work() for _ in range(WORKERS)))
    seconds = time.perf_counter() - began
    return {
        "per_second": len(bodies) / seconds,
        "cpu_us": 1e6 * (sum(process.cpu_times()[:2]) - cpu) / len(bodies),
        "load_cpu_share": (time.process_time() - own) / seconds,
    }


def _request(key: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/feedback HTTP/1.1\r\nHost: benchmark\r\n"
        f"Authorization: Bearer {key}\r\nIdempotency-Key: {uuid.uuid4()}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def _completions(port: int, key: str) -> list[str]:
    body = {"model": "policy", "n": 3, "messages": [{"role": "user", "content": "Name a fruit."}]}
    url, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(headers=headers, timeout=30) as client:
        answers = [await client.post(url, json=body) for _ in range(COMPLETIONS)]
    return [answer.headers["X-Completion-Id"] for answer in answers]


async def _listening(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
            continue
        writer.close()
        return
    raise RuntimeError("a server does not start")


def bare_route(port: str, redis_url: str) -> None:
    """A FastAPI route that only does the durable XADD."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

    client: Any = redis.asyncio.Redis.from_url(redis_url)
    app = FastAPI()

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> JSONResponse:
        event, event_id = await request.json(), f"fb-{uuid.uuid4().hex}"
        await client.xadd("bare", {"kind": "event", "data": json.dumps(event), "event": event_id})
        return JSONResponse({"event_id": event_id, "status": "queued"}, 202)

    run(listen(app, int(port)))


# -- storing


def storing(place: Place, slices: int, events: int) -> dict[str, Any]:
    """Let both drain equal streams into fresh databases in turn."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    for number in range(slices + 1):
        for name, drained in found.items():
            path = place.directory / f"{name}-{number}.db"
            with redis.Redis.from_url(place.redis_url) as client:
                client.flushall()
            ids = _prepared(path)
            asyncio.run(_fill(place.redis_url, events, ids))
            output = place.directory / "drained.json"
            child = place.child("drain", name, place.redis_url, str(path), str(output))
            if child.wait() != 0:
                raise RuntimeError(f"{name} failed")
            drained.append(json.loads(output.read_text()))
            for file in place.directory.glob(f"{path.name}*"):
                file.unlink()
    return _compared({name: drained[1:] for name, drained in found.items()})


def _prepared(path: Path) -> list[str]:
    """A database with the completions; returns their ids."""
    from server.context import Generation

    engine = database.connect(f"sqlite:///{path}")
    database.migrate(engine)
    ids = [f"chatcmpl-benchmark-{number:016x}-0123456789ab" for number in range(COMPLETIONS)]
    messages = [{"role": "user", "content": "Name a fruit."}]
    records = [
        generated(Generation(id_, "/v1/chat/completions", "key", None, messages)).model_dump_json().encode()
        for id_ in ids
    ]
    Store(engine).ingest([Entry(f"1-{i}", "completion", data) for i, data in enumerate(records)])
    engine.dispose()
    return ids


async def _fill(url: str, count: int, ids: Sequence[str]) -> None:
    client = redis.asyncio.Redis.from_url(url)
    queue = FeedbackQueue(client, QUEUE)
    for start in range(0, count, 1000):
        await queue.submit_batch(
            [
                Event(
                    event_id=f"fb-{number:032x}",
                    key_id="key",
                    rater=f"key/rater-{number}",
                    received_at=time.time(),
                    feedback=FEEDBACK.validate_python(said(number, ids[number % len(ids)])),
                )
                for number in range(start, min(start + 1000, count))
            ]
        )
    await client.aclose()


def drain(name: str, redis_url: str, path: str, output: str) -> None:
    """Store all that is in the stream, and say how long it took."""
    client = redis.Redis.from_url(redis_url)
    count = client.xlen(QUEUE.stream)
    engine = database.connect(f"sqlite:///{path}")
    with engine.connect() as connection:
        connection.execute(sa.select(tables.counter))
    began, cpu = time.perf_counter(), time.process_time()
    {"ours": _drain_ours, "bare": _drain_bare}[name](client, engine)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    with engine.connect() as connection:
        stored = connection.execute(sa.select(sa.func.count()).select_from(tables.events)).scalar_one()
    assert (stored, client.xlen(QUEUE.stream)) == (count, 0), f"{stored} of {count} are stored"
    Path(output).write_text(json.dumps({"per_second": count / seconds, "cpu_us": 1e6 * cpu_seconds / count}))


def _drain_ours(client: redis.Redis, engine: sa.Engine) -> None:
    stop = threading.Event()

    class Draining(StreamReader):
        def read(self, block_seconds: float) -> list[Entry]:
            entries = super().read(0)
            if not entries:
                stop.set()
            return entries

    ingest.run(Draining(client, QUEUE, "benchmark"), Store(engine), stop)


def _drain_bare(client: redis.Redis, engine: sa.Engine) -> None:
    """Read, parse, insert, commit, acknowledge: nothing is checked, nobody's earlier word is looked for."""
    stream, group, position, now = QUEUE.stream, QUEUE.group, 0, time.time()
    client.xgroup_create(stream, group, id="0")
    while answer := client.xreadgroup(group, "bare", {stream: ">"}, count=QUEUE.batch):
        entries: Any = next(iter(answer.values()))[0] if isinstance(answer, dict) else answer[0][1]
        events, targets = [], []
        for _, fields in entries:
            event = json.loads(fields[b"data"])
            said_, position = event["feedback"], position + 1
            id_ = said_.get("completion_id") or said_["groups"][0][0]["completion_id"]
            targets.append({"event_id": event["event_id"], "completion_id": id_})
            events.append(
                {name: event[name] for name in ("event_id", "key_id", "rater", "source", "received_at")}
                | {"type": said_["type"], "target": f"{id_}#{position}", "feedback": said_}
                | {"ingested_at": now, "status": "stored", "reason": None, "position": position}
                | {"superseded_by": None, "superseded_position": None}
            )
        with engine.begin() as connection:
            connection.execute(sa.insert(tables.events), events)
            connection.execute(sa.insert(tables.event_targets), targets)
        ids = [id_ for id_, _ in entries]
        with client.pipeline(transaction=True) as pipeline:
            pipeline.xack(stream, group, *ids)
            pipeline.xdel(stream, *ids)
            pipeline.execute()


# -- a backlog


def backlog(place: Place, events: int) -> dict[str, Any]:
    """Let `instructloop ingest` store many events; its memory and pace at ten points, and Redis' memory."""
    path = place.directory / "backlog.db"
    client = redis.Redis.from_url(place.redis_url)
    client.flushall()
    ids = _prepared(path)
    before = client.info("memory")["used_memory"]
    asyncio.run(_fill(place.redis_url, events, ids))
    full = client.info("memory")["used_memory"]
    process = place.spawn(
        "instructloop.cli", "ingest", "--consumer", "benchmark", INSTRUCTLOOP_STORE__URL=f"sqlite:///{path}"
    )
    points = []
    last_left, last_at = events, time.monotonic()
    try:
        while (left := client.xlen(QUEUE.stream)) > 0 or len(points) < 10:
            if left <= events - (len(points) + 1) * events // 10:
                now = time.monotonic()
                points.append(
                    {
                        "stored": events - left,
                        "rss_mib": round(psutil.Process(process.pid).memory_info().rss / 2**20, 1),
                        "per_second": round((last_left - left) / (now - last_at)),
                    }
                )
                last_left, last_at = left, now
            time.sleep(0.02)
    finally:
        process.terminate()
        process.wait()
    engine = database.connect(f"sqlite:///{path}")
    counts = Store(engine).counts()
    engine.dispose()
    return {
        "events": events,
        "stored": counts["stored"],
        "points": points,
        "redis_mib": {
            name: round(value / 2**20, 1)
            for name, value in (
                ("before", before),
                ("full", full),
                ("after", client.info("memory")["used_memory"]),
            )
        },
    }


def _compared(slices: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both, and the ratio: the median over pairs of slices that followed each other."""
    pairs = list(zip(slices["ours"], slices["bare"], strict=True))
    return {
        name: {key: round(statistics.median(one[key] for one in found), 2) for key in found[0]}
        for name, found in slices.items()
    } | {
        "ratio": round(statistics.median(o["per_second"] / b["per_second"] for o, b in pairs), 3),
        "ratio_of_cpu": round(statistics.median(b["cpu_us"] / o["cpu_us"] for o, b in pairs), 3),
        "ratios": sorted(round(o["per_second"] / b["per_second"], 2) for o, b in pairs),
    }


CHILDREN: dict[str, Callable[..., None]] = {"bare_route": bare_route, "drain": drain}

if __name__ == "__main__":
    main()
