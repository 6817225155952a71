"""The demo's HTTP client: asks for completions, gives feedback, follows rounds, as any client would.

Owns the requests, their retries and a bound on how many run at once. What to ask is `instructloop.demo`'s.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import httpx

_GENERATION_SECONDS = 600.0
_RETRY_SECONDS = 90.0

Item = TypeVar("Item")
Result = TypeVar("Result")


class DemoProblem(RuntimeError):  # noqa: N818
    """The demo cannot go on; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One completion: its id and its choices' texts, in order, with why each ended."""

    completion_id: str
    texts: tuple[str, ...]
    finish_reasons: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """What became of one streamed request of `expected_tokens` tokens, as its client saw it."""

    completion_id: str | None
    pieces: int
    finish_reason: str | None
    tokens: int | None
    expected_tokens: int
    error: str | None

    @property
    def cut(self) -> bool:
        """Whether it ended without an error and yet not as a whole."""
        return self.error is None and (self.finish_reason != "length" or self.tokens != self.expected_tokens)


class Server:
    """A running `instructloop up` at `base_url`; use it as an async context manager."""

    def __init__(self, base_url: str, client_key: str, operator_key: str, *, concurrency: int) -> None:
        self._client_key = client_key
        self._operator_key = operator_key
        self._turns = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(
            base_url=base_url, timeout=_GENERATION_SECONDS, limits=httpx.Limits(max_connections=100)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def check(self) -> str:
        """Return the version in service. Raises DemoProblem where no server answers or it isn't ready."""
        try:
            response = await self._http.get("/ready", timeout=15)
        except httpx.TransportError as error:
            raise DemoProblem(
                f"no server answers at {self._http.base_url}: start `instructloop up` first"
            ) from error
        if response.status_code != 200:
            raise DemoProblem(f"the server is not ready: {response.text}")
        return str(response.json()["version"])

    async def ask(self, text: str, *, n: int, temperature: float, max_tokens: int, seed: int) -> Answer:
        """Send one instruction as a chat and return its `n` answers."""
        body = {
            "model": "policy",
            "messages": [{"role": "user", "content": text}],
            "n": n,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        async with self._turns:
            found = (await self._send("POST", "/v1/chat/completions", self._client_key, body)).json()
        choices = sorted(found["choices"], key=lambda choice: choice["index"])
        return Answer(
            found["id"],
            tuple(choice["message"]["content"] or "" for choice in choices),
            tuple(choice["finish_reason"] for choice in choices),
        )

    async def stream(self, text: str, *, max_tokens: int) -> Stream:
        """Stream one long answer of exactly `max_tokens` tokens and note how it ended. Never retried."""
        body = {
            "model": "policy",
            "messages": [{"role": "user", "content": text}],
            "temperature": 1.0,
            "max_tokens": max_tokens,
            "ignore_eos": True,  # every stream has the same known length, so that a cut one shows
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        completion_id, pieces, reason, tokens, ended = None, 0, None, None, False
        try:
            async with self._http.stream(
                "POST", "/v1/chat/completions", json=body, headers=_bearer(self._client_key)
            ) as response:
                response.raise_for_status()
                completion_id = response.headers["X-Completion-Id"]
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        ended = True
                        break
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise DemoProblem(str(chunk["error"]))
                    for choice in chunk["choices"]:
                        pieces += bool(choice["delta"].get("content"))
                        reason = choice["finish_reason"] or reason
                    if chunk.get("usage"):
                        tokens = chunk["usage"]["completion_tokens"]
        except (httpx.HTTPError, DemoProblem, ValueError, KeyError) as error:
            return Stream(
                completion_id, pieces, reason, tokens, max_tokens, f"{type(error).__name__}: {error}"
            )
        return Stream(
            completion_id, pieces, reason, tokens, max_tokens, None if ended else "the stream had no end"
        )

    async def give(self, event: Mapping[str, Any]) -> str:
        """Give one feedback event and return its id; retries are the same event."""
        key = str(uuid.uuid4())
        async with self._turns:
            response = await self._send("POST", "/v1/feedback", self._client_key, event, idempotency_key=key)
        return str(response.json()["event_id"])

    async def receipt(self, event_id: str) -> dict[str, Any]:
        """Return what became of an event."""
        async with self._turns:
            return await self._read(f"/v1/feedback/{event_id}", self._client_key)

    async def completion(self, completion_id: str) -> dict[str, Any] | None:
        """Return a completion's record, None while it is not stored yet."""
        async with self._turns:
            response = await self._send(
                "GET", f"/v1/completions/{completion_id}", self._operator_key, missing=True
            )
        return None if response.status_code == 404 else dict(response.json())

    async def request_round(self) -> int:
        """Ask for a training round and return its id."""
        return int((await self._send("POST", "/v1/rounds", self._operator_key)).json()["id"])

    async def round(self, round_id: int) -> dict[str, Any]:
        """Return a round with its figures so far."""
        return await self._read(f"/v1/rounds/{round_id}", self._operator_key)

    async def versions(self) -> list[dict[str, Any]]:
        """Return all versions, oldest first."""
        return list((await self._read("/v1/versions", self._operator_key))["versions"])

    async def replicas(self) -> list[dict[str, Any]]:
        """Return what each replica says of itself."""
        return list((await self._read("/v1/replicas", self._operator_key))["replicas"])

    async def _read(self, path: str, key: str) -> dict[str, Any]:
        return dict((await self._send("GET", path, key)).json())

    async def _send(
        self,
        method: str,
        path: str,
        key: str,
        body: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        missing: bool = False,
    ) -> httpx.Response:
        """Send a request; while the server is away or answers 503 try again, for a minute and a half.

        Raises DemoProblem for any other refusal; a 404 is returned where `missing` allows it.
        """
        headers = _bearer(key) | ({"Idempotency-Key": idempotency_key} if idempotency_key else {})
        deadline = asyncio.get_running_loop().time() + _RETRY_SECONDS
        while True:
            trouble: str
            pause = 2.0
            try:
                response = await self._http.request(method, path, json=body, headers=headers)
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if response.status_code < 400 or (missing and response.status_code == 404):
                    return response
                trouble = f"{response.status_code} {response.text[:500]}"
                if response.status_code != 503:
                    raise DemoProblem(f"{method} {path} was refused: {trouble}")
                with contextlib.suppress(ValueError):
                    pause = float(response.headers.get("Retry-After", pause))
            if asyncio.get_running_loop().time() + pause > deadline:
                raise DemoProblem(f"{method} {path} failed for {_RETRY_SECONDS:.0f} s: {trouble}")
            await asyncio.sleep(pause)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def each(
    items: Sequence[Item], work: Callable[[Item], Awaitable[Result]], done: Callable[[int], None]
) -> list[Result]:
    """Do `work` on all items at once, within the server's bound, and call `done` with the count so far.

    Results stand in the order of the items. The first failure ends the others and is raised.
    """
    finished = 0

    async def one(item: Item) -> Result:
        nonlocal finished
        result = await work(item)
        finished += 1
        done(finished)
        return result

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
