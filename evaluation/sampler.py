"""Answers prompts as a given version: a vLLM engine of its own beside the one that serves, or Transformers.

Owns the offline engines and the loading of weights into them. It is the only file beside `server/engine.py`
that imports vLLM. What is asked and how answers are judged is decided elsewhere.
"""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from evaluation.reward_model import DEVICE
from registry.precision import matrix_dtype

DEFAULT_ARGUMENTS: dict[str, Any] = {
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

    def loglikelihoods(
        self, items: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """Return each continuation's logprob after its context, and whether it is the likeliest.

        Both are token ids, neither is empty. The logprob is the sum over tokens in nats, at temperature 1; a
        greedy decoder gives the likeliest. What is too long loses the beginning of its context.
        """

    def close(self) -> None:
        """Give back memory and processes."""


class VllmSampler:
    """A vLLM engine whose weights are replaced between batches.

    On a CPU it runs in this process: engine and trainer take turns, so both can have all cores, and a second
    process would spend one of them on waiting. On a GPU, and beside other training processes, it has
    processes of its own. `max_model_len` bounds prompt plus response in tokens; `kv_cache_gib` is the memory
    for keys and values. `vllm_arguments` are further arguments of vLLM's `LLM` and win over ours.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        max_model_len: int,
        kv_cache_gib: float,
        vllm_arguments: dict[str, Any] | None = None,
    ) -> None:
        self._in_process = DEVICE.type == "cpu" and not torch.distributed.is_initialized()
        _set_environment(self._in_process)
        from vllm import LLM  # noqa: PLC0415 - takes seconds to import

        self._max_model_len = max_model_len
        with _own_state():
            self._llm = LLM(
                str(model_dir),
                max_model_len=max_model_len,
                kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
                logprobs_mode="processed_logprobs",
                worker_extension_cls="registry.worker.WorkerExtension",
                **DEFAULT_ARGUMENTS | {"dtype": matrix_dtype()} | (vllm_arguments or {}),
            )
        if not self._in_process:
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
        # One seed a prompt: with one seed for all, equal prompts would get equal answers.
        params = [self._parameters(n, max_tokens, temperature, seed + i) for i in range(len(prompts))]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self._llm.generate(requests, params, use_tqdm=False)
        return [[_sample(output) for output in result.outputs] for result in results]

    def loglikelihoods(
        self, items: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """See `Sampler.loglikelihoods`; the engine computes them as it reads a prompt."""
        from vllm import SamplingParams  # noqa: PLC0415

        # An engine generates one token at least, which has to fit in, too.
        rows = [[*context, *continuation][1 - self._max_model_len :] for context, continuation in items]
        results = self._llm.generate(
            [{"prompt_token_ids": row} for row in rows],
            SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        found = []
        for row, (_, continuation), result in zip(rows, items, results, strict=True):
            start = max(1, len(row) - len(continuation))  # nothing predicts the first token
            steps = [
                step[token] for step, token in zip(result.prompt_logprobs[start:], row[start:], strict=True)
            ]
            found.append((sum(step.logprob for step in steps), all(step.rank == 1 for step in steps)))
        return found

    def _parameters(self, n: int, max_tokens: int, temperature: float, seed: int) -> Any:
        from vllm import SamplingParams  # noqa: PLC0415

        return SamplingParams(n=n, max_tokens=max_tokens, temperature=temperature, seed=seed, logprobs=0)

    def close(self) -> None:
        """End the engine and give back its memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        if self._in_process:
            from vllm.distributed import cleanup_dist_env_and_memory  # noqa: PLC0415

            cleanup_dist_env_and_memory()


class TransformersSampler:
    """Hugging Face's own `generate`, in this process: slower than vLLM, but runs wherever training does."""

    def __init__(self, model_dir: Path, *, batch: int = 16) -> None:
        self._batch = batch
        self.load(model_dir)

    def load(self, model_dir: Path) -> None:
        """Read the model anew, in the number format that vLLM uses."""
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

        self._model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=matrix_dtype()).to(DEVICE)
        self._tokenizer = AutoTokenizer.from_pretrained(str(model_dir))

    def sample(
        self, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        """`n` responses to each prompt; the same call gives the same responses."""
        wanted = [list(prompt) for prompt in prompts for _ in range(n)]
        samples: list[Sample] = []
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, len(wanted), self._batch):
                samples += self._generate(wanted[start : start + self._batch], max_tokens, temperature)
        return [samples[i * n : (i + 1) * n] for i in range(len(prompts))]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def loglikelihoods(
        self, items: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """See `Sampler.loglikelihoods`; rows of like length share a pass."""
        longest = self._model.config.max_position_embeddings
        rows = [[*context, *continuation][-longest:] for context, continuation in items]
        found = [(0.0, False)] * len(items)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for begin in range(0, len(order), self._batch):
            group = order[begin : begin + self._batch]
            width = max(len(rows[i]) for i in group)
            # Padded behind: a causal model does not look there.
            ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in group], device=DEVICE)
            logits = self._model(input_ids=ids).logits  # (B, T, V)
            for i, row_logits in zip(group, logits, strict=True):
                start = max(1, len(rows[i]) - len(items[i][1]))
                own = row_logits[start - 1 : len(rows[i]) - 1].float()  # predict what comes after
                tokens = torch.tensor(rows[i][start:], device=DEVICE)
                logprobs = own.log_softmax(-1).gather(1, tokens[:, None])
                found[i] = (float(logprobs.sum()), bool((own.argmax(-1) == tokens).all()))
        return found

    def close(self) -> None:
        """Let go of the weights."""
        del self._model

    def _generate(self, prompts: list[list[int]], max_tokens: int, temperature: float) -> list[Sample]:
        width = max(map(len, prompts))
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
        ends = self._ends()
        found = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            eos_token_id=ends or None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = found.sequences[:, width:]
        logits = torch.stack(found.logits, 1).float() / (temperature or 1.0)  # (B, T, V)
        logprobs = logits.log_softmax(-1).gather(2, tokens[:, :, None]).squeeze(2)
        return [
            self._sample(own, of_own, ends)
            for own, of_own in zip(tokens.tolist(), logprobs.tolist(), strict=True)
        ]

    def _sample(self, tokens: list[int], logprobs: list[float], ends: list[int]) -> Sample:
        ended = next((at for at, token in enumerate(tokens) if token in ends), None)
        length = len(tokens) if ended is None else ended + 1
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        return Sample(tokens[:length], logprobs[:length], text, "length" if ended is None else "stop")

    def _ends(self) -> list[int]:
        found = self._model.generation_config.eos_token_id
        if found is None:
            found = self._tokenizer.eos_token_id
        return found if isinstance(found, list) else [] if found is None else [found]


def _set_environment(in_process: bool) -> None:
    """Set what vLLM reads from the environment when it is imported; what the user has set stands."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    # vLLM would pin every engine of a machine to the same cores, this one to those of the server's.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if not in_process:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) - 1)))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextmanager
def _own_state() -> Iterator[None]:
    """Keep what an engine in this process would change for everybody: random states and torch's threads."""
    set_num_threads = torch.set_num_threads
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _sample(output: Any) -> Sample:
    token_ids = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, token_ids, strict=True)]
    return Sample(token_ids, logprobs, output.text, output.finish_reason)
