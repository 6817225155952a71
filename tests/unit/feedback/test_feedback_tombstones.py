"""By what names records are forgotten, also where they come damaged."""

import json

from feedback.events import FEEDBACK, Event
from feedback.records import Choice, Completion
from feedback.tombstones import (
    completion_names,
    completion_of,
    digest,
    event_names,
    rater_of_user,
    raw_names,
    raw_time,
    user_of,
)
from server.identity import TokenClaims, rater_of_key, rater_of_token


def test_names_of_raters_are_those_that_the_server_gives() -> None:
    by_token = rater_of_token("k1", TokenClaims("chatcmpl-1", "ann"))
    assert rater_of_user("k1", "ann") == by_token
    assert user_of(by_token) == ("k1", "ann")
    nameless = rater_of_token("k1", TokenClaims("chatcmpl-1", None))
    assert (user_of(nameless), completion_of(nameless)) == (None, "chatcmpl-1")
    named = rater_of_key("k1", "ann")
    assert (user_of(named), completion_of(named)) == (None, None)
    # A slash in a user's name is a part of it.
    assert user_of(rater_of_user("k1", "a/user:b")) == ("k1", "a/user:b")


def test_names_of_records() -> None:
    completion = Completion(
        id="c1", key_id="k1", user="ann", endpoint="e", created_at=1.0, choices=[Choice(index=0, text="x")]
    )
    assert completion_names(completion) == [("completion", "c1"), ("rater", "k1/user:ann")]
    groups = [[{"completion_id": "c1", "choice": 0}], [{"completion_id": "c2", "choice": 0}]]
    event = Event(
        event_id="e1",
        key_id="k1",
        rater="k1/r",
        received_at=1.0,
        feedback=FEEDBACK.validate_python({"type": "ranking", "groups": groups}),
    )
    assert event_names(event) == [
        ("event", "e1"),
        ("rater", "k1/r"),
        ("completion", "c1"),
        ("completion", "c2"),
    ]
    # What can't be parsed as a record is known by what can be read of it.
    broken = completion.model_dump(mode="json") | {"choices": 3}
    assert {("completion", "c1"), ("rater", "k1/user:ann")} <= set(raw_names(json.dumps(broken).encode()))
    broken = event.model_dump(mode="json") | {"feedback": {"completion_id": "c1"}}
    assert set(raw_names(json.dumps(broken).encode())) >= {
        ("rater", "k1/r"),
        ("completion", "c1"),
        ("event", "e1"),
    }
    for data in (b"{", b"3", b"\xff", b"[" * 100_000, b'{"id": 3, "feedback": []}'):
        assert raw_names(data) == []


def test_digests_tell_kinds_apart_and_take_any_text() -> None:
    assert digest(("rater", "a")) != digest(("completion", "a"))
    assert len(digest(("rater", "\ud800"))) == 64


def test_when_an_entry_was_made_that_is_not_as_it_should_be() -> None:
    said = {"received_at": 5.5, "created_at": 4}
    assert raw_time(json.dumps(said).encode()) == 5.5
    assert raw_time(b'{"created_at": 4}') == 4
    for data in (
        b"{",
        b"[5]",
        b"{}",
        b'{"received_at": "5"}',
        b'{"received_at": true}',
        b'{"received_at": NaN}',
    ):
        assert raw_time(data) is None
