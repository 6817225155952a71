"""A shorter way to the routes that are asked most: from the gate to their handler, past FastAPI.

FastAPI's own way leads through two error middlewares, a match against each route, three exit stacks and the
solving of dependencies; that costs more than to take an event does. The routes stay FastAPI's, in its
document too; only who answers is found here. For handlers that take the bare request and return the response.
"""

import inspect
from collections.abc import Awaitable, Callable, Collection

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

Handler = Callable[[Request], Awaitable[Response]]


class Shortcut:
    """Pure ASGI in front of `app`: the `routes` (method and path, without parameters) are answered here.

    What their handlers raise goes to the exception handlers of `app`, as it does on the long way.
    """

    def __init__(self, app: FastAPI, routes: Collection[tuple[str, str]]) -> None:
        self._app: ASGIApp = app
        self._errors = app.exception_handlers
        self._handlers: dict[tuple[str, str], Handler] = {
            (method, route.path): route.endpoint
            for route in app.routes
            if isinstance(route, APIRoute)
            for method in route.methods
            if (method, route.path) in routes
        }
        assert set(self._handlers) == set(routes), "a route is not there"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the app answer."""
        handler = self._handlers.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await handler(request)
        except Exception as error:
            kind = next(kind for kind in type(error).__mro__ if kind in self._errors)
            answer = self._errors[kind](request, error)
            await (await answer if inspect.isawaitable(answer) else answer)(scope, receive, send)
            if kind is Exception:
                raise  # nobody foresaw it: the server logs it
            return
        await response(scope, receive, send)
