"""What the first start leaves in the data directory: the secret, the database, the first version, a key.

Every step is idempotent, so a start that was cut short goes on. Processes are the supervisor's business.
"""

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from instructloop import access, database, model
from instructloop.config import Config

if TYPE_CHECKING:
    import sqlalchemy

    from registry.registry import Registry

SECRET_BYTES = 32


class InstallationProblem(RuntimeError):  # noqa: N818
    """The data directory can't be used as it is; the message says what to do."""


@dataclass(slots=True)
class DataLock:
    """Holds a data directory for one `instructloop up`, as long as it or a child of it lives."""

    descriptor: int

    @classmethod
    def take(cls, data_dir: Path) -> "DataLock":
        """Lock `data_dir`, creating it. Raises InstallationProblem naming the process that holds it."""
        data_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(data_dir / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode().strip()
            os.close(descriptor)
            raise InstallationProblem(
                f"`instructloop up` runs in {data_dir} already (process {holder or 'unknown'}): "
                "stop it first, or give another data_dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor)

    def release(self) -> None:
        """Let the next one in, unless a child still holds the lock."""
        os.close(self.descriptor)


def ensure_secret(data_dir: Path) -> bytes:
    """Return the key that signs ids and tokens: `INSTRUCTLOOP_SECRET` (hex), else a file, made once."""
    given = os.environ.get("INSTRUCTLOOP_SECRET")
    if given:
        return _secret_bytes(given, "INSTRUCTLOOP_SECRET")
    path = data_dir / "secret"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".secret-{os.getpid()}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)  # never replaces: of two processes at once, one secret wins
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    return _secret_bytes(path.read_text(), str(path))


def open_database(config: Config) -> "sqlalchemy.Engine":
    """Connect to the configured database and bring it to the newest schema."""
    config.data_dir.mkdir(parents=True, exist_ok=True)
    engine = database.connect(config.database_url)
    database.migrate(engine)
    return engine


def open_registry(config: Config, engine: "sqlalchemy.Engine") -> "Registry":
    """Return the registry over this installation's versions."""
    from registry.registry import Registry

    return Registry(engine, config.versions_dir)


def staging(config: Config) -> Path:
    """Return where the first version's checkpoint is prepared: on the file system that it will stay on."""
    return config.versions_dir / model.STAGING


def ensure_serving(config: Config, registry: "Registry") -> str:
    """Return the version that should serve; the first is published from `staging` and promoted."""
    desired = registry.desired()
    if desired is not None:
        return desired.name
    published = registry.versions()
    if published:
        # A start that was cut short between publishing and promoting.
        registry.promote(published[0].name, actor="setup", reason="the first version")
        return published[0].name
    return model.publish_base(registry, staging(config), config.model.path).name


@dataclass(frozen=True, slots=True)
class FirstKeys:
    """The secrets of the keys that a new installation starts with; they can't be read again."""

    operator: str
    client: str


def ensure_keys(engine: "sqlalchemy.Engine") -> FirstKeys | None:
    """Make an operator's and a client's key if this installation never had an operator, else return None."""
    keys = access.keys_as(engine, "setup")
    if any(key.role == "operator" for key in keys.list()):
        return None
    # The operator last: a start that is cut short between the two makes both again, and shows both.
    client = keys.create("client", "first client").secret
    return FirstKeys(operator=keys.create("operator", "first operator").secret, client=client)


def _secret_bytes(text: str, where: str) -> bytes:
    try:
        secret = bytes.fromhex(text.strip())
    except ValueError:
        raise InstallationProblem(f"{where}: not a hexadecimal secret") from None
    if len(secret) < SECRET_BYTES:
        raise InstallationProblem(
            f"{where}: a secret has at least {SECRET_BYTES} bytes ({2 * SECRET_BYTES} digits)"
        )
    return secret
