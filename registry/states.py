"""What the version log means: a pure fold of its entries to the state of each version.

Owns which moves are legal. Touches no database and no file; `registry.registry` reads the log, asks here, and
appends.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

State = Literal["candidate", "serving", "retired", "rejected", "pruned", "canary", "shadow"]
Action = Literal[
    "published", "promoted", "rejected", "rolled_back", "pruned", "canary", "shadow", "withdrawn"
]
Mode = Literal["canary", "shadow"]
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
    @property
    def at(self) -> float: ...  # noqa: D102
    @property
    def share(self) -> float | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Trial:
    """One version beside the stable one.

    A `canary` answers `share` of the end users, a `shadow` copies of `share` of the requests, which nobody
    sees. `sequence` and `since` (Unix seconds) are those of the entry that said so last: a changed share
    begins a new comparison, since votes from times of different shares don't compare. `former` is the
    state that the version goes back to when it is withdrawn.
    """

    version: str
    mode: Mode
    share: float
    sequence: int
    since: float
    former: State = "candidate"


@dataclass(frozen=True, slots=True)
class Fleet:
    """The versions after a log: each one's state, and who served before whom.

    `served` is a stack, its top the version that serves: a promotion pushes, a rollback pops, so rolling back
    twice goes two versions back and never forth again to the one just left. `sequence` is the last entry's;
    `desired_sequence` that of the entry which made the top serve (0 while nothing serves). `trial` is the
    one version that is tried beside the one that serves, if any.
    """

    states: Mapping[str, State] = field(default_factory=dict)
    served: tuple[str, ...] = ()
    sequence: int = 0
    desired_sequence: int = 0
    trial: Trial | None = None

    @property
    def serving(self) -> str | None:
        """The version that should serve, if any."""
        return self.served[-1] if self.served else None

    @property
    def rollback_target(self) -> str | None:
        """The version that a rollback returns to: the last before this one that was not ruled out since.

        One that is on trial now counts as what it was before.
        """
        return self._stack_below[-1] if self._stack_below else None

    @property
    def _stack_below(self) -> tuple[str, ...]:
        below, states = self.served[:-1], _without_trial(self)
        while below and states[below[-1]] != "retired":
            below = below[:-1]
        return below


def apply(
    fleet: Fleet,
    action: str,
    version: str,
    sequence: int | None = None,
    *,
    share: float | None = None,
    at: float = 0.0,
) -> Fleet:
    """Return the fleet after one more entry, numbered `sequence` (by default the next), of Unix time `at`.

    `share`, in (0, 1], belongs to a canary or a shadow and to nothing else. Raises IllegalTransition, in
    words for the operator, where the move is not allowed.
    """
    sequence = fleet.sequence + 1 if sequence is None else sequence
    _check(fleet, action, version, share)
    states: dict[str, State]
    match action:
        case "published":
            return replace(fleet, states={**fleet.states, version: "candidate"}, sequence=sequence)
        case "canary" | "shadow":
            trial = _trial(fleet, action, version, share, sequence=sequence, since=at)
            return replace(fleet, states={**fleet.states, version: action}, trial=trial, sequence=sequence)
        case "withdrawn":
            return replace(fleet, states=_without_trial(fleet), trial=None, sequence=sequence)
        case "rejected" | "pruned":
            left = None if fleet.trial is None or fleet.trial.version == version else fleet.trial
            states = {**fleet.states, version: _ruled_out(fleet, action, version)}
            return replace(fleet, states=states, trial=left, sequence=sequence)
        case "promoted":
            served = (*fleet.served, version)
        case _:
            served = fleet._stack_below
    # Whichever serves now: what was on trial has lost what it was compared with, or has won.
    states = _without_trial(fleet)
    if fleet.serving is not None:
        states[fleet.serving] = "retired"
    states[version] = "serving"
    return Fleet(states, served, sequence, sequence)


def _check(fleet: Fleet, action: str, version: str, share: float | None) -> None:
    """Raise IllegalTransition for a move that the version's state, or where it stands, does not allow."""
    state = fleet.states.get(version)
    if action not in ACTIONS:
        raise IllegalTransition(f"{action!r} is not an action")
    if share is not None and action not in ("canary", "shadow"):
        raise IllegalTransition("only a canary or a shadow has a share")
    if action == "published":
        if state is not None:
            raise IllegalTransition(f"{version} has been published already and is {state}")
        return
    if state is None:
        raise IllegalTransition(f"{version} has not been published")
    if state == "pruned":
        raise IllegalTransition(f"{version} is pruned: its weights were deleted to save disk space")
    if action == "promoted" and state not in ("candidate", "retired", "canary", "shadow"):
        raise IllegalTransition(
            f"{version} is {state}: only a candidate, a retired version or one on trial is promoted"
        )
    if action == "rolled_back" and version != fleet.rollback_target:
        raise IllegalTransition(f"{version} is not the version that served before {fleet.serving}")
    if action == "withdrawn" and (fleet.trial is None or version != fleet.trial.version):
        raise IllegalTransition(f"{version} is {state}: it is not on trial")


def _trial(
    fleet: Fleet, mode: Mode, version: str, share: float | None, *, sequence: int, since: float
) -> Trial:
    """Return the trial of `version`, new or changed in mode or share; raises IllegalTransition."""
    if fleet.serving is None:
        raise IllegalTransition("no version serves yet that another could be compared with")
    if fleet.trial is not None and fleet.trial.version != version:
        raise IllegalTransition(f"{fleet.trial.version} is on trial: withdraw it first")
    former = fleet.trial.former if fleet.trial else fleet.states[version]
    if former not in ("candidate", "retired"):
        raise IllegalTransition(f"{version} is {former}: only a candidate or a retired version is tried")
    if share is None or not 0 < share <= 1:
        raise IllegalTransition(f"the share of a {mode} lies above 0 and is at most 1, not {share}")
    return Trial(version, mode, share, sequence, since, former)


def _without_trial(fleet: Fleet) -> dict[str, State]:
    """Return the states as if nothing was on trial."""
    back = {fleet.trial.version: fleet.trial.former} if fleet.trial else {}
    return {**fleet.states, **back}


def _ruled_out(fleet: Fleet, action: str, version: str) -> State:
    """Return the state of a version that is never to serve again; raises IllegalTransition where it may."""
    if action == "pruned":
        if version in (fleet.serving, fleet.rollback_target):
            raise IllegalTransition(f"{version} serves, or is what a rollback returns to: it is not pruned")
        if fleet.trial is not None and version == fleet.trial.version:
            raise IllegalTransition(f"{version} is on trial: it is not pruned")
        return "pruned"
    state = fleet.states[version]
    if state not in ("candidate", "retired", "canary", "shadow"):
        raise IllegalTransition(
            f"{version} is {state}: only a candidate, a retired version or one on trial is rejected"
        )
    return "rejected"


def fold(entries: Iterable[LogLine]) -> Fleet:
    """Return the fleet after all `entries`, in order of their sequence."""
    fleet = Fleet()
    for entry in entries:
        fleet = apply(fleet, entry.action, entry.version, entry.sequence, share=entry.share, at=entry.at)
    return fleet
