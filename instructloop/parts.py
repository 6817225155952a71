"""Runs one part of the system in this process: gives its entry point the settings and connections it needs.

It holds the wiring and no logic; each part's own package does the work.
"""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructloop import access, canary, installation
from instructloop.config import Config

if TYPE_CHECKING:
    import sqlalchemy

    from evaluation.report import Report
    from evaluation.run import Evaluator
    from registry.evaluations import Evaluation, Evaluations


_UPKEEP_END_SECONDS = 5.0


class PartProblem(RuntimeError):  # noqa: N818
    """A part can't run; the message says what to do."""


async def serve(config: Config) -> int:
    """Run one serving replica until a signal ends it."""
    import redis.asyncio

    from evaluation.cases import check_case
    from feedback.queue import FeedbackQueue
    from server.app import serve as run
    from server.limits import RedisCounters
    from server.routes import FromAbove

    engine = installation.open_database(config)
    if installation.open_registry(config, engine).desired() is None:
        raise PartProblem("no version is to serve yet: `instructloop up` makes the first one, or promote one")
    # A crowd waits for a connection instead of being refused one.
    pool: redis.asyncio.ConnectionPool = redis.asyncio.BlockingConnectionPool.from_url(
        config.queue_url, timeout=config.queue.timeout_seconds
    )
    client = redis.asyncio.Redis.from_pool(pool)
    try:
        await run(
            config.server,
            config.rollout,
            queue=FeedbackQueue(client, config.queue),
            counters=RedisCounters(client, f"{{{config.queue.stream}}}:limit"),
            database=engine,
            versions=config.versions_dir,
            spool=config.spool_file,
            secret=installation.ensure_secret(config.data_dir),
            replica_id=replica_id(config),
            waiting_hours=config.store.waiting_hours,
            raters=config.raters,
            above=FromAbove(
                round_report=lambda number: round_report(config, engine, number).html(),
                evaluation_report=lambda number: evaluation_report(config, engine, number).html(),
                trial_report=canary.open_canary(config, engine).report,
                check_case=check_case,
            ),
        )
    finally:
        await client.aclose()
        engine.dispose()
    return 0


def replica_id(config: Config) -> str:
    """Name a replica: the same after every restart, another for each address and data directory."""
    place = hashlib.sha256(str(config.data_dir).encode()).hexdigest()[:6]
    return f"{socket.gethostname()}-{config.server.port}-{place}"


def round_report(config: Config, engine: "sqlalchemy.Engine", number: int) -> "Report":
    """Make the report of one round, as far as it is; raises UnknownRound."""
    from evaluation.round_report import round_report as make
    from feedback.cases import Cases
    from registry.round_record import read_record
    from registry.rounds import Rounds
    from training.samples import SampleLog

    record = read_record(Rounds(engine), installation.open_registry(config, engine), number)
    kept = Cases(engine)
    cases = {case.id: case for case in kept.list(removed=True)}
    results = kept.results(round_id=number)
    answered = [(cases[result.case_id], result) for result in results if result.case_id in cases]
    return make(record, SampleLog(config.data_dir / "rounds" / f"{number:04d}").read(), answered)


def evaluation_report(config: Config, engine: "sqlalchemy.Engine", number: int) -> "Report":
    """Make the report of one evaluation, as far as it is; raises UnknownEvaluation."""
    from evaluation.evaluation_files import EvaluationFiles, evaluation_directory
    from evaluation.evaluation_report import evaluation_report as make
    from registry.evaluations import Evaluations

    files = EvaluationFiles(evaluation_directory(config.data_dir, number))
    return make(Evaluations(engine).get(number), files)


def evaluate(config: Config, make: "Callable[[Evaluations], int]") -> "Evaluation":
    """Carry out the evaluation whose number `make` returns, once no other one is under way."""
    from registry.evaluations import Evaluations

    engine = installation.open_database(config)
    return _evaluator(config, engine).carry_out(lambda: make(Evaluations(engine)))


def ingest(config: Config, consumer: str | None, stop: threading.Event) -> int:
    """Move the stream to the store until `stop`; beside it, do the upkeep and watch the canary."""
    import redis

    from feedback.ingest import run
    from feedback.queue import StreamReader
    from feedback.store import Store
    from instructloop.upkeep import Upkeep

    engine = installation.open_database(config)
    client = redis.Redis.from_url(config.queue_url)
    name = consumer or f"{socket.gethostname()}-{os.getpid()}"
    beside = [
        threading.Thread(target=run_beside, args=(stop,), daemon=True)
        for run_beside in (Upkeep(config, engine, client).run, canary.open_canary(config, engine).run)
    ]
    for thread in beside:
        thread.start()
    run(StreamReader(client, config.queue, name), Store(engine, config.store.waiting_hours), stop)
    # A step that was cut short is done again by the next ingest.
    for thread in beside:
        thread.join(timeout=_UPKEEP_END_SECONDS)
    client.close()
    return 0


def train_once(config: Config, minimum_events: int) -> int:
    """Run one round; exit code 0 also when there was nothing to learn from, 1 when it failed."""
    from registry.audit import AuditLog
    from training import processes

    trainer = _trainer(config)
    if not processes.is_first():
        trainer.follow()
        return 0
    AuditLog(installation.open_database(config)).append(access.actor(), "start_round")
    round_ = trainer.run_once(minimum_events=minimum_events)
    if round_ is None:
        print("no round: there is not enough new feedback")
        return 0
    print(f"round {round_.id} is {round_.state}" + (f": {round_.version}" if round_.version else ""))
    return 0 if round_.state == "done" else 1


def train_without(config: Config, rater: str, start: str | None) -> int:
    """Run one round without a rater's feedback, from before its first; exit code 1 when it failed."""
    round_ = _trainer(config).retrain(rater, start)
    print(
        f"round {round_.id} from {round_.config['parent']} is {round_.state}"
        + (f": {round_.version}" if round_.version else "")
    )
    return 0 if round_.state == "done" else 1


def repeat_round(config: Config, number: int, overrides: Mapping[str, Any]) -> int:
    """Repeat a round and say whether it gave the same weights; exit code 1 when it failed."""
    from registry.audit import AuditLog
    from registry.round_record import read_record, same_weights
    from registry.rounds import Rounds

    engine = installation.open_database(config)
    log, who, target = AuditLog(engine), access.actor(), f"round {number}"
    with log.refusals(who, "repeat_round", target):
        repeat = _trainer(config).repeat(number, overrides)
    detail = " ".join(f"{key}={value}" for key, value in overrides.items())
    log.append(who, "repeat_round", target, detail=f"round {repeat.id} {detail}".rstrip())
    registry, rounds = installation.open_registry(config, engine), Rounds(engine)
    print(
        f"round {repeat.id} is {repeat.state}"
        + (f": {repeat.version}, a candidate" if repeat.version else "")
    )
    match same_weights(read_record(rounds, registry, number), read_record(rounds, registry, repeat.id)):
        case True:
            print(f"its weights are those of round {number}, bit for bit")
        case False:
            print(f"its weights are not round {number}'s: `instructloop rounds diff {number} {repeat.id}`")
    return 0 if repeat.state == "done" else 1


def train_every(config: Config, seconds: float, minimum_events: int, stop: threading.Event) -> int:
    """Run rounds until `stop`; a request over HTTP starts one at once."""
    from training import processes

    trainer = _trainer(config)
    if processes.is_first():
        trainer.run_every(seconds, minimum_events, stop)
    else:
        trainer.follow()
    return 0


def compare_algorithms(
    config: Config,
    *,
    algorithms: Sequence[str],
    round_id: int | None,
    seeds: int,
    budget_seconds: float,
    output: Path,
) -> Sequence[Sequence[str]]:
    """Train by several algorithms on one slice, write the report to `output` and return its table."""
    from feedback.store import Store
    from registry.rounds import Rounds
    from training import compare
    from training.trainer import sampler_factory

    engine = installation.open_database(config)
    store, registry = Store(engine, config.store.waiting_hours), installation.open_registry(config, engine)
    chosen = compare.slice_to_compare(store, registry, Rounds(engine), round_id)
    # Prompts and answers will stand in it: who forgets one of them is told.
    store.forgettings.note_export(str(output.resolve()), "comparison", chosen["cursor"], chosen["cutoff"])
    run = compare.ComparisonRun(
        chosen,
        output,
        training=config.training,
        evaluation=config.evaluation,
        budget=compare.Budget(budget_seconds),
        store=store,
        registry=registry,
        make_sampler=sampler_factory(config.server.max_model_len),
        raters=config.raters,
    )
    compared = run.compare(algorithms, range(config.training.seed, config.training.seed + seeds))
    compare.write(compared, output)
    return compare.table(compared)


async def import_feedback(config: Config, file: Path, source: str) -> int:
    """Queue the comparisons of `file`; a bad line ends it with exit code 2, what came before stays."""
    import redis.asyncio

    from feedback.queue import FeedbackQueue
    from feedback.transfer import import_preferences
    from registry.audit import AuditLog

    log = AuditLog(installation.open_database(config))
    client = redis.asyncio.Redis.from_url(config.queue_url)
    try:
        with log.refusals(access.actor(), "import_feedback", source):
            counts = await import_preferences(
                FeedbackQueue(client, config.queue), file, source, progress=_progress("comparisons queued")
            )
    finally:
        await client.aclose()
    log.append(access.actor(), "import_feedback", source, detail=f"{file.name}: {counts}")
    print(counts)
    return 0


def demo(config: Config, seed: int, output: Path) -> int:
    """Run the demo against the server of this configuration, with keys made for it and revoked after it."""
    from instructloop.demo import run_demo

    keys = access.keys_as(installation.open_database(config), f"demo on the {access.actor()}")
    client, operator = keys.create("client", "demo"), keys.create("operator", "demo")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.server.host, config.server.host)
    try:
        return run_demo(
            f"http://{host}:{config.server.port}", client.secret, operator.secret, seed=seed, output=output
        )
    finally:
        keys.revoke(client.id)
        keys.revoke(operator.id)


def _progress(what: str) -> Callable[[int], None]:
    """Return a counter that shows itself on a terminal at most twice a second, and never in a file."""
    import sys

    last = 0.0

    def show(count: int) -> None:
        nonlocal last
        if sys.stderr.isatty() and time.monotonic() - last > 0.5:
            last = time.monotonic()
            print(f"\r{count} {what}", end="", file=sys.stderr, flush=True)

    return show


def _evaluator(config: Config, engine: "sqlalchemy.Engine") -> "Evaluator":
    from evaluation.participants import Equipment
    from evaluation.run import Evaluator
    from feedback.privacy import PrivacyFilter
    from feedback.store import Store
    from registry.evaluations import Evaluations
    from training.trainer import sampler_factory

    training, max_model_len = config.training, config.server.max_model_len
    start = sampler_factory(max_model_len)
    return Evaluator(
        Equipment(
            evaluations=Evaluations(engine),
            registry=installation.open_registry(config, engine),
            store=Store(engine, config.store.waiting_hours),
            data_dir=config.data_dir,
            settings=config.evaluation,
            make_sampler=lambda model_dir: start(model_dir, training),
            max_model_len=max_model_len,
            held_out_share=training.held_out_share,
            reward_tokens=(training.prompt_tokens, training.response_tokens),
            privacy=PrivacyFilter(training.privacy_phone_regions) if training.privacy_filter else None,
        )
    )


def _trainer(config: Config):  # type: ignore[no-untyped-def]
    from feedback.store import Store
    from registry.rounds import Rounds
    from training.trainer import Trainer

    engine = installation.open_database(config)
    return Trainer(
        settings=config.training,
        evaluation=config.evaluation,
        store=Store(engine, config.store.waiting_hours),
        registry=installation.open_registry(config, engine),
        rounds=Rounds(engine),
        data_dir=config.data_dir,
        max_model_len=config.server.max_model_len,
        raters=config.raters,
        evaluator=_evaluator(config, engine),
    )
