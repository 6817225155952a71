"""An installation with two versions, and a process that carries an evaluation out until it is killed."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from unit.training.installation import Installation
from unit.training.tiny import TransformersSampler, tiny_model

from evaluation import evaluation_files, tournament
from evaluation.participants import Equipment
from evaluation.run import Evaluator
from evaluation.settings import EvaluationSettings
from feedback.cases import Cases
from registry.evaluation_request import EvaluationRequest, resolve
from registry.evaluations import Evaluations

# What intervals are worth is tested with the leaderboard itself.
tournament._RATING_RESAMPLES = 5

# Forked, which takes no time: nothing below trains, so torch has no threads that would be missing.
PROCESSES = multiprocessing.get_context("fork")


def installation_with_two_versions(directory: Path) -> Installation:
    found = Installation(directory)
    found.registry.publish(
        tiny_model(directory / "other", seed=1), parent=None, round_id=None, kind="test", details={}
    )
    return found


def evaluator(installation: Installation, **change: Any) -> Evaluator:
    values: dict[str, Any] = {
        "evaluations": Evaluations(installation.engine),
        "registry": installation.registry,
        "store": installation.store,
        "data_dir": installation.directory,
        "settings": EvaluationSettings(resamples=200),
        "make_sampler": TransformersSampler,
        "max_model_len": 128,
        "held_out_share": 0.5,
        "reward_tokens": (64, 16),
    }
    return Evaluator(Equipment(**values | change))


def ask(installation: Installation, **request: Any) -> int:
    """Write a request down, with a few short answers, and return its number."""
    values = {"contestants": ["policy-0000", "policy-0001"], "n": 2, "max_tokens": 6, "judges": ["checks"]}
    wanted = EvaluationRequest(**values | request)
    cases = Cases(installation.engine).list
    whole = resolve(wanted, installation.registry, installation.directory, cases=cases)
    return Evaluations(installation.engine).request(whole, "test").id


def run_until(directory: Path, files: int) -> None:
    """Carry out what waits below `directory`, and kill this process when it has written so many files.

    Between two files, and with the next one half-way to the disk.
    """
    written, replace = 0, Path.replace

    def counted(self: Path, target: Path) -> Path:
        nonlocal written
        if written == files:
            self.write_bytes(self.read_bytes()[: self.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        return replace(self, target)

    evaluation_files.Path.replace = counted  # type: ignore[method-assign]
    installation = Installation.__new__(Installation)
    installation.open(directory)
    evaluator(installation).carry_out_next()
    sys.exit(0)


def run_in_a_process(directory: Path, kill_after_files: int = 10**9) -> int:
    """Run in a process of its own; returns its exit code."""
    process = PROCESSES.Process(target=run_until, args=(directory, kill_after_files))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode
