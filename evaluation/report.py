"""One self-contained HTML file: text, tables, plots as inline SVG, responses side by side.

Owns how a report looks. What stands in it is decided by who fills it: a round, or the demo. Nothing is loaded
from anywhere when it is opened.
"""

import io
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

import matplotlib
from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1rem 0 } caption { text-align: left; color: #555 }
th, td { border: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top }
th { background: #f5f5f5 } td.number { text-align: right; font-variant-numeric: tabular-nums }
table.samples { table-layout: fixed; width: 100% } .samples td, .samples th { overflow-wrap: anywhere }
td.response, th.prompt { white-space: pre-wrap } th.prompt { font-weight: normal }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto } figcaption { color: #555 }
.side { display: flex; flex-wrap: wrap; column-gap: 2rem; align-items: flex-start }
.side figure { width: calc(50% - 1rem); min-width: 20rem; margin: .5rem 0 }
.good { color: #14653a } .bad { color: #a3261f }
"""
_COLUMNS = 3
_ALONE, _BESIDE = (8, 3.2), (6, 2.6)
"""Inches of a line plot, so that its text is of one size wherever it stands."""
# Its settings are the whole process's, and a server makes reports in several threads.
_MATPLOTLIB = threading.Lock()


class ReportProblem(RuntimeError):  # noqa: N818
    """The report cannot be written; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot: `values` over `steps`; a value that is None or not finite leaves a gap.

    With `bounds`, a pair to each value, an interval is drawn around each.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float | None]
    bounds: Sequence[tuple[float | None, float | None]] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """One response in a table of samples; `good` colours its mark, None leaves it unmarked."""

    text: str
    good: bool | None = None


class MetricLike(Protocol):
    """What a metric has to have to be plotted; `registry.rounds.Metric` is one."""

    @property
    def stage(self) -> str: ...  # noqa: D102
    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def value(self) -> float | None: ...  # noqa: D102


class Report:
    """Collects sections in order; `write` makes the file. Every text that it is given is escaped."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._line_size = _ALONE
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self.paragraph(subtitle)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Put the plots and tables that are added within beside each other, as many as fit."""
        self._parts.append('<div class="side">')
        self._line_size = _BESIDE
        yield
        self._line_size = _ALONE
        self._parts.append("</div>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def items(self, texts: Sequence[str]) -> None:
        """Add a list of short texts."""
        self._parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """Add a table; numbers are set to the right, floats with three decimals.

        Where a column has numbers, what is missing in it stands to the right as well.
        """
        numeric = {place for row in rows for place, value in enumerate(row) if _is_number(value)}
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        cells = ([_cell(value, place in numeric) for place, value in enumerate(row)] for row in rows)
        body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def samples(self, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Response]]]) -> None:
        """Add responses side by side: for each prompt one row of responses, one to a column."""
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join(
            f'<tr><th class="prompt" colspan="{len(columns)}">{escape(prompt)}</th></tr>'
            f"<tr>{''.join(_response(response) for response in responses)}</tr>"
            for prompt, responses in rows
        )
        parts = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        self._parts.append(f'<table class="samples">{parts}</table>')

    def lines(self, caption: str, series: Sequence[Series], *, x_label: str, y_label: str) -> None:
        """Add a line plot."""
        figure = Figure(figsize=self._line_size, layout="constrained")
        axes = figure.subplots()
        for line in series:
            _draw(axes, line)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(series) > 1:
            axes.legend()
        self._figure(figure, caption)

    def bars(
        self,
        caption: str,
        categories: Sequence[str],
        groups: Mapping[str, Sequence[float]],
        *,
        x_label: str,
        limits: tuple[float, float] | None = None,
    ) -> None:
        """Add horizontal bars: for each category one bar a group (such as `before` and `after`)."""
        figure = Figure(figsize=(8, 0.6 + 0.2 * len(categories) * (len(groups) + 0.6)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / max(1, len(groups))
        for position, (label, values) in enumerate(groups.items()):
            places = [row + (position - (len(groups) - 1) / 2) * height for row in range(len(categories))]
            axes.barh(places, values, height=height, label=label)
        axes.set_yticks(range(len(categories)), categories)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)
        if limits is not None:
            axes.set_xlim(*limits)
        if len(groups) > 1:
            axes.legend()
        self._figure(figure, caption)

    def intervals(
        self,
        caption: str,
        rows: Sequence[tuple[str, float, float, float]],
        *,
        x_label: str,
        limits: tuple[float, float] | None = None,
        reference: float | None = None,
    ) -> None:
        """Add estimates with their intervals, (label, estimate, low, high), one below the other.

        A dashed line stands at `reference`, such as the win rate of two that are alike.
        """
        figure = Figure(figsize=(8, 0.9 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        for place, (_, estimate, low, high) in zip(places, rows, strict=True):
            axes.plot([low, high], [place, place], color="tab:blue", linewidth=2)
            axes.plot(estimate, place, "o", color="tab:blue")
        if reference is not None:
            axes.axvline(reference, color="grey", linestyle="--", linewidth=1)
        axes.set_yticks(places, [label for label, *_ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.invert_yaxis()
        axes.set_xlabel(x_label)
        axes.grid(alpha=0.3, axis="x")
        if limits is not None:
            axes.set_xlim(*limits)
        self._figure(figure, caption)

    def metrics(self, metrics: Iterable[MetricLike]) -> None:
        """Add all figures of a round: a plot for each that has several steps, the others in a table."""
        stages: dict[str, dict[str, dict[int, float | None]]] = {}
        for metric in metrics:
            stages.setdefault(metric.stage, {}).setdefault(metric.name, {})[metric.step] = metric.value
        for stage, names in stages.items():
            curves = [
                Series(name, sorted(points), [points[step] for step in sorted(points)])
                for name, points in names.items()
                if len(points) > 1
            ]
            single = [(name, *points.values()) for name, points in names.items() if len(points) == 1]
            if single:
                self.table(["figure", "value"], single, caption=stage)
            if curves:
                self._grid(stage, curves)

    def html(self) -> str:
        """Return the whole page."""
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; raises ReportProblem."""
        partial = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.html(), encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise ReportProblem(f"the report cannot be written to {path}: {error.strerror}") from error

    def _grid(self, stage: str, curves: Sequence[Series]) -> None:
        rows = math.ceil(len(curves) / _COLUMNS)
        figure = Figure(figsize=(11, 2.3 * rows), layout="constrained")
        for position, line in enumerate(curves, 1):
            axes = figure.add_subplot(rows, _COLUMNS, position)
            _draw(axes, line)
            axes.set_title(line.label, fontsize=9)
            axes.tick_params(labelsize=8)
        self._figure(figure, f"{stage}, by step")

    def _figure(self, figure: Figure, caption: str) -> None:
        buffer = io.StringIO()
        # Text stays text, which keeps the file small and searchable; the salt makes the output repeatable
        # and keeps the ids of two figures in one page apart.
        settings = {"svg.fonttype": "none", "svg.hashsalt": f"{len(self._parts)}{self._title}"}
        with _MATPLOTLIB, matplotlib.rc_context(settings):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        svg = buffer.getvalue()
        self._parts.append(
            f"<figure><figcaption>{escape(caption)}</figcaption>{svg[svg.index('<svg') :]}</figure>"
        )


def _draw(axes: Any, line: Series) -> None:
    values = [_plotted(value) for value in line.values]
    (drawn,) = axes.plot(line.steps, values, marker="." if len(values) < 60 else None, label=line.label)
    for step, (low, high) in zip(line.steps, line.bounds, strict=False):
        axes.vlines(step, _plotted(low), _plotted(high), color=drawn.get_color(), alpha=0.5)
    axes.grid(alpha=0.3)


def _plotted(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else value


def _is_number(value: Any) -> bool:
    return not (value is None or isinstance(value, bool | str))


def _cell(value: Any, numeric: bool) -> str:
    if _is_number(value):
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return f'<td class="number">{escape(text)}</td>'
    if isinstance(value, bool):
        return "<td>yes</td>" if value else "<td>no</td>"
    kind = ' class="number"' if numeric and value is None else ""
    return f"<td{kind}>{escape(value or '–')}</td>"


def _response(response: Response) -> str:
    mark = {True: '<b class="good">✓</b> ', False: '<b class="bad">✗</b> ', None: ""}[response.good]
    return f'<td class="response">{mark}{escape(response.text)}</td>'
