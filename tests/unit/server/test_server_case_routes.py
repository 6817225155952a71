"""Operators' routes on cases: adding, what is wrong with one, sending it as feedback, results, removing."""

from typing import Any

import httpx
import pytest
from server_bench import Bench

from feedback.cases import CaseResult, Cases
from registry.audit import AuditLog
from registry.rounds import EventUse
from server.access import ROUTES

PROMPT = [{"role": "user", "content": "What is your name?"}]
CHECK = {"kind": "mentions_any", "words": ["InstructLoop"]}


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    body = response.json()["error"]
    return response.status_code, body["type"], body["param"]


async def test_a_case_is_added_trained_on_tried_and_removed(bench: Bench) -> None:
    body = {"messages": PROMPT, "checks": [CHECK], "good": "InstructLoop.", "bad": "A model.", "train": True}
    async with bench.http("operator") as http:
        made = await http.post("/v1/cases", json=body)
        assert made.status_code == 201, made.text
        case = made.json()
        assert (case["title"], case["trainings"]) == ("What is your name?", 1)
        assert case["added_by"] == f"key {bench.key_ids['operator']} (operator)"
        events = [one["event_id"] for one in case["taught"]]
        assert events == [f"{case['id']}-1-demonstration", f"{case['id']}-1-ranking"]
        assert {one["status"] for one in case["taught"]} == {"queued"}
        # The same once more is the same case and the same feedback.
        assert (await http.post("/v1/cases", json=body)).json()["id"] == case["id"]
        bench.queue.drain_into(bench.store)
        assert bench.store.counts()["stored"] == 2
        receipt = (await http.get(f"/v1/feedback/{events[0]}")).json()
        assert receipt["status"] == "stored"

        round_ = bench.rounds.begin(0, bench.store.head(), {"parent": "policy-0000"}, 0)
        bench.rounds.record_uses(round_.id, [EventUse(events[0], "trained"), EventUse(events[1], "trained")])
        bench.rounds.stage(round_.id, "publish", "running")
        bench.rounds.stage(round_.id, "publish", "done", {"version": "policy-0001"})
        told = CaseResult(case["id"], "policy-0001", "policy-0000", "A model.", False, "InstructLoop.", True)
        Cases(bench.database).record_results(round_.id, [told])
        found = (await http.get(f"/v1/cases/{case['id']}")).json()
        assert [(one["change"], one["after"]) for one in found["results"]] == [("fixed", "InstructLoop.")]
        assert found["taught"][0]["versions"] == ["policy-0001"]
        (listed,) = (await http.get("/v1/cases")).json()["cases"]
        assert (listed["id"], listed["results"][0]["change"]) == (case["id"], "fixed")

        removed = await http.delete(f"/v1/cases/{case['id']}")
        assert removed.json()["removed"] == case["id"]
        assert removed.json()["taught"][0]["rounds"] == [
            {"round": round_.id, "use": "trained", "reason": None}
        ]
        assert (await http.get("/v1/cases")).json() == {"cases": []}
        (old,) = (await http.get("/v1/cases?removed=true")).json()["cases"]
        assert old["removed_at"] is not None
        assert error(await http.delete(f"/v1/cases/{case['id']}")) == (404, "not_found", None)
    actions = [(one.action, one.target, one.outcome) for one in AuditLog(bench.database).entries()]
    assert ("remove case", case["id"], "done") in actions
    assert ("remove case", case["id"], "refused") in actions
    assert ("add case", case["id"], "done") in actions


async def test_a_completion_lends_its_prompt_and_bad_answer(bench: Bench) -> None:
    id_ = bench.completion()
    bench.queue.drain_into(bench.store)
    async with bench.http("operator") as http:
        made = await http.post(
            "/v1/cases", json={"completion_id": id_, "checks": [{"kind": "max_words", "n": 1}], "bad": "a b"}
        )
        assert made.status_code == 201, made.text
        assert made.json()["origins"]["completion"] == [id_]
        await http.post("/v1/forget", json={"completion_id": id_})
        assert error(await http.get(f"/v1/cases/{made.json()['id']}"))[0] == 404


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (422, "invalid", "messages")),
        ([], (422, "invalid", None)),
        ({"messages": PROMPT, "completion_id": "x"}, (422, "invalid", "messages")),
        ({"messages": []}, (422, "invalid", "messages")),
        ({"messages": [{"role": "user"}]}, (422, "invalid", "messages.0.content")),
        ({"messages": PROMPT}, (422, "invalid", "checks")),
        ({"messages": PROMPT, "good": "x"}, (422, "invalid", "bad")),
        ({"messages": PROMPT, "checks": [{"kind": "max_words"}]}, (422, "invalid", "checks.0.n")),
        ({"messages": PROMPT, "checks": [CHECK], "good": "A model."}, (422, "invalid", "good")),
        ({"messages": PROMPT, "checks": [CHECK], "train": True}, (422, "invalid", "train")),
        ({"messages": PROMPT, "checks": [CHECK], "other": 1}, (422, "invalid", "other")),
        ({"completion_id": "chatcmpl-none", "checks": [CHECK]}, (404, "not_found", "completion_id")),
        ({"event_id": "none", "checks": [CHECK]}, (404, "not_found", "event_id")),
    ],
)
async def test_a_wrong_case_names_the_field(
    bench: Bench, body: Any, expected: tuple[int, str, str | None]
) -> None:
    async with bench.http("operator") as http:
        assert error(await http.post("/v1/cases", json=body)) == expected
    assert Cases(bench.database).list() == []


async def test_while_redis_is_away_the_case_is_kept_and_the_same_request_sends_it(bench: Bench) -> None:
    body = {"messages": PROMPT, "checks": [CHECK], "good": "InstructLoop.", "train": True}
    bench.queue.away = "gone"
    async with bench.http("operator") as http:
        refused = await http.post("/v1/cases", json=body)
        assert error(refused)[:2] == (503, "unavailable")
        assert "Retry-After" in refused.headers
        bench.queue.away = None
        assert (await http.post("/v1/cases", json=body)).status_code == 201
    bench.queue.drain_into(bench.store)
    (case,) = Cases(bench.database).list()
    assert (case.trainings, bench.store.counts()["stored"]) == (1, 1)


@pytest.mark.parametrize("role", ["client", "rater", None])
async def test_cases_are_the_operators(bench: Bench, role: str | None) -> None:
    routes = [(method, path) for method, path, _ in ROUTES if path.startswith("/v1/cases")]
    assert len(routes) == 4
    async with bench.http(role) if role else bench.http(None) as http:
        for method, path in routes:
            answer = await http.request(method, path.replace("{id}", "x"))
            assert answer.status_code == (403 if role else 401), (method, path)
