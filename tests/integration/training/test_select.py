"""The stages before the policy learns: SFT's checkpoints, and the reward model's choice among them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from unit.training.prepared import EVALUATION, SETTINGS, Installation
from unit.training.tiny import TransformersSampler

from evaluation.reward_model import RewardModel, pack
from training.round import RoundRun, _replace


def weights(directory: Path) -> torch.Tensor:
    return torch.cat([value.flatten() for value in load_file(directory / "model.safetensors").values()])


def prepared(installation: Installation) -> RoundRun:
    run = installation.round(SETTINGS)
    run._prepare()
    return run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared round's directory, whose stages after SFT can be run again."""
    root = tmp_path_factory.mktemp("round")
    prepared(Installation(root))
    return root / "rounds" / "0001"


@pytest.fixture
def installation(directory: Path) -> Installation:
    """The same installation, taken up again."""
    return Installation(directory.parents[1])


def again(installation: Installation, directory: Path) -> dict[str, Any]:
    (directory / "select.json").unlink()
    run = installation.round(SETTINGS)
    run._prepare()
    return dict(run._result("select"))


def slow_score(directory: Path, installation: Installation, epoch: int) -> float:
    """Mean of the reward model on the checkpoint's answers, one response at a time."""
    model = RewardModel.load(directory / "reward_model").eval()
    sampler = TransformersSampler(directory / "sft_epochs" / str(epoch))
    dataset = installation.round(SETTINGS)._dataset
    prompts = sorted(dataset.train.prompts.values(), key=lambda prompt: prompt.key)[:6]
    answers = sampler.sample(
        [prompt.token_ids for prompt in prompts],
        n=EVALUATION.samples_per_prompt,
        max_tokens=EVALUATION.max_tokens,
        temperature=EVALUATION.temperature,
        seed=SETTINGS.seed,
    )
    with torch.no_grad():
        scores = [
            float(model(pack([(prompt.token_ids, [sample.token_ids])])).mean())
            for prompt, samples in zip(prompts, answers, strict=True)
            for sample in samples
        ]
    return sum(scores) / len(scores)


def test_the_checkpoint_with_the_best_answers_is_chosen(installation: Installation, directory: Path) -> None:
    chosen = dict(installation.round(SETTINGS)._result("select"))
    scores = {item["epoch"]: item["score"] for item in chosen["epochs"]}
    assert list(scores) == [1, 2, 3]
    for epoch, score in scores.items():
        assert score["estimate"] == pytest.approx(slow_score(directory, installation, epoch), abs=0.05)
        assert score["low"] <= score["estimate"] <= score["high"]
        assert score["clusters"] == 6
    assert scores[chosen["epoch"]]["estimate"] == max(score["estimate"] for score in scores.values())
    assert len({score["estimate"] for score in scores.values()}) == 3
    assert torch.equal(weights(directory / "sft"), weights(directory / "sft_epochs" / str(chosen["epoch"])))
    losses = {item["epoch"]: item["loss"] for item in chosen["epochs"]}
    assert losses == {
        item["epoch"]: item["loss"] for item in installation.round(SETTINGS)._result("sft")["epochs"]
    }
    stored = {(m.step, m.name): m.value for m in installation.rounds.metrics(1) if m.stage == "select"}
    assert stored[(2, "score")] == scores[2]["estimate"]
    assert stored[(2, "loss")] == losses[2]


def test_the_choice_follows_the_weights_and_not_their_order(
    installation: Installation, directory: Path
) -> None:
    first = dict(installation.round(SETTINGS)._result("select"))
    chosen = weights(directory / "sft")
    _swap(directory / "sft_epochs" / "1", directory / "sft_epochs" / "3")
    second = again(installation, directory)
    assert second["epoch"] == {1: 3, 2: 2, 3: 1}[first["epoch"]]
    assert torch.equal(weights(directory / "sft"), chosen)
    _swap(directory / "sft_epochs" / "1", directory / "sft_epochs" / "3")
    assert again(installation, directory) == first


def _swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_a_choice_that_was_killed_is_made_again(
    installation: Installation, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, chosen = dict(installation.round(SETTINGS)._result("select")), weights(directory / "sft")

    def killed(source: Path, target: Path) -> None:
        _replace(source, target)
        shutil.rmtree(target)  # as if it had died between the two steps of the exchange
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.round._replace", killed)
        with pytest.raises(KeyboardInterrupt):
            again(installation, directory)
    run = installation.round(SETTINGS)
    run._prepare()
    assert dict(run._result("select")) == before
    assert torch.equal(weights(directory / "sft"), chosen)


def test_without_sft_there_is_nothing_to_choose(tmp_path: Path) -> None:
    installation = Installation(tmp_path, demonstrations=False)
    run = prepared(installation)
    assert run._result("sft") == {"skipped": "0 demonstrations, 4 are needed"}
    assert run._result("select") == {"skipped": "there was no SFT"}
    base = installation.registry.version("policy-0000").path
    assert torch.equal(weights(tmp_path / "rounds" / "0001" / "sft"), weights(base))


def test_one_epoch_leaves_no_choice(tmp_path: Path) -> None:
    run = Installation(tmp_path).round(SETTINGS.model_copy(update={"sft_epochs": 1}))
    run._prepare()
    assert run._result("select") == {"skipped": "it takes two checkpoints and two prompts to choose"}


@pytest.mark.parametrize("algorithm", ["dpo", "ppo"])
def test_a_round_publishes_what_its_algorithm_made(tmp_path: Path, algorithm: str) -> None:
    installation = Installation(tmp_path)
    run = installation.round(SETTINGS.model_copy(update={"algorithm": algorithm, "sft_epochs": 2}))
    verdict, name = run.run()
    manifest = installation.registry.version(name).manifest
    assert manifest.kind == algorithm
    stages: Sequence[str] = list(manifest.details["stages"])
    assert stages == ["dataset", "sft", "reward_model", "judge", "select", "ppo", "checkpoints"]
    assert manifest.details["stages"]["ppo"]["algorithm"] == algorithm
    assert verdict["figures"]["comparisons"] > 0
    named = {metric.name for metric in installation.rounds.metrics(1) if metric.stage == "ppo"}
    assert ("rewards/margins" in named) is (algorithm == "dpo")
