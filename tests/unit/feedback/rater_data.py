"""Public votes of several raters, from the folder INSTRUCTLOOP_DATA; a test without them is skipped."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from feedback.votes import Vote, ranking_verdicts

ROOT = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("INSTRUCTLOOP_DATA", ROOT.parent / "shared" / "data"))


def rows(name: str) -> Iterator[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set INSTRUCTLOOP_DATA to the folder that holds {name}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def mt_bench() -> list[Vote]:
    """The human votes of MT-Bench; the task is the turn."""
    votes = []
    for number, row in enumerate(rows("mt-bench/human_votes.jsonl.gz")):
        prompt = f"{row['question_id']}/{row['turn']}"
        a, b = f"{prompt}/{row['model_a']}", f"{prompt}/{row['model_b']}"
        groups = {"model_a": [[a], [b]], "model_b": [[b], [a]], "tie": [[a, b]]}[row["winner"]]
        judge = f"mt-bench/{row['judge']}"
        task = f"turn {row['turn']}"
        votes.append(Vote(f"{number:05}", judge, "mt-bench", prompt, ranking_verdicts(groups), task=task))
    return votes
