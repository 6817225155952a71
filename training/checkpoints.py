"""The policy's checkpoints over its updates, and which of them is published.

Owns when one is kept and where, and their sampling; the plane they are set on and the choice among them are
`evaluation/overoptimisation.py`'s.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from evaluation.contest import Prompt
from evaluation.overoptimisation import Point, Scores, liked_best, point
from evaluation.reward_model import RewardModel, score_responses
from evaluation.sampler import Sample, Sampler
from evaluation.settings import EvaluationSettings
from training.logprobs import kl_from
from training.policy import Policy, load_policy, write_checkpoint
from training.sft import checkpoint_epochs


class Checkpoints:
    """Keeps the policy in `directory` after some of its updates, but the last: that one is the candidate.

    `count` are spread evenly over the updates, the last among them.
    """

    def __init__(self, directory: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._count = count

    def is_due(self, update: int, updates: int) -> bool:
        """Whether the policy is to be kept after `update` of `updates`."""
        return update < updates and update in checkpoint_epochs(updates, self._count)

    def keep(self, policy: Policy, update: int) -> None:
        """Write the policy; again after a kill, it ends the same."""
        write_checkpoint(policy, self._tokenizer, self._path(update))

    def kept(self, before: int) -> dict[int, Path]:
        """Return the directories of the checkpoints before the update `before`, by their update."""
        found = {int(path.name): path for path in self._directory.glob("[0-9]*")}
        return {update: found[update] for update in sorted(found) if update < before}

    def _path(self, update: int) -> Path:
        return self._directory / f"{update:04d}"


class KeepCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Keeps checkpoints of a Transformers trainer's policy; an update has `steps` of its steps."""

    def __init__(self, checkpoints: Checkpoints, policy: Callable[[], Policy], steps: int = 1) -> None:
        self._checkpoints = checkpoints
        self._policy = policy
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the policy where it is due."""
        update, rest = divmod(state.global_step, self._steps)
        if not rest and self._checkpoints.is_due(update, state.max_steps // self._steps):
            self._checkpoints.keep(self._policy(), update)


class Watching:
    """Samples one checkpoint after the other on the same prompts and sets each on the plane.

    `sft` is the directory of the policy that all set out from, `proxy` of the reward model that they were
    trained to maximise and `gold` of the one that nobody was trained on.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        *,
        sft: Path,
        proxy: Path,
        gold: Path,
        responses: int,
        settings: EvaluationSettings,
        seed: int,
    ) -> None:
        self._sampler = sampler
        self._prompts = prompts
        self._models = RewardModel.load(proxy), RewardModel.load(gold)
        self._reference = load_policy(sft)
        self._responses = responses
        self._settings = settings
        self._seed = seed
        self._start = self._scores(self._sample(sft))

    def start(self) -> Point:
        """Return the SFT policy's point, the origin."""
        return point(0, 0.0, self._start, self._start, self._settings)

    def place(self, update: int, directory: Path) -> Point:
        """Return the point of the checkpoint in `directory`."""
        samples = self._sample(directory)
        kl = kl_from(self._reference, self._prompts, samples, self._settings.temperature)
        return point(update, kl, self._scores(samples), self._start, self._settings)

    def _sample(self, directory: Path) -> list[list[Sample]]:
        self._sampler.load(directory)
        return self._sampler.sample(
            [prompt.token_ids for prompt in self._prompts],
            n=self._responses,
            max_tokens=self._settings.max_tokens,
            temperature=self._settings.temperature,
            seed=self._seed,
        )

    def _scores(self, samples: Sequence[Sequence[Sample]]) -> Scores:
        items = [
            (prompt.token_ids, [sample.token_ids for sample in own])
            for prompt, own in zip(self._prompts, samples, strict=True)
        ]
        proxy, gold = (
            [score for own in score_responses(model, items) for score in own] for model in self._models
        )
        prompts = [prompt.key for prompt, own in zip(self._prompts, samples, strict=True) for _ in own]
        return Scores(prompts, proxy, gold)


def choose(
    watching: Watching, candidates: Mapping[int, Path], report: Callable[[Point], None]
) -> tuple[Point, list[Point]]:
    """Return the checkpoint that the gold judge likes best, and all of them; `report` gets each point."""
    report(watching.start())
    points = []
    for update, directory in candidates.items():
        points.append(watching.place(update, directory))
        report(points[-1])
    return liked_best(points), points
