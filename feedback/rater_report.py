"""What an operator sees of raters: each one's state and figures, and how far they agree.

It reads and puts together; the estimates are `reliability`'s and `raters`', the log is `rater_records`'.
"""

from typing import Any

from feedback.rater_records import RaterLogEntry, RaterRecords
from feedback.raters import (
    agreement,
    agreement_by_task,
    agreement_over_time,
    comparisons_of,
    crowd_bradley_terry,
    units_of,
)
from feedback.reliability import Standing, assess, is_trusted
from feedback.settings import RaterSettings


def raters_report(records: RaterRecords, cutoff: int, settings: RaterSettings) -> list[dict[str, Any]]:
    """List the raters of the latest votes up to position `cutoff`, and all in quarantine, as plain JSON.

    Those come first that wait for an operator: in quarantine and not confirmed, then suspected; then who gave
    most votes.
    """
    states = records.states()
    votes = records.votes(cutoff, settings.evidence_events)
    excluded = {rater for rater, last in states.items() if last.state != "lifted"}
    gold = records.votes_of_events([item.event.event_id for item in records.gold()])
    standings = assess(votes, settings, gold=gold, excluded=excluded).standings
    follows = crowd_bradley_terry(comparisons_of(votes)).reliability
    found = [
        _row(rater, standings.get(rater), states.get(rater), settings) | {"bradley_terry": follows.get(rater)}
        for rater in standings.keys() | states.keys()
    ]
    found.sort(key=lambda row: (_urgency(row), -row["votes"], row["rater"]))
    return found


def agreement_report(
    records: RaterRecords, cutoff: int, settings: RaterSettings, days: int
) -> dict[str, Any]:
    """Tell how far raters agree on the latest votes: on all, by task, and over time in periods of `days`."""
    quarantined = set(records.quarantined())
    votes = [
        vote for vote in records.votes(cutoff, settings.evidence_events) if vote.rater not in quarantined
    ]
    return {
        "all": agreement(units_of(votes)).figures(),
        "by_task": {name: own.figures() for name, own in agreement_by_task(votes).items()},
        "over_time": {name: own.figures() for name, own in agreement_over_time(votes, days).items()},
        "days": days,
    }


def _row(
    rater: str, standing: Standing | None, last: RaterLogEntry | None, settings: RaterSettings
) -> dict[str, Any]:
    return {
        "rater": rater,
        "state": "active" if last is None else last.state,
        "reason": None if last is None else last.reason,
        "trusted": is_trusted(rater, settings),
        "votes": standing.votes if standing else 0,
        "judged": standing.judged if standing else 0,
        "agreement": standing.agreement if standing else None,
        "accuracy": standing.accuracy if standing else None,
        "reliability": standing.reliability if standing else None,
        "gold_asked": standing.gold_asked if standing else 0,
        "gold_right": standing.gold_right if standing else 0,
        "votes_as": standing.voice if standing and standing.voice != rater else None,
        "suspicions": list(standing.suspicions) if standing else [],
    }


def _urgency(row: dict[str, Any]) -> int:
    if row["state"] == "quarantined":
        return 0
    return 1 if row["suspicions"] and row["state"] == "active" else 2
