"""What must not come back: records of forgotten raters and completions, kept out of a batch by their names.

Owns the names that a record goes by and their digests, which are all that is kept of a name. What writes
tombstones is `forgetting`.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from feedback import tables
from feedback.events import Event, references
from feedback.records import Completion

Kind = Literal["rater", "completion", "event"]
Name = tuple[Kind, str]
Record = TypeVar("Record")

_CHUNK = 500
_USER, _ANONYMOUS = "user:", "anonymous:"


def digest(name: Name) -> str:
    """SHA-256 (hex) of a name. Whoever guesses an id can confirm it; nobody can read it."""
    kind, id = name
    return hashlib.sha256(f"{kind}\0{id}".encode("utf-8", "surrogatepass")).hexdigest()


def rater_of_user(key_id: str, user: str) -> str:
    """Return the rater that an end user of a client's is, in whose name prompts and votes by token come."""
    return f"{key_id}/{_USER}{user}"


def user_of(rater: str) -> tuple[str, str] | None:
    """Return the key id and the end user of a rater who is one."""
    key_id, _, name = rater.partition("/")
    return (key_id, name.removeprefix(_USER)) if name.startswith(_USER) else None


def completion_of(rater: str) -> str | None:
    """Return the one completion of a rater who is known by nothing else."""
    name = rater.partition("/")[2]
    return name.removeprefix(_ANONYMOUS) if name.startswith(_ANONYMOUS) else None


def completion_names(completion: Completion) -> list[Name]:
    """List the names under which a completion can be forgotten."""
    names: list[Name] = [("completion", completion.id)]
    if completion.user:
        names.append(("rater", rater_of_user(completion.key_id, completion.user)))
    return names


def event_names(event: Event) -> list[Name]:
    """List the names under which an event can be forgotten: its own, its giver's, those that it judges."""
    judged: list[Name] = [("completion", ref.completion_id) for ref in references(event.feedback)]
    return [("event", event.event_id), ("rater", event.rater), *judged]


def raw_names(data: bytes) -> list[Name]:
    """List the names in an entry that is not as it should be, as far as they can be read."""
    fields = _raw_fields(data)
    said = fields.get("feedback")
    found: list[tuple[Kind, Any]] = [
        ("completion", fields.get("id")),
        ("event", fields.get("event_id")),
        ("rater", fields.get("rater")),
        ("completion", said.get("completion_id") if isinstance(said, dict) else None),
    ]
    if isinstance(fields.get("key_id"), str) and isinstance(fields.get("user"), str):
        found.append(("rater", rater_of_user(fields["key_id"], fields["user"])))
    return [(kind, id) for kind, id in found if isinstance(id, str)]


def raw_time(data: bytes) -> float | None:
    """Return when such an entry was made, in Unix seconds; None where it does not say."""
    fields = _raw_fields(data)
    at = fields.get("received_at", fields.get("created_at"))
    if not isinstance(at, int | float) or isinstance(at, bool):
        return None
    # NaN would be neither before nor after anything.
    return float(at) if math.isfinite(at) else None


def _raw_fields(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Of which forgetting it is, and the moment up to which it holds for a rater, in Unix seconds."""

    forgetting_id: int
    at: float


class Tombstones:
    """Looks tombstones up over an open transaction.

    `kept_out` has the own name of each record that it kept out, with the tombstone that did; `met` counts
    them by forgetting.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        first = sa.select(tables.tombstones.c.digest).limit(1)
        self.any = connection.execute(first).first() is not None
        self.met: Counter[int] = Counter()
        self.kept_out: dict[Name, Tombstone] = {}

    def among(self, names: Iterable[Name]) -> dict[Name, Tombstone]:
        """Return the tombstones of those names that have one."""
        by_digest = {digest(name): name for name in names} if self.any else {}
        digests, table, found = sorted(by_digest), tables.tombstones, {}
        for start in range(0, len(digests), _CHUNK):
            query = sa.select(table).where(table.c.digest.in_(digests[start : start + _CHUNK]))
            for row in self._connection.execute(query):
                found[by_digest[row.digest]] = Tombstone(row.forgetting_id, row.at)
        return found

    def without(
        self, records: Sequence[Record], names_and_time: Callable[[Record], tuple[list[Name], float | None]]
    ) -> list[Record]:
        """Return the records that are not forgotten. The first of a record's names is its own.

        A rater's tombstone holds for what was made up to its moment, or at a time that nobody knows.
        """
        if not self.any:
            return list(records)
        described = [names_and_time(record) for record in records]
        found = self.among(name for names, _ in described for name in names)
        kept = []
        for record, (names, made_at) in zip(records, described, strict=True):
            hits = [
                found[name]
                for name in names
                if name in found and (name[0] != "rater" or made_at is None or made_at <= found[name].at)
            ]
            if not hits:
                kept.append(record)
                continue
            self.met.update({hit.forgetting_id for hit in hits})
            self.kept_out[names[0]] = hits[0]
        return kept
