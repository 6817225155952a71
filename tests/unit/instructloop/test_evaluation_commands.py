"""`instructloop evaluate` and `evaluations`: what they ask for, print and refuse."""

import json
from pathlib import Path

import pytest

from evaluation.labels import LABELS
from feedback.store import Store
from instructloop import cli, installation
from instructloop.config import load
from registry.audit import AuditLog
from registry.evaluations import Evaluations

INTERVAL = {"estimate": 0.75, "low": 0.5, "high": 1.0, "confidence": 0.95, "clusters": 2, "values": 4}
RESULT = {
    "prompts": 2,
    "prompts_with_checks": 2,
    "contestants": [
        {"name": name, "answers": 4, "words": INTERVAL, "tokens": 3.0, "cut_off": 0.0, "empty": 0.0}
        for name in ("policy-0000", "policy-0001")
    ],
    "judges": [{"name": "checks", "axis": "constraints", "agreement": None, "statement": "A program."}],
    "tables": [
        {
            "name": "checks",
            "axis": "constraints",
            "pairs": [
                {
                    "first": "policy-0000",
                    "second": "policy-0001",
                    "win_rate": INTERVAL,
                    "verdicts": 4,
                    "ties": 2,
                    "no_verdict": 0,
                }
            ],
            "leaderboards": {},
        }
    ],
    "labels": [
        {
            "source": "people",
            "contestants": [
                {"name": "policy-0000", "answers": 1, "opinions": 1, "shares": dict.fromkeys(LABELS)},
                {
                    "name": "policy-0001",
                    "answers": 3,
                    "opinions": 3,
                    "shares": dict.fromkeys(LABELS, INTERVAL),
                },
            ],
        }
    ],
}


def test_evaluations_are_asked_for_listed_shown_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCTLOOP_DATA_DIR", str(tmp_path / "data"))
    config = load()
    engine = installation.open_database(config)
    registry = installation.open_registry(config, engine)
    for text in ("a", "b"):
        staging = tmp_path / text
        staging.mkdir()
        (staging / "model.safetensors").write_text(text)
        registry.publish(staging, parent=None, round_id=None, kind="test", details={})
    for wrong, message in (
        (["policy-0000"], "contestants: "),
        (["policy-0000", "policy-0009"], "contestants.1: there is no version policy-0009"),
        (["base", "policy-0001", "--judge", "jury"], "judges.0: 'jury' is none of"),
        (["base", "policy-0001", "--prompts", "none.jsonl"], "prompts: there is no file"),
        (["base", "policy-0001", "--prompts", "cases"], "prompts: at least two cases are needed"),
        (["base", "policy-0001", "--n", "99"], "n: "),
        (["--resume", "7"], "there is no evaluation 7"),
    ):
        assert cli.run(["evaluate", *wrong]) == 2, wrong
        assert message in capsys.readouterr().err
    (tmp_path / "own.jsonl").write_text('{"prompt": "hi"}\n')
    for prompts in ("own.jsonl", "held-out"):
        command = ["evaluate", "base", "policy-0001", "--prompts", prompts, "--max-tokens", "9", "--later"]
        assert cli.run(command) == 0
    assert "evaluation 2 is requested" in capsys.readouterr().out
    evaluations = Evaluations(engine)
    first = evaluations.get(1).asked
    assert (first.prompts, first.max_tokens) == (str(tmp_path / "own.jsonl"), 9)
    for number in (1, 2):
        evaluations.begin(number)
    evaluations.finish(1, error="prompts: there are 1 in it")
    evaluations.finish(2, RESULT)
    assert cli.run(["evaluations"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["2", "done"],
        ["1", "failed"],
    ]
    assert cli.run(["evaluations", "show", "2"]) == 0
    rates, _, labels = capsys.readouterr().out.partition("\n\n")
    assert "0.750 [0.500, 1.000]" in rates
    header, answers, *shares = [line.split() for line in labels.splitlines()]
    assert (header[-2:], answers[-2:]) == (["policy-0000", "policy-0001"], ["1", "3"])
    assert shares == [["people", label, "-", "0.750", "[0.500,", "1.000]"] for label in LABELS]
    assert cli.run(["evaluations", "show", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == "prompts: there are 1 in it"
    assert cli.run(["evaluate", "--resume", "2"]) == 2
    assert "done already" in capsys.readouterr().err
    assert cli.run(["evaluations", "cancel", "2"]) == 2
    assert "evaluation 2 is done already" in capsys.readouterr().err
    for number, state in ((3, "cancelled"), (4, "cancelled: it stops at its next step")):
        assert cli.run(["evaluate", "base", "policy-0001", "--later"]) == 0
        if number == 4:
            evaluations.begin(number)
        capsys.readouterr()
        assert cli.run(["evaluations", "cancel", str(number), "--reason", "too long"]) == 0
        assert capsys.readouterr().out == f"evaluation {number} is {state}\n"
        assert evaluations.get(number).state == "cancelled"
    assert {one.detail for one in AuditLog(engine).entries(limit=3)} == {"", "too long"}
    assert cli.run(["evaluations", "report", "2", "--output", "page.html"]) == 0
    assert "0.750" in (tmp_path / "page.html").read_text()
    # Whoever is forgotten later may stand in it.
    with engine.connect() as connection:
        exports = connection.exec_driver_sql("SELECT path, what FROM exports").all()
    assert exports == [(str(tmp_path / "page.html"), "evaluation 2")]
    assert Store(engine).head() == 0
