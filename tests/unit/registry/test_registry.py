"""Moves, replicas and the log over a real database, also with several processes at once."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from instructloop.database import connect
from registry.registry import BrokenVersion, IllegalTransition, Registry, Replica, UnknownVersion, Version

Make = Callable[..., Path]


@pytest.fixture
def three(registry: Registry, checkpoint: Make) -> Registry:
    for number in range(3):
        registry.publish(checkpoint(bytes([number])), parent=None, round_id=number, kind="ppo", details={})
    return registry


def test_promotions_and_rollbacks_change_what_is_desired(three: Registry) -> None:
    assert three.desired() is None
    three.promote("policy-0000", actor="up", reason="first")
    three.promote("policy-0001", actor="gate", reason="better")
    desired = three.desired()
    assert desired is not None
    assert (desired.name, desired.sequence) == ("policy-0001", 5)
    assert three.rollback(actor="ann", reason="rude") == "policy-0000"
    assert [version.state for version in three.versions()] == ["serving", "retired", "candidate"]
    three.reject("policy-0002", actor="gate", reason="worse")
    # A rejection changes nothing about who serves, so replicas must not see a new wish.
    desired = three.desired()
    assert desired is not None
    assert (desired.name, desired.sequence) == ("policy-0000", 6)
    last = three.log(2)
    assert [(entry.actor, entry.action, entry.version, entry.reason) for entry in last] == [
        ("ann", "rolled_back", "policy-0000", "rude"),
        ("gate", "rejected", "policy-0002", "worse"),
    ]


def test_a_trial_is_what_its_track_should_serve(three: Registry) -> None:
    assert three.desired("trial") is None
    three.promote("policy-0000", actor="up", reason="first")
    assert three.trial() is None
    assert three.desired("trial") == three.desired()
    before = time.time()
    three.shadow("policy-0001", 1.0, actor="ann", reason="look")
    three.canary("policy-0001", 0.25, actor="ann", reason="try")
    trial, desired = three.trial(), three.desired("trial")
    assert trial is not None
    assert desired is not None
    assert (trial.version, trial.mode, trial.share, trial.former) == (
        "policy-0001",
        "canary",
        0.25,
        "candidate",
    )
    assert before <= trial.since <= time.time()
    assert (desired.name, desired.sequence) == ("policy-0001", trial.sequence) == ("policy-0001", 6)
    stable = three.desired("stable")
    assert stable is not None
    assert stable.name == "policy-0000"
    assert [entry.share for entry in three.log(3)] == [None, 1.0, 0.25]
    assert three.withdraw(actor="ann", reason="") == "policy-0001"
    assert (three.trial(), three.desired("trial")) == (None, stable)
    with pytest.raises(IllegalTransition, match="no version is on trial"):
        three.withdraw(actor="ann", reason="")


def test_a_version_with_broken_files_is_not_tried(three: Registry) -> None:
    three.promote("policy-0000", actor="up", reason="first")
    (three.version("policy-0001").path / "model.safetensors").write_bytes(b"torn")
    for attempt in (three.canary, three.shadow):
        with pytest.raises(BrokenVersion, match=r"model\.safetensors"):
            attempt("policy-0001", 0.5, actor="me", reason="")
        with pytest.raises(UnknownVersion):
            attempt("policy-0009", 0.5, actor="me", reason="")
    assert three.trial() is None


def test_pruning_spares_what_is_on_trial(three: Registry) -> None:
    three.promote("policy-0002", actor="up", reason="first")
    three.canary("policy-0000", 0.5, actor="me", reason="")
    assert three.prune(keep=0) == ["policy-0001"]
    three.withdraw(actor="me", reason="")
    assert three.prune(keep=0) == ["policy-0000"]


def test_moves_that_make_no_sense_are_refused_and_not_logged(three: Registry) -> None:
    three.promote("policy-0000", actor="me", reason="")
    three.reject("policy-0001", actor="me", reason="")
    length = len(three.log())
    with pytest.raises(IllegalTransition, match="no version served before"):
        three.rollback(actor="me", reason="")
    with pytest.raises(IllegalTransition, match="rejected"):
        three.promote("policy-0001", actor="me", reason="")
    for move in (three.promote, three.reject):
        with pytest.raises(IllegalTransition, match="serving"):
            move("policy-0000", actor="me", reason="")
        with pytest.raises(UnknownVersion, match="no version policy-0009"):
            move("policy-0009", actor="me", reason="")
    assert len(three.log()) == length


def test_of_operators_who_act_at_once_each_entry_follows_from_the_one_before(
    three: Registry, tmp_path: Path
) -> None:
    three.promote("policy-0000", actor="up", reason="")

    def promote(name: str) -> str | None:
        engine = connect(f"sqlite:///{tmp_path}/store.db")
        try:
            Registry(engine, tmp_path / "versions").promote(name, actor=name, reason="")
        except IllegalTransition:
            return None
        finally:
            engine.dispose()
        return name

    with ThreadPoolExecutor(8) as pool:
        done = [name for name in pool.map(promote, ["policy-0001", "policy-0002"] * 4) if name]
    log = three.log()
    assert [entry.sequence for entry in log] == list(range(1, len(log) + 1))
    # The fold would have refused a log in which a promotion meets a version that serves already.
    promoted = [entry.version for entry in log if entry.action == "promoted"]
    assert sorted(promoted[1:]) == sorted(done)
    assert {"policy-0001", "policy-0002"} <= set(done)
    desired = three.desired()
    assert desired is not None
    assert desired.name == promoted[-1]


def test_an_entry_that_came_in_between_makes_the_writer_look_again(
    three: Registry, engine: sa.Engine, tmp_path: Path
) -> None:
    """As on Postgres, where readers don't wait: the other process commits after our look at the log."""
    other = Registry(connect(f"sqlite:///{tmp_path}/store.db"), tmp_path / "versions")
    looks: list[int] = []
    entries = Registry._entries

    def meddled(connection: sa.Connection) -> object:
        found = entries(connection)
        looks.append(len(found))
        return found[:-1] if len(looks) == 1 else found

    other._entries = meddled  # type: ignore[method-assign, assignment]
    other._append(lambda _: ("promoted", "policy-0001"), "me", "")
    assert looks == [3, 3]
    assert [entry.sequence for entry in three.log()] == [1, 2, 3, 4]


def test_replicas_report_and_are_replaced_by_their_next_report(registry: Registry) -> None:
    before = time.time()
    registry.report(Replica("b", "policy-0001", None, "starting", pid=7, url="http://127.0.0.1:8001"))
    registry.report(Replica("a", "policy-0001", "policy-0000", "swapping"))
    registry.report(Replica("a", "policy-0001", "policy-0001", "serving", last_swap_seconds=0.6))
    first, second = registry.replicas()
    assert (first.id, first.actual, first.state, first.last_swap_seconds) == (
        "a",
        "policy-0001",
        "serving",
        0.6,
    )
    assert (second.pid, second.url) == (7, "http://127.0.0.1:8001")
    assert before <= second.seen_at <= first.seen_at <= time.time()
    registry.forget("a")
    assert [replica.id for replica in registry.replicas()] == ["b"]


def test_reading_does_not_wait_for_a_writer(three: Registry, engine: sa.Engine) -> None:
    three.promote("policy-0000", actor="me", reason="")
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM replicas"))
        started = time.monotonic()
        assert three.desired() is not None
        assert three.replicas() == []
    assert time.monotonic() - started < 5


def files_of(registry: Registry, name: str) -> set[str]:
    path = registry.version(name).path
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


WHOLE = {"manifest.json", "READY", "model.safetensors", "config.json", "onnx/extra.bin"}
BARE = {"manifest.json", "READY"}


@pytest.fixture
def many(registry: Registry, checkpoint: Make) -> Registry:
    """A base and eight candidates of rounds: 1 and 2 have served, 3 serves, 4 is rejected."""
    registry.publish(checkpoint(b"base"), parent=None, round_id=None, kind="base", details={})
    for number in range(1, 9):
        registry.publish(checkpoint(bytes([number])), parent=None, round_id=number, kind="ppo", details={})
    for number in (0, 1, 2, 3):
        registry.promote(f"policy-000{number}", actor="test", reason="")
    registry.reject("policy-0004", actor="test", reason="")
    return registry


def test_pruning_keeps_what_serves_what_may_serve_again_and_the_newest(many: Registry) -> None:
    many.report(Replica("r1", "policy-0003", "policy-0005", "swapping"))
    assert many.prune(2, spare={"policy-0004", None}) == ["policy-0001", "policy-0006"]
    assert {name: files_of(many, name) == WHOLE for name in [f"policy-000{i}" for i in range(9)]} == {
        "policy-0000": True,  # no round made it
        "policy-0001": False,
        "policy-0002": True,  # a rollback returns to it
        "policy-0003": True,  # serves
        "policy-0004": True,  # spared
        "policy-0005": True,  # a replica has it
        "policy-0006": False,
        "policy-0007": True,  # the two newest
        "policy-0008": True,
    }
    pruned = many.version("policy-0006")
    assert (pruned.state, files_of(many, "policy-0006")) == ("pruned", BARE)
    assert set(pruned.manifest.files) == WHOLE - BARE
    assert many.prune(2, spare={"policy-0004"}) == []
    many.rollback(actor="test", reason="")
    # The one before is gone, so a second rollback goes to the base.
    assert many.rollback(actor="test", reason="") == "policy-0000"


def test_a_pruned_version_never_serves_again_and_says_why(many: Registry) -> None:
    many.prune(1)
    for move in (many.promote, many.reject):
        with pytest.raises(
            (BrokenVersion, IllegalTransition), match="policy-0001 is pruned: its weights were"
        ):
            move("policy-0001", actor="test", reason="")
    with pytest.raises(BrokenVersion, match="pruned"):
        many.verify("policy-0001")


def test_a_prune_that_was_killed_leaves_nothing_to_promote_and_is_finished_by_the_next(
    many: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(path: Path, missing_ok: bool = False) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            many.prune(1)
    assert files_of(many, "policy-0001") == WHOLE
    with pytest.raises(BrokenVersion, match="pruned"):
        many.promote("policy-0001", actor="test", reason="")
    assert many.prune(1) == []
    assert files_of(many, "policy-0001") == BARE


def test_a_version_that_is_promoted_while_its_pruning_begins_is_kept(
    many: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = many.versions

    def promoted_meanwhile() -> list[Version]:
        found = versions()
        many.promote("policy-0001", actor="ann", reason="in between")
        return found

    monkeypatch.setattr(many, "versions", promoted_meanwhile)
    assert "policy-0001" not in many.prune(1)
    assert files_of(many, "policy-0001") == WHOLE
