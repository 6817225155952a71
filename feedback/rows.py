"""How records lie in table rows, both ways. No statements: `intake` writes the rows, `store` reads them."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Row

from feedback.events import FEEDBACK, Event, target
from feedback.records import Choice, Completion, WeightSpan, prompt_hash


def completion_row(completion: Completion) -> dict[str, Any]:
    """Make the row of `completions`."""
    row = completion.model_dump(exclude={"choices"})
    return row | {"prompt_hash": prompt_hash(completion)}


def choice_rows(completion: Completion) -> list[dict[str, Any]]:
    """Make the rows of `choices`."""
    owner = {"completion_id": completion.id, "part": completion.part}
    return [choice.model_dump() | owner for choice in completion.choices]


def event_row(event: Event) -> dict[str, Any]:
    """Make the row of `events`, as far as the event itself decides it."""
    return {
        "event_id": event.event_id,
        "key_id": event.key_id,
        "rater": event.rater,
        "source": event.source,
        "type": event.feedback.type,
        "target": target(event.feedback),
        "feedback": event.feedback.model_dump(mode="json", exclude_defaults=True),
        "received_at": event.received_at,
    }


def event_of(row: Row[Any]) -> Event:
    """Read a row of `events`."""
    return Event(
        event_id=row.event_id,
        key_id=row.key_id,
        rater=row.rater,
        source=row.source,
        received_at=row.received_at,
        feedback=FEEDBACK.validate_python(row.feedback),
    )


def completion_of(row: Row[Any], choices: Iterable[Row[Any]]) -> Completion:
    """Read a row of `completions` and its rows of `choices`."""
    columns = dict(row._mapping)
    del columns["prompt_hash"]
    return Completion(choices=[_choice_of(choice) for choice in choices], **columns)


def _choice_of(row: Row[Any]) -> Choice:
    return Choice(
        index=row._mapping["index"],
        text=row.text,
        token_ids=row.token_ids,
        logprobs=row.logprobs,
        finish_reason=row.finish_reason,
        weight_spans=[WeightSpan.model_validate(span) for span in row.weight_spans],
    )
