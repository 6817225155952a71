"""The reward model: packing, fitting, standardising, its file format and its accuracy."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
    Qwen2Config,
)
from unit.training.tiny import WORDS, tiny_model, tiny_tokenizer

from evaluation.contest import Prompt
from evaluation.reward_model import (
    RewardModel,
    UnsuitableBackbone,
    head_scores_of_responses,
    pack,
    rows_by_tokens,
    score_responses,
    scores_and_spreads,
)
from training.dataset import Comparison, Demonstration, Judgement, Side
from training.reward_model import bootstrap_weights, check_backbone, fit
from training.reward_quality import accuracy_by_source, measure
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
        packed = model(pack(items)).squeeze(-1).tolist()
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
    model = RewardModel.from_decoder(model_dir, heads=3)
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

    by_head = torch.cat(head_scores_of_responses(model, items)).std(0)
    assert by_head.tolist() == pytest.approx([float(by_head[0])] * 3, abs=1e-3)  # all heads vary alike

    model.save(tmp_path / "saved")
    again = head_scores_of_responses(RewardModel.load(tmp_path / "saved"), items)
    assert torch.equal(torch.cat(again), torch.cat(head_scores_of_responses(model, items)))


def test_heads_on_their_own_bootstraps_disagree_more_where_people_do(model_dir: Path) -> None:
    spreads = []
    for guessing in (0.0, 0.6):
        generator = random.Random(6)
        said = [
            Comparison(c.prompt, c.responses, generator.sample(c.ranks, 4), "s")
            if generator.random() < guessing
            else c
            for c in _comparisons(96, seed=6)
        ]
        torch.manual_seed(0)
        model = RewardModel.from_decoder(model_dir, heads=4)
        settings = TrainingSettings(reward_epochs=8, reward_learning_rate=2e-3)
        fit(model, Side(comparisons=said), settings, lambda *_: None)
        items = [(c.prompt.token_ids, c.responses) for c in _comparisons(40, seed=7)]
        found = [spread for _, own in scores_and_spreads(model, items) for spread in own]
        spreads.append(sum(found) / len(found))
    assert spreads[0] > 0
    assert spreads[1] > 3 * spreads[0]


def test_reward_is_the_mean_less_a_multiple_of_the_population_deviation(model_dir: Path) -> None:
    torch.manual_seed(0)
    model = RewardModel.from_decoder(model_dir, heads=4)
    torch.nn.init.normal_(model.head.weight)
    model.offset.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    model.scale.copy_(torch.tensor([0.5, 1.0, 2.0, 1.5]))
    model.requires_grad_(False)
    hidden = torch.randn(5, 128)
    for row, reward, score in zip(hidden, model.reward(hidden, 0.7), model.score(hidden), strict=True):
        values = [
            (float(model.head.weight[h] @ row + model.head.bias[h]) - float(model.offset[h]))
            / float(model.scale[h])
            for h in range(4)
        ]
        mean = sum(values) / 4
        deviation = (sum((value - mean) ** 2 for value in values) / 4) ** 0.5
        assert float(score) == pytest.approx(mean, abs=1e-4)
        assert float(reward) == pytest.approx(mean - 0.7 * deviation, abs=1e-4)


def test_demonstrations_score_zero_on_average(model_dir: Path) -> None:
    torch.manual_seed(0)
    model = RewardModel.from_decoder(model_dir, heads=2)
    generator = random.Random(7)
    written = [
        Demonstration(Prompt(str(i), _tokens(generator, 4)), [GOOD] * generator.randint(3, 8))
        for i in range(9)
    ]
    side = Side(comparisons=_comparisons(48, seed=7), demonstrations=written)
    fit(model, side, TrainingSettings(reward_epochs=8, reward_learning_rate=3e-3), lambda *_: None)
    items = [(item.prompt.token_ids, [item.response]) for item in written]
    assert torch.tensor(score_responses(model, items)).mean().item() == pytest.approx(0, abs=0.02)
    responses = [(c.prompt.token_ids, c.responses) for c in side.comparisons]
    scores = torch.tensor(score_responses(model, responses)).flatten()
    assert scores.std().item() == pytest.approx(1, abs=0.02)
    assert scores.mean() < -0.5  # they are better than what was ranked


def test_bootstraps_take_whole_prompts_and_keep_the_scale() -> None:
    comparisons = _comparisons(30, seed=8)
    items: list[Comparison | Judgement] = [*comparisons]
    items += [Judgement(c.prompt, c.responses[0], 1.0, "thumb", weight=0.25) for c in comparisons[:10]]
    weights = bootstrap_weights(items, 5, seed=3)
    assert weights.shape == (40, 5)
    assert weights.sum(0).tolist() == pytest.approx([40.0] * 5, rel=1e-5)
    assert len({tuple(head) for head in weights.T.tolist()}) == 5
    for head in weights.T:
        unit = head[:30][head[:30] > 0].min()  # one draw, unless nothing was drawn just once
        draws = (head[:30] / unit).tolist()
        assert all(abs(draw - round(draw)) < 1e-4 for draw in draws)
        assert sum(draws) == pytest.approx(30)  # as many prompts as there are
        assert 0.0 in draws
        assert (head[30:] / head[:10].clamp(min=1e-9)).tolist() == pytest.approx(
            [0.25 if draw else 0.0 for draw in draws[:10]], abs=1e-5
        )
    assert torch.equal(weights, bootstrap_weights(items, 5, seed=3))
    assert bootstrap_weights(comparisons, 1, seed=3).flatten().tolist() == [1.0] * 30


def test_a_raters_weight_decides_between_raters_who_disagree(model_dir: Path) -> None:
    """Two raters rank everything the other way round; the model follows the one who counts."""
    for trusted, better in ((1.0, True), (0.05, False)):
        torch.manual_seed(0)
        model = RewardModel.from_decoder(model_dir, heads=2)
        said = []
        for c in _comparisons(64, seed=9):
            said.append(Comparison(c.prompt, c.responses, c.ranks, "s", weight=trusted))
            said.append(Comparison(c.prompt, c.responses, c.ranks[::-1], "s", weight=1.05 - trusted))
        fit(
            model,
            Side(comparisons=said),
            TrainingSettings(reward_epochs=10, reward_learning_rate=2e-3),
            lambda *_: None,
        )
        accuracy = accuracy_by_source(model, _comparisons(40, seed=10))["synthetic"]["model"]
        assert (accuracy.low > 0.6) if better else (accuracy.high < 0.4)


def test_quality_is_told_by_source_and_by_group(model_dir: Path) -> None:
    torch.manual_seed(0)
    model = RewardModel.from_decoder(model_dir, heads=2)
    fit(
        model,
        Side(comparisons=_comparisons(96, seed=1)),
        TrainingSettings(reward_epochs=12, reward_learning_rate=3e-3),
        lambda *_: None,
    )
    right = _comparisons(30, seed=11)
    wrong = [Comparison(c.prompt, c.responses, c.ranks[::-1], "b", 1.0, "contrary") for c in right]
    quality = measure(model, [*right, *wrong])
    by_group = quality.by_group
    assert by_group["contrary"]["model"].estimate == pytest.approx(1 - by_group[""]["model"].estimate)
    assert quality.by_source["b"] == by_group["contrary"]
    assert quality.by_source["synthetic"]["model"].estimate > 0.7
    plain = json.loads(json.dumps(quality.figures(), allow_nan=False))
    assert plain["held_out_accuracy"]["b"]["longer"]["clusters"] == 30
    assert sum(each["pairs"] for each in plain["calibration"]) == 2 * 30 * 6
    # Each pair was right once and wrong once, whatever its score.
    assert all(each["accuracy"] in (None, 0.5) for each in plain["calibration"])
    assert quality.metrics()["held_out_accuracy/b/model"] == quality.by_source["b"]["model"].estimate
    assert measure(model, []).figures()["calibration_error"] is None


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


_SIZE = {"vocab_size": len(WORDS), "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
_TWO_LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _backbone(config: PretrainedConfig, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(**_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=64),
        Qwen2Config(**_SIZE, **_TWO_LAYERS, num_key_value_heads=1),
        GPTNeoXConfig(**_SIZE, **_TWO_LAYERS),
    ],
    ids=lambda config: config.model_type,
)
def test_another_architecture_can_be_the_trunk(config: PretrainedConfig, tmp_path: Path) -> None:
    directory = _backbone(config, tmp_path / "backbone")
    check_backbone(str(directory), tiny_tokenizer())
    torch.manual_seed(0)
    model = RewardModel.from_decoder(directory, heads=2)
    fit(
        model,
        Side(comparisons=_comparisons(96, seed=12)),
        TrainingSettings(reward_epochs=20, reward_learning_rate=5e-3),
        lambda *_: None,
    )
    held_out = _comparisons(40, seed=13)
    assert accuracy_by_source(model, held_out)["synthetic"]["model"].low > 0.6
    model.save(tmp_path / "saved")
    items = [(c.prompt.token_ids, c.responses) for c in held_out]
    assert score_responses(RewardModel.load(tmp_path / "saved"), items) == score_responses(model, items)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**_SIZE, hidden_size=32, num_hidden_layers=2, state_size=4),
        MptConfig(vocab_size=len(WORDS), d_model=32, n_layers=2, n_heads=2),
        GPTNeoConfig(
            **_SIZE,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_a_trunk_that_cannot_be_packed_is_refused(config: PretrainedConfig, tmp_path: Path) -> None:
    directory = _backbone(config, tmp_path / "backbone")
    with pytest.raises(UnsuitableBackbone, match=f"(?i){config.model_type.replace('_', '')}"):
        check_backbone(str(directory), tiny_tokenizer())


def test_a_trunk_with_another_vocabulary_is_refused(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w99"])
    check_backbone(str(model_dir), tiny_tokenizer())
    with pytest.raises(UnsuitableBackbone, match="1 tokens have other ids"):
        check_backbone(str(model_dir), tokenizer)
