"""A whole round on the real engine and a real database, with a model of a few thousand weights.

The trainer is the command that users run, in a process of its own, so that it can be killed as a crash would.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from integration.feedback_samples import entry
from safetensors.torch import load_file
from unit.training.tiny import END, WORDS, TransformersSampler, tiny_model, tiny_tokenizer

from evaluation.settings import EvaluationSettings
from feedback.events import FEEDBACK, Event
from feedback.records import Choice, Completion
from feedback.store import Store
from instructloop.database import connect, migrate
from registry.registry import Registry
from registry.rounds import Round, Rounds
from training.round import STAGES
from training.settings import TrainingSettings
from training.trainer import Trainer

SETTINGS = {
    "SERVER__MAX_MODEL_LEN": "128",
    "TRAINING__MINIMUM_JUDGED": "4",
    "TRAINING__SFT_MINIMUM": "4",
    "TRAINING__REWARD_EPOCHS": "20",
    "TRAINING__REWARD_LEARNING_RATE": "3e-3",
    "TRAINING__PPO_UPDATES": "6",
    "TRAINING__PPO_BATCH": "16",
    "TRAINING__PPO_RESPONSE_TOKENS": "12",
    "TRAINING__PPO_LEARNING_RATE": "1e-3",
    "TRAINING__PPO_CHECKPOINT_UPDATES": "2",
    "TRAINING__KV_CACHE_GIB": "0.1",
    "TRAINING__THREADS": "1",
    "EVALUATION__MAX_TOKENS": "12",
}
ENGINE_SECONDS = 180


class Installation:
    """A data directory with a tiny base version in service and feedback on it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        engine = connect(f"sqlite:///{directory / 'store.db'}")
        migrate(engine)
        self.store, self.rounds = Store(engine), Rounds(engine)
        self.registry = Registry(engine, directory / "versions")
        base = self.registry.publish(
            tiny_model(directory / "staging"), parent=None, round_id=None, kind="base", details={}
        )
        self.registry.promote(base.name, actor="test", reason="first")

    def give_feedback(self, seed: int) -> int:
        """Rank four responses by how often they say w7, with thumbs and demonstrations; returns how many."""
        generator = random.Random(seed)
        tokenizer = tiny_tokenizer()
        records: list[Completion | Event] = []
        for i in range(40):
            messages = [{"role": "user", "content": f"w{generator.randrange(59)} w{generator.randrange(59)}"}]
            choices = []
            for index in range(4):
                words = [f"w{generator.choice([8, 9, 10, 11])}" for _ in range(6)]
                words[: index + 1] = ["w7"] * (index + 1)
                tokens = [*(WORDS.index(word) for word in words), END]
                choices.append(Choice(index=index, text=" ".join(words), token_ids=tokens))
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            name = f"chatcmpl-{seed}-{i}"
            records.append(
                Completion(
                    id=name,
                    key_id="k",
                    endpoint="/v1/chat/completions",
                    created_at=1.0,
                    messages=messages,
                    prompt_token_ids=prompt,
                    choices=choices,
                )
            )
            groups = [[{"completion_id": name, "choice": choice}] for choice in (3, 2, 1, 0)]
            checks = {"checks": [{"kind": "required_words", "words": ["w7"]}]}
            said = [
                {"type": "ranking", "groups": groups, "context": checks},
                {"type": "thumb", "completion_id": name, "choice": 3, "value": "up"},
                {"type": "demonstration", "completion_id": name, "text": "w7 w7 w7 w7"},
            ]
            records += [
                Event(
                    event_id=f"{name}-{feedback['type']}",
                    key_id="k",
                    rater="k/",
                    received_at=2.0,
                    feedback=FEEDBACK.validate_python(feedback),
                )
                for feedback in said
            ]
        counts = self.store.ingest([entry(record, i) for i, record in enumerate(records)])
        assert not counts.dead_letters
        return 3 * 40

    def start(self, **more: str) -> "subprocess.Popen[bytes]":
        environment = {f"INSTRUCTLOOP_{name}": value for name, value in (SETTINGS | more).items()}
        environment |= {"INSTRUCTLOOP_DATA_DIR": str(self.directory), "OMP_NUM_THREADS": "1"}
        log = (self.directory / "trainer.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", "instructloop.cli", "train", "--once"],
            env=os.environ | environment,
            cwd=self.directory,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def train(self, **more: str) -> Round:
        process = self.start(**more)
        code = process.wait(timeout=ENGINE_SECONDS)
        assert code == 0, (self.directory / "trainer.log").read_text()[-4000:]
        return self.rounds.list()[0]

    def kill_in(self, stage: str) -> str:
        """Start the trainer, kill -9 it once it is in `stage` (or already past it); returns where it was."""
        process = self.start()
        deadline = time.monotonic() + ENGINE_SECONDS
        order = [*STAGES, "end"]
        while True:
            at = self._stage()
            if at is not None and order.index(at) >= order.index(stage):
                break
            assert process.poll() is None, (self.directory / "trainer.log").read_text()[-4000:]
            assert time.monotonic() < deadline, f"the round did not reach {stage}"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return at

    def _stage(self) -> str | None:
        running = self.rounds.unfinished()
        if running is not None:
            return running.stage
        return "end" if self.rounds.last_done() else None


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path)


def _weights(installation: Installation, version: str) -> str:
    return installation.registry.version(version).manifest.files["model.safetensors"]


def test_a_round_killed_in_every_stage_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    broken, unbroken = (Installation(tmp_path / name) for name in ("broken", "unbroken"))
    for installation in (broken, unbroken):
        events = installation.give_feedback(seed=1)
        assert installation.store.head() == events

    killed_in = [broken.kill_in(stage) for stage in STAGES]
    assert len(set(killed_in)) >= len(STAGES) - 2, killed_in  # the shortest stages may be over too soon
    ended = broken.train() if broken.rounds.unfinished() else broken.rounds.list()[0]
    expected = unbroken.train()

    for installation, round_ in ((broken, ended), (unbroken, expected)):
        assert (round_.state, round_.id, round_.cursor, round_.cutoff) == ("done", 1, 0, 120)
        versions = installation.registry.versions()
        assert [version.name for version in versions] == ["policy-0000", "policy-0001"]
        manifest = versions[1].manifest
        assert manifest.details["slice"] == [0, 120]
        assert manifest.details["config_hash"] == round_.config_hash
        assert manifest.verdict is not None
        assert manifest.verdict["reasons"]
        assert versions[1].state == ("serving" if manifest.verdict["promote"] else "rejected")
        steps = {m.step for m in installation.rounds.metrics(1) if m.stage == "ppo"}
        assert steps == set(range(1, 7))
        # A ranking that says "more w7" is easy: the reward model has to have learned it.
        accuracy = manifest.details["stages"]["reward_model"]["held_out_accuracy"]["serving"]["model"]
        assert accuracy["low"] > 0.7
        asked = installation.store.queries(100)
        assert len(asked) == 40
        assert [query.spread for query in asked] == sorted((q.spread for q in asked), reverse=True)
        assert not (installation.directory / "rounds" / "0001" / "ppo").exists()
    assert _weights(broken, "policy-0001") == _weights(unbroken, "policy-0001")
    assert ended.verdict == expected.verdict

    assert unbroken.start().wait(timeout=60) == 0  # nothing new: no second round
    assert len(unbroken.rounds.list()) == 1


def test_a_round_says_why_it_failed_and_its_events_stay_for_the_next(installation: Installation) -> None:
    installation.give_feedback(seed=2)
    failed = installation.start(TRAINING__MINIMUM_JUDGED="1000")
    assert failed.wait(timeout=60) == 1
    (round_,) = installation.rounds.list()
    assert round_.state == "failed"
    assert round_.error is not None
    assert round_.error.startswith("dataset: only ")
    assert [version.name for version in installation.registry.versions()] == ["policy-0000"]
    assert installation.rounds.last_done() is None


def test_a_second_round_starts_from_the_first_ones_reward_model_and_a_share_of_its_data(
    installation: Installation,
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


def test_a_reward_backbone_with_another_vocabulary_is_refused_at_once(
    installation: Installation, tmp_path: Path
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


def test_only_one_trainer_works_at_a_time(installation: Installation) -> None:
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
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
