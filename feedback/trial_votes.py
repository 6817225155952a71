"""The votes that compare a version on trial with the stable one: read and counted, one a person.

Owns which votes count. What they mean for the trial is `evaluation.canary`'s affair.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from feedback import tables
from feedback.events import FEEDBACK, Rating, Thumb
from feedback.rater_records import RaterRecords
from feedback.votes import person_of, verdicts_of


@dataclass(frozen=True, slots=True)
class GivenVote:
    """A thumb or a rating, and whose response it is about.

    `rater` gave it; `key_id` and `user` are the end user's whose request was answered, by whom arms are
    drawn (`user` is None where the request named none). `versions` made the response's tokens.
    """

    rater: str
    key_id: str
    user: str | None
    versions: frozenset[str]
    said: Thumb | Rating


@dataclass(frozen=True, slots=True)
class ArmVotes:
    """The votes on the responses of one version."""

    good: int = 0
    bad: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return self.good + self.bad

    @property
    def share(self) -> float | None:
        """The share of good ones, if there are any."""
        return self.good / self.count if self.count else None


@dataclass(frozen=True, slots=True)
class TrialVotes:
    """The votes of both arms, and how many were left out, by reason."""

    trial: ArmVotes = ArmVotes()
    stable: ArmVotes = ArmVotes()
    left_out: Mapping[str, int] = field(default_factory=dict)


def count_votes(
    votes: Iterable[GivenVote], *, trial: str, stable: str, quarantined: Collection[str]
) -> TrialVotes:
    """Count the first vote of each end user and each rater on a response wholly by `trial` or `stable`.

    `votes` come in the order in which they were stored. One person's votes hang together, and a test that
    took them for independent would be too sure: an end user has one, whoever votes on what it was answered,
    and a rater has one, whomever that was answered. Who changes a vote afterwards has had it: a test that is
    looked at all the time can't take back what it has seen. A rating of 4 is in between and counts for
    neither, but is its giver's only one.
    """
    arms = {trial: Counter[str](), stable: Counter[str]()}
    left_out: Counter[str] = Counter()
    seen: set[tuple[str, str | None]] = set()
    for vote in votes:
        (arm,) = vote.versions if len(vote.versions) == 1 else (None,)
        persons = _persons(vote)
        if vote.rater in quarantined:
            left_out["by a rater in quarantine"] += 1
        elif arm not in arms:
            left_out["on a response by several versions or another one"] += 1
        elif persons & seen:
            left_out["not the first of its end user or rater"] += 1
        else:
            seen |= persons
            (label,) = verdicts_of(vote.said).values()
            if label == "=":
                left_out["a rating of 4, which is in between"] += 1
            else:
                arms[arm][label] += 1
    return TrialVotes(
        ArmVotes(arms[trial]["+"], arms[trial]["-"]),
        ArmVotes(arms[stable]["+"], arms[stable]["-"]),
        dict(left_out),
    )


def trial_votes(engine: Engine, *, trial: str, stable: str, since: float) -> TrialVotes:
    """Count the stored votes on responses to requests since Unix time `since`; see `count_votes`."""
    quarantined = RaterRecords(engine).quarantined()
    return count_votes(
        given_votes(engine, since), trial=trial, stable=stable, quarantined=frozenset(quarantined)
    )


def given_votes(engine: Engine, since: float) -> list[GivenVote]:
    """Read the thumbs and ratings on served responses since Unix time `since`, in the order of their storing.

    Those that were superseded are among them.
    """
    events, targets, completions, choices = (
        tables.events,
        tables.event_targets,
        tables.completions,
        tables.choices,
    )
    # A thumb's target names its choice; its place in the JSON is no business of SQL.
    choice = completions.c.id + "#" + sa.cast(choices.c["index"], sa.Text)
    query = (
        sa.select(
            events.c.rater,
            completions.c.key_id,
            completions.c.user,
            choices.c.weight_spans,
            events.c.feedback,
        )
        .select_from(completions)
        .join(
            choices,
            sa.and_(choices.c.completion_id == completions.c.id, choices.c.part == completions.c.part),
        )
        .join(targets, targets.c.completion_id == completions.c.id)
        .join(events, sa.and_(events.c.event_id == targets.c.event_id, events.c.target == choice))
        .where(
            completions.c.created_at >= since,
            completions.c.source == "serving",
            events.c.type.in_(("thumb", "rating")),
            events.c.position.is_not(None),
        )
        .order_by(events.c.position)
    )
    with engine.execution_options(read_only=True).connect() as connection:
        return [
            GivenVote(
                rater=row.rater,
                key_id=row.key_id,
                user=row.user,
                versions=frozenset(span["version"] for span in row.weight_spans),
                said=FEEDBACK.validate_python(row.feedback),  # type: ignore[arg-type]
            )
            for row in connection.execute(query)
        ]


def _persons(vote: GivenVote) -> set[tuple[str, str | None]]:
    """Return whose one vote this is: the end user's, by name or as all of its key, and the rater's."""
    end_user: tuple[str, str | None] = (vote.key_id, vote.user)
    # A client that names no rater hands on what the end user said.
    if person_of(vote.rater) in (f"{vote.key_id}/", f"{vote.key_id}/anonymous:"):
        return {end_user}
    return {end_user, ("rater", vote.rater)}
