"""When a replica swaps, what it proves, and what it does when something fails; on a real registry."""

import asyncio
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from registry import proof
from registry.registry import Desired, Registry, Replica, Track
from server.metrics import ServerMetrics
from server.swap import Failure, ProbeToken, Status, Swapper, UnprovenWeights, answers_alike, target

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
    answers: Callable[[dict[str, str]], list[ProbeToken]] | None = None

    async def probe(self) -> list[ProbeToken]:
        assert not self.paused
        return (
            self.answers(self.weights)
            if self.answers
            else [ProbeToken(hash(self.weights["a"]), -1.0, 2.0)] * 2
        )

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


def read(directory: Path, dtype: str, names: Collection[str] | None = None) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / "model.safetensors").read_text())
    if "nan" in found.values():
        raise ValueError("a holds a NaN or an infinity")
    return {name: value for name, value in found.items() if names is None or name in names}


def other_model(held: Path, other: Path) -> str | None:
    names = read(held, "bfloat16").keys(), read(other, "bfloat16").keys()
    return f"it has {sorted(names[1] - names[0])[0]}" if names[1] - names[0] else None


@dataclass
class Rig:
    engine: FakeEngine
    registry: Registry
    swapper: Swapper
    metrics: ServerMetrics

    def replica(self) -> Replica:
        return self.of("replica")

    def of(self, id: str) -> Replica:
        (found,) = [replica for replica in self.registry.replicas() if replica.id == id]
        return found

    async def another(self, id: str, track: Track = "stable") -> "Rig":
        """One more replica of the same registry."""
        engine = FakeEngine({"a": "a0", "b": "b0"})
        swapper = make(engine, self.registry, self.metrics, Replica(id, None, None, "starting", track=track))
        await swapper.begin(self.registry.version("policy-0000"))
        engine.calls.clear()
        return Rig(engine, self.registry, swapper, self.metrics)

    def promote(self, name: str) -> None:
        self.registry.promote(name, actor="test", reason="")


def make(engine: FakeEngine, registry: Registry, metrics: ServerMetrics, identity: Replica) -> Swapper:
    return Swapper(
        engine,
        registry,
        metrics,
        identity,
        watch_seconds=0.01,
        retry_seconds=3600,
        max_unavailable=1,
        fingerprint_checkpoint=read,
        difference=other_model,
    )


async def start(
    registry: Registry, publish: Callable[[str], str], metrics: ServerMetrics, *, packed: bool
) -> Rig:
    publish('{"a": "a0", "b": "b0"}')
    publish('{"a": "a1", "b": "b1"}')
    registry.promote("policy-0000", actor="test", reason="")
    engine = FakeEngine({"a": "a0", "b": "b0"}, packed=packed)
    swapper = make(engine, registry, metrics, Replica("replica", None, None, "starting"))
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


async def test_a_version_that_answers_in_another_way_than_before_is_taken_back(staging: Rig) -> None:
    staging.promote("policy-0001")
    await staging.swapper.step()
    staging.registry.rollback(actor="test", reason="")
    await staging.swapper.step()
    assert staging.replica().actual == "policy-0000"
    staging.engine.calls.clear()
    staging.engine.answers = lambda weights: [ProbeToken(7, -0.1, 5.0)] * 2
    staging.promote("policy-0001")
    await staging.swapper.step()
    assert staging.engine.calls[-5:] == ["pause", "load policy-0000", "reset", "label policy-0000", "resume"]
    assert staging.engine.weights == {"a": "a0", "b": "b0"}
    assert (staging.replica().state, staging.replica().actual) == ("failed", "policy-0000")
    assert "answers in another way" in staging.replica().detail
    assert staging.swapper.obstacle() is None


async def test_a_version_whose_answers_are_no_numbers_is_taken_back(rig: Rig) -> None:
    rig.engine.answers = lambda weights: [ProbeToken(0, float("nan"), float("nan"))]
    rig.promote("policy-0001")
    await rig.swapper.step()
    assert (rig.replica().state, rig.replica().actual) == ("failed", "policy-0000")
    assert "no numbers" in rig.replica().detail


@pytest.mark.parametrize(
    ("found", "alike"),
    [
        ([(5, -0.1, 3.0), (6, -1.0, 0.2)], True),
        ([(5, -0.15, 2.9), (6, -1.1, 0.1)], True),  # rounded otherwise
        ([(5, -0.1, 3.0), (9, -1.1, 0.1)], True),  # a near tie fell otherwise
        ([(9, -0.1, 3.0), (6, -1.0, 0.2)], False),
        ([(5, -0.1, 3.0), (9, -0.2, 2.0)], False),
        ([(5, -0.9, 3.0), (6, -1.0, 0.2)], False),
    ],
)
def test_which_answers_are_alike(found: list[tuple[int, float, float]], alike: bool) -> None:
    known = [ProbeToken(5, -0.1, 3.0), ProbeToken(6, -1.0, 0.2)]
    assert answers_alike(known, [ProbeToken(*one) for one in found]) is alike


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


@pytest.mark.parametrize("loads", [True, False])
async def test_what_is_asked_for_during_a_swap_is_answered_after_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    rig.promote("policy-0001")
    if not loads:
        rig.engine.tampers = [lambda before: {"a": "a1"}, lambda before: {"a": "a1"}]
    pausing, going_on, pause = asyncio.Event(), asyncio.Event(), rig.engine.pause

    async def slow_pause() -> None:
        await pause()
        pausing.set()
        await going_on.wait()

    monkeypatch.setattr(rig.engine, "pause", slow_pause)
    swapping = asyncio.create_task(rig.swapper.step())
    await pausing.wait()
    # A balancer goes on sending requests; they wait.
    assert rig.swapper.obstacle() is None
    asked = asyncio.create_task(rig.swapper.obstacle_at_rest())
    await asyncio.sleep(0.05)
    assert not asked.done()
    going_on.set()
    await swapping
    assert (await asked is None) == loads
    assert (rig.swapper.status.serving == "policy-0001") == loads


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


async def test_another_architecture_or_a_missing_tensor_never_reaches_the_engine(
    rig: Rig, publish: Callable[[str], str]
) -> None:
    for weights, why in (
        ('{"a": "a2", "b": "b2", "c": "c2"}', "not the model that this engine was built for: it has c"),
        ('{"a": "a2"}', "lacks b"),
    ):
        rig.promote(publish(weights))
        await rig.swapper.step()
        assert rig.engine.calls == []
        assert (rig.replica().state, rig.replica().actual) == ("failed", "policy-0000")
        assert why in rig.replica().detail


async def test_a_replica_waits_its_turn_and_takes_it_without_checking_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = await rig.another("second")
    rig.promote("policy-0001")
    pausing, going_on = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        second.engine.paused = True
        pausing.set()
        await going_on.wait()

    monkeypatch.setattr(second.engine, "pause", pause)
    swapping = asyncio.create_task(second.swapper.step())
    await pausing.wait()
    assert (rig.of("second").state, rig.of("second").detail) == ("swapping", "loading policy-0001")
    for _ in range(3):
        await rig.swapper.step()
    assert rig.engine.calls == []
    waiting = rig.replica()
    assert (waiting.state, waiting.actual) == ("serving", "policy-0000")
    assert waiting.detail == "waiting for its turn to load policy-0001"
    going_on.set()
    await swapping
    # Whole when it was looked at: what is loaded is compared with that in any case.
    monkeypatch.setattr(rig.registry, "verify", lambda name: pytest.fail("it was checked already"))
    await rig.swapper.step()
    assert [rig.of(id).actual for id in ("replica", "second")] == ["policy-0001"] * 2
    assert rig.replica().detail == ""


async def test_a_replica_that_serves_nobody_does_not_wait_for_a_turn(rig: Rig) -> None:
    rig.promote("policy-0001")
    rig.engine.tampers = [lambda before: {"a": "a1"}, lambda before: {"a": "a1"}]
    await rig.swapper.step()
    assert rig.swapper.obstacle() is not None
    assert rig.registry.begin_swap(Replica("second", None, None, "swapping"), 1, 30)
    rig.registry.rollback(actor="test", reason="")
    await rig.swapper.step()
    assert rig.swapper.obstacle() is None
    assert rig.replica().actual == "policy-0000"


async def test_the_track_of_a_trial_follows_it_and_goes_back(rig: Rig) -> None:
    trial = await rig.another("trial", "trial")
    rig.registry.canary("policy-0001", 0.1, actor="test", reason="")
    for one in (rig, trial):
        await one.swapper.step()
    assert [rig.of(id).actual for id in ("replica", "trial")] == ["policy-0000", "policy-0001"]
    rig.registry.withdraw(actor="test", reason="")
    await trial.swapper.step()
    assert (rig.of("trial").actual, rig.of("trial").track) == ("policy-0000", "trial")


async def test_a_version_on_trial_that_can_not_be_loaded_is_told_and_the_stable_one_stays(
    rig: Rig, publish: Callable[[str], str]
) -> None:
    trial = await rig.another("trial", "trial")
    name = publish('{"a": "nan", "b": "b2"}')
    rig.registry.canary(name, 0.1, actor="test", reason="")
    await trial.swapper.step()
    found = rig.of("trial")
    assert (found.state, found.actual, found.desired) == ("failed", "policy-0000", name)
    assert "NaN" in found.detail
    assert trial.swapper.obstacle() is None


async def test_a_replica_is_heard_of_while_it_loads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.swap.HEARTBEAT_SECONDS", 0.02)
    rig.promote("policy-0001")
    seen: list[float] = []

    async def load_slowly(model_dir: Path) -> None:
        rig.engine.weights = read(model_dir, "bfloat16")
        while len(set(seen)) < 3:
            await asyncio.sleep(0.01)
            assert rig.replica().state == "swapping"
            seen.append(rig.replica().seen_at)

    monkeypatch.setattr(rig.engine, "load", load_slowly)
    running = asyncio.create_task(rig.swapper.run())
    async with asyncio.timeout(20):
        while not rig.registry.replicas() or rig.replica().state != "serving":
            await asyncio.sleep(0.01)
    running.cancel()
    assert rig.replica().actual == "policy-0001"
