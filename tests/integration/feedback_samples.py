"""Records for the tests of the queue and the store: as the server makes them, with short ids."""

from typing import Any

from feedback.events import FEEDBACK, Event
from feedback.queue import Entry
from feedback.records import Choice, Completion, WeightSpan


def completion(id: str = "chatcmpl-1", *, n: int = 2, part: int = 0, **changes: Any) -> Completion:
    """`n` choices of two tokens each, numbered over the whole completion."""
    choices = [
        Choice(
            index=part * n + i,
            text=f"reply {part * n + i}",
            token_ids=[i, 2],
            logprobs=[-0.1, -float(i)],
            finish_reason="stop",
            weight_spans=[WeightSpan(version="policy-0001", start=0, end=2)],
        )
        for i in range(n)
    ]
    fields: dict[str, Any] = {
        "id": id,
        "part": part,
        "key_id": "k1",
        "user": "u",
        "endpoint": "/v1/chat/completions",
        "created_at": 100.0,
        "latency_seconds": 0.5,
        "messages": [{"role": "user", "content": "hi"}],
        "prompt_token_ids": [5, 6, 7],
        "sampling": {"n": n, "temperature": 0.7},
        "choices": choices,
    }
    return Completion.model_validate(fields | changes)


def thumb(
    event_id: str, of: str = "chatcmpl-1", *, choice: int = 0, value: str = "up", **changes: Any
) -> Event:
    return event(
        event_id, {"type": "thumb", "completion_id": of, "choice": choice, "value": value}, **changes
    )


def ranking(event_id: str, *refs: tuple[str, int], **changes: Any) -> Event:
    groups = [[{"completion_id": of, "choice": choice}] for of, choice in refs]
    return event(event_id, {"type": "ranking", "groups": groups}, **changes)


def event(event_id: str, feedback: dict[str, Any], **changes: Any) -> Event:
    fields: dict[str, Any] = {"event_id": event_id, "key_id": "k1", "rater": "k1/r", "received_at": 200.0}
    return Event.model_validate(fields | changes | {"feedback": FEEDBACK.validate_python(feedback)})


def entry(record: Completion | Event, number: int = 0) -> Entry:
    """The record as the stream carries it."""
    data = record.model_dump_json().encode()
    if isinstance(record, Completion):
        return Entry(f"1-{number}", "completion", data)
    return Entry(f"1-{number}", "event", data, record.event_id)


def entries(*records: Completion | Event) -> list[Entry]:
    return [entry(record, number) for number, record in enumerate(records)]
