"""What is told of a case's feedback: where each of its events stands, and what learned from it.

Plain JSON, for the route and the command line alike.
"""

from collections.abc import Mapping
from typing import Any

from feedback.cases import Case
from feedback.store import Store
from registry.lineage import Lineage


def taught(case: Case, store: Store, lineage: Lineage) -> list[Mapping[str, Any]]:
    """Return all events that were made of a case, latest first, each with the rounds and versions behind it.

    One that is not in the store yet is `queued`.
    """
    found: list[Mapping[str, Any]] = []
    for event_id in case.event_ids:
        stored = store.event(event_id)
        uses = lineage.uses(event_id)
        found.append(
            {
                "event_id": event_id,
                "status": "queued" if stored is None else stored.status,
                "rounds": [{"round": one.round_id, "use": one.use, "reason": one.reason} for one in uses],
                "versions": lineage.learned(event_id),
            }
        )
    return found
