"""Two versions answer the same prompts, and each pair of answers gets an outcome.

Owns who is asked what and how an outcome comes about; intervals and the verdict are the gate's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.comparison import outcome
from evaluation.gate import Comparison
from evaluation.judges import checked
from evaluation.reward_model import RewardModel, score_responses
from evaluation.sampler import Sample, Sampler
from evaluation.settings import EvaluationSettings


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked: `key` is its hash, `token_ids` what the policy sees, `checks` what programs check."""

    key: str
    token_ids: list[int]
    checks: tuple[dict[str, Any], ...] = ()


def answers(
    sampler: Sampler, model_dir: Path, prompts: Sequence[Prompt], settings: EvaluationSettings, seed: int
) -> list[list[Sample]]:
    """`samples_per_prompt` answers of the version in `model_dir` to each prompt."""
    sampler.load(model_dir)
    return sampler.sample(
        [prompt.token_ids for prompt in prompts],
        n=settings.samples_per_prompt,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=seed,
    )


def compare(
    judge: RewardModel,
    prompts: Sequence[Prompt],
    candidate: Sequence[Sequence[Sample]],
    incumbent: Sequence[Sequence[Sample]],
) -> list[Comparison]:
    """Set the candidate's i-th answer to each prompt against the incumbent's i-th.

    `judge` is a reward model that the candidate was not trained on; a prompt's own checks count by the share
    that an answer satisfies.
    """
    items = [
        (prompt.token_ids, [sample.token_ids for sample in (*ours, *theirs)])
        for prompt, ours, theirs in zip(prompts, candidate, incumbent, strict=True)
    ]
    comparisons = []
    for prompt, ours, theirs, scores in zip(
        prompts, candidate, incumbent, score_responses(judge, items), strict=True
    ):
        for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            by_checks = checked(prompt.checks, our.text, their.text)
            comparisons.append(Comparison(prompt.key, outcome(scores[i], scores[len(ours) + i]), by_checks))
    return comparisons
