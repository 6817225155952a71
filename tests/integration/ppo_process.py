"""PPO on the tiny model in one process of several; each writes its figures to `figures-RANK.json`."""

import json
import sys
from pathlib import Path

import torch
from unit.training.tiny import TransformersSampler, tiny_tokenizer

from evaluation.contest import Prompt
from evaluation.reward_model import RewardModel
from training.policy import load_policy
from training.ppo import PPO
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
)
PROMPTS = [Prompt(str(i), [3, 5 + i, 6 + i, *range(7, 7 + i), 4]) for i in range(11)]


def main(model_dir: Path, work: Path) -> None:
    torch.manual_seed(0)
    reward_model = RewardModel.from_decoder(model_dir)
    torch.nn.init.normal_(reward_model.head.weight)
    figures: list[dict[str, float]] = []
    ppo = PPO(
        policy=load_policy(model_dir),
        tokenizer=tiny_tokenizer(),
        reward_model=reward_model,
        prompts=PROMPTS,
        rollouts=Rollouts(
            TransformersSampler(model_dir), tiny_tokenizer(), work / "rollout", max_tokens=6, temperature=1.0
        ),
        settings=SETTINGS,
        work=work,
        report=lambda step, steps, values: figures.append(dict(values)),
    )
    ppo.train()
    rank = ppo.accelerator.process_index
    (work / f"figures-{rank}.json").write_text(json.dumps([ppo.accelerator.num_processes, figures]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
