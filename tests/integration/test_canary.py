"""A trial on a real database: votes come in, the rule acts, and the log says why. SQLite and Postgres."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from feedback_samples import completion, entries, event, thumb
from sqlalchemy.engine import Engine

from feedback.events import Event
from feedback.records import Choice, Completion, WeightSpan
from feedback.store import Store
from feedback.trial_votes import trial_votes
from instructloop.canary import Canary
from registry.audit import AuditLog
from registry.registry import IllegalTransition, Registry, Replica, Trial
from registry.settings import RolloutSettings

STABLE, NEW, OTHER = "policy-0000", "policy-0001", "policy-0002"


@dataclass
class Site:
    """An installation with three versions, the first of which serves, and people who vote."""

    engine: Engine
    registry: Registry
    store: Store
    count: int = 0
    records: list[Completion | Event] = field(default_factory=list)

    def trial(self) -> Trial:
        found = self.registry.trial()
        assert found is not None
        return found

    def answered(self, user: str | None, *versions: str, source: str = "serving", age: float = 0.0) -> str:
        """Record a response to `user` by `versions`, one token each, `age` seconds before the trial."""
        self.count += 1
        id = f"chatcmpl-{self.count}"
        spans = [WeightSpan(version=name, start=i, end=i + 1) for i, name in enumerate(versions)]
        choice = Choice(index=0, text="x", token_ids=[1] * len(spans), weight_spans=spans)
        at = self.trial().since + 1 - age
        self.records.append(completion(id, user=user, source=source, created_at=at, choices=[choice]))
        return id

    def votes(self, user: str | None, value: str, *versions: str, rater: str | None = None) -> str:
        """Let somebody vote on a response of its own; returns the completion's id."""
        id = self.answered(user, *versions)
        self.says(rater or f"k1/user:{user}", id, value)
        return id

    def says(self, rater: str, id: str, value: str) -> None:
        self.count += 1
        self.records.append(thumb(f"e{self.count}", id, value=value, rater=rater))

    def crowd(self, version: str, good: int, bad: int) -> None:
        for number in range(good + bad):
            self.votes(f"{version} {self.count} {number}", "up" if number < good else "down", version)

    def ingest(self) -> None:
        self.store.ingest(entries(*self.records))
        self.records.clear()

    def rule(self, **settings: float) -> Canary:
        return Canary(self.engine, self.registry, RolloutSettings(**settings))  # type: ignore[arg-type]

    def counts(self) -> tuple[int, int, int, int]:
        self.ingest()
        found = trial_votes(self.engine, trial=NEW, stable=STABLE, since=self.trial().since)
        return found.trial.good, found.trial.bad, found.stable.good, found.stable.bad


@pytest.fixture
def site(either_database: Engine, tmp_path: Path) -> Iterator[Site]:
    registry = Registry(either_database, tmp_path / "versions")
    for number in range(3):
        staging = tmp_path / f"staging-{number}"
        staging.mkdir()
        (staging / "model.safetensors").write_bytes(bytes([number]))
        registry.publish(staging, parent=None, round_id=number, kind="ppo", details={})
    registry.promote(STABLE, actor="setup", reason="the first")
    registry.canary(NEW, 0.5, actor="ann", reason="try it")
    return Site(either_database, registry, Store(either_database))


def test_a_canary_that_angers_users_is_rolled_back_and_the_log_says_why(site: Site) -> None:
    rule = site.rule()
    site.crowd(STABLE, 24, 6)
    site.ingest()
    found = rule.look()
    assert found is not None
    assert found.move == "keep"
    site.crowd(NEW, 6, 24)
    site.ingest()
    found = rule.look()
    assert found is not None
    assert found.move == "rollback"
    assert site.registry.trial() is None
    assert site.registry.states()[NEW] == "candidate"
    desired = site.registry.desired("trial")
    assert desired is not None
    assert desired.name == STABLE
    last = site.registry.log()[-1]
    assert (last.actor, last.action, last.version) == ("canary rule", "withdrawn", NEW)
    assert last.reason.startswith(
        "Users find it worse: 6 of 30 votes (20%) on policy-0001 were good, 24 of 30"
    )
    audited = AuditLog(site.engine).entries(2)
    assert [(one.actor, one.action, one.target, one.outcome) for one in audited] == [
        ("canary rule", "withdraw", NEW, "done"),
        ("ann", "canary", NEW, "done"),
    ]
    assert audited[0].detail == last.reason
    assert rule.look() is None


def test_a_good_canary_is_promoted_once_however_many_watch(site: Site) -> None:
    site.crowd(STABLE, 60, 40)
    site.crowd(NEW, 90, 10)
    site.ingest()
    watches = [site.rule() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        moves = list(pool.map(lambda watch: watch.look(), watches))
    assert {move.move for move in moves if move is not None} == {"promote"}
    log = [(entry.actor, entry.action) for entry in site.registry.log()]
    assert log[-2:] == [("ann", "canary"), ("canary rule", "promoted")]
    assert site.registry.states()[NEW] == "serving"
    # Who came second met a trial that was over: no refusal to look into.
    assert {one.outcome for one in AuditLog(site.engine).entries()} == {"done"}


@pytest.mark.parametrize("move", ["withdrawn", "changed", "another"])
def test_a_decision_on_a_trial_that_is_over_does_nothing(site: Site, move: str) -> None:
    """The operator acts between the watch's look and its move."""
    before = site.trial()
    match move:
        case "withdrawn":
            site.registry.withdraw(actor="ann", reason="")
        case "changed":
            site.registry.canary(NEW, 0.1, actor="ann", reason="less")
        case "another":
            site.registry.withdraw(actor="ann", reason="")
            site.registry.canary(OTHER, 0.5, actor="ann", reason="")
    entries_before = site.registry.log()
    with pytest.raises(IllegalTransition, match="over or was changed"):
        site.registry.promote(NEW, actor="rule", reason="", trial=before)
    with pytest.raises(IllegalTransition, match="over or was changed"):
        site.registry.withdraw(actor="rule", reason="", trial=before)
    assert site.registry.log() == entries_before


def test_a_canary_whose_files_broke_is_withdrawn_not_promoted(site: Site) -> None:
    site.crowd(STABLE, 60, 40)
    site.crowd(NEW, 90, 10)
    site.ingest()
    (site.registry.version(NEW).path / "model.safetensors").write_bytes(b"torn")
    site.rule().look()
    last = site.registry.log()[-1]
    assert (last.action, last.version) == ("withdrawn", NEW)
    assert "model.safetensors" in last.reason
    refused = [one for one in AuditLog(site.engine).entries() if one.outcome == "refused"]
    assert [(one.actor, one.action, one.target) for one in refused] == [("canary rule", "promote", NEW)]


def test_which_votes_count(site: Site) -> None:
    assert site.counts() == (0, 0, 0, 0)
    # A changed vote: its giver has had its say, whichever way round the two come.
    liked = site.votes("ann", "up", NEW)
    site.says("k1/user:ann", liked, "down")
    assert site.counts() == (1, 0, 0, 0)
    # The same end user again, on another answer, by either version.
    site.votes("ann", "down", NEW)
    site.votes("ann", "down", STABLE)
    assert site.counts() == (1, 0, 0, 0)
    # A response that began on one version and ended on the other, and one by a third.
    site.votes("bob", "up", STABLE, NEW)
    site.votes("bob", "up", OTHER)
    site.votes("bob", "down", NEW, NEW)
    assert site.counts() == (1, 1, 0, 0)
    # From before the trial, from a shadow, and a demonstration.
    for id in (site.answered("cat", STABLE, age=60.0), site.answered("cat", NEW, source="shadow")):
        site.says("k1/user:cat", id, "down")
    shown = {"type": "demonstration", "completion_id": site.answered("cat", STABLE), "text": "y"}
    site.records.append(event("shown", shown, rater="k1/user:cat"))
    assert site.counts() == (1, 1, 0, 0)
    # Ratings; a choice's own rating, not its neighbour's.
    two = [
        Choice(index=i, text="x", weight_spans=[WeightSpan(version=name, start=0, end=1)])
        for i, name in enumerate((STABLE, NEW))
    ]
    site.records.append(completion("two", user="dan", created_at=site.trial().since + 1, choices=two))
    rated = {"type": "rating", "completion_id": "two", "choice": 0, "score": 2}
    site.records.append(event("rated", rated, rater="k1/user:dan"))
    assert site.counts() == (1, 1, 0, 1)
    # A vote that waits for its completion counts when that has come.
    late = site.answered("eve", NEW)
    record = site.records.pop()
    site.says("k1/user:eve", late, "up")
    assert site.counts() == (1, 1, 0, 1)
    site.records.append(record)
    assert site.counts() == (2, 1, 0, 1)
    # Who is quarantined has no vote, and leaves its end user's to others.
    mine = site.votes("fay", "down", NEW, rater="k1/mallory")
    assert site.counts() == (2, 2, 0, 1)
    site.store.raters.quarantine("k1/mallory", actor="ann", reason="a ring")
    assert site.counts() == (2, 1, 0, 1)
    site.says("k1/user:fay", mine, "up")
    assert site.counts() == (3, 1, 0, 1)


def test_a_changed_share_begins_a_new_comparison(site: Site) -> None:
    site.says("k1/user:ann", site.answered("ann", NEW, age=1.0), "down")
    assert site.counts() == (0, 1, 0, 0)
    site.registry.canary(NEW, 0.25, actor="ann", reason="less")
    assert site.counts() == (0, 0, 0, 0)
    site.votes("ann", "up", NEW)
    assert site.counts() == (1, 0, 0, 0)


def test_a_version_that_no_replica_can_load_is_rolled_back(site: Site) -> None:
    site.registry.report(Replica("r0", STABLE, STABLE, "serving"))
    site.registry.report(Replica("r1", NEW, STABLE, "failed", "NaN in layer 3", track="trial"))
    site.rule().look()
    assert site.registry.trial() is None
    assert (
        site.registry.log()[-1].reason == "No replica of the trial can load policy-0001: r1: NaN in layer 3."
    )


def test_operators_can_switch_the_rule_off_and_still_see_what_it_would_do(site: Site) -> None:
    site.crowd(STABLE, 50, 0)
    site.crowd(NEW, 0, 50)
    site.ingest()
    rule = site.rule(canary_rule=False)
    assert rule.look() is None
    report = rule.report()
    json.dumps(report, allow_nan=False)
    assert (report["rule"], report["stable"], report["trial"]["version"]) == (False, STABLE, NEW)
    assert report["decision"]["move"] == "rollback"
    assert report["decision"]["figures"]["trial_votes"] == {"good": 0, "bad": 50, "share": 0.0}
    site.registry.withdraw(actor="ann", reason="seen")
    assert rule.report() == {"stable": STABLE, "trial": None, "rule": False, "decision": None}


def test_at_most_so_many_replicas_of_a_track_swap_at_once(site: Site) -> None:
    def begin(number: int) -> bool:
        replica = Replica(f"r{number}", NEW, STABLE, "serving", track="stable" if number < 8 else "trial")
        return site.registry.begin_swap(replica, max_unavailable=2, stale_seconds=30)

    with ThreadPoolExecutor(10) as pool:
        began = list(pool.map(begin, range(10)))
    assert (sum(began[:8]), sum(began[8:])) == (2, 2)
    swapping = {one.id for one in site.registry.replicas() if one.state == "swapping"}
    assert swapping == {f"r{number}" for number, yes in enumerate(began) if yes}
    # One that has begun may say so again; one that is done makes room.
    first, other = began[:8].index(True), began[:8].index(False)
    assert begin(first)
    assert not begin(other)
    site.registry.report(Replica(f"r{first}", NEW, NEW, "serving"))
    assert begin(other)
    # Those that fell silent are not waited for.
    silent = Replica("r20", NEW, STABLE, "serving")
    assert not site.registry.begin_swap(silent, 2, stale_seconds=30)
    assert site.registry.begin_swap(silent, 2, stale_seconds=0.0)
