"""What a language model thinks of given responses, computed for response tokens only.

Shapes: N response tokens over all items, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.contest import Prompt
from evaluation.reward_model import (
    DEVICE,
    PackedRows,
    TokenIds,
    autocast,
    last_hidden,
    pack,
    rows_by_tokens,
)
from evaluation.sampler import Sample
from training.policy import Policy, trunk_and_head

Item = tuple[TokenIds, Sequence[TokenIds]]
"""A prompt and its responses."""

CHUNK = 2**22
"""Logits that are held in float32 at a time."""


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
        logits = head(states)
    logprobs, entropies = _TokenLogprobs.apply(logits, tokens, temperature)
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):  # type: ignore[misc]
    """Log-softmax at given tokens, a few rows at a time: float32 copies of all logits (N, V) never exist.

    d log p(t) / d z_v = (1[v = t] - p(v)) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        normalisers, logprobs, entropies = [], [], []
        for rows in _chunks(logits):
            scaled = logits[rows].to(torch.float32, copy=True).div_(temperature)
            normaliser = scaled.logsumexp(-1)
            logprobs.append(scaled.gather(1, tokens[rows, None]).squeeze(1) - normaliser)
            entropies.append(normaliser - torch.linalg.vecdot((scaled - normaliser[:, None]).exp_(), scaled))
            normalisers.append(normaliser)
        ctx.save_for_backward(logits, tokens, torch.cat(normalisers))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy := torch.cat(entropies))
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, normalisers = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            scale = gradient[rows, None] / ctx.temperature
            own = logits[rows].to(torch.float32, copy=True).div_(ctx.temperature)
            own.sub_(normalisers[rows, None]).exp_().mul_(-scale)
            result[rows] = own.scatter_add_(1, tokens[rows, None], scale)
        return result, None, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Rows whose logits in float32 stay within a processor's cache, or a GPU's memory."""
    size = max(1, CHUNK // logits.shape[-1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


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


def kl_from(
    reference: Policy,
    prompts: Sequence[Prompt],
    ours: Sequence[Sequence[Sample]],
    temperature: float,
) -> float:
    """Mean over a policy's answers of log pi - log pi_reference, in nats a response.

    Both at the answers' sampling temperature, where the mean estimates KL(pi || pi_reference).
    """
    pairs = [
        (prompt.token_ids, sample)
        for prompt, samples in zip(prompts, ours, strict=True)
        for sample in samples
    ]
    theirs = total_logprobs(reference, [(prompt, sample.token_ids) for prompt, sample in pairs], temperature)
    gaps = [sum(sample.logprobs) - their for (_, sample), their in zip(pairs, theirs, strict=True)]
    return float(sum(gaps) / len(gaps))
