"""One ingest transaction: which completions and events are new, and what becomes of the events.

It runs inside a transaction that `store` opens and commits. Idempotent: what is there changes nothing.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import Connection

from feedback import tables
from feedback.entries import Letter
from feedback.events import Event, Reference, references
from feedback.forgetting import bury_late
from feedback.records import Completion
from feedback.resolution import Outcome, Part, Status, resolve
from feedback.rows import choice_rows, completion_row, event_of, event_row
from feedback.tombstones import Tombstones, completion_names, event_names, raw_names, raw_time

# Bound parameters of one statement; SQLite takes 32,766, Postgres 65,535.
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class IngestCounts:
    """What one batch did. `resolved` of the events stored or rejected had been waiting before.

    `forgotten` are records that came after their rater or completion was forgotten, and left no trace.
    """

    completions: int = 0
    stored: int = 0
    waiting: int = 0
    rejected: int = 0
    superseded: int = 0
    resolved: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    forgotten: int = 0

    def __add__(self, other: "IngestCounts") -> "IngestCounts":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return IngestCounts(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclass(slots=True)
class _Candidate:
    """An event to decide on. `before` is its status in the table; `expired` has waited long enough."""

    event: Event
    before: Status | None = None
    expired: bool = False
    refs: list[Reference] = field(init=False)

    def __post_init__(self) -> None:
        self.refs = references(self.event.feedback)


@dataclass(slots=True)
class _Holder:
    """The current event of a rater on a target."""

    event_id: str
    received_at: float


class Intake:
    """Takes one batch into the database over an open transaction. `now` is in Unix seconds.

    `cleaning` says that the batch comes from a stream that is deleted afterwards.
    """

    def __init__(
        self, connection: Connection, *, now: float, waiting_hours: float, cleaning: bool = False
    ) -> None:
        self._connection = connection
        self._cleaning = cleaning
        self._now = now
        self._expired_before = now - waiting_hours * 3600
        self._position = 0

    def take(
        self, completions: Sequence[Completion], events: Sequence[Event], letters: Sequence[Letter]
    ) -> IngestCounts:
        """Store what is new, in order, and settle the events that waited for it."""
        self._lock()
        came = len(completions) + len(events) + len(letters)
        completions, events, letters = self._without_forgotten(completions, events, letters)
        fresh = self._add_completions(completions)
        new = self._unknown(events)
        due = self._due({completion.id for completion in fresh})
        counts = self._settle(due + [_Candidate(event) for event in new])
        self._unbury({event.event_id for event in new})
        self._unlock()
        return counts + IngestCounts(
            completions=len(fresh),
            duplicates=len(completions) - len(fresh) + len(events) - len(new),
            dead_letters=self._bury(letters),
            forgotten=came - len(completions) - len(events) - len(letters),
        )

    def _lock(self) -> None:
        """Make ingest transactions take turns (SQLite's BEGIN IMMEDIATE already has)."""
        row = sa.select(tables.counter.c.value).where(tables.counter.c.name == "position").with_for_update()
        self._position = self._connection.execute(row).scalar_one()

    def _unlock(self) -> None:
        row = sa.update(tables.counter).where(tables.counter.c.name == "position")
        self._connection.execute(row.values(value=self._position))

    def _without_forgotten(
        self, completions: Sequence[Completion], events: Sequence[Event], letters: Sequence[Letter]
    ) -> tuple[list[Completion], list[Event], list[Letter]]:
        tombstones = Tombstones(self._connection)
        if not tombstones.any:
            return list(completions), list(events), list(letters)
        # One after the other: a completion that is kept out takes its events with it.
        completions = tombstones.without(completions, lambda one: (completion_names(one), one.created_at))
        bury_late(self._connection, tombstones.kept_out)
        events = tombstones.without(events, lambda one: (event_names(one), one.received_at))
        letters = tombstones.without(letters, lambda one: (raw_names(one.data), raw_time(one.data)))
        bury_late(self._connection, tombstones.kept_out)
        if tombstones.met:
            table = tables.forgettings
            late = sa.update(table).where(table.c.id == sa.bindparam("forgetting"))
            late = late.values(late=table.c.late + sa.bindparam("count"))
            if not self._cleaning:
                # It passed through the queue, whose files are to be cleaned once more.
                late = late.values(queue_at=None)
            rows = [{"forgetting": id, "count": count} for id, count in sorted(tombstones.met.items())]
            self._connection.execute(late, rows)
        return completions, events, letters

    def _add_completions(self, completions: Sequence[Completion]) -> list[Completion]:
        ids = {completion.id for completion in completions}
        table = tables.completions
        seen = {
            (row.id, row.part) for row in self._select(sa.select(table.c.id, table.c.part), table.c.id, ids)
        }
        fresh = []
        for completion in completions:
            if (completion.id, completion.part) not in seen:
                seen.add((completion.id, completion.part))
                fresh.append(completion)
        self._insert(table, [completion_row(completion) for completion in fresh])
        self._insert(tables.choices, [row for completion in fresh for row in choice_rows(completion)])
        return fresh

    def _unknown(self, events: Sequence[Event]) -> list[Event]:
        column = tables.events.c.event_id
        seen = {row.event_id for row in self._select(sa.select(column), column, {e.event_id for e in events})}
        new = []
        for event in events:
            if event.event_id not in seen:
                seen.add(event.event_id)
                new.append(event)
        return new

    def _due(self, completion_ids: set[str]) -> list[_Candidate]:
        """Find waiting events of which a completion has just come, or whose time is up; oldest first.

        A completion that comes after their time is up (it lay in a spool, or among the dead letters) lets the
        events on it count after all, so rejected ones are decided on anew.
        """
        events, targets = tables.events, tables.event_targets
        joined = sa.select(events).join(targets, targets.c.event_id == events.c.event_id)
        undecided = events.c.status.in_(("waiting", "rejected"))
        rows = list(self._select(joined.where(undecided), targets.c.completion_id, completion_ids))
        rows += self._connection.execute(
            sa.select(events).where(
                sa.text("events.status = 'waiting'"), events.c.ingested_at < self._expired_before
            )
        )
        unique = {row.event_id: row for row in rows}
        ordered = sorted(unique.values(), key=lambda row: (row.ingested_at, row.received_at, row.event_id))
        return [
            _Candidate(
                event_of(row),
                before=row.status,
                expired=row.status == "rejected" or row.ingested_at < self._expired_before,
            )
            for row in ordered
        ]

    def _settle(self, candidates: Sequence[_Candidate]) -> IngestCounts:
        """Decide every candidate in order and write the decisions."""
        rows = self._decided(candidates)
        superseded = self._supersede([row for row in rows if row["status"] == "stored"])
        # Earlier holders first: the index of current events allows one at a time.
        self._update(superseded)
        new = [row for row, c in zip(rows, candidates, strict=True) if c.before is None]
        settled = [
            {name: row[name] for name in ("event_id", "status", "reason", *_SUPERSEDING)}
            for row, c in zip(rows, candidates, strict=True)
            if c.before not in (None, row["status"])
        ]
        self._insert(tables.events, new)
        self._insert(tables.event_targets, _target_rows(c for c in candidates if c.before is None))
        self._update(settled)
        status = [row["status"] for row in (*new, *settled)]
        return IngestCounts(
            stored=status.count("stored") + status.count("superseded"),
            waiting=status.count("waiting"),
            rejected=status.count("rejected"),
            superseded=len(superseded) + status.count("superseded"),
            resolved=len(settled),
        )

    def _decided(self, candidates: Sequence[_Candidate]) -> list[dict[str, Any]]:
        """Make the rows of the candidates, with what was decided of each."""
        there = self._choices({ref.completion_id for candidate in candidates for ref in candidate.refs})
        # Most speak of one choice, and it is there. Of the rest more must be known.
        others = [c for c in candidates if len(c.refs) > 1 or not there.issuperset(c.refs)]
        known = self._parts({ref.completion_id for candidate in others for ref in candidate.refs})
        outcomes = {id(candidate): resolve(candidate.refs, known) for candidate in others}
        rows = []
        for candidate in candidates:
            outcome = outcomes.get(id(candidate), _STORED)
            status = "rejected" if candidate.expired and outcome.status == "waiting" else outcome.status
            row = event_row(candidate.event)
            row.update(_UNDECIDED, ingested_at=self._now, status=status)
            if status == "rejected":
                row["reason"] = outcome.reason
            rows.append(row)
        return rows

    def _supersede(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Give each row its position; where a rater spoke twice of a target, the later received one counts.

        Changes `rows` and returns the changes to events that were current before this batch.
        """
        holders = self._holders({(row["target"], row["rater"], row["type"]) for row in rows})
        in_batch = {row["event_id"]: row for row in rows}
        changes = []
        for row in rows:
            self._position += 1
            row["position"] = self._position
            holder = holders.get((row["target"], row["rater"], row["type"]))
            if holder is not None and holder.received_at > row["received_at"]:
                row.update(_superseded(holder.event_id, self._position))
                continue
            holders[row["target"], row["rater"], row["type"]] = _Holder(row["event_id"], row["received_at"])
            if holder is None:
                continue
            change = _superseded(row["event_id"], self._position)
            if holder.event_id in in_batch:
                in_batch[holder.event_id].update(change)
            else:
                changes.append({"event_id": holder.event_id} | change)
        return changes

    def _holders(self, judged: set[tuple[str, str, str]]) -> dict[tuple[str, str, str], _Holder]:
        """Find the current events of the given (target, rater, type)."""
        columns = tables.events.c
        key = (columns.target, columns.rater, columns.type)
        # In clear, not as a parameter: SQLite must see that the index of current events is the one to use.
        current: sa.Select[Any] = sa.select(*key, columns.event_id, columns.received_at).where(
            sa.text("events.status = 'stored'")
        )
        if self._connection.dialect.name == "sqlite":
            # It would scan that index for a list of tuples, and look each up for a list of rows.
            wanted = sa.func.json_each(json.dumps(sorted(judged))).table_valued("value", name="wanted")
            fields = [sa.func.json_extract(wanted.c.value, f"$[{i}]") for i in range(len(key))]
            matches = sa.and_(*(column == field for column, field in zip(key, fields, strict=True)))
            rows = iter(self._connection.execute(current.select_from(wanted.join(tables.events, matches))))
        else:
            rows = self._select(current, sa.tuple_(*key), judged)
        return {(row.target, row.rater, row.type): _Holder(row.event_id, row.received_at) for row in rows}

    def _choices(self, completion_ids: set[str]) -> set[tuple[str, int]]:
        """Find the choices of completions. The index tells all: their rows, long with texts, are not read."""
        columns = tables.choices.c
        query = sa.select(columns.completion_id, columns.index)
        # Plain tuples, to which references are equal: there may be many more than are asked for.
        return set(map(tuple, self._select(query, columns.completion_id, completion_ids)))

    def _parts(self, completion_ids: set[str]) -> dict[str, list[Part]]:
        columns, choices = tables.completions.c, tables.choices.c
        query = sa.select(columns.id, columns.part, columns.parts, columns.prompt_hash)
        indexes = sa.select(choices.completion_id, choices.part, choices.index)
        found: dict[tuple[str, int], set[int]] = {}
        for id, part, index in map(tuple, self._select(indexes, choices.completion_id, completion_ids)):
            found.setdefault((id, part), set()).add(index)
        known: dict[str, list[Part]] = {}
        for id, part, parts, prompt_hash in map(tuple, self._select(query, columns.id, completion_ids)):
            indexes_of = frozenset(found.get((id, part), ()))
            known.setdefault(id, []).append(Part(part, parts, prompt_hash, indexes_of))
        return known

    def _bury(self, letters: Sequence[Letter]) -> int:
        """Keep letters that are new; one whose event is stored was replayed, and comes a second time."""
        table, event_ids = tables.dead_letters, tables.events.c.event_id
        rows = {_digest(letter): dataclasses.asdict(letter) for letter in letters}
        seen = {row.digest for row in self._select(sa.select(table.c.digest), table.c.digest, set(rows))}
        named = {letter.event_id for letter in letters if letter.event_id is not None}
        stored = {row.event_id for row in self._select(sa.select(event_ids), event_ids, named)}
        fresh = [
            row | {"digest": digest, "at": self._now}
            for digest, row in rows.items()
            if digest not in seen and row["event_id"] not in stored
        ]
        self._insert(table, fresh)
        return len(fresh)

    def _unbury(self, event_ids: set[str]) -> None:
        """Delete the letters of events that came again as they should be: an event is in one place only."""
        column, ordered = tables.dead_letters.c.event_id, sorted(event_ids)
        if self._connection.execute(sa.select(column).limit(1)).first() is None:
            return  # as most often
        for start in range(0, len(ordered), _CHUNK):
            chunk = ordered[start : start + _CHUNK]
            self._connection.execute(sa.delete(tables.dead_letters).where(column.in_(chunk)))

    def _select(
        self, query: sa.Select[Any], column: sa.ColumnElement[Any], values: set[Any]
    ) -> Iterator[sa.Row[Any]]:
        """Rows where `column` is one of `values`, in as many statements as it takes."""
        ordered = sorted(values)
        for start in range(0, len(ordered), _CHUNK):
            chunk = ordered[start : start + _CHUNK]
            yield from self._connection.execute(query.where(self._is_among(column, chunk))).all()

    def _is_among(self, column: sa.ColumnElement[Any], values: Sequence[Any]) -> sa.ColumnElement[bool]:
        if self._connection.dialect.name != "sqlite" or not isinstance(column.type, sa.String):
            return column.in_(values)
        # One parameter instead of hundreds, each of which SQLAlchemy and SQLite would write and read.
        listed = sa.func.json_each(json.dumps(values)).table_valued("value", name="listed")
        return column.in_(sa.select(listed.c.value))

    def _insert(self, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            self._connection.execute(sa.insert(table), list(rows))

    def _update(self, changes: Sequence[dict[str, Any]]) -> None:
        if not changes:
            return
        names = [name for name in changes[0] if name != "event_id"]
        statement = sa.update(tables.events).where(tables.events.c.event_id == sa.bindparam("changed"))
        rows = [
            {"changed": change["event_id"]} | {f"new_{n}": change[n] for n in names} for change in changes
        ]
        self._connection.execute(statement.values({n: sa.bindparam(f"new_{n}") for n in names}), rows)


_SUPERSEDING = ("position", "superseded_by", "superseded_position")
_UNDECIDED = dict.fromkeys(("reason", *_SUPERSEDING))
_STORED = Outcome("stored")


def _superseded(by: str, position: int) -> dict[str, Any]:
    return {"status": "superseded", "superseded_by": by, "superseded_position": position}


def _target_rows(candidates: Iterable[_Candidate]) -> list[dict[str, str]]:
    return [
        {"event_id": candidate.event.event_id, "completion_id": completion_id}
        for candidate in candidates
        for completion_id in {ref.completion_id: None for ref in candidate.refs}
    ]


def _digest(letter: Letter) -> str:
    framed = f"{letter.entry_id}\0{letter.kind}\0".encode("utf-8", "surrogatepass") + letter.data
    return hashlib.sha256(framed).hexdigest()


def blames_the_data(problem: Exception) -> bool:
    """Tell whether a transaction failed for what was to be stored, and not for a database that is away.

    Away is one that doesn't answer, is locked, full or not migrated. All else that storing can raise is of
    the record's making: a value that the database can't hold, an index entry beyond what Postgres takes
    (SQLSTATE 54…), or a defect of ours that only this record meets.
    """
    if isinstance(problem, exc.DBAPIError):
        too_long = str(getattr(problem.orig, "sqlstate", None) or "").startswith("54")
        return too_long or isinstance(problem, exc.DataError | exc.IntegrityError)
    if isinstance(problem, exc.StatementError):
        return not isinstance(problem.orig, OSError | MemoryError)
    return not isinstance(problem, exc.SQLAlchemyError | OSError | MemoryError)


def refusal(problem: Exception) -> str:
    """Say why a record that can be read can't be stored."""
    if isinstance(problem, exc.StatementError):
        return f"the database refused it: {problem.orig}"
    return f"it can't be stored: {type(problem).__name__}: {problem}"
