"""What is told of a forgetting: what went, what is left to do, and what still holds or has learned from it.

Plain JSON, for the route and the command line alike.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from feedback.forgetting import Forgettings
from registry.lineage import Lineage
from registry.registry import Registry

OUT_OF_REACH = (
    "backups, replicas of Redis, Postgres' own log and free space until they are overwritten, "
    "trackers outside the data directory, weights that learned from it"
)
"""Where it may still be, whatever was done."""


def describe(forgettings: Forgettings, registry: Registry, lineage: Lineage, id: int) -> Mapping[str, Any]:
    """Return all that is known of one forgetting; raises KeyError.

    Its `rounds` had an event of it in their slice: reports made of them may show its text.
    """
    forgetting, traces = forgettings.get(id), forgettings.traces(id)
    learned, states = lineage.learned_from(traces, forgettings.took(id)), registry.states()
    exports = [{"path": one.path, "what": one.what, "at": one.at} for one in forgettings.exports(id)]
    return {
        "id": forgetting.id,
        "kind": forgetting.kind,
        "sha256": forgetting.digest,
        "actor": forgetting.actor,
        "at": forgetting.at,
        "state": "done" if forgetting.done else "erased" if forgetting.erasure else "begun",
        "left": list(forgetting.left),
        "erased": dict(forgetting.counts),
        "versions": [asdict(one) | {"state": states[one.version]} for one in learned],
        "rounds": lineage.over([position for position, _ in traces]),
        "exports": exports,
        "out_of_reach": OUT_OF_REACH,
    }
