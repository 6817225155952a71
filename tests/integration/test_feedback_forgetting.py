"""Forgetting in the database, on SQLite and on Postgres: what goes, what stays, what must not come back."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from feedback_samples import completion, entries, event, ranking, thumb
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.dead_letters import DeadLetters
from feedback.forgetting import Forgettings, NotARater
from feedback.intake import IngestCounts
from feedback.queue import Entry
from feedback.retention import BATCH, EXPIRED_TEXT, expire
from feedback.store import ResponseScore, Store
from feedback.tombstones import digest
from instructloop.database import compact

SECRET = "xyzzy-plugh"
NOW = 1000.0


@pytest.fixture
def store(either_database: Engine) -> Store:
    return Store(either_database, clock=lambda: NOW)


@pytest.fixture
def forget(either_database: Engine) -> Callable[..., int]:
    """Forgets at once, at the time `at`; returns the forgetting's id."""

    def run(kind: Any, id: str, at: float = NOW) -> int:
        forgettings = Forgettings(either_database, clock=lambda: at)
        number = forgettings.begin(kind, id, "ann the operator")
        forgettings.erase(number)
        return number

    return run


def everything(engine: Engine) -> dict[str, list[str]]:
    """All rows of all tables, as text."""
    with engine.connect() as connection:
        return {
            name: [repr(tuple(row)) for row in connection.execute(sa.select(table))]
            for name, table in tables.METADATA.tables.items()
        }


def fill(store: Store) -> None:
    """Ann (a user) asked c1 and c2, Bob asked c3; r1 and r2 judged, r1 with words of their own."""
    ann = {"user": "ann", "messages": [{"role": "user", "content": SECRET}]}
    said = {"type": "demonstration", "messages": [{"role": "user", "content": "hi"}], "text": SECRET}
    store.ingest(
        entries(
            completion("c1", **ann),
            completion("c2", **ann),
            completion("c3", user="bob"),
            thumb("e1", "c1", rater="k1/r1"),
            event(
                "e2",
                {"type": "thumb", "completion_id": "c3", "value": "up", "comment": SECRET},
                rater="k1/r1",
            ),
            event("e3", said, rater="k1/r1"),
            thumb("e4", "c3", rater="k1/r2"),
            ranking("e5", ("c1", 0), ("c2", 1), rater="k1/r2"),
            thumb("e6", "c3", rater="k1/user:ann"),
            thumb("e7", "missing", rater="k1/r1"),
        )
    )
    store.replace_scores(1, [ResponseScore("c1", 0, 0, 1.0, 0.5), ResponseScore("c3", 0, 0, 1.0, 0.5)])


def stored(store: Store) -> set[str]:
    return {f"e{i}" for i in range(1, 10) if store.event(f"e{i}") is not None}


def erased(store: Store, number: int) -> tuple[int, int]:
    counts = store.forgettings.get(number).counts
    return counts["completions"], counts["events"]


def test_a_rater_goes_with_all_that_they_said_and_others_stay(
    store: Store, either_database: Engine, forget: Callable[..., int]
) -> None:
    fill(store)
    number = forget("rater", "k1/r1")
    assert stored(store) == {"e4", "e5", "e6"}
    assert [len(store.completion(id)) for id in ("c1", "c2", "c3")] == [1, 1, 1]
    assert [one.event_id for one in store.slice(0, store.head()).events] == ["e4", "e5", "e6"]
    forgetting = store.forgettings.get(number)
    assert (forgetting.kind, forgetting.actor, forgetting.at) == ("rater", "ann the operator", NOW)
    assert forgetting.counts == {
        "completions": 0,
        "events": 4,
        "cases": 0,
        "dead_letters": 0,
        "in_the_queue": 0,
    }
    assert forgetting.digest == digest(("rater", "k1/r1"))
    assert store.forgettings.traces(number) == [(1, 1), (2, 1), (3, 1)]
    # Not even the id is left, in any table.
    assert all("k1/r1" not in row for rows in everything(either_database).values() for row in rows)
    store.forgettings.erase(number)
    assert store.forgettings.get(number) == forgetting


def test_an_end_user_goes_with_the_prompts_and_all_votes_on_them(
    store: Store, either_database: Engine, forget: Callable[..., int]
) -> None:
    fill(store)
    number = forget("rater", "k1/user:ann")
    assert stored(store) == {"e2", "e3", "e4", "e7"}
    assert [len(store.completion(id)) for id in ("c1", "c2", "c3")] == [0, 0, 1]
    assert store.forgettings.get(number).counts == {
        "completions": 2,
        "events": 3,
        "cases": 0,
        "dead_letters": 0,
        "in_the_queue": 0,
    }
    rows = everything(either_database)
    assert len(rows["choices"]) == 2
    assert [row for row in rows["response_scores"] if "'c1'" in row] == []
    assert all("user:ann" not in row and "'ann'" not in row for table in rows.values() for row in table)
    # Somebody of the same name, but not this user, keeps their own.
    store.ingest(entries(completion("c8", user="ann", key_id="k2"), thumb("e8", "c8", rater="k1/ann")))
    assert store.event("e8") is not None


def test_a_completion_goes_with_the_votes_on_it_whoever_gave_them(
    store: Store, either_database: Engine, forget: Callable[..., int]
) -> None:
    fill(store)
    forget("completion", "c1")
    assert stored(store) == {"e2", "e3", "e4", "e6", "e7"}
    assert [len(store.completion(id)) for id in ("c1", "c2", "c3")] == [0, 1, 1]
    assert all("'c1'" not in row for rows in everything(either_database).values() for row in rows)


def test_a_rater_who_is_known_by_one_completion_goes_with_it(
    store: Store, forget: Callable[..., int]
) -> None:
    fill(store)
    store.ingest(entries(thumb("e8", "c1", rater="k1/anonymous:c1")))
    forget("rater", "k1/anonymous:c1")
    assert stored(store) == {"e2", "e3", "e4", "e6", "e7"}
    assert store.completion("c1") == []


def test_nothing_comes_back(store: Store, either_database: Engine, forget: Callable[..., int]) -> None:
    fill(store)
    before = store.forgettings.get(forget("rater", "k1/user:ann"))
    forget("rater", "k1/r1")
    late = entries(
        completion("c1", user="ann"),  # the same again
        completion("c9", user="ann", created_at=NOW - 1),  # hers, from before, recorded late
        completion("c1", part=1, user=None),  # more of what is gone
        thumb("e1", "c1", rater="k1/r1"),
        thumb("e8", "c3", rater="k1/r1", received_at=NOW),  # given before, ingested late
        thumb("e5", "c3", rater="k1/somebody", received_at=NOW + 9),  # an event of this id is gone
        thumb("e9", "c1", rater="k1/somebody", received_at=NOW + 9),  # on what is gone
    )
    broken = [
        Entry("9-1", "event", b'{"rater": "k1/r1", "feedback": "' + SECRET.encode() + b'"}'),
        Entry("9-2", "completion", b'{"key_id": "k1", "user": "ann", "choices": "' + SECRET.encode() + b'"}'),
    ]
    counts = store.ingest([*late, *broken])
    assert counts == IngestCounts(forgotten=9)
    assert stored(store) == {"e4"}
    assert store.completion("c1") == store.completion("c9") == DeadLetters(either_database).list() == []
    store.replace_scores(2, [ResponseScore("c1", 0, 0, 1.0, 0.5), ResponseScore("c3", 0, 0, 1.0, 0.5)])
    assert [query.completion.id for query in store.queries(10)] == ["c3"]
    # What they say from now on counts: they are forgotten, not banned.
    new = entries(completion("c7", user="ann", created_at=NOW + 1), thumb("e2", "c3", rater="k1/r1"))
    assert store.ingest(new) == IngestCounts(completions=1, forgotten=1)
    assert store.ingest(entries(thumb("e6", "c7", rater="k1/r2", received_at=NOW + 1))).forgotten == 1
    assert store.ingest(entries(thumb("n1", "c7", rater="k1/r1", received_at=NOW + 1))).stored == 1
    # What came late went through the queue, whose files have to be cleaned again.
    assert store.forgettings.get(before.id).counts["in_the_queue"] == 8


def test_what_is_kept_out_takes_the_votes_on_it_along(store: Store, forget: Callable[..., int]) -> None:
    early = event("e1", {"type": "thumb", "completion_id": "c1", "value": "up", "comment": SECRET})
    store.ingest(entries(early))  # it waits for the record of its completion
    number = forget("rater", "k1/user:ann")
    late = entries(thumb("e2", "c1"), completion("c1", user="ann"), thumb("e3", "c1", rater="k1/user:ann"))
    assert store.ingest(late) == IngestCounts(forgotten=3)
    assert store.ingest(entries(thumb("e4", "c1"))) == IngestCounts(forgotten=1)
    assert stored(store) == set()
    assert all(store.forgettings.is_forgotten("event", f"e{i}") for i in (1, 2, 3, 4))
    assert store.forgettings.get(number).counts["in_the_queue"] == 4


def test_dead_letters_that_name_the_forgotten_go(
    store: Store, either_database: Engine, forget: Callable[..., int]
) -> None:
    store.ingest(
        [
            Entry("1-1", "event", b'{"rater": "k1/r1", "feedback": broken'),
            Entry("1-2", "completion", b'{"key_id":"k1","user":"ann","choices":0}'),
            Entry("1-3", "completion", b'{"key_id":"k2","user":"ann","choices":0}'),
            Entry("1-4", "event", '{"rater": "k1/Jürgen", broken'.encode()),
            Entry("1-5", "event", b'{"rater": "k1/J\\u00fcrgen", broken'),
            Entry("1-6", "event", b'{"completion_id":"c1", broken'),
            Entry("1-7", "event", b'{"rater": "k1/r10", "completion_id":"c10", broken'),
        ]
    )
    for kind, id in (
        ("rater", "k1/r1"),
        ("rater", "k1/user:ann"),
        ("rater", "k1/Jürgen"),
        ("completion", "c1"),
    ):
        forget(kind, id)
    assert {letter.entry_id for letter in DeadLetters(either_database).list()} == {"1-3", "1-7"}


def test_the_tombstone_comes_first_and_whoever_comes_next_erases(
    store: Store, either_database: Engine
) -> None:
    fill(store)
    forgettings = Forgettings(either_database, clock=lambda: NOW)
    number = forgettings.begin("rater", "k1/r1", "ann")
    # The process is killed here. Nothing more of the rater gets in,
    assert store.ingest(entries(thumb("e8", "c3", rater="k1/r1"))).forgotten == 1
    (left,) = Forgettings(either_database).unfinished()
    assert (left.id, left.erasure, left.left) == (number, None, ("queue", "files", "database"))
    # and another, which never heard the id, finishes it.
    Forgettings(either_database).erase(left.id)
    assert stored(store) == {"e4", "e5", "e6"}
    for step in left.left:
        forgettings.step_begins(step, [number])
        assert step in forgettings.get(number).left
        forgettings.step_done(step, [number])
    assert forgettings.unfinished() == []
    assert forgettings.get(number).done


def test_a_step_is_not_done_if_something_came_through_meanwhile(
    store: Store, either_database: Engine, forget: Callable[..., int]
) -> None:
    number = forget("completion", "c1")
    store.forgettings.step_begins("queue", [number])
    store.ingest(entries(thumb("e1", "c1")))
    store.forgettings.step_done("queue", [number])
    assert "queue" in store.forgettings.get(number).left
    store.forgettings.step_begins("queue", [number])
    store.ingest(entries(thumb("e2", "c1")), cleaning=True)
    store.forgettings.step_done("queue", [number])
    assert "queue" not in store.forgettings.get(number).left
    store.ingest(entries(thumb("e3", "c1")))
    assert "queue" in store.forgettings.get(number).left
    assert store.forgettings.get(number).counts["in_the_queue"] == 3


def test_an_id_that_no_rater_has_is_refused(store: Store) -> None:
    with pytest.raises(NotARater, match="<key id>/<name>"):
        store.forgettings.begin("rater", "ann", "operator")
    assert store.forgettings.list() == []
    with pytest.raises(KeyError):
        store.forgettings.get(1)


def test_positions_of_a_rater_are_known_before_and_after(store: Store, forget: Callable[..., int]) -> None:
    fill(store)
    assert store.forgettings.traces_of("k1/r1") == [(1, None), (2, None), (3, None)]
    forget("completion", "c3")
    assert store.forgettings.traces_of("k1/r1") == [(1, None), (3, None)]
    forget("rater", "k1/r1")
    store.ingest(entries(thumb("e8", "c2", rater="k1/r1", received_at=NOW + 1)))
    assert store.forgettings.traces_of("k1/r1") == [(1, 2), (3, 2), (7, None)]
    assert store.forgettings.traces_of("k1/nobody") == []
    assert store.forgettings.last_erasure() == 2
    assert store.forgettings.erased_since(0, 2)
    assert not store.forgettings.erased_since(0, 0)
    assert store.forgettings.erased_since(1, 1)
    assert not store.forgettings.erased_since(2, 100)


def test_exports_that_held_it_are_told(
    store: Store, either_database: Engine, forget: Callable[..., int]
) -> None:
    fill(store)
    noted = Forgettings(either_database, clock=lambda: NOW - 1)
    noted.note_export("/a", "feedback", 0, 6)
    noted.note_export("/b", "comparison", 0, 1)  # holds e1
    noted.note_export("/c", "round 7", 3, 6)
    number = forget("completion", "c1")  # e1 and e5, at 1 and 5
    Forgettings(either_database, clock=lambda: NOW + 1).note_export("/d", "feedback", 0, 6)
    assert [one.path for one in store.forgettings.exports(number)] == ["/a", "/b", "/c"]
    assert store.forgettings.exports(forget("completion", "unknown")) == []


def test_ingest_and_forgetting_at_once_leave_nothing(either_database: Engine) -> None:
    """Whatever the order in which they get their turns."""
    store, forgettings = Store(either_database), Forgettings(either_database)
    start = threading.Barrier(3)

    def ingest(worker: int) -> None:
        start.wait()
        for i in range(30):
            name = f"c{worker}-{i}"
            store.ingest(entries(completion(name, user="ann"), thumb(f"e{name}", name, rater="k1/user:ann")))

    threads = [threading.Thread(target=ingest, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    start.wait()
    numbers = []
    for _ in range(5):
        numbers.append(forgettings.begin("rater", "k1/user:ann", "operator"))
        forgettings.erase(numbers[-1])
    for thread in threads:
        thread.join()
    last = forgettings.begin("rater", "k1/user:ann", "operator")
    forgettings.erase(last)
    counts = store.counts()
    assert (counts["completions"], counts["stored"], counts["waiting"]) == (0, 0, 0)
    with either_database.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(tables.choices)).scalar_one() == 0


def test_many_events_and_completions(store: Store, forget: Callable[..., int]) -> None:
    store.ingest(entries(*[completion(f"c{i}", n=1, user="ann") for i in range(1100)]))
    store.ingest(entries(*[thumb(f"e{i}", f"c{i}", rater="k1/r") for i in range(1100)]))
    number = forget("rater", "k1/user:ann")
    assert store.forgettings.get(number).counts == {
        "completions": 1100,
        "events": 1100,
        "cases": 0,
        "dead_letters": 0,
        "in_the_queue": 0,
    }
    assert store.counts() == dict.fromkeys(store.counts(), 0)


def test_completions_past_their_age_go_and_votes_keep_no_words(store: Store, either_database: Engine) -> None:
    words = {"comment": SECRET, "context": {"note": SECRET}, "labels": ["opinion"]}
    store.ingest(
        entries(
            completion("old", created_at=1.0),
            completion("new", created_at=500.0),
            event("e1", {"type": "thumb", "completion_id": "old", "value": "down", **words}, rater="k1/r"),
            event("e2", {"type": "demonstration", "completion_id": "old", "text": SECRET}),
            event("e3", {"type": "thumb", "completion_id": "new", "value": "up", "comment": "stays"}),
            ranking("e4", ("old", 0), ("old", 1)),
        )
    )
    store.ingest([Entry("1-1", "event", SECRET.encode())])
    store.replace_scores(1, [ResponseScore("old", 0, 0, 1.0, 0.5)])
    assert expire(either_database, before=2.0) == 1  # the dead letter is of now
    assert expire(either_database, before=2.0) == 0
    assert (store.completion("old"), len(store.completion("new"))) == ([], 1)
    kept = store.event("e1")
    assert kept is not None
    assert (kept.status, kept.position, kept.event.rater) == ("stored", 1, "k1/r")
    assert kept.event.feedback.model_dump(exclude_defaults=True) == {
        "type": "thumb",
        "completion_id": "old",
        "value": "down",
        "labels": ["opinion"],
    }
    written = store.event("e2")
    assert written is not None
    assert getattr(written.event.feedback, "text", None) == EXPIRED_TEXT
    other = store.event("e3")
    assert other is not None
    assert other.event.feedback.comment == "stays"
    assert len(store.events_of("old")) == 3
    assert expire(either_database, before=NOW + 1) == 2
    assert all(SECRET not in row for rows in everything(either_database).values() for row in rows)


def test_retention_goes_in_bounded_batches(store: Store, either_database: Engine) -> None:
    store.ingest(entries(*[completion(f"c{i}", n=1, created_at=float(i)) for i in range(BATCH + 50)]))
    assert expire(either_database, before=1e6) == BATCH
    assert store.completion(f"c{BATCH}") != []
    assert expire(either_database, before=1e6) == 50
    assert store.counts()["completions"] == 0


def test_compacting_while_others_work(either_database: Engine, store: Store) -> None:
    fill(store)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            store.slice(0, 100)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(5):
            compact(either_database, tables.METADATA.tables)
            store.ingest(entries(completion(f"d{i}")))
    finally:
        stop.set()
        reader.join()
    assert store.counts()["completions"] == 8
