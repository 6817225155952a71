"""The logprob of each sampled token at little cost, inside vLLM's worker on a CPU.

A server records this one number for every token. vLLM computes it by a log-softmax over the vocabulary, which
it writes out and reads again for the token's rank. The normaliser alone, summed a row at a time while the row
is in the cache, is enough. Batches in which somebody asks for more than the sampled token's logprob, and
other kinds of logprobs than the model's own, are left to vLLM. It imports no vLLM.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_type_hints

import numpy as np


class SampledLogprobs:
    """Mixed into vLLM's worker through `registry.worker`."""

    model_runner: Any

    def compute_logprobs_cheaply(self) -> bool:
        """From now on compute sampled tokens' logprobs with `logsumexp`; returns whether it applies here."""
        sampler = self.model_runner.sampler
        if self.model_runner.device.type != "cpu" or getattr(sampler, "logprobs_mode", "") != "raw_logprobs":
            return False
        if not hasattr(sampler, "gather_logprobs"):  # vLLM's second model runner samples in another way
            return False
        sampler.forward = _forward(sampler.forward, get_type_hints(type(sampler).gather_logprobs)["return"])
        return True


def _forward(original: Callable[..., Any], make: Callable[..., Any]) -> Callable[..., Any]:
    """Return vLLM's `Sampler.forward` with the sampled tokens' logprobs computed here.

    The ranks that vLLM's `LogprobsTensors` (`make`) also carries are left 0; no HTTP answer contains them.
    """
    import torch

    def forward(logits: Any, sampling_metadata: Any, *arguments: Any, **options: Any) -> Any:
        """`logits` (B, V), of the model itself."""
        only_sampled = sampling_metadata.max_num_logprobs == 0 and not sampling_metadata.logprob_token_ids
        if not only_sampled or arguments or any(options.values()):
            return original(logits, sampling_metadata, *arguments, **options)
        # float32 logits are changed in place by temperature and penalties; others are copied before.
        kept = logits.clone() if logits.dtype == torch.float32 else logits
        normaliser = torch.from_numpy(logsumexp(kept.float().numpy()))
        output = original(logits, replace(sampling_metadata, max_num_logprobs=None))
        tokens = output.sampled_token_ids  # (B, 1)
        logprobs = kept.gather(1, tokens.long()).float() - normaliser[:, None]
        output.logprobs_tensors = make(tokens, logprobs, torch.zeros(len(tokens), dtype=torch.int32))
        return output

    return forward


def logsumexp(logits: "np.ndarray[Any, np.dtype[np.float32]]") -> "np.ndarray[Any, np.dtype[np.float32]]":
    """(B, V) -> (B,), in nats."""
    exponentials = np.empty(logits.shape[1], np.float32)
    found = np.empty(len(logits), np.float32)
    for i, row in enumerate(logits):
        largest = row.max()
        np.subtract(row, largest, out=exponentials)
        np.exp(exponentials, out=exponentials)
        found[i] = largest + np.log(exponentials.sum())
    return found
