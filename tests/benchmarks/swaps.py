"""Ten swaps under load: what clients see of them, beside the bare `reload_weights` of vLLM.

Our server, with recording, authentication and metrics on, answers `vllm bench serve` all the time while an
operator promotes two versions in turn. Requests come at random, for a share of what the server can do: those
that come one by one as others end begin together in the end, and a step that reads eight prompts at once
holds the others up for longer than a reload, swap or not. The pause of a swap is the longest time between
two pieces of any stream from when it was asked for until it was answered, checking and staging included. The
bare time is that of `reload_weights` alone, in an idle engine with the same arguments, before and after.
Run it with `make bench-swap`: some minutes on two cores. Prints a table, and fails where a bound is missed.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from registry.precision import matrix_dtype
from tests.benchmarks.serving_load import (
    KV_CACHE_GIB,
    MAX_MODEL_LEN,
    ROOT,
    Load,
    environment,
    our_server,
    run,
    table,
)
from tests.integration.server_fixture import Installation, perturbed, test_model

MOST_PAUSE = 1.3
ANSWER = 64
BUSY = 0.7
"""The load's share of what the server can do: it works all the time, and no queue grows."""
LONGEST_SWAP_SECONDS = 15.0
LONGEST_START_SECONDS = 120.0


def main() -> None:
    """Measure and print, or be the bare engine (`--bare`)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--between", type=float, default=4.0, help="seconds from one swap to the next")
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(asyncio.run(reloads(*map(Path, options.bare)))))
        return
    with tempfile.TemporaryDirectory(prefix="il-b-") as directory, our_server() as (server, place):
        other = perturbed(test_model(), Path(directory) / "other", scale=0.02, seed=1)
        versions = [place.publish(other), "policy-0000"]
        bare = bare_reloads(other)
        shape = {"concurrency": options.concurrency, "prompt": 64, "answer": ANSWER}
        pace = run(server, requests=4 * options.concurrency, seed=0, **shape)
        seconds = options.swaps * (options.between + LONGEST_SWAP_SECONDS) + 10
        rate = BUSY * pace.tokens_per_second / ANSWER
        with ThreadPoolExecutor(1) as operator:
            promoting = operator.submit(swap_under, place, versions, options.swaps, options.between)
            load = run(server, requests=int(rate * seconds), seed=1, rate=rate, **shape)
            swaps = promoting.result()
        if max(map(max, load.arrivals)) < swaps[-1].end:
            raise RuntimeError("the load ended before the last swap")
        bare += bare_reloads(other)
    sys.exit(report(load, swaps, bare))


@dataclass(frozen=True, slots=True)
class Swap:
    """When a promotion was asked for and answered, and how long generation stood still by our own account."""

    begin: float
    end: float
    stood_still: float


def swap_under(place: Installation, versions: list[str], count: int, between: float) -> list[Swap]:
    """Promote the versions in turn once the load has begun."""
    found = []
    with place.http(place.operator_key) as http:
        deadline = time.monotonic() + LONGEST_START_SECONDS
        while not running(http):
            if time.monotonic() > deadline:
                raise RuntimeError("the load does not begin")
            time.sleep(0.2)
        for number in range(count):
            time.sleep(between)
            name, begin = versions[number % len(versions)], time.perf_counter()
            response = http.post(f"/v1/versions/{name}/promote?wait=true").raise_for_status().json()
            (replica,) = response["replicas"]
            if replica["actual"] != name:
                raise RuntimeError(f"{name} is not served: {replica}")
            found.append(Swap(begin, time.perf_counter(), replica["last_swap_seconds"]))
    return found


def running(http: httpx.Client) -> float:
    """How many requests the engine works on."""
    metrics = http.get("/metrics").raise_for_status().text
    return sum(
        sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name in ("vllm:num_requests_running", "vllm:num_requests_waiting")
    )


def report(load: Load, swaps: list[Swap], bare: list[float]) -> int:
    """Print the figures; returns 1 if a bound is missed."""
    gaps = load.gaps()
    rows: list[list[object]] = [["swap", "asked to answered s", "stood still s", "clients' pause s"]]
    pauses = []
    for number, swap in enumerate(swaps):
        around = [end - begin for begin, end in gaps if begin < swap.end and end > swap.begin]
        pauses.append(max(around))
        rows.append([number + 1, swap.end - swap.begin, swap.stood_still, pauses[-1]])
    print(table(rows))
    lengths = np.array([end - begin for begin, end in gaps])
    in_swaps = np.array([
        any(begin < swap.end and end > swap.begin for swap in swaps) for begin, end in gaps
    ])  # fmt: skip
    pause, reload_ = statistics.median(pauses), statistics.median(bare)
    print(
        f"{len(load.ttfts)} requests, {load.tokens_per_second:.0f} tokens/s; "
        f"failed {load.failed}, cut {load.cut}"
    )
    print(f"time between tokens: p50 {1000 * np.percentile(lengths, 50):.0f} ms, "
          f"p99 {1000 * np.percentile(lengths, 99):.0f} ms, largest {1000 * lengths.max():.0f} ms; "
          f"away from swaps p99 {1000 * np.percentile(lengths[~in_swaps], 99):.0f} ms")  # fmt: skip
    print(f"bare reload_weights: {reload_:.3f} s (median of {len(bare)}, {min(bare):.3f} to {max(bare):.3f})")
    print(f"clients' pause / bare reload: {pause / reload_:.2f} (median; at most {MOST_PAUSE}), "
          f"largest {max(pauses) / reload_:.2f}")  # fmt: skip
    return int(load.failed > 0 or load.cut > 0 or pause > MOST_PAUSE * reload_)


def bare_reloads(other: Path) -> list[float]:
    """Time a bare engine's reloads in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.swaps", "--bare", str(test_model()), str(other)]
    done = subprocess.run(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


async def reloads(first: Path, second: Path) -> list[float]:
    """Seconds of `reload_weights` in an idle engine, of both checkpoints in turn."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine: Any = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(first),
            max_model_len=MAX_MODEL_LEN,
            kv_cache_memory_bytes=int(KV_CACHE_GIB * 2**30),
            dtype=matrix_dtype(),
            enforce_eager=True,
            enable_chunked_prefill=False,
            max_num_batched_tokens=8192,
        )
    )
    found = []
    for number in range(11):
        await engine.pause_generation(mode="keep")
        began = time.perf_counter()
        path = str((second, first)[number % 2])
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
        found.append(time.perf_counter() - began)
        await engine.resume_generation()
    engine.shutdown(timeout=0)
    # The first brings the files into memory.
    return found[1:]


if __name__ == "__main__":
    main()
