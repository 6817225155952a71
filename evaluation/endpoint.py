"""Asks a model at an OpenAI-compatible endpoint: many requests at a time, in order, patient with refusals.

Owns the connection, its bounds and its retries. What is asked, and what an answer means, is the caller's.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")
_UNREADABLE = frozenset({400, 422})
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 60.0
_LONGEST_MESSAGE = 300


class EndpointProblem(RuntimeError):  # noqa: N818
    """An endpoint refused, or did not answer however often it was asked; the message says which and why."""


class RequestRefused(EndpointProblem):
    """It can't take this very request, such as one that is too long; others it may."""


class Endpoint:
    """The model `model` at the base URL `url` (which ends in /v1, as a rule).

    At most `concurrency` requests are under way at once. One that is refused for now (429, 5xx) or that fails
    on the way is sent again, later each time, or when the endpoint says, `attempts` times in all. `key` goes
    into a header and nowhere else. `sleep` and `transport` are there for tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        concurrency: int = 8,
        attempts: int = 8,
        timeout_seconds: float = 300.0,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._concurrency = concurrency
        self._attempts = attempts
        self._sleep = sleep
        self._takes_forms = True
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout_seconds,
            limits=httpx.Limits(max_connections=concurrency),
            transport=transport,
        )

    def chat(self, bodies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Ask with each body; return the answers in order. Raises EndpointProblem."""
        return self.each(self.ask, bodies)

    def each(self, ask: Callable[[_Item], _Found], items: Sequence[_Item]) -> list[_Found]:
        """Call `ask`, which asks this endpoint, on many items at a time; return in order what came of it."""
        with ThreadPoolExecutor(self._concurrency) as pool:
            asked = [pool.submit(ask, item) for item in items]
            try:
                return [one.result() for one in asked]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def ask_in_form(self, body: Mapping[str, Any], form: Mapping[str, Any]) -> str | RequestRefused:
        """Ask for an answer in a form (`response_format`); return its text, or why this was refused.

        An endpoint that refuses forms is asked without. Raises EndpointProblem.
        """
        in_form = self._takes_forms
        try:
            return text_of(self.ask({**body, "response_format": form} if in_form else body))
        except RequestRefused as refusal:
            if not in_form:
                return refusal
        try:
            said = text_of(self.ask(body))
        except RequestRefused as refusal:
            return refusal
        self._takes_forms = False  # it was the form that the endpoint does not take
        return said

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Post a body, `model` added, to /chat/completions; return the answer. Raises EndpointProblem."""
        wait, problem = _FIRST_WAIT_SECONDS, ""
        for attempt in range(self._attempts):
            if attempt:
                self._sleep(min(wait, _LONGEST_WAIT_SECONDS))
            wait = _FIRST_WAIT_SECONDS * 2**attempt * random.uniform(1.0, 1.5)  # not all at once again
            try:
                response = self._client.post(
                    f"{self.url}/chat/completions", json={"model": self.model, **body}
                )
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return _answer(response, self.url)
            problem = f"{response.status_code}: {_reason(response)}"
            if response.status_code not in _AGAIN:
                kind = RequestRefused if response.status_code in _UNREADABLE else EndpointProblem
                raise kind(f"{self.url} refuses a request for {self.model} with {problem}")
            wait = max(wait, _retry_after(response))
        raise EndpointProblem(
            f"{self.url} has not answered a request for {self.model} in {self._attempts} attempts: {problem}"
        )


def text_of(answer: Mapping[str, Any]) -> str:
    """Return the text of the first choice of an answer; empty where the model said nothing."""
    return str(answer["choices"][0]["message"].get("content") or "")


def _answer(response: httpx.Response, url: str) -> dict[str, Any]:
    """Read an answer with at least one choice; raises EndpointProblem."""
    try:
        found: dict[str, Any] = response.json()
        text_of(found)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise EndpointProblem(f"{url} answers with something else than a chat completion") from None
    return found


def _reason(response: httpx.Response) -> str:
    """Return what the endpoint says is wrong, in a line."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = response.text
    return " ".join(str(text).split())[:_LONGEST_MESSAGE]


def _retry_after(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0  # a date: the usual wait will do
