"""Feedback over HTTP: what is taken, from whom, what is refused and how, and what becomes of it."""

import json
from typing import Any

import httpx
import pytest
from server_bench import Bench

from feedback.queue import Entry
from feedback.records import Choice, Completion
from feedback.submission import EntryTooLarge
from registry.rounds import EventUse

REF = {"completion_id": "ID"}


def error(response: httpx.Response) -> tuple[int, str | None]:
    body = response.json()["error"]
    assert set(body) == {"type", "message", "param"}
    return response.status_code, body["param"]


def thumb(id_: str, **more: Any) -> dict[str, Any]:
    return {"type": "thumb", "completion_id": id_, "value": "up", **more}


async def test_each_type_is_taken_and_queued_as_given(bench: Bench) -> None:
    id_ = bench.completion(choices=3)
    refs = [{"completion_id": id_, "choice": choice} for choice in range(3)]
    events = [
        thumb(id_, choice=2, value="down", labels=["hallucination"], comment="no"),
        {"type": "rating", "completion_id": id_, "score": 7},
        {"type": "ranking", "groups": [refs[:1], refs[1:]], "context": {"checks": [{"kind": "json"}]}},
        {"type": "demonstration", "completion_id": id_, "text": "better"},
        {"type": "demonstration", "messages": [{"role": "user", "content": "hi"}], "text": "hello"},
    ]
    async with bench.http("client") as http:
        for event in events:
            response = await http.post("/v1/feedback", json=event)
            assert response.status_code == 202, response.text
            assert response.json() == {"event_id": bench.queue.events[-1].event_id, "status": "queued"}
    for sent, queued in zip(events, bench.queue.events, strict=True):
        found = queued.feedback.model_dump(mode="json")
        assert sent.items() <= found.items()
        assert (queued.key_id, queued.rater) == (bench.key_ids["client"], f"{bench.key_ids['client']}/")
    count = bench.metrics.registry.get_sample_value(
        "instructloop_feedback_accepted_total", {"type": "ranking"}
    )
    assert count == 1


@pytest.mark.parametrize(
    ("event", "param"),
    [
        ({}, "type"),
        ({"type": "clap"}, "type"),
        ({"type": "thumb", "value": "up"}, "completion_id"),
        ({"type": "thumb", "completion_id": "ID", "value": "sideways"}, "value"),
        ({"type": "thumb", "completion_id": "ID", "value": "up", "labels": ["rude"]}, "labels.0"),
        ({"type": "thumb", "completion_id": "ID", "value": "up", "stars": 3}, "stars"),
        ({"type": "thumb", "completion_id": "ID", "value": "up", "choice": 2}, "choice"),
        ({"type": "rating", "completion_id": "ID", "score": 8}, "score"),
        ({"type": "ranking", "groups": [[REF]]}, "groups"),
        ({"type": "ranking", "groups": [[REF], [REF]]}, "groups"),
        (
            {
                "type": "ranking",
                "groups": [[{"completion_id": "ID"}, {"completion_id": "ID", "choice": "x"}]],
            },
            "groups.0.1.choice",
        ),
        (
            {"type": "ranking", "groups": [[REF, {"completion_id": "ID", "choice": 5}]]},
            "groups.0.1.choice",
        ),
        ({"type": "demonstration", "text": "x"}, "completion_id"),
        ({"type": "demonstration", "completion_id": "ID", "text": ""}, "text"),
        (
            {"type": "demonstration", "messages": [{"role": "robot", "content": "x"}], "text": "x"},
            "messages.0.role",
        ),
    ],
)
async def test_a_wrong_event_is_422_and_names_its_field(
    bench: Bench, event: dict[str, Any], param: str
) -> None:
    id_ = bench.completion(choices=2)
    asked = json.loads(json.dumps(event).replace('"ID"', json.dumps(id_)))
    async with bench.http("client") as http:
        assert error(await http.post("/v1/feedback", json=asked)) == (422, param)
    assert bench.queue.events == []
    assert (
        bench.metrics.registry.get_sample_value("instructloop_feedback_refused_total", {"status": "422"}) == 1
    )


async def test_what_is_not_a_json_object_is_422(bench: Bench) -> None:
    async with bench.http("client") as http:
        for body in (b"", b"{", b"[]", b'"x"'):
            assert error(await http.post("/v1/feedback", content=body))[0] == 422


@pytest.mark.parametrize("who", ["client", "rater", "token"])
async def test_a_choice_that_was_not_asked_for_is_refused_before_its_record_comes(
    bench: Bench, who: str
) -> None:
    id_ = bench.completion(choices=2, stored=False)
    given = {"X-Feedback-Token": bench.token(id_, "bob")} if who == "token" else {}
    async with bench.http(None if given else who, **given) as http:
        assert (await http.post("/v1/feedback", json=thumb(id_, choice=1))).status_code == 202
        assert error(await http.post("/v1/feedback", json=thumb(id_, choice=2))) == (422, "choice")
        assert error(await http.post("/v1/feedback", json=thumb(id_, choice=7))) == (422, "choice")
        both = [[{"completion_id": id_}], [{"completion_id": id_, "choice": 7}]]
        ranking = await http.post("/v1/feedback", json={"type": "ranking", "groups": both})
        assert error(ranking) == (422, "groups.1.0.choice")
    assert len(bench.queue.events) == 1


async def test_where_the_id_does_not_say_a_choice_is_checked_once_the_record_is_there(bench: Bench) -> None:
    id_ = bench.completion(stored=False, counted=False)
    recorded = bench.completion(choices=2, counted=False)
    async with bench.http("client") as http:
        assert (await http.post("/v1/feedback", json=thumb(id_, choice=900))).status_code == 202
        assert (await http.post("/v1/feedback", json=thumb(recorded, choice=1))).status_code == 202
        assert error(await http.post("/v1/feedback", json=thumb(recorded, choice=2))) == (422, "choice")
        lines = "\n".join(json.dumps(thumb(recorded, choice=choice)) for choice in (1, 2))
        answers = (await http.post("/v1/feedback/batch", content=lines)).text.splitlines()
        assert [json.loads(answer).get("status") for answer in answers] == ["queued", None]
        assert json.loads(answers[1])["error"]["param"] == "choice"


async def test_only_issued_completions_of_ones_own_can_be_spoken_of(bench: Bench) -> None:
    mine, theirs = bench.completion(), bench.completion(who="other")
    async with bench.http("client") as http:
        assert error(await http.post("/v1/feedback", json=thumb("chatcmpl-made-up"))) == (
            404,
            "completion_id",
        )
        assert error(await http.post("/v1/feedback", json=thumb(theirs))) == (403, "completion_id")
        ranking = {"type": "ranking", "groups": [[{"completion_id": mine}], [{"completion_id": theirs}]]}
        refused = await http.post("/v1/feedback", json=ranking)
        assert error(refused) == (403, "groups.1.0.completion_id")
    async with bench.http("rater") as http:
        assert (await http.post("/v1/feedback", json=thumb(theirs))).status_code == 202


async def test_raters_are_named_by_clients_alone(bench: Bench) -> None:
    id_ = bench.completion()
    async with bench.http("client") as http:
        await http.post("/v1/feedback", json=thumb(id_, rater="bob"))
    async with bench.http("rater") as http:
        await http.post("/v1/feedback", json=thumb(id_))
        assert error(await http.post("/v1/feedback", json=thumb(id_, rater="bob"))) == (422, "rater")
    raters = [event.rater for event in bench.queue.events]
    assert raters == [f"{bench.key_ids['client']}/bob", f"{bench.key_ids['rater']}/"]


async def test_a_token_speaks_of_its_completion_for_its_user(bench: Bench) -> None:
    mine, another = bench.completion(), bench.completion()
    for user, name in ((None, f"anonymous:{mine}"), ("bob", "user:bob")):
        async with bench.http(**{"X-Feedback-Token": bench.token(mine, user)}) as http:
            assert (await http.post("/v1/feedback", json=thumb(mine))).status_code == 202
            assert bench.queue.events[-1].rater == f"{bench.key_ids['client']}/{name}"
            assert error(await http.post("/v1/feedback", json=thumb(another))) == (403, "completion_id")
            assert error(await http.post("/v1/feedback", json=thumb(mine, rater="eve"))) == (422, "rater")
            free = {"type": "demonstration", "messages": [{"role": "user", "content": "x"}], "text": "y"}
            assert error(await http.post("/v1/feedback", json=free))[0] == 403
            assert error(await http.post("/v1/feedback/batch", content=b"{}"))[0] == 403
            assert error(await http.get(f"/v1/completions/{mine}"))[0] == 403


async def test_the_same_key_is_the_same_event_and_another_body_a_conflict(bench: Bench) -> None:
    id_ = bench.completion()
    async with bench.http("client", **{"Idempotency-Key": "k1"}) as http:
        first = await http.post("/v1/feedback", json=thumb(id_))
        again = await http.post("/v1/feedback", json=thumb(id_))
        assert (first.status_code, again.status_code) == (202, 202)
        assert first.json() == again.json()
        assert len(bench.queue.events) == 1
        other = await http.post("/v1/feedback", json=thumb(id_, value="down"))
        assert error(other) == (409, "Idempotency-Key")
    async with bench.http("client", **{"Idempotency-Key": "k" * 201}) as http:
        assert error(await http.post("/v1/feedback", json=thumb(id_))) == (422, "Idempotency-Key")


async def test_without_a_durable_queue_feedback_is_503_and_the_rest_goes_on(bench: Bench) -> None:
    id_ = bench.completion()
    bench.queue.away = "Redis has appendonly no; feedback needs appendonly yes"
    async with bench.http("client") as http:
        for response in (
            await http.post("/v1/feedback", json=thumb(id_)),
            await http.post("/v1/feedback/batch", content=json.dumps(thumb(id_))),
        ):
            assert error(response)[0] == 503
            assert int(response.headers["retry-after"]) > 0
            assert "appendonly" in response.json()["error"]["message"]
        generated = await http.post("/v1/chat/completions", json={"messages": []})
        assert (generated.status_code, "x-completion-id" in generated.headers) == (200, True)


async def test_a_batch_answers_line_by_line(bench: Bench) -> None:
    id_, theirs = bench.completion(), bench.completion(who="other")
    lines = [json.dumps(thumb(id_)), "{", json.dumps(thumb(theirs)), "", json.dumps(thumb(id_, value="down"))]
    async with bench.http("client") as http:
        response = await http.post("/v1/feedback/batch", content="\n".join(lines))
        answers = [json.loads(line) for line in response.text.splitlines()]
        assert (response.status_code, len(answers)) == (200, 4)
        assert [answer.get("event_id") for answer in answers] == [
            bench.queue.events[0].event_id,
            None,
            None,
            bench.queue.events[1].event_id,
        ]
        assert answers[1]["error"]["type"] == "invalid"
        assert answers[2]["error"] == {
            "type": "forbidden",
            "message": "this completion was given to another client",
            "param": "completion_id",
        }
        too_many = "\n".join([json.dumps(thumb(id_))] * 6)
        assert error(await http.post("/v1/feedback/batch", content=too_many))[0] == 413
        assert error(await http.post("/v1/feedback/batch", content=b"\n\n"))[0] == 422


async def test_each_line_of_a_batch_may_carry_its_idempotency_key(bench: Bench) -> None:
    id_ = bench.completion()
    up, down = thumb(id_, rater="a"), thumb(id_, rater="a", value="down")
    lines = [up | {"idempotency_key": "k1"}, up | {"idempotency_key": "k1"}, down | {"idempotency_key": "k1"}]
    lines += [down | {"idempotency_key": 5}, down | {"idempotency_key": None}]
    async with bench.http("client") as http:
        sent = await http.post("/v1/feedback/batch", content="\n".join(map(json.dumps, lines)))
        first, again, conflict, wrong, none = [json.loads(line) for line in sent.text.splitlines()]
        assert first == again == {"event_id": bench.queue.events[0].event_id, "status": "queued"}
        assert (conflict["error"]["type"], conflict["error"]["param"]) == ("conflict", "idempotency_key")
        assert first["event_id"] in conflict["error"]["message"]
        assert (wrong["error"]["type"], wrong["error"]["param"]) == ("invalid", "idempotency_key")
        assert none["event_id"] == bench.queue.events[1].event_id
        # The whole batch again, after a lost answer: what had a key is the same event.
        again = await http.post("/v1/feedback/batch", content="\n".join(map(json.dumps, lines[:2])))
        assert [json.loads(line) for line in again.text.splitlines()] == [first, first]
        # A single event's header names the same thing.
        single = await http.post("/v1/feedback", json=up, headers={"Idempotency-Key": "k1"})
        assert single.json() == first
    assert len(bench.queue.events) == 2
    assert bench.count("feedback_accepted", type="thumb") == 2
    assert bench.count("feedback_refused", status="409") == 1


@pytest.mark.parametrize(
    "context",
    [
        r'"\ud800"',
        r'{"\ud800": 1}',
        "NaN",
        "-Infinity",
        "1e999",
        "[" * 250 + "]" * 250,
        "[" * 199 + "]" * 199,
    ],
)
async def test_what_ingest_could_not_read_is_refused_at_once(bench: Bench, context: str) -> None:
    text = json.dumps(thumb(bench.completion(), context={"a": 5})).replace("5}", context + "}")
    async with bench.http("client") as http:
        assert (await http.post("/v1/feedback", content=text)).status_code == 422
        answer = await http.post("/v1/feedback/batch", content=text)
        assert "error" in answer.json()
    assert bench.queue.events == []


async def test_an_event_beyond_what_an_entry_may_be_is_413(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any) -> None:
        raise EntryTooLarge("an event may have at most 64 bytes")

    monkeypatch.setattr(bench.queue, "submit", refuse)
    async with bench.http("client") as http:
        assert error(await http.post("/v1/feedback", json=thumb(bench.completion()))) == (413, None)


async def test_a_receipt_follows_the_event_from_the_queue_to_what_learned_from_it(bench: Bench) -> None:
    id_ = bench.completion()
    async with bench.http("client") as http:
        sent = (await http.post("/v1/feedback", json=thumb(id_))).json()["event_id"]
        expected = {
            "event_id": sent,
            "status": "queued",
            "reason": None,
            "superseded_by": None,
            "rounds": [],
            "versions": [],
            "held_out_rounds": [],
        }
        assert (await http.get(f"/v1/feedback/{sent}")).json() == expected
        bench.queue.drain_into(bench.store)
        assert (await http.get(f"/v1/feedback/{sent}")).json() == expected | {"status": "stored"}
        numbers = []
        for version, use in (("1", "trained"), ("2", "older"), ("3", "held_out")):
            number = bench.rounds.begin(0, bench.store.head(), {}, 0).id
            bench.rounds.record_uses(number, [EventUse(sent, use)])
            # Not yet: as long as nothing is published, nothing has learned.
            assert (await http.get(f"/v1/feedback/{sent}")).json()["rounds"] == numbers
            bench.rounds.finish(number, "done", version=f"policy-000{version}")
            numbers = [*numbers, number][:2]
        learned = expected | {"status": "stored", "rounds": numbers, "held_out_rounds": [number]}
        learned["versions"] = ["policy-0001", "policy-0002"]
        assert (await http.get(f"/v1/feedback/{sent}")).json() == learned
        newer = (await http.post("/v1/feedback", json=thumb(id_, value="down"))).json()["event_id"]
        bench.queue.drain_into(bench.store)
        found = (await http.get(f"/v1/feedback/{sent}")).json()
        assert found == learned | {"status": "superseded", "superseded_by": newer}


async def test_an_event_without_its_record_is_still_queued(bench: Bench) -> None:
    id_ = bench.completion(stored=False)
    async with bench.http("client") as http:
        sent = (await http.post("/v1/feedback", json=thumb(id_))).json()["event_id"]
        bench.queue.drain_into(bench.store)
        assert (await http.get(f"/v1/feedback/{sent}")).json()["status"] == "queued"


async def test_receipts_are_for_givers_and_operators(bench: Bench) -> None:
    id_ = bench.completion()
    tokens = {name: bench.token(id_, name) for name in ("bob", "eve")}
    async with bench.http(**{"X-Feedback-Token": tokens["bob"]}) as http:
        sent = (await http.post("/v1/feedback", json=thumb(id_))).json()["event_id"]
    for stored in (False, True):
        if stored:
            bench.queue.drain_into(bench.store)
        expected = {"other": 403, "rater": 403, "client": 200, "operator": 200}
        for who, status in expected.items():
            async with bench.http(who) as http:
                assert (await http.get(f"/v1/feedback/{sent}")).status_code == status, who
        async with bench.http(**{"X-Feedback-Token": tokens["bob"]}) as http:
            assert (await http.get(f"/v1/feedback/{sent}")).status_code == 200
    async with bench.http(**{"X-Feedback-Token": tokens["eve"]}) as http:
        assert error(await http.get(f"/v1/feedback/{sent}"))[0] == 403
    async with bench.http("operator") as http:
        assert error(await http.get("/v1/feedback/fb-none"))[0] == 404


async def test_a_completion_is_read_with_the_feedback_on_it(bench: Bench) -> None:
    id_ = bench.completion(choices=2)
    async with bench.http("client") as http:
        sent = (await http.post("/v1/feedback", json=thumb(id_, choice=1, rater="bob"))).json()["event_id"]
        bench.queue.drain_into(bench.store)
        found = (await http.get(f"/v1/completions/{id_}")).json()
        assert (found["id"], found["messages"]) == (id_, [{"role": "user", "content": "hi"}])
        assert [choice["text"] for choice in found["choices"]] == ["answer 0", "answer 1"]
        assert found["prompts"][0]["prompt_token_ids"] == [1, 2]
        (feedback,) = found["feedback"]
        assert (feedback["event_id"], feedback["status"]) == (sent, "stored")
        assert feedback["feedback"]["value"] == "up"
        later = bench.completion(stored=False)
        assert error(await http.get(f"/v1/completions/{later}"))[0] == 404
        assert error(await http.get("/v1/completions/cmpl-none"))[0] == 404
    async with bench.http("other") as http:
        assert error(await http.get(f"/v1/completions/{id_}"))[0] == 403
    async with bench.http("operator") as http:
        assert (await http.get(f"/v1/completions/{id_}")).status_code == 200


async def test_end_users_of_one_client_do_not_share_idempotency_keys(bench: Bench) -> None:
    id_ = bench.completion()
    sent = []
    for user in ("bob", "eve", "bob"):
        headers = {"X-Feedback-Token": bench.token(id_, user), "Idempotency-Key": "k1"}
        async with bench.http(**headers) as http:
            response = await http.post("/v1/feedback", json=thumb(id_))
            assert response.status_code == 202
            sent.append(response.json()["event_id"])
    assert sent[0] == sent[2] != sent[1]
    async with bench.http("client", **{"Idempotency-Key": "k1"}) as http:
        assert (await http.post("/v1/feedback", json=thumb(id_))).json()["event_id"] not in sent


async def test_infinite_logprobs_are_null(bench: Bench) -> None:
    id_ = "chatcmpl-" + bench.identity.new_request_id(bench.key_ids["client"], 1)
    choice = Choice(index=0, text="x", token_ids=[1, 2], logprobs=[float("-inf"), -1.0])
    record = Completion(
        id=id_, key_id=bench.key_ids["client"], endpoint="e", created_at=1.0, messages=[], choices=[choice]
    )
    bench.store.ingest([Entry("1-0", "completion", record.model_dump_json().encode())])
    async with bench.http("client") as http:
        found = await http.get(f"/v1/completions/{id_}")
        assert (found.status_code, found.json()["choices"][0]["logprobs"]) == (200, [None, -1.0])
