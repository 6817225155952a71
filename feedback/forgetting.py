"""Forgetting a rater or a completion: the tombstone first, then all in the database, in one transaction.

Owns the rows that go, the record that stays, and which exported files held what went. The queue is cleaned by
`queue`, files of rounds and the database's own file by the application; this module remembers what is left to
do. It knows an id in clear only until what it names is erased; afterwards its digest (see `tombstones`).
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from feedback import tables
from feedback.records import Completion
from feedback.tombstones import (
    Kind,
    Name,
    Tombstone,
    Tombstones,
    completion_names,
    completion_of,
    digest,
    user_of,
)

Subject = Literal["rater", "completion"]
Step = Literal["queue", "files", "database"]

_CHUNK = 500
_UNDER_WAY = 0.0


class NotARater(ValueError):  # noqa: N818
    """An id that no rater can have; the message says how one looks."""


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Who or what was forgotten, by whom, when (Unix seconds), and how far it is.

    `erasure` numbers erasures in the order in which the database committed them; None before. `counts` says
    how many records went, or were kept out. `left` are the steps that are still to be done.
    """

    id: int
    kind: Subject
    digest: str
    actor: str
    at: float
    erasure: int | None
    counts: Mapping[str, int]
    left: tuple[Step, ...]

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.erasure is not None and not self.left


@dataclass(frozen=True, slots=True)
class Export:
    """A file that an operator had written, with what stood at positions `(cursor, cutoff]`."""

    path: str
    what: str
    at: float
    cursor: int
    cutoff: int


class Forgettings:
    """What was forgotten in one database; safe to share between threads. `clock` gives Unix seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)
        self._clock = clock

    def begin(self, kind: Subject, id: str, actor: str) -> int:
        """Write the tombstone and return the forgetting's id.

        From here on nothing of a completion, and nothing that a rater made up to this moment, gets into the
        store any more, and a process that ends before `erase` has begun leaves that to the next.
        Raises NotARater.
        """
        if kind == "rater" and "/" not in id:
            raise NotARater(f"{id!r} is not a rater's id: that is <key id>/<name>, as in the stored feedback")
        names: list[Name] = [(kind, id)]
        if kind == "rater" and (own := completion_of(id)) is not None:
            names.append(("completion", own))
        with self._engine.begin() as connection:
            take_turn(connection)
            now = self._clock()
            row = {"kind": kind, "digest": digest((kind, id)), "subject": id, "actor": actor, "at": now}
            key = connection.execute(sa.insert(tables.forgettings).values(**row)).inserted_primary_key
            assert key is not None
            _bury(connection, int(key[0]), now, [(name, None) for name in names])
            return int(key[0])

    def erase(self, forgetting_id: int) -> None:
        """Delete all of the forgetting's subject from the tables in one transaction; again, it does nothing.

        With a completion go all events that judge it, with a rater who is an end user also that user's
        completions, with any of them the cases that were made from it and what these became as feedback.
        Those events and completions get tombstones of their own.
        """
        table = tables.forgettings
        with self._engine.begin() as connection:
            take_turn(connection)
            row = connection.execute(sa.select(table).where(table.c.id == forgetting_id)).one()
            if row.erasure is not None:
                return
            completions, events, cases = _found(connection, row.kind, row.subject, row.at)
            counts = {
                "completions": len(completions),
                "events": len(events),
                "cases": len(cases),
                "dead_letters": _delete_letters(connection, row.kind, row.subject),
            }
            _delete(connection, completions, events)
            _delete_cases(connection, cases)
            if row.kind == "rater":
                log = tables.rater_log
                unnamed = sa.update(log).where(log.c.rater == row.subject)
                connection.execute(unnamed.values(rater=f"sha256:{row.digest}"))
            # What a case became as feedback bears its id, and may still be in the queue.
            buried: list[tuple[Name, int | None]] = [
                (("completion", id), None) for id in sorted({*completions, *cases})
            ]
            buried += [(("event", id), position) for id, position in events.items()]
            _bury(connection, row.id, row.at, buried)
            number = connection.execute(
                sa.select(sa.func.coalesce(sa.func.max(table.c.erasure), 0))
            ).scalar_one()
            change = {"subject": None, "erasure": number + 1, "counts": counts}
            connection.execute(sa.update(table).where(table.c.id == row.id).values(**change))

    def get(self, forgetting_id: int) -> Forgetting:
        """Return one forgetting; raises KeyError."""
        table = tables.forgettings
        with self._reader.connect() as connection:
            row = connection.execute(sa.select(table).where(table.c.id == forgetting_id)).one_or_none()
        if row is None:
            raise KeyError(forgetting_id)
        return _forgetting(row)

    def list(self, limit: int = 100) -> list[Forgetting]:
        """List the latest forgettings, newest first."""
        query = sa.select(tables.forgettings).order_by(tables.forgettings.c.id.desc()).limit(limit)
        with self._reader.connect() as connection:
            return [_forgetting(row) for row in connection.execute(query)]

    def unfinished(self) -> Sequence[Forgetting]:
        """Return the forgettings of which something is left to do, oldest first."""
        table = tables.forgettings
        steps = [sa.func.coalesce(table.c[f"{step}_at"], _UNDER_WAY) == _UNDER_WAY for step in _STEPS]
        left = sa.or_(table.c.erasure.is_(None), *steps)
        with self._reader.connect() as connection:
            rows = connection.execute(sa.select(table).where(left).order_by(table.c.id))
            return [_forgetting(row) for row in rows]

    def step_begins(self, step: Step, forgetting_ids: Sequence[int]) -> None:
        """Note that a step is under way, until `step_done`; until then it is left to do."""
        self._set(step, forgetting_ids, _UNDER_WAY)

    def step_done(self, step: Step, forgetting_ids: Sequence[int]) -> None:
        """Note that a step is done, unless something gave reason to do it again since it began."""
        self._set(step, forgetting_ids, self._clock(), before=_UNDER_WAY)

    def _set(
        self, step: Step, forgetting_ids: Sequence[int], value: float, before: float | None = None
    ) -> None:
        table, column = tables.forgettings, tables.forgettings.c[f"{step}_at"]
        change = sa.update(table).where(table.c.id.in_(list(forgetting_ids))).values({column: value})
        with self._engine.begin() as connection:
            connection.execute(change if before is None else change.where(column == before))

    def is_forgotten(self, kind: Kind, id: str) -> bool:
        """Whether there is a tombstone of this name."""
        with self._reader.connect() as connection:
            return bool(Tombstones(connection).among([(kind, id)]))

    def among(self, names: Collection[Name]) -> set[Name]:
        """Return those of the names that have a tombstone."""
        with self._reader.connect() as connection:
            return set(Tombstones(connection).among(names))

    def traces(self, forgetting_id: int) -> Sequence[tuple[int, int | None]]:
        """Return the positions of the events that were erased, each with the number of the erasure."""
        erasure = self.get(forgetting_id).erasure
        return [(position, erasure) for position in self.positions(forgetting_id)]

    def left_of(self, completions: Sequence[Completion]) -> Sequence[Completion]:
        """Return the completions that are not forgotten."""
        with self._reader.connect() as connection:
            return Tombstones(connection).without(
                completions, lambda one: (completion_names(one), one.created_at)
            )

    def positions(self, forgetting_id: int) -> Sequence[int]:
        """Return the positions of the events that were erased, in order."""
        column = tables.tombstones.c.position
        query = sa.select(column).where(
            tables.tombstones.c.forgetting_id == forgetting_id, column.is_not(None)
        )
        with self._reader.connect() as connection:
            return list(connection.execute(query.order_by(column)).scalars())

    def traces_of(self, rater: str) -> Sequence[tuple[int, int | None]]:
        """Return the positions of a rater's events in order, each with the number of its erasure.

        That is None for an event that is there. With the events of a forgotten rater stand all that went too.
        """
        events, graves, all_ = tables.events, tables.tombstones, tables.forgettings
        here = sa.select(events.c.position).where(events.c.rater == rater, events.c.position.is_not(None))
        gone = (
            sa.select(graves.c.position, all_.c.erasure)
            .join(all_, all_.c.id == graves.c.forgetting_id)
            .where(all_.c.digest == digest(("rater", rater)), graves.c.position.is_not(None))
        )
        with self._reader.connect() as connection:
            found: list[tuple[int, int | None]] = [(one, None) for one in connection.execute(here).scalars()]
            found += [(row.position, row.erasure) for row in connection.execute(gone)]
            return sorted(found, key=lambda trace: trace[0])

    def took(self, forgetting_id: int) -> Callable[[str], bool]:
        """Return what tells the ids of the events that a forgetting erased from others."""
        return self._named(tables.tombstones.c.forgetting_id == forgetting_id)

    def gave(self, rater: str) -> Callable[[str], bool]:
        """Return what tells the ids of a rater's events, forgotten ones and those that went with them too."""
        events, graves, all_ = tables.events, tables.tombstones, tables.forgettings
        forgotten = sa.select(all_.c.id).where(all_.c.digest == digest(("rater", rater)))
        with self._reader.connect() as connection:
            here = set(
                connection.execute(sa.select(events.c.event_id).where(events.c.rater == rater)).scalars()
            )
        gone = self._named(graves.c.forgetting_id.in_(forgotten))
        return lambda event_id: event_id in here or gone(event_id)

    def _named(self, which: sa.ColumnElement[bool]) -> Callable[[str], bool]:
        graves = tables.tombstones.c
        query = sa.select(graves.digest).where(graves.kind == "event", which)
        with self._reader.connect() as connection:
            digests = set(connection.execute(query).scalars())
        return lambda event_id: digest(("event", event_id)) in digests

    def last_erasure(self) -> int:
        """Return the number of the latest erasure; 0 if there was none."""
        query = sa.select(sa.func.coalesce(sa.func.max(tables.forgettings.c.erasure), 0))
        with self._reader.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def erased_since(self, erasure: int, cutoff: int) -> bool:
        """Whether a later erasure than this took an event at a position up to `cutoff`."""
        graves, all_ = tables.tombstones, tables.forgettings
        query = (
            sa.select(graves.c.position)
            .join(all_, all_.c.id == graves.c.forgetting_id)
            .where(all_.c.erasure > erasure, graves.c.position <= cutoff)
            .limit(1)
        )
        with self._reader.connect() as connection:
            return connection.execute(query).first() is not None

    def note_export(self, path: str, what: str, cursor: int, cutoff: int) -> None:
        """Remember that a file now holds what stood at these positions."""
        row = {"path": path, "what": what, "at": self._clock(), "cursor": cursor, "cutoff": cutoff}
        with self._engine.begin() as connection:
            connection.execute(sa.insert(tables.exports).values(**row))

    def exports(self, forgetting_id: int) -> Sequence[Export]:
        """Return the files that were exported while an erased event stood within their positions."""
        exports, graves, all_ = tables.exports, tables.tombstones, tables.forgettings
        held = sa.exists().where(
            graves.c.forgetting_id == forgetting_id,
            graves.c.position > exports.c.cursor,
            graves.c.position <= exports.c.cutoff,
        )
        moment = sa.select(all_.c.at).where(all_.c.id == forgetting_id).scalar_subquery()
        query = sa.select(exports).where(held, exports.c.at <= moment).order_by(exports.c.id)
        with self._reader.connect() as connection:
            return [
                Export(row.path, row.what, row.at, row.cursor, row.cutoff)
                for row in connection.execute(query)
            ]


_STEPS: tuple[Step, ...] = ("queue", "files", "database")


def _forgetting(row: sa.Row[Any]) -> Forgetting:
    return Forgetting(
        id=row.id,
        kind=row.kind,
        digest=row.digest,
        actor=row.actor,
        at=row.at,
        erasure=row.erasure,
        counts=(row.counts or {}) | {"in_the_queue": row.late},
        left=tuple(step for step in _STEPS if not row._mapping[f"{step}_at"]),
    )


def take_turn(connection: Connection) -> None:
    """Take turns with ingest transactions, so that none of them misses a tombstone."""
    connection.execute(
        sa.select(tables.counter.c.value).where(tables.counter.c.name == "position").with_for_update()
    )


def _bury(connection: Connection, id: int, at: float, names: Sequence[tuple[Name, int | None]]) -> None:
    """Write tombstones; a name that has one already gets the later moment, and keeps its position."""
    table = tables.tombstones
    known = Tombstones(connection).among(name for name, _ in names)
    if known:
        same = sa.and_(table.c.kind == sa.bindparam("of"), table.c.digest == sa.bindparam("named"))
        rows = [{"of": name[0], "named": digest(name)} for name in known]
        connection.execute(sa.update(table).where(same).values(at=at, forgetting_id=id), rows)
    fresh = {name: position for name, position in names if name not in known}
    if fresh:
        common = {"forgetting_id": id, "at": at}
        graves = [
            {"kind": name[0], "digest": digest(name), "position": position, **common}
            for name, position in fresh.items()
        ]
        connection.execute(sa.insert(table), graves)


def bury_late(connection: Connection, kept_out: Mapping[Name, Tombstone]) -> None:
    """Give what was kept out by another name a tombstone of its own; what waits for such a completion goes.

    So votes on it are kept out, too, and the events' idempotency keys are found.
    """
    known = Tombstones(connection).among(kept_out)
    by_tombstone: dict[Tombstone, list[Name]] = {}
    for name, by in kept_out.items():
        if name not in known:
            by_tombstone.setdefault(by, []).append(name)
    for by, names in by_tombstone.items():
        waiting = _judging(connection, [id for kind, id in names if kind == "completion"])
        _delete(connection, (), waiting)
        buried: list[tuple[Name, int | None]] = [(name, None) for name in names]
        buried += [(("event", id), position) for id, position in waiting.items()]
        _bury(connection, by.forgetting_id, by.at, buried)


def _judging(connection: Connection, completion_ids: Collection[str]) -> dict[str, int | None]:
    """Return the ids of the events that judge one of the completions, with their positions."""
    events, targets = tables.events.c, tables.event_targets.c
    found: dict[str, int | None] = {}
    for chunk in _chunks(completion_ids):
        query = (
            sa.select(events.event_id, events.position)
            .join(tables.event_targets, targets.event_id == events.event_id)
            .where(targets.completion_id.in_(chunk))
        )
        found |= {row.event_id: row.position for row in connection.execute(query)}
    return found


def _found(
    connection: Connection, kind: Subject, subject: str, at: float
) -> tuple[list[str], dict[str, int | None], list[str]]:
    """Return the ids of the completions that go, of the events with their positions, and of the cases."""
    completions, events = tables.completions.c, tables.events.c
    ids, found = {subject} if kind == "completion" else set(), {}
    if kind == "rater":
        own = sa.select(events.event_id, events.position).where(
            events.rater == subject, events.received_at <= at
        )
        found = {row.event_id: row.position for row in connection.execute(own)}
        if (user := user_of(subject)) is not None:
            asked = sa.select(completions.id).where(
                completions.key_id == user[0], completions.user == user[1], completions.created_at <= at
            )
            ids |= set(connection.execute(asked).scalars())
        elif (one := completion_of(subject)) is not None:
            ids.add(one)
    found |= _judging(connection, ids)
    cases = _cases(connection, [(kind, subject)], ids, found)
    ids |= cases
    found |= _judging(connection, cases)
    there: set[str] = set()
    for chunk in _chunks(ids):
        there |= set(connection.execute(sa.select(completions.id).where(completions.id.in_(chunk))).scalars())
    return sorted(there), found, sorted(cases)


def _cases(
    connection: Connection, names: Sequence[Name], completions: Collection[str], events: Collection[str]
) -> set[str]:
    """Return the ids of the cases that were made from any of these, or from such a case's own answers."""
    cases, origins = tables.cases, tables.case_origins.c
    # A case's own answers are recorded under its id.
    found = {
        id
        for chunk in _chunks(completions)
        for id in connection.execute(sa.select(cases.c.id).where(cases.c.id.in_(chunk))).scalars()
    }
    left: set[Name] = {*names, *(("completion", id) for id in completions), *(("event", id) for id in events)}
    while left:
        new: set[str] = set()
        for kind in ("rater", "completion", "event"):
            for chunk in _chunks([id for of, id in left if of == kind]):
                made = sa.select(origins.case_id).where(origins.kind == kind, origins.name.in_(chunk))
                new |= set(connection.execute(made).scalars())
        new -= found
        found |= new
        left = {("completion", id) for id in new}
        left |= {("event", id) for id in _judging(connection, new)}
    return found


def _delete_cases(connection: Connection, ids: Collection[str]) -> None:
    for chunk in _chunks(ids):
        for table, column in (
            (tables.case_results, tables.case_results.c.case_id),
            (tables.case_origins, tables.case_origins.c.case_id),
            (tables.cases, tables.cases.c.id),
        ):
            connection.execute(sa.delete(table).where(column.in_(chunk)))


def _delete(connection: Connection, completions: Collection[str], events: Collection[str]) -> None:
    for chunk in _chunks(events):
        for table in (tables.gold, tables.event_targets, tables.events):
            connection.execute(sa.delete(table).where(table.c.event_id.in_(chunk)))
    delete_completions(connection, completions)


def delete_completions(connection: Connection, ids: Collection[str]) -> None:
    """Delete completions with their choices and what a reward model thought of these; no events."""
    for chunk in _chunks(ids):
        for table, column in (
            (tables.response_scores, tables.response_scores.c.completion_id),
            (tables.choices, tables.choices.c.completion_id),
            (tables.completions, tables.completions.c.id),
        ):
            connection.execute(sa.delete(table).where(column.in_(chunk)))


def _delete_letters(connection: Connection, kind: Subject, subject: str) -> int:
    """Delete the dead letters that name the subject: they may be anything, so it is looked for as text.

    Of one that was given up only the names are left.
    """
    wanted = [[subject]]
    if kind == "rater" and (user := user_of(subject)) is not None:
        wanted.append(list(user))
    elif kind == "rater" and (own := completion_of(subject)) is not None:
        wanted.append([own])
    table = tables.dead_letters
    query = sa.select(table.c.digest, table.c.data, table.c.rater).execution_options(yield_per=_CHUNK)
    named = [
        row.digest
        for row in connection.execute(query)
        if (kind == "rater" and row.rater == subject)
        or any(all(_stands_in(part, row.data) for part in parts) for parts in wanted)
    ]
    for chunk in _chunks(named):
        connection.execute(sa.delete(table).where(table.c.digest.in_(chunk)))
    return len(named)


def _stands_in(text: str, data: bytes) -> bool:
    """Whether `data` holds the text as a JSON string."""
    forms = (json.dumps(text), json.dumps(text, ensure_ascii=False))
    return any(form.encode("utf-8", "surrogatepass") in data for form in forms)


def _chunks(ids: Collection[str]) -> Iterator[list[str]]:
    ordered = sorted(ids)
    for start in range(0, len(ordered), _CHUNK):
        yield ordered[start : start + _CHUNK]
