"""How events are handed to Redis: what is said of each, the script that takes a group of them, its answers.

Pure: sending it, and what is promised of it, is `feedback.queue`'s.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from feedback.events import Event, body_digest
from feedback.records import SCHEMA
from feedback.settings import QueueSettings

LARGEST_ENTRY_BYTES = 64 * 2**20
"""An event beyond this is refused; what comes into the stream all the same is a dead letter."""

# Takes a group of events, one after the other, in one command: it is read, run and answered once.
# KEYS: stream, then of each event its receipt, and where the giver sent one the idempotency key.
# ARGV: lifetime of idempotency keys in seconds, schema version, then of each event: its id, the key id, the
# event as JSON, digest of what was said, 1 where the giver sent an idempotency key and 0 elsewhere.
# Answers with a letter for each event (queued, duplicate, conflict), and the id of the earlier event for each
# that is not queued.
# The entry comes before any key: if Redis refuses it for lack of memory, nothing claims that it is there.
# A duplicate writes its key again, so that a WAIT behind it also speaks of the write that was first.
SUBMIT = """
local function submit(receipt, idempotency, id, key, data, digest)
  if idempotency then
    local seen = redis.call('GET', idempotency)
    if seen then
      if string.sub(seen, 1, 64) ~= digest then
        return 'c', string.sub(seen, 66)
      end
      redis.call('SET', idempotency, seen, 'KEEPTTL')
      return 'd', string.sub(seen, 66)
    end
  end
  if redis.call('EXISTS', receipt) == 1 then
    redis.call('SET', receipt, key)
    return 'd', id
  end
  redis.call('XADD', KEYS[1], '*', 'kind', 'event', 'data', data, 'event', id, 'key', key, 'schema', ARGV[2])
  redis.call('SET', receipt, key)
  if idempotency then
    redis.call('SET', idempotency, digest .. ':' .. id, 'EX', ARGV[1])
  end
  return 'q'
end

local letters, earlier, k = {}, {}, 2
for i = 3, #ARGV, 5 do
  local receipt, idempotency = KEYS[k], nil
  k = k + 1
  if ARGV[i + 4] == '1' then
    idempotency = KEYS[k]
    k = k + 1
  end
  local letter, id = submit(receipt, idempotency, ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
  table.insert(letters, letter)
  table.insert(earlier, id)
end
return {table.concat(letters), unpack(earlier)}
"""


class EntryTooLarge(ValueError):  # noqa: N818
    """The event is larger than any entry may be."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """An event that is durably queued. `duplicate`: it was already, under this id.

    `conflict`: the idempotency key was used for the event `event_id`, which said something else; nothing was
    queued. Only `submit_batch` answers with it.
    """

    event_id: str
    duplicate: bool
    conflict: bool = False


@dataclass(frozen=True, slots=True)
class Submission:
    """An event on its way to Redis: what `SUBMIT` takes of it."""

    event_id: str
    key_id: str
    data: bytes
    digest: str
    idempotency: str | None


def submission(settings: QueueSettings, event: Event, idempotency_key: str | None) -> Submission:
    """Make ready an event; with an idempotency key its id is made from that. Raises EntryTooLarge."""
    digest, idempotency = body_digest(event), None
    if idempotency_key is not None:
        event = _named(event, idempotency_key, digest)
        idempotency = _idempotency_key(settings, event.key_id, idempotency_key)
    data = event.model_dump_json().encode()
    if len(data) > LARGEST_ENTRY_BYTES:
        raise EntryTooLarge(f"an event may have at most {LARGEST_ENTRY_BYTES} bytes")
    return Submission(event.event_id, event.key_id, data, digest, idempotency)


def divided(given: Sequence[Submission]) -> list[list[Submission]]:
    """Divide a group so that no command is larger than the buffer in which Redis reads it (1 GiB)."""
    commands: list[list[Submission]] = [[]]
    size = 0
    for one in given:
        size += len(one.data)
        if size > LARGEST_ENTRY_BYTES and commands[-1]:
            commands.append([])
            size = len(one.data)
        commands[-1].append(one)
    return commands


def arguments_of(settings: QueueSettings, command: Sequence[Submission]) -> list[str | bytes | int]:
    """Return what EVAL takes after the script: the number of keys, keys, arguments."""
    keys = [settings.stream]
    arguments: list[str | bytes | int] = [max(1, round(settings.idempotency_hours * 3600)), SCHEMA]
    for one in command:
        keys.append(receipt_key(settings, one.event_id))
        if one.idempotency is not None:
            keys.append(one.idempotency)
        arguments += (one.event_id, one.key_id, one.data, one.digest, int(one.idempotency is not None))
    return [len(keys), *keys, *arguments]


def receipts_of(command: Sequence[Submission], letters: str, earlier: Iterator[str]) -> list[Receipt]:
    """Read the script's answer: one receipt for each event, in order."""
    return [
        Receipt(one.event_id, duplicate=False)
        if letter == "q"
        else Receipt(next(earlier), duplicate=letter == "d", conflict=letter == "c")
        for one, letter in zip(command, letters, strict=True)
    ]


def receipt_key(settings: QueueSettings, event_id: str) -> str:
    """Name the key that stands while an event waits in the queue; its value is the giver's key id."""
    return f"{{{settings.stream}}}:receipt:{event_id}"


def _idempotency_key(settings: QueueSettings, key_id: str, idempotency_key: str) -> str:
    return f"{{{settings.stream}}}:idempotency:{_sha256(key_id, idempotency_key)}"


def _named(event: Event, idempotency_key: str, digest: str) -> Event:
    """Give an event the id that every try under its giver's idempotency key has."""
    id = f"fb-{_sha256(event.key_id, idempotency_key, digest)[:32]}"
    return event.model_copy(update={"event_id": id})


def _sha256(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
