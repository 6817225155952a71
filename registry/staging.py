"""Brings a checkpoint's weights into vLLM's worker beside those in service, to be put in place at once.

Reading, packing and proving a checkpoint takes as long as a reload, but it can be done while requests run.
What is left for the pause is to exchange references, forth and, if need be, back. It applies to a model
on a CPU whose every tensor is named and shaped as in the checkpoint (apart from `registry.proof`'s fused
layers), which the first fingerprint of a server shows; other engines reload. It imports no vLLM.
"""

import math
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil

from registry.proof import (
    checkpoint_tensors,
    columns_name,
    held_tensors,
    input_width,
    is_packed,
    packed_digest,
    parts_of,
    shapes_of,
    tensor_digest,
)

_PASSED_OVER = ("rotary_emb.", "lm_head.")
"""What vLLM leaves aside in a checkpoint; it refuses to start on other tensors that it has no place for."""
_NICENESS = 5
"""How much the thread gives way to vLLM's; more would let a busy machine never come to it."""
_SLICE_SECONDS = 0.03
"""For about how long layers are packed between two of the engine's steps."""


class WeightStaging:
    """Mixed into vLLM's worker through `registry.worker`; at most one checkpoint is staged at a time."""

    model_runner: Any
    _staged: "_Staged | None" = None

    def stage_weights(self, directory: str) -> bool:
        """Begin to stage a checkpoint and return at once; False where this engine can only reload."""
        model = self.model_runner.get_model()
        # What a compiled graph multiplies by is not ours to exchange.
        eager = self.model_runner.model_config.enforce_eager
        if not _can_stage(model, Path(directory), eager=eager):
            return False
        self._staged = _Staged(model, Path(directory))
        self._staged.start()
        return True

    def staged_fingerprint(self) -> dict[str, str] | str | None:
        """Pack some of what has been read; return what `weight_fingerprint` will say once all is, else None.

        A text says why they can't be staged: a tensor that is missing, unknown, misshapen or not finite.
        """
        assert self._staged is not None
        return self._staged.advance()

    def exchange_weights(self) -> None:
        """Put the staged weights in place, and those in service where they were: a second call undoes it."""
        assert self._staged is not None
        self._staged.exchange()

    def drop_staged_weights(self) -> None:
        """Free what is not in service."""
        self._staged = None


class _Staged:
    """A second set of a model's weights: a thread of low priority reads it, the caller's own packs it.

    Packed layers are multiplied in memory that the model at work uses too (vLLM gives oneDNN one scratchpad
    for all), so the two may not do it at the same time.
    """

    def __init__(self, model: Any, directory: Path) -> None:
        self._model = model
        self._directory = directory
        self._found: dict[str, str] = {}
        self._failure: str | None = None
        self._read = False
        # Each parameter with what is to stand in its place; each packed layer with what it is to multiply by.
        self._parameters: list[tuple[Any, Any]] = []
        self._products: list[tuple[Any, Any]] = []
        self._to_pack: deque[tuple[str, Any, Any]] = deque()

    def start(self) -> None:
        threading.Thread(target=self._run, name="stage-weights", daemon=True).start()

    def advance(self) -> dict[str, str] | str | None:
        """Pack for a slice of time; the whole fingerprint, or why there will be none, or None."""
        import torch

        deadline = time.monotonic() + _SLICE_SECONDS
        with torch.inference_mode():
            while self._failure is None and self._to_pack:
                try:
                    self._pack(*self._to_pack.popleft())
                except Exception as error:
                    self._failure = str(error) or repr(error)
                if time.monotonic() >= deadline:
                    break
        return self._failure or (self._found if self._complete() else None)

    def exchange(self) -> None:
        if self._failure is not None or not self._complete():
            raise RuntimeError("nothing is staged")
        parameters, products = self._parameters, self._products
        self._parameters = [(parameter, parameter.data) for parameter, _ in parameters]
        self._products = [(module, module.cpu_linear) for module, _ in products]
        for parameter, data in parameters:
            parameter.data = data
        for module, product in products:
            module.cpu_linear = product

    def _complete(self) -> bool:
        # In this order: once all has been read, nothing is added to what is to be packed.
        return self._read and not self._to_pack

    def _run(self) -> None:
        import torch

        # Only this thread: vLLM has bound the worker to one core, and its steps must go first.
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS)
        os.sched_setaffinity(own, range(os.cpu_count() or 1))
        try:
            with torch.no_grad():
                self._fill()
            self._read = True
        # Whatever goes wrong, the server is told and the weights in service are untouched.
        except Exception as error:
            self._failure = str(error) or repr(error)

    def _fill(self) -> None:
        wanted = {
            name: (module, own, parameter) for name, module, own, parameter in held_tensors(self._model)
        }
        places = wanted.keys() | {part for name in wanted for part in parts_of(name)}
        for name, tensor in checkpoint_tensors(self._directory):
            if name not in places and not any(part in name for part in _PASSED_OVER):
                raise ValueError(f"the model in service has no place for {name}")
            if name in wanted:
                self._stage(name, tensor, *wanted.pop(name))
        if wanted:
            raise ValueError(f"the checkpoint has no {min(wanted)}")

    def _stage(self, name: str, tensor: Any, module: Any, own: str, parameter: Any) -> None:
        """Make what will stand in for one parameter; its packed form is left to `advance`."""
        shape = tuple(parameter.shape) if parameter.numel() else (_output_width(module), input_width(module))
        if tuple(tensor.shape) != shape:
            shapes = f"{tuple(tensor.shape)}, the model in service {shape}"
            raise ValueError(f"{name} has the shape {shapes}")
        # A copy: what safetensors gives may be the file itself, mapped into memory.
        data = tensor.to(parameter.dtype, copy=True)
        if parameter.numel():
            self._found[name] = tensor_digest(name, data)
            # Tied layers share a parameter, which is staged once.
            if all(parameter is not staged for staged, _ in self._parameters):
                self._parameters.append((parameter, data))
        if is_packed(module, own):
            self._to_pack.append((name, module, data))

    def _pack(self, name: str, module: Any, data: Any) -> None:
        """Let vLLM pack a matrix as it would for `module`, and read it back."""
        from torch import nn

        layer = nn.Module()
        layer.weight = nn.Parameter(data, requires_grad=False)
        module.quant_method.process_weights_after_loading(layer)
        self._found[columns_name(name)] = packed_digest(name, layer, input_width(module))
        self._products.append((module, layer.cpu_linear))


def _can_stage(model: Any, directory: Path, *, eager: bool) -> bool:
    held = list(held_tensors(model))
    if any(parameter.device.type != "cpu" for *_, parameter in held):
        return False
    for _, module, own, parameter in held:
        packed = is_packed(module, own)
        if (packed and not eager) or not (parameter.numel() or packed):
            return False
    # What has been read and not been packed yet stands there twice.
    width = max(parameter.dtype.itemsize for *_, parameter in held)
    needed = width * sum(math.prod(shape) for shape in shapes_of(directory).values())
    return bool(psutil.virtual_memory().available >= 2 * needed)


def _output_width(module: Any) -> Any:
    """How many outputs (N) a linear or output layer of vLLM has."""
    return getattr(module, "output_size_per_partition", None) or module.num_embeddings_per_partition
