"""`instructloop cases …`: add, list, show and remove cases from the command line; what `fix` refuses."""

import fcntl
import json
from pathlib import Path

import pytest
from integration.feedback_samples import completion, entries

from feedback.cases import Case, CaseResult, Cases, training_records
from feedback.store import Store
from instructloop import cli, installation
from instructloop.config import load
from instructloop.fix import trainer_is_at_work
from registry.audit import AuditLog

CHECK = ("--check", '{"kind":"mentions_any","words":["InstructLoop"]}')
NAME = ("--prompt", "What is your name?", *CHECK)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCTLOOP_DATA_DIR", str(tmp_path / "data"))
    store = Store(installation.open_database(load()))
    store.ingest(entries(completion()))
    return store


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(["cases", *arguments]) == 0
    return capsys.readouterr().out


def added(store: Store, capsys: pytest.CaptureFixture[str], *arguments: str) -> Case:
    before = {case.id for case in Cases(store.engine).list()}
    output(capsys, "add", *arguments)
    (new,) = [case for case in Cases(store.engine).list() if case.id not in before]
    return new


def test_cases_are_added_listed_shown_and_removed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    case = added(store, capsys, *NAME, "--answer", "InstructLoop.", "--title", "its name")
    assert case.messages == [{"role": "user", "content": "What is your name?"}]
    header, row = output(capsys).splitlines()
    assert header.split()[:2] == ["CASE", "TITLE"]
    assert row.split()[:4] == [case.id, "its", "name", "mentions_any"]
    assert "it was never sent as feedback" in output(capsys, "show", case.id)

    cases = Cases(store.engine)
    store.ingest(entries(*_records(cases.begin_training(case.id))))
    told = CaseResult(case.id, "policy-0002", "policy-0001", "A model.", False, "InstructLoop.", True)
    cases.record_results(7, [told])
    shown = output(capsys, "show", case.id)
    assert "round 7: fixed" in shown
    assert "policy-0002 said: InstructLoop." in shown
    assert f"{case.id}-1-demonstration: stored; no round; no version learned from it" in shown
    (found,) = json.loads(output(capsys, "list", "--json"))
    assert found["results"][0]["change"] == "fixed"

    removed = output(capsys, "remove", case.id)
    assert f"{case.id}-1-demonstration: stored" in removed
    assert f"`instructloop forget --completion {case.id}`" in removed
    assert len(output(capsys).splitlines()) == 1
    assert case.id in output(capsys, "list", "--removed")
    actions = [(entry.action, entry.target) for entry in AuditLog(store.engine).entries()]
    assert actions == [("remove case", case.id), ("add case", case.id)]


def _records(case: Case):  # type: ignore[no-untyped-def]
    record, events = training_records(case, 1.0)
    return record, *events


def test_prompts_come_from_completions_and_files(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = added(store, capsys, "--completion", "chatcmpl-1", "--choice", "1", *CHECK)
    assert (case.messages[0]["content"], case.bad) == ("hi", "reply 1")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    file = tmp_path / "turns.json"
    file.write_text(json.dumps(turns))
    assert added(store, capsys, "--messages", str(file), *CHECK).messages == turns


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("cases", "add", *CHECK), "--prompt: give one of"),
        (("cases", "add", "--prompt", "x"), "checks: give checks"),
        (("cases", "add", "--prompt", "x", "--check", "{"), "--check 1: not JSON"),
        (("cases", "add", "--prompt", "x", "--check", "[]"), "--check 1: a JSON object"),
        (
            ("cases", "add", "--prompt", "x", "--check", '{"kind":"max_words"}'),
            "checks.0.n: max_words needs it",
        ),
        (("cases", "add", "--messages", "none.json", *CHECK), "--messages: none.json: "),
        (("cases", "add", "--completion", "none", *CHECK), "completion_id: there is no record of none"),
        (("cases", "add", *NAME, "--train"), "train: there is nothing to learn from"),
        (("cases", "show", "case-0"), "there is no case case-0"),
        (("cases", "remove", "case-0"), "there is no case case-0"),
        (("fix",), "CASE: give the id of a case, or the prompt"),
        (("fix", "case-0", *NAME), "CASE: give the id of a case, or the prompt"),
        (("fix", "case-0"), "there is no case case-0"),
        (("fix", *NAME, "--answer", "A model."), "good: the good answer does not meet checks.0"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    store: Store, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert cli.run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"instructloop: {says}")
    assert Cases(store.engine).list() == []


def test_no_trainer_is_started_beside_another_or_an_up_that_keeps_one(tmp_path: Path) -> None:
    assert not trainer_is_at_work(tmp_path)
    up = installation.DataLock.take(tmp_path)
    assert trainer_is_at_work(tmp_path)
    up.release()
    assert not trainer_is_at_work(tmp_path)
    (tmp_path / "rounds").mkdir()
    with (tmp_path / "rounds" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert trainer_is_at_work(tmp_path)
    assert not trainer_is_at_work(tmp_path)
