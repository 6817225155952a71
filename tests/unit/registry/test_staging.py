"""Weights come in beside those in service, proven, and the two are exchanged at once, forth and back."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_proof import Model, engine_fingerprint, tensors

from registry.proof import checkpoint_fingerprint
from registry.staging import WeightStaging


def worker_with(held: dict[str, torch.Tensor], *, packed: bool = False) -> WeightStaging:
    model = Model(held, packed=packed)
    worker = WeightStaging()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    return worker


def staged(worker: WeightStaging, directory: Path) -> dict[str, str] | str:
    assert worker.stage_weights(str(directory))
    deadline = time.monotonic() + 30
    while (found := worker.staged_fingerprint()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_an_exchange_puts_the_proven_weights_in_place_and_a_second_the_old_ones(tmp_path: Path) -> None:
    worker = worker_with(tensors(0))
    model = worker.model_runner.get_model()
    new = tensors(1)
    del new["embed_tokens.weight"]  # as this model has none
    save_file(new, tmp_path / "model.safetensors")
    old = engine_fingerprint(model)
    found = staged(worker, tmp_path)
    assert engine_fingerprint(model) == old
    expected = checkpoint_fingerprint(tmp_path, "bfloat16")
    assert found == {name: expected[name] for name in old}
    worker.exchange_weights()
    assert engine_fingerprint(model) == found
    worker.exchange_weights()
    assert engine_fingerprint(model) == old
    worker.exchange_weights()
    worker.drop_staged_weights()
    assert engine_fingerprint(model) == found


@pytest.mark.parametrize(
    ("name", "change", "because"),
    [
        ("attention.o_proj.weight", None, "has no attention.o_proj.weight"),
        ("attention.q_proj.weight", None, "has no attention.qkv_proj.weight"),
        ("attention.o_proj.weight", torch.zeros(12, 41), r"o_proj.weight has the shape \(12, 41\)"),
        ("attention.v_proj.weight", torch.zeros(13, 40), r"qkv_proj.weight has the shape \(37, 40\)"),
        ("another.weight", torch.zeros(40), "no place for another.weight"),
        ("norm.weight", torch.zeros(39), r"norm.weight has the shape \(39,\)"),
        ("norm.weight", torch.full((40,), torch.nan), "norm.weight holds a NaN"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    tmp_path: Path, name: str, change: torch.Tensor | None, because: str
) -> None:
    worker = worker_with(tensors(0))
    model = worker.model_runner.get_model()
    wrong = tensors(1)
    del wrong["embed_tokens.weight"]
    if change is None:
        del wrong[name]
    else:
        wrong[name] = change
    save_file(wrong, tmp_path / "model.safetensors")
    old = engine_fingerprint(model)
    found = staged(worker, tmp_path)
    assert isinstance(found, str)
    with pytest.raises(ValueError, match=because):
        raise ValueError(found)
    with pytest.raises(RuntimeError, match="nothing is staged"):
        worker.exchange_weights()
    assert engine_fingerprint(model) == old


def test_packed_layers_can_only_be_reloaded(tmp_path: Path) -> None:
    worker = worker_with(tensors(0), packed=True)
    save_file(tensors(1), tmp_path / "model.safetensors")
    assert not worker.stage_weights(str(tmp_path))
