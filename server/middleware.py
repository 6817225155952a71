"""The gate in front of every route, vLLM's and ours: who may pass, and what is noted about a generation.

It authenticates, applies `server.access` and `server.limits`, bounds and reads the body, gives each
generation its id before vLLM sees it (so the headers are right before the first byte of a stream), and
answers refusals in the one error shape. It decides nothing about what a route does.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import Authenticator, roles_of
from server.body import parse_object
from server.context import (
    CALLER,
    ENDPOINTS,
    GENERATION,
    Caller,
    Generation,
    choice_count,
    generation_of,
    is_answer,
)
from server.errors import Problem
from server.identity import Identity, TokenClaims
from server.limits import Limits

logger = logging.getLogger(__name__)

_REQUEST_ID = b"x-request-id"
_ENGINE_BODIES = frozenset(ENDPOINTS) | {"/tokenize", "/detokenize"}
"""The paths whose bodies are read by vLLM."""


class Gate:
    """Pure ASGI middleware; `max_body_bytes` bounds every request's body.

    `obstacle` says why nothing may be generated at the moment, or None.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticator: Authenticator,
        identity: Identity,
        limits: Limits,
        max_body_bytes: int,
        obstacle: Callable[[], str | None],
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._identity = identity
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._obstacle = obstacle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, changed where needed, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            caller = await self._admit(scope)
            body = await self._read(scope, receive)
            scope, body, generation = self._prepare(scope, caller, body)
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        if caller is not None:
            CALLER.set(caller)
        GENERATION.set(generation)
        await self._app(scope, _replayed(body, receive), self._sender(send, generation))

    async def _admit(self, scope: Scope) -> Caller | None:
        """Return the caller, if the route needs one. Raises Problem 401, 403, 404, 405, 429, 503."""
        roles = roles_of(scope["method"], scope["path"])
        if not roles:
            return None
        caller = await self._authenticator.caller(Headers(scope=scope))
        if caller.role not in roles:
            raise Problem(403, f"a {caller.role} may not call this; it is for: {', '.join(sorted(roles))}")
        await self._limits.request(caller)
        return caller

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        too_large = Problem(413, f"the body may have at most {self._max_body_bytes} bytes")
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._max_body_bytes:
            raise too_large
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Problem(400, "the client went away")
            piece = message.get("body", b"")
            size += len(piece)
            if size > self._max_body_bytes:
                raise too_large
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)

    def _prepare(
        self, scope: Scope, caller: Caller | None, body: bytes
    ) -> tuple[Scope, bytes, Generation | None]:
        """Replace the request id, and note a generation. A client never chooses an id itself."""
        headers = [item for item in scope["headers"] if item[0] != _REQUEST_ID]
        path = scope["path"]
        posted = scope["method"] == "POST" and caller is not None
        fields = parse_object(body) if posted and path in _ENGINE_BODIES else None
        generation = None
        if fields is not None and caller is not None and (prefix := ENDPOINTS.get(path)) is not None:
            if (reason := self._obstacle()) is not None:
                raise Problem(503, reason, retry_after=5)
            self._check_ownership(fields, caller)
            request_id = self._identity.new_request_id(caller.key_id, choice_count(path, fields))
            headers.append((_REQUEST_ID, request_id.encode()))
            completion_id = prefix + request_id
            if prefix == "resp_":
                fields["request_id"] = completion_id
                body = json.dumps(fields).encode()
            if is_answer(fields):
                generation = generation_of(path, completion_id, caller.key_id, fields)
        headers = [item for item in headers if item[0] not in (b"content-length", b"transfer-encoding")]
        headers.append((b"content-length", str(len(body)).encode()))
        return {**scope, "headers": headers}, body, generation

    def _check_ownership(self, fields: dict[str, Any], caller: Caller) -> None:
        """Refuse to continue a response that was not given to the same key."""
        previous = fields.get("previous_response_id")
        if isinstance(previous, str) and self._identity.owner(previous) != caller.key_id:
            raise Problem(404, "no such response", param="previous_response_id")

    def _sender(self, send: Send, generation: Generation | None) -> Send:
        if generation is None:
            return send
        token = self._identity.new_token(TokenClaims(generation.completion_id, generation.user))

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                headers = MutableHeaders(scope=message)
                headers["X-Completion-Id"] = generation.completion_id
                headers["X-Feedback-Token"] = token
            await send(message)

        return with_headers


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read already once, then whatever comes (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
