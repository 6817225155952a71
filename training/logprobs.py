"""What a language model thinks of given responses, computed for response tokens only.

Shapes: N response tokens over all items, D width, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evaluation.reward_model import (
    DEVICE,
    PackedRows,
    TokenIds,
    autocast,
    last_hidden,
    pack,
    rows_by_tokens,
)
from training.policy import Policy, trunk_and_head

Item = tuple[TokenIds, Sequence[TokenIds]]
"""A prompt and its responses."""


def response_states(trunk: nn.Module, packed: PackedRows) -> Tensor:
    """Hidden states (N, D) of the positions that predict each response token, response by response."""
    row, column = before_each_token(packed)
    with autocast():
        return last_hidden(trunk, packed)[row, column]


def response_tokens(packed: PackedRows) -> Tensor:
    """All response tokens (N,), response by response."""
    tokens = [
        packed.input_ids[row, start:end] for row, spans in enumerate(packed.spans) for start, end in spans
    ]
    return torch.cat(tokens).to(DEVICE)


def token_logprobs(
    head: nn.Module, states: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logprobs of `tokens` (N,) and entropies in nats, both (N,), where `states` (N, D) predict them.

    Logits are divided by `temperature` first. Entropies carry no gradient.
    """
    with autocast():
        logits = head(states).float() / temperature
    log_normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(1, tokens[:, None]).squeeze(1) - log_normaliser
    with torch.no_grad():
        entropies = log_normaliser - ((logits - log_normaliser[:, None]).exp() * logits).sum(-1)
    return logprobs, entropies


def response_logprobs(model: Policy, items: Sequence[Item], temperature: float) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies in nats, both (N,), of the responses' tokens one response after the other.

    The vocabulary's logits (N, V) are never computed for prompts.
    """
    packed = pack(items)
    trunk, head = trunk_and_head(model)
    return token_logprobs(head, response_states(trunk, packed), response_tokens(packed), temperature)


def before_each_token(packed: PackedRows) -> tuple[Tensor, Tensor]:
    """Row and column of the position that predicts each response token, both (N,), response by response.

    A response's first token is predicted by the prompt's last, wherever in the row the response stands.
    """
    pairs = []
    for row, spans in enumerate(packed.spans):
        last_of_prompt = spans[0][0] - 1
        for start, end in spans:
            pairs += [(row, last_of_prompt), *((row, column) for column in range(start, end - 1))]
    index = torch.tensor(pairs, dtype=torch.long)
    return index[:, 0], index[:, 1]


@torch.no_grad()  # type: ignore[untyped-decorator]
def total_logprobs(
    model: Policy,
    items: Sequence[tuple[TokenIds, TokenIds]],
    temperature: float,
    token_budget: int = 2048,
) -> list[float]:
    """Return the logprob in nats of each whole response to its prompt."""
    totals = [0.0] * len(items)
    sizes = [len(prompt) + len(response) for prompt, response in items]
    for group in rows_by_tokens(sizes, token_budget):
        pairs = [(items[i][0], [items[i][1]]) for i in group]
        logprobs, _ = response_logprobs(model, pairs, temperature)
        parts = logprobs.split([len(items[i][1]) for i in group])
        for index, own in zip(group, parts, strict=True):
            totals[index] = float(own.sum())
    return totals
