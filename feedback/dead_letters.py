"""Queue entries that could not be stored: to be looked at, fixed, replayed or dropped.

`intake` buries them; what makes an entry one is decided in `entries` and by the database. A letter of an
event keeps that event's receipt, also once it was dropped.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from feedback import tables
from feedback.entries import letter, parse
from feedback.intake import Intake, blames_the_data, refusal
from feedback.queue import Entry

SHORTEST_ID = 6


class UnknownLetter(KeyError):  # noqa: N818
    """There is no such dead letter, or there are several whose ids begin so."""

    def __str__(self) -> str:
        return str(self.args[0])


class StillBroken(ValueError):  # noqa: N818
    """The entry still can't be stored; the message says why."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that could not be stored, without its data, which has `size` bytes. Times are in Unix seconds.

    `entry_id` is Redis' (`<milliseconds>-<n>`). `event_id`, `key_id` and `rater` are those of an event, as
    far as they are known. `fixed_at`: an operator has put other data in place. `dropped_at`: it is given up,
    and its data is gone.
    """

    id: str
    entry_id: str
    kind: str
    schema: str
    size: int
    reason: str
    at: float
    event_id: str | None
    key_id: str | None
    rater: str | None
    fixed_at: float | None
    dropped_at: float | None


class DeadLetters:
    """The dead letters of one database; `waiting_hours` and `clock` as the store's.

    Letters are named by their id or, where that is unique, by its beginning (6 digits or more).
    """

    def __init__(
        self, engine: Engine, waiting_hours: float = 24.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)
        self._waiting_hours = waiting_hours
        self._clock = clock

    def list(self, limit: int = 100, after: str | None = None, dropped: bool = False) -> list[DeadLetter]:
        """List letters, newest first, from the one behind `after` on; with `dropped` also those given up.

        Raises UnknownLetter for `after`.
        """
        columns = tables.dead_letters.c
        query = _LETTER.order_by(columns.at.desc(), columns.digest).limit(limit)
        if not dropped:
            query = query.where(columns.dropped_at.is_(None))
        with self._reader.connect() as connection:
            if after is not None:
                last = self._find(connection, after)
                behind = (columns.at == last.at) & (columns.digest > last.id)
                query = query.where((columns.at < last.at) | behind)
            return [DeadLetter(**row._mapping) for row in connection.execute(query)]

    def get(self, id: str) -> DeadLetter:
        """Return one letter; raises UnknownLetter."""
        with self._reader.connect() as connection:
            return self._find(connection, id)

    def data(self, id: str) -> bytes:
        """Return what the entry holds; raises UnknownLetter."""
        with self._reader.connect() as connection:
            return _data(connection, self._find(connection, id))

    def of_event(self, event_id: str) -> DeadLetter | None:
        """Return the letter, also a dropped one, that is an event's; None if there is none."""
        columns = tables.dead_letters.c
        query = _LETTER.where(columns.event_id == event_id).order_by(columns.at.desc()).limit(1)
        with self._reader.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else DeadLetter(**row._mapping)

    def ids(self) -> Sequence[str]:
        """List all letters that can be replayed, in the order in which they stood in the queue."""
        columns = tables.dead_letters.c
        query = sa.select(columns.digest, columns.entry_id).where(columns.dropped_at.is_(None))
        with self._reader.connect() as connection:
            rows = list(connection.execute(query))
        return [row.digest for row in sorted(rows, key=lambda row: (_order(row.entry_id), row.digest))]

    def fix(self, id: str, data: bytes, kind: str | None = None) -> None:
        """Put other data in place, in the newest schema, and if it was wrong another kind; then replay it.

        Raises UnknownLetter, and StillBroken for data that can't be read, or that would make another event
        or somebody else's of it.
        """
        with self._engine.begin() as connection:
            found = self._locked(connection, id)
            entry = Entry(found.entry_id, kind or found.kind, data, found.event_id, found.key_id)
            parsed = parse([entry])
            if parsed.letters:
                raise StillBroken(parsed.letters[0].reason)
            for event in parsed.events:
                for name in ("event_id", "key_id"):
                    if (known := getattr(found, name)) not in (None, getattr(event, name)):
                        raise StillBroken(f"{name}: it is {known}, and a fix can't change that")
            new = asdict(letter(entry, found.reason))
            changes = {name: new[name] for name in _FIXED} | {"fixed_at": self._clock()}
            self._update(connection, found, changes)

    def replay(self, id: str) -> DeadLetter:
        """Store the entry as if it had just come, and return the letter, which is gone with it.

        An event counts from when it was received: it does not replace what its rater said later. Feedback
        that waited too long for a completion that is replayed counts after all. Raises UnknownLetter, and
        StillBroken; the letter then has the new reason.
        """
        try:
            with self._engine.begin() as connection:
                found = self._locked(connection, id)
                entry = _entry(found, _data(connection, found))
                parsed = parse([entry])
                if parsed.letters:
                    raise StillBroken(parsed.letters[0].reason)
                intake = Intake(connection, now=self._clock(), waiting_hours=self._waiting_hours)
                intake.take(parsed.completions, parsed.events, [])
                connection.execute(sa.delete(tables.dead_letters).where(_is(found)))
                return found
        except Exception as problem:
            if isinstance(problem, UnknownLetter) or not blames_the_data(problem):
                raise
            reason = str(problem) if isinstance(problem, StillBroken) else refusal(problem)
            reason = letter(entry, reason).reason
        with self._engine.begin() as connection:
            self._update(connection, found, {"reason": reason})
        raise StillBroken(reason)

    def drop(self, id: str, reason: str) -> DeadLetter:
        """Give a letter up for `reason`: its data is deleted, an event's receipt stays.

        Raises UnknownLetter.
        """
        with self._engine.begin() as connection:
            found = self._locked(connection, id)
            if found.event_id is None:
                connection.execute(sa.delete(tables.dead_letters).where(_is(found)))
            else:
                said = f"{found.reason}; dropped: {reason}" if reason else f"{found.reason}; dropped"
                self._update(connection, found, {"data": b"", "reason": said, "dropped_at": self._clock()})
            return found

    def _locked(self, connection: Connection, id: str) -> DeadLetter:
        """Find a letter and keep others from changing it; one that was dropped can't be changed any more."""
        found = self._find(connection, id)
        row = sa.select(tables.dead_letters.c.digest).where(_is(found)).with_for_update()
        # It may have gone while this waited for the lock.
        if connection.execute(row).one_or_none() is None or found.dropped_at is not None:
            raise UnknownLetter(f"there is no dead letter {id}, or no more")
        return found

    @staticmethod
    def _find(connection: Connection, id: str) -> DeadLetter:
        named = tables.dead_letters.c.digest == id
        if SHORTEST_ID <= len(id) < 64 and id.isalnum():
            named = tables.dead_letters.c.digest.startswith(id)
        rows = connection.execute(_LETTER.where(named).limit(2)).all()
        if len(rows) > 1:
            raise UnknownLetter(f"several dead letters begin with {id}")
        if not rows:
            raise UnknownLetter(f"there is no dead letter {id}")
        return DeadLetter(**rows[0]._mapping)

    @staticmethod
    def _update(connection: Connection, found: DeadLetter, changes: dict[str, Any]) -> None:
        connection.execute(sa.update(tables.dead_letters).where(_is(found)).values(**changes))


_FIXED = ("kind", "schema", "data", "event_id", "key_id", "rater")
_LETTER = sa.select(
    tables.dead_letters.c.digest.label("id"),
    sa.func.length(tables.dead_letters.c.data).label("size"),
    *(column for column in tables.dead_letters.c if column.name not in ("digest", "data")),
)


def _is(found: DeadLetter) -> sa.ColumnElement[bool]:
    return tables.dead_letters.c.digest == found.id


def _data(connection: Connection, found: DeadLetter) -> bytes:
    return bytes(connection.execute(sa.select(tables.dead_letters.c.data).where(_is(found))).scalar_one())


def _entry(found: DeadLetter, data: bytes) -> Entry:
    return Entry(found.entry_id, found.kind, data, found.event_id, found.key_id, found.schema)


def _order(entry_id: str) -> tuple[int, ...]:
    """Sort Redis' ids as numbers; what is no such id comes first."""
    parts = entry_id.split("-")
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else ()
