"""API keys on SQLite and on Postgres."""

import time

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.keys import Keys, RevokedKey, UnknownKey
from registry.audit import AuditLog, key_note


def test_a_key_opens_until_it_is_revoked(either_database: Engine) -> None:
    keys = Keys(either_database)
    new = keys.create("rater", "Ada's page")
    other = keys.create("client", "app")
    assert new.secret.startswith(f"il_rater_{new.id}_")
    found = keys.verify(new.secret)
    assert found is not None
    assert (found.id, found.role, found.name, found.revoked_at) == (new.id, "rater", "Ada's page", None)
    keys.revoke(new.id)
    keys.revoke(new.id)
    assert keys.verify(new.secret) is None
    assert keys.verify(other.secret) is not None
    assert [(key.id, key.revoked_at is None) for key in keys.list()] == [(new.id, False), (other.id, True)]
    with pytest.raises(UnknownKey):
        keys.revoke("nobody")


def test_no_other_secret_opens(database: Engine) -> None:
    keys = Keys(database)
    new, other = keys.create("client", "a"), keys.create("operator", "b")
    grafted = f"il_operator_{new.id}_{new.secret.rsplit('_', 1)[1]}"
    swapped = f"il_client_{new.id}_{other.secret.rsplit('_', 1)[1]}"
    for wrong in ("", "il___", grafted, swapped, new.secret[:-1], new.secret + "0", "\ud800", "no such key"):
        assert keys.verify(wrong) is None
    with pytest.raises(ValueError, match="role"):
        keys.create("admin", "x")  # type: ignore[arg-type]


def test_a_rotated_key_has_a_new_secret_and_the_old_one_opens_as_long_as_was_said(
    either_database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = Keys(either_database)
    first = keys.create("client", "app")
    second = keys.rotate(first.id)
    assert (second.id, second.secret.startswith(f"il_client_{first.id}_")) == (first.id, True)
    assert keys.verify(first.secret) is None
    found = keys.verify(second.secret)
    assert found is not None
    assert (found.id, found.role, found.name, found.old_secret_until) == (first.id, "client", "app", None)
    third = keys.rotate(first.id, grace_seconds=60)
    now = time.time()
    assert [keys.verify(key.secret) is not None for key in (first, second, third)] == [False, True, True]
    # Two secrets at most: the next rotation ends the one before the last, whatever grace it had.
    fourth = keys.rotate(first.id, grace_seconds=600)
    assert [keys.verify(key.secret) is not None for key in (second, third, fourth)] == [False, True, True]
    monkeypatch.setattr(time, "time", lambda: now + 590)
    assert keys.verify(third.secret) is not None
    monkeypatch.setattr(time, "time", lambda: now + 610)
    assert [keys.verify(key.secret) is not None for key in (third, fourth)] == [False, True]


def test_a_revoked_key_ends_with_all_its_secrets_and_gets_no_new_one(database: Engine) -> None:
    keys = Keys(database)
    first = keys.create("client", "app")
    second = keys.rotate(first.id, grace_seconds=60)
    assert keys.find(first.id) is not None
    keys.revoke(first.id)
    assert keys.find(first.id) is None
    assert keys.verify(first.secret) is None
    assert keys.verify(second.secret) is None
    with pytest.raises(RevokedKey, match=first.id):
        keys.rotate(first.id)
    with pytest.raises(UnknownKey, match="nobody"):
        keys.rotate("nobody")


def test_another_replica_sees_a_change_at_once(either_database: Engine) -> None:
    """Each has its own connections, as processes have; nothing is remembered in between."""
    here, there = Keys(either_database), Keys(sa.create_engine(either_database.url))
    key = here.create("client", "app")
    for _ in range(3):
        assert there.verify(key.secret) is not None
    turned = here.rotate(key.id)
    assert there.verify(key.secret) is None
    assert there.verify(turned.secret) is not None
    here.revoke(key.id)
    assert there.verify(turned.secret) is None
    assert there.find(key.id) is None


def test_what_is_done_to_a_key_is_written_down_with_it_or_not_done(either_database: Engine) -> None:
    keys, log = Keys(either_database, note=key_note("ann")), AuditLog(either_database)
    key = keys.create("rater", "bob")
    keys.rotate(key.id)
    keys.revoke(key.id)
    keys.revoke(key.id)
    seen = [(entry.actor, entry.action, entry.target) for entry in reversed(log.entries())]
    target = f"key {key.id}"
    assert seen == [
        ("ann", "create_key", target),
        ("ann", "rotate_key", target),
        ("ann", "revoke_key", target),
    ]

    def broken(connection: object, action: str, key_id: str) -> None:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        Keys(either_database, note=broken).create("client", "unseen")
    assert [found.name for found in keys.list()] == ["bob"]


def test_secrets_are_not_in_the_database(database: Engine) -> None:
    keys = Keys(database)
    new = keys.create("client", "a")
    turned = keys.rotate(new.id, grace_seconds=60)
    with database.connect() as connection:
        row = connection.execute(sa.select(tables.keys)).one()
    for secret in (new.secret, turned.secret):
        assert secret.rsplit("_", 1)[1] not in repr(row)
