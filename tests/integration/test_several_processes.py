"""Two processes with gloo run the same round as one, and give the same losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from integration.round_process import ENGINE_SECONDS, RoundInstallation
from unit.training.tiny import tiny_model

SETTINGS = {
    "TRAINING__PPO_UPDATES": "3",
    "TRAINING__REWARD_EPOCHS": "4",
    "TRAINING__REWARD_LEARNING_RATE": "3e-4",
}
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TESTS = Path(__file__).resolve().parents[1]
Figures = dict[tuple[str, int, str], float]


def _figures(installation: RoundInstallation) -> Figures:
    (round_,) = installation.rounds.list()
    assert (round_.state, round_.error) == ("done", None), installation.log()[-4000:]
    return {(m.stage, m.step, m.name): m.value for m in installation.rounds.metrics(1) if m.value is not None}


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    one, two = (RoundInstallation(tmp_path / name) for name in ("one", "two"))
    for installation in (one, two):
        installation.give_feedback(seed=1)
    one.train(**SETTINGS)
    launched = two.start("train", "--once", launcher=LAUNCHER, **SETTINGS)
    assert launched.wait(timeout=2 * ENGINE_SECONDS) == 0, two.log()[-4000:]

    alone, together = _figures(one), _figures(two)
    assert alone.keys() == together.keys()
    for stage, steps in (("sft", 12), ("reward_model", 10), ("judge", 6)):
        losses = [key for key in alone if key[0] == stage and key[2] == "loss" and 0 < key[1] <= steps]
        assert len(losses) == steps
        for key in losses:
            assert together[key] == pytest.approx(alone[key], rel=0.03, abs=2e-3), key
    # Sums come together in another order: beyond the first update a sampled token may turn out otherwise.
    first = [key for key in alone if key[:2] == ("ppo", 1)]
    for name in ("objective/kl", "policy/entropy_avg", "response/length", "response/ended"):
        assert ("ppo", 1, name) in first
        assert together["ppo", 1, name] == pytest.approx(alone["ppo", 1, name], rel=0.05, abs=0.02), name
    versions = two.registry.versions()
    assert [version.name for version in versions] == ["policy-0000", "policy-0001"]
    assert versions[1].manifest.verdict is not None


def test_two_processes_make_the_ppo_updates_of_one(tmp_path: Path) -> None:
    model_dir = tiny_model(tmp_path / "model")
    runs = {"one": [sys.executable], "two": LAUNCHER}
    figures = {}
    for name, launcher in runs.items():
        work = tmp_path / name
        work.mkdir()
        environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
        command = [*launcher, "-m", "integration.ppo_process", str(model_dir), str(work)]
        subprocess.run(command, env=environment, check=True, timeout=ENGINE_SECONDS)
        figures[name] = [json.loads(file.read_text()) for file in sorted(work.glob("figures-*.json"))]
    (expected,) = figures["one"]
    first, second = figures["two"]
    assert (expected[0], first[0], second[0]) == (1, 2, 2)
    assert first[1] == second[1]
    assert len(expected[1]) == 3
    for alone, together in zip(expected[1], first[1], strict=True):
        assert alone.keys() == together.keys()
        for name, value in alone.items():
            assert together[name] == pytest.approx(value, rel=0.02, abs=2e-3), name


def test_a_round_that_fails_in_several_processes_ends_them_all(tmp_path: Path) -> None:
    installation = RoundInstallation(tmp_path)
    installation.give_feedback(seed=2)
    failed = installation.start("train", "--once", launcher=LAUNCHER, TRAINING__MINIMUM_JUDGED="1000")
    assert failed.wait(timeout=ENGINE_SECONDS) == 1
    (round_,) = installation.rounds.list()
    assert round_.state == "failed"
    assert str(round_.error).startswith("dataset: only ")


def test_the_shipped_configuration_of_accelerate_loads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = Path(__file__).resolve().parents[2] / "docker" / "accelerate" / "data_parallel.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_processes) == ("MULTI_GPU", 2)
