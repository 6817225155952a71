"""What a language model thinks of given responses, computed for response tokens only.

Shapes: N response tokens over all items, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.reward_model import DEVICE, TokenIds, autocast, last_hidden, pack, rows_by_tokens


def response_logprobs(
    model: PreTrainedModel, items: Sequence[tuple[TokenIds, TokenIds]], temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies in nats, both (N,), of the responses' tokens one item after the other.

    `items` are (prompt, response) pairs; logits are divided by `temperature` first. The vocabulary's logits
    (N, V) are never computed for prompts.
    """
    packed = pack([(prompt, [response]) for prompt, response in items])
    with autocast():
        hidden = last_hidden(model.model, packed)
        row, column = before_each_token(packed.spans)
        logits = model.lm_head(hidden[row, column]).float() / temperature
    targets = packed.input_ids[row, column + 1].to(DEVICE)
    log_normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(1, targets[:, None]).squeeze(1) - log_normaliser
    with torch.no_grad():
        entropies = log_normaliser - (logits.softmax(-1) * logits).sum(-1)
    return logprobs, entropies


def before_each_token(spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Row and column of the position that predicts each response token, both (N,); one response a row."""
    pairs = [
        (row, column) for row, ((start, end),) in enumerate(spans) for column in range(start - 1, end - 1)
    ]
    index = torch.tensor(pairs, dtype=torch.long)
    return index[:, 0], index[:, 1]


@torch.no_grad()  # type: ignore[untyped-decorator]
def total_logprobs(
    model: PreTrainedModel,
    items: Sequence[tuple[TokenIds, TokenIds]],
    temperature: float,
    token_budget: int = 2048,
) -> list[float]:
    """Return the logprob in nats of each whole response."""
    totals = [0.0] * len(items)
    sizes = [len(prompt) + len(response) for prompt, response in items]
    for group in rows_by_tokens(sizes, token_budget):
        logprobs, _ = response_logprobs(model, [items[i] for i in group], temperature)
        parts = logprobs.split([len(items[i][1]) for i in group])
        for index, own in zip(group, parts, strict=True):
            totals[index] = float(own.sum())
    return totals
