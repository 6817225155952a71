"""What people said of responses: the four feedback types and the envelope that carries one to the store."""

import hashlib
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

from feedback.records import Name, canonical_json

Label = Literal[
    "fails_instruction",
    "violates_constraint",
    "hallucination",
    "inappropriate",
    "harmful_advice",
    "sexual",
    "violent",
    "denigrates",
    "opinion",
    "other",
]
"""The metadata that InstructGPT's labelers gave (Ouyang et al. 2022, table 3)."""

ChoiceIndex = Annotated[int, Field(ge=0, lt=1024)]


class _Common(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    rater: Name | None = None
    comment: Annotated[str, Field(max_length=4000)] | None = None
    labels: list[Label] = []
    context: dict[str, Any] | None = None


class ChoiceRef(BaseModel):
    """Names one choice of one completion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    completion_id: Name
    choice: ChoiceIndex = 0


class Thumb(_Common):
    """Up or down on one choice."""

    type: Literal["thumb"]
    completion_id: Name
    choice: ChoiceIndex = 0
    value: Literal["up", "down"]


class Rating(_Common):
    """Overall quality of one choice on InstructGPT's 1 to 7 scale."""

    type: Literal["rating"]
    completion_id: Name
    choice: ChoiceIndex = 0
    score: Annotated[int, Field(ge=1, le=7)]


class Ranking(_Common):
    """An order of 2 to 9 responses to one prompt, best first; the members of a group are tied."""

    type: Literal["ranking"]
    groups: Annotated[list[Annotated[list[ChoiceRef], Field(min_length=1)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Ranking":
        refs = [(ref.completion_id, ref.choice) for group in self.groups for ref in group]
        if not 2 <= len(refs) <= 9:
            raise ValueError("groups: a ranking orders 2 to 9 responses")
        if len(set(refs)) != len(refs):
            raise ValueError("groups: a response may stand in a ranking only once")
        return self


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Demonstration(_Common):
    """A response that a person wrote: to a completion's prompt, or to `messages`."""

    type: Literal["demonstration"]
    completion_id: Name | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    text: Annotated[str, Field(min_length=1, max_length=100_000)]

    @model_validator(mode="after")
    def _check(self) -> "Demonstration":
        if (self.completion_id is None) == (self.messages is None):
            raise ValueError("completion_id: give either completion_id or messages")
        return self


Feedback = Annotated[Thumb | Rating | Ranking | Demonstration, Field(discriminator="type")]
FEEDBACK: TypeAdapter[Thumb | Rating | Ranking | Demonstration] = TypeAdapter(Feedback)


class Reference(NamedTuple):
    """Names one choice of one completion that an event speaks of."""

    completion_id: str
    choice: int


def references(feedback: Feedback) -> list[Reference]:
    """List the choices that an event speaks of, in its own order; none for a demonstration on `messages`."""
    match feedback:
        case Thumb() | Rating():
            return [Reference(feedback.completion_id, feedback.choice)]
        case Ranking(groups=groups):
            return [Reference(ref.completion_id, ref.choice) for group in groups for ref in group]
        case Demonstration(completion_id=None):
            return []
        case Demonstration(completion_id=str() as completion_id):
            return [Reference(completion_id, 0)]
    raise AssertionError(f"unknown feedback {feedback!r}")


def target(feedback: Feedback) -> str:
    """Name what an event judges in one canonical string: a rater's next event on it replaces the earlier.

    A choice is named in clear; a ranking is the set of its responses in whatever order, and a demonstration
    on `messages` is those messages, both as a digest so that the string stays short enough for an index.
    """
    match feedback:
        case Thumb() | Rating():
            return f"{feedback.completion_id}#{feedback.choice}"
        case Demonstration(completion_id=str() as completion_id):
            return completion_id
        case Demonstration(messages=messages):
            return "messages:" + _digest([message.model_dump() for message in messages or []])
        case Ranking():
            refs = sorted([ref.completion_id, ref.choice] for ref in references(feedback))
            return "choices:" + _digest(refs)
    raise AssertionError(f"unknown feedback {feedback!r}")


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


class Event(BaseModel):
    """A feedback as it was accepted: who gave it, when, and what it says.

    `rater` is the identity that counts for superseding and for per-rater statistics, already in the
    namespace of the key that vouches for it (`<key_id>/<rater>`). `received_at` is in Unix seconds.
    """

    model_config = ConfigDict(frozen=True)

    event_id: Name
    key_id: str
    rater: Annotated[str, Field(max_length=500)]
    source: str = "serving"
    received_at: FiniteFloat
    feedback: Feedback


def body_digest(event: Event) -> str:
    """Digest (SHA-256, hex) what the giver said: equal for a retry of a request, whatever its event id."""
    said = event.feedback.model_dump_json(exclude={"context"})
    # Only what is open to anything may come with its keys in another order.
    context = canonical_json(event.feedback.context)
    framed = "\0".join((event.rater, event.source, said, context))
    return hashlib.sha256(framed.encode("utf-8", "surrogatepass")).hexdigest()
