"""Operators' routes about the trial on a real registry and a real store."""

from collections.abc import Callable

import httpx
import pytest
from server_bench import Bench


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["type"]


@pytest.fixture
def tried(bench: Bench, publish: Callable[[str], str]) -> Bench:
    """Three versions, the first of which serves."""
    for weights in ("a", "b", "c"):
        publish(weights)
    bench.registry.promote("policy-0000", actor="me", reason="")
    return bench


async def test_a_version_is_shadow_canary_and_withdrawn(tried: Bench) -> None:
    async with tried.http("operator") as http:
        nothing = {"stable": "policy-0000", "trial": None, "rule": True, "decision": None}
        assert (await http.get("/v1/trial")).json() == nothing
        shadow = await http.post("/v1/versions/policy-0001/shadow", json={"share": 1, "reason": "look"})
        assert (shadow.status_code, shadow.json()) == (
            200,
            {"action": "shadow", "version": "policy-0001", "replicas": None},
        )
        canary = await http.post("/v1/versions/policy-0001/canary", json={"share": 0.25})
        assert canary.json()["action"] == "canary"
        found = (await http.get("/v1/trial")).json()
        trial = found["trial"]
        assert (trial["version"], trial["mode"], trial["share"]) == ("policy-0001", "canary", 0.25)
        assert found["decision"]["move"] == "keep"
        assert found["decision"]["figures"]["trial_votes"] == {"good": 0, "bad": 0, "share": None}
        states = {item["name"]: item["state"] for item in (await http.get("/v1/versions")).json()["versions"]}
        assert states["policy-0001"] == "canary"
        ended = await http.post("/v1/withdraw", json={"reason": "seen"})
        assert (ended.json()["action"], ended.json()["version"]) == ("withdrawn", "policy-0001")
        assert (await http.get("/v1/trial")).json() == nothing
        logged = (await http.get("/v1/audit?limit=3")).json()["entries"]
        assert [(one["action"], one["target"], one["detail"]) for one in logged] == [
            ("withdraw", "policy-0001", "seen"),
            ("canary", "policy-0001", ""),
            ("shadow", "policy-0001", "look"),
        ]


async def test_trials_that_can_t_be_are_refused_and_written_down(tried: Bench) -> None:
    path = "/v1/versions/policy-0001/canary"
    async with tried.http("operator") as http:
        for share in (0, -1, 1.5, "0.1", None, True):
            wrong = await http.post(path, json={"share": share})
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (422, "share")
        assert (await http.post(path)).status_code == 422
        assert (await http.post(path, json={"share": 0.1, "reason": 5})).json()["error"]["param"] == "reason"
        assert error(await http.post("/v1/withdraw")) == (409, "conflict")
        assert error(await http.post("/v1/versions/policy-0009/canary", json={"share": 0.1}))[0] == 404
        assert error(await http.post("/v1/versions/policy-0000/shadow", json={"share": 0.1}))[0] == 409
        await http.post(path, json={"share": 0.1})
        second = await http.post("/v1/versions/policy-0002/canary", json={"share": 0.1})
        assert error(second) == (409, "conflict")
        assert "policy-0001 is on trial" in second.json()["error"]["message"]
        found = (await http.get("/v1/audit")).json()["entries"]
        refused = [(one["action"], one["target"]) for one in found if one["outcome"] == "refused"]
        assert refused == [
            ("canary", "policy-0002"),
            ("shadow", "policy-0000"),
            ("canary", "policy-0009"),
            ("withdraw", ""),
        ]


@pytest.mark.parametrize("who", ["client", "rater", None])
async def test_trials_are_the_operators(tried: Bench, who: str | None) -> None:
    status = 401 if who is None else 403
    async with tried.http(who) as http:
        assert (await http.get("/v1/trial")).status_code == status
        for path in ("/v1/versions/policy-0001/canary", "/v1/versions/policy-0001/shadow", "/v1/withdraw"):
            assert (await http.post(path, json={"share": 0.1})).status_code == status
    assert tried.registry.trial() is None
