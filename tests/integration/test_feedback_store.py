"""The store on SQLite and on Postgres: what is stored, what waits, what replaces what, what a slice is."""

import threading
from typing import Any

import pytest
import sqlalchemy as sa
from feedback_samples import completion, entries, entry, event, ranking, thumb
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.intake import IngestCounts
from feedback.store import ResponseScore, Store


@pytest.fixture
def store(either_database: Engine) -> Store:
    return Store(either_database)


def status(store: Store, event_id: str) -> str:
    found = store.event(event_id)
    assert found is not None
    return found.status


def test_records_come_back_as_they_went_in(store: Store) -> None:
    record = completion("chatcmpl-1", n=3, user=None, sampling={"stop": ["\n"], "seed": 2**40})
    said = event(
        "e1",
        {
            "type": "rating",
            "completion_id": "chatcmpl-1",
            "choice": 2,
            "score": 6,
            "labels": ["hallucination"],
            "comment": "ok – é 😀",
            "context": {"checks": [{"kind": "json"}]},
        },
        received_at=1234567890.123456,
    )
    counts = store.ingest(entries(record, said))
    assert counts == IngestCounts(completions=1, stored=1)
    assert store.completion("chatcmpl-1") == [record]
    found = store.event("e1")
    assert found is not None
    assert (found.event, found.status, found.position) == (said, "stored", 1)
    assert store.completion("chatcmpl-2") == []
    assert store.event("e2") is None


def test_a_second_delivery_changes_nothing(store: Store) -> None:
    batch = entries(completion(), thumb("e1"), thumb("e2", rater="k1/other"), thumb("e1"))
    store.ingest(batch)
    before = (store.head(), store.counts())
    changed = entry(completion(messages=[{"role": "user", "content": "other"}]))
    assert store.ingest([*batch, changed]) == IngestCounts(duplicates=5)
    assert (store.head(), store.counts()) == before
    assert store.completion("chatcmpl-1") == [completion()]


def test_an_event_before_its_completion_waits_and_falls_into_a_later_slice(store: Store) -> None:
    store.ingest(entries(thumb("late", "chatcmpl-2"), completion("chatcmpl-1"), thumb("e1")))
    assert status(store, "late") == "waiting"
    assert store.head() == 1
    assert store.ingest(entries(completion("chatcmpl-2"))) == IngestCounts(
        completions=1, stored=1, resolved=1
    )
    found = store.event("late")
    assert found is not None
    assert (found.status, found.position) == ("stored", 2)
    assert [one.event_id for one in store.slice(1, 2).events] == ["late"]
    assert [one.event.event_id for one in store.events_of("chatcmpl-2")] == ["late"]


def test_a_ranking_waits_for_all_of_its_completions(store: Store) -> None:
    store.ingest(entries(ranking("e1", ("a", 0), ("b", 1), ("c", 0)), completion("a")))
    store.ingest(entries(completion("b")))
    assert status(store, "e1") == "waiting"
    store.ingest(entries(completion("c")))
    assert status(store, "e1") == "stored"
    assert set(store.slice(0, 1).completions) == {"a", "b", "c"}


def test_impossible_events_are_rejected_with_the_reason(store: Store) -> None:
    other = completion("b", prompt_token_ids=[9])
    store.ingest(
        entries(completion("a"), other, thumb("e1", "a", choice=2), ranking("e2", ("a", 0), ("b", 0)))
    )
    for event_id, reason in (("e1", "no choice 2"), ("e2", "one prompt")):
        found = store.event(event_id)
        assert found is not None
        assert found.status == "rejected"
        assert reason in str(found.reason)
        assert found.position is None
    assert store.slice(0, store.head()).events == []


def test_several_prompts_in_one_request_are_parts(store: Store) -> None:
    first, second = (
        completion("cmpl-1", part=part, messages=None, prompt=str(part), prompt_token_ids=[part])
        for part in (0, 1)
    )
    store.ingest(entries(first, thumb("e1", "cmpl-1", choice=3)))
    assert status(store, "e1") == "waiting"
    store.ingest(entries(second))
    assert status(store, "e1") == "stored"
    assert store.completion("cmpl-1") == [first, second]
    assert store.slice(0, 1).completions == {"cmpl-1": [first, second]}


def test_waiting_ends_after_the_given_hours(either_database: Engine) -> None:
    now = [1000.0]
    store = Store(either_database, waiting_hours=2, clock=lambda: now[0])
    store.ingest(entries(thumb("e1", "missing"), thumb("e2", "cmpl-1", choice=9), completion("cmpl-1")))
    now[0] += 2 * 3600 - 1
    store.ingest(entries(completion("x")))
    assert store.counts()["waiting"] == 2
    now[0] += 2
    assert store.ingest(entries(completion("y"))).rejected == 2
    reasons = [found.reason for found in map(store.event, ("e1", "e2")) if found is not None]
    assert reasons == ["no such completion: missing", "completion cmpl-1 has no choice 9"]


def test_the_later_word_of_a_rater_counts_and_history_is_kept(store: Store) -> None:
    store.ingest(entries(completion(), thumb("e1", value="up", received_at=1), thumb("e2", rater="k1/x")))
    assert store.ingest(entries(thumb("e3", value="down", received_at=2))).superseded == 1
    old = store.event("e1")
    assert old is not None
    assert (old.status, old.superseded_by, old.position) == ("superseded", "e3", 1)
    assert [one.event_id for one in store.slice(0, 3).events] == ["e2", "e3"]
    # A round that took its slice before the change of mind can take the same slice again.
    assert [one.event_id for one in store.slice(0, 2).events] == ["e1", "e2"]
    assert [one.event_id for one in store.slice(0, 2, as_of=3).events] == ["e2"]
    assert [one.event.event_id for one in store.events_of("chatcmpl-1")] == ["e1", "e3", "e2"]


def test_the_later_word_counts_also_if_it_comes_first_or_in_the_same_batch(store: Store) -> None:
    store.ingest(entries(completion(), thumb("new", received_at=9.0)))
    store.ingest(entries(thumb("old", received_at=1.0), thumb("oldest", received_at=0.5)))
    assert status(store, "new") == "stored"
    assert {status(store, "old"), status(store, "oldest")} == {"superseded"}
    assert [one.event_id for one in store.slice(0, store.head()).events] == ["new"]
    store.ingest(entries(*[thumb(f"b{i}", received_at=10.0 + i) for i in range(4)]))
    assert [status(store, f"b{i}") for i in range(4)] == ["superseded"] * 3 + ["stored"]
    assert status(store, "new") == "superseded"


def test_other_types_choices_and_raters_do_not_replace_each_other(store: Store) -> None:
    rating = event("e2", {"type": "rating", "completion_id": "chatcmpl-1", "score": 3})
    store.ingest(entries(completion(), thumb("e1"), rating, thumb("e3", choice=1), thumb("e4", rater="k2/r")))
    assert store.counts()["stored"] == 4


def test_a_ranking_of_the_same_responses_replaces_the_earlier_order(store: Store) -> None:
    first, second = ("chatcmpl-1", 0), ("chatcmpl-1", 1)
    store.ingest(entries(completion(), ranking("e1", first, second), ranking("e2", second, first)))
    assert (status(store, "e1"), status(store, "e2")) == ("superseded", "stored")


def test_text_that_postgres_can_not_hold_is_stored_on_both(store: Store) -> None:
    record = completion(choices=[{"index": 0, "text": "a\0b", "token_ids": [0]}])
    said = event("e1", {"type": "demonstration", "completion_id": "chatcmpl-1", "text": "c\0d"})
    store.ingest(entries(record, said))
    assert store.completion("chatcmpl-1")[0].choices[0].text == "a\ufffdb"
    assert store.counts()["dead_letters"] == 0


def test_a_database_without_tables_is_an_error_and_not_a_dead_letter(either_database: Engine) -> None:
    with either_database.begin() as connection:
        connection.execute(sa.text("DROP TABLE event_targets"))
    store = Store(either_database)
    with pytest.raises(sa.exc.DBAPIError):
        store.ingest(entries(completion(), thumb("e1")))
    assert store.counts()["completions"] == 0


def test_batches_larger_than_a_statement(store: Store) -> None:
    records: list[Any] = [completion(f"c{i}", n=1) for i in range(1200)]
    records += [thumb(f"e{i}", f"c{i}") for i in range(1200)]
    assert store.ingest(entries(*records)) == IngestCounts(completions=1200, stored=1200)
    found = store.slice(0, 1200)
    assert [one.event_id for one in found.events] == [f"e{i}" for i in range(1200)]
    assert len(found.completions) == 1200


def test_ingest_from_several_threads_gives_each_event_one_position(either_database: Engine) -> None:
    """Workers share no order; still nothing waits for ever and positions have no gap or double."""
    workers, each = 4, 40

    def work(worker: int) -> None:
        store = Store(either_database)
        for i in range(each):
            # Every event judges what another worker brings.
            records = [
                completion(f"c{worker}-{i}", n=1),
                thumb(f"e{worker}-{i}", f"c{(worker + 1) % workers}-{i}"),
            ]
            store.ingest(entries(*records))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(either_database)
    assert store.counts()["stored"] == workers * each
    with either_database.connect() as connection:
        positions = connection.execute(sa.select(tables.events.c.position)).scalars().all()
    assert sorted(positions) == list(range(1, workers * each + 1)) and store.head() == workers * each


def test_unjudged_are_the_latest_records_that_no_event_speaks_of(store: Store) -> None:
    records = [completion(f"chatcmpl-{i}", created_at=float(i)) for i in range(5)]
    parts = [completion("cmpl-1", part=part, parts=2, created_at=9.0) for part in (0, 1)]
    store.ingest(entries(*records, *parts, thumb("e1", "chatcmpl-4"), thumb("e2", "chatcmpl-2")))
    assert [(one.id, one.part) for one in store.unjudged(3)] == [
        ("cmpl-1", 0),
        ("cmpl-1", 1),
        ("chatcmpl-3", 0),
    ]
    assert store.unjudged(10)[2:] == [records[3], records[1], records[0]]
    assert store.unjudged(0) == []


def test_queries_are_ranked_by_the_mean_spread_and_leave_out_what_a_rater_judged(store: Store) -> None:
    parts = [completion("cmpl-1", part=part, parts=2) for part in (0, 1)]
    store.ingest(entries(completion("a"), completion("b"), *parts))
    scores = [
        ResponseScore("a", 0, 0, 1.0, 0.5),
        ResponseScore("a", 1, 0, 2.0, 0.1),
        ResponseScore("b", 0, 0, -1.0, 0.4),
        ResponseScore("cmpl-1", 0, 0, 0.0, 0.2),
        ResponseScore("cmpl-1", 3, 1, 0.0, 0.6),
        ResponseScore("forgotten", 0, 0, 0.0, 9.0),
    ]
    store.replace_scores(1, [ResponseScore("b", 1, 0, 0.0, 8.0)])
    store.replace_scores(4, scores)
    found = store.queries(10)
    assert [(q.completion.id, q.completion.part, q.round_id) for q in found] == [
        ("cmpl-1", 1, 4),
        ("b", 0, 4),
        ("a", 0, 4),
        ("cmpl-1", 0, 4),
    ]
    assert found[2].spread == pytest.approx(0.3)
    assert found[2].scores == scores[:2]
    assert found[2].completion == completion("a")
    store.ingest(entries(thumb("e1", "b", rater="k1/r"), thumb("e2", "a", rater="k1/other")))
    assert [q.completion.id for q in store.queries(2, "k1/r")] == ["cmpl-1", "a"]
    assert [q.completion.id for q in store.queries(2)] == ["cmpl-1", "b"]
    assert store.queries(0) == []
