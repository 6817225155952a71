"""One round in several processes: which is first, whose share is whose, and how their sums come together.

`torchrun` or `accelerate launch` start the processes, each of which sees the same data directory. Only the
first writes, samples and judges. A process that was started by itself is the first of one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, nn

from evaluation.reward_model import DEVICE

Value = TypeVar("Value")


@cache
def _state() -> PartialState:
    # The others wait while the first samples and judges, however long that takes.
    return PartialState(cpu=DEVICE.type == "cpu", timeout=timedelta(days=7))


def count() -> int:
    """How many processes there are."""
    return int(_state().num_processes)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return bool(_state().is_main_process)


def own(indices: Iterable[int]) -> list[int]:
    """Return this process's share of the indices: by the number itself, so always the same ones."""
    return [index for index in indices if index % count() == _state().process_index]


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
    """Give every process the sum of all gradients; a parameter without one counts as zero."""
    if count() == 1:
        return
    for parameter in parameters:
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
