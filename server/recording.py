"""Adds up what the engine yields for one request and makes the completion record of it.

It knows vLLM's outputs only by the attributes that it reads (`Output`), so it is tested without an engine.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from feedback.records import Choice, Completion, WeightSpan
from server.context import Generation

SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_tokens",
    "min_tokens",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
"""The sampling parameters that a record carries, where they differ from vLLM's neutral defaults or not."""


class Output(Protocol):
    """What is read of vLLM's `CompletionOutput`: one choice, or in a stream one piece of it."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Any
    finish_reason: str | None
    weight_versions: Any


@dataclass(slots=True)
class _ChoiceSoFar:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    spans: list[WeightSpan] = field(default_factory=list)


class Recording:
    """One engine request. `pieces` says that outputs are increments, to be added up for each index.

    `taken` says that the record has been made.
    """

    def __init__(
        self, generation: Generation, part: int, *, sampling: Mapping[str, Any], pieces: bool, version: str
    ) -> None:
        self._generation = generation
        self._part = part
        self._sampling = dict(sampling)
        self._pieces = pieces
        self._version = version
        self._started_at = time.time()
        self._prompt_token_ids: list[int] = []
        self._choices: dict[int, _ChoiceSoFar] = {}
        self.taken = False

    @property
    def empty(self) -> bool:
        """Whether not one token was generated."""
        return not any(choice.token_ids for choice in self._choices.values())

    def add(self, prompt_token_ids: Sequence[int] | None, outputs: Sequence[Output]) -> None:
        """Take what the engine yielded once."""
        if prompt_token_ids is not None and not self._prompt_token_ids:
            self._prompt_token_ids = list(prompt_token_ids)
        for output in outputs:
            # In FINAL_ONLY mode an abort leaves holes where choices had not begun.
            if output is not None:
                self._add_choice(output)

    def _add_choice(self, output: Output) -> None:
        choice = self._choices.setdefault(output.index, _ChoiceSoFar())
        if not self._pieces:
            choice.text, choice.token_ids, choice.logprobs = "", [], []
        choice.text += output.text
        choice.token_ids.extend(output.token_ids)
        choice.logprobs.extend(sampled_logprobs(output.token_ids, output.logprobs))
        if output.finish_reason is not None:
            choice.finish_reason = output.finish_reason
            choice.spans = [
                WeightSpan(version=span.version, start=span.start, end=span.end)
                for span in output.weight_versions or ()
            ]

    def completion(self, unfinished: str) -> Completion:
        """Make the record; choices that did not finish get `unfinished` as their finish reason."""
        self.taken = True
        n = int(self._sampling.get("n") or 1)
        prompts = self._generation.prompts
        return Completion(
            id=self._generation.completion_id,
            part=self._part,
            parts=self._generation.parts,
            key_id=self._generation.key_id,
            user=self._generation.user,
            source=self._generation.source,
            endpoint=self._generation.endpoint,
            created_at=self._started_at,
            latency_seconds=time.time() - self._started_at,
            messages=self._generation.messages,
            prompt=prompts[self._part] if self._part < len(prompts) else None,
            prompt_token_ids=self._prompt_token_ids,
            sampling=self._sampling,
            choices=[
                Choice(
                    index=self._part * n + index,
                    text=choice.text,
                    token_ids=choice.token_ids,
                    logprobs=choice.logprobs,
                    finish_reason=choice.finish_reason or unfinished,
                    weight_spans=choice.spans or self._unlabelled(choice),
                )
                for index, choice in sorted(self._choices.items())
            ],
        )

    def _unlabelled(self, choice: _ChoiceSoFar) -> list[WeightSpan]:
        # vLLM labels the final output only; a choice cut off without one began with this version.
        end = len(choice.token_ids)
        return [WeightSpan(version=self._version, start=0, end=end)] if end else []


def sampled_logprobs(token_ids: Sequence[int], positions: Any) -> list[float]:
    """Return the logprob (nats) of each sampled token, (T,), from vLLM's mappings token -> Logprob."""
    if positions is None:
        return []
    flat = getattr(positions, "start_indices", None)
    if flat is not None:
        # FlatLogprobs: the sampled token stands first at each position.
        return [positions.logprobs[start] for start in flat]
    return [at[token].logprob for token, at in zip(token_ids, positions, strict=True)]
