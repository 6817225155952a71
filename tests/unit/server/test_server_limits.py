"""Rate limits at the door and on events: whose requests count under what, and how a refusal looks."""

import json
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from server_bench import Bench

from server.settings import ServerSettings

CHAT = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}


def limited(bench: Bench, **rates: str) -> None:
    bench.settings = bench.settings.model_copy(update=rates)
    bench.__post_init__()


def thumb(id_: str, **more: Any) -> dict[str, Any]:
    return {"type": "thumb", "completion_id": id_, "value": "up", **more}


def refused(response: httpx.Response) -> bool:
    """Whether it is a 429, which then has the one shape and says when to come again."""
    if response.status_code != 429:
        return False
    assert response.json()["error"]["type"] == "too_many_requests"
    assert set(response.json()["error"]) == {"type", "message", "param"}
    assert 1 <= int(response.headers["retry-after"]) <= 3600
    return True


async def test_a_key_may_ask_so_often_on_whatever_route_and_others_are_not_touched(bench: Bench) -> None:
    limited(bench, rate_per_key="3/hour")
    async with bench.http("client") as http, bench.http("other") as other, bench.http("operator") as operator:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.post("/v1/rollback")).status_code == 403  # refused before it counts
        assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert (await http.post("/v1/feedback", json={})).status_code == 422
        for request in (
            http.get("/v1/models"),
            http.post("/v1/chat/completions", json=CHAT),
            http.post("/v1/feedback", json={}),
        ):
            assert refused(await request)
        assert (await http.get("/health")).status_code == 200
        assert (await other.get("/v1/models")).status_code == 200
        assert (await operator.get("/v1/versions")).status_code == 200
    assert (
        bench.metrics.registry.get_sample_value("instructloop_requests_limited_total", {"limit": "key"}) == 3
    )


async def test_an_end_user_is_limited_and_does_not_use_up_what_the_client_may(bench: Bench) -> None:
    limited(bench, rate_per_key="5/hour", rate_per_end_user="2/hour")
    first, second = bench.completion(), bench.completion()

    def browser(id_: str, user: str | None) -> httpx.AsyncClient:
        return bench.http(**{"X-Feedback-Token": bench.token(id_, user)})

    async with browser(first, "bob") as http:
        assert (await http.post("/v1/feedback", json=thumb(first))).status_code == 202
        assert (await http.post("/v1/feedback", json={})).status_code == 422
        assert refused(await http.post("/v1/feedback", json=thumb(first)))
        assert refused(await http.get("/v1/feedback/fb-1"))
    async with browser(second, "bob") as http:  # the same end user with another token
        assert refused(await http.post("/v1/feedback", json=thumb(second)))
    for id_, user in ((first, "eve"), (first, None), (second, None)):
        async with browser(id_, user) as http:
            assert (await http.post("/v1/feedback", json=thumb(id_))).status_code == 202
    async with bench.http("client") as http:
        for _ in range(5):
            assert (await http.get("/v1/models")).status_code == 200


async def test_a_rater_that_a_client_names_is_limited_and_the_client_itself_as_its_requests(
    bench: Bench,
) -> None:
    limited(bench, rate_per_rater="2/hour")
    id_ = bench.completion()
    async with bench.http("client") as http:
        statuses = [
            (await http.post("/v1/feedback", json=thumb(id_, rater=rater))).status_code
            for rater in ("bob", "bob", "bob", "eve")
        ]
        assert statuses == [202, 202, 429, 202]
        assert refused(await http.post("/v1/feedback", json=thumb(id_, rater="bob")))
        for _ in range(4):
            assert (await http.post("/v1/feedback", json=thumb(id_))).status_code == 202
    async with bench.http("rater") as http:
        statuses = [(await http.post("/v1/feedback", json=thumb(id_))).status_code for _ in range(3)]
        assert statuses == [202, 202, 429]
    assert len(bench.queue.events) == 9


async def test_in_a_batch_only_the_lines_of_the_rater_who_gave_too_many_are_refused(bench: Bench) -> None:
    limited(bench, rate_per_rater="2/hour")
    id_ = bench.completion()
    raters = ["bob", "eve", "bob", "bob", None]
    lines = "\n".join(json.dumps(thumb(id_, rater=rater) if rater else thumb(id_)) for rater in raters)
    async with bench.http("client") as http:
        answers = [
            json.loads(line)
            for line in (await http.post("/v1/feedback/batch", content=lines)).text.splitlines()
        ]
    kinds = [answer["error"]["type"] if "error" in answer else "queued" for answer in answers]
    assert kinds == ["too_many_requests", "queued", "too_many_requests", "too_many_requests", "queued"]
    assert [event.rater.rpartition("/")[2] for event in bench.queue.events] == ["eve", ""]


async def test_limits_can_be_switched_off(bench: Bench) -> None:
    limited(bench, rate_per_key="none", rate_per_rater="none", rate_per_end_user="none")
    async with bench.http("client") as http:
        for _ in range(30):
            assert (await http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    "rate", ["", "5", "0/minute", "5/fortnight", "5 per minute", "-1/hour", "5/minute;1/hour"]
)
def test_a_rate_that_can_t_be_read_is_refused(rate: str) -> None:
    with pytest.raises(ValidationError, match="rate_per_key"):
        ServerSettings(rate_per_key=rate)
