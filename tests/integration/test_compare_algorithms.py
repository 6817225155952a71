"""The comparison of algorithms as users run it: the command and the real engine, on a tiny model."""

import json
from pathlib import Path

from integration.round_process import ENGINE_SECONDS, RoundInstallation


def test_the_command_compares_and_publishes_nothing(tmp_path: Path) -> None:
    installation = RoundInstallation(tmp_path / "data")
    events = installation.give_feedback(seed=1)
    report = tmp_path / "report"
    command = ["compare-algorithms", "--seeds", "1", "--budget", "10s", "--output", str(report)]
    ended = installation.start(*command)
    assert ended.wait(timeout=2 * ENGINE_SECONDS) == 0, installation.log()[-4000:]
    table = installation.log().splitlines()
    at = next(i for i, line in enumerate(table) if line.startswith("ALGORITHM"))
    assert [row.split()[0] for row in table[at + 1 : at + 5]] == ["ppo", "rloo", "dpo", "kto"]
    compared = json.loads((report / "comparison.json").read_text())
    assert compared["slice"] == [0, events]
    for item in compared["algorithms"]:
        assert item["seconds"][0] > 0
        assert item["win_rate"]["low"] <= item["win_rate"]["estimate"] <= item["win_rate"]["high"]
        # DPO and KTO are through their few pairs in a second and hardly move.
        assert (0.1 if item["algorithm"] in ("ppo", "rloo") else -1) < item["kl"][0] < 100
    assert [version.name for version in installation.registry.versions()] == ["policy-0000"]
    assert installation.rounds.list() == []
    assert sorted(path.name for path in report.iterdir()) == [
        "comparison.html",
        "comparison.json",
    ]
