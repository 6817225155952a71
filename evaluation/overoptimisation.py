"""The over-optimisation watch: a policy's checkpoints on the plane of √KL against proxy and gold reward.

As a policy moves from where it began, at d = √KL, the reward that it maximises (the proxy) goes on rising,
while the reward that nobody trained on (gold) turns at some distance (Gao, Schulman and Hilton 2022, arXiv
2210.10760, section 3). Owns the points, the choice among them and what the gate hears of it; what the
checkpoints are and how they are sampled is `training/checkpoints.py`'s.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.comparison import Interval, paired_difference
from evaluation.settings import EvaluationSettings


@dataclass(frozen=True, slots=True)
class Scores:
    """One policy's responses to the same prompts: each one's prompt and its two scores, all (N,)."""

    prompts: list[str]
    proxy: list[float]
    gold: list[float]


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint on the plane, after `update` updates (0: the SFT policy, from which the others set out).

    `kl` is its mean KL from the SFT policy in nats a response; `proxy` and `gold` are what it gains over that
    policy on the same prompts, in the reward models' units, paired response by response.
    """

    update: int
    kl: float
    proxy: Interval
    gold: Interval

    @property
    def distance(self) -> float:
        """Return d = √KL; an estimate of KL from samples can lie below 0, where d is 0."""
        return math.sqrt(max(self.kl, 0.0))

    def figures(self) -> dict[str, float]:
        """Return the point as metrics of a round."""
        return {
            "kl": self.kl,
            "distance": self.distance,
            **{
                f"{name}{part}": value
                for name, gain in (("proxy", self.proxy), ("gold", self.gold))
                for part, value in (("", gain.estimate), ("/low", gain.low), ("/high", gain.high))
            },
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the point as plain JSON, in which NaN, from a model that came apart, is None."""
        return asdict(self) | {"kl": self.kl if math.isfinite(self.kl) else None}


def point(update: int, kl: float, scores: Scores, start: Scores, settings: EvaluationSettings) -> Point:
    """Place the checkpoint with `scores` on the plane; `start` are the SFT policy's on the same prompts.

    Raises ValueError with fewer than two prompts.
    """

    def gain(after: Sequence[float], before: Sequence[float]) -> Interval:
        return paired_difference(
            scores.prompts, before, after, confidence=settings.confidence, resamples=settings.resamples
        )

    return Point(update, kl, gain(scores.proxy, start.proxy), gain(scores.gold, start.gold))


def liked_best(points: Sequence[Point]) -> Point:
    """Return the point with the highest gold reward; of equal ones the first, which is nearest to SFT."""
    return max(points, key=lambda one: one.gold.estimate if math.isfinite(one.gold.estimate) else -math.inf)


@dataclass(frozen=True, slots=True)
class Watch:
    """What the gate hears of the watch: the published checkpoint's gains over the SFT policy.

    It was chosen among `checkpoints`, on `prompts` prompts that the gate does not use: `held_out` ones where
    there were enough, else training prompts.
    """

    update: int
    checkpoints: int
    prompts: int
    held_out: bool
    proxy: Interval
    gold: Interval

    @property
    def over_optimised(self) -> bool:
        """Whether the proxy rose while gold fell, so far that its interval lies below 0."""
        return self.proxy.estimate > 0 and self.gold.high < 0


def watch_of(result: Mapping[str, Any]) -> Watch | None:
    """Read what the stage that watched has left behind; None where it was skipped."""
    if "points" not in result:
        return None
    chosen = next(item for item in result["points"] if item["update"] == result["update"])
    return Watch(
        result["update"],
        len(result["points"]),
        result["prompts"],
        result["held_out"],
        Interval(**chosen["proxy"]),
        Interval(**chosen["gold"]),
    )
