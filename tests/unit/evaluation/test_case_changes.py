"""Cases as tests of versions: what makes a case, when an answer passes, what the gate makes of changes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from unit.training.tiny import tiny_tokenizer

from evaluation.cases import CaseChanges, CaseTest, Score, changes, check_case
from evaluation.gate import Comparison, decide, gather, in_words
from evaluation.sampler import Sample
from evaluation.settings import EvaluationSettings
from feedback.cases import Case, CaseResult
from feedback.new_case import BadCase

SHORT = [{"kind": "max_words", "n": 3}]


def case(id: str = "case-1", checks: Sequence[dict[str, Any]] = (), **changed: Any) -> Case:
    fields: dict[str, Any] = {
        "id": id,
        "title": id,
        "messages": [{"role": "user", "content": "w1 w2"}],
        "checks": list(checks),
        "good": None,
        "bad": None,
        "trainings": 0,
        "added_by": "ann",
        "added_at": 1.0,
    }
    return Case(**fields | changed)


@pytest.mark.parametrize(
    ("checks", "good", "bad", "field", "says"),
    [
        ([], None, None, "checks", "give checks"),
        ([], "fine", None, "bad", "takes a bad answer"),
        ([], None, "bad", "checks", "give checks"),
        ([], "same", "same", "bad", "the same"),
        ([{"kind": "max_words"}], None, None, "checks.0.n", "needs it"),
        ([*SHORT, {"kind": "nonsense"}], None, None, "checks.1.kind", "is none of"),
        (SHORT, "one two three four", None, "good", "does not meet checks.0 (max_words)"),
        (SHORT, None, "one two", "checks", "don't catch it"),
    ],
)
def test_what_makes_no_case_names_the_field(
    checks: list[dict[str, Any]], good: str | None, bad: str | None, field: str, says: str
) -> None:
    with pytest.raises(BadCase, match=rf"^{field}: ") as problem:
        check_case(checks, good, bad)
    assert problem.value.field == field
    assert says in problem.value.reason


def test_checks_alone_or_two_answers_make_a_case() -> None:
    check_case(SHORT, None, None)
    check_case(SHORT, "one two", "one two three four")
    check_case([], "good", "bad")


class _Sampler:
    """Answers every prompt with the text that stands in the model's directory."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], dict[str, Any]]] = []

    def load(self, model_dir: Path) -> None:
        self._text = (model_dir / "says").read_text()

    def sample(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[Sample]]:
        self.asked.append(([list(prompt) for prompt in prompts], options))
        ids = tiny_tokenizer()(self._text, add_special_tokens=False).input_ids
        return [[Sample(ids, [0.0] * len(ids), self._text, "stop")] for _ in prompts]

    def close(self) -> None:
        pass


def test_answers_are_greedy_to_the_prompt_as_the_policy_sees_it(tmp_path: Path) -> None:
    (tmp_path / "says").write_text("w3 w4")
    tokenizer, sampler = tiny_tokenizer(), _Sampler()
    whole = tokenizer.apply_chat_template(case().messages, add_generation_prompt=True, return_dict=False)
    (answer,) = CaseTest(tokenizer, len(whole), 7).answers(sampler, tmp_path, [case()])
    CaseTest(tokenizer, 2, 7).answers(sampler, tmp_path, [case()])
    assert answer.text == "w3 w4"
    (first, options), (second, _) = sampler.asked
    assert (first, second) == ([whole], [whole[-2:]])
    assert options == {"n": 1, "max_tokens": 7, "temperature": 0.0, "seed": 0}


def test_checks_decide_and_a_judge_is_asked_only_where_there_are_none() -> None:
    test = CaseTest(tiny_tokenizer(), 100, 100)
    asked: list[Any] = []

    def judge() -> Score:
        def score(items: Any) -> list[list[float]]:
            asked.extend(items)
            # More tokens are better.
            return [[float(len(response)) for response in responses] for _, responses in items]

        return score

    def sample(text: str) -> Sample:
        ids = tiny_tokenizer()(text, add_special_tokens=False).input_ids
        return Sample(ids, [0.0] * len(ids), text, "stop")

    def never() -> Score:
        raise AssertionError("the judge was asked")

    checked = [case("a", SHORT), case("b", SHORT, good="w1", bad="w1 w2 w3 w4")]
    assert test.passed(checked, [sample("w1 w2"), sample("w1 w2 w3 w4 w5")], never) == [True, False]
    judged = case("c", good="w1 w2 w3", bad="w4 w5")
    answers = [sample("w1"), sample("w1 w2 w3 w4"), sample("w6"), sample(" ")]
    cases = [case("a", SHORT), judged, judged, judged]
    assert test.passed(cases, answers, judge) == [True, True, False, False]
    assert len(asked) == 3
    prompt, (own, bad) = asked[0]
    assert own == answers[1].token_ids
    # The bad answer ends as a written text does.
    assert bad == [*tiny_tokenizer()("w4 w5").input_ids, tiny_tokenizer().eos_token_id]
    assert prompt == test._prompt(judged)


def result(id: str, before: bool, after: bool) -> CaseResult:
    return CaseResult(id, "policy-0002", "policy-0001", "old", before, "new", after)


def test_results_are_told_by_what_changed() -> None:
    found = changes(
        [
            result("a", False, True),
            result("b", True, False),
            result("c", False, False),
            result("d", True, True),
            result("e", False, True),
        ]
    )
    assert found == CaseChanges(["a", "e"], ["b"], ["c"], ["d"])


@pytest.mark.parametrize(("broken", "may_break", "promoted"), [(0, 0, True), (1, 0, False), (1, 1, True)])
def test_a_candidate_may_break_as_many_cases_as_are_allowed(
    broken: int, may_break: int, promoted: bool
) -> None:
    settings = EvaluationSettings(cases_may_break=may_break)
    won = [Comparison(str(n), 1.0) for n in range(20)]
    cases = CaseChanges(["case-f"], [f"case-{n}" for n in range(broken)], ["case-x"], [])
    verdict = decide(replace(gather(won, 1.0, settings), cases=cases), settings)
    assert verdict.promote is promoted
    (condition,) = [one for one in verdict.conditions if one.name == "cases"]
    assert "fixes 1 (case-f)" in condition.sentence
    assert ("case-0" in condition.sentence) == bool(broken)
    assert condition.figures["cases"]["broke"] == cases.broke
    assert any(line.startswith("cases (") for line in in_words(verdict.as_dict()))


def test_without_cases_the_gate_asks_nothing_of_them() -> None:
    settings = EvaluationSettings()
    verdict = decide(gather([Comparison(str(n), 1.0) for n in range(20)], 1.0, settings), settings)
    assert verdict.promote
    assert [one.name for one in verdict.conditions] == ["decided prompts", "win rate", "KL"]
