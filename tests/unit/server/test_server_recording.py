"""What the engine yields, in pieces or whole, becomes one record; the recorder loses nothing it need not."""

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_bench import MemoryQueue

from feedback.records import Choice, Completion, WeightSpan
from server.context import Generation
from server.metrics import ServerMetrics
from server.recorder import Recorder
from server.recording import Recording, sampled_logprobs

GENERATION = Generation("cmpl-1", "/v1/completions", "key", "user", None, ("first", "second"))


@dataclass
class Piece:
    index: int
    text: str
    token_ids: list[int]
    logprobs: Any
    finish_reason: str | None = None
    weight_versions: Any = None


def at(tokens: list[int]) -> list[dict[int, Any]]:
    """vLLM's form: each position maps the sampled token (here with logprob -token) and others."""
    return [
        {99: SimpleNamespace(logprob=0.0), token: SimpleNamespace(logprob=-float(token))} for token in tokens
    ]


def recording(*, pieces: bool, part: int = 0, n: int = 1) -> Recording:
    return Recording(
        GENERATION, part, sampling={"n": n, "temperature": 0.5}, pieces=pieces, version="policy-0001"
    )


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 50), max_size=4)), max_size=30))
def test_pieces_of_interleaved_choices_add_up(stream: list[tuple[int, list[int]]]) -> None:
    found = recording(pieces=True, n=3)
    expected: dict[int, list[int]] = {}
    for index, tokens in stream:
        found.add([7, 8], [Piece(index, "".join(f"<{t}>" for t in tokens), tokens, at(tokens))])
        expected.setdefault(index, []).extend(tokens)
    choices = {choice.index: choice for choice in found.completion("abort").choices}
    assert {index: choice.token_ids for index, choice in choices.items()} == expected
    for index, tokens in expected.items():
        assert choices[index].text == "".join(f"<{t}>" for t in tokens)
        assert choices[index].logprobs == [-float(t) for t in tokens]
        assert choices[index].finish_reason == "abort"


def test_whole_outputs_replace_what_came_before() -> None:
    found = recording(pieces=False)
    found.add([7], [Piece(0, "a", [1], at([1]))])
    spans = [SimpleNamespace(version="v1", start=0, end=1), SimpleNamespace(version="v2", start=1, end=2)]
    found.add([7], [Piece(0, "ab", [1, 2], at([1, 2]), "stop", spans)])
    (choice,) = found.completion("error").choices
    assert choice == Choice(
        index=0,
        text="ab",
        token_ids=[1, 2],
        logprobs=[-1.0, -2.0],
        finish_reason="stop",
        weight_spans=[WeightSpan(version="v1", start=0, end=1), WeightSpan(version="v2", start=1, end=2)],
    )


def test_the_record_of_a_part_carries_its_prompt_and_counts_choices_over_the_request() -> None:
    found = recording(pieces=False, part=1, n=2)
    found.add([7, 8], [Piece(0, "a", [1], at([1]), "stop"), Piece(1, "b", [2], at([2]), "length")])
    record = found.completion("error")
    assert (record.id, record.part, record.parts, record.prompt) == ("cmpl-1", 1, 2, "second")
    assert [choice.index for choice in record.choices] == [2, 3]
    assert (record.key_id, record.user, record.prompt_token_ids) == ("key", "user", [7, 8])
    assert record.sampling == {"n": 2, "temperature": 0.5}
    assert record.latency_seconds >= 0
    assert Completion.model_validate_json(record.model_dump_json()) == record


def test_choices_without_a_label_come_from_the_version_that_served() -> None:
    found = recording(pieces=True)
    found.add([7], [Piece(0, "a", [1, 2, 3], at([1, 2, 3]))])
    (choice,) = found.completion("abort").choices
    assert choice.weight_spans == [WeightSpan(version="policy-0001", start=0, end=3)]


def test_holes_of_an_aborted_request_are_passed_over() -> None:
    found = recording(pieces=False, n=2)
    assert found.empty
    found.add([7], [None, Piece(1, "b", [2], at([2]), "abort")])  # type: ignore[list-item]
    assert not found.empty
    assert [choice.index for choice in found.completion("abort").choices] == [1]


def test_flat_logprobs_give_the_sampled_token_of_each_position() -> None:
    flat = SimpleNamespace(start_indices=[0, 2], logprobs=[-1.0, -9.0, -2.0])
    assert sampled_logprobs([5, 6], flat) == [-1.0, -2.0]
    assert sampled_logprobs([5, 6], at([5, 6])) == [-5.0, -6.0]
    assert sampled_logprobs([5], None) == []
    with pytest.raises(ValueError, match="zip"):
        sampled_logprobs([5, 6], at([5]))


def completion(number: int) -> Completion:
    return Completion(
        id=f"cmpl-{number}",
        key_id="k",
        endpoint="/v1/completions",
        created_at=0,
        choices=[Choice(index=0, text="x")],
    )


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"instructloop_completions_{name}", labels) or 0.0


async def test_records_arrive_in_order_in_batches(metrics: ServerMetrics) -> None:
    queue = MemoryQueue()
    recorder = Recorder(queue, metrics, limit=100, batch=7)
    task = asyncio.create_task(recorder.run())
    for number in range(50):
        recorder.record(completion(number))
    while len(queue.recorded) < 50:
        await asyncio.sleep(0.001)
    task.cancel()
    assert [item.id for item in queue.recorded] == [f"cmpl-{number}" for number in range(50)]
    assert value(metrics, "recorded_total") == 50
    assert value(metrics, "waiting") == 0


async def test_an_outage_is_survived_without_loss_or_doubles(metrics: ServerMetrics) -> None:
    queue = MemoryQueue(away="Redis is away")
    recorder = Recorder(queue, metrics, limit=100, batch=3)
    task = asyncio.create_task(recorder.run())
    for number in range(10):
        recorder.record(completion(number))
    await asyncio.sleep(0.05)
    assert value(metrics, "waiting") == 10
    queue.away = None
    while len(queue.recorded) < 10:
        await asyncio.sleep(0.01)
    task.cancel()
    assert [item.id for item in queue.recorded] == [f"cmpl-{number}" for number in range(10)]
    assert value(metrics, "dropped_total", reason="full") == 0


async def test_a_full_buffer_drops_what_comes_and_counts_it(metrics: ServerMetrics) -> None:
    recorder = Recorder(MemoryQueue(away="gone"), metrics, limit=4, batch=2)
    for number in range(10):
        recorder.record(completion(number))
    assert value(metrics, "dropped_total", reason="full") == 6
    assert value(metrics, "waiting") == 4


async def test_flush_sends_the_rest_or_says_what_was_lost(metrics: ServerMetrics) -> None:
    queue = MemoryQueue()
    recorder = Recorder(queue, metrics, limit=10, batch=2)
    for number in range(5):
        recorder.record(completion(number))
    await recorder.flush(1.0)
    assert len(queue.recorded) == 5
    queue.away = "gone"
    recorder.record(completion(6))
    await recorder.flush(0.1)
    assert value(metrics, "dropped_total", reason="shutdown") == 1


@dataclass
class SlowQueue(MemoryQueue):
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def record(self, completions: Any) -> None:
        self.started.set()
        await asyncio.sleep(3600)


async def test_a_queue_that_hangs_holds_up_nobody(metrics: ServerMetrics) -> None:
    queue = SlowQueue()
    recorder = Recorder(queue, metrics, limit=10, batch=2)
    task = asyncio.create_task(recorder.run())
    recorder.record(completion(0))
    await queue.started.wait()
    loop = asyncio.get_running_loop()
    before = loop.time()
    for number in range(1, 10):
        recorder.record(completion(number))
    assert loop.time() - before < 0.1
    task.cancel()
    await recorder.flush(0.05)
    assert value(metrics, "dropped_total", reason="shutdown") == 10
