"""`instructloop fix` waits for the version that passed its case: while it is on trial, until it serves."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from instructloop.fix import NotFixed, wait_until_served
from registry.registry import Registry, Replica, Track

NEW = "policy-0001"


def report(registry: Registry, actual: str, track: Track = "stable") -> None:
    registry.report(Replica("one", desired=actual, actual=actual, state="serving", track=track))


class Told:
    """What was told; `on_trial` is set when it was that the version is on trial."""

    def __init__(self) -> None:
        self.steps: dict[str, str] = {}
        self.on_trial = threading.Event()

    def __call__(self, step: str, what: str) -> None:
        self.steps[step] = what
        if step == "on trial":
            self.on_trial.set()


@contextmanager
def once_on_trial(told: Told, act: Callable[[], object]) -> Iterator[None]:
    """Do `act` in another thread as soon as it was told that the version is on trial."""

    def run() -> None:
        assert told.on_trial.wait(30)
        act()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()


def test_a_trial_is_told_of_and_waited_for(registry: Registry) -> None:
    report(registry, "policy-0000")
    registry.canary(NEW, 0.25, actor="round 1", reason="it passed")
    told = Told()

    def promote() -> None:
        registry.promote(NEW, actor="rule", reason="its votes")
        report(registry, NEW)

    with once_on_trial(told, promote):
        assert wait_until_served(registry, NEW, told).actual == NEW
    assert told.steps["on trial"] == f"{NEW} as a canary (0.25), until its users' votes decide"
    assert told.steps["serving"].startswith(f"{NEW} on one")


def test_a_trial_that_is_ended_is_no_fix(registry: Registry) -> None:
    report(registry, "policy-0000")
    registry.canary(NEW, 0.25, actor="round 1", reason="it passed")
    told = Told()

    def withdraw() -> None:
        registry.withdraw(actor="rule", reason="its votes")

    with (
        once_on_trial(told, withdraw),
        pytest.raises(NotFixed, match=f"{NEW} passes the case, but policy-0000 is to serve since"),
    ):
        wait_until_served(registry, NEW, told)
    assert "serving" not in told.steps


def test_a_replica_that_only_serves_the_trial_s_users_is_not_enough(registry: Registry) -> None:
    registry.canary(NEW, 0.25, actor="round 1", reason="it passed")
    report(registry, NEW, track="trial")
    told = Told()

    def withdraw() -> None:
        registry.withdraw(actor="rule", reason="its votes")

    with once_on_trial(told, withdraw), pytest.raises(NotFixed):
        wait_until_served(registry, NEW, told)


def test_a_replica_that_can_t_load_it_says_why(registry: Registry) -> None:
    registry.promote(NEW, actor="round 1", reason="it passed")
    registry.report(Replica("one", desired=NEW, actual="policy-0000", state="failed", detail="norm is a NaN"))
    with pytest.raises(NotFixed, match="one can't load it: norm is a NaN"):
        wait_until_served(registry, NEW, Told())
