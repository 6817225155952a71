"""Who is calling and what generation was asked for: what the middleware learns and the engine records.

Both travel in context variables, so vLLM's handlers between the middleware and the engine need to know
nothing of them.
"""

import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

CallerRole = Literal["client", "rater", "operator", "token"]

ENDPOINTS: Mapping[str, str] = {
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/messages": "chatcmpl-",
    "/v1/responses": "resp_",
}
"""The generating endpoints of vLLM and the prefix of the completion ids that each one makes."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. A feedback token's `key_id` is that of the client it speaks for.

    `completion_id` and `user` are set for tokens only: what the token allows to speak of, and for whom.
    """

    role: CallerRole
    key_id: str
    name: str
    completion_id: str | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One request for text as the client made it.

    `prompts` has an entry for each prompt of a completion request (None where it is token ids) and is empty
    for the endpoints that take messages.
    """

    completion_id: str
    endpoint: str
    key_id: str
    user: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompts: tuple[str | None, ...] = ()

    @property
    def parts(self) -> int | None:
        """How many records this request will have; None where tool turns decide it."""
        return None if self.endpoint == "/v1/responses" else max(1, len(self.prompts))

    def part(self, engine_request_id: str) -> int | None:
        """Which prompt (or tool turn) of this request the engine works on; None if it is not this request's.

        vLLM appends `-0`, `-1` … for the prompts of `/v1/completions` and `_0`, `_1` … for the turns of
        `/v1/responses`; what beam search asks of the engine has other suffixes and belongs to no response.
        """
        if not engine_request_id.startswith(self.completion_id):
            return None
        suffix = engine_request_id[len(self.completion_id) :]
        if not suffix:
            return 0
        match = re.fullmatch(r"[-_](\d{1,6})", suffix)
        return int(match[1]) if match else None


CALLER: ContextVar[Caller] = ContextVar("caller")
GENERATION: ContextVar[Generation | None] = ContextVar("generation", default=None)

_INTEGER = TypeAdapter(int)
# More than vLLM ever takes.
_LARGEST_N = 100_000


def is_answer(body: Mapping[str, Any]) -> bool:
    """Whether what a request asks for is recorded and can get feedback; odd bodies are vLLM's to refuse.

    Beam search is none: its candidates were not sampled. Nor is a request for the likelihood of its own
    prompt, as benchmarks send by the thousand: nobody reads the one token that an engine has to generate
    then, and raters must not be asked about it.
    """
    scored = body.get("prompt_logprobs") is not None or (
        bool(body.get("echo")) and body.get("logprobs") is not None
    )
    return not body.get("use_beam_search") and not (scored and body.get("max_tokens") in (0, 1))


def generation_of(path: str, completion_id: str, key_id: str, body: Mapping[str, Any]) -> Generation:
    """Read from a request body what a record of it should carry; odd bodies are vLLM's to refuse."""
    prompts: tuple[str | None, ...] = ()
    messages = None
    match path:
        case "/v1/completions":
            prompts = _prompts(body.get("prompt"))
        case "/v1/responses":
            messages = _messages(body.get("instructions"), body.get("input"))
        case _:
            messages = _messages(body.get("system"), body.get("messages"))
    return Generation(completion_id, path, key_id, _user(body), messages, prompts)


def choice_count(path: str, body: Mapping[str, Any]) -> int | None:
    """How many choices the answer has; None where tool turns decide it, or vLLM will refuse the body."""
    match path:
        case "/v1/messages":
            return 1
        case "/v1/completions" if body.get("prompt_embeds") is None:
            prompts = len(_prompts(body.get("prompt")))
        case "/v1/chat/completions":
            prompts = 1
        case _:
            return None
    try:
        # As vLLM reads it: "2" and 2.0 are 2.
        n = 1 if body.get("n") is None else _INTEGER.validate_python(body["n"])
    except ValidationError:
        return None
    return n * prompts if 1 <= n <= _LARGEST_N else None


def _user(body: Mapping[str, Any]) -> str | None:
    metadata = body.get("metadata")
    named = metadata.get("user_id") if isinstance(metadata, dict) else None
    user = body.get("user") or named
    return user[:200] if isinstance(user, str) and user else None


def _prompts(prompt: Any) -> tuple[str | None, ...]:
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return tuple(item if isinstance(item, str) else None for item in prompt)
    return (prompt if isinstance(prompt, str) else None,)


def _messages(system: Any, conversation: Any) -> list[dict[str, Any]] | None:
    """Put a `system` turn first, and make each turn's text one string where it is only text."""
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    if not isinstance(conversation, list):
        return None
    turns = [dict(turn) for turn in conversation if isinstance(turn, dict)]
    if system:
        turns.insert(0, {"role": "system", "content": system})
    return [turn | {"content": _text(turn["content"])} if "content" in turn else turn for turn in turns]


def _text(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    texts = [
        block["text"] for block in content if isinstance(block, dict) and isinstance(block.get("text"), str)
    ]
    return "".join(texts) if len(texts) == len(content) else content
