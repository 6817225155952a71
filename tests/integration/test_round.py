"""Rounds by the command that users run, on the real engine: failures, stops, one at a time.

What survives kill -9 is in `test_round_kills.py`.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from integration.feedback_samples import entries
from integration.round_process import ENGINE_SECONDS, RoundInstallation
from safetensors.torch import load_file
from unit.training.tiny import TransformersSampler, tiny_model, tiny_tokenizer

from evaluation.cases import check_case
from evaluation.settings import EvaluationSettings
from feedback.cases import Case, Cases, training_records
from feedback.new_case import NewCase
from feedback.records import Completion, prompt_hash
from instructloop import parts
from instructloop.config import Config
from registry.lineage import Lineage
from registry.rounds import Round
from training.dataset import is_held_out
from training.settings import TrainingSettings
from training.trainer import Trainer


@pytest.fixture
def installation(tmp_path: Path) -> RoundInstallation:
    return RoundInstallation(tmp_path)


def test_a_round_says_why_it_failed_and_its_events_stay_for_the_next(
    installation: RoundInstallation,
) -> None:
    installation.give_feedback(seed=2)
    failed = installation.start(TRAINING__MINIMUM_JUDGED="1000")
    assert failed.wait(timeout=60) == 1
    (round_,) = installation.rounds.list()
    assert round_.state == "failed"
    assert round_.error is not None
    assert round_.error.startswith("dataset: only ")
    assert [version.name for version in installation.registry.versions()] == ["policy-0000"]
    assert installation.rounds.last_done() is None


def test_an_engine_that_finds_no_memory_says_what_to_lower(installation: RoundInstallation) -> None:
    installation.give_feedback(seed=4)
    failed = installation.start(TRAINING__KV_CACHE_GIB="0.00001", TRAINING__REWARD_EPOCHS="1")
    assert failed.wait(timeout=ENGINE_SECONDS) == 1
    (round_,) = installation.rounds.list()
    first, advice = str(round_.error).splitlines()
    assert first.startswith("select: the rollout engine did not start: ")
    assert "training.kv_cache_gib" in advice
    assert {path.name for path in (installation.directory / "rounds" / "0001").glob("*/")} == {
        "reward_model",
        "judge",
    }


def test_a_second_round_starts_from_the_first_ones_reward_model_and_a_share_of_its_data(
    installation: RoundInstallation,
) -> None:
    def train(**changes: object) -> Mapping[str, Any]:
        settings = TrainingSettings(
            minimum_judged=4, ppo_updates=1, ppo_batch=8, ppo_response_tokens=4, **changes
        )
        round_ = Trainer(
            settings=settings,
            evaluation=EvaluationSettings(max_tokens=4, samples_per_prompt=1),
            store=installation.store,
            registry=installation.registry,
            rounds=installation.rounds,
            data_dir=installation.directory,
            max_model_len=128,
            make_sampler=lambda model_dir, _: TransformersSampler(model_dir),
        ).run_once()
        assert round_ is not None
        assert round_.state == "done", round_.error
        stages = installation.registry.version(round_.version or "").manifest.details["stages"]
        _check_lineage(installation, round_, stages)
        return {"from": round_.config["reward_model_from"], **stages["reward_model"], **stages["dataset"]}

    installation.give_feedback(seed=4)
    first = train(reward_heads=2)
    assert (first["from"], first["older"]) == (None, 0)
    installation.give_feedback(seed=5)
    second = train(reward_heads=3, reward_older_share=0.5, keep_rounds=1)
    assert second["from"] == 1
    assert 0.7 < second["older"] / (second["train"]["comparisons"] + second["train"]["judgements"]) <= 1
    heads = load_file(installation.directory / "rounds" / "0002" / "reward_model" / "head.safetensors")
    assert heads["head.weight"].shape == (3, 128)
    assert {query.round_id for query in installation.store.queries(100)} == {2}
    # Another trunk than the last round's: the last reward model is no start for it.
    installation.give_feedback(seed=6)
    other = tiny_model(installation.directory / "other", seed=3)
    third = train(reward_backbone=str(other))
    assert third["from"] is None


def _check_lineage(installation: RoundInstallation, round_: Round, stages: Mapping[str, Any]) -> None:
    """What the round wrote down is what its stages counted, and leads to the events of the store."""
    lineage = Lineage(installation.engine)
    own, *others = lineage.behind(round_.version or "")
    judged = {side: {**stages["dataset"][side], "prompts": 0} for side in ("train", "held_out")}
    assert own.events == {
        name: count
        for name, count in (
            ("trained", sum(judged["train"].values())),
            ("held_out", sum(judged["held_out"].values())),
            ("older", stages["reward_model"]["older"]),
        )
        if count
    }
    # The last round's reward model is behind this one, whatever became of its candidate.
    start = round_.config["reward_model_from"]
    assert start is None or start in [found.round_id for found in others]
    for event in lineage.events([round_.id], limit=10_000):
        stored = installation.store.event(event.event_id)
        assert stored is not None
        assert stored.position is not None
        assert (stored.position <= (round_.cursor or 0)) == (event.use == "older")
        learned = lineage.learned(event.event_id)
        assert (round_.version in learned) == (event.use != "held_out")


def test_a_round_tries_its_candidate_on_cases_learns_from_them_and_tells_what_changed(
    installation: RoundInstallation,
) -> None:
    installation.give_feedback(seed=4)
    cases = Cases(installation.engine)

    def add(prompt: str, check: dict[str, Any], **fields: Any) -> Case:
        messages = [{"role": "user", "content": prompt}]
        new = NewCase.model_validate({"messages": messages, "checks": [check], **fields})
        return cases.add(new, actor="ann", validate=check_case)

    # Its prompt would be held out, if it were not a case's.
    prompt = next(text for n in range(50) if is_held_out(prompt_hash(_asked(text := f"w50 w{n}")), 0.3))
    fixed = add(prompt, {"kind": "required_words", "words": ["w20"]}, good="w20 w21 w22 w23")
    broken = add("w1 w2", {"kind": "forbidden_words", "words": ["w7"]})
    judged = cases.add(
        NewCase.model_validate(
            {"messages": [{"role": "user", "content": "w3 w4"}], "good": "w7 w7", "bad": "w8 w9 w10"}
        ),
        actor="ann",
        validate=check_case,
    )
    fixed = cases.begin_training(fixed.id)
    record, events = training_records(fixed, 3.0)
    installation.store.ingest(entries(record, *events))
    round_ = Trainer(
        settings=TrainingSettings(
            minimum_judged=4,
            sft_learning_rate=5e-3,
            sft_case_repeats=40,
            sft_checkpoints=1,
            reward_heads=1,
            reward_epochs=40,
            reward_learning_rate=3e-3,
            ppo_updates=1,
            ppo_batch=8,
            ppo_response_tokens=4,
        ),
        # The base says one word over and over, which from three on passes nothing.
        evaluation=EvaluationSettings(max_tokens=4, samples_per_prompt=1, case_tokens=2),
        store=installation.store,
        registry=installation.registry,
        rounds=installation.rounds,
        data_dir=installation.directory,
        max_model_len=128,
        make_sampler=lambda model_dir, _: TransformersSampler(model_dir),
    ).run_once()
    assert round_ is not None
    assert round_.state == "done", round_.error
    assert round_.version is not None
    found = {result.case_id: result for result in cases.results(round_id=round_.id)}
    assert (found[fixed.id].change, found[fixed.id].after) == ("fixed", "w20 w21")
    assert (found[broken.id].change, found[broken.id].after) == ("broke", "w7 w7")
    # The judge was fitted to rankings in which more w7 is better.
    assert found[judged.id].after_passed
    verdict = round_.verdict or {}
    (condition,) = [one for one in verdict["conditions"] if one["name"] == "cases"]
    assert (verdict["promote"], condition["passed"]) == (False, False)
    assert condition["figures"]["cases"]["broke"] == [broken.id]
    assert fixed.id in condition["sentence"]
    assert installation.registry.version(round_.version).state == "rejected"
    (used,) = Lineage(installation.engine).uses(fixed.event_ids[0])
    assert (used.use, used.reason) == ("trained", None)
    page = parts.round_report(Config(data_dir=installation.directory), installation.engine, round_.id).html()
    count = Counter(result.change for result in found.values())
    assert f"{count['fixed']} fixed, 1 broke" in page
    assert "w20 w21" in page


def _asked(text: str) -> Completion:
    """The completion that a case of this prompt is recorded as."""
    messages = [{"role": "user", "content": text}]
    return Completion(id="c", key_id="k", endpoint="cases", created_at=1.0, messages=messages, choices=[])


def test_a_reward_backbone_with_another_vocabulary_is_refused_at_once(
    installation: RoundInstallation, tmp_path: Path
) -> None:
    installation.give_feedback(seed=7)
    other = tiny_model(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    swapped = tokenizer.backend_tokenizer.to_str().replace('"w1":', '"w99":')
    (other / "tokenizer.json").write_text(swapped)
    assert installation.start(TRAINING__REWARD_BACKBONE=str(other)).wait(timeout=60) == 1
    (round_,) = installation.rounds.list()
    assert round_.error is not None
    assert round_.error.startswith("dataset: reward_backbone: ")
    assert "vocabulary" in round_.error


def test_only_one_trainer_works_at_a_time_and_one_that_is_stopped_is_gone_on_with(
    installation: RoundInstallation,
) -> None:
    installation.give_feedback(seed=3)
    first = installation.start()
    while installation.rounds.unfinished() is None:
        assert first.poll() is None
        time.sleep(0.05)
    second = subprocess.run(
        [sys.executable, "-m", "instructloop.cli", "train", "--once"],
        env=os.environ | {"INSTRUCTLOOP_DATA_DIR": str(installation.directory)},
        cwd=installation.directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode != 0
    assert "another trainer" in second.stderr
    assert "Traceback" not in second.stderr
    first.terminate()
    assert first.wait(timeout=60) == 128 + 15
    assert "round 1 was stopped: the next trainer goes on with it" in installation.log()
    stopped = installation.rounds.unfinished()
    assert stopped is not None
    assert stopped.id == 1
