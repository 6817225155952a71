"""Completions past their age: they go with their texts, and what judged them keeps its verdict but no words.

Owns what goes and what stays of one batch; `instructloop.upkeep` runs batches until none is left.
"""

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from feedback import tables
from feedback.forgetting import delete_completions, take_turn

BATCH = 500
EXPIRED_TEXT = "(no longer kept)"
"""Stands for the text of a demonstration whose completion has gone: no round uses it any more."""


def expire(engine: Engine, before: float) -> int:
    """Delete a batch of completions and dead letters from before `before` (Unix seconds); return how many.

    All parts of a completion go together, with their choices and scores. The events that judge it stay: who
    voted, when, on what and how, for receipts, lineage and statistics of raters. Their comments, contexts
    and written texts go. No round learns from them again.
    """
    with engine.begin() as connection:
        take_turn(connection)
        old = sa.select(tables.completions.c.id).where(tables.completions.c.created_at < before)
        ids = set(connection.execute(old.order_by(tables.completions.c.created_at).limit(BATCH)).scalars())
        _strip_events(connection, ids)
        delete_completions(connection, ids)
        letters = tables.dead_letters
        stale = sa.select(letters.c.digest).where(letters.c.at < before).limit(BATCH)
        digests = list(connection.execute(stale).scalars())
        if digests:
            connection.execute(sa.delete(letters).where(letters.c.digest.in_(digests)))
        return len(ids) + len(digests)


def _strip_events(connection: Connection, completion_ids: set[str]) -> None:
    events, targets = tables.events, tables.event_targets
    query = (
        sa.select(events.c.event_id, events.c.feedback)
        .join(targets, targets.c.event_id == events.c.event_id)
        .where(targets.c.completion_id.in_(sorted(completion_ids)))
    )
    changed = {row.event_id: _stripped(row.feedback) for row in connection.execute(query)}
    if changed:
        statement = sa.update(events).where(events.c.event_id == sa.bindparam("changed"))
        rows = [{"changed": id, "stripped": feedback} for id, feedback in changed.items()]
        connection.execute(statement.values(feedback=sa.bindparam("stripped", type_=sa.JSON)), rows)


def _stripped(feedback: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in feedback.items() if name not in ("comment", "context")}
    return kept | {"text": EXPIRED_TEXT} if "text" in kept else kept
