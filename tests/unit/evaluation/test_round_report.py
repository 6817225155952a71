"""A round's report: everything that the store has of it, escaped, at any time of its life."""

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from unit.evaluation.test_report import Page

from evaluation.round_report import PLOTS, round_report
from instructloop.database import connect
from registry.registry import Registry
from registry.round_record import RoundRecord, read_record
from registry.rounds import Rounds
from registry.tables import METADATA

EVIL = "<script>alert(1)</script> & <b>"
INTERVAL = {"estimate": 0.75, "low": 0.5, "high": float("inf"), "confidence": 0.95}
CONFIG = {"parent": "policy-0000", "training": {"ppo_updates": 8, "vllm_arguments": {"x": EVIL}}}


@pytest.fixture
def rounds(tmp_path: Path) -> Rounds:
    engine = connect(f"sqlite:///{tmp_path / 'store.db'}")
    METADATA.create_all(engine)
    return Rounds(engine)


def page(rounds: Rounds, number: int, samples: list[dict[str, Any]] | None = None) -> Page:
    record = read_record(rounds, Registry(sa.create_engine("sqlite://"), Path("/nowhere")), number)
    found = Page(round_report(record, samples or []).html())
    assert found.open == []
    assert all(link.startswith("#") for link in found.links)
    assert "script" not in found.tags
    return found


def finished(rounds: Rounds) -> int:
    number = rounds.begin(0, 40, CONFIG, 7).id
    rounds.stage(number, "dataset", "running")
    rounds.stage(number, "dataset", "done", {"train": {"comparisons": 31}, EVIL: EVIL, "won": INTERVAL})
    rounds.stage(number, "ppo", "running")
    for step in range(1, 5):
        rounds.metric(number, "sft", step, {"loss": 1 / step})
        figures = {name: step / 4 for _, _, names in PLOTS for name in names if name != "loss"}
        rounds.metric(number, "ppo", step, figures | {"lr": 0.1 / step, EVIL: 1.0 * step})
    rounds.metric(number, "judge", 0, {"held_out_accuracy/serving/model": 0.8125})
    rounds.finish(number, "failed", error=f"ppo: {EVIL}\nWhat to do: lower the rate")
    return number


def test_everything_stands_in_it_and_is_escaped(rounds: Rounds) -> None:
    number = finished(rounds)
    samples = [{"update": u, "prompt": EVIL, "response": f"{EVIL} {u}", "score": 0.25} for u in (1, 1, 2)]
    found = page(rounds, number, samples)
    for text in (
        "It is failed. It learns from the events 0..40, with seed 7.",
        "What to do: lower the rate",
        "31",
        "0.812",  # the judge's accuracy
        "training",
        "ppo_updates",
        "update 1",
        "update 2",
        "0.250",
        "sft, by step",
        "ppo, by step",
        *(caption for caption, _, _ in PLOTS),
        "0.750 [0.500, –]",
        "lr",
    ):
        assert text in found.text, text
    # Curves: every plot, SFT's loss, the grid of the rest, and the stages' times.
    assert found.tags.count("svg") == len(PLOTS) - 1 + 1 + 1 + 1
    assert found.text.count("alert(1)") >= 8


def test_a_figure_is_plotted_once(rounds: Rounds) -> None:
    found = page(rounds, finished(rounds))
    for caption, _, names in PLOTS:
        if names != ("loss",):
            assert found.text.count(caption) == 1
    assert found.text.count("objective/scores") == 1  # in the legend of its own plot, not in the grid too


@pytest.mark.parametrize("state", ["requested", "begun", "running", "done"])
def test_at_every_time_of_its_life(rounds: Rounds, state: str) -> None:
    number = rounds.request("ann")
    if state != "requested":
        rounds.begin(0, 40, CONFIG, 7)
    if state in ("running", "done"):
        rounds.stage(number, "sft", "running")
        rounds.metric(number, "sft", 1, {"loss": float("nan")})
    if state == "done":
        rounds.finish(number, "done", verdict={"promote": True, "reasons": ["It is better."]})
    found = page(rounds, number)
    says = {
        "requested": "It is requested.",
        "begun": "It is running.",
        "running": "It is running, in the stage sft.",
        "done": "To be promoted.",
    }
    assert says[state].rstrip(".") in found.text
    assert ("It is better." in found.text) == (state == "done")


def test_a_repeat_says_so(rounds: Rounds) -> None:
    number = rounds.begin(0, 40, CONFIG, 7, repeat_of=3).id
    record = RoundRecord(rounds.get(number), [], [], {})
    assert "It repeats round 3" in round_report(record, []).html()


def test_checkpoints_stand_on_the_plane_by_their_distance(rounds: Rounds) -> None:
    number = rounds.begin(0, 40, CONFIG, 7).id
    rounds.stage(number, "checkpoints", "running")
    for update, kl, gold in ((0, 0.0, 0.0), (4, 9.0, 0.25), (8, 4.0, -0.5)):
        gains = {
            f"{name}{part}": value for name, value in (("proxy", kl), ("gold", gold)) for part in ("", "/low")
        }
        rounds.metric(number, "checkpoints", update, {"kl": kl, "distance": kl**0.5, **gains})
    assert "published" not in page(rounds, number).text.replace("likes best is published", "")
    rounds.stage(number, "checkpoints", "done", {"update": 4, "points": [{"update": 4}]})
    found = page(rounds, number)
    for text in ("Over-optimisation watch", "√KL", "proxy, which was maximised", "0 (SFT)", "-0.500"):
        assert text in found.text, text
    assert found.text.index("9.000") < found.text.index("published", found.text.index("0 (SFT)"))
    assert "checkpoints, by step" not in found.text  # once, on the plane
    assert found.tags.count("svg") == 2  # and where the time went
