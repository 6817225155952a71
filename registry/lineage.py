"""What a version learned from, and what learned from an event: read from what rounds wrote down.

Owns the way back from a version over its parents and reward models, and the way forth from an event. Events
are ids here; what they say is `feedback`'s. What each round used is written by `registry.rounds`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa

from registry.rounds import Use
from registry.tables import ROUND_EVENTS, ROUND_STAGES, ROUNDS

LEARNED: tuple[Use, ...] = ("trained", "older", "unrecorded")
"""The uses by which weights come to depend on an event; held-out ones only decide what is promoted."""

Through = Literal["own", "policy", "reward_model"]
_CHUNK = 500


@dataclass(frozen=True, slots=True)
class RoundUse:
    """What a round did with one event.

    `version` is what the round published, if it has; `repeat_of` the round whose slice it ran on again.
    """

    round_id: int
    version: str | None
    repeat_of: int | None
    use: Use
    reason: str | None


@dataclass(frozen=True, slots=True)
class RoundBehind:
    """A round behind a version: its own, or one `through` which its policy or a reward model came.

    `events` counts the round's events by use, `reasons` those of which a reason is told, mostly why they are
    left out. The round learned from the slice `(cursor, cutoff]`, and from older events.
    """

    round_id: int
    version: str | None
    through: Through
    repeat_of: int | None
    cursor: int
    cutoff: int
    events: Mapping[str, int]
    reasons: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class UsedEvent:
    """An event of a round behind a version."""

    round_id: int
    event_id: str
    use: Use
    reason: str | None


class _Made(NamedTuple):
    """What a round makes: its policy or its reward model."""

    what: Literal["policy", "reward_model"]
    round_id: int


@dataclass(frozen=True, slots=True)
class _Round:
    """The part of a round's row that says what it went out from."""

    id: int
    version: str | None
    parent: str | None
    reward_model_from: int | None
    reward_backbone: str | None
    repeat_of: int | None
    cursor: int
    cutoff: int


class Lineage:
    """The lineage of all versions in the database of `engine`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._reader = engine.execution_options(read_only=True)

    def behind(self, version: str, *, counted: bool = True) -> list[RoundBehind]:
        """List the rounds behind a version, newest first; none for a version that no round made.

        Each round went out from the policy of its parent version, and from the reward model of the round
        before it, whose candidate may have been rejected. A first reward model starts from the SFT policy.
        Unless `counted`, for which every event is looked at, they come without counts.
        """
        with self._reader.connect() as connection:
            rounds = _rounds(connection)
            own = next((found.id for found in rounds.values() if found.version == version), None)
            if own is None:
                return []
            through = _through(own, rounds)
            counts = _counts(connection, sorted(through)) if counted else {}
        return [
            RoundBehind(
                round_id=number,
                version=rounds[number].version,
                through=through[number],
                repeat_of=rounds[number].repeat_of,
                cursor=rounds[number].cursor,
                cutoff=rounds[number].cutoff,
                events=counts.get(number, ({}, {}))[0],
                reasons=counts.get(number, ({}, {}))[1],
            )
            for number in sorted(through, reverse=True)
        ]

    def events(
        self,
        rounds: Sequence[int],
        *,
        limit: int,
        after: tuple[int, str] | None = None,
        use: Use | None = None,
    ) -> list[UsedEvent]:
        """List the next `limit` events of `rounds`, in that order and within each by id.

        `after` is the round and id of the last event that is known already.
        """
        columns = ROUND_EVENTS.c
        query = sa.select(columns.round_id, columns.event_id, columns.use, columns.reason)
        query = query.order_by(columns.event_id)
        if use is not None:
            query = query.where(columns.use == use)
        start = rounds.index(after[0]) if after is not None else 0
        found: list[UsedEvent] = []
        with self._reader.connect() as connection:
            for number in rounds[start:]:
                page = query.where(columns.round_id == number).limit(limit - len(found))
                if after is not None and number == after[0]:
                    page = page.where(columns.event_id > after[1])
                found += [UsedEvent(**row._mapping) for row in connection.execute(page)]
                if len(found) == limit:
                    break
        return found

    def uses(self, event_id: str) -> list[RoundUse]:
        """List what rounds did with an event, oldest first."""
        columns = ROUND_EVENTS.c
        query = (
            sa.select(columns.round_id, _VERSION, ROUNDS.c.repeat_of, columns.use, columns.reason)
            .join(ROUNDS, ROUNDS.c.id == columns.round_id)
            .outerjoin(ROUND_STAGES, _PUBLISHED)
            .where(columns.event_id == event_id)
            .order_by(columns.round_id)
        )
        with self._reader.connect() as connection:
            return [RoundUse(**row._mapping) for row in connection.execute(query)]

    def learned(self, event_id: str) -> list[str]:
        """List the versions that learned from an event, oldest round first.

        Those are the ones that a round made of it, and all that came from their weights or reward models.
        """
        reached = [
            _Made(what, use.round_id)
            for use in self.uses(event_id)
            if use.use in LEARNED
            for what in ("policy", "reward_model")
        ]
        with self._reader.connect() as connection:
            rounds = _rounds(connection)
        made_of: dict[_Made, list[_Made]] = {}
        for made, sources in _sources(rounds).items():
            for source in sources:
                made_of.setdefault(source, []).append(made)
        policies = sorted(made.round_id for made in _closure(reached, made_of) if made.what == "policy")
        versions = [rounds[number].version for number in policies]
        return [version for version in versions if version is not None]


_PUBLISHED = (
    (ROUND_STAGES.c.round_id == ROUNDS.c.id)
    & (ROUND_STAGES.c.name == "publish")
    & (ROUND_STAGES.c.state == "done")
)
# A round that failed in the gate, or that is in it, has published its candidate too.
_VERSION = sa.func.coalesce(ROUNDS.c.version, ROUND_STAGES.c.result["version"].as_string()).label("version")


def _rounds(connection: sa.Connection) -> dict[int, _Round]:
    """Load all rounds that have begun, by id."""
    config = ROUNDS.c.config
    query = (
        sa.select(
            ROUNDS.c.id,
            _VERSION,
            config["parent"].as_string().label("parent"),
            config["reward_model_from"].as_integer().label("reward_model_from"),
            config[("training", "reward_backbone")].as_string().label("reward_backbone"),
            ROUNDS.c.repeat_of,
            ROUNDS.c.cursor,
            ROUNDS.c.cutoff,
        )
        .outerjoin(ROUND_STAGES, _PUBLISHED)
        .where(ROUNDS.c.cutoff.is_not(None))
    )
    return {row.id: _Round(**row._mapping) for row in connection.execute(query)}


def _sources(rounds: Mapping[int, _Round]) -> dict[_Made, list[_Made]]:
    """List what each policy and reward model was made from, beside the events of its own round."""
    makers = {round_.version: number for number, round_ in rounds.items() if round_.version is not None}
    sources = {}
    for number, round_ in rounds.items():
        # A version that no round made has nothing behind it.
        parent = [_Made("policy", makers[round_.parent])] if round_.parent in makers else []
        sources[_Made("policy", number)] = [_Made("reward_model", number), *parent]
        if round_.reward_model_from is not None:
            before = [_Made("reward_model", round_.reward_model_from)]
        else:
            before = [] if round_.reward_backbone else parent
        sources[_Made("reward_model", number)] = before
    return sources


def _closure(start: Sequence[_Made], edges: Mapping[_Made, Sequence[_Made]]) -> set[_Made]:
    """Everything that is reached from `start`, with it."""
    reached, left = set(start), list(start)
    while left:
        for made in edges.get(left.pop(), ()):
            if made not in reached:
                reached.add(made)
                left.append(made)
    return reached


def _through(own: int, rounds: Mapping[int, _Round]) -> dict[int, Through]:
    """Say how each round behind round `own` is: by weights of the policy, or only by a reward model."""
    reached = _closure([_Made("policy", own)], _sources(rounds))
    through: dict[int, Through] = dict.fromkeys((made.round_id for made in reached), "reward_model")
    through |= dict.fromkeys((made.round_id for made in reached if made.what == "policy"), "policy")
    return through | {own: "own"}


def _counts(
    connection: sa.Connection, numbers: Sequence[int]
) -> dict[int, tuple[dict[str, int], dict[str, int]]]:
    """Count the events of each round by use and by reason."""
    counts: dict[int, tuple[dict[str, int], dict[str, int]]] = {}
    for row in _grouped(connection, numbers):
        by_use, by_reason = counts.setdefault(row.round_id, ({}, {}))
        by_use[row.use] = by_use.get(row.use, 0) + row.events
        if row.reason is not None:
            by_reason[row.reason] = by_reason.get(row.reason, 0) + row.events
    return counts


def _grouped(connection: sa.Connection, numbers: Sequence[int]) -> Iterator[sa.Row[Any]]:
    columns = (ROUND_EVENTS.c.round_id, ROUND_EVENTS.c.use, ROUND_EVENTS.c.reason)
    query = sa.select(*columns, sa.func.count().label("events")).group_by(*columns).order_by(*columns)
    for start in range(0, len(numbers), _CHUNK):
        chunk = numbers[start : start + _CHUNK]
        yield from connection.execute(query.where(ROUND_EVENTS.c.round_id.in_(chunk)))
