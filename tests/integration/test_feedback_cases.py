"""Cases in the database, on SQLite and on Postgres: what they are made from, as feedback, forgotten."""

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from feedback_samples import completion, entries, event, ranking, thumb
from sqlalchemy.engine import Engine

from evaluation.cases import check_case
from feedback import tables
from feedback.cases import RATER, Case, CaseResult, Cases, UnknownCase, training_records
from feedback.events import Demonstration, Ranking
from feedback.forgetting import Forgettings
from feedback.new_case import BadCase, NewCase, UnknownOrigin
from feedback.store import Store

SECRET = "xyzzy-plugh"
CHECKS = [{"kind": "forbidden_words", "words": [SECRET]}]
NOW = 1000.0


@pytest.fixture
def store(either_database: Engine) -> Store:
    return Store(either_database, clock=lambda: NOW)


@pytest.fixture
def add(either_database: Engine) -> Callable[..., Case]:
    def run(**fields: Any) -> Case:
        fields = {"checks": CHECKS} | fields
        if not {"completion_id", "event_id"} & fields.keys():
            fields.setdefault("messages", [{"role": "user", "content": "hello"}])
        new = NewCase.model_validate(fields)
        return Cases(either_database, clock=lambda: NOW).add(new, actor="ann", validate=check_case)

    return run


def forget(engine: Engine, kind: Any, id: str) -> dict[str, int]:
    forgettings = Forgettings(engine, clock=lambda: NOW)
    number = forgettings.begin(kind, id, "ann")
    forgettings.erase(number)
    return dict(forgettings.get(number).counts)


def everything(engine: Engine) -> str:
    with engine.connect() as connection:
        return repr(
            {
                name: [tuple(row) for row in connection.execute(sa.select(table))]
                for name, table in tables.METADATA.tables.items()
            }
        )


def train(store: Store, case: Case, now: float = NOW) -> Case:
    """What `begin_training`, the queue and ingest do."""
    case = Cases(store.engine).begin_training(case.id, again=case.trainings > 0)
    record, events = training_records(case, now)
    store.ingest(entries(record, *events))
    return case


def test_a_case_comes_once_is_removed_and_comes_back(
    either_database: Engine, add: Callable[..., Case]
) -> None:
    cases = Cases(either_database, clock=lambda: NOW + 5)
    one = add(good="fine", title="greets")
    assert add(good="fine", title="another title") == one == cases.get(one.id)
    other = add(good="fine", bad=SECRET)
    assert other.id != one.id
    assert other.title == "hello"
    assert [case.id for case in cases.list()] == sorted([one.id, other.id])
    assert cases.remove(one.id, actor="bob").removed_at == NOW + 5
    assert [case.id for case in cases.list()] == [other.id]
    assert {case.id for case in cases.list(removed=True)} == {one.id, other.id}
    with pytest.raises(UnknownCase):
        cases.remove(one.id, actor="bob")
    assert add(good="fine").removed_at is None
    assert len(cases.list()) == 2
    with pytest.raises(UnknownCase):
        cases.get("case-none")


def test_a_completion_gives_its_prompt_and_its_answer_as_the_bad_one(
    store: Store, add: Callable[..., Case]
) -> None:
    said = {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": "it?"}]}
    store.ingest(entries(completion("c1", messages=[said]), completion("t", messages=None)))
    case = add(completion_id="c1", choice=1, good="fine", checks=[{"kind": "no_digits"}])
    assert case.messages == [{"role": "user", "content": "what is\nit?"}]
    assert (case.good, case.bad) == ("fine", "reply 1")
    assert case.origins == [("completion", "c1"), ("rater", "k1/user:u")]
    for fields, field in (
        ({"completion_id": "nobody"}, "completion_id"),
        ({"completion_id": "c1", "choice": 7}, "choice"),
        ({"completion_id": "t"}, "completion_id"),
        ({"event_id": "nothing"}, "event_id"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages"),
        ({"good": "a\0b"}, "good"),
        ({"train": True}, "train"),
    ):
        with pytest.raises(BadCase) as problem:
            add(**fields)
        assert problem.value.field == field
        assert isinstance(problem.value, UnknownOrigin) == ("no" in str(fields) and "choice" not in fields)


def test_feedback_gives_its_prompt_and_what_it_liked(store: Store, add: Callable[..., Case]) -> None:
    written = {"type": "demonstration", "messages": [{"role": "user", "content": "hi"}], "text": "hello you"}
    store.ingest(
        entries(
            completion("c1"),
            thumb("e1", "c1", choice=1, value="down"),
            event("e2", {"type": "rating", "completion_id": "c1", "choice": 0, "score": 6}),
            ranking("e3", ("c1", 1), ("c1", 0)),
            event("e4", written),
        )
    )
    found = [
        add(event_id=id, checks=[{"kind": "max_words", "n": 9}] if id in "e2 e4" else [])
        for id in ("e2", "e3", "e4")
    ]
    assert [(case.good, case.bad) for case in found] == [
        ("reply 0", None),
        ("reply 1", "reply 0"),
        ("hello you", None),
    ]
    assert found[2].messages == [{"role": "user", "content": "hi"}]
    voted = add(event_id="e1", checks=[{"kind": "no_digits"}])
    assert (voted.good, voted.bad) == (None, "reply 1")
    assert ("event", "e1") in voted.origins
    assert ("rater", "k1/r") in voted.origins


def test_a_case_becomes_a_demonstration_and_a_ranking_and_again_in_place_of_the_first(
    store: Store, either_database: Engine, add: Callable[..., Case]
) -> None:
    case = train(store, add(good="fine", bad=SECRET))
    assert case.event_ids == [f"{case.id}-1-demonstration", f"{case.id}-1-ranking"]
    (record,) = store.completion(case.id)
    assert [choice.text for choice in record.choices] == ["fine", SECRET]
    first = store.slice(0, store.head())
    assert {type(one.feedback) for one in first.events} == {Demonstration, Ranking}
    assert {(one.key_id, one.rater, one.source) for one in first.events} == {("cases", RATER, "cases")}
    assert all((one.feedback.context or {})["checks"] == CHECKS for one in first.events)
    head = store.head()
    again = train(store, case, NOW + 1)
    assert again.trainings == 2
    statuses = [(one.status, one.position) for id in again.event_ids if (one := store.event(id)) is not None]
    assert [status for status, _ in statuses] == ["stored", "stored", "superseded", "superseded"]
    # The new ones are in the next round's slice.
    assert all((position or 0) > head for _, position in statuses[:2])
    # Sending it without `again` is the same training.
    assert Cases(either_database).begin_training(case.id).trainings == 2


def test_a_bad_answer_alone_is_voted_down(store: Store, add: Callable[..., Case]) -> None:
    case = train(store, add(bad=SECRET))
    (event_id,) = case.event_ids
    stored = store.event(event_id)
    assert stored is not None
    assert (stored.status, stored.event.feedback.type) == ("stored", "thumb")


def test_results_of_a_round_are_kept_until_it_tells_them_anew(
    either_database: Engine, add: Callable[..., Case]
) -> None:
    cases = Cases(either_database, clock=lambda: NOW)
    case = add()
    told = CaseResult(case.id, "policy-0002", "policy-0001", "old", False, "new", True)
    cases.record_results(3, [told, CaseResult("case-gone", "a", "b", "", True, "", True)])
    cases.record_results(3, [told])
    (found,) = cases.results(case_id=case.id)
    assert (found.round_id, found.change, found.at) == (3, "fixed", NOW)
    assert cases.results(round_id=4) == []


@pytest.mark.parametrize("kind", ["completion", "asker", "giver", "case"])
def test_forgetting_takes_cases_what_was_answered_to_them_and_what_they_taught(
    either_database: Engine, store: Store, add: Callable[..., Case], kind: str
) -> None:
    said = {"user": "zoe", "messages": [{"role": "user", "content": SECRET}]}
    written = {"type": "demonstration", "completion_id": "c1", "text": f"{SECRET} indeed"}
    store.ingest(entries(completion("c1", **said), event("e1", written, rater="k1/bob"), completion("c2")))
    fields: dict[str, Any] = {"checks": [{"kind": "no_commas"}], "bad": "so, then"}
    case = add(event_id="e1", **fields) if kind == "giver" else add(completion_id="c1", **fields)
    stays = add(completion_id="c2", **fields)
    case, stays = train(store, case), train(store, stays)
    # A case that was made from what another one taught goes with that.
    add(completion_id=case.id, choice=0, **fields)
    results = [CaseResult(one.id, "v2", "v1", SECRET, False, "x", True) for one in (case, stays)]
    Cases(either_database).record_results(1, results[:1])
    # What is still on its way stays out, too.
    late, late_events = training_records(Cases(either_database).begin_training(case.id, again=True), NOW)
    what = {
        "completion": ("completion", "c1"),
        "asker": ("rater", "k1/user:zoe"),
        "giver": ("rater", "k1/bob"),
        "case": ("completion", case.id),
    }[kind]
    assert forget(either_database, *what)["cases"] == 2
    assert [one.id for one in Cases(either_database).list()] == [stays.id]
    store.ingest(entries(late, *late_events))
    assert store.completion(case.id) == []
    assert store.event(late_events[0].event_id) is None
    assert Cases(either_database).results(round_id=1) == []
    assert store.event(stays.event_ids[0]) is not None
    if kind == "completion":
        assert SECRET not in everything(either_database)


def test_a_case_that_was_forgotten_does_not_come_back_unseen(
    either_database: Engine, store: Store, add: Callable[..., Case]
) -> None:
    case = train(store, add(good="fine"))
    forget(either_database, "completion", case.id)
    with pytest.raises(BadCase, match="was forgotten"):
        add(good="fine")
    assert add(good="fine indeed").id != case.id
