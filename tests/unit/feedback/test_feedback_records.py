"""Records, events and how they lie in rows: what is equal, what is told apart, what survives the way."""

import math
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy.dialects import sqlite

from feedback.events import (
    FEEDBACK,
    Event,
    Feedback,
    Message,
    Ranking,
    body_digest,
    references,
    target,
)
from feedback.records import Choice, Completion, WeightSpan, prompt_hash
from feedback.tables import Packed

DIALECT = sqlite.dialect()


def completion(**changes: object) -> Completion:
    fields: dict[str, object] = {
        "id": "chatcmpl-1",
        "key_id": "k",
        "endpoint": "/v1/chat/completions",
        "created_at": 1.0,
        "messages": [{"role": "user", "content": "hi"}],
        "choices": [Choice(index=0, text="hello")],
    }
    return Completion.model_validate(fields | changes)


def ranking(*groups: list[tuple[str, int]]) -> Feedback:
    return FEEDBACK.validate_python(
        {"type": "ranking", "groups": [[{"completion_id": c, "choice": i} for c, i in g] for g in groups]}
    )


def event(feedback: Feedback, **changes: object) -> Event:
    fields = {"event_id": "e1", "key_id": "k", "rater": "k/", "received_at": 1.0, "feedback": feedback}
    return Event.model_validate(fields | changes)


def test_the_tokens_are_the_prompt_when_there_are_some() -> None:
    a = completion(prompt_token_ids=[1, 2], messages=[{"role": "user", "content": "a"}])
    b = completion(prompt_token_ids=[1, 2], messages=[{"role": "user", "content": "b"}])
    assert prompt_hash(a) == prompt_hash(b)
    assert prompt_hash(a) != prompt_hash(completion(prompt_token_ids=[1, 2, 3]))
    assert prompt_hash(a) != prompt_hash(completion(prompt_token_ids=[12]))


def test_messages_are_compared_whatever_the_order_of_their_keys() -> None:
    a = completion(messages=[{"role": "user", "content": "a"}])
    assert prompt_hash(a) == prompt_hash(completion(messages=[{"content": "a", "role": "user"}]))
    assert prompt_hash(a) != prompt_hash(completion(messages=[{"role": "system", "content": "a"}]))


def test_a_text_prompt_is_not_the_tokens_or_messages_that_read_like_it() -> None:
    hashes = {
        prompt_hash(completion(messages=None, prompt="[1]")),
        prompt_hash(completion(messages=None, prompt_token_ids=[1])),
        prompt_hash(completion(messages=[])),
        prompt_hash(completion(messages=None, prompt="[]")),
    }
    assert len(hashes) == 4


@given(
    logprobs=st.lists(st.floats(allow_nan=False)),
    text=st.text(),
    token_ids=st.lists(st.integers(0, 2**31 - 1)),
)
def test_a_completion_survives_the_queue(logprobs: list[float], text: str, token_ids: list[int]) -> None:
    span = WeightSpan(version="policy-0001", start=0, end=1)
    choice = Choice(index=0, text=text, token_ids=token_ids, logprobs=logprobs, weight_spans=[span])
    record = completion(choices=[choice], sampling={"temperature": 0.7})
    assert Completion.model_validate_json(record.model_dump_json(exclude_defaults=True)) == record


@given(st.lists(st.floats(allow_nan=False)), st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packed_columns_are_exact(floats: list[float], ints: list[int]) -> None:
    for column, values in ((Packed("d"), floats), (Packed("i"), ints)):
        stored = column.process_bind_param(values, DIALECT)
        assert column.process_result_value(stored, DIALECT) == values


def test_packed_columns_are_little_endian_and_refuse_what_does_not_fit() -> None:
    assert Packed("i").process_bind_param([1], DIALECT) == b"\1\0\0\0"
    assert array("d", [1.0]).itemsize == 8
    with pytest.raises(OverflowError):
        Packed("i").process_bind_param([2**31], DIALECT)
    stored = Packed("d").process_bind_param([-math.inf], DIALECT)
    assert Packed("d").process_result_value(stored, DIALECT) == [-math.inf]


@given(st.permutations([("a", 0), ("a", 1), ("b", 0), ("c", 7)]), st.integers(1, 3))
def test_a_ranking_judges_the_same_responses_in_whatever_order(
    order: list[tuple[str, int]], cut: int
) -> None:
    assert target(ranking(order[:cut], order[cut:])) == target(
        ranking([("a", 0), ("a", 1), ("b", 0), ("c", 7)])
    )
    assert target(ranking(order[:3])) != target(ranking(order))


def test_targets_are_told_apart_and_fit_an_index() -> None:
    long = "c" * 200
    said = [
        {"type": "thumb", "completion_id": "a", "choice": 0, "value": "up"},
        {"type": "thumb", "completion_id": "a", "choice": 1, "value": "up"},
        {"type": "demonstration", "completion_id": "a", "text": "x"},
        {"type": "demonstration", "messages": [{"role": "user", "content": "a"}], "text": "x"},
        {"type": "demonstration", "messages": [{"role": "user", "content": "b"}], "text": "x"},
        {"type": "rating", "completion_id": long, "choice": 1023, "score": 7},
    ]
    targets = [target(FEEDBACK.validate_python(one)) for one in said]
    assert len(set(targets)) == len(said)
    assert max(len(name) for name in targets) <= 210


def test_what_a_rater_replaces_does_not_depend_on_the_verdict() -> None:
    up, down = (
        FEEDBACK.validate_python({"type": "thumb", "completion_id": "a", "value": value})
        for value in ("up", "down")
    )
    assert target(up) == target(down)


def test_a_retry_has_the_same_digest_and_another_event_has_not() -> None:
    first = event(ranking([("a", 0)], [("a", 1)]))
    retry = event(ranking([("a", 0)], [("a", 1)]), event_id="e2", received_at=9.0)
    other = event(ranking([("a", 1)], [("a", 0)]))
    assert body_digest(first) == body_digest(retry)
    assert len({body_digest(first), body_digest(other), body_digest(event(first.feedback, rater="k/x"))}) == 3


def test_references_are_in_the_order_of_the_ranking() -> None:
    refs = references(ranking([("b", 1)], [("a", 0), ("c", 2)]))
    assert [(ref.completion_id, ref.choice) for ref in refs] == [("b", 1), ("a", 0), ("c", 2)]
    told = FEEDBACK.validate_python(
        {"type": "demonstration", "messages": [Message(role="user", content="a")], "text": "b"}
    )
    assert references(told) == []


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ([[("a", 0)]], "2 to 9"),
        ([[("a", 0)], [("a", 0)]], "only once"),
        ([[("a", i)] for i in range(10)], "2 to 9"),
    ],
)
def test_impossible_rankings(groups: list[list[tuple[str, int]]], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        ranking(*groups)
    assert isinstance(ranking([("a", 0), ("a", 1)]), Ranking)
