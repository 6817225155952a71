"""Lineage and dead letters over HTTP: what operators see and do, and what they are told when they can't."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from server_bench import Bench

from feedback.queue import Entry
from registry.rounds import EventUse


def error(response: Any) -> tuple[int, str | None]:
    body = response.json()["error"]
    assert set(body) == {"type", "message", "param"}
    return response.status_code, body["param"]


@pytest.fixture
def learned(bench: Bench, publish: Callable[[str], str]) -> Bench:
    """Two versions, the second of a round that used seven events."""
    for weights in "ab":
        publish(weights)
    number = bench.rounds.begin(0, 9, {"parent": "policy-0000", "reward_model_from": None}, 0).id
    uses = [EventUse(f"fb-{n}", "trained" if n < 5 else "held_out") for n in range(6)]
    bench.rounds.record_uses(number, [*uses, EventUse("fb-6", "left_out", "a response is empty")])
    bench.rounds.finish(number, "done", version="policy-0001")
    return bench


async def test_a_version_tells_its_rounds_and_its_events_page_by_page(learned: Bench) -> None:
    async with learned.http("operator") as http:
        found = (await http.get("/v1/versions/policy-0001/lineage")).json()
        assert (found["version"], found["state"], found["next"]) == ("policy-0001", "candidate", None)
        (round_,) = found["rounds"]
        assert round_ == {
            "round_id": 1,
            "version": "policy-0001",
            "state": "candidate",
            "through": "own",
            "repeat_of": None,
            "cursor": 0,
            "cutoff": 9,
            "events": {"trained": 5, "held_out": 1, "left_out": 1},
            "reasons": {"a response is empty": 1},
        }
        assert found["events"][6] == {
            "round_id": 1,
            "event_id": "fb-6",
            "use": "left_out",
            "reason": "a response is empty",
        }
        paged: list[dict[str, Any]] = []
        query = "limit=3"
        while query:
            page = (await http.get(f"/v1/versions/policy-0001/lineage?{query}")).json()
            assert ("rounds" in page) == (query == "limit=3")
            paged += page["events"]
            query = f"limit=3&after={page['next']}" if page["next"] else ""
        assert paged == found["events"]
        held_out = (await http.get("/v1/versions/policy-0001/lineage?round=1&use=held_out")).json()
        assert [event["event_id"] for event in held_out["events"]] == ["fb-5"]
        base = (await http.get("/v1/versions/policy-0000/lineage")).json()
        assert (base["rounds"], base["events"]) == ([], [])


async def test_an_event_tells_its_rounds_and_versions(learned: Bench) -> None:
    id_ = learned.completion()
    async with learned.http("client") as http:
        thumb = {"type": "thumb", "completion_id": id_, "value": "up"}
        sent = (await http.post("/v1/feedback", json=thumb)).json()["event_id"]
        assert (await http.get(f"/v1/feedback/{sent}/lineage")).status_code == 403
    async with learned.http("operator") as http:
        assert (await http.get("/v1/feedback/fb-0/lineage")).json() == {
            "event_id": "fb-0",
            "rounds": [
                {
                    "round_id": 1,
                    "version": "policy-0001",
                    "repeat_of": None,
                    "use": "trained",
                    "reason": None,
                }
            ],
            "versions": [{"version": "policy-0001", "state": "candidate"}],
        }
        assert (await http.get("/v1/feedback/fb-5/lineage")).json()["versions"] == []
        assert error(await http.get(f"/v1/feedback/{sent}/lineage")) == (404, None)
        learned.queue.drain_into(learned.store)
        assert (await http.get(f"/v1/feedback/{sent}/lineage")).json()["rounds"] == []


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("policy-0009/lineage", 404, None),
        ("policy-0001/lineage?round=2", 404, "round"),
        ("policy-0001/lineage?limit=0", 422, "limit"),
        ("policy-0001/lineage?limit=10001", 422, "limit"),
        ("policy-0001/lineage?use=burnt", 422, "use"),
        ("policy-0001/lineage?after=fb-1", 422, "after"),
        ("policy-0001/lineage?after=2:fb-1", 404, "after"),
        ("policy-0001/lineage?after=%C2%B2:fb-1", 422, "after"),
        ("policy-0001/lineage?round=99999999999999999999", 422, "round"),
    ],
)
async def test_wrong_questions_about_lineage(
    learned: Bench, path: str, status: int, param: str | None
) -> None:
    async with learned.http("operator") as http:
        assert error(await http.get(f"/v1/versions/{path}")) == (status, param)


async def test_a_dead_lettered_event_keeps_its_receipt_until_it_is_replayed(bench: Bench) -> None:
    id_ = bench.completion()
    token = bench.token(id_, "bob")
    async with bench.http(**{"X-Feedback-Token": token}) as http:
        thumb = {"type": "thumb", "completion_id": id_, "value": "up"}
        sent = (await http.post("/v1/feedback", json=thumb)).json()["event_id"]
    (event,) = bench.queue.events
    bench.queue.events.clear()
    good = event.model_dump_json()
    bench.store.ingest([Entry("1-1", "event", good.replace('"up"', "1").encode(), sent, event.key_id)])
    for who, status in {"client": 200, "operator": 200, "other": 403, "rater": 403}.items():
        async with bench.http(who) as http:
            found = await http.get(f"/v1/feedback/{sent}")
            assert found.status_code == status
    async with bench.http(**{"X-Feedback-Token": bench.token(id_, "eve")}) as http:
        assert (await http.get(f"/v1/feedback/{sent}")).status_code == 403
    async with bench.http("operator") as http:
        (letter,) = (await http.get("/v1/dead-letters")).json()["dead_letters"]
        assert (letter["event_id"], letter["kind"], letter["rater"]) == (sent, "event", event.rater)
        path = f"/v1/dead-letters/{letter['id']}"
        shown = (await http.get(path)).json()
        assert (shown["encoding"], json.loads(shown["data"])["event_id"]) == ("utf-8", sent)
        assert error(await http.post(f"{path}/replay")) == (422, None)
        assert error(await http.post(f"{path}/fix", content=good.replace(sent, "fb-other"))) == (422, None)
        fixed = await http.post(f"{path}/fix", content=good)
        assert (fixed.status_code, fixed.json()["dead_letter"]["size"]) == (200, len(good))
    async with bench.http(**{"X-Feedback-Token": token}) as http:
        found = (await http.get(f"/v1/feedback/{sent}")).json()
        assert (found["status"], found["rounds"]) == ("rejected", [])
        assert found["reason"].startswith("feedback.thumb.value: ")
    async with bench.http("operator") as http:
        replayed = (await http.post(f"{path}/replay")).json()
        assert (replayed["action"], replayed["dead_letter"]["event_id"]) == ("replayed", sent)
        assert (await http.get(f"/v1/feedback/{sent}")).json()["status"] == "stored"
        assert error(await http.post(f"{path}/replay")) == (404, None)
        assert (await http.get("/v1/dead-letters")).json() == {"dead_letters": [], "next": None}


async def test_dead_letters_in_pages_of_any_bytes_and_dropped(bench: Bench) -> None:
    bench.store.ingest([Entry(f"{n}-0", "event", b"\xff%d" % n, f"fb-{n}") for n in range(5)])
    async with bench.http("operator") as http:
        ids: list[str] = []
        after = ""
        while after is not None:
            page = (await http.get(f"/v1/dead-letters?limit=2{after}")).json()
            ids += [letter["id"] for letter in page["dead_letters"]]
            after = f"&after={page['next']}" if page["next"] else None  # type: ignore[assignment]
        assert len(set(ids)) == 5
        shown = (await http.get(f"/v1/dead-letters/{ids[0][:9]}")).json()
        assert (shown["id"], shown["encoding"], shown["data"][:2]) == (ids[0], "base64", "/z")
        dropped = await http.post(f"/v1/dead-letters/{ids[0]}/drop", json={"reason": "noise"})
        assert dropped.json()["action"] == "dropped"
        assert len((await http.get("/v1/dead-letters")).json()["dead_letters"]) == 4
        assert len((await http.get("/v1/dead-letters?dropped=true")).json()["dead_letters"]) == 5
        found = (await http.get(f"/v1/feedback/{shown['event_id']}")).json()
        assert (found["status"], found["reason"][-16:]) == ("rejected", "; dropped: noise")
        unknown = "0" * 64
        for method, path in (
            ("GET", ""),
            ("POST", "/fix"),
            ("POST", "/replay"),
            ("POST", "/drop"),
        ):
            assert error(await http.request(method, f"/v1/dead-letters/{unknown}{path}")) == (404, None)
        assert error(await http.get(f"/v1/dead-letters?after={unknown}")) == (404, None)
        wrong = await http.post(f"/v1/dead-letters/{ids[1]}/fix?kind=letter", content=b"{}")
        assert error(wrong) == (422, "kind")
        wrong = await http.post(f"/v1/dead-letters/{ids[1]}/drop", json={"reason": 5})
        assert error(wrong) == (422, "reason")
    for who in ("client", "rater"):
        async with bench.http(who) as http:
            assert (await http.get("/v1/dead-letters")).status_code == 403
