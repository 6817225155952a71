"""API keys and their roles. It doesn't say which route wants which role: that is the server's affair."""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from feedback import tables

Role = Literal["client", "rater", "operator"]
KeyAction = Literal["create_key", "rotate_key", "revoke_key"]

Note = Callable[[Connection, KeyAction, str], None]
"""Writes down what was done to which key (its id), in the transaction that does it."""

_ABSENT = hashlib.sha256(b"no such key").hexdigest()
_ID = re.compile(r"[0-9a-f]{12}")
# Built once: it runs for every request.
_BY_ID = sa.select(tables.keys).where(tables.keys.c.id == sa.bindparam("key_id"))
_BY_IDS = sa.select(tables.keys).where(tables.keys.c.id.in_(sa.bindparam("key_ids", expanding=True)))


class UnknownKey(KeyError):  # noqa: N818
    """No key has this id."""

    def __str__(self) -> str:
        return f"no key has the id {self.args[0]!r}: see `instructloop keys list`"


class RevokedKey(ValueError):  # noqa: N818
    """The key was revoked, so it gets no new secret."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secrets. Times are in Unix seconds.

    After a rotation the secret before it opens too, until `old_secret_until`.
    """

    id: str
    role: Role
    name: str
    created_at: float
    revoked_at: float | None = None
    rotated_at: float | None = None
    old_secret_until: float | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key as it is made or rotated: the only time that its secret can be read."""

    id: str
    secret: str


class Keys:
    """The keys in the database. Only the SHA-256 of a secret is kept: it holds 192 random bits.

    Nothing is remembered between calls: a key that is revoked or rotated anywhere is so everywhere at once.
    """

    def __init__(self, engine: Engine, note: Note | None = None) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)
        # For what every request asks: one statement needs no BEGIN around it.
        self._looker = engine.execution_options(read_only=True, one_statement=True)
        self._note = note

    def create(self, role: Role, name: str) -> NewKey:
        """Make a key; its id is 12 hex digits, its secret `il_<role>_<id>_<random>`."""
        if role not in get_args(Role):
            raise ValueError(f"role: {role!r} is none of {', '.join(get_args(Role))}")
        id = secrets.token_hex(6)
        secret = _new_secret(role, id)
        row = {
            "id": id,
            "role": role,
            "name": name,
            "secret_sha256": _sha256(secret),
            "created_at": time.time(),
        }
        with self._engine.begin() as connection:
            connection.execute(sa.insert(tables.keys), row)
            self._write_down(connection, "create_key", id)
        return NewKey(id=id, secret=secret)

    def verify(self, secret: str) -> Key | None:
        """Return the key that this secret opens, or None if it is unknown, malformed, replaced or revoked."""
        return self.verify_all([secret])[0]

    def verify_all(self, secrets: Sequence[str]) -> Sequence[Key | None]:
        """As `verify` of each, in one look at the database."""
        # Requests that come at the same time mostly come with the same few keys.
        ids = {secret: _id_of(secret) for secret in secrets}
        rows = self._rows(list(ids.values()))
        opened = {secret: _opened(secret, rows.get(id)) for secret, id in ids.items()}
        return [opened[secret] for secret in secrets]

    def find(self, id: str) -> Key | None:
        """Return the key with this id, or None if there is none or it is revoked."""
        return self.find_all([id])[0]

    def find_all(self, ids: Sequence[str]) -> Sequence[Key | None]:
        """As `find` of each, in one look at the database."""
        rows = self._rows(ids)
        found = [rows.get(id) for id in ids]
        return [None if row is None or row.revoked_at is not None else _key(row) for row in found]

    def rotate(self, id: str, grace_seconds: float = 0.0) -> NewKey:
        """Give a key a new secret; the last one opens for `grace_seconds` more, any older one no longer.

        Id, role and all that belongs to the key stay. Raises UnknownKey, RevokedKey.
        """
        with self._engine.begin() as connection:
            row = connection.execute(_BY_ID.with_for_update(), {"key_id": id}).one_or_none()
            if row is None:
                raise UnknownKey(id)
            if row.revoked_at is not None:
                raise RevokedKey(f"key {id} is revoked: make another one")
            secret, now = _new_secret(row.role, id), time.time()
            values = {
                "secret_sha256": _sha256(secret),
                "rotated_at": now,
                "old_secret_sha256": row.secret_sha256 if grace_seconds > 0 else None,
                "old_secret_until": now + grace_seconds if grace_seconds > 0 else None,
            }
            connection.execute(sa.update(tables.keys).where(tables.keys.c.id == id).values(**values))
            self._write_down(connection, "rotate_key", id)
        return NewKey(id=id, secret=secret)

    def revoke(self, id: str) -> None:
        """End a key at once, with all its secrets; a second time changes nothing. Raises UnknownKey."""
        found = tables.keys.c.id == id
        with self._engine.begin() as connection:
            if connection.execute(sa.select(tables.keys.c.id).where(found)).one_or_none() is None:
                raise UnknownKey(id)
            statement = sa.update(tables.keys).where(found, tables.keys.c.revoked_at.is_(None))
            if connection.execute(statement.values(revoked_at=time.time())).rowcount:
                self._write_down(connection, "revoke_key", id)

    def list(self) -> Sequence[Key]:
        """List all keys, revoked ones too, oldest first."""
        statement = sa.select(tables.keys).order_by(tables.keys.c.created_at, tables.keys.c.id)
        with self._reader.connect() as connection:
            return [_key(row) for row in connection.execute(statement)]

    def _rows(self, ids: Sequence[str]) -> "dict[str, sa.Row[tuple[object, ...]]]":
        wanted = sorted(set(ids))
        with self._looker.connect() as connection:
            if len(wanted) == 1:  # as most often, and then the statement is ready
                rows = connection.execute(_BY_ID, {"key_id": wanted[0]})
            else:
                rows = connection.execute(_BY_IDS, {"key_ids": wanted})
            return {row.id: row for row in rows}

    def _write_down(self, connection: Connection, action: KeyAction, id: str) -> None:
        if self._note is not None:
            self._note(connection, action, id)


def _id_of(secret: str) -> str:
    parts = secret.split("_")
    return parts[2] if len(parts) == 4 and _ID.fullmatch(parts[2]) else ""


def _opened(secret: str, row: "sa.Row[tuple[object, ...]] | None") -> Key | None:
    given = _sha256(secret)
    # Compare also when there is no such id, so that the answer takes the same time.
    current = hmac.compare_digest(given, _ABSENT if row is None else row.secret_sha256)
    old = hmac.compare_digest(given, (None if row is None else row.old_secret_sha256) or _ABSENT)
    if row is None or row.revoked_at is not None:
        return None
    return _key(row) if current or (old and time.time() < row.old_secret_until) else None


def _key(row: "sa.Row[tuple[object, ...]]") -> Key:
    return Key(
        id=row.id,
        role=row.role,
        name=row.name,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        rotated_at=row.rotated_at,
        old_secret_until=row.old_secret_until,
    )


def _new_secret(role: str, id: str) -> str:
    return f"il_{role}_{id}_{secrets.token_hex(24)}"


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
