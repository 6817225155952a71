"""What is done beside ingest: forgettings are finished, completions past their age are deleted.

Owns the order of a forgetting's steps outside the tables, and when they are tried again. Every step can be
done again, so one that was killed or refused is simply run once more, by the next ingest or the next command.
"""

import json
import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from evaluation.evaluation_files import EvaluationFiles, evaluation_directory
from feedback.forgetting import Forgetting, Forgettings, Step
from feedback.records import Completion
from feedback.retention import expire
from feedback.spool import Spool
from feedback.store import Store
from feedback.tables import METADATA
from feedback.tombstones import digest
from instructloop.database import compact
from registry.arena import Arena
from registry.evaluations import Evaluations
from registry.lineage import Lineage
from registry.rounds import Rounds
from training.samples import SampleLog

if TYPE_CHECKING:
    import redis
    from sqlalchemy import Engine

    from instructloop.config import Config

TRACKING = "tracking"
"""As in `training.trackers`, whose import takes torch."""

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 300.0
_EXPIRE_SECONDS = 600.0
_COMPACT_SECONDS = 86_400.0
_DAY_SECONDS = 86_400.0


class Upkeep:
    """The upkeep of one installation. `client` must not decode responses."""

    def __init__(self, config: "Config", engine: "Engine", client: "redis.Redis") -> None:
        self._config = config
        self._engine = engine
        self._client = client
        self._store = Store(engine, config.store.waiting_hours)
        self._forgettings = Forgettings(engine)
        self._arena = Arena(engine)
        self._compact_at = 0.0

    def run(self, stop: threading.Event) -> None:
        """Look after everything until `stop`; what does not work now is tried again later."""
        pause, expire_at = _LOOK_SECONDS, 0.0
        while True:
            try:
                problems: Mapping[str, str] = self.finish()
                if time.monotonic() >= expire_at:
                    expire_at = time.monotonic() + _EXPIRE_SECONDS
                    self.expire(stop)
            except (SQLAlchemyError, OSError) as problem:
                problems = {"database": str(problem)}
            for place, problem_text in problems.items():
                _LOG.warning("upkeep waits %.0f s: %s: %s", pause, place, problem_text)
            if stop.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS) if problems else _LOOK_SECONDS

    def finish(self) -> Mapping[str, str]:
        """Do what is left of all forgettings; return what went wrong, by place.

        Raises sqlalchemy.exc.SQLAlchemyError when the database is away.
        """
        for one in self._forgettings.unfinished():
            self._forgettings.erase(one.id)
        problems: dict[str, str] = {}
        for step, work in self._steps():
            due = [one for one in self._forgettings.unfinished() if step in one.left]
            if not due:
                continue
            ids = [one.id for one in due]
            self._forgettings.step_begins(step, ids)
            try:
                work(due)
            except (RedisError, SQLAlchemyError, OSError, sqlite3.Error) as problem:
                problems[step] = str(problem)
            else:
                self._forgettings.step_done(step, ids)
        return problems

    def expire(self, stop: threading.Event) -> int:
        """Delete completions past `store.retention_days` in batches, and rounds' and evaluations' texts."""
        days = self._config.store.retention_days
        if days is None:
            return 0
        before = time.time() - days * _DAY_SECONDS
        count = 0
        while not stop.is_set() and (deleted := expire(self._engine, before)):
            count += deleted
        for round_ in Rounds(self._engine).list(limit=1_000_000):
            if round_.ended_at is not None and round_.ended_at < before:
                self._samples(round_.id).delete()
        for evaluation in Evaluations(self._engine).list(limit=1_000_000):
            if evaluation.ended_at is not None and evaluation.ended_at < before:
                self._delete_texts(self._evaluation(evaluation.id))
        if count:
            _LOG.info("%d completions and dead letters were past %g days and are deleted", count, days)
            if time.monotonic() >= self._compact_at:
                self._compact_at = time.monotonic() + _COMPACT_SECONDS
                self._compact()
        return count

    def _steps(self) -> "tuple[tuple[Step, Callable[[Sequence[Forgetting]], None]], ...]":
        # The database last: the queue is emptied into it.
        return (
            ("queue", lambda _: self._clean_queue()),
            ("files", self._clean_files),
            ("database", lambda _: self._compact()),
        )

    def _clean_queue(self) -> None:
        from feedback.queue import QueueCleaning

        def forgotten(event_ids: Sequence[str]) -> set[str]:
            return {id for _, id in self._forgettings.among([("event", id) for id in event_ids])}

        # The spool first: what waits in it comes into the queue later.
        Spool(self._config.spool_file, 0).discard(self._is_forgotten)
        ingest = partial(self._store.ingest, cleaning=True)
        QueueCleaning(self._client, self._config.queue, ingest, forgotten).run()

    def _is_forgotten(self, record: bytes) -> bool:
        try:
            return not self._forgettings.left_of([Completion.model_validate_json(record)])
        except ValueError:
            return False  # ingest will make a dead letter of it

    def _clean_files(self, forgettings: Sequence[Forgetting]) -> None:
        """Delete sample responses of rounds that had such events: prompts stand in them, and maybe echoes.

        Of evaluations, the texts of those that ask such prompts. With a rater go its votes in the arena.
        """
        rounds, lineage = Rounds(self._engine), Lineage(self._engine)
        for evaluation in Evaluations(self._engine).list(limit=1_000_000):
            files = self._evaluation(evaluation.id)
            if self._forgettings.among([("completion", id) for id in files.completion_ids()]):
                self._delete_texts(files)
        for forgetting in forgettings:
            for number in lineage.over(self._forgettings.positions(forgetting.id)):
                self._samples(number).delete()
            if forgetting.kind == "rater":
                self._arena.forget(partial(_is_rater, forgetting.digest))
                self._rename(rounds, forgetting.digest)

    def _rename(self, rounds: Rounds, rater: str) -> None:
        """Take a rater's id out of what rounds, versions and trackers say of raters."""
        from registry import manifest

        is_it = partial(_is_rater, rater)
        name = f"sha256:{rater}"
        for directory in self._config.versions_dir.glob("*/"):
            if (directory / manifest.READY).exists():
                manifest.rename_in(directory, is_it, name)
        for file in (self._config.data_dir / "rounds").glob("*/*.json"):
            found = json.loads(file.read_bytes())
            if (changed := manifest.renamed(found, is_it, name)) != found:
                partial_ = file.with_suffix(".partial")
                partial_.write_text(json.dumps(changed))
                partial_.replace(file)
        for number in rounds.rename_rater(is_it, name):
            shutil.rmtree(self._config.data_dir / "rounds" / f"{number:04d}" / TRACKING, ignore_errors=True)

    def _samples(self, number: int) -> SampleLog:
        return SampleLog(self._config.data_dir / "rounds" / f"{number:04d}")

    def _evaluation(self, number: int) -> EvaluationFiles:
        return EvaluationFiles(evaluation_directory(self._config.data_dir, number))

    def _delete_texts(self, files: EvaluationFiles) -> None:
        """Delete what an evaluation asks and was answered, where people are asked about it too."""
        self._arena.withdraw_asking([one["messages"] for one in files.prompts() or ()])
        files.delete_texts()

    def _compact(self) -> None:
        compact(self._engine, METADATA.tables)


def _is_rater(of: str, rater: str) -> bool:
    """Whether a rater's id is the one with the digest `of`."""
    return digest(("rater", rater)) == of
