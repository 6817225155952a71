"""Cases: misbehaviours that an operator found, each a prompt with what a good answer to it is.

Owns the cases themselves, what they become as training feedback, and what versions answered to them. What a
new one is made of is in `feedback.new_case`. Whether an answer passes is decided in `evaluation.cases`; which
versions are tried on them, by the training round.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from feedback import tables
from feedback.events import (
    ChoiceRef,
    Demonstration,
    Event,
    Ranking,
    Thumb,
)
from feedback.forgetting import take_turn
from feedback.new_case import BadCase, NewCase, resolved
from feedback.records import Choice, Completion
from feedback.submission import Receipt
from feedback.tombstones import Name as Origin
from feedback.tombstones import Tombstones

SOURCE = "cases"
"""The source and the key id of the feedback that cases become."""

RATER = f"{SOURCE}/operator"

Change = Literal["fixed", "broke", "still failing", "still passing"]
Validate = Callable[[Sequence[Mapping[str, Any]], str | None, str | None], None]
"""Called with checks, good answer and bad answer; raises BadCase where they make no case."""


class UnknownCase(KeyError):  # noqa: N818
    """There is no such case."""

    def __str__(self) -> str:
        return f"there is no case {self.args[0]}: see `instructloop cases`"


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and what a good answer to it is: `checks` that programs carry out, or a reference verdict.

    `trainings` counts how often it was sent as feedback; times are Unix seconds. A removed one is tried no
    more. `origins` are the names under which what it was made from can be forgotten.
    """

    id: str
    title: str
    messages: list[dict[str, str]]
    checks: list[dict[str, Any]]
    good: str | None
    bad: str | None
    trainings: int
    added_by: str
    added_at: float
    removed_by: str | None = None
    removed_at: float | None = None
    origins: Sequence[Origin] = field(default=())

    @property
    def event_ids(self) -> list[str]:
        """The ids of all feedback that was made of it, latest first."""
        return [id for n in range(self.trainings, 0, -1) for id in self.event_ids_of(n)]

    def event_ids_of(self, training: int) -> list[str]:
        """Return the ids of the feedback that it became the `training`-th time, from 1 on."""
        return [f"{self.id}-{training}-{kind}" for kind in self._kinds]

    @property
    def _kinds(self) -> list[str]:
        if self.good is None:
            return ["thumb"] if self.bad is not None else []
        return ["demonstration"] + ["ranking"] * (self.bad is not None)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What the version in service answered to a case (`before`) and what a round's candidate did (`after`).

    `at` is in Unix seconds.
    """

    case_id: str
    version: str
    incumbent: str
    before: str
    before_passed: bool
    after: str
    after_passed: bool
    round_id: int = 0
    at: float = 0.0

    @property
    def change(self) -> Change:
        """What the candidate changed."""
        if self.before_passed:
            return "still passing" if self.after_passed else "broke"
        return "fixed" if self.after_passed else "still failing"


class CaseQueue(Protocol):
    """The part of `feedback.queue.FeedbackQueue` that takes cases."""

    async def record(self, completions: Sequence[Completion]) -> None: ...  # noqa: D102
    async def submit_batch(self, events: Sequence[Event]) -> list[Receipt]: ...  # noqa: D102


class Cases:
    """The cases of one database; safe to share between threads. `clock` gives Unix seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)
        self._clock = clock

    @property
    def engine(self) -> Engine:
        """The database."""
        return self._engine

    def add(self, new: NewCase, *, actor: str, validate: Validate) -> Case:
        """Add a case and return it; what is there already is that case, and counts again if it was removed.

        Raises BadCase, naming the field, where its origin is unknown or it is none.
        """
        with self._engine.begin() as connection:
            # So that nothing is forgotten between the look at it and the copy.
            take_turn(connection)
            row, origins = resolved(connection, new)
            validate(row["checks"], row["good"], row["bad"])
            if new.train and row["good"] is None and row["bad"] is None:
                raise BadCase("train", "there is nothing to learn from without a good or a bad answer")
            if Tombstones(connection).among([("completion", row["id"])]):
                raise BadCase("messages", f"this case was forgotten ({row['id']}): change its words")
            now, same = self._clock(), tables.cases.c.id == row["id"]
            known = connection.execute(sa.select(tables.cases).where(same)).one_or_none()
            if known is None:
                row |= {"added_by": actor, "added_at": now}
                connection.execute(sa.insert(tables.cases).values(**row))
                named = [{"kind": kind, "name": name, "case_id": row["id"]} for kind, name in origins]
                if named:
                    connection.execute(sa.insert(tables.case_origins), named)
            elif known.removed_at is not None:
                back = {"removed_at": None, "removed_by": None, "added_by": actor, "added_at": now}
                connection.execute(sa.update(tables.cases).where(same).values(**back))
            return _case(connection, row["id"])

    def get(self, id: str) -> Case:
        """Return one case, removed or not; raises UnknownCase."""
        with self._reader.connect() as connection:
            return _case(connection, id)

    def list(self, *, removed: bool = False) -> list[Case]:
        """Return the cases that later versions are tried on, oldest first; with `removed`, the others too."""
        query = sa.select(tables.cases).order_by(tables.cases.c.added_at, tables.cases.c.id)
        if not removed:
            query = query.where(tables.cases.c.removed_at.is_(None))
        with self._reader.connect() as connection:
            origins: dict[str, list[Origin]] = {}
            for row in connection.execute(sa.select(tables.case_origins)):
                origins.setdefault(row.case_id, []).append((row.kind, row.name))
            return [_case_of(row, origins.get(row.id, [])) for row in connection.execute(query)]

    def remove(self, id: str, *, actor: str) -> Case:
        """Try no version on this case any more; raises UnknownCase, also where it was removed before."""
        with self._engine.begin() as connection:
            table = tables.cases
            there = sa.and_(table.c.id == id, table.c.removed_at.is_(None))
            change = sa.update(table).where(there).values(removed_by=actor, removed_at=self._clock())
            if connection.execute(change).rowcount == 0:
                raise UnknownCase(id)
            return _case(connection, id)

    def begin_training(self, id: str, *, again: bool = False) -> Case:
        """Note that a case is sent as feedback and return it; `again` sends what was sent before anew.

        Unless `again`, what is sent a second time is the same event. Raises UnknownCase, BadCase.
        """
        with self._engine.begin() as connection:
            case = _case(connection, id)
            if case.good is None and case.bad is None:
                raise BadCase("train", "there is nothing to learn from without a good or a bad answer")
            if case.trainings == 0 or again:
                count = sa.update(tables.cases).where(tables.cases.c.id == id)
                connection.execute(count.values(trainings=tables.cases.c.trainings + 1))
            return _case(connection, id)

    def record_results(self, round_id: int, results: Sequence[CaseResult]) -> None:
        """Keep what the versions of a round answered, instead of what is kept of it already.

        What was answered to cases that are forgotten is left out.
        """
        with self._engine.begin() as connection:
            take_turn(connection)
            table, now = tables.case_results, self._clock()
            connection.execute(sa.delete(table).where(table.c.round_id == round_id))
            there = set(connection.execute(sa.select(tables.cases.c.id)).scalars())
            rows = [
                {column.name: getattr(result, column.name) for column in table.columns}
                | {"round_id": round_id, "at": now}
                for result in results
                if result.case_id in there
            ]
            if rows:
                connection.execute(sa.insert(table), rows)

    def results(self, *, round_id: int | None = None, case_id: str | None = None) -> Sequence[CaseResult]:
        """Return what is kept of a round, or of a case, in order of rounds and cases."""
        table = tables.case_results
        query = sa.select(table).order_by(table.c.round_id, table.c.case_id)
        if round_id is not None:
            query = query.where(table.c.round_id == round_id)
        if case_id is not None:
            query = query.where(table.c.case_id == case_id)
        with self._reader.connect() as connection:
            return [CaseResult(**row._mapping) for row in connection.execute(query)]


async def send(queue: CaseQueue, case: Case, now: float | None = None) -> list[str]:
    """Send a case as feedback, as its latest training; returns the events' ids.

    Sending it once more adds nothing. Raises QueueUnavailable: some of it may be there.
    """
    completion, events = training_records(case, time.time() if now is None else now)
    await queue.record([completion])
    await queue.submit_batch(events)
    return [event.event_id for event in events]


def training_records(case: Case, now: float) -> tuple[Completion, list[Event]]:
    """Return what a case is as feedback: a record of its answers, and the events on them.

    A good answer is a demonstration, and ranked over a bad one; a bad one alone is voted down. The events
    bring the checks. `now` is in Unix seconds.
    """
    texts = [text for text in (case.good, case.bad) if text is not None]
    completion = Completion(
        id=case.id,
        parts=1,
        key_id=SOURCE,
        source=SOURCE,
        endpoint=SOURCE,
        created_at=now,
        messages=case.messages,
        choices=[Choice(index=index, text=text) for index, text in enumerate(texts)],
    )
    context = {"case": case.id} | ({"checks": case.checks} if case.checks else {})
    first, second = (ChoiceRef(completion_id=case.id, choice=choice) for choice in (0, 1))
    said: list[Demonstration | Ranking | Thumb] = []
    if case.good is not None:
        said.append(
            Demonstration(type="demonstration", completion_id=case.id, text=case.good, context=context)
        )
        if case.bad is not None:
            said.append(Ranking(type="ranking", groups=[[first], [second]], context=context))
    else:
        said.append(Thumb(type="thumb", completion_id=case.id, value="down", context=context))
    events = [
        Event(
            event_id=event_id,
            key_id=SOURCE,
            rater=RATER,
            source=SOURCE,
            received_at=now,
            feedback=feedback,
        )
        for event_id, feedback in zip(case.event_ids_of(case.trainings), said, strict=True)
    ]
    return completion, events


def _case(connection: Connection, id: str) -> Case:
    row = connection.execute(sa.select(tables.cases).where(tables.cases.c.id == id)).one_or_none()
    if row is None:
        raise UnknownCase(id)
    origins = sa.select(tables.case_origins).where(tables.case_origins.c.case_id == id)
    return _case_of(row, [(one.kind, one.name) for one in connection.execute(origins)])


def _case_of(row: sa.Row[Any], origins: Sequence[Origin]) -> Case:
    return Case(**row._mapping, origins=sorted(origins))
