"""Training rounds as rows: who asked for one, what it learns from, where it stands, what it measured.

Owns the rounds' life (`requested`, `running`, then `done` or `failed`), which are kept (pinned) and which run
another again (a repeat, from which no later round goes on). It trains nothing; `training` asks it what to do
and tells it what happened.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import sqlalchemy as sa

from registry import audit
from registry.manifest import renamed
from registry.tables import ROUND_EVENTS, ROUND_METRICS, ROUND_STAGES, ROUNDS

RoundState = Literal["requested", "running", "done", "failed"]
Use = Literal["trained", "older", "held_out", "left_out", "unrecorded"]


class UnknownRound(KeyError):  # noqa: N818
    """There is no such round."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "no such round"


class RoundConflict(ValueError):  # noqa: N818
    """The round is not in a state that allows this, or another one runs."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round: it learns from the events at positions `(cursor, cutoff]`. Times are Unix seconds.

    A `pinned` round's files are kept. `repeat_of` is the round whose slice this one runs on again, only to
    compare: the next round takes neither its cursor nor its reward model from here.
    """

    id: int
    state: RoundState
    stage: str | None
    cursor: int | None
    cutoff: int | None
    config: Mapping[str, Any]
    config_hash: str | None
    seed: int | None
    version: str | None
    verdict: Mapping[str, Any] | None
    error: str | None
    requested_by: str | None
    requested_at: float | None
    started_at: float | None
    ended_at: float | None
    pinned: bool = False
    repeat_of: int | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a stage stands: when it was last begun and when it ended (Unix seconds), and what it left.

    `attempts` is how often it was begun: more than once where its process was killed.
    """

    name: str
    state: str
    started_at: float | None
    ended_at: float | None
    result: Mapping[str, Any] | None
    attempts: int = 1

    @property
    def seconds(self) -> float | None:
        """How long it took; None before its end. Of a stage that was killed and begun again, the last run."""
        if self.started_at is None or self.ended_at is None:
            return None
        return self.ended_at - self.started_at


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure at one step of one stage; `value` is None where it was not finite."""

    stage: str
    step: int
    name: str
    value: float | None
    at: float


@dataclass(frozen=True, slots=True)
class EventUse:
    """What a round does with an event.

    `trained`: models are fitted to it. `older`: the reward model is, and it comes from before the round's
    slice. `held_out`: only the gate's judge and metrics see it. `left_out`: it is not used, for `reason` (of
    another use it may say how far). `unrecorded`: it was in the slice of a round that wrote nothing down.
    """

    event_id: str
    use: Use
    reason: str | None = None


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 over the configuration's canonical JSON: equal for equal settings, whatever their order."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Rounds:
    """The rounds in the database of `engine`."""

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = self._engine = engine
        # Reads say so: they then need no write lock on SQLite.
        self._reader = engine.execution_options(read_only=True)

    def request(self, actor: str) -> int:
        """Ask for a round and return its id; while a request waits, it is that one."""
        try:
            with self._engine.begin() as connection:
                waiting = self._only(connection, "requested")
                row = {"state": "requested", "config": {}, "requested_by": actor, "requested_at": time.time()}
                id = self._insert(connection, row) if waiting is None else waiting.id
                audit.write(connection, actor, "request_round", f"round {id}")
                return id
        except sa.exc.IntegrityError:
            # Another request came in between; its row is committed now.
            with self._engine.begin() as connection:
                waiting = self._only(connection, "requested")
                if waiting is None:
                    raise
                audit.write(connection, actor, "request_round", f"round {waiting.id}")
                return waiting.id

    def requested(self) -> Round | None:
        """Return the request that waits, if any."""
        with self._reader.connect() as connection:
            return self._only(connection, "requested")

    def begin(
        self, cursor: int, cutoff: int, config: Mapping[str, Any], seed: int, repeat_of: int | None = None
    ) -> Round:
        """Start a round on `(cursor, cutoff]`: the requested one if there is one, else a new one.

        A repeat is always a new one. `config` has to be plain JSON. Raises RoundConflict while another round
        runs.
        """
        row = {
            "state": "running",
            "cursor": cursor,
            "cutoff": cutoff,
            "config": dict(config),
            "config_hash": config_hash(config),
            "seed": seed,
            "started_at": time.time(),
            "repeat_of": repeat_of,
        }
        try:
            with self._engine.begin() as connection:
                waiting = self._only(connection, "requested")
                if waiting is not None and repeat_of is None:
                    connection.execute(sa.update(ROUNDS).where(ROUNDS.c.id == waiting.id).values(**row))
                    return self._get(connection, waiting.id)
                return self._get(connection, self._insert(connection, row))
        except sa.exc.IntegrityError as error:
            raise RoundConflict("another round is running") from error

    def unfinished(self) -> Round | None:
        """Return the round that runs, or that ran when its trainer was killed."""
        with self._reader.connect() as connection:
            return self._only(connection, "running")

    def last_done(self) -> Round | None:
        """Return the latest round that came to its end, not a repeat; the next starts at its cutoff."""
        done = (ROUNDS.c.state == "done", ROUNDS.c.repeat_of.is_(None))
        query = sa.select(ROUNDS).where(*done).order_by(ROUNDS.c.id.desc()).limit(1)
        with self._reader.connect() as connection:
            row = connection.execute(query).first()
        return Round(**row._mapping) if row else None

    def stage(self, round_id: int, name: str, state: str, result: Mapping[str, Any] | None = None) -> None:
        """Note that the round's stage `name` is now `running`, or `done` and what it left behind."""
        with self._engine.begin() as connection:
            self._require_running(connection, round_id)
            connection.execute(sa.update(ROUNDS).where(ROUNDS.c.id == round_id).values(stage=name))
            same = (ROUND_STAGES.c.round_id == round_id) & (ROUND_STAGES.c.name == name)
            now = time.time()
            row: dict[str, Any] = {"state": state, "at": now}
            if state == "running":
                row |= {"started_at": now, "ended_at": None, "attempts": ROUND_STAGES.c.attempts + 1}
            else:
                row |= {"ended_at": now, "result": _plain(result)}
            if connection.execute(sa.select(ROUND_STAGES.c.name).where(same)).first() is None:
                first = {"round_id": round_id, "name": name, "state": state, "at": now}
                connection.execute(sa.insert(ROUND_STAGES).values(**first))
            connection.execute(sa.update(ROUND_STAGES).where(same).values(**row))

    def stages(self, round_id: int) -> Sequence[Stage]:
        """Return the stages that the round has reached, in the order of their last change."""
        names = ("name", "state", "started_at", "ended_at", "result", "attempts")
        query = (
            sa.select(*(ROUND_STAGES.c[name] for name in names))
            .where(ROUND_STAGES.c.round_id == round_id)
            .order_by(ROUND_STAGES.c.at)
        )
        with self._reader.connect() as connection:
            return [Stage(**row._mapping) for row in connection.execute(query)]

    def pin(self, round_id: int, pinned: bool = True, actor: str = "command line") -> None:
        """Keep the round's files and version, or with `pinned` false no longer; raises UnknownRound."""
        with self._engine.begin() as connection:
            self._get(connection, round_id)
            connection.execute(sa.update(ROUNDS).where(ROUNDS.c.id == round_id).values(pinned=pinned))
            audit.write(connection, actor, "pin_round" if pinned else "unpin_round", f"round {round_id}")

    def pinned(self) -> Sequence[Round]:
        """All pinned rounds, oldest first."""
        query = sa.select(ROUNDS).where(ROUNDS.c.pinned).order_by(ROUNDS.c.id)
        with self._reader.connect() as connection:
            return [Round(**row._mapping) for row in connection.execute(query)]

    def metric(self, round_id: int, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Store the figures of one step; a step that is run again after a kill replaces its figures."""
        if not values:
            return
        at = time.time()
        rows = [
            {
                "round_id": round_id,
                "stage": stage,
                "step": step,
                "name": name,
                "value": float(value) if math.isfinite(value) else None,
                "at": at,
            }
            for name, value in values.items()
        ]
        with self._engine.begin() as connection:
            connection.execute(
                sa.delete(ROUND_METRICS).where(
                    ROUND_METRICS.c.round_id == round_id,
                    ROUND_METRICS.c.stage == stage,
                    ROUND_METRICS.c.step == step,
                    ROUND_METRICS.c.name.in_(list(values)),
                )
            )
            connection.execute(sa.insert(ROUND_METRICS), rows)

    def record_uses(self, round_id: int, uses: Sequence[EventUse]) -> None:
        """Keep what the round does with each event of its slice; a stage that is run again replaces it."""
        self._replace_uses(round_id, ROUND_EVENTS.c.use != "older", uses)

    def record_older(self, round_id: int, event_ids: Sequence[str]) -> None:
        """Keep which events from before its slice the round's reward model is fitted to."""
        self._replace_uses(
            round_id, ROUND_EVENTS.c.use == "older", [EventUse(id, "older") for id in event_ids]
        )

    def finish(
        self,
        round_id: int,
        state: Literal["done", "failed"],
        version: str | None = None,
        error: str | None = None,
        verdict: Mapping[str, Any] | None = None,
    ) -> None:
        """End a round; raises RoundConflict if it has ended already, UnknownRound.

        One that failed before it published has taught nothing: which events it used is forgotten.
        """
        row = {
            "state": state,
            "version": version,
            "error": error,
            "verdict": None if verdict is None else dict(verdict),
            "ended_at": time.time(),
        }
        with self._engine.begin() as connection:
            before = self._get(connection, round_id)
            if before.state in ("done", "failed"):
                raise RoundConflict(f"round {round_id} is {before.state} already")
            connection.execute(sa.update(ROUNDS).where(ROUNDS.c.id == round_id).values(**row))
            if state == "failed" and not self._has_published(connection, round_id):
                connection.execute(sa.delete(ROUND_EVENTS).where(ROUND_EVENTS.c.round_id == round_id))

    def get(self, round_id: int) -> Round:
        """One round; raises UnknownRound."""
        with self._reader.connect() as connection:
            return self._get(connection, round_id)

    def list(self, limit: int = 100) -> list[Round]:
        """Return the latest `limit` rounds, newest first."""
        query = sa.select(ROUNDS).order_by(ROUNDS.c.id.desc()).limit(limit)
        with self._reader.connect() as connection:
            return [Round(**row._mapping) for row in connection.execute(query)]

    def metrics(self, round_id: int) -> Sequence[Metric]:
        """All figures of a round, in the order in which they were stored."""
        columns = [ROUND_METRICS.c[name] for name in ("stage", "step", "name", "value", "at")]
        query = (
            sa.select(*columns)
            .where(ROUND_METRICS.c.round_id == round_id)
            .order_by(ROUND_METRICS.c.at, ROUND_METRICS.c.stage, ROUND_METRICS.c.step, ROUND_METRICS.c.name)
        )
        with self._reader.connect() as connection:
            return [Metric(**row._mapping) for row in connection.execute(query)]

    def _replace_uses(self, round_id: int, which: sa.ColumnElement[bool], uses: Sequence[EventUse]) -> None:
        rows = [{"round_id": round_id, **asdict(use)} for use in uses]
        with self._engine.begin() as connection:
            self._require_running(connection, round_id)
            connection.execute(sa.delete(ROUND_EVENTS).where(ROUND_EVENTS.c.round_id == round_id, which))
            if rows:
                connection.execute(sa.insert(ROUND_EVENTS), rows)

    @staticmethod
    def _has_published(connection: sa.Connection, round_id: int) -> bool:
        columns = ROUND_STAGES.c
        published = (columns.round_id == round_id, columns.name == "publish", columns.state == "done")
        return connection.execute(sa.select(columns.name).where(*published)).first() is not None

    def rename_rater(self, is_it: Callable[[str], bool], name: str) -> Sequence[int]:
        """Call a rater `name` in the settings and results of all rounds; return the ids of those it stood in.

        Their configuration's hash stays that of what they ran with.
        """
        found: set[int] = set()
        with self._engine.begin() as connection:
            for id, config in connection.execute(sa.select(ROUNDS.c.id, ROUNDS.c.config)).all():
                changed = renamed(config, is_it, name)
                if changed != config:
                    connection.execute(sa.update(ROUNDS).where(ROUNDS.c.id == id).values(config=changed))
                    found.add(id)
            stages = ROUND_STAGES.c
            for id, stage, result in connection.execute(
                sa.select(stages.round_id, stages.name, stages.result)
            ).all():
                changed = renamed(result, is_it, name)
                if changed != result:
                    same = (stages.round_id == id) & (stages.name == stage)
                    connection.execute(sa.update(ROUND_STAGES).where(same).values(result=changed))
                    found.add(id)
        return sorted(found)

    @staticmethod
    def _only(connection: sa.Connection, state: RoundState) -> Round | None:
        row = connection.execute(sa.select(ROUNDS).where(ROUNDS.c.state == state)).first()
        return Round(**row._mapping) if row else None

    @staticmethod
    def _get(connection: sa.Connection, round_id: int) -> Round:
        row = connection.execute(sa.select(ROUNDS).where(ROUNDS.c.id == round_id)).first()
        if row is None:
            raise UnknownRound(f"there is no round {round_id}")
        return Round(**row._mapping)

    @staticmethod
    def _insert(connection: sa.Connection, row: Mapping[str, Any]) -> int:
        key = connection.execute(sa.insert(ROUNDS).values(**row)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def _require_running(self, connection: sa.Connection, round_id: int) -> None:
        state = self._get(connection, round_id).state
        if state != "running":
            raise RoundConflict(f"round {round_id} is {state}, not running")


def _plain(value: Any) -> Any:
    """Return the same JSON with null where a number is not finite, which a database does not take."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
