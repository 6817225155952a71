"""The tables of completions, feedback, raters, what was forgotten of them, cases, and API keys."""

import sys
from array import array
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

METADATA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Packed(sa.types.TypeDecorator[list[Any]]):
    """A list of numbers as little-endian bytes: a quarter of its JSON, exact, and open to infinities.

    `i` packs token ids as int32, `d` packs logprobs as float64.
    """

    impl = sa.LargeBinary
    cache_ok = True

    def __init__(self, typecode: Literal["i", "d"]) -> None:
        super().__init__()
        self.typecode = typecode

    def process_bind_param(self, value: list[Any] | None, dialect: Dialect) -> bytes | None:
        """Pack; raises OverflowError for a number that doesn't fit."""
        return None if value is None else _little_endian(array(self.typecode, value)).tobytes()

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> list[Any] | None:
        """Unpack."""
        if value is None:
            return None
        numbers = array(self.typecode)
        numbers.frombytes(value)
        return _little_endian(numbers).tolist()


def _little_endian(numbers: "array[Any]") -> "array[Any]":
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


completions = sa.Table(
    "completions",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("part", sa.Integer, primary_key=True),
    sa.Column("parts", sa.Integer),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("user", sa.Text),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False, index=True),
    sa.Column("latency_seconds", sa.Double, nullable=False),
    sa.Column("messages", sa.JSON(none_as_null=True)),
    sa.Column("prompt", sa.Text),
    sa.Column("prompt_token_ids", Packed("i"), nullable=False),
    sa.Column("prompt_hash", sa.String(64), nullable=False, index=True),
    sa.Column("sampling", sa.JSON, nullable=False),
)

choices = sa.Table(
    "choices",
    METADATA,
    sa.Column("completion_id", sa.Text, primary_key=True),
    sa.Column("index", sa.Integer, primary_key=True),
    sa.Column("part", sa.Integer, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("token_ids", Packed("i"), nullable=False),
    sa.Column("logprobs", Packed("d"), nullable=False),
    sa.Column("finish_reason", sa.Text),
    sa.Column("weight_spans", sa.JSON, nullable=False),
    sa.ForeignKeyConstraint(["completion_id", "part"], ["completions.id", "completions.part"]),
)

events = sa.Table(
    "events",
    METADATA,
    sa.Column("event_id", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("rater", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("type", sa.String(20), nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("feedback", sa.JSON, nullable=False),
    sa.Column("received_at", sa.Double, nullable=False),
    sa.Column("ingested_at", sa.Double, nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("reason", sa.Text),
    sa.Column("position", sa.BigInteger, unique=True),
    sa.Column("superseded_by", sa.Text),
    sa.Column("superseded_position", sa.BigInteger),
    sa.CheckConstraint("status IN ('waiting', 'stored', 'superseded', 'rejected')", name="status"),
    # Only of the waiting ones. With an index over every status, SQLite takes that for the current ones too.
    sa.Index(
        "ix_events_waiting",
        "ingested_at",
        sqlite_where=sa.text("status = 'waiting'"),
        postgresql_where=sa.text("status = 'waiting'"),
    ),
    # The database itself refuses a second current event of one rater on one target.
    sa.Index(
        "uq_events_current",
        "target",
        "rater",
        "type",
        unique=True,
        sqlite_where=sa.text("status = 'stored'"),
        postgresql_where=sa.text("status = 'stored'"),
    ),
)

# No foreign key to completions: an event may arrive before the record of its completion.
event_targets = sa.Table(
    "event_targets",
    METADATA,
    sa.Column("completion_id", sa.Text, primary_key=True),
    sa.Column("event_id", sa.Text, sa.ForeignKey("events.event_id"), primary_key=True),
)

# What the latest reward model thinks of recorded responses, replaced as a whole by each round. No foreign
# keys: a completion may be deleted meanwhile.
response_scores = sa.Table(
    "response_scores",
    METADATA,
    sa.Column("completion_id", sa.Text, primary_key=True),
    sa.Column("choice", sa.Integer, primary_key=True),
    sa.Column("part", sa.Integer, nullable=False),
    sa.Column("round_id", sa.Integer, nullable=False),
    sa.Column("score", sa.Double, nullable=False),
    sa.Column("spread", sa.Double, nullable=False),
)

# One row, `position`. Its lock makes ingest transactions take turns, so that positions commit in order.
counter = sa.Table(
    "counter",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)

dead_letters = sa.Table(
    "dead_letters",
    METADATA,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("entry_id", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False, index=True),
    sa.Column("schema", sa.Text, nullable=False, server_default="1"),
    sa.Column("event_id", sa.Text, index=True),
    sa.Column("key_id", sa.Text),
    sa.Column("rater", sa.Text),
    sa.Column("fixed_at", sa.Double),
    sa.Column("dropped_at", sa.Double),
)

# Who or what was forgotten, and how far that is. `subject` is the id itself, only until what it names is
# erased; `erasure` numbers the erasures in the order of their commits. The times say when a place was clean.
forgettings = sa.Table(
    "forgettings",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("subject", sa.Text),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("erasure", sa.BigInteger, unique=True),
    sa.Column("counts", sa.JSON(none_as_null=True)),
    sa.Column("late", sa.Integer, nullable=False, server_default="0"),
    sa.Column("queue_at", sa.Double),
    sa.Column("files_at", sa.Double),
    sa.Column("database_at", sa.Double),
    sa.CheckConstraint("kind IN ('rater', 'completion')", name="kind"),
)

# What must not come back, by the digest of its id. An event has the `position` that it had.
tombstones = sa.Table(
    "tombstones",
    METADATA,
    sa.Column("kind", sa.String(20), primary_key=True),
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("forgetting_id", sa.Integer, sa.ForeignKey("forgettings.id"), nullable=False, index=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("position", sa.BigInteger),
    sa.CheckConstraint("kind IN ('rater', 'completion', 'event')", name="kind"),
)

# Files outside the data directory that hold what stood at positions `(cursor, cutoff]`.
exports = sa.Table(
    "exports",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("what", sa.String(40), nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("cursor", sa.BigInteger, nullable=False),
    sa.Column("cutoff", sa.BigInteger, nullable=False),
)

# Appended to, never changed: who was quarantined, why, and what an operator made of it. The writer picks
# `sequence` itself (last + 1): of two who act at once the second meets the primary key and looks again.
rater_log = sa.Table(
    "rater_log",
    METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("rater", sa.Text, nullable=False, index=True),
    sa.Column("action", sa.String(20), nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.CheckConstraint("action IN ('quarantine', 'confirm', 'lift')", name="action"),
)

# Events whose verdict is known to be right.
gold = sa.Table(
    "gold",
    METADATA,
    sa.Column("event_id", sa.Text, sa.ForeignKey("events.event_id"), primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
)

# Prompts whose answers have to meet checks, or be better than a bad answer. Never changed but in what became
# of them: `trainings` counts how often a case was sent as feedback.
cases = sa.Table(
    "cases",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("messages", sa.JSON, nullable=False),
    sa.Column("checks", sa.JSON, nullable=False),
    sa.Column("good", sa.Text),
    sa.Column("bad", sa.Text),
    sa.Column("trainings", sa.Integer, nullable=False, server_default="0"),
    sa.Column("added_by", sa.Text, nullable=False),
    sa.Column("added_at", sa.Double, nullable=False, index=True),
    sa.Column("removed_by", sa.Text),
    sa.Column("removed_at", sa.Double),
)

# What a case was made from, by the names under which that can be forgotten.
case_origins = sa.Table(
    "case_origins",
    METADATA,
    sa.Column("kind", sa.String(20), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("case_id", sa.Text, sa.ForeignKey("cases.id"), primary_key=True),
    sa.CheckConstraint("kind IN ('rater', 'completion', 'event')", name="kind"),
)

# What a round's candidate, and the version in service then, answered to a case.
case_results = sa.Table(
    "case_results",
    METADATA,
    sa.Column("round_id", sa.Integer, primary_key=True),
    sa.Column("case_id", sa.Text, sa.ForeignKey("cases.id"), primary_key=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("incumbent", sa.Text, nullable=False),
    sa.Column("before", sa.Text, nullable=False),
    sa.Column("before_passed", sa.Boolean, nullable=False),
    sa.Column("after", sa.Text, nullable=False),
    sa.Column("after_passed", sa.Boolean, nullable=False),
)

keys = sa.Table(
    "keys",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("role", sa.String(20), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
    sa.Column("rotated_at", sa.Double),
    # The secret before the last rotation, which opens until then.
    sa.Column("old_secret_sha256", sa.String(64)),
    sa.Column("old_secret_until", sa.Double),
    sa.CheckConstraint("role IN ('client', 'rater', 'operator')", name="role"),
)
