"""The loop that moves the stream into the store: read, commit, acknowledge, in this order and no other.

Killed anywhere, it leaves entries that are read again and change nothing if they were committed.
"""

import gc
import logging
import threading

from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from feedback.intake import IngestCounts
from feedback.queue import StreamReader
from feedback.store import Store

_LOG = logging.getLogger(__name__)
_BLOCK_SECONDS = 1.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 10.0


def run(reader: StreamReader, store: Store, stop: threading.Event) -> None:
    """Move entries until `stop` is set; takes up to a second to notice it.

    Redis or a database that is away is waited for, with growing pauses: entries stay in the stream, and are
    acknowledged only after they are committed.
    """
    # What is loaded by now stays: to look it all through for garbage would take longer than the parsing.
    gc.freeze()
    pause_seconds = _FIRST_PAUSE_SECONDS
    while not stop.is_set():
        try:
            counts = _move_batch(reader, store)
        except (RedisError, SQLAlchemyError, OSError) as problem:
            _LOG.warning("ingest waits %.1f s: %s", pause_seconds, problem)
            stop.wait(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)
            continue
        pause_seconds = _FIRST_PAUSE_SECONDS
        if counts.dead_letters:
            _LOG.warning("%d entries could not be stored; see the dead letters", counts.dead_letters)


def _move_batch(reader: StreamReader, store: Store) -> IngestCounts:
    entries = reader.read(_BLOCK_SECONDS)
    if not entries:
        return IngestCounts()
    counts = store.ingest(entries)
    reader.done(entries)
    _LOG.debug("%s", counts)
    return counts
