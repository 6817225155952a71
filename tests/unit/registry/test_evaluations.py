"""Requests of evaluations with every field checked, and an evaluation's life over a real database."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from registry.audit import AuditLog
from registry.evaluation_request import EvaluationRequest, UnsuitableRequest, resolve
from registry.evaluations import EvaluationConflict, Evaluations, UnknownEvaluation
from registry.registry import Registry

TWO = {"contestants": ["policy-0000", "policy-0001"]}


def test_contestants_and_judges_may_be_texts() -> None:
    request = EvaluationRequest(
        contestants=["policy-0001", "base+few-shot", "https://api.test/v1#big/model#BIG_API_KEY"],
        judges=[
            "checks",
            "reward-model:3",
            "honest=http://127.0.0.1:9/v1#judge",
            "http://h/v1#a",
            "helpful+labels=http://h/v1#a",
        ],
    )
    assert [one.name for one in request.contestants] == [
        "policy-0001",
        "base+few-shot",
        "big/model at api.test",
    ]
    assert request.contestants[2].key_variable == "BIG_API_KEY"
    assert [(one.kind, one.round, one.axis, one.model, one.labels) for one in request.judges] == [
        ("checks", None, "overall", None, False),
        ("reward-model", 3, "overall", None, False),
        ("endpoint", None, "honest", "judge", False),
        ("endpoint", None, "overall", "a", False),
        ("endpoint", None, "helpful", "a", True),
    ]
    assert EvaluationRequest(**request.model_dump(mode="json")) == request


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"contestants": ["policy-0000"]}, "contestants"),
        ({"contestants": ["policy-0000", "policy-0000"]}, ""),
        (
            {"contestants": ["policy-0000", {"version": "a", "url": "http://h/v1", "model": "m"}]},
            "contestants.1",
        ),
        ({"contestants": ["policy-0000", {"url": "http://h/v1"}]}, "contestants.1"),
        ({"contestants": ["policy-0000", "http://h/v1"]}, "contestants.1"),
        ({"contestants": ["policy-0000", {"url": "ftp://h", "model": "m"}]}, "contestants.1.url"),
        ({"contestants": ["policy-0000", "http://me:secret@h/v1#m"]}, "contestants.1.url"),
        # Nothing but a key may leave the environment.
        ({"contestants": ["policy-0000", "http://h/v1#m#INSTRUCTLOOP_SECRET"]}, "contestants.1.key_variable"),
        ({"contestants": ["policy-0000", {"version": "a", "key_variable": "A_API_KEY"}]}, "contestants.1"),
        ({"judges": ["jury"]}, "judges.0"),
        ({"judges": ["checks", "checks"]}, ""),
        ({"judges": ["reward-model:0"]}, "judges.0.round"),
        ({"judges": ["people:0"]}, "judges.0.votes"),
        ({"judges": ["witty=people"]}, "judges.0.axis"),
        ({"judges": ["+labels=http://h/v1#m"]}, "judges.0.axis"),
        ({"judges": [{"kind": "people", "labels": True}]}, "judges.0"),
        ({"judges": [{"kind": "checks", "votes": 2}]}, "judges.0"),
        ({"judges": ["witty=http://h/v1#m"]}, "judges.0.axis"),
        ({"judges": [{"kind": "checks", "round": 1}]}, "judges.0"),
        ({"n": 17}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"prompts": "a\nb"}, "prompts"),
        ({"why": "because"}, "why"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        EvaluationRequest(**TWO | change)
    assert ".".join(map(str, refused.value.errors()[0]["loc"])) == field


def test_what_a_request_names_has_to_be_there(
    registry: Registry, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    for weights in (b"a", b"b"):
        registry.publish(checkpoint(weights), parent=None, round_id=None, kind="test", details={})
    registry.promote("policy-0001", actor="ann", reason="")

    def resolved(**change: Any) -> EvaluationRequest:
        return resolve(EvaluationRequest(**TWO | change), registry, tmp_path, cases=lambda: range(count))

    count = 1

    for change, field in (
        ({"contestants": ["base", "policy-0009"]}, "contestants.1"),
        ({"contestants": ["base", "policy-0000"]}, "contestants"),
        ({"prompts": str(tmp_path / "none.jsonl")}, "prompts"),
        ({"judges": ["checks", "reward-model"]}, "judges.1"),
        ({"judges": ["cases"]}, "judges"),
        ({"prompts": "cases"}, "prompts"),
        ({"prompts": "cases", "judges": ["checks", "cases:3"]}, "judges.1"),
    ):
        with pytest.raises(UnsuitableRequest) as refused:
            resolved(**change)
        assert refused.value.field == field
    assert [one.kind for one in resolved().judges] == ["checks"]
    count = 2
    of_cases = resolved(prompts="cases")
    assert not of_cases.files
    assert [(one.kind, one.round) for one in of_cases.judges] == [("checks", None), ("cases", None)]
    for number in (2, 11):
        judge = tmp_path / "rounds" / f"{number:04d}" / "judge"
        judge.mkdir(parents=True)
        (judge / "head.safetensors").touch()
    found = resolved(contestants=["serving", "base+few-shot"])
    assert [one.name for one in found.contestants] == ["policy-0001", "policy-0000+few-shot"]
    assert [(one.kind, one.round) for one in found.judges] == [("checks", None), ("reward-model", 11)]
    of_cases = resolved(prompts="cases", judges=["cases", "cases:2"])
    assert [(one.kind, one.round) for one in of_cases.judges] == [("cases", 11), ("cases", 2)]
    with pytest.raises(UnsuitableRequest, match="round 3 is not kept; there is 2, 11"):
        resolved(judges=["reward-model:3"])


def test_an_evaluation_from_request_to_end(engine: sa.Engine) -> None:
    evaluations = Evaluations(engine)
    assert evaluations.next() is None
    first, second = (evaluations.request(EvaluationRequest(**TWO, seed=i), "ann") for i in range(2))
    assert (first.state, first.asked.seed, second.asked.seed) == ("requested", 0, 1)
    waiting = evaluations.next()
    assert waiting is not None
    assert waiting.id == first.id
    evaluations.begin(second.id)
    evaluations.progress(second.id, "answers of policy-0000", 32, 400)
    # What was begun comes first: its process was killed.
    left = evaluations.next()
    assert left is not None
    assert (left.id, left.step, left.done, left.total) == (second.id, "answers of policy-0000", 32, 400)
    again = evaluations.begin(second.id)
    assert (again.attempts, again.started_at) == (2, left.started_at)
    evaluations.finish(second.id, {"prompts": 3})
    with pytest.raises(EvaluationConflict, match="done already"):
        evaluations.begin(second.id)
    evaluations.finish(evaluations.begin(first.id).id, error="no prompts")
    assert evaluations.next() is None
    assert [(one.state, one.result, one.error) for one in evaluations.list()] == [
        ("done", {"prompts": 3}, None),
        ("failed", None, "no prompts"),
    ]
    with pytest.raises(UnknownEvaluation, match="no evaluation 7"):
        evaluations.get(7)
    assert [entry.action for entry in AuditLog(engine).entries()] == ["request_evaluation"] * 2


def test_one_that_waits_or_runs_can_be_cancelled_and_taken_up_again(engine: sa.Engine) -> None:
    evaluations = Evaluations(engine)
    waits, runs = (evaluations.request(EvaluationRequest(**TWO, seed=i), "ann").id for i in range(2))
    for _ in range(3):
        evaluations.begin(runs)
    evaluations.progress(runs, "answers of policy-0000", 32, 400)
    assert evaluations.cancel(waits, "ben", "not now").state == "requested"
    assert evaluations.cancel(runs, "ben").state == "running"
    assert (evaluations.next(), evaluations.unfinished()) == (None, [])
    # Whoever carries it out learns of it by either, and can't end it otherwise.
    for note in (
        lambda: evaluations.progress(runs, "answers of policy-0001", 64, 400),
        lambda: evaluations.finish(runs, {"prompts": 3}),
        lambda: evaluations.finish(runs, error="no prompts"),
        lambda: evaluations.begin(runs),
        lambda: evaluations.cancel(runs, "ben"),
    ):
        with pytest.raises(EvaluationConflict, match=f"evaluation {runs} is cancelled already"):
            note()
    cancelled = evaluations.get(runs)
    assert (cancelled.state, cancelled.done, cancelled.result) == ("cancelled", 32, None)
    assert cancelled.ended_at is not None
    again = evaluations.begin(runs, again=True)
    assert (again.state, again.attempts, again.ended_at) == ("running", 1, None)
    evaluations.finish(runs, {"prompts": 3})
    with pytest.raises(EvaluationConflict, match="done already"):
        evaluations.cancel(runs, "ben")
    with pytest.raises(UnknownEvaluation):
        evaluations.cancel(7, "ben")
    found = [entry for entry in AuditLog(engine).entries() if entry.action == "cancel_evaluation"]
    assert [(entry.actor, entry.target, entry.detail) for entry in found] == [
        ("ben", f"evaluation {runs}", ""),
        ("ben", f"evaluation {waits}", "not now"),
    ]
