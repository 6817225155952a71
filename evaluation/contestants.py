"""Contestants: each answers prompts, whether it is a version, a few-shot prompted one or a model elsewhere.

Owns how a prompt becomes what a contestant is asked. Which contestants there are, and what becomes of their
answers, is `evaluation.run`'s.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evaluation.endpoint import Endpoint, text_of
from evaluation.judges import ChatPrompt
from evaluation.sampler import Sampler

Turns = Sequence[tuple[Mapping[str, str], Mapping[str, str]]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; it ended by itself (`stop`) or was cut off (`length`).

    `tokens` is its length in the contestant's own tokens, None where it says nothing of that.
    """

    text: str
    tokens: int | None
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn: `n` to a prompt, of at most `max_tokens` tokens."""

    n: int
    max_tokens: int
    temperature: float


class Contestant(Protocol):
    """Anything that answers prompts under a name."""

    name: str

    def answer(self, prompts: Sequence[ChatPrompt], seed: int) -> list[list[Answer]]:
        """Return n answers to each prompt; the same prompts and seed give the same answers, if it can."""


class SharedEngine:
    """One engine for all versions, started when the first one answers; their weights replace each other's."""

    def __init__(self, start: Callable[[Path], Sampler]) -> None:
        self._start = start
        self._sampler: Sampler | None = None

    def with_weights(self, model_dir: Path) -> Sampler:
        """Return the engine with the weights of `model_dir` and empty caches."""
        if self._sampler is None:
            self._sampler = self._start(model_dir)
        # Also where they are its weights already: so a batch starts from one state, whatever came before.
        self._sampler.load(model_dir)
        return self._sampler

    def close(self) -> None:
        """End the engine, if there is one."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None


class VersionContestant:
    """A version of the policy, with `examples` before each prompt where it is prompted by some.

    Prompt and answer together have at most `max_model_len` tokens: a prompt that is longer loses examples
    first, then its beginning. Raises ValueError where nothing is left for the prompt.
    """

    def __init__(
        self,
        name: str,
        model_dir: Path,
        engine: SharedEngine,
        sampling: Sampling,
        *,
        max_model_len: int,
        examples: Turns = (),
    ) -> None:
        self.name = name
        self._model_dir = model_dir
        self._engine = engine
        self._sampling = sampling
        self._prompt_tokens = max_model_len - sampling.max_tokens
        self._examples = examples
        if self._prompt_tokens < 1:
            raise ValueError(
                f"max_tokens: {sampling.max_tokens} leaves no room for a prompt: both together have at "
                f"most {max_model_len} (server.max_model_len)"
            )
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model_dir))

    def answer(self, prompts: Sequence[ChatPrompt], seed: int) -> list[list[Answer]]:
        """Sample in the engine; of one engine the same call gives the same answers."""
        sampler = self._engine.with_weights(self._model_dir)
        found = sampler.sample(
            [self._rendered(prompt) for prompt in prompts],
            n=self._sampling.n,
            max_tokens=self._sampling.max_tokens,
            temperature=self._sampling.temperature,
            seed=seed,
        )
        return [[Answer(one.text, len(one.token_ids), one.finish_reason) for one in own] for own in found]

    def _rendered(self, prompt: ChatPrompt) -> list[int]:
        for left_out in range(len(self._examples) + 1):
            ids = self._render(with_examples(prompt, self._examples[left_out:]))
            if len(ids) <= self._prompt_tokens:
                return ids
        return ids[-self._prompt_tokens :]

    def _render(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        ids: list[int] = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
        )
        return ids


def with_examples(prompt: ChatPrompt, examples: Turns) -> list[Mapping[str, str]]:
    """Return a prompt's messages with the examples as earlier turns, behind a system message that it has."""
    system = [message for message in prompt.messages[:1] if message["role"] == "system"]
    turns = [message for pair in examples for message in pair]
    return [*system, *turns, *prompt.messages[len(system) :]]


class EndpointContestant:
    """A model at an OpenAI-compatible endpoint. Each answer is a request of its own: not all know `n`."""

    def __init__(self, name: str, endpoint: Endpoint, sampling: Sampling) -> None:
        self.name = name
        self._endpoint = endpoint
        self._sampling = sampling

    def answer(self, prompts: Sequence[ChatPrompt], seed: int) -> list[list[Answer]]:
        """Ask; whether a seed gives the same answers again is the endpoint's affair.

        Raises EndpointProblem.
        """
        n = self._sampling.n
        bodies = [
            {
                "messages": [dict(message) for message in prompt.messages],
                "max_tokens": self._sampling.max_tokens,
                "temperature": self._sampling.temperature,
                "seed": seed + i * n + k,
            }
            for i, prompt in enumerate(prompts)
            for k in range(n)
        ]
        answers = [
            Answer(
                text_of(found),
                (found.get("usage") or {}).get("completion_tokens"),
                "length" if found["choices"][0].get("finish_reason") == "length" else "stop",
            )
            for found in self._endpoint.chat(bodies)
        ]
        return [answers[i * n : (i + 1) * n] for i in range(len(prompts))]
