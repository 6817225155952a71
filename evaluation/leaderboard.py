"""A leaderboard over contestants from outcomes of pairs: Bradley–Terry ratings with intervals.

Owns the ratings, plain and with length and style held equal, as pure functions of matches. Whoever judged the
matches is elsewhere. Intervals are bootstraps that draw whole prompts, as in `evaluation.comparison`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import evalica
import numpy as np
from numpy.typing import NDArray

from evaluation.comparison import Interval

Floats = NDArray[np.float64]

SCALE = 400 / np.log(10)
"""Ratings are on Elo's scale: 400 more are odds of 10 to 1. Their mean is 1000."""

# Each contestant also ties once with an imagined one: ratings stay finite where somebody won every match.
_PRIOR_TIES = 1.0
_IMAGINED = ""

_HEADER = re.compile(r"(?m)^ {0,3}#{1,6}\s")
_LIST_ITEM = re.compile(r"(?m)^\s*(?:[-*+]|\d+[.)])\s+\S")
_BOLD = re.compile(r"(\*\*|__)(?=\S).+?(?<=\S)\1")


@dataclass(frozen=True, slots=True)
class Style:
    """What a judge may be led by beside the content: characters, and counts of markdown."""

    length: int
    headers: int = 0
    list_items: int = 0
    bold: int = 0


@dataclass(frozen=True, slots=True)
class Match:
    """One pair of answers to a prompt: `outcome` is the first contestant's, 1 won, 0 lost, 0.5 tied."""

    prompt: str
    first: str
    second: str
    outcome: float
    first_style: Style | None = None
    second_style: Style | None = None


@dataclass(frozen=True, slots=True)
class Rating:
    """One contestant's place: `rank` is 1 more than the number of those who are surely better.

    Surely means that the interval of the difference leaves out 0: two intervals may overlap and the
    difference be sure all the same, since both ratings move together when prompts are drawn.
    """

    contestant: str
    rating: Interval
    rank: int
    matches: int


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Ratings, best first; `style` is what a standard deviation of each style's difference is worth.

    Style effects are in rating points, positive where more of it wins; empty on a plain leaderboard.
    """

    ratings: list[Rating]
    style: dict[str, Interval]

    def figures(self) -> dict[str, Any]:
        """Return the leaderboard as plain JSON."""
        return asdict(self)


def style_of(text: str) -> Style:
    """Measure a text."""
    found = (len(pattern.findall(text)) for pattern in (_HEADER, _LIST_ITEM, _BOLD))
    return Style(len(text), *found)


def bradley_terry(
    matches: Sequence[Match], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Leaderboard:
    """Rate contestants by who beat whom (Bradley and Terry 1952), a tie being half a win for each.

    Raises ValueError with matches of fewer than two prompts or contestants.
    """
    table = _Table(matches)
    cells = sorted({(match.first, match.second, match.outcome) for match in matches})
    column = {cell: i for i, cell in enumerate(cells)}
    counts = np.zeros((len(table.prompts), len(cells)))  # matches by prompt and kind of cell
    for match, prompt in zip(matches, table.prompt, strict=True):
        counts[prompt, column[match.first, match.second, match.outcome]] += 1
    firsts = [first for first, _, _ in cells] + table.contestants
    seconds = [second for _, second, _ in cells] + [_IMAGINED] * len(table.contestants)
    winners = [_WINNER[outcome] for _, _, outcome in cells] + [evalica.Winner.Draw] * len(table.contestants)
    _, _, index = evalica.indexing(firsts, seconds)

    def rate(times: Floats) -> Floats:
        """Rate with each prompt counted so many times."""
        weights = [*(times @ counts), *[_PRIOR_TIES] * len(table.contestants)]
        found = evalica.bradley_terry(
            firsts, seconds, winners, index=index, weights=weights, tolerance=1e-8, limit=10_000
        )
        return np.asarray(np.log(found.scores[table.contestants].to_numpy()) * SCALE, dtype=np.float64)

    return table.leaderboard(rate, confidence, resamples, seed)


def style_controlled(
    matches: Sequence[Match], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Leaderboard:
    """Rate contestants as if all answers had the same length and markdown.

    Bradley–Terry as a logistic regression with the differences in style as covariates, each relative to the
    sum of both, as Chatbot Arena's style control (Li, Angelopoulos and Chiang 2024). They are divided by
    their root mean square and not centred: here a contestant may always stand first. Raises ValueError with
    matches of fewer than two prompts or contestants, or without styles.
    """
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - takes a second to import

    table = _Table(matches)
    who = _design(matches, table.contestants)  # (M, C)
    style = _style_differences(matches)  # (M, S)
    outcomes = np.array([match.outcome for match in matches])
    contestants = np.eye(len(table.contestants))
    features = np.block([[who, style], [contestants, np.zeros((len(contestants), style.shape[1]))]])
    wins = np.concatenate([outcomes, np.full(len(contestants), 0.5)])
    # A tie is half a win and half a loss: each row twice, weighed by its outcome.
    rows, won = np.vstack([features, features]), np.repeat([1, 0], len(features))
    shares = np.concatenate([wins, 1 - wins])
    # So weak a penalty only keeps apart what the matches do not, such as a style that never differs.
    model = LogisticRegression(C=1e6, fit_intercept=False, solver="newton-cholesky", tol=1e-8)

    def rate(times: Floats) -> Floats:
        weights = np.concatenate([times[table.prompt], np.full(len(contestants), _PRIOR_TIES)])
        weights = np.concatenate([weights, weights]) * shares
        kept = weights > 0
        found = model.fit(rows[kept], won[kept], sample_weight=weights[kept]).coef_[0] * SCALE
        return np.asarray(found, dtype=np.float64)

    return table.leaderboard(rate, confidence, resamples, seed)


_WINNER = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
_STYLES = ("length", "headers", "list_items", "bold")


class _Table:
    """Matches by number: `prompt` (M,) says which of `prompts` each match is of."""

    def __init__(self, matches: Sequence[Match]) -> None:
        if any(match.outcome not in _WINNER for match in matches):
            raise ValueError("an outcome is 0, 0.5 or 1")
        self.contestants = sorted({name for match in matches for name in (match.first, match.second)})
        if len(self.contestants) < 2:
            raise ValueError("a leaderboard needs at least two contestants")
        if any(match.first == match.second for match in matches):
            raise ValueError("a contestant can't play against itself")
        names, self.prompt = np.unique([match.prompt for match in matches], return_inverse=True)
        self.prompts: list[str] = names.tolist()
        if len(self.prompts) < 2:
            raise ValueError("an interval needs matches on at least two prompts")
        self._matches = matches

    def leaderboard(
        self, rate: Callable[[Floats], Floats], confidence: float, resamples: int, seed: int
    ) -> Leaderboard:
        """Rate once with each prompt counted once, and once for every draw of prompts.

        `rate` returns the contestants' log-strengths, then the effects of style if it has any.
        """
        count, places = len(self.prompts), len(self.contestants)
        random = np.random.default_rng(seed)
        drawn = random.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)
        found = np.array([rate(np.ones(count)), *(rate(times) for times in drawn)])  # (1 + resamples, C + S)
        found[:, :places] += 1000 - found[:, :places].mean(axis=1, keepdims=True)
        low, high = np.quantile(found[1:], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        strengths = found[1:, :places]
        lead = np.quantile(strengths[:, :, None] - strengths[:, None, :], (1 - confidence) / 2, axis=0)
        ranks = 1 + (lead > 0).sum(axis=0)  # lead[j, i]: by how much j is better than i at least
        intervals = [
            Interval(float(found[0, i]), float(low[i]), float(high[i]), confidence, count, len(self._matches))
            for i in range(found.shape[1])
        ]
        ratings = [
            Rating(name, intervals[i], int(ranks[i]), self._played(name))
            for i, name in enumerate(self.contestants)
        ]
        return Leaderboard(
            sorted(ratings, key=lambda rating: -rating.rating.estimate),
            dict(zip(_STYLES, intervals[places:], strict=False)),
        )

    def _played(self, name: str) -> int:
        return sum(name in (match.first, match.second) for match in self._matches)


def _design(matches: Sequence[Match], contestants: Sequence[str]) -> Floats:
    """1 in the column of who stands first, -1 in that of who stands second, (M, C)."""
    place = {name: i for i, name in enumerate(contestants)}
    rows = np.zeros((len(matches), len(contestants)))
    for row, match in zip(rows, matches, strict=True):
        row[place[match.first]], row[place[match.second]] = 1, -1
    return rows


def _style_differences(matches: Sequence[Match]) -> Floats:
    """Return the differences in style, relative to the sums and scaled to a root mean square of 1, (M, S)."""
    rows = []
    for match in matches:
        if match.first_style is None or match.second_style is None:
            raise ValueError("style control needs the style of every answer")
        ours, theirs = asdict(match.first_style), asdict(match.second_style)
        rows.append([(ours[s] - theirs[s]) / max(1, ours[s] + theirs[s]) for s in _STYLES])
    differences = np.array(rows)
    spread = np.sqrt((differences**2).mean(axis=0))
    scaled: Floats = differences / np.where(spread > 0, spread, 1)
    return scaled
