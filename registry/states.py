"""What the version log means: a pure fold of its entries to the state of each version.

Owns which moves are legal. Touches no database and no file; `registry.registry` reads the log, asks here, and
appends.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

State = Literal["candidate", "serving", "retired", "rejected", "pruned"]
Action = Literal["published", "promoted", "rejected", "rolled_back", "pruned"]
ACTIONS: tuple[Action, ...] = get_args(Action)


class IllegalTransition(ValueError):  # noqa: N818
    """The version cannot make this move from the state that it is in."""


class LogLine(Protocol):
    """What the fold needs of a log entry."""

    @property
    def sequence(self) -> int: ...  # noqa: D102
    @property
    def action(self) -> str: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Fleet:
    """The versions after a log: each one's state, and who served before whom.

    `served` is a stack, its top the version that serves: a promotion pushes, a rollback pops, so rolling back
    twice goes two versions back and never forth again to the one just left. `sequence` is the last entry's;
    `desired_sequence` that of the entry which made the top serve (0 while nothing serves).
    """

    states: Mapping[str, State] = field(default_factory=dict)
    served: tuple[str, ...] = ()
    sequence: int = 0
    desired_sequence: int = 0

    @property
    def serving(self) -> str | None:
        """The version that should serve, if any."""
        return self.served[-1] if self.served else None

    @property
    def rollback_target(self) -> str | None:
        """The version that a rollback returns to: the last before this one that was not rejected since."""
        return self._stack_below[-1] if self._stack_below else None

    @property
    def _stack_below(self) -> tuple[str, ...]:
        below = self.served[:-1]
        while below and self.states[below[-1]] != "retired":
            below = below[:-1]
        return below


def apply(fleet: Fleet, action: str, version: str, sequence: int | None = None) -> Fleet:
    """Return the fleet after one more entry, numbered `sequence` (by default the next).

    Raises IllegalTransition, in words for the operator, where the move is not allowed.
    """
    sequence = fleet.sequence + 1 if sequence is None else sequence
    state = fleet.states.get(version)
    if action not in ACTIONS:
        raise IllegalTransition(f"{action!r} is not an action")
    if action == "published":
        if state is not None:
            raise IllegalTransition(f"{version} has been published already and is {state}")
        return Fleet({**fleet.states, version: "candidate"}, fleet.served, sequence, fleet.desired_sequence)
    if state is None:
        raise IllegalTransition(f"{version} has not been published")
    if state == "pruned":
        raise IllegalTransition(f"{version} is pruned: its weights were deleted to save disk space")
    if action in ("rejected", "pruned"):
        ruled_out = _ruled_out(fleet, action, version)
        return Fleet({**fleet.states, version: ruled_out}, fleet.served, sequence, fleet.desired_sequence)
    if action == "promoted":
        if state not in ("candidate", "retired"):
            raise IllegalTransition(
                f"{version} is {state}: only a candidate or a retired version is promoted"
            )
        served = (*fleet.served, version)
    else:
        if version != fleet.rollback_target:
            raise IllegalTransition(f"{version} is not the version that served before {fleet.serving}")
        served = fleet._stack_below
    states = dict(fleet.states)
    if fleet.serving is not None:
        states[fleet.serving] = "retired"
    states[version] = "serving"
    return Fleet(states, served, sequence, sequence)


def _ruled_out(fleet: Fleet, action: str, version: str) -> State:
    """Return the state of a version that is never to serve again; raises IllegalTransition where it may."""
    if action == "pruned":
        if version in (fleet.serving, fleet.rollback_target):
            raise IllegalTransition(f"{version} serves, or is what a rollback returns to: it is not pruned")
        return "pruned"
    state = fleet.states[version]
    if state not in ("candidate", "retired"):
        raise IllegalTransition(f"{version} is {state}: only a candidate or a retired version is rejected")
    return "rejected"


def fold(entries: Iterable[LogLine]) -> Fleet:
    """Return the fleet after all `entries`, in order of their sequence."""
    fleet = Fleet()
    for entry in entries:
        fleet = apply(fleet, entry.action, entry.version, entry.sequence)
    return fleet
