"""A database that hangs or is away costs a request some seconds and a 503, not the process its threads."""

import asyncio
import threading
import time

import pytest
from server_bench import Bench
from sqlalchemy import exc

from server.errors import Problem
from server.lookups import from_database

AWAY = exc.OperationalError("SELECT", None, Exception("no route to host"))


@pytest.mark.parametrize("problem", [AWAY, exc.TimeoutError("QueuePool limit")])
async def test_a_database_that_is_away_is_503(problem: Exception) -> None:
    def read() -> None:
        raise problem

    with pytest.raises(Problem) as refused:
        await from_database(read)
    assert refused.value.status == 503
    assert refused.value.retry_after is not None


async def test_what_is_wrong_otherwise_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        await from_database(lambda: 1 // 0)
    assert await from_database(divmod, 7, 2) == (3, 1)


async def test_reads_that_hang_are_given_up_and_take_few_threads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.lookups.LONGEST_SECONDS", 0.3)
    go = threading.Event()
    monkeypatch.setattr("feedback.store.Store.event", lambda store, event_id: go.wait(10))
    before = threading.active_count()
    try:
        async with bench.http("client") as http:
            began = time.monotonic()
            answers = await asyncio.gather(*(http.get("/v1/feedback/fb-1") for _ in range(60)))
            assert time.monotonic() - began < 5
            assert {answer.status_code for answer in answers} == {503}
            assert {answer.json()["error"]["type"] for answer in answers} == {"unavailable"}
            assert threading.active_count() - before < 40
    finally:
        go.set()
    monkeypatch.undo()
    async with bench.http("client") as http:
        assert (await http.get("/v1/feedback/fb-1")).status_code == 404
