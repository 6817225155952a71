"""Weights come in beside those in service, proven, and the two are exchanged at once, forth and back."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_proof import Model, engine_fingerprint, tensors

from registry.proof import checkpoint_fingerprint
from registry.staging import WeightStaging


def worker_with(held: dict[str, torch.Tensor], *, packed: bool, eager: bool = True) -> WeightStaging:
    model = Model(held, packed=packed)
    worker = WeightStaging()
    config = SimpleNamespace(enforce_eager=eager)
    worker.model_runner = SimpleNamespace(get_model=lambda: model, model_config=config)
    return worker


def checkpoint(directory: Path, seed: int, *, packed: bool, **changes: torch.Tensor | None) -> Path:
    """Write what fits the model; the test's unpacked one has no embeddings."""
    held = tensors(seed) | changes
    if not packed:
        del held["embed_tokens.weight"]
    save_file(
        {name: value for name, value in held.items() if value is not None}, directory / "model.safetensors"
    )
    return directory


def staged(worker: WeightStaging, directory: Path) -> dict[str, str] | str:
    assert worker.stage_weights(str(directory))
    deadline = time.monotonic() + 30
    while (found := worker.staged_fingerprint()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_an_exchange_puts_the_proven_weights_in_place_and_a_second_the_old_ones(
    tmp_path: Path, packed: bool
) -> None:
    worker = worker_with(tensors(0), packed=packed)
    model = worker.model_runner.get_model()
    checkpoint(tmp_path, 1, packed=packed)
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


@pytest.mark.parametrize("packed", [False, True])
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
    tmp_path: Path, name: str, change: torch.Tensor | None, because: str, packed: bool
) -> None:
    worker = worker_with(tensors(0), packed=packed)
    model = worker.model_runner.get_model()
    checkpoint(tmp_path, 1, packed=packed, **{name: change})
    old = engine_fingerprint(model)
    found = staged(worker, tmp_path)
    assert isinstance(found, str)
    with pytest.raises(ValueError, match=because):
        raise ValueError(found)
    with pytest.raises(RuntimeError, match="nothing is staged"):
        worker.exchange_weights()
    assert engine_fingerprint(model) == old


def test_a_packed_layer_that_is_not_finite_is_named(tmp_path: Path) -> None:
    worker = worker_with(tensors(0), packed=True)
    broken = torch.full((12, 40), torch.inf)
    checkpoint(tmp_path, 1, packed=True, **{"attention.o_proj.weight": broken})
    assert staged(worker, tmp_path) == "attention.o_proj.weight holds a NaN or an infinity"
    with pytest.raises(RuntimeError, match="nothing is staged"):
        worker.exchange_weights()


def test_layers_are_packed_by_the_caller_one_slice_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_with(tensors(0), packed=True)
    model = worker.model_runner.get_model()
    threads: list[int] = []
    for layer in (model.attention.qkv_proj, model.attention.o_proj, model.lm_head):

        def noting(
            stand_in: torch.nn.Module, pack: Any = layer.quant_method.process_weights_after_loading
        ) -> None:
            threads.append(threading.get_ident())
            pack(stand_in)

        layer.quant_method.process_weights_after_loading = noting
    # So short that each slice has one layer.
    monkeypatch.setattr("registry.staging._SLICE_SECONDS", 0.0)
    assert worker.stage_weights(str(checkpoint(tmp_path, 1, packed=True)))
    deadline = time.monotonic() + 30
    while True:
        before, found = len(threads), worker.staged_fingerprint()
        assert len(threads) <= before + 1
        if found is not None:
            break
        assert time.monotonic() < deadline
    assert isinstance(found, dict)
    assert threads == [threading.get_ident()] * 3


def test_packed_layers_of_a_compiled_model_can_only_be_reloaded(tmp_path: Path) -> None:
    worker = worker_with(tensors(0), packed=True, eager=False)
    assert not worker.stage_weights(str(checkpoint(tmp_path, 1, packed=True)))
