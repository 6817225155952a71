"""Asking an endpoint: order, bounds, patience, and what is said of a refusal."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from evaluation.endpoint import Endpoint, EndpointProblem, text_of


def answer(text: str) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def endpoint(handle: Callable[[httpx.Request], httpx.Response], **more: Any) -> tuple[Endpoint, list[float]]:
    waits: list[float] = []
    transport = httpx.MockTransport(handle)
    return Endpoint("http://h/v1/", "m", "secret", sleep=waits.append, transport=transport, **more), waits


def test_answers_come_in_order_and_no_more_at_once_than_allowed() -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def handle(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        assert (request.url.path, request.headers["Authorization"]) == (
            "/v1/chat/completions",
            "Bearer secret",
        )
        body = json.loads(request.content)
        assert body["model"] == "m"
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.002 * (20 - body["seed"]))
        with lock:
            under_way -= 1
        return answer(str(body["seed"]))

    asked, _ = endpoint(handle, concurrency=3)
    assert [text_of(one) for one in asked.chat([{"seed": i} for i in range(20)])] == list(map(str, range(20)))
    assert most == 3


def test_what_is_refused_for_now_is_asked_again_later_each_time() -> None:
    script: list[Any] = [
        httpx.Response(429, headers={"Retry-After": "7"}),
        httpx.ConnectError("refused"),
        httpx.Response(503, text="overloaded"),
        answer("at last"),
    ]

    def handle(request: httpx.Request) -> httpx.Response:
        now = script.pop(0)
        if isinstance(now, Exception):
            raise now
        assert isinstance(now, httpx.Response)
        return now

    asked, waits = endpoint(handle, concurrency=1)
    assert [text_of(one) for one in asked.chat([{}])] == ["at last"]
    assert waits[0] == 7
    assert 1.0 <= waits[1] < waits[2] <= 3.0


def test_a_refusal_for_good_is_told_once_and_without_the_key() -> None:
    calls = []

    def handle(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        return httpx.Response(404, json={"error": {"message": "no model m"}})

    asked, waits = endpoint(handle, concurrency=1)
    with pytest.raises(
        EndpointProblem, match="http://h/v1 refuses a request for m with 404: no model m"
    ) as told:
        asked.chat([{}] * 5)
    assert "secret" not in str(told.value)
    assert (len(calls), waits) == (1, [])


def test_patience_ends() -> None:
    asked, waits = endpoint(lambda _: httpx.Response(500, text="broken"))
    with pytest.raises(EndpointProblem, match="in 8 attempts: 500: broken"):
        asked.chat([{}])
    assert len(waits) == 7
    assert max(waits) <= 60


@pytest.mark.parametrize("body", ["[]", '{"choices": []}', "<html>", '{"choices": [{"message": null}]}'])
def test_something_else_than_an_answer_is_refused(body: str) -> None:
    asked, _ = endpoint(lambda _: httpx.Response(200, text=body))
    with pytest.raises(EndpointProblem, match="something else than a chat completion"):
        asked.chat([{}])
