"""What the command line lists: versions, rounds and keys as rows of text, a header first."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feedback.keys import Keys
    from registry.registry import Registry
    from registry.rounds import Rounds

Rows = list[tuple[str, ...]]


def versions(registry: "Registry") -> Rows:
    """Every version with its state, origin and verdict, then which replicas serve what."""
    serving: dict[str, int] = {}
    for replica in registry.replicas():
        if replica.actual and replica.state == "serving":
            serving[replica.actual] = serving.get(replica.actual, 0) + 1
    rows: Rows = [("VERSION", "STATE", "PARENT", "ROUND", "KIND", "VERDICT", "REPLICAS")]
    for version in registry.versions():
        manifest = version.manifest
        verdict = manifest.verdict or {}
        rows.append(
            (
                version.name,
                version.state,
                manifest.parent or "-",
                "-" if manifest.round_id is None else str(manifest.round_id),
                manifest.kind,
                {True: "promote", False: "keep out"}.get(verdict.get("promote"), "-"),  # type: ignore[arg-type]
                str(serving.get(version.name, 0)),
            )
        )
    return rows


def rounds(rounds: "Rounds") -> Rows:
    """Every round with what it learned from, where it stands and what came of it."""
    rows: Rows = [("ROUND", "STATE", "STAGE", "EVENTS", "STARTED", "TOOK", "VERSION", "ERROR")]
    for round_ in rounds.list():
        ended = round_.ended_at or time.time()
        took = "-" if round_.started_at is None else f"{(ended - round_.started_at) / 60:.1f} min"
        span = "-" if round_.cutoff is None else f"{round_.cursor}..{round_.cutoff}"
        rows.append(
            (
                str(round_.id),
                round_.state,
                round_.stage or "-",
                span,
                _when(round_.started_at),
                took,
                round_.version or "-",
                (round_.error or "").splitlines()[0] if round_.error else "",
            )
        )
    return rows


def keys(keys: "Keys") -> Rows:
    """Every key without its secret."""
    rows: Rows = [("ID", "ROLE", "NAME", "MADE", "REVOKED")]
    for key in keys.list():
        rows.append((key.id, key.role, key.name, _when(key.created_at), _when(key.revoked_at)))
    return rows


def _when(at: float | None) -> str:
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
