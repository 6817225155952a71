"""Rounds with several raters: a contrary one is quarantined, and counts once an operator lifts it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from integration.round_process import RoundInstallation
from unit.training.test_rater_weights import GOOD, rank
from unit.training.tiny import TransformersSampler

from evaluation.settings import EvaluationSettings
from feedback.settings import RaterSettings
from registry.lineage import Lineage
from registry.round_record import read_record, same_weights
from registry.rounds import Round
from training.settings import TrainingSettings
from training.trainer import Trainer


@pytest.fixture
def installation(tmp_path: Path) -> RoundInstallation:
    return RoundInstallation(tmp_path)


def trainer(installation: RoundInstallation, raters: RaterSettings) -> Trainer:
    settings = TrainingSettings(
        keep_rounds=5,
        minimum_judged=4,
        ppo_updates=1,
        ppo_batch=8,
        ppo_response_tokens=4,
        reward_heads=1,
        threads=1,
    )
    return Trainer(
        settings=settings,
        evaluation=EvaluationSettings(max_tokens=4, samples_per_prompt=1),
        store=installation.store,
        registry=installation.registry,
        rounds=installation.rounds,
        data_dir=installation.directory,
        max_model_len=128,
        make_sampler=lambda model_dir, _: TransformersSampler(model_dir),
        raters=raters,
    )


def stages(installation: RoundInstallation, round_: Round | None) -> Mapping[str, Any]:
    assert round_ is not None
    assert round_.state == "done", round_.error
    found: Mapping[str, Any] = installation.registry.version(round_.version or "").manifest.details["stages"]
    return found


def test_a_contrary_rater_is_held_back_until_it_is_lifted(installation: RoundInstallation) -> None:
    store, rounds = installation.store, installation.rounds
    installation.give_feedback(seed=1)
    for rater in GOOD:
        rank(store, rater, range(20))
    rank(store, "k/bad", range(20), right=False)
    raters = RaterSettings(held_out=["k/e"])
    first = trainer(installation, raters).run_once()
    found = stages(installation, first)
    assert first is not None
    assert store.raters.quarantined() == ["k/bad"]
    assert found["dataset"]["raters"]["quarantined"] == ["k/bad"]
    assert found["dataset"]["left_out"]["the rater is quarantined"] == 20
    assert found["dataset"]["raters"]["held_out_comparisons"] == 20
    assert found["reward_model"]["influence"]["reasons"]
    assert set(found["reward_model"]["influence"]["largest"]) <= {"k/", *GOOD}
    assert 0 <= found["judge"]["held_out_rater_accuracy"]["serving"]["model"]["estimate"] <= 1
    lineage = Lineage(installation.engine)
    held = lineage.uses("k/bad-chatcmpl-1-3")
    assert [(use.round_id, use.use, use.reason) for use in held] == [
        (first.id, "left_out", "the rater is quarantined")
    ]

    # A repeat does the same, whatever became of the rater since.
    store.raters.lift("k/bad", actor="op", reason="a taste of its own")
    repeat = trainer(installation, RaterSettings()).repeat(first.id, {})
    assert repeat.state == "done", repeat.error
    records = [read_record(rounds, installation.registry, one.id) for one in (first, repeat)]
    assert same_weights(*records) is True
    assert store.raters.quarantined() == []

    installation.give_feedback(seed=2)
    second = trainer(installation, raters).run_once()
    found = stages(installation, second)
    assert second is not None
    assert found["dataset"]["raters"]["returned"] == ["k/bad"]
    assert found["dataset"]["raters"]["quarantined"] == []
    counted = sum(found["dataset"][side]["comparisons"] for side in ("train", "held_out"))
    assert counted == 40 + 20
    later = [use for use in lineage.uses("k/bad-chatcmpl-1-3") if use.round_id == second.id]
    assert [use.use for use in later] in (["trained"], ["held_out"])
    changed = trainer(installation, raters).repeat(second.id, {"raters.defend": False})
    assert changed.config["raters"]["defend"] is False
    assert changed.config["standing"] == second.config["standing"]
