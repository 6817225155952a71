"""Whatever is submitted, retried, redelivered, replayed and erased: the store agrees with a slow model.

A Hypothesis state machine over a real Redis and a real database, the same for SQLite and Postgres. Both the
queue's promise (what was acknowledged is somewhere, exactly once) and the store's (which events count, which
replaced which, that a slice stays what it was) are checked after each step that can change them.
`make fuzz-store` runs more and longer cases.
"""

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import redis
import redis.asyncio
import sqlalchemy as sa
from feedback_samples import completion, event
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.dead_letters import DeadLetter, DeadLetters, StillBroken
from feedback.entries import parse
from feedback.events import Event, body_digest, references, target
from feedback.intake import Intake
from feedback.queue import Entry, FeedbackQueue, IdempotencyConflict, StreamReader
from feedback.records import Completion
from feedback.settings import QueueSettings
from feedback.store import Store
from instructloop.database import connect, migrate

FUZZING = settings.get_current_profile_name() == "fuzz"
CASES = {} if FUZZING else {"max_examples": 150, "stateful_step_count": 40, "derandomize": True}

WAITING_HOURS = 24.0
SETTINGS = QueueSettings(claim_after_seconds=3600.0, durability_check_seconds=3600.0)
HEIR = "heir"
"""The process that takes at once what others hold. They never do: what happens must not hang on time."""
NEWER = "2"
RATERS = ("k1/x", "k1/y", "k2/x")
PARTS = (("chatcmpl-a", 0), ("chatcmpl-b", 0), ("chatcmpl-c", 0), ("cmpl-d", 0), ("cmpl-d", 1))
CHOICES = {"chatcmpl-a": 3, "chatcmpl-b": 2, "chatcmpl-c": 2, "cmpl-d": 5}
REFS = [(id, choice) for id, choices in CHOICES.items() for choice in range(choices)]
"""Choices that judgements speak of: some of them are in no record, and those of `cmpl-d` are in two."""
KEYS = st.none() | st.sampled_from("pq")
NAMES = st.sampled_from(["a", "b", HEIR])


def record(id: str, part: int) -> Completion:
    """Two choices a part; a and b answer the same prompt."""
    prompt = {"chatcmpl-a": 1, "chatcmpl-b": 1, "chatcmpl-c": 2, "cmpl-d": 3}[id] + part
    parts = 2 if id == "cmpl-d" else None
    return completion(id, n=2, part=part, parts=parts, prompt_token_ids=[prompt])


def rankings(draw: Any) -> dict[str, Any]:
    refs = draw(st.lists(st.sampled_from(REFS), min_size=2, max_size=3, unique=True))
    return {"type": "ranking", "groups": [[{"completion_id": id, "choice": n}] for id, n in refs]}


@st.composite
def judgements(draw: st.DrawFn) -> dict[str, Any]:
    """What is said, in one of the four types; few enough different ones that raters repeat themselves."""
    id, choice = draw(st.sampled_from(REFS))
    match draw(st.sampled_from(["thumb", "thumb", "rating", "ranking", "demonstration", "free"])):
        case "thumb":
            value = draw(st.sampled_from(["up", "down"]))
            return {"type": "thumb", "completion_id": id, "choice": choice, "value": value}
        case "rating":
            return {"type": "rating", "completion_id": id, "choice": choice, "score": draw(st.integers(1, 2))}
        case "ranking":
            return rankings(draw)
        case "demonstration":
            return {"type": "demonstration", "completion_id": id, "text": draw(st.sampled_from("st"))}
    messages = [{"role": "user", "content": "hi"}]
    return {"type": "demonstration", "messages": messages, "text": draw(st.sampled_from("s\0"))}


@dataclass
class Kept:
    """An event as the model has it stored."""

    event: Event
    ingested_at: float
    expired: bool = False


@dataclass
class Model:
    """What must hold, with no thought for order, batches or transactions.

    `events` are in the store, `letters` are the ids of dead events, those dropped with `dropped`, and the
    parts of dead completions; `forgotten` is up to when each erased rater's events are gone.
    """

    parts: set[tuple[str, int]] = field(default_factory=set)
    events: dict[str, Kept] = field(default_factory=dict)
    letters: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    dead_parts: Counter[tuple[str, int]] = field(default_factory=Counter)
    forgotten: dict[str, float] = field(default_factory=dict)

    def is_forgotten(self, said: Event) -> bool:
        return said.received_at <= self.forgotten.get(said.rater, float("-inf"))

    def take(self, completions: Sequence[Completion], events: Sequence[Event], now: float) -> None:
        """What an ingest transaction does."""
        self.parts |= {(found.id, found.part) for found in completions}
        for said in events:
            if said.event_id not in self.events and not self.is_forgotten(said):
                self.events[said.event_id] = Kept(said, now)
                self.letters.discard(said.event_id)
                self.dropped.discard(said.event_id)
        for kept in self.events.values():
            late = kept.ingested_at < now - WAITING_HOURS * 3600
            if late and self.resolved(kept.event) == "waiting":
                kept.expired = True

    def resolved(self, said: Event) -> str:
        prompts, waits = set(), False
        for ref in references(said.feedback):
            part = ref.choice // 2 if ref.completion_id == "cmpl-d" else 0
            exists = ref.choice < 2 * (2 if ref.completion_id == "cmpl-d" else 1)
            known = sum(id == ref.completion_id for id, _ in self.parts)
            if exists and (ref.completion_id, part) in self.parts:
                prompts.add(record(ref.completion_id, part).prompt_token_ids[0])
            elif known == (2 if ref.completion_id == "cmpl-d" else 1):
                return "rejected"
            else:
                waits = True
        if said.feedback.type == "ranking" and len(prompts) > 1:
            return "rejected"
        return "waiting" if waits else "stored"

    def statuses(self) -> dict[str, str]:
        """The status that each event in the store must have."""
        found, last = {}, {}
        for event_id, kept in self.events.items():
            status = self.resolved(kept.event)
            found[event_id] = "rejected" if status == "waiting" and kept.expired else status
            if status == "stored":
                rivals = last.setdefault(_current(kept.event), [])
                rivals.append(kept.event)
        for rivals in last.values():
            winner = max(rivals, key=lambda said: said.received_at)
            found |= {said.event_id: "superseded" for said in rivals if said is not winner}
        return found


def _current(said: Event) -> tuple[str, str, str]:
    return said.rater, said.feedback.type, target(said.feedback)


class FeedbackMachine(RuleBasedStateMachine):
    """Givers, two ingest processes that die, an operator and time, over one queue and one store."""

    engine: Engine
    client: redis.Redis
    queue: FeedbackQueue
    runner: "asyncio.Runner"
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000_000.0
        self.number = 0
        self.model = Model()
        self.acknowledged: dict[str, Event] = {}
        self.keys: dict[tuple[str, str], tuple[str, str]] = {}
        self.in_queue: set[str] = set()
        self.slices: list[tuple[int, int, list[str]]] = []
        self.positions: dict[str, int] = {}
        self.store = Store(self.engine, WAITING_HOURS, clock=self.clock)
        self.dead_letters = DeadLetters(self.engine, WAITING_HOURS, clock=self.clock)
        self.seen["cases"] += 1

    @initialize()
    def empty(self) -> None:
        self.client.flushdb()
        with self.engine.begin() as connection:
            for table in reversed(tables.METADATA.sorted_tables):
                if table is not tables.counter:
                    connection.execute(sa.delete(table))
            connection.execute(sa.update(tables.counter).values(value=0))

    def clock(self) -> float:
        """Give the time of store and operator, behind that of every giver's server."""
        return self.now + 600.0

    # -- givers

    @rule(parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=5))
    def generate(self, parts: list[tuple[str, int]]) -> None:
        self._step("completions")
        self.runner.run(self.queue.record([record(*part) for part in parts]))

    @rule(said=judgements(), rater=st.sampled_from(RATERS), key=KEYS, skew=st.integers(-500, 500))
    def submit(self, said: dict[str, Any], rater: str, key: str | None, skew: int) -> None:
        self._step("submits")
        given = self._event(said, rater, skew)
        first = self.keys.get((given.key_id, key or ""))
        if first is not None and first[1] != body_digest(given):
            with pytest.raises(IdempotencyConflict, match=first[0]):
                self.runner.run(self.queue.submit(given, key))
            return
        receipt = self.runner.run(self.queue.submit(given, key))
        self._receive(given, key, (receipt.event_id, receipt.duplicate))

    @rule(
        said=st.lists(st.tuples(judgements(), st.sampled_from(RATERS), KEYS), min_size=1, max_size=4),
    )
    def submit_batch(self, said: list[tuple[dict[str, Any], str, str | None]]) -> None:
        self._step("submits", len(said))
        given = [self._event(feedback, rater, 0) for feedback, rater, _ in said]
        keys = [key for *_, key in said]
        receipts = self.runner.run(self.queue.submit_batch(given, keys))
        for one, key, receipt in zip(given, keys, receipts, strict=True):
            first = self.keys.get((one.key_id, key or ""))
            assert receipt.conflict == (first is not None and first[1] != body_digest(one))
            if receipt.conflict:
                assert first is not None
                assert receipt.event_id == first[0]
            else:
                self._receive(one, key, (receipt.event_id, receipt.duplicate))

    @precondition(lambda self: self.acknowledged)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """The very same event again, as an import that is run again sends it."""
        self._step("retries")
        given = self.acknowledged[data.draw(st.sampled_from(sorted(self.acknowledged)))]
        waits = given.event_id in self.in_queue
        assert self.runner.run(self.queue.queued(given.event_id)) == (given.key_id if waits else None)
        receipt = self.runner.run(self.queue.submit(given))
        assert (receipt.event_id, receipt.duplicate) == (given.event_id, waits)
        self.in_queue.add(given.event_id)

    @rule(
        kind=st.sampled_from(["newer event"] * 3 + ["newer completion"] * 2 + ["cut off", "noise"]),
        said=judgements(),
        rater=st.sampled_from(RATERS),
        part=st.sampled_from(PARTS),
    )
    def poison(self, kind: str, said: dict[str, Any], rater: str, part: tuple[str, int]) -> None:
        """What ingest can't read: in the schema of a newer server, or just broken."""
        self._step("poison")
        data = record(*part).model_dump_json().encode()
        if kind == "newer event":
            given = self._event(said, rater, 0)
            with patch("feedback.submission.SCHEMA", NEWER):
                self.runner.run(self.queue.submit(given))
            self.acknowledged[given.event_id] = given
            self.in_queue.add(given.event_id)
            return
        fields: dict[Any, Any] = {b"\xff": b"\0"}
        if kind == "newer completion":
            fields = {"kind": "completion", "data": data, "schema": NEWER}
        elif kind == "cut off":
            fields = {"kind": "event", "data": data[:-5]}
        self.client.xadd(SETTINGS.stream, fields)

    # -- ingest

    @rule(name=NAMES, batch=st.integers(1, 6), dies=st.sampled_from(["before", "after"]))
    def ingest_and_die(self, name: str, batch: int, dies: str) -> None:
        """A process ends before the commit of a batch, or between that and the acknowledgement."""
        self._step("deaths")
        found = self._reader(name, batch).read(0)
        if dies == "before":
            self._die_before_the_commit(found)
        else:
            self._store(found)
        self._check_store()

    @rule(name=NAMES, batch=st.integers(1, 6), batches=st.sampled_from([1, 2, 3, 100]))
    def ingest(self, name: str, batch: int, batches: int) -> None:
        self._step("ingests")
        reader = self._reader(name, batch)
        while batches and (found := reader.read(0)):
            batches -= 1
            self._store(found)
            self._done(reader, found)
        self._check_store()

    @rule(hours=st.integers(1, 30))
    def wait(self, hours: int) -> None:
        self._step("waits")
        self.now += hours * 3600.0

    # -- operators

    @precondition(lambda self: self.can_look())
    @rule(hows=st.lists(st.sampled_from(["fix", "fix", "as it is", "drop"]), min_size=1, max_size=4))
    def look_at_dead_letters(self, hows: list[str]) -> None:
        """Some of the newer schema are fixed and replayed, replayed as they are, or dropped."""
        # Not in the order of the list: that of letters of one moment hangs on Redis' clock.
        letters = [one for one in map(self.dead_letters.get, self.dead_letters.ids()) if one.schema == NEWER]
        for letter, how in zip(letters, hows, strict=False):
            self._step({"fix": "replays", "drop": "drops"}.get(how, "vain replays"))
            self._treat(letter, how)
        self._check_store()

    @precondition(lambda self: self.can_look())
    @rule()
    def replay_all_dead_letters(self) -> None:
        """The operator has upgraded ingest, so to speak: all are replayed in the order of the queue."""
        for letter in map(self.dead_letters.get, self.dead_letters.ids()):
            if letter.schema == NEWER:
                self._step("replays")
                self._treat(letter, "fix")
        self._check_store()

    def can_look(self) -> bool:
        return bool(self.model.letters - self.model.dropped or +self.model.dead_parts)

    def _treat(self, letter: DeadLetter, how: str) -> None:
        raw = self.dead_letters.data(letter.id)
        if how == "as it is":
            with pytest.raises(StillBroken, match="schema version '2'"):
                self.dead_letters.replay(letter.id)
            return
        parsed = parse([Entry(letter.entry_id, letter.kind, raw)])
        self.model.dead_parts -= Counter((one.id, one.part) for one in parsed.completions)
        if how == "drop":
            self.dead_letters.drop(letter.id, "the model says so")
            self.model.dropped |= {one.event_id for one in parsed.events}
        else:
            self.dead_letters.fix(letter.id, raw)
            self.dead_letters.replay(letter.id)
            self.model.take(parsed.completions, parsed.events, self.clock())

    @rule(back=st.integers(0, 5))
    def slice(self, back: int) -> None:
        """A round takes what is new since some earlier one."""
        self._step("slices")
        head = self.store.head()
        ends = [0, *sorted({cutoff for _, cutoff, _ in self.slices})]
        cursor = ends[-1 - back] if back < len(ends) else 0
        found = self.store.slice(cursor, head)
        assert set(found.completions) == {
            ref.completion_id for one in found.events for ref in references(one.feedback)
        }
        self.slices.append((cursor, head, [one.event_id for one in found.events]))

    @precondition(lambda self: can_erase())
    @rule(rater=st.sampled_from(RATERS))
    def erase(self, rater: str) -> None:
        """All that a rater gave up to now goes, wherever it is, and what is still in the queue stays out."""
        self._step("erasures")
        erase(self.store, rater)
        self.model.forgotten[rater] = self.clock()
        gone = {id for id, said in self.acknowledged.items() if self.model.is_forgotten(said)}
        for name in gone:
            self.model.events.pop(name, None)
        self.model.letters -= gone
        self.model.dropped -= gone
        self._check_store()

    # -- what must hold

    def teardown(self) -> None:
        """Everything that was acknowledged is in the store or a dead letter, and Redis is empty."""
        self._drain()
        self._check_store()
        in_letters = {one.event_id for one in self.dead_letters.list(10_000, dropped=True)} - {None}
        for event_id, given in self.acknowledged.items():
            if self.model.is_forgotten(given):
                assert event_id not in self.model.events
                continue
            assert (event_id in self.model.events) != (event_id in in_letters), event_id
            assert self.runner.run(self.queue.queued(event_id)) is None
        for cursor, cutoff, events in self.slices:
            left = [name for name in events if not self.model.is_forgotten(self.acknowledged[name])]
            assert [one.event_id for one in self.store.slice(cursor, cutoff).events] == left
        for id in {id for id, _ in self.model.parts}:
            found_parts = self.store.completion(id)
            assert found_parts == [record(*part) for part in sorted(self.model.parts) if part[0] == id]
        assert self.client.xlen(SETTINGS.stream) == 0
        kinds = {name.rpartition(b":")[0].rpartition(b":")[2] for name in self.client.keys("*:*:*")}
        assert kinds <= {b"idempotency"}
        super().teardown()

    def _check_store(self) -> None:
        statuses = self.model.statuses()
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(tables.events)).all()
        assert {row.event_id: row.status for row in rows} == statuses
        # Positions are given once, in order and without gaps, and never change.
        for row in rows:
            if row.position is not None:
                assert self.positions.setdefault(row.event_id, row.position) == row.position
        assert sorted(self.positions.values()) == list(range(1, self.store.head() + 1))
        by_id = {row.event_id: row for row in rows}
        for row in rows:
            assert (row.reason is not None) == (row.status == "rejected")
            assert (row.superseded_by is not None) == (row.status == "superseded")
            assert (row.position is not None) == (row.status in ("stored", "superseded"))
            if row.status == "superseded":
                assert by_id[row.superseded_by].received_at > row.received_at
        current = sorted((row.position, row.event_id) for row in rows if row.status == "stored")
        everything = self.store.slice(0, self.store.head()).events
        assert [one.event_id for one in everything] == [name for _, name in current]
        assert self._dead() == (self.model.letters, self.model.dropped, +self.model.dead_parts)

    def _dead(self) -> tuple[set[str], set[str], Counter[tuple[str, int]]]:
        listed = self.dead_letters.list(10_000, dropped=True)
        named = [one for one in listed if one.event_id is not None]
        parts: Counter[tuple[str, int]] = Counter()
        for one in listed:
            if one.kind == "completion":
                (found,) = parse([Entry("", "completion", self.dead_letters.data(one.id))]).completions
                parts[found.id, found.part] += 1
        return (
            {str(one.event_id) for one in named},
            {str(one.event_id) for one in named if one.dropped_at is not None},
            parts,
        )

    def _event(self, said: dict[str, Any], rater: str, skew: int) -> Event:
        """Make an event, received about now; no two are received at the same moment."""
        self.number += 1
        received_at = self.now + skew + self.number / 1000
        return event(
            f"e{self.number}", said, rater=rater, key_id=rater.partition("/")[0], received_at=received_at
        )

    def _receive(self, given: Event, key: str | None, receipt: tuple[str, bool]) -> None:
        """Note an acknowledgement; under a key it names the event for every try, the first time a new one."""
        first = None if key is None else self.keys.get((given.key_id, key))
        if first is not None:
            assert receipt == (first[0], True)
        elif key is None:
            assert receipt == (given.event_id, False)
        else:
            assert receipt[0] not in self.acknowledged
            assert not receipt[1]
            self.keys[given.key_id, key] = (receipt[0], body_digest(given))
            given = given.model_copy(update={"event_id": receipt[0]})
        if not receipt[1]:
            self.acknowledged[given.event_id] = given
            self.in_queue.add(given.event_id)

    def _die_before_the_commit(self, found: Sequence[Entry]) -> None:
        parsed = parse(found)
        with self.engine.connect() as connection, connection.begin() as transaction:
            intake = Intake(connection, now=self.clock(), waiting_hours=WAITING_HOURS)
            intake.take(parsed.completions, parsed.events, parsed.letters)
            transaction.rollback()

    def _reader(self, name: str, batch: int = 500) -> StreamReader:
        changes = {"batch": batch} | ({"claim_after_seconds": 1e-9} if name == HEIR else {})
        return StreamReader(self.client, SETTINGS.model_copy(update=changes), name)

    def _drain(self) -> None:
        """Let a process that has just started ingest all that is left, also what others held that died."""
        reader = self._reader(HEIR)
        while found := reader.read(0):
            self._store(found)
            self._done(reader, found)
        assert self.client.xlen(SETTINGS.stream) == 0

    def _done(self, reader: StreamReader, found: Sequence[Entry]) -> None:
        reader.done(found)
        self.in_queue -= {entry.event_id for entry in found if entry.event_id is not None}

    def _store(self, found: Sequence[Entry]) -> None:
        """Ingest a batch, and tell the model."""
        self.store.ingest(found)
        parsed = parse(found)
        self.model.take(parsed.completions, parsed.events, self.clock())
        for letter in parsed.letters:
            given = self.acknowledged.get(letter.event_id or "")
            if given is not None and not self.model.is_forgotten(given):
                self.model.letters |= {given.event_id} - set(self.model.events)
        if parsed.letters:
            # A letter is known by its entry: only what is buried now can tell a second delivery.
            self.model.dead_parts = self._dead()[2]

    def _step(self, name: str, count: int = 1) -> None:
        self.seen["steps"] += 1
        self.seen[name] += count


def can_erase() -> bool:
    """Whether the store can forget a rater."""
    return hasattr(Store, "forgettings")


def erase(store: Any, rater: str) -> None:
    store.forgettings.erase(store.forgettings.begin("rater", rater, actor="test"))


@pytest.fixture(params=["sqlite", "postgres"])
def machine(request: pytest.FixtureRequest) -> Iterator[type[FeedbackMachine]]:
    """A machine's class on servers of its own. They write to memory: here nobody pulls the plug."""
    from conftest import RedisServer, free_port

    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="il-machine-", dir=memory if memory.is_dir() else None))
    server = RedisServer(directory, free_port())
    server.start()
    if request.param == "postgres":
        engine: Engine = request.getfixturevalue("postgres")
        sa.event.listen(engine, "connect", lambda raw, _: raw.execute("SET synchronous_commit = off"))
        engine.dispose()  # those that are open don't know it
    else:
        engine = connect(f"sqlite:///{directory / 'store.db'}")
        migrate(engine)
    asynchronous = redis.asyncio.Redis.from_url(server.url)
    with asyncio.Runner() as runner, server.client() as client:

        class Machine(FeedbackMachine):
            pass

        Machine.engine, Machine.client, Machine.runner = engine, client, runner
        Machine.queue, Machine.seen = FeedbackQueue(asynchronous, SETTINGS), Counter()
        yield Machine
        runner.run(asynchronous.aclose())
    engine.dispose()
    server.stop()
    shutil.rmtree(directory)


def test_the_queue_and_the_store_keep_their_contract(
    machine: type[FeedbackMachine], tell: Callable[[str], None]
) -> None:
    run_state_machine_as_test(machine, settings=settings(**CASES))
    counts = ", ".join(f"{count} {name}" for name, count in machine.seen.items())
    tell(f"{machine.engine.dialect.name}: {counts}")
