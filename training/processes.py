"""One round in several processes: which is first, whose share is whose, and how their sums come together.

`torchrun` or `accelerate launch` start the processes, each of which sees the same data directory. Only the
first writes, samples and judges. A process that was started by itself is the first of one. How weights are
divided among processes is `training/sharding.py`'s.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from evaluation.reward_model import DEVICE

Value = TypeVar("Value")

logger = logging.getLogger(__name__)


class LaunchRefused(ValueError):  # noqa: N818
    """The launcher asks for what a round can't do; the message says what to use."""


@cache
def _state() -> PartialState:
    _follow_launcher()
    # The others wait while the first samples and judges, however long that takes.
    return PartialState(cpu=DEVICE.type == "cpu", timeout=timedelta(days=7))


def count() -> int:
    """How many processes there are."""
    return int(_state().num_processes)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return bool(_state().is_main_process)


@cache
def sharded() -> bool:
    """Whether the launcher wants models to be divided among the processes (FSDP)."""
    wanted = count() > 1 and _asked_for("ACCELERATE_USE_FSDP")
    if wanted and is_first():
        logger.info("each model is divided among %d processes", count())
    return wanted


def loading_device() -> torch.device:
    """Where a model is read to: the CPU if it is to be divided, since it need not fit on one device."""
    return torch.device("cpu") if sharded() else DEVICE


def own(indices: Iterable[int]) -> list[int]:
    """Return this process's share of the indices: by the number itself, so always the same ones."""
    return [index for index in indices if index % count() == _state().process_index]


def in_step(passes: Sequence[Value], spare: Value) -> list[tuple[Value, int]]:
    """Pair this process's passes through a model with 1, and add `spare` with 0 until all have as many.

    A divided model is gathered by all processes at once, so they have to run it equally often; nothing may
    come of a spare pass. Where nothing is divided none is added.
    """
    missing = 0
    if sharded():
        most = torch.tensor(len(passes), device=DEVICE)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        missing = int(most) - len(passes)
    return [*((own_pass, 1) for own_pass in passes), *([(spare, 0)] * missing)]


def from_first(make: Callable[[], Value]) -> Value:
    """Return what `make` gives in the first process, which alone calls it; it has to be picklable."""
    if count() == 1:
        return make()
    found = [make() if is_first() else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def added_up(tensor: Tensor) -> Tensor:
    """Return the sum of all processes' tensors."""
    if count() > 1:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor)
    return tensor


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the sum of all gradients; a parameter without one counts as zero.

    Those of divided weights were added up at the end of each pass.
    """
    if count() == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


def summed(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sum figures by name, over the sequence and over all processes."""
    everyones: list[Sequence[Mapping[str, float]]] = [figures]
    if count() > 1:
        everyones = [[] for _ in range(count())]
        torch.distributed.all_gather_object(everyones, list(figures))
    totals: dict[str, float] = {}
    for of_one in everyones:
        for one in of_one:
            for name, value in one.items():
                totals[name] = totals.get(name, 0.0) + value
    return totals


def wait_for_all() -> None:
    """Return once every process has come here."""
    _state().wait_for_everyone()


def _follow_launcher() -> None:
    """Read how `accelerate launch` wants models to be divided; raises LaunchRefused."""
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):
        _carry_out_zero3_by_fsdp()
    if not _asked_for("ACCELERATE_USE_FSDP"):
        return
    plugin = FullyShardedDataParallelPlugin()
    refused = {
        "fsdp_version: 1": plugin.fsdp_version != 2,
        "fsdp_reshard_after_forward: false": plugin.reshard_after_forward is False,
        "fsdp_offload_params: true": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing: true": plugin.activation_checkpointing,
        "fsdp_cpu_ram_efficient_loading: true": plugin.cpu_ram_efficient_loading,
    }
    if wrong := [name for name, found in refused.items() if found]:
        raise LaunchRefused(
            f"rounds don't run with {', '.join(wrong)}: take docker/accelerate/fsdp.yaml and change no more "
            "than the numbers of machines and processes"
        )


def _carry_out_zero3_by_fsdp() -> None:
    """Put FSDP in the place of DeepSpeed's ZeRO-3: both divide weights, gradients and optimiser states.

    DeepSpeed's engine owns the optimiser's step, which the stages here take by themselves. Raises
    LaunchRefused for what only DeepSpeed does.
    """
    others = [
        name
        for name in ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE")
        if os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", "none") != "none"
    ]
    if others or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") != "3":
        raise LaunchRefused(
            "of DeepSpeed, rounds know ZeRO-3 alone, without offloading and without a file of DeepSpeed's: "
            "take docker/accelerate/zero3.yaml or fsdp.yaml"
        )
    # Here accelerate and Transformers look, too.
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    logger.warning("PyTorch's FSDP carries out ZeRO-3, which divides the same: DeepSpeed itself is not used")


def _asked_for(variable: str) -> bool:
    """Whether `accelerate launch` switched this on."""
    return os.environ.get(variable, "false").lower() in ("1", "true")
