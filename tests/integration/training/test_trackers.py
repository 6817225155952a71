"""Trackers get every stage's figures; what can't be tracked is refused before the round begins."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from unit.training.installation import Installation

from training.round import RoundRefused
from training.trackers import Trackers

QUICK: dict[str, Any] = {
    "reward_epochs": 1,
    "sft_epochs": 1.0,
    "ppo_updates": 2,
    "ppo_batch": 4,
    "ppo_samples_per_prompt": 1,
}


class Notebook(TrainerCallback):  # type: ignore[misc]
    """A tracker as Transformers knows them, that remembers; `breaks_at` is the figure that it chokes on."""

    runs: ClassVar[list["Notebook"]] = []
    breaks_at: str | None = None

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = False
        Notebook.runs.append(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.name, self.config, self.directory = args.run_name, args.to_dict(), args.output_dir

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.breaks_at in logs:
            raise ConnectionError("the tracking server is away")
        self.logged.append((state.global_step, logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = True


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    monkeypatch.setattr(Notebook, "runs", [])
    monkeypatch.setattr(Notebook, "breaks_at", None)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "notebook", Notebook)
    return Notebook


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    made = Installation(tmp_path)
    made.give_feedback(seed=1)
    return made


def test_a_tracker_gets_exactly_what_the_store_gets(
    installation: Installation, notebook: type[Notebook]
) -> None:
    ended = installation.trainer(**QUICK, report_to=["notebook"]).run_once()
    assert ended is not None
    assert ended.state == "done"
    (run,) = notebook.runs
    assert (run.name, run.config, run.ended) == ("round-0001", ended.config, True)
    tracked = {(step, name): value for step, logs in run.logged for name, value in logs.items()}
    stored = {(m.step, f"{m.stage}/{m.name}"): m.value for m in installation.rounds.metrics(1)}
    assert tracked == stored
    assert {name.split("/")[0] for _, name in tracked} == {
        "sft",
        "reward_model",
        "judge",
        "ppo",
        "checkpoints",
    }


def test_a_tracker_that_breaks_is_left_out_and_the_round_goes_on(
    installation: Installation,
    notebook: type[Notebook],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(notebook, "breaks_at", "reward_model/loss")
    ended = installation.trainer(**QUICK, report_to=["notebook"]).run_once()
    assert ended is not None
    assert ended.state == "done"
    (run,) = notebook.runs
    assert {name.split("/")[0] for _, logs in run.logged for name in logs} == {"sft"}
    assert [record.message for record in caplog.records if record.name == "training.trackers"] == [
        "notebook takes no more figures: it is left out of this round"
    ]


def missing() -> str:
    """A tracker that Transformers knows and that is not installed here."""
    for name, available in (
        ("comet_ml", integration_utils.is_comet_available()),
        ("clearml", integration_utils.is_clearml_available()),
        ("tensorboard", integration_utils.is_tensorboard_available()),
    ):
        if not available:
            return name
    pytest.skip("every tracker is installed here")


@pytest.mark.parametrize("name", ["abacus", "<missing>"])
def test_a_tracker_that_can_t_be_used_is_refused(
    installation: Installation, notebook: type[Notebook], name: str
) -> None:
    name = missing() if name == "<missing>" else name
    ended = installation.trainer(**QUICK, report_to=["notebook", name]).run_once()
    assert ended is not None
    assert ended.state == "failed"
    assert str(ended.error).startswith(f"start: training.report_to: {name} can't be used: ")
    assert [run.ended for run in notebook.runs] == [True]
    assert installation.rounds.stages(1) == []


@pytest.mark.skipif(
    not integration_utils.is_tensorboard_available(), reason="tensorboard is not installed here"
)
def test_tensorboard_s_files_hold_the_curve(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(["tensorboard"], run_name="round-0001", directory=tmp_path, config={"a": 1}) as trackers:
        for step in (1, 2):
            trackers.log("ppo", step, {"objective/kl": step / 2})
    (directory,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    events = EventAccumulator(str(directory)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/ppo/objective/kl")] == [(1, 0.5), (2, 1.0)]


def test_without_trackers_nothing_is_made(tmp_path: Path) -> None:
    with Trackers([], run_name="round-0001", directory=tmp_path, config={}) as trackers:
        trackers.log("ppo", 1, {"objective/kl": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_away_at_the_start_is_refused(
    notebook: type[Notebook], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def away(self: Notebook, *arguments: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(notebook, "on_train_begin", away)
    with pytest.raises(RoundRefused, match=r"training.report_to: notebook can't be used: no route to host"):
        Trackers(["notebook"], run_name="r", directory=tmp_path, config={})
