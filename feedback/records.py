"""What the policy generated: one record a finished engine request, as it crosses the queue.

The server writes these, ingest stores them, training reads them. Judgements of them are in `events`.
"""

import hashlib
import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

SCHEMA = "1"
"""The version of the records' JSON in the queue. Raise it when an older ingest would misread what is new."""

SHADOW = "shadow"
"""The source of what answered a copy of a request: nobody saw it, and nobody is asked about it."""

_INDEX_LIMIT = 2**31
Index = Annotated[int, Field(ge=0, lt=_INDEX_LIMIT)]
TokenId = Annotated[int, Field(ge=-_INDEX_LIMIT, lt=_INDEX_LIMIT)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
"""What is looked up by: an index of Postgres takes no more than 2,704 bytes in one entry."""


class WeightSpan(BaseModel):
    """Output tokens `[start, end)` of a choice came from the weights of `version`."""

    model_config = ConfigDict(frozen=True)

    version: str
    start: int
    end: int


class Choice(BaseModel):
    """One sampled response.

    `index` counts over the whole completion: with several prompts in one request it is
    `part * n + position`, as in the response that the client saw. `token_ids` and `logprobs` have one
    entry a sampled token (logprobs in nats); both are empty for imported text.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants")

    index: Index
    text: str
    token_ids: list[TokenId] = []
    logprobs: list[float] = []
    finish_reason: str | None = None
    weight_spans: list[WeightSpan] = []


class Completion(BaseModel):
    """One prompt and the choices that were sampled for it.

    `id` is the id that the client saw (`chatcmpl-…`, `cmpl-…`, `resp_…`); `part` is the prompt's position
    in a request with several prompts, else 0; `parts` is how many prompts that request had, where the
    recorder knows it. `messages` or `prompt` is what the client sent,
    `prompt_token_ids` what the engine saw (empty for imported text). `key_id` names the caller's key,
    `user` the caller's end user where it named one, `source` is `serving`, `shadow` or an
    import's name.
    `created_at` is in Unix seconds.
    """

    # What was said is in no message about a record that is wrong: such messages are logged.
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="constants", hide_input_in_errors=True)

    id: Name
    part: Index = 0
    parts: Annotated[int, Field(ge=1, lt=_INDEX_LIMIT)] | None = None
    key_id: str
    user: str | None = None
    source: str = "serving"
    endpoint: str
    created_at: FiniteFloat
    latency_seconds: FiniteFloat = 0.0
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    prompt_token_ids: list[TokenId] = []
    sampling: dict[str, Any] = {}
    choices: list[Choice]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def prompt_hash(completion: Completion) -> str:
    """Define "one prompt": the SHA-256 (hex) of the tokens that the engine saw, else of the client's text.

    Two completions answer the same prompt exactly when their hashes are equal.
    """
    if completion.prompt_token_ids:
        kind, value = "tokens", canonical_json(completion.prompt_token_ids)
    elif completion.messages is not None:
        kind, value = "messages", canonical_json(completion.messages)
    else:
        kind, value = "prompt", completion.prompt or ""
    return hashlib.sha256(f"{kind}:{value}".encode("utf-8", "surrogatepass")).hexdigest()
