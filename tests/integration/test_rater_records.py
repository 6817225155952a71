"""Raters on SQLite and on Postgres: the log of quarantine, gold questions, votes as of a position."""

import threading

import pytest
from feedback_samples import completion, entries, event, ranking, thumb
from sqlalchemy.engine import Engine

from feedback.rater_records import RaterConflict, RaterLogEntry, UnknownRater, UnsuitableGold
from feedback.rater_report import agreement_report, raters_report
from feedback.records import prompt_hash
from feedback.settings import RaterSettings
from feedback.store import ResponseScore, Store
from feedback.votes import Vote

SETTINGS = RaterSettings()


@pytest.fixture
def store(either_database: Engine) -> Store:
    return Store(either_database, clock=lambda: 50.0)


def test_quarantine_is_confirmed_and_lifted_and_everything_is_remembered(store: Store) -> None:
    store.ingest(entries(completion(), thumb("e1", rater="k1/a"), thumb("e2", rater="k1/b")))
    raters = store.raters
    assert (raters.states(), raters.quarantined(), raters.state("k1/a")) == ({}, [], None)
    raters.quarantine("k1/a", actor="trainer", reason="contrary")
    assert (raters.quarantined(), raters.state("k1/a")) == (["k1/a"], "quarantined")
    raters.confirm("k1/a", actor="op", reason="seen")
    raters.quarantine("k1/b", actor="op", reason="spam")
    assert raters.quarantined() == ["k1/a", "k1/b"]
    raters.lift("k1/a", actor="op", reason="my mistake")
    assert (raters.quarantined(), raters.state("k1/a")) == (["k1/b"], "lifted")
    raters.quarantine("k1/a", actor="op", reason="again")
    assert raters.log("k1/a") == [
        RaterLogEntry(1, 50.0, "k1/a", "quarantine", "trainer", "contrary"),
        RaterLogEntry(2, 50.0, "k1/a", "confirm", "op", "seen"),
        RaterLogEntry(4, 50.0, "k1/a", "lift", "op", "my mistake"),
        RaterLogEntry(5, 50.0, "k1/a", "quarantine", "op", "again"),
    ]
    assert [entry.sequence for entry in raters.log(limit=2)] == [4, 5]
    assert {rater: last.state for rater, last in raters.states().items()} == {
        "k1/a": "quarantined",
        "k1/b": "quarantined",
    }


@pytest.mark.parametrize(
    ("before", "move"),
    [
        ((), "confirm"),
        ((), "lift"),
        (("quarantine",), "quarantine"),
        (("quarantine", "confirm"), "quarantine"),
        (("quarantine", "confirm"), "confirm"),
        (("quarantine", "lift"), "lift"),
        (("quarantine", "lift"), "confirm"),
    ],
)
def test_moves_that_can_t_be_are_refused(store: Store, before: tuple[str, ...], move: str) -> None:
    store.ingest(entries(completion(), thumb("e1", rater="k1/a")))
    for made in before:
        getattr(store.raters, made)("k1/a", actor="op", reason="")
    with pytest.raises(RaterConflict, match="k1/a is "):
        getattr(store.raters, move)("k1/a", actor="op", reason="")
    assert len(store.raters.log()) == len(before)
    with pytest.raises(UnknownRater, match="nobody"):
        store.raters.quarantine("nobody", actor="op", reason="")


def test_of_those_who_quarantine_a_rater_at_once_one_does(either_database: Engine) -> None:
    Store(either_database).ingest(entries(completion(), thumb("e1", rater="k1/a")))
    done: list[str] = []

    def act(number: int) -> None:
        try:
            Store(either_database).raters.quarantine("k1/a", actor=f"op{number}", reason="")
            done.append("done")
        except RaterConflict:
            done.append("refused")

    threads = [threading.Thread(target=act, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == ["done"] + ["refused"] * 5
    assert [entry.sequence for entry in Store(either_database).raters.log()] == [1]


def test_gold_questions_are_verdicts_that_counted(store: Store) -> None:
    demonstration = {"type": "demonstration", "completion_id": "chatcmpl-1", "text": "better"}
    store.ingest(
        entries(
            completion(),
            thumb("e1", received_at=1),
            event("e2", demonstration),
            thumb("e3", choice=9, rater="k1/x"),
            thumb("e4", "missing"),
        )
    )
    raters = store.raters
    first = raters.add_gold("e1", actor="op", reason="sure")
    assert raters.add_gold("e1", actor="other", reason="again") == first
    assert raters.gold() == [first]
    assert (first.event.event_id, first.at, first.actor, first.reason) == ("e1", 50.0, "op", "sure")
    for event_id, why in (("e2", "demonstration"), ("e3", "rejected"), ("e4", "waiting"), ("e5", "no event")):
        with pytest.raises(UnsuitableGold, match=why):
            raters.add_gold(event_id, actor="op", reason="")
    store.ingest(entries(thumb("e6", value="down", received_at=2)))
    # Its giver thought better of it; the operator did not.
    assert [vote.verdicts for vote in raters.votes_of_events(["e1"])] == [{("chatcmpl-1#0",): "+"}]
    assert store.gold_completions() == [completion()]
    assert raters.remove_gold("e1")
    assert not raters.remove_gold("e1")
    assert raters.gold() == []


def test_votes_are_those_that_counted_at_a_position(store: Store) -> None:
    other = completion("cmpl-1", part=1, parts=2, messages=None, prompt="b", prompt_token_ids=[9])
    first = completion("cmpl-1", part=0, parts=2, messages=None, prompt="a", prompt_token_ids=[8])
    store.ingest(
        entries(
            completion(),
            first,
            other,
            thumb("e1", received_at=1),
            ranking("e2", ("cmpl-1", 3), ("cmpl-1", 2), rater="k2/b"),
            event("e3", {"type": "demonstration", "completion_id": "chatcmpl-1", "text": "x"}),
            thumb("e4", value="down", received_at=2),
        )
    )
    first_vote = Vote(
        "e1", "k1/r", "k1", prompt_hash(completion()), {("chatcmpl-1#0",): "+"}, task="thumb", at=1.0
    )
    pair = {("cmpl-1#2", "cmpl-1#3"): "-"}
    second = Vote("e2", "k2/b", "k2", prompt_hash(other), pair, task="ranking", at=200.0)  # type: ignore[arg-type]
    assert store.raters.votes(3, 10) == [first_vote, second]
    assert [vote.id for vote in store.raters.votes(4, 10)] == ["e2", "e4"]
    assert [vote.id for vote in store.raters.votes(4, 1)] == ["e4"]
    assert store.raters.votes(0, 10) == []


def _rankings(store: Store, wanted: dict[str, str], count: int = 40) -> None:
    """Each rater ranks two answers to each of many prompts: `right`, `wrong` or by turns."""
    records = [completion(f"c{n}", prompt_token_ids=[n, 7]) for n in range(count)]
    said = []
    for rater, how in wanted.items():
        for n in range(count):
            right = how == "right" or (how == "turns" and n % 2)
            refs = [(f"c{n}", 0), (f"c{n}", 1)] if right else [(f"c{n}", 1), (f"c{n}", 0)]
            said.append(ranking(f"{rater}-{n}", *refs, rater=rater, received_at=86_400.0 * n))
    store.ingest(entries(*records, *said))


def test_the_report_puts_first_who_waits_for_an_operator(store: Store) -> None:
    careful = {f"k/{name}": "right" for name in "abcde"}
    _rankings(store, careful | {"k/contrary": "wrong", "k/guess": "turns"})
    found = raters_report(store.raters, store.head(), SETTINGS)
    assert [row["rater"] for row in found[:2]] == ["k/contrary", "k/a"]
    contrary = found[0]
    assert contrary["state"] == "active"
    assert contrary["suspicions"][0].startswith("It says the contrary of 6 others")
    assert (contrary["votes"], contrary["judged"], contrary["agreement"] < 0.1) == (40, 40, True)
    assert contrary["bradley_terry"] < 0.3 < found[1]["bradley_terry"]
    by_rater = {row["rater"]: row for row in found}
    assert by_rater["k/guess"]["reliability"] < 0.3 < by_rater["k/a"]["reliability"]
    store.raters.quarantine("k/guess", actor="op", reason="random")
    found = raters_report(store.raters, store.head(), SETTINGS)
    assert [(row["rater"], row["state"], row["reason"]) for row in found[:2]] == [
        ("k/guess", "quarantined", "random"),
        ("k/contrary", "active", None),
    ]
    store.raters.confirm("k/guess", actor="op", reason="sure")
    assert raters_report(store.raters, store.head(), SETTINGS)[0]["rater"] == "k/contrary"


def test_the_report_tells_agreement_by_task_and_over_time_without_the_quarantined(store: Store) -> None:
    _rankings(store, {"k/a": "right", "k/b": "right", "k/bad": "wrong"}, count=14)
    found = agreement_report(store.raters, store.head(), SETTINGS, days=7)
    assert found["all"]["share"] == pytest.approx(1 / 3)
    store.raters.quarantine("k/bad", actor="op", reason="")
    found = agreement_report(store.raters, store.head(), SETTINGS, days=7)
    assert (found["all"]["share"], found["all"]["pairs"]) == (1.0, 14)
    assert list(found["by_task"]) == ["ranking"]
    assert {start: own["pairs"] for start, own in found["over_time"].items()} == {
        "1970-01-01": 7,
        "1970-01-08": 7,
    }


def test_gold_questions_are_among_what_a_rater_is_asked(store: Store) -> None:
    store.ingest(entries(*(completion(f"c{n:02}", prompt_token_ids=[n]) for n in range(30))))
    store.replace_scores(
        1, [ResponseScore(f"c{n:02}", choice, 0, 0.0, 1 - n / 100) for n in range(30) for choice in (0, 1)]
    )
    gold = ["c25", "c27", "c29"]
    store.ingest(entries(*(ranking(f"g{id}", (id, 0), (id, 1), rater="staff/x") for id in gold)))
    for id in gold:
        store.raters.add_gold(f"g{id}", actor="op", reason="")
    plain = [query.completion.id for query in store.queries(10, "k/r")]
    assert plain == [f"c{n:02}" for n in range(10)]
    asked = store.queries(10, "k/r", 0.2)
    ids = [query.completion.id for query in asked]
    assert len(set(ids)) == 10
    assert len(set(ids) & set(gold)) == 2
    # Nothing about them stands out: they lie where their own spread puts them.
    assert [query.spread for query in asked] == sorted((query.spread for query in asked), reverse=True)
    assert store.queries(10, "k/r", 0.2) == asked
    other = [query.completion.id for query in store.queries(10, "k/s", 0.2)]
    assert len(set(other) & set(gold)) == 2
    # One at a time, every fifth is one; what was answered is not asked again, and not who gave the answer.
    met = []
    for number in range(12):
        (query,) = store.queries(1, "k/r", 0.2)
        met.append(query.completion.id)
        refs = [(query.completion.id, 0), (query.completion.id, 1)]
        store.ingest(entries(ranking(f"a{number}", *refs, rater="k/r")))
    assert len(set(met)) == 12
    assert [id in gold for id in met] == [number % 5 == 4 for number in range(12)]
    assert not {query.completion.id for query in store.queries(20, "staff/x", 0.2)} & set(gold)
    assert [query.completion.id for query in store.queries(3)] == ["c00", "c01", "c02"]
