"""The version log's meaning, against Hypothesis: an obvious model that keeps a list of who served."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.registry import LogEntry
from registry.states import ACTIONS, Fleet, IllegalTransition, apply, fold

VERSIONS = ["policy-0000", "policy-0001", "policy-0002", "policy-0003"]
MOVES = st.lists(st.tuples(st.sampled_from([*ACTIONS, "canonised"]), st.sampled_from(VERSIONS)), max_size=40)


class Slow:
    """What operators expect, written down move by move without any cleverness."""

    def __init__(self) -> None:
        self.state: dict[str, str] = {}
        self.history: list[str] = []

    def move(self, action: str, version: str) -> bool:
        state = self.state.get(version)
        if action == "published" and state is None:
            self.state[version] = "candidate"
            return True
        if action == "promoted" and state in ("candidate", "retired"):
            self.history.append(version)
            self._serve(version)
            return True
        if self._may_be_ruled_out(action, version):
            self.state[version] = action
            return True
        if action == "rolled_back" and self.history:
            for back in range(len(self.history) - 2, -1, -1):
                if self.state[self.history[back]] == "retired":
                    if self.history[back] != version:
                        return False
                    self.history = self.history[: back + 1]
                    self._serve(version)
                    return True
        return False

    def _may_be_ruled_out(self, action: str, version: str) -> bool:
        state = self.state.get(version)
        if action == "pruned":
            below = [name for name in self.history[:-1] if self.state[name] == "retired"]
            return state in ("candidate", "retired", "rejected") and [version] != below[-1:]
        return action == "rejected" and state in ("candidate", "retired")

    def _serve(self, version: str) -> None:
        for name, state in self.state.items():
            if state == "serving":
                self.state[name] = "retired"
        self.state[version] = "serving"


@given(MOVES)
def test_the_fold_does_what_the_slow_model_does(moves: list[tuple[str, str]]) -> None:
    fleet, slow, log = Fleet(), Slow(), []
    for action, version in moves:
        if slow.move(action, version):
            log.append(LogEntry(fleet.sequence + 1, 0.0, "me", action, version, ""))
            fleet = apply(fleet, action, version)
        else:
            with pytest.raises(IllegalTransition):
                apply(fleet, action, version)
        assert fleet.states == slow.state
    assert fold(log) == fleet


@given(MOVES)
def test_at_most_one_serves_and_it_is_the_desired_one(moves: list[tuple[str, str]]) -> None:
    fleet = Fleet()
    for action, version in moves:
        before = fleet
        try:
            fleet = apply(fleet, action, version)
        except IllegalTransition:
            continue
        serving = [name for name, state in fleet.states.items() if state == "serving"]
        assert serving == ([fleet.serving] if fleet.serving else [])
        # Once something serves, something always does; and no move brings back what was ruled out.
        assert fleet.serving or not before.serving
        for name, state in before.states.items():
            if state in ("rejected", "pruned"):
                assert fleet.states[name] in (state, "pruned")
        assert (fleet.desired_sequence == fleet.sequence) == (action in ("promoted", "rolled_back"))


def test_rolling_back_twice_goes_two_versions_back() -> None:
    fleet = Fleet()
    for name in VERSIONS[:3]:
        fleet = apply(apply(fleet, "published", name), "promoted", name)
    assert fleet.rollback_target == VERSIONS[1]
    fleet = apply(fleet, "rolled_back", VERSIONS[1])
    assert fleet.rollback_target == VERSIONS[0]
    fleet = apply(fleet, "rolled_back", VERSIONS[0])
    assert (fleet.serving, fleet.rollback_target) == (VERSIONS[0], None)


def test_rollback_passes_over_a_version_that_was_rejected_since() -> None:
    fleet = Fleet()
    for name in VERSIONS[:3]:
        fleet = apply(apply(fleet, "published", name), "promoted", name)
    fleet = apply(fleet, "rejected", VERSIONS[1])
    assert fleet.rollback_target == VERSIONS[0]


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("published", "already"),
        ("promoted", "serving"),
        ("rejected", "serving"),
        ("rolled_back", "before"),
        ("pruned", "serves"),
    ],
)
def test_a_refusal_says_why(action: str, says: str) -> None:
    fleet = apply(apply(Fleet(), "published", "policy-0000"), "promoted", "policy-0000")
    with pytest.raises(IllegalTransition, match=says):
        apply(fleet, action, "policy-0000")
    with pytest.raises(IllegalTransition, match="not been published"):
        apply(fleet, "promoted", "policy-0009")
