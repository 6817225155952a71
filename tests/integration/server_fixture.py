"""A whole serving installation for tests: real engine, real Redis, real SQLite, real ingest; started once.

`served` is the fixture. The processes are started as `instructloop` starts them, on free ports.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import httpx
import pytest

from feedback.keys import Keys
from feedback.records import Completion
from feedback.store import Store
from instructloop import config, installation, model, redis_process
from registry.registry import Registry

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 240.0


@dataclass
class Installation:
    """A data directory with its processes; `start` brings up Redis, ingest and one replica."""

    data_dir: Path
    port: int
    variables: dict[str, str] = field(default_factory=dict)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "INSTRUCTLOOP_DATA_DIR": str(self.data_dir),
            "INSTRUCTLOOP_SERVER__PORT": str(self.port),
            "INSTRUCTLOOP_SERVER__MAX_MODEL_LEN": "1024",
            "INSTRUCTLOOP_SERVER__KV_CACHE_GIB": "0.5",
            "INSTRUCTLOOP_ROLLOUT__WATCH_SECONDS": "0.2",
            # More than a server logs by itself: what must be in no log is looked for.
            "VLLM_LOGGING_LEVEL": "INFO",
            **self.variables,
        }

    def prepare(self, checkpoint: Path) -> None:
        """Migrate the database, publish `checkpoint` as the first version and make one key a role."""
        self.config = config.load(environment=self.environment)
        self.database = installation.open_database(self.config)
        installation.ensure_secret(self.data_dir)
        self.registry: Registry = installation.open_registry(self.config, self.database)
        self.store = Store(self.database)
        staging = self.data_dir / "staging"
        copy_checkpoint(checkpoint, staging)
        model.publish_base(self.registry, staging, None)
        keys = Keys(self.database)
        self.client_key = keys.create("client", "test client").secret
        self.other_client_key = keys.create("client", "another client").secret
        self.rater_key = keys.create("rater", "test rater").secret
        self.operator_key = keys.create("operator", "test operator").secret

    def start(self) -> None:
        self.start_redis()
        self.start_part("ingest")
        self.start_part("serve")
        self.wait_until_ready()

    def start_redis(self) -> None:
        self._spawn("redis", redis_process.prepare(self.data_dir))
        deadline = time.monotonic() + 20
        while (problem := redis_process.failure(self.data_dir)) is not None:
            if time.monotonic() > deadline:
                pytest.fail(f"Redis does not start: {problem}\n{self.log('redis')}")
            time.sleep(0.05)

    def start_part(self, name: str) -> None:
        code = "from instructloop.cli import main; main()"
        self._spawn(name, [sys.executable, "-c", code, name])

    def start_replica(self, name: str, port: int, *arguments: str) -> None:
        """Start one more replica, under `name` in `processes`."""
        code = "from instructloop.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", *arguments]
        self._spawn(name, command, {"INSTRUCTLOOP_SERVER__PORT": str(port)})

    def wait_until_ready(self, name: str = "serve", port: int | None = None) -> None:
        deadline = time.monotonic() + START_SECONDS
        process = self.processes[name]
        url = f"http://127.0.0.1:{port or self.port}"
        while True:
            try:
                if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server does not start:\n{self.log(name)[-8000:]}")
            time.sleep(0.3)

    def log(self, name: str) -> str:
        return (self.data_dir / f"{name}.log").read_text(errors="replace")

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(timeout=40)

    def stop_all(self) -> None:
        last = [name for name in ("ingest", "redis") if name in self.processes]
        for name in [*(name for name in self.processes if name not in last), *last]:
            self.stop(name)

    def http(self, key: str | None = None, **headers: str) -> httpx.Client:
        """An HTTP client for this server, with a key if one is given."""
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def publish(self, checkpoint: Path) -> str:
        """Publish a copy of `checkpoint` as a candidate and return its name."""
        staging = Path(tempfile.mkdtemp(dir=self.data_dir))
        copy_checkpoint(checkpoint, staging)
        return self.registry.publish(staging, parent=None, round_id=None, kind="test", details={}).name

    def _spawn(self, name: str, command: list[str], variables: Mapping[str, str] | None = None) -> None:
        environment = {**self.environment, **(variables or {})}
        with (self.data_dir / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=REPOSITORY
            )


def copy_checkpoint(source: Path, destination: Path) -> None:
    """Copy a checkpoint's own files, without the registry's."""
    destination.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in ("manifest.json", "READY"):
            shutil.copyfile(file, destination / file.name)


def perturbed(source: Path, destination: Path, *, scale: float, seed: int) -> Path:
    """A checkpoint whose every matrix is moved a little; other answers, same language."""
    import torch
    from safetensors.torch import load_file, save_file

    copy_checkpoint(source, destination)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(destination / "model.safetensors")
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * scale
        tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_model() -> Path:
    """The default model: INSTRUCTLOOP_TEST_MODEL, this checkout's installed one, or converted now."""
    given = os.environ.get("INSTRUCTLOOP_TEST_MODEL")
    if given:
        return Path(given)
    installed = REPOSITORY / ".instructloop" / "versions" / "policy-0000"
    if (installed / "READY").exists():
        return installed
    return model.ensure_default_model(REPOSITORY / ".instructloop" / "test-model")


test_model.__test__ = False  # type: ignore[attr-defined]


@cache
def _started() -> Installation:
    # A short path: Redis listens on a Unix socket below it.
    found = Installation(Path(tempfile.mkdtemp(prefix="il-srv-")), free_port())
    try:
        found.prepare(test_model())
        found.start()
    except BaseException:
        found.stop_all()
        raise
    return found


@pytest.fixture(scope="session")
def served() -> Iterator[Installation]:
    """The one installation of this test run; modules that import this fixture share it."""
    installation_ = _started()
    yield installation_
    if "serve" in installation_.processes:
        assert installation_.stop("serve") == 0, installation_.log("serve")[-4000:]
        assert [replica.state for replica in installation_.registry.replicas()] == ["stopped"]
    installation_.stop_all()
    shutil.rmtree(installation_.data_dir, ignore_errors=True)


def wait_for_record(installation_: Installation, id_: str, parts: int = 1) -> list[Completion]:
    """The parts of a completion once the real ingest has stored them all."""
    deadline = time.monotonic() + 20
    while len(found := installation_.store.completion(id_)) < parts:
        assert time.monotonic() < deadline, f"{id_} has {len(found)} of {parts} records"
        time.sleep(0.05)
    return found
