"""What a version learned from, and what learned from an event: read from what rounds wrote down.

Owns the way back from a version over its parents and reward models, and the way forth from events: from those
that are there, and from those that were forgotten, of which positions are left. Events are ids here; what
they say is `feedback`'s. What each round used is written by `registry.rounds`.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa

from registry.rounds import Use
from registry.tables import ROUND_EVENTS, ROUND_STAGES, ROUNDS

LEARNED: tuple[Use, ...] = ("trained", "older", "unrecorded")
"""The uses by which weights come to depend on an event; held-out ones only decide what is promoted."""

Trace = tuple[int, int | None]
"""An event's position, and the number of the erasure that took it; None while it is there."""

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


@dataclass(frozen=True, slots=True)
class Learned:
    """A version that learned from an event, and how."""

    version: str
    how: str


class _Made(NamedTuple):
    """What a round makes: its policy or its reward model."""

    what: Literal["policy", "reward_model"]
    round_id: int


@dataclass(frozen=True, slots=True)
class _Round:
    """The part of a round's row that says what it went out from.

    `returned` has the spans of positions that came back to it by rater, `without_raters` digests; `erasures`
    numbers the last erasure before it read its slice.
    """

    id: int
    version: str | None
    parent: str | None
    reward_model_from: int | None
    reward_backbone: str | None
    repeat_of: int | None
    cursor: int
    cutoff: int
    returned: Mapping[str, Sequence[Sequence[int]]] | None = None
    reward_older_share: float | None = None
    without_raters: Sequence[str] | None = None
    erasures: int | None = None

    def holds(self, positions: Sequence[int]) -> bool:
        """Whether one of the positions, which are in order, lies in the slice or in what came back to it.

        Feedback that was held back in quarantine comes back to the first round after that was lifted.
        Positions don't tell whose it is, so all of such a span counts: rather one too many.
        """
        spans = [
            (self.cursor, self.cutoff),
            *(span for own in (self.returned or {}).values() for span in own),
        ]
        return any(bisect_right(positions, start) < bisect_right(positions, end) for start, end in spans)


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
        uses = [use for use in self.uses(event_id) if use.use in LEARNED]
        with self._reader.connect() as connection:
            rounds = _rounds(connection)
        return [one.version for one in _reached(rounds, {use.round_id: "" for use in uses})]

    def learned_from(
        self, traces: Sequence[Trace], is_it: Callable[[str], bool], without: str | None = None
    ) -> list[Learned]:
        """List the versions that learned from one of the events that left `traces`, oldest round first.

        As `learned`, of events some of which may have been forgotten: `is_it` tells them by their ids in what
        rounds wrote down. Of a round that wrote down nothing, each counts whose slice held one that was not
        erased before, or that drew older feedback from among them, unless it left out the rater with the
        digest `without`: rather one too many.
        """
        with self._reader.connect() as connection:
            rounds = _rounds(connection)
            direct = {}
            for number, round_ in rounds.items():
                how = _may_have_learned(round_, traces, without)
                if how is None:
                    continue
                written = _written(connection, number)
                if written is None:
                    direct[number] = how
                elif any(is_it(event_id) for event_id in written):
                    direct[number] = f"round {number} learned from it"
        return _reached(rounds, direct)

    def over(self, positions: Sequence[int]) -> list[int]:
        """Return the rounds, whatever became of them, whose slice holds one of the positions, oldest first.

        `positions` are in order.
        """
        with self._reader.connect() as connection:
            return [
                number for number, round_ in sorted(_rounds(connection).items()) if round_.holds(positions)
            ]


_PUBLISHED = (
    (ROUND_STAGES.c.round_id == ROUNDS.c.id)
    & (ROUND_STAGES.c.name == "publish")
    & (ROUND_STAGES.c.state == "done")
)
# A round that failed in the gate, or that is in it, has published its candidate too.
_VERSION = sa.func.coalesce(ROUNDS.c.version, ROUND_STAGES.c.result["version"].as_string()).label("version")
_DATASET = ROUND_STAGES.alias("dataset_stages")


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
            config[("standing", "returned")].label("returned"),
            config[("training", "reward_older_share")].as_float().label("reward_older_share"),
            config["without_raters"].label("without_raters"),
            _DATASET.c.result["erasures"].as_integer().label("erasures"),
        )
        .outerjoin(ROUND_STAGES, _PUBLISHED)
        .outerjoin(_DATASET, (_DATASET.c.round_id == ROUNDS.c.id) & (_DATASET.c.name == "dataset"))
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


def _may_have_learned(round_: _Round, traces: Sequence[Trace], without: str | None) -> str | None:
    """Say how a round may have learned from one of the events, as far as positions tell."""
    if without is not None and without in (round_.without_raters or ()):
        return None
    there = (erasure is None or erasure > (round_.erasures or 0) for _, erasure in traces)
    seen = sorted(position for (position, _), is_there in zip(traces, there, strict=True) if is_there)
    if round_.holds(seen):
        return f"round {round_.id} learned from it"
    if round_.reward_older_share and seen and seen[0] <= round_.cursor:
        return f"round {round_.id} drew from older feedback, perhaps from it"
    return None


def _written(connection: sa.Connection, number: int) -> list[str] | None:
    """Return the events that a round wrote down to have learned from; None if it wrote down nothing."""
    columns = ROUND_EVENTS.c
    of_round = sa.select(columns.event_id).where(columns.round_id == number)
    if connection.execute(of_round.where(columns.use != "unrecorded").limit(1)).first() is None:
        return None
    return list(connection.execute(of_round.where(columns.use.in_(LEARNED))).scalars())


def _reached(rounds: Mapping[int, _Round], direct: Mapping[int, str]) -> list[Learned]:
    """Return the versions of the rounds that learned, as `direct` says how, and all that came of these."""
    sources = _sources(rounds)
    found = {_Made("reward_model", number): how for number, how in direct.items()}
    before = -1
    while before < len(found):  # a round may begin with what a later one made
        before = len(found)
        for made in sorted(sources, key=lambda one: (one.round_id, one.what != "reward_model")):
            reached = next((source for source in sources[made] if source in found), None)
            if made not in found and reached is not None:
                found[made] = _how(made, reached, rounds, found)
    policies = sorted(made for made in found if made.what == "policy")
    versions = [(rounds[made.round_id].version, found[made]) for made in policies]
    return [Learned(version, how) for version, how in versions if version is not None]


def _how(made: _Made, source: _Made, rounds: Mapping[int, _Round], found: Mapping[_Made, str]) -> str:
    if source.what == "policy":
        return f"descends from {rounds[source.round_id].version}"
    if source.round_id == made.round_id:
        return found[source]
    return f"its reward model began as that of round {source.round_id}"


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
