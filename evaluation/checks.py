"""Constraints on a response that a program can check, such as "no commas" or "at most two sentences".

Owns the kinds of checks and what each means for a text. A check is plain JSON such as
`{"kind": "max_words", "n": 20}` and rides on feedback as `context: {"checks": [...]}`. IFEval's instruction
kinds, whose names have a colon, are checks too (`evaluation.ifeval`). Whether a response is any good beyond
its constraints is for the judges.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evaluation import ifeval

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_BULLET = re.compile(r"\s*[-*•]\s+\S")
_NUMBERED = re.compile(r"\s*(\d+)[.)]\s+\S")
_MARKER = re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+")
# A full stop after one of these ends no sentence.
_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|st|vs|etc|e\.g|i\.e|[a-z])\.$", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")

_WINDOW_WORDS = 40
_LEAST_DISTINCT = 0.25


class BadCheck(ValueError):  # noqa: N818
    """A check that cannot be carried out; the message names the field."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of check: its parameters by name, what it asks for, and the test of a text."""

    parameters: Mapping[str, Literal["count", "text", "words"]]
    meaning: str
    holds: Callable[[str, Mapping[str, Any]], bool]


def words(text: str) -> list[str]:
    """Return the words of a text; "don't" and "well-known" are one word each."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Split a text into sentences; a line break ends one too, and list markers are left out."""
    found: list[str] = []
    for line in _MARKER.sub("", text).splitlines():
        start = 0
        for end in (match.end() for match in _SENTENCE_END.finditer(line)):
            if not _ABBREVIATION.search(line[start:end]):
                found.append(line[start:end].strip())
                start = end
        found.append(line[start:].strip())
    return [sentence for sentence in found if _WORD.search(sentence)]


def degenerate(text: str) -> bool:
    """Whether a text is empty, has no word, or repeats the same few words over and over."""
    spoken = [word.casefold() for word in words(text)]
    if not spoken:
        return True
    if len(spoken) >= 3 and len(set(spoken)) == 1:
        return True
    windows = [spoken[start : start + _WINDOW_WORDS] for start in range(0, len(spoken), _WINDOW_WORDS)]
    return any(len(set(window)) < _LEAST_DISTINCT * len(window) for window in windows if len(window) >= 12)


def mentions(text: str, word: str) -> bool:
    """Whether a text has this word or phrase, in any case, alone or with a plural ending."""
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    return re.search(rf"(?<!\w){pattern}(?:s|es)?(?!\w)", text, re.IGNORECASE) is not None


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _items(text: str) -> list[str]:
    """Return the lines of a list, without one line that introduces it."""
    lines = _lines(text)
    return lines[1:] if lines and lines[0].rstrip().endswith(":") and len(lines) > 1 else lines


def _is_bullet_list(text: str, check: Mapping[str, Any]) -> bool:
    items = _items(text)
    return len(items) >= check.get("n", 2) and all(_BULLET.match(item) for item in items)


def _is_numbered_list(text: str, check: Mapping[str, Any]) -> bool:
    matches = [_NUMBERED.match(item) for item in _items(text)]
    numbers = [int(match[1]) for match in matches if match]
    return len(matches) >= check.get("n", 2) and numbers == list(range(1, len(matches) + 1))


def _is_quoted(text: str, check: Mapping[str, Any]) -> bool:
    stripped = text.strip()
    return len(stripped) > 2 and stripped[0] in '"“' and stripped[-1] in '"”'


def _has_title(text: str, check: Mapping[str, Any]) -> bool:
    return re.match(r"\s*<<[^<>\n]*\w[^<>\n]*>>", text) is not None and bool(words(text.partition(">>")[2]))


def _is_json(text: str, check: Mapping[str, Any]) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def _mentions_any(text: str, check: Mapping[str, Any]) -> bool:
    return any(mentions(text, word) for word in check["words"])


def _mentions_all(text: str, check: Mapping[str, Any]) -> bool:
    return all(mentions(text, word) for word in check["words"])


def _starts(text: str, check: Mapping[str, Any]) -> bool:
    return text.lstrip().casefold().startswith(check["text"].casefold())


def _ends(text: str, check: Mapping[str, Any]) -> bool:
    return text.rstrip().casefold().endswith(check["text"].casefold())


KINDS: Mapping[str, Kind] = {
    "no_commas": Kind({}, "has no comma", lambda text, _: "," not in text),
    "lowercase": Kind({}, "is all in lower case", lambda text, _: text.islower()),
    "uppercase": Kind({}, "is all in capitals", lambda text, _: text.isupper()),
    "no_digits": Kind({}, "has no digit", lambda text, _: not re.search(r"\d", text)),
    "max_sentences": Kind(
        {"n": "count"}, "has at most n sentences", lambda text, check: len(sentences(text)) <= check["n"]
    ),
    "min_sentences": Kind(
        {"n": "count"}, "has at least n sentences", lambda text, check: len(sentences(text)) >= check["n"]
    ),
    "max_words": Kind(
        {"n": "count"}, "has at most n words", lambda text, check: len(words(text)) <= check["n"]
    ),
    "min_words": Kind(
        {"n": "count"}, "has at least n words", lambda text, check: len(words(text)) >= check["n"]
    ),
    "forbidden_words": Kind(
        {"words": "words"}, "has none of the words", lambda text, check: not _mentions_any(text, check)
    ),
    "required_words": Kind({"words": "words"}, "has all of the words", _mentions_all),
    "mentions_any": Kind({"words": "words"}, "has at least one of the words", _mentions_any),
    "starts_with": Kind({"text": "text"}, "begins with the text", _starts),
    "ends_with": Kind({"text": "text"}, "ends with the text", _ends),
    "bullet_list": Kind({}, "is a list of at least n (2) bullet points", _is_bullet_list),
    "numbered_list": Kind({}, "is a list of at least n (2) points numbered from 1", _is_numbered_list),
    "single_paragraph": Kind({}, "is one paragraph on one line", lambda text, _: len(_lines(text)) == 1),
    "question": Kind({}, "ends with a question", lambda text, _: text.rstrip(" \n\"'”’)").endswith("?")),
    "quoted": Kind({}, "stands in double quotation marks", _is_quoted),
    "title": Kind({}, "begins with a title in double angle brackets, as in <<title>>", _has_title),
    "json": Kind({}, "is a JSON object or array", _is_json),
}
"""Every kind of check. `bullet_list` and `numbered_list` take an optional `n`, the fewest items."""

_OPTIONAL: Mapping[str, Mapping[str, Literal["count", "text", "words"]]] = {
    "bullet_list": {"n": "count"},
    "numbered_list": {"n": "count"},
}


def validate(check: Mapping[str, Any]) -> Kind:
    """Return the kind of a check; raises BadCheck naming the field that is wrong."""
    name = check.get("kind")
    if isinstance(name, str) and ":" in name:
        return _instruction(check)
    kind = KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise BadCheck(f"kind: {name!r} is none of {', '.join(sorted(KINDS))}")
    allowed = {**kind.parameters, **_OPTIONAL.get(str(name), {})}
    for field in check:
        if field != "kind" and field not in allowed:
            raise BadCheck(f"{field}: {name} has no such parameter")
    for field, form in allowed.items():
        if field in check:
            if not _has_form(check[field], form):
                raise BadCheck(f"{field}: {name} needs {_FORMS[form]}")
        elif field in kind.parameters:
            raise BadCheck(f"{field}: {name} needs it")
    return kind


def _instruction(check: Mapping[str, Any]) -> Kind:
    """Return the kind of an instruction of IFEval's."""
    try:
        ifeval.validate(check)
    except ifeval.BadInstruction as error:
        raise BadCheck(str(error)) from error
    return Kind({}, "follows an instruction of IFEval's", lambda text, check: ifeval.follows(check, text))


_FORMS = {
    "count": "a whole number of at least 1",
    "text": "a text that is not empty",
    "words": "a list of words",
}


def _has_form(value: Any, form: Literal["count", "text", "words"]) -> bool:
    match form:
        case "count":
            return isinstance(value, int) and not isinstance(value, bool) and value >= 1
        case "text":
            return isinstance(value, str) and bool(value.strip())
        case "words":
            return (
                isinstance(value, list)
                and bool(value)
                and all(isinstance(word, str) and word.strip() for word in value)
            )


def satisfied(check: Mapping[str, Any], text: str) -> bool:
    """Whether `text` meets the check; a degenerate text meets none of our own kinds. Raises BadCheck."""
    kind = validate(check)
    # About IFEval's kinds the verdict is IFEval's, which only refuses a blank text.
    of_ifeval = ":" in check["kind"]
    return (of_ifeval or not degenerate(text)) and kind.holds(text, check)


def share_satisfied(checks: Sequence[Mapping[str, Any]], text: str) -> float:
    """Return the share of `checks` that `text` meets, 0 to 1; raises ValueError without any, BadCheck."""
    if not checks:
        raise ValueError("no checks")
    return sum(satisfied(check, text) for check in checks) / len(checks)


def all_satisfied(checks: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether `text` meets every check; raises ValueError without any, BadCheck."""
    return share_satisfied(checks, text) == 1.0
