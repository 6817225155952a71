"""Logprobs of response tokens, computed a few rows at a time, against all at once."""

import pytest
import torch
from torch import nn

from evaluation.reward_model import autocast
from training import logprobs
from training.logprobs import token_logprobs


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_what_a_whole_log_softmax_does(
    rows_a_chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vocabulary, width, count = 50, 8, 10
    monkeypatch.setattr(logprobs, "CHUNK", rows_a_chunk * vocabulary)
    head = nn.Linear(width, vocabulary)
    states = torch.randn(count, width, requires_grad=True)
    tokens = torch.randint(vocabulary, (count,))
    weights = torch.randn(count)

    found, entropies = token_logprobs(head, states, tokens, temperature)
    ours = torch.autograd.grad((found * weights).sum(), [states, head.weight])

    with autocast():
        logits = head(states)
    whole = (logits.float() / temperature).log_softmax(-1)
    slow = torch.stack([whole[i, token] for i, token in enumerate(tokens)])
    theirs = torch.autograd.grad((slow * weights).sum(), [states, head.weight])

    assert torch.allclose(found, slow, atol=1e-5)
    assert torch.allclose(entropies, -(whole.exp() * whole).sum(-1), atol=1e-5)
    assert not entropies.requires_grad
    for mine, slower in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, slower, atol=2e-2 * float(slower.abs().max()))
