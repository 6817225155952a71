"""`GET /v1/queries`: what raters are asked next, in which order, and what they are not asked again."""

from typing import Any

from server_bench import Bench

from feedback.store import ResponseScore


def _scores(bench: Bench, spreads: dict[str, list[float]], round_id: int = 1) -> None:
    bench.store.replace_scores(
        round_id,
        [
            ResponseScore(id_, choice, 0, 0.5, spread)
            for id_, own in spreads.items()
            for choice, spread in enumerate(own)
        ],
    )


async def _asked(bench: Bench, who: str, query: str = "") -> list[dict[str, Any]]:
    async with bench.http(who) as http:
        response = await http.get(f"/v1/queries{query}")
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["queries"]
    return found


async def test_the_least_certain_come_first_with_their_responses(bench: Bench) -> None:
    sure, unsure, middling = (bench.completion(choices=2) for _ in range(3))
    _scores(bench, {sure: [0.1, 0.1], unsure: [0.2, 1.0], middling: [0.3, 0.4]}, round_id=7)
    asked = await _asked(bench, "rater")
    assert [item["completion_id"] for item in asked] == [unsure, middling, sure]
    assert asked[0] == {
        "completion_id": unsure,
        "part": 0,
        "messages": [{"role": "user", "content": "hi"}],
        "prompt": None,
        "round": 7,
        "spread": 0.6,
        "choices": [
            {"choice": 0, "text": "answer 0", "spread": 0.2},
            {"choice": 1, "text": "answer 1", "spread": 1.0},
        ],
    }
    assert [item["completion_id"] for item in await _asked(bench, "operator", "?limit=2")] == [
        unsure,
        middling,
    ]


async def test_a_rater_is_not_asked_again_but_another_one_is(bench: Bench) -> None:
    first, second = bench.completion(choices=2), bench.completion(choices=2)
    _scores(bench, {first: [0.9, 0.9], second: [0.1, 0.1]})
    refs = [{"completion_id": first, "choice": choice} for choice in (0, 1)]
    async with bench.http("rater") as http:
        sent = await http.post("/v1/feedback", json={"type": "ranking", "groups": [refs[:1], refs[1:]]})
        assert sent.status_code == 202
    bench.queue.drain_into(bench.store)
    assert [item["completion_id"] for item in await _asked(bench, "rater")] == [second]
    assert [item["completion_id"] for item in await _asked(bench, "operator")] == [first, second]


async def test_a_round_replaces_what_the_last_one_asked(bench: Bench) -> None:
    first, second = bench.completion(), bench.completion()
    _scores(bench, {first: [0.9]}, round_id=1)
    _scores(bench, {second: [0.1]}, round_id=2)
    assert [(item["completion_id"], item["round"]) for item in await _asked(bench, "rater")] == [(second, 2)]
    bench.store.replace_scores(3, [])
    assert await _asked(bench, "rater") == []


async def test_what_is_no_longer_recorded_is_not_asked(bench: Bench) -> None:
    gone, here = bench.completion(stored=False), bench.completion()
    _scores(bench, {gone: [0.9], here: [0.1]})
    assert [item["completion_id"] for item in await _asked(bench, "rater")] == [here]


async def test_a_wrong_limit_is_422_and_clients_may_not_ask(bench: Bench) -> None:
    async with bench.http("rater") as http:
        for limit in ("0", "101", "many"):
            response = await http.get(f"/v1/queries?limit={limit}")
            assert (response.status_code, response.json()["error"]["param"]) == (422, "limit")
    async with bench.http("client") as http:
        assert (await http.get("/v1/queries")).status_code == 403
