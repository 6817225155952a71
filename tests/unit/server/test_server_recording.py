"""What the engine yields, in pieces or whole, becomes one record; the recorder loses nothing it need not."""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_bench import MemoryQueue

from feedback.queue import encoded
from feedback.records import SCHEMA, Choice, Completion, WeightSpan
from feedback.spool import Spool
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


def completion(number: int, *, text: str = "x", **more: Any) -> Completion:
    return Completion(
        id=f"cmpl-{number}",
        key_id="k",
        endpoint="/v1/completions",
        created_at=0,
        choices=[Choice(index=0, text=text)],
        **more,
    )


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(f"instructloop_completions_{name}", labels) or 0.0


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool.db", 2**20)


@pytest.fixture
def recorder_for(metrics: ServerMetrics, spool: Spool) -> Callable[..., Recorder]:
    """Makes a recorder, as a server does at its start; those of one test share the spool."""

    def make(queue: MemoryQueue, *, limit: int = 100, batch: int = 7, into: Spool = spool) -> Recorder:
        return Recorder(queue, into, metrics, limit=limit, batch=batch)

    return make


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def ids(numbers: range) -> list[str]:
    return [f"cmpl-{number}" for number in numbers]


async def test_records_arrive_in_order_in_batches(
    metrics: ServerMetrics, recorder_for: Callable[..., Recorder]
) -> None:
    queue = MemoryQueue()
    recorder = recorder_for(queue)
    task = asyncio.create_task(recorder.run())
    await asyncio.sleep(0.05)
    for number in range(50):
        recorder.record(completion(number))
    await until(lambda: len(queue.recorded) == 50)
    task.cancel()
    assert [item.id for item in queue.recorded] == ids(range(50))
    assert value(metrics, "recorded_total") == 50
    assert value(metrics, "waiting") == 0


async def test_an_outage_is_spent_on_disk_and_order_is_kept(
    metrics: ServerMetrics, recorder_for: Callable[..., Recorder], spool: Spool
) -> None:
    queue = MemoryQueue()
    recorder = recorder_for(queue, batch=3)
    task = asyncio.create_task(recorder.run())
    recorder.record(completion(0))
    await until(lambda: len(queue.recorded) == 1)
    queue.away = "Redis is away"
    for number in range(1, 11):
        recorder.record(completion(number))
        await asyncio.sleep(0.005)
    await until(lambda: value(metrics, "spooled") == 10)
    assert value(metrics, "waiting") == 0
    assert recorder.trouble() == "10 completions wait on disk"
    queue.away = None
    for number in range(11, 40):  # while the spool is being replayed
        recorder.record(completion(number))
        await asyncio.sleep(0.002)
    await until(lambda: len(queue.recorded) == 40)
    await until(lambda: recorder.trouble() is None)
    task.cancel()
    assert [item.id for item in queue.recorded] == ids(range(40))
    assert spool.oldest(1) == []
    assert value(metrics, "recorded_total") == 40


async def test_what_a_dead_server_left_is_replayed_before_what_comes(
    recorder_for: Callable[..., Recorder], spool: Spool
) -> None:
    """A server that was killed has no flush; the next one on the same data directory goes on."""
    away = MemoryQueue(away="gone")
    dead = recorder_for(away)
    task = asyncio.create_task(dead.run())
    for number in range(20):
        dead.record(completion(number))
    await until(lambda: spool.waiting() == 20)
    task.cancel()

    queue = MemoryQueue(away="gone")
    heir = recorder_for(queue)
    task = asyncio.create_task(heir.run())
    for number in range(20, 30):
        heir.record(completion(number))
    await until(lambda: spool.waiting() == 30)
    queue.away = None
    await until(lambda: len(queue.recorded) == 30)
    task.cancel()
    assert [item.id for item in queue.recorded] == ids(range(30))


async def test_records_of_another_version_are_sent_as_what_they_are(
    recorder_for: Callable[..., Recorder], spool: Spool, tmp_path: Path
) -> None:
    for number, schema in enumerate("0110"):
        spool.append([encoded(completion(number))])
        with closing(sqlite3.connect(tmp_path / "spool.db", isolation_level=None)) as connection:
            last = "(SELECT max(id) FROM records)"
            connection.execute(f"UPDATE records SET schema = ? WHERE id = {last}", [schema])
    sent: list[tuple[str, list[str]]] = []

    class Noting(MemoryQueue):
        async def record_encoded(self, records: Sequence[bytes], schema: str = SCHEMA) -> None:
            sent.append((schema, [Completion.model_validate_json(data).id for data in records]))

    task = asyncio.create_task(recorder_for(Noting()).run())
    await until(lambda: spool.waiting() == 0)
    task.cancel()
    assert sent == [("0", ["cmpl-0"]), ("1", ["cmpl-1", "cmpl-2"]), ("0", ["cmpl-3"])]


async def test_an_idle_replica_replays_what_another_left(
    recorder_for: Callable[..., Recorder], spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.recorder._LOOK_SECONDS", 0.05)
    queue = MemoryQueue()
    recorder = recorder_for(queue)
    task = asyncio.create_task(recorder.run())
    await asyncio.sleep(0.05)
    spool.append([encoded(completion(number)) for number in range(3)])
    await until(lambda: len(queue.recorded) == 3)
    task.cancel()


async def test_what_the_bound_drops_is_counted_and_told(
    metrics: ServerMetrics, recorder_for: Callable[..., Recorder], tmp_path: Path
) -> None:
    small = Spool(tmp_path / "small.db", 40_000)
    queue = MemoryQueue(away="gone")
    recorder = recorder_for(queue, into=small)
    task = asyncio.create_task(recorder.run())
    for number in range(300):
        recorder.record(completion(number, text="x" * 1000))
        # No faster than the disk takes them: what the buffer in memory drops is not of the spool's bound.
        await until(lambda: value(metrics, "waiting") < 50)
    await until(lambda: value(metrics, "waiting") == 0)
    dropped = value(metrics, "dropped_total", reason="spool_full")
    kept = value(metrics, "spooled")
    assert (dropped + kept, 15 < kept < 40) == (300, True)
    told = f"{kept:.0f} completions wait on disk and {dropped:.0f} completions were dropped"
    assert recorder.trouble() == told
    assert (tmp_path / "small.db").stat().st_size <= 60_000
    queue.away = None
    await until(lambda: len(queue.recorded) == kept)
    # In order; the last ones of them may have come after one that was a little too large.
    numbers = [int(item.id.removeprefix("cmpl-")) for item in queue.recorded]
    assert numbers == sorted(set(numbers))
    await until(lambda: recorder.trouble() == f"{dropped:.0f} completions were dropped")
    task.cancel()


async def test_a_disk_that_fails_leaves_completions_in_memory(
    metrics: ServerMetrics,
    recorder_for: Callable[..., Recorder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.recorder._LONGEST_PAUSE_SECONDS", 0.05)
    queue = MemoryQueue(away="gone")
    recorder = recorder_for(queue, limit=4, into=Spool(tmp_path / "no such directory" / "spool.db", 2**20))
    task = asyncio.create_task(recorder.run())
    for number in range(10):
        recorder.record(completion(number))
    await asyncio.sleep(0.1)
    assert value(metrics, "dropped_total", reason="full") == 6
    assert value(metrics, "waiting") == 4
    queue.away = None
    await until(lambda: len(queue.recorded) == 4)
    task.cancel()
    queue.away = "gone again"
    recorder.record(completion(10))
    await recorder.flush(0.1)
    assert value(metrics, "dropped_total", reason="shutdown") == 1


async def test_a_full_disk_does_not_stop_the_replay(
    recorder_for: Callable[..., Recorder], spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was replayed but can't be deleted is not replayed for ever, and what comes goes past it."""
    spool.append([encoded(completion(number)) for number in range(20)])

    def full(through: int) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(spool, "remove", full)
    queue = MemoryQueue()
    recorder = recorder_for(queue)
    task = asyncio.create_task(recorder.run())
    await until(lambda: len(queue.recorded) == 20)
    recorder.record(completion(20))
    await until(lambda: len(queue.recorded) == 21)
    monkeypatch.undo()
    task.cancel()
    assert [item.id for item in queue.recorded] == ids(range(21))
    assert spool.waiting() >= 20


async def test_flush_sends_the_rest_or_saves_it(
    metrics: ServerMetrics, recorder_for: Callable[..., Recorder], spool: Spool
) -> None:
    queue = MemoryQueue()
    recorder = recorder_for(queue, batch=2)
    task = asyncio.create_task(recorder.run())
    await asyncio.sleep(0.05)
    task.cancel()
    for number in range(5):
        recorder.record(completion(number))
    await recorder.flush(1.0)
    assert len(queue.recorded) == 5
    queue.away = "gone"
    recorder.record(completion(6))
    await recorder.flush(0.1)
    assert value(metrics, "dropped_total", reason="shutdown") == 0
    assert [Completion.model_validate_json(item.data).id for item in spool.oldest(9)] == ["cmpl-6"]


@dataclass
class SlowQueue(MemoryQueue):
    started: asyncio.Event = field(default_factory=asyncio.Event)

    async def record_encoded(self, records: Sequence[bytes], schema: str = SCHEMA) -> None:
        self.started.set()
        await asyncio.sleep(3600)


async def test_a_queue_that_hangs_holds_up_nobody(
    recorder_for: Callable[..., Recorder], spool: Spool
) -> None:
    queue = SlowQueue()
    recorder = recorder_for(queue, batch=2)
    task = asyncio.create_task(recorder.run())
    await asyncio.sleep(0.05)
    recorder.record(completion(0))
    await queue.started.wait()
    loop = asyncio.get_running_loop()
    before = loop.time()
    for number in range(1, 10):
        recorder.record(completion(number))
    assert loop.time() - before < 0.1
    task.cancel()
    await recorder.flush(0.05)
    assert spool.waiting() == 10


async def test_what_no_text_may_hold_harms_nothing(recorder_for: Callable[..., Recorder]) -> None:
    queue = MemoryQueue()
    recorder = recorder_for(queue)
    task = asyncio.create_task(recorder.run())
    recorder.record(completion(0, messages=[{"role": "user", "content": "hi", "name": "half \ud800"}]))
    recorder.record(completion(1))
    await until(lambda: len(queue.recorded) == 2)
    assert queue.recorded[0].messages == [{"role": "user", "content": "hi", "name": "half ?"}]
    task.cancel()
