"""An evaluation's page: what stands in it at each of its states, and nothing that a browser would run."""

from html import escape
from pathlib import Path
from typing import Any

from evaluation.evaluation_files import EvaluationFiles
from evaluation.evaluation_report import evaluation_report
from evaluation.labels import LABELS
from registry.evaluation_request import EvaluationRequest
from registry.evaluations import Evaluation

NAMES = ("policy-0000", "policy-0001", "m at h")
ATTACK = "<script>alert(1)</script>"


def interval(estimate: float) -> dict[str, float]:
    return {"estimate": estimate, "low": estimate - 0.1, "high": estimate + 0.1, "confidence": 0.95}


def evaluation(state: str, result: dict[str, Any] | None = None, error: str | None = None) -> Evaluation:
    request = EvaluationRequest(contestants=[*NAMES[:2], "http://h/v1#m"], judges=["checks"])
    asked = request.model_dump(mode="json")
    return Evaluation(7, state, asked, result, error, "ann", 1.0, 2.0, None, 1, "answers of m at h", 3, 12)  # type: ignore[arg-type]


def board(**style: Any) -> dict[str, Any]:
    ratings = [
        {"contestant": name, "rank": i + 1, "rating": interval(1000.0 - i), "matches": 4}
        for i, name in enumerate(NAMES)
    ]
    return {"ratings": ratings, "style": style}


def result() -> dict[str, Any]:
    pairs = [
        {
            "first": first,
            "second": second,
            "win_rate": rate and interval(rate),
            "verdicts": 8,
            "ties": 1,
            "no_verdict": 2,
        }
        for first, second, rate in (
            (NAMES[0], NAMES[1], 0.25),
            (NAMES[0], NAMES[2], 0.4),
            (NAMES[1], NAMES[2], None),
        )
    ]
    boards = {"plain": board(), "controlled": board(length=interval(31.5))}
    return {
        "prompts": 5,
        "contestants": [
            {"name": n, "answers": 5, "words": interval(9), "tokens": None, "cut_off": 0.2, "empty": 0.0}
            for n in NAMES
        ],
        "judges": [{"name": "m on honest", "axis": "honest", "agreement": None, "statement": "Agrees: 0.71"}],
        "tables": [
            {"name": "m on honest", "axis": "honest", "pairs": pairs, "leaderboards": boards},
            {
                "name": "checks",
                "axis": "constraints",
                "pairs": [pair | {"verdicts": 0, "win_rate": None} for pair in pairs],
                "leaderboards": {},
            },
        ],
    }


def labelled() -> dict[str, Any]:
    shares = dict.fromkeys(LABELS, interval(0.0)) | {"hallucination": interval(0.325)}
    contestants = [{"name": name, "answers": 4, "opinions": 6, "shares": shares} for name in NAMES[:2]]
    contestants += [{"name": NAMES[2], "answers": 1, "opinions": 1, "shares": dict.fromkeys(LABELS)}]
    return {"source": f"people {ATTACK}", "contestants": contestants}


def files(directory: Path) -> EvaluationFiles:
    found = EvaluationFiles(directory / "0007")
    found.choose([{"key": "k", "messages": [{"role": "user", "content": ATTACK}], "checks": []}])
    for i in range(3):
        text = f"{ATTACK} of {i}"
        found.answers(i, 0, lambda text=text: [[{"text": text, "tokens": 1, "finish_reason": "stop"}]])  # type: ignore[misc]
    return found


def test_the_page_says_who_won_by_whom_and_shows_answers(tmp_path: Path) -> None:
    page = evaluation_report(evaluation("done", result()), files(tmp_path)).html()
    # The win rate of the second over the first is what is left, and nothing is made up where none is known.
    unknown = '<td class="number">–</td>'
    assert f'<tr><td>policy-0001</td><td class="number">0.750</td>{unknown * 2}</tr>' in page
    assert "<h2>By m on honest</h2>" in page
    for text in (
        "<h2>By checks: constraints</h2>",
        '<td class="number">999</td><td>[999,\N{NO-BREAK SPACE}999]</td>',
        "31.500 [31.400, 31.600]",
        "Agrees: 0.71",
        "gave no verdict",
        "policy-0000 over m at h",
        "of 2",
    ):
        assert text in page
    assert page.count("<svg") == 3
    # Each of three answers has a third of the page, and a prompt keeps its lines.
    assert '<table class="samples">' in page
    assert "table.samples { table-layout: fixed; width: 100% }" in page
    assert f'<th class="prompt" colspan="3">user: {escape(ATTACK)}</th>' in page
    assert "<script" not in page


def test_labels_stand_in_a_table_for_each_source(tmp_path: Path) -> None:
    page = evaluation_report(evaluation("done", result() | {"labels": [labelled()]}), files(tmp_path)).html()
    assert "<td>makes things up</td><td>0.325 [0.225,\N{NO-BREAK SPACE}0.425]</td>" in page
    assert "Labels of their answers by people &lt;script" in page
    row = page[page.index("<td>denigrates a protected class</td>") :].partition("</tr>")[0]
    assert row.endswith("<td>–</td>")
    assert "<script" not in page
    assert "Labels" not in evaluation_report(evaluation("done", result()), files(tmp_path)).html()


def test_one_that_is_not_done_says_how_far_it_is_and_one_that_failed_why(tmp_path: Path) -> None:
    running = evaluation_report(evaluation("running"), files(tmp_path)).html()
    assert "It is running at answers of m at h, 25% of all" in running
    cancelled = evaluation_report(evaluation("cancelled"), files(tmp_path)).html()
    assert "It is cancelled at answers of m at h, 25% of all" in cancelled
    assert "Answers side by side" in running
    failed = evaluation_report(
        evaluation("failed", error=f"{ATTACK}: no"), EvaluationFiles(tmp_path / "none")
    )
    assert "Why it failed" in failed.html()
    assert "<script" not in failed.html()
    gone = files(tmp_path)
    gone.delete_texts()
    page = evaluation_report(evaluation("done", result()), gone).html()
    assert "were deleted since" in page
    assert "of 2" not in page
