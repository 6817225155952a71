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
    for text in ("state: done", "verdict: promote: So it is.", '{"demonstrations": 20}', "sft/loss"):
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
