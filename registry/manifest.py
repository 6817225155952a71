"""A version on disk: its directory's manifest, the digests of its files, and writes that survive a crash.

Owns file formats and durability. Which versions exist and what state they are in is `registry.registry`.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MANIFEST = "manifest.json"
READY = "READY"
_OURS = (MANIFEST, f"{MANIFEST}.partial", READY)


class BrokenVersion(Exception):  # noqa: N818
    """A version's files are not the ones that were published; the message names the file."""


class Manifest(BaseModel):
    """What a version is: where it comes from and the SHA-256 of every file.

    `parent` is the version that it was trained from, `round_id` the round that made it (None for a model
    that was brought in), `kind` how (`base`, `ppo`, …). `details` holds what its maker wants remembered (base
    model, dataset slice, config hash, seed); `metrics` and `verdict` are added after it was evaluated.
    `created_at` is in Unix seconds.
    """

    # A newer release's fields have to survive a rewrite by an older one.
    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    parent: str | None = None
    round_id: int | None = None
    kind: str
    created_at: float = Field(default_factory=time.time)
    files: dict[str, str]
    details: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    verdict: dict[str, Any] | None = None


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of each file under `directory` (relative POSIX path to hex), without the registry's own files.

    Raises ValueError for a symbolic link: a version has to be whole in its own directory.
    """
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link; a version must hold its own files")
        if path.is_file() and name not in _OURS:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check(directory: Path, manifest: Manifest) -> None:
    """Compare the files of `directory` with `manifest`; raises BrokenVersion naming the file."""
    found = digests(directory)
    for name, expected in manifest.files.items():
        if name not in found:
            raise BrokenVersion(f"{manifest.name}: {name} is missing")
        if found[name] != expected:
            raise BrokenVersion(f"{manifest.name}: {name} does not have the SHA-256 that was published")
    for name in found:
        if name not in manifest.files:
            raise BrokenVersion(f"{manifest.name}: {name} was not published with it")


def read(directory: Path) -> Manifest:
    """Return the manifest of the version in `directory`; raises BrokenVersion when it cannot be read."""
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise BrokenVersion(f"{directory.name}: {MANIFEST} cannot be read: {error}") from error


def write(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically: after a crash either the old or the new one is there, whole."""
    partial = directory / f"{MANIFEST}.partial"
    with partial.open("wb") as file:
        file.write(manifest.model_dump_json(indent=2).encode())
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / MANIFEST)
    sync(directory)


def rename_in(directory: Path, is_it: Callable[[str], bool], name: str) -> None:
    """Put `name` for every text that is the one into the manifest of the version in `directory`."""
    manifest = read(directory)
    changed = Manifest(**renamed(manifest.model_dump(), is_it, name))
    if changed != manifest:
        write(directory, changed)


def renamed(value: Any, is_it: Callable[[str], bool], name: str) -> Any:
    """Return the same JSON with `name` for every key and text that is the one."""
    if isinstance(value, Mapping):
        return {name if is_it(key) else key: renamed(item, is_it, name) for key, item in value.items()}
    if isinstance(value, list):
        return [renamed(item, is_it, name) for item in value]
    return name if isinstance(value, str) and is_it(value) else value


def mark_ready(directory: Path) -> None:
    """Write READY, from which on the version exists."""
    with (directory / READY).open("wb") as file:
        os.fsync(file.fileno())
    sync(directory)


def sync(path: Path) -> None:
    """Flush a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush everything under `directory` to the disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
