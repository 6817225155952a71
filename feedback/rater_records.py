"""What is kept of raters: who is in quarantine and why, gold questions, and votes as the store has them.

It decides nothing about anybody: `reliability` suspects, operators and rounds act. The log only grows.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from feedback import tables
from feedback.events import Event, Ranking, Rating, Thumb, references
from feedback.rows import event_of
from feedback.votes import Vote, votes_of

State = Literal["quarantined", "confirmed", "lifted"]
Action = Literal["quarantine", "confirm", "lift"]

_AFTER: dict[str, State] = {"quarantine": "quarantined", "confirm": "confirmed", "lift": "lifted"}
_FROM: dict[str, tuple[State | None, ...]] = {
    "quarantine": (None, "lifted"),
    "confirm": ("quarantined",),
    "lift": ("quarantined", "confirmed"),
}
_APPEND_ATTEMPTS = 20
_CHUNK = 500


class RaterConflict(ValueError):  # noqa: N818
    """The rater is not in a state that allows this; the message says in which it is."""


class UnknownRater(KeyError):  # noqa: N818
    """Nobody of this name has given feedback."""

    def __str__(self) -> str:
        return f"no rater {self.args[0]!r} has given feedback: see `instructloop raters`"


class UnsuitableGold(ValueError):  # noqa: N818
    """The event can't be a gold question; the message says why."""


@dataclass(frozen=True, slots=True)
class RaterLogEntry:
    """One thing that was done about a rater; `at` is in Unix seconds."""

    sequence: int
    at: float
    rater: str
    action: Action
    actor: str
    reason: str

    @property
    def state(self) -> State:
        """The state that the rater is in after it."""
        return _AFTER[self.action]


@dataclass(frozen=True, slots=True)
class Gold:
    """An event whose verdict is known to be right: who said so, when (Unix seconds) and why."""

    event: Event
    at: float
    actor: str
    reason: str


class RaterRecords:
    """The raters of one database; safe to share between threads. `clock` gives Unix seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)
        self._clock = clock

    # -- quarantine

    def quarantine(self, rater: str, *, actor: str, reason: str) -> RaterLogEntry:
        """Let nothing that `rater` says count in a round, until an operator lifts it.

        Raises UnknownRater, and RaterConflict where it is in quarantine already.
        """
        return self._append(rater, "quarantine", actor, reason)

    def confirm(self, rater: str, *, actor: str, reason: str) -> RaterLogEntry:
        """Say that a quarantine is right; it then stands as before. Raises RaterConflict."""
        return self._append(rater, "confirm", actor, reason)

    def lift(self, rater: str, *, actor: str, reason: str) -> RaterLogEntry:
        """End a quarantine: what the rater said meanwhile counts in the next round. Raises RaterConflict.

        No round quarantines it again by itself; an operator can.
        """
        return self._append(rater, "lift", actor, reason)

    def states(self) -> dict[str, RaterLogEntry]:
        """Return the last entry of every rater about whom something was ever done, by rater."""
        log = tables.rater_log
        last = sa.select(sa.func.max(log.c.sequence)).group_by(log.c.rater)
        query = sa.select(log).where(log.c.sequence.in_(last)).order_by(log.c.sequence)
        with self._reader.connect() as connection:
            return {row.rater: _entry(row) for row in connection.execute(query)}

    def quarantined(self) -> list[str]:
        """Return the raters in quarantine, confirmed or not, sorted."""
        return sorted(rater for rater, last in self.states().items() if last.state != "lifted")

    def state(self, rater: str) -> State | None:
        """Return the state of one rater; None if nothing was ever done about it."""
        with self._reader.connect() as connection:
            return _state(connection, rater)

    def log(self, rater: str | None = None, limit: int = 100) -> list[RaterLogEntry]:
        """Return the latest entries, of one rater if it is named, oldest of them first."""
        log = tables.rater_log
        query = sa.select(log).order_by(log.c.sequence.desc()).limit(limit)
        if rater is not None:
            query = query.where(log.c.rater == rater)
        with self._reader.connect() as connection:
            return [_entry(row) for row in connection.execute(query)][::-1]

    def _append(self, rater: str, action: Action, actor: str, reason: str) -> RaterLogEntry:
        """Append on the state as it is; look again if another process appended in between."""
        for attempt in range(_APPEND_ATTEMPTS):
            try:
                with self._engine.begin() as connection:
                    return self._append_once(connection, rater, action, actor, reason)
            except sa.exc.IntegrityError:
                if attempt == _APPEND_ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _append_once(
        self, connection: Connection, rater: str, action: Action, actor: str, reason: str
    ) -> RaterLogEntry:
        log, events = tables.rater_log, tables.events
        # First: whoever appends after this makes the insert fail, whoever did before is seen in the state.
        last = connection.execute(sa.select(sa.func.max(log.c.sequence))).scalar_one() or 0
        state = _state(connection, rater)
        known = sa.select(events.c.event_id).where(events.c.rater == rater).limit(1)
        if state is None and connection.execute(known).first() is None:
            raise UnknownRater(rater)
        if state not in _FROM[action]:
            raise RaterConflict(f"{rater} is {state or 'not in quarantine'}: it can't be {_AFTER[action]}")
        entry = RaterLogEntry(last + 1, self._clock(), rater, action, actor, reason)
        connection.execute(sa.insert(log), asdict(entry))
        return entry

    # -- gold questions

    def add_gold(self, event_id: str, *, actor: str, reason: str) -> Gold:
        """Say that a stored event's verdict is right: others are measured by it; again, it changes nothing.

        Raises UnsuitableGold for a demonstration, and for an event that is unknown or never counted.
        """
        events, table = tables.events, tables.gold
        with self._engine.begin() as connection:
            row = connection.execute(sa.select(events).where(events.c.event_id == event_id)).one_or_none()
            if row is None:
                raise UnsuitableGold(f"no event {event_id} is stored")
            if row.type == "demonstration" or row.status not in ("stored", "superseded"):
                raise UnsuitableGold(f"event {event_id} ({row.type}, {row.status}) is no verdict that counts")
            known = sa.select(table).where(table.c.event_id == event_id)
            if connection.execute(known).one_or_none() is None:
                values = {"event_id": event_id, "at": self._clock(), "actor": actor, "reason": reason}
                connection.execute(sa.insert(table), values)
            found = connection.execute(known).one()
            return Gold(event_of(row), found.at, found.actor, found.reason)

    def remove_gold(self, event_id: str) -> bool:
        """Measure nobody by this event any more; returns whether it was a gold question."""
        table = tables.gold
        with self._engine.begin() as connection:
            return bool(connection.execute(sa.delete(table).where(table.c.event_id == event_id)).rowcount)

    def gold(self) -> list[Gold]:
        """List the gold questions, oldest first."""
        events, table = tables.events, tables.gold
        query = (
            sa.select(events, table.c.at.label("gold_at"), table.c.actor, table.c.reason.label("why"))
            .join(table, table.c.event_id == events.c.event_id)
            .order_by(table.c.at, table.c.event_id)
        )
        with self._reader.connect() as connection:
            return [Gold(event_of(row), row.gold_at, row.actor, row.why) for row in connection.execute(query)]

    # -- votes

    def votes(self, cutoff: int, limit: int) -> list[Vote]:
        """Return the latest `limit` rankings, thumbs and ratings that count at position `cutoff`, in order.

        The same numbers give the same votes for ever, as a slice does.
        """
        columns = tables.events.c
        counts = sa.or_(columns.superseded_position.is_(None), columns.superseded_position > cutoff)
        query = (
            sa.select(tables.events)
            .where(columns.position <= cutoff, counts, columns.type != "demonstration")
            .order_by(columns.position.desc())
            .limit(limit)
        )
        with self._reader.connect() as connection:
            return _votes(connection, [event_of(row) for row in connection.execute(query)][::-1])

    def votes_of_events(self, event_ids: Collection[str]) -> list[Vote]:
        """Return the votes of these events, whatever became of them since."""
        columns = tables.events.c
        wanted = sorted(event_ids)
        with self._reader.connect() as connection:
            events = [
                event_of(row)
                for start in range(0, len(wanted), _CHUNK)
                for row in connection.execute(
                    sa.select(tables.events).where(columns.event_id.in_(wanted[start : start + _CHUNK]))
                )
            ]
            return _votes(connection, sorted(events, key=lambda event: event.event_id))


def _entry(row: sa.Row[Any]) -> RaterLogEntry:
    return RaterLogEntry(**row._mapping)


def _state(connection: Connection, rater: str) -> State | None:
    log = tables.rater_log
    query = sa.select(log.c.action).where(log.c.rater == rater).order_by(log.c.sequence.desc()).limit(1)
    action = connection.execute(query).scalar_one_or_none()
    return None if action is None else _AFTER[action]


def _votes(connection: Connection, events: Sequence[Event]) -> list[Vote]:
    judging = [event for event in events if isinstance(event.feedback, Ranking | Thumb | Rating)]
    ids = {references(event.feedback)[0].completion_id for event in judging}
    return votes_of(judging, _prompts(connection, ids))


def _prompts(connection: Connection, ids: Iterable[str]) -> dict[tuple[str, int], str]:
    """Return the prompt's hash of each choice of these completions."""
    completions, choices = tables.completions, tables.choices
    joined = completions.join(
        choices, sa.and_(choices.c.completion_id == completions.c.id, choices.c.part == completions.c.part)
    )
    query = sa.select(completions.c.id, choices.c["index"], completions.c.prompt_hash).select_from(joined)
    found = {}
    wanted = sorted(ids)
    for start in range(0, len(wanted), _CHUNK):
        chunk = wanted[start : start + _CHUNK]
        for id, index, prompt in connection.execute(query.where(completions.c.id.in_(chunk))):
            found[id, index] = prompt
    return found
