"""PPO on the tiny model in one process of several; each writes its figures to `figures-RANK.json`.

The first also writes the policy to `candidate/`. `--stop 3` ends all of them in update 3, before it is over.
Other arguments are settings: `ppo_lora_rank=2`.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from unit.training.tiny import TransformersSampler, tiny_tokenizer

from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel
from training import processes
from training.policy import load_policy, with_adapter, write_checkpoint
from training.ppo import PPO
from training.pretraining import PretrainingTexts
from training.rollouts import Rollouts
from training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    ppo_updates=3,
    ppo_batch=12,
    ppo_samples_per_prompt=2,
    ppo_mini_batches=2,
    ppo_response_tokens=6,
    ppo_learning_rate=1e-3,
    ppo_checkpoint_updates=2,
    ppo_ptx_batch=3,
    ppo_ptx_tokens=8,
)
PROMPTS = [Prompt(str(i), [3, 5 + i, 6 + i, *range(7, 7 + i), 4]) for i in range(11)]


def main(model_dir: Path, work: Path, settings: TrainingSettings, stop: int) -> None:
    torch.manual_seed(0)
    reward_model = RewardModel.from_decoder(model_dir)
    torch.nn.init.normal_(reward_model.head.weight)
    policy = load_policy(model_dir, processes.loading_device())
    if settings.ppo_lora_rank:
        policy = with_adapter(policy, settings.ppo_lora_rank)
    figures: list[dict[str, float]] = []

    def report(step: int, steps: int, values: Mapping[str, float]) -> None:
        if step == stop:
            sys.exit()
        figures.append(dict(values))

    ppo = PPO(
        policy=policy,
        tokenizer=tiny_tokenizer(),
        reward_model=reward_model,
        prompts=PROMPTS,
        rollouts=Rollouts(
            TransformersSampler(model_dir), tiny_tokenizer(), work / "rollout", max_tokens=6, temperature=1.0
        ),
        settings=settings,
        work=work,
        report=report,
        texts=PretrainingTexts(Path(settings.ppo_ptx_file), tiny_tokenizer(), settings.ppo_ptx_tokens)
        if settings.ppo_ptx_file
        else None,
    )
    ppo.train()
    write_checkpoint(ppo.trained_policy(), tiny_tokenizer(), work / "candidate")
    rank = ppo.accelerator.process_index
    shares = sum(getattr(p, "_local_tensor", p).numel() for p in ppo.policy_model.parameters())
    result = {"processes": ppo.accelerator.num_processes, "updates": figures, "weights": shares}
    (work / f"figures-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--stop", type=int, default=0)
    given = parser.parse_args()
    changed = dict(setting.split("=", 1) for setting in given.settings)
    main(given.model_dir, given.work, TrainingSettings(**(SETTINGS.model_dump() | changed)), given.stop)
