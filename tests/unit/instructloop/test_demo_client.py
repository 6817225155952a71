"""The demo's client against a real HTTP server on a free port that answers what each test wants."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from instructloop.demo_client import DemoProblem, Server, each


class Site:
    """Answers with `reply`, which gets the request; notes every request's method, path, headers and body."""

    def __init__(self) -> None:
        self.reply: Callable[[BaseHTTPRequestHandler], None] = lambda _: None
        self.seen: list[tuple[str, str, dict[str, str], Any]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(raw) if raw else None
                site.seen.append((self.command, self.path, dict(self.headers), body))
                site.reply(self)

            do_GET = do_POST = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def answer(
    handler: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None
) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(data)


def client(site: Site, concurrency: int = 4) -> Server:
    return Server(site.url, "client-key", "operator-key", concurrency=concurrency)


async def test_feedback_that_meets_a_503_is_given_again_as_the_same_event(site: Site) -> None:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        if len(site.seen) < 3:
            answer(handler, 503, {"error": {"message": "Redis is away"}}, {"Retry-After": "0"})
        else:
            answer(handler, 202, {"event_id": "e1", "status": "queued"})

    site.reply = reply
    async with client(site) as server:
        assert await server.give({"type": "thumb"}) == "e1"
    keys = [headers["Idempotency-Key"] for _, _, headers, _ in site.seen]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert {headers["Authorization"] for _, _, headers, _ in site.seen} == {"Bearer client-key"}


async def test_a_refusal_is_not_retried_and_is_told(site: Site) -> None:
    site.reply = lambda handler: answer(handler, 422, {"error": {"message": "groups: too few"}})
    async with client(site) as server:
        with pytest.raises(DemoProblem, match=r"422 .*too few"):
            await server.give({"type": "ranking"})
    assert len(site.seen) == 1


async def test_choices_come_in_their_order_and_empty_ones_stay(site: Site) -> None:
    choices = [
        {"index": 1, "message": {"content": None}, "finish_reason": "stop"},
        {"index": 0, "message": {"content": "frogs"}, "finish_reason": "length"},
    ]
    site.reply = lambda handler: answer(handler, 200, {"id": "chatcmpl-1", "choices": choices})
    async with client(site) as server:
        found = await server.ask("Frogs?", n=2, temperature=0.5, max_tokens=9, seed=3)
    assert (found.completion_id, found.texts) == ("chatcmpl-1", ("frogs", ""))
    assert found.finish_reasons == ("length", "stop")
    body = site.seen[0][3]
    assert (body["model"], body["n"], body["max_tokens"], body["seed"]) == ("policy", 2, 9, 3)


async def test_a_completion_that_is_not_stored_yet_is_none(site: Site) -> None:
    site.reply = lambda handler: answer(handler, 404, {"error": {}})
    async with client(site) as server:
        assert await server.completion("chatcmpl-1") is None
    assert site.seen[0][2]["Authorization"] == "Bearer operator-key"


async def test_a_server_that_is_not_there_or_not_ready_is_told() -> None:
    site = Site()
    site.reply = lambda handler: answer(handler, 503, {"ready": False, "feedback": "no Redis"})
    async with client(site) as server:
        with pytest.raises(DemoProblem, match=r"not ready.*no Redis"):
            await server.check()
        site.close()
        with pytest.raises(DemoProblem, match="start `instructloop up` first"):
            await server.check()


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def piece(text: str, reason: str | None = None) -> bytes:
    return event(choices=[{"delta": {"content": text}, "finish_reason": reason}])


USAGE = event(choices=[], usage={"completion_tokens": 5})
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("lines", "failed", "cut"),
    [
        ([piece("a"), piece("b", "length"), USAGE, DONE], False, False),
        ([piece("a"), piece("b", "stop"), USAGE, DONE], False, True),
        ([piece("a", "length"), event(choices=[], usage={"completion_tokens": 4}), DONE], False, True),
        ([piece("a"), DONE], False, True),
        ([piece("a"), piece("b", "length"), USAGE], True, False),
        ([piece("a"), event(error={"message": "engine dead"})], True, False),
        ([piece("a"), b"data: {bro\n\n"], True, False),
        ([], True, False),
    ],
    ids=["whole", "stopped", "one token short", "no end given", "no [DONE]", "error", "torn", "nothing"],
)
async def test_a_stream_is_whole_cut_or_failed(
    lines: list[bytes], failed: bool, cut: bool, site: Site
) -> None:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("X-Completion-Id", "chatcmpl-1")
        handler.end_headers()
        for line in lines:
            handler.wfile.write(line)

    site.reply = reply
    async with client(site) as server:
        found = await server.stream("Frogs?", max_tokens=5)
    assert (found.error is not None, found.cut) == (failed, cut)
    assert found.completion_id == "chatcmpl-1"
    assert site.seen[0][3]["ignore_eos"] is True


async def test_a_refused_stream_has_failed(site: Site) -> None:
    site.reply = lambda handler: answer(handler, 503, {})
    async with client(site) as server:
        found = await server.stream("Frogs?", max_tokens=5)
    assert found.error is not None
    assert "503" in found.error
    assert found.completion_id is None


async def test_no_more_requests_run_at_once_than_allowed(site: Site) -> None:
    lock, running, most = threading.Lock(), 0, 0
    gate = threading.Barrier(3, timeout=10)

    def reply(handler: BaseHTTPRequestHandler) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait()  # opens only when three are in flight
        with lock:
            running -= 1
        answer(handler, 200, {"status": "stored"})

    site.reply = reply
    counts: list[int] = []
    async with client(site, concurrency=3) as server:
        found = await each([str(n) for n in range(12)], server.receipt, counts.append)
    assert most == 3
    assert counts == list(range(1, 13))
    assert len(found) == 12


async def test_the_first_failure_ends_the_others_and_is_raised_as_itself() -> None:
    ended: list[int] = []

    async def work(number: int) -> int:
        if number == 1:
            raise DemoProblem("refused")
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(number)
        return number

    with pytest.raises(DemoProblem, match="refused"):
        await each([0, 1, 2], work, lambda _: None)
    assert sorted(ended) == [0, 2]
