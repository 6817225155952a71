"""The critic of PPO: a value head on one of three trunks."""

from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from evaluation.reward_model import DEVICE, RewardModel

Kind = Literal["reward_model", "policy", "separate"]


class Critic(nn.Module):  # type: ignore[misc]
    """V(x, y_<t) from the hidden state before each response token; `kind` says which trunk gives it.

    `reward_model`: the reward model's, which stays as fitted: the pass that scores a response also values it.
    `separate`: a copy of it that learns (Ouyang et al. 2022, appendix C.4). `policy`: the policy's own, which
    then learns from the value loss, too. On the reward model's trunk the head starts as the reward model's:
    the first values are the scores of what is written so far. On the policy's it starts from zero.
    """

    base_model_prefix = "backbone"  # where TRL looks for the trunk

    def __init__(self, reward_model: RewardModel, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.backbone = reward_model.backbone if kind == "reward_model" else nn.Identity()
        if kind == "separate":
            self.backbone = deepcopy(reward_model.backbone).requires_grad_(True)
        self.score = nn.Linear(reward_model.head.in_features, 1, device=DEVICE)
        with torch.no_grad():
            if kind == "policy":
                self.score.weight.zero_()
                self.score.bias.zero_()
            else:
                self.score.weight.copy_(reward_model.head.weight / reward_model.scale)
                self.score.bias.copy_((reward_model.head.bias - reward_model.offset) / reward_model.scale)

    def forward(self, states: Tensor) -> Tensor:
        """Values of hidden states (…, D) -> (…)."""
        values: Tensor = self.score(states.float()).squeeze(-1)
        return values
