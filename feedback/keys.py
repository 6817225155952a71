"""API keys and their roles. It doesn't say which route wants which role: that is the server's affair."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from feedback import tables

Role = Literal["client", "rater", "operator"]
_ABSENT = hashlib.sha256(b"no such key").hexdigest()


class UnknownKey(KeyError):  # noqa: N818
    """No key has this id."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret. Times are in Unix seconds."""

    id: str
    role: Role
    name: str
    created_at: float
    revoked_at: float | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key as it is made: the only time that its secret can be read."""

    id: str
    secret: str


class Keys:
    """The keys in the database. Only the SHA-256 of a secret is kept: it holds 192 random bits."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)

    def create(self, role: Role, name: str) -> NewKey:
        """Make a key; its id is 12 hex digits, its secret `il_<role>_<id>_<random>`."""
        if role not in get_args(Role):
            raise ValueError(f"role: {role!r} is none of {', '.join(get_args(Role))}")
        id = secrets.token_hex(6)
        secret = f"il_{role}_{id}_{secrets.token_hex(24)}"
        row = {
            "id": id,
            "role": role,
            "name": name,
            "secret_sha256": _sha256(secret),
            "created_at": time.time(),
        }
        with self._engine.begin() as connection:
            connection.execute(sa.insert(tables.keys), row)
        return NewKey(id=id, secret=secret)

    def verify(self, secret: str) -> Key | None:
        """Return the key that this secret opens, or None if it is unknown, malformed or revoked."""
        given = _sha256(secret)
        parts = secret.split("_")
        id = parts[2] if len(parts) == 4 else ""
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(tables.keys).where(tables.keys.c.id == id)).one_or_none()
        # Compare also when there is no such id, so that the answer takes the same time.
        matches = hmac.compare_digest(given, _ABSENT if row is None else row.secret_sha256)
        if row is None or not matches or row.revoked_at is not None:
            return None
        return _key(row)

    def revoke(self, id: str) -> None:
        """End a key at once; a second time changes nothing. Raises UnknownKey."""
        found = tables.keys.c.id == id
        with self._engine.begin() as connection:
            if connection.execute(sa.select(tables.keys.c.id).where(found)).one_or_none() is None:
                raise UnknownKey(id)
            statement = sa.update(tables.keys).where(found, tables.keys.c.revoked_at.is_(None))
            connection.execute(statement.values(revoked_at=time.time()))

    def list(self) -> Sequence[Key]:
        """List all keys, revoked ones too, oldest first."""
        statement = sa.select(tables.keys).order_by(tables.keys.c.created_at, tables.keys.c.id)
        with self._reader.connect() as connection:
            return [_key(row) for row in connection.execute(statement)]


def _key(row: "sa.Row[tuple[object, ...]]") -> Key:
    return Key(id=row.id, role=row.role, name=row.name, created_at=row.created_at, revoked_at=row.revoked_at)


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
