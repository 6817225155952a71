import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from instructloop import child, processes
from instructloop.processes import Child

# A leader with a child of its own in the same group; both ignore SIGTERM when asked to.
FAMILY = """
import os, signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
orphan = subprocess.Popen([sys.executable, "-c", deaf])
open(sys.argv[1], "a").write(f"{os.getpid()} {orphan.pid}\\n")
time.sleep(60)
"""


def make(tmp_path: Path, command: list[str], said: list[str], grace_seconds: float = 5.0) -> Child:
    return Child(
        "test",
        command,
        environment=dict(os.environ),
        log=tmp_path / "logs" / "test.log",
        say=said.append,
        grace_seconds=grace_seconds,
    )


async def eventually(condition: Callable[[], bool | Awaitable[bool]], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that was killed and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pids(path: Path) -> list[list[int]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [[int(word) for word in line.split()] for line in lines]


async def test_a_killed_child_is_started_again_and_its_orphan_is_gone(tmp_path: Path) -> None:
    said: list[str] = []
    note = tmp_path / "pids"
    process = make(tmp_path, [sys.executable, "-c", FAMILY, str(note)], said)
    keeping = asyncio.create_task(process.keep())
    await eventually(lambda: len(pids(note)) == 1)
    leader, orphan = pids(note)[0]
    os.kill(leader, signal.SIGKILL)
    await eventually(lambda: len(pids(note)) == 2)
    assert not alive(orphan)
    assert process.starts == 2
    assert any("killed by SIGKILL" in line for line in said)
    await process.stop()
    await keeping
    await eventually(lambda: not any(alive(pid) for pid in pids(note)[1]))


async def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(tmp_path: Path) -> None:
    said: list[str] = []
    note = tmp_path / "pids"
    process = make(tmp_path, [sys.executable, "-c", FAMILY, str(note), "stubborn"], said, grace_seconds=0.3)
    keeping = asyncio.create_task(process.keep())
    await eventually(lambda: len(pids(note)) == 1)
    await process.stop()
    await keeping
    await eventually(lambda: not any(alive(pid) for pid in pids(note)[0]))
    assert any("did not stop" in line for line in said)


async def test_output_goes_to_the_log_and_our_lines_to_the_terminal(tmp_path: Path) -> None:
    said: list[str] = []
    lines = [
        "INFO 11-24 engine.py: a line of vLLM",
        "12:00:00 INFO training.round: round 1 starts",
        "12:00:00 WARNING server.swap: retrying",
        "12:00:00 INFO httpx: a request",
        "x" * 300_000,
        "last words",
    ]
    text = tmp_path / "text"
    text.write_text("\n".join(lines))
    program = "import sys; print(open(sys.argv[1]).read()); sys.exit(3)"
    process = make(tmp_path, [sys.executable, "-c", program, str(text)], said)
    assert await process.run() == 3
    assert (tmp_path / "logs" / "test.log").read_text() == "\n".join(lines) + "\n"
    assert said == ["round 1 starts", "warning: retrying"]
    assert process.tail()[-1] == "last words"


async def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """kill -9 of the parent, which can run no clean-up, ends the child too."""
    note = tmp_path / "pid"
    child_program = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent_program = (
        "import subprocess, sys, time; from instructloop import child\n"
        f"subprocess.Popen(child.command(sys.executable, '-c', {child_program!r})); time.sleep(60)"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", parent_program)
    await eventually(lambda: note.exists() and note.read_text() != "")
    pid = int(note.read_text())
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await eventually(lambda: not alive(pid))


async def test_a_child_of_a_dead_parent_does_not_start() -> None:
    command = child.command(sys.executable, "-c", "print('started')")
    command[3] = "1"  # the process id of somebody who is not the parent
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output == b""


async def test_a_large_log_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_LARGEST_LOG", 10)
    process = make(tmp_path, [sys.executable, "-c", "print('a line that is long enough')"], [])
    await process.run()
    await process.run()
    logs = tmp_path / "logs"
    assert (
        (logs / "test.log").read_text() == (logs / "test.log.1").read_text() == "a line that is long enough\n"
    )


def test_restarts_come_slower_and_slower_up_to_a_limit() -> None:
    waits = [processes.restart_wait(failures) for failures in range(1, 12)]
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert waits == sorted(waits)
    assert waits[-1] == processes.LONGEST_WAIT_SECONDS
    assert processes.restart_wait(10_000) == processes.LONGEST_WAIT_SECONDS


def test_the_users_environment_wins() -> None:
    found = processes.environment({"MALLOC_TOP_PAD_": "1", "HOME": "/home/x"})
    assert found["MALLOC_TOP_PAD_"] == "1"
    assert found["HOME"] == "/home/x"
    assert int(found["MALLOC_MMAP_THRESHOLD_"]) > 2**20


def test_tcmalloc_is_preloaded_once_and_keeps_other_preloads(monkeypatch: pytest.MonkeyPatch) -> None:
    library = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
    monkeypatch.setattr(processes, "tcmalloc", lambda: library)
    assert processes.environment({})["LD_PRELOAD"] == library
    assert processes.environment({"LD_PRELOAD": "/x.so"})["LD_PRELOAD"] == f"{library}:/x.so"
    assert processes.environment({"LD_PRELOAD": library})["LD_PRELOAD"] == library
