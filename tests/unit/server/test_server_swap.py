"""When a replica swaps, what it proves, and what it does when something fails; on a real registry."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from registry import proof
from registry.registry import Desired, Registry, Replica
from server.metrics import ServerMetrics
from server.swap import Failure, Status, Swapper, UnprovenWeights, target

SERVING = Status(serving="policy-0000")


@pytest.mark.parametrize(
    ("desired", "status", "now", "expected"),
    [
        (None, SERVING, 0, None),
        (Desired("policy-0000", 1), SERVING, 0, None),
        (Desired("policy-0001", 2), SERVING, 0, "policy-0001"),
        (Desired("policy-0001", 2), Status("policy-0000", failure=Failure(2, 100, "x")), 129, None),
        (Desired("policy-0001", 2), Status("policy-0000", failure=Failure(2, 100, "x")), 130, "policy-0001"),
        (Desired("policy-0001", 3), Status("policy-0000", failure=Failure(2, 100, "x")), 101, "policy-0001"),
        (Desired("policy-0000", 3), Status("policy-0000", failure=Failure(2, 100, "x")), 500, None),
        (Desired("policy-0000", 1), Status("policy-0000", proven=False), 0, "policy-0000"),
    ],
)
def test_what_to_load(desired: Desired | None, status: Status, now: float, expected: str | None) -> None:
    assert target(desired, status, now=now, retry_seconds=30) == expected


@dataclass
class FakeEngine:
    """Holds a checkpoint's tensors (JSON in its weights file); `tampers` change what a load leaves.

    With `packed` it has a tensor that no file proves, so it can't stage.
    """

    weights: dict[str, str]
    dtype: str = "bfloat16"
    topology: str = "fake-tp1"
    ranks: int = 1
    calls: list[str] = field(default_factory=list)
    tampers: list[Callable[[dict[str, str]], dict[str, str]]] = field(default_factory=list)
    paused: bool = False
    labelled: str = ""
    packed: bool = True
    staged: dict[str, str] | None = None
    architecture: str | None = None

    async def check(self, model_dir: Path) -> None:
        if self.architecture is not None:
            raise ValueError(self.architecture)

    async def stage(self, model_dir: Path) -> dict[str, str] | None:
        assert not self.paused
        self.calls.append(f"stage {model_dir.name}")
        self.staged = read(model_dir, "bfloat16")
        if self.tampers:
            self.staged = self.tampers.pop(0)(self.weights)
        return self.staged

    async def exchange(self) -> None:
        assert self.paused
        assert self.staged is not None
        self.calls.append("exchange")
        self.weights, self.staged = self.staged, self.weights

    async def unstage(self) -> None:
        self.staged = None

    async def pause(self) -> None:
        self.paused = True
        self.calls.append("pause")

    async def resume(self) -> None:
        self.paused = False
        self.calls.append("resume")

    async def load(self, model_dir: Path) -> None:
        assert self.paused
        self.calls.append(f"load {model_dir.name}")
        before = self.weights
        self.weights = read(model_dir, "bfloat16")
        if self.tampers:
            self.weights = self.tampers.pop(0)(before)

    async def fingerprint(self) -> dict[str, str]:
        return {**self.weights, "packed": "always the same"} if self.packed else self.weights

    async def reset_caches(self) -> None:
        assert self.paused
        self.calls.append("reset")

    async def label(self, version: str) -> None:
        self.labelled = version
        self.calls.append(f"label {version}")


def read(directory: Path, dtype: str) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / "model.safetensors").read_text())
    if "nan" in found.values():
        raise ValueError("a holds a NaN or an infinity")
    return found


@dataclass
class Rig:
    engine: FakeEngine
    registry: Registry
    swapper: Swapper
    metrics: ServerMetrics

    def replica(self) -> Replica:
        (found,) = self.registry.replicas()
        return found

    def promote(self, name: str) -> None:
        self.registry.promote(name, actor="test", reason="")


async def start(
    registry: Registry, publish: Callable[[str], str], metrics: ServerMetrics, *, packed: bool
) -> Rig:
    publish('{"a": "a0", "b": "b0"}')
    publish('{"a": "a1", "b": "b1"}')
    registry.promote("policy-0000", actor="test", reason="")
    engine = FakeEngine({"a": "a0", "b": "b0"}, packed=packed)
    identity = Replica("replica", None, None, "starting")
    swapper = Swapper(
        engine,
        registry,
        metrics,
        identity,
        watch_seconds=0.01,
        retry_seconds=3600,
        fingerprint_checkpoint=read,
    )
    await swapper.begin(registry.version("policy-0000"))
    engine.calls.clear()
    return Rig(engine, registry, swapper, metrics)


@pytest.fixture
async def rig(registry: Registry, publish: Callable[[str], str], metrics: ServerMetrics) -> Rig:
    """A replica that can only load a version in place of the one in service."""
    return await start(registry, publish, metrics, packed=True)


@pytest.fixture
async def staging(registry: Registry, publish: Callable[[str], str], metrics: ServerMetrics) -> Rig:
    """A replica that can hold a version beside the one in service."""
    return await start(registry, publish, metrics, packed=False)


async def test_where_it_can_a_replica_proves_before_generation_stops(staging: Rig) -> None:
    staging.promote("policy-0001")
    await staging.swapper.step()
    assert staging.engine.calls == [
        "stage policy-0001",
        "pause",
        "exchange",
        "reset",
        "label policy-0001",
        "resume",
    ]
    assert staging.engine.weights == {"a": "a1", "b": "b1"}
    assert staging.engine.staged is None
    assert (staging.replica().state, staging.replica().actual) == ("serving", "policy-0001")


async def test_what_is_wrong_with_staged_weights_never_stops_generation(staging: Rig) -> None:
    def broken(before: dict[str, str]) -> dict[str, str]:
        raise ValueError("a has the shape (3,), the model in service (4,)")

    for number, (tamper, because) in enumerate(
        [
            (broken, "a has the shape"),
            (lambda before: {"a": "a1", "b": before["b"]}, "b in the engine is not that of the checkpoint"),
        ]
    ):
        staging.promote("policy-0001")
        staging.engine.tampers = [tamper]
        await staging.swapper.step()
        assert staging.engine.calls == ["stage policy-0001"] * (number + 1)
        assert because in staging.replica().detail
        assert (staging.replica().state, staging.replica().actual) == ("failed", "policy-0000")
        assert staging.engine.staged is None
        staging.registry.rollback(actor="test", reason="")


async def test_an_exchange_that_fails_half_way_ends_on_the_last_good_version(staging: Rig) -> None:
    async def half_way() -> None:
        staging.engine.weights = {"a": "a1", "b": "b0"}
        raise RuntimeError("out of memory")

    staging.promote("policy-0001")
    staging.engine.exchange = half_way  # type: ignore[method-assign]
    await staging.swapper.step()
    assert staging.engine.calls == [
        "stage policy-0001",
        "pause",
        "load policy-0000",
        "reset",
        "label policy-0000",
        "resume",
    ]
    assert staging.engine.weights == {"a": "a0", "b": "b0"}
    assert (staging.replica().state, staging.replica().actual) == ("failed", "policy-0000")
    assert staging.swapper.obstacle() is None


async def test_another_architecture_is_refused_before_the_engine_is_touched(rig: Rig) -> None:
    rig.engine.architecture = "another architecture: rope_theta is 10, in the model in service 20"
    rig.promote("policy-0001")
    await rig.swapper.step()
    assert rig.engine.calls == []
    assert "rope_theta" in rig.replica().detail


async def test_a_checkpoint_that_lacks_a_tensor_is_refused_before_the_engine_is_touched(
    rig: Rig, publish: Callable[[str], str]
) -> None:
    rig.promote(publish('{"a": "a2"}'))
    await rig.swapper.step()
    assert rig.engine.calls == []
    assert "policy-0002 lacks b" in rig.replica().detail


async def test_nothing_wanted_nothing_done(rig: Rig) -> None:
    await rig.swapper.step()
    assert rig.engine.calls == []
    assert (rig.replica().state, rig.replica().actual) == ("serving", "policy-0000")


async def test_a_promotion_is_followed_in_this_order(rig: Rig) -> None:
    rig.promote("policy-0001")
    await rig.swapper.step()
    assert rig.engine.calls == ["pause", "load policy-0001", "reset", "label policy-0001", "resume"]
    found = rig.replica()
    assert (found.state, found.actual, found.desired) == ("serving", "policy-0001", "policy-0001")
    assert found.last_swap_seconds is not None
    assert rig.swapper.obstacle() is None
    rig.registry.rollback(actor="test", reason="")
    await rig.swapper.step()
    assert rig.replica().actual == "policy-0000"
    assert rig.engine.weights == {"a": "a0", "b": "b0"}


async def test_a_torn_version_is_refused_before_generation_stops(rig: Rig) -> None:
    rig.promote("policy-0001")
    (rig.registry.version("policy-0001").path / "model.safetensors").write_text('{"a": "a1", "b": "?"}')
    await rig.swapper.step()
    assert rig.engine.calls == []
    found = rig.replica()
    assert (found.state, found.actual, found.desired) == ("failed", "policy-0000", "policy-0001")
    assert "model.safetensors" in found.detail
    await rig.swapper.step()
    assert rig.engine.calls == []
    assert rig.metrics.registry.get_sample_value("instructloop_swaps_total", {"outcome": "failed"}) == 1


async def test_a_nan_is_refused_before_generation_stops(rig: Rig, publish: Callable[[str], str]) -> None:
    name = publish('{"a": "nan", "b": "b2"}')
    rig.promote(name)
    await rig.swapper.step()
    assert rig.engine.calls == []
    assert "NaN" in rig.replica().detail


async def test_mixed_weights_are_found_and_the_last_good_version_comes_back(rig: Rig) -> None:
    rig.promote("policy-0001")
    rig.engine.tampers = [lambda before: {"a": "a1", "b": before["b"]}]
    await rig.swapper.step()
    assert rig.engine.calls[:3] == ["pause", "load policy-0001", "load policy-0000"]
    assert rig.engine.calls[-1] == "resume"
    assert rig.engine.labelled == "policy-0000"
    assert rig.engine.weights == {"a": "a0", "b": "b0"}
    found = rig.replica()
    assert (found.state, found.actual) == ("failed", "policy-0000")
    assert "b in the engine is not that of the checkpoint" in found.detail
    assert rig.swapper.obstacle() is None
    # An operator who wants the old version again ends the failure.
    rig.registry.rollback(actor="test", reason="")
    await rig.swapper.step()
    assert rig.replica().state == "serving"


async def test_a_load_that_did_nothing_is_found(rig: Rig) -> None:
    rig.promote("policy-0001")
    rig.engine.tampers = [lambda before: before]
    await rig.swapper.step()
    assert rig.replica().state == "failed"
    assert rig.swapper.status.serving == "policy-0000"


async def test_when_nothing_can_be_loaded_nobody_is_let_in_until_something_can(rig: Rig) -> None:
    rig.promote("policy-0001")
    rig.engine.tampers = [lambda before: {"a": "a1"}, lambda before: {"a": "a1"}]
    await rig.swapper.step()
    assert not rig.engine.paused
    found = rig.replica()
    assert (found.state, found.actual) == ("failed", None)
    assert rig.swapper.obstacle() is not None
    rig.registry.rollback(actor="test", reason="")
    await rig.swapper.step()
    assert rig.swapper.obstacle() is None
    assert (rig.replica().state, rig.replica().actual) == ("serving", "policy-0000")


async def test_an_error_of_the_engine_is_survived(rig: Rig) -> None:
    def broken(before: dict[str, str]) -> dict[str, str]:
        raise RuntimeError("shape mismatch")

    rig.promote("policy-0001")
    rig.engine.tampers = [broken]
    await rig.swapper.step()
    assert "shape mismatch" in rig.replica().detail
    assert rig.engine.weights == {"a": "a0", "b": "b0"}
    assert not rig.engine.paused


async def test_what_no_file_proves_is_compared_with_earlier_loads(rig: Rig) -> None:
    key = "engine_sha256_fake-tp1"
    known = rig.registry.version("policy-0000").manifest.metrics[key]
    assert known == proof.digest({"a": "a0", "b": "b0", "packed": "always the same"})
    rig.registry.annotate("policy-0001", metrics={key: "what another replica saw"})
    rig.promote("policy-0001")
    await rig.swapper.step()
    assert "other weights when it was loaded before" in rig.replica().detail
    assert rig.swapper.status.serving == "policy-0000"


async def test_a_start_on_other_weights_than_before_is_refused(rig: Rig) -> None:
    rig.engine.weights = {"a": "a0", "b": "flipped"}
    with pytest.raises(UnprovenWeights):
        await rig.swapper.begin(rig.registry.version("policy-0000"))
