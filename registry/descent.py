"""Which versions learned from certain events: in their own round, or by what their round began with.

Owns the rules; which events are meant is said by their positions. It reads the registry and the rounds.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from registry.registry import Registry
from registry.rounds import Round, Rounds

Trace = tuple[int, int | None]
"""An event's position, and the number of the erasure that took it; None while it is there."""


@dataclass(frozen=True, slots=True)
class Learned:
    """A version that learned from an event, and how."""

    version: str
    state: str
    how: str


def learned(
    registry: Registry, rounds: Rounds, traces: Sequence[Trace], without: str | None = None
) -> list[Learned]:
    """Return the versions that learned from one of the events, oldest first.

    A round did when its slice held one that was not erased before, and its raters were not left out by the
    digest `without`. What began with such a round's version or reward model has learned, too, and so may have
    one that drew older feedback from among the events.
    """
    found: dict[str, Learned] = {}
    models: set[int] = set()  # rounds whose reward model learned
    versions = {version.manifest.round_id: version for version in registry.versions()}
    for round_ in sorted(rounds.list(limit=1_000_000), key=lambda one: one.id):
        if round_.cutoff is None:
            continue
        version = versions.get(round_.id)
        seen = _seen(round_, rounds.erasures_before(round_.id), traces, without)
        how = _how(round_, seen, models)
        if how is not None:
            models.add(round_.id)
        elif round_.config.get("parent") in found:
            how = f"descends from {round_.config['parent']}"
        if how is not None and version is not None:
            found[version.name] = Learned(version.name, version.state, how)
    return list(found.values())


def _seen(round_: Round, erasures: int, traces: Sequence[Trace], without: str | None) -> list[int]:
    """Return the positions of the events that were there for the round to read, in order."""
    if without is not None and without in round_.config.get("without_raters", ()):
        return []
    return sorted(position for position, erasure in traces if erasure is None or erasure > erasures)


def _how(round_: Round, seen: Sequence[int], models: Collection[int]) -> str | None:
    if round_.holds(seen):
        return f"round {round_.id} learned from it"
    assert round_.cursor is not None
    older: float = _training(round_.config).get("reward_older_share", 0)
    if older and seen and seen[0] <= round_.cursor:
        return f"round {round_.id} drew from older feedback, perhaps from it"
    previous = round_.config.get("reward_model_from")
    if previous in models:
        return f"its reward model began as that of round {previous}"
    return None


def _training(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("training", {})
    return found
