"""Preference files as they occur: transcripts, TRL's variants, and lines that are no preference."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from feedback.events import Ranking
from feedback.preferences import ImportProblem, read_preferences
from feedback.records import Completion

USER = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "No."}


def write(path: Path, *lines: Any) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path) -> list[Completion]:
    return [completion for completion, _ in read_preferences(path, "test")]


@pytest.mark.parametrize(
    "line",
    [
        {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: No."},
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."},
        {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": "Hello.", "rejected": "No."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_every_form_says_the_same(tmp_path: Path, line: dict[str, Any], name: str) -> None:
    ((completion, event),) = read_preferences(write(tmp_path / name, line), "test")
    assert completion.messages == [USER]
    assert [choice.text for choice in completion.choices] == ["Hello.", "No."]
    assert (completion.source, event.source, event.rater) == ("test", "test", "import/test")
    assert isinstance(event.feedback, Ranking)
    assert [[(r.completion_id, r.choice) for r in g] for g in event.feedback.groups] == [
        [(completion.id, 0)],
        [(completion.id, 1)],
    ]


def test_ids_follow_from_the_line_and_the_source(tmp_path: Path) -> None:
    a = {"prompt": "a", "chosen": "x", "rejected": "y"}
    swapped = {"prompt": "a", "chosen": "y", "rejected": "x"}
    path = write(tmp_path / "a.jsonl", a, swapped, a)
    first, second = read(path), read(path)
    assert [c.id for c in first] == [c.id for c in second]
    assert first[0].id == first[2].id != first[1].id
    assert next(read_preferences(path, "other"))[0].id != first[0].id


def test_a_reply_in_two_turns_is_one_reply(tmp_path: Path) -> None:
    line = {
        "chosen": "\n\nHuman: How much?\n\nAssistant: Umm...\n\nAssistant: About $50.",
        "rejected": "\n\nHuman: How much?\n\nAssistant: Look here.",
    }
    (completion,) = read(write(tmp_path / "a.jsonl", line))
    assert [choice.text for choice in completion.choices] == ["Umm...\n\nAbout $50.", "Look here."]


def test_an_empty_reply_is_a_reply(tmp_path: Path) -> None:
    line = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: "}
    (completion,) = read(write(tmp_path / "a.jsonl", line))
    assert completion.choices[1].text == ""


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "line"),
        ("[]", "line"),
        ({"chosen": "x"}, "rejected"),
        ({"rejected": "x"}, "chosen"),
        ({"prompt": "a", "chosen": 3, "rejected": "x"}, "chosen"),
        ({"prompt": "a", "chosen": [{"role": "tool", "content": "x"}], "rejected": "x"}, "chosen[0].role"),
        ({"prompt": "a", "chosen": "x", "rejected": [{"role": "assistant"}]}, "rejected[0].content"),
        ({"prompt": "a", "chosen": "x", "rejected": "x"}, "rejected"),
        ({"chosen": "x", "rejected": "y"}, "prompt"),
        ({"prompt": [GOOD], "chosen": "x", "rejected": "y"}, "prompt"),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: e",
            },
            "chosen",
        ),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a\n\nAssistant: e"}, "chosen"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: Any, field: str) -> None:
    good = {"prompt": "a", "chosen": "x", "rejected": "y"}
    path = write(tmp_path / "a.jsonl", good, "", line, good)
    pairs = read_preferences(path, "test")
    next(pairs)
    with pytest.raises(ImportProblem, match=r"^line 3: ") as caught:
        next(pairs)
    assert (caught.value.line, caught.value.field) == (3, field)
    problems: list[ImportProblem] = []
    assert len(list(read_preferences(path, "test", problems.append))) == 2
    assert [problem.line for problem in problems] == [3]


def test_a_file_that_breaks_off_says_where(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl.gz", *[{"prompt": str(i), "chosen": "x", "rejected": "y"} for i in range(9)]
    )
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ImportProblem, match="damaged"):
        read(path)
