"""A checkpoint's fingerprint equals that of an engine that holds it, packed or not, and no other's."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from registry.proof import WeightProof, checkpoint_fingerprint, difference, digest

N, K = 12, 40


class Layer(nn.Module):
    """Like vLLM's linear layers on a CPU: the matrix is inside `cpu_linear`, the parameter empty."""

    def __init__(self, weight: torch.Tensor, *, packed: bool) -> None:
        super().__init__()
        self.output_size_per_partition, self.input_size_per_partition = weight.shape
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        if packed:
            self.quant_method = SimpleNamespace(process_weights_after_loading=partial(pack, empty=True))
            pack(self, empty=True)


def pack(layer: nn.Module, *, empty: bool) -> None:
    """As vLLM does it, which keeps nothing of a linear layer's own matrix."""
    held = layer.weight.clone()
    layer.cpu_linear = lambda x, _, bias: nn.functional.linear(x, held, bias)
    if empty:
        layer.weight = nn.Parameter(torch.empty(0, dtype=held.dtype), requires_grad=False)


class Head(nn.Module):
    """Like vLLM's tied output layer on a CPU: it shares a parameter and multiplies by a packed copy of it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.embedding_dim = weight.shape[1]
        self.weight = weight
        self.quant_method = SimpleNamespace(process_weights_after_loading=partial(pack, empty=False))
        pack(self, empty=False)


class Model(nn.Module):
    def __init__(self, tensors: dict[str, torch.Tensor], *, packed: bool) -> None:
        super().__init__()
        cast = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(cast["norm.weight"], requires_grad=False)
        self.attention = nn.Module()
        fused = torch.cat([cast[f"attention.{part}_proj.weight"] for part in "qkv"])
        self.attention.qkv_proj = Layer(fused, packed=packed)
        self.attention.o_proj = Layer(cast["attention.o_proj.weight"], packed=packed)
        if packed:
            self.embed_tokens = nn.Module()
            self.embed_tokens.weight = nn.Parameter(cast["embed_tokens.weight"], requires_grad=False)
            self.lm_head = Head(self.embed_tokens.weight)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"attention.{part}_proj.weight" for part in "qkvo"]
    found = {name: torch.randn(N, K, generator=generator) for name in names}
    found["attention.q_proj.weight"][0, 0] = -0.0
    embeddings = torch.randn(3 * N, K, generator=generator)
    return found | {"norm.weight": torch.randn(K, generator=generator), "embed_tokens.weight": embeddings}


def engine_fingerprint(model: nn.Module) -> dict[str, str]:
    worker = WeightProof()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    return worker.weight_fingerprint()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("files", [1, 2])
def test_an_engine_that_holds_the_checkpoint_agrees_with_it(tmp_path: Path, packed: bool, files: int) -> None:
    held = tensors(0)
    names = sorted(held)
    for i in range(files):
        save_file({name: held[name] for name in names[i::files]}, tmp_path / f"model-{i}.safetensors")
    found = engine_fingerprint(Model(held, packed=packed))
    suffix = "#columns" if packed else ""
    matrices = {f"attention.{name}_proj.weight{suffix}" for name in ("qkv", "o")}
    tied = {"embed_tokens.weight", "lm_head.weight", "lm_head.weight#columns"} if packed else set()
    assert found.keys() == matrices | {"norm.weight"} | tied
    expected = checkpoint_fingerprint(tmp_path, "bfloat16")
    assert found == {name: expected[name] for name in found}


@pytest.mark.parametrize("packed", [False, True])
def test_one_layer_of_other_weights_is_noticed(tmp_path: Path, packed: bool) -> None:
    held = tensors(0)
    save_file(held, tmp_path / "model.safetensors")
    expected = checkpoint_fingerprint(tmp_path, "bfloat16")
    for name in ("attention.v_proj.weight", "attention.o_proj.weight", "norm.weight"):
        found = engine_fingerprint(Model(held | {name: tensors(1)[name]}, packed=packed))
        assert sum(found[key] != expected[key] for key in found) == 1, name


def test_a_tied_output_layer_that_was_not_packed_again_is_noticed_and_refreshed(tmp_path: Path) -> None:
    old, new = tensors(0), tensors(1)
    save_file(new, tmp_path / "model.safetensors")
    expected = checkpoint_fingerprint(tmp_path, "bfloat16")
    model = Model(new | {"embed_tokens.weight": old["embed_tokens.weight"]}, packed=True)
    model.embed_tokens.weight.data.copy_(new["embed_tokens.weight"])
    found = engine_fingerprint(model)
    assert [name for name in found if found[name] != expected[name]] == ["lm_head.weight#columns"]
    worker = WeightProof()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    worker.refresh_packed_weights()
    found = engine_fingerprint(model)
    assert found == {name: expected[name] for name in found}


def test_a_tiny_change_of_all_weights_is_noticed(tmp_path: Path) -> None:
    held = tensors(0)
    save_file(held, tmp_path / "model.safetensors")
    expected = checkpoint_fingerprint(tmp_path, "bfloat16")
    moved = {name: tensor * (1 + 2**-8) for name, tensor in held.items()}
    found = engine_fingerprint(Model(moved, packed=True))
    assert all(found[key] != expected[key] for key in found)


def test_of_a_checkpoint_only_what_is_asked_for_is_computed(tmp_path: Path) -> None:
    held = tensors(0)
    save_file(held, tmp_path / "model.safetensors")
    every = checkpoint_fingerprint(tmp_path, "bfloat16")
    names = {"norm.weight", "attention.qkv_proj.weight#columns", "of another model"}
    some = checkpoint_fingerprint(tmp_path, "bfloat16", names)
    assert some == {name: every[name] for name in names & every.keys()}
    assert len(some) == 2
    held["attention.o_proj.weight"][0, 0] = torch.nan
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"o_proj\.weight holds a NaN"):
        checkpoint_fingerprint(tmp_path, "bfloat16", names)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    held = tensors(0)
    held["attention.k_proj.weight"][3, 3] = bad
    save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"attention\.k_proj\.weight holds a NaN"):
        checkpoint_fingerprint(tmp_path, "bfloat16")
    with pytest.raises(ValueError, match=r"attention\.qkv_proj\.weight holds a NaN"):
        engine_fingerprint(Model(held, packed=False))


def test_the_digest_is_of_names_and_values_in_any_order() -> None:
    assert digest({"a": "1", "b": "2"}) == digest({"b": "2", "a": "1"})
    assert digest({"a": "1", "b": "2"}) != digest({"a": "2", "b": "1"})


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 40,
    "num_attention_heads": 4,
    "eos_token_id": 2,
}


def checkpoint(directory: Path, config: dict[str, object], **changed: torch.Tensor) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors(0) | changed, directory / "model.safetensors")
    return directory


def test_another_model_is_told_by_its_configuration_and_its_shapes(tmp_path: Path) -> None:
    held = checkpoint(tmp_path / "held", CONFIG)
    same = checkpoint(tmp_path / "same", CONFIG | {"eos_token_id": 7, "head_dim": 10}, extra=torch.ones(2))
    assert difference(held, same) is None
    # The same shapes, and yet other attention.
    heads = checkpoint(tmp_path / "heads", CONFIG | {"num_attention_heads": 8})
    assert difference(held, heads) == "num_attention_heads is 8, not 4"
    wide = checkpoint(tmp_path / "wide", CONFIG, **{"norm.weight": torch.ones(K + 1)})
    assert difference(held, wide) == f"norm.weight has the shape {[K + 1]}, not {[K]}"


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    held, torn = (checkpoint(tmp_path / name, CONFIG) for name in ("held", "torn"))
    with (torn / "model.safetensors").open("r+b") as file:
        file.truncate(200)
    for read in (lambda: difference(held, torn), lambda: checkpoint_fingerprint(torn, "bfloat16")):
        with pytest.raises(ValueError, match=r"model\.safetensors can't be read"):
            read()
