"""The experience of one PPO update: what was sampled, what was made of it, and what it tells of the policy.

Shapes: B episodes, K of them to each prompt, R the longest response, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from evaluation.checks import share_satisfied
from evaluation.contest import Prompt
from evaluation.sampler import Sample


@dataclass(slots=True)
class Episodes:
    """The experience of one update, on response tokens; tensors are (B, R), false or zero behind a response.

    Episodes of one prompt stand together, in the order of `prompts` (B / K). `old_logprobs` are those of the
    policy that sampled, `ref_logprobs` the reference policy's; `scores` (B,) are the reward model's less the
    penalty; `features` (B, R, D) are the reward model's hidden states before each token where the critic is
    on its trunk. `weights` are importance weights where the engine had to be corrected. `logprob_gap` is the
    mean distance between the engine's and the trainer's logprobs, in nats.
    """

    prompts: list[Prompt]
    samples: list[Sample]
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    scores: Tensor
    values: Tensor
    features: Tensor | None = None
    weights: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    logprob_gap: float = 0.0

    @property
    def a_prompt(self) -> int:
        """K."""
        return len(self.samples) // len(self.prompts)

    def of(self, prompts: Sequence[int]) -> list[int]:
        """Return the rows of the episodes of these prompts, in order."""
        return [prompt * self.a_prompt + k for prompt in prompts for k in range(self.a_prompt)]

    def items(self, prompts: Sequence[int]) -> list[tuple[list[int], list[list[int]]]]:
        """Return these prompts with their responses, as token ids."""
        return [
            (self.prompts[i].token_ids, [self.samples[row].token_ids for row in self.of([i])])
            for i in prompts
        ]

    def kl(self) -> Tensor:
        """Return log pi(y) - log pi_ref(y) of each episode, (B,), in nats."""
        return ((self.old_logprobs - self.ref_logprobs) * self.mask).sum(1)

    def figures(self, kl_coefficient: float) -> dict[str, float]:
        """Return what happened in the rollout of one update, under TRL's names where it has one."""
        assert self.returns is not None
        mask, kl = self.mask, self.kl()
        returns, values = self.returns[mask], self.values[mask]
        ended = [sample.finish_reason == "stop" for sample in self.samples]
        figures = {
            "objective/scores": float(self.scores.mean()),
            "objective/kl": float(kl.mean()),
            "objective/kl_coefficient": kl_coefficient,
            "objective/rlhf_reward": float((self.scores - kl_coefficient * kl).mean()),
            "objective/entropy": float(-(self.old_logprobs * mask).sum(1).mean()),
            "val/explained_variance": float(1 - (returns - values).var() / returns.var().clamp(min=1e-8)),
            "rollout/logprob_gap": self.logprob_gap,
            "rollout/corrected": float(self.weights is not None),
            "response/length": float(mask.sum(1).float().mean()),
            "response/ended": sum(ended) / len(ended),
        }
        # What programs check is a gold reward: PPO sees the reward model's opinion only.
        gold = [
            share_satisfied(prompt.checks, self.samples[row].text)
            for i, prompt in enumerate(self.prompts)
            if prompt.checks
            for row in self.of([i])
        ]
        return figures | ({"objective/gold": sum(gold) / len(gold)} if gold else {})
