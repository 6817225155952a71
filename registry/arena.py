"""The arena: pairs of answers that people are asked about blindly, and what they said.

Owns the tables `arena_pairs` and `arena_votes`. Nobody learns here who wrote an answer: an evaluation that
offers pairs keeps the names, and each rater sees the two answers in an order of its own. What follows from
votes is the evaluation's.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from registry.tables import ARENA_PAIRS, ARENA_VOTES

Choice = Literal["first", "second", "tie"]

_CHUNK = 500
# Of the pairs with the fewest votes a rater gets one of so many, its own: not all raters the same.
_SPREAD = 50
_OUTCOME: Mapping[str, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}


class UnknownPair(LookupError):  # noqa: N818
    """No pair has this id; it may have been withdrawn."""


class AlreadyVoted(ValueError):  # noqa: N818
    """The rater has said something else of the pair before; one vote a rater stands."""


@dataclass(frozen=True, slots=True)
class OfferedPair:
    """Two answers to the last of `messages` (role and content), to be compared by `axis`."""

    messages: Sequence[Mapping[str, str]]
    first: str
    second: str
    axis: str = "overall"

    @property
    def id(self) -> str:
        """The pair's name: the same pair offered again is the same pair."""
        said = [[dict(message) for message in self.messages], self.first, self.second, self.axis]
        text = json.dumps(said, sort_keys=True)
        return "pair-" + hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class BlindPair:
    """A pair as one rater sees it: which of the two is called first is drawn anew for each rater."""

    id: str
    axis: str
    messages: list[dict[str, str]]
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class ArenaVote:
    """What one rater said: `outcome` is the offered first answer's, 1 won, 0 lost, 0.5 tied.

    `first_labels` and `second_labels` are the metadata that the rater gave the two answers as offered; `at`
    is in Unix seconds.
    """

    rater: str
    outcome: float
    first_labels: list[str]
    second_labels: list[str]
    at: float


class Arena:
    """The arena in the database of `engine`; safe to share between threads. `clock` gives Unix seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)
        self._clock = clock

    def offer(self, pairs: Sequence[OfferedPair], wanted: int = 1) -> list[str]:
        """Have people asked about each pair until `wanted` of them voted; return the pairs' ids in order.

        A pair that is there already stays, with its votes; more votes may be wanted of it than before.
        """
        if wanted < 1:
            raise ValueError("at least one vote has to be wanted")
        by_id = {pair.id: pair for pair in pairs}
        with self._engine.begin() as connection:
            for chunk in _chunks(sorted(by_id)):
                asked = ARENA_PAIRS.c.id.in_(chunk)
                known = set(connection.execute(sa.select(ARENA_PAIRS.c.id).where(asked)).scalars())
                more = sa.update(ARENA_PAIRS).where(asked, ARENA_PAIRS.c.wanted < wanted)
                connection.execute(more.values(wanted=wanted))
                rows = [self._row(by_id[id], wanted) for id in chunk if id not in known]
                if rows:
                    connection.execute(_insert_new(connection), rows)
        return [pair.id for pair in pairs]

    def next_pair(self, rater: str) -> BlindPair | None:
        """Return a pair that this rater has not voted on and of which votes are wanted; None without any.

        Until the rater votes, it stays the same one as long as others do not finish it.
        """
        counts = (
            sa.select(ARENA_VOTES.c.pair_id, sa.func.count().label("votes"))
            .group_by(ARENA_VOTES.c.pair_id)
            .subquery()
        )
        votes = sa.func.coalesce(counts.c.votes, 0)
        own = sa.select(ARENA_VOTES.c.pair_id).where(ARENA_VOTES.c.rater == rater)
        query = (
            sa.select(ARENA_PAIRS)
            .outerjoin(counts, counts.c.pair_id == ARENA_PAIRS.c.id)
            .where(votes < ARENA_PAIRS.c.wanted, ARENA_PAIRS.c.id.not_in(own))
            .order_by(votes, ARENA_PAIRS.c.id)
            .limit(_SPREAD)
        )
        with self._reader.connect() as connection:
            rows = connection.execute(query).all()
        if not rows:
            return None
        row = min(rows, key=lambda row: _draw(row.seed, rater))
        answers = [row.first, row.second]
        first, second = reversed(answers) if _swapped(row.seed, rater) else answers
        return BlindPair(row.id, row.axis, row.messages, first, second)

    def vote(
        self,
        pair_id: str,
        rater: str,
        choice: Choice,
        *,
        first_labels: Sequence[str] = (),
        second_labels: Sequence[str] = (),
    ) -> None:
        """Write down a vote on a pair as this rater saw it; the same vote again changes nothing.

        Raises UnknownPair, and AlreadyVoted for another vote than before.
        """
        with self._engine.begin() as connection:
            seed = connection.execute(
                sa.select(ARENA_PAIRS.c.seed).where(ARENA_PAIRS.c.id == pair_id)
            ).scalar_one_or_none()
            if seed is None:
                raise UnknownPair(f"no such pair: {pair_id}")
            labels = [list(first_labels), list(second_labels)]
            outcome = _OUTCOME[choice]
            if _swapped(seed, rater):
                outcome, labels = 1 - outcome, labels[::-1]
            row = {"pair_id": pair_id, "rater": rater, "outcome": outcome, "at": self._clock()}
            row |= {"first_labels": labels[0], "second_labels": labels[1]}
            try:
                with connection.begin_nested():
                    connection.execute(sa.insert(ARENA_VOTES).values(**row))
            except sa.exc.IntegrityError:
                before = self._of_rater(connection, pair_id, rater)
                if before is None:
                    raise UnknownPair(f"no such pair: {pair_id}") from None
                if (before.outcome, [before.first_labels, before.second_labels]) != (outcome, labels):
                    raise AlreadyVoted(f"this rater has voted on {pair_id} before") from None

    def votes(self, pair_ids: Sequence[str]) -> dict[str, list[ArenaVote]]:
        """Return the votes on each of these pairs, oldest first; a pair without votes has none."""
        found: dict[str, list[ArenaVote]] = {id: [] for id in pair_ids}
        with self._reader.connect() as connection:
            for chunk in _chunks(sorted(found)):
                query = sa.select(ARENA_VOTES).where(ARENA_VOTES.c.pair_id.in_(chunk))
                for row in connection.execute(query.order_by(ARENA_VOTES.c.at, ARENA_VOTES.c.rater)):
                    found[row.pair_id].append(_vote(row))
        return found

    def withdraw(self, pair_ids: Sequence[str]) -> None:
        """Delete pairs and the votes on them, once their evaluation has them."""
        with self._engine.begin() as connection:
            for chunk in _chunks(sorted(pair_ids)):
                connection.execute(sa.delete(ARENA_VOTES).where(ARENA_VOTES.c.pair_id.in_(chunk)))
                connection.execute(sa.delete(ARENA_PAIRS).where(ARENA_PAIRS.c.id.in_(chunk)))

    def withdraw_asking(self, prompts: Sequence[Sequence[Mapping[str, str]]]) -> None:
        """Delete the pairs of answers to any of these prompts (messages each) and the votes on them."""
        asked = {_canonical(messages) for messages in prompts}
        if not asked:
            return
        with self._reader.connect() as connection:
            rows = connection.execute(sa.select(ARENA_PAIRS.c.id, ARENA_PAIRS.c.messages)).all()
        self.withdraw([row.id for row in rows if _canonical(row.messages) in asked])

    def forget(self, is_forgotten: Callable[[str], bool]) -> int:
        """Delete the votes of every rater whose id `is_forgotten` knows; return how many went."""
        with self._engine.begin() as connection:
            raters = connection.execute(sa.select(ARENA_VOTES.c.rater).distinct()).scalars().all()
            gone = [rater for rater in raters if is_forgotten(rater)]
            if not gone:
                return 0
            return connection.execute(sa.delete(ARENA_VOTES).where(ARENA_VOTES.c.rater.in_(gone))).rowcount

    def _row(self, pair: OfferedPair, wanted: int) -> dict[str, Any]:
        return {
            "id": pair.id,
            "axis": pair.axis,
            "messages": _storable_messages(pair.messages),
            "first": _storable(pair.first),
            "second": _storable(pair.second),
            "seed": secrets.token_hex(16),
            "wanted": wanted,
            "at": self._clock(),
        }

    @staticmethod
    def _of_rater(connection: Connection, pair_id: str, rater: str) -> ArenaVote | None:
        query = sa.select(ARENA_VOTES).where(ARENA_VOTES.c.pair_id == pair_id, ARENA_VOTES.c.rater == rater)
        row = connection.execute(query).one_or_none()
        return None if row is None else _vote(row)


def _vote(row: Any) -> ArenaVote:
    return ArenaVote(row.rater, row.outcome, row.first_labels, row.second_labels, row.at)


def _insert_new(connection: Connection) -> Any:
    """Make an insert that leaves alone what another process has offered meanwhile."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(ARENA_PAIRS).on_conflict_do_nothing()
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(ARENA_PAIRS).on_conflict_do_nothing()


def _draw(seed: str, rater: str) -> int:
    """Draw a number that nobody can foretell without the seed, which never leaves the database."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{rater}".encode()).digest()[:8], "big")


def _swapped(seed: str, rater: str) -> bool:
    return _draw(seed, rater) % 2 == 1


def _storable(text: str) -> str:
    """Return the text without what a database can't hold: NUL, and halves of surrogate pairs."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _storable_messages(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    return [{key: _storable(value) for key, value in message.items()} for message in messages]


def _canonical(messages: Sequence[Mapping[str, str]]) -> str:
    return json.dumps(_storable_messages(messages), sort_keys=True)


def _chunks(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[at : at + _CHUNK] for at in range(0, len(ids), _CHUNK)]
