"""Which versions exist, which one should serve, and what replicas really serve.

Owns the versions directory and the append-only log of what happened to them. It moves no weights into an
engine: replicas read `desired()` and report back. What may follow what is decided in `registry.states`.
"""

import contextlib
import errno
import fcntl
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from registry import manifest as manifests
from registry.manifest import BrokenVersion, Manifest
from registry.states import Action, Fleet, IllegalTransition, Mode, State, Trial, apply, fold
from registry.tables import REPLICAS, VERSION_LOG

__all__ = [
    "STALE_SECONDS",
    "BrokenVersion",
    "Desired",
    "IllegalTransition",
    "LogEntry",
    "Manifest",
    "Registry",
    "Replica",
    "Track",
    "Trial",
    "UnknownVersion",
    "Version",
]

Track = Literal["stable", "trial"]
"""What a replica follows: the stable version, or the one on trial."""

STALE_SECONDS = 30.0
"""A replica that has said nothing for so long is taken for gone."""
_APPEND_ATTEMPTS = 20


class UnknownVersion(KeyError):  # noqa: N818
    """There is no such version."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else "no such version"


@dataclass(frozen=True, slots=True)
class Version:
    """A published version: its state, its manifest and its directory."""

    name: str
    state: State
    manifest: Manifest
    path: Path


@dataclass(frozen=True, slots=True)
class Desired:
    """The version that a track should serve, and the number of the log entry that said so."""

    name: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Replica:
    """What one server replica says of itself.

    `state` is one of `starting`, `serving`, `swapping`, `failed`, `stopped`; `detail` says why in words;
    `track` is `stable` or `trial`.
    `seen_at` is in Unix seconds; `Registry.report` sets it.
    """

    id: str
    desired: str | None
    actual: str | None
    state: str
    detail: str = ""
    pid: int | None = None
    url: str | None = None
    seen_at: float = 0.0
    last_swap_seconds: float | None = None
    track: Track = "stable"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One thing that happened to a version; `at` is in Unix seconds, `share` that of a canary or shadow."""

    sequence: int
    at: float
    actor: str
    action: str
    version: str
    reason: str
    share: float | None = None


class Registry:
    """The versions under `root` and their log in the database of `engine`."""

    def __init__(self, engine: sa.Engine, root: Path) -> None:
        self._engine = engine
        # Reads say so: they then need no write lock on SQLite.
        self._reader = engine.execution_options(read_only=True)
        self._root = root

    # -- versions on disk

    def publish(
        self,
        staging: Path,
        *,
        parent: str | None,
        round_id: int | None,
        kind: str,
        details: Mapping[str, Any],
        actor: str = "trainer",
    ) -> Version:
        """Make the checkpoint in `staging` a version, as a candidate, and return it.

        The manifest is written and flushed in `staging`, the directory renamed into place, READY written
        last, then the log entry; a kill between any two steps leaves no half version visible, and calling
        again goes on where it stopped. A round publishes once: a second call for its id returns the first
        version. `staging` is moved away (copied first if it lies on another file system).

        Raises FileNotFoundError without a checkpoint, ValueError if it is empty or holds symbolic links.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            target = self._of_round(round_id)
            if target is None:
                target = self._place(staging, parent=parent, round_id=round_id, kind=kind, details=details)
            manifest = manifests.read(target)
            if not (target / manifests.READY).exists():
                manifests.check(target, manifest)
                manifests.mark_ready(target)
            if manifest.name not in self._fleet().states:
                reason = f"round {round_id}" if round_id is not None else kind
                self._append(lambda _: ("published", manifest.name), actor, reason)
        return self.version(manifest.name)

    def versions(self) -> list[Version]:
        """All published versions, oldest first."""
        states = self._fleet().states
        return [self._load(name, state) for name, state in states.items() if self._is_ready(name)]

    def prune(self, keep: int, spare: Collection[str | None] = ()) -> list[str]:
        """Delete the weights of old versions that rounds made, and return the names of these versions.

        Kept are those that serve or that a replica has or wants, the one that a rollback returns to, the one
        on trial, those in `spare` and the `keep` newest others. A pruned version keeps its manifest. It is
        marked before its files go, so a kill in between leaves nothing that could be promoted; the next call
        deletes the rest.
        """
        fleet = self._fleet()
        in_use = {fleet.serving, fleet.rollback_target, *spare}
        in_use.add(fleet.trial.version if fleet.trial else None)
        in_use |= {name for replica in self.replicas() for name in (replica.actual, replica.desired)}
        versions = self.versions()
        others = [
            version
            for version in versions
            if version.manifest.round_id is not None
            and version.state != "pruned"
            and version.name not in in_use
        ]
        pruned = []
        for version in others[: max(0, len(others) - keep)]:
            mark: tuple[Action, str] = ("pruned", version.name)
            with contextlib.suppress(IllegalTransition):  # promoted meanwhile
                self._append(lambda _, mark=mark: mark, "trainer", f"the {keep} newest are kept")  # type: ignore[misc]
                pruned.append(version.name)
        for version in versions:
            if version.state == "pruned" or version.name in pruned:
                for name in version.manifest.files:
                    (version.path / name).unlink(missing_ok=True)
        return pruned

    def states(self) -> Mapping[str, State]:
        """Return the state of every version that was published, oldest first, without reading manifests."""
        return self._fleet().states

    def version(self, name: str) -> Version:
        """One version; raises UnknownVersion."""
        state = self._fleet().states.get(name)
        if state is None or not self._is_ready(name):
            raise UnknownVersion(f"there is no version {name}")
        return self._load(name, state)

    def verify(self, name: str) -> None:
        """Compare the version's files with its manifest.

        Raises UnknownVersion, and BrokenVersion naming the file.
        """
        version = self.version(name)
        if version.state == "pruned":
            raise BrokenVersion(f"{name} is pruned: its weights were deleted to save disk space")
        manifests.check(version.path, version.manifest)

    def annotate(
        self, name: str, *, metrics: Mapping[str, Any] | None = None, verdict: Mapping[str, Any] | None = None
    ) -> None:
        """Add `metrics` to the manifest and set its `verdict`; raises UnknownVersion."""
        with self._locked():
            version = self.version(name)
            changes: dict[str, Any] = {"metrics": {**version.manifest.metrics, **(metrics or {})}}
            if verdict is not None:
                changes["verdict"] = dict(verdict)
            manifests.write(version.path, version.manifest.model_copy(update=changes))

    # -- moves

    def promote(self, name: str, *, actor: str, reason: str, trial: Trial | None = None) -> None:
        """Make `name` the version that should serve.

        What else is on trial is withdrawn by that. With `trial`, only while just this trial goes on.

        Raises UnknownVersion, BrokenVersion if its files have changed since it was published, and
        IllegalTransition if it serves already or was rejected, or `trial` is over.
        """

        def promoted(fleet: Fleet) -> tuple[Action, str]:
            _still(fleet, trial)
            return "promoted", name

        self.verify(name)
        self._append(promoted, actor, reason)

    def reject(self, name: str, *, actor: str, reason: str) -> None:
        """Rule `name` out for good; raises UnknownVersion, IllegalTransition if it serves."""
        self.version(name)
        self._append(lambda _: ("rejected", name), actor, reason)

    def rollback(self, *, actor: str, reason: str) -> str:
        """Go back to the version that served before, and return its name.

        Raises IllegalTransition when none did, BrokenVersion if its files have changed.
        """

        def before(fleet: Fleet) -> tuple[Action, str]:
            target = fleet.rollback_target
            if target is None:
                raise IllegalTransition("no version served before this one")
            return "rolled_back", target

        # Hashing takes a while; it happens before the transaction, which decides on the state that it finds.
        self.verify(before(self._fleet())[1])
        return self._append(before, actor, reason).version

    def canary(self, name: str, share: float, *, actor: str, reason: str) -> None:
        """Let `name` answer `share` (0 to 1) of the end users beside the version that serves.

        Also changes the share of a canary and turns a shadow into one. Raises UnknownVersion, BrokenVersion,
        and IllegalTransition where another version is on trial, nothing serves or the share is not one.
        """
        self._try("canary", name, share, actor, reason)

    def shadow(self, name: str, share: float, *, actor: str, reason: str) -> None:
        """Let `name` answer copies of `share` (0 to 1) of the requests, which nobody sees; as `canary`."""
        self._try("shadow", name, share, actor, reason)

    def withdraw(self, *, actor: str, reason: str, trial: Trial | None = None) -> str:
        """End the trial and return the name of its version, which is again what it was before.

        With `trial`, only that one, unchanged. Raises IllegalTransition if none goes on, or not that one.
        """

        def withdrawn(fleet: Fleet) -> tuple[Action, str]:
            _still(fleet, trial)
            if fleet.trial is None:
                raise IllegalTransition("no version is on trial")
            return "withdrawn", fleet.trial.version

        return self._append(withdrawn, actor, reason).version

    def trial(self) -> Trial | None:
        """Return the version that is tried beside the stable one, if any."""
        return self._fleet().trial

    def desired(self, track: Track = "stable") -> Desired | None:
        """Return the version that replicas of a track should serve; None before the first promotion.

        Without a trial the trial track follows the stable one.
        """
        fleet = self._fleet()
        if track == "trial" and fleet.trial is not None:
            return Desired(fleet.trial.version, fleet.trial.sequence)
        return Desired(fleet.serving, fleet.desired_sequence) if fleet.serving is not None else None

    def log(self, limit: int = 100) -> list[LogEntry]:
        """Return the latest `limit` entries, oldest of them first."""
        query = sa.select(VERSION_LOG).order_by(VERSION_LOG.c.sequence.desc()).limit(limit)
        with self._reader.connect() as connection:
            return [LogEntry(**row._mapping) for row in connection.execute(query)][::-1]

    # -- replicas

    def report(self, replica: Replica) -> None:
        """Record what a replica says of itself, now."""
        with self._engine.begin() as connection:
            _report(connection, replica)

    def begin_swap(self, replica: Replica, max_unavailable: int, stale_seconds: float) -> bool:
        """Record `replica` as swapping, unless `max_unavailable` others of its track are; say whether.

        Replicas that were not heard of for `stale_seconds` don't count. Of several that ask at once, no more
        than `max_unavailable` are told yes. Nothing is written when the answer is no.
        """
        others = sa.select(sa.func.count()).where(
            REPLICAS.c.track == replica.track,
            REPLICAS.c.id != replica.id,
            REPLICAS.c.state == "swapping",
            REPLICAS.c.seen_at > time.time() - stale_seconds,
        )
        with self._engine.begin() as connection:
            if connection.dialect.name == "postgresql":  # SQLite holds its one write lock already
                connection.exec_driver_sql("LOCK TABLE replicas IN SHARE ROW EXCLUSIVE MODE")
            if connection.execute(others).scalar_one() >= max_unavailable:
                return False
            _report(connection, replace(replica, state="swapping"))
        return True

    def forget(self, replica_id: str) -> None:
        """Remove a replica that was shut down for good."""
        with self._engine.begin() as connection:
            connection.execute(sa.delete(REPLICAS).where(REPLICAS.c.id == replica_id))

    def replicas(self) -> list[Replica]:
        """Every replica's last report, by id."""
        with self._reader.connect() as connection:
            rows = connection.execute(sa.select(REPLICAS).order_by(REPLICAS.c.id))
            return [Replica(**row._mapping) for row in rows]

    # -- within

    def _fleet(self) -> Fleet:
        with self._reader.connect() as connection:
            return fold(self._entries(connection))

    @staticmethod
    def _entries(connection: sa.Connection) -> Sequence[LogEntry]:
        rows = connection.execute(sa.select(VERSION_LOG).order_by(VERSION_LOG.c.sequence))
        return [LogEntry(**row._mapping) for row in rows]

    def _append(
        self,
        decide: Callable[[Fleet], tuple[Action, str]],
        actor: str,
        reason: str,
        share: float | None = None,
    ) -> LogEntry:
        """Decide on the log as it is and append; again if another process appended in between."""
        for attempt in range(_APPEND_ATTEMPTS):
            try:
                with self._engine.begin() as connection:
                    fleet = fold(self._entries(connection))
                    action, name = decide(fleet)
                    apply(fleet, action, name, share=share)
                    entry = LogEntry(fleet.sequence + 1, time.time(), actor, action, name, reason, share)
                    connection.execute(sa.insert(VERSION_LOG).values(**asdict(entry)))
                return entry
            except sa.exc.IntegrityError:
                if attempt == _APPEND_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def _try(self, mode: Mode, name: str, share: float, actor: str, reason: str) -> None:
        self.verify(name)
        self._append(lambda _: (mode, name), actor, reason, share)

    def _is_ready(self, name: str) -> bool:
        return (self._root / name / manifests.READY).exists()

    def _load(self, name: str, state: State) -> Version:
        path = self._root / name
        return Version(name, state, manifests.read(path), path)

    def _directories(self) -> list[Path]:
        return sorted(path for path in self._root.glob("policy-[0-9]*") if path.is_dir())

    def _of_round(self, round_id: int | None) -> Path | None:
        """Return the directory that this round has put into place already, with or without READY."""
        if round_id is None:
            return None
        for directory in self._directories():
            if manifests.read(directory).round_id == round_id:
                return directory
        return None

    def _place(
        self,
        staging: Path,
        *,
        parent: str | None,
        round_id: int | None,
        kind: str,
        details: Mapping[str, Any],
    ) -> Path:
        """Write the manifest and rename `staging` to the next free name; returns the version's directory."""
        staging = self._on_this_file_system(staging)
        files = manifests.digests(staging)
        if not files:
            raise ValueError(f"{staging} holds no files to publish")
        if (leftover := self._leftover(kind, parent, round_id, files)) is not None:
            shutil.rmtree(staging)
            return leftover
        name = self._next_name()
        manifests.write(
            staging,
            Manifest(
                name=name, parent=parent, round_id=round_id, kind=kind, files=files, details=dict(details)
            ),
        )
        manifests.sync_tree(staging)
        staging.rename(self._root / name)
        manifests.sync(self._root)
        return self._root / name

    def _next_name(self) -> str:
        # Names in the log count too: a version that was deleted from the disk keeps its name for itself.
        taken = [path.name for path in self._directories()] + list(self._fleet().states)
        return f"policy-{max((int(name.rpartition('-')[2]) for name in taken), default=-1) + 1:04d}"

    def _leftover(
        self, kind: str, parent: str | None, round_id: int | None, files: Mapping[str, str]
    ) -> Path | None:
        """Return a directory with exactly this content whose publication was killed before its log entry."""
        published = self._fleet().states
        for directory in self._directories():
            if directory.name not in published:
                there = manifests.read(directory)
                if (there.kind, there.parent, there.round_id, there.files) == (kind, parent, round_id, files):
                    return directory
        return None

    def _on_this_file_system(self, staging: Path) -> Path:
        """`staging` itself, or a copy below the root where a rename cannot reach it."""
        if not staging.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no checkpoint to publish", str(staging))
        if staging.stat().st_dev == self._root.stat().st_dev:
            return staging
        copy = self._root / ".incoming"
        shutil.rmtree(copy, ignore_errors=True)  # of a publication that was killed while it copied
        shutil.copytree(staging, copy, symlinks=True)
        return copy

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time below the root, over all processes; the kernel frees it when one is killed."""
        with (self._root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _report(connection: sa.Connection, replica: Replica) -> None:
    row = {**asdict(replica), "seen_at": time.time()}
    # A row has one writer, the replica itself, so this cannot race with another insert.
    changed = connection.execute(
        sa.update(REPLICAS).where(REPLICAS.c.id == replica.id).values(**row)
    ).rowcount
    if not changed:
        connection.execute(sa.insert(REPLICAS).values(**row))


def _still(fleet: Fleet, trial: Trial | None) -> None:
    """Raise IllegalTransition if `trial` was asked for and does not go on just as it was."""
    if trial is not None and fleet.trial != trial:
        raise IllegalTransition(f"the trial of {trial.version} is over or was changed meanwhile")
