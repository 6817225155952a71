"""Raters in quarantine, and gold questions."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "rater_log",
        sa.Column("sequence", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("rater", sa.Text(), nullable=False),
        sa.Column("action", sa.String(length=20), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.CheckConstraint("action IN ('quarantine', 'confirm', 'lift')", name=op.f("ck_rater_log_action")),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_rater_log")),
    )
    op.create_index(op.f("ix_rater_log_rater"), "rater_log", ["rater"], unique=False)
    op.create_table(
        "gold",
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["event_id"], ["events.event_id"], name=op.f("fk_gold_event_id")),
        sa.PrimaryKeyConstraint("event_id", name=op.f("pk_gold")),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("gold")
    op.drop_index(op.f("ix_rater_log_rater"), table_name="rater_log")
    op.drop_table("rater_log")
