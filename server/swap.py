"""Makes a running replica serve the version that the registry wants, and proves what it then serves.

A version is verified on disk and fingerprinted before generation stops. Where the engine can hold it beside
the one in service, it is also loaded, read back and compared before, and the two are only exchanged while
requests are frozen; elsewhere it is loaded and compared then. Caches are dropped, requests go on, and a
greedy probe is compared with earlier ones. Whatever fails, requests go on: with the last good version, or, if
that can't be loaded either, with nobody let in until one can. Of the replicas of a track no more than some
swap at once. It does not choose versions: `registry` does.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import anyio.to_thread
from sqlalchemy.exc import SQLAlchemyError

from registry import proof
from registry.registry import STALE_SECONDS, BrokenVersion, Desired, Registry, Replica, Version
from server.metrics import ServerMetrics

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0

_PROOF = "engine_sha256_"
_PROBE = "engine_probe_"
_ROUNDING_NATS = 0.5
"""What other batches of bfloat16 may move a logprob by; other weights move it by more."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ProbeToken:
    """One token of a greedy answer: its logprob and by how much it beat the second best, both in nats."""

    id: int
    logprob: float
    margin: float


def answers_alike(known: Sequence[ProbeToken], found: Sequence[ProbeToken]) -> bool:
    """Whether two greedy answers to one prompt can be of one model, whose batches are rounded differently.

    The tokens are the same, with about the same logprobs, up to the first near tie that fell otherwise.
    """
    for one, other in zip(known, found, strict=True):
        if one.id != other.id:
            return max(one.margin, other.margin) < _ROUNDING_NATS
        if abs(one.logprob - other.logprob) > _ROUNDING_NATS:
            return False
    return True


class WeightEngine(Protocol):
    """What a swap needs of the engine; `server.engine.Engine` is the real one."""

    dtype: str
    topology: str
    ranks: int

    async def pause(self) -> None: ...  # noqa: D102
    async def resume(self) -> None: ...  # noqa: D102
    async def stage(self, model_dir: Path) -> dict[str, str] | None: ...  # noqa: D102
    async def exchange(self) -> None: ...  # noqa: D102
    async def unstage(self) -> None: ...  # noqa: D102
    async def load(self, model_dir: Path) -> None: ...  # noqa: D102
    async def fingerprint(self) -> dict[str, str]: ...  # noqa: D102
    async def probe(self) -> list[ProbeToken]: ...  # noqa: D102
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


@dataclass(frozen=True, slots=True)
class _Checked:
    """A version that was found whole on disk, with the fingerprint that an engine must have of it."""

    desired: Desired
    version: Version
    expected: Mapping[str, str]


def is_proven(version: Version) -> bool:
    """Whether an engine has held this version whole before, on any topology."""
    return any(key.startswith(_PROOF) for key in version.manifest.metrics)


class Swapper:
    """Watches the registry for one replica, `identity` of which is reported with every change of state.

    It follows the identity's track; `max_unavailable` replicas of a track swap at the same time.
    """

    def __init__(
        self,
        engine: WeightEngine,
        registry: Registry,
        metrics: ServerMetrics,
        identity: Replica,
        *,
        watch_seconds: float,
        retry_seconds: float,
        max_unavailable: int = 1,
        fingerprint_checkpoint: Callable[
            [Path, str, Collection[str]], dict[str, str]
        ] = proof.checkpoint_fingerprint,
        difference: Callable[[Path, Path], str | None] = proof.difference,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._metrics = metrics
        self._identity = identity
        self._watch_seconds = watch_seconds
        self._retry_seconds = retry_seconds
        self._max_unavailable = max_unavailable
        self._fingerprint_checkpoint = fingerprint_checkpoint
        self._difference = difference
        self._checked: _Checked | None = None
        self._reported: tuple[Replica, float] | None = None
        self._reporting = asyncio.Lock()
        self._at_rest = asyncio.Event()
        self._at_rest.set()
        # The engine's whole fingerprint while it holds `status.serving`, and the tensors in it that this
        # engine is known to keep exactly as a checkpoint's files have them.
        self._held: dict[str, str] = {}
        self._comparable: frozenset[str] = frozenset()
        self.status = Status(serving=identity.actual or "", proven=False)

    def obstacle(self) -> str | None:
        """Why generation must be refused, or None. That a swap is under way is no reason."""
        return None if self.status.proven else "the weights in memory are not those of any version"

    async def obstacle_at_rest(self) -> str | None:
        """Return the same once no swap is under way: what is asked for during one is answered after it."""
        await self._at_rest.wait()
        return self.obstacle()

    async def begin(self, version: Version) -> None:
        """Take stock of an engine that was started on `version`.

        Raises UnprovenWeights if an earlier start on it had other weights, ValueError for a NaN.
        """
        self._held = await self._engine.fingerprint()
        expected = await self._expected(version, self._held.keys())
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
        await self._probe(version)
        await self._engine.label(version.name)
        self.status = Status(serving=version.name)

    async def run(self) -> None:
        """Follow the registry until cancelled; a database that is away is waited for."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_repeat(self.step, self._watch_seconds))
            # Beside it: checking and loading a large version takes longer than a replica may be silent.
            group.create_task(_repeat(self._beat, HEARTBEAT_SECONDS))

    async def step(self) -> None:
        """Look once, swap if needed and allowed, and report."""
        desired = await _thread(self._registry.desired, self._identity.track)
        wanted = target(desired, self.status, now=time.monotonic(), retry_seconds=self._retry_seconds)
        waits = False
        if desired is not None and wanted is not None and (checked := await self._check(desired)) is not None:
            waits = not await self._begin(checked)
            if not waits:
                await self._swap(checked)
        failure = self.status.failure
        if waits:
            await self._report(desired, "serving", f"waiting for its turn to load {wanted}")
        elif failure is not None and desired is not None and desired.name != self.status.serving:
            await self._report(desired, "failed", failure.detail)
        elif not self.status.proven:
            await self._report(desired, "failed", self.obstacle() or "")
        else:
            await self._report(desired, "serving", "")

    async def stop(self) -> None:
        """Say that this replica serves no more."""
        await _thread(self._registry.report, replace(self._identity, actual=None, state="stopped"))

    async def _check(self, desired: Desired) -> _Checked | None:
        """Return the wanted version, found whole and fit for this engine; None if it is not, which is noted.

        It is done once each time that a version is wanted: a replica that waits its turn does not repeat it.
        """
        if self._checked is not None and self._checked.desired == desired:
            return self._checked
        try:
            version = await _thread(self._registry.version, desired.name)
            # Hashing every file also brings the checkpoint into memory, so that loading it is quick.
            await _thread(self._registry.verify, desired.name)
            expected = await self._expected(version, self._comparable)
            await self._require_fit(version, expected)
        except (BrokenVersion, KeyError, OSError, ValueError, UnprovenWeights) as error:
            self._failed(desired, error)
            return None
        self._checked = _Checked(desired, version, expected)
        return self._checked

    async def _require_fit(self, version: Version, expected: Mapping[str, str]) -> None:
        """Raise UnprovenWeights for a model of another architecture, or one that lacks a tensor."""
        held = await _thread(self._registry.version, self.status.serving)
        found = await _thread(self._difference, held.path, version.path)
        if found is not None:
            raise UnprovenWeights(f"{version.name} is not the model that this engine was built for: {found}")
        if missing := sorted(self._comparable - expected.keys()):
            raise UnprovenWeights(f"{version.name} lacks {missing[0]}")

    async def _begin(self, checked: _Checked) -> bool:
        """Take this replica's turn; False if others have it. One that serves nobody needs none."""
        replica = self._replica(checked.desired, "swapping", f"loading {checked.version.name}")
        if not self.status.proven:
            await self._send(replica)
            return True
        async with self._reporting:
            begun = await _thread(self._registry.begin_swap, replica, self._max_unavailable, STALE_SECONDS)
            if begun:
                self._reported = (replica, time.monotonic())
        return begun

    async def _swap(self, checked: _Checked) -> None:
        # When it is wanted anew, it is looked at anew.
        self._checked = None
        before, held = self.status, self._held
        try:
            staged = await self._stage(checked)
        except (ValueError, UnprovenWeights) as error:
            await self._engine.unstage()
            self._failed(checked.desired, error)
            return
        started = time.monotonic()
        async with self._paused():
            await self._replace(checked, staged)
        seconds = time.monotonic() - started
        await self._engine.unstage()
        self._metrics.swap_seconds.observe(seconds)
        self.status = replace(self.status, last_swap_seconds=seconds)
        if self.status.proven and self.status.serving == checked.version.name:
            await self._keep_if_it_answers_as_before(checked, before, held)

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Hold what is generated and what is asked for meanwhile until the weights are a version's again."""
        self._at_rest.clear()
        try:
            await self._engine.pause()
            try:
                yield
            finally:
                await self._engine.resume()
        finally:
            self._at_rest.set()

    async def _stage(self, checked: _Checked) -> dict[str, str] | None:
        """Prove a version beside the weights in service; None if the engine has to load it in their place.

        An engine that keeps some tensor otherwise than the checkpoint's files (quantised, divided) has to.
        """
        if not self.status.proven or self._held.keys() != self._comparable:
            return None
        staged = await self._engine.stage(checked.version.path)
        if staged is not None:
            await self._prove(checked, staged)
        return staged

    async def _keep_if_it_answers_as_before(
        self, checked: _Checked, before: Status, held: dict[str, str]
    ) -> None:
        """Go back to `before`, when the engine had `held`, if the probe is answered otherwise than earlier.

        It takes a running engine, so it comes after the proof of the weights, not in its place: it sees what
        is no weight, such as a wrong setting or keys and values of other weights.
        """
        try:
            await self._probe(checked.version)
            return
        except UnprovenWeights as error:
            self._failed(checked.desired, error)
        failure, self._held = self.status.failure, held
        async with self._paused():
            await self._go_back(before)
        self.status = replace(self.status, failure=failure)

    async def _replace(self, checked: _Checked, staged: dict[str, str] | None) -> None:
        """Put a version into the paused engine, or go back to what it held."""
        before, version = self.status, checked.version
        try:
            if staged is not None:
                await self._engine.exchange()
                held = staged
            else:
                await self._engine.load(version.path)
                held = await self._engine.fingerprint()
                await self._prove(checked, held)
            await self._settle(version.name)
        # Whatever vLLM raises, the weights may now be mixed: the answer is always to go back.
        except Exception as error:
            logger.exception("%s could not be loaded", version.name)
            await self._go_back(before)
            self._failed(checked.desired, error)
            return
        self._held = held
        self.status = Status(serving=version.name)
        self._metrics.swaps.labels("done").inc()
        logger.info("now serving %s", version.name)

    async def _go_back(self, before: Status) -> None:
        # Nobody may be answered by mixed weights: this closes the door until a version loads.
        self.status = replace(before, proven=False)
        if not before.proven:
            return
        try:
            version = await _thread(self._registry.version, before.serving)
            await self._engine.load(version.path)
            self._require_same(await self._engine.fingerprint(), self._held)
            await self._settle(version.name)
        except Exception:
            logger.exception("%s could not be restored", before.serving)
            return
        self.status = before

    async def _prove(self, checked: _Checked, held: Mapping[str, str]) -> None:
        """Require the tensors of the files, and those of earlier loads. Raises UnprovenWeights."""
        self._require_same(held, {name: checked.expected.get(name) for name in self._comparable})
        await self._compare_with_past(checked.version, held)

    async def _probe(self, version: Version) -> None:
        """Require the answer to a fixed prompt that the version gave before on the same topology, about.

        Raises UnprovenWeights.
        """
        key = f"{_PROBE}{self._engine.topology}"
        found = await self._engine.probe()
        if not all(math.isfinite(token.logprob) for token in found):
            raise UnprovenWeights(f"{version.name} answers with probabilities that are no numbers")
        known = version.manifest.metrics.get(key)
        if known is None:
            await _thread(
                self._registry.annotate, version.name, metrics={key: [asdict(one) for one in found]}
            )
        elif not answers_alike([ProbeToken(**one) for one in known], found):
            raise UnprovenWeights(f"{version.name} answers in another way than when it was loaded before")

    async def _settle(self, name: str) -> None:
        await self._engine.reset_caches()
        await self._engine.label(name)

    async def _expected(self, version: Version, names: Collection[str]) -> dict[str, str]:
        return await _thread(self._fingerprint_checkpoint, version.path, self._engine.dtype, names)

    async def _compare_with_past(self, version: Version, held: Mapping[str, str]) -> None:
        """Require the same tensors of a version each time that it is loaded, on the same topology."""
        key = f"{_PROOF}{self._engine.topology}"
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
        """Tell the registry what has changed."""
        replica = self._replica(desired, state, detail)
        if self._reported is None or self._reported[0] != replica:
            await self._send(replica)

    async def _beat(self) -> None:
        """Say again what was said last, if that is some time ago: this replica is alive."""
        if self._reported is not None and time.monotonic() > self._reported[1] + HEARTBEAT_SECONDS / 2:
            await self._send()

    async def _send(self, replica: Replica | None = None) -> None:
        """Write a report down, without one the last. One after the other, so that the newest stands."""
        async with self._reporting:
            if replica is None and self._reported is not None:
                replica = self._reported[0]
            if replica is not None:
                await _thread(self._registry.report, replica)
                self._reported = (replica, time.monotonic())

    def _replica(self, desired: Desired | None, state: str, detail: str) -> Replica:
        return replace(
            self._identity,
            desired=desired.name if desired else None,
            actual=self.status.serving if self.status.proven else None,
            state=state,
            detail=detail,
            last_swap_seconds=self.status.last_swap_seconds,
        )


async def _repeat(action: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        try:
            await action()
        except SQLAlchemyError as error:
            logger.error("the registry can't be read: %s", error)
        await asyncio.sleep(seconds)


async def _thread(function: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    return await anyio.to_thread.run_sync(partial(function, *arguments, **options))
