"""A trainer as users run it, in a process of its own with the real engine, so that it can be killed.

The data and the model are those of the unit tests, of a few thousand weights.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from unit.training.installation import EVALUATION, TRAINING, Installation

from registry.rounds import Round
from training.round import STAGES

ENGINE_SECONDS = 180
SETTINGS = {"SERVER__MAX_MODEL_LEN": "128"}
SETTINGS |= {f"TRAINING__{name.upper()}": json.dumps(value) for name, value in TRAINING.items()}
SETTINGS["EVALUATION__TAX_TASKS"] = json.dumps([str(Path(__file__).with_name("tax_tasks"))])
SETTINGS |= {f"EVALUATION__{name.upper()}": json.dumps(value) for name, value in EVALUATION.items()}


class RoundInstallation(Installation):
    """An installation whose trainer is the command `instructloop train --once`."""

    def start(self, *command: str, launcher: Sequence[str] = (), **more: str) -> "subprocess.Popen[bytes]":
        environment = {f"INSTRUCTLOOP_{name}": value for name, value in (SETTINGS | more).items()}
        environment |= {"INSTRUCTLOOP_DATA_DIR": str(self.directory), "OMP_NUM_THREADS": "1"}
        with (self.directory / "trainer.log").open("ab") as log:
            return subprocess.Popen(
                [
                    *(launcher or [sys.executable]),
                    "-m",
                    "instructloop.cli",
                    *(command or ("train", "--once")),
                ],
                env=os.environ | environment,
                cwd=self.directory,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        return (self.directory / "trainer.log").read_text()

    def train(self, **more: str) -> Round:
        code = self.start(**more).wait(timeout=ENGINE_SECONDS)
        assert code == 0, self.log()[-4000:]
        return self.rounds.list()[0]

    def kill(self, stage: str, seconds: float) -> str:
        """Start the trainer and kill -9 it so many seconds into `stage`; returns the stage it was in.

        That is a later one if it was over sooner.
        """
        launched = time.time()
        process = self.start()
        deadline = time.monotonic() + ENGINE_SECONDS
        while True:
            at, began = self._working_on(since=launched)
            ahead = -1 if at is None else STAGES.index(at) - STAGES.index(stage)
            if ahead > 0 or (ahead == 0 and time.time() >= began + seconds):
                break
            assert process.poll() is None, self.log()[-4000:]
            assert time.monotonic() < deadline, f"the round did not reach {stage}"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert at is not None
        return at

    def _working_on(self, since: float) -> tuple[str | None, float]:
        """The stage that a trainer which was started at `since` has begun last, and when it did."""
        running = self.rounds.unfinished()
        if running is None:
            return None, 0.0
        begun = [
            (stage.started_at, stage.name)
            for stage in self.rounds.stages(running.id)
            if stage.started_at is not None and stage.started_at > since
        ]
        began, name = max(begun, default=(0.0, None))
        return name, began
