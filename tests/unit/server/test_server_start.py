"""Which version a replica starts on, and where others find it; on a real registry."""

from collections.abc import Callable

import pytest

from registry.registry import Registry
from server.app import NothingToServe, address, first_whole
from server.settings import ServerSettings

Publish = Callable[[str], str]


def proven(registry: Registry, name: str) -> str:
    registry.annotate(name, metrics={"engine_sha256_fake-tp1": "held once"})
    return name


@pytest.fixture
def served(registry: Registry, publish: Publish) -> Registry:
    """Two versions that have served one after the other, and a third that no engine has held."""
    for weights in ("old", "new", "candidate"):
        publish(weights)
    for name in ("policy-0000", "policy-0001"):
        registry.promote(proven(registry, name), actor="test", reason="")
    return registry


def test_the_very_first_is_started_on_unproven(registry: Registry, publish: Publish) -> None:
    with pytest.raises(NothingToServe):
        first_whole(registry, "stable")
    registry.promote(publish("first"), actor="test", reason="")
    assert first_whole(registry, "stable").name == "policy-0000"


def test_each_track_starts_on_its_version_once_an_engine_has_held_it(served: Registry) -> None:
    assert first_whole(served, "trial").name == "policy-0001"
    served.canary("policy-0002", 0.1, actor="test", reason="")
    # From the stable one it swaps to what is on trial, which can be refused while it serves on.
    assert first_whole(served, "trial").name == "policy-0001"
    proven(served, "policy-0002")
    assert first_whole(served, "trial").name == "policy-0002"
    assert first_whole(served, "stable").name == "policy-0001"


def test_a_broken_or_unproven_one_is_passed_by(served: Registry) -> None:
    served.promote("policy-0002", actor="test", reason="")
    assert first_whole(served, "stable").name == "policy-0001", "nobody has held policy-0002"
    (served.version("policy-0001").path / "model.safetensors").write_text("torn")
    assert first_whole(served, "stable").name == "policy-0000"
    (served.version("policy-0000").path / "model.safetensors").write_text("torn")
    assert first_whole(served, "stable").name == "policy-0002", "better than nothing"
    (served.version("policy-0002").path / "model.safetensors").write_text("torn")
    with pytest.raises(NothingToServe, match="policy-0002 is broken"):
        first_whole(served, "stable")


def test_where_others_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-7")
    assert address(ServerSettings(port=9)) == "http://127.0.0.1:9"
    assert address(ServerSettings(host="0.0.0.0", port=9)) == "http://gpu-7:9"
    assert address(ServerSettings(host="fd00::7", port=9)) == "http://[fd00::7]:9"
    assert address(ServerSettings(host="0.0.0.0", url="https://one.internal/")) == "https://one.internal"
