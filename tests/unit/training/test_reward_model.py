"""The reward model: packing, fitting, standardising, its file format and its accuracy."""

import random
from pathlib import Path

import pytest
import torch
from unit.training.tiny import WORDS, tiny_model

from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel, pack, rows_by_tokens, score_responses
from training.dataset import Comparison, Judgement, Side
from training.reward_model import accuracy_by_source, fit
from training.settings import TrainingSettings

GOOD = WORDS.index("w7")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("policy"))


def _tokens(generator: random.Random, length: int) -> list[int]:
    return [generator.choice([t for t in range(5, len(WORDS)) if t != GOOD]) for _ in range(length)]


def _comparisons(count: int, seed: int) -> list[Comparison]:
    """Rankings of four responses by how often they say w7, with lengths that tell nothing."""
    generator = random.Random(seed)
    made = []
    for i in range(count):
        responses = []
        for wanted in range(4):
            response = _tokens(generator, generator.randint(6, 10))
            for place in generator.sample(range(len(response)), wanted):
                response[place] = GOOD
            responses.append(response)
        prompt = Prompt(f"{seed}-{i}", _tokens(generator, generator.randint(3, 9)))
        made.append(Comparison(prompt, responses, [3, 2, 1, 0], "synthetic"))
    return made


def test_packed_scores_are_those_of_separate_sequences(model_dir: Path) -> None:
    torch.manual_seed(0)
    model = RewardModel.from_decoder(model_dir).eval()
    torch.nn.init.normal_(model.head.weight)
    generator = random.Random(0)
    items = [
        (_tokens(generator, 4), [_tokens(generator, n) for n in (3, 7, 5)]),
        (_tokens(generator, 9), [_tokens(generator, 2)]),
        (_tokens(generator, 1), [_tokens(generator, n) for n in (6, 1)]),
    ]
    with torch.no_grad():
        packed = model(pack(items)).tolist()
        separate = [
            float(
                model.score(
                    model.backbone(input_ids=torch.tensor([prompt + response])).last_hidden_state[0, -1]
                )
            )
            for prompt, responses in items
            for response in responses
        ]
    assert packed == pytest.approx(separate, abs=1e-5)
    assert len(set(round(value, 4) for value in packed)) == len(packed)


def test_rows_by_tokens_keeps_the_budget_and_every_row() -> None:
    sizes = [5, 90, 10, 30, 8, 200, 31]
    groups = list(rows_by_tokens(sizes, 100))
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    assert all(len(group) == 1 or len(group) * max(sizes[i] for i in group) <= 100 for group in groups)


def test_fit_learns_a_ranking_and_standardises(model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RewardModel.from_decoder(model_dir)
    side = Side(comparisons=_comparisons(96, seed=1))
    settings = TrainingSettings(reward_epochs=12, reward_learning_rate=3e-3)
    losses: list[float] = []
    fit(model, side, settings, lambda step, steps, figures: losses.append(figures["loss"]))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])

    held_out = _comparisons(40, seed=2)
    accuracy = accuracy_by_source(model, held_out)["synthetic"]
    assert accuracy["model"].low > 0.7
    assert accuracy["longer"].low < 0.55

    items = [(c.prompt.token_ids, c.responses) for c in side.comparisons]
    scores = torch.tensor(score_responses(model, items)).flatten()
    assert scores.mean().item() == pytest.approx(0, abs=0.02)
    assert scores.std().item() == pytest.approx(1, abs=0.02)

    model.save(tmp_path / "saved")
    again = score_responses(RewardModel.load(tmp_path / "saved"), items)
    assert torch.tensor(again).flatten().tolist() == pytest.approx(scores.tolist(), abs=1e-3)


def test_thumbs_alone_teach_too(model_dir: Path) -> None:
    torch.manual_seed(0)
    model = RewardModel.from_decoder(model_dir)
    thumbs = [
        Judgement(c.prompt, response, float(rank == 0), "thumb")
        for c in _comparisons(64, seed=3)
        for response, rank in zip(c.responses, c.ranks, strict=True)
        if rank in (0, 3)
    ]
    settings = TrainingSettings(reward_epochs=20, reward_learning_rate=1e-3)
    fit(model, Side(judgements=thumbs), settings, lambda *_: None)
    assert accuracy_by_source(model, _comparisons(40, seed=4))["synthetic"]["model"].low > 0.65


def test_fitting_twice_gives_the_same_model(model_dir: Path) -> None:
    side = Side(comparisons=_comparisons(16, seed=5))
    scores = []
    for _ in range(2):
        torch.manual_seed(0)
        model = RewardModel.from_decoder(model_dir)
        fit(model, side, TrainingSettings(), lambda *_: None)
        scores.append(score_responses(model, [(c.prompt.token_ids, c.responses) for c in side.comparisons]))
    assert scores[0] == scores[1]
