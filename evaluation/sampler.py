"""Answers prompts as a given version: a vLLM engine of its own, beside the one that serves.

Owns the offline engine and the loading of weights into it. It is the only file beside `server/engine.py`
that imports vLLM. What is asked and how answers are judged is decided elsewhere.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

DEFAULT_ARGUMENTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    # vLLM 0.32 on a CPU dies when a request with a seed is prefilled in chunks (it rewinds the
    # generator's offset, which CPU generators have not).
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 8192,
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response: `token_ids` and `logprobs` (nats, under the sampling temperature), both (T,).

    The end-of-turn token is the last of `token_ids` where the response ended by itself; `finish_reason` is
    then `stop`, else `length`.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


class Sampler(Protocol):
    """Anything that can answer prompts with the weights of a model directory."""

    def load(self, model_dir: Path) -> None:
        """Take the weights of `model_dir` for all later samples."""

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        """`n` responses to each prompt of token ids, in the prompts' order."""

    def close(self) -> None:
        """Give back memory and processes."""


class VllmSampler:
    """A vLLM engine in a process of its own, whose weights are replaced between batches.

    `max_model_len` bounds prompt plus response in tokens; `kv_cache_gib` is the memory for keys and values.
    `vllm_arguments` are further arguments of vLLM's `LLM` and win over ours.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        max_model_len: int,
        kv_cache_gib: float,
        vllm_arguments: dict[str, Any] | None = None,
    ) -> None:
        _set_environment()
        from vllm import LLM  # noqa: PLC0415 - takes seconds to import

        self._llm = LLM(
            str(model_dir),
            max_model_len=max_model_len,
            kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
            logprobs_mode="processed_logprobs",
            worker_extension_cls="registry.worker.WorkerExtension",
            **DEFAULT_ARGUMENTS | (vllm_arguments or {}),
        )
        self._llm.collective_rpc("end_with", args=(os.getpid(),))

    def load(self, model_dir: Path) -> None:
        """Replace the weights in place; keys and values computed with the old ones are dropped."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model_dir)})
        self._llm.collective_rpc("refresh_packed_weights")
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the engine kept its prefix cache across a change of weights")

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        """`n` responses to each prompt; the same `seed` gives the same responses on the same engine."""
        from vllm import SamplingParams  # noqa: PLC0415

        # One seed a prompt: with one seed for all, equal prompts would get equal answers.
        params = [
            SamplingParams(n=n, max_tokens=max_tokens, temperature=temperature, seed=seed + i, logprobs=0)
            for i in range(len(prompts))
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self._llm.generate(requests, params, use_tqdm=False)
        return [[_sample(output) for output in result.outputs] for result in results]

    def close(self) -> None:
        """End the engine's process."""
        self._llm.llm_engine.engine_core.shutdown()


def _set_environment() -> None:
    """Set what vLLM reads from the environment when it is imported; what the user has set stands."""
    # vLLM would pin every engine of a machine to the same cores, this one to those of the server's.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) - 1)))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _sample(output: Any) -> Sample:
    token_ids = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)]
    return Sample(token_ids, logprobs, output.text, output.finish_reason)
