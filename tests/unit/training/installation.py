"""A data directory with a tiny base version in service and feedback on it, and a trainer on them.

The trainer is the real one; in this process its engine is the sampler on Transformers.
"""

import random
from pathlib import Path
from typing import Any

from databases import migrated
from unit.training.tiny import END, WORDS, TransformersSampler, tiny_model, tiny_tokenizer

from evaluation.settings import EvaluationSettings
from feedback.events import FEEDBACK, Event
from feedback.queue import Entry
from feedback.records import Choice, Completion
from feedback.store import Store
from instructloop.database import connect
from registry.registry import Registry
from registry.rounds import Rounds
from training.settings import TrainingSettings
from training.trainer import Trainer

TRAINING: dict[str, Any] = {
    "minimum_judged": 4,
    "sft_minimum": 4,
    "reward_epochs": 20,
    "reward_learning_rate": 3e-3,
    "ppo_updates": 6,
    "ppo_batch": 16,
    "ppo_response_tokens": 12,
    "ppo_learning_rate": 1e-3,
    "ppo_checkpoint_updates": 2,
    "kv_cache_gib": 0.1,
    "threads": 1,
}
EVALUATION: dict[str, Any] = {"max_tokens": 12}
PROMPTS = 40
EVENTS = 3 * PROMPTS


class Installation:
    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        migrated(directory / "store.db").dispose()
        self.open(directory)
        base = self.registry.publish(
            tiny_model(directory / "staging"), parent=None, round_id=None, kind="base", details={}
        )
        self.registry.promote(base.name, actor="test", reason="first")

    def open(self, directory: Path) -> None:
        """Open what is there already."""
        self.directory = directory
        self.engine = connect(f"sqlite:///{directory / 'store.db'}")
        self.store, self.rounds = Store(self.engine), Rounds(self.engine)
        self.registry = Registry(self.engine, directory / "versions")

    def trainer(self, **training: Any) -> Trainer:
        """A trainer in this process; `training` and `evaluation` are settings, `make_sampler` its engine."""
        evaluation = training.pop("evaluation", {})
        make_sampler = training.pop("make_sampler", lambda model_dir, _: TransformersSampler(model_dir))
        return Trainer(
            settings=TrainingSettings(**TRAINING | training),
            evaluation=EvaluationSettings(**EVALUATION | evaluation),
            store=self.store,
            registry=self.registry,
            rounds=self.rounds,
            data_dir=self.directory,
            max_model_len=128,
            make_sampler=make_sampler,
        )

    def weights(self, version: str | None) -> str:
        """SHA-256 of a version's weights."""
        assert version is not None
        return self.registry.version(version).manifest.files["model.safetensors"]

    def give_feedback(self, seed: int) -> int:
        """Rank four responses by how often they say w7, with thumbs and demonstrations; returns how many."""
        generator = random.Random(seed)
        tokenizer = tiny_tokenizer()
        records: list[Completion | Event] = []
        for i in range(PROMPTS):
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
        counts = self.store.ingest([_entry(record, i) for i, record in enumerate(records)])
        assert not counts.dead_letters
        return EVENTS


def _entry(record: Completion | Event, number: int) -> Entry:
    kind = "completion" if isinstance(record, Completion) else "event"
    return Entry(f"1-{number}", kind, record.model_dump_json().encode(), getattr(record, "event_id", None))
