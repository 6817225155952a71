"""Turns what a caller says into an Event, or refuses it: who may say what about which completion.

Pure, but for looking a completion up through `Lookup`; queueing and HTTP are `server.routes_feedback`'s.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from feedback.events import FEEDBACK, Event, Feedback, Ranking, Reference, references
from feedback.records import Completion
from server.context import Caller
from server.errors import Problem, invalid_field
from server.identity import SHADOW_OWNER, Identity, Issued, TokenClaims, rater_of_key, rater_of_token

Lookup = Callable[[str], list[Completion]]
"""Gives the stored parts of a completion, [] while there are none; it may block."""


def event_from(
    fields: Mapping[str, Any],
    caller: Caller,
    identity: Identity,
    *,
    event_id: str | None = None,
) -> Event:
    """Make the event that `caller` gives. Raises Problem 403, 404 or 422 (naming the field)."""
    try:
        feedback = FEEDBACK.validate_python(dict(fields), strict=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise Problem(422, str(first["msg"]), param="type") from None
        raise invalid_field(first, skip=1) from None
    if feedback.rater is not None and caller.role != "client":
        raise Problem(422, "only a client's key may name a rater", param="rater")
    _check_references(feedback, caller, identity)
    event = Event(
        event_id=event_id or new_event_id(),
        key_id=caller.key_id,
        rater=rater_of(caller, feedback.rater),
        received_at=time.time(),
        feedback=feedback,
    )
    if feedback.context is not None:
        _check_readable(event)
    return event


def new_event_id() -> str:
    """Return a fresh event id."""
    return f"fb-{uuid.uuid4().hex}"


def rater_of(caller: Caller, named: str | None = None) -> str:
    """Under whose identity a caller's events count; `named` is an end user whom a client names."""
    if caller.role == "token":
        assert caller.completion_id is not None
        return rater_of_token(caller.key_id, TokenClaims(caller.completion_id, caller.user))
    return rater_of_key(caller.key_id, named)


def check_owner(
    completion_id: str, caller: Caller, identity: Identity, *, param: str | None = None
) -> Issued:
    """Return what the id says. Raises Problem 404 if it was never issued, 403 if not to this caller."""
    issued = identity.issued(completion_id)
    # What a shadow answered was given to nobody: for everybody there is no such completion.
    if issued is None or issued.key_id == SHADOW_OWNER:
        raise Problem(404, f"no such completion: {completion_id}", param=param)
    if caller.role == "client" and issued.key_id != caller.key_id:
        raise Problem(403, "this completion was given to another client", param=param)
    if caller.role == "token" and completion_id != caller.completion_id:
        raise Problem(403, "this feedback token is for another completion", param=param)
    return issued


def _check_readable(event: Event) -> None:
    """Refuse what ingest would not be able to read: what is accepted must not become a dead letter."""
    try:
        Event.model_validate_json(event.model_dump_json())
    except ValueError as error:
        # Only `context` is open to anything: it may be nested beyond what the parser follows.
        raise Problem(422, f"it can't be read again: {error}", param="context") from None


def open_references(feedback: Feedback, identity: Identity) -> bool:
    """Whether it speaks of a completion whose id, which was issued, does not say how many choices it has."""
    return not all(identity.is_counted(ref.completion_id) for ref in references(feedback))


def check_recorded(feedback: Feedback, lookup: Lookup) -> None:
    """Raise Problem 422 for a choice that is not in the records, where these are complete."""
    stored: dict[str, list[Completion]] = {}
    for ref, path in _located(feedback):
        if ref.completion_id not in stored:
            stored[ref.completion_id] = lookup(ref.completion_id)
        parts = stored[ref.completion_id]
        if _complete(parts) and all(choice.index != ref.choice for part in parts for choice in part.choices):
            raise _no_such_choice(ref, path)


def _check_references(feedback: Feedback, caller: Caller, identity: Identity) -> None:
    found = _located(feedback)
    if not found and caller.role == "token":
        raise Problem(403, "a feedback token is for its completion only", param="completion_id")
    for ref, path in found:
        issued = check_owner(ref.completion_id, caller, identity, param=f"{path}completion_id")
        if issued.choices is not None and ref.choice >= issued.choices:
            raise _no_such_choice(ref, path)


def _no_such_choice(ref: Reference, path: str) -> Problem:
    return Problem(422, f"{ref.completion_id} has no choice {ref.choice}", param=f"{path}choice")


def _complete(parts: list[Completion]) -> bool:
    """Whether all records of a completion are there, so that a missing choice will not come any more."""
    return bool(parts) and len(parts) >= (parts[0].parts or 1)


def _located(feedback: Feedback) -> list[tuple[Reference, str]]:
    """Each reference with where it stands in the event, as errors name it: `groups.0.1.` or nothing."""
    if isinstance(feedback, Ranking):
        return [
            (Reference(ref.completion_id, ref.choice), f"groups.{i}.{j}.")
            for i, group in enumerate(feedback.groups)
            for j, ref in enumerate(group)
        ]
    return [(ref, "") for ref in references(feedback)]
