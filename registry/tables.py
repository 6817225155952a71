"""The tables: versions' and audit log, replicas, rounds with their figures, evaluations, the arena.

Owns the columns only. Rows are written by `registry.registry`, `.audit`, `.rounds`, `.evaluations` and
`.arena`, the tables by migrations. What a version is made of stands on disk, beside its weights, not here.
"""

import sqlalchemy as sa

METADATA = sa.MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Appended to, never changed. The writer picks `sequence` itself (last + 1), so that of two operators who act
# on the same state the second meets the primary key, looks again and decides again.
VERSION_LOG = sa.Table(
    "version_log",
    METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("action", sa.String(40), nullable=False),
    sa.Column("version", sa.String(100), nullable=False),
    sa.Column("reason", sa.Text, nullable=False, default=""),
)

# What operators did beyond the version log, and what they were refused. Triggers keep it
# append-only; the migration makes them.
AUDIT_LOG = sa.Table(
    "audit_log",
    METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True),
    sa.Column("at", sa.Float, nullable=False, index=True),
    sa.Column("actor", sa.String(200), nullable=False),
    sa.Column("action", sa.String(40), nullable=False),
    sa.Column("target", sa.String(200), nullable=False),
    sa.Column("outcome", sa.String(20), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.CheckConstraint("outcome IN ('done', 'refused', 'failed')", name="outcome"),
)

REPLICAS = sa.Table(
    "replicas",
    METADATA,
    sa.Column("id", sa.String(200), primary_key=True),
    sa.Column("desired", sa.String(100)),
    sa.Column("actual", sa.String(100)),
    sa.Column("state", sa.String(40), nullable=False),
    sa.Column("detail", sa.Text, nullable=False, default=""),
    sa.Column("pid", sa.Integer),
    sa.Column("url", sa.String(500)),
    sa.Column("seen_at", sa.Float, nullable=False),
    sa.Column("last_swap_seconds", sa.Float),
)

ROUNDS = sa.Table(
    "rounds",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("stage", sa.String(60)),
    sa.Column("cursor", sa.BigInteger),
    sa.Column("cutoff", sa.BigInteger),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("config_hash", sa.String(64)),
    sa.Column("seed", sa.BigInteger),
    sa.Column("version", sa.String(100)),
    sa.Column("verdict", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.Text),
    sa.Column("requested_by", sa.String(200)),
    sa.Column("requested_at", sa.Float),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("repeat_of", sa.Integer),
)

# The database itself keeps to one request that waits and one round that runs, whoever races.
for _state in ("requested", "running"):
    _only = ROUNDS.c.state == _state
    sa.Index(
        f"ix_rounds_one_{_state}", ROUNDS.c.state, unique=True, sqlite_where=_only, postgresql_where=_only
    )

ROUND_STAGES = sa.Table(
    "round_stages",
    METADATA,
    sa.Column("round_id", sa.Integer, sa.ForeignKey("rounds.id"), primary_key=True),
    sa.Column("name", sa.String(60), primary_key=True),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
)

# `value` is null where the figure was not finite: a diverged loss has to be storable, and NaN is not JSON.
ROUND_METRICS = sa.Table(
    "round_metrics",
    METADATA,
    sa.Column("round_id", sa.Integer, sa.ForeignKey("rounds.id"), primary_key=True),
    sa.Column("stage", sa.String(60), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("value", sa.Float),
    sa.Column("at", sa.Float, nullable=False),
)

# What a round did with each event that it had: `trained`, `older` (trained, from before its slice),
# `held_out`, `left_out` for a reason, or `unrecorded`. Ids only: an event that is forgotten stays named here.
ROUND_EVENTS = sa.Table(
    "round_events",
    METADATA,
    sa.Column("round_id", sa.Integer, sa.ForeignKey("rounds.id"), primary_key=True),
    sa.Column("event_id", sa.Text, primary_key=True, index=True),
    sa.Column("use", sa.String(20), nullable=False),
    sa.Column("reason", sa.Text),
)

EVALUATIONS = sa.Table(
    "evaluations",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("state", sa.String(20), nullable=False, index=True),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("result", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.Text),
    sa.Column("requested_by", sa.String(200), nullable=False),
    sa.Column("requested_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("step", sa.String(200)),
    sa.Column("done", sa.Integer, nullable=False, server_default="0"),
    sa.Column("total", sa.Integer, nullable=False, server_default="0"),
)

# Pairs of answers that people are asked about. `seed` decides, with the rater's id, in which order a rater
# sees the two; it is never shown.
ARENA_PAIRS = sa.Table(
    "arena_pairs",
    METADATA,
    sa.Column("id", sa.String(60), primary_key=True),
    sa.Column("axis", sa.String(40), nullable=False),
    sa.Column("messages", sa.JSON, nullable=False),
    sa.Column("first", sa.Text, nullable=False),
    sa.Column("second", sa.Text, nullable=False),
    sa.Column("seed", sa.String(32), nullable=False),
    sa.Column("wanted", sa.Integer, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

# One vote a rater and pair. `outcome` is that of the pair's `first`, whatever order the rater saw.
ARENA_VOTES = sa.Table(
    "arena_votes",
    METADATA,
    sa.Column("pair_id", sa.String(60), sa.ForeignKey("arena_pairs.id"), primary_key=True),
    sa.Column("rater", sa.String(500), primary_key=True, index=True),
    sa.Column("outcome", sa.Float, nullable=False),
    sa.Column("first_labels", sa.JSON, nullable=False),
    sa.Column("second_labels", sa.JSON, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
