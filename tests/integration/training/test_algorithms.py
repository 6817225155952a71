"""DPO, KTO and RLOO on a round's own data: the right token ids reach TRL, and each moves what it should."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from unit.training.tiny import END, TransformersSampler, tiny_model, tiny_tokenizer

from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel, scores_and_spreads
from training.algorithms import NothingToLearnFrom, Task, beside_neighbours, desirability, pairs, rloo, train
from training.checkpoints import Checkpoints
from training.dataset import Comparison, Judgement, Side
from training.logprobs import total_logprobs
from training.policy import load_policy
from training.rollouts import Rollouts
from training.settings import TrainingSettings

PROMPTS = [Prompt(str(i), [3, 5 + i, 6]) for i in range(6)]
GOOD, BETTER, WORSE, BAD = [7, 8, END], [9, END], [10, END], [11, 12, 13, END]
COMPARISONS = [Comparison(prompt, [BAD, BETTER, GOOD, WORSE], [2, 0, 1, 1], "x") for prompt in PROMPTS]
UP, MIDDLE, DOWN = [20, 21, END], [22, END], [23, END]
JUDGEMENTS = [
    Judgement(PROMPTS[0], UP, 1.0, "thumb"),
    Judgement(PROMPTS[1], MIDDLE, 0.5, "rating"),
    Judgement(PROMPTS[2], DOWN, 0.0, "thumb"),
    Judgement(PROMPTS[3], UP, 5 / 6, "rating"),
]
SIDE = Side(comparisons=COMPARISONS, judgements=JUDGEMENTS, prompts={p.key: p for p in PROMPTS})
FAST = TrainingSettings(
    preference_learning_rate=3e-3,
    preference_epochs=3,
    ppo_learning_rate=3e-3,
    ppo_batch=16,
    ppo_updates=12,
    ppo_response_tokens=6,
)


class Run:
    """One algorithm's run on the tiny policy, with all that it reported."""

    def __init__(self, directory: Path, settings: TrainingSettings, side: Side = SIDE, **more: Any) -> None:
        policy_dir = tiny_model(directory / "sft")
        RewardModel.from_decoder(policy_dir).save(directory / "reward_model")
        self.before = load_policy(policy_dir)
        self.figures: list[dict[str, float]] = []
        self.steps: list[tuple[int, int]] = []
        self.task = Task(
            policy=load_policy(policy_dir),
            tokenizer=tiny_tokenizer(),
            side=side,
            prompts=side.sorted_prompts(),
            reward_model=directory / "reward_model",
            rollouts=Rollouts(
                TransformersSampler(policy_dir),
                tiny_tokenizer(),
                directory / "rollout",
                max_tokens=settings.ppo_response_tokens,
                temperature=settings.ppo_temperature,
            ),
            settings=settings,
            work=directory / "work",
            report=self._report,
            **more,
        )

    def _report(self, step: int, steps: int, figures: Any) -> None:
        self.steps.append((step, steps))
        self.figures.append(dict(figures))


def settings(algorithm: str, **more: Any) -> TrainingSettings:
    return FAST.model_copy(update={"algorithm": algorithm, **more})


def logprobs(policy: PreTrainedModel, items: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
    return torch.tensor(total_logprobs(policy, items, 1.0))


def change(run: Run, after: PreTrainedModel, response: list[int]) -> float:
    items = [(prompt.token_ids, response) for prompt in PROMPTS]
    return float((logprobs(after, items) - logprobs(run.before, items)).mean())


def test_pairs_are_all_that_a_ranking_decides() -> None:
    slow = []
    for item in COMPARISONS:
        for i, j in itertools.permutations(range(4), 2):
            if item.ranks[i] < item.ranks[j]:
                slow.append((item.prompt.token_ids, item.responses[i], item.responses[j]))
    found = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in pairs(COMPARISONS)]
    assert sorted(found) == sorted(slow)
    assert len(found) == 5 * len(PROMPTS)  # of six pairs one is tied
    assert not any(
        {tuple(chosen), tuple(rejected)} == {tuple(GOOD), tuple(WORSE)} for _, chosen, rejected in found
    )


def test_judgements_and_pairs_become_desirable_or_not() -> None:
    rows = [(row["prompt_ids"], row["completion_ids"], row["label"]) for row in desirability(SIDE)]
    judged = rows[:3]
    assert judged == [
        (PROMPTS[0].token_ids, UP, True),
        (PROMPTS[2].token_ids, DOWN, False),
        (PROMPTS[3].token_ids, UP, True),
    ]
    of_one = [(ids, label) for prompt, ids, label in rows[3:] if prompt == PROMPTS[4].token_ids]
    assert of_one.count((BETTER, True)) == 3
    assert of_one.count((GOOD, True)) == of_one.count((GOOD, False)) == 1
    assert of_one.count((BAD, False)) == 3
    assert len(of_one) == 2 * 5


def test_dpo_sees_our_tokens_and_widens_the_margin(tmp_path: Path) -> None:
    rows = pairs(COMPARISONS)
    run = Run(tmp_path, settings("dpo", preference_batch=len(rows), preference_epochs=12))
    after, _ = train(run.task)
    first = run.figures[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    for name in ("chosen", "rejected"):
        expected = logprobs(run.before, [(row["prompt_ids"], row[f"{name}_ids"]) for row in rows]).mean()
        assert first[f"logps/{name}"] == pytest.approx(float(expected), rel=0.01)
    assert run.steps == [(i, 12) for i in range(1, 13)]
    assert after is run.task.policy
    assert change(run, after, BETTER) - change(run, after, BAD) > 5
    assert run.figures[-1]["loss"] < 0.5 * first["loss"]


@pytest.mark.parametrize("algorithm", ["dpo", "rloo"])
def test_checkpoints_are_kept_on_the_way_and_change_nothing(algorithm: str, tmp_path: Path) -> None:
    chosen = settings(algorithm, preference_batch=12, ppo_updates=4)
    kept = Checkpoints(tmp_path / "kept", tiny_tokenizer(), 2)
    watched, unwatched = (
        train(Run(tmp_path / name, chosen, checkpoints=checkpoints).task)
        for name, checkpoints in (("watched", kept), ("unwatched", None))
    )
    assert watched[1] == unwatched[1]
    assert list(kept.kept(before=100)) == [int(watched[1]["updates"]) // 2]
    for name, value in watched[0].state_dict().items():
        assert torch.equal(value, unwatched[0].state_dict()[name])
    (directory,) = kept.kept(before=100).values()
    start, on_the_way, end = (
        logprobs(policy, [(PROMPTS[0].token_ids, BETTER)])
        for policy in (load_policy(tmp_path / "watched" / "sft"), load_policy(directory), watched[0])
    )
    assert len({float(start), float(on_the_way), float(end)}) == 3


def test_kto_raises_what_is_desirable_and_lowers_the_rest(tmp_path: Path) -> None:
    rows = desirability(SIDE)
    run = Run(tmp_path, settings("kto", preference_batch=len(rows), preference_epochs=16))
    after, _ = train(run.task)
    for name, label in (("chosen", True), ("rejected", False)):
        items = [(row["prompt_ids"], row["completion_ids"]) for row in rows if row["label"] is label]
        assert run.figures[0][f"logps/{name}"] == pytest.approx(
            float(logprobs(run.before, items).mean()), rel=0.01
        )
    # 1 - sigmoid(0) on every response; the rarer kind, the undesirable here or there, weighs more.
    good = sum(row["label"] for row in rows)
    weights = sum(
        max(1, (len(rows) - good) / good) if row["label"] else max(1, good / (len(rows) - good))
        for row in rows
    )
    assert run.figures[0]["loss"] == pytest.approx(0.5 * weights / len(rows), rel=1e-3)
    assert change(run, after, BETTER) > 1
    assert change(run, after, BAD) < -1


def test_kto_estimates_kl_with_a_neighbours_response() -> None:
    """A response beside its own prompt would make the estimate the reward itself."""
    rows = [{"prompt_ids": [i], "completion_ids": [30 + i], "label": True} for i in range(7)]
    found = beside_neighbours(rows, 3)
    assert [row["completion_ids"][0] - 30 for row in found] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["KL_completion_ids"][0] - 30 for row in found] == [2, 0, 1, 5, 3, 4, 6]


def test_rloo_raises_a_simple_reward_on_our_prompts(tmp_path: Path) -> None:
    run = Run(tmp_path, settings("rloo"))
    asked: list[tuple[int, ...]] = []

    def reward(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
        asked.extend(tuple(prompt) for prompt in prompts)
        assert all(1 <= len(response) <= FAST.ppo_response_tokens for response in responses)
        assert all(END not in response[:-1] for response in responses)
        return [float(list(response).count(7)) for response in responses]

    after, _ = rloo(run.task, reward)
    assert run.steps == [(i, 12) for i in range(1, 13)]
    assert len(asked) == 12 * 16
    groups = [asked[i : i + 4] for i in range(0, len(asked), 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert {group[0] for group in groups} == {tuple(prompt.token_ids) for prompt in PROMPTS}
    sampler = TransformersSampler(tmp_path / "sft")

    def said(policy: PreTrainedModel) -> float:
        sampler._model = policy.eval()
        found = sampler.sample([p.token_ids for p in PROMPTS], n=20, max_tokens=6, temperature=1.0, seed=1)
        return sum(sample.token_ids.count(7) for group in found for sample in group) / (20 * len(PROMPTS))

    assert said(after) > said(run.before) + 0.5


def test_rloo_takes_the_penalty_from_responses_that_do_not_end(tmp_path: Path) -> None:
    run = Run(tmp_path, settings("rloo", ppo_updates=1, ppo_missing_end_penalty=3.0))
    rloo(run.task, lambda prompts, responses: [0.5] * len(responses))
    figures = run.figures[0]
    assert figures["reward"] == pytest.approx(0.5 - 3.0 * figures["completions/clipped_ratio"], abs=1e-5)
    assert figures["completions/clipped_ratio"] > 0


def test_rloo_takes_the_penalty_from_short_responses_too(tmp_path: Path) -> None:
    run = Run(tmp_path, settings("rloo", ppo_updates=1, ppo_missing_end_penalty=3.0, ppo_minimum_tokens=7))
    rloo(run.task, lambda prompts, responses: [0.5] * len(responses))
    assert run.figures[0]["reward"] == pytest.approx(0.5 - 3.0)  # six tokens are the most they can have


def test_rloo_is_rewarded_by_the_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, settings("rloo", ppo_updates=1))
    model = RewardModel(RewardModel.load(tmp_path / "reward_model").backbone, heads=3)
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path / "reward_model")
    scored: list[tuple[list[int], list[int], float]] = []

    def spy(model: RewardModel, items: Any) -> list[tuple[list[float], list[float]]]:
        found = scores_and_spreads(model, items)
        for (prompt, own), (scores, spreads) in zip(items, found, strict=True):
            scored.append((prompt, own[0], scores[0] - FAST.reward_spread_penalty * spreads[0]))
        return found

    monkeypatch.setattr("training.algorithms.scores_and_spreads", spy)
    train(run.task)
    assert len(scored) == FAST.ppo_batch
    assert all(prompt in [known.token_ids for known in PROMPTS] for prompt, _, _ in scored)
    assert len({score for _, _, score in scored}) > 1
    expected = [score - FAST.ppo_missing_end_penalty * (ids[-1] != END) for _, ids, score in scored]
    assert run.figures[0]["reward"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "dpo", "kto"])
def test_the_same_seed_gives_the_same_weights(tmp_path: Path, algorithm: str) -> None:
    def weights(name: str, seed: int) -> torch.Tensor:
        run = Run(tmp_path / name, settings(algorithm, seed=seed, ppo_updates=2, preference_batch=8))
        torch.manual_seed(len(name))  # whatever was drawn before must not matter
        return torch.cat([value.flatten() for value in train(run.task)[0].state_dict().values()])

    first, again, other = weights("a", 3), weights("again", 3), weights("other", 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "dpo", "kto"])
def test_updates_can_be_bounded(tmp_path: Path, algorithm: str) -> None:
    run = Run(tmp_path, settings(algorithm, preference_batch=8), updates=2)
    train(run.task)
    assert run.steps == [(1, 2), (2, 2)]


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_no_pairs_or_judgements_are_said(tmp_path: Path, algorithm: str) -> None:
    run = Run(tmp_path, settings(algorithm), Side(prompts=SIDE.prompts))
    with pytest.raises(NothingToLearnFrom, match="there are none"):
        train(run.task)
