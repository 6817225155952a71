"""`instructloop raters …`: listing, agreement, quarantine and gold questions from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from integration.feedback_samples import completion, entries, event, thumb

from feedback.store import Store
from instructloop import cli, installation
from instructloop.config import load


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An installation in which two raters agree on a response, and a third one does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCTLOOP_DATA_DIR", str(tmp_path / "data"))
    store = Store(installation.open_database(load()))
    said = [
        thumb("e1", rater="k1/ann"),
        thumb("e2", rater="k1/bob"),
        thumb("e3", rater="k1/eve", value="down"),
    ]
    demonstration = {"type": "demonstration", "completion_id": "chatcmpl-1", "text": "x"}
    store.ingest(entries(completion(), *said, event("e4", demonstration)))
    return store


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    assert cli.run(["raters", *arguments]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.run(["raters", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_raters_are_listed_and_shown(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    listed = rows(capsys)
    assert listed[0][:3] == ["RATER", "STATE", "VOTES"]
    assert [row[:3] for row in listed[1:]] == [
        [f"k1/{name}", "active", "1"] for name in ("ann", "bob", "eve")
    ]
    assert listed == rows(capsys, "list")
    assert [row["rater"] for row in as_json(capsys, "list", "--limit", "2")] == ["k1/ann", "k1/bob"]
    shown = as_json(capsys, "show", "k1/eve")
    assert (shown["judged"], shown["log"]) == (1, [])
    assert ["judged:", "1"] in rows(capsys, "show", "k1/eve")


def test_agreement_is_told(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "agreement")
    assert found[1][:-1] == ["all", "3", "1", "0.33", "3", "0.33", "3"]
    assert found[2][0] == "thumb"
    assert found[3][:3] == ["7", "days", "from"]
    assert as_json(capsys, "agreement", "--days", "30")["days"] == 30


def test_quarantine_is_made_confirmed_and_lifted(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, state in (
        (("quarantine", "k1/eve", "--reason", "spam"), "quarantined"),
        (("confirm", "k1/eve"), "confirmed"),
        (("lift", "k1/eve", "--reason", "sorry"), "lifted"),
    ):
        assert rows(capsys, *arguments) == [["k1/eve", "is", state]]
        assert store.raters.state("k1/eve") == state
        assert as_json(capsys, "show", "k1/eve")["state"] == state
    assert [(entry.actor, entry.reason) for entry in store.raters.log()] == [
        ("command line", "spam"),
        ("command line", ""),
        ("command line", "sorry"),
    ]
    shown = rows(capsys, "show", "k1/eve")
    assert shown[-1][-4:] == ["lift", "command", "line", "sorry"]
    with pytest.raises(SystemExit):
        cli.run(["raters", "quarantine", "k1/ann"])
    assert "--reason" in capsys.readouterr().err


def test_gold_questions_are_added_listed_and_removed(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows(capsys, "gold") == [["EVENT", "TYPE", "RATER", "SINCE", "BY", "REASON"]]
    rows(capsys, "gold", "add", "e1", "--reason", "plain")
    (gold,) = store.raters.gold()
    assert (gold.event.event_id, gold.reason) == ("e1", "plain")
    assert rows(capsys, "gold", "list")[1][:3] == ["e1", "thumb", "k1/ann"]
    assert as_json(capsys, "show", "k1/eve")["gold_asked"] == 1
    rows(capsys, "gold", "remove", "e1")
    assert store.raters.gold() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "k1/nobody"], "no rater 'k1/nobody'"),
        (["quarantine", "k1/nobody", "--reason", "x"], "no rater 'k1/nobody'"),
        (["lift", "k1/eve"], "k1/eve is not in quarantine"),
        (["confirm", "k1/eve"], "k1/eve is not in quarantine"),
        (["gold", "add", "e4"], "event e4 (demonstration, stored)"),
        (["gold", "add", "e9"], "no event e9"),
        (["gold", "remove", "e1"], "e1 is no gold question"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    store: Store, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.run(["raters", *arguments]) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
