"""What came of an evaluation as figures: win rates, ties, leaderboards by judge and by axis, lengths, labels.

Owns which figures there are; intervals are `comparison`'s, ratings `leaderboard`'s, shares of labels those of
`evaluation.labels`. The result is plain JSON and has no text of prompts or answers in it.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.agreement import statement
from evaluation.checks import words
from evaluation.comparison import clustered_mean, win_rate
from evaluation.contestants import Answer
from evaluation.judges import CasesJudge, ChatPrompt, ChecksJudge, Judge
from evaluation.labels import Labelling, label_shares
from evaluation.leaderboard import Match, bradley_terry, style_controlled, style_of
from evaluation.people_judge import PeopleJudge
from evaluation.settings import EvaluationSettings

Answers = Sequence[Sequence[Answer]]

_RATING_RESAMPLES = 500
"""Fewer than of a mean: each is a fit over all matches."""


@dataclass(frozen=True, slots=True)
class Duel:
    """A judge's verdicts on two contestants: for each prompt, on each two answers, None for no verdict."""

    judge: int
    pair: tuple[int, int]
    verdicts: Sequence[Sequence[float | None]]


def figures(
    *,
    contestants: Sequence[str],
    judges: Sequence[Judge],
    prompts: Sequence[ChatPrompt],
    answers: Sequence[Answers],
    duels: Sequence[Duel],
    labellings: Sequence[Labelling],
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, Any]:
    """Return the result of an evaluation as plain JSON.

    One table a judge, and one an axis where several judges judge by it: all their verdicts together. One
    table of labels for each who gave some.
    """
    keys = [prompt.key for prompt, own in zip(prompts, answers[0], strict=True) for _ in own]
    tables = [(judge.name, judge.axis, [j]) for j, judge in enumerate(judges)]
    for axis in dict.fromkeys(judge.axis for judge in judges):
        same = [j for j, judge in enumerate(judges) if judge.axis == axis]
        if len(same) > 1:
            tables.append((f"all judges by {axis}", axis, same))
    return {
        "prompts": len(prompts),
        "prompts_with_checks": sum(bool(prompt.checks) for prompt in prompts),
        "contestants": [
            _of_answers(name, prompts, own, settings, seed)
            for name, own in zip(contestants, answers, strict=True)
        ],
        "judges": [
            {
                "name": judge.name,
                "axis": judge.axis,
                "agreement": judge.agreement,
                "statement": _statement(judge),
            }
            for judge in judges
        ],
        "tables": [
            {
                "name": name,
                "axis": axis,
                "pairs": table.pairs(settings, seed),
                "leaderboards": table.leaderboards(settings, seed),
            }
            for name, axis, table in (
                (
                    name,
                    axis,
                    _Table(contestants, prompts, answers, [duel for duel in duels if duel.judge in own]),
                )
                for name, axis, own in tables
            )
        ],
        "labels": [label_shares(one, contestants, keys, settings, seed) for one in labellings],
    }


class _Table:
    """All verdicts of one judge, or of all who judge by one axis."""

    def __init__(
        self,
        contestants: Sequence[str],
        prompts: Sequence[ChatPrompt],
        answers: Sequence[Answers],
        duels: Sequence[Duel],
    ) -> None:
        self._contestants = contestants
        self._prompts = prompts
        self._duels = duels
        self._styles = [[[style_of(one.text) for one in own] for own in answer] for answer in answers]

    def pairs(self, settings: EvaluationSettings, seed: int) -> list[dict[str, Any]]:
        """Return how often the first of every two wins; None for the rate without verdicts on two prompts."""
        rows = []
        for first, second in dict.fromkeys(duel.pair for duel in self._duels):
            own = [duel for duel in self._duels if duel.pair == (first, second)]
            given = sum(len(verdicts) for duel in own for verdicts in duel.verdicts)
            judged = [(prompt, verdict) for prompt, _, _, _, verdict in self._judged(own)]
            clusters = [prompt for prompt, _ in judged]
            rate = None
            if len(set(clusters)) > 1:
                rate = win_rate(
                    clusters,
                    [verdict for _, verdict in judged],
                    confidence=settings.confidence,
                    resamples=settings.resamples,
                    seed=seed,
                )
            rows.append(
                {
                    "first": self._contestants[first],
                    "second": self._contestants[second],
                    "win_rate": rate and rate.figures(),
                    "verdicts": len(judged),
                    "ties": sum(verdict == 0.5 for _, verdict in judged),
                    "no_verdict": given - len(judged),
                }
            )
        return rows

    def leaderboards(self, settings: EvaluationSettings, seed: int) -> dict[str, Any]:
        """Return the leaderboard, `plain` and with length and style held equal (`controlled`).

        Empty without verdicts on two prompts.
        """
        matches = [
            Match(
                prompt,
                self._contestants[first],
                self._contestants[second],
                verdict,
                self._styles[first][at][k],
                self._styles[second][at][k],
            )
            for prompt, (first, second), at, k, verdict in self._judged(self._duels)
        ]
        if len({match.prompt for match in matches}) < 2:
            return {}
        ways = {"plain": bradley_terry, "controlled": style_controlled}
        with warnings.catch_warnings():
            # Where hardly anything is decided the regression turns to another solver, and says so each time.
            warnings.filterwarnings("ignore", "Line search of Newton solver")
            return {
                name: rate(
                    matches, confidence=settings.confidence, resamples=_RATING_RESAMPLES, seed=seed
                ).figures()
                for name, rate in ways.items()
            }

    def _judged(self, duels: Sequence[Duel]) -> Iterator[tuple[str, tuple[int, int], int, int, float]]:
        """Yield each verdict with the prompt's key, the pair, and which prompt and which of its answers."""
        for duel in duels:
            for at, own in enumerate(duel.verdicts):
                for k, verdict in enumerate(own):
                    if verdict is not None:
                        yield self._prompts[at].key, duel.pair, at, k, verdict


def _of_answers(
    name: str, prompts: Sequence[ChatPrompt], answers: Answers, settings: EvaluationSettings, seed: int
) -> dict[str, Any]:
    flat = [(prompt.key, answer) for prompt, own in zip(prompts, answers, strict=True) for answer in own]
    tokens = [answer.tokens for _, answer in flat if answer.tokens is not None]
    length = clustered_mean(
        [key for key, _ in flat],
        [len(words(answer.text)) for _, answer in flat],
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=seed,
    )
    return {
        "name": name,
        "answers": len(flat),
        "words": length.figures(),
        "tokens": sum(tokens) / len(tokens) if tokens else None,
        "cut_off": _share(answer.finish_reason == "length" for _, answer in flat),
        "empty": _share(not answer.text.strip() for _, answer in flat),
    }


def _share(values: Iterable[bool]) -> float:
    all_ = list(values)
    return sum(all_) / len(all_)


def _statement(judge: Judge) -> str:
    """Say how far a judge is to be believed."""
    if isinstance(judge, ChecksJudge):
        return "A program, which does not err about what it checks."
    if isinstance(judge, CasesJudge):
        by = "nothing" if judge.reference is None else f"the {judge.reference.name}"
        return f"Programs where a case has checks, else {by}. {statement(judge.agreement)}"
    if isinstance(judge, PeopleJudge):
        return "People, who did not know whose answers they compared."
    return statement(judge.agreement)
