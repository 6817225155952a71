"""Operators' routes on raters: seeing, quarantine, lifting, gold questions; and what receipts say of it."""

from typing import Any

import httpx
import pytest
from server_bench import Bench

from registry.rounds import EventUse, Use
from server.access import ROUTES


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    body = response.json()["error"]
    return response.status_code, body["type"], body["param"]


def operator(bench: Bench) -> str:
    return f"key {bench.key_ids['operator']} (operator)"


async def give(bench: Bench, rater: str, value: str = "up", completion_id: str | None = None) -> str:
    """One thumb of an end user of the client's; returns the event's id."""
    id_ = completion_id or bench.completion()
    thumb = {"type": "thumb", "completion_id": id_, "value": value, "rater": rater}
    async with bench.http("client") as http:
        event_id: str = (await http.post("/v1/feedback", json=thumb)).json()["event_id"]
    bench.queue.drain_into(bench.store)
    return event_id


async def receipt(bench: Bench, event_id: str) -> dict[str, Any]:
    async with bench.http("client") as http:
        found: dict[str, Any] = (await http.get(f"/v1/feedback/{event_id}")).json()
    return found


async def test_a_quarantine_is_seen_confirmed_and_lifted(bench: Bench) -> None:
    await give(bench, "bob")
    rater = f"{bench.key_ids['client']}/bob"
    async with bench.http("operator") as http:
        listed = (await http.get("/v1/raters")).json()
        assert listed["total"] == 1
        assert (listed["raters"][0]["rater"], listed["raters"][0]["state"]) == (rater, "active")
        made = await http.post("/v1/raters/quarantine", json={"rater": rater, "reason": "spam"})
        assert (made.status_code, made.json()) == (
            200,
            {"rater": rater, "state": "quarantined", "reason": "spam"},
        )
        (row,) = (await http.get("/v1/raters?limit=1")).json()["raters"]
        assert (row["state"], row["reason"]) == ("quarantined", "spam")
        assert error(await http.post("/v1/raters/quarantine", json={"rater": rater}))[:2] == (409, "conflict")
        assert (await http.post("/v1/raters/confirm", json={"rater": rater})).json()["state"] == "confirmed"
        assert (await http.post("/v1/raters/lift", json={"rater": rater})).json()["state"] == "lifted"
        entries = (await http.get("/v1/raters/log", params={"rater": rater})).json()["entries"]
        assert [(e["action"], e["actor"], e["reason"]) for e in entries] == [
            ("quarantine", operator(bench), "spam"),
            ("confirm", operator(bench), ""),
            ("lift", operator(bench), ""),
        ]
        assert (await http.get("/v1/raters/log?rater=other")).json()["entries"] == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (422, "invalid", "rater")),
        ({"rater": ""}, (422, "invalid", "rater")),
        ({"rater": 5}, (422, "invalid", "rater")),
        ({"rater": "k/x", "reason": 5}, (422, "invalid", "reason")),
        ({"rater": "k/x", "reason": "x" * 1001}, (422, "invalid", "reason")),
        ({"rater": "k/nobody"}, (404, "not_found", "rater")),
        ([], (422, "invalid", None)),
    ],
)
async def test_a_wrong_request_says_what_is_wrong(
    bench: Bench, body: Any, expected: tuple[int, str, str | None]
) -> None:
    async with bench.http("operator") as http:
        assert error(await http.post("/v1/raters/quarantine", json=body)) == expected


async def test_wrong_parameters_are_named(bench: Bench) -> None:
    async with bench.http("operator") as http:
        for path, param in (
            ("/v1/raters?limit=0", "limit"),
            ("/v1/raters/log?limit=x", "limit"),
            ("/v1/raters/agreement?days=0", "days"),
        ):
            assert error(await http.get(path)) == (422, "invalid", param)


async def test_agreement_is_told(bench: Bench) -> None:
    id_ = bench.completion()
    for rater, value in (("ann", "up"), ("bob", "up"), ("eve", "down")):
        await give(bench, rater, value, id_)
    async with bench.http("operator") as http:
        found = (await http.get("/v1/raters/agreement?days=30")).json()
    assert found["days"] == 30
    assert found["all"] | {"alpha": None} == {
        "raters": 3,
        "units": 1,
        "share": pytest.approx(1 / 3),
        "pairs": 3,
        "decided_share": pytest.approx(1 / 3),
        "decided_pairs": 3,
        "alpha": None,
    }
    assert list(found["by_task"]) == ["thumb"]
    assert len(found["over_time"]) == 1


async def test_gold_questions_are_added_listed_and_removed(bench: Bench) -> None:
    event_id = await give(bench, "expert")
    async with bench.http("operator") as http:
        added = await http.post("/v1/gold", json={"event_id": event_id, "reason": "plain"})
        assert added.status_code == 200
        assert (added.json()["event_id"], added.json()["actor"]) == (event_id, operator(bench))
        (listed,) = (await http.get("/v1/gold")).json()["gold"]
        assert listed == added.json()
        assert listed["feedback"]["value"] == "up"
        assert error(await http.post("/v1/gold", json={"event_id": "fb-none"})) == (
            409,
            "conflict",
            "event_id",
        )
        assert error(await http.post("/v1/gold", json={}))[2] == "event_id"
        assert (await http.delete(f"/v1/gold/{event_id}")).json() == {"removed": event_id}
        assert error(await http.delete(f"/v1/gold/{event_id}"))[:2] == (404, "not_found")


async def test_receipts_say_that_a_rater_is_in_quarantine_and_which_rounds_took_its_events(
    bench: Bench,
) -> None:
    def learn(version: str, **uses: Use) -> int:
        last = bench.rounds.last_done()
        cursor = (last.cutoff or 0) if last else 0
        round_ = bench.rounds.begin(cursor, bench.store.head(), {}, 0)
        bench.rounds.record_uses(round_.id, [EventUse(ids[name], use) for name, use in uses.items()])
        bench.rounds.finish(round_.id, "done", version=version)
        return round_.id

    rater = f"{bench.key_ids['client']}/bob"
    ids = {"before": await give(bench, "bob")}
    first = learn("policy-0001", before="trained")
    ids |= {"during": await give(bench, "bob"), "other": await give(bench, "ann")}
    bench.store.raters.quarantine(rater, actor="op", reason="")
    second = learn("policy-0002", during="left_out", other="trained")
    assert (await receipt(bench, ids["before"]))["rounds"] == [first]
    held = await receipt(bench, ids["during"])
    assert (held["status"], held["rounds"], held["versions"]) == ("stored", [], [])
    assert (
        held["reason"]
        == "the rater is in quarantine: this counts in no further round until an operator lifts it"
    )
    assert (await receipt(bench, ids["other"]))["rounds"] == [second]
    bench.store.raters.lift(rater, actor="op", reason="")
    assert (await receipt(bench, ids["during"]))["reason"] is None
    third = learn("policy-0003", during="trained")
    found = await receipt(bench, ids["during"])
    assert (found["rounds"], found["versions"]) == ([third], ["policy-0003"])
    assert (await receipt(bench, ids["before"]))["rounds"] == [first]


async def test_all_of_this_is_the_operators(bench: Bench) -> None:
    mine = [(m, p.replace("{id}", "x")) for m, p, _ in ROUTES if p.startswith(("/v1/raters", "/v1/gold"))]
    assert len(mine) == 9
    for who, status in (("client", 403), ("rater", 403), (None, 401)):
        async with bench.http(who) as http:
            for method, path in mine:
                assert (await http.request(method, path)).status_code == status, (who, method, path)
