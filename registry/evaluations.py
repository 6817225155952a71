"""Evaluations as rows: what is to be compared by whom, who asked for it, where it stands, what came of it.

Owns an evaluation's life (`requested`, `running`, then `done`, `failed` or `cancelled`). It asks no model
anything: `evaluation.run` carries out what stands here, in the trainer's process or on the command line.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from registry import audit
from registry.evaluation_request import EvaluationRequest
from registry.tables import EVALUATIONS

EvaluationState = Literal["requested", "running", "done", "failed", "cancelled"]

MOST_ATTEMPTS = 20
"""How often an evaluation is begun; beyond that it is no power cut, but the kernel that kills it."""


class UnknownEvaluation(KeyError):  # noqa: N818
    """There is no such evaluation."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "no such evaluation"


class EvaluationConflict(ValueError):  # noqa: N818
    """The evaluation is not in a state that allows this."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation. Times are Unix seconds; `done` of `total` answers and verdicts are there by now.

    `attempts` is how often it was begun: more than once where its process was killed.
    """

    id: int
    state: EvaluationState
    request: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: str | None
    requested_by: str
    requested_at: float
    started_at: float | None
    ended_at: float | None
    attempts: int
    step: str | None
    done: int
    total: int

    @property
    def asked(self) -> EvaluationRequest:
        """The request, read."""
        return EvaluationRequest(**self.request)


class Evaluations:
    """The evaluations in the database of `engine`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._reader = engine.execution_options(read_only=True)

    def request(self, request: EvaluationRequest, actor: str) -> Evaluation:
        """Write down a request, which `resolve` has found whole."""
        row = {
            "state": "requested",
            "request": request.model_dump(mode="json", exclude_defaults=False),
            "requested_by": actor[:200],
            "requested_at": time.time(),
        }
        with self._engine.begin() as connection:
            key = connection.execute(sa.insert(EVALUATIONS).values(**row)).inserted_primary_key
            assert key is not None
            audit.write(connection, actor, "request_evaluation", f"evaluation {key[0]}")
            return self._get(connection, int(key[0]))

    def next(self) -> Evaluation | None:
        """Return what is to be carried out next: what was begun and not ended, else the oldest request."""
        query = sa.select(EVALUATIONS).where(EVALUATIONS.c.state.in_(("running", "requested")))
        query = query.order_by((EVALUATIONS.c.state == "requested"), EVALUATIONS.c.id).limit(1)
        with self._reader.connect() as connection:
            row = connection.execute(query).first()
        return Evaluation(**row._mapping) if row else None

    def unfinished(self) -> Sequence[Evaluation]:
        """Return those that are requested or running, oldest first."""
        query = sa.select(EVALUATIONS).where(EVALUATIONS.c.state.in_(("running", "requested")))
        with self._reader.connect() as connection:
            rows = connection.execute(query.order_by(EVALUATIONS.c.id))
            return [Evaluation(**row._mapping) for row in rows]

    def begin(self, evaluation_id: int, *, again: bool = False) -> Evaluation:
        """Note that it is carried out from now on.

        With `again`, also one that was cancelled, and one that is done if people judge: they may have voted
        since. Raises UnknownEvaluation, and EvaluationConflict if it has ended.
        """
        with self._engine.begin() as connection:
            before = self._get(connection, evaluation_id)
            ended = before.state == "cancelled" or (before.state == "done" and before.asked.by_people)
            if not (again and ended):
                self._require(before, "requested", "running")
            change = {
                "state": "running",
                "started_at": before.started_at or time.time(),
                "ended_at": None,
                "attempts": 1 if ended else before.attempts + 1,
            }
            self._change(connection, evaluation_id, change, before.state)
            return self._get(connection, evaluation_id)

    def progress(self, evaluation_id: int, step: str, done: int, total: int) -> None:
        """Note how far it is; raises EvaluationConflict if it does not run any more: it was cancelled."""
        change = {"step": step[:200], "done": done, "total": total}
        with self._engine.begin() as connection:
            self._change(connection, evaluation_id, change, "running")

    def finish(
        self, evaluation_id: int, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> None:
        """End it with what came of it, or with why it failed; raises EvaluationConflict if it has ended.

        What came of it before stays where it was begun again and failed.
        """
        change: dict[str, Any] = {
            "state": "done" if error is None else "failed",
            "error": error,
            "ended_at": time.time(),
        }
        if result is not None:
            change["result"] = dict(result)
        with self._engine.begin() as connection:
            self._change(connection, evaluation_id, change, "requested", "running")

    def cancel(self, evaluation_id: int, actor: str, reason: str = "") -> Evaluation:
        """End one that waits or runs; whoever carries it out stops when it next notes how far it is.

        Returns it as it was before. Raises UnknownEvaluation, and EvaluationConflict if it has ended.
        """
        with self._engine.begin() as connection:
            before = self._get(connection, evaluation_id)
            change = {"state": "cancelled", "ended_at": time.time()}
            self._change(connection, evaluation_id, change, "requested", "running")
            target = f"evaluation {evaluation_id}"
            audit.write(connection, actor, "cancel_evaluation", target, detail=reason)
            return before

    def get(self, evaluation_id: int) -> Evaluation:
        """One evaluation; raises UnknownEvaluation."""
        with self._reader.connect() as connection:
            return self._get(connection, evaluation_id)

    def list(self, limit: int = 100) -> list[Evaluation]:
        """Return the latest `limit` evaluations, newest first."""
        query = sa.select(EVALUATIONS).order_by(EVALUATIONS.c.id.desc()).limit(limit)
        with self._reader.connect() as connection:
            return [Evaluation(**row._mapping) for row in connection.execute(query)]

    @staticmethod
    def _get(connection: sa.Connection, evaluation_id: int) -> Evaluation:
        row = connection.execute(sa.select(EVALUATIONS).where(EVALUATIONS.c.id == evaluation_id)).first()
        if row is None:
            raise UnknownEvaluation(f"there is no evaluation {evaluation_id}")
        return Evaluation(**row._mapping)

    def _change(
        self,
        connection: sa.Connection,
        evaluation_id: int,
        change: Mapping[str, Any],
        *states: EvaluationState,
    ) -> None:
        """Change one that is in one of these states, whoever else changes it now; else EvaluationConflict."""
        table = EVALUATIONS
        there = sa.and_(table.c.id == evaluation_id, table.c.state.in_(states))
        if connection.execute(sa.update(table).where(there).values(**change)).rowcount == 0:
            self._require(self._get(connection, evaluation_id), *states)

    @staticmethod
    def _require(evaluation: Evaluation, *states: EvaluationState) -> None:
        if evaluation.state not in states:
            raise EvaluationConflict(f"evaluation {evaluation.id} is {evaluation.state} already")
