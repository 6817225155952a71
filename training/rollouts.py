"""Episodes from the current policy: its weights are handed to a sampler, which answers prompts with them.

Owns the checkpoints that the sampler reads; generation is the sampler's.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from evaluation.contest import Prompt
from evaluation.sampler import Sample, Sampler
from training import processes
from training.policy import Policy, write_checkpoint


class Rollouts:
    """The current policy's responses, through `sampler`, by way of checkpoints in `directory`.

    The weights of each update and of the one before stay there, in bfloat16, under the update's number. A
    process that is not the first of several has no sampler, and gets the first one's responses.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        *,
        max_tokens: int,
        temperature: float,
    ) -> None:
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._directory = directory
        self._max_tokens = max_tokens
        self._temperature = temperature

    def sample(
        self, policy: Policy, prompts: Sequence[Prompt], update: int, *, n: int, seed: int
    ) -> list[list[Sample]]:
        """`n` responses to each prompt with the policy's weights as they are at this update."""
        checkpoint = self.checkpoint(update)
        write_checkpoint(policy, self._tokenizer, checkpoint)
        return processes.from_first(lambda: self._sample(checkpoint, prompts, update, n, seed))

    def _sample(
        self, checkpoint: Path, prompts: Sequence[Prompt], update: int, n: int, seed: int
    ) -> list[list[Sample]]:
        assert self._sampler is not None
        for other in self._directory.iterdir():
            if other not in (checkpoint, self.checkpoint(update - 1)):
                shutil.rmtree(other)
        self._sampler.load(checkpoint)
        return self._sampler.sample(
            [prompt.token_ids for prompt in prompts],
            n=n,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=seed,
        )

    def checkpoint(self, update: int) -> Path:
        """Where the weights are that the responses of an update were sampled with."""
        return self._directory / f"{update:04d}"
