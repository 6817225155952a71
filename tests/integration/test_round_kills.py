"""A round that is killed ten times, each time at a random moment, ends like one that ran through.

On the real engine, with kill -9, as a crash would do it.
"""

import random
from pathlib import Path
from typing import Any

from integration.round_process import RoundInstallation

from training.round import STAGES
from training.samples import SampleLog

KILLS = 10
SEED = 20220304


def moments(seconds: dict[str, float], seed: int) -> list[tuple[str, float]]:
    """Ten moments, in order: one in every stage, the others in PPO, which takes longest."""
    generator = random.Random(seed)
    stages = [*STAGES, *["ppo"] * (KILLS - len(STAGES))]
    # The last tenth of a stage could be over before the signal arrives.
    found = [(stage, generator.uniform(0, 0.9) * seconds[stage]) for stage in stages]
    return sorted(found, key=lambda moment: (STAGES.index(moment[0]), moment[1]))


def outcome(installation: RoundInstallation) -> dict[str, Any]:
    """All that a round leaves behind, but times."""
    (round_,) = installation.rounds.list()
    assert round_.version is not None
    version = installation.registry.version(round_.version)
    return {
        "round": (round_.state, round_.cursor, round_.cutoff, round_.config_hash, round_.version),
        "verdict": round_.verdict,
        "state": version.state,
        "files": version.manifest.files,
        "details": version.manifest.details,
        "manifest's verdict": version.manifest.verdict,
        "results": {stage.name: (stage.state, stage.result) for stage in installation.rounds.stages(1)},
        "metrics": {(m.stage, m.step, m.name): m.value for m in installation.rounds.metrics(1)},
        "samples": SampleLog(installation.directory / "rounds" / "0001").read(),
        "on disk": sorted(
            str(path.relative_to(installation.directory))
            for path in (installation.directory / "rounds").rglob("*")
        ),
    }


def test_ten_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    broken, unbroken = (RoundInstallation(tmp_path / name) for name in ("broken", "unbroken"))
    for installation in (broken, unbroken):
        events = installation.give_feedback(seed=1)
        assert installation.store.head() == events

    expected = unbroken.train()
    assert (expected.state, expected.error) == ("done", None)
    seconds = {stage.name: stage.seconds or 0.0 for stage in unbroken.rounds.stages(1)}
    plan = moments(seconds, SEED)
    hit = [broken.kill(stage, offset) for stage, offset in plan]
    assert len(hit) == KILLS
    # The shortest stages may be over before the signal arrives.
    assert len(set(hit)) >= len(STAGES) - 2, (hit, plan)
    broken.train()

    assert outcome(broken) == outcome(unbroken)
    (_, candidate) = broken.registry.versions()
    assert candidate.manifest.verdict is not None
    conditions = [condition["name"] for condition in candidate.manifest.verdict["conditions"]]
    assert conditions == ["decided prompts", "win rate", "KL", "gold against proxy", "tax"]
    assert all(
        len(item.manifest.metrics["tax"]["facts"]["right"]) == 8 for item in broken.registry.versions()
    )
    plane = {(m.step, m.name): m.value for m in broken.rounds.metrics(1) if m.stage == "checkpoints"}
    assert {step for step, _ in plane} == {0, 2, 3, 4, 6}
    assert plane[6, "distance"] > plane[0, "distance"] == 0.0
    assert candidate.state == ("serving" if candidate.manifest.verdict["promote"] else "rejected")
    ppo = {metric.step for metric in broken.rounds.metrics(1) if metric.stage == "ppo"}
    assert ppo == set(range(1, 7))
    # A ranking that says "more w7" is easy: the reward model has to have learned it.
    accuracy = candidate.manifest.details["stages"]["reward_model"]["held_out_accuracy"]["serving"]["model"]
    assert accuracy["low"] > 0.7
    asked = broken.store.queries(100)
    assert len(asked) == 40
    assert [query.spread for query in asked] == sorted((query.spread for query in asked), reverse=True)

    assert unbroken.start().wait(timeout=60) == 0  # nothing new: no second round
    assert len(unbroken.rounds.list()) == 1
