"""The memory: completions, what people said of them, and what became of what they said.

It takes entries in and answers questions about them. It never touches the queue (`ingest` does), and what a
training round makes of a slice is the round's affair. The database must be migrated.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from feedback import tables
from feedback.entries import Parsed, letter, parse
from feedback.events import Event, references
from feedback.forgetting import Forgettings
from feedback.intake import IngestCounts, Intake, blames_the_data, refusal
from feedback.queue import Entry
from feedback.rater_records import RaterRecords
from feedback.records import SHADOW, Completion
from feedback.resolution import Status
from feedback.rows import completion_of, event_of
from feedback.tombstones import Tombstones

_CHUNK = 500


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event and what became of it.

    `waiting`: the record of its completion has not come. `stored`: it counts, from `position` on.
    `superseded`: it counted until `superseded_by` came, of the same rater on the same target. `rejected`: it
    never counts, for `reason`.
    """

    event: Event
    status: Status
    reason: str | None = None
    position: int | None = None
    superseded_by: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """The events of `(cursor, cutoff]` in order of position, and all parts of each completion they judge."""

    events: list[Event]
    completions: dict[str, list[Completion]]


@dataclass(frozen=True, slots=True)
class ResponseScore:
    """What a reward model thinks of one recorded response: its score, and how far its heads disagree.

    Both are in deviations of the score over the responses that the model was fitted on.
    """

    completion_id: str
    choice: int
    part: int
    score: float
    spread: float


@dataclass(frozen=True, slots=True)
class Query:
    """A recorded prompt with its responses that raters may be asked about, scored in round `round_id`.

    `spread` is the mean over its responses; `scores` are those of the choices that were scored.
    """

    completion: Completion
    round_id: int
    spread: float
    scores: list[ResponseScore]


class Store:
    """The feedback tables of one database; safe to share between threads.

    `waiting_hours` is how long an event waits for its completion, `clock` gives Unix seconds.
    """

    def __init__(
        self, engine: Engine, waiting_hours: float = 24.0, clock: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)
        self._waiting_hours = waiting_hours
        self._clock = clock
        self.raters = RaterRecords(engine, clock)

    @property
    def forgettings(self) -> Forgettings:
        """What was forgotten in this database."""
        return Forgettings(self._engine, self._clock)

    def ingest(self, entries: Sequence[Entry], *, cleaning: bool = False) -> IngestCounts:
        """Store a batch in one transaction; once it returns, the batch is committed.

        Idempotent: a completion (by id and part) or an event (by id) that is there already changes nothing.
        What was forgotten stays out. What can't be parsed, or what the database can't hold, becomes a dead
        letter and blocks nothing else. `cleaning` says that the entries come from a stream that is being
        cleaned of what was forgotten.
        Raises sqlalchemy.exc.SQLAlchemyError when the database is away; nothing is stored then.
        """
        parsed = parse(entries)
        try:
            return self._commit(parsed, cleaning)
        except Exception as problem:
            if not blames_the_data(problem):
                raise
        # Find the one to blame by storing each by itself; the others get in.
        counts = IngestCounts()
        for entry in entries:
            counts += self._ingest_alone(entry, cleaning)
        return counts

    def completion(self, id: str) -> list[Completion]:
        """Return the recorded parts of a completion in order; [] if it is unknown."""
        with self._reader.connect() as connection:
            return _completions(connection, [id]).get(id, [])

    def event(self, event_id: str) -> StoredEvent | None:
        """Return an event and what became of it; None if it is unknown here."""
        query = sa.select(tables.events).where(tables.events.c.event_id == event_id)
        with self._reader.connect() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _stored(row)

    def events_of(self, completion_id: str) -> list[StoredEvent]:
        """List the events that judge a completion, in the order in which they were received."""
        events, targets = tables.events, tables.event_targets
        query = (
            sa.select(events)
            .join(targets, targets.c.event_id == events.c.event_id)
            .where(targets.c.completion_id == completion_id)
            .order_by(events.c.received_at, events.c.event_id)
        )
        with self._reader.connect() as connection:
            return [_stored(row) for row in connection.execute(query)]

    def head(self) -> int:
        """Return the greatest position; 0 if no event is stored."""
        query = sa.select(tables.counter.c.value).where(tables.counter.c.name == "position")
        with self._reader.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def slice(self, cursor: int, cutoff: int, as_of: int | None = None) -> Slice:
        """Return the events with `cursor < position <= cutoff` that count at position `as_of`.

        `as_of` is `cutoff` if not given. The same numbers give the same slice: what was superseded after
        `as_of` still counts in it. Only what was forgotten is missing, and completions past their retention.
        """
        columns = tables.events.c
        seen_from = cutoff if as_of is None else as_of
        counts = sa.or_(columns.superseded_position.is_(None), columns.superseded_position > seen_from)
        query = (
            sa.select(tables.events)
            .where(columns.position > cursor, columns.position <= cutoff, counts)
            .order_by(columns.position)
        )
        with self._reader.connect() as connection:
            events = [event_of(row) for row in connection.execute(query)]
            ids = {ref.completion_id for event in events for ref in references(event.feedback)}
            return Slice(events=events, completions=_completions(connection, sorted(ids)))

    def unjudged(self, limit: int) -> list[Completion]:
        """List the latest records of completions that no event speaks of, newest first; not a shadow's."""
        completions, targets = tables.completions, tables.event_targets
        spoken_of = sa.exists().where(targets.c.completion_id == completions.c.id)
        query = (
            sa.select(completions.c.id, completions.c.part)
            .where(~spoken_of, completions.c.source != SHADOW)
            .order_by(completions.c.created_at.desc(), completions.c.id, completions.c.part)
            .limit(limit)
        )
        with self._reader.connect() as connection:
            return _parts(connection, [(row.id, row.part) for row in connection.execute(query)])

    def gold_completions(self) -> list[Completion]:
        """List the records of the completions that gold questions are about."""
        ids = {ref.completion_id for item in self.raters.gold() for ref in references(item.event.feedback)}
        with self._reader.connect() as connection:
            found = _completions(connection, sorted(ids))
        return [part for id in sorted(found) for part in found[id]]

    def replace_scores(self, round_id: int, scores: Iterable[ResponseScore]) -> None:
        """Keep what the reward model of a round thinks of recorded responses, instead of all before.

        Scores of completions that were forgotten meanwhile are left out.
        """
        rows = {
            (score.completion_id, score.choice): {"round_id": round_id, **asdict(score)} for score in scores
        }
        with self._engine.begin() as connection:
            gone = Tombstones(connection).among({("completion", id) for id, _ in rows})
            rows = {key: row for key, row in rows.items() if ("completion", key[0]) not in gone}
            connection.execute(sa.delete(tables.response_scores))
            if rows:
                connection.execute(sa.insert(tables.response_scores), list(rows.values()))

    def queries(self, limit: int, rater: str | None = None, gold_share: float = 0.0) -> list[Query]:
        """List the scored prompts whose responses the reward model is least sure of, in that order.

        Those with a current event of `rater` are left out: it has said what it thinks. Gold questions make up
        `gold_share` of what a rater is asked in all, wherever their own spread puts them among the others.
        """
        with self._reader.connect() as connection:
            found = _scored(connection, limit, rater)
            if rater is not None and gold_share:
                gold = _gold_to_ask(connection, limit, rater, gold_share)
                others = [one for one in found.items() if one[0] not in gold]
                found = dict([*others[: limit - len(gold)], *gold.items()])
                found = dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))
            scores: dict[tuple[str, int], list[sa.Row[Any]]] = {}
            table = tables.response_scores
            ids = sa.select(table).where(table.c.completion_id.in_([id for id, _ in found]))
            for row in connection.execute(ids.order_by(table.c.choice)):
                scores.setdefault((row.completion_id, row.part), []).append(row)
            return [
                _query(completion, found[completion.id, completion.part], scores)
                for completion in _parts(connection, list(found))
                if (completion.id, completion.part) in scores
            ]

    def counts(self) -> dict[str, int]:
        """Count the records of completions, the events of each status, and the dead letters not given up."""
        by_status = sa.select(tables.events.c.status, sa.func.count()).group_by(tables.events.c.status)
        dead = tables.dead_letters.c.dropped_at.is_(None)
        with self._reader.connect() as connection:
            counts = {"completions": _size(connection, tables.completions)}
            counts |= dict.fromkeys(("waiting", "stored", "superseded", "rejected"), 0)
            counts |= {status: count for status, count in connection.execute(by_status)}
            return counts | {"dead_letters": _size(connection, tables.dead_letters, dead)}

    def _commit(self, parsed: Parsed, cleaning: bool) -> IngestCounts:
        with self._engine.begin() as connection:
            intake = Intake(
                connection, now=self._clock(), waiting_hours=self._waiting_hours, cleaning=cleaning
            )
            return intake.take(parsed.completions, parsed.events, parsed.letters)

    def _ingest_alone(self, entry: Entry, cleaning: bool) -> IngestCounts:
        try:
            return self._commit(parse([entry]), cleaning)
        except Exception as problem:
            if not blames_the_data(problem):
                raise
            return self._commit(Parsed(letters=[letter(entry, refusal(problem))]), cleaning)


def _stored(row: sa.Row[Any]) -> StoredEvent:
    return StoredEvent(
        event=event_of(row),
        status=row.status,
        reason=row.reason,
        position=row.position,
        superseded_by=row.superseded_by,
    )


def _completions(connection: Connection, ids: Sequence[str]) -> dict[str, list[Completion]]:
    """Load all parts of the completions that are there, in a few statements."""
    found: dict[str, list[Completion]] = {}
    completions, choices = tables.completions, tables.choices
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        mine: dict[tuple[str, int], list[sa.Row[Any]]] = {}
        for row in connection.execute(
            sa.select(choices).where(choices.c.completion_id.in_(chunk)).order_by(choices.c.index)
        ):
            mine.setdefault((row.completion_id, row.part), []).append(row)
        query = sa.select(completions).where(completions.c.id.in_(chunk)).order_by(completions.c.part)
        for row in connection.execute(query):
            found.setdefault(row.id, []).append(completion_of(row, mine.get((row.id, row.part), [])))
    return found


def _parts(connection: Connection, wanted: Sequence[tuple[str, int]]) -> list[Completion]:
    """Load single parts of completions, in the order in which they are wanted."""
    found = _completions(connection, sorted({id for id, _ in wanted}))
    by_part = {(id, part.part): part for id, parts in found.items() for part in parts}
    return [by_part[one] for one in wanted if one in by_part]


def _scored(
    connection: Connection, limit: int | None, rater: str | None, *, gold: bool = False
) -> dict[tuple[str, int], float]:
    """Return the mean spread of scored prompts (with `gold`, those of gold questions), greatest first.

    What `rater` has judged is left out.
    """
    table, events, targets = tables.response_scores, tables.events, tables.event_targets
    there = sa.exists().where(
        tables.completions.c.id == table.c.completion_id, tables.completions.c.source != SHADOW
    )
    spread = sa.func.avg(table.c.spread).label("spread")
    query = sa.select(table.c.completion_id, table.c.part, spread).where(there)
    if rater is not None:
        own = sa.exists().where(
            targets.c.completion_id == table.c.completion_id,
            targets.c.event_id == events.c.event_id,
            events.c.rater == rater,
            events.c.status == "stored",
        )
        query = query.where(~own)
    if gold:
        asked = targets.join(tables.gold, tables.gold.c.event_id == targets.c.event_id)
        query = query.where(table.c.completion_id.in_(sa.select(targets.c.completion_id).select_from(asked)))
    query = query.group_by(table.c.completion_id, table.c.part)
    query = query.order_by(spread.desc(), table.c.completion_id, table.c.part).limit(limit)
    return {(row.completion_id, row.part): row.spread for row in connection.execute(query)}


def _gold_to_ask(
    connection: Connection, limit: int, rater: str, share: float
) -> dict[tuple[str, int], float]:
    """Pick the gold questions for the next `limit` that a rater is asked, the same until it answers them."""
    events = tables.events
    own = sa.select(sa.func.count()).select_from(events).where(events.c.rater == rater)
    answered = connection.execute(own).scalar_one()
    due = math.floor((answered + limit) * share) - math.floor(answered * share)
    ids = _scored(connection, None, rater, gold=True) if due else {}
    drawn = sorted(ids, key=lambda one: hashlib.sha256(f"{rater} {one}".encode()).digest())
    return {one: ids[one] for one in drawn[:due]}


def _query(
    completion: Completion, spread: float, scores: Mapping[tuple[str, int], Sequence[sa.Row[Any]]]
) -> Query:
    rows = scores[completion.id, completion.part]
    own = [ResponseScore(row.completion_id, row.choice, row.part, row.score, row.spread) for row in rows]
    return Query(completion, rows[0].round_id, spread, own)


def _size(connection: Connection, table: sa.Table, *which: sa.ColumnElement[bool]) -> int:
    return connection.execute(sa.select(sa.func.count()).select_from(table).where(*which)).scalar_one()
