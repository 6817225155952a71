"""A registry on a real SQLite file, as the application opens it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from instructloop.database import connect
from registry.registry import Registry
from registry.tables import METADATA


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = connect(f"sqlite:///{tmp_path}/store.db")
    METADATA.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def registry(engine: sa.Engine, tmp_path: Path) -> Registry:
    return Registry(engine, tmp_path / "versions")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Makes a staging directory whose weights are the given bytes."""
    made = iter(range(1000))

    def make(weights: bytes = b"weights") -> Path:
        directory = tmp_path / f"staging-{next(made)}"
        (directory / "onnx").mkdir(parents=True)
        (directory / "model.safetensors").write_bytes(weights)
        (directory / "config.json").write_text("{}")
        (directory / "onnx" / "extra.bin").write_bytes(b"\0\1")
        return directory

    return make
