"""The trainer: when a round is due, one at a time, and what is kept of those that are over.

What a round does is `training/round.py`'s.
"""

import fcntl
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evaluation.sampler import Sampler, TransformersSampler, VllmSampler
from evaluation.settings import EvaluationSettings
from feedback.store import Store
from registry.registry import Registry
from registry.rounds import Round, Rounds
from training.round import WORKING_FILES, Result, RoundRefused, RoundRun, SamplerFactory
from training.settings import TrainingSettings

logger = logging.getLogger(__name__)


class TrainerBusy(RuntimeError):  # noqa: N818
    """Another trainer is at work on the same data directory."""


def sampler_of(model_dir: Path, settings: TrainingSettings, max_model_len: int) -> Sampler:
    """Start the engine for rollouts and held-out answers, for `max_model_len` tokens with the prompt."""
    if settings.rollout_engine == "transformers":
        return TransformersSampler(model_dir)
    return VllmSampler(
        model_dir,
        max_model_len=max_model_len,
        kv_cache_gib=settings.kv_cache_gib,
        vllm_arguments=settings.vllm_arguments,
    )


class Trainer:
    """Runs rounds, one at a time, on the store and the registry it is given.

    `data_dir` holds `rounds/NNNN/` with a round's working files, and the lock; `make_sampler` starts the
    engine for rollouts and held-out answers.
    """

    def __init__(
        self,
        *,
        settings: TrainingSettings,
        evaluation: EvaluationSettings,
        store: Store,
        registry: Registry,
        rounds: Rounds,
        data_dir: Path,
        max_model_len: int,
        make_sampler: SamplerFactory | None = None,
    ) -> None:
        self._settings = settings
        self._evaluation = evaluation
        self._store = store
        self._registry = registry
        self._rounds = rounds
        self._root = data_dir / "rounds"
        self._make_sampler = make_sampler or (
            lambda model_dir, chosen: sampler_of(model_dir, chosen, max_model_len)
        )

    def run_once(self, minimum_events: int = 0) -> Round | None:
        """Finish the round that a killed trainer left, else run one on all feedback since the last.

        Returns the round when it has ended (`done` or `failed`), None when there is nothing to learn from.
        Raises TrainerBusy while another trainer holds the lock.
        """
        with self._lock():
            return self._run_once(minimum_events)

    def run_every(self, seconds: float, minimum_events: int, stop: threading.Event) -> None:
        """Run a round whenever one is asked for, and every `seconds` where enough events have come.

        Holds the lock until `stop` is set; raises TrainerBusy at once if another trainer has it.
        """
        with self._lock():
            if self._rounds.unfinished() is not None:
                self._run_once(0)
            due = time.monotonic() + seconds
            while not stop.wait(1.0):
                if self._rounds.requested() is not None:
                    self._run_once(0)
                elif time.monotonic() >= due:
                    due = time.monotonic() + seconds
                    self._run_once(minimum_events)

    def _run_once(self, minimum_events: int) -> Round | None:
        round_ = self._rounds.unfinished()
        if round_ is None:
            last = self._rounds.last_done()
            cursor, cutoff = (last.cutoff or 0) if last else 0, self._store.head()
            requested = self._rounds.requested() is not None
            if not requested and cutoff - cursor < max(1, minimum_events):
                return None
            round_ = self._begin(cursor, cutoff, last)
        else:
            logger.info("round %d was not finished: going on with it", round_.id)
        try:
            verdict, version = self._run(round_)
        except Exception as problem:
            # Whatever it was: a round left `running` would be taken up, and fail, again and again.
            logger.exception("round %d failed", round_.id)
            stage = self._rounds.get(round_.id).stage or "dataset"
            self._rounds.finish(round_.id, "failed", error=f"{stage}: {problem}")
        else:
            self._rounds.finish(round_.id, "done", version=version, verdict=verdict)
            self._tidy(round_.id)
        return self._rounds.get(round_.id)

    def _run(self, round_: Round) -> tuple[Result, str]:
        return RoundRun(
            round_,
            self._root / f"{round_.id:04d}",
            store=self._store,
            registry=self._registry,
            rounds=self._rounds,
            make_sampler=self._make_sampler,
        ).run()

    def _begin(self, cursor: int, cutoff: int, last: Round | None) -> Round:
        desired = self._registry.desired()
        if desired is None:
            raise RoundRefused("no version is in service, so there is nothing to train from")
        previous = self._root / f"{last.id:04d}" / "reward_model" if last else None
        config = {
            "parent": desired.name,
            "reward_model_from": last.id
            if last and previous and (previous / "head.safetensors").exists()
            else None,
            "training": self._settings.model_dump(mode="json"),
            "evaluation": self._evaluation.model_dump(mode="json"),
        }
        return self._rounds.begin(cursor, cutoff, config, self._settings.seed)

    def _tidy(self, round_id: int) -> None:
        """Keep the working files of the latest rounds only, and of those no checkpoint that was published."""
        for name in WORKING_FILES:
            shutil.rmtree(self._root / f"{round_id:04d}" / name, ignore_errors=True)
        directories = sorted(path for path in self._root.iterdir() if path.is_dir())
        for old in directories[: -self._settings.keep_rounds]:
            shutil.rmtree(old)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as file:
            try:
                # The kernel lets go of it when the process ends, however it ends.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainerBusy(f"another trainer holds {self._root / 'lock'}") from None
            yield
