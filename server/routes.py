"""All routes of ours, each group on what it works on.

Owns which groups there are; what a route does is in its own `routes_*` module.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastapi import APIRouter
from sqlalchemy import Engine as Database

from feedback.cases import CaseQueue, Cases, Validate
from feedback.dead_letters import DeadLetters
from feedback.settings import RaterSettings
from feedback.store import Store
from registry.arena import Arena
from registry.audit import AuditLog
from registry.evaluations import Evaluations
from registry.lineage import Lineage
from registry.registry import Registry
from registry.rounds import Rounds
from server.identity import Identity
from server.limits import Limits
from server.metrics import ServerMetrics
from server.routes_arena import ArenaRoutes
from server.routes_cases import CaseRoutes
from server.routes_dead_letters import DeadLetterRoutes
from server.routes_evaluations import EvaluationRoutes
from server.routes_feedback import EventQueue, FeedbackRoutes
from server.routes_forget import ForgetRoutes
from server.routes_lineage import LineageRoutes
from server.routes_operator import OperatorRoutes
from server.routes_raters import RaterRoutes
from server.routes_state import Durability, StateRoutes
from server.routes_trial import TrialRoutes
from server.settings import ServerSettings


class Queue(EventQueue, CaseQueue, Durability, Protocol):
    """The parts of `feedback.queue.FeedbackQueue` that routes use."""


@dataclass(frozen=True, slots=True)
class FromAbove:
    """What routes need of packages that the server may not import; the composition root gives it.

    `round_report` and `evaluation_report` make the page about the one with a number, `trial_report` tells of
    the trial, `check_case` refuses what makes no case.
    """

    round_report: Callable[[int], str]
    evaluation_report: Callable[[int], str]
    trial_report: Callable[[], dict[str, Any]]
    check_case: Validate


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What a replica says of itself when it is asked: each is called anew."""

    dead: Callable[[], bool]
    obstacle: Callable[[], str | None]
    serving: Callable[[], str]
    recording: Callable[[], str | None]


def all_routers(
    *,
    database: Database,
    registry: Registry,
    queue: Queue,
    identity: Identity,
    limits: Limits,
    metrics: ServerMetrics,
    settings: ServerSettings,
    raters: RaterSettings,
    data_dir: Path,
    waiting_hours: float,
    wait_seconds: float,
    state: ReplicaState,
    above: FromAbove,
) -> list[APIRouter]:
    """Return every router. `wait_seconds` bounds how long `?wait=true` waits for replicas."""
    store, rounds, audit = Store(database, waiting_hours), Rounds(database), AuditLog(database)
    dead_letters, lineage = DeadLetters(database, waiting_hours), Lineage(database)
    return [
        StateRoutes(
            queue=queue,
            metrics=metrics,
            dead=state.dead,
            obstacle=state.obstacle,
            serving=state.serving,
            recording=state.recording,
        ).router(),
        FeedbackRoutes(
            queue=queue,
            store=store,
            dead_letters=dead_letters,
            lineage=lineage,
            identity=identity,
            limits=limits,
            metrics=metrics,
            batch_lines=settings.batch_lines,
            gold_share=raters.gold_share,
        ).router(),
        ForgetRoutes(forgettings=store.forgettings, registry=registry, lineage=lineage, audit=audit).router(),
        RaterRoutes(audit=audit, store=store, settings=raters).router(),
        OperatorRoutes(
            registry=registry,
            rounds=rounds,
            audit=audit,
            wait_seconds=wait_seconds,
            round_report=above.round_report,
        ).router(),
        TrialRoutes(registry=registry, audit=audit, report=above.trial_report).router(),
        EvaluationRoutes(
            evaluations=Evaluations(database),
            registry=registry,
            cases=Cases(database),
            audit=audit,
            data_dir=data_dir,
            report=above.evaluation_report,
        ).router(),
        LineageRoutes(lineage=lineage, registry=registry, store=store).router(),
        ArenaRoutes(arena=Arena(database), limits=limits).router(),
        DeadLetterRoutes(dead_letters, audit).router(),
        CaseRoutes(
            cases=Cases(database),
            queue=queue,
            store=store,
            lineage=lineage,
            audit=audit,
            validate=above.check_case,
        ).router(),
    ]
