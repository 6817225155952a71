"""Every formula against an obvious slow version."""

import math
import random

import pytest
import torch

from training.losses import (
    adapted_kl_coefficient,
    generalised_advantages,
    importance_weights,
    policy_loss,
    token_rewards,
    value_loss,
)
from training.reward_model import PointwiseLoss, ranking_loss
from training.reward_quality import calibration, pair_outcomes, within_correlation


def _mask(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def test_ranking_loss_is_the_mean_over_untied_pairs() -> None:
    scores, ranks = [0.3, -1.2, 2.0, 0.5, 0.5], [1, 2, 0, 1, 2]
    terms = [
        -math.log(1 / (1 + math.exp(-(scores[i] - scores[j]))))
        for i in range(5)
        for j in range(5)
        if ranks[i] < ranks[j]
    ]
    assert len(terms) == 8  # C(5,2) less the two tied pairs
    assert ranking_loss(torch.tensor(scores), ranks).item() == pytest.approx(
        sum(terms) / len(terms), rel=1e-5
    )


def test_ranking_loss_of_heads_is_each_heads_own() -> None:
    scores, ranks = torch.randn(5, 3), [1, 2, 0, 1, 2]
    by_head = ranking_loss(scores, ranks)
    assert by_head.tolist() == pytest.approx([float(ranking_loss(scores[:, h], ranks)) for h in range(3)])


def test_ranking_loss_falls_along_its_gradient() -> None:
    scores = torch.tensor([0.0, 0.1, 0.2], requires_grad=True)
    loss = ranking_loss(scores, [0, 1, 2])
    loss.backward()
    assert scores.grad is not None
    assert scores.grad[0] < 0 < scores.grad[2]
    assert ranking_loss(scores.detach() - 0.5 * scores.grad, [0, 1, 2]) < loss


def test_pointwise_offsets_are_one_a_kind() -> None:
    loss = PointwiseLoss()
    with torch.no_grad():
        loss.offsets["thumb"].fill_(2.0)
    score = torch.tensor([-0.5])
    expected = -math.log(1 / (1 + math.exp(-1.5)))
    assert loss(score, 1.0, "thumb").item() == pytest.approx(expected, rel=1e-5)
    half = -0.5 * math.log(1 / (1 + math.exp(0.5))) - 0.5 * math.log(1 - 1 / (1 + math.exp(0.5)))
    assert loss(score, 0.5, "rating").item() == pytest.approx(half, rel=1e-5)


def test_pair_outcomes_count_ties_of_values_half() -> None:
    assert pair_outcomes([1.0, 0.0, 1.0], [0, 1, 1]) == [1.0, 0.5]


def test_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    random.seed(2)
    differences = [random.gauss(0.4, 1.5) for _ in range(300)] + [0.0, 40.0, -40.0]
    error, bins = calibration(differences)
    total = 0.0
    for i, found in enumerate(bins):
        low, high = 0.5 + 0.05 * i, 0.55 + 0.05 * i
        inside = [
            (1 / (1 + math.exp(-abs(d))), 0.5 if d == 0 else float(d > 0))
            for d in differences
            if low < 1 / (1 + math.exp(-abs(d))) <= high or (i == 0 and d == 0)
        ]
        assert found.pairs == len(inside)
        confidence = sum(c for c, _ in inside) / len(inside)
        accuracy = sum(right for _, right in inside) / len(inside)
        assert found.confidence == pytest.approx(confidence)
        assert found.accuracy == pytest.approx(accuracy)
        total += len(inside) * abs(confidence - accuracy)
    assert error == pytest.approx(total / len(differences))
    assert calibration([])[0] is None


def test_calibration_is_good_where_outcomes_follow_the_probabilities() -> None:
    random.seed(3)
    honest = []
    for _ in range(20_000):
        d = abs(random.gauss(0, 1.5))
        honest.append(d if random.random() < 1 / (1 + math.exp(-d)) else -d)
    error, _ = calibration(honest)
    boastful, _ = calibration([3 * d for d in honest])
    assert error is not None
    assert boastful is not None
    assert error < 0.015
    assert boastful > 0.1


def test_length_correlation_is_within_prompts() -> None:
    scores, lengths = [[1.0, 3.0, 2.0], [10.0, 9.0]], [[100.0, 90.0, 80.0], [5.0, 7.0]]
    x, y = [-1.0, 1.0, 0.0, 0.5, -0.5], [10.0, 0.0, -10.0, -1.0, 1.0]
    expected = sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(
        sum(a * a for a in x) * sum(b * b for b in y)
    )
    assert within_correlation(scores, lengths) == pytest.approx(expected)
    assert within_correlation([[1.0, 2.0]], [[3.0, 3.0]]) is None
    assert within_correlation([], []) is None


def test_token_rewards_put_the_score_on_the_last_token() -> None:
    mask = _mask([2, 3], 3)
    kl = torch.tensor([[0.1, 0.2, 9.0], [0.3, -0.4, 0.5]])
    rewards = token_rewards(torch.tensor([1.0, -2.0]), kl, mask, 0.5)
    expected = [[-0.05, 1.0 - 0.1, 0.0], [-0.15, 0.2, -2.0 - 0.25]]
    assert torch.allclose(rewards, torch.tensor(expected))


def test_advantages_are_the_discounted_sum_of_errors() -> None:
    random.seed(1)
    lengths, width, gamma, lam = [4, 1, 6], 6, 0.9, 0.7
    mask = _mask(lengths, width)
    rewards, values = torch.randn(3, width) * mask, torch.randn(3, width)
    advantages, returns = generalised_advantages(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-5)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_policy_loss_clips_only_where_it_lowers_the_gain() -> None:
    old = torch.zeros(4)
    new = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5]))
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, share = policy_loss(new, old, advantages, 0.2)
    # gains: min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-0.5, -0.8)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    assert share.item() == 0.5


def test_value_loss_takes_the_worse_of_free_and_clipped() -> None:
    new, old, returns = torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0])
    loss, share = value_loss(new, old, returns, 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.8**2 + 0.9**2) / 2)
    assert share.item() == 0.5


def test_importance_weights_are_the_slow_versions_and_bounded() -> None:
    trainer, engine = torch.tensor([-1.0, -0.5, -3.0]), torch.tensor([-1.2, -2.5, -1.0])
    slow = [min(math.exp(t - e), 2.0) for t, e in zip(trainer.tolist(), engine.tolist(), strict=True)]
    assert importance_weights(trainer, engine).tolist() == pytest.approx(slow)
    assert importance_weights(trainer, engine)[1] == 2.0


def test_importance_weights_multiply_each_tokens_loss() -> None:
    new, old = torch.tensor([-1.0, -0.4, -2.0]), torch.tensor([-1.1, -1.4, -1.0])
    advantages, weights = torch.tensor([1.0, 2.0, -1.5]), torch.tensor([0.5, 2.0, 1.2])
    losses = []
    for n, o, a, w in zip(*(x.tolist() for x in (new, old, advantages, weights)), strict=True):
        ratio = math.exp(n - o)
        losses.append(w * -min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    loss, _ = policy_loss(new, old, advantages, 0.2, weights)
    assert float(loss) == pytest.approx(sum(losses) / 3)
    assert float(loss) != pytest.approx(float(policy_loss(new, old, advantages, 0.2)[0]))


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (0.0, 0.98)])
def test_the_kl_coefficient_follows_the_target_in_bounded_steps(kl: float, factor: float) -> None:
    assert adapted_kl_coefficient(0.2, kl, 6.0) == pytest.approx(0.2 * factor)
