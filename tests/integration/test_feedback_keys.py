"""API keys on SQLite and on Postgres."""

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.keys import Keys, UnknownKey


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


def test_secrets_are_not_in_the_database(database: Engine) -> None:
    new = Keys(database).create("client", "a")
    with database.connect() as connection:
        row = connection.execute(sa.select(tables.keys)).one()
    assert new.secret.rsplit("_", 1)[1] not in repr(row)
