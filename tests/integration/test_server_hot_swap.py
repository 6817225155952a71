"""Weights change under running streams: none is cut, each token has its version, and what serves is proven.

The tests run in order: each goes on from the version that the one before left in service.
"""

import asyncio
import json
import logging
import re
import signal
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from safetensors.torch import load_file, save_file
from server_fixture import Installation, perturbed, served, wait_for_record

__all__ = ["served"]

logger = logging.getLogger(__name__)

STREAMS = 16
TOKENS = 400
# The last fills a block of the prefix cache, so its answer shows of which weights what is kept there is.
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at " + "no, at " * 50,
]


def greedy(served: Installation) -> list[str]:
    """One greedy answer after the other, so that no batching changes a rounding."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.client_key) as client:
        answers = [
            client.completions.create(model="policy", prompt=prompt, max_tokens=32, temperature=0)
            for prompt in PROMPTS
        ]
    return [answer.choices[0].text for answer in answers]


def operate(served: Installation, path: str) -> dict[str, Any]:
    with served.http(served.operator_key) as http:
        response = http.post(path)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def engine_sums(served: Installation, name: str) -> dict[str, str]:
    metrics = served.registry.version(name).manifest.metrics
    return {key: value for key, value in metrics.items() if key.startswith("engine_sha256")}


@pytest.fixture(scope="module")
def second(served: Installation, tmp_path_factory: pytest.TempPathFactory) -> str:
    base = served.registry.version("policy-0000").path
    return served.publish(perturbed(base, tmp_path_factory.mktemp("second"), scale=0.02, seed=1))


@pytest.fixture(scope="module")
def answers_of_base(served: Installation) -> list[str]:
    """What the server answered when it had been started cold on policy-0000."""
    desired = served.registry.desired()
    assert desired is not None
    assert desired.name == "policy-0000"
    return greedy(served)


async def stream(
    client: openai.AsyncOpenAI, number: int, begun: asyncio.Barrier
) -> tuple[str, str, int, str | None]:
    """One long answer; returns its id, text, count of tokens and finish reason."""
    text, count, reason = "", 0, None
    chunks = await client.completions.create(
        model="policy",
        prompt=f"Story number {number}:",
        max_tokens=TOKENS,
        temperature=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    seen = 0
    async for chunk in chunks:
        seen += 1
        if seen == 3:
            await begun.wait()
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
        if chunk.usage:
            count = chunk.usage.completion_tokens
    return chunk.id, text, count, reason


async def test_sixteen_streams_survive_a_swap(
    served: Installation, second: str, answers_of_base: list[str]
) -> None:
    begun = asyncio.Barrier(STREAMS + 1)
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key=served.client_key, max_retries=0
    ) as client:
        running = [asyncio.create_task(stream(client, number, begun)) for number in range(STREAMS)]
        await asyncio.wait_for(begun.wait(), timeout=60)
        moved = await asyncio.to_thread(operate, served, f"/v1/versions/{second}/promote?wait=true")
        assert [replica["actual"] for replica in moved["replicas"]] == [second]
        results = await asyncio.gather(*running)
    seconds = moved["replicas"][0]["last_swap_seconds"]
    logger.info("generation stood still for %.2f s", seconds)
    assert 0 < seconds < 30
    for id_, text, count, reason in results:
        assert (count, reason) == (TOKENS, "length")
        (record,) = wait_for_record(served, id_)
        (choice,) = record.choices
        assert choice.text == text
        assert len(choice.token_ids) == len(choice.logprobs) == TOKENS
        before, after = choice.weight_spans
        assert (before.version, after.version) == ("policy-0000", second)
        assert 0 == before.start < before.end == after.start < after.end == TOKENS


def test_after_a_swap_the_server_is_what_a_cold_start_gives(
    served: Installation, second: str, answers_of_base: list[str]
) -> None:
    swapped, sums = greedy(served), engine_sums(served, second)
    assert swapped != answers_of_base
    assert sums
    children = psutil.Process(served.processes["serve"].pid).children(recursive=True)
    assert len(children) >= 2
    served.stop("serve", signal.SIGKILL)
    # A killed server takes its engine along, with all the memory that it holds.
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert alive == []
    served.start_part("serve")
    served.wait_until_ready()
    # All are proven; how many there are depends on how vLLM packs layers on this processor.
    assert re.search(rf"{second}: (\d+) of \1 tensors", served.log("serve"))
    assert greedy(served) == swapped
    # A start refuses to serve weights whose sums are not those known; here they are the swap's.
    assert engine_sums(served, second) == sums


def test_a_rollback_gives_the_answers_of_before(served: Installation, answers_of_base: list[str]) -> None:
    moved = operate(served, "/v1/rollback?wait=true")
    assert moved["version"] == "policy-0000"
    assert greedy(served) == answers_of_base


def test_a_torn_version_is_refused_and_the_old_one_serves(
    served: Installation, answers_of_base: list[str], tmp_path: Path
) -> None:
    base = served.registry.version("policy-0000").path
    name = served.publish(perturbed(base, tmp_path / "torn", scale=0.02, seed=2))
    file = served.registry.version(name).path / "model.safetensors"
    served.registry.promote(name, actor="test", reason="torn right after its promotion")
    with file.open("r+b") as weights:
        weights.seek(-1000, 2)
        weights.write(b"\xff" * 500)
    refused(served, name, "model.safetensors")
    assert greedy(served) == answers_of_base
    operate(served, "/v1/rollback?wait=true")


def test_weights_that_are_not_numbers_are_refused(
    served: Installation, answers_of_base: list[str], tmp_path: Path
) -> None:
    source = perturbed(served.registry.version("policy-0000").path, tmp_path / "nan", scale=0, seed=0)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.7.mlp.up_proj.weight"][5, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    name = served.publish(source)
    served.registry.promote(name, actor="test", reason="")
    refused(served, name, "model.layers.7.mlp.up_proj.weight")
    assert greedy(served) == answers_of_base
    operate(served, "/v1/rollback?wait=true")


def test_a_checkpoint_that_lacks_a_tensor_leaves_no_mixture_behind(
    served: Installation, answers_of_base: list[str], tmp_path: Path
) -> None:
    source = perturbed(served.registry.version("policy-0000").path, tmp_path / "half", scale=0.02, seed=3)
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.20.self_attn.o_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    name = served.publish(source)
    served.registry.promote(name, actor="test", reason="")
    refused(served, name, "model.layers.20.self_attn.o_proj")
    assert greedy(served) == answers_of_base
    operate(served, "/v1/rollback?wait=true")


@pytest.mark.parametrize(
    ("damage", "because"),
    [
        ("truncated", "model.safetensors can't be read"),
        ("architecture", "num_attention_heads is 3"),
        ("shape", "model.norm.weight has the shape"),
    ],
)
def test_what_does_not_fit_never_stops_generation(
    served: Installation, answers_of_base: list[str], tmp_path: Path, damage: str, because: str
) -> None:
    source = perturbed(served.registry.version("policy-0000").path, tmp_path / damage, scale=0.02, seed=4)
    file = source / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif damage == "architecture":
        settings = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(settings | {"num_attention_heads": 3}))
    else:
        tensors = load_file(file)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        save_file(tensors, file, metadata={"format": "pt"})
    name, before = served.publish(source), pauses(served)
    served.registry.promote(name, actor="test", reason="")
    refused(served, name, because)
    assert pauses(served) == before
    assert greedy(served) == answers_of_base
    operate(served, "/v1/rollback?wait=true")


async def test_a_version_that_answers_otherwise_than_before_is_taken_back_and_no_stream_is_cut(
    served: Installation, answers_of_base: list[str], tmp_path: Path
) -> None:
    base = served.registry.version("policy-0000")
    name = served.publish(perturbed(base.path, tmp_path / "probed", scale=0.02, seed=5))
    (key,) = [key for key in base.manifest.metrics if key.startswith("engine_probe")]
    answer = [{**token, "id": token["id"] + 1, "margin": 9.0} for token in base.manifest.metrics[key]]
    served.registry.annotate(name, metrics={key: answer})
    begun = asyncio.Barrier(5)
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key=served.client_key, max_retries=0
    ) as client:
        running = [asyncio.create_task(stream(client, number, begun)) for number in range(4)]
        await asyncio.wait_for(begun.wait(), timeout=60)
        served.registry.promote(name, actor="test", reason="")
        await asyncio.to_thread(refused, served, name, "answers in another way")
        results = await asyncio.gather(*running)
    assert [(count, reason) for _, _, count, reason in results] == [(TOKENS, "length")] * 4
    # The weights that came back by vLLM's own reload are those of before, whole.
    assert greedy(served) == answers_of_base
    operate(served, "/v1/rollback?wait=true")


def pauses(served: Installation) -> float:
    """How often generation stood still for a swap."""
    with served.http(served.operator_key) as http:
        lines = http.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("instructloop_swap_seconds_count")]
    return float(line.split()[-1])


def refused(served: Installation, name: str, because: str) -> None:
    """Wait until the replica says that it could not load `name`, and still serves policy-0000."""
    deadline = time.monotonic() + 120
    while True:
        (replica,) = served.registry.replicas()
        if replica.state == "failed" and replica.desired == name:
            break
        assert time.monotonic() < deadline, replica
        time.sleep(0.1)
    assert because in replica.detail
    assert replica.actual == "policy-0000"
    with served.http() as http:
        assert http.get("/ready").json()["version"] == "policy-0000"
