"""Evaluations over HTTP: what is taken, what is refused with the field named, what is told of them."""

from collections.abc import Callable
from typing import Any

import pytest
from server_bench import Bench

from registry.audit import AuditLog
from registry.evaluations import Evaluations

TWO = {"contestants": ["policy-0000", "policy-0001"]}


@pytest.fixture
def versions(publish: Callable[[str], str]) -> list[str]:
    return [publish("a"), publish("b")]


async def test_one_is_asked_for_and_followed_to_its_end(bench: Bench, versions: list[str]) -> None:
    prompts = bench.data_dir / "prompts"
    prompts.mkdir()
    (prompts / "own.jsonl").write_text('{"prompt": "hi"}\n')
    asked = TWO | {"prompts": "own.jsonl", "judges": ["checks"], "n": 3}
    async with bench.http("operator") as http:
        told = await http.post("/v1/evaluations", json=asked)
        assert (told.status_code, told.json()) == (202, {"id": 1, "state": "requested"})
        evaluations = Evaluations(bench.database)
        evaluations.begin(1)
        evaluations.progress(1, "answers of policy-0000", 3, 8)
        found = (await http.get("/v1/evaluations/1")).json()
        assert (found["state"], found["step"], found["done"], found["total"]) == (
            "running",
            "answers of policy-0000",
            3,
            8,
        )
        assert found["requested_by"] == f"key {bench.key_ids['operator']} (operator)"
        assert found["request"]["prompts"] == str((prompts / "own.jsonl").resolve())
        assert [one["version"] for one in found["request"]["contestants"]] == versions
        evaluations.finish(1, {"prompts": 4})
        (listed,) = (await http.get("/v1/evaluations")).json()["evaluations"]
        assert (listed["state"], listed["result"]) == ("done", {"prompts": 4})
        page = await http.get("/v1/evaluations/1/report")
        assert page.text == "<h1>Evaluation 1</h1>"
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        for path in ("/v1/evaluations/7", "/v1/evaluations/7/report"):
            missing = await http.get(path)
            assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found")


async def test_cases_are_asked_for_as_prompts(bench: Bench, versions: list[str]) -> None:
    check = {"kind": "max_words", "n": 3}
    async with bench.http("operator") as http:
        for text in ("hi", "ho"):
            case = {"messages": [{"role": "user", "content": text}], "checks": [check]}
            assert (await http.post("/v1/cases", json=case)).status_code == 201
        assert (await http.post("/v1/evaluations", json=TWO | {"prompts": "cases"})).status_code == 202
        found = (await http.get("/v1/evaluations/1")).json()["request"]
    assert found["prompts"] == "cases"
    assert [one["kind"] for one in found["judges"]] == ["checks", "cases"]


async def test_one_is_cancelled_with_a_reason_and_one_that_ended_is_not(
    bench: Bench, versions: list[str]
) -> None:
    async with bench.http("operator") as http:
        for _ in range(2):
            await http.post("/v1/evaluations", json=TWO)
        told = await http.post("/v1/evaluations/1/cancel", json={"reason": "wrong prompts"})
        assert (told.status_code, told.json()) == (200, {"id": 1, "state": "cancelled"})
        evaluations = Evaluations(bench.database)
        evaluations.begin(2)
        assert (await http.post("/v1/evaluations/2/cancel")).status_code == 200
        assert [one.state for one in evaluations.list()] == ["cancelled", "cancelled"]
        evaluations.begin(2, again=True)
        evaluations.finish(2, {"prompts": 4})
        refused = await http.post("/v1/evaluations/2/cancel")
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            409,
            "evaluation 2 is done already",
        )
        assert (await http.post("/v1/evaluations/7/cancel")).status_code == 404
        bad = await http.post("/v1/evaluations/1/cancel", json={"reason": 7})
        assert (bad.status_code, bad.json()["error"]["param"]) == (422, "reason")
    log = [one for one in AuditLog(bench.database).entries() if one.action == "cancel_evaluation"]
    assert [(one.target, one.outcome, one.detail) for one in reversed(log)] == [
        ("evaluation 1", "done", "wrong prompts"),
        ("evaluation 2", "done", ""),
        ("evaluation 2", "refused", "evaluation 2 is done already"),
        ("evaluation 7", "refused", "there is no evaluation 7"),
    ]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"contestants": ["policy-0000"]}, "contestants"),
        ({"contestants": ["policy-0000", "policy-0000"]}, "contestants"),
        ({"contestants": ["policy-0000", "policy-0009"]}, "contestants.1"),
        ({"contestants": ["policy-0000", {"url": "file:///etc", "model": "m"}]}, "contestants.1.url"),
        ({"judges": ["jury"]}, "judges.0"),
        ({"judges": ["reward-model"]}, "judges.0"),
        ({"prompts": "none.jsonl"}, "prompts"),
        ({"prompts": "cases"}, "prompts"),
        ({"prompts": "../store.db"}, "prompts"),
        ({"prompts": "/etc/passwd"}, "prompts"),
        ({"n": 0}, "n"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_what_can_t_be_evaluated_is_refused_with_the_field(
    bench: Bench, versions: list[str], change: dict[str, Any], param: str
) -> None:
    async with bench.http("operator") as http:
        refused = await http.post("/v1/evaluations", json=TWO | change)
    error = refused.json()["error"]
    assert (refused.status_code, error["type"], error["param"]) == (422, "invalid", param)
    assert Evaluations(bench.database).list() == []
    assert all(entry.outcome == "refused" for entry in AuditLog(bench.database).entries())


async def test_only_operators_evaluate(bench: Bench) -> None:
    for who in ("client", "rater"):
        async with bench.http(who) as http:
            routes = (("GET", ""), ("POST", ""), ("GET", "/1"), ("GET", "/1/report"), ("POST", "/1/cancel"))
            for method, path in routes:
                assert (await http.request(method, f"/v1/evaluations{path}")).status_code == 403
