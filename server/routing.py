"""Which replica answers a request while a version is on trial: its arm, the way to a peer, and copies.

It owns the look at the trial and at the other replicas, which is at most a watch interval old, and the HTTP
between replicas. What is on trial, and how it ends, is `registry`'s affair; who may ask is decided in
`server.middleware`.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import anyio.to_thread
import httpx
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from registry.registry import STALE_SECONDS, Replica, Track, Trial
from server.context import end_user
from server.identity import Errand, Identity
from server.metrics import ServerMetrics

logger = logging.getLogger(__name__)

ERRAND_HEADER = "x-instructloop-errand"
"""Says that a replica sends this request, and why, under a MAC of the secret that replicas share."""

_CONNECT_SECONDS = 2.0
_AWAY_SECONDS = 5.0
_UNAVAILABLE = 503
# Of one connection, or written anew by the peer's client; `origin` is answered by the replica that was asked.
_NOT_PASSED_ON = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
    b"host content-length origin x-request-id".split()
) | {ERRAND_HEADER.encode()}
_NOT_PASSED_BACK = frozenset(b"connection keep-alive transfer-encoding trailer upgrade date server".split())


class TrialBook(Protocol):
    """Where a trial and the replicas are looked up: `registry.registry.Registry`. Both may block."""

    def trial(self) -> Trial | None: ...  # noqa: D102
    def replicas(self) -> Sequence[Replica]: ...  # noqa: D102


class PeerLost(RuntimeError):  # noqa: N818
    """A peer went away in the middle of its answer: what the client has of it is not all."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for text that came through the gate: what is passed on of it, and what decides its arm."""

    path: str
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes
    key_id: str
    user: str | None
    continues: bool

    @classmethod
    def of(cls, scope: Scope, body: bytes, fields: Mapping[str, Any], key_id: str) -> "Asked":
        """Read it from an ASGI scope and a body with its `fields`."""
        continues = fields.get("previous_response_id") is not None
        return cls(scope["path"], scope["headers"], body, key_id, end_user(fields), continues)


def chosen(trial: Trial, key_id: str, user: str | None) -> bool:
    """Whether the share of `trial` takes in this end user; without one, the key counts as one.

    The same user is always in or out of the trial of a version, and a greater share keeps those it had.
    """
    text = "\0".join((trial.version, key_id, user or ""))
    drawn = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return drawn < trial.share * 2.0**64


def arm_of(trial: Trial | None, key_id: str, user: str | None) -> Track | None:
    """Return the track that is to answer; None while there is no trial. A shadow never answers."""
    if trial is None:
        return None
    return "trial" if trial.mode == "canary" and chosen(trial, key_id, user) else "stable"


def peers_of(
    replicas: Sequence[Replica], trial: Trial, arm: Track, *, own_id: str, now: float
) -> list[Replica]:
    """Find the replicas that can answer for `arm`: alive, not this one, and with that arm's weights.

    `now` is in Unix seconds.
    """
    return [
        replica
        for replica in replicas
        if replica.track == arm
        and replica.id != own_id
        and replica.url
        and replica.actual is not None
        and (replica.actual == trial.version) == (arm == "trial")
        and replica.state not in ("starting", "stopped")
        and now - replica.seen_at < STALE_SECONDS
    ]


class Router:
    """Sends requests of the other arm to a peer, and copies to a shadow's replica.

    `copies` bounds the copies under way at once.
    """

    def __init__(
        self,
        book: TrialBook,
        identity: Identity,
        metrics: ServerMetrics,
        *,
        replica_id: str,
        track: Track,
        watch_seconds: float,
        copies: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._book = book
        self._identity = identity
        self._metrics = metrics
        self._replica_id = replica_id
        self._track = track
        self._watch_seconds = watch_seconds
        self._limit = copies
        self._trial: Trial | None = None
        self._replicas: Sequence[Replica] = ()
        self._away: dict[str, float] = {}
        self._copies: set[asyncio.Task[None]] = set()
        # How long an answer takes is the client's affair: it hangs up when it has waited enough.
        self._client = httpx.AsyncClient(
            transport=transport,
            headers={"Accept-Encoding": "identity"},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=4.0),
            trust_env=False,
        )

    async def run(self) -> None:
        """Look every watch interval, until cancelled."""
        try:
            while True:
                try:
                    await self.look()
                except SQLAlchemyError as error:
                    logger.error("the registry can't be read: %s", error)
                await asyncio.sleep(self._watch_seconds)
        finally:
            for task in self._copies:
                task.cancel()
            await self._client.aclose()

    async def look(self) -> None:
        """See what is on trial and who could answer for it."""
        trial = await anyio.to_thread.run_sync(self._book.trial)
        if trial is not None:
            self._replicas = await anyio.to_thread.run_sync(self._book.replicas)
        self._trial = trial

    async def answered(self, asked: Asked, receive: Receive, send: Send) -> bool:
        """Let a peer answer, if the request belongs to the other arm; False if it is to be answered here.

        Raises PeerLost if the peer went away in the middle of its answer.
        """
        trial = self._trial
        arm = arm_of(trial, asked.key_id, asked.user)
        if trial is None or arm is None:
            return False
        if arm == self._track:
            self._routed(arm, "here")
            return False
        for peer in self._peers(trial, arm, asked):
            if await self._while_wanted(self._relay(peer, asked, send), receive):
                self._routed(arm, "peer")
                return True
        self._routed(arm, "no_peer")
        return False

    def hidden(self) -> str | None:
        """Why this replica must not answer anybody itself, or None: what a shadow says nobody sees."""
        if self._track == "trial" and self._trial is not None and self._trial.mode == "shadow":
            return "this replica has the weights of a shadow, and no other replica answers"
        return None

    def copy(self, asked: Asked) -> None:
        """Send a copy to a shadow's replica, if there is one, its share takes this in, and there is room.

        Returns at once; what becomes of the copy nobody waits for.
        """
        trial = self._trial
        if trial is None or trial.mode != "shadow" or self._track != "stable":
            return
        # What an answer goes on from, the shadow has not.
        if asked.continues or not chosen(trial, asked.key_id, asked.user):
            return
        peers = self._peers(trial, "trial", asked)
        if not peers or len(self._copies) >= self._limit:
            self._metrics.shadow_copies.labels("dropped" if peers else "no_peer").inc()
            return
        task = asyncio.create_task(self._send_copy(peers[0], asked))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    def _peers(self, trial: Trial, arm: Track, asked: Asked) -> list[Replica]:
        """List the peers to try, in the order that is this end user's: it meets the same caches again."""
        found = peers_of(self._replicas, trial, arm, own_id=self._replica_id, now=time.time())

        def weight(peer: Replica) -> bytes:
            text = f"{peer.id}\0{asked.key_id}\0{asked.user or ''}"
            return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

        now = time.monotonic()
        return sorted((peer for peer in found if self._away.get(peer.id, 0.0) <= now), key=weight)

    async def _while_wanted(self, work: Any, receive: Receive) -> bool:
        """Await `work`, but give it up when the client hangs up: the peer then stops generating too."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            # A client that has gone has been answered, as far as it wanted to be.
            return working.result() if working.done() else True
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _relay(self, peer: Replica, asked: Asked, send: Send) -> bool:
        """Send the request on and its answer back, piece by piece; False if the peer can't answer it."""
        begun = False
        try:
            async with self._stream(peer, asked, "serve") as response:
                if response.status_code == _UNAVAILABLE or (asked.continues and response.status_code == 404):
                    # It can't generate now, or it is not the replica that gave the response to go on from.
                    return False
                begun = True
                headers = [(k.lower(), v) for k, v in response.headers.raw]
                headers = [(k, v) for k, v in headers if k not in _NOT_PASSED_BACK]
                await send(
                    {"type": "http.response.start", "status": response.status_code, "headers": headers}
                )
                async for piece in response.aiter_raw():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
                return True
        except httpx.TransportError as error:
            self._lost(peer, error)
            if begun:
                raise PeerLost(f"{peer.id} went away in the middle of an answer") from error
            return False

    async def _send_copy(self, peer: Replica, asked: Asked) -> None:
        try:
            async with self._stream(peer, asked, "shadow") as response:
                async for _ in response.aiter_raw():
                    pass
            outcome = "sent" if response.status_code < 400 else "refused"
        except httpx.TransportError as error:
            self._lost(peer, error)
            outcome = "lost"
        self._metrics.shadow_copies.labels(outcome).inc()

    def _stream(self, peer: Replica, asked: Asked, errand: Errand) -> Any:
        headers = [(k, v) for k, v in asked.headers if k not in _NOT_PASSED_ON]
        seal = self._identity.seal(errand, asked.key_id, asked.path, asked.body)
        headers.append((ERRAND_HEADER.encode(), seal.encode()))
        return self._client.stream("POST", f"{peer.url}{asked.path}", headers=headers, content=asked.body)

    def _lost(self, peer: Replica, error: Exception) -> None:
        logger.warning("replica %s does not answer: %s", peer.id, str(error) or type(error).__name__)
        self._away[peer.id] = time.monotonic() + _AWAY_SECONDS

    def _routed(self, arm: Track, where: Literal["here", "peer", "no_peer"]) -> None:
        self._metrics.routed.labels(arm, where).inc()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
