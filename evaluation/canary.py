"""What becomes of a version on trial: it goes on, is promoted, or is rolled back, and why.

Owns the decision, as a pure function. Counting votes is `feedback.trial_votes`' affair, acting on what is
decided `instructloop.canary`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluation.sequential import log_e_not_worse, log_e_worse
from feedback.trial_votes import ArmVotes, TrialVotes
from registry.registry import Replica, Trial
from registry.settings import RolloutSettings

Move = Literal["keep", "promote", "rollback"]

_LARGEST_LOG_E = 600.0
"""Beyond it e is told as so much: no number is infinite in JSON."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What the rule does with a trial, why in a sentence, and the figures behind it as plain JSON."""

    move: Move
    reason: str
    figures: dict[str, Any]


def decide(
    trial: Trial,
    stable: str,
    votes: TrialVotes,
    replicas: Sequence[Replica],
    *,
    settings: RolloutSettings,
    now: float,
    stale_seconds: float,
) -> Decision:
    """Decide on a trial beside `stable` at Unix time `now`.

    A version that can't be loaded is rolled back, then a canary that its users find worse; one that they find
    not worse is promoted; one on which they decided nothing in time is rolled back too. Replicas that were
    not heard of for `stale_seconds` don't count.
    """
    figures = _figures(votes, settings) | {"hours": (now - trial.since) / 3600}
    if (failure := _failure(trial, replicas, now - stale_seconds)) is not None:
        return Decision("rollback", failure, figures)
    if trial.mode == "shadow":
        reason = "A shadow goes on until it is withdrawn: nobody sees its answers, so nobody votes on them."
        return Decision("keep", reason, figures)
    shares = f"{_text(votes.trial)} on {trial.version} were good, {_text(votes.stable)} on {stable}"
    if figures["e_worse"] >= figures["e_needed"]:
        reason = f"Users find it worse: {shares}; {_evidence('e_worse', figures)}."
        return Decision("rollback", reason, figures)
    enough = votes.trial.count >= settings.canary_minimum_votes
    if figures["e_not_worse"] >= figures["e_needed"] and enough:
        reason = (
            f"Users find it not worse by {settings.canary_margin:g} or more: {shares}; "
            f"{_evidence('e_not_worse', figures)}."
        )
        return Decision("promote", reason, figures)
    if figures["hours"] >= settings.canary_hours:
        reason = f"The votes of {settings.canary_hours:g} hours don't decide: {shares}."
        return Decision("rollback", reason, figures)
    return Decision("keep", _waits_for(shares, enough, figures), figures)


def _failure(trial: Trial, replicas: Sequence[Replica], seen_since: float) -> str | None:
    """Say that no replica of the trial can load its version, if so."""
    live = [
        replica
        for replica in replicas
        if replica.track == "trial" and replica.state != "stopped" and replica.seen_at > seen_since
    ]
    if not live or any(one.state != "failed" or one.desired != trial.version for one in live):
        return None
    details = "; ".join(f"{replica.id}: {replica.detail}" for replica in live)
    return f"No replica of the trial can load {trial.version}: {details}."


def _figures(votes: TrialVotes, settings: RolloutSettings) -> dict[str, Any]:
    counts = (votes.trial.good, votes.trial.bad, votes.stable.good, votes.stable.bad)
    worse, not_worse = log_e_worse(*counts), log_e_not_worse(*counts, settings.canary_margin)
    return {
        "trial_votes": _arm(votes.trial),
        "stable_votes": _arm(votes.stable),
        "left_out": dict(votes.left_out),
        "e_worse": math.exp(min(_LARGEST_LOG_E, worse.item())),
        "e_not_worse": math.exp(min(_LARGEST_LOG_E, not_worse.item())),
        "e_needed": 1 / settings.canary_alpha,
        "margin": settings.canary_margin,
        "minimum_votes": settings.canary_minimum_votes,
    }


def _waits_for(shares: str, enough: bool, figures: dict[str, Any]) -> str:
    reason = (
        f"The votes don't decide yet: {shares}; evidence that it is worse {figures['e_worse']:.3g}, that it "
        f"is not by {figures['margin']:g} or more {figures['e_not_worse']:.3g}, of {figures['e_needed']:g}"
    )
    return reason + ("." if enough else f"; a promotion takes {figures['minimum_votes']} votes on it.")


def _evidence(name: str, figures: dict[str, Any]) -> str:
    return f"evidence {figures[name]:.3g} of {figures['e_needed']:g}"


def _arm(votes: ArmVotes) -> dict[str, Any]:
    return {"good": votes.good, "bad": votes.bad, "share": votes.share}


def _text(votes: ArmVotes) -> str:
    share = "" if votes.share is None else f" ({votes.share:.0%})"
    return f"{votes.good} of {votes.count} votes{share}"
