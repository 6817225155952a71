"""A round's report: what it learned, measured and decided, from what the store has, also while it runs.

Owns the choice and the order of what is shown; how it looks is `evaluation.report`'s.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from evaluation.gate import in_words
from evaluation.report import Report, Response, Series
from feedback.cases import Case, CaseResult, Change
from registry.round_record import RoundRecord
from registry.rounds import Metric

PLOTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Reward of the episodes", "score", ("objective/scores", "objective/rlhf_reward")),
    ("Gold reward of the episodes, never trained on", "score", ("objective/gold", "gold/score")),
    ("KL from the reference policy", "nats a response", ("objective/kl",)),
    ("Entropy of the responses", "nats a response", ("objective/entropy",)),
    ("Length of the responses", "tokens", ("response/length",)),
    ("Share of responses that end by themselves", "share", ("response/ended",)),
    ("Share of clipped ratios and values", "share", ("policy/clipfrac_avg", "val/clipfrac_avg")),
    ("Variance of the returns that the values explain", "share", ("val/explained_variance",)),
    ("Value loss", "loss", ("loss/value_avg",)),
    ("Policy loss", "loss", ("loss/policy_avg",)),
    ("Distance of the engine's logprobs from the trainer's", "nats", ("rollout/logprob_gap",)),
    ("Loss", "loss", ("loss",)),
    ("Share of pairs ranked as people did", "share", ("accuracy",)),
)
"""(caption, unit, names): what is plotted by itself, for each stage that has it; the rest is in a grid."""

_CHANGES: tuple[Change, ...] = ("fixed", "broke", "still failing", "still passing")

_WATCH = "checkpoints"
"""The stage whose metrics are points on the plane of the over-optimisation watch."""

_INTERVAL = ("estimate", "low", "high")

Samples = Sequence[Mapping[str, Any]]


def round_report(
    record: RoundRecord, samples: Samples, cases: Sequence[tuple[Case, CaseResult]] = ()
) -> Report:
    """Make the report of one round.

    `samples` are the lines of its `training.samples.SampleLog`, `cases` what was answered to each case.
    """
    round_ = record.round
    report = Report(f"Round {round_.id}", _summary(record))
    _add_outcome(report, record)
    _add_cases(report, cases)
    _add_stages(report, record)
    _add_plane(report, record)
    _add_figures(report, [metric for metric in record.metrics if metric.stage != _WATCH])
    _add_samples(report, samples)
    report.heading("Configuration")
    for section, values in _sections(round_.config):
        report.table(["setting", "value"], [(key, str(value)) for key, value in values.items()], section)
    return report


def _summary(record: RoundRecord) -> str:
    round_ = record.round
    text = f"It is {round_.state}"
    if round_.state == "running" and round_.stage is not None:
        text += f", in the stage {round_.stage}"
    if round_.cutoff is not None:
        text += f". It learns from the events {round_.cursor}..{round_.cutoff}, with seed {round_.seed}"
    if round_.repeat_of is not None:
        text += f". It repeats round {round_.repeat_of}"
    if round_.version is not None:
        text += f". It made {round_.version}"
    return text + "."


def _add_outcome(report: Report, record: RoundRecord) -> None:
    verdict = record.round.verdict
    if record.round.error is not None:
        report.heading("Why it failed")
        report.items(record.round.error.splitlines())
    if verdict is not None:
        report.heading("Verdict")
        decision, *reasons = in_words(verdict)
        report.paragraph(decision)
        report.items(reasons)


def _add_cases(report: Report, cases: Sequence[tuple[Case, CaseResult]]) -> None:
    if not cases:
        return
    report.heading("Cases")
    _, first = cases[0]
    counts = Counter(result.change for _, result in cases)
    report.paragraph(", ".join(f"{counts[change]} {change}" for change in _CHANGES) + ".")
    for change in _CHANGES:
        rows = [
            (f"{case.title} ({case.id})", [Response(result.before), Response(result.after)])
            for case, result in cases
            if result.change == change
        ]
        if rows:
            report.samples([change, first.incumbent, first.version], rows)


def _add_stages(report: Report, record: RoundRecord) -> None:
    if not record.stages:
        return
    report.heading("Stages")
    names = [stage.name for stage in record.stages]
    rows: list[tuple[str, str, float | None]] = [(s.name, s.state, s.seconds) for s in record.stages]
    report.table(["stage", "state", "seconds"], [*rows, ("all", record.round.state, record.seconds)])
    if any(stage.seconds for stage in record.stages):
        seconds = [stage.seconds or 0.0 for stage in record.stages]
        report.bars("Where the time went", names, {"seconds": seconds}, x_label="seconds")
    with report.side_by_side():
        for stage in record.stages:
            # The gate's result is the verdict, and the watch's is on its plane.
            if stage.result and stage.name != "gate" and "points" not in stage.result:
                report.table(["result", "value"], flat(stage.result), caption=stage.name)


def _add_plane(report: Report, record: RoundRecord) -> None:
    """Show the policy's checkpoints at d = √KL from the SFT policy: what was maximised, beside gold."""
    points: dict[int, dict[str, float | None]] = {}
    for metric in record.metrics:
        if metric.stage == _WATCH:
            points.setdefault(metric.step, {})[metric.name] = metric.value
    if len(points) < 2:
        return
    results = [stage.result for stage in record.stages if stage.name == _WATCH and stage.result]
    chosen = results[0]["update"] if results else None
    report.heading("Over-optimisation watch")
    report.paragraph(
        "The policy's checkpoints, by how far they are from the SFT policy. The proxy is the reward model "
        "that training maximised, gold the judge of the held-out side, which nothing was trained on. Where "
        "gold turns down while the proxy rises, training went too far (arXiv 2210.10760). The checkpoint "
        "that gold likes best is published."
    )
    order = sorted(points, key=lambda update: points[update].get("distance") or 0.0)
    lines = [
        Series(
            label,
            [points[update].get("distance") or 0.0 for update in order],
            [points[update].get(name) for update in order],
            [(points[update].get(f"{name}/low"), points[update].get(f"{name}/high")) for update in order],
        )
        for name, label in (("proxy", "proxy, which was maximised"), ("gold", "gold"))
    ]
    report.lines(
        "Reward gained over the SFT policy", lines, x_label="√KL, KL in nats a response", y_label="gain"
    )
    names = ("kl", "distance", "proxy", "gold")
    report.table(
        ["after update", *("KL", "√KL", "proxy's gain", "gold's gain"), ""],
        [
            (
                "0 (SFT)" if update == 0 else str(update),
                *(points[update].get(name) for name in names),
                "published" if update == chosen else " ",
            )
            for update in sorted(points)
        ],
    )


def _add_figures(report: Report, metrics: Sequence[Metric]) -> None:
    shown: set[tuple[str, str]] = set()
    stages = list(dict.fromkeys(metric.stage for metric in metrics))
    points: dict[tuple[str, str], dict[int, float | None]] = {}
    for metric in metrics:
        points.setdefault((metric.stage, metric.name), {})[metric.step] = metric.value
    for stage in stages:
        plots = []
        for caption, unit, names in PLOTS:
            series = [
                _series(name, points[stage, name]) for name in names if len(points.get((stage, name), ())) > 1
            ]
            if series:
                plots.append((caption, unit, series))
                shown |= {(stage, line.label) for line in series}
        if plots:
            report.heading(f"{stage}, by step")
            with report.side_by_side():
                for caption, unit, series in plots:
                    report.lines(caption, series, x_label="step", y_label=unit)
    rest = [metric for metric in metrics if (metric.stage, metric.name) not in shown]
    if rest:
        report.heading("Other figures")
        report.metrics(rest)


def _series(name: str, points: Mapping[int, float | None]) -> Series:
    steps = sorted(points)
    return Series(name, steps, [points[step] for step in steps])


def _add_samples(report: Report, samples: Samples) -> None:
    if not samples:
        return
    report.heading("Sample responses")
    report.paragraph("Beside each response the score that was maximised; nobody chose these.")
    for update, lines in groupby(samples, key=lambda line: line["update"]):
        rows = [
            (str(line["prompt"]), [Response(str(line["response"])), Response(f"{line['score']:.3f}")])
            for line in lines
        ]
        report.samples([f"update {update}", "score"], rows)


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return a tree of results as rows of a name and a value; intervals become one text."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and set(_INTERVAL) <= value.keys():
            numbers = ["–" if value[name] is None else f"{value[name]:.3f}" for name in _INTERVAL]
            rows.append((f"{prefix}{key}", "{} [{}, {}]".format(*numbers)))
        elif isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key} ")
        else:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else value))
    return rows


def _sections(config: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield what stands beside the sections first, then each section."""
    yield "round", {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    yield from ((key, value) for key, value in config.items() if isinstance(value, Mapping))
