"""Records that wait on disk for a queue that is away: a SQLite file, oldest first, with a bound.

All replicas on one data directory share the file; SQLite's locks keep them apart, also on a network file
system (no write-ahead log, which needs shared memory). What `append` has returned is on the disk, fsync'd,
and a writer that was killed leaves nothing half there. When to write and when to replay is the recorder's
affair; a record that is replayed twice is stored once.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from feedback.records import SCHEMA

_BUSY_SECONDS = 5.0
# auto_vacuum: what is replayed leaves the file; secure_delete: and is overwritten, for it is people's texts.
# EXTRA: a commit is also on the disk after a power cut, when the deletion of its journal is not.
_SETTINGS = ("auto_vacuum = FULL", "synchronous = EXTRA", "secure_delete = ON")
# AUTOINCREMENT: no id comes twice, so that what was replayed can be told from what came later.
_TABLE = """
CREATE TABLE IF NOT EXISTS records (
  id INTEGER PRIMARY KEY AUTOINCREMENT, schema TEXT NOT NULL, data BLOB NOT NULL
)
"""


@dataclass(frozen=True, slots=True)
class Spooled:
    """A record in the spool, in version `schema` of its form; ids grow in the order of arrival."""

    id: int
    data: bytes
    schema: str


class Spool:
    """The file at `path`, which comes to be with the first record and takes at most about `limit_bytes`.

    Its methods block, may be called from any thread and raise sqlite3.Error or OSError when the disk fails.
    """

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes

    def append(self, records: Sequence[bytes]) -> int:
        """Keep records, in order, as far as the bound allows; returns how many. The rest is not kept."""
        os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600))
        with self._open() as connection:
            free = self._limit_bytes - _size(connection)
            kept = 0
            for data in records:
                free -= len(data)
                if free < 0:
                    break
                kept += 1
            connection.executemany(
                "INSERT INTO records (schema, data) VALUES (?, ?)",
                [(SCHEMA, data) for data in records[:kept]],
            )
        return kept

    def oldest(self, count: int, after: int = 0) -> list[Spooled]:
        """Return the oldest records, at most `count`, of those with an id above `after`."""
        if not self._path.exists():
            return []
        query = "SELECT id, data, schema FROM records WHERE id > ? ORDER BY id LIMIT ?"
        with self._open() as connection:
            return [Spooled(*row) for row in connection.execute(query, (after, count))]

    def remove(self, through: int) -> None:
        """Forget the records up to and with the id `through`."""
        with self._open() as connection:
            connection.execute("DELETE FROM records WHERE id <= ?", (through,))

    def discard(self, unwanted: Callable[[bytes], bool]) -> int:
        """Forget the records that `unwanted` picks; returns how many. Writers wait meanwhile."""
        if not self._path.exists():
            return 0
        with self._open() as connection:
            picked = [
                (id,) for id, data in connection.execute("SELECT id, data FROM records") if unwanted(data)
            ]
            connection.executemany("DELETE FROM records WHERE id = ?", picked)
        return len(picked)

    def waiting(self) -> int:
        """Count the records, as the span of their ids (what was discarded from their midst counts too)."""
        if not self._path.exists():
            return 0
        with self._open() as connection:
            (count,) = connection.execute("SELECT coalesce(max(id) - min(id) + 1, 0) FROM records").fetchone()
        return int(count)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open a connection in a transaction, which is committed at the end."""
        with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
            for setting in _SETTINGS:
                connection.execute(f"PRAGMA {setting}")
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(_TABLE)
                yield connection


def _size(connection: sqlite3.Connection) -> int:
    """Bytes of the file that hold something."""
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page_bytes)
