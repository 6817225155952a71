"""Which events a round used and for what; whose event a dead letter is, and what became of it."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_ADDED = ("schema", "event_id", "key_id", "rater", "fixed_at", "dropped_at")
_LONGEST_NAME = 400


def upgrade() -> None:
    """Create the table and the columns, and fill them from what is there."""
    op.create_table(
        "round_events",
        sa.Column("round_id", sa.Integer(), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("use", sa.String(length=20), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name=op.f("fk_round_events_round_id_rounds")),
        sa.PrimaryKeyConstraint("round_id", "event_id", name=op.f("pk_round_events")),
    )
    op.create_index(op.f("ix_round_events_event_id"), "round_events", ["event_id"], unique=False)
    # Of earlier rounds only the slice is known; one that failed before it published left nothing behind.
    op.execute(
        "INSERT INTO round_events (round_id, event_id, use) "
        "SELECT rounds.id, events.event_id, 'unrecorded' FROM rounds JOIN events "
        "ON events.position > rounds.cursor AND events.position <= rounds.cutoff "
        "AND (events.superseded_position IS NULL OR events.superseded_position > rounds.cutoff) "
        "WHERE rounds.state <> 'failed' OR EXISTS (SELECT 1 FROM round_stages WHERE name = 'publish' "
        "AND round_stages.state = 'done' AND round_id = rounds.id)"
    )
    op.add_column("dead_letters", sa.Column("schema", sa.Text(), server_default="1", nullable=False))
    for name in ("event_id", "key_id", "rater"):
        op.add_column("dead_letters", sa.Column(name, sa.Text(), nullable=True))
    for name in ("fixed_at", "dropped_at"):
        op.add_column("dead_letters", sa.Column(name, sa.Double(), nullable=True))
    op.create_index(op.f("ix_dead_letters_event_id"), "dead_letters", ["event_id"], unique=False)
    _name_events()


def downgrade() -> None:
    """Drop both."""
    op.drop_index(op.f("ix_dead_letters_event_id"), table_name="dead_letters")
    for name in reversed(_ADDED):
        op.drop_column("dead_letters", name)
    op.drop_table("round_events")


def _name_events() -> None:
    """Write beside each letter whose event it is, where its JSON says so: receipts are found by that."""
    letters = sa.table("dead_letters", *(sa.column(name) for name in ("digest", "kind", "data", *_ADDED)))
    connection = op.get_bind()
    digests = connection.execute(sa.select(letters.c.digest).where(letters.c.kind == "event")).scalars().all()
    for digest in digests:
        data = connection.execute(sa.select(letters.c.data).where(letters.c.digest == digest)).scalar_one()
        try:
            fields = json.loads(bytes(data))
        except (ValueError, RecursionError):
            continue
        found = {
            name: fields[name]
            for name in ("event_id", "key_id", "rater")
            if isinstance(fields, dict) and _is_name(fields.get(name))
        }
        if found:
            connection.execute(sa.update(letters).where(letters.c.digest == digest).values(**found))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= _LONGEST_NAME
