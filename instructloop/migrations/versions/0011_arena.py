"""The arena: pairs of answers that people are asked about, and their votes."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create both tables."""
    op.create_table(
        "arena_pairs",
        sa.Column("id", sa.String(length=60), nullable=False),
        sa.Column("axis", sa.String(length=40), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("first", sa.Text(), nullable=False),
        sa.Column("second", sa.Text(), nullable=False),
        sa.Column("seed", sa.String(length=32), nullable=False),
        sa.Column("wanted", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_arena_pairs")),
    )
    op.create_table(
        "arena_votes",
        sa.Column("pair_id", sa.String(length=60), nullable=False),
        sa.Column("rater", sa.String(length=500), nullable=False),
        sa.Column("outcome", sa.Float(), nullable=False),
        sa.Column("first_labels", sa.JSON(), nullable=False),
        sa.Column("second_labels", sa.JSON(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["pair_id"], ["arena_pairs.id"], name=op.f("fk_arena_votes_pair_id_arena_pairs")
        ),
        sa.PrimaryKeyConstraint("pair_id", "rater", name=op.f("pk_arena_votes")),
    )
    op.create_index(op.f("ix_arena_votes_rater"), "arena_votes", ["rater"], unique=False)


def downgrade() -> None:
    """Drop both."""
    op.drop_table("arena_votes")
    op.drop_table("arena_pairs")
