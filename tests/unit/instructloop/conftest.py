"""An installation of two versions, of which the first serves, as the commands find it."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from instructloop import installation
from instructloop.config import Config, load
from registry.registry import Registry


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSTRUCTLOOP_DATA_DIR", str(tmp_path / "data"))
    return load()


@pytest.fixture
def engine(config: Config) -> sa.Engine:
    return installation.open_database(config)


@pytest.fixture
def registry(config: Config, engine: sa.Engine, tmp_path: Path) -> Registry:
    registry = installation.open_registry(config, engine)
    for number in range(2):
        staging = tmp_path / f"staging-{number}"
        staging.mkdir()
        (staging / "model.safetensors").write_bytes(bytes([number]))
        registry.publish(staging, parent=None, round_id=None, kind="test", details={})
    registry.promote("policy-0000", actor="setup", reason="")
    return registry
