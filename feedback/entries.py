"""Reads queue entries: the records that can be stored, and letters of what can't, each with its reason.

Pure: no database and no queue. What becomes of records is `intake`'s, what of letters `dead_letters`'.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from feedback.events import Event
from feedback.queue import Entry
from feedback.records import SCHEMA, Completion
from feedback.submission import LARGEST_ENTRY_BYTES

_NUL = b"\\u0000"
_NOT_FINITE = (b"NaN", b"Infinity")
_LONGEST_REASON = 1000
_LONGEST_NAME = 200


@dataclass(frozen=True, slots=True)
class Letter:
    """An entry that can't be stored, and why; of its giver what is known."""

    entry_id: str
    kind: str
    schema: str
    data: bytes
    reason: str
    event_id: str | None = None
    key_id: str | None = None
    rater: str | None = None


@dataclass(slots=True)
class Parsed:
    """What entries hold, in their order."""

    completions: list[Completion] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)


def parse(entries: Iterable[Entry]) -> Parsed:
    """Read entries; one that can't be read becomes a letter."""
    parsed = Parsed()
    for entry in entries:
        try:
            record = _record(entry)
        except (ValueError, RecursionError) as problem:
            parsed.letters.append(letter(entry, _words(problem)))
            continue
        if isinstance(record, Completion):
            parsed.completions.append(record)
        else:
            parsed.events.append(record)
    return parsed


def letter(entry: Entry, reason: str) -> Letter:
    """Make the letter of an entry: nothing in it is more than a database can hold."""
    # Whoever wrote the entry knew whose it is; its data may not even be JSON.
    beside = {"event_id": entry.event_id, "key_id": entry.key_id}
    named = _envelope(entry) | {name: value for name, value in beside.items() if value is not None}
    # A name that is cut would be another's; without it only operators see the event.
    whole = {name: value for name, value in named.items() if _is_storable(value)}
    return Letter(
        entry_id=entry.id,
        kind=_storable(entry.kind, _LONGEST_NAME),
        schema=_storable(entry.schema, _LONGEST_NAME),
        data=entry.data[:LARGEST_ENTRY_BYTES],
        reason=_storable(reason, _LONGEST_REASON),
        **{name: whole.get(name) for name in ("event_id", "key_id", "rater")},
    )


def _record(entry: Entry) -> Completion | Event:
    """Read one entry; raises ValueError (ValidationError is one) and RecursionError."""
    if len(entry.data) > LARGEST_ENTRY_BYTES:
        size, most = len(entry.data), LARGEST_ENTRY_BYTES
        raise ValueError(f"too large: {size} bytes, at most {most} are taken; its end is not kept")
    if entry.kind not in ("completion", "event"):
        raise ValueError(f"kind {entry.kind!r} is neither completion nor event")
    if entry.schema != SCHEMA:
        raise ValueError(
            f"schema version {entry.schema!r} is unknown: this ingest reads {SCHEMA}; upgrade it, then replay"
        )
    data = _without_nul(entry.data) if _NUL in entry.data else entry.data
    record: Completion | Event
    if entry.kind == "completion":
        record = Completion.model_validate_json(data)
    else:
        record = Event.model_validate_json(data)
    if any(word in data for word in _NOT_FINITE):
        record = _finite(record)
    return record


def _envelope(entry: Entry) -> dict[str, Any]:
    """Find whose event this is, if its JSON says so."""
    if entry.kind != "event" or len(entry.data) > LARGEST_ENTRY_BYTES:
        return {}
    try:
        fields = json.loads(entry.data)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _words(problem: Exception) -> str:
    """Say of a problem where it is and what it is."""
    if isinstance(problem, ValidationError):
        first = problem.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    return str(problem)


def _storable(text: str, longest: int) -> str:
    """Cut a text and replace what Postgres can't hold in one."""
    return text[:longest].replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _is_storable(name: Any) -> bool:
    return isinstance(name, str) and name == _storable(name, 2 * _LONGEST_NAME)


def _without_nul(data: bytes) -> bytes:
    """Replace U+0000 in the strings of a JSON text by U+FFFD: Postgres can't hold it.

    The token ids still say what was sampled. Raises ValueError where the JSON is broken.
    """
    return json.dumps(_replace_nul(json.loads(data))).encode()


def _replace_nul(value: Any) -> Any:
    match value:
        case str():
            return value.replace("\0", "\ufffd")
        case list():
            return [_replace_nul(item) for item in value]
        case dict():
            return {_replace_nul(key): _replace_nul(item) for key, item in value.items()}
    return value


def _finite(record: Completion | Event) -> Completion | Event:
    """Put null for numbers that JSON doesn't have, where a record holds JSON of a caller's own.

    Logprobs are kept as they are: their column is open to infinities.
    """
    if isinstance(record, Completion):
        changes = {"messages": _json(record.messages), "sampling": _json(record.sampling)}
        return record.model_copy(update=changes)
    feedback = record.feedback.model_copy(update={"context": _json(record.feedback.context)})
    return record.model_copy(update={"feedback": feedback})


def _json(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case list():
            return [_json(item) for item in value]
        case dict():
            return {key: _json(item) for key, item in value.items()}
    return value
