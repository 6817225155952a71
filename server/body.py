"""What a request body may be: JSON in UTF-8, not nested without end, of characters that can be stored.

Everything behind it, vLLM's handlers too, relies on that: what this reads, every later reader reads alike.
"""

import json
import math
from typing import Any

from server.errors import Problem

DEEPEST = 100
"""How deep lists and objects may lie in each other. Python and pydantic give up at some hundreds."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Read a JSON object from a request body. Raises Problem 422."""
    try:
        value = _DECODER.decode(raw.decode())
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise Problem(422, f"not JSON: {_without_content(error)}") from None
    if not isinstance(value, dict):
        raise Problem(422, "a JSON object is expected")
    # Few brackets can't be deep: most bodies are not walked.
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and _deeper(value, DEEPEST):
        raise _too_deep()
    if b"\\u" in raw:
        _refuse_lone_surrogates(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is more than a number can be")
    return value


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def _without_content(error: ValueError) -> str:
    """Say what is wrong with a body without quoting it."""
    return f"not UTF-8 at byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)


def _too_deep() -> Problem:
    return Problem(422, f"lists and objects may lie {DEEPEST} deep in each other, not deeper")


def _deeper(value: Any, depth: int) -> bool:
    """Whether containers lie more than `depth` deep; level by level, so it can't recurse too deep itself."""
    level = [value]
    for _ in range(depth):
        level = [
            item
            for container in level
            for item in (container.values() if isinstance(container, dict) else container)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _refuse_lone_surrogates(value: Any) -> None:
    """Raise Problem 422 for half a surrogate pair, which JSON can spell and no UTF-8 can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Problem(422, "a \\ud800 to \\udfff stands alone: it is half a character") from None
