"""One version on trial beside the stable one: its share in the log, and the track of each replica."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("version_log", sa.Column("share", sa.Float(), nullable=True))
    op.add_column(
        "replicas",
        sa.Column("track", sa.String(length=20), server_default="stable", nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_column("replicas", "track")
    op.drop_column("version_log", "share")
