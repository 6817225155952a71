"""Which routes exist for whom, and who a caller is. Everything that is not listed here is 404.

vLLM brings more routes than these, some of them unguarded by its own key; none is reachable unless it
stands in `ROUTES`.
"""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import anyio.to_thread
from starlette.datastructures import Headers

from server.context import Caller, CallerRole
from server.errors import Problem
from server.identity import Identity

_CLIENT: frozenset[CallerRole] = frozenset({"client"})
_GIVERS: frozenset[CallerRole] = frozenset({"client", "rater", "token"})
_OPERATOR: frozenset[CallerRole] = frozenset({"operator"})
_OPEN: frozenset[CallerRole] = frozenset()

ROUTES: tuple[tuple[str, str, frozenset[CallerRole]], ...] = (
    ("GET", "/health", _OPEN),
    ("GET", "/ready", _OPEN),
    ("GET", "/metrics", _OPERATOR),
    ("GET", "/v1/models", _CLIENT),
    ("POST", "/v1/chat/completions", _CLIENT),
    ("POST", "/v1/completions", _CLIENT),
    ("POST", "/v1/responses", _CLIENT),
    ("POST", "/v1/messages", _CLIENT),
    ("POST", "/tokenize", _CLIENT),
    ("POST", "/detokenize", _CLIENT),
    ("GET", "/v1/completions/{id}", _CLIENT | _OPERATOR),
    ("POST", "/v1/feedback", _GIVERS),
    ("POST", "/v1/feedback/batch", _GIVERS - {"token"}),
    ("GET", "/v1/feedback/{id}", _GIVERS | _OPERATOR),
    ("GET", "/v1/queries", frozenset({"rater", "operator"})),
    ("GET", "/v1/versions", _OPERATOR),
    ("GET", "/v1/versions/{id}", _OPERATOR),
    ("POST", "/v1/versions/{id}/promote", _OPERATOR),
    ("POST", "/v1/versions/{id}/reject", _OPERATOR),
    ("POST", "/v1/rollback", _OPERATOR),
    ("GET", "/v1/replicas", _OPERATOR),
    ("GET", "/v1/rounds", _OPERATOR),
    ("POST", "/v1/rounds", _OPERATOR),
    ("GET", "/v1/rounds/{id}", _OPERATOR),
    ("GET", "/v1/rounds/{id}/report", _OPERATOR),
    ("GET", "/v1/raters", _OPERATOR),
    ("GET", "/v1/raters/log", _OPERATOR),
    ("GET", "/v1/raters/agreement", _OPERATOR),
    ("POST", "/v1/raters/quarantine", _OPERATOR),
    ("POST", "/v1/raters/confirm", _OPERATOR),
    ("POST", "/v1/raters/lift", _OPERATOR),
    ("GET", "/v1/gold", _OPERATOR),
    ("POST", "/v1/gold", _OPERATOR),
    ("DELETE", "/v1/gold/{id}", _OPERATOR),
)

_PATTERNS = [(method, re.compile(re.sub(r"\{id\}", "[^/]+", path)), roles) for method, path, roles in ROUTES]


def roles_of(method: str, path: str) -> frozenset[CallerRole]:
    """Who may call this route; empty means anybody. Raises Problem 404, or 405 for another method."""
    matching = [(known, roles) for known, pattern, roles in _PATTERNS if pattern.fullmatch(path)]
    if not matching:
        raise Problem(404, f"there is no {path}")
    for known, roles in matching:
        if known == method:
            return roles
    raise Problem(405, f"{path} takes {', '.join(known for known, _ in matching)}")


class Key(Protocol):
    """A verified key, as `feedback.keys` gives it."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def role(self) -> CallerRole: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102


@dataclass(slots=True)
class _Remembered:
    caller: Caller
    until: float


class Authenticator:
    """Turns credentials into a Caller: `Authorization: Bearer`, `x-api-key`, or `X-Feedback-Token`.

    `verify` may block (it reads the database) and runs in a thread. A key that was good is remembered for
    two seconds, so a revoked one works at most that much longer.
    """

    REMEMBER_SECONDS = 2.0
    REMEMBER_KEYS = 1024

    def __init__(self, verify: Callable[[str], Key | None], identity: Identity) -> None:
        self._verify = verify
        self._identity = identity
        self._remembered: dict[bytes, _Remembered] = {}

    async def caller(self, headers: Headers) -> Caller:
        """Who sent these headers. Raises Problem 401."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        secret = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        if secret:
            return await self._by_key(secret)
        token = headers.get("x-feedback-token")
        if token:
            return self._by_token(token)
        raise Problem(401, "an API key (Authorization: Bearer …) or a feedback token is needed")

    async def _by_key(self, secret: str) -> Caller:
        now = time.monotonic()
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        known = self._remembered.get(digest)
        if known is not None and known.until > now:
            return known.caller
        self._remembered.pop(digest, None)
        key = await anyio.to_thread.run_sync(self._verify, secret)
        if key is None:
            raise Problem(401, "unknown or revoked API key")
        caller = Caller(key.role, key.id, key.name)
        if len(self._remembered) >= self.REMEMBER_KEYS:
            self._remembered.clear()
        self._remembered[digest] = _Remembered(caller, now + self.REMEMBER_SECONDS)
        return caller

    def _by_token(self, token: str) -> Caller:
        claims = self._identity.read_token(token)
        key_id = self._identity.owner(claims.completion_id) if claims is not None else None
        if claims is None or key_id is None:
            raise Problem(401, "unknown or expired feedback token")
        return Caller("token", key_id, "feedback token", claims.completion_id, claims.user)
