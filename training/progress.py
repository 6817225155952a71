"""How far a stage is: a bar on a terminal, a line now and then in a log, every figure to its keeper."""

import logging
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class Progress:
    """A `training.reward_model.Report` for one stage; use it as a context manager around the stage.

    `keep` is called with each step and its figures.
    """

    def __init__(self, stage: str, keep: Callable[[int, Mapping[str, float]], None]) -> None:
        self._stage = stage
        self._keep = keep
        self._bar = tqdm(desc=stage, unit="step", disable=not sys.stderr.isatty())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __call__(self, step: int, steps: int, figures: Mapping[str, float]) -> None:
        """Take the figures of `step` of `steps`."""
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        self._keep(step, numbers)
        self._bar.total = steps
        self._bar.update(step - self._bar.n)
        shown = {name: f"{value:.3g}" for name, value in list(numbers.items())[:4]}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable and (step == steps or step % max(1, steps // 10) == 0):
            logger.info("%s: step %d of %d, %s", self._stage, step, steps, shown)


class ReportedLogs(TrainerCallback):  # type: ignore[misc]
    """Hands the figures that a Transformers trainer logs on to a `training.reward_model.Report`."""

    def __init__(self, report: Callable[[int, int, Mapping[str, float]], None]) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report the figures of a step; the closing summary is none."""
        if logs and "train_runtime" not in logs:
            self._report(state.global_step, state.max_steps, logs)
