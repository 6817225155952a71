"""Judges on what a real model says: the served model as a judge, and IFEval's verdicts on its answers."""

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from server_fixture import REPOSITORY, Installation, served

from evaluation import ifeval
from evaluation.endpoint_judge import EndpointJudge
from evaluation.judges import ChatPrompt, Pair

__all__ = ["served"]

DATA = Path(os.environ.get("INSTRUCTLOOP_DATA", REPOSITORY.parent / "shared" / "data"))


def test_a_served_model_judges_in_the_form_that_it_is_given(served: Installation) -> None:
    """Its judgement is poor at this size; that each verdict can be read is the engine's structured output."""
    prompt = ChatPrompt("p", ({"role": "user", "content": "What is the capital of France?"},))
    pairs = [
        Pair(prompt, "The capital of France is Paris.", "Bananas are yellow."),
        Pair(prompt, "I do not know.", "Paris."),
        Pair(prompt, "Paris.", "x" * 20_000),
    ]
    with EndpointJudge(
        f"{served.url}/v1", "policy", axis="helpful", api_key=served.client_key, max_tokens=250
    ) as judge:
        verdicts = judge.compare(pairs)
    assert set(verdicts[:2]) <= {0.0, 0.5, 1.0}
    assert verdicts[2] is None, "more than the model's context"
    assert judge.orders.unread == 1
    assert sum(judge.orders.figures().values()) == 3


def test_ifeval_on_real_answers_is_what_the_harness_says(served: Installation) -> None:
    path = DATA / "ifeval" / "input_data.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent: set INSTRUCTLOOP_DATA to the folder that holds ifeval/")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    prompts = ifeval.read(path)
    chosen = range(0, len(rows), 34)

    def answer(at: int) -> str:
        with served.http(served.client_key) as http:
            asked = {"model": "policy", "messages": list(prompts[at].messages), "max_tokens": 96}
            done = http.post("/v1/chat/completions", json=asked | {"temperature": 0})
        text: str = done.json()["choices"][0]["message"]["content"]
        return text

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(answer, chosen))
    found = [
        ifeval.following(prompts[at].key, prompts[at].checks, text)
        for at, text in zip(chosen, texts, strict=True)
    ]
    from lm_eval.tasks.ifeval import utils

    expected = [utils.process_results(rows[at], [text]) for at, text in zip(chosen, texts, strict=True)]
    assert [list(one.strict) for one in found] == [one["inst_level_strict_acc"] for one in expected]
    assert [list(one.loose) for one in found] == [one["inst_level_loose_acc"] for one in expected]
    figures = ifeval.accuracies(found)
    flat = [value for one in expected for value in one["inst_level_loose_acc"]]
    assert figures.instruction_loose.estimate == pytest.approx(sum(flat) / len(flat))
    prompt_level = [one["prompt_level_strict_acc"] for one in expected]
    assert figures.prompt_strict.estimate == pytest.approx(sum(prompt_level) / len(prompt_level))
