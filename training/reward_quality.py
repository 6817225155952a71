"""How good a reward model is on rankings that it was not fitted to.

Owns the figures and how they stand as JSON: pair accuracy by source and by rater group, the length-only
baseline, calibration, how far scores follow length. Fitting is `training/reward_model.py`'s.
Shapes: K responses to one prompt, P pairs, H heads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from evaluation.comparison import Interval, clustered_mean
from evaluation.reward_model import RewardModel, head_scores_of_responses
from training.dataset import Comparison

Accuracies = Mapping[str, Mapping[str, Interval]]
"""By source or group, then `model` and `longer`."""

BINS = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose better response was predicted with a probability in (`low`, `high`].

    `confidence` is their mean probability, `accuracy` the share that was right; both None without pairs.
    """

    low: float
    high: float
    pairs: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Quality:
    """What is known of a reward model from unseen rankings; None where there was too little to tell.

    `by_held_out_rater` is told, by source, for raters of whom no reward model has seen anything. `spread` is
    the mean standard deviation over the heads, in deviations of the score.
    """

    by_source: Accuracies
    by_group: Accuracies
    by_held_out_rater: Accuracies
    calibration_error: float | None
    calibration: list[Bin]
    length_correlation: float | None
    spread: float | None

    def figures(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        return {
            "held_out_accuracy": _plain(self.by_source),
            "held_out_accuracy_by_group": _plain(self.by_group),
            "held_out_rater_accuracy": _plain(self.by_held_out_rater),
            "calibration_error": self.calibration_error,
            "calibration": [asdict(each) for each in self.calibration],
            "length_correlation": self.length_correlation,
            "spread": self.spread,
        }

    def metrics(self) -> dict[str, float]:
        """Return the estimates by name, without intervals and bins."""
        found = {
            f"{kind}/{name}/{by}": interval.estimate
            for kind, accuracies in (
                ("held_out_accuracy", self.by_source),
                ("held_out_accuracy_by_group", self.by_group),
                ("held_out_rater_accuracy", self.by_held_out_rater),
            )
            for name, intervals in accuracies.items()
            for by, interval in intervals.items()
        }
        single = {
            "calibration_error": self.calibration_error,
            "length_correlation": self.length_correlation,
            "spread": self.spread,
        }
        return found | {name: value for name, value in single.items() if value is not None}


def measure(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    seed: int = 0,
    by_held_out_raters: Sequence[Comparison] = (),
) -> Quality:
    """Measure `model` on rankings of prompts that it was not fitted to, and on those of held-out raters.

    Sources and groups with fewer than two prompts are left out, as no interval can be told.
    """
    scores = head_scores_of_responses(
        model, [(item.prompt.token_ids, item.responses) for item in comparisons]
    )
    means = [own.mean(-1).tolist() for own in scores]
    # Probabilities are those of the scores as they were fitted, before they were standardised.
    scale = model.scale.cpu()
    fitted = [(own * scale).mean(-1).tolist() for own in scores]
    error, bins = calibration(
        [d for own, item in zip(fitted, comparisons, strict=True) for d in _differences(own, item.ranks)]
    )
    lengths = _lengths(comparisons)
    spread = torch.cat(scores).std(-1, unbiased=False).mean().item() if scores else math.nan
    return Quality(
        by_source=_accuracies(comparisons, [item.source for item in comparisons], means, lengths, seed),
        by_group=_accuracies(comparisons, [item.rater_group for item in comparisons], means, lengths, seed),
        by_held_out_rater=_of_held_out(model, by_held_out_raters, seed),
        calibration_error=error,
        calibration=bins,
        length_correlation=within_correlation(means, lengths),
        spread=spread if math.isfinite(spread) else None,
    )


def accuracy_by_source(model: RewardModel, comparisons: Sequence[Comparison], seed: int = 0) -> Accuracies:
    """Held-out pair accuracy of `model` and of choosing the longer answer, by source, clustered by prompt."""
    return measure(model, comparisons, seed).by_source


def _of_held_out(model: RewardModel, comparisons: Sequence[Comparison], seed: int) -> Accuracies:
    items = [(item.prompt.token_ids, item.responses) for item in comparisons]
    means = [own.mean(-1).tolist() for own in head_scores_of_responses(model, items)]
    return _accuracies(comparisons, [item.source for item in comparisons], means, _lengths(comparisons), seed)


def _lengths(comparisons: Sequence[Comparison]) -> list[list[float]]:
    return [[float(len(response)) for response in item.responses] for item in comparisons]


def pair_outcomes(values: Sequence[float], ranks: Sequence[int]) -> list[float]:
    """Outcome of each pair with different ranks: 1 if the better has the greater value, 0.5 if equal."""
    return [0.5 if d == 0 else float(d > 0) for d in _differences(values, ranks)]


def calibration(differences: ArrayLike) -> tuple[float | None, list[Bin]]:
    """Tell how far sigmoid(|d|) is from the share of pairs whose higher score is the better one, with bins.

    `differences` (P,) are r_w - r_l of pairs with a known winner: a pair is right where d > 0, half right
    where d = 0. Ten bins of equal width from 0.5 to 1; the error is the mean over pairs of their bin's
    |accuracy - confidence| (Guo et al. 2017, arXiv 1706.04599, equation 3). None without pairs.
    """
    d = np.asarray(differences, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    right = np.where(d == 0, 0.5, d > 0)
    edges = np.linspace(0.5, 1.0, BINS + 1)
    of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    bins, error = [], 0.0
    for i in range(BINS):
        mine = of == i
        count = int(mine.sum())
        mean, share = (float(confidence[mine].mean()), float(right[mine].mean())) if count else (None, None)
        bins.append(Bin(float(edges[i]), float(edges[i + 1]), count, mean, share))
        if mean is not None and share is not None:
            error += count / len(d) * abs(share - mean)
    return (error if len(d) else None), bins


def within_correlation(values: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float | None:
    """Pearson's correlation of two figures of responses, each less its mean over its prompt's responses.

    So it tells whether scores follow length among answers to one prompt, whatever prompts differ in. None
    where either does not vary.
    """
    x = np.concatenate([np.asarray(own) - np.mean(own) for own in values]) if values else np.empty(0)
    y = np.concatenate([np.asarray(own) - np.mean(own) for own in others]) if others else np.empty(0)
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 and math.isfinite(norm) else None


def _differences(values: Sequence[float], ranks: Sequence[int]) -> list[float]:
    return [
        values[i] - values[j]
        for i, better in enumerate(ranks)
        for j, worse in enumerate(ranks)
        if better < worse
    ]


def _accuracies(
    comparisons: Sequence[Comparison],
    names: Sequence[str],
    scores: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[float]],
    seed: int,
) -> Accuracies:
    """Pair accuracies of the scores and of the lengths by name, one name a comparison."""
    outcomes: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for item, name, own, length in zip(comparisons, names, scores, lengths, strict=True):
        by = outcomes.setdefault(name, {"model": [], "longer": []})
        for kind, values in (("model", own), ("longer", length)):
            by[kind] += [(item.prompt.key, value) for value in pair_outcomes(values, item.ranks)]
    return {
        name: {
            kind: clustered_mean([key for key, _ in pairs], [value for _, value in pairs], seed=seed)
            for kind, pairs in by.items()
        }
        for name, by in outcomes.items()
        if len({key for key, _ in by["model"]}) >= 2
    }


def _plain(accuracies: Accuracies) -> dict[str, dict[str, Any]]:
    return {
        name: {kind: interval.figures() for kind, interval in by.items()} for name, by in accuracies.items()
    }
