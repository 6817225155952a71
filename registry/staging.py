"""Brings a checkpoint's weights into vLLM's worker beside those in service, to be put in place at once.

Reading, packing and proving a checkpoint takes as long as a reload, but a thread can do it while requests
run. What is left for the pause is to exchange references, forth and, if need be, back. It applies to a model
on a CPU whose every tensor is named and shaped as in the checkpoint (apart from `registry.proof`'s fused
layers), which the first fingerprint of a server shows; other engines reload. It imports no vLLM.
"""

import os
import threading
from pathlib import Path
from typing import Any

import psutil

from registry.proof import (
    checkpoint_tensors,
    held_tensors,
    is_packed,
    parts_of,
    tensor_digest,
)

_PASSED_OVER = ("rotary_emb.", "lm_head.")
"""What vLLM leaves aside in a checkpoint; it refuses to start on other tensors that it has no place for."""
_NICENESS = 5
"""How much the thread gives way to vLLM's; more would let a busy machine never come to it."""


class WeightStaging:
    """Mixed into vLLM's worker through `registry.worker`; at most one checkpoint is staged at a time."""

    model_runner: Any
    _staged: "_Staged | None" = None

    def stage_weights(self, directory: str) -> bool:
        """Begin to stage a checkpoint and return at once; False where this engine can only reload."""
        model = self.model_runner.get_model()
        if not _can_stage(model, Path(directory)):
            return False
        self._staged = _Staged(model, Path(directory))
        self._staged.start()
        return True

    def staged_fingerprint(self) -> dict[str, str] | str | None:
        """Return what `weight_fingerprint` will say of the staged weights; None while they are on their way.

        A text says why they can't be staged: a tensor that is missing, unknown, misshapen or not finite.
        """
        assert self._staged is not None
        return self._staged.result

    def exchange_weights(self) -> None:
        """Put the staged weights in place, and those in service where they were: a second call undoes it."""
        assert self._staged is not None
        self._staged.exchange()

    def drop_staged_weights(self) -> None:
        """Free what is not in service."""
        self._staged = None


class _Staged:
    """A second set of a model's parameters, filled by a thread of low priority."""

    def __init__(self, model: Any, directory: Path) -> None:
        self.result: dict[str, str] | str | None = None
        self._model = model
        self._directory = directory
        # Each parameter with what is to stand in its place.
        self._parameters: list[tuple[Any, Any]] = []

    def start(self) -> None:
        threading.Thread(target=self._run, name="stage-weights", daemon=True).start()

    def exchange(self) -> None:
        if not isinstance(self.result, dict):
            raise RuntimeError("nothing is staged")
        parameters = self._parameters
        self._parameters = [(parameter, parameter.data) for parameter, _ in parameters]
        for parameter, data in parameters:
            parameter.data = data

    def _run(self) -> None:
        import torch

        # Only this thread: vLLM has bound the worker to one core, and its steps must go first.
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS)
        os.sched_setaffinity(own, range(os.cpu_count() or 1))
        try:
            with torch.no_grad():
                self.result = self._fill()
        # Whatever goes wrong, the server is told and the weights in service are untouched.
        except Exception as error:
            self.result = str(error) or repr(error)

    def _fill(self) -> dict[str, str]:
        wanted: dict[str, list[Any]] = {}
        for name, _, _, parameter in held_tensors(self._model):
            wanted.setdefault(name, []).append(parameter)
        found: dict[str, str] = {}
        places = wanted.keys() | {part for name in wanted for part in parts_of(name)}
        for name, tensor in checkpoint_tensors(self._directory):
            if name not in places and not any(part in name for part in _PASSED_OVER):
                raise ValueError(f"the model in service has no place for {name}")
            for parameter in wanted.pop(name, []):
                found[name] = self._stage(name, tensor, parameter)
        if wanted:
            raise ValueError(f"the checkpoint has no {min(wanted)}")
        return found

    def _stage(self, name: str, tensor: Any, parameter: Any) -> str:
        """Make what will stand in for one parameter; returns its digest."""
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, the model in service {tuple(parameter.shape)}"
            raise ValueError(f"{name} has the shape {shapes}")
        # A copy: what safetensors gives may be the file itself, mapped into memory.
        data = tensor.to(parameter.dtype, copy=True)
        # Tied layers share a parameter, which is staged once.
        if all(parameter is not staged for staged, _ in self._parameters):
            self._parameters.append((parameter, data))
        return tensor_digest(name, data)


def _can_stage(model: Any, directory: Path) -> bool:
    needed = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    if psutil.virtual_memory().available < 2 * needed:
        return False
    for _, module, own, parameter in held_tensors(model):
        # When a thread packed and proved layers beside the model at work, numbers were spoiled at random:
        # most likely vLLM's packed products share memory. They are reloaded during the pause.
        if parameter.device.type != "cpu" or is_packed(module, own) or not parameter.numel():
            return False
    return True
