"""An index of the waiting events alone: the one over all states misled SQLite and grew with every event."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_WAITING = sa.text("status = 'waiting'")


def upgrade() -> None:
    """Replace the index."""
    op.drop_index("ix_events_status_ingested_at", table_name="events")
    op.create_index(
        "ix_events_waiting", "events", ["ingested_at"], sqlite_where=_WAITING, postgresql_where=_WAITING
    )


def downgrade() -> None:
    """Put the old one back."""
    op.drop_index("ix_events_waiting", table_name="events")
    op.create_index("ix_events_status_ingested_at", "events", ["status", "ingested_at"], unique=False)
