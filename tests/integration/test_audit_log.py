"""The audit log on SQLite and on Postgres: it only grows, and tells moves of versions once."""

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from registry.audit import AuditLog
from registry.tables import AUDIT_LOG, VERSION_LOG


def test_what_was_written_down_can_t_be_changed_or_taken_away(either_database: Engine) -> None:
    log = AuditLog(either_database)
    log.append("ann", "start_round")
    log.append(
        "key 1 (" + "n" * 500 + ")", "promote", "policy-" + "9" * 500, outcome="refused", detail="x" * 9000
    )
    before = log.entries()
    statements: list[sa.Executable] = [sa.update(AUDIT_LOG).values(actor="eve"), sa.delete(AUDIT_LOG)]
    if either_database.dialect.name == "postgresql":
        statements.append(sa.text("TRUNCATE audit_log"))
    for statement in statements:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), either_database.begin() as connection:
            connection.execute(statement)
    assert log.entries() == before
    assert [len(before[0].actor), len(before[0].target), len(before[0].detail)] == [200, 200, 2000]


def test_moves_are_read_from_the_version_log_in_their_place_in_time(either_database: Engine) -> None:
    moves = [(1, "published"), (2, "promoted"), (4, "rolled_back"), (6, "rejected"), (7, "pruned")]
    with either_database.begin() as connection:
        for sequence, (at, action) in enumerate(moves):
            row = {"at": at, "actor": "round 1", "action": action, "version": "policy-0001", "reason": "why"}
            connection.execute(sa.insert(VERSION_LOG).values(sequence=sequence, **row))
        for at in (3, 5):
            row = {"at": at, "actor": "ann", "action": "rotate_key", "target": "key 1", "outcome": "done"}
            connection.execute(sa.insert(AUDIT_LOG).values(detail="", **row))
    log = AuditLog(either_database)
    found = log.entries()
    assert [(entry.at, entry.action) for entry in found] == [
        (6, "reject"),
        (5, "rotate_key"),
        (4, "rollback"),
        (3, "rotate_key"),
        (2, "promote"),
    ]
    assert (found[0].target, found[0].outcome, found[0].detail) == ("policy-0001", "done", "why")
    assert log.entries(limit=2) == found[:2]
    assert log.entries(before=4) == found[3:]


def test_what_is_refused_or_fails_is_written_down_and_raised_on(either_database: Engine) -> None:
    log = AuditLog(either_database)
    for error in (ValueError("not now"), KeyError("policy-9"), RuntimeError("boom")):
        with pytest.raises(type(error)), log.refusals("ann", "promote", "policy-9"):
            raise error
    with log.refusals("ann", "promote", "policy-1"):
        pass
    assert [(entry.outcome, entry.detail) for entry in reversed(log.entries())] == [
        ("refused", "not now"),
        ("refused", "'policy-9'"),
        ("failed", "RuntimeError('boom')"),
    ]
