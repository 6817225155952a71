"""One whole update of ours beside stock TRL 1.12.0's, on the same rollouts, in float32.

The configuration is one in which the two are meant to be the same: one response to each prompt, a critic of
its own, one mini-batch, no clipping of gradients. Responses are of full length: behind one that has ended TRL
puts the score on a position that has no token.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from unit.training.tiny import WORDS, tiny_model, tiny_tokenizer

import evaluation.reward_model
import training.logprobs
import training.policy
import training.ppo
from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel
from evaluation.sampler import Sample
from training.policy import load_policy
from training.ppo import PPO
from training.settings import TrainingSettings

LENGTH = 6
EPOCHS = 3
RATE = 1e-3
PROMPTS = [Prompt(str(i), [3, 5 + i, 6 + i, 4]) for i in range(8)]
SAME = [
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "policy/entropy_avg",
    "objective/kl",
    "objective/scores",
    "objective/entropy",
    "objective/rlhf_reward",
]


def _response(prompt: Sequence[int]) -> list[int]:
    """Any fixed response of full length without padding or end token."""
    generator = torch.Generator().manual_seed(sum(prompt))
    return torch.randint(3, len(WORDS), (LENGTH,), generator=generator).tolist()


class _Given:
    """A sampler whose responses are given; their logprobs are the model's in float32."""

    def load(self, model_dir: Path) -> None:
        pass

    def use(self, model: nn.Module) -> None:
        self._model = model

    def sample(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[Sample]]:
        results = []
        for prompt in prompts:
            response = _response(prompt)
            with torch.no_grad():
                logits = self._model(input_ids=torch.tensor([[*prompt, *response]])).logits[
                    0, len(prompt) - 1 : -1
                ]
            own = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
            results.append([Sample(response, own.tolist(), "", "length")])
        return results

    def close(self) -> None:
        pass


def _as_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (evaluation.reward_model, training.logprobs, training.ppo):
        monkeypatch.setattr(module, "autocast", nullcontext)
    for module in (training.policy, training.ppo):
        monkeypatch.setattr(module, "freeze", lambda model: model.requires_grad_(False))


def _reward_model(model_dir: Path) -> RewardModel:
    torch.manual_seed(1)
    reward_model = RewardModel.from_decoder(model_dir)
    nn.init.normal_(reward_model.head.weight, std=0.3)
    return reward_model


def _ours(model_dir: Path, work: Path) -> tuple[dict[str, float], nn.Module, nn.Module]:
    sampler, found = _Given(), {}
    settings = TrainingSettings(
        ppo_updates=1,
        ppo_batch=len(PROMPTS),
        ppo_samples_per_prompt=1,
        ppo_mini_batches=1,
        ppo_epochs=EPOCHS,
        ppo_learning_rate=RATE,
        ppo_critic="separate",
        ppo_critic_learning_rate=RATE,
        ppo_response_tokens=LENGTH,
        ppo_missing_end_penalty=0.0,
    )
    policy = load_policy(model_dir)
    sampler.use(policy)
    ppo = PPO(
        policy=policy,
        tokenizer=tiny_tokenizer(),
        reward_model=_reward_model(model_dir),
        prompts=PROMPTS,
        rollouts=training.rollouts.Rollouts(
            sampler, tiny_tokenizer(), work / "rollout", max_tokens=LENGTH, temperature=1.0
        ),
        settings=settings,
        work=work,
        report=lambda step, steps, figures: found.update(figures),
    )
    ppo.args.max_grad_norm = 1e9  # TRL's loop does not clip
    ppo.train()
    return found, ppo.policy_model, ppo.value_model


def _classifier(model_dir: Path) -> nn.Module:
    """The same reward model (or critic) as TRL wants it."""
    ours = _reward_model(model_dir)
    model = LlamaForSequenceClassification.from_pretrained(
        str(model_dir), num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    model.score = nn.Linear(ours.head.in_features, 1)
    model.score.load_state_dict({name: value.clone() for name, value in ours.head.state_dict().items()})
    return model


class _Log(TrainerCallback):
    def __init__(self, found: dict[str, float]) -> None:
        self._found = found

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._found.update(logs)


def _stock(
    model_dir: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, float], nn.Module, nn.Module]:
    def given(model: nn.Module, queries: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        responses = torch.tensor([_response(query) for query in queries.tolist()])
        whole = torch.cat([queries, responses], 1)
        with torch.no_grad():
            return whole, model(input_ids=whole).logits[:, queries.shape[1] - 1 : -1]

    monkeypatch.setattr(ppo_trainer, "batch_generation", given)
    found: dict[str, float] = {}
    policy, critic = load_policy(model_dir), _classifier(model_dir)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=RATE, weight_decay=0.0)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 1)
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(work),
            per_device_train_batch_size=len(PROMPTS),
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            total_episodes=len(PROMPTS),
            response_length=LENGTH,
            temperature=1.0,
            kl_coef=0.05,
            missing_eos_penalty=None,
            num_sample_generations=0,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        processing_class=tiny_tokenizer(),
        model=policy,
        ref_model=None,
        reward_model=_classifier(model_dir),
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": [prompt.token_ids for prompt in PROMPTS]}),
        optimizers=(optimizer, schedule),
        callbacks=[_Log(found)],
    )
    monkeypatch.setattr(trainer, "save_model", lambda *a, **k: None, raising=False)
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda *a, **k: None, raising=False)
    trainer.train()
    return found, policy, critic


def test_one_update_has_trls_losses_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir = tiny_model(tmp_path / "policy")
    _as_in_float32(monkeypatch)
    ours, our_policy, our_critic = _ours(model_dir, tmp_path / "ours")
    stock, policy, critic = _stock(model_dir, tmp_path / "stock", monkeypatch)
    assert ours["policy/approxkl_avg"] > 1e-5  # the later epochs have moved the policy
    for name in SAME:
        assert ours[name] == pytest.approx(stock[name], rel=2e-4, abs=2e-6), name
    start = load_policy(model_dir).state_dict()
    for name, value in our_policy.state_dict().items():
        assert torch.allclose(value, policy.state_dict()[name], atol=2e-5), name
        assert not torch.equal(value, start[name]), name
    assert torch.allclose(our_critic.score.weight, critic.score.weight, atol=2e-5)
    for name, value in our_critic.backbone.state_dict().items():
        assert torch.allclose(value, critic.model.state_dict()[name], atol=2e-5), name
