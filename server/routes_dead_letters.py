"""HTTP routes for operators: queue entries that could not be stored, to be fixed, replayed or dropped.

What may become of them is decided in `feedback.dead_letters`.
"""

import base64
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request

from feedback.dead_letters import DeadLetter, DeadLetters, StillBroken, UnknownLetter
from server.errors import Problem
from server.routes_operator import reason_of


class DeadLetterRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(self, letters: DeadLetters) -> None:
        self._letters = letters

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/dead-letters", self.letters, methods=["GET"])
        add("/v1/dead-letters/{id}", self.letter, methods=["GET"])
        add("/v1/dead-letters/{id}/fix", self.fix, methods=["POST"])
        add("/v1/dead-letters/{id}/replay", self.replay, methods=["POST"])
        add("/v1/dead-letters/{id}/drop", self.drop, methods=["POST"])
        return router

    async def letters(
        self,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: str | None = None,
        dropped: bool = False,
    ) -> dict[str, Any]:
        """List them, newest first; `next` is the next page's `after`. `dropped` lists those, too."""
        found = await _known(self._letters.list, limit, after, dropped)
        return {
            "dead_letters": [asdict(letter) for letter in found],
            "next": found[-1].id if len(found) == limit else None,
        }

    async def letter(self, id: str) -> dict[str, Any]:
        """Return one with its data: as text, or in base64 where it is none."""
        letter: DeadLetter = await _known(self._letters.get, id)
        data: bytes = await _known(self._letters.data, letter.id)
        try:
            shown = {"data": data.decode(), "encoding": "utf-8"}
        except UnicodeDecodeError:
            shown = {"data": base64.b64encode(data).decode(), "encoding": "base64"}
        return asdict(letter) | shown

    async def fix(
        self, id: str, request: Request, kind: Literal["completion", "event"] | None = None
    ) -> dict[str, Any]:
        """Put the request's body, a whole record in JSON, in place of the data."""
        await _known(self._letters.fix, id, await request.body(), kind)
        return {"action": "fixed", "dead_letter": asdict(await _known(self._letters.get, id))}

    async def replay(self, id: str) -> dict[str, Any]:
        """Store it as if it had just come; it is a dead letter no more."""
        return {"action": "replayed", "dead_letter": asdict(await _known(self._letters.replay, id))}

    async def drop(self, id: str, request: Request) -> dict[str, Any]:
        """Give it up for a `reason`, which an event's receipt then tells."""
        reason = await reason_of(request)
        return {"action": "dropped", "dead_letter": asdict(await _known(self._letters.drop, id, reason))}


async def _known(function: Callable[..., Any], *arguments: Any) -> Any:
    """Work on letters in a thread, speaking of what is refused over HTTP."""
    try:
        return await anyio.to_thread.run_sync(function, *arguments)
    except UnknownLetter as error:
        raise Problem(404, str(error)) from error
    except StillBroken as error:
        raise Problem(422, f"it still can't be stored: {error}") from error
