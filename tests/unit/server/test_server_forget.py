"""Forgetting over HTTP, and what is answered about what was forgotten."""

import httpx
import pytest
from server_bench import Bench

from feedback.tombstones import digest


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    body = response.json()["error"]
    return response.status_code, body["type"], body["param"]


async def test_a_completion_is_forgotten_at_once_and_spoken_of_no_more(bench: Bench) -> None:
    id_, other = bench.completion(), bench.completion()
    thumb = {"type": "thumb", "completion_id": id_, "value": "up"}
    ranking = {"type": "ranking", "groups": [[{"completion_id": other}], [{"completion_id": id_}]]}
    async with bench.http("client") as http:
        event_id = (await http.post("/v1/feedback", json=thumb)).json()["event_id"]
        bench.queue.drain_into(bench.store)
        async with bench.http("operator") as operator:
            told = await operator.post("/v1/forget", json={"completion_id": id_})
            assert told.status_code == 202
            report = told.json()
            assert (report["kind"], report["state"]) == ("completion", "erased")
            assert report["actor"] == f"key {bench.key_ids['operator']} (operator)"
            assert report["sha256"] == digest(("completion", id_))
            assert report["left"] == ["queue", "files", "database"]
            assert report["erased"] == {
                "completions": 1,
                "events": 1,
                "cases": 0,
                "dead_letters": 0,
                "in_the_queue": 0,
            }
            assert (report["versions"], report["rounds"], report["exports"]) == ([], [], [])
            assert "backups" in report["out_of_reach"]
            assert (await operator.get(f"/v1/forget/{report['id']}")).json() == report
            assert (await operator.get("/v1/forget")).json() == {"forgettings": [report]}
            assert id_ not in told.text
        # The door asks no database whether an id of ours was forgotten; ingest does, and the receipt tells.
        late = [
            (await http.post("/v1/feedback", json=event)).json()["event_id"] for event in (thumb, ranking)
        ]
        bench.queue.drain_into(bench.store)
        for late_id in late:
            assert error(await http.get(f"/v1/feedback/{late_id}")) == (410, "gone", None)
        assert error(await http.get(f"/v1/completions/{id_}")) == (410, "gone", None)
        assert error(await http.get(f"/v1/feedback/{event_id}")) == (410, "gone", None)
        assert (await http.get(f"/v1/completions/{other}")).status_code == 200
    assert bench.store.counts()["stored"] == 0


async def test_a_rater_is_forgotten_and_may_come_again(bench: Bench) -> None:
    id_ = bench.completion()
    thumb = {"type": "thumb", "completion_id": id_, "value": "up", "rater": "ann"}
    async with bench.http("client") as http, bench.http("operator") as operator:
        await http.post("/v1/feedback", json=thumb)
        bench.queue.drain_into(bench.store)
        told = await operator.post("/v1/forget", json={"rater": f"{bench.key_ids['client']}/ann"})
        assert told.json()["erased"]["events"] == 1
        again = await http.post("/v1/feedback", json=thumb)
        assert again.status_code == 202
        bench.queue.drain_into(bench.store)
        receipt = (await http.get(f"/v1/feedback/{again.json()['event_id']}")).json()
        assert receipt["status"] == "stored"
        assert bench.store.counts()["stored"] == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"rater": "k1/ann", "completion_id": "c"}, "rater"),
        ({"rater": "k1/ann", "why": "asked"}, "rater"),
        ({"rater": ""}, "rater"),
        ({"completion_id": 3}, "completion_id"),
        ({"completion_id": "c" * 501}, "completion_id"),
    ],
)
async def test_what_is_not_one_id_is_refused(
    bench: Bench, body: dict[str, object], param: str | None
) -> None:
    async with bench.http("operator") as http:
        assert error(await http.post("/v1/forget", json=body)) == (422, "invalid", param)
        assert error(await http.post("/v1/forget", json={"rater": "ann"})) == (404, "not_found", "rater")
        assert error(await http.get("/v1/forget/7")) == (404, "not_found", None)
    assert bench.store.forgettings.list() == []


@pytest.mark.parametrize("who", ["client", "rater"])
async def test_only_operators_forget(bench: Bench, who: str) -> None:
    async with bench.http(who) as http:
        assert (await http.post("/v1/forget", json={"completion_id": "c"})).status_code == 403
        assert (await http.get("/v1/forget")).status_code == 403
        assert (await http.get("/v1/forget/1")).status_code == 403
