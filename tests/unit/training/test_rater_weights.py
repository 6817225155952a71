"""What a round makes of its raters: whose events it takes, when, and how much they count."""

import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from unit.training.installation import Installation
from unit.training.tiny import tiny_tokenizer

from evaluation.contest import Prompt
from feedback.events import FEEDBACK, Event
from feedback.queue import Entry
from feedback.settings import RaterSettings
from feedback.store import Store
from instructloop.database import connect
from registry.rounds import Round
from training.dataset import Comparison, Dataset, Demonstration, Judgement, Side, build, is_held_out_rater
from training.rater_weights import (
    RaterWeights,
    Standing,
    next_standing,
    older_than,
    quarantine_suspects,
    raters_of,
    slice_of,
    standing_of,
    thinned,
)
from training.settings import TrainingSettings

SETTINGS = RaterSettings()
GOOD = [f"k/{name}" for name in "abcde"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Forty prompts with four answers each, on which `k/` has said something."""
    installation = Installation(tmp_path_factory.mktemp("raters"))
    installation.give_feedback(seed=1)
    return installation


@pytest.fixture
def store(installed: Installation, tmp_path: Path) -> Store:
    """A copy of that database."""
    source, target = (sqlite3.connect(path / "store.db") for path in (installed.directory, tmp_path))
    source.backup(target)
    source.close()
    target.close()
    return Store(connect(f"sqlite:///{tmp_path / 'store.db'}"))


def rank(store: Store, rater: str, prompts: range, *, right: bool = True, tag: str = "") -> None:
    """Let a rater rank the answers of prompts as `k/` did, or the other way round."""
    entries = []
    for i in prompts:
        name = f"chatcmpl-1-{i}"
        order = (3, 2, 1, 0) if right else (0, 1, 2, 3)
        groups = [[{"completion_id": name, "choice": choice}] for choice in order]
        event = Event(
            event_id=f"{rater}-{name}{tag}",
            key_id="k",
            rater=rater,
            received_at=3.0,
            feedback=FEEDBACK.validate_python({"type": "ranking", "groups": groups}),
        )
        entries.append(Entry(f"2-{i}", "event", event.model_dump_json().encode(), event.event_id))
    assert not store.ingest(entries).dead_letters


def done(standing: Standing, cursor: int, cutoff: int) -> Round:
    config = {"standing": standing.as_dict()}
    nothing: Any = [None] * 9
    return Round(1, "done", None, cursor, cutoff, config, *nothing)


def test_who_contradicts_the_others_is_quarantined_once_and_not_again_when_lifted(store: Store) -> None:
    for rater in GOOD:
        rank(store, rater, range(20))
    rank(store, "k/bad", range(20), right=False)
    assert quarantine_suspects(store, RaterSettings(automatic_quarantine=False), store.head()) == []
    assert quarantine_suspects(store, RaterSettings(defend=False), store.head()) == []
    assert quarantine_suspects(store, SETTINGS, 5) == []
    assert quarantine_suspects(store, SETTINGS, store.head()) == ["k/bad"]
    (entry,) = store.raters.log()
    assert (entry.rater, entry.action, entry.actor) == ("k/bad", "quarantine", "trainer")
    assert "says the contrary" in entry.reason
    assert quarantine_suspects(store, SETTINGS, store.head()) == []
    store.raters.lift("k/bad", actor="op", reason="a taste of its own")
    assert quarantine_suspects(store, SETTINGS, store.head()) == []
    assert len(store.raters.log()) == 2


def test_what_is_held_back_returns_after_it_was_lifted_once(store: Store) -> None:
    first = store.head()
    rank(store, "k/x", range(5))
    rank(store, "k/y", range(5))
    second = store.head()
    store.raters.quarantine("k/x", actor="op", reason="")
    one = next_standing(store, None, 0, first)
    assert one.held == {"k/x": [[0, first]]}
    two = next_standing(store, done(one, 0, first), first, second)
    assert (two.held, two.returned) == ({"k/x": [[0, second]]}, {})

    rank(store, "k/x", range(5, 8))
    store.raters.lift("k/x", actor="op", reason="")
    third = store.head()
    three = next_standing(store, done(two, first, second), second, third)
    assert (three.held, three.returned) == ({}, {"k/x": [[0, second]]})
    taken = slice_of(store, second, third, three)
    assert [event.event_id for event in taken.events] == [f"k/x-chatcmpl-1-{i}" for i in range(8)]
    assert {f"chatcmpl-1-{i}" for i in range(8)} <= set(taken.completions)
    # Not a second time as older data, where the others' are.
    older = older_than(store, second, third, three)
    raters = Counter(event.rater for event in older.events)
    assert (raters["k/x"], raters["k/y"]) == (0, 5)

    four = next_standing(store, done(three, second, third), third, third)
    assert (four.held, four.returned) == ({}, {})
    assert Counter(event.rater for event in older_than(store, third, third, four).events)["k/x"] == 8
    # A second quarantine holds only what comes after.
    store.raters.quarantine("k/x", actor="op", reason="")
    rank(store, "k/x", range(8, 9))
    last = store.head()
    five = next_standing(store, done(four, third, third), third, last)
    assert five.held == {"k/x": [[third, last]]}
    assert "k/x" not in {event.rater for event in older_than(store, third, last, five).events}


def test_the_standing_survives_the_round_s_configuration(store: Store) -> None:
    standing = Standing({"k/x": [[0, 3]]}, {"k/y": [[1, 2]]}, ["e1"])
    assert standing_of({"standing": standing.as_dict()}) == standing
    assert standing_of({}) == Standing()
    assert raters_of({"raters": {"lone_weight": 0.25}}).lone_weight == 0.25
    # A round from before there were defences is repeated without them.
    assert raters_of({}).defend is False


def test_what_a_quarantined_rater_says_is_left_out_and_counted(store: Store) -> None:
    rank(store, "k/x", range(6))
    data = store.slice(0, store.head())
    everything = build(data, tiny_tokenizer(), TrainingSettings())
    found = build(data, tiny_tokenizer(), TrainingSettings(), quarantined={"k/x"})
    assert found.left_out["the rater is quarantined"] == 6
    raters = {item.rater for side in (found.train, found.held_out) for item in side.comparisons}
    assert raters == {"k/"}
    assert "k/x" in {
        item.rater for side in (everything.train, everything.held_out) for item in side.comparisons
    }


def test_held_out_raters_only_measure(store: Store) -> None:
    rank(store, "k/x", range(12))
    rank(store, "j/y", range(12))
    data = store.slice(0, store.head())
    for held_out in (["k/x"], ["j"]):
        settings = RaterSettings(held_out=held_out)
        found = build(data, tiny_tokenizer(), TrainingSettings(), raters=settings)
        apart = [*found.train.by_held_out_raters, *found.held_out.by_held_out_raters]
        assert Counter(item.rater for item in apart) == {"k/x" if held_out == ["k/x"] else "j/y": 12}
        trained = {i.rater for side in (found.train, found.held_out) for i in side.comparisons}
        assert trained == {"k/", "j/y" if held_out == ["k/x"] else "k/x"}
        assert all(item.prompt.key in found.train.prompts for item in found.train.by_held_out_raters)
    nobody = build(data, tiny_tokenizer(), TrainingSettings(), raters=RaterSettings())
    assert nobody.train.by_held_out_raters == []
    thumbs = build(data, tiny_tokenizer(), TrainingSettings(), raters=RaterSettings(held_out=["k/"]))
    assert thumbs.left_out["a held-out rater's, and no ranking"] == 80
    share = RaterSettings(held_out_share=0.2)
    drawn = sum(is_held_out_rater(f"k/{n}", share) for n in range(3000)) / 3000
    assert drawn == pytest.approx(0.2, abs=0.03)
    assert not any(is_held_out_rater(f"k/{n}", SETTINGS) for n in range(100))


def test_weights_follow_what_is_known_of_raters(store: Store) -> None:
    for rater in GOOD:
        rank(store, rater, range(20))
    rank(store, "k/bad", range(20), right=False)
    rank(store, "k/new", range(39, 40))
    head = store.head()
    side = build(store.slice(0, head), tiny_tokenizer(), TrainingSettings()).train
    settings = RaterSettings(automatic_quarantine=False, rater_share=1.0, key_share=1.0)
    weighed, figures = RaterWeights(store, head, Standing(), settings).weighed(side)
    assert len(weighed.comparisons) == len(side.comparisons)
    assert [item.event_id for item in weighed.judgements] == [item.event_id for item in side.judgements]
    mean = {
        rater: sum(i.weight for i in weighed.comparisons if i.rater == rater)
        / max(1, sum(i.rater == rater for i in weighed.comparisons))
        for rater in ("k/a", "k/bad")
    }
    assert mean["k/bad"] < 0.2 * mean["k/a"]
    assert figures["votes"] == len(side.comparisons) + len(side.judgements)
    assert figures["reasons"]["the rater agrees less with others than most do"] > 0
    assert sum(figures["largest"].values()) == pytest.approx(1.0)
    off, _ = RaterWeights(store, head, Standing(), RaterSettings(defend=False)).weighed(side)
    assert {item.weight for item in [*off.comparisons, *off.judgements]} == {1.0}


def test_no_rater_has_more_than_its_share_of_what_a_model_is_fitted_to(store: Store) -> None:
    for n in range(45):
        rank(store, f"k/r{n}", range(8), tag="x")
    head = store.head()
    side = build(store.slice(0, head), tiny_tokenizer(), TrainingSettings()).train
    weighed, figures = RaterWeights(store, head, Standing(), SETTINGS).weighed(side)
    totals: Counter[str] = Counter()
    for item in [*weighed.comparisons, *weighed.judgements]:
        totals[item.rater] += item.weight  # type: ignore[assignment]
    assert len(side.comparisons) + len(side.judgements) > 100
    assert max(totals.values()) / sum(totals.values()) <= 0.05 + 1e-9
    assert figures["rater_limit"] == 0.05
    assert max(figures["largest"].values()) == pytest.approx(0.05)


def test_the_evidence_leaves_out_who_was_in_quarantine_as_the_round_began(store: Store) -> None:
    for rater in GOOD:
        rank(store, rater, range(20))
    rank(store, "k/bad", range(20), right=False)
    head = store.head()
    weights = RaterWeights(store, head, Standing(held={"k/bad": [[0, head]]}), SETTINGS)
    assert weights.assessment.standings["k/a"].accuracy > 0.8
    assert weights.figures() | {"usual_accuracy": None} == {
        "assessed": 7,
        "usual_accuracy": None,
        "vote_as_one": [],
        "quarantined": ["k/bad"],
        "returned": [],
        "gold_questions": 0,
    }


def written(rater: str, count: int) -> list[Demonstration]:
    return [
        Demonstration(Prompt(f"{rater} {n}", [1]), [2], event_id=f"{rater}-{n}", rater=rater)
        for n in range(count)
    ]


def test_demonstrations_beyond_a_rater_s_share_are_left_out(store: Store) -> None:
    many = [item for n in range(60) for item in written(f"k/r{n}", 2)]
    dataset = Dataset(train=Side(demonstrations=[*written("k/flood", 90), *many]))
    RaterWeights(store, 0, Standing(), SETTINGS).limit_demonstrations(dataset)
    kept = Counter(item.rater for item in dataset.train.demonstrations)
    assert kept["k/flood"] == round(120 * 0.05 / 0.95)
    assert {kept[f"k/r{n}"] for n in range(60)} == {2}
    assert dataset.left_out == {"beyond the rater's share of demonstrations": 90 - kept["k/flood"]}
    again = Dataset(train=Side(demonstrations=[*written("k/flood", 90), *many]))
    RaterWeights(store, 0, Standing(), SETTINGS).limit_demonstrations(again)
    assert again.train.demonstrations == dataset.train.demonstrations
    alone = Dataset(train=Side(demonstrations=written("k/only", 30)))
    RaterWeights(store, 0, Standing(), SETTINGS).limit_demonstrations(alone)
    assert len(alone.train.demonstrations) == 30


def test_thinning_keeps_rows_as_their_weights_say() -> None:
    prompt = Prompt("p", [1])
    heavy = [Comparison(prompt, [[1], [2]], [0, 1], "s", weight=0.8) for _ in range(2000)]
    light = [Judgement(prompt, [1], 1.0, "thumb", weight=0.2) for _ in range(2000)]
    found = thinned(Side(comparisons=heavy, judgements=light), seed=3)
    assert found.comparisons == heavy
    assert len(found.judgements) == pytest.approx(500, abs=60)
    assert thinned(Side(comparisons=heavy, judgements=light), seed=3) == found
    assert thinned(Side(), seed=0) == Side()
