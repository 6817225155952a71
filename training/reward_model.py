"""Fitting a reward model to rankings, thumbs and ratings, and measuring it.

Owns the losses and the fitting loop; the module itself and how it scores is `evaluation/reward_model.py`.
Shapes: K responses to one prompt, N responses in a batch.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from evaluation.comparison import Interval, clustered_mean
from evaluation.reward_model import DEVICE, RewardModel, autocast, pack, rows_by_tokens, score_responses
from training.dataset import Comparison, Judgement, Side
from training.settings import TrainingSettings

Item = Comparison | Judgement
Report = Callable[[int, int, Mapping[str, float]], None]
"""Called with the step, the number of steps and the step's figures."""

TOKENS_A_PASS = 1024


def ranking_loss(scores: Tensor, ranks: Sequence[int]) -> Tensor:
    """InstructGPT's K-wise loss of one prompt's scores (K,).

    -1/P sum over pairs with rank_w < rank_l of log sigmoid(r_w - r_l), P the number of such pairs: all pairs
    of a prompt weigh as one element (Ouyang et al. 2022, equation 1). Tied pairs are left out.
    """
    order = torch.tensor(ranks, device=scores.device)
    better = order[:, None] < order[None, :]  # (K, K)
    differences = (scores[:, None] - scores[None, :])[better]
    return -functional.logsigmoid(differences).mean()


class PointwiseLoss(nn.Module):  # type: ignore[misc]
    """Thumbs and ratings: cross-entropy of sigmoid(r + offset) against the target, one offset a kind.

    The offset takes up how readily people give a thumb, so only differences of quality reach the score.
    """

    def __init__(self, kinds: Sequence[str] = ("thumb", "rating")) -> None:
        super().__init__()
        self.offsets = nn.ParameterDict(
            {kind: nn.Parameter(torch.zeros((), device=DEVICE)) for kind in kinds}
        )

    def forward(self, score: Tensor, target: float, kind: str) -> Tensor:
        """Loss of one score () against a target in [0, 1]."""
        return functional.binary_cross_entropy_with_logits(
            score + self.offsets[kind], score.new_tensor(target)
        )


def fit(model: RewardModel, side: Side, settings: TrainingSettings, report: Report) -> None:
    """Fit `model` in place to all that was said on one side's prompts.

    Each step takes `reward_batch` prompts with all their responses; the learning rate warms up over a tenth
    of the steps and falls to a tenth by a cosine. Afterwards the score is standardised on the same responses.
    Raises FloatingPointError if the loss is not finite.
    """
    items: list[Item] = [*side.comparisons, *side.judgements]
    steps_an_epoch = -(-len(items) // settings.reward_batch)
    steps = steps_an_epoch * settings.reward_epochs
    pointwise = PointwiseLoss()
    optimizer = torch.optim.AdamW(
        [
            {"params": model.backbone.parameters(), "lr": settings.reward_learning_rate},
            # The new head starts from noise and needs longer strides than the trunk.
            {"params": model.head.parameters(), "lr": 10 * settings.reward_learning_rate},
            {"params": pointwise.parameters(), "lr": 1e-2},
        ],
        weight_decay=0.0,
        fused=True,
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, max(1, steps // 10), steps, min_lr_rate=0.1
    )
    shuffle = random.Random(settings.seed)
    model.train()
    model.offset.zero_()
    model.scale.fill_(1.0)
    step = 0
    for _ in range(settings.reward_epochs):
        shuffle.shuffle(items)
        for start in range(0, len(items), settings.reward_batch):
            batch = items[start : start + settings.reward_batch]
            figures = _step(model, pointwise, batch)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            report(step, steps, {**figures, "gradient_norm": float(norm)})
    _standardise(model, items)


def _step(model: RewardModel, pointwise: PointwiseLoss, batch: Sequence[Item]) -> dict[str, float]:
    """Accumulate the gradient of a batch's mean loss, in passes of bounded size."""
    total, pairs, right = 0.0, 0, 0
    packs = [_packable(item) for item in batch]
    sizes = [len(prompt) + sum(map(len, responses)) for prompt, responses in packs]
    for group in rows_by_tokens(sizes, TOKENS_A_PASS):
        with autocast():
            scores = model(pack([packs[i] for i in group]))
        losses = []
        for index, own in zip(group, scores.split([len(packs[i][1]) for i in group]), strict=True):
            item = batch[index]
            if isinstance(item, Comparison):
                losses.append(ranking_loss(own, item.ranks))
                correct = pair_outcomes(own.tolist(), item.ranks)
                pairs, right = pairs + len(correct), right + int(sum(correct))
            else:
                losses.append(pointwise(own[0], item.target, item.kind))
        loss = torch.stack(losses).sum() / len(batch)
        if not torch.isfinite(loss):
            raise FloatingPointError("the reward model's loss is not finite; lower reward_learning_rate")
        loss.backward()
        total += loss.item()
    return {"loss": total} | ({"accuracy": right / pairs} if pairs else {})


def _packable(item: Item) -> tuple[list[int], list[list[int]]]:
    responses = item.responses if isinstance(item, Comparison) else [item.response]
    return item.prompt.token_ids, responses


def _standardise(model: RewardModel, items: Sequence[Item]) -> None:
    scores = torch.tensor(
        [score for own in score_responses(model, [_packable(item) for item in items]) for score in own]
    )
    model.offset.fill_(scores.mean())
    model.scale.fill_(scores.std().clamp(min=1e-3))


def pair_outcomes(values: Sequence[float], ranks: Sequence[int]) -> list[float]:
    """Outcome of each pair with different ranks: 1 if the better has the greater value, 0.5 if equal."""
    outcomes = []
    for i, better in enumerate(ranks):
        for j, worse in enumerate(ranks):
            if better < worse:
                outcomes.append(0.5 if values[i] == values[j] else float(values[i] > values[j]))
    return outcomes


def accuracy_by_source(
    model: RewardModel, comparisons: Sequence[Comparison], seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Held-out pair accuracy of `model` and of choosing the longer answer, by source, clustered by prompt.

    Sources with fewer than two prompts are left out, as no interval can be told.
    """
    scores = score_responses(model, [_packable(item) for item in comparisons])
    outcomes: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for item, own in zip(comparisons, scores, strict=True):
        source = outcomes.setdefault(item.source, {"model": [], "longer": []})
        for name, values in (("model", own), ("longer", [float(len(r)) for r in item.responses])):
            source[name] += [(item.prompt.key, value) for value in pair_outcomes(values, item.ranks)]
    return {
        source: {
            name: clustered_mean([key for key, _ in pairs], [value for _, value in pairs], seed=seed)
            for name, pairs in by_name.items()
        }
        for source, by_name in outcomes.items()
        if len({key for key, _ in by_name["model"]}) >= 2
    }
