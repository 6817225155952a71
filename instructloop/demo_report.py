"""The demo's figures and its report: how often constraints were met before and after, and what the round did.

Owns the numbers that the demo claims and how they are shown. It sends nothing; `instructloop.demo` collects.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from evaluation.checks import all_satisfied, satisfied, words
from evaluation.comparison import Interval, paired_difference
from evaluation.report import Report, Response, Series
from instructloop.demo_instructions import KINDS, Instruction
from registry.rounds import Metric

_SAMPLES = 16
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """Answers of one version to the held-out instructions, in their order: several sampled, one greedy."""

    version: str
    instructions: tuple[Instruction, ...]
    sampled: tuple[tuple[str, ...], ...]
    greedy: tuple[str, ...]


Judge = Callable[[Instruction, str], bool]


def _all(instruction: Instruction, text: str) -> bool:
    return all_satisfied(instruction.checks, text)


def _constraint(instruction: Instruction, text: str) -> bool:
    return satisfied(instruction.checks[0], text)


def figures(before: Measurement, after: Measurement, *, seed: int) -> dict[str, Any]:
    """Return what the demo measured as plain JSON; both measurements are of the same instructions.

    An answer counts as satisfactory when it meets all checks of its instruction. Differences are paired by
    instruction, with intervals clustered by it.
    """
    sampled = _difference(before, after, _all, seed)
    conclusion = _conclusion(before, after, sampled)
    return {
        "versions": {"before": before.version, "after": after.version},
        "instructions": len(before.instructions),
        "satisfaction": {
            "before": _mean(before, _all),
            "after": _mean(after, _all),
            "difference": sampled.figures(),
            "by_kind": {"before": _by_kind(before), "after": _by_kind(after)},
        },
        "constraint_alone": {
            "before": _mean(before, _constraint),
            "after": _mean(after, _constraint),
            "difference": _difference(before, after, _constraint, seed).figures(),
        },
        "greedy": {
            "before": _greedy_mean(before),
            "after": _greedy_mean(after),
            "difference": _greedy_difference(before, after, seed).figures(),
        },
        # Figures that would show an improvement bought with answers that are empty or all the same.
        "answers": {"before": _shape(before), "after": _shape(after)},
        "improved": sampled.low > 0,
        "conclusions": conclusion,
        "samples": [
            {"instruction": instruction.text, "kind": instruction.kind, "before": old, "after": new}
            for instruction, old, new in _side_by_side(before, after)
        ],
    }


def _values(measured: Measurement, judge: Judge) -> list[float]:
    return [
        float(judge(instruction, text))
        for instruction, texts in zip(measured.instructions, measured.sampled, strict=True)
        for text in texts
    ]


def _mean(measured: Measurement, judge: Judge) -> float:
    return fmean(_values(measured, judge))


def _difference(before: Measurement, after: Measurement, judge: Judge, seed: int) -> Interval:
    clusters = [
        instruction.text
        for instruction, texts in zip(before.instructions, before.sampled, strict=True)
        for _ in texts
    ]
    return paired_difference(
        clusters, _values(before, judge), _values(after, judge), resamples=_RESAMPLES, seed=seed
    )


def _greedy_values(measured: Measurement) -> list[float]:
    return [
        float(_all(instruction, text))
        for instruction, text in zip(measured.instructions, measured.greedy, strict=True)
    ]


def _greedy_mean(measured: Measurement) -> float:
    return fmean(_greedy_values(measured))


def _greedy_difference(before: Measurement, after: Measurement, seed: int) -> Interval:
    clusters = [instruction.text for instruction in before.instructions]
    return paired_difference(
        clusters, _greedy_values(before), _greedy_values(after), resamples=_RESAMPLES, seed=seed
    )


def _by_kind(measured: Measurement) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for instruction, texts in zip(measured.instructions, measured.sampled, strict=True):
        found.setdefault(instruction.kind, []).extend(float(_all(instruction, text)) for text in texts)
    return {kind: fmean(found[kind]) for kind in KINDS if kind in found}


def _shape(measured: Measurement) -> dict[str, float]:
    texts = [text for found in measured.sampled for text in found]
    return {
        "mean_words": fmean(len(words(text)) for text in texts),
        "distinct_share": len(set(texts)) / len(texts),
    }


def _side_by_side(before: Measurement, after: Measurement) -> list[tuple[Instruction, str, str]]:
    """Return the first answers to one instruction a kind, not chosen for how well they turned out."""
    kinds: set[str] = set()
    rows = []
    for instruction, old, new in zip(before.instructions, before.sampled, after.sampled, strict=True):
        if instruction.kind not in kinds:
            kinds.add(instruction.kind)
            rows.append((instruction, old[0], new[0]))
    return rows[:_SAMPLES]


def _conclusion(before: Measurement, after: Measurement, difference: Interval) -> list[str]:
    if before.version == after.version:
        first = f"{before.version} still serves: no new version was promoted."
    else:
        first = f"{after.version} serves in place of {before.version}."
    numbers = (
        f"On {len(before.instructions)} held-out instructions all constraints were met in "
        f"{_mean(before, _all):.1%} of the answers before and {_mean(after, _all):.1%} after: "
        f"a difference of {difference.estimate:+.1%}, "
        f"95 % interval [{difference.low:+.1%}, {difference.high:+.1%}]."
    )
    if difference.low > 0:
        last = "The interval lies above zero: it improved."
    elif difference.high < 0:
        last = "The interval lies below zero: it got worse."
    else:
        last = "The interval holds zero: no improvement is shown."
    return [first, numbers, last]


def write_report(path: Path, found: Mapping[str, Any], before: Measurement, after: Measurement) -> None:
    """Write the HTML report of `found`; raises evaluation.report.ReportProblem."""
    report = Report(
        "InstructLoop demo",
        "The rater in this demo is a script, not a person: it ranks answers by checks that a program can do.",
    )
    report.items(found["conclusions"])
    _add_satisfaction(report, found)
    _add_round(report, found["round"])
    _add_swap(report, found["swap"])
    report.heading("Answers side by side")
    report.paragraph(
        "The first sampled answer to the first instruction of each kind; a tick: all checks met."
    )
    report.samples(
        [f"before: {before.version}", f"after: {after.version}"],
        [
            (instruction.text, [Response(text, _all(instruction, text)) for text in (old, new)])
            for instruction, old, new in _side_by_side(before, after)
        ],
    )
    report.heading("How it was run")
    report.table(["part", "seconds"], list(found["seconds"].items()))
    report.table(["feedback", "events"], list(found["feedback"].items()))
    report.table(["setting", "value"], [("seed", found["seed"]), *found["sizes"].items()])
    report.write(path)


def _add_satisfaction(report: Report, found: Mapping[str, Any]) -> None:
    report.heading("How often the constraints were met")
    rows = []
    for label, name in (
        ("all checks, sampled", "satisfaction"),
        ("the constraint alone, sampled", "constraint_alone"),
        ("all checks, greedy", "greedy"),
    ):
        part = found[name]
        difference = part["difference"]
        interval = f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
        rows.append((label, part["before"], part["after"], difference["estimate"], interval))
    report.table(["share of answers", "before", "after", "difference", "95 % interval"], rows)
    kinds = found["satisfaction"]["by_kind"]
    report.bars(
        "All checks met, by kind of constraint (sampled answers to held-out instructions)",
        list(kinds["before"]),
        {name: list(kinds[name].values()) for name in ("before", "after")},
        x_label="share of answers",
        limits=(0, 1),
    )
    shapes = found["answers"]
    report.table(
        ["answers", "before", "after"],
        [
            ("mean words", shapes["before"]["mean_words"], shapes["after"]["mean_words"]),
            (
                "share of distinct answers",
                shapes["before"]["distinct_share"],
                shapes["after"]["distinct_share"],
            ),
        ],
    )


def _add_round(report: Report, finished: Mapping[str, Any]) -> None:
    report.heading(f"Round {finished['id']}")
    if finished["error"]:
        report.paragraph(f"It failed: {finished['error']}")
    verdict = finished["verdict"] or {}
    if verdict:
        report.paragraph("The gate promoted the candidate." if verdict.get("promote") else "Not promoted.")
        report.items(verdict.get("reasons", []))
    metrics = [
        Metric(item["stage"], item["step"], item["name"], item["value"], item["at"])
        for item in finished["metrics"]
    ]
    _add_curve(report, metrics, ("score", "reward"), "The learned reward of the episodes", "reward")
    _add_curve(report, metrics, ("kl",), "KL from the reference policy", "nats a response")
    report.heading("All figures of the round")
    report.metrics(metrics)


def _add_curve(
    report: Report, metrics: Sequence[Metric], names: tuple[str, ...], caption: str, label: str
) -> None:
    """Plot PPO's figures whose last name part has one of `names` in it, if it has any."""
    found: dict[str, dict[int, float | None]] = {}
    for metric in metrics:
        if metric.name.startswith("objective/") and any(name in metric.name for name in names):
            found.setdefault(metric.name, {})[metric.step] = metric.value
    series = [
        Series(name, list(points), list(points.values())) for name, points in found.items() if len(points) > 1
    ]
    if series:
        report.lines(caption, series, x_label="update", y_label=label)


def _add_swap(report: Report, swap: Mapping[str, Any]) -> None:
    report.heading("Streams across the swap")
    report.table(
        ["what", "count"],
        [
            ("streams", swap["streams"]),
            ("tokens each", swap["tokens_each"]),
            ("failed", swap["failed"]),
            ("cut short", swap["cut"]),
            ("with tokens of more than one version", swap["across_the_swap"]),
            ("every token attributed to a version", swap["every_token_attributed"]),
        ],
    )
    if swap["errors"]:
        report.items(swap["errors"])
    if swap["divided"]:
        rows = [
            (
                item["completion_id"],
                "; ".join(f"{name}: {start} to {end}" for name, start, end in item["spans"]),
            )
            for item in swap["divided"]
        ]
        report.table(["completion", "tokens by version"], rows)
