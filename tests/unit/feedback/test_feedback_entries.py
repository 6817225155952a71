"""Queue entries as they are read: what becomes a record, and what a letter with its reason."""

import json
from typing import Any

import pytest

from feedback import entries
from feedback.entries import parse
from feedback.queue import Entry

EVENT = {
    "event_id": "e1",
    "key_id": "k1",
    "rater": "k1/r",
    "received_at": 2.0,
    "feedback": {"type": "demonstration", "completion_id": "c1", "text": "x"},
}
COMPLETION = {
    "id": "c1",
    "key_id": "k1",
    "endpoint": "chat",
    "created_at": 1.0,
    "messages": [],
    "prompt_token_ids": [1],
    "choices": [{"index": 0, "text": "y", "token_ids": [2], "logprobs": [-1.0]}],
}


def entry(data: bytes, kind: str = "event", **more: Any) -> Entry:
    return Entry("1-1", kind, data, **more)


def said(**changes: Any) -> bytes:
    return json.dumps(EVENT | {"feedback": {**EVENT["feedback"], **changes}}).encode()  # type: ignore[dict-item]


def reason(*found: Entry) -> str:
    (letter,) = parse(found).letters
    return letter.reason


def test_records_are_read_in_their_order() -> None:
    second = json.dumps(EVENT | {"event_id": "e2"}).encode()
    found = parse(
        [
            entry(json.dumps(EVENT).encode()),
            entry(json.dumps(COMPLETION).encode(), "completion"),
            entry(second),
        ]
    )
    assert [event.event_id for event in found.events] == ["e1", "e2"]
    assert [completion.id for completion in found.completions] == ["c1"]
    assert found.letters == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (entry(b""), "Invalid JSON"),
        (entry(b"\xff\xfe{"), "Invalid JSON"),
        (entry(b'{"event_id": "e1"'), "Invalid JSON"),
        (entry(b"[]"), "object"),
        (entry(b"null"), "object"),
        (entry(b"[" * 100_000), "recursion limit"),
        (entry(rb'{"event_id": "\ud800"}'), "hex escape"),
        (entry(rb'{"event_id": "\u0000"' + b"[" * 100_000), ""),
        (entry(said(text=5)), "feedback.demonstration.text: "),
        (entry(said(colour="red")), "feedback.demonstration.colour: Extra"),
        (entry(said(type="clap")), "feedback: Input tag 'clap'"),
        (entry(json.dumps(EVENT | {"received_at": float("nan")}).encode()), "received_at: "),
        (entry(json.dumps(EVENT | {"received_at": 10**400}).encode()), "received_at: "),
        (entry(json.dumps(EVENT | {"event_id": "x" * 201}).encode()), "event_id: "),
        (entry(json.dumps(EVENT | {"rater": "x" * 501}).encode()), "rater: "),
        (entry(json.dumps(COMPLETION | {"id": "x" * 201}).encode(), "completion"), "id: "),
        (entry(json.dumps(COMPLETION | {"created_at": float("inf")}).encode(), "completion"), "created_at: "),
        (
            entry(json.dumps(COMPLETION | {"prompt_token_ids": [2**31]}).encode(), "completion"),
            "prompt_token",
        ),
        (entry(json.dumps(COMPLETION | {"part": 2**31}).encode(), "completion"), "part: "),
        (entry(json.dumps(COMPLETION).encode(), "completions"), "kind 'completions' is neither"),
        (entry(json.dumps(EVENT).encode(), schema="2"), "schema version '2' is unknown: this ingest reads 1"),
    ],
)
def test_what_can_not_be_read_is_a_letter_with_the_reason(found: Entry, words: str) -> None:
    assert words in reason(found)


def test_an_entry_that_is_too_large_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps(EVENT).encode()
    monkeypatch.setattr(entries, "LARGEST_ENTRY_BYTES", len(data))
    assert parse([entry(data)]).events
    (letter,) = parse([entry(data + b" ", event_id="e1", key_id="k1")]).letters
    assert letter.reason.startswith(f"too large: {len(data) + 1} bytes, at most {len(data)}")
    assert (len(letter.data), letter.event_id, letter.key_id) == (len(data), "e1", "k1")


def test_nul_is_replaced_and_an_escaped_backslash_is_left() -> None:
    (event,) = parse([entry(said(text="x\0y", context={"a\0": "\0"}))]).events
    assert event.feedback.text == "x\ufffdy"  # type: ignore[union-attr]
    assert event.feedback.context == {"a\ufffd": "\ufffd"}
    (event,) = parse([entry(said(text=r"\u0000"))]).events
    assert event.feedback.text == r"\u0000"  # type: ignore[union-attr]


def test_numbers_that_json_does_not_have_are_null_but_for_logprobs() -> None:
    nan, infinity = float("nan"), float("inf")
    (event,) = parse([entry(said(text="NaN", context={"a": [nan, 1.5], "b": {"c": -infinity}}))]).events
    assert event.feedback.context == {"a": [None, 1.5], "b": {"c": None}}
    assert event.feedback.text == "NaN"  # type: ignore[union-attr]
    choice = {"index": 0, "text": "y", "token_ids": [2], "logprobs": [-infinity]}
    record = COMPLETION | {"choices": [choice], "messages": [{"a": nan}], "sampling": {"seed": infinity}}
    (completion,) = parse([entry(json.dumps(record).encode(), "completion")]).completions
    assert completion.choices[0].logprobs == [-infinity]
    assert (completion.messages, completion.sampling) == ([{"a": None}], {"seed": None})


def test_a_letter_knows_whose_event_it_is() -> None:
    broken = json.dumps(EVENT | {"feedback": {}}).encode()
    (letter,) = parse([entry(broken)]).letters
    assert (letter.event_id, letter.key_id, letter.rater) == ("e1", "k1", "k1/r")
    # What stands beside the data counts more: it is there even where that is no JSON.
    (letter,) = parse([entry(b"{", event_id="e9", key_id="k9")]).letters
    assert (letter.event_id, letter.key_id, letter.rater) == ("e9", "k9", None)
    (letter,) = parse([entry(json.dumps({"event_id": 5, "rater": "x" * 500}).encode())]).letters
    assert (letter.event_id, letter.key_id, letter.rater) == (None, None, None)
    for name in ("a\0b", "x" * 401):
        (letter,) = parse([entry(b"{", event_id=name, key_id=name)]).letters
        assert (letter.event_id, letter.key_id) == (None, None)
    (letter,) = parse([entry(json.dumps(COMPLETION | {"id": 5}).encode(), "completion")]).letters
    assert letter.key_id is None


def test_what_a_letter_says_of_an_entry_fits_a_database() -> None:
    (letter,) = parse([entry(b"\0", "a\0b" * 1000)]).letters
    assert "\0" not in letter.kind + letter.reason
    assert (len(letter.kind), len(letter.reason)) == (200, 1000)
    assert letter.data == b"\0"
