import argparse
import json
import re
from pathlib import Path
from typing import get_args

import pytest

from instructloop import cli
from training.settings import TrainingSettings


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCTLOOP_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("45s", 45), ("30m", 1800), ("6h", 21600), ("6.0h", 21600), ("1 D", 86400)],
)
def test_durations(text: str, expected: float) -> None:
    assert cli.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1h", "6 weeks", "h"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not a duration"):
        cli.seconds(text)


def test_keys_are_made_listed_and_revoked(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["keys", "create", "--role", "client", "--name", "my-app"]) == 0
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("il_client_")
    key_id = secret.split("_")[2]
    assert cli.run(["keys", "list"]) == 0
    listing = capsys.readouterr().out
    assert key_id in listing
    assert "my-app" in listing
    assert secret not in listing
    assert cli.run(["keys", "revoke", key_id]) == 0
    cli.run(["keys", "list"])
    assert listing.splitlines()[1] != capsys.readouterr().out.splitlines()[-1]


def test_a_key_is_rotated_and_every_action_is_in_the_audit_log(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from feedback.keys import Keys
    from instructloop import installation
    from instructloop.config import load

    cli.run(["keys", "create", "--role", "operator", "--name", "ann"])
    old = capsys.readouterr().out.strip()
    key_id = old.split("_")[2]
    assert cli.run(["keys", "rotate", key_id, "--grace", "1h"]) == 0
    new = capsys.readouterr().out.strip()
    keys = Keys(installation.open_database(load()))
    assert None not in (keys.verify(old), keys.verify(new))
    assert old != new
    assert cli.run(["keys", "rotate", key_id]) == 0
    assert keys.verify(new) is None
    assert cli.run(["keys", "revoke", key_id]) == 0
    assert cli.run(["keys", "rotate", key_id]) == 2
    assert cli.run(["promote", "policy-0099"]) == 2
    assert cli.run(["rounds", "pin", "7"]) == 2
    capsys.readouterr()
    assert cli.run(["audit", "--json"]) == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    target = f"key {key_id}"
    assert [(entry["action"], entry["target"], entry["outcome"]) for entry in reversed(entries)] == [
        ("create_key", target, "done"),
        ("rotate_key", target, "done"),
        ("rotate_key", target, "done"),
        ("revoke_key", target, "done"),
        ("rotate_key", target, "refused"),
        ("promote", "policy-0099", "refused"),
        ("pin_round", "round 7", "refused"),
    ]
    assert all(re.fullmatch(r"command line \(.+@.+\)", entry["actor"]) for entry in entries)
    assert cli.run(["audit", "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["WHEN", "WHO", "ACTION", "ON", "OUTCOME", "DETAIL"]
    assert ["pin_round" in lines[1], "promote" in lines[2], len(lines)] == [True, True, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["keys", "rotate", "nobody"], "no key has the id 'nobody'"),
        (["keys", "revoke", "nobody"], "no key has the id 'nobody'"),
        (["promote", "policy-0099"], "policy-0099"),
        (["reject", "policy-0099"], "policy-0099"),
        (["rollback"], "no version served before"),
        (["lineage", "policy-0099"], "there is no version policy-0099"),
        (["dead-letters", "replay", "abcdef"], "there is no dead letter abcdef"),
        (["rounds", "show", "7"], "there is no round 7"),
        (["rounds", "diff", "7", "8"], "there is no round 7"),
        (["rounds", "pin", "7"], "there is no round 7"),
        (["rounds", "report", "7"], "there is no round 7"),
        (["rounds", "repeat", "7", "--set", "training.ppo_updates"], "KEY=VALUE is expected"),
        (["rounds", "repeat", "7", "--set", "training.vllm_arguments={"], "neither TOML nor JSON"),
        (["feedback", "import", "absent.jsonl", "--source", "x"], "absent.jsonl: no such file"),
        (["compare-algorithms", "--seeds", "1"], "no version is in service"),
        (["--config", "absent.toml", "versions"], "absent.toml: no such file"),
    ],
)
def test_an_expected_failure_is_one_line_and_exit_code_2(
    data_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.run(arguments) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("instructloop: ")
    assert said.count("\n") == 1


def test_a_defect_is_not_taken_for_a_mistake_of_the_user(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("instructloop.installation.open_database", broken)
    with pytest.raises(ZeroDivisionError):
        cli.run(["versions"])


def test_listings_of_an_empty_installation(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, header in ((["versions"], "VERSION"), (["rounds"], "ROUND"), (["rounds", "list"], "ROUND")):
        assert cli.run(command) == 0
        assert capsys.readouterr().out.split()[0] == header


def test_versions_roll_forward_and_back(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from instructloop import installation
    from instructloop.config import load

    config = load()
    registry = installation.open_registry(config, installation.open_database(config))
    for number in range(2):
        staging = tmp_path / f"staging-{number}"
        staging.mkdir()
        (staging / "model.safetensors").write_bytes(bytes([number]) * 100)
        registry.publish(staging, parent=None, round_id=None, kind="base", details={})
    for arguments, serving in (
        (["promote", "policy-0000"], "policy-0000"),
        (["promote", "policy-0001"], "policy-0001"),
        (["rollback", "--reason", "worse"], "policy-0000"),
    ):
        assert cli.run(arguments) == 0
        capsys.readouterr()
        cli.run(["versions"])
        states = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]}
        assert [name for name, state in states.items() if state == "serving"] == [serving]
    assert registry.log()[-1].reason == "worse"

    condition = {"name": "KL", "passed": False, "binding": True, "sentence": "Too far.", "figures": {}}
    verdict = {"promote": False, "summary": "Not to be promoted.", "conditions": [condition], "remarks": []}
    kept = {"metric": "acc_norm", "digest": "d", "right": "1" * 6 + "0" * 4}
    registry.annotate(
        "policy-0001", verdict=verdict | {"incumbent": "policy-0000"}, metrics={"tax": {"piqa": kept}}
    )
    capsys.readouterr()
    assert cli.run(["versions", "policy-0001"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "policy-0001: retired",
        "piqa: acc_norm 0.600 [0.313, 0.832], 10 items",
        "Not to be promoted. It was compared with policy-0000.\n  KL (fails): Too far.",
    ):
        assert text in shown, shown
    assert cli.run(["versions", "policy-0009"]) == 2


def test_rounds_are_shown_compared_pinned_and_reported(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from instructloop import installation
    from instructloop.config import load
    from registry.rounds import Rounds
    from training.samples import SampleLog

    rounds = Rounds(installation.open_database(load()))
    for updates, loss in ((8, 0.5), (12, 0.25)):
        number = rounds.begin(0, 40, {"training": {"ppo_updates": updates}}, 7).id
        rounds.stage(number, "sft", "running")
        rounds.stage(number, "sft", "done", {"demonstrations": 20})
        rounds.metric(number, "sft", 1, {"loss": loss})
        rounds.finish(number, "done", verdict={"promote": updates > 8, "reasons": ["So it is."]})
    assert cli.run(["rounds", "diff", "1", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["PART", "NAME", "ROUND", "1", "ROUND", "2"]
    assert ["config", "training.ppo_updates", "8", "12"] in lines
    assert ["figures", "sft/loss", "0.5", "0.25"] in lines
    assert ["verdict", "promote", "false", "true"] in lines
    assert cli.run(["rounds", "diff", "1", "2", "--json"]) == 0
    found = {(item["section"], item["name"]): item for item in json.loads(capsys.readouterr().out)}
    assert found["config", "training.ppo_updates"]["new"] == 12

    assert cli.run(["rounds", "pin", "1"]) == 0
    capsys.readouterr()
    cli.run(["rounds"])
    (pinned,) = [line for line in capsys.readouterr().out.splitlines() if "pinned" in line]
    assert pinned.startswith("1 ")
    assert cli.run(["rounds", "unpin", "1"]) == 0
    assert rounds.pinned() == []

    capsys.readouterr()
    assert cli.run(["rounds", "show", "2"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "state: done",
        "verdict:\n  To be promoted.\n  So it is.",
        '{"demonstrations": 20}',
        "sft/loss",
    ):
        assert text in shown
    assert cli.run(["rounds", "show", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == {"sft/loss": 0.25}

    directory = data_dir / "rounds" / "0002"
    directory.mkdir(parents=True)
    SampleLog(directory).keep(1, [{"prompt": "say w7", "response": "w7 <w7>", "score": 1.0}])
    assert cli.run(["rounds", "report", "2", "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "w7 &lt;w7&gt;" in page
    assert "So it is." in page


def test_serve_says_what_to_do_when_there_is_no_version(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["serve"]) == cli.USAGE_ERROR
    assert "instructloop up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--algorithms", "ppo,reinforce"], "'reinforce' is none of ppo, rloo, dpo, kto"),
        (["--seeds", "0"], "'0' is not a number from 1 on"),
        (["--budget", "soon"], "'soon' is not a duration"),
    ],
)
def test_a_comparison_is_asked_for_rightly(
    data_dir: Path, capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["compare-algorithms", *option])
    assert ended.value.code == cli.USAGE_ERROR
    assert message in capsys.readouterr().err
    assert not data_dir.exists()


def test_the_algorithms_are_those_that_a_round_can_be_set_to() -> None:
    annotation = TrainingSettings.model_fields["algorithm"].annotation
    assert get_args(annotation) == cli._ALGORITHMS


def test_the_lineage_of_versions_and_events(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from instructloop import installation
    from instructloop.config import load
    from registry.rounds import EventUse, Rounds

    config = load()
    engine = installation.open_database(config)
    registry, rounds = installation.open_registry(config, engine), Rounds(engine)
    uses = [EventUse("fb-a", "trained"), EventUse("fb-b", "held_out"), EventUse("fb-c", "left_out", "tied")]
    for number in range(2):
        round_ = None
        if number:
            round_ = rounds.begin(0, 40, {"parent": "policy-0000", "reward_model_from": None}, 0).id
            rounds.record_uses(round_, uses)
        staging = tmp_path / f"staging-{number}"
        staging.mkdir()
        (staging / "model.safetensors").write_bytes(bytes([number]))
        version = registry.publish(staging, parent=None, round_id=round_, kind="ppo", details={}).name
        if round_ is not None:
            rounds.finish(round_, "done", version=version)

    def said(*arguments: str) -> str:
        assert cli.run(["lineage", *arguments]) == 0
        return capsys.readouterr().out

    summary, events = said("policy-0001").split("\n\n")
    assert "own" in summary.splitlines()[1]
    assert [line.split() for line in events.splitlines()[1:]] == [
        ["1", "trained", "fb-a"],
        ["1", "held_out", "fb-b"],
        ["1", "left_out", "fb-c", "tied"],
    ]
    assert said("policy-0001", "--summary") == summary + "\n"
    assert said("policy-0001", "--use", "held_out").splitlines()[-1].split() == ["1", "held_out", "fb-b"]
    assert len(said("policy-0001", "--round", "7").splitlines()) == 4
    lines = [json.loads(line) for line in said("policy-0001", "--json").splitlines()]
    assert (lines[0]["events"], lines[0]["state"]) == (
        {"trained": 1, "held_out": 1, "left_out": 1},
        "candidate",
    )
    assert lines[3] == {"round_id": 1, "event_id": "fb-c", "use": "left_out", "reason": "tied"}
    assert len(said("policy-0000").splitlines()) == 3
    assert said("--event", "fb-a").endswith("versions that learned from it: policy-0001\n")
    assert said("--event", "fb-b").endswith("versions that learned from it: none\n")
    assert json.loads(said("--event", "fb-a", "--json").splitlines()[1]) == {
        "version": "policy-0001",
        "state": "candidate",
    }


def test_dead_letters_are_listed_fixed_replayed_and_dropped(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from feedback.dead_letters import DeadLetters
    from feedback.queue import Entry
    from feedback.store import Store
    from instructloop import installation
    from instructloop.config import load

    engine = installation.open_database(load())
    asked = [{"role": "user", "content": "say"}]
    feedback = {"type": "demonstration", "messages": asked, "text": 5}
    broken = {"key_id": "k", "rater": "k/", "received_at": 1.0, "feedback": feedback}
    data = {name: json.dumps(broken | {"event_id": name}).encode() for name in ("fb-a", "fb-b")}
    letters = [Entry(f"{n}-0", "event", value, name) for n, (name, value) in enumerate(data.items())]
    Store(engine).ingest([*letters, Entry("3-0", "a\nb", b"\xff")])
    ids = {letter.event_id: letter.id for letter in DeadLetters(engine).list()}

    def said(*arguments: str, code: int = 0) -> str:
        assert cli.run(["dead-letters", *arguments]) == code
        return capsys.readouterr().out

    listed = said().splitlines()
    assert said("list", "--limit", "10").splitlines() == listed
    assert len(listed) == 4
    assert any("fb-a" in line and "feedback.demonstration.text" in line for line in listed)
    assert len(said("list", "--limit", "1").splitlines()) == 2
    assert '"received_at": 1.0' in said("show", ids["fb-a"][:8])
    assert said("show", str(ids[None])).endswith("\\xff\n")
    assert cli.run(["dead-letters", "show", ids["fb-a"], "--raw"]) == 0
    assert capsys.readouterr().out.encode() == data["fb-a"]
    assert said("replay", "--all", code=1) == "0 replayed, 3 stay\n"
    file = tmp_path / "fixed.json"
    file.write_bytes(data["fb-a"].replace(b'"text": 5', b'"text": "five"'))
    assert "replay it now" in said("fix", ids["fb-a"], str(file))
    assert f"{ids['fb-a'][:12]} is replayed: fb-a\n1 replayed, 0 stay\n" == said("replay", ids["fb-a"][:9])
    found = Store(engine).event("fb-a")
    assert found is not None
    assert found.status == "stored"
    said("drop", ids["fb-b"], str(ids[None]), "--reason", "of no use")
    assert len(said("list").splitlines()) == 1
    assert "of no use" in said("list", "--dropped")
    for arguments in (["replay", ids["fb-b"]], ["show", "0" * 64], ["fix", ids["fb-b"], str(file)]):
        assert cli.run(["dead-letters", *arguments]) == cli.USAGE_ERROR
        assert "there is no dead letter" in capsys.readouterr().err
