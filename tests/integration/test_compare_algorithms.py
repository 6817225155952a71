"""The comparison of algorithms as users run it: the command and the real engine, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

from integration.test_round import ENGINE_SECONDS, SETTINGS, Installation


def test_the_command_compares_and_publishes_nothing(tmp_path: Path) -> None:
    installation = Installation(tmp_path / "data")
    events = installation.give_feedback(seed=1)
    environment = {f"INSTRUCTLOOP_{name}": value for name, value in SETTINGS.items()}
    environment |= {"INSTRUCTLOOP_DATA_DIR": str(installation.directory), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "instructloop.cli", "compare-algorithms"),
            *("--seeds", "1", "--budget", "10s", "--output", str(tmp_path / "report")),
        ],
        env=os.environ | environment,
        cwd=installation.directory,
        capture_output=True,
        text=True,
        timeout=2 * ENGINE_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    header, *rows = ended.stdout.splitlines()
    assert header.split()[0] == "ALGORITHM"
    assert [row.split()[0] for row in rows] == ["ppo", "rloo", "dpo", "kto"]
    compared = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert compared["slice"] == [0, events]
    for item in compared["algorithms"]:
        # The budget counts the engine's process, too: without it PPO would use far more than it was given.
        assert 0 < item["seconds"][0] < 30
        assert item["win_rate"]["low"] <= item["win_rate"]["estimate"] <= item["win_rate"]["high"]
        assert 0 < item["kl"][0] < 100
    assert [version.name for version in installation.registry.versions()] == ["policy-0000"]
    assert installation.rounds.list() == []
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "comparison.html",
        "comparison.json",
    ]
