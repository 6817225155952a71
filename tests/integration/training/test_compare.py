"""The comparison of algorithms: the whole of it on tiny models, its plan, its figures and its resumption."""

import json
from pathlib import Path
from typing import Any

import pytest
from unit.training.prepared import EVALUATION, SETTINGS, Installation
from unit.training.tiny import TransformersSampler

from registry.rounds import Rounds
from training.compare import (
    Budget,
    ComparisonProblem,
    ComparisonRun,
    compute_seconds,
    slice_to_compare,
    summary,
    table,
    write,
)

FAST = SETTINGS.model_copy(
    update={"sft_epochs": 2, "preference_learning_rate": 1e-3, "preference_batch": 8, "reward_epochs": 2}
)


class CountingSampler(TransformersSampler):
    loads = 0

    def load(self, model_dir: Path) -> None:
        type(self).loads += 1
        super().load(model_dir)


def comparison(installation: Installation, output: Path, seconds: float = 0.8, **more: Any) -> ComparisonRun:
    return ComparisonRun(
        slice_to_compare(installation.store, installation.registry, installation.rounds, None),
        output,
        training=FAST.model_copy(update=more),
        evaluation=EVALUATION,
        budget=Budget(seconds),
        store=installation.store,
        registry=installation.registry,
        make_sampler=lambda model_dir, _: CountingSampler(model_dir),
    )


def test_all_algorithms_are_compared_and_nothing_else_is_changed(tmp_path: Path) -> None:
    installation, output = Installation(tmp_path / "data"), tmp_path / "output"
    before = [(v.name, v.state, v.manifest) for v in installation.registry.versions()]
    compared = comparison(installation, output).compare(["ppo", "rloo", "dpo", "kto"], [0, 1])
    write(compared, output)

    assert [(v.name, v.state, v.manifest) for v in installation.registry.versions()] == before
    assert installation.rounds.list() == []
    assert sorted(path.name for path in output.iterdir()) == ["comparison.html", "comparison.json"]
    assert json.loads((output / "comparison.json").read_text()) == compared
    assert [item["algorithm"] for item in compared["algorithms"]] == ["ppo", "rloo", "dpo", "kto"]
    assert compared["slice"] == [0, installation.store.head()]
    assert compared["stages"]["select"]["epoch"] in (1, 2)
    for item in compared["algorithms"]:
        # All of these prompts have checks, so these decide.
        assert item["win_rate"] == item["win_rate_by_checks"]
        assert item["win_rate"]["estimate"] == pytest.approx(sum(item["win_rate_by_seed"]) / 2)
        assert item["win_rate"]["values"] == item["win_rate"]["clusters"] * EVALUATION.samples_per_prompt * 2
        assert all(seconds > 0 for seconds in item["seconds"])
        assert all(0 < abs(kl) < 50 for kl in item["kl"])
        assert len(item["answers"]) == len(compared["prompts"]) == len(item["sft_answers"])
    page = (output / "comparison.html").read_text()
    assert all(f">{item['algorithm']}<" in page for item in compared["algorithms"])
    rows = table(compared)
    assert [len(row) for row in rows] == [8] * 5
    best = compared["algorithms"][2]["win_rate"]
    assert rows[3][1] == f"{best['estimate']:.3f} [{best['low']:.3f}, {best['high']:.3f}]"


def test_a_budget_becomes_whole_updates() -> None:
    assert Budget(100).updates(first=20, each=10) == 9  # 20 + 8 * 10
    assert Budget(100).updates(first=20, each=9.9) == 9
    assert Budget(100).updates(first=500, each=100) == 1
    for seconds in (1.0, 7.5, 60.0, 601.0):
        updates = Budget(seconds).updates(first=0.9, each=0.7)
        assert 0.9 + (updates - 1) * 0.7 <= seconds < 0.9 + updates * 0.7


def test_compute_is_what_this_process_and_its_children_used() -> None:
    before = compute_seconds()
    sum(i * i for i in range(2_000_000))
    assert 0.01 < compute_seconds() - before < 20


def test_the_plan_keeps_to_the_budget(tmp_path: Path) -> None:
    """DPO on the tiny model takes milliseconds an update: more compute is more updates, up to its data."""
    installation = Installation(tmp_path / "data")
    little = comparison(installation, tmp_path / "a", 1e-3).compare(["dpo"], [0])["algorithms"][0]
    ample = comparison(installation, tmp_path / "b", 1e3).compare(["dpo"], [0])["algorithms"][0]
    assert little["updates"] == [1]
    rankings = installation.round(FAST)._dataset.train.counts()["comparisons"]
    assert ample["updates"] == [-(-3 * rankings // FAST.preference_batch)]  # three pairs to a ranking


def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installation, output = Installation(tmp_path / "data"), tmp_path / "output"
    ample = 1e3  # so that DPO goes through its data, however fast this machine is
    run = comparison(installation, output, ample)
    monkeypatch.setattr(run, "_learn", _killed_at(run._learn, seed=1))
    with pytest.raises(KeyboardInterrupt):
        run.compare(["dpo"], [0, 1])
    first = json.loads((output / "work" / "dpo-0.json").read_text())
    with pytest.raises(ComparisonProblem, match="unfinished comparison on other feedback or settings"):
        comparison(installation, output, ample, reward_epochs=3).compare(["dpo"], [0, 1])
    CountingSampler.loads = 0
    compared = comparison(installation, output, ample).compare(["dpo"], [0, 1])
    # Started once, then the policy's answers and SFT's with the second seed only.
    assert CountingSampler.loads == 3
    assert compared["algorithms"][0]["seconds"][0] == first["seconds"]
    whole = comparison(installation, tmp_path / "unbroken", ample).compare(["dpo"], [0, 1])
    for name in ("win_rate", "kl", "answers"):
        assert compared["algorithms"][0][name] == whole["algorithms"][0][name]


def _killed_at(learn: Any, seed: int) -> Any:
    def maybe(algorithm: str, its_seed: int, updates: int) -> Any:
        if its_seed == seed:
            raise KeyboardInterrupt
        return learn(algorithm, its_seed, updates)

    return maybe


def test_a_summary_pools_the_seeds() -> None:
    def run(seed: int, outcomes: dict[str, tuple[float, float | None]]) -> dict[str, Any]:
        items = [{"prompt": p, "judge": judge, "checks": checks} for p, (judge, checks) in outcomes.items()]
        answered = {"answers": ["a"], "sft_answers": ["b"]}
        return {"seed": seed, "updates": 4, "seconds": 9.0 + seed, "kl": 1.0, "comparisons": items} | answered

    runs = [
        run(0, {"p": (1.0, None), "q": (0.0, 1.0), "r": (0.5, 0.5)}),
        run(1, {"p": (0.0, None), "q": (0.0, 1.0), "r": (1.0, 0.0)}),
    ]
    found = summary("kto", runs, EVALUATION)
    assert found["win_rate"]["estimate"] == pytest.approx((1 + 1 + 0.5 + 0 + 1 + 0) / 6)
    assert found["win_rate_by_checks"]["estimate"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert found["win_rate_by_judge"]["estimate"] == pytest.approx(2.5 / 6)
    assert found["win_rate_by_seed"] == pytest.approx([2.5 / 3, 1 / 3])
    assert found["win_rate"]["clusters"] == 3
    assert found["seconds"] == [9.0, 10.0]


def test_the_slice_is_a_rounds_or_all_there_is(tmp_path: Path) -> None:
    installation = Installation(tmp_path)

    def chosen(round_id: int | None) -> dict[str, Any]:
        return slice_to_compare(installation.store, installation.registry, installation.rounds, round_id)

    head = installation.store.head()
    everything = {"cursor": 0, "cutoff": head, "parent": "policy-0000"}
    assert chosen(None) == everything
    rounds: Rounds = installation.rounds
    round_ = rounds.begin(0, 30, {"parent": "policy-0000"}, 0)
    assert chosen(None) == everything  # it is not done
    rounds.finish(round_.id, "done")
    assert chosen(None) == chosen(round_.id) == {"cursor": 0, "cutoff": 30, "parent": "policy-0000"}
    requested = rounds.request("someone")
    with pytest.raises(ComparisonProblem, match="has not begun"):
        chosen(requested)
    with pytest.raises(ComparisonProblem, match="no round 99"):
        chosen(99)
