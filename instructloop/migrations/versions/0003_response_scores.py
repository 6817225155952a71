"""What the reward model thinks of recorded responses, and completions in order of time."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table and the index."""
    op.create_table(
        "response_scores",
        sa.Column("completion_id", sa.Text(), nullable=False),
        sa.Column("choice", sa.Integer(), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("round_id", sa.Integer(), nullable=False),
        sa.Column("score", sa.Double(), nullable=False),
        sa.Column("spread", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("completion_id", "choice", name=op.f("pk_response_scores")),
    )
    op.create_index(op.f("ix_completions_created_at"), "completions", ["created_at"], unique=False)


def downgrade() -> None:
    """Drop both."""
    op.drop_index(op.f("ix_completions_created_at"), table_name="completions")
    op.drop_table("response_scores")
