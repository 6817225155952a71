"""Decides what becomes of an event, given what is known of the completions it judges. Pure: no database."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from feedback.events import Reference

Status = Literal["waiting", "stored", "superseded", "rejected"]


@dataclass(frozen=True, slots=True)
class Part:
    """What is known of one prompt of a completion and of its choices."""

    part: int
    parts: int | None
    prompt_hash: str
    choices: frozenset[int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """`waiting` and `rejected` come with the reason; `superseded` is not decided here."""

    status: Status
    reason: str | None = None


def resolve(refs: Sequence[Reference], known: Mapping[str, list[Part]]) -> Outcome:
    """Decide whether an event can be stored, must wait for a record, or can never be stored.

    `refs` are the choices that it speaks of; several of them are a ranking's. `known` maps a completion id to
    its recorded parts; ids without a record are absent.
    """
    prompts: set[str] = set()
    waits: str | None = None
    for ref in refs:
        parts = known.get(ref.completion_id)
        if not parts:
            waits = waits or f"no such completion: {ref.completion_id}"
            continue
        answered = next((part for part in parts if ref.choice in part.choices), None)
        if answered is not None:
            prompts.add(answered.prompt_hash)
            continue
        reason = f"completion {ref.completion_id} has no choice {ref.choice}"
        if _complete(ref.completion_id, parts):
            return Outcome("rejected", reason)
        waits = waits or reason
    if len(prompts) > 1:
        return Outcome("rejected", "groups: a ranking orders responses to one prompt, these answer several")
    return Outcome("stored") if waits is None else Outcome("waiting", waits)


def _complete(completion_id: str, parts: list[Part]) -> bool:
    """Tell whether no further record of this completion can come.

    Only `/v1/completions` (ids `cmpl-…`) takes several prompts, each of which is recorded by itself.
    """
    expected = next((part.parts for part in parts if part.parts is not None), None)
    if expected is not None:
        return len(parts) >= expected
    return not completion_id.startswith("cmpl-")
