"""The policy as a trainable model: how it is read, adapted, frozen and written.

Owns the model's precision, its LoRA adapter and the form in which weights leave the trainer. What is learned
is each stage's own. One that is divided among processes (`training/sharding.py`) is written whole.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from evaluation.reward_model import ATTENTION, DEVICE
from registry.precision import matrix_dtype
from training import processes, sharding

Policy: TypeAlias = PreTrainedModel | PeftModel


def load_policy(directory: Path, device: torch.device = DEVICE) -> PreTrainedModel:
    """Read a language model for training: float32 weights, which mixed precision may multiply as bfloat16."""
    return AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation=ATTENTION
    ).to(device)


def with_adapter(model: PreTrainedModel, rank: int) -> PeftModel:
    """Freeze the model and put LoRA adapters of this rank on all its linear layers but the output.

    W + (alpha / rank) B A with alpha = 2 rank; B starts at zero (Hu et al. 2021, arXiv 2106.09685).
    """
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    freeze(adapted.get_base_model())
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapted


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model for forward passes only; under mixed precision it computes exactly what the model does."""
    copy = deepcopy(model)
    freeze(copy)
    return copy


def freeze(model: nn.Module) -> None:
    """Make a model's weights constant, and its matrices what mixed precision makes them each pass."""
    model.requires_grad_(False)
    model.eval()
    dtype = getattr(torch, matrix_dtype())
    for name, module in list(model.named_modules()):
        # An adapter's matrices stay as they are: they are the ones that learn.
        if isinstance(module, nn.Linear) and "lora_" not in name:
            # A new parameter: an output layer tied to the embeddings must leave those in float32.
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)


def without_adapter(model: Policy) -> AbstractContextManager[None]:
    """Compute as before the adapter was put on: the reference policy of LoRA training."""
    return model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def trunk_and_head(model: Policy) -> tuple[Callable[..., Any], Callable[[Tensor], Tensor]]:
    """Return the decoder that gives hidden states, and the layer that turns them into logits."""
    return sharding.trunk_and_head(model.get_base_model() if isinstance(model, PeftModel) else model)


@torch.no_grad()  # type: ignore[untyped-decorator]
def merged_weights(model: Policy) -> Iterator[tuple[str, Tensor]]:
    """Name and whole value of each weight of the plain model, adapters added in; no tied output weights."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    adapted = {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}
    tied = getattr(inner.config, "tie_word_embeddings", False)
    for name, value in inner.state_dict().items():
        if "lora_" in name or (tied and name == "lm_head.weight"):
            continue
        plain = name.replace(".base_layer.", ".")
        layer = adapted.get(name.removesuffix(".base_layer.weight")) if plain != name else None
        if layer is not None and name.endswith(".weight"):
            yield plain, sharding.whole(value.float() + layer.get_delta_weight("default").float())
        else:
            yield plain, sharding.whole(value)


def write_checkpoint(model: Policy, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a Hugging Face directory of bfloat16 weights, as versions and engines want it.

    The weights are exactly those that bfloat16's mixed precision multiplies with in training (but for a LoRA
    adapter, whose product is added in before rounding). Every process comes here, and the first one writes.
    """
    weights = {}
    for name, value in merged_weights(model):
        if processes.is_first():
            weights[name] = value.to("cpu", torch.bfloat16).contiguous()
    if not processes.is_first():
        return
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    dtype = inner.config.dtype
    inner.config.dtype = torch.bfloat16
    inner.config.save_pretrained(directory)
    inner.config.dtype = dtype
    if inner.generation_config is not None:
        inner.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def read_weights(model: PreTrainedModel, directory: Path) -> None:
    """Give a plain model the weights that `write_checkpoint` left in `directory`."""
    missing, unexpected = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    # A tied output layer is not in the file: it is the embeddings, which are.
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"{directory} holds another model's weights: {[*missing, *unexpected][:3]}")
