"""What came of an evaluation as figures: win rates, ties and leaderboards by judge and by axis, lengths.

Owns which figures there are; intervals are `comparison`'s, ratings `leaderboard`'s. The result is plain JSON
and has no text of prompts or answers in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.checks import words
from evaluation.comparison import clustered_mean, win_rate
from evaluation.contestants import Answer
from evaluation.judges import ChatPrompt, Judge
from evaluation.settings import EvaluationSettings

Answers = Sequence[Sequence[Answer]]


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
    settings: EvaluationSettings,
    seed: int,
) -> dict[str, Any]:
    """Return the result of an evaluation as plain JSON.

    One table a judge, and one an axis where several judges judge by it: all their verdicts together.
    """
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
            {"name": judge.name, "axis": judge.axis, "agreement": judge.agreement} for judge in judges
        ],
        "tables": [
            {
                "name": name,
                "axis": axis,
                "pairs": _pairs(
                    contestants, prompts, [duel for duel in duels if duel.judge in own], settings, seed
                ),
            }
            for name, axis, own in tables
        ],
    }


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


def _pairs(
    contestants: Sequence[str],
    prompts: Sequence[ChatPrompt],
    duels: Sequence[Duel],
    settings: EvaluationSettings,
    seed: int,
) -> list[dict[str, Any]]:
    rows = []
    for pair in dict.fromkeys(duel.pair for duel in duels):
        given = [
            (prompt.key, verdict)
            for duel in duels
            if duel.pair == pair
            for prompt, own in zip(prompts, duel.verdicts, strict=True)
            for verdict in own
        ]
        judged = [(key, verdict) for key, verdict in given if verdict is not None]
        clusters = [key for key, _ in judged]
        rate = None
        if len(set(clusters)) > 1:
            rate = win_rate(
                clusters,
                [verdict for _, verdict in judged],
                confidence=settings.confidence,
                resamples=settings.resamples,
                seed=seed,
            ).figures()
        rows.append(
            {
                "first": contestants[pair[0]],
                "second": contestants[pair[1]],
                "win_rate": rate,
                "verdicts": len(judged),
                "ties": sum(verdict == 0.5 for _, verdict in judged),
                "no_verdict": len(given) - len(judged),
            }
        )
    return rows


def _share(values: Iterable[bool]) -> float:
    all_ = list(values)
    return sum(all_) / len(all_)
