"""`instructloop canary`, `shadow` and `withdraw`, and the watch while the database is away."""

import json
import threading

import pytest
import sqlalchemy as sa
from integration.feedback_samples import completion, entries, thumb

from feedback.records import Choice, WeightSpan
from feedback.store import Store
from instructloop import canary, cli
from instructloop.config import Config
from registry.registry import Registry


def test_a_trial_is_begun_shown_and_ended(
    registry: Registry, engine: sa.Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["canary"]) == 0
    assert capsys.readouterr().out == "no version is on trial\n"
    assert cli.run(["shadow", "policy-0001", "--share", "1"]) == 0
    assert "policy-0001 is a shadow for 1 of requests, unseen" in capsys.readouterr().out
    assert cli.run(["canary", "policy-0001", "--share", "0.25", "--reason", "try"]) == 0
    capsys.readouterr()
    trial = registry.trial()
    assert trial is not None
    assert (trial.mode, trial.share, registry.log()[-1].reason) == ("canary", 0.25, "try")
    by_new = [Choice(index=0, text="x", weight_spans=[WeightSpan(version="policy-0001", start=0, end=1)])]
    records = [completion(id, user=id, created_at=trial.since + 1, choices=by_new) for id in "abc"]
    said = [
        thumb(f"e{id}", id, value=value, rater=f"k1/{id}")
        for id, value in zip("abc", ("up", "down", "up"), strict=True)
    ]
    Store(engine).ingest(entries(*records, *said, thumb("again", "a", rater="k1/z")))
    assert cli.run(["canary"]) == 0
    header, tried, stable, reason, left_out = capsys.readouterr().out.splitlines()
    assert header.split() == ["VERSION", "STATE", "SHARE", "SINCE", "GOOD", "VOTES", "OF"]
    assert (tried.split()[:3], tried.split()[-2:]) == (["policy-0001", "canary", "0.25"], ["2", "3"])
    assert (stable.split()[:2], stable.split()[-2:]) == (["policy-0000", "serving"], ["0", "0"])
    assert reason.startswith("The votes don't decide yet: 2 of 3 votes (67%) on policy-0001 were good")
    assert left_out == "left out: 1 votes, not the first of its end user or rater"
    assert cli.run(["canary", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"]["move"] == "keep"
    assert cli.run(["withdraw", "--reason", "seen"]) == 0
    assert capsys.readouterr().out == "policy-0001 is on trial no more\n"
    assert registry.trial() is None


def test_what_is_refused_says_why_in_a_line(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["withdraw"]) == 2
    assert capsys.readouterr().err == "instructloop: no version is on trial\n"
    assert cli.run(["canary", "policy-0000"]) == 2
    assert "policy-0000 is serving" in capsys.readouterr().err
    assert cli.run(["shadow", "policy-0009"]) == 2
    for share in ("0", "1.1", "nan", "half"):
        with pytest.raises(SystemExit):
            cli.run(["canary", "policy-0001", "--share", share])
    assert "is not a share such as 0.1" in capsys.readouterr().err
    assert registry.trial() is None


def test_the_watch_outlives_a_database_that_is_away_and_then_acts(
    registry: Registry, engine: sa.Engine, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(canary, "_LONGEST_PAUSE_SECONDS", 0.02)
    registry.canary("policy-0001", 0.5, actor="me", reason="")
    overdue = config.model_copy(update={"rollout": config.rollout.model_copy(update={"canary_hours": 1e-9})})
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE replicas RENAME TO elsewhere")
    stop = threading.Event()
    watch = threading.Thread(target=canary.open_canary(overdue, engine).run, args=(stop,))
    watch.start()
    try:
        stop.wait(0.2)
        assert registry.trial() is not None
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO replicas")
        for _ in range(500):
            if registry.trial() is None:
                break
            stop.wait(0.01)
        assert registry.log()[-1].reason.startswith("The votes of 1e-09 hours don't decide")
    finally:
        stop.set()
        watch.join(10)
    assert not watch.is_alive()
