"""Who or what was forgotten, what must not come back, and which files were exported."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "forgettings",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.Text(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("erasure", sa.BigInteger(), nullable=True),
        sa.Column("counts", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("late", sa.Integer(), server_default="0", nullable=False),
        sa.Column("queue_at", sa.Double(), nullable=True),
        sa.Column("files_at", sa.Double(), nullable=True),
        sa.Column("database_at", sa.Double(), nullable=True),
        sa.CheckConstraint("kind IN ('rater', 'completion')", name=op.f("ck_forgettings_kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_forgettings")),
        sa.UniqueConstraint("erasure", name=op.f("uq_forgettings_erasure")),
    )
    op.create_table(
        "tombstones",
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("forgetting_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("kind IN ('rater', 'completion', 'event')", name=op.f("ck_tombstones_kind")),
        sa.ForeignKeyConstraint(
            ["forgetting_id"], ["forgettings.id"], name=op.f("fk_tombstones_forgetting_id")
        ),
        sa.PrimaryKeyConstraint("kind", "digest", name=op.f("pk_tombstones")),
    )
    op.create_index(op.f("ix_tombstones_forgetting_id"), "tombstones", ["forgetting_id"], unique=False)
    op.create_table(
        "exports",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("what", sa.String(length=40), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("cursor", sa.BigInteger(), nullable=False),
        sa.Column("cutoff", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_exports")),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("exports", "tombstones", "forgettings"):
        op.drop_table(table)
