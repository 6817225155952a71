"""The processes that the fault harness runs and harms: Redis with or without a replica, a database, our own.

Each part is a real process in a directory of its own; a part that dies is started again, as `up` does it. A
proxy stands before HTTP and before each way to Redis, to cut connections between a write and its answer.
"""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import redis
import sqlalchemy as sa

from instructloop import redis_process
from instructloop.database import connect

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0


class Part:
    """One process; `ready` says whether it works (it may block, and raises while it does not)."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        ready: Callable[[], object],
    ) -> None:
        self.name = name
        self.starts = 0
        self._command = command
        self._log = log
        self._environment = environment
        self._ready = ready
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start the process without waiting for it."""
        self._wanted = True
        self.starts += 1
        with self._log.open("ab") as log:
            # SIGXFSZ stays ignored, as Python has it: a full quota is an error to write, not a death.
            self._process = subprocess.Popen(
                self._command(),
                stdout=log,
                stderr=log,
                env=self._environment,
                cwd=ROOT,
                restore_signals=False,
            )

    async def start(self) -> None:
        """Start the process and wait until it works."""
        self.launch()
        await self.wait_ready()

    async def wait_ready(self) -> None:
        """Wait until the part works, however often it has to be started again."""
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        while True:
            try:
                await asyncio.to_thread(self._ready)
                return
            except Exception as problem:
                if asyncio.get_running_loop().time() > deadline:
                    tail = self._log.read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"{self.name} does not work: {problem}\n{tail}") from problem
            await asyncio.sleep(0.05)

    async def kill(self, number: int = signal.SIGKILL) -> None:
        """End the process and leave it dead until it is started again."""
        self._wanted = False
        await self.end(number)

    async def end(self, number: int = signal.SIGKILL) -> None:
        """End the process; whoever keeps it alive starts it again."""
        assert self._process is not None
        self._process.send_signal(number)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)
        await asyncio.to_thread(self._process.wait)

    def pause(self) -> None:
        """Stop the process and its children where they are."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        own = psutil.Process(self.pid)
        for process in [own, *own.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    async def keep(self) -> None:
        """Start the process again whenever it has died unasked, until cancelled."""
        while True:
            await asyncio.sleep(0.3)
            if self._wanted and not self.alive:
                self.launch()


class Quota:
    """A directory with room for `mebibytes`: a file system of its own, where that may be mounted.

    Elsewhere `fill` limits the size of the files that a process may write instead.
    """

    def __init__(self, directory: Path, mebibytes: int) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700)
        options = f"size={mebibytes}m,mode=0700"
        command = ["mount", "-t", "tmpfs", "-o", options, "instructloop-faults", str(directory)]
        self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0

    def fill(self, process_id: int) -> None:
        """Leave no room for anything more that the process may write."""
        if not self.mounted:
            largest = max((f.stat().st_size for f in self.directory.rglob("*") if f.is_file()), default=0)
            self._limit(process_id, largest)
            return
        with (self.directory / "ballast").open("wb", buffering=0) as ballast:
            for size in (2**20, 2**12):
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(b"\0" * size)

    def free(self, process_id: int | None) -> None:
        """Give the room back."""
        (self.directory / "ballast").unlink(missing_ok=True)
        if not self.mounted and process_id is not None:
            with contextlib.suppress(ProcessLookupError):
                self._limit(process_id, resource.RLIM_INFINITY)

    def close(self) -> None:
        """Unmount it."""
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.directory)], check=False)

    def _limit(self, process_id: int, size: int) -> None:
        resource.prlimit(process_id, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Proxy:
    """Passes TCP connections on to `upstream` (host and port, or the path of a Unix socket).

    `cut_share`: of the answers that come back, so many are dropped and their connections closed, after the
    request went through.
    """

    def __init__(self, upstream: tuple[str, int] | str) -> None:
        self.upstream = upstream
        self.cut_share = 0.0
        self.cuts = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._answers = 0.0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def disconnect(self) -> None:
        """Close all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    def close(self) -> None:
        assert self._server is not None
        self._server.close()
        self.disconnect()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        onward: asyncio.StreamWriter | None = None
        try:
            if isinstance(self.upstream, str):
                back, onward = await asyncio.open_unix_connection(self.upstream)
            else:
                back, onward = await asyncio.open_connection(*self.upstream)
            self._writers.add(onward)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, onward, answers=False))
                group.create_task(self._pump(back, writer, answers=True))
        except* (OSError, EOFError):
            pass
        finally:
            for end in (writer, onward):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        while piece := await reader.read(65536):
            if answers and self.cut_share:
                self._answers += self.cut_share
                if self._answers >= 1:
                    self._answers -= 1
                    self.cuts += 1
                    break
            writer.write(piece)
            await writer.drain()
        raise EOFError


class RedisServer:
    """One redis-server as `redis_process` starts it, or by TCP with `port`; `replica_of` another's port."""

    def __init__(self, work: Path, name: str, *, port: int | None, replica_of: int | None = None) -> None:
        self.quota = Quota(work / name, 512)
        self.directory = self.quota.directory
        self.port = port
        self.replica_of = replica_of
        self.url = redis_process.url(self.directory) if port is None else f"redis://127.0.0.1:{port}/0"
        self.upstream: tuple[str, int] | str = (
            str(redis_process.socket_path(self.directory)) if port is None else ("127.0.0.1", port)
        )
        self.part = Part("redis", self._command, work / f"{name}.log", ready=self._ping)

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=10)

    def wipe(self) -> None:
        """Lose the disk of a server that is dead."""
        for found in self.directory.iterdir():
            found.unlink() if found.is_file() else shutil.rmtree(found)

    def _command(self) -> list[str]:
        if self.port is None:
            return redis_process.prepare(self.directory)
        server = redis_process.find_server()
        assert server is not None
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.directory),
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "save": "",
            "repl-diskless-sync-delay": "0",
        }
        words = [str(server), *(word for name, value in options.items() for word in (f"--{name}", value))]
        return (
            words if self.replica_of is None else [*words, "--replicaof", "127.0.0.1", str(self.replica_of)]
        )

    def _ping(self) -> None:
        with self.client() as client:
            client.ping()
            if self.replica_of is not None and client.info("replication")["master_link_status"] != "up":
                raise RuntimeError("the replica has not caught up")


class Postgres:
    """A Postgres server of this run's own, on a Unix socket."""

    def __init__(self, work: Path) -> None:
        programs = next(
            (path for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None
        )
        found = shutil.which("postgres")
        if programs is None and found:
            programs = Path(found).resolve().parent
        if programs is None:
            raise FileNotFoundError("Postgres is not installed here")
        # Not below `work`: Postgres refuses to run as root, and another user can't reach that.
        self.directory = Path(tempfile.mkdtemp(prefix="il-faults-pg-"))
        user: list[str] = []
        if os.getuid() == 0:
            user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
            os.chown(self.directory, 65534, 65534)
        data = str(self.directory / "data")
        initdb = [*user, str(programs / "initdb"), "-D", data, "-U", "faults", "-A", "trust"]
        subprocess.run(
            [*initdb, "-E", "UTF8", "--locale=C"], check=True, capture_output=True, cwd=self.directory
        )
        serve = [str(programs / "postgres"), "-D", data, "-k", str(self.directory), "-c", "listen_addresses="]
        self.url = f"postgresql://faults@/postgres?host={self.directory}"
        self.part = Part("postgres", lambda: [*user, *serve], work / "postgres.log", ready=self._ask)

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _ask(self) -> None:
        engine = connect(self.url)
        try:
            with engine.connect() as connection:
                connection.execute(sa.select(1))
        finally:
            engine.dispose()


def our_part(name: str, module: Sequence[str], environment: dict[str, str], log: Path, ready: Any) -> Part:
    """A process of ours: `python -m …`."""
    return Part(name, lambda: [sys.executable, "-m", *module], log, environment=environment, ready=ready)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@asynccontextmanager
async def work_directory() -> AsyncIterator[Path]:
    """A directory with a short path, for Redis listens on a socket below it."""
    directory = Path(tempfile.mkdtemp(prefix="il-f-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
