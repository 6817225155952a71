"""An evaluation's report: who won how often by whom, how sure that is, labels, and answers side by side.

Owns the choice and the order of what is shown; how it looks is `evaluation.report`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.evaluation_files import EvaluationFiles
from evaluation.labels import WORDS
from evaluation.report import Report, Response
from evaluation.round_report import flat
from registry.evaluations import Evaluation

SHOWN_PROMPTS = 12
_LEADERBOARDS = {
    "plain": "Leaderboard (Bradley–Terry)",
    "controlled": "Leaderboard with length and markdown held equal",
}
_LONGEST_LABEL = 48
Bar = tuple[str, float, float, float]
"""A label, an estimate and the bounds of its interval."""


def evaluation_report(evaluation: Evaluation, files: EvaluationFiles) -> Report:
    """Make the report of one evaluation, as far as it is."""
    report = Report(f"Evaluation {evaluation.id}", _summary(evaluation))
    if evaluation.error is not None:
        report.heading("Why it failed")
        report.items(evaluation.error.splitlines())
    if evaluation.result is not None:
        _add_tables(report, evaluation.result)
        _add_answers(report, evaluation.result)
        _add_labels(report, evaluation.result)
        _add_judges(report, evaluation.result)
    _add_samples(report, evaluation, files)
    report.heading("What was asked for")
    rows = [(key, value) for key, value in evaluation.request.items() if not isinstance(value, list)]
    report.table(["setting", "value"], [(key, str(value)) for key, value in rows])
    return report


def _summary(evaluation: Evaluation) -> str:
    names = [contestant.name for contestant in evaluation.asked.contestants]
    text = f"{', '.join(names[:-1])} and {names[-1]}. It is {evaluation.state}"
    if evaluation.state in ("running", "cancelled") and evaluation.total:
        text += f" at {evaluation.step}, {evaluation.done / evaluation.total:.0%} of all"
    if evaluation.result is not None:
        text += f", on {evaluation.result['prompts']} prompts"
    return text + "."


def _add_tables(report: Report, result: Mapping[str, Any]) -> None:
    for table in result["tables"]:
        name, axis = table["name"], table["axis"]
        report.heading(f"By {name}" if axis in name.split() else f"By {name}: {axis}")
        pairs = table["pairs"]
        if not any(pair["verdicts"] for pair in pairs):
            report.paragraph("It gave no verdict on these prompts.")
            continue
        _add_leaderboards(report, table)
        _add_pairs(report, pairs)
        if len(result["contestants"]) > 2:
            _add_matrix(report, [one["name"] for one in result["contestants"]], pairs)


def _add_leaderboards(report: Report, table: Mapping[str, Any]) -> None:
    """Add the ratings; of two contestants they say no more than the win rate."""
    for kind, caption in _LEADERBOARDS.items():
        board = table["leaderboards"].get(kind)
        if board is None:
            continue
        ratings = [(one["contestant"], one["rank"], _bounds(one["rating"])) for one in board["ratings"]]
        report.intervals(caption, _short([(name, *bounds) for name, _, bounds in ratings]), x_label="rating")
        report.table(
            ["contestant", "rank", "rating", "interval"],
            # Points mean nothing below one.
            [
                (name, rank, round(estimate), f"[{low:.0f},\N{NO-BREAK SPACE}{high:.0f}]")
                for name, rank, (estimate, low, high) in ratings
            ],
            caption="A rank is 1 more than how many are surely better; 400 points are odds of 10 to 1.",
        )
        if board["style"]:
            report.table(
                ["what else wins", "rating points a standard deviation"],
                flat(board["style"]),
                caption="What it is worth to be longer, or to have more markdown, than the other answer.",
            )


def _add_pairs(report: Report, pairs: Sequence[Mapping[str, Any]]) -> None:
    rated = [pair for pair in pairs if pair["win_rate"] is not None]
    report.table(
        ["first", "second", "first wins", "interval", "ties", "verdicts", "no verdict"],
        [
            (
                pair["first"],
                pair["second"],
                rate["estimate"] if (rate := pair["win_rate"]) else None,
                _span(rate["low"], rate["high"]) if rate else None,
                pair["ties"],
                pair["verdicts"],
                pair["no_verdict"],
            )
            for pair in pairs
        ],
        caption="A tie counts half. Intervals are over prompts: answers to one prompt are not independent.",
    )
    if rated:
        rows = [(f"{pair['first']} over {pair['second']}", *_bounds(pair["win_rate"])) for pair in rated]
        report.intervals(
            "Win rates with their intervals", _short(rows), x_label="win rate", limits=(0, 1), reference=0.5
        )


def _add_matrix(report: Report, names: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> None:
    rates: dict[tuple[str, str], float] = {}
    for pair in pairs:
        if pair["win_rate"] is not None:
            estimate = pair["win_rate"]["estimate"]
            rates[pair["first"], pair["second"]] = estimate
            rates[pair["second"], pair["first"]] = 1 - estimate
    rows = [(row, *(rates.get((row, column)) for column in names)) for row in names]
    report.table(["wins over", *names], rows, caption="How often the row wins over the column.")


def _add_answers(report: Report, result: Mapping[str, Any]) -> None:
    report.heading("Their answers")
    report.table(
        ["contestant", "answers", "words", "interval", "own tokens", "cut off", "empty"],
        [
            (
                one["name"],
                one["answers"],
                one["words"]["estimate"],
                _span(one["words"]["low"], one["words"]["high"]),
                one["tokens"],
                one["cut_off"],
                one["empty"],
            )
            for one in result["contestants"]
        ],
        caption="Means over all answers, and the shares that ran into the limit and that say nothing.",
    )


def _add_labels(report: Report, result: Mapping[str, Any]) -> None:
    for source in result.get("labels", ()):
        report.heading(f"Labels of their answers by {source['source']}")
        contestants = source["contestants"]
        report.table(
            ["label", *(one["name"] for one in contestants)],
            [
                ("answers looked at", *(str(one["answers"]) for one in contestants)),
                *(
                    (words, *(_estimate(one["shares"][label]) for one in contestants))
                    for label, words in WORDS.items()
                ),
            ],
            caption="Shares of each contestant's answers, with intervals over prompts. Where several looked "
            "at an answer, it counts by the share of them that gave the label.",
        )


def _add_judges(report: Report, result: Mapping[str, Any]) -> None:
    report.heading("Who judged")
    rows = [(judge["name"], judge["axis"], judge["statement"]) for judge in result["judges"]]
    report.table(["judge", "by", "agreement with people"], rows)


def _add_samples(report: Report, evaluation: Evaluation, files: EvaluationFiles) -> None:
    prompts = files.prompts()
    if prompts is None:
        if evaluation.state == "done":
            report.paragraph(
                "Prompts and answers were deleted since: one was forgotten, or they were too old."
            )
        return
    names = [contestant.name for contestant in evaluation.asked.contestants]
    answers = [files.answers_so_far(i, 0) for i in range(len(names))]
    rows = [
        (
            "\n".join(f"{message['role']}: {message['content']}" for message in prompt["messages"]),
            [Response(own[i][0]["text"]) if i < len(own) else Response("–") for own in answers],
        )
        for i, prompt in enumerate(prompts[:SHOWN_PROMPTS])
    ]
    if any(answers):
        report.heading("Answers side by side")
        report.paragraph("The first answers to the first prompts; nobody chose them.")
        report.samples(names, rows)


def _short(rows: Sequence[Bar]) -> list[Bar]:
    """Cut labels that would leave no room for the plot."""
    return [
        (name if len(name) <= _LONGEST_LABEL else f"{name[: _LONGEST_LABEL - 1]}…", estimate, low, high)
        for name, estimate, low, high in rows
    ]


def _estimate(interval: Mapping[str, float] | None) -> str | None:
    if interval is None:
        return None
    return f"{interval['estimate']:.3f} {_span(interval['low'], interval['high'])}"


def _bounds(interval: Mapping[str, float]) -> tuple[float, float, float]:
    return interval["estimate"], interval["low"], interval["high"]


def _span(low: float, high: float) -> str:
    return f"[{low:.3f},\N{NO-BREAK SPACE}{high:.3f}]"
