"""What a new case is made of: what an operator says, and the completion or the feedback that it came from.

Owns the form of that and the way to a case's row; cases are kept by `feedback.cases`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from sqlalchemy.engine import Connection

from feedback import tables
from feedback.events import (
    ChoiceIndex,
    ChoiceRef,
    Demonstration,
    Event,
    Message,
    Ranking,
    Rating,
    Thumb,
    references,
)
from feedback.records import Completion, Name, canonical_json, conversation
from feedback.rows import event_of
from feedback.store import load_completions
from feedback.tombstones import Name as Origin
from feedback.tombstones import completion_names

Text = Annotated[str, Field(min_length=1, max_length=100_000)]

_MESSAGES = TypeAdapter(list[Message])
_LONGEST_PROMPT = 100_000
_TITLE = 60


class BadCase(ValueError):  # noqa: N818
    """What is given makes no case; `field` is to blame."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class UnknownOrigin(BadCase):
    """What a case is to be made from is not in the store."""


class NewCase(BaseModel):
    """What an operator says of a case: its prompt, or where that is to be taken from, and what is good.

    With a completion, its choice is the bad answer; with an event, a demonstration's text, a ranking's first
    and whatever else people liked is the good one, and what they did not like the bad one. `good` and `bad`
    go before these.
    """

    model_config = ConfigDict(extra="forbid")

    title: str = Field("", max_length=200, description="What it is called; by default how its prompt begins")
    messages: Annotated[list[Message], Field(min_length=1, max_length=100)] | None = None
    completion_id: Name | None = Field(None, description="Whose prompt it is, and whose answer was bad")
    choice: ChoiceIndex = Field(0, description="Which of the completion's answers was bad")
    event_id: Name | None = Field(None, description="Feedback whose prompt and answers these are")
    checks: list[dict[str, Any]] = Field(
        [], max_length=20, description="What programs check of an answer, such as {kind: max_words, n: 20}"
    )
    good: Text | None = Field(None, description="An answer that is good")
    bad: Text | None = Field(None, description="An answer that is bad")
    train: bool = Field(False, description="Whether it also becomes feedback that the next round learns from")

    @model_validator(mode="after")
    def _check(self) -> "NewCase":
        if sum(one is not None for one in (self.messages, self.completion_id, self.event_id)) != 1:
            raise ValueError("messages: give one of messages, completion_id and event_id")
        return self


def resolved(connection: Connection, new: NewCase) -> tuple[dict[str, Any], list[Origin]]:
    """Return the row that a new case is, and the names of what it was made from; raises BadCase."""
    good, bad, origins = new.good, new.bad, list[Origin]()
    if new.messages is not None:
        messages = [message.model_dump() for message in new.messages]
    elif new.completion_id is not None:
        part = _part(connection, new.completion_id, new.choice, "completion_id")
        messages, origins = _turns(part, "completion_id"), completion_names(part)
        bad = bad or _text(part, new.choice)
    else:
        assert new.event_id is not None
        event, part_ = _judged(connection, new.event_id)
        messages = _prompt_of(event, part_)
        liked, disliked = _verdict(event, connection)
        good, bad = good or liked, bad or disliked
        judged = [("completion", ref.completion_id) for ref in references(event.feedback)]
        asked = completion_names(part_) if part_ is not None else []
        origins = list(dict.fromkeys([("event", event.event_id), ("rater", event.rater), *judged, *asked]))  # type: ignore[list-item]
    if messages[-1]["role"] != "user":
        raise BadCase("messages", "the last turn has to be the user's")
    row = {
        "title": new.title.strip() or _title(messages),
        "messages": messages,
        "checks": new.checks,
        "good": good or None,
        "bad": bad or None,
    }
    for name, value in row.items():
        _check_text(name, value)
    content = [messages, new.checks, row["good"], row["bad"], origins]
    digest = hashlib.sha256(canonical_json(content).encode()).hexdigest()
    return row | {"id": f"case-{digest[:16]}"}, origins


def _check_text(name: str, value: Any) -> None:
    """Refuse what a database can't hold, and prompts without end; raises BadCase."""
    texts = list(_texts(value))
    if name == "messages" and sum(map(len, texts)) > _LONGEST_PROMPT:
        raise BadCase(name, f"a prompt may have at most {_LONGEST_PROMPT} characters")
    if any("\0" in text for text in texts):
        raise BadCase(name, "a database can't hold the character NUL")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise BadCase(name, "there is half a character in it") from None


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in some JSON, names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _title(messages: Sequence[Mapping[str, str]]) -> str:
    words = " ".join(messages[-1]["content"].split())
    return words if len(words) <= _TITLE else words[: _TITLE - 1] + "…"


def _part(connection: Connection, id: str, choice: int, param: str) -> Completion:
    """Return the part of a completion that has the choice; raises BadCase."""
    parts = load_completions(connection, [id]).get(id, [])
    if not parts:
        raise UnknownOrigin(param, f"there is no record of {id}, or not yet")
    found = [part for part in parts if any(one.index == choice for one in part.choices)]
    if not found:
        raise BadCase("choice", f"{id} has no choice {choice}")
    return found[0]


def _text(part: Completion, choice: int) -> str:
    return next(one.text for one in part.choices if one.index == choice)


def _turns(part: Completion, param: str) -> list[dict[str, str]]:
    turns = conversation(part)
    if turns is None:
        raise BadCase(param, f"the prompt of {part.id} was sent as token ids: give messages")
    try:
        return [message.model_dump() for message in _MESSAGES.validate_python(turns)]
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise BadCase(
            param, f"its prompt is no plain conversation (messages.{where}: {first['msg']})"
        ) from None


def _judged(connection: Connection, event_id: str) -> tuple[Event, Completion | None]:
    """Return an event and the completion that it judges first; raises BadCase."""
    row = connection.execute(
        sa.select(tables.events).where(tables.events.c.event_id == event_id)
    ).one_or_none()
    if row is None:
        raise UnknownOrigin("event_id", f"there is no event {event_id}, or not yet")
    event = event_of(row)
    refs = references(event.feedback)
    return event, _part(connection, refs[0].completion_id, refs[0].choice, "event_id") if refs else None


def _prompt_of(event: Event, part: Completion | None) -> list[dict[str, str]]:
    if part is not None:
        return _turns(part, "event_id")
    assert isinstance(event.feedback, Demonstration)
    return [message.model_dump() for message in event.feedback.messages or []]


def _verdict(event: Event, connection: Connection) -> tuple[str | None, str | None]:
    """Return the texts that the giver of an event found good and bad."""

    def text(ref: ChoiceRef) -> str:
        return _text(_part(connection, ref.completion_id, ref.choice, "event_id"), ref.choice)

    match event.feedback:
        case Demonstration(text=written):
            return written, None
        case Ranking(groups=groups):
            return text(groups[0][0]), text(groups[-1][0]) if len(groups) > 1 else None
        case Thumb() | Rating() as given:
            own = text(ChoiceRef(completion_id=given.completion_id, choice=given.choice))
            liked = given.value == "up" if isinstance(given, Thumb) else given.score > 4
            return (own, None) if liked else (None, own)
    raise AssertionError(f"unknown feedback {event.feedback!r}")
