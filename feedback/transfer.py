"""Feedback in and out of files: preferences in through the queue, TRL's data formats out of the store.

What the lines of a preference file mean is in `preferences`. The live API is not here.
"""

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from feedback.events import ChoiceRef, Demonstration, Event, Ranking, Rating, Thumb, references
from feedback.preferences import ImportProblem, ProblemHandler, read_preferences
from feedback.privacy import PrivacyFilter
from feedback.queue import FeedbackQueue
from feedback.records import Choice, Completion, conversation
from feedback.store import Slice, Store

__all__ = ["ImportCounts", "ImportProblem", "export", "import_preferences", "read_preferences"]

_LOG = logging.getLogger(__name__)
_BATCH = 500
_HIGH_WATER = 20_000
_WINDOW = 1000

_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_GIVER = [("source", pa.string()), ("rater", pa.string()), ("event_id", pa.string())]
_SCHEMAS = {
    "preferences": pa.schema(
        [("prompt", _TURNS), ("chosen", _TURNS), ("rejected", _TURNS), ("weight", pa.float64()), *_GIVER]
    ),
    "thumbs": pa.schema([("prompt", _TURNS), ("completion", _TURNS), ("label", pa.bool_()), *_GIVER]),
    "ratings": pa.schema([("prompt", _TURNS), ("completion", _TURNS), ("score", pa.int64()), *_GIVER]),
    "demonstrations": pa.schema([("prompt", _TURNS), ("completion", _TURNS), *_GIVER]),
}


@dataclass(frozen=True, slots=True)
class ImportCounts:
    """`queued` comparisons were accepted, of which `duplicates` were waiting already; `bad` lines were not.

    What the store already has counts as queued here; the store leaves it out.
    """

    queued: int = 0
    duplicates: int = 0
    bad: int = 0

    def __str__(self) -> str:
        return f"{self.queued} comparisons queued, {self.duplicates} already waiting, {self.bad} bad lines"


async def import_preferences(
    queue: FeedbackQueue,
    path: Path,
    source: str,
    *,
    on_problem: ProblemHandler | None = None,
    progress: Callable[[int], None] | None = None,
) -> ImportCounts:
    """Send a file's comparisons through the queue; `progress` is told how many are queued so far.

    Waits while more than 20,000 entries are not yet stored. Raises ImportProblem, which tells how many good
    lines before it were kept, and QueueUnavailable; in either case the import can simply be run again.
    """
    counts = ImportCounts()

    def tolerate(problem: ImportProblem) -> None:
        nonlocal counts
        counts = ImportCounts(counts.queued, counts.duplicates, counts.bad + 1)
        assert on_problem is not None
        on_problem(problem)

    batch: list[tuple[Completion, Event]] = []
    pairs = read_preferences(path, source, None if on_problem is None else tolerate)
    while True:
        problem = None
        try:
            pair = next(pairs, None)
        except ImportProblem as found:
            pair, problem = None, found
        if pair is not None:
            batch.append(pair)
        if len(batch) == _BATCH or pair is None:
            counts = await _send(queue, batch, counts)
            batch = []
            if progress is not None:
                progress(counts.queued)
        if problem is not None:
            problem.kept = f" ({counts} before it)"
            raise problem
        if pair is None:
            return counts


async def _send(
    queue: FeedbackQueue, batch: Sequence[tuple[Completion, Event]], counts: ImportCounts
) -> ImportCounts:
    warned_at = time.monotonic()
    while await queue.depth() > _HIGH_WATER:
        if time.monotonic() - warned_at > 10:
            warned_at = time.monotonic()
            _LOG.warning("the import waits for ingest: more than %d entries are not yet stored", _HIGH_WATER)
        await asyncio.sleep(0.1)
    await queue.record([completion for completion, _ in batch])
    receipts = await queue.submit_batch([event for _, event in batch])
    duplicates = sum(receipt.duplicate for receipt in receipts)
    return ImportCounts(counts.queued + len(receipts), counts.duplicates + duplicates, counts.bad)


def export(
    store: Store,
    directory: Path,
    format: Literal["jsonl", "parquet"],
    privacy: PrivacyFilter | None = None,
) -> dict[str, int]:
    """Write what counts now in TRL's formats, one file a kind, and return how many rows each got.

    `preferences` (all pairs of each ranking that are not tied; the weights of a ranking's pairs add up to 1),
    `thumbs` (TRL's unpaired preferences), `ratings` (a score from 1 to 7 instead of the label) and
    `demonstrations` (prompt and completion). Prompts and responses are lists of messages; a prompt that was
    sent as plain text is one user message. A kind without rows gets no file. `without_text` counts the events
    on prompts that were sent as token ids, or on completions that are no longer stored. With `privacy`, texts
    are cleaned, and what was replaced is counted by kind, in each row. The store remembers the directory.
    `datasets.load_dataset(directory, "preferences")` opens it.
    """
    replaced: Counter[str] = Counter()
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: _File(directory, name, format) for name in _SCHEMAS}
    without_text = 0
    try:
        head = store.head()
        store.forgettings.note_export(str(directory.resolve()), "feedback", 0, head)
        for cursor in range(0, head, _WINDOW):
            window = store.slice(cursor, min(cursor + _WINDOW, head), as_of=head)
            for event in window.events:
                name, rows = _rows(event, window) if _is_whole(event, window) else ("", None)
                if rows is None:
                    without_text += 1
                elif privacy is None:
                    files[name].write(rows)
                else:
                    files[name].write([_cleaned(row, privacy, replaced) for row in rows])
        counts = {name: file.finish() for name, file in files.items()}
    finally:
        for file in files.values():
            file.abandon()
    _describe(directory, [name for name, count in counts.items() if count], format)
    return counts | {"without_text": without_text} | {f"{kind}_replaced": n for kind, n in replaced.items()}


def _is_whole(event: Event, window: Slice) -> bool:
    """Whether all that an event judges is still stored."""
    return all(ref.completion_id in window.completions for ref in references(event.feedback))


def _cleaned(row: dict[str, Any], privacy: PrivacyFilter, replaced: Counter[str]) -> dict[str, Any]:
    """Clean the texts of a row's messages."""

    def clean(turn: dict[str, str]) -> dict[str, str]:
        text, found = privacy.clean(turn["content"])
        replaced.update(found)
        return turn | {"content": text}

    turns = {name: [clean(turn) for turn in value] for name, value in row.items() if isinstance(value, list)}
    return row | turns


def _rows(event: Event, window: Slice) -> tuple[str, list[dict[str, Any]] | None]:
    """Tell which file an event belongs to and its rows there; None if its prompt has no text."""
    said = event.feedback
    giver = {"source": event.source, "rater": event.rater, "event_id": event.event_id}
    if isinstance(said, Demonstration):
        prompt = (
            conversation(window.completions[said.completion_id][0])
            if said.completion_id is not None
            else [{"role": turn.role, "content": turn.content} for turn in said.messages or []]
        )
        reply = {"prompt": prompt, "completion": _reply(said.text)}
        return "demonstrations", None if prompt is None else [reply | giver]
    if isinstance(said, Ranking):
        return "preferences", _pairs(said, window, giver)
    completion, choice = _find(ChoiceRef(completion_id=said.completion_id, choice=said.choice), window)
    name, verdict = _verdict(said)
    prompt = conversation(completion)
    row = {"prompt": prompt, "completion": _reply(choice.text)} | verdict | giver
    return name, None if prompt is None else [row]


def _verdict(said: Thumb | Rating) -> tuple[str, dict[str, Any]]:
    if isinstance(said, Thumb):
        return "thumbs", {"label": said.value == "up"}
    return "ratings", {"score": said.score}


def _pairs(ranking: Ranking, window: Slice, giver: dict[str, str]) -> list[dict[str, Any]] | None:
    prompt = conversation(_find(ranking.groups[0][0], window)[0])
    if prompt is None:
        return None
    pairs = [pair for better, worse in combinations(ranking.groups, 2) for pair in product(better, worse)]
    return [
        {
            "prompt": prompt,
            "chosen": _reply(_find(better, window)[1].text),
            "rejected": _reply(_find(worse, window)[1].text),
            "weight": 1 / len(pairs),
        }
        | giver
        for better, worse in pairs
    ]


def _find(ref: ChoiceRef, window: Slice) -> tuple[Completion, Choice]:
    """Look up a choice; an event is stored only after all its choices are."""
    for completion in window.completions[ref.completion_id]:
        for choice in completion.choices:
            if choice.index == ref.choice:
                return completion, choice
    raise AssertionError(f"{ref} is judged but not stored")


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


class _File:
    """One data file: written under a temporary name, and moved to its own when it is complete."""

    def __init__(self, directory: Path, name: str, format: Literal["jsonl", "parquet"]) -> None:
        self._final = directory / f"{name}.{format}"
        self._partial = directory / f".{name}.{format}.partial"
        self._schema = _SCHEMAS[name]
        self._rows = 0
        self._parquet = pq.ParquetWriter(self._partial, self._schema) if format == "parquet" else None
        self._lines = self._partial.open("w", encoding="utf-8") if format == "jsonl" else None
        self._buffer: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._rows += len(rows)
        self._buffer += rows
        if len(self._buffer) >= _WINDOW:
            self._flush()

    def finish(self) -> int:
        """Put the file in its place, or none if it would be empty; return its rows."""
        self._flush()
        self._close()
        if self._rows:
            os.replace(self._partial, self._final)
        else:
            self._final.unlink(missing_ok=True)
        return self._rows

    def abandon(self) -> None:
        """Leave nothing half-written behind; after `finish` there is nothing to do."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._lines is not None:
            self._lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._buffer)
        elif self._parquet is not None and self._buffer:
            self._parquet.write_table(pa.Table.from_pylist(self._buffer, schema=self._schema))
        self._buffer = []

    def _close(self) -> None:
        if self._parquet is not None:
            self._parquet.close()
        if self._lines is not None:
            self._lines.close()


def _describe(directory: Path, names: list[str], format: str) -> None:
    """Write the card from which `datasets` knows that each file is a data set by itself."""
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.{format}\n" for name in names)
    listed = "configs:\n" + configs if names else ""
    (directory / "README.md").write_text(f"---\n{listed}---\n\nFeedback exported by InstructLoop.\n")
