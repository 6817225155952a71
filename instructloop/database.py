"""Opens the database and brings it to the newest schema. What is kept in it is `feedback`'s and `registry`'s.

SQLite and Postgres behave alike here: a transaction that `engine.begin()` opens may write and holds the
write lock from its start, unless the engine was marked with `execution_options(read_only=True)`. With
`one_statement=True` beside it, SQLite is spared the BEGIN: for reads that are made very often.
"""

import sqlite3
import time
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url

_BUSY_SECONDS = 30
# A Postgres that vanished without a word is given up after so long.
_CONNECT_SECONDS = 5
_SILENCE_SECONDS = 10
_POOL_SECONDS = 5.0
# Any constant will do, as long as no other application in the same Postgres database takes the same one.
_MIGRATION_LOCK = 0x1257_0C71_00B5


class UnsupportedDatabase(ValueError):  # noqa: N818
    """The URL names neither SQLite nor Postgres."""


def connect(url: str) -> Engine:
    """Open `sqlite:///path` or `postgresql://user@host/name`; no connection is made yet.

    Raises UnsupportedDatabase. A SQLite database must be a file, since several processes share it.
    """
    # Statements are logged without what they carry: feedback and prompts.
    parsed = make_url(url)
    match parsed.get_backend_name():
        case "sqlite":
            return _sqlite(parsed)
        case "postgresql":
            return _postgres(parsed)
    raise UnsupportedDatabase(f"{parsed.get_backend_name()!r}: the database is sqlite:///… or postgresql://…")


def migrate(engine: Engine) -> None:
    """Bring the database to the newest schema, all or nothing; processes that do it at once take turns."""
    with engine.connect() as connection, connection.begin():
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        config = Config()
        config.set_main_option("script_location", "instructloop:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def compact(engine: Engine, tables: Iterable[str]) -> None:
    """Leave nothing of deleted rows in the database's own files, as far as the database can do that.

    SQLite's file is written anew (secure_delete leaves copies where a page was split) and its write-ahead log
    emptied. Postgres removes the dead rows of `tables`; their bytes may stay in free space, its own log and
    backups until they are overwritten. Raises OperationalError while another process is in the way.
    """
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM " + ", ".join(tables))
        return
    raw = engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("VACUUM")
        deadline = time.monotonic() + _BUSY_SECONDS
        # Readers hold the log, each for a moment.
        while cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > deadline:
                raise sa.exc.OperationalError(
                    "PRAGMA wal_checkpoint(TRUNCATE)",
                    None,
                    sqlite3.OperationalError("a reader holds the log"),
                )
            time.sleep(0.05)
    except sqlite3.OperationalError as problem:
        raise sa.exc.OperationalError("VACUUM", None, problem) from problem
    finally:
        raw.close()


def _postgres(url: URL) -> Engine:
    return sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_pre_ping=True,
        pool_timeout=_POOL_SECONDS,
        connect_args={"connect_timeout": _CONNECT_SECONDS, "tcp_user_timeout": _SILENCE_SECONDS * 1000},
        hide_parameters=True,  # they are what people wrote, and messages are logged
    )


def _sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:":
        raise UnsupportedDatabase("sqlite: name a file, sqlite:///path; several processes share it")
    engine = sa.create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, hide_parameters=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    # Python's own handling begins transactions too late, and not at all before DDL: `_begin_sqlite` does.
    connection.isolation_level = None
    _write_ahead(connection)
    # FULL: a commit is on disk before ingest acknowledges it. What is deleted is overwritten at once.
    timeout = f"busy_timeout={_BUSY_SECONDS * 1000}"
    for pragma in ("synchronous=FULL", timeout, "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log; SQLite doesn't wait here for another process that does the same."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail as soon as another one has written meanwhile.
    options = connection.get_execution_options()
    if not options.get("one_statement", False):
        connection.exec_driver_sql("BEGIN" if options.get("read_only", False) else "BEGIN IMMEDIATE")
