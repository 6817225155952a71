"""A real `instructloop up` in its own data directory, seen as a person sees it: its terminal and its port."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

START_SECONDS = 300.0


@dataclass
class Up:
    """One `instructloop up`; `lines` is what its terminal shows."""

    data_dir: Path
    model: Path
    settings: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    process: "subprocess.Popen[str] | None" = None
    url: str = ""
    client_key: str = ""
    operator_key: str = ""
    groups: set[int] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        own = {f"INSTRUCTLOOP_{name}": value for name, value in self.settings.items()}
        # As many threads as a user's: the limit on the tests' own tiny models is not for it.
        theirs = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        return (
            theirs
            | own
            | {
                "INSTRUCTLOOP_DATA_DIR": str(self.data_dir),
                "INSTRUCTLOOP_MODEL__PATH": str(self.model),
                "INSTRUCTLOOP_SERVER__PORT": "0",
                "INSTRUCTLOOP_SERVER__MAX_MODEL_LEN": "512",
                "INSTRUCTLOOP_SERVER__KV_CACHE_GIB": "0.25",
            }
        )

    def start(self) -> None:
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "instructloop.cli", "up"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def wait_until_serving(self) -> None:
        found = self.wait_for_line(r"serving on (http://\S+)/v1")
        self.url = found[1]
        if not self.client_key:
            self.client_key = self.wait_for_line(r"client\s+(il_client_\w+)")[1]
            self.operator_key = self.wait_for_line(r"operator\s+(il_operator_\w+)")[1]

    def wait_for_line(self, pattern: str, seconds: float = START_SECONDS) -> "re.Match[str]":
        deadline = time.monotonic() + seconds
        while True:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            if time.monotonic() > deadline or (self.process and self.process.poll() is not None):
                pytest.fail(f"no line with {pattern!r}:\n" + "\n".join(self.lines[-60:]))
            time.sleep(0.1)

    def signal(self, number: int) -> int:
        """Send the supervisor alone a signal, and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=90)

    def http(self, key: str | None = None, **headers: str) -> httpx.Client:
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def processes(self) -> dict[int, str]:
        """Every process of this installation, wherever it hangs in the process tree: pid -> command line.

        Those that name or hold the data directory, and whoever is or was in a process group with one of them:
        redis-server and vLLM's engine write their titles over their environment.
        """
        seen = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                group = os.getpgid(int(directory.name))
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                seen[int(directory.name)] = (group, command, self._belongs(directory))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        self.groups |= {group for group, _, belongs in seen.values() if belongs} - {os.getpgrp()}
        return {
            pid: command
            for pid, (group, command, belongs) in seen.items()
            if command and (belongs or group in self.groups)  # a zombie has no command line
        }

    def _belongs(self, directory: Path) -> bool:
        if f"INSTRUCTLOOP_DATA_DIR={self.data_dir}\0".encode() in (directory / "environ").read_bytes():
            return True
        held = [os.readlink(link) for link in (directory / "fd").iterdir()]
        # The test's own process looks into the database too.
        return int(directory.name) != os.getpid() and any(
            Path(path).is_relative_to(self.data_dir) for path in held
        )

    def pid_of(self, part: str) -> int:
        """The process that the supervisor keeps alive as `part`."""
        assert self.process is not None
        name = "redis-server" if part == "redis" else f"instructloop.cli {part}"
        for pid, command in self.processes().items():
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if int(stat[1]) == self.process.pid and name in command:
                return pid
        pytest.fail(f"{part} does not run: {self.processes()}")

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append(line.rstrip("\n"))


def eventually(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for `condition`; fails saying `what` did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.2)


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    """What a module's `up` has set (`SECTION__KEY`); a module with wishes defines its own."""
    return {}


@pytest.fixture(scope="module")
def up(model_dir: Path, settings: dict[str, str]) -> Iterator[Up]:
    """An `up` that serves, shared by a module's tests, which run in their order."""
    with tempfile.TemporaryDirectory(prefix="il-up-") as directory:
        running = Up(Path(directory), model_dir, settings)
        running.start()
        try:
            running.wait_until_serving()
            yield running
        finally:
            if running.process is not None and running.process.poll() is None:
                running.signal(signal.SIGTERM)
            for pid in running.processes():  # of a failed test: whatever it left
                os.kill(pid, signal.SIGKILL)
