"""The report file: valid, self-contained, escaped, written whole."""

import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluation.report import Report, ReportProblem, Response, Series
from registry.rounds import Metric


class Page(HTMLParser):
    """Collects what the page holds, and whether its tags close in order."""

    VOID = ("meta", "br", "hr", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _write(report: Report, path: Path) -> Page:
    report.write(path)
    return Page(path.read_text(encoding="utf-8"))


def test_everything_stands_in_one_file_that_loads_nothing(tmp_path: Path) -> None:
    report = Report("Round 3", "What it did")
    report.heading("Curves")
    report.lines(
        "reward", [Series("score", [1, 2, 3], [0.1, None, math.nan])], x_label="update", y_label="score"
    )
    report.bars(
        "by kind", ["no_commas", "title"], {"before": [0.1, 0.2], "after": [0.9, 0.8]}, x_label="share"
    )
    report.table(["a", "b"], [[1, 0.12345], ["text", None], [True, -3]], caption="figures")
    report.items(["one reason", "another"])
    page = _write(report, tmp_path / "deep" / "report.html")
    assert page.open == []
    assert page.tags.count("svg") == 2
    assert all(link.startswith("#") for link in page.links)
    for text in ("Round 3", "0.123", "–", "yes", "no_commas", "before", "after", "one reason"):
        assert text in page.text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_texts_of_models_and_people_are_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & <b>"
    report = Report(evil, evil)
    report.heading(evil)
    report.table([evil], [[evil]], caption=evil)
    report.samples(["before", "after"], [(evil, [Response(evil, True), Response("line\nbreak", False)])])
    report.lines(evil, [Series(evil, [1, 2], [1, 2])], x_label=evil, y_label="y")
    page = _write(report, tmp_path / "report.html")
    assert "script" not in page.tags
    assert page.text.count("alert(1)") >= 8
    assert "✓" in page.text
    assert "✗" in page.text


def test_metrics_of_a_round_are_plotted_by_stage_and_single_figures_listed(tmp_path: Path) -> None:
    metrics = [Metric("ppo", step, "objective/kl", step / 10, 0.0) for step in range(1, 5)]
    metrics += [Metric("ppo", step, "objective/scores", None, 0.0) for step in range(1, 5)]
    metrics.append(Metric("reward_model", 0, "accuracy", 0.625, 0.0))
    report = Report("Round 1")
    report.metrics(metrics)
    page = _write(report, tmp_path / "report.html")
    assert page.tags.count("svg") == 1
    for text in ("objective/kl", "objective/scores", "ppo, by step", "accuracy", "0.625"):
        assert text in page.text


def test_the_same_report_is_the_same_file(tmp_path: Path) -> None:
    def make(path: Path) -> bytes:
        report = Report("Same")
        for caption in ("first", "second"):
            report.lines(caption, [Series("score", [1, 2], [1, 2])], x_label="x", y_label="y")
        report.write(path)
        return path.read_bytes()

    assert make(tmp_path / "a.html") == make(tmp_path / "b.html")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportProblem, match=r"file/report\.html"):
        Report("x").write(tmp_path / "file" / "report.html")
