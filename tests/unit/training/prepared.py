"""A real store and registry on SQLite with a tiny base version in service, and feedback on its answers."""

import random
from pathlib import Path

from databases import migrated
from integration.feedback_samples import entry
from unit.training.tiny import END, WORDS, TransformersSampler, tiny_model, tiny_tokenizer

from evaluation.settings import EvaluationSettings
from feedback.events import FEEDBACK, Event
from feedback.records import Choice, Completion
from feedback.store import Store
from instructloop.database import connect
from registry.registry import Registry
from registry.rounds import Rounds
from training.round import RoundRun
from training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    minimum_judged=4,
    sft_minimum=4,
    sft_learning_rate=1e-3,
    sft_selection_prompts=6,
    reward_epochs=4,
    reward_learning_rate=3e-3,
    ppo_updates=2,
    ppo_batch=8,
    ppo_response_tokens=8,
    threads=1,
)
EVALUATION = EvaluationSettings(max_tokens=8, samples_per_prompt=2, resamples=200)


class Installation:
    """Rankings by how often w7 is said, thumbs for the best, and demonstrations for half of the prompts."""

    def __init__(self, directory: Path, demonstrations: bool = True) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        new = not (directory / "store.db").exists()
        file = directory / "store.db"
        engine = migrated(file) if new else connect(f"sqlite:///{file}")
        self.directory = directory
        self.store, self.rounds = Store(engine), Rounds(engine)
        self.registry = Registry(engine, directory / "versions")
        if new:
            self._fill(demonstrations)

    def _fill(self, demonstrations: bool) -> None:
        directory = self.directory
        base = self.registry.publish(
            tiny_model(directory / "staging"), parent=None, round_id=None, kind="base", details={}
        )
        self.registry.promote(base.name, actor="test", reason="first")
        records: list[Completion | Event] = []
        for i in range(24):
            records += _feedback(i, demonstrations and i % 2 == 0)
        counts = self.store.ingest([entry(record, i) for i, record in enumerate(records)])
        assert not counts.dead_letters

    def round(self, settings: TrainingSettings) -> RoundRun:
        """A round that has begun, sampling with Transformers."""
        config = {
            "parent": "policy-0000",
            "reward_model_from": None,
            "training": settings.model_dump(mode="json"),
            "evaluation": EVALUATION.model_dump(mode="json"),
        }
        round_ = self.rounds.unfinished() or self.rounds.begin(0, self.store.head(), config, settings.seed)
        return RoundRun(
            round_,
            self.directory / "rounds" / "0001",
            store=self.store,
            registry=self.registry,
            rounds=self.rounds,
            make_sampler=lambda model_dir, _: TransformersSampler(model_dir),
            track=lambda *_: None,
        )


def _feedback(number: int, demonstrated: bool) -> list[Completion | Event]:
    generator = random.Random(number)
    messages = [{"role": "user", "content": f"w{generator.randrange(59)} w{generator.randrange(59)}"}]
    choices = []
    for index in range(3):
        words = ["w7"] * (index + 1) + [f"w{generator.choice([8, 9, 10])}" for _ in range(3 - index)]
        tokens = [*(WORDS.index(word) for word in words), END]
        choices.append(Choice(index=index, text=" ".join(words), token_ids=tokens))
    name = f"chatcmpl-{number}"
    prompt = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    completion = Completion(
        id=name,
        key_id="k",
        endpoint="/v1/chat/completions",
        created_at=1.0,
        messages=messages,
        prompt_token_ids=prompt,
        choices=choices,
    )
    groups = [[{"completion_id": name, "choice": choice}] for choice in (2, 1, 0)]
    checks = {"checks": [{"kind": "required_words", "words": ["w7"]}]}
    said = [
        {"type": "ranking", "groups": groups, "context": checks},
        {"type": "thumb", "completion_id": name, "choice": 2, "value": "up"},
    ]
    if demonstrated:
        said.append({"type": "demonstration", "completion_id": name, "text": "w7 w7 w7"})
    events = [
        Event(
            event_id=f"{name}-{feedback['type']}",
            key_id="k",
            rater="k/",
            received_at=2.0,
            feedback=FEEDBACK.validate_python(feedback),
        )
        for feedback in said
    ]
    return [completion, *events]
