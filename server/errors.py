"""The one shape of an error: `{"error": {"type", "message", "param"}}`, from routes and middleware alike."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection
from starlette.responses import JSONResponse

DATABASE_AWAY = (OperationalError, InterfaceError, NoConnection)
"""What SQLAlchemy raises when the database does not answer."""

_TYPES = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    409: "conflict",
    410: "gone",
    413: "too_large",
    422: "invalid",
    429: "too_many_requests",
    500: "internal",
    503: "unavailable",
    504: "timeout",
}


class Problem(Exception):  # noqa: N818
    """A request that is refused: HTTP status, a sentence for a person, and the field at fault if one is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.allow = allow

    def body(self) -> dict[str, Any]:
        """Return the JSON object that the client sees."""
        kind = _TYPES.get(self.status, "error")
        return {"error": {"type": kind, "message": self.message, "param": self.param}}

    def headers(self) -> dict[str, str]:
        """`Retry-After`, in seconds, where trying again may help; what the server wants or takes instead."""
        headers = {
            "Retry-After": None if self.retry_after is None else str(self.retry_after),
            "WWW-Authenticate": "Bearer" if self.status == 401 else None,
            "Allow": self.allow,
        }
        return {name: value for name, value in headers.items() if value is not None}

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.body(), self.status, self.headers())


def invalid_field(error: Mapping[str, Any], *, skip: int = 0) -> Problem:
    """Make a 422 that names the field of one pydantic error, without the `skip` first parts of its path."""
    location = [str(part) for part in error["loc"][skip:]]
    message = str(error["msg"]).removeprefix("Value error, ")
    if not location and ": " in message:
        # A model's own check names its field before the colon.
        field, message = message.split(": ", 1)
        location = [field]
    return Problem(422, message, param=".".join(location) or None)
