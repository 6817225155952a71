"""Fitting a reward model to rankings, thumbs and ratings.

Owns the losses and the fitting loop; the module itself and how it scores is `evaluation/reward_model.py`,
how good it is on rankings that it has not seen is `training/reward_quality.py`.
Shapes: K responses to one prompt, N items of a side, H heads.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from evaluation.reward_model import (
    DEVICE,
    RewardModel,
    TokenIds,
    UnsuitableBackbone,
    autocast,
    head_scores_of_responses,
    pack,
    rows_by_tokens,
)
from training import processes, sharding
from training.dataset import Comparison, Judgement, Side
from training.reward_quality import pair_outcomes
from training.settings import TrainingSettings

Item = Comparison | Judgement
Report = Callable[[int, int, Mapping[str, float]], None]
"""Called with the step, the number of steps and the step's figures."""

TOKENS_A_PASS = 1024
STANDARD_ITEMS = 256
"""Of so many items the scores' mean and deviation are known well enough."""


def check_backbone(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UnsuitableBackbone unless the model `name` reads the policy's token ids and can be packed.

    PPO's critic sees the policy's own tokens one by one, so they are not encoded anew for another vocabulary.
    """
    theirs = AutoTokenizer.from_pretrained(name).get_vocab()
    other = sum(theirs.get(token) != id for token, id in tokenizer.get_vocab().items())
    if other:
        raise UnsuitableBackbone(
            f"{name} has another vocabulary than the policy ({other} tokens have other ids); "
            "take a model of the policy's family, or leave it empty to start from the policy"
        )
    RewardModel.from_decoder(name)


def ranking_loss(scores: Tensor, ranks: Sequence[int]) -> Tensor:
    """InstructGPT's K-wise loss of one prompt's scores (K,) or (K, H): () or one for each head (H,).

    -1/P sum over pairs with rank_w < rank_l of log sigmoid(r_w - r_l), P the number of such pairs: all pairs
    of a prompt weigh as one element (Ouyang et al. 2022, equation 1). Tied pairs are left out.
    """
    order = torch.tensor(ranks, device=scores.device)
    better, worse = (order[:, None] < order[None, :]).nonzero(as_tuple=True)  # (P,) each
    return -functional.logsigmoid(scores[better] - scores[worse]).mean(0)


class PointwiseLoss(nn.Module):  # type: ignore[misc]
    """Thumbs and ratings: cross-entropy of sigmoid(r + offset) against the target, an offset a kind and head.

    The offset takes up how readily people give a thumb, so only differences of quality reach the score.
    """

    def __init__(self, heads: int = 1, kinds: Sequence[str] = ("thumb", "rating")) -> None:
        super().__init__()
        self.offsets = nn.ParameterDict(
            {kind: nn.Parameter(torch.zeros(heads, device=DEVICE)) for kind in kinds}
        )

    def forward(self, scores: Tensor, target: float, kind: str) -> Tensor:
        """Losses (H,) of one response's scores (H,) against a target in [0, 1]."""
        logits = scores + self.offsets[kind]
        return functional.binary_cross_entropy_with_logits(
            logits, torch.full_like(logits, target), reduction="none"
        )


def bootstrap_weights(items: Sequence[Item], heads: int, seed: int) -> Tensor:
    """Weights (N, H) of the items for each head: the rater's, times how often the head drew the prompt.

    Each head draws as many prompts as there are, with replacement (Efron and Tibshirani 1993), all of a
    prompt's items together; a single head takes every prompt once. Each head's weights sum to N, so that the
    loss has the same scale whatever is drawn.
    """
    position = {key: i for i, key in enumerate(sorted({item.prompt.key for item in items}))}
    drawn = np.ones((heads, len(position)))
    if heads > 1:
        generator = np.random.default_rng(seed)
        for head in range(heads):
            picks = generator.integers(len(position), size=len(position))
            drawn[head] = np.bincount(picks, minlength=len(position))
    owners = [position[item.prompt.key] for item in items]
    weights = np.array([[item.weight] for item in items]) * drawn[:, owners].T
    return torch.tensor(weights * len(items) / weights.sum(0), dtype=torch.float32, device=DEVICE)


def fit(model: RewardModel, side: Side, settings: TrainingSettings, report: Report) -> None:
    """Fit `model` in place to all that was said on one side's prompts.

    Each step takes `reward_batch` prompts with all their responses; the learning rate warms up over a tenth
    of the steps and falls to a tenth by a cosine. Afterwards the scores are standardised on the same
    responses, with demonstrations at 0 where the side has some. While it is fitted the trunk may be divided
    among the processes; in the end each has it whole.
    Raises FloatingPointError if the loss is not finite.
    """
    items: list[Item] = [*side.comparisons, *side.judgements]
    weights = bootstrap_weights(items, model.heads, settings.seed)
    steps_an_epoch = -(-len(items) // settings.reward_batch)
    steps = steps_an_epoch * settings.reward_epochs
    pointwise = PointwiseLoss(model.heads)
    empty = sharding.outline(model.backbone)
    sharding.shard(model.backbone)
    optimizer = torch.optim.AdamW(
        [
            {"params": model.backbone.parameters(), "lr": settings.reward_learning_rate},
            # New heads start from nothing and need longer strides than the trunk.
            {"params": model.head.parameters(), "lr": 10 * settings.reward_learning_rate},
            {"params": pointwise.parameters(), "lr": 1e-2},
        ],
        weight_decay=0.0,
        fused=True,
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, steps // 10, steps, min_lr_rate=0.1)
    shuffle = random.Random(settings.seed)
    order = list(range(len(items)))
    model.train()
    model.offset.zero_()
    model.scale.fill_(1.0)
    step = 0
    for _ in range(settings.reward_epochs):
        shuffle.shuffle(order)
        for start in range(0, len(items), settings.reward_batch):
            batch = order[start : start + settings.reward_batch]
            figures = _step(model, pointwise, [items[i] for i in batch], weights[batch])
            processes.add_up_gradients([*model.parameters(), *pointwise.parameters()])
            norm = sharding.clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            report(step, steps, {**figures, "gradient_norm": float(norm)})
    _standardise(model, items, side)
    model.backbone = sharding.filled(empty, model.backbone)


def _step(
    model: RewardModel, pointwise: PointwiseLoss, batch: Sequence[Item], weights: Tensor
) -> dict[str, float]:
    """Accumulate the gradient of a batch's weighted mean loss, in passes of bounded size."""
    found: list[dict[str, float]] = []
    packs = [_packable(item) for item in batch]
    own = processes.own(range(len(batch)))
    sizes = [len(packs[i][0]) + sum(map(len, packs[i][1])) for i in own]
    passes = [[own[i] for i in group] for group in rows_by_tokens(sizes, TOKENS_A_PASS)]
    for group, counts in processes.in_step(passes, [0]):
        with autocast():
            scores = model(pack([packs[i] for i in group]))  # (sum of K, H)
        losses, outcomes = [], []
        for index, of_item in zip(group, scores.split([len(packs[i][1]) for i in group]), strict=True):
            item = batch[index]
            if isinstance(item, Comparison):
                losses.append(ranking_loss(of_item, item.ranks))
                outcomes += pair_outcomes(of_item.mean(-1).tolist(), item.ranks)
            else:
                losses.append(pointwise(of_item[0], item.target, item.kind))
        loss = counts * (torch.stack(losses) * weights[group]).mean(-1).sum() / len(batch)
        loss.backward()
        pairs, right = counts * len(outcomes), counts * sum(outcomes)
        found.append({"loss": loss.item(), "pairs": pairs, "right": right})
    total = processes.summed(found)
    if not math.isfinite(total["loss"]):
        raise FloatingPointError("the reward model's loss is not finite; lower reward_learning_rate")
    accuracy = {"accuracy": total["right"] / total["pairs"]} if total["pairs"] else {}
    return {"loss": total["loss"]} | accuracy


def _packable(item: Item) -> tuple[TokenIds, Sequence[TokenIds]]:
    responses = item.responses if isinstance(item, Comparison) else [item.response]
    return item.prompt.token_ids, responses


def _standardise(model: RewardModel, items: Sequence[Item], side: Side) -> None:
    """Set `offset` and `scale` so that all heads vary alike over the items and their mean has deviation 1.

    Zero is the mean score of the side's demonstrations (Ouyang et al. 2022, section 3.5), else of its items.
    """
    chosen = random.Random(0).sample(items, min(STANDARD_ITEMS, len(items)))
    scores = torch.cat(head_scores_of_responses(model, [_packable(item) for item in chosen]))
    scale = scores.std(0).clamp(min=1e-3)
    scale = scale * (scores / scale).mean(-1).std().clamp(min=1e-3)
    written = [(item.prompt.token_ids, [item.response]) for item in side.demonstrations[:STANDARD_ITEMS]]
    zero = torch.cat(head_scores_of_responses(model, written)) if written else scores
    model.offset.copy_(zero.mean(0))
    model.scale.copy_(scale)
