"""Opening and migrating the database: the migrations give exactly the tables that the code uses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy.engine import Engine

from feedback import tables
from instructloop.database import UnsupportedDatabase, connect, migrate
from registry import tables as registry_tables

ROOT = Path(__file__).resolve().parents[2]
METADATA = [tables.METADATA, registry_tables.METADATA]


def test_migrations_give_exactly_the_tables(either_database: Engine) -> None:
    with either_database.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_migrations_give_the_same_statements_on_sqlite(database: Engine, tmp_path: Path) -> None:
    """Checks and conditions of indexes too, which Alembic does not compare."""
    created = connect(f"sqlite:///{tmp_path / 'created.db'}")
    for metadata in METADATA:
        metadata.create_all(created)
    assert _schema(database) == _schema(created)
    created.dispose()


def _schema(engine: Engine) -> dict[str, str]:
    # Triggers are the migrations' alone.
    query = sa.text(
        "SELECT name, sql FROM sqlite_master "
        "WHERE sql IS NOT NULL AND name != 'alembic_version' AND type != 'trigger'"
    )
    with engine.connect() as connection:
        found = {name: sql for name, sql in connection.execute(query)}
    # The order of a table's constraints says nothing, and columns that were added stand on one line.
    return {
        name: "".join(sorted(re.split(r",?\s*\n\s*|,\s*", sql))).replace(" ", "")
        for name, sql in found.items()
    }


def test_what_was_there_before_lineage_gets_its_own(either_database: Engine) -> None:
    """Rounds get their slices, dead letters the names of their events."""
    _downgrade(either_database, "0003")
    event = {"event_id": "e9", "key_id": "k1", "rater": "k1/r", "feedback": {}}
    with either_database.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO events (event_id, key_id, rater, source, type, target, feedback, received_at, "
                "ingested_at, status, position, superseded_position) VALUES (:id, 'k', 'r', 's', 'thumb', "
                ":id, '{}', 1, 1, 'superseded', :position, :superseded)"
            ),
            [
                {"id": "a", "position": 1, "superseded": 2},
                {"id": "b", "position": 2, "superseded": 4},
                {"id": "c", "position": 3, "superseded": None},
                {"id": "d", "position": 4, "superseded": None},
            ],
        )
        connection.execute(
            sa.text(
                "INSERT INTO rounds (id, state, cursor, cutoff, config) VALUES (1, 'done', 0, 3, '{}'), "
                "(2, 'failed', 3, 4, '{}'), (3, 'failed', 3, 4, '{}'), (4, 'requested', NULL, NULL, '{}')"
            )
        )
        connection.execute(
            sa.text("INSERT INTO round_stages (round_id, name, state, at) VALUES (3, 'publish', 'done', 1)")
        )
        connection.execute(
            sa.text("INSERT INTO dead_letters VALUES (:digest, '1-1', :kind, :data, 'broken', 1)"),
            [
                {"digest": "1", "kind": "event", "data": json.dumps(event).encode()},
                {"digest": "2", "kind": "event", "data": b"\xff"},
                {"digest": "3", "kind": "event", "data": b"[]"},
                {"digest": "4", "kind": "completion", "data": json.dumps(event).encode()},
            ],
        )
    migrate(either_database)
    with either_database.connect() as connection:
        uses = connection.execute(sa.select(registry_tables.ROUND_EVENTS).order_by(sa.text("1, 2"))).all()
        letters = connection.execute(sa.select(tables.dead_letters).order_by(sa.text("1"))).all()
    assert uses == [(number, id, "unrecorded", None) for number, id in ((1, "b"), (1, "c"), (3, "d"))]
    assert [(row.event_id, row.key_id, row.rater) for row in letters] == [
        ("e9", "k1", "k1/r"),
        *[(None, None, None)] * 3,
    ]
    assert {row.schema for row in letters} == {"1"}


def _downgrade(engine: Engine, revision: str) -> None:
    with engine.connect() as connection, connection.begin():
        config = Config()
        config.set_main_option("script_location", "instructloop:migrations")
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_migrating_again_keeps_what_is_there(either_database: Engine) -> None:
    with either_database.begin() as connection:
        connection.execute(sa.update(tables.counter).values(value=7))
    migrate(either_database)
    with either_database.connect() as connection:
        assert connection.execute(sa.select(tables.counter)).all() == [("position", 7)]


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_two_processes_may_migrate_at_once(
    backend: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    if backend == "postgres":
        engine: Engine = request.getfixturevalue("postgres")
        with engine.begin() as connection:
            connection.execute(sa.text("DROP SCHEMA public CASCADE"))
            connection.execute(sa.text("CREATE SCHEMA public"))
        url = engine.url.render_as_string(hide_password=False)
    code = f"from instructloop.database import *; migrate(connect({url!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in processes:
        assert process.communicate(timeout=30)[1] == b""
        assert process.returncode == 0
    with connect(url).connect() as connection:
        assert connection.execute(sa.select(tables.counter)).all() == [("position", 0)]


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path / 'a.db'}")
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE version_log (sequence INTEGER)"))
    with pytest.raises(sa.exc.OperationalError, match="already exists"):
        migrate(engine)
    assert sa.inspect(engine).get_table_names() == ["version_log"]


def test_sqlite_is_opened_for_durability_and_shared_use(database: Engine) -> None:
    with database.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_a_reader_does_not_wait_for_a_writer_and_two_writers_take_turns(database: Engine) -> None:
    readers = database.execution_options(read_only=True)
    query = sa.select(tables.counter.c.value)
    with database.begin() as writer:
        writer.execute(sa.update(tables.counter).values(value=1))
        with readers.connect() as reader:
            assert reader.execute(query).scalar_one() == 0
        # The write lock is taken from the start, before any statement.
        other = sa.create_engine(database.url, connect_args={"timeout": 0.05, "isolation_level": None})
        with other.connect() as connection, pytest.raises(sa.exc.OperationalError, match="locked"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        other.dispose()
    with readers.connect() as reader:
        assert reader.execute(query).scalar_one() == 1


@pytest.mark.parametrize("url", ["mysql://localhost/x", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(UnsupportedDatabase):
        connect(url)
