"""HTTP routes for operators: queue entries that could not be stored, to be fixed, replayed or dropped.

What may become of them is decided in `feedback.dead_letters`.
"""

import base64
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request

from feedback.dead_letters import DeadLetter, DeadLetters, StillBroken, UnknownLetter
from registry.audit import AuditLog
from server.answers import Move
from server.context import CALLER
from server.errors import Problem
from server.openapi import problems, takes, takes_record
from server.routes_operator import actor, reason_of


class DeadLetterRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(self, letters: DeadLetters, audit: AuditLog) -> None:
        self._letters = letters
        self._audit = audit

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/dead-letters", self.letters, methods=["GET"], responses=problems(404))
        add("/v1/dead-letters/{id}", self.letter, methods=["GET"], responses=problems(404))
        add(
            "/v1/dead-letters/{id}/fix",
            self.fix,
            methods=["POST"],
            responses=problems(404),
            openapi_extra=takes_record(),
        )
        add("/v1/dead-letters/{id}/replay", self.replay, methods=["POST"], responses=problems(404))
        add(
            "/v1/dead-letters/{id}/drop",
            self.drop,
            methods=["POST"],
            responses=problems(404),
            openapi_extra=takes(Move),
        )
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
        body = await request.body()
        await self._audited("fix dead letter", id, partial(self._letters.fix, id, body, kind))
        return {"action": "fixed", "dead_letter": asdict(await _known(self._letters.get, id))}

    async def replay(self, id: str) -> dict[str, Any]:
        """Store it as if it had just come; it is a dead letter no more."""
        letter = await self._audited("replay dead letter", id, partial(self._letters.replay, id))
        return {"action": "replayed", "dead_letter": asdict(letter)}

    async def drop(self, id: str, request: Request) -> dict[str, Any]:
        """Give it up for a `reason`, which an event's receipt then tells."""
        reason = await reason_of(request)
        letter = await self._audited("drop dead letter", id, partial(self._letters.drop, id, reason), reason)
        return {"action": "dropped", "dead_letter": asdict(letter)}

    async def _audited(self, action: str, id: str, work: Callable[[], Any], detail: str = "") -> Any:
        """Carry out what an operator asks for and write it down, refused or done."""
        who = actor(CALLER.get())

        def run() -> Any:
            with self._audit.refusals(who, action, id):
                found = work()
            self._audit.append(who, action, id, detail=detail)
            return found

        return await _known(run)


async def _known(function: Callable[..., Any], *arguments: Any) -> Any:
    """Work on letters in a thread, speaking of what is refused over HTTP."""
    try:
        return await anyio.to_thread.run_sync(function, *arguments)
    except UnknownLetter as error:
        raise Problem(404, str(error)) from error
    except StillBroken as error:
        raise Problem(422, f"it still can't be stored: {error}") from error
