"""Proves which weights an engine holds, by fingerprints of the engine's tensors and of a checkpoint's files.

vLLM's own weight checksums are not enough on a CPU: there it packs the matrices of linear layers into a
kernel's format and leaves empty tensors behind, whose checksums never change. So a packed layer is asked
to multiply unit vectors, which reads columns of its matrix back exactly, and these are compared instead.
It decides nothing and loads nothing into engines; `server` and `evaluation.sampler` do.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLUMNS = 16
"""How many columns of a packed matrix are read back; a layer is loaded as a whole or not at all."""

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's fused layers and the checkpoint's layers whose rows they stack, in order."""


_OUTPUT = "lm_head.weight"

_ARCHITECTURE = (
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
    "tie_word_embeddings",
)
"""The keys of config.json that say how an engine is built. It is built once: weights change, it does not."""


class WeightProof:
    """Runs inside vLLM's worker, which it becomes a part of through `registry.worker`."""

    model_runner: Any

    def refresh_packed_weights(self) -> None:
        """Pack again what vLLM's reload forgets, after it.

        An output layer that is tied to the embeddings is not in the checkpoint, so `reload_weights` passes it
        over; on a CPU it would go on multiplying by the packed copy of the weights that were loaded first.
        """
        for _, module in self.model_runner.get_model().named_modules():
            weight = getattr(module, "weight", None)
            if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def weight_fingerprint(self) -> dict[str, str]:
        """SHA-256 by tensor: all of a plain parameter, `name#columns` of what a packed layer multiplies by.

        Raises ValueError naming the first tensor that holds a NaN or an infinity.
        """
        import torch

        found: dict[str, str] = {}
        known: dict[int, str] = {}  # tied layers share a parameter
        with torch.inference_mode():
            for name, module, own, parameter in held_tensors(self.model_runner.get_model()):
                if parameter.numel():
                    if id(parameter) not in known:
                        known[id(parameter)] = tensor_digest(name, parameter)
                    found[name] = known[id(parameter)]
                if is_packed(module, own):
                    found[columns_name(name)] = packed_digest(name, module, input_width(module))
        return found


def held_tensors(model: Any) -> Iterator[tuple[str, Any, str, Any]]:
    """Each parameter of a model in vLLM, packed ones too: whole name, module, name there, parameter."""
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            yield f"{name}.{own}" if name else own, module, own, parameter


def is_packed(module: Any, own: str) -> bool:
    """Whether the layer multiplies by a packed copy of its parameter `own`."""
    return own == "weight" and input_width(module) is not None and hasattr(module, "cpu_linear")


def columns_name(name: str) -> str:
    """Name the columns that a packed tensor is read back by."""
    return f"{name}#columns"


def digest(fingerprint: Mapping[str, str]) -> str:
    """One SHA-256 over a whole fingerprint."""
    return hashlib.sha256(json.dumps(sorted(fingerprint.items())).encode()).hexdigest()


def checkpoint_fingerprint(
    directory: Path, dtype: str, names: Collection[str] | None = None
) -> dict[str, str]:
    """Compute what an engine of one rank reports when it holds this checkpoint in `dtype` (`bfloat16`).

    It has an entry for each tensor, each fused layer and a tied output layer, in both forms; which of them
    an engine reports depends on the model and the processor, and with `names` only those are computed.
    Raises ValueError naming a tensor that is not finite, also one without a name among them.
    """
    import torch

    target = getattr(torch, dtype)
    found: dict[str, str] = {}
    for name, tensor in checkpoint_tensors(directory):
        cast = tensor.to(target)
        _require_finite(name, cast)
        forms = {name: cast}
        if cast.ndim == 2:
            forms[columns_name(name)] = _columns(cast)
        found |= {key: _sha256(form) for key, form in forms.items() if names is None or key in names}
    return found


def difference(held: Path, other: Path) -> str | None:
    """Say in which way checkpoint `other` is another model than `held`: the first that is found, or None.

    What the configuration says of the architecture, and the shapes of the tensors that both have.
    Raises ValueError for a file that can't be read.
    """
    configs = [json.loads((directory / "config.json").read_text()) for directory in (held, other)]
    for key in _ARCHITECTURE:
        mine, theirs = (config.get(key) for config in configs)
        if mine != theirs and None not in (mine, theirs):
            return f"{key} is {theirs}, not {mine}"
    shapes = shapes_of(held)
    for name, shape in shapes_of(other).items():
        if shapes.get(name, shape) != shape:
            return f"{name} has the shape {shape}, not {shapes[name]}"
    return None


def shapes_of(directory: Path) -> dict[str, list[int]]:
    """Read the shape of each tensor from the headers of the files."""
    found: dict[str, list[int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with _opened(file) as opened:
            found |= {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file. Raises ValueError naming it if it is none, or not all of one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{file.name} can't be read: {error}") from error


def parts_of(fused: str) -> list[str]:
    """Name the tensors of a checkpoint that an engine holds as the one named `fused`; none for another."""
    return [
        fused.replace(f".{layer}.", f".{part}.")
        for layer, parts in _FUSED.items()
        if f".{layer}." in fused
        for part in parts
    ]


def checkpoint_tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """Each tensor of the checkpoint, a tied output layer, each fused layer; one in memory at a time."""
    import torch

    where: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with _opened(file) as opened:
            where |= dict.fromkeys(opened.keys(), file)
    for name, file in where.items():
        with _opened(file) as opened:
            yield name, opened.get_tensor(name)
    embeddings = [name for name in where if name.endswith("embed_tokens.weight")]
    if len(embeddings) == 1 and _OUTPUT not in where:
        with _opened(where[embeddings[0]]) as opened:
            yield _OUTPUT, opened.get_tensor(embeddings[0])
    for fused, parts in _FUSED.items():
        for first in [name for name in where if f".{parts[0]}." in name]:
            names = [first.replace(f".{parts[0]}.", f".{part}.") for part in parts]
            if all(name in where for name in names):
                pieces = []
                for name in names:
                    with _opened(where[name]) as opened:
                        pieces.append(opened.get_tensor(name))
                yield first.replace(f".{parts[0]}.", f".{fused}."), torch.cat(pieces)


def _positions(width: int) -> list[int]:
    count = min(COLUMNS, width)
    return [i * width // count for i in range(count)]


def _columns(weight: Any) -> Any:
    """(N, K) -> (COLUMNS, N): evenly spaced columns of a plain matrix."""
    return weight[:, _positions(weight.shape[1])].T


def input_width(module: Any) -> Any:
    """How many inputs (K) a linear or output layer of vLLM takes; None for other modules."""
    return getattr(module, "input_size_per_partition", None) or getattr(module, "embedding_dim", None)


def packed_digest(name: str, module: Any, width: int) -> str:
    """Digest (COLUMNS, N) of a matrix that only exists packed, by multiplying unit vectors of `width`."""
    import torch

    chosen = _positions(width)
    units = torch.zeros(len(chosen), width, dtype=module.weight.dtype)
    units[range(len(chosen)), chosen] = 1
    return tensor_digest(name, module.cpu_linear(units, module.weight, None))


def tensor_digest(name: str, tensor: Any) -> str:
    """SHA-256 of a tensor's values. Raises ValueError if one is not finite, with `name`."""
    tensor = tensor.detach().cpu()
    _require_finite(name, tensor)
    return _sha256(tensor)


def _require_finite(name: str, tensor: Any) -> None:
    import torch

    # One that is not finite makes the sum so too, which is a tenth of the work of looking at each.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds a NaN or an infinity")


def _sha256(tensor: Any) -> str:
    import torch

    # Adding zero makes -0 and +0 the same: a multiplication can't tell them apart.
    plain = (tensor + 0).contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().data).hexdigest()
