"""What people say and what keys are stands in no log: marked, and looked for in all that the parts write."""

import json
import logging
import time
from typing import TYPE_CHECKING

import pytest
import redis
import redis.asyncio
import sqlalchemy as sa
from server_fixture import Installation, served
from sqlalchemy.engine import Engine

from feedback.keys import Keys
from feedback.queue import FeedbackQueue, QueueUnavailable
from feedback.records import Completion
from feedback.settings import QueueSettings
from instructloop import redis_process
from instructloop.database import connect

if TYPE_CHECKING:
    from conftest import RedisServer

__all__ = ["served"]

SAID = "zanzibar-marker"
SECRET = "quetzal-marker"


def provoke(served: Installation) -> None:
    """Requests that succeed and requests that fail, in every way that we know of, all with the markers."""
    chat = {"model": "policy", "messages": [{"role": "user", "content": SAID}], "max_tokens": 4, "user": SAID}
    schema = {"type": "object", "properties": {SAID: {"type": "no such type"}}}
    answer_format = {"type": "json_schema", "json_schema": {"name": SAID, "schema": schema}}
    generations = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat | {"stream": True}),
        ("/v1/chat/completions", chat | {"model": "another"}),  # vLLM logs this name, which nobody said
        ("/v1/chat/completions", chat | {"messages": [{"role": SAID, "content": SAID}]}),
        ("/v1/chat/completions", chat | {"messages": [{"role": "user", "content": f"{SAID} " * 2000}]}),
        ("/v1/chat/completions", chat | {"messages": SAID}),
        ("/v1/chat/completions", chat | {"temperature": SAID}),
        ("/v1/chat/completions", chat | {"response_format": answer_format}),
        ("/v1/chat/completions", chat | {"structured_outputs": {"grammar": f"root ::= {SAID}"}}),
        ("/v1/chat/completions", chat | {"structured_outputs": {"regex": f"({SAID}"}}),
        ("/v1/chat/completions", chat | {"chat_template": "{{ " + SAID + "() }}"}),
        ("/v1/chat/completions", chat | {"tools": [{"type": SAID}]}),
        ("/v1/chat/completions", chat | {"stop": [SAID], "logit_bias": {"999999999": 1}}),
        ("/v1/completions", {"model": "policy", "prompt": [SAID, SAID], "max_tokens": 4}),
        ("/v1/completions", {"model": "policy", "prompt": SAID, "max_tokens": 4, "use_beam_search": True}),
        ("/v1/completions", {"model": "policy", "prompt": f"{SAID} " * 2000}),
        ("/v1/completions", {"model": "policy", "prompt": {"x": SAID}}),
        ("/v1/responses", {"model": "policy", "input": SAID, "max_output_tokens": 16}),
        ("/v1/responses", {"model": "policy", "input": [{"type": SAID}], "previous_response_id": SAID}),
        ("/v1/messages", chat | {"system": SAID, "metadata": {"user_id": SAID}}),
        ("/v1/messages", chat | {"messages": [{"role": "user", "content": [{"type": SAID, "text": SAID}]}]}),
        ("/tokenize", {"model": "policy", "prompt": SAID}),
        ("/detokenize", {"model": "policy", "tokens": SAID}),
    ]
    with served.http(served.client_key) as http:
        statuses = [http.post(path, json=body).status_code for path, body in generations]
        # The provocations do provoke: some succeed, some are vLLM's to refuse.
        assert statuses.count(200) >= 6
        assert sum(status >= 400 for status in statuses) >= 8
        given = http.post("/v1/chat/completions", json=chat).headers
        id_ = given["x-completion-id"]
        event = {"type": "thumb", "completion_id": id_, "value": "up", "comment": SAID, "rater": SAID}
        for body in (
            event,
            event | {"value": SAID},
            event | {SAID: SAID},
            event | {"completion_id": SAID},
            {"type": "demonstration", "completion_id": id_, "text": SAID},
        ):
            http.post("/v1/feedback", json=body, headers={"Idempotency-Key": SAID + str(time.time())})
            http.post("/v1/feedback/batch", content=json.dumps(body))
        http.post("/v1/feedback", content=b'{"' + SAID.encode())
        http.get(f"/v1/feedback/{SAID}")
        http.get(f"/v1/completions/{id_}")
    for name in ("Authorization", "x-api-key", "X-Feedback-Token"):
        for value in (SECRET, f"Bearer {SECRET}", f"Bearer il_client_0123456789ab_{SECRET}"):
            with served.http(**{name: value}) as http:
                assert http.post("/v1/chat/completions", json=chat).status_code in (401, 403)
                http.post("/v1/feedback", json=event)
    with served.http(**{"X-Feedback-Token": given["x-feedback-token"]}) as http:
        assert (
            http.post("/v1/feedback", json={k: v for k, v in event.items() if k != "rater"}).status_code
            == 202
        )
    with redis.Redis.from_url(redis_process.url(served.data_dir)) as queue:
        for kind in ("event", "completion", SAID):
            queue.xadd(served.config.queue.stream, {"kind": kind, "data": json.dumps({"text": SAID})})
    served.stop("redis")
    try:
        with served.http(served.client_key) as http:
            assert http.post("/v1/chat/completions", json=chat).status_code == 200
            assert http.post("/v1/feedback", json=event).status_code == 503
            time.sleep(1)
    finally:
        served.start_redis()


def test_no_prompt_and_no_secret_is_in_a_log(served: Installation) -> None:
    """vLLM logs at INFO here, and the engine's process writes to the same file as the server's."""
    made = Keys(served.database).create("client", "marked")
    before = {name: len(served.log(name)) for name in ("serve", "ingest")}
    dead = served.store.counts()["dead_letters"]
    provoke(served)
    with served.http(made.secret) as http:
        assert http.get("/v1/models").status_code == 200
    deadline = time.monotonic() + 20
    while served.store.counts()["dead_letters"] < dead + 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    logs = {name: served.log(name)[start:] for name, start in before.items()}
    assert "completions go to the spool" in logs["serve"]
    assert "could not be stored" in logs["ingest"]
    secrets = [made.secret, served.client_key, served.operator_key, served.rater_key, SECRET]
    secrets += [secret.rsplit("_", 1)[-1] for secret in secrets]
    secrets.append((served.data_dir / "secret").read_text().strip())
    for name, log in logs.items():
        lines = [line for line in log.splitlines() if any(marker in line for marker in (SAID, *secrets))]
        assert lines == [], name
    for name in ("serve", "ingest"):
        assert not any(secret in served.log(name) for secret in secrets)


def test_a_statement_that_fails_is_named_without_what_it_carried(either_database: Engine) -> None:
    engine = connect(either_database.url.render_as_string(hide_password=False))
    with pytest.raises(sa.exc.DBAPIError) as failed, engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO elsewhere (comment) VALUES (:said)"), {"said": SAID})
    assert "elsewhere" in str(failed.value)
    assert SAID not in str(failed.value)
    engine.dispose()


def test_a_record_that_can_t_be_made_is_named_without_its_text() -> None:
    with pytest.raises(ValueError, match="choices") as failed:
        Completion(id="x", key_id="k", endpoint="e", created_at=1, choices=[{"index": -1, "text": SAID}])  # type: ignore[list-item]
    assert SAID not in str(failed.value)


async def test_redis_password_is_in_no_reason(
    redis_server: "RedisServer", caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for url in (
        redis_server.url.replace("redis://", f"redis://user:{SECRET}@"),
        f"redis://:{SECRET}@127.0.0.1:1/0",
    ):
        async with redis.asyncio.Redis.from_url(url) as client:
            queue = FeedbackQueue(client, QueueSettings())
            reason = await queue.durability()
            assert reason is not None
            assert SECRET not in reason
            with pytest.raises(QueueUnavailable) as refused:
                await queue.depth()
            assert SECRET not in str(refused.value)
    assert SECRET not in caplog.text
