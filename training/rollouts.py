"""Episodes from the current policy: its weights are handed to a sampler, which answers prompts with them.

Owns the checkpoint that the sampler reads and the choice of prompts; generation is the sampler's.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from evaluation.contest import Prompt
from evaluation.reward_model import ATTENTION, DEVICE
from evaluation.sampler import Sample, Sampler


def load_policy(directory: Path) -> PreTrainedModel:
    """Read a language model for training: float32 weights, which mixed precision multiplies as bfloat16."""
    return AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation=ATTENTION
    ).to(DEVICE)


def write_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a Hugging Face directory of bfloat16 weights, as versions and engines want it.

    The weights are exactly those that mixed precision multiplies with in training.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tied = getattr(model.config, "tie_word_embeddings", False)
    weights = {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    dtype = model.config.dtype
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(directory)
    model.config.dtype = dtype
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def prompts_of_update(prompts: Sequence[Prompt], update: int, batch: int, seed: int) -> list[Prompt]:
    """Return the `batch` prompts of the update with this number (from 0): seeded passes over all of them.

    A function of its arguments alone, so that a resumed run asks what the unbroken one would have asked.
    """
    chosen = []
    for position in range(update * batch, (update + 1) * batch):
        sweep, index = divmod(position, len(prompts))
        order = list(range(len(prompts)))
        random.Random(f"{seed}:{sweep}").shuffle(order)
        chosen.append(prompts[order[index]])
    return chosen


class Rollouts:
    """The current policy's responses, through `sampler`, by way of the checkpoint in `directory`."""

    def __init__(
        self,
        sampler: Sampler,
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

    def sample(self, policy: PreTrainedModel, prompts: Sequence[Prompt], seed: int) -> list[Sample]:
        """One response to each prompt with the policy's weights as they are now."""
        write_checkpoint(policy, self._tokenizer, self._directory)
        self._sampler.load(self._directory)
        groups = self._sampler.sample(
            [prompt.token_ids for prompt in prompts],
            n=1,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            seed=seed,
        )
        return [group[0] for group in groups]
