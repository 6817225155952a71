"""What is recorded of a round, and how two rounds differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from registry.registry import Registry
from registry.round_record import Difference, differences, read_record, same_weights
from registry.rounds import Rounds, UnknownRound

CONFIG = {
    "parent": "policy-0000",
    "training": {"ppo_updates": 8, "vllm_arguments": {}},
    "evaluation": {"n": 4},
}


@pytest.fixture
def run(engine: sa.Engine, registry: Registry, checkpoint: Callable[..., Path]) -> Callable[..., int]:
    """Runs a round of one stage and one curve; returns its number."""
    rounds = Rounds(engine)

    def make(
        config: dict[str, Any], scores: list[float], weights: bytes, repeat_of: int | None = None
    ) -> int:
        number = rounds.begin(0, 40, config, 7, repeat_of=repeat_of).id
        rounds.stage(number, "dataset", "running")
        rounds.stage(number, "dataset", "done", {"train": {"comparisons": 30}, "left_out": {}})
        for step, score in enumerate(scores, 1):
            rounds.metric(number, "ppo", step, {"objective/scores": score})
        version = registry.publish(
            checkpoint(weights), parent=None, round_id=number, kind="ppo", details={}
        ).name
        rounds.stage(number, "gate", "done", {"promote": True})
        rounds.finish(number, "done", version=version, verdict={"promote": scores[-1] > 1, "reasons": ["so"]})
        return number

    return make


def test_what_differs_and_nothing_else(
    engine: sa.Engine, registry: Registry, run: Callable[..., int]
) -> None:
    changed = {**CONFIG, "training": {"ppo_updates": 12, "seed": 1}}
    one = run(CONFIG, [0.5, 1.5], b"a")
    two = run(changed, [0.5, 1.5, 0.75], b"b", repeat_of=one)
    old, new = (read_record(Rounds(engine), registry, number) for number in (one, two))
    found = differences(old, new)
    timeless = [item for item in found if item.section not in ("seconds", "weights")]
    assert timeless == [
        Difference("round", "repeat_of", None, one),
        Difference("config", "training.ppo_updates", 8, 12),
        Difference("config", "training.seed", None, 1),
        Difference("figures", "ppo/objective/scores", 1.5, 0.75),
        Difference("verdict", "promote", True, False),
    ]
    (weights,) = [item for item in found if item.section == "weights"]
    assert (weights.name, len(weights.old), weights.old != weights.new) == ("model.safetensors", 64, True)
    assert {item.name for item in found if item.section == "seconds"} <= {"all", "dataset", "gate"}
    backwards = differences(new, old)
    assert {(i.section, i.name, i.new, i.old) for i in backwards} == {
        (i.section, i.name, i.old, i.new) for i in found
    }
    assert differences(old, old) == []


def test_the_same_weights_are_recognised_also_when_they_were_pruned(
    engine: sa.Engine, registry: Registry, run: Callable[..., int]
) -> None:
    rounds = Rounds(engine)
    first, other, again = run(CONFIG, [1.0], b"a"), run(CONFIG, [1.0], b"b"), run(CONFIG, [1.0], b"a")
    running = rounds.begin(40, 41, CONFIG, 0).id
    registry.prune(1)

    def same(one: int, two: int) -> bool | None:
        return same_weights(read_record(rounds, registry, one), read_record(rounds, registry, two))

    assert (same(first, again), same(first, other), same(first, running)) == (True, False, None)
    assert registry.version("policy-0000").state == "pruned"


def test_the_last_step_counts_whatever_was_stored_last(engine: sa.Engine, registry: Registry) -> None:
    rounds = Rounds(engine)
    number = rounds.begin(0, 1, {}, 0).id
    for step in (1, 3, 2):
        rounds.metric(number, "sft", step, {"loss": float(step)})
    record = read_record(rounds, registry, number)
    assert record.final_figures() == {"sft/loss": 3.0}
    assert record.seconds is None
    with pytest.raises(UnknownRound, match="no round 9"):
        read_record(rounds, registry, 9)
