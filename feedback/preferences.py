"""Reads files of human preferences: HH-RLHF transcripts and TRL preference lines.

Each line becomes a completion with two choices and a ranking of them, under ids that follow from the line, so
that reading a file again makes the same records. Where the records go is `transfer`'s affair.
"""

import gzip
import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from feedback.events import ChoiceRef, Event, Message, Ranking
from feedback.records import Choice, Completion, canonical_json

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_MESSAGES = TypeAdapter(list[Message])
_KEY_ID = "import"

Turns = list[Message]
ProblemHandler = Callable[["ImportProblem"], None]


class ImportProblem(ValueError):  # noqa: N818
    """A line (counted from 1) that is no preference, and the field to blame; `kept` says what got in."""

    def __init__(self, line: int, field: str, reason: str) -> None:
        super().__init__(f"line {line}: {field}: {reason}")
        self.line = line
        self.field = field
        self.reason = reason
        self.kept = ""

    def __str__(self) -> str:
        return super().__str__() + self.kept


def read_preferences(
    path: Path, source: str, on_problem: ProblemHandler | None = None
) -> Iterator[tuple[Completion, Event]]:
    """Yield each comparison of a `.jsonl` or `.jsonl.gz` file as a completion and a ranking of its choices.

    Choice 0 is the preferred one. `source` names the data set in both records. Raises ImportProblem at the
    first bad line, or hands each to `on_problem` and goes on; a file that breaks off raises it in any case.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            prompt, chosen, rejected = _preference(number, line)
        except ImportProblem as problem:
            if on_problem is None:
                raise
            on_problem(problem)
            continue
        yield _records(source, prompt, chosen, rejected)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers, from 1; damage to the file is a problem of the next line."""
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        while True:
            try:
                line = file.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
                raise ImportProblem(number + 1, "file", f"the gzip data is damaged: {problem}") from problem
            if not line:
                return
            number += 1
            yield number, line


def _preference(number: int, line: bytes) -> tuple[Turns, str, str]:
    """Parse one line into the shared turns and the two responses. Raises ImportProblem."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ImportProblem(number, "line", f"not JSON: {problem}") from problem
    if not isinstance(fields, dict):
        raise ImportProblem(number, "line", "not a JSON object")
    for name in ("chosen", "rejected"):
        if name not in fields:
            raise ImportProblem(number, name, "missing")
    start = _turns(number, "prompt", fields["prompt"], "user") if "prompt" in fields else []
    if start and start[-1] == Message(role="assistant", content=""):
        start.pop()  # a transcript that ends in "Assistant:", for the reply to follow
    chosen = _conversation(number, "chosen", fields["chosen"], start)
    rejected = _conversation(number, "rejected", fields["rejected"], start)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise ImportProblem(number, "rejected", "the same as chosen")
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if [turn.role for turn in turns[shared:]] != ["assistant"]:
            raise ImportProblem(
                number, name, "must end in one reply of the assistant after the turns that both share"
            )
    if not shared or chosen[shared - 1].role == "assistant":
        raise ImportProblem(
            number, "prompt", "there is no prompt: the replies don't follow a shared user turn"
        )
    return chosen[:shared], chosen[shared].content, rejected[shared].content


def _conversation(number: int, name: str, value: Any, start: Turns) -> Turns:
    """All turns of one side: TRL files repeat the prompt in them, or don't."""
    turns = _turns(number, name, value, "assistant")
    return turns if start and turns[: len(start)] == start else _merged(start + turns)


def _turns(number: int, name: str, value: Any, role: str) -> Turns:
    """Read a transcript, a list of messages, or a plain string, which is one turn of `role`."""
    if isinstance(value, str):
        if not _TURN.match(value):
            return [Message.model_validate({"role": role, "content": value})]
        pieces = _TURN.split(value)
        said = zip(pieces[1::2], pieces[2::2], strict=True)
        return _merged(
            [Message.model_validate({"role": _ROLES[who], "content": text.strip()}) for who, text in said]
        )
    try:
        return _merged(_MESSAGES.validate_python(value))
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
        raise ImportProblem(number, name + where, first["msg"]) from problem


def _merged(turns: Turns) -> Turns:
    """Join turns of one role that follow each other: some transcripts split a reply in two."""
    merged: Turns = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            merged[-1] = Message(role=turn.role, content=f"{merged[-1].content}\n\n{turn.content}")
        else:
            merged.append(turn)
    return merged


def _records(source: str, prompt: Turns, chosen: str, rejected: str) -> tuple[Completion, Event]:
    messages = [turn.model_dump() for turn in prompt]
    identity = canonical_json([source, messages, chosen, rejected])
    id = "import-" + hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    now = time.time()
    completion = Completion(
        id=id,
        parts=1,
        key_id=_KEY_ID,
        source=source,
        endpoint="import",
        created_at=now,
        messages=messages,
        choices=[Choice(index=0, text=chosen), Choice(index=1, text=rejected)],
    )
    order = [[ChoiceRef(completion_id=id, choice=0)], [ChoiceRef(completion_id=id, choice=1)]]
    event = Event(
        event_id=id,
        key_id=_KEY_ID,
        rater=f"{_KEY_ID}/{source}",
        source=source,
        received_at=now,
        feedback=Ranking(type="ranking", groups=order),
    )
    return completion, event
