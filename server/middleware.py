"""The gate in front of every route, vLLM's and ours: who may pass, and what is noted about a generation.

It authenticates, applies `server.access` and `server.limits`, bounds and reads the body, gives each
generation its id before vLLM sees it (so the headers are right before the first byte of a stream), and
answers refusals in the one error shape. While a version is on trial it lets `server.routing` pass a request
on to another replica. It decides nothing about what a route does.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feedback.records import SHADOW
from server.access import COUNTED_WITH_ITS_EVENT, Authenticator, roles_of
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
from server.identity import SHADOW_OWNER, Errand, Identity, TokenClaims
from server.limits import Limits
from server.routing import ERRAND_HEADER, Asked, Router

logger = logging.getLogger(__name__)

_REQUEST_ID = b"x-request-id"
_OURS = (_REQUEST_ID, ERRAND_HEADER.encode())
"""Headers whose values a client does not choose."""

_ENGINE_BODIES = frozenset(ENDPOINTS) | {"/tokenize", "/detokenize"}
"""The paths whose bodies are read by vLLM."""


class Gate:
    """Pure ASGI middleware; `max_body_bytes` bounds every request's body.

    `obstacle` says why nothing may be generated, or None, as soon as that is known. Without a `router` every
    request is answered here.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        authenticator: Authenticator,
        identity: Identity,
        limits: Limits,
        max_body_bytes: int,
        obstacle: Callable[[], Awaitable[str | None]],
        router: Router | None = None,
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._identity = identity
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._obstacle = obstacle
        self._router = router

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
            errand = await self._errand(scope, caller, body)
            fields = self._fields(scope, caller, body)
            asked = None if errand is not None else self._asked(scope, caller, body, fields)
            if asked is not None and await self._passed_on(asked, receive, send):
                return
            scope, body, generation = await self._prepare(scope, caller, body, fields, errand)
        except Problem as problem:
            await problem.response()(scope, receive, send)
            return
        if caller is not None:
            CALLER.set(caller)
        GENERATION.set(generation)
        if generation is not None and generation.source == SHADOW:
            await self._app(scope, _replayed(body, receive), send)
        else:
            await self._app(scope, _replayed(body, receive), self._sender(send, generation))

    async def _admit(self, scope: Scope) -> Caller | None:
        """Return the caller, if the route needs one. Raises Problem 401, 403, 404, 405, 429, 503."""
        roles = roles_of(scope["method"], scope["path"])
        if not roles:
            return None
        caller = await self._authenticator.caller(Headers(scope=scope))
        if caller.role not in roles:
            raise Problem(403, f"a {caller.role} may not call this; it is for: {', '.join(sorted(roles))}")
        # What another replica sends was counted there; whether it does is told by the body (`_errand`).
        passed_on = ERRAND_HEADER in Headers(scope=scope)
        if not passed_on and (scope["method"], scope["path"]) not in COUNTED_WITH_ITS_EVENT:
            await self._limits.request(caller)
        return caller

    async def _errand(self, scope: Scope, caller: Caller | None, body: bytes) -> Errand | None:
        """Why another replica sends this request; None if a client does. Raises Problem 403 for a forgery."""
        seal = Headers(scope=scope).get(ERRAND_HEADER)
        if seal is None or caller is None:
            return None
        errand = self._identity.errand(seal, caller.key_id, scope["path"], body)
        if errand is None:
            await self._limits.request(caller)
            raise Problem(403, f"{ERRAND_HEADER} is for replicas that share this one's secret")
        return errand

    def _asked(
        self, scope: Scope, caller: Caller | None, body: bytes, fields: dict[str, Any] | None
    ) -> Asked | None:
        """Return what may be answered by another replica; None for what is this one's affair."""
        if caller is None or fields is None or scope["path"] not in ENDPOINTS:
            return None
        return Asked.of(scope, body, fields, caller.key_id)

    async def _passed_on(self, asked: Asked, receive: Receive, send: Send) -> bool:
        """Whether another replica has answered; if not, one may get a copy. Raises Problem 503."""
        if self._router is None:
            return False
        if await self._router.answered(asked, receive, send):
            return True
        if (reason := self._router.hidden()) is not None:
            raise Problem(503, reason, retry_after=5)
        self._router.copy(asked)
        return False

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

    def _fields(self, scope: Scope, caller: Caller | None, body: bytes) -> dict[str, Any] | None:
        """Return what a body for vLLM says, None for other bodies. Raises Problem 422."""
        posted = scope["method"] == "POST" and caller is not None
        return parse_object(body) if posted and scope["path"] in _ENGINE_BODIES else None

    async def _prepare(
        self,
        scope: Scope,
        caller: Caller | None,
        body: bytes,
        fields: dict[str, Any] | None,
        errand: Errand | None,
    ) -> tuple[Scope, bytes, Generation | None]:
        """Replace the request id, and note a generation. A client never chooses an id itself."""
        headers = [item for item in scope["headers"] if item[0] not in _OURS]
        path = scope["path"]
        generation = None
        if fields is not None and caller is not None and (prefix := ENDPOINTS.get(path)) is not None:
            if (reason := await self._obstacle()) is not None:
                raise Problem(503, reason, retry_after=5)
            self._check_ownership(fields, caller)
            owner, source = (SHADOW_OWNER, SHADOW) if errand == "shadow" else (caller.key_id, "serving")
            request_id = self._identity.new_request_id(owner, choice_count(path, fields))
            headers.append((_REQUEST_ID, request_id.encode()))
            completion_id = prefix + request_id
            if prefix == "resp_":
                fields["request_id"] = completion_id
                body = json.dumps(fields).encode()
            if is_answer(fields):
                generation = generation_of(path, completion_id, caller.key_id, fields, source)
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
