"""Sends every stage's figures to the experiment trackers that the user has, such as TensorBoard or MLflow.

Owns the one place where trackers are fed, through Transformers' integrations of them. A tracker only looks
on: once a round runs, one that breaks is left out.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from training.round import RoundRefused

TRACKING = "tracking"

logger = logging.getLogger(__name__)


class _Arguments(TrainingArguments):  # type: ignore[misc]
    """Trackers note the arguments of a run: here they are the round's own configuration."""

    round_config: Mapping[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the round's configuration."""
        return dict(self.round_config)


class Trackers:
    """One run of each tracker in `names` for a round; use it as a context manager around the round.

    Figures are named `stage/name` and stand at their own stage's step. Files of trackers that write some
    (TensorBoard) go below `directory`. Raises RoundRefused, which names `training.report_to`, for a tracker
    that Transformers does not know, that is not installed or that can't be reached at the start.
    """

    def __init__(
        self, names: Sequence[str], *, run_name: str, directory: Path, config: Mapping[str, Any]
    ) -> None:
        self._trackers: dict[str, TrainerCallback] = {}
        if not names:
            return
        self._arguments = _Arguments(
            output_dir=str(directory / TRACKING),
            run_name=run_name,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        self._arguments.round_config = config
        self._state = TrainerState(is_world_process_zero=self._arguments.process_index == 0)
        for name in names:
            try:
                (make,) = get_reporting_integration_callbacks([name])
                tracker = make()
                tracker.on_train_begin(self._arguments, self._state, TrainerControl(), model=None)
            except Exception as problem:
                # Each tracker has its own kinds of failure; all mean that the setting can't be followed.
                self._end()
                raise RoundRefused(f"training.report_to: {name} can't be used: {problem}") from problem
            self._trackers[name] = tracker

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def log(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """Hand on the figures of one step of one stage."""
        if not self._trackers:
            return
        self._state.global_step = step
        self._tell("on_log", logs={f"{stage}/{name}": value for name, value in figures.items()})

    def _end(self) -> None:
        self._tell("on_train_end")
        self._trackers = {}

    def _tell(self, event: str, **more: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                getattr(tracker, event)(self._arguments, self._state, TrainerControl(), model=None, **more)
            except Exception:
                logger.exception("%s takes no more figures: it is left out of this round", name)
                del self._trackers[name]
