"""Every route of the real server, vLLM's and ours: none answers without a key but the two that are open."""

import json
import re
import subprocess
import sys

import httpx
import pytest
from server_fixture import REPOSITORY, Installation, served, test_model

from server.access import ROUTES

__all__ = ["served"]

OPEN = {("GET", "/health"), ("GET", "/ready")}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.fixture(scope="module")
def routes(served: Installation) -> dict[str, list[str]]:
    """The paths of vLLM's app and of ours, an id in the place of each parameter, with their methods."""
    command = [sys.executable, "tests/integration/vllm_routes.py", str(test_model())]
    environment = served.environment | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[str]] = {}
    for path, methods in json.loads(done.stdout.splitlines()[-1]):
        found.setdefault(re.sub(r"\{[^}]*\}", "x", path), []).extend(methods)
    with served.http(served.operator_key) as http:
        ours = http.get("/v1/openapi.json").json()["paths"]
    for path, operations in ours.items():
        found.setdefault(re.sub(r"\{[^}]*\}", "x", path), []).extend(method.upper() for method in operations)
    for method, path, _ in ROUTES:
        found.setdefault(path.replace("{id}", "x"), []).append(method)
    return found


def test_the_routes_were_found(routes: dict[str, list[str]]) -> None:
    for path in (
        "/v1/chat/completions",  # vLLM's, listed
        "/v1/embeddings",  # another task's
        "/invocations",  # SageMaker's
        "/reset_prefix_cache",  # development's
        "/v1/realtime",  # a WebSocket
        "/v1/feedback",  # ours
        "/v1/audit",
    ):
        assert path in routes, sorted(routes)
    assert len(routes) > 50


@pytest.mark.parametrize(
    "credentials", [None, "Bearer il_client_0123456789ab_" + "0" * 48, "Bearer \u00e9", "Basic eDp5"]
)
def test_no_route_answers_without_a_key(
    served: Installation, routes: dict[str, list[str]], credentials: str | None
) -> None:
    answered = []
    headers = {} if credentials is None else {"Authorization": credentials.encode("latin-1")}
    with httpx.Client(base_url=served.url, headers=headers) as http:
        for path in sorted(routes):
            for suffix in ("", "/"):
                for method in METHODS:
                    response = http.request(method, f"{path.rstrip('/')}{suffix}" or "/")
                    if response.status_code not in (401, 404, 405):
                        answered.append((method, path + suffix, response.status_code))
    assert {(method, path) for method, path, _ in answered} == OPEN, answered


def test_no_socket_opens(served: Installation, routes: dict[str, list[str]]) -> None:
    for key in (None, served.client_key, served.operator_key):
        with served.http(key, **UPGRADE) as http:
            for path in sorted(routes):
                assert http.get(path).status_code == 403, path


def test_with_a_key_nothing_is_there_that_is_not_listed(
    served: Installation, routes: dict[str, list[str]]
) -> None:
    listed = {(method, path.replace("{id}", "x")): roles for method, path, roles in ROUTES}
    keys = {"client": served.client_key, "rater": served.rater_key, "operator": served.operator_key}
    for role, key in keys.items():
        with served.http(key) as http:
            for path in sorted(routes):
                for method in ("GET", "POST"):
                    roles = listed.get((method, path))
                    if roles is not None and (not roles or role in roles):
                        continue
                    status = http.request(method, path).status_code
                    assert status == (403 if roles else status), (role, method, path)
                    assert status in (403, 404, 405), (role, method, path)


def test_a_body_in_pieces_is_bounded_too(served: Installation) -> None:
    largest = served.config.server.max_body_bytes
    with served.http(served.client_key) as http:
        for path in ("/v1/chat/completions", "/v1/feedback", "/tokenize"):
            refused = http.post(path, content=(b"x" * 65536 for _ in range(largest // 65536 + 1)))
            assert (refused.status_code, refused.json()["error"]["type"]) == (413, "too_large")


def test_a_body_that_would_bury_the_server_is_refused(served: Installation) -> None:
    with served.http(served.client_key, **{"Content-Type": "application/json"}) as http:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/tokenize"):
            for body in (b"[" * 100_000, b'{"a":' * 50_000, b'{"x": "\\ud800"}'):
                refused = http.post(path, content=body)
                assert (refused.status_code, refused.json()["error"]["type"]) == (422, "invalid")
        half = {"role": "user", "content": "hi", "name": "\ud800"}
        body = json.dumps({"model": "policy", "messages": [half], "max_tokens": 2})
        assert http.post("/v1/chat/completions", content=body).status_code == 422
        body = json.dumps({"model": "policy", "messages": [half | {"name": "x"}], "max_tokens": 2})
        assert http.post("/v1/chat/completions", content=body).status_code == 200


def test_a_vote_on_a_choice_that_was_not_asked_for_is_refused_at_the_door(served: Installation) -> None:
    asked = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "n": 2}
    with served.http(served.client_key) as http:
        given = http.post("/v1/chat/completions", json=asked).headers
        vote = {"type": "thumb", "completion_id": given["x-completion-id"], "value": "up", "choice": 7}
        for headers in ({}, {"Authorization": "", "X-Feedback-Token": given["x-feedback-token"]}):
            refused = http.post("/v1/feedback", json=vote, headers=headers)
            assert (refused.status_code, refused.json()["error"]["param"]) == (422, "choice")
            taken = http.post("/v1/feedback", json=vote | {"choice": 1}, headers=headers)
            assert taken.status_code == 202


def test_a_key_that_is_revoked_is_refused_with_the_next_request(served: Installation) -> None:
    from feedback.keys import Keys

    keys = Keys(served.database)
    made = keys.create("client", "short-lived")
    with httpx.Client(base_url=served.url) as http:
        http.headers["Authorization"] = f"Bearer {made.secret}"
        for _ in range(3):
            assert http.get("/v1/models").status_code == 200
        turned = keys.rotate(made.id, grace_seconds=60)
        assert http.get("/v1/models").status_code == 200
        keys.rotate(made.id)
        assert http.get("/v1/models").status_code == 401
        http.headers["Authorization"] = f"Bearer {turned.secret}"
        assert http.get("/v1/models").status_code == 401
        http.headers["Authorization"] = f"Bearer {keys.rotate(made.id).secret}"
        assert http.get("/v1/models").status_code == 200
        keys.revoke(made.id)
        assert http.get("/v1/models").status_code == 401
