import os
import stat
from pathlib import Path

import pytest

from instructloop import installation, model
from instructloop.config import Config
from instructloop.installation import DataLock, InstallationProblem


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(data_dir=tmp_path / "data")


def test_the_secret_is_made_once_and_is_private(config: Config) -> None:
    secret = installation.ensure_secret(config.data_dir)
    assert len(secret) == installation.SECRET_BYTES
    assert installation.ensure_secret(config.data_dir) == secret
    assert stat.S_IMODE((config.data_dir / "secret").stat().st_mode) == 0o600
    assert [path.name for path in config.data_dir.iterdir()] == ["secret"]


def test_the_secret_of_the_environment_wins(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_SECRET", "ab" * 32)
    assert installation.ensure_secret(config.data_dir) == bytes([0xAB]) * 32
    assert not (config.data_dir / "secret").exists()


@pytest.mark.parametrize("given", ["not hexadecimal", "abcd"])
def test_a_weak_secret_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("INSTRUCTLOOP_SECRET", given)
    with pytest.raises(InstallationProblem, match="INSTRUCTLOOP_SECRET"):
        installation.ensure_secret(config.data_dir)


def test_one_up_a_data_directory(config: Config) -> None:
    lock = DataLock.take(config.data_dir)
    with pytest.raises(InstallationProblem, match=f"process {os.getpid()}"):
        DataLock.take(config.data_dir)
    lock.release()
    DataLock.take(config.data_dir).release()


def test_the_lock_outlives_its_owner_in_a_child(config: Config) -> None:
    lock = DataLock.take(config.data_dir)
    in_child = os.dup(lock.descriptor)  # as inherited over a fork
    lock.release()
    with pytest.raises(InstallationProblem):
        DataLock.take(config.data_dir)
    os.close(in_child)
    DataLock.take(config.data_dir).release()


def staged(config: Config) -> None:
    directory = installation.staging(config)
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_bytes(b"weights")


def test_the_first_version_is_published_and_serves(config: Config) -> None:
    registry = installation.open_registry(config, installation.open_database(config))
    staged(config)
    assert installation.ensure_serving(config, registry) == "policy-0000"
    assert registry.version("policy-0000").state == "serving"
    assert registry.version("policy-0000").manifest.details["base"] == model.DEFAULT_NAME
    assert not installation.staging(config).exists()
    # A second start has nothing staged and leaves things as they are.
    assert installation.ensure_serving(config, registry) == "policy-0000"
    assert len(registry.log()) == 2


def test_a_start_cut_short_after_publishing_goes_on(config: Config) -> None:
    registry = installation.open_registry(config, installation.open_database(config))
    staged(config)
    registry.publish(installation.staging(config), parent=None, round_id=None, kind="base", details={})
    assert registry.desired() is None
    assert installation.ensure_serving(config, registry) == "policy-0000"


def test_the_first_keys_are_shown_once(config: Config) -> None:
    from feedback.keys import Keys

    engine = installation.open_database(config)
    first = installation.ensure_keys(engine)
    assert first is not None
    for secret, role in ((first.operator, "operator"), (first.client, "client")):
        key = Keys(engine).verify(secret)
        assert key is not None
        assert key.role == role
    assert installation.ensure_keys(engine) is None
