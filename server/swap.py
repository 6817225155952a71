"""Makes a running replica serve the version that the registry wants, and proves what it then serves.

A version is verified on disk and fingerprinted before generation stops. Where the engine can hold it beside
the one in service, it is also loaded, read back and compared before, and the two are only exchanged while
requests are frozen; elsewhere it is loaded and compared then. Caches are dropped and requests go on, whatever
fails: with the last good version, or, if that can't be loaded either, with nobody let in until one can.
It does not choose versions: `registry` does.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio.to_thread
from sqlalchemy.exc import SQLAlchemyError

from registry import proof
from registry.registry import BrokenVersion, Desired, Registry, Replica, Version
from server.metrics import ServerMetrics

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
_T = TypeVar("_T")


class WeightEngine(Protocol):
    """What a swap needs of the engine; `server.engine.Engine` is the real one."""

    dtype: str
    topology: str
    ranks: int

    async def pause(self) -> None: ...  # noqa: D102
    async def resume(self) -> None: ...  # noqa: D102
    async def check(self, model_dir: Path) -> None: ...  # noqa: D102
    async def stage(self, model_dir: Path) -> dict[str, str] | None: ...  # noqa: D102
    async def exchange(self) -> None: ...  # noqa: D102
    async def unstage(self) -> None: ...  # noqa: D102
    async def load(self, model_dir: Path) -> None: ...  # noqa: D102
    async def fingerprint(self) -> dict[str, str]: ...  # noqa: D102
    async def reset_caches(self) -> None: ...  # noqa: D102
    async def label(self, version: str) -> None: ...  # noqa: D102


class UnprovenWeights(Exception):  # noqa: N818
    """The engine does not hold the weights that it was told to load; the message names a tensor."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A version that could not be loaded, as the registry wanted it at `sequence`."""

    sequence: int
    at: float
    detail: str


@dataclass(frozen=True, slots=True)
class Status:
    """What this replica serves. `proven` is False while the weights in memory are not a whole version's."""

    serving: str
    proven: bool = True
    failure: Failure | None = None
    last_swap_seconds: float | None = None


def target(desired: Desired | None, status: Status, *, now: float, retry_seconds: float) -> str | None:
    """Decide which version to load now, or None to stay: the wanted one, unless it has just failed.

    A failed version is tried again when `retry_seconds` have passed or an operator has wanted it anew.
    Times are of one monotonic clock, in seconds.
    """
    if desired is None or (desired.name == status.serving and status.proven):
        return None
    failure = status.failure
    if failure is not None and failure.sequence == desired.sequence and now < failure.at + retry_seconds:
        return None
    return desired.name


class Swapper:
    """Watches the registry for one replica, `identity` of which is reported with every change of state."""

    def __init__(
        self,
        engine: WeightEngine,
        registry: Registry,
        metrics: ServerMetrics,
        identity: Replica,
        *,
        watch_seconds: float,
        retry_seconds: float,
        fingerprint_checkpoint: Callable[[Path, str], dict[str, str]] = proof.checkpoint_fingerprint,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._metrics = metrics
        self._identity = identity
        self._watch_seconds = watch_seconds
        self._retry_seconds = retry_seconds
        self._fingerprint_checkpoint = fingerprint_checkpoint
        self._reported: tuple[Replica, float] | None = None
        # The engine's whole fingerprint while it holds `status.serving`, and the tensors in it that this
        # engine is known to keep exactly as a checkpoint's files have them.
        self._held: dict[str, str] = {}
        self._comparable: frozenset[str] = frozenset()
        self.status = Status(serving=identity.actual or "", proven=False)

    def obstacle(self) -> str | None:
        """Why generation must be refused, or None."""
        return None if self.status.proven else "the weights in memory are not those of any version"

    async def begin(self, version: Version) -> None:
        """Take stock of an engine that was started on `version`.

        Raises UnprovenWeights if an earlier start on it had other weights, ValueError for a NaN.
        """
        self._held = await self._engine.fingerprint()
        expected = await self._expected(version)
        self._comparable = frozenset(
            name
            for name, value in self._held.items()
            if self._engine.ranks == 1 and expected.get(name) == value
        )
        logger.info(
            "%s: %d of %d tensors in the engine are proven by the checkpoint's files; not: %s",
            version.name,
            len(self._comparable),
            len(self._held),
            ", ".join(sorted(self._held.keys() - self._comparable)[:5]) or "none",
        )
        await self._compare_with_past(version, self._held)
        await self._engine.label(version.name)
        self.status = Status(serving=version.name)

    async def run(self) -> None:
        """Follow the registry until cancelled; a database that is away is waited for."""
        while True:
            try:
                await self.step()
            except SQLAlchemyError as error:
                logger.error("the registry can't be read: %s", error)
            await asyncio.sleep(self._watch_seconds)

    async def step(self) -> None:
        """Look once, swap if needed, and report."""
        desired = await _thread(self._registry.desired)
        wanted = target(desired, self.status, now=time.monotonic(), retry_seconds=self._retry_seconds)
        if desired is not None and wanted is not None:
            await self._report(desired, "swapping", f"loading {wanted}")
            await self._swap(desired)
        failure = self.status.failure
        if failure is not None and desired is not None and desired.name != self.status.serving:
            await self._report(desired, "failed", failure.detail)
        elif not self.status.proven:
            await self._report(desired, "failed", self.obstacle() or "")
        else:
            await self._report(desired, "serving", "")

    async def stop(self) -> None:
        """Say that this replica serves no more."""
        await _thread(self._registry.report, replace(self._identity, actual=None, state="stopped"))

    async def _swap(self, desired: Desired) -> None:
        try:
            version = await _thread(self._registry.version, desired.name)
            # Hashing every file also brings the checkpoint into memory, so that loading it is quick.
            await _thread(self._registry.verify, desired.name)
            await self._engine.check(version.path)
            expected = await self._expected(version)
            self._require_complete(version, expected)
            staged = await self._stage(version, expected)
        except (BrokenVersion, KeyError, OSError, ValueError, UnprovenWeights) as error:
            await self._engine.unstage()
            self._failed(desired, error)
            return
        started = time.monotonic()
        await self._engine.pause()
        try:
            await self._replace(desired, version, expected, staged)
        finally:
            await self._engine.resume()
        seconds = time.monotonic() - started
        await self._engine.unstage()
        self._metrics.swap_seconds.observe(seconds)
        self.status = replace(self.status, last_swap_seconds=seconds)

    async def _stage(self, version: Version, expected: Mapping[str, str]) -> dict[str, str] | None:
        """Prove `version` beside the weights in service; None if the engine has to load it in their place.

        An engine that keeps some tensor otherwise than the checkpoint's files (quantised, divided) has to.
        """
        if not self.status.proven or self._held.keys() != self._comparable:
            return None
        staged = await self._engine.stage(version.path)
        if staged is not None:
            await self._prove(version, staged, expected)
        return staged

    async def _replace(
        self,
        desired: Desired,
        version: Version,
        expected: Mapping[str, str],
        staged: dict[str, str] | None,
    ) -> None:
        """Put `version` into the paused engine, or go back to what it held."""
        before = self.status
        self.status = replace(before, proven=False)
        try:
            if staged is not None:
                await self._engine.exchange()
                held = staged
            else:
                await self._engine.load(version.path)
                held = await self._engine.fingerprint()
                await self._prove(version, held, expected)
            await self._settle(version.name)
        # Whatever vLLM raises, the weights may now be mixed: the answer is always to go back.
        except Exception as error:
            logger.exception("%s could not be loaded", version.name)
            await self._go_back(before)
            self._failed(desired, error)
            return
        self._held = held
        self.status = Status(serving=version.name)
        self._metrics.swaps.labels("done").inc()
        logger.info("now serving %s", version.name)

    async def _go_back(self, before: Status) -> None:
        if not before.proven:
            return
        try:
            version = await _thread(self._registry.version, before.serving)
            await self._engine.load(version.path)
            self._require_same(await self._engine.fingerprint(), self._held)
            await self._settle(version.name)
        except Exception:
            # Nobody may be answered by mixed weights: `obstacle` closes the door until a version loads.
            logger.exception("%s could not be restored", before.serving)
            return
        self.status = before

    async def _prove(self, version: Version, held: Mapping[str, str], expected: Mapping[str, str]) -> None:
        """Require the tensors of the files, and those of earlier loads. Raises UnprovenWeights."""
        self._require_same(held, {name: expected.get(name) for name in self._comparable})
        await self._compare_with_past(version, held)

    def _require_complete(self, version: Version, expected: Mapping[str, str]) -> None:
        """Refuse a checkpoint that lacks what the engine holds. Raises ValueError naming a tensor."""
        missing = self._comparable - expected.keys()
        if missing:
            raise ValueError(f"{version.name} lacks {min(missing).removesuffix('#columns')}")

    async def _settle(self, name: str) -> None:
        await self._engine.reset_caches()
        await self._engine.label(name)

    async def _expected(self, version: Version) -> dict[str, str]:
        return await _thread(self._fingerprint_checkpoint, version.path, self._engine.dtype)

    async def _compare_with_past(self, version: Version, held: Mapping[str, str]) -> None:
        """Require the same tensors of a version each time that it is loaded, on the same topology."""
        key = f"engine_sha256_{self._engine.topology}"
        found = proof.digest(held)
        known = version.manifest.metrics.get(key)
        if known is None:
            await _thread(self._registry.annotate, version.name, metrics={key: found})
        elif known != found:
            raise UnprovenWeights(f"{version.name} gave other weights when it was loaded before")

    @staticmethod
    def _require_same(held: Mapping[str, str], expected: Mapping[str, str | None]) -> None:
        for name, value in expected.items():
            if held.get(name) != value:
                raise UnprovenWeights(f"{name} in the engine is not that of the checkpoint")

    def _failed(self, desired: Desired, error: Exception) -> None:
        detail = f"{desired.name}: {error}" if desired.name not in str(error) else str(error)
        logger.error("not served: %s", detail)
        self._metrics.swaps.labels("failed").inc()
        self.status = replace(self.status, failure=Failure(desired.sequence, time.monotonic(), detail))

    async def _report(self, desired: Desired | None, state: str, detail: str) -> None:
        """Tell the registry what changed; without a change, only that this replica is alive."""
        replica = replace(
            self._identity,
            desired=desired.name if desired else None,
            actual=self.status.serving if self.status.proven else None,
            state=state,
            detail=detail,
            last_swap_seconds=self.status.last_swap_seconds,
        )
        now = time.monotonic()
        if self._reported is not None:
            known, at = self._reported
            if known == replica and now < at + HEARTBEAT_SECONDS:
                return
        await _thread(self._registry.report, replica)
        self._reported = (replica, now)


async def _thread(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    return await anyio.to_thread.run_sync(partial(function, *arguments, **options))
