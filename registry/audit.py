"""The audit log: what operators did, and what they tried and were refused, over HTTP and on the command line.

Owns the table `audit_log`, which only grows. Moves of versions that happened stand in the version log already
and are read from there, not written twice. Whoever carries an action out writes it down, in the same
transaction where it can.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from registry.manifest import BrokenVersion
from registry.tables import AUDIT_LOG, VERSION_LOG

Outcome = Literal["done", "refused", "failed"]

_MOVES = {
    "promoted": "promote",
    "rejected": "reject",
    "rolled_back": "rollback",
    "canary": "canary",
    "shadow": "shadow",
    "withdrawn": "withdraw",
}
"""What the version log calls the moves that stand here as what somebody did."""

_WIDTH = 200
_LONGEST_DETAIL = 2000


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One action: who did what on what, when, and what came of it.

    `actor` is `key <id> (<name>)` over HTTP, `command line (<user>@<host>)`, or a part of the system, such as
    `round 3`. `at` is in Unix seconds; `detail` is the reason that was given, or why it was refused.
    """

    at: float
    actor: str
    action: str
    target: str
    outcome: Outcome
    detail: str


class AuditLog:
    """The log in the database of `engine`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)

    def append(
        self, actor: str, action: str, target: str = "", *, outcome: Outcome = "done", detail: str = ""
    ) -> None:
        """Write down one action, after it."""
        with self._engine.begin() as connection:
            write(connection, actor, action, target, outcome=outcome, detail=detail)

    @contextlib.contextmanager
    def refusals(self, actor: str, action: str, target: str = "") -> Iterator[None]:
        """Write down an action that is not carried out: around what writes it down itself once it is."""
        try:
            yield
        except sa.exc.SQLAlchemyError:
            raise  # The database is away, and with it this log.
        except Exception as error:
            refused = isinstance(error, ValueError | LookupError | BrokenVersion)
            outcome: Outcome = "refused" if refused else "failed"
            self.append(actor, action, target, outcome=outcome, detail=str(error) if refused else repr(error))
            raise

    def entries(self, limit: int = 100, before: float | None = None) -> list[AuditEntry]:
        """Return the latest `limit` actions, those at Unix time `before` or later left out; newest first."""
        moves = sa.select(
            VERSION_LOG.c.at,
            VERSION_LOG.c.actor,
            sa.case(_MOVES, value=VERSION_LOG.c.action).label("action"),
            VERSION_LOG.c.version.label("target"),
            sa.literal("done").label("outcome"),
            VERSION_LOG.c.reason.label("detail"),
            VERSION_LOG.c.sequence,
        ).where(VERSION_LOG.c.action.in_(list(_MOVES)))
        columns = [AUDIT_LOG.c[name] for name in ("at", "actor", "action", "target", "outcome", "detail")]
        both = sa.union_all(moves, sa.select(*columns, AUDIT_LOG.c.sequence)).subquery()
        query = sa.select(*(both.c[column.name] for column in columns))
        if before is not None:
            query = query.where(both.c.at < before)
        query = query.order_by(both.c.at.desc(), both.c.sequence.desc()).limit(limit)
        with self._reader.connect() as connection:
            return [AuditEntry(**row._mapping) for row in connection.execute(query)]


def write(
    connection: sa.Connection,
    actor: str,
    action: str,
    target: str = "",
    *,
    outcome: Outcome = "done",
    detail: str = "",
) -> None:
    """Write down one action in the transaction that carries it out."""
    row = {
        "at": time.time(),
        "actor": actor[:_WIDTH],
        "action": action,
        "target": target[:_WIDTH],
        "outcome": outcome,
        "detail": detail[:_LONGEST_DETAIL],
    }
    connection.execute(sa.insert(AUDIT_LOG).values(**row))


def key_note(actor: str) -> Callable[[sa.Connection, str, str], None]:
    """Return what writes down, for `feedback.keys.Keys`, that `actor` made, rotated or revoked a key."""

    def note(connection: sa.Connection, action: str, key_id: str) -> None:
        write(connection, actor, action, f"key {key_id}")

    return note
