"""A language model as the judge, against a scripted OpenAI-compatible server over real HTTP."""

import json
import re
import time
from typing import Any

import pytest
from unit.evaluation.scripted_endpoint import Endpoint, Reply, said

from evaluation.endpoint import EndpointProblem
from evaluation.endpoint_judge import (
    AXES,
    EndpointJudge,
    Letter,
    Orders,
    combined,
    read_verdict,
)
from evaluation.judges import ChatPrompt, Pair
from evaluation.labels import LABELS


def answers_of(body: dict[str, Any]) -> tuple[str, str]:
    """The two answers as the judging model is shown them, A and B."""
    shown = body["messages"][-1]["content"]
    first, second = (re.search(rf"<answer {x}>\n(.*?)\n</answer {x}>", shown, re.DOTALL) for x in "AB")
    assert first
    assert second
    return first[1], second[1]


def prefers_good(body: dict[str, Any]) -> Reply:
    first, second = ("good" in text for text in answers_of(body))
    verdict = "tie" if first == second else "A" if first else "B"
    return said(json.dumps({"explanation": "one is good", "verdict": verdict}))


def pair(first: str, second: str) -> Pair:
    return Pair(ChatPrompt("p", ({"role": "user", "content": "Name a frog."},)), first, second)


PAIRS = [pair("good x", "bad x"), pair("bad y", "good y"), pair("good z", "good zz")]


def test_the_better_answer_wins_wherever_it_stands() -> None:
    endpoint = Endpoint(prefers_good)
    with (
        endpoint.running() as url,
        EndpointJudge(url, "judge-1", axis="honest", api_key="secret") as judge,
    ):
        assert judge.compare(PAIRS) == [1.0, 0.0, 0.5]
        assert judge.orders == Orders(agreed=3)
        assert judge.compare([]) == []
    assert (judge.name, judge.axis) == ("judge-1 on honest", "honest")
    shown = sorted(answers_of(body) for body in endpoint.asked)
    assert shown == sorted([(p.first, p.second) for p in PAIRS] + [(p.second, p.first) for p in PAIRS])
    for body, headers in zip(endpoint.asked, endpoint.headers, strict=True):
        assert (body["path"], body["model"], body["temperature"]) == ("/v1/chat/completions", "judge-1", 0)
        assert headers["authorization"] == "Bearer secret"
        assert body["response_format"]["json_schema"]["schema"]["required"] == ["explanation", "verdict"]
        assert AXES["honest"] in body["messages"][-1]["content"]
        assert "USER: Name a frog." in body["messages"][-1]["content"]


@pytest.mark.parametrize(("letter", "field"), [("A", "first_twice"), ("B", "second_twice")])
def test_a_judge_that_prefers_a_place_decides_nothing_and_is_seen(letter: str, field: str) -> None:
    with (
        Endpoint(lambda _: said(f"I like it. [[{letter}]]")).running() as url,
        EndpointJudge(url, "m") as judge,
    ):
        assert judge.compare(PAIRS) == [0.5] * 3
        judge.compare(PAIRS[:1])
        assert judge.orders == Orders(**{field: 4})


def test_a_verdict_that_is_not_there_in_one_order_is_none() -> None:
    def silent_on_second(body: dict[str, Any]) -> Reply:
        return said("I can't tell.") if answers_of(body)[1].startswith("good") else prefers_good(body)

    with Endpoint(silent_on_second).running() as url, EndpointJudge(url, "m") as judge:
        assert judge.compare([PAIRS[0], pair("bad", "bad")]) == [None, 0.5]
        assert judge.orders == Orders(agreed=1, unread=1)


def test_an_endpoint_without_schemas_is_asked_without() -> None:
    def refuses_schema(body: dict[str, Any]) -> Reply:
        return (400, {}, "unknown field response_format") if "response_format" in body else prefers_good(body)

    endpoint = Endpoint(refuses_schema)
    with endpoint.running() as url, EndpointJudge(url, "m", concurrency=1) as judge:
        assert judge.compare(PAIRS) == [1.0, 0.0, 0.5]
    assert ["response_format" in body for body in endpoint.asked] == [True] + [False] * 6


def finds_labels(body: dict[str, Any]) -> Reply:
    """A frog in an answer makes it one that was made up; one that is bad gives no labels that can be read."""
    (answer,) = re.findall(r"<answer>\n(.*?)\n</answer>", body["messages"][-1]["content"], re.DOTALL)
    if "bad" in answer:
        return said("I would rather not.")
    return said(json.dumps({"explanation": "x", "labels": ["hallucination"] if "frog" in answer else []}))


def test_each_answer_is_labelled_in_a_request_of_its_own() -> None:
    endpoint = Endpoint(finds_labels)
    prompt = ChatPrompt("p", ({"role": "user", "content": "Name a toad."},))
    with endpoint.running() as url, EndpointJudge(url, "m", concurrency=1) as judge:
        found = judge.labels([(prompt, "a frog"), (prompt, "a toad"), (prompt, "bad")])
    assert found == [["hallucination"], [], None]
    assert len(endpoint.asked) == 3
    for body in endpoint.asked:
        schema = body["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["labels"]["items"]["enum"] == list(LABELS)
        assert "USER: Name a toad." in body["messages"][-1]["content"]
        assert all(f"{label}: " in body["messages"][-1]["content"] for label in LABELS)


def test_labels_are_asked_for_without_a_schema_too_and_one_that_is_too_long_has_none() -> None:
    def plain_and_short(body: dict[str, Any]) -> Reply:
        refused = "response_format" in body or "x" * 99 in str(body["messages"])
        return (400, {}, "no") if refused else finds_labels(body)

    prompt = ChatPrompt("p", ({"role": "user", "content": "Name a toad."},))
    with Endpoint(plain_and_short).running() as url, EndpointJudge(url, "m", concurrency=1) as judge:
        assert judge.labels([(prompt, "a frog"), (prompt, "x" * 99)]) == [["hallucination"], None]
        with pytest.raises(EndpointProblem, match="400: no"):
            judge.labels([(prompt, "x" * 99)])


def test_a_pair_that_is_too_long_has_no_verdict_and_the_others_have() -> None:
    def short_context(body: dict[str, Any]) -> Reply:
        return (400, {}, "too long") if "x" * 99 in str(body["messages"]) else prefers_good(body)

    endpoint = Endpoint(short_context)
    with endpoint.running() as url, EndpointJudge(url, "m", concurrency=1) as judge:
        assert judge.compare([pair("good", "x" * 99), PAIRS[0]]) == [None, 1.0]
        assert "response_format" in endpoint.asked[-1], "it was not the schema"
        with pytest.raises(EndpointProblem, match="400: too long"):
            judge.compare([pair("good", "x" * 99)])


def test_what_passes_is_tried_again_as_the_endpoint_asks() -> None:
    refusals = iter([(429, {"retry-after": "7"}, ""), (503, {}, ""), (500, {}, "")])
    slept: list[float] = []
    endpoint = Endpoint(lambda body: next(refusals, None) or prefers_good(body))
    with endpoint.running() as url, EndpointJudge(url, "m", concurrency=1, sleep=slept.append) as judge:
        assert judge.compare(PAIRS) == [1.0, 0.0, 0.5]
    assert slept[0] == 7
    assert 1 <= slept[1] <= 2 < slept[2] <= 4
    assert len(endpoint.asked) == 6 + 3


@pytest.mark.parametrize(
    ("reply", "message", "requests"),
    [
        ((401, {}, "no such key"), "401: no such key", 1),
        ((503, {}, "overloaded"), "in 3 attempts: 503: overloaded", 3),
    ],
)
def test_an_endpoint_that_gives_no_verdicts_is_an_error_that_says_why(
    reply: Reply, message: str, requests: int
) -> None:
    endpoint = Endpoint(lambda _: reply)
    with (
        endpoint.running() as url,
        EndpointJudge(url, "m", concurrency=1, attempts=3, sleep=lambda _: None) as judge,
        pytest.raises(EndpointProblem, match=message),
    ):
        judge.compare(PAIRS[:1])
    assert len(endpoint.asked) >= requests


def test_no_endpoint_at_all_is_an_error() -> None:
    with Endpoint(prefers_good).running() as url:
        pass
    with (
        EndpointJudge(url, "m", attempts=2, sleep=lambda _: None) as judge,
        pytest.raises(EndpointProblem, match="in 2 attempts"),
    ):
        judge.compare(PAIRS)


def test_no_more_requests_run_at_once_than_allowed() -> None:
    def slowly(body: dict[str, Any]) -> Reply:
        time.sleep(0.03)
        return prefers_good(body)

    endpoint = Endpoint(slowly)
    with endpoint.running() as url, EndpointJudge(url, "m", concurrency=3) as judge:
        assert judge.compare(PAIRS * 6) == [1.0, 0.0, 0.5] * 6
    assert 2 <= endpoint.most_at_once <= 3


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"explanation": "B is worse", "verdict": "A"}', "A"),
        ('```json\n{\n  "explanation": "x",\n  "verdict": "tie"\n}\n```', "tie"),
        ('{"verdict":"Answer B"}', "B"),
        ('{"explanation": "cut off here', None),
        ("Both have merits, but [[B]]", "B"),
        ("First [[A]], but on reflection [[B]]", "B"),
        ("[[C]]", "tie"),
        ("**Verdict:** A", "A"),
        ("My verdict is: **tie**.", "tie"),
        ("The better answer is B.", "B"),
        ("The better answer is a matter of taste.", None),
        ("Answer A's facts are wrong and so are the others", None),
        ("Winner: Assistant A", "A"),
        (" b ", "B"),
        ("Answer A", "A"),
        ("Tie.", "tie"),
        ("<think>[[A]]? No.</think>[[B]]", "B"),
        ("<think>[[A]]? No.", None),
        ("Answer B is wrong.", None),
        ("Answer A is better than Answer B.", "A"),
        ("Answer A is better written, but it is wrong.", None),
        ("Neither is good; answer A tries. Verdict: tie", "tie"),
        ("", None),
        ("A frog is green.", None),
        ("I can't say. Both are good.", None),
    ],
)
def test_verdicts_are_read_in_the_forms_that_models_use(text: str, verdict: Letter | None) -> None:
    assert read_verdict(text) == verdict


def test_two_orders_make_one_verdict() -> None:
    table: dict[tuple[Letter | None, Letter | None], float | None] = {
        ("A", "B"): 1.0,
        ("B", "A"): 0.0,
        ("A", "A"): 0.5,
        ("B", "B"): 0.5,
        ("tie", "tie"): 0.5,
        ("A", "tie"): 0.5,
        ("tie", "A"): 0.5,
        (None, "A"): None,
        ("B", None): None,
    }
    assert {both: combined(*both) for both in table} == table


def test_an_axis_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="axis"):
        EndpointJudge("http://127.0.0.1:1/v1", "m", axis="funny")
