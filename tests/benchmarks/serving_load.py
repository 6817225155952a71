"""What the serving benchmarks share: servers to measure, and load on them by `vllm bench serve`.

Owns the processes of a run and the reading of its results. What is compared is in `swaps` and `serving`.
"""

import contextlib
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from registry.precision import matrix_dtype
from tests.integration.server_fixture import Installation, free_port, test_model

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300.0
MAX_MODEL_LEN = 1024
KV_CACHE_GIB = 0.5


@dataclass
class Server:
    """A running server: where it listens, the key that opens it, and its process (with children)."""

    name: str
    url: str
    key: str
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time that the server and its children have taken so far."""
        process = psutil.Process(self.pid)
        return sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])


@contextmanager
def our_server() -> Iterator[tuple[Server, Installation]]:
    """Redis, ingest and one replica as `instructloop` starts them, everything on, limits out of reach."""
    place = Installation(Path(tempfile.mkdtemp(prefix="il-b-")), free_port())
    place.variables = {
        "INSTRUCTLOOP_SERVER__RATE_PER_KEY": "100000000/minute",
        "INSTRUCTLOOP_SERVER__MAX_MODEL_LEN": str(MAX_MODEL_LEN),
        "INSTRUCTLOOP_SERVER__KV_CACHE_GIB": str(KV_CACHE_GIB),
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    try:
        place.prepare(test_model())
        place.start()
        yield Server("ours", place.url, place.client_key, place.processes["serve"].pid), place
    finally:
        place.stop_all()
        shutil.rmtree(place.data_dir, ignore_errors=True)


@contextmanager
def bare_server() -> Iterator[Server]:
    """`vllm serve` of the same model with the arguments that our engine is started with on a CPU."""
    directory = Path(tempfile.mkdtemp(prefix="il-b-"))
    port = free_port()
    words = ["--model", str(test_model()), "--served-model-name", "policy", "--host", "127.0.0.1"]
    words += ["--port", str(port), *engine_words(), "--uvicorn-log-level", "warning"]
    # What `vllm serve` runs; the command itself asks for a package that has another name on a CPU.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *words]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        server = Server("bare", f"http://127.0.0.1:{port}", "none", process.pid)
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(server.url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((directory / "log").read_text()[-4000:])
            time.sleep(0.3)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(directory, ignore_errors=True)


def engine_words() -> list[str]:
    """The engine's arguments, as `server.engine` chooses them on a CPU."""
    return [
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--kv-cache-memory-bytes", str(int(KV_CACHE_GIB * 2**30))),
        *("--dtype", matrix_dtype()),
        *("--max-num-batched-tokens", "8192"),
        "--enforce-eager",
        "--no-enable-chunked-prefill",
    ]


def environment() -> dict[str, str]:
    """What vLLM's own programs read: no telemetry, no downloads, few words."""
    return os.environ | {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Load:
    """The result of one run. Times are seconds of the machine's monotonic clock."""

    failed: int
    cut: int
    tokens: int
    seconds: float
    ttfts: list[float]
    arrivals: list[list[float]] = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def gaps(self) -> list[tuple[float, float]]:
        """(begin, end) of the time between each two pieces of each stream."""
        return [pair for times in self.arrivals for pair in pairwise(times)]


def run(
    server: Server,
    *,
    requests: int,
    concurrency: int,
    prompt: int,
    answer: int,
    seed: int,
    rate: float = math.inf,
) -> Load:
    """Let `vllm bench serve` load a server: `requests` random prompts, all answers of `answer` tokens.

    They come at `rate` a second at random (Poisson), at most `concurrency` at a time.
    """
    # Only here: it takes ten seconds and is needed once.
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ["OPENAI_API_KEY"] = server.key
    with tempfile.TemporaryDirectory(prefix="il-b-") as directory:
        options = {
            "backend": "openai",
            "base-url": server.url,
            "endpoint": "/v1/completions",
            "model": "policy",
            "tokenizer": test_model(),
            "dataset-name": "random",
            "random-input-len": prompt,
            "random-output-len": answer,
            "num-prompts": requests,
            "max-concurrency": concurrency,
            "request-rate": rate,
            "temperature": 1,
            "seed": seed,
            "result-dir": directory,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        words += ["--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        with contextlib.redirect_stdout(io.StringIO()):
            found = bench(parser.parse_args(words))
    return _load(found, requests, answer)


def _load(found: dict[str, Any], requests: int, answer: int) -> Load:
    lengths: Sequence[int] = found["output_lens"]
    streams = zip(found["start_times"], found["ttfts"], found["itls"], strict=True)
    failed = sum(1 for error in found["errors"] if error) + requests - len(lengths)
    return Load(
        failed=failed,
        cut=sum(1 for length in lengths if length != answer) - failed,
        tokens=sum(lengths),
        seconds=found["duration"],
        ttfts=list(found["ttfts"]),
        arrivals=[list(accumulate(itls, initial=start + ttft)) for start, ttft, itls in streams],
    )


def table(rows: Sequence[Sequence[object]]) -> str:
    """Return columns of text, the first row being their names."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells
    )
