"""The arena's routes: a blind pair, a vote on it, and what is refused."""

from typing import Any

import httpx
import pytest
from server_bench import Bench

from registry.arena import Arena, OfferedPair
from server.access import ROUTES

MESSAGES = [{"role": "user", "content": "Name a frog."}]


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    body = response.json()["error"]
    return response.status_code, body["type"], body["param"]


def offer(bench: Bench, count: int = 1, wanted: int = 2) -> tuple[Arena, list[str]]:
    arena = Arena(bench.database)
    pairs = [OfferedPair(MESSAGES, f"good {i}", f"bad {i}", "helpful") for i in range(count)]
    return arena, arena.offer(pairs, wanted)


async def test_a_pair_is_handed_out_blind_and_the_vote_counts_for_the_answer_that_was_meant(
    bench: Bench,
) -> None:
    arena, (id_,) = offer(bench)
    for who in ("rater", "operator"):
        async with bench.http(who) as http:
            pair = (await http.get("/v1/arena")).json()["pair"]
            assert set(pair) == {"id", "axis", "messages", "first", "second"}, "no names, no order"
            assert (pair["id"], pair["axis"], pair["messages"]) == (id_, "helpful", MESSAGES)
            good, bad = ("first", "second") if pair["first"] == "good 0" else ("second", "first")
            vote = {"vote": good, "labels": {bad: ["hallucination"]}}
            for _ in range(2):
                taken = await http.post(f"/v1/arena/{id_}", json=vote)
                assert (taken.status_code, taken.json()) == (200, {"pair_id": id_, "vote": good})
            assert error(await http.post(f"/v1/arena/{id_}", json={"vote": bad}))[:2] == (409, "conflict")
            assert (await http.get("/v1/arena")).json() == {"pair": None}
    (votes,) = arena.votes([id_]).values()
    assert sorted(vote.rater for vote in votes) == sorted(
        f"{bench.key_ids[who]}/" for who in ("rater", "operator")
    )
    assert {(vote.outcome, *vote.second_labels) for vote in votes} == {(1.0, "hallucination")}
    assert all(vote.first_labels == [] for vote in votes)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "vote"),
        ({"vote": "both"}, "vote"),
        ({"vote": "tie", "labels": {"first": ["nice"]}}, "labels.first.0"),
        ({"vote": "tie", "labels": {"third": []}}, "labels.third"),
        ({"vote": "tie", "rater": "bob"}, "rater"),
        ([], None),
    ],
)
async def test_a_vote_that_says_something_else_is_refused_by_field(
    bench: Bench, body: Any, param: str | None
) -> None:
    arena, (id_,) = offer(bench)
    async with bench.http("rater") as http:
        assert error(await http.post(f"/v1/arena/{id_}", json=body)) == (422, "invalid", param)
        assert error(await http.post("/v1/arena/pair-none", json={"vote": "tie"}))[:2] == (404, "not_found")
    assert arena.votes([id_]) == {id_: []}


async def test_only_raters_and_operators_get_in(bench: Bench) -> None:
    _, (id_,) = offer(bench)
    mine = [(m, p.replace("{id}", id_)) for m, p, _ in ROUTES if p.startswith("/v1/arena")]
    assert len(mine) == 2
    for method, path in mine:
        for who, status in ((None, 401), ("client", 403)):
            async with bench.http(who) as http:
                assert (await http.request(method, path, json={"vote": "tie"})).status_code == status
