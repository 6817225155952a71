"""What can't be stored, on both databases: it blocks nothing, is not lost, and can be fixed and replayed."""

import json
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio
import sqlalchemy as sa
from feedback_samples import completion, entries, entry, event, ranking, thumb
from sqlalchemy.engine import Engine

from feedback.dead_letters import DeadLetter, DeadLetters, StillBroken, UnknownLetter
from feedback.events import Event
from feedback.intake import IngestCounts
from feedback.queue import Entry, FeedbackQueue, StreamReader
from feedback.records import Completion
from feedback.settings import QueueSettings
from feedback.store import Store

if TYPE_CHECKING:
    from conftest import RedisServer

EVENT = thumb("p").model_dump(mode="json")
COMPLETION = completion("c9").model_dump(mode="json")
WIDE = "".join(chr(0x4E00 + (7919 * i) % 20_000) for i in range(20_000))
"""60 kB that don't compress: no index of Postgres takes it."""


def changed(record: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(record | changes).encode()


POISON: dict[str, tuple[str, bytes]] = {
    "no JSON": ("event", b"\xff\xfe{"),
    "nothing": ("event", b""),
    "cut off": ("event", changed(EVENT)[:-5]),
    "another shape": ("event", b"[1, 2]"),
    "another kind": ("surprise", changed(EVENT)),
    "a kind with NUL": ("a\0b", b"\0"),
    "a wrong type": ("event", changed(EVENT, received_at="yesterday")),
    "an unknown type with NUL": ("event", changed(EVENT, feedback={"type": "a\0b"})),
    "an unknown field with NUL": ("event", changed(EVENT, feedback=EVENT["feedback"] | {"a\0b": 1})),
    "NaN": ("event", changed(EVENT, received_at=float("nan"))),
    "infinity": ("event", changed(EVENT, received_at=float("inf"))),
    "a number beyond float": ("event", changed(EVENT, received_at=10**400)),
    "half of a surrogate pair": ("event", changed(EVENT, rater="\ud800")),
    "nested too deep": ("event", changed(EVENT)[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a wide event id": ("event", changed(EVENT, event_id=WIDE)),
    "a wide rater": ("event", changed(EVENT, rater=WIDE)),
    "a wide completion id": ("completion", changed(COMPLETION, id=WIDE)),
    "a token id beyond int32": ("completion", changed(COMPLETION, prompt_token_ids=[2**31])),
    "a part beyond int32": ("completion", changed(COMPLETION, part=2**40)),
    "a time without end": ("completion", changed(COMPLETION, created_at=float("inf"))),
}


@pytest.fixture
def store(either_database: Engine) -> Store:
    return Store(either_database)


@pytest.fixture
def letters(either_database: Engine) -> DeadLetters:
    return DeadLetters(either_database)


def only(letters: DeadLetters) -> DeadLetter:
    (letter,) = letters.list()
    return letter


def status(store: Store, event_id: str) -> str:
    found = store.event(event_id)
    assert found is not None
    return found.status


def bury(store: Store, *records: Completion | Event | Entry) -> None:
    """Ingest; records are made unreadable by another schema version."""
    for number, record in enumerate(records):
        found = record if isinstance(record, Entry) else entry(record, number)
        newer = Entry(found.id, found.kind, found.data, found.event_id, found.key_id, "2")
        assert store.ingest([newer]).dead_letters == 1


def test_poison_is_a_dead_letter_and_its_batch_gets_in(store: Store, letters: DeadLetters) -> None:
    for number, (name, (kind, data)) in enumerate(POISON.items()):
        poison = Entry(f"2-{number}", kind, data, f"p{number}", "k1")
        good = entries(completion(f"c{number}"), thumb(f"e{number}", f"c{number}"))
        counts = store.ingest([*good[:1], poison, *good[1:]])
        assert counts == IngestCounts(completions=1, stored=1, dead_letters=1), name
        letter = letters.of_event(f"p{number}")
        assert letter is not None, name
        assert (letter.entry_id, letter.key_id) == (f"2-{number}", "k1")
        assert (letters.data(letter.id), letter.size) == (data, len(data))
        assert letter.reason
        assert "\0" not in letter.kind + letter.reason
        # Delivered again, it is the same letter; replayed as it is, it stays one.
        assert store.ingest([poison]).dead_letters == 0
        with pytest.raises(StillBroken):
            letters.replay(letter.id)
        again = letters.of_event(f"p{number}")
        assert again is not None
        assert again.id == letter.id
        assert store.counts()["dead_letters"] == number + 1


def test_what_only_the_database_refuses_is_a_dead_letter_and_its_batch_gets_in(
    store: Store, letters: DeadLetters
) -> None:
    # A choice number that the completion already has in another part: the schema forbids it, no record does.
    clash = completion("cmpl-1", part=1, n=1).model_copy(update={"choices": completion(n=1).choices})
    batch = entries(completion("cmpl-1", n=1), clash, completion("b"), thumb("e1", "b"))
    counts = store.ingest(batch)
    assert (counts.completions, counts.stored, counts.dead_letters) == (2, 1, 1)
    letter = only(letters)
    assert (letter.entry_id, letter.event_id) == ("1-1", None)
    assert letter.reason.startswith("the database refused it: ")
    with pytest.raises(StillBroken, match="the database refused it: "):
        letters.replay(letter.id)


def test_a_defect_that_only_one_record_meets_is_that_records_affair(
    store: Store, letters: DeadLetters, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(completion: Completion) -> dict[str, Any]:
        if completion.id == "b":
            raise ZeroDivisionError("of ours")
        return original(completion)

    from feedback import intake

    original = intake.completion_row
    monkeypatch.setattr(intake, "completion_row", broken)
    assert store.ingest(entries(completion("a"), completion("b"), thumb("e1", "a"))).dead_letters == 1
    assert status(store, "e1") == "stored"
    assert only(letters).reason == "it can't be stored: ZeroDivisionError: of ours"
    monkeypatch.undo()
    letters.replay(only(letters).id)
    assert store.completion("b") == [completion("b")]


async def test_poison_in_the_stream_blocks_nothing_behind_it_and_leaves_redis_empty(
    redis_server: "RedisServer", store: Store, letters: DeadLetters
) -> None:
    settings = QueueSettings(batch=3)
    client = redis.asyncio.Redis.from_url(redis_server.url)
    queue = FeedbackQueue(client, settings)
    with redis_server.client() as admin:
        for number, (kind, data) in enumerate(POISON.values()):
            fields = {"kind": kind.encode(), "data": data, "event": f"p{number}", "key": "k1"}
            admin.xadd(settings.stream, fields)
            await queue.record([completion(f"c{number}")])
            await queue.submit(thumb(f"e{number}", f"c{number}"))
        admin.xadd(settings.stream, {b"\xff": b"\xff"})
        reader = StreamReader(admin, settings, "a")
        while found := reader.read(0):
            store.ingest(found)
            reader.done(found)
        assert admin.xlen(settings.stream) == 0
        assert admin.keys("*receipt*") == []
    await client.aclose()
    counts = store.counts()
    assert (counts["stored"], counts["dead_letters"]) == (len(POISON), len(POISON) + 1)
    assert all(letters.of_event(f"p{number}") is not None for number in range(len(POISON)))


def test_letters_are_listed_in_pages_newest_first(either_database: Engine) -> None:
    now = [0.0]
    store = Store(either_database, clock=lambda: now[0])
    letters = DeadLetters(either_database)
    for number in range(7):
        now[0] += number % 2  # two at a time
        store.ingest([Entry(f"{number}-0", "event", b"{", f"e{number}")])
    everything = letters.list()
    assert [letter.at for letter in everything] == [3, 3, 2, 2, 1, 1, 0]
    pages, after = [], None
    while page := letters.list(limit=2, after=after):
        pages += page
        after = page[-1].id
    assert pages == everything
    assert letters.list(limit=1) == everything[:1]
    by_event = {letter.event_id: letter.id for letter in everything}
    assert letters.ids() == [by_event[f"e{number}"] for number in range(7)]


def test_a_letter_is_named_by_the_beginning_of_its_id(store: Store, letters: DeadLetters) -> None:
    store.ingest([Entry(f"{number}-0", "event", b"{") for number in range(50)])
    letter = letters.list()[-1]
    assert letters.get(letter.id) == letters.get(letter.id[:10]) == letter
    for name in ("", letter.id[:5], "%" * 10, "0" * 64, letter.id + "0"):
        with pytest.raises(UnknownLetter, match="no dead letter"):
            letters.get(name)


def test_a_fixed_event_is_stored_as_if_it_had_just_come(store: Store, letters: DeadLetters) -> None:
    broken = thumb("e1").model_dump_json().replace('"up"', '"sideways"').encode()
    store.ingest([*entries(completion()), Entry("5-0", "event", broken, "e1", "k1")])
    letter = only(letters)
    assert "sideways" not in letter.reason
    assert letter.reason.startswith("feedback.thumb.value: ")
    good = broken.replace(b'"sideways"', b'"down"')
    wrong = {
        b"{": "Invalid JSON",
        broken: "value",
        good.replace(b'"e1"', b'"e2"'): "event_id: it is e1",
        good.replace(b'"key_id":"k1"', b'"key_id":"k2"'): "key_id: it is k1",
    }
    for data, reason in wrong.items():
        with pytest.raises(StillBroken, match=reason):
            letters.fix(letter.id, data)
    assert only(letters) == letter
    letters.fix(letter.id, good)
    fixed = only(letters)
    assert (fixed.id, fixed.size, fixed.rater) == (letter.id, len(good), "k1/r")
    assert fixed.fixed_at is not None
    assert letters.replay(letter.id) == fixed
    found = store.event("e1")
    assert found is not None
    assert (found.status, found.position) == ("stored", 1)
    assert found.event == thumb("e1", value="down")
    assert letters.list(dropped=True) == []
    with pytest.raises(UnknownLetter):
        letters.replay(letter.id)
    # The entry, delivered once more (ingest died before it could say that it was done), is no letter again.
    assert store.ingest([Entry("5-0", "event", broken, "e1", "k1")]).dead_letters == 0


def test_what_is_of_no_kind_can_be_given_one(store: Store, letters: DeadLetters) -> None:
    store.ingest([Entry("5-0", "", b"{b'junk': b'1'}")])
    data = completion("c1").model_dump_json().encode()
    with pytest.raises(StillBroken, match="neither"):
        letters.fix(only(letters).id, data)
    letters.fix(only(letters).id, data, "completion")
    letters.replay(only(letters).id)
    assert store.completion("c1") == [completion("c1")]


def test_a_replayed_event_does_not_replace_what_its_rater_said_later(
    store: Store, letters: DeadLetters
) -> None:
    store.ingest(entries(completion(), thumb("first", received_at=1.0)))
    bury(store, thumb("second", value="down", received_at=2.0), thumb("fourth", received_at=4.0))
    store.ingest(entries(thumb("third", received_at=3.0)))
    second, fourth = letters.ids()
    before = store.slice(0, 2)
    with pytest.raises(StillBroken, match="schema version '2'"):
        letters.replay(second)
    for id, data in ((second, letters.data(second)), (fourth, letters.data(fourth))):
        letters.fix(id, data)
        letters.replay(id)
    found = {name: store.event(name) for name in ("first", "second", "third", "fourth")}
    assert {name: one and (one.status, one.superseded_by) for name, one in found.items()} == {
        "first": ("superseded", "third"),
        "second": ("superseded", "third"),
        "third": ("superseded", "fourth"),
        "fourth": ("stored", None),
    }
    # A round that was before sees what it saw.
    assert store.slice(0, 2) == before
    assert [one.event_id for one in store.slice(0, 4).events] == ["fourth"]


def test_feedback_on_a_completion_that_is_replayed_counts_even_after_its_time(
    either_database: Engine,
) -> None:
    now = [1000.0]
    store = Store(either_database, waiting_hours=1, clock=lambda: now[0])
    letters = DeadLetters(either_database, waiting_hours=1, clock=lambda: now[0])
    bury(store, completion("a"))
    events = [thumb("old", "a", received_at=1.0), ranking("r", ("a", 0), ("b", 0)), thumb("x", "a", choice=7)]
    store.ingest(entries(*events))
    now[0] += 2 * 3600
    assert store.ingest(entries(thumb("new", "a", received_at=2.0))).rejected == 3
    letter = only(letters)
    letters.fix(letter.id, letters.data(letter.id))
    letters.replay(letter.id)
    assert {name: status(store, name) for name in ("old", "new", "r", "x")} == {
        "old": "superseded",
        "new": "stored",
        "r": "rejected",  # it still waits for the other, for too long
        "x": "rejected",
    }
    counts = store.ingest(entries(completion("b")))
    assert counts == IngestCounts(completions=1, stored=1, resolved=1)
    assert status(store, "r") == "stored"
    positions = sorted(one.position for name in ("old", "new", "r") if (one := store.event(name)))
    assert positions == [1, 2, 3]


def test_a_dropped_letter_is_gone_but_for_its_events_receipt(store: Store, letters: DeadLetters) -> None:
    store.ingest([Entry("5-0", "event", b"{", "e1", "k1"), Entry("5-1", "completion", b"{")])
    ids = {letter.kind: letter.id for letter in letters.list()}
    for id in ids.values():
        letters.drop(id, "nothing can be made of it")
    assert letters.list() == []
    assert letters.ids() == []
    assert store.counts()["dead_letters"] == 0
    (left,) = letters.list(dropped=True)
    assert (left.id, left.size, left.event_id, left.key_id) == (ids["event"], 0, "e1", "k1")
    assert left.reason.endswith("; dropped: nothing can be made of it")
    assert letters.of_event("e1") == left
    for work in (letters.replay, lambda id: letters.fix(id, b"{}"), lambda id: letters.drop(id, "")):
        with pytest.raises(UnknownLetter):
            work(ids["event"])
    # Nor does another delivery of the entry bring it back.
    assert store.ingest([Entry("5-0", "event", b"{", "e1", "k1")]).dead_letters == 0


def test_replays_in_their_order_from_the_queue(store: Store, letters: DeadLetters) -> None:
    """Numbers are compared as numbers: 9-10 comes after 9-9."""
    said = [event(f"e{n}", {"type": "thumb", "completion_id": "a", "value": "up"}) for n in (9, 10, 11)]
    for found in reversed(said):
        number = int(found.event_id[1:])
        bury(store, Entry(f"9-{number}", "event", found.model_dump_json().encode(), found.event_id, "k1"))
    store.ingest(entries(completion("a")))
    for id in letters.ids():
        letters.fix(id, letters.data(id))
        letters.replay(id)
    # All were received at the same moment: the last of them in the queue counts.
    assert [status(store, f"e{n}") for n in (9, 10, 11)] == ["superseded", "superseded", "stored"]


def test_a_database_that_is_away_makes_no_dead_letters(either_database: Engine) -> None:
    store, letters = Store(either_database), DeadLetters(either_database)
    bury(store, thumb("e1"))
    letters.fix(only(letters).id, letters.data(only(letters).id))
    before = only(letters)
    with either_database.begin() as connection:
        connection.execute(sa.text("DROP TABLE event_targets"))
    with pytest.raises(sa.exc.DBAPIError):
        letters.replay(before.id)
    with pytest.raises(sa.exc.DBAPIError):
        store.ingest(entries(thumb("e2")))
    assert only(letters) == before


def test_a_forgotten_raters_letters_go_and_what_it_says_later_is_kept(either_database: Engine) -> None:
    now = [100.0]
    store = Store(either_database, clock=lambda: now[0])
    letters = DeadLetters(either_database, clock=lambda: now[0])
    said = {name: thumb(name, rater="k1/ann", received_at=50.0) for name in ("open", "dropped", "late")}
    bury(store, said["open"], said["dropped"], thumb("bob's", rater="k1/bob", received_at=50.0))
    letters.drop(str(next(one.id for one in letters.list() if one.event_id == "dropped")), "noise")
    store.forgettings.erase(store.forgettings.begin("rater", "k1/ann", actor="test"))
    # Even of a letter that was given up, her name goes.
    assert [one.event_id for one in letters.list(dropped=True)] == ["bob's"]
    late = [entry(said["late"], 7), entry(thumb("later", rater="k1/ann", received_at=150.0), 8)]
    now[0] = 200.0
    for found in late:
        store.ingest([Entry(found.id, "event", found.data, found.event_id, "k1", "2")])
    assert {one.event_id for one in letters.list()} == {"bob's", "later"}
