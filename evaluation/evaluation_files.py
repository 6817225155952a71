"""The files of one evaluation: prompts, contestants' answers, judges' verdicts and labels, a batch a file.

Owns their places and that each is there whole or not at all, which is what an evaluation is resumed by. It
loads without torch: the server's pages and the upkeep read and delete here.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BATCH = 32
"""How many prompts are answered, or judged, between two files."""


def evaluation_directory(data_dir: Path, evaluation_id: int) -> Path:
    """Return where the files of an evaluation are."""
    return data_dir / "evaluations" / f"{evaluation_id:04d}"


class EvaluationFiles:
    """The files below `directory`, which need not exist.

    Prompts are objects with `key`, `messages`, `checks` and, from the store, the `completion_id` under which
    they are forgotten: a case's own id for a case, which may have a `bad` answer too. Answers are lists of
    objects with `text`, `tokens` and `finish_reason`, in the prompts' order; verdicts are lists of outcomes
    (1, 0.5, 0 or null), labels lists of what an answer was given, or null.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def prompts(self) -> list[dict[str, Any]] | None:
        """Return the prompts; None where they have not been chosen, or were deleted."""
        found: list[dict[str, Any]] | None = _read(self._prompts)
        return found

    def choose(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Keep the prompts, and nothing else."""
        shutil.rmtree(self.directory, ignore_errors=True)
        _write(self._prompts, list(prompts))

    def answers(self, contestant: int, batch: int, make: Callable[[], Any]) -> Any:
        """Return a contestant's answers to a batch of prompts, made now if they are not there."""
        return _kept(self.directory / "answers" / f"{contestant:02d}-{batch:05d}.json", make)

    def verdicts(self, judge: int, pair: tuple[int, int], batch: int, make: Callable[[], Any]) -> Any:
        """Return a judge's verdicts on the answers of a pair to a batch, made now if they are not there."""
        first, second = pair
        name = f"{judge:02d}-{first:02d}-{second:02d}-{batch:05d}.json"
        return _kept(self.directory / "verdicts" / name, make)

    def labels(self, judge: int, contestant: int, batch: int, make: Callable[[], Any]) -> Any:
        """Return the labels that a judge gives a contestant's answers to a batch, made now if not there."""
        return _kept(self.directory / "labels" / f"{judge:02d}-{contestant:02d}-{batch:05d}.json", make)

    def answers_so_far(self, contestant: int, batch: int) -> list[list[dict[str, Any]]]:
        """Return a contestant's answers to a batch; none where there are none."""
        return _read(self.directory / "answers" / f"{contestant:02d}-{batch:05d}.json") or []

    def completion_ids(self) -> list[str]:
        """Return the completions, and the cases, whose prompts are asked."""
        return [one["completion_id"] for one in self.prompts() or () if one.get("completion_id")]

    def delete_texts(self) -> None:
        """Delete prompts and answers; verdicts and labels, in which there is no text of theirs, stay."""
        shutil.rmtree(self.directory / "answers", ignore_errors=True)
        self._prompts.unlink(missing_ok=True)
        _staging(self._prompts).unlink(missing_ok=True)

    @property
    def _prompts(self) -> Path:
        return self.directory / "prompts.json"


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    found = _read(path)
    if found is None:
        found = make()
        _write(path, found)
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def _write(path: Path, value: Any) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = _staging(path)
    with staging.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def _staging(path: Path) -> Path:
    return path.with_suffix(".partial")
