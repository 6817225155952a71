"""The version log's meaning, against Hypothesis: an obvious model that keeps a list of who served."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from registry.registry import LogEntry
from registry.states import ACTIONS, Fleet, IllegalTransition, Trial, apply, fold

VERSIONS = ["policy-0000", "policy-0001", "policy-0002", "policy-0003"]
NAMES = st.sampled_from(VERSIONS)
SHARES = st.sampled_from([0.1, 0.5, 1.0])
MOVES = st.lists(
    st.tuples(
        st.sampled_from([*ACTIONS, "canonised"]),
        NAMES,
        st.sampled_from([None, None, 0.1, 0.5, 1.0, 0.0, -0.1, 1.1, float("nan")]),
    ),
    max_size=40,
)


class Slow:
    """What operators expect, written down move by move without any cleverness.

    `state` is what each version is or, for the one on trial, was before; `trial` its name, mode and share.
    """

    def __init__(self) -> None:
        self.state: dict[str, str] = {}
        self.history: list[str] = []
        self.trial: tuple[str, str, float] | None = None

    @property
    def seen(self) -> dict[str, str]:
        return self.state | ({self.trial[0]: self.trial[1]} if self.trial else {})

    def move(self, action: str, version: str, share: float | None) -> bool:
        """Make the move and return True, or return False if it is not allowed."""
        if action in ("canary", "shadow"):
            return self._try(action, version, share)
        if share is not None or action not in ACTIONS:
            return False
        if action == "published":
            new = version not in self.state
            self.state.setdefault(version, "candidate")
            return new
        if action == "rolled_back":
            return self._roll_back(version)
        return version in self.state and self._move(action, version)

    def _move(self, action: str, version: str) -> bool:
        tried = self.trial is not None and self.trial[0] == version
        allowed = self.state[version] in ("candidate", "retired")
        if action == "withdrawn":
            allowed = tried
        elif action == "pruned":
            below = [name for name in self.history[:-1] if self.state[name] == "retired"]
            allowed = (allowed or self.state[version] == "rejected") and not tried
            allowed = allowed and [version] != below[-1:]
        if allowed:
            if action == "promoted":
                self.history.append(version)
                self._serve(version)
            elif action != "withdrawn":
                self.state[version] = action
            self.trial = None if tried else self.trial
        return allowed

    def _roll_back(self, version: str) -> bool:
        for back in range(len(self.history) - 2, -1, -1):
            if self.state[self.history[back]] == "retired":
                if self.history[back] != version:
                    return False
                self.history = self.history[: back + 1]
                self._serve(version)
                return True
        return False

    def _try(self, mode: str, version: str, share: float | None) -> bool:
        if "serving" not in self.state.values() or share not in (0.1, 0.5, 1.0):
            return False
        if self.state.get(version) not in ("candidate", "retired"):
            return False
        if self.trial and self.trial[0] != version:
            return False
        self.trial = (version, mode, share)
        return True

    def _serve(self, version: str) -> None:
        self.trial = None
        for name, state in self.state.items():
            if state == "serving":
                self.state[name] = "retired"
        self.state[version] = "serving"


@given(MOVES)
def test_the_fold_does_what_the_slow_model_does(moves: list[tuple[str, str, float | None]]) -> None:
    fleet, slow = Fleet(), Slow()
    log: list[LogEntry] = []
    for action, version, share in moves:
        at = 1000.0 + len(log)
        if slow.move(action, version, share):
            log.append(LogEntry(fleet.sequence + 1, at, "me", action, version, "", share))
            fleet = apply(fleet, action, version, share=share, at=at)
        else:
            with pytest.raises(IllegalTransition):
                apply(fleet, action, version, share=share, at=at)
        assert fleet.states == slow.seen
        trial = fleet.trial
        assert (trial and (trial.version, trial.mode, trial.share)) == slow.trial
    assert fold(log) == fleet


class Rollout(RuleBasedStateMachine):
    """Operators, rounds and the rule act on a few versions; what must hold after each move is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = self.before = Fleet()
        self.log: list[LogEntry] = []

    def act(self, action: str, version: str, share: float | None = None) -> None:
        at = 1000.0 + len(self.log)
        try:
            after = apply(self.fleet, action, version, share=share, at=at)
        except IllegalTransition:
            return
        self.log.append(LogEntry(after.sequence, at, "me", action, version, "", share))
        self.before, self.fleet = self.fleet, after

    @rule(version=NAMES)
    def publish(self, version: str) -> None:
        self.act("published", version)

    @rule(version=NAMES, action=st.sampled_from(["promoted", "rejected", "pruned", "withdrawn"]))
    def move(self, action: str, version: str) -> None:
        self.act(action, version)

    @rule(version=NAMES, mode=st.sampled_from(["canary", "shadow"]), share=SHARES)
    def attempt(self, mode: str, version: str, share: float) -> None:
        self.act(mode, version, share)

    @rule()
    def roll_back(self) -> None:
        if self.fleet.rollback_target is not None:
            self.act("rolled_back", self.fleet.rollback_target)
            assert self.fleet is not self.before  # what is named as the target can be returned to

    @rule()
    def finish_the_trial(self) -> None:
        """Whatever is on trial can be promoted, as the rule does."""
        if self.fleet.trial is not None:
            name = self.fleet.trial.version
            self.act("promoted", name)
            assert self.fleet.serving == name

    @invariant()
    def one_serves_and_it_is_the_desired_one(self) -> None:
        serving = [name for name, state in self.fleet.states.items() if state == "serving"]
        assert serving == ([self.fleet.serving] if self.fleet.serving else [])
        assert (self.fleet.serving is None) == ("promoted" not in [entry.action for entry in self.log])

    @invariant()
    def at_most_one_is_tried_and_it_does_not_serve(self) -> None:
        trial, states = self.fleet.trial, self.fleet.states
        tried = {name: state for name, state in states.items() if state in ("canary", "shadow")}
        assert tried == ({trial.version: trial.mode} if trial else {})
        if trial is not None:
            last = next(entry for entry in reversed(self.log) if entry.action in ("canary", "shadow"))
            assert trial == Trial(last.version, last.action, last.share, last.sequence, last.at, trial.former)  # type: ignore[arg-type]
            assert self.fleet.serving not in (None, trial.version)
            assert trial.former in ("candidate", "retired")

    @invariant()
    def a_trial_lasts_until_its_baseline_or_itself_is_moved(self) -> None:
        if not self.log:
            return
        last, before, now = self.log[-1], self.before.trial, self.fleet.trial
        if last.action in ("promoted", "rolled_back"):
            assert now is None
        elif (
            before is not None and last.action in ("withdrawn", "rejected") and last.version == before.version
        ):
            assert now is None
            assert self.fleet.states[last.version] in ("rejected", before.former)
        elif last.action not in ("canary", "shadow"):
            assert now == before

    @invariant()
    def what_was_ruled_out_stays_out(self) -> None:
        for name, state in self.before.states.items():
            if state in ("rejected", "pruned"):
                assert self.fleet.states[name] in (state, "pruned")

    @invariant()
    def replicas_see_a_new_wish_only_when_another_serves(self) -> None:
        if self.log:
            moved = self.log[-1].action in ("promoted", "rolled_back")
            assert (self.fleet.desired_sequence == self.fleet.sequence) == moved

    def teardown(self) -> None:
        assert fold(self.log) == self.fleet


TestRollout = Rollout.TestCase


def fleet_of(*moves: Sequence[object]) -> Fleet:
    fleet = Fleet()
    for at, (action, version, *share) in enumerate(moves):
        fleet = apply(fleet, str(action), str(version), share=share[0] if share else None, at=float(at))  # type: ignore[arg-type]
    return fleet


BASE = [("published", "a"), ("published", "b"), ("published", "c"), ("promoted", "a")]


def test_a_trial_goes_from_shadow_to_canary_changes_its_share_and_wins() -> None:
    shadow = fleet_of(*BASE, ("shadow", "b", 1.0))
    assert shadow.trial == Trial("b", "shadow", 1.0, 5, 4.0, "candidate")
    wider = fleet_of(*BASE, ("shadow", "b", 1.0), ("canary", "b", 0.1), ("canary", "b", 0.5))
    assert wider.trial == Trial("b", "canary", 0.5, 7, 6.0, "candidate")
    assert wider.serving == "a"
    won = apply(wider, "promoted", "b")
    assert (won.trial, won.serving, won.states["a"], won.rollback_target) == (None, "b", "retired", "a")


def test_a_version_that_served_before_is_withdrawn_to_what_it_was_and_stays_the_rollback_target() -> None:
    fleet = fleet_of(*BASE, ("promoted", "b"), ("canary", "a", 0.2))
    assert fleet.rollback_target == "a"
    assert apply(fleet, "withdrawn", "a").states["a"] == "retired"
    back = apply(fleet, "rolled_back", "a")
    assert (back.serving, back.trial, back.states["b"]) == ("a", None, "retired")
    with pytest.raises(IllegalTransition, match="rollback returns"):
        apply(fleet, "pruned", "a")


@pytest.mark.parametrize("move", [("promoted", "c"), ("rolled_back", "a")])
def test_another_version_that_serves_ends_the_trial(move: tuple[str, str]) -> None:
    fleet = fleet_of(*BASE, ("published", "d"), ("promoted", "b"), ("canary", "d", 0.2), move)
    assert (fleet.trial, fleet.states["d"]) == (None, "candidate")


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (("canary", "c", 0.1), "b is on trial: withdraw it first"),
        (("canary", "a", 0.1), "b is on trial"),
        (("canary", "b", 0.0), "share"),
        (("canary", "b"), "share"),
        (("promoted", "b", 0.1), "share"),
        (("withdrawn", "c"), "not on trial"),
        (("pruned", "b"), "on trial"),
    ],
)
def test_what_a_trial_does_not_allow_is_said(move: Sequence[object], says: str) -> None:
    with pytest.raises(IllegalTransition, match=says):
        fleet_of(*BASE, ("canary", "b", 0.1), move)


def test_nothing_is_tried_without_a_baseline_and_what_serves_is_not_tried() -> None:
    with pytest.raises(IllegalTransition, match="no version serves"):
        fleet_of(("published", "a"), ("canary", "a", 0.1))
    with pytest.raises(IllegalTransition, match="a is serving"):
        fleet_of(*BASE, ("shadow", "a", 0.1))


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
