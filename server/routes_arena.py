"""HTTP routes of the arena: a rater is handed a blind pair of answers and votes on it.

Which pairs there are and in which order a rater sees them is `registry.arena`'s; what follows from votes is
the evaluation's that offered them.
"""

from collections.abc import Callable

import anyio.to_thread
from fastapi import APIRouter, Request
from pydantic import ValidationError

from registry.arena import AlreadyVoted, Arena, UnknownPair
from server.answers import ArenaAnswer, ArenaPair, ArenaVote, ArenaVoted
from server.body import parse_object
from server.context import CALLER
from server.errors import Problem, invalid_field
from server.feedback_events import rater_of
from server.limits import Limits
from server.lookups import from_database
from server.openapi import problems, takes


class ArenaRoutes:
    """The handlers and what they work on; `router()` binds them to their paths."""

    def __init__(self, *, arena: Arena, limits: Limits) -> None:
        self._arena = arena
        self._limits = limits

    def router(self) -> APIRouter:
        """Bind the handlers to their paths."""
        router = APIRouter()
        add: Callable[..., None] = router.add_api_route
        add("/v1/arena", self.next_pair, methods=["GET"])
        add(
            "/v1/arena/{pair_id}",
            self.vote,
            methods=["POST"],
            responses=problems(404, 409),
            openapi_extra=takes(ArenaVote, required=True),
        )
        return router

    async def next_pair(self) -> ArenaAnswer:
        """Hand out a pair that this rater has not voted on; null when there is none."""
        pair = await from_database(self._arena.next_pair, rater_of(CALLER.get()))
        if pair is None:
            return ArenaAnswer(pair=None)
        shown = ArenaPair(
            id=pair.id, axis=pair.axis, messages=pair.messages, first=pair.first, second=pair.second
        )
        return ArenaAnswer(pair=shown)

    async def vote(self, pair_id: str, request: Request) -> ArenaVoted:
        """Take a rater's vote on a pair as it was handed out to that rater."""
        caller = CALLER.get()
        try:
            given = ArenaVote.model_validate(parse_object(await request.body()))
        except ValidationError as error:
            raise invalid_field(error.errors(include_url=False)[0], skip=0) from None
        rater = rater_of(caller)
        await self._limits.events(caller, rater)

        def act() -> None:
            self._arena.vote(
                pair_id,
                rater,
                given.vote,
                first_labels=given.labels.first,
                second_labels=given.labels.second,
            )

        try:
            await anyio.to_thread.run_sync(act)
        except UnknownPair as error:
            raise Problem(404, str(error)) from error
        except AlreadyVoted as error:
            raise Problem(409, str(error)) from error
        return ArenaVoted(pair_id=pair_id, vote=given.vote)
