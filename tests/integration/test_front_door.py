"""docker/nginx.conf before two servers: each token at once, a hang-up passed on, a dead one passed by.

The servers stand in for replicas, whose own part is tested elsewhere; nginx is a real one.
"""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

CONFIGURATION = Path(__file__).resolve().parents[2] / "docker" / "nginx.conf"


class QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class Upstream:
    """A server that streams one piece and then waits for `hold`; it keeps the headers that it saw."""

    name: str
    port: int = field(default_factory=free_port)
    seen: list[dict[str, str]] = field(default_factory=list)
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    server: QuietServer | None = None

    async def start(self) -> None:
        routes = [Route("/{path:path}", self.answer, methods=["POST"])]
        config = uvicorn.Config(
            Starlette(routes=routes), port=self.port, log_level="critical", lifespan="off"
        )
        self.server = QuietServer(config)
        self._serving = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        assert self.server is not None
        self.server.should_exit = self.server.force_exit = True
        await asyncio.wait([self._serving], timeout=5)

    async def answer(self, request: Request) -> Response:
        self.seen.append(dict(request.headers))
        if request.url.path == "/stream":
            return StreamingResponse(self.pieces(), media_type="text/event-stream")
        return JSONResponse({"by": self.name, "size": len(await request.body())})

    async def pieces(self) -> AsyncIterator[bytes]:
        try:
            yield f"data: {self.name}\n\n".encode()
            await self.hold.wait()
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cut.set()
            raise


@dataclass
class FrontDoor:
    url: str
    upstreams: dict[str, Upstream]

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=10)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[FrontDoor]:
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("nginx is not installed here: its configuration is not tested")
    upstreams = {name: Upstream(name) for name in ("instructloop", "replica")}
    port, text = free_port(), CONFIGURATION.read_text()
    for name, upstream in upstreams.items():
        text = text.replace(f"server {name}:8000", f"server 127.0.0.1:{upstream.port}")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{port}").replace(
        "/tmp/nginx.pid", f"{tmp_path}/pid"
    )
    assert ":8000" not in text
    # Where an unprivileged one may write.
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"    {name}_temp_path {tmp_path}/{name};\n" for name in paths)
    text = re.sub(r"(http \{\n)", rf"\1{temporary}", text)
    if os.getuid() == 0:
        text = "user root;\n" + text
    (tmp_path / "nginx.conf").write_text(text)
    command = [program, "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-g", "daemon off;"]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for upstream in upstreams.values():
            await upstream.start()
        deadline = time.monotonic() + 10
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((tmp_path / "log").read_text())
            await asyncio.sleep(0.02)
        yield FrontDoor(f"http://127.0.0.1:{port}", upstreams)
    finally:
        process.terminate()
        process.wait(timeout=10)
        log.close()
        for upstream in upstreams.values():
            if upstream.server is not None:
                await upstream.stop()


async def test_requests_are_shared_out_and_a_dead_replica_is_passed_by(door: FrontDoor) -> None:
    async with door.http() as http:
        by = Counter([(await http.post("/v1/chat/completions", json={})).json()["by"] for _ in range(10)])
        assert min(by["instructloop"], by["replica"]) >= 4
        await door.upstreams["replica"].stop()
        answers = [await http.post("/v1/chat/completions", json={}) for _ in range(20)]
        assert {answer.json()["by"] for answer in answers} == {"instructloop"}
        large = await http.post("/v1/feedback/batch", content=b"x" * (4 * 2**20))
        assert large.json()["size"] == 4 * 2**20


async def test_each_token_comes_at_once_and_who_hangs_up_stops_the_replica(door: FrontDoor) -> None:
    async with door.http() as http:
        async with http.stream("POST", "/stream", json={}) as answer:
            first = await anext(answer.aiter_bytes())
        (serving,) = [one for one in door.upstreams.values() if one.seen]
        assert first == f"data: {serving.name}\n\n".encode()
    async with asyncio.timeout(10):
        await serving.cut.wait()


async def test_nobody_outside_speaks_as_a_replica(door: FrontDoor) -> None:
    async with door.http() as http:
        sent = {"X-InstructLoop-Errand": "shadow.1", "Authorization": "Bearer x"}
        await http.post("/v1/chat/completions", json={}, headers=sent)
    (seen,) = [headers for one in door.upstreams.values() for headers in one.seen]
    assert "x-instructloop-errand" not in seen
    assert seen["authorization"] == "Bearer x"
