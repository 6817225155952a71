"""The gate: who passes to which route, and what the engine's app behind it gets to see."""

import json
import re
from typing import Any

import httpx
import pytest
from server_bench import Bench

from feedback.keys import Keys
from server.access import ROUTES, roles_of
from server.body import DEEPEST
from server.context import ENDPOINTS, Generation, generation_of
from server.errors import Problem
from server.identity import Issued

CHAT = {"model": "policy", "messages": [{"role": "user", "content": "hi"}]}


def error(response: httpx.Response) -> tuple[int, str, str | None]:
    found = response.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"type", "message", "param"}
    return response.status_code, found["error"]["type"], found["error"]["param"]


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/inference/v1/generate",
        "/scale_elastic_ep",
        "/v1/load_lora_adapter",
        "/v1/embeddings",
        "/reset_prefix_cache",
        "/docs",
        "/openapi.json",
        "/v1/chat/completions/",
        "/v1/chat/completions/batch",
        "//v1/chat/completions",
        "/v1/responses/resp_1/cancel",
        "/",
    ],
)
async def test_routes_that_are_not_listed_do_not_exist(bench: Bench, path: str) -> None:
    async with bench.http("client") as http:
        for method in ("GET", "POST"):
            response = await http.request(method, f"http://test{path}")
            assert error(response)[:2] == (404, "not_found")


async def test_another_method_is_405(bench: Bench) -> None:
    async with bench.http("client") as http:
        refused = await http.delete("/v1/feedback")
        assert (error(refused)[0], refused.headers["allow"]) == (405, "POST")
        refused = await http.get("/v1/feedback/batch")
        assert (error(refused)[0], refused.headers["allow"]) == (405, "POST")
        assert (await http.put("/v1/completions/x")).headers["allow"] == "GET"
        assert error(await http.get("/v1/chat/completions"))[0] == 405


@pytest.mark.parametrize(("method", "path", "roles"), ROUTES)
async def test_each_route_takes_its_roles_and_no_other(
    bench: Bench, method: str, path: str, roles: frozenset[str]
) -> None:
    path = path.replace("{id}", "policy-0000")
    async with bench.http() as http:
        assert (await http.request(method, path)).status_code == (401 if roles else 200)
    for role in ("client", "rater", "operator"):
        async with bench.http(role) as http:
            refused = (await http.request(method, path, json={})).status_code == 403
            assert refused == bool(roles and role not in roles), role


async def test_open_routes_need_no_key(bench: Bench) -> None:
    async with bench.http() as http:
        assert (await http.get("/health")).json() == {"status": "alive"}
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()["version"]) == (200, "policy-0000")
        assert ready.json()["recording"] == "ok"
        bench.recording = "3 completions wait on disk"
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()["recording"]) == (200, bench.recording)
        bench.queue.away = "Redis has appendonly no"
        assert (await http.get("/ready")).json()["feedback"] == "Redis has appendonly no"
        assert (await http.get("/ready")).status_code == 503
        bench.queue.away, bench.dead = None, True
        assert (await http.get("/ready")).status_code == 503
        assert error(await http.get("/health"))[0] == 503


async def test_wrong_credentials_are_401(bench: Bench) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer il_client_x_y"},
        {"Authorization": "Basic abc"},
        {"x-api-key": "no"},
    ):
        async with bench.http(**headers) as http:
            response = await http.post("/v1/chat/completions", json=CHAT)
            assert error(response)[:2] == (401, "unauthenticated")
            assert response.headers["www-authenticate"] == "Bearer"


async def test_anthropic_clients_send_their_key_elsewhere(bench: Bench) -> None:
    async with bench.http(**{"x-api-key": bench.keys["client"]}) as http:
        assert (await http.post("/v1/messages", json=CHAT)).status_code == 200


async def test_the_engine_sees_our_id_and_the_client_the_same(bench: Bench) -> None:
    async with bench.http("client", **{"X-Request-Id": "mine"}) as http:
        for path, prefix in (
            ("/v1/chat/completions", "chatcmpl-"),
            ("/v1/completions", "cmpl-"),
            ("/v1/messages", "chatcmpl-"),
        ):
            response = await http.post(path, json=CHAT)
            id_ = response.headers["x-completion-id"]
            assert id_ == prefix + response.json()["headers"]["x-request-id"]
            assert bench.identity.owner(id_) == bench.key_ids["client"]
            claims = bench.identity.read_token(response.headers["x-feedback-token"])
            assert claims is not None
            assert (claims.completion_id, claims.user) == (id_, None)
            assert json.loads(response.json()["body"]) == CHAT


async def test_responses_take_their_id_from_the_body_which_we_write(bench: Bench) -> None:
    async with bench.http("client") as http:
        asked = {"model": "policy", "input": "é" * 50, "request_id": "resp_mine"}
        response = await http.post("/v1/responses", json=asked)
        seen = json.loads(response.json()["body"])
        assert seen["request_id"] == response.headers["x-completion-id"] != "resp_mine"
        assert bench.identity.owner(seen["request_id"]) == bench.key_ids["client"]
        assert seen["input"] == asked["input"]
        length = int(response.json()["headers"]["content-length"])
        assert length == len(response.json()["body"].encode())


async def test_a_response_continues_only_what_its_own_key_was_given(bench: Bench) -> None:
    theirs = "resp_" + bench.identity.new_request_id(bench.key_ids["other"])
    mine = "resp_" + bench.identity.new_request_id(bench.key_ids["client"])
    async with bench.http("client") as http:
        body = {"model": "policy", "input": "x"}
        assert (
            await http.post("/v1/responses", json=body | {"previous_response_id": mine})
        ).status_code == 200
        refused = await http.post("/v1/responses", json=body | {"previous_response_id": theirs})
        assert error(refused) == (404, "not_found", "previous_response_id")


async def test_refused_and_odd_requests_have_no_completion(bench: Bench) -> None:
    async with bench.http("client") as http:
        refused = await http.post("/v1/chat/completions", json=CHAT | {"user": "refuse me"})
        assert refused.status_code == 400
        assert "x-completion-id" not in refused.headers
        beam = await http.post("/v1/completions", json={"prompt": "x", "use_beam_search": True})
        assert (beam.status_code, "x-completion-id" in beam.headers) == (200, False)


NOT_PLAIN_JSON = [
    b"",
    b'{"model":',
    b"[]",
    b'"x"',
    b'{"x": NaN}',
    b'{"x": -Infinity}',
    b'{"x": "\xff"}',
    b'{"x": "\xed\xa0\x80"}',
    b'{"x": "\\ud800"}',
    b'{"x": {"\\udfff": 1}}',
    '{"x": 1}'.encode("utf-16"),
    b'{"x": ' + b"9" * 5000 + b"}",
    b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"x": ' * 1000 + b"1" + b"}" * 1000,
    b"[" * 2000,
    b'{"x": ' + b"[" * 2000 + b"]" * 2000 + b"}",
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/tokenize", "/v1/feedback"])
async def test_a_body_that_is_not_plain_json_goes_no_further(bench: Bench, path: str) -> None:
    bench.settings = bench.settings.model_copy(update={"max_body_bytes": 20_000})
    bench.__post_init__()
    async with bench.http("client") as http:
        for body in NOT_PLAIN_JSON:
            assert error(await http.post(path, content=body))[:2] == (422, "invalid"), body[:20]


async def test_what_is_nested_as_deep_as_may_be_gets_through(bench: Bench) -> None:
    deepest = b'{"x": ' + b"[" * (DEEPEST - 1) + b"]" * (DEEPEST - 1) + b"}"
    escaped = json.dumps(CHAT | {"x": "\U0001f600[[[["}).encode()
    async with bench.http("client") as http:
        for body in (deepest, escaped, b'{"x": "' + b"[" * 3000 + b'"}'):
            response = await http.post("/v1/chat/completions", content=body)
            assert (response.status_code, response.json()["body"]) == (200, body.decode())
        context = {"x": json.loads(deepest)["x"][0]}
        event = {"type": "thumb", "completion_id": bench.completion(), "value": "up", "context": context}
        assert (await http.post("/v1/feedback", json=event)).status_code == 202
        json.loads(bench.queue.events[0].model_dump_json())


async def test_a_body_that_is_too_large_is_413_with_and_without_a_length(bench: Bench) -> None:
    async def pieces() -> Any:
        for _ in range(5):
            yield b"x" * 1000

    largest = b'{"x": "' + b"x" * 4087 + b'"}'
    async with bench.http("client") as http:
        assert error(await http.post("/v1/chat/completions", content=b"x" * 4097))[:2] == (413, "too_large")
        assert error(await http.post("/v1/chat/completions", content=pieces()))[0] == 413
        odd = {"Content-Length": "many", "Transfer-Encoding": "chunked"}
        assert error(await http.post("/v1/feedback", content=pieces(), headers=odd))[0] == 413
        assert (await http.post("/tokenize", content=largest)).status_code == 200


async def test_nothing_is_generated_by_weights_of_no_version(bench: Bench) -> None:
    bench.obstacle = "the weights in memory are not those of any version"
    async with bench.http("client") as http:
        response = await http.post("/v1/chat/completions", json=CHAT)
        assert error(response)[0] == 503
        assert response.headers["retry-after"] == "5"
        assert (await http.get("/v1/models")).status_code == 200


async def test_a_key_ends_and_turns_with_the_next_request(bench: Bench) -> None:
    keys = Keys(bench.database)
    token = bench.token(bench.completion())
    event = {"type": "thumb", "completion_id": "x", "value": "up"}
    async with bench.http("client") as http, bench.http(**{"X-Feedback-Token": token}) as browser:
        assert (await http.get("/v1/models")).status_code == 200
        assert error(await browser.post("/v1/feedback", json=event))[0] == 404
        turned = keys.rotate(bench.key_ids["client"]).secret
        assert error(await http.get("/v1/models"))[0] == 401
        http.headers["Authorization"] = f"Bearer {turned}"
        assert (await http.get("/v1/models")).status_code == 200
        assert error(await browser.post("/v1/feedback", json=event))[0] == 404
        keys.revoke(bench.key_ids["client"])
        assert error(await http.get("/v1/models"))[0] == 401
        # A token speaks for its client's key, and ends with it.
        assert error(await browser.post("/v1/feedback", json=event))[0] == 401


async def test_without_the_database_nobody_passes(bench: Bench) -> None:
    with bench.database.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE keys RENAME TO elsewhere")
    async with bench.http("client") as http:
        refused = await http.get("/v1/models")
        assert (error(refused)[0], refused.headers["retry-after"]) == (503, "5")
        assert (await http.get("/health")).status_code == 200


async def test_an_id_says_how_many_choices_were_asked_for(bench: Bench) -> None:
    asked: list[tuple[str, dict[str, Any], int | None]] = [
        ("/v1/chat/completions", {}, 1),
        ("/v1/chat/completions", {"n": None}, 1),
        ("/v1/chat/completions", {"n": 3, "prompt": ["a", "b"]}, 3),
        ("/v1/chat/completions", {"n": "2"}, 2),
        ("/v1/chat/completions", {"n": 2.0}, 2),
        ("/v1/chat/completions", {"n": 2.5}, None),
        ("/v1/chat/completions", {"n": -1}, None),
        ("/v1/chat/completions", {"n": 10**400}, None),
        ("/v1/completions", {"prompt": ["a", "b"], "n": 4}, 8),
        ("/v1/completions", {"prompt": [1, 2], "n": 4}, 4),
        ("/v1/completions", {"prompt_embeds": ["x", "y"]}, None),
        ("/v1/messages", {"n": 5}, 1),
        ("/v1/responses", {"input": "x"}, None),
    ]
    async with bench.http("client") as http:
        for path, body, choices in asked:
            response = await http.post(path, json=body)
            issued = bench.identity.issued(response.headers["x-completion-id"])
            assert issued == Issued(bench.key_ids["client"], choices), (path, body)


async def test_cors_is_answered_only_for_listed_origins(bench: Bench) -> None:
    page = "https://page.example"
    preflight = {
        "Origin": page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,idempotency-key,x-feedback-token",
    }
    async with bench.http(**preflight) as http:
        assert (await http.options("/v1/feedback")).status_code == 405
    bench.settings = bench.settings.model_copy(update={"cors_origins": [page]})
    bench.__post_init__()
    async with bench.http(**preflight) as http:
        # The browser sends no credentials with it.
        allowed = await http.options("/v1/feedback")
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, page)
        assert "x-feedback-token" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in allowed.headers
    async with bench.http("client", Origin=page) as http:
        for response in (
            await http.post("/v1/chat/completions", json=CHAT),
            await http.post("/v1/chat/completions", content=b"{"),
            await http.post("/v1/rollback"),
        ):
            # Refusals too: else a page could not tell its user why.
            assert response.headers["access-control-allow-origin"] == page
            exposed = response.headers["access-control-expose-headers"]
            assert exposed == "X-Completion-Id, X-Feedback-Token, Retry-After"
    for headers in ({"Origin": "https://evil.example"}, preflight | {"Origin": "https://evil.example"}):
        async with bench.http(**headers) as http:
            for response in (await http.get("/health"), await http.options("/v1/feedback")):
                assert "access-control-allow-origin" not in response.headers


async def test_what_nobody_foresaw_is_500_in_the_one_shape(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.registry, "replicas", lambda: 1 / 0)
    async with bench.http("operator") as http:
        assert error(await http.get("/v1/replicas"))[:2] == (500, "internal")


async def test_the_document_describes_our_own_routes_and_no_other(bench: Bench) -> None:
    for who in ("client", "rater", "operator"):
        async with bench.http(who) as http:
            found = (await http.get("/v1/openapi.json")).json()
    described = {
        (method.upper(), re.sub(r"\{\w+\}", "{id}", path)): operation
        for path, operations in found["paths"].items()
        for method, operation in operations.items()
    }
    others = {"/v1/openapi.json", "/v1/models", "/tokenize", "/detokenize", *ENDPOINTS}
    assert set(described) == {(method, path) for method, path, _ in ROUTES if path not in others}
    for method, path, roles in ROUTES:
        if path not in others:
            operation = described[method, path]
            assert operation["x-roles"] == sorted(roles)
            assert bool(operation["security"]) == bool(roles)
            assert {"401", "403", "422", "429", "503"} <= set(operation["responses"]) or not roles
    text = json.dumps(found)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in found["components"]["schemas"]
    assert "HTTPValidationError" not in text


def test_what_a_record_carries_is_read_from_each_kind_of_body() -> None:
    chat = generation_of("/v1/chat/completions", "chatcmpl-1", "k", CHAT | {"user": "u"})
    assert (chat.messages, chat.user, chat.parts) == (CHAT["messages"], "u", 1)
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    anthropic = generation_of(
        "/v1/messages",
        "chatcmpl-1",
        "k",
        {"system": "s", "messages": [{"role": "user", "content": blocks}], "metadata": {"user_id": "zoe"}},
    )
    assert anthropic.messages == [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]
    assert anthropic.user == "zoe"
    image = [{"type": "image", "source": {}}]
    kept = generation_of(
        "/v1/messages", "chatcmpl-1", "k", {"messages": [{"role": "user", "content": image}]}
    )
    assert kept.messages == [{"role": "user", "content": image}]
    plain = generation_of("/v1/responses", "resp_1", "k", {"input": "hi", "instructions": "be brief"})
    assert plain.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert plain.parts is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], (None,)), ([[1], [2]], (None, None)), (None, (None,))],
)
def test_prompts_are_counted_as_the_engine_counts_them(prompt: Any, prompts: tuple[str | None, ...]) -> None:
    generation = generation_of("/v1/completions", "cmpl-1", "k", {"prompt": prompt})
    assert generation.prompts == prompts
    assert generation.parts == len(prompts)


def test_the_engine_s_ids_are_told_apart() -> None:
    generation = Generation("cmpl-1", "/v1/completions", "k")
    assert generation.part("cmpl-1") == 0
    assert generation.part("cmpl-1-0") == 0
    assert generation.part("cmpl-1-12") == 12
    assert generation.part("cmpl-1_3") == 3
    assert generation.part("cmpl-1-0a1b2c-beam-0") is None
    assert generation.part("cmpl-12") is None
    assert generation.part("tokenize-1") is None


def test_unknown_paths_have_no_roles() -> None:
    with pytest.raises(Problem) as refused:
        roles_of("GET", "/v1/versions/a/b")
    assert refused.value.status == 404
