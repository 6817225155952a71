"""What a failed round says: the stage, why, and what to do about it.

Owns the words; which failure ends a round is decided by `training/trainer.py`.
"""

import errno
from collections.abc import Callable, Iterator

import torch

from training.round import EngineFailed, RoundRefused

_LEARNING_RATES = {
    "sft": "training.sft_learning_rate",
    "reward_model": "training.reward_learning_rate",
    "judge": "training.reward_learning_rate",
    "ppo": "training.ppo_learning_rate or training.ppo_critic_learning_rate",
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SPACE_TEXTS = (
    "No space left",
    "File too large",
    "quota exceeded",
    "disk is full",
)
_NO_MEMORY_TEXTS = ("out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory")


def explain(stage: str, problem: Exception) -> str:
    """One line that says where and why, and below it what to do, unless the problem says so itself."""
    if isinstance(problem, RoundRefused):
        return f"{stage}: {problem}"
    for known in _chain(problem):
        advice = _advice(stage, known)
        if advice is not None:
            return f"{stage}: {_first_line(known)}\nWhat to do: {advice}"
    advice = "the trainer's log has the traceback; the next round learns from the same feedback."
    return f"{stage}: {_first_line(problem)}\nWhat to do: {advice}"


def _chain(problem: BaseException | None) -> Iterator[BaseException]:
    """Yield the problem and what it came from: torch hides a full disk behind an error of its own."""
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0] if lines else type(problem).__name__


def _advice(stage: str, problem: BaseException) -> str | None:
    if isinstance(problem, FloatingPointError):
        rate = _LEARNING_RATES.get(stage, "the learning rate of this stage")
        return f"lower {rate}; the next round learns from the same feedback."
    return next((advice for applies, advice in _ADVICE if applies(problem)), None)


def _out_of_space(problem: BaseException) -> bool:
    # safetensors raises an error of its own, which only its text gives away.
    number = problem.errno if isinstance(problem, OSError) else None
    return number in _NO_SPACE or any(text in str(problem) for text in _NO_SPACE_TEXTS)


def _out_of_memory(problem: BaseException) -> bool:
    if isinstance(problem, MemoryError | torch.OutOfMemoryError):
        return True
    return any(text in str(problem) for text in _NO_MEMORY_TEXTS)


def _engine_failed(problem: BaseException) -> bool:
    # vLLM's own class for an engine that died while it was used; only the sampler may import it.
    return isinstance(problem, EngineFailed) or type(problem).__name__ == "EngineDeadError"


# In this order: an engine that found no memory says so in its own log, and takes another remedy.
_ADVICE: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
    (
        _out_of_space,
        "free disk space, or lower training.keep_rounds and training.keep_versions; "
        "the next round learns from the same feedback.",
    ),
    (
        _engine_failed,
        "the trainer's log has vLLM's own message above this one; where memory is short, lower "
        "training.kv_cache_gib or server.max_model_len, else look at training.vllm_arguments.",
    ),
    (
        _out_of_memory,
        "lower training.prompt_tokens, training.response_tokens, training.ppo_batch or "
        "training.kv_cache_gib, or give the trainer a machine with more memory.",
    ),
)
