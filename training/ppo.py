"""The PPO stage on TRL's trainer: its configuration, state and callbacks, with a step of our own.

TRL 1.12.0 is the last release with `PPOTrainer`, and only this file imports it. The step differs from TRL's
where that wastes time or teaches the wrong thing: responses come from the rollout engine, logits are computed
for response tokens only, the end-of-turn token counts, and the critic is a value head on the reward model's
frozen trunk, so that one pass gives both the score and the values.
Shapes: B episodes of an update, R the longest response, T prompt and response, N response tokens, D width,
V vocabulary.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HfDataset
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    get_linear_schedule_with_warmup,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo.ppo_trainer import masked_whiten

from evaluation.contest import Prompt
from evaluation.reward_model import DEVICE, RewardModel, autocast, pack, rows_by_tokens
from evaluation.sampler import Sample
from training.logprobs import before_each_token, response_logprobs
from training.losses import generalised_advantages, policy_loss, token_rewards, value_loss
from training.reward_model import Report
from training.rollouts import Rollouts, prompts_of_update
from training.settings import TrainingSettings

TOKENS_A_PASS = 1024

LOGPROB_GAP_BOUND = 0.2
"""Mean distance in nats between the engine's and the trainer's logprobs; beyond it they are two policies."""


@dataclass(slots=True)
class Episodes:
    """The experience of one update, on response tokens; tensors are (B, R), false or zero behind a response.

    `old_logprobs` are the sampling policy's as the trainer computes them, `ref_logprobs` the reference
    policy's; `features` (B, R, D) are the critic's hidden states before each token, `scores` (B,) the reward
    model's less the penalty. `logprob_gap` is the mean distance to the engine's own logprobs, in nats.
    """

    prompts: list[Prompt]
    samples: list[Sample]
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    features: Tensor
    scores: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    logprob_gap: float


class Critic(nn.Module):  # type: ignore[misc]
    """V(x, y_<t): a value head on the reward model's trunk, which stays as it was fitted.

    The head starts as the mean of the reward model's own, so that the first values are the scores of what is
    written so far (Ouyang et al. 2022, appendix C.4: the value function starts from the reward model).
    """

    base_model_prefix = "backbone"

    def __init__(self, reward_model: RewardModel) -> None:
        super().__init__()
        self.backbone = reward_model.backbone
        self.score = nn.Linear(reward_model.head.in_features, 1, device=DEVICE)
        with torch.no_grad():
            weight = reward_model.head.weight / reward_model.scale[:, None]
            bias = (reward_model.head.bias - reward_model.offset) / reward_model.scale
            self.score.weight.copy_(weight.mean(0, keepdim=True))
            self.score.bias.copy_(bias.mean())

    def forward(self, features: Tensor) -> Tensor:
        """Values of hidden states (…, D) -> (…)."""
        values: Tensor = self.score(features).squeeze(-1).float()
        return values


class PPO(PPOTrainer):  # type: ignore[misc]
    """TRL's PPOTrainer with rollouts by an engine and a critic on the reward model's trunk."""

    def __init__(
        self,
        *,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reward_model: RewardModel,
        prompts: Sequence[Prompt],
        rollouts: Rollouts,
        settings: TrainingSettings,
        work: Path,
        report: Report,
    ) -> None:
        self._prompts = list(prompts)
        self._rollouts = rollouts
        self._settings = settings
        self._checkpoint = work / "checkpoint.pt"
        reward_model.requires_grad_(False)
        critic = Critic(reward_model)
        optimizer = torch.optim.AdamW(
            [
                {"params": policy.parameters(), "lr": settings.ppo_learning_rate},
                {"params": critic.score.parameters(), "lr": settings.ppo_critic_learning_rate},
            ],
            weight_decay=0.0,
            fused=True,
        )
        schedule = get_linear_schedule_with_warmup(optimizer, 0, settings.ppo_updates)
        super().__init__(
            args=_configuration(settings, work),
            processing_class=tokenizer,
            model=policy,
            ref_model=None,  # TRL makes a frozen copy of the policy as it is now
            reward_model=reward_model,
            value_model=critic,
            train_dataset=HfDataset.from_dict({"input_ids": [prompt.token_ids for prompt in prompts]}),
            optimizers=(optimizer, schedule),
            callbacks=[_Progress(report)],
        )
        self.remove_callback(PrinterCallback)

    def train(self) -> None:
        """Run the updates that are left, from the last checkpoint if there is one."""
        self._begin()
        while self.state.global_step < self.state.max_steps:
            episodes = self._roll_out()
            self._set_advantages(episodes)
            figures = self._optimise(episodes)
            self._end_update(episodes, figures)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _begin(self) -> None:
        self.state.global_step = 0
        self.state.max_steps = self._settings.ppo_updates
        if self._checkpoint.exists():
            self._resume()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _roll_out(self) -> Episodes:
        """Sample a response to each prompt of this update; score it and hold it against the reference."""
        update, batch = self.state.global_step, self._settings.ppo_batch
        prompts = prompts_of_update(self._prompts, update, batch, self.args.seed)
        seed = (self.args.seed * 1_000_003 + update) * batch
        samples = self._rollouts.sample(self.policy_model, prompts, seed)
        width = max(len(sample.token_ids) for sample in samples)
        mask = torch.zeros(batch, width, dtype=torch.bool, device=DEVICE)
        engine = torch.zeros(batch, width, device=DEVICE)
        for row, sample in enumerate(samples):
            mask[row, : len(sample.token_ids)] = True
            engine[row, : len(sample.token_ids)] = torch.tensor(sample.logprobs, device=DEVICE)
        features = torch.zeros(batch, width, self.value_model.score.in_features, device=DEVICE)
        empty = torch.zeros_like(engine)
        episodes = Episodes(prompts, samples, mask, empty, empty, features, empty, empty, empty, empty, 0.0)
        with torch.no_grad():
            # With the engine's own logprobs, which differ by its rounding, ratios would start off 1.
            episodes.old_logprobs = self._all_logprobs(self.policy_model, episodes)
            episodes.logprob_gap = float((episodes.old_logprobs - engine)[mask].abs().mean())
            _check_gap(episodes.logprob_gap)
            episodes.ref_logprobs = self._all_logprobs(self.ref_model, episodes)
            episodes.scores = self._scores_and_features(episodes)
            episodes.values = self.value_model(features) * mask
        return episodes

    def _set_advantages(self, episodes: Episodes) -> None:
        """Rewards with the KL penalty, then GAE; advantages are whitened over the batch."""
        kl = (episodes.old_logprobs - episodes.ref_logprobs) * episodes.mask
        rewards = token_rewards(episodes.scores, kl, episodes.mask, self.args.kl_coef)
        advantages, episodes.returns = generalised_advantages(
            rewards, episodes.values, episodes.mask, self.args.gamma, self.args.lam
        )
        episodes.advantages = masked_whiten(advantages, episodes.mask) * episodes.mask

    def _optimise(self, episodes: Episodes) -> dict[str, float]:
        """Take the optimiser's steps on shuffled mini-batches and return the mean of their figures."""
        size = self._settings.ppo_batch // self._settings.ppo_mini_batches
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        all_figures: list[dict[str, float]] = []
        for _ in range(self.args.num_ppo_epochs):
            order = torch.randperm(len(episodes.samples), generator=generator).tolist()
            for start in range(0, len(order), size):
                all_figures.append(self._mini_batch(episodes, order[start : start + size]))
        return {name: sum(f[name] for f in all_figures) / len(all_figures) for name in all_figures[0]}

    def _end_update(self, episodes: Episodes, figures: Mapping[str, float]) -> None:
        """Log the update, step the schedule and write a checkpoint where one is due."""
        self.state.global_step += 1
        self.state.episode += self._settings.ppo_batch
        self.state.epoch = self.state.episode / len(self._prompts)
        self.log(
            _figures(episodes, self.args.kl_coef) | dict(figures) | {"lr": self.lr_scheduler.get_last_lr()[0]}
        )
        self.lr_scheduler.step()
        self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.state.global_step % self._settings.ppo_checkpoint_updates == 0:
            self._save()

    def _mini_batch(self, episodes: Episodes, rows: Sequence[int]) -> dict[str, float]:
        """Accumulate the gradient of one mini-batch in passes of bounded size, then step."""
        tokens = int(episodes.mask[rows].sum())
        totals: dict[str, float] = {}
        for group in self._passes(episodes, rows):
            mask = episodes.mask[group]
            new, entropy = self._logprobs(self.policy_model, episodes, group)
            values = self.value_model(episodes.features[group][mask])
            old = episodes.old_logprobs[group][mask]
            loss, clipped = policy_loss(new, old, episodes.advantages[group][mask], self.args.cliprange)
            v_loss, v_clipped = value_loss(
                values, episodes.values[group][mask], episodes.returns[group][mask], self.args.cliprange_value
            )
            share = len(new) / tokens
            self.accelerator.backward((loss + self.args.vf_coef * v_loss) * share)
            difference = (new - old).detach()
            figures = {
                "loss/policy_avg": loss,
                "loss/value_avg": v_loss,
                "policy/clipfrac_avg": clipped,
                "val/clipfrac_avg": v_clipped,
                "policy/entropy_avg": entropy.mean(),
                "policy/approxkl_avg": 0.5 * difference.square().mean(),
                "val/ratio": difference.exp().mean(),
            }
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) * share
        norm = nn.utils.clip_grad_norm_(self.policy_model.parameters(), self.args.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError("the policy's gradient is not finite; lower ppo_learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return totals | {"policy/gradient_norm": float(norm)}

    def _passes(self, episodes: Episodes, rows: Sequence[int]) -> Iterator[list[int]]:
        sizes = [len(episodes.prompts[row].token_ids) + len(episodes.samples[row].token_ids) for row in rows]
        for group in rows_by_tokens(sizes, TOKENS_A_PASS):
            yield [rows[i] for i in group]

    def _logprobs(
        self, model: PreTrainedModel, episodes: Episodes, rows: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        items = [(episodes.prompts[row].token_ids, episodes.samples[row].token_ids) for row in rows]
        return response_logprobs(model, items, self.args.temperature)

    def _all_logprobs(self, model: PreTrainedModel, episodes: Episodes) -> Tensor:
        result = torch.zeros_like(episodes.old_logprobs)
        for rows in self._passes(episodes, range(len(episodes.samples))):
            logprobs, _ = self._logprobs(model, episodes, rows)
            result[rows] = result[rows].masked_scatter(episodes.mask[rows], logprobs)
        return result

    def _scores_and_features(self, episodes: Episodes) -> Tensor:
        """Scores (B,); the critic's hidden states before each token are written to `episodes.features`."""
        scores = torch.zeros(len(episodes.samples), device=DEVICE)
        for rows in self._passes(episodes, range(len(episodes.samples))):
            packed = pack(
                [(episodes.prompts[row].token_ids, [episodes.samples[row].token_ids]) for row in rows]
            )
            with autocast():
                hidden = self.reward_model.hidden(packed).float()
            row, column = before_each_token(packed.spans)
            for place, b in enumerate(rows):
                episodes.features[b, : int(episodes.mask[b].sum())] = hidden[place, column[row == place]]
            row, last = packed.last_tokens()
            scores[rows] = self.reward_model.reward(hidden[row, last], self._settings.reward_spread_penalty)
        unended = torch.tensor([sample.finish_reason != "stop" for sample in episodes.samples], device=DEVICE)
        return scores - self.args.missing_eos_penalty * unended

    def _save(self) -> None:
        staging = self._checkpoint.with_suffix(".partial")
        state = {
            "update": self.state.global_step,
            "policy": self.policy_model.state_dict(),
            "critic": self.value_model.score.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
        }
        with staging.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        staging.rename(self._checkpoint)

    def _resume(self) -> None:
        # The reference is already in place: the trainer was built on the SFT policy, as the first time.
        state = torch.load(self._checkpoint, map_location=DEVICE, weights_only=True)
        self.policy_model.load_state_dict(state["policy"])
        self.value_model.score.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["schedule"])
        self.state.global_step = state["update"]
        self.state.episode = state["update"] * self._settings.ppo_batch


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Hands each update's logged figures on."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report an update."""
        self._report(state.global_step, state.max_steps, logs)


def _configuration(settings: TrainingSettings, work: Path) -> Any:
    return PPOConfig(
        output_dir=str(work),
        seed=settings.seed,
        learning_rate=settings.ppo_learning_rate,
        per_device_train_batch_size=settings.ppo_batch,
        gradient_accumulation_steps=1,
        num_mini_batches=settings.ppo_mini_batches,
        num_ppo_epochs=settings.ppo_epochs,
        total_episodes=settings.ppo_batch * settings.ppo_updates,
        response_length=settings.ppo_response_tokens,
        temperature=settings.ppo_temperature,
        kl_coef=settings.ppo_kl_coefficient,
        missing_eos_penalty=settings.ppo_missing_end_penalty,
        num_sample_generations=0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _check_gap(gap: float) -> None:
    if not gap <= LOGPROB_GAP_BOUND:
        raise RuntimeError(
            f"the rollout engine's logprobs are {gap:.3f} nats from the trainer's: it has other weights"
        )


def _figures(episodes: Episodes, kl_coefficient: float) -> dict[str, float]:
    """Return what happened in the rollout of one update, under TRL's names where it has one."""
    mask = episodes.mask
    kl = ((episodes.old_logprobs - episodes.ref_logprobs) * mask).sum(1)
    returns, values = episodes.returns[mask], episodes.values[mask]
    ended = [sample.finish_reason == "stop" for sample in episodes.samples]
    return {
        "objective/scores": float(episodes.scores.mean()),
        "objective/kl": float(kl.mean()),
        "objective/rlhf_reward": float((episodes.scores - kl_coefficient * kl).mean()),
        "objective/entropy": float(-(episodes.old_logprobs * mask).sum(1).mean()),
        "val/explained_variance": float(1 - (returns - values).var() / returns.var().clamp(min=1e-8)),
        "rollout/logprob_gap": episodes.logprob_gap,
        "response/length": float(mask.sum(1).float().mean()),
        "response/ended": sum(ended) / len(ended),
    }
