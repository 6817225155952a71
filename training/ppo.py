"""The PPO stage on TRL's trainer: its configuration, state and callbacks, with a step of our own.

TRL 1.12.0 is the last release with `PPOTrainer`, and only this file imports it. The step differs from TRL's
where that wastes time or teaches the wrong thing: responses come from the rollout engine, and so do their
logprobs as long as they agree with the trainer's; logits are computed for response tokens only; the responses
to one prompt share its pass; the end-of-turn token counts; and the critic can be a value head on the reward
model's frozen trunk, so that one pass gives both the score and the values. Added are the pretraining mix, an
adaptive KL coefficient, a KL budget, a guard against steps that are not finite and an average of the weights.
Shapes: B episodes of an update, K of them to each prompt, R the longest response, N response tokens, D width.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HfDataset
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    get_linear_schedule_with_warmup,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from trl.experimental.ppo.ppo_trainer import masked_whiten

from evaluation.contest import Prompt
from evaluation.reward_model import DEVICE, PackedRows, RewardModel, autocast, pack, rows_by_tokens
from evaluation.sampler import Sample
from registry.precision import matrix_dtype
from training import processes, sharding
from training.checkpoints import Checkpoints
from training.critic import Critic
from training.episodes import Episodes
from training.logprobs import (
    before_each_token,
    response_logprobs,
    response_states,
    response_tokens,
    token_logprobs,
)
from training.losses import (
    adapted_kl_coefficient,
    generalised_advantages,
    importance_weights,
    policy_loss,
    token_rewards,
    value_loss,
)
from training.policy import Policy, freeze, frozen_copy, load_policy, trunk_and_head, without_adapter
from training.pretraining import PretrainingTexts, in_passes
from training.progress import ReportedLogs
from training.reward_model import Report
from training.rollouts import Rollouts
from training.samples import SAMPLES_AN_UPDATE
from training.settings import TrainingSettings

TOKENS_A_PASS = 1024

GAP_LIMIT = 0.5
"""Mean distance in nats between the engine's and the trainer's logprobs; beyond it they are two policies."""

GAP_TOKENS = 128
"""On about so many response tokens of an update, of different prompts, the engine's logprobs are checked."""

RETREATS = 3
"""How often PPO goes back to its last checkpoint, with half the learning rate, before it gives up."""

KeepSamples = Callable[[int, list[dict[str, Any]]], None]


class PPO(PPOTrainer):  # type: ignore[misc]
    """TRL's PPOTrainer with rollouts by an engine; see the module's docstring for what else is different.

    `work` takes checkpoints, from which a killed run goes on. `texts` is the pretraining mix, if any,
    `checkpoints` keeps the policy after some of the updates.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        reward_model: RewardModel,
        prompts: Sequence[Prompt],
        rollouts: Rollouts,
        settings: TrainingSettings,
        work: Path,
        report: Report,
        texts: PretrainingTexts | None = None,
        keep_samples: KeepSamples | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self._prompts = list(prompts)
        self._rollouts = rollouts
        self._settings = settings
        self._texts = texts
        self._keep_samples = keep_samples
        self._checkpoints = checkpoints
        self._checkpoint = work / "checkpoint.pt"
        self._kl_coefficient = settings.ppo_kl_coefficient
        self._retreats = 0
        self._within_budget: Path | None = None
        critic = Critic(reward_model, settings.ppo_critic)
        freeze(reward_model.backbone)
        reward_model.requires_grad_(False)
        # With LoRA the reference is the policy without its adapter.
        reference = None if isinstance(policy, PeftModel) else frozen_copy(policy)
        sharding.shard(policy, reference, reward_model.backbone)
        if critic.kind == "separate":
            sharding.shard(critic.backbone)
        self._learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self._average = [p.detach().clone() for p in self._learning] if settings.ppo_ema_decay else []
        optimizer = torch.optim.AdamW(
            [
                {"params": self._learning, "lr": settings.ppo_learning_rate},
                {"params": critic.score.parameters(), "lr": settings.ppo_critic_learning_rate},
                *(
                    [{"params": critic.backbone.parameters(), "lr": settings.ppo_learning_rate}]
                    if critic.kind == "separate"
                    else []
                ),
            ],
            weight_decay=0.0,
            fused=True,
        )
        schedule = get_linear_schedule_with_warmup(optimizer, 0, settings.ppo_updates)
        super().__init__(
            args=_configuration(settings, work),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward_model,
            value_model=critic,
            train_dataset=HfDataset.from_dict({"input_ids": [prompt.token_ids for prompt in prompts]}),
            optimizers=(optimizer, schedule),
            callbacks=[ReportedLogs(report)],
        )
        self.optimizer = optimizer
        self.remove_callback(PrinterCallback)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Leave nothing for accelerate to wrap: `_step` adds up the gradients, or they come added up."""
        self.model = self.optimizer = None

    def train(self) -> None:
        """Run the updates that are left, from the last checkpoint if there is one.

        Raises FloatingPointError if losses or gradients are not finite however small the steps.
        """
        self._begin()
        while self.state.global_step < self.state.max_steps:
            episodes = self._roll_out()
            self._score(episodes)
            if float(episodes.kl().mean()) > self._settings.ppo_kl_budget:
                self._within_budget = self._rollouts.checkpoint(self.state.global_step - 1)
                break
            self._set_advantages(episodes)
            try:
                figures = self._optimise(episodes)
            except FloatingPointError as problem:
                self._go_back(problem)
                continue
            self._end_update(episodes, figures)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def trained_policy(self) -> Policy:
        """Return the policy to publish: the last within the KL budget, the weights' average, or the last."""
        if self._within_budget is not None and self._within_budget.is_dir():
            return load_policy(self._within_budget)
        with torch.no_grad():
            for parameter, average in zip(self._learning, self._average, strict=bool(self._average)):
                parameter.copy_(average)
        return self.policy_model

    def result(self) -> dict[str, Any]:
        """Return what became of the run, as plain JSON."""
        return {
            "updates": self.state.global_step,
            "stopped_by_kl_budget": self._within_budget is not None,
            "kl_coefficient": self._kl_coefficient,
            "retreats": self._retreats,
        }

    # -- the verbs of an update

    def _begin(self) -> None:
        self.state.global_step = 0
        self.state.max_steps = self._settings.ppo_updates
        if processes.from_first(self._checkpoint.exists):
            self._resume()
        else:
            self._save()
        self.callback_handler.on_train_begin(self.args, self.state, self.control)

    def _roll_out(self) -> Episodes:
        """Sample K responses to each prompt of this update, in the first process for all."""
        update, batch, each = (
            self.state.global_step,
            self._settings.ppo_batch,
            self._settings.ppo_samples_per_prompt,
        )
        count = batch // each
        prompts = in_passes(self._prompts, update * count, count, self.args.seed)
        seed = (self.args.seed * 1_000_003 + update) * batch
        groups = self._rollouts.sample(self.policy_model, prompts, update, n=each, seed=seed)
        samples = [sample for group in groups for sample in group]
        width = max(len(sample.token_ids) for sample in samples)
        mask = torch.zeros(batch, width, dtype=torch.bool, device=DEVICE)
        engine = torch.zeros(batch, width, device=DEVICE)
        for row, sample in enumerate(samples):
            mask[row, : len(sample.token_ids)] = True
            engine[row, : len(sample.token_ids)] = torch.tensor(sample.logprobs, device=DEVICE)
        zeros = torch.zeros_like(engine)
        return Episodes(prompts, samples, mask, engine, zeros, zeros[:, 0], zeros)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _score(self, episodes: Episodes) -> None:
        """Hold the episodes against the trainer's policy, the reference, the reward model and the critic."""
        self._check_engine(episodes)
        episodes.ref_logprobs = self._reference_logprobs(episodes)
        episodes.scores = self._rewards(episodes)
        episodes.values = self._first_values(episodes)

    def _set_advantages(self, episodes: Episodes) -> None:
        """Rewards with the KL penalty, then GAE; advantages are whitened over the batch."""
        kl = (episodes.old_logprobs - episodes.ref_logprobs) * episodes.mask
        rewards = token_rewards(episodes.scores, kl, episodes.mask, self._kl_coefficient)
        advantages, episodes.returns = generalised_advantages(
            rewards, episodes.values, episodes.mask, self.args.gamma, self.args.lam
        )
        episodes.advantages = masked_whiten(advantages, episodes.mask) * episodes.mask

    def _optimise(self, episodes: Episodes) -> dict[str, float]:
        """Take the optimiser's steps on shuffled mini-batches of prompts; return their mean figures."""
        size = len(episodes.prompts) // self._settings.ppo_mini_batches
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        all_figures: list[dict[str, float]] = []
        for _ in range(self.args.num_ppo_epochs):
            order = torch.randperm(len(episodes.prompts), generator=generator).tolist()
            for start in range(0, len(order), size):
                figures = self._mini_batch(episodes, order[start : start + size])
                figures |= self._pretraining(len(all_figures))
                figures["policy/gradient_norm"] = self._step()
                all_figures.append(figures)
        return {name: sum(f[name] for f in all_figures) / len(all_figures) for name in all_figures[0]}

    def _end_update(self, episodes: Episodes, figures: Mapping[str, float]) -> None:
        """Log the update, step schedule and KL coefficient, and write a checkpoint where one is due."""
        figures = episodes.figures(self._kl_coefficient) | dict(figures)
        self.state.global_step += 1
        self.state.episode += self._settings.ppo_batch
        self.state.epoch = self.state.episode / len(self._prompts)
        self.log(figures | {"lr": self.optimizer.param_groups[0]["lr"]})
        if self._keep_samples is not None and processes.is_first():
            self._keep_samples(self.state.global_step, self._shown(episodes))
        if self._settings.ppo_kl_target:
            self._kl_coefficient = adapted_kl_coefficient(
                self._kl_coefficient, figures["objective/kl"], self._settings.ppo_kl_target
            )
        self.lr_scheduler.step()
        self.callback_handler.on_step_end(self.args, self.state, self.control)
        self._keep_checkpoint()  # before the state that a killed run goes on from, or it might be missing
        if self.state.global_step % self._settings.ppo_checkpoint_updates == 0:
            self._save()

    # -- what a rollout is held against

    def _check_engine(self, episodes: Episodes) -> None:
        """Compare the engine's logprobs with the trainer's on some episodes; correct or stop."""
        checked: list[tuple[Prompt, Sample]] = []
        for prompt, sample in zip(episodes.prompts, episodes.samples[:: episodes.a_prompt], strict=True):
            if sum(len(of.token_ids) for _, of in checked) < GAP_TOKENS:
                checked.append((prompt, sample))
        items = [(prompt.token_ids, [sample.token_ids]) for prompt, sample in checked]
        ours, _ = response_logprobs(self.policy_model, items, self.args.temperature)
        theirs = torch.tensor([value for _, sample in checked for value in sample.logprobs], device=DEVICE)
        episodes.logprob_gap = float((ours - theirs).abs().mean())
        if episodes.logprob_gap <= self._settings.ppo_logprob_gap:
            return
        if not episodes.logprob_gap <= GAP_LIMIT or self._settings.ppo_beyond_gap == "stop":
            raise RuntimeError(
                f"the rollout engine's logprobs are {episodes.logprob_gap:.3f} nats from the trainer's, "
                "as if it had other weights: see ppo_logprob_gap and ppo_beyond_gap"
            )
        ours = self._all(lambda passes: self._logprobs_of(self.policy_model, episodes, passes), episodes)
        episodes.weights = importance_weights(ours, episodes.old_logprobs)
        episodes.old_logprobs = ours

    def _reference_logprobs(self, episodes: Episodes) -> Tensor:
        reference = self.ref_model or self.policy_model
        with without_adapter(reference):
            return self._all(lambda passes: self._logprobs_of(reference, episodes, passes), episodes)

    def _logprobs_of(self, model: Policy, episodes: Episodes, passes: Sequence[list[int]]) -> Tensor:
        result = torch.zeros_like(episodes.old_logprobs)
        for prompts in passes:
            logprobs, _ = response_logprobs(model, episodes.items(prompts), self.args.temperature)
            rows = episodes.of(prompts)
            result[rows] = result[rows].masked_scatter(episodes.mask[rows], logprobs)
        return result

    def _rewards(self, episodes: Episodes) -> Tensor:
        """Scores (B,) less the penalty; where the critic stands on this trunk its features are kept."""
        if self.value_model.kind == "reward_model":
            shape = (*episodes.mask.shape, self.value_model.score.in_features)
            episodes.features = torch.zeros(shape, device=DEVICE)

        def scores_of(passes: Sequence[list[int]]) -> Tensor:
            scores = torch.zeros_like(episodes.scores)
            for prompts in passes:
                packed, rows = pack(episodes.items(prompts)), episodes.of(prompts)
                with autocast():
                    hidden = self.reward_model.hidden(packed).float()
                scores[rows] = self.reward_model.reward(
                    hidden[packed.last_tokens()], self._settings.reward_spread_penalty
                )
                if episodes.features is not None:
                    before = hidden[before_each_token(packed)]
                    mask = episodes.mask[rows][:, :, None]
                    episodes.features[rows] = episodes.features[rows].masked_scatter(mask, before)
            return scores

        scores = self._all(scores_of, episodes)
        unended = torch.tensor(
            [
                sample.finish_reason != "stop" or len(sample.token_ids) < self._settings.ppo_minimum_tokens
                for sample in episodes.samples
            ],
            device=DEVICE,
        )
        return scores - self.args.missing_eos_penalty * unended

    def _first_values(self, episodes: Episodes) -> Tensor:
        trunk, _ = trunk_and_head(self.policy_model)

        def values_of(passes: Sequence[list[int]]) -> Tensor:
            values = torch.zeros_like(episodes.values)
            for prompts in passes:
                packed, rows = pack(episodes.items(prompts)), episodes.of(prompts)
                states = response_states(trunk, packed) if self.value_model.kind == "policy" else None
                own = self._values(episodes, prompts, packed, states)
                values[rows] = values[rows].masked_scatter(episodes.mask[rows], own)
            return values

        return self._all(values_of, episodes)

    def _values(
        self, episodes: Episodes, prompts: Sequence[int], packed: PackedRows, states: Tensor | None
    ) -> Tensor:
        """Values (N,) of the prompts' response tokens; `states` (N, D) are the policy's before each token."""
        if self.value_model.kind == "separate":
            states = response_states(self.value_model.backbone, packed)
        elif episodes.features is not None:
            rows = episodes.of(prompts)
            states = episodes.features[rows][episodes.mask[rows]]
        values: Tensor = self.value_model(states)
        return values

    # -- a step of the optimiser

    def _mini_batch(self, episodes: Episodes, prompts: Sequence[int]) -> dict[str, float]:
        """Accumulate the gradient of one mini-batch's loss, a mean over its tokens, pass by pass."""
        assert episodes.advantages is not None and episodes.returns is not None
        trunk, head = trunk_and_head(self.policy_model)
        tokens = int(episodes.mask[episodes.of(prompts)].sum())
        all_figures: list[dict[str, float]] = []
        passes = list(self._passes(episodes, processes.own(prompts)))
        for group, counts in processes.in_step(passes, prompts[:1]):
            rows = episodes.of(group)
            mask = episodes.mask[rows]
            packed = pack(episodes.items(group))
            states = response_states(trunk, packed)
            new, entropy = token_logprobs(head, states, response_tokens(packed), self.args.temperature)
            values = self._values(episodes, group, packed, states)
            old = episodes.old_logprobs[rows][mask]
            weights = None if episodes.weights is None else episodes.weights[rows][mask]
            loss, clipped = policy_loss(
                new, old, episodes.advantages[rows][mask], self.args.cliprange, weights
            )
            v_loss, v_clipped = value_loss(
                values, episodes.values[rows][mask], episodes.returns[rows][mask], self.args.cliprange_value
            )
            share = counts * len(new) / tokens
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
            all_figures.append({name: float(value.detach()) * share for name, value in figures.items()})
        return processes.summed(all_figures)

    def _pretraining(self, step: int) -> dict[str, float]:
        """Add the gradient of the pretraining texts' loss (Ouyang et al. 2022, equation 2)."""
        settings = self._settings
        if self._texts is None or not settings.ppo_ptx_coefficient:
            return {}
        number = self.state.global_step * settings.ppo_epochs * settings.ppo_mini_batches + step
        texts = self._texts.batch(number, settings.ppo_ptx_batch, self.args.seed)
        all_figures: list[dict[str, float]] = []
        own = [texts[i] for i in processes.own(range(len(texts)))]
        passes = [[own[i] for i in group] for group in rows_by_tokens([*map(len, own)], TOKENS_A_PASS)]
        for group, counts in processes.in_step(passes, texts[:1]):
            pieces = [(text[:1], [text[1:]]) for text in group]
            logprobs, _ = response_logprobs(self.policy_model, pieces, temperature=1.0)
            share = counts * len(group) / len(texts)
            loss = -logprobs.mean()
            self.accelerator.backward(settings.ppo_ptx_coefficient * loss * share)
            all_figures.append({"loss/ptx_avg": float(loss.detach()) * share})
        return processes.summed(all_figures)

    def _step(self) -> float:
        """Step the optimiser and the weights' average; returns the gradient's norm.

        Raises FloatingPointError, with the weights as they were, where the gradient is not finite.
        """
        processes.add_up_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        norm = sharding.clip_gradients(self._learning, self.args.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError("the policy's gradient is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(self._average, self._learning, strict=False):
                average.lerp_(parameter, 1 - self._settings.ppo_ema_decay)
        return float(norm)

    def _all(self, compute: Callable[[Sequence[list[int]]], Tensor], episodes: Episodes) -> Tensor:
        """Return the tensor of which `compute` fills in the rows of the passes that it is given."""
        passes = list(self._passes(episodes, processes.own(range(len(episodes.prompts)))))
        compute([spare for spare, counts in processes.in_step(passes, [0]) if not counts])
        return processes.added_up(compute(passes))

    def _passes(self, episodes: Episodes, prompts: Sequence[int]) -> Iterator[list[int]]:
        """Divide the prompts with their responses into passes of like size."""
        sizes = [len(prompt) + sum(map(len, responses)) for prompt, responses in episodes.items(prompts)]
        for group in rows_by_tokens(sizes, TOKENS_A_PASS):
            yield [prompts[i] for i in group]

    # -- checkpoints

    def _keep_checkpoint(self) -> None:
        """Keep the policy that would be published if this update were the last."""
        update, updates = self.state.global_step, self.state.max_steps
        if self._checkpoints is None or not self._checkpoints.is_due(update, updates):
            return
        with torch.no_grad():
            learning = [parameter.detach().clone() for parameter in self._learning] if self._average else []
            for parameter, average in zip(self._learning, self._average, strict=bool(self._average)):
                parameter.copy_(average)
            self._checkpoints.keep(self.policy_model, update)
            for parameter, own in zip(self._learning, learning, strict=bool(learning)):
                parameter.copy_(own)

    def _save(self) -> None:
        state = sharding.gathered(
            {
                "update": self.state.global_step,
                "policy": [parameter.detach() for parameter in self._learning],
                "average": self._average,
                "critic": self._critic_state(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.lr_scheduler.state_dict(),
                "kl_coefficient": self._kl_coefficient,
                "retreats": self._retreats,
            }
        )
        if not processes.is_first():
            return
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        staging = self._checkpoint.with_suffix(".partial")
        with staging.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        staging.rename(self._checkpoint)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _resume(self) -> None:
        # The reference is already in place: the trainer was built on the SFT policy, as the first time.
        state = torch.load(self._checkpoint, map_location="cpu", mmap=True, weights_only=True)
        for parameter, saved in zip(self._learning, state["policy"], strict=True):
            parameter.copy_(sharding.as_shared(parameter, saved))
        for average, saved in zip(self._average, state["average"], strict=True):
            average.copy_(sharding.as_shared(average, saved))
        critic = dict(self.value_model.named_parameters())
        for name, saved in state["critic"].items():
            critic[name].copy_(sharding.as_shared(critic[name], saved))
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.optimizer.load_state_dict(sharding.optimizer_state(state["optimizer"], learning))
        self.lr_scheduler.load_state_dict(state["schedule"])
        self._kl_coefficient, self._retreats = state["kl_coefficient"], state["retreats"]
        self.state.global_step = state["update"]
        self.state.episode = state["update"] * self._settings.ppo_batch

    def _critic_state(self) -> dict[str, Tensor]:
        """Return what learns of the critic."""
        learns = {name for name, parameter in self.value_model.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in self.value_model.state_dict().items() if name in learns}

    def _go_back(self, problem: FloatingPointError) -> None:
        """Return to the last checkpoint with half the learning rate, a few times at most."""
        retreats = self._retreats + 1
        if retreats > RETREATS:
            raise FloatingPointError(
                f"{problem}, though the learning rate was halved {RETREATS} times: lower ppo_learning_rate"
            ) from problem
        self.optimizer.zero_grad()
        self._resume()
        processes.wait_for_all()  # before the first one writes what the others are to read
        self._retreats = retreats
        self.lr_scheduler.base_lrs = [lr / 2 for lr in self.lr_scheduler.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] /= 2
        self._save()

    def _shown(self, episodes: Episodes) -> list[dict[str, Any]]:
        """Return the first response to some of an update's prompts, as text with its score."""
        rows = [episodes.of([i])[0] for i in range(min(SAMPLES_AN_UPDATE, len(episodes.prompts)))]
        return [
            {
                "prompt": self.processing_class.decode(episodes.prompts[i].token_ids),
                "response": episodes.samples[row].text,
                "score": float(episodes.scores[row]),
            }
            for i, row in enumerate(rows)
        ]


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
        bf16=matrix_dtype() == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
