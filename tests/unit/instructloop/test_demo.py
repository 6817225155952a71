"""The demo's own decisions: what the rater says, what is claimed, what counts as a failed stream."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from evaluation.checks import all_satisfied, share_satisfied
from feedback.events import FEEDBACK, Ranking
from instructloop.demo import DemoSizes, _conclude, _Course, _events, _spread
from instructloop.demo_client import Answer, Stream
from instructloop.demo_instructions import KINDS, demonstration, held_out, training
from instructloop.demo_report import Measurement, figures
from instructloop.demo_streams import STREAM_TOKENS, Crossing, summary


def _answers() -> list[Answer]:
    """Two plain answers, one that the rater would have written, an empty one."""
    found = []
    for number, item in enumerate(training()):
        plain = f"{item.topic.capitalize()} are fine, and I like {item.topic} a lot. They last. Yes, they do."
        good = demonstration(item, plain)
        assert good is not None
        found.append(Answer(f"chatcmpl-{number}", (plain, good, "", plain), ("stop",) * 4))
    return found


def test_rankings_put_what_meets_more_checks_first_and_tie_equals() -> None:
    answers = _answers()
    events = _events(training(), answers, random.Random(0))
    rankings = [event for event in events if event["type"] == "ranking"]
    assert len(rankings) == len(training())
    for instruction, answer, ranking in zip(training(), answers, rankings, strict=True):
        shares = [
            [share_satisfied(instruction.checks, answer.texts[ref["choice"]]) for ref in group]
            for group in ranking["groups"]
        ]
        assert all(len(set(group)) == 1 for group in shares)
        heads = [group[0] for group in shares]
        assert heads == sorted(set(heads), reverse=True)
        assert sum(map(len, shares)) == 4
        assert ranking["context"] == {"checks": list(instruction.checks)}


def test_all_events_are_ones_that_the_server_takes() -> None:
    events = _events(training(), _answers(), random.Random(1))
    for event in events:
        FEEDBACK.validate_python(event)
    counts = {kind: sum(event["type"] == kind for event in events) for kind in ("thumb", "demonstration")}
    assert counts == {"thumb": 54, "demonstration": 160}


def test_a_ranking_in_which_all_are_tied_is_one_group() -> None:
    answer = Answer("chatcmpl-1", ("", "", "", ""), ("stop",) * 4)
    (ranking, thumb) = _events(training()[:1], [answer], random.Random(0))
    assert len(FEEDBACK.validate_python(ranking).groups) == 1  # type: ignore[union-attr]
    assert isinstance(FEEDBACK.validate_python(ranking), Ranking)
    assert thumb["value"] == "down"


def test_thumbs_and_demonstrations_say_what_the_checks_say() -> None:
    answers = {answer.completion_id: answer for answer in _answers()}
    by_id = {f"chatcmpl-{number}": item for number, item in enumerate(training())}
    for event in _events(training(), list(answers.values()), random.Random(2)):
        item = by_id.get(event.get("completion_id", ""))
        if event["type"] == "thumb":
            assert item is not None
            text = answers[event["completion_id"]].texts[event["choice"]]
            assert (event["value"] == "up") == all_satisfied(item.checks, text)
        if event["type"] == "demonstration":
            assert item is not None
            assert all_satisfied(item.checks, event["text"])


def test_a_smaller_demo_still_has_all_kinds() -> None:
    assert {item.kind for item in _spread(training(), 16)} == set(KINDS)
    assert len({item.text for item in _spread(held_out(), 20)}) == 20
    assert _spread(held_out(), None) == held_out()


def _measurement(version: str, good: set[int]) -> Measurement:
    """Answers of which those to the instructions in `good` meet all checks."""
    texts = []
    for number, item in enumerate(held_out()):
        plain = f"{item.topic.capitalize()} are a fine thing. I like {item.topic}. They last long."
        repaired = demonstration(item, plain)
        assert repaired is not None
        texts.append(repaired if number in good else "")
    return Measurement(version, tuple(held_out()), tuple((text, text) for text in texts), tuple(texts))


def test_the_figures_are_the_shares_of_what_was_measured() -> None:
    before, after = _measurement("policy-0000", set(range(16))), _measurement("policy-0001", set(range(48)))
    found = figures(before, after, seed=0)
    satisfaction = found["satisfaction"]
    assert (satisfaction["before"], satisfaction["after"]) == (0.25, 0.75)
    assert satisfaction["difference"]["estimate"] == 0.5
    assert satisfaction["difference"]["clusters"] == 64
    assert 0.3 < satisfaction["difference"]["low"] < 0.45
    assert found["greedy"]["difference"]["estimate"] == 0.5
    assert satisfaction["by_kind"]["before"] == {kind: float(KINDS.index(kind) < 4) for kind in KINDS}
    assert found["improved"]
    assert found["conclusions"][2] == "The interval lies above zero: it improved."
    assert found["answers"]["before"]["distinct_share"] < 0.2


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (_measurement("policy-0000", set(range(16))), "no new version was promoted"),
        (_measurement("policy-0001", set(range(15))), "no improvement is shown"),
        (_measurement("policy-0001", set()), "it got worse"),
    ],
)
def test_it_says_so_when_nothing_improved(after: Measurement, says: str) -> None:
    found = figures(_measurement("policy-0000", set(range(16))), after, seed=0)
    assert not found["improved"]
    assert any(says in line for line in found["conclusions"])


def _stream(**changes: Any) -> Stream:
    fields = {
        "completion_id": "chatcmpl-1",
        "pieces": 400,
        "finish_reason": "length",
        "tokens": STREAM_TOKENS,
        "expected_tokens": STREAM_TOKENS,
        "error": None,
    }
    return Stream(**{**fields, **changes})


def test_streams_are_counted_by_what_became_of_them() -> None:
    crossings = [
        Crossing(_stream(), (("policy-0000", 0, 100), ("policy-0001", 100, 400)), recorded=True),
        Crossing(_stream(), (("policy-0000", 0, 400),), recorded=True),
        Crossing(_stream(tokens=399), (("policy-0000", 0, 400),), recorded=True),
        Crossing(_stream(finish_reason="abort"), (), recorded=False),
        Crossing(_stream(error="ReadError: gone", completion_id=None), (), recorded=False),
    ]
    found = summary(crossings)
    assert (found["streams"], found["failed"], found["cut"], found["unrecorded"]) == (5, 1, 2, 2)
    assert found["across_the_swap"] == 1
    assert found["every_token_attributed"]
    assert found["errors"] == ["ReadError: gone"]
    for spans in [
        (("policy-0000", 0, 100), ("policy-0001", 101, 400)),
        (("policy-0000", 0, 399),),
        (("policy-0000", 0, 200), ("policy-0001", 150, 400)),
        (),
    ]:
        assert not summary([Crossing(_stream(), spans, recorded=True)])["every_token_attributed"]


@pytest.mark.parametrize("state", ["done", "failed"])
def test_the_report_holds_what_happened(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = [
        {"stage": "ppo", "step": step, "name": name, "value": step / 10, "at": 0.0}
        for step in range(1, 5)
        for name in ("objective/kl", "objective/scores", "response/length")
    ]
    finished = {
        "id": 7,
        "state": state,
        "version": "policy-0001" if state == "done" else None,
        "error": None if state == "done" else "out of memory",
        "verdict": {"promote": True, "reasons": ["The candidate's win rate is 0.8"]}
        if state == "done"
        else None,
        "metrics": metrics,
    }
    before = _measurement("policy-0000", set(range(16)))
    after = _measurement("policy-0001", set(range(48))) if state == "done" else before
    code = _conclude(
        _Course(3, DemoSizes(), {"round": 600.0}, {"ranking": 160}),
        tmp_path,
        before=before,
        after=after,
        finished=finished,
        receipt={"status": "stored", "rounds": [7]},
        crossings=[Crossing(_stream(), (("policy-0000", 0, 400),), recorded=True)],
    )
    page = (tmp_path / "demo-report.html").read_text()
    stored = json.loads((tmp_path / "demo.json").read_text())
    said = capsys.readouterr().out
    assert code == (0 if state == "done" else 1)
    assert stored["round"]["metrics"] == metrics
    assert stored["first_receipt"]["rounds"] == [7]
    assert "a script, not a person" in page
    for text in ("KL from the reference policy", "The learned reward", "Answers side by side", "no_commas"):
        assert text in page
    if state == "done":
        assert "win rate is 0.8" in page
        assert "it improved" in said
    else:
        assert "out of memory" in page
        assert "out of memory" in said
        assert "no new version was promoted" in said
