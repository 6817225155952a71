"""Feedback on real completions, from HTTP through Redis and ingest to the store; and Redis going away."""

import json
import time
from typing import Any

import httpx
from server_fixture import Installation, served, wait_for_record

__all__ = ["served"]


def answer(served: Installation, **more: Any) -> httpx.Response:
    body = {"model": "policy", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8}
    with served.http(served.client_key) as http:
        response = http.post("/v1/chat/completions", json=body | more)
    assert response.status_code == 200, response.text
    return response


def settled(http: httpx.Client, event_id: str) -> dict[str, Any]:
    """What a receipt says once the event has left the queue."""
    deadline = time.monotonic() + 20
    while True:
        found: dict[str, Any] = http.get(f"/v1/feedback/{event_id}").json()
        if found["status"] != "queued":
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_four_types_reach_the_store(served: Installation) -> None:
    id_ = answer(served, n=3, temperature=1).headers["x-completion-id"]
    refs = [{"completion_id": id_, "choice": choice} for choice in range(3)]
    events: list[dict[str, Any]] = [
        {"type": "thumb", "completion_id": id_, "choice": 1, "value": "down", "labels": ["opinion"]},
        {"type": "ranking", "groups": [[refs[2]], [refs[0], refs[1]]], "rater": "bob"},
        {"type": "rating", "completion_id": id_, "choice": 2, "score": 6},
        {"type": "demonstration", "completion_id": id_, "text": "Something."},
        {"type": "demonstration", "messages": [{"role": "user", "content": "Hi"}], "text": "Hello."},
    ]
    wait_for_record(served, id_)
    with served.http(served.client_key) as http:
        for event in events:
            sent = http.post("/v1/feedback", json=event)
            assert sent.status_code == 202, sent.text
            assert settled(http, sent.json()["event_id"])["status"] == "stored"
        record = http.get(f"/v1/completions/{id_}").json()
        assert sorted(item["feedback"]["type"] for item in record["feedback"]) == sorted(
            event["type"] for event in events[:4]
        )
        assert len(record["choices"]) == 3
        refused = http.post(
            "/v1/feedback", json={"type": "thumb", "completion_id": id_, "choice": 3, "value": "up"}
        )
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "choice")


def test_a_browser_gives_feedback_with_the_token_alone(served: Installation) -> None:
    given = answer(served, user="zoe").headers
    thumb = {"type": "thumb", "completion_id": given["x-completion-id"], "value": "up"}
    with served.http(**{"X-Feedback-Token": given["x-feedback-token"]}) as http:
        sent = http.post("/v1/feedback", json=thumb)
        assert sent.status_code == 202
        assert settled(http, sent.json()["event_id"])["status"] == "stored"
        again = http.post("/v1/feedback", json=thumb | {"value": "down"})
        assert settled(http, again.json()["event_id"])["status"] == "stored"
        assert settled(http, sent.json()["event_id"])["superseded_by"] == again.json()["event_id"]
    (old, new) = served.store.events_of(given["x-completion-id"])
    assert old.event.rater == new.event.rater == f"{served.client_key.split('_')[2]}/user:zoe"
    with served.http() as http:
        assert http.post("/v1/feedback", json=thumb).status_code == 401


def test_roles_and_owners_are_kept_apart(served: Installation) -> None:
    id_ = answer(served).headers["x-completion-id"]
    thumb = {"type": "thumb", "completion_id": id_, "value": "up"}
    expected = [
        (served.other_client_key, 403),
        (served.rater_key, 202),
        (served.operator_key, 403),
        (served.client_key, 202),
    ]
    for key, status in expected:
        with served.http(key) as http:
            assert http.post("/v1/feedback", json=thumb).status_code == status
    with served.http(served.rater_key) as http:
        assert http.post("/v1/chat/completions", json={}).status_code == 403
    with served.http(served.operator_key) as http:
        metrics = http.get("/metrics").text
        assert "instructloop_completions_recorded_total" in metrics
        assert "vllm:generation_tokens_total" in metrics


def test_a_retry_is_the_same_event(served: Installation) -> None:
    id_ = answer(served).headers["x-completion-id"]
    thumb = {"type": "thumb", "completion_id": id_, "value": "up"}
    with served.http(served.client_key, **{"Idempotency-Key": f"key of {id_}"}) as http:
        first, second = http.post("/v1/feedback", json=thumb), http.post("/v1/feedback", json=thumb)
        assert first.json() == second.json()
        assert http.post("/v1/feedback", json=thumb | {"value": "down"}).status_code == 409
        settled(http, first.json()["event_id"])
    assert len(served.store.events_of(id_)) == 1


def test_a_batch_and_its_lines(served: Installation) -> None:
    id_ = answer(served).headers["x-completion-id"]
    lines = [{"type": "rating", "completion_id": id_, "score": score} for score in (1, 9, 7)]
    with served.http(served.client_key) as http:
        sent = http.post("/v1/feedback/batch", content="\n".join(map(json.dumps, lines)))
        receipts = [json.loads(line) for line in sent.text.splitlines()]
        assert receipts[1]["error"]["param"] == "score"
        assert settled(http, receipts[2]["event_id"])["status"] == "stored"
        assert settled(http, receipts[0]["event_id"])["superseded_by"] == receipts[2]["event_id"]


def test_serving_goes_on_without_redis_and_nothing_is_lost(served: Installation) -> None:
    served.stop("redis")
    try:
        with served.http(served.client_key) as http:
            given = answer(served).headers
            thumb = {"type": "thumb", "completion_id": given["x-completion-id"], "value": "up"}
            refused = http.post("/v1/feedback", json=thumb)
            assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable")
            assert int(refused.headers["retry-after"]) > 0
            assert http.get("/health").status_code == 200
            assert http.get("/ready").status_code == 503
    finally:
        served.start_redis()
    wait_for_record(served, given["x-completion-id"])
    with served.http(served.client_key) as http:
        sent = http.post("/v1/feedback", json=thumb)
        assert sent.status_code == 202
        assert settled(http, sent.json()["event_id"])["status"] == "stored"
        assert http.get("/ready").status_code == 200
