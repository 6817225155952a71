"""What events say in a form in which raters can be compared: verdicts on units that others judge, too.

Owns how an event becomes verdicts. What follows from them is in `raters` (statistics) and `influence`
(weights).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from feedback.events import ChoiceRef, Event, Ranking, Rating, Thumb, references

Label = Literal["+", "-", "="]
"""Of a pair: the first is better, the second, neither. Of a single response: good, bad, in between."""

Unit = tuple[str, ...]
"""What a verdict is on: one response by its name, or a pair of responses in the order of their names."""


_ANONYMOUS = "anonymous:"


@dataclass(frozen=True, slots=True)
class Vote:
    """One event of a rater on one prompt, and what it says.

    `id` is the event's, `key` the key that vouches for `rater`, `prompt` the prompt's hash. `verdicts` maps
    units to what is said of them. `weight` is what the vote would weigh if nothing were known of its rater.
    `at` is in Unix seconds.
    """

    id: str
    rater: str
    key: str
    prompt: str
    verdicts: Mapping[Unit, Label] = field(default_factory=dict)
    weight: float = 1.0
    task: str = ""
    at: float = 0.0


def key_of(rater: str) -> str:
    """Return the key that vouches for a rater: a rater is named in its key's namespace, `<key id>/<name>`."""
    return rater.partition("/")[0]


def person_of(rater: str) -> str:
    """Return whom a rater may be: itself, or where it has no name all such raters of its key."""
    key, _, name = rater.partition("/")
    return f"{key}/{_ANONYMOUS}" if name.startswith(_ANONYMOUS) else rater


def votes_of(events: Iterable[Event], prompts: Mapping[tuple[str, int], str]) -> list[Vote]:
    """Turn events into votes, in their order; `prompts` gives the prompt's hash of a completion's choice.

    Demonstrations are left out, as nobody else can say the same, and so are events whose prompt is unknown.
    """
    votes = []
    for event in events:
        said = event.feedback
        refs = references(said)
        prompt = prompts.get((refs[0].completion_id, refs[0].choice)) if refs else None
        if prompt is not None and isinstance(said, Ranking | Thumb | Rating):
            votes.append(
                Vote(
                    id=event.event_id,
                    rater=event.rater,
                    key=key_of(event.rater),
                    prompt=prompt,
                    verdicts=verdicts_of(said),
                    task=task_of(event),
                    at=event.received_at,
                )
            )
    return votes


def verdicts_of(said: Ranking | Thumb | Rating) -> dict[Unit, Label]:
    """Return what an event says: of each pair of a ranking, or of the one response.

    A thumb and a rating of the same response are comparable: 5 to 7 is good, 1 to 3 bad, 4 in between.
    """
    match said:
        case Thumb():
            label: Label = "+" if said.value == "up" else "-"
        case Rating():
            label = "+" if said.score > 4 else "-" if said.score < 4 else "="
        case Ranking():
            return ranking_verdicts([[_name(ref) for ref in group] for group in said.groups])
    return {(_name(ChoiceRef(completion_id=said.completion_id, choice=said.choice)),): label}


def ranking_verdicts(groups: Sequence[Sequence[str]]) -> dict[Unit, Label]:
    """Return the verdict on every pair of a ranking of named responses: groups, best first, ties within."""
    ranks = sorted((name, rank) for rank, group in enumerate(groups) for name in group)
    found: dict[Unit, Label] = {}
    for (first, rank), (second, other) in combinations(ranks, 2):
        found[first, second] = "=" if rank == other else "+" if rank < other else "-"
    return found


def task_of(event: Event) -> str:
    """Return the task that the event's context names (`task`), else the kind of feedback."""
    named = (event.feedback.context or {}).get("task")
    return named if isinstance(named, str) and named else event.feedback.type


def _name(ref: ChoiceRef) -> str:
    return f"{ref.completion_id}#{ref.choice}"
