"""The cheap logprobs are those of a log-softmax over the model's own logits, and touch nothing else."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from registry.logprobs import SampledLogprobs, logsumexp


class Tensors(NamedTuple):
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor


@dataclass
class Metadata:
    max_num_logprobs: int | None
    logprob_token_ids: dict[int, list[int]] | None = None


class Sampler:
    """As vLLM's: it may change the logits in place, and returns (B, 1) tokens."""

    logprobs_mode = "raw_logprobs"

    def __init__(self) -> None:
        self.asked: list[int | None] = []

    def forward(
        self, logits: torch.Tensor, sampling_metadata: Metadata, predict_bonus_token: bool = False
    ) -> Any:
        self.asked.append(sampling_metadata.max_num_logprobs)
        scaled = logits.float().div_(0.5)
        return SimpleNamespace(
            sampled_token_ids=scaled.argmin(-1, keepdim=True).int(), logprobs_tensors="vLLM's"
        )

    @staticmethod
    def gather_logprobs(logprobs: torch.Tensor) -> Tensors:
        raise NotImplementedError


def worker(device: str = "cpu", mode: str = "raw_logprobs") -> tuple[SampledLogprobs, Sampler]:
    found, sampler = SampledLogprobs(), Sampler()
    sampler.logprobs_mode = mode
    found.model_runner = SimpleNamespace(sampler=sampler, device=SimpleNamespace(type=device))
    return found, sampler


def test_the_normaliser_is_exact_to_float32() -> None:
    logits = (torch.randn(5, 49_152) * 8).numpy()
    logits[0, :] = -np.inf
    logits[0, 3] = 7.0
    exact = torch.from_numpy(logits).double().logsumexp(-1).numpy()
    np.testing.assert_allclose(logsumexp(logits), exact, rtol=1e-6)
    logits[1, 1] = np.nan
    assert np.isnan(logsumexp(logits)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sampled_tokens_get_the_models_own_logprobs(dtype: torch.dtype) -> None:
    found, sampler = worker()
    assert found.compute_logprobs_cheaply()
    logits = (torch.randn(4, 1000) * 5).to(dtype)
    exact = logits.double().log_softmax(-1)
    output = sampler.forward(logits=logits, sampling_metadata=Metadata(0))
    tokens = output.sampled_token_ids.long()
    torch.testing.assert_close(
        output.logprobs_tensors.logprobs, exact.gather(1, tokens).float(), atol=1e-5, rtol=1e-6
    )
    assert torch.equal(output.logprobs_tensors.token_ids, output.sampled_token_ids)
    assert sampler.asked == [None]


@pytest.mark.parametrize("metadata", [Metadata(None), Metadata(5), Metadata(-1), Metadata(0, {0: [1]})])
def test_whoever_asks_for_more_or_less_is_left_to_vllm(metadata: Metadata) -> None:
    found, sampler = worker()
    assert found.compute_logprobs_cheaply()
    output = sampler.forward(logits=torch.randn(2, 10), sampling_metadata=metadata)
    assert output.logprobs_tensors == "vLLM's"
    assert sampler.asked == [metadata.max_num_logprobs]


@pytest.mark.parametrize(("device", "mode"), [("cuda", "raw_logprobs"), ("cpu", "processed_logprobs")])
def test_it_applies_to_the_models_own_logprobs_on_a_cpu(device: str, mode: str) -> None:
    found, sampler = worker(device, mode)
    own = sampler.forward
    assert not found.compute_logprobs_cheaply()
    assert sampler.forward == own
