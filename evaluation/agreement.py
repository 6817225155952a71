"""How often a judge agrees with people, measured on pairs that people have judged.

Owns the measure and the small file that keeps it beside a judge, so that it can be stated beside the judge's
verdicts. People are whoever labelled the data set.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.comparison import Interval, clustered_mean
from evaluation.judges import Judge, Pair

FILE = "agreement.json"
"""The file's name in the directory of a judge, such as a reward model's."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """A pair with what people said of it: 1 the first answer is better, 0 the second, 0.5 a tie."""

    pair: Pair
    human: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement over pairs; an interval is None where fewer than two prompts speak for it.

    `credit` counts a tie of one side alone as half: it is the accuracy where people never tie, and 0.5 for a
    judge that only tosses coins or only ties. `same` is the share of equal verdicts with ties counted as a
    third verdict (setup S1 of Zheng et al. 2023, arXiv 2306.05685), `decided` that among pairs on which both
    sides decided (setup S2). `verdicts` of the `pairs` had one.
    """

    credit: Interval | None
    same: Interval | None
    decided: Interval | None
    pairs: int
    verdicts: int

    def figures(self) -> dict[str, Any]:
        """Return the agreement as plain JSON."""
        return asdict(self)


def agreement(
    prompts: Sequence[str],
    human: Sequence[float],
    judged: Sequence[float | None],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Agreement:
    """Compare verdicts on the same pairs, position by position, clustered by prompt."""
    rows = [
        (prompt, theirs, ours)
        for prompt, theirs, ours in zip(prompts, human, judged, strict=True)
        if ours is not None
    ]

    def share(kept: Sequence[tuple[str, float, float]], of: Sequence[float]) -> Interval | None:
        names = [prompt for prompt, _, _ in kept]
        if len(set(names)) < 2:
            return None
        return clustered_mean(names, np.array(of), confidence=confidence, resamples=resamples)

    both = [row for row in rows if row[1] != 0.5 and row[2] != 0.5]
    return Agreement(
        credit=share(rows, [1 - abs(theirs - ours) for _, theirs, ours in rows]),
        same=share(rows, [float(theirs == ours) for _, theirs, ours in rows]),
        decided=share(both, [float(theirs == ours) for _, theirs, ours in both]),
        pairs=len(prompts),
        verdicts=len(rows),
    )


def measure(judge: Judge, labelled: Sequence[Labelled], *, confidence: float = 0.95) -> Agreement:
    """Ask a judge about pairs whose verdict is known."""
    judged = judge.compare([item.pair for item in labelled])
    prompts = [item.pair.prompt.key for item in labelled]
    return agreement(prompts, [item.human for item in labelled], judged, confidence=confidence)


class LengthJudge:
    """The longer answer wins: what a judge has to beat."""

    name = "length"
    axis = "overall"
    agreement: Mapping[str, Any] | None = None

    def compare(self, pairs: Sequence[Pair]) -> list[float | None]:
        """Compare the answers' characters."""
        return [0.5 + 0.5 * float(np.sign(len(pair.first) - len(pair.second))) for pair in pairs]


def keep(directory: Path, measured: Mapping[str, Agreement]) -> None:
    """Write agreements, by data set, beside a judge; of a data set measured before the new one stands."""
    found = {**(kept(directory) or {}), **{name: one.figures() for name, one in measured.items()}}
    new = directory / f"{FILE}.new"
    new.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    os.replace(new, directory / FILE)


def kept(directory: Path) -> dict[str, Any] | None:
    """Return the agreements that `keep` wrote, by data set; None where none were."""
    path = directory / FILE
    return json.loads(path.read_text()) if path.exists() else None


def statement(kept: Mapping[str, Any] | None) -> str:
    """Say in one line how far a judge can be trusted, for a person who reads its verdicts."""
    if not kept:
        return "Nobody has measured how often this judge agrees with people."
    said = []
    for name, figures in sorted(kept.items()):
        credit = figures["credit"]
        if credit is not None:
            interval = f"[{credit['low']:.2f}, {credit['high']:.2f}]"
            said.append(f"{name} {credit['estimate']:.2f} {interval}, {figures['verdicts']} pairs")
    return f"Agrees with people on: {'; '.join(said)}." if said else "Its agreement is of too few prompts."
