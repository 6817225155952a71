"""Our own routes as an OpenAPI document: what each takes, from whom, and every status that it may answer.

The document is made from the routes themselves; what the gate does in front of all of them is added here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.routing import BaseRoute

from feedback.events import FEEDBACK
from server.access import roles_of
from server.answers import ProblemAnswer

_REASONS = {
    401: "No key or token, or none that is good",
    403: "Not for this role, or of another client",
    404: "There is no such thing",
    405: "The path takes another method",
    409: "It can't be in the state in which things are",
    410: "It was forgotten",
    413: "The body is too large",
    422: "The field that `param` names is wrong",
    429: "More than the rate limit allows",
    500: "A replica could not do it",
    503: "Something that this needs is away, or not durable",
    504: "It is not so yet",
}
_SECONDS = {"Retry-After": {"required": True, "schema": {"type": "integer"}, "description": "Seconds"}}
_HEADERS: Mapping[int, Mapping[str, Any]] = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}},
    429: _SECONDS,
}
_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key"},
    "keyHeader": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "An API key"},
    "token": {
        "type": "apiKey",
        "in": "header",
        "name": "X-Feedback-Token",
        "description": "A feedback token",
    },
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what `responses=` of a route says of refusals, beyond those that every route may give."""
    return {status: _problem(status) for status in statuses}


def takes(model: type[BaseModel], *, required: bool = False) -> dict[str, Any]:
    """Return what `openapi_extra=` of a route says of a JSON body; unless `required`, it may be left out."""
    return _body("application/json", model.model_json_schema(), required=required)


def takes_feedback() -> dict[str, Any]:
    """Return what `openapi_extra=` of a route says that takes one event."""
    return _body("application/json", {"$ref": "#/components/schemas/Feedback"})


def takes_record() -> dict[str, Any]:
    """Return what `openapi_extra=` of a route says that takes a whole record."""
    return _body("application/json", {"type": "object"})


def takes_lines() -> dict[str, Any]:
    """Return what `openapi_extra=` of a route says that takes an event a line."""
    return _body("application/x-ndjson", {"type": "string"})


def document(routes: Sequence[BaseRoute]) -> dict[str, Any]:
    """Make the document of `routes`."""
    found = get_openapi(
        title="InstructLoop",
        version="1",
        description=(
            "Feedback, receipts and operations. The generating routes beside these are vLLM's: OpenAI's "
            "`/v1/chat/completions`, `/v1/completions`, `/v1/responses` and Anthropic's `/v1/messages`."
        ),
        routes=routes,
    )
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    feedback = FEEDBACK.json_schema(ref_template="#/components/schemas/{model}")
    schemas |= feedback.pop("$defs") | {"Feedback": feedback}
    problem = ProblemAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= problem.pop("$defs") | {"ProblemAnswer": problem}
    components["securitySchemes"] = _SCHEMES
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            _guard(method.upper(), path, operation)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return found


def _guard(method: str, path: str, operation: dict[str, Any]) -> None:
    """Add what the gate asks for and may answer."""
    roles = roles_of(method, path)
    operation["x-roles"] = sorted(roles)
    operation["security"] = [{"key": []}, {"keyHeader": []}] if roles else []
    operation["security"] += [{"token": []}] if "token" in roles else []
    gate = {str(status): _problem(status) for status in ((401, 403, 413, 422, 429, 503) if roles else (413,))}
    # FastAPI describes its own form of a 422, which nobody gets to see.
    own = {status: answer for status, answer in operation["responses"].items() if status != "422"}
    operation["responses"] = dict(sorted((gate | own).items()))


def _problem(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ProblemAnswer"}
    answer = {"description": _REASONS[status], "content": {"application/json": {"schema": schema}}}
    return answer | ({"headers": _HEADERS[status]} if status in _HEADERS else {})


def _body(media_type: str, schema: Mapping[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"requestBody": {"required": required, "content": {media_type: {"schema": schema}}}}
