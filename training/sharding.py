"""Models divided among the processes of a round: each holds a share of every weight (PyTorch's FSDP2).

Owns which parts of a model are gathered together, and the way from shares to whole tensors and back. With the
weights their gradients, optimiser states and averages are divided, too. Whether models are to be divided is
`training/processes.py`'s; where they are not, everything here leaves things as they are.

All processes have to come to a divided model together: to each of its passes, and to `whole` and `gathered`.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from training import processes

Part = Callable[..., Any]


def shard(*models: PreTrainedModel | PeftModel | None) -> None:
    """Divide the models' weights in place; optimisers have to be made afterwards.

    A layer is gathered for its passes and given up after them, and so is what stands outside of the layers
    (embeddings, last norm, output). Gradients are summed over the processes as each pass ends. Weights may be
    on the CPU before: a layer at a time goes to this process's device.
    """
    if not processes.sharded():
        return
    for model in models:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        if inner is None or isinstance(inner, FSDPModule):
            continue
        for module in list(inner.modules()):
            if type(module).__name__ in inner._no_split_modules:
                fully_shard(module)
        fully_shard(inner, reshard_after_forward=True)
        for module in inner.modules():
            if isinstance(module, FSDPModule):
                # Each process weighs its losses by their share already: sums, not means.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        if inner.get_output_embeddings() is not None:
            _let_parts_be_called(inner)


def _let_parts_be_called(model: PreTrainedModel) -> None:
    """Make `trunk_and_head` possible: what the two share (tied weights) belongs to the model around them."""
    trunk, head = model.base_model, model.get_output_embeddings()
    model.sharded_trunk = trunk.__call__
    model.sharded_head = head.__call__
    register_fsdp_forward_method(model, "sharded_trunk")
    register_fsdp_forward_method(model, "sharded_head")


def trunk_and_head(model: PreTrainedModel) -> tuple[Part, Part]:
    """Return the decoder that gives hidden states, and the layer that turns them into logits."""
    if isinstance(model, FSDPModule):
        return model.sharded_trunk, model.sharded_head
    return model.base_model, model.get_output_embeddings()


def outline(model: nn.Module) -> nn.Module:
    """Copy a model without its weights, for `filled` after it was divided: that can't be undone."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def filled(empty: nn.Module, model: nn.Module) -> nn.Module:
    """Give an outline the weights of its model; a model that is not divided is returned as it is."""
    if not isinstance(model, FSDPModule):
        return model
    weights = {name: whole(value.detach()) for name, value in model.state_dict().items()}
    empty.load_state_dict(weights, assign=True)
    return empty.train(model.training)


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or the whole of which it is a share."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """Return nested containers with whole tensors for the shares: on the first process's CPU, else None."""

    def gather(share: DTensor) -> Tensor | None:
        full = whole(share.detach())
        return full.cpu() if processes.is_first() else None

    return tree_map_only(DTensor, gather, state)


def as_shared(like: Tensor, tensor: Tensor) -> Tensor:
    """Return the share of a whole tensor that this process holds of `like`."""
    if not isinstance(like, DTensor):
        return tensor
    # Every process has the whole already: nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_state(saved: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Divide what `gathered` made of an optimiser's state as its parameters are divided, in their order."""
    states = {
        index: {
            name: as_shared(parameters[index], value) if value.shape == parameters[index].shape else value
            for name, value in state.items()
        }
        for index, state in saved["state"].items()
    }
    return {**saved, "state": states}


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to a common norm of at most `limit`; returns the norm before, (), whole."""
    groups: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in group])) for group in groups.values()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm
