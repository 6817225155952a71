"""Rounds that are pinned or repeated; when a stage began, how often, when it ended, what it left."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("rounds", sa.Column("pinned", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("rounds", sa.Column("repeat_of", sa.Integer(), nullable=True))
    op.add_column("round_stages", sa.Column("started_at", sa.Float(), nullable=True))
    op.add_column("round_stages", sa.Column("ended_at", sa.Float(), nullable=True))
    op.add_column("round_stages", sa.Column("result", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("round_stages", sa.Column("attempts", sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    """Drop the columns."""
    for table, columns in (
        ("round_stages", ("attempts", "result", "ended_at", "started_at")),
        ("rounds", ("repeat_of", "pinned")),
    ):
        for column in columns:
            op.drop_column(table, column)
