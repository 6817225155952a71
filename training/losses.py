"""PPO's formulas on tensors of response tokens, free of models and trainers.

Shapes: B episodes, R the longest response of the batch; `mask` (B, R) is True on response tokens, which
stand at the left of each row.
"""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Rewards (B, R): -beta * kl on each token, plus the score (B,) on the response's last token.

    `kl` (B, R) is log pi(y_t) - log pi_ref(y_t) of the sampled tokens (Ouyang et al. 2022, equation 2, with
    the penalty paid token by token as in Ziegler et al. 2019, section 2.2).
    """
    rewards = -kl_coefficient * kl * mask
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores), device=last.device), last] += scores
    return rewards


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each (B, R), zero outside the mask.

    A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the
    last token; the return is A_t + V_t (Schulman et al. 2016, arXiv 1506.02438, equation 16).
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(running)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
        following = values[:, t]
    return advantages, (advantages + values) * mask


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, clip: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss of tokens (N,) and the share of tokens on which the clip decides.

    -min(rho A, clip(rho, 1 - clip, 1 + clip) A), rho = exp(new - old) (Schulman et al. 2017,
    arXiv 1707.06347, equation 7), each token times its importance weight where `weights` (N,) are given.
    """
    ratio = (new - old).exp()
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    losses = torch.maximum(free, clipped)
    if weights is not None:
        losses = losses * weights
    return losses.mean(), (clipped > free).float().mean()


def importance_weights(trainer: Tensor, engine: Tensor, limit: float = 2.0) -> Tensor:
    """min(pi_trainer / pi_engine, limit) of each token, from the two policies' logprobs, all of one shape.

    Corrects for tokens that an engine sampled from slightly other probabilities than the trainer's (truncated
    importance sampling, Ionides 2008; for engines: Yao et al. 2025).
    """
    return (trainer - engine).exp().clamp(max=limit)


def adapted_kl_coefficient(coefficient: float, kl: float, target: float) -> float:
    """Return the KL coefficient after an update whose mean KL was `kl`, in nats a response as `target` is.

    beta (1 + 0.1 clip(kl / target - 1, -0.2, 0.2)) (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).
    """
    return coefficient * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def value_loss(new: Tensor, old: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Half the clipped squared error of values (N,) and the share of tokens on which the clip decides.

    0.5 max((V - G)^2, (V_old + clip(V - V_old, -clip, clip) - G)^2) (Huang et al. 2024, arXiv 2403.17031).
    """
    free = (new - returns).square()
    clipped = (old + (new - old).clamp(-clip, clip) - returns).square()
    return 0.5 * torch.maximum(free, clipped).mean(), (clipped > free).float().mean()
