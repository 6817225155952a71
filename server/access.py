"""Which routes exist for whom, and who a caller is. Everything that is not listed here is 404.

vLLM brings more routes than these, some of them unguarded by its own key; none is reachable unless it
stands in `ROUTES`.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from starlette.datastructures import Headers

from feedback.grouping import Grouped
from server.context import Caller, CallerRole
from server.errors import Problem
from server.identity import Identity
from server.lookups import from_database

_CLIENT: frozenset[CallerRole] = frozenset({"client"})
_GIVERS: frozenset[CallerRole] = frozenset({"client", "rater", "token"})
_OPERATOR: frozenset[CallerRole] = frozenset({"operator"})
_RATERS: frozenset[CallerRole] = frozenset({"rater", "operator"})
_KEYS: frozenset[CallerRole] = frozenset({"client", "rater", "operator"})
_OPEN: frozenset[CallerRole] = frozenset()

ROUTES: tuple[tuple[str, str, frozenset[CallerRole]], ...] = (
    ("GET", "/health", _OPEN),
    ("GET", "/ready", _OPEN),
    ("GET", "/metrics", _OPERATOR),
    ("GET", "/v1/openapi.json", _KEYS),
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
    ("GET", "/v1/feedback/{id}/lineage", _OPERATOR),
    ("GET", "/v1/queries", _RATERS),
    ("GET", "/v1/arena", _RATERS),
    ("POST", "/v1/arena/{id}", _RATERS),
    ("POST", "/v1/forget", _OPERATOR),
    ("GET", "/v1/forget", _OPERATOR),
    ("GET", "/v1/forget/{id}", _OPERATOR),
    ("GET", "/v1/versions", _OPERATOR),
    ("GET", "/v1/versions/{id}", _OPERATOR),
    ("GET", "/v1/versions/{id}/lineage", _OPERATOR),
    ("POST", "/v1/versions/{id}/promote", _OPERATOR),
    ("POST", "/v1/versions/{id}/reject", _OPERATOR),
    ("POST", "/v1/rollback", _OPERATOR),
    ("POST", "/v1/versions/{id}/canary", _OPERATOR),
    ("POST", "/v1/versions/{id}/shadow", _OPERATOR),
    ("POST", "/v1/withdraw", _OPERATOR),
    ("GET", "/v1/trial", _OPERATOR),
    ("GET", "/v1/replicas", _OPERATOR),
    ("GET", "/v1/rounds", _OPERATOR),
    ("POST", "/v1/rounds", _OPERATOR),
    ("GET", "/v1/rounds/{id}", _OPERATOR),
    ("GET", "/v1/rounds/{id}/report", _OPERATOR),
    ("GET", "/v1/evaluations", _OPERATOR),
    ("POST", "/v1/evaluations", _OPERATOR),
    ("GET", "/v1/evaluations/{id}", _OPERATOR),
    ("GET", "/v1/evaluations/{id}/report", _OPERATOR),
    ("POST", "/v1/evaluations/{id}/cancel", _OPERATOR),
    ("GET", "/v1/dead-letters", _OPERATOR),
    ("GET", "/v1/dead-letters/{id}", _OPERATOR),
    ("POST", "/v1/dead-letters/{id}/fix", _OPERATOR),
    ("POST", "/v1/dead-letters/{id}/replay", _OPERATOR),
    ("POST", "/v1/dead-letters/{id}/drop", _OPERATOR),
    ("GET", "/v1/audit", _OPERATOR),
    ("GET", "/v1/raters", _OPERATOR),
    ("GET", "/v1/raters/log", _OPERATOR),
    ("GET", "/v1/raters/agreement", _OPERATOR),
    ("POST", "/v1/raters/quarantine", _OPERATOR),
    ("POST", "/v1/raters/confirm", _OPERATOR),
    ("POST", "/v1/raters/lift", _OPERATOR),
    ("GET", "/v1/gold", _OPERATOR),
    ("POST", "/v1/gold", _OPERATOR),
    ("DELETE", "/v1/gold/{id}", _OPERATOR),
    ("GET", "/v1/cases", _OPERATOR),
    ("POST", "/v1/cases", _OPERATOR),
    ("GET", "/v1/cases/{id}", _OPERATOR),
    ("DELETE", "/v1/cases/{id}", _OPERATOR),
)


COUNTED_WITH_ITS_EVENT = frozenset({("POST", "/v1/feedback")})
"""Routes that count their request themselves, together with its event, to ask Redis once."""

_Methods = dict[str, frozenset[CallerRole]]


def _by_path() -> tuple[dict[str, _Methods], list[tuple[re.Pattern[str], _Methods]]]:
    """Each path's methods: of paths in clear, and of those with an id in them."""
    methods: dict[str, _Methods] = {}
    for method, path, roles in ROUTES:
        methods.setdefault(path, {})[method] = roles
    clear = {path: found for path, found in methods.items() if "{id}" not in path}
    # Control characters are in no id, and a database may refuse to look for them.
    patterns = [
        (re.compile(path.replace("{id}", r"[^/\x00-\x1f]+")), found)
        for path, found in methods.items()
        if path not in clear
    ]
    return clear, patterns


_CLEAR, _PATTERNS = _by_path()


def roles_of(method: str, path: str) -> frozenset[CallerRole]:
    """Who may call this route; empty means anybody. Raises Problem 404, or 405 for another method."""
    # Paths in clear first, so that none of them is taken for an id.
    methods = _CLEAR.get(path) or next(
        (found for pattern, found in _PATTERNS if pattern.fullmatch(path)), None
    )
    if methods is None:
        raise Problem(404, f"there is no {path}")
    if method not in methods:
        allow = ", ".join(methods)
        raise Problem(405, f"{path} takes {allow}", allow=allow)
    return methods[method]


class Key(Protocol):
    """A verified key, as `feedback.keys` gives it."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def role(self) -> CallerRole: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102


class KeyBook(Protocol):
    """Where keys are looked up: `feedback.keys.Keys`. Both may block, on the database."""

    def verify_all(self, secrets: Sequence[str]) -> Sequence[Key | None]:
        """Return the key that each secret opens now."""

    def find_all(self, ids: Sequence[str]) -> Sequence[Key | None]:
        """Return the keys with these ids, None for one that is revoked."""


class Authenticator:
    """Turns credentials into a Caller: `Authorization: Bearer`, `x-api-key`, or `X-Feedback-Token`.

    Every request asks the key book, in a thread: a key that is revoked or rotated anywhere is so here with
    the next request, whatever else is away. Requests that come at the same time ask together. A feedback
    token is good as long as the key that it speaks for.
    """

    def __init__(self, keys: KeyBook, identity: Identity) -> None:
        self._keys = keys
        self._identity = identity
        self._verify = Grouped(self._verify_all)
        self._find = Grouped(self._find_all)

    async def caller(self, headers: Headers) -> Caller:
        """Who sent these headers. Raises Problem 401."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        secret = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        if secret:
            return await self._by_key(secret)
        token = headers.get("x-feedback-token")
        if token:
            return await self._by_token(token)
        raise Problem(401, "an API key (Authorization: Bearer …) or a feedback token is needed")

    async def _by_key(self, secret: str) -> Caller:
        key = await self._verify(secret)
        if key is None:
            raise Problem(401, "unknown or revoked API key")
        return Caller(key.role, key.id, key.name)

    async def _by_token(self, token: str) -> Caller:
        claims = self._identity.read_token(token)
        key_id = self._identity.owner(claims.completion_id) if claims is not None else None
        if claims is None or key_id is None:
            raise Problem(401, "unknown or expired feedback token")
        if await self._find(key_id) is None:
            raise Problem(401, "the key that this feedback token speaks for is revoked")
        return Caller("token", key_id, "feedback token", claims.completion_id, claims.user)

    async def _verify_all(self, secrets: Sequence[str]) -> Sequence[Key | None]:
        return await from_database(self._keys.verify_all, secrets)

    async def _find_all(self, ids: Sequence[str]) -> Sequence[Key | None]:
        return await from_database(self._keys.find_all, ids)
