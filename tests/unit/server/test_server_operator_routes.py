"""Operators' routes on a real registry: versions and moves, waiting for replicas, rounds, figures."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from server_bench import Bench

from feedback.keys import Keys
from registry.audit import key_note
from registry.registry import Replica
from server.routes_operator import progress

NOW = 1000.0


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["type"]


def replica(name: str, state: str, actual: str | None, desired: str = "new", age: float = 1.0) -> Replica:
    return Replica(name, desired, actual, state, seen_at=NOW - age)


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([], "pending"),
        ([replica("a", "serving", "new")], "served"),
        ([replica("a", "serving", "new"), replica("b", "serving", "old", "old")], "pending"),
        ([replica("a", "serving", "new"), replica("b", "swapping", "old")], "pending"),
        ([replica("a", "serving", "new"), replica("b", "stopped", None)], "served"),
        ([replica("a", "serving", "new"), replica("b", "serving", "old", "old", age=31)], "served"),
        ([replica("a", "serving", "new"), replica("b", "failed", "old")], "failed"),
        ([replica("a", "serving", "new"), replica("b", "failed", "old", "older")], "pending"),
    ],
)
def test_how_far_the_replicas_are(replicas: list[Replica], expected: str) -> None:
    assert progress(replicas, "new", now=NOW) == expected


async def test_versions_are_listed_promoted_rolled_back_and_rejected(
    bench: Bench, publish: Callable[[str], str]
) -> None:
    for weights in ("a", "b", "c"):
        publish(weights)
    async with bench.http("operator") as http:
        assert (await http.get("/v1/versions")).json()["desired"] is None
        moved = await http.post("/v1/versions/policy-0000/promote", json={"reason": "first"})
        assert (moved.status_code, moved.json()) == (202, {"action": "promoted", "version": "policy-0000"})
        await http.post("/v1/versions/policy-0001/promote")
        listed = (await http.get("/v1/versions")).json()
        assert listed["desired"] == "policy-0001"
        states = {item["name"]: item["state"] for item in listed["versions"]}
        assert states == {"policy-0000": "retired", "policy-0001": "serving", "policy-0002": "candidate"}
        assert (await http.post("/v1/rollback")).json()["version"] == "policy-0000"
        assert (await http.post("/v1/versions/policy-0002/reject")).status_code == 200
        one = (await http.get("/v1/versions/policy-0002")).json()
        assert (one["state"], list(one["manifest"]["files"])) == ("rejected", ["model.safetensors"])
    entry = bench.registry.log()[3]
    assert (entry.action, entry.version, entry.actor, entry.reason) == (
        "promoted",
        "policy-0000",
        f"key {bench.key_ids['operator']} (operator)",
        "first",
    )


async def test_moves_that_can_t_be_are_refused(bench: Bench, publish: Callable[[str], str]) -> None:
    publish("a")
    publish("b")
    async with bench.http("operator") as http:
        assert error(await http.post("/v1/versions/policy-0009/promote")) == (404, "not_found")
        assert error(await http.get("/v1/versions/policy-0009")) == (404, "not_found")
        assert error(await http.post("/v1/rollback")) == (409, "conflict")
        await http.post("/v1/versions/policy-0000/promote")
        assert error(await http.post("/v1/versions/policy-0000/promote")) == (409, "conflict")
        (bench.registry.version("policy-0001").path / "model.safetensors").write_text("torn")
        assert error(await http.post("/v1/versions/policy-0001/promote")) == (409, "conflict")
        wrong = await http.post("/v1/versions/policy-0001/promote", json={"reason": 5})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "reason")
        wrong = await http.post("/v1/rollback?wait=perhaps")
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "wait")


async def test_wait_answers_when_the_replicas_serve(bench: Bench, publish: Callable[[str], str]) -> None:
    name = publish("a")
    bench.registry.report(Replica("r1", None, None, "serving"))
    async with bench.http("operator") as http:
        asked = asyncio.create_task(http.post(f"/v1/versions/{name}/promote?wait=true"))
        await asyncio.sleep(0.2)
        assert not asked.done()
        bench.registry.report(Replica("r1", name, name, "serving"))
        answer = await asked
        assert (answer.status_code, answer.json()["replicas"][0]["actual"]) == (200, name)


async def test_wait_says_when_a_replica_failed_or_took_too_long(
    bench: Bench, publish: Callable[[str], str]
) -> None:
    first, second = publish("a"), publish("b")
    async with bench.http("operator") as http:
        assert error(await http.post(f"/v1/versions/{first}/promote?wait=true")) == (504, "timeout")
        bench.registry.report(Replica("r1", second, first, "failed", "disk full"))
        failed = await http.post(f"/v1/versions/{second}/promote?wait=true")
        assert error(failed) == (500, "internal")
        assert "disk full" in failed.json()["error"]["message"]


async def test_replicas_and_rounds(bench: Bench) -> None:
    bench.registry.report(Replica("r1", "policy-0000", "policy-0000", "serving", last_swap_seconds=0.5))
    async with bench.http("operator") as http:
        (found,) = (await http.get("/v1/replicas")).json()["replicas"]
        assert (found["id"], found["last_swap_seconds"]) == ("r1", 0.5)
        asked = await http.post("/v1/rounds")
        assert (asked.status_code, asked.json()["state"]) == (202, "requested")
        assert (await http.post("/v1/rounds")).json() == asked.json()
        round_ = bench.rounds.begin(0, 5, {"seed": 1}, 1)
        bench.rounds.stage(round_.id, "sft", "running")
        bench.rounds.metric(round_.id, "sft", 1, {"loss": 2.0})
        listed = (await http.get("/v1/rounds")).json()["rounds"]
        assert [(item["id"], item["state"]) for item in listed] == [(asked.json()["id"], "running")]
        one = (await http.get(f"/v1/rounds/{round_.id}")).json()
        assert (one["stages"], one["metrics"][0]["value"]) == ({"sft": "running"}, 2.0)
        assert (one["seconds"], one["results"]) == ({"sft": None}, {"sft": None})
        bench.rounds.stage(round_.id, "sft", "done", {"demonstrations": 20})
        one = (await http.get(f"/v1/rounds/{round_.id}")).json()
        assert one["results"] == {"sft": {"demonstrations": 20}}
        assert 0 <= one["seconds"]["sft"] < 60
        assert error(await http.get("/v1/rounds/99")) == (404, "not_found")
        assert error(await http.get("/v1/rounds/x"))[0] == 422


async def test_the_page_about_a_round_is_the_operators_and_runs_nothing(bench: Bench) -> None:
    round_ = bench.rounds.begin(0, 5, {}, 1)
    path = f"/v1/rounds/{round_.id}/report"
    async with bench.http("operator") as http:
        found = await http.get(path)
        assert (found.status_code, found.text) == (200, f"<h1>Round {round_.id}</h1>")
        assert found.headers["content-type"] == "text/html; charset=utf-8"
        assert found.headers["content-security-policy"].startswith("default-src 'none'; ")
        assert error(await http.get("/v1/rounds/99/report")) == (404, "not_found")
    for who, status in (("client", 403), ("rater", 403), (None, 401)):
        async with bench.http(who) as http:
            assert (await http.get(path)).status_code == status


async def test_figures_are_in_prometheus_format(bench: Bench) -> None:
    async with bench.http("operator") as http:
        bench.metrics.recorded.inc(3)
        text = (await http.get("/metrics")).text
        assert "instructloop_completions_recorded_total 3.0" in text
        assert "instructloop_swap_seconds_bucket" in text


async def test_a_database_that_is_away_is_503(bench: Bench) -> None:
    async with bench.http("operator") as http:
        await http.get("/v1/versions")
        with bench.database.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE version_log RENAME TO elsewhere")
        refused = await http.get("/v1/versions")
        assert error(refused) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0


async def test_the_audit_log_says_who_did_what_and_what_was_refused(
    bench: Bench, publish: Callable[[str], str]
) -> None:
    publish("a")
    keys = Keys(bench.database, note=key_note("command line (ann@host)"))
    keys.revoke(keys.create("rater", "bob").id)
    async with bench.http("operator") as http:
        await http.post("/v1/versions/policy-0000/promote", json={"reason": "first"})
        await http.post("/v1/versions/policy-0000/promote")
        await http.post("/v1/versions/policy-0009/reject")
        await http.post("/v1/rollback")
        asked = (await http.post("/v1/rounds")).json()["id"]
        found = (await http.get("/v1/audit")).json()["entries"]
        me = f"key {bench.key_ids['operator']} (operator)"
        assert {entry["actor"] for entry in found} == {me, "command line (ann@host)"}
        seen = [(entry["action"], entry["target"], entry["outcome"]) for entry in reversed(found)]
        key = found[-1]["target"]
        assert seen == [
            ("create_key", key, "done"),
            ("revoke_key", key, "done"),
            ("promote", "policy-0000", "done"),
            ("promote", "policy-0000", "refused"),
            ("reject", "policy-0009", "refused"),
            ("rollback", "", "refused"),
            ("request_round", f"round {asked}", "done"),
        ]
        assert found[4]["detail"] == "first"
        assert "serving" in found[3]["detail"]
        assert (await http.get("/v1/audit?limit=1")).json()["entries"] == found[:1]
        older = (await http.get("/v1/audit", params={"before": found[3]["at"]})).json()["entries"]
        assert older == found[4:]
        for query in ("limit=0", "limit=1001", "limit=x", "before=nan", "before=-1"):
            assert error(await http.get(f"/v1/audit?{query}"))[0] == 422
    for who in ("client", "rater"):
        async with bench.http(who) as http:
            assert error(await http.get("/v1/audit"))[0] == 403


async def test_what_a_database_can_t_hold_is_refused_at_the_door(bench: Bench) -> None:
    async with bench.http("operator") as http:
        for number in (0, -1, 2**31, 10**30):
            assert error(await http.get(f"/v1/rounds/{number}"))[0] == 422
        assert error(await http.get("/v1/versions/%00"))[0] == 404
        assert error(await http.post("/v1/rollback", json={"reason": "a\0b"}))[0] == 422
