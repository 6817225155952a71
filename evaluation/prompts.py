"""Prompts from a file, from the store or of cases, as text, and which prompts no round trains on.

Owns the file's form and the split by prompt. What prompts become for a model is the model's side's affair.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.checks import BadCheck, validate
from evaluation.ifeval import checks_of
from evaluation.judges import ChatPrompt
from feedback.cases import Case
from feedback.privacy import PrivacyFilter
from feedback.records import Completion, prompt_hash
from feedback.store import Store


class FileProblem(ValueError):  # noqa: N818
    """A file of texts or prompts can't be used; the message names the file, the line and the field."""


def is_held_out(key: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out side: the same in every round, whatever else is asked."""
    digest = hashlib.sha256(f"held-out:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_chats(path: Path) -> Iterator[ChatPrompt]:
    """Read JSON lines, `{"prompt": "…"}` (a user's turn) or `{"messages": […]}`, with or without `checks`.

    IFEval's own form of checks (`instruction_id_list` and `kwargs`) will do, too.

    A prompt's key is `file:` and its line. Raises FileProblem.
    """
    for number, row in read_rows(path):
        where = f"{path}, line {number}"
        yield ChatPrompt(f"file:{number}", _messages(row, where), _checks(row, where))


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read JSON lines: the number of each line that is not empty, and its object. Raises FileProblem."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise FileProblem(f"{path}, line {number}: not a JSON object")
                    yield number, row
    except OSError as problem:
        raise FileProblem(f"{path} can't be read: {problem.strerror}") from problem
    except ValueError as problem:
        if isinstance(problem, FileProblem):
            raise
        raise FileProblem(f"{path} is not JSON lines in UTF-8: {problem}") from problem


def held_out_chats(
    store: Store, share: float, limit: int, privacy: PrivacyFilter | None = None
) -> Iterator[tuple[ChatPrompt, str]]:
    """Yield the store's latest `limit` held-out prompts, each with the id of a completion that asked it.

    `share` is the rounds' own. Checks are those that feedback on that prompt brought along; a prompt whose
    text nobody recorded is left out. `privacy` cleans the texts, as it does for rounds.
    """
    for completion in store.prompts(lambda key: is_held_out(key, share), limit):
        key, messages = prompt_hash(completion), _recorded(completion, privacy)
        if messages:
            yield ChatPrompt(key, messages, _checks_given(store, key)), completion.id


def case_chats(cases: Sequence[Case], privacy: PrivacyFilter | None = None) -> list[ChatPrompt]:
    """Return the prompts of cases, each under its case's id; `privacy` cleans texts, as for rounds."""
    return [
        ChatPrompt(
            case.id,
            _cleaned(case.messages, privacy),
            tuple(case.checks),
            case.bad if case.bad is None or privacy is None else privacy.clean(case.bad)[0],
        )
        for case in cases
    ]


def _recorded(completion: Completion, privacy: PrivacyFilter | None) -> tuple[Mapping[str, str], ...]:
    if completion.messages is not None:
        messages = [
            {"role": str(message.get("role", "user")), "content": content}
            for message in completion.messages
            if (content := text_of(message.get("content")))
        ]
    else:
        messages = [{"role": "user", "content": completion.prompt}] if completion.prompt else []
    return _cleaned(messages, privacy)


def _cleaned(
    messages: Sequence[Mapping[str, str]], privacy: PrivacyFilter | None
) -> tuple[Mapping[str, str], ...]:
    if privacy is not None:
        messages = [{**message, "content": privacy.clean(message["content"])[0]} for message in messages]
    return tuple(messages)


def text_of(content: Any) -> str:
    """Return the text of a message's content, which may be in parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _checks_given(store: Store, key: str) -> tuple[Mapping[str, Any], ...]:
    """Return the checks of the last feedback on the prompt that has some which can be carried out."""
    for stored in reversed(store.events_on(key)):
        checks = (stored.event.feedback.context or {}).get("checks")
        if isinstance(checks, list) and checks and all(map(_is_check, checks)):
            return tuple(checks)
    return ()


def _is_check(check: Any) -> bool:
    try:
        return isinstance(check, dict) and bool(validate(check))
    except BadCheck:
        return False


def _messages(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, str], ...]:
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    if not (isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)):
        raise FileProblem(f'{where}: "prompt" (a string) or "messages" (a list) is missing')
    for message in messages:
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise FileProblem(f'{where}: each of "messages" needs "role" and "content" (strings)')
    return tuple({"role": one["role"], "content": one["content"]} for one in messages)


def _checks(row: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    try:
        checks = checks_of(row) if "instruction_id_list" in row else row.get("checks", [])
    except (LookupError, TypeError, ValueError, AttributeError):
        raise FileProblem(
            f'{where}: "instruction_id_list" and "kwargs" have to be lists of one length'
        ) from None
    if not isinstance(checks, list | tuple) or not all(isinstance(check, dict) for check in checks):
        raise FileProblem(f'{where}: "checks" has to be a list of objects')
    for check in checks:
        try:
            validate(check)
        except BadCheck as problem:
            raise FileProblem(f'{where}: "checks": {problem}') from None
    return tuple(checks)
