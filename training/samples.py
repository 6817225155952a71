"""Sample responses of a round, a handful an update, as JSON lines beside its other files.

Owns the file: its form, its bound and what happens to it when a round is resumed. Which responses are shown
is decided by who hands them over.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLES = "samples.jsonl"
SAMPLES_AN_UPDATE = 4


class SampleLog:
    """The samples of the round in `directory`.

    Each is a `prompt` and a `response` as text with the `score` that was maximised, and in the file with the
    number of its `update`, from 1.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / SAMPLES

    def keep(self, update: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Add the first few samples of an update, in place of those of a run that was killed after it."""
        lines = [line for line in self.read() if line["update"] < update]
        lines += [{"update": update, **sample} for sample in samples[:SAMPLES_AN_UPDATE]]
        staging = self._path.with_suffix(".partial")
        staging.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        staging.rename(self._path)

    def delete(self) -> None:
        """Leave no sample behind."""
        for path in (self._path, self._path.with_suffix(".partial")):
            path.unlink(missing_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """All lines, by update; none where the round has kept none."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
