"""What a contestant is asked: the version's template, examples before it, the engine's bound on both."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from unit.training.tiny import tiny_model, tiny_tokenizer

from evaluation.contestants import (
    Answer,
    EndpointContestant,
    Sampling,
    SharedEngine,
    VersionContestant,
    with_examples,
)
from evaluation.endpoint import Endpoint
from evaluation.judges import ChatPrompt
from evaluation.sampler import Sample

SYSTEM = {"role": "system", "content": "w9"}
EXAMPLES = tuple(
    ({"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i} w{i}"}) for i in (1, 2)
)


class Engine:
    """Says which weights answer, and keeps what it is asked."""

    def __init__(self) -> None:
        self.weights = ""
        self.asked: list[list[int]] = []

    def load(self, model_dir: Path) -> None:
        self.weights = model_dir.name

    def sample(self, prompts: Sequence[Sequence[int]], *, n: int, **_: Any) -> list[list[Sample]]:
        self.asked = [list(prompt) for prompt in prompts]
        return [[Sample([1, 2], [0.0, 0.0], self.weights, "stop")] * n for _ in prompts]

    def close(self) -> None:
        self.weights = "closed"


def chat(*contents: str) -> ChatPrompt:
    return ChatPrompt(contents[0], tuple({"role": "user", "content": content} for content in contents))


def test_versions_share_one_engine_and_each_answers_with_its_own_weights(tmp_path: Path) -> None:
    engine, started = Engine(), []

    def start(model_dir: Path) -> Engine:
        started.append(model_dir.name)
        return engine

    shared = SharedEngine(start)
    one, two = (
        VersionContestant(name, tiny_model(tmp_path / name), shared, Sampling(2, 8, 1.0), max_model_len=64)
        for name in ("a", "b")
    )
    assert one.answer([chat("w1")], 0) == [[Answer("a", 2, "stop")] * 2]
    assert two.answer([chat("w1")], 0) == [[Answer("b", 2, "stop")] * 2]
    assert one.answer([chat("w1"), chat("w2")], 0)[1][0].text == "a"
    assert started == ["a"]
    shared.close()
    assert engine.weights == "closed"


def test_examples_stand_behind_the_system_message_and_give_way_to_the_prompt(tmp_path: Path) -> None:
    prompt = ChatPrompt("k", (SYSTEM, {"role": "user", "content": "w3"}))
    asked, said = ([turn["content"] for pair in EXAMPLES for turn in pair], ["w9", "w3"])
    assert [one["content"] for one in with_examples(prompt, EXAMPLES)] == [said[0], *asked, said[1]]
    engine, model, tokenizer = Engine(), tiny_model(tmp_path / "m"), tiny_tokenizer()

    def tokens(examples: Sequence[Any]) -> list[int]:
        messages = with_examples(prompt, examples)
        ids: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return ids

    for room, expected in (
        (len(tokens(EXAMPLES)), tokens(EXAMPLES)),
        (len(tokens(EXAMPLES)) - 1, tokens(EXAMPLES[1:])),
        (len(tokens(())), tokens(())),
        (4, tokens(())[-4:]),
    ):
        contestant = VersionContestant(
            "few",
            model,
            SharedEngine(lambda _: engine),
            Sampling(1, 5, 1.0),
            max_model_len=room + 5,
            examples=EXAMPLES,
        )
        contestant.answer([prompt], 0)
        assert engine.asked == [expected]
    with pytest.raises(ValueError, match="max_tokens: 5 leaves no room"):
        VersionContestant("x", model, SharedEngine(lambda _: engine), Sampling(1, 5, 1.0), max_model_len=5)


def test_an_endpoint_is_asked_for_each_answer_with_a_seed_of_its_own() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        choice = {
            "message": {"content": f"{body['messages'][-1]['content']} {body['seed']}"},
            "finish_reason": "length" if body["seed"] == 41 else "stop",
        }
        usage = {"completion_tokens": body["max_tokens"]}
        return httpx.Response(200, json={"choices": [choice], "usage": usage})

    endpoint = Endpoint("http://h/v1", "m", transport=httpx.MockTransport(handle))
    contestant = EndpointContestant("m at h", endpoint, Sampling(2, 9, 0.5))
    assert contestant.answer([chat("a"), chat("b", "c")], 40) == [
        [Answer("a 40", 9, "stop"), Answer("a 41", 9, "length")],
        [Answer("c 42", 9, "stop"), Answer("c 43", 9, "stop")],
    ]
