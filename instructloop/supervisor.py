"""`instructloop up`: everything on one machine, in one terminal, from the first start to Ctrl-C.

It owns the order in which the parts start and stop. How a child is kept alive stands in `processes`, what a
first start creates in `installation`; the parts themselves are ordinary commands (`serve`, `ingest`, `train`)
that also run without it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructloop import config as configuration
from instructloop import installation, model, processes, redis_process
from instructloop.config import Config
from instructloop.processes import Child
from instructloop.trial_replica import NAME as TRIAL
from instructloop.trial_replica import TrialReplica

if TYPE_CHECKING:
    import sqlalchemy

REDIS_START_SECONDS = 60.0
# A lock that outlives its owner belongs to children that are still ending.
LOCK_WAIT_SECONDS = 20.0
GRACE_SECONDS = {"redis": 20.0, "model": 2.0, "serve": 30.0, TRIAL: 30.0, "ingest": 15.0, "train": 15.0}


class SupervisorProblem(RuntimeError):  # noqa: N818
    """`up` can't go on; the message says what to do."""


def up(config: Config, file: Path | None) -> int:
    """Run until Ctrl-C or SIGTERM; returns an exit code. Raises a Problem before anything was started."""
    lock = _lock(config.data_dir)
    try:
        port = _free_port(config.server.host, config.server.port)
        environment = processes.environment(os.environ)
        environment |= configuration.child_environment(config, file)
        environment["INSTRUCTLOOP_SERVER__PORT"] = str(port)
        return asyncio.run(_Supervisor(config, environment, port, lock.descriptor).run())
    finally:
        lock.release()


class _Supervisor:
    """One run of `up`."""

    def __init__(self, config: Config, environment: dict[str, str], port: int, lock: int) -> None:
        self._config = config
        self._environment = environment
        self._port = port
        self._lock = lock
        self._children: dict[str, Child] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._trial: TrialReplica | None = None
        self._stop = asyncio.Event()

    async def run(self) -> int:
        """Start, wait for a signal, stop; nothing that was started is left when this returns."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signalled)
        try:
            await self._unless_stopped(self._start())
            await self._stop.wait()
            return 0
        except (SupervisorProblem, redis_process.RedisProblem, model.ModelProblem) as problem:
            print(f"instructloop: {problem}", file=sys.stderr, flush=True)
            return 2
        finally:
            await self._shut_down()

    def _signalled(self) -> None:
        if self._stop.is_set():
            say("up", "stopping already; this takes up to half a minute")
        self._stop.set()

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`, but give it up as soon as a signal has come."""
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            return
        task.result()

    async def _start(self) -> None:
        await self._start_redis()
        engine = await asyncio.to_thread(self._open_database)
        await self._ensure_model(engine)
        installation.ensure_secret(self._config.data_dir)
        self._spawn_ours("serve")
        # The same name at every start, so that it finds its own unfinished entries first.
        self._spawn_ours("ingest", "--consumer", f"{socket.gethostname()}-up")
        self._spawn_ours("train", "--every", f"{self._config.training.every_hours}h")
        self._tasks.append(asyncio.create_task(self._watch_server(engine)))
        if self._config.rollout.trial_replica:
            registry = installation.open_registry(self._config, engine)
            self._trial = TrialReplica(registry, self._trial_child, lambda line: say("up", line))
            self._tasks.append(asyncio.create_task(self._trial.run()))

    async def _start_redis(self) -> None:
        if self._config.queue.url:
            say("up", "using the Redis of queue.url")
            return
        command = redis_process.prepare(self._config.data_dir)
        say("up", f"starting Redis ({command[0]})")
        self._spawn("redis", command)
        deadline = time.monotonic() + REDIS_START_SECONDS
        while failure := await asyncio.to_thread(redis_process.failure, self._config.data_dir):
            if time.monotonic() > deadline:
                raise redis_process.RedisProblem(f"Redis does not answer ({failure}): see logs/redis.log")
            await asyncio.sleep(0.05)

    def _open_database(self) -> "sqlalchemy.Engine":
        say("up", "bringing the database up to date")
        return installation.open_database(self._config)

    async def _ensure_model(self, engine: "sqlalchemy.Engine") -> None:
        registry = installation.open_registry(self._config, engine)
        if not await asyncio.to_thread(registry.versions):
            await self._prepare_model()
        name = await asyncio.to_thread(installation.ensure_serving, self._config, registry)
        say("up", f"the version to serve is {name}")

    async def _prepare_model(self) -> None:
        source = self._config.model.path
        say("up", f"preparing the first version from {source or 'the bundled ' + model.DEFAULT_NAME} (once)")
        child = self._child("model", model.command(source, installation.staging(self._config)))
        self._children["model"] = child
        began = time.monotonic()
        running = asyncio.create_task(child.run())
        while not (await asyncio.wait({running}, timeout=5.0))[0]:
            say("model", f"still at it after {time.monotonic() - began:.0f} s")
        del self._children["model"]
        if running.result() != 0:
            raise model.ModelProblem((child.tail() or ["the model could not be prepared"])[-1])
        say("model", f"ready after {time.monotonic() - began:.0f} s")

    def _trial_child(self) -> Child:
        # The same place each time, where it is free: a replica is named by it.
        try:
            port = _free_port(self._config.server.host, self._port + 1)
        except (SupervisorProblem, OverflowError):
            port = _free_port(self._config.server.host, 0)
        own = {"INSTRUCTLOOP_SERVER__PORT": str(port), "INSTRUCTLOOP_SERVER__URL": ""}
        # vLLM would bind its engine to the same core as the first replica's.
        own |= {"VLLM_CPU_OMP_THREADS_BIND": self._environment.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")}
        return self._child(TRIAL, _ours("serve", "--track", "trial"), own)

    def _spawn_ours(self, name: str, *arguments: str) -> None:
        command = _ours(name, *arguments)
        nice = shutil.which("nice")
        if name == "train" and nice:
            command = [nice, "-n", "10", *command]  # people wait for the server, nobody for a round
        self._spawn(name, command)

    def _spawn(self, name: str, command: list[str]) -> None:
        self._children[name] = self._child(name, command)
        self._tasks.append(asyncio.create_task(self._children[name].keep()))

    def _child(self, name: str, command: list[str], variables: Mapping[str, str] | None = None) -> Child:
        return Child(
            name,
            command,
            environment={**self._environment, **(variables or {})},
            log=self._config.data_dir / "logs" / f"{name}.log",
            say=lambda line: say(name, line),
            grace_seconds=GRACE_SECONDS[name],
            inherit=[self._lock],
        )

    async def _watch_server(self, engine: "sqlalchemy.Engine") -> None:
        """Say when the server is able to serve, each time that it has become so."""
        say(
            "up",
            f"loading the model (about half a minute; log: {self._config.data_dir / 'logs' / 'serve.log'})",
        )
        ready, began, told = False, time.monotonic(), 0.0
        while not self._stop.is_set():
            was_ready, ready = ready, await _answers(self._config.server.host, self._port, "/ready")
            waited = time.monotonic() - began
            if ready and not was_ready:
                say("up", f"serving on http://{self._address()}/v1 (Ctrl-C stops everything)")
                self._greet(await asyncio.to_thread(installation.ensure_keys, engine))
            elif self._stop.is_set():
                return
            elif was_ready and not ready:
                began, told = time.monotonic(), 0.0
                say("up", "the server is not ready")
            elif not ready and waited - told > 15.0:
                told = waited
                say("up", f"not ready yet after {waited:.0f} s")
            await asyncio.sleep(5.0 if ready else 0.5)

    def _greet(self, keys: installation.FirstKeys | None) -> None:
        if keys is None:
            return
        body = '{"model":"policy","messages":[{"role":"user","content":"Name three fruits."}]}'
        print(
            f"\n  Two keys, shown only now:\n    client    {keys.client}\n    operator  {keys.operator}\n\n"
            f"  curl http://{self._address()}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f"    -H 'Authorization: Bearer {keys.client}' \\\n    -d '{body}'\n",
            flush=True,
        )

    def _address(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._config.server.host, self._config.server.host)
        return f"{host}:{self._port}"

    async def _shut_down(self) -> None:
        """Stop what writes before what it writes to."""
        if self._children:
            say("up", "stopping")
        for names in (("model", "serve", "train"), ("ingest",), ("redis",)):
            stops = [self._children[name].stop() for name in names if name in self._children]
            if self._trial is not None:
                stops.append(self._trial.end())
            await asyncio.gather(*stops)
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                say("up", f"{type(outcome).__name__}: {outcome}")
        if self._children:
            say("up", "stopped")


def _ours(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "instructloop.cli", name, *arguments]


def say(name: str, line: str) -> None:
    """One line on the terminal, with who says it."""
    print(f"{name:>6} | {line}", flush=True)


def _lock(data_dir: Path) -> installation.DataLock:
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            return installation.DataLock.take(data_dir)
        except installation.InstallationProblem:
            if _holder_lives(data_dir) or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _holder_lives(data_dir: Path) -> bool:
    try:
        holder = int((data_dir / "up.lock").read_text())
        os.kill(holder, 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _free_port(host: str, port: int) -> int:
    """`port` if it can be listened on (a free one for 0); raises SupervisorProblem."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise SupervisorProblem(
                f"can't listen on {host}:{port} ({error.strerror}): set server.port (or server.host)"
            ) from None
        return int(listener.getsockname()[1])


async def _answers(host: str, port: int, path: str) -> bool:
    """Whether GET `path` is answered with 200."""
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    request = f"GET {path} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n".encode()
    writer = None
    try:
        async with asyncio.timeout(10.0):
            reader, writer = await asyncio.open_connection(target, port)
            writer.write(request)
            status = await reader.readline()
        return status.split()[1:2] == [b"200"]
    except (OSError, TimeoutError):
        return False
    finally:
        if writer is not None:
            writer.close()
