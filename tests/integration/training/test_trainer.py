"""Rounds by a real trainer on a tiny model: repeats, pins, what is kept on disk, and how failures read."""

import errno
import hashlib
import json
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from unit.training.installation import EVALUATION, EVENTS, TRAINING, Installation

from evaluation.overoptimisation import Point
from evaluation.sampler import Sampler
from evaluation.settings import ConditionName, EvaluationSettings
from registry.registry import Desired
from registry.round_record import differences, read_record, same_weights
from registry.rounds import UnknownRound
from training.checkpoints import Watching, choose
from training.disk import tidy, weights_a_round
from training.failures import explain
from training.round import MOST_ATTEMPTS, STAGES, EngineFailed, RoundRefused
from training.samples import SAMPLES, SAMPLES_AN_UPDATE, SampleLog
from training.settings import TrainingSettings

QUICK: dict[str, Any] = {
    "reward_epochs": 1,
    "sft_epochs": 1.0,
    "ppo_updates": 2,
    "ppo_batch": 4,
    "ppo_samples_per_prompt": 1,
}


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    made = Installation(tmp_path)
    made.give_feedback(seed=1)
    return made


def kept(installation: Installation, number: int) -> set[str]:
    return {path.name for path in (installation.directory / "rounds" / f"{number:04d}").iterdir()}


RESULTS = {f"{stage}.json" for stage in STAGES} | {SAMPLES}


def test_a_candidate_that_passes_is_a_canary_first_where_the_settings_say_so(
    installation: Installation, caplog: pytest.LogCaptureFixture
) -> None:
    """One is on trial at a time: the next that passes stays a candidate, for an operator to decide."""
    registry, lenient = installation.registry, {"report_only": list(get_args(ConditionName))}
    trainer = installation.trainer(**QUICK, evaluation={**lenient, "canary_share": 0.25})
    first = trainer.run_once()
    assert first is not None
    assert (first.state, first.error) == ("done", None)
    assert registry.desired() == Desired("policy-0000", 2)
    trial = registry.trial()
    assert trial is not None
    assert (trial.version, trial.mode, trial.share) == (first.version, "canary", 0.25)
    assert registry.log()[-1].actor == "round 1"

    installation.give_feedback(seed=2)
    second = trainer.run_once()
    assert second is not None
    assert second.version is not None
    assert registry.trial() == trial
    assert registry.version(second.version).state == "candidate"
    assert (
        f"{second.version} passed the gate and stays a candidate: {first.version} is on trial" in caplog.text
    )


def test_a_repeat_gives_the_same_weights_and_moves_nothing(installation: Installation) -> None:
    first = installation.trainer(**QUICK).run_once()
    assert first is not None
    assert (first.state, first.error) == ("done", None)
    desired = installation.registry.desired()
    repeat = installation.trainer(**QUICK).repeat(1, {})
    assert (repeat.state, repeat.error, repeat.id, repeat.repeat_of) == ("done", None, 2, 1)
    assert (repeat.cursor, repeat.cutoff, repeat.config_hash) == (0, EVENTS, first.config_hash)
    one, two = (read_record(installation.rounds, installation.registry, number) for number in (1, 2))
    assert same_weights(one, two) is True
    found = [(item.section, item.name) for item in differences(one, two) if item.section != "seconds"]
    assert found == [("round", "repeat_of"), ("results", "publish.version")]
    assert repeat.version is not None
    assert installation.registry.version(repeat.version).state == "candidate"
    assert installation.registry.version(repeat.version).manifest.verdict == repeat.verdict
    assert installation.registry.desired() == desired
    # The next round goes on from the first: there is no new feedback, then just the new.
    assert installation.trainer(**QUICK).run_once() is None
    installation.give_feedback(seed=2)
    following = installation.trainer(**QUICK).run_once()
    assert following is not None
    assert (following.cursor, following.config["reward_model_from"]) == (EVENTS, 1)


def test_a_repeat_with_other_settings_differs_in_them_and_in_what_they_change(
    installation: Installation,
) -> None:
    installation.trainer(**QUICK).run_once()
    installation.trainer().repeat(1, {"training.ppo_updates": "3", "evaluation.temperature": 0.5})
    one, two = (read_record(installation.rounds, installation.registry, number) for number in (1, 2))
    found = differences(one, two)
    config = {item.name: (item.old, item.new) for item in found if item.section == "config"}
    assert config == {"training.ppo_updates": (2, 3), "evaluation.temperature": (0.7, 0.5)}
    assert same_weights(one, two) is False
    # What comes before PPO is the same, to the last digit.
    same = {item.name for item in found if item.section in ("results", "figures")}
    assert not any(name.startswith(("sft", "reward_model", "judge", "dataset")) for name in same)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.ppo_update": 3}, "training.ppo_update is not a setting of a round"),
        ({"server.port": 3}, "server.port is not a setting of a round"),
        ({"ppo_updates": 3}, "ppo_updates is not a setting of a round"),
        ({"training.ppo_updates": "many"}, "training.ppo_updates: Input should be a valid integer"),
        ({"training.ppo_updates": 0}, "training.ppo_updates: Input should be greater than or equal to 1"),
    ],
)
def test_wrong_overrides_are_refused_before_a_round_begins(
    installation: Installation, overrides: dict[str, Any], message: str
) -> None:
    failed = installation.trainer(minimum_judged=1000).run_once()
    assert failed is not None
    with pytest.raises(RoundRefused, match=message):
        installation.trainer().repeat(1, overrides)
    with pytest.raises(UnknownRound):
        installation.trainer().repeat(7, {})
    assert len(installation.rounds.list()) == 1


def test_a_round_that_is_not_finished_comes_before_a_repeat(installation: Installation) -> None:
    installation.trainer(minimum_judged=1000).run_once()
    config = installation.rounds.get(1).config
    installation.rounds.begin(0, EVENTS, config, 0)
    with pytest.raises(RoundRefused, match="round 2 was not finished: `instructloop train --once`"):
        installation.trainer().repeat(1, {})
    installation.rounds.finish(2, "failed")
    # Of the same repeat, killed, the rest is run.
    installation.rounds.begin(0, EVENTS, config, 0, repeat_of=1)
    ended = installation.trainer().repeat(1, {})
    assert (ended.id, ended.state) == (3, "failed")
    assert "at least 1000 are needed" in str(ended.error)


def test_old_rounds_leave_results_and_pinned_ones_can_be_repeated(installation: Installation) -> None:
    installation.trainer(**QUICK).run_once()
    installation.give_feedback(seed=2)
    installation.trainer(**QUICK).run_once()
    installation.rounds.pin(2)
    settings = QUICK | {"keep_rounds": 1, "keep_versions": 1}
    for seed in (3, 4):
        installation.give_feedback(seed)
        installation.trainer(**settings).run_once()
    installation.give_feedback(seed=5)
    failed = installation.trainer(**settings | {"minimum_judged": 1000}).run_once()
    assert failed is not None
    assert failed.state == "failed"
    assert kept(installation, 3) == RESULTS
    # Round 2 is pinned and started from the reward model of round 1; round 4 is what the next starts from.
    for number in (1, 2, 4):
        assert kept(installation, number) == RESULTS | {"reward_model", "judge"}
    states = {version.name: version.state for version in installation.registry.versions()}
    pinned = installation.rounds.get(2)
    assert "pruned" not in (states[str(pinned.version)], states[pinned.config["parent"]])
    # Of what was ruled out or has served its time, the newest alone keeps its weights.
    assert list(states.values()).count("pruned") >= 1
    assert installation.trainer(**settings).repeat(2, {}).state == "done"
    # What round 3 started from has been kept for round 2; round 4's start has gone.
    with pytest.raises(RoundRefused, match="round 3's reward model, which was tidied away: pin rounds"):
        installation.trainer(**settings).repeat(4, {})


def test_a_repeat_of_a_round_whose_parent_is_pruned_is_refused(installation: Installation) -> None:
    installation.trainer(minimum_judged=1000).run_once()
    original = installation.rounds.get(1)
    staging = installation.directory / "other"
    base = installation.registry.version("policy-0000").path
    for number in (8, 9):
        staging.mkdir()
        for file in ("config.json", "model.safetensors"):
            (staging / file).write_bytes((base / file).read_bytes())
        installation.registry.publish(staging, parent=None, round_id=number, kind="ppo", details={})
    installation.registry.prune(1)
    installation.rounds.finish(
        installation.rounds.begin(0, EVENTS, {**original.config, "parent": "policy-0001"}, 0).id, "done"
    )
    with pytest.raises(RoundRefused, match="policy-0001, whose weights were pruned since: pin rounds"):
        installation.trainer().repeat(2, {})


def test_only_what_is_named_survives_tidying(tmp_path: Path) -> None:
    for number in ("0001", "0002"):
        for name in ("sft", "ppo", "some_new_stage", "reward_model", "judge", "tracking"):
            (tmp_path / number / name).mkdir(parents=True)
            (tmp_path / number / name / "weights").write_text("w")
        (tmp_path / number / "samples.jsonl").write_text("{}")
    (tmp_path / "lock").touch()
    tidy(tmp_path, {2, None})
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        "lock",
        "0001/samples.jsonl",
        "0001/tracking/weights",
        "0002/samples.jsonl",
        "0002/tracking/weights",
        "0002/reward_model/weights",
        "0002/judge/weights",
    }


@pytest.mark.parametrize(
    "more",
    [{}, {"ppo_ema_decay": 0.9}, {"ppo_critic": "separate"}, {"ppo_lora_rank": 1}],
    ids=["full", "average", "critic", "adapters"],
)
def test_a_round_takes_no_more_disk_than_it_is_refused_on(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """The most that stood below its directory whenever PPO had written a checkpoint, against the estimate."""
    root = installation.directory / "rounds"
    sizes: list[int] = []
    rename = Path.rename

    def measuring(path: Path, target: Path) -> Path:
        sizes.append(sum(file.stat().st_size for file in root.rglob("*") if file.is_file()))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", measuring)
    settings = QUICK | {"ppo_checkpoint_updates": 1, **more}
    ended = installation.trainer(**settings).run_once()
    assert ended is not None
    assert ended.state == "done"
    weights = (installation.registry.version("policy-0000").path / "model.safetensors").stat().st_size
    bound = weights_a_round(TrainingSettings(**settings))
    # Without a full checkpoint the most is there when nothing is renamed.
    assert (0.7 if "ppo_lora_rank" in more else 0.9) * bound < max(sizes) / weights < 1.05 * bound


def test_a_round_is_refused_where_the_disk_is_too_small(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"total": 10**6, "used": 0, "free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    ended = installation.trainer(**QUICK).run_once()
    assert ended is not None
    assert ended.state == "failed"
    assert str(ended.error).startswith("start: a round from policy-0000 takes up to 0.0 GiB of disk and ")
    assert "lower training.keep_rounds" in str(ended.error)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of this process can't grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_ends_the_round_with_what_to_do(installation: Installation) -> None:
    # A connection that closes last empties the write-ahead log, which is larger.
    installation.engine.dispose()
    with largest_file(2_000_000):  # a checkpoint of PPO has 2.5 MB
        ended = installation.trainer(**QUICK | {"ppo_checkpoint_updates": 1}).run_once()
    assert ended is not None
    first, advice = str(ended.error).splitlines()
    assert first.startswith("ppo: ")
    assert advice.startswith("What to do: free disk space, or lower training.keep_rounds")
    # The room it took is given back, and the feedback is there for the next.
    assert "ppo" not in kept(installation, 1)
    following = installation.trainer(**QUICK).run_once()
    assert following is not None
    assert (following.state, following.cursor, following.cutoff) == ("done", 0, EVENTS)


@pytest.mark.parametrize(
    ("stage", "setting", "rate"),
    [
        ("sft", "sft_learning_rate", 1e30),
        ("reward_model", "reward_learning_rate", 1e38),
        ("ppo", "ppo_learning_rate", 1e30),
    ],
)
def test_a_learning_rate_that_diverges_is_named(
    installation: Installation, stage: str, setting: str, rate: float
) -> None:
    settings = QUICK | {"sft_epochs": 4.0, "reward_epochs": 4, setting: rate}
    ended = installation.trainer(**settings).run_once()
    assert ended is not None
    assert ended.state == "failed"
    first, advice = str(ended.error).splitlines()
    assert first.startswith(f"{stage}: ")
    assert f"lower training.{setting}" in advice


def test_an_engine_that_does_not_start_is_named(installation: Installation) -> None:
    def refuse(model_dir: Path, settings: TrainingSettings) -> Sampler:
        raise ValueError("No available memory for the cache blocks.\nSee the root cause above.")

    ended = installation.trainer(**QUICK, make_sampler=refuse).run_once()
    assert ended is not None
    assert str(ended.error).startswith("ppo: the rollout engine did not start: No available memory for the")
    assert "training.kv_cache_gib" in str(ended.error).splitlines()[1]


def test_a_stage_whose_process_is_killed_again_and_again_is_given_up(installation: Installation) -> None:
    settings = TrainingSettings(**TRAINING | QUICK).model_dump(mode="json")
    evaluation = EvaluationSettings(**EVALUATION).model_dump(mode="json")
    config = {
        "parent": "policy-0000",
        "reward_model_from": None,
        "training": settings,
        "evaluation": evaluation,
    }
    for killed, state in ((MOST_ATTEMPTS - 1, "done"), (MOST_ATTEMPTS, "failed")):
        number = installation.rounds.begin(0, EVENTS, config, 0).id
        for _ in range(killed):
            installation.rounds.stage(number, "sft", "running")
        ended = installation.trainer(**QUICK).run_once()
        assert ended is not None
        assert (ended.id, ended.state) == (number, state)
    assert str(ended.error).startswith("sft: its process was killed 20 times, most likely for want of memory")


def raised(function: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # whatever the library raises
        function()
    return caught.value


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (raised(lambda: torch.empty(1 << 60)), "training.prompt_tokens"),
        (raised(lambda: bytearray(1 << 62)), "training.prompt_tokens"),
        (raised(lambda: Path("/dev/full").write_text("x")), "free disk space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free disk space"),
        (EngineFailed("the rollout engine did not start: out of memory"), "training.kv_cache_gib"),
        (KeyError("unforeseen"), "the trainer's log has the traceback"),
    ],
    ids=["torch", "memory", "disk", "quota", "engine", "defect"],
)
def test_failures_name_stage_reason_and_remedy(problem: Exception, says: str) -> None:
    first, advice = explain("ppo", problem).splitlines()
    assert first.startswith("ppo: ")
    assert len(first) > len("ppo: ")
    assert says in advice


def test_a_refusal_speaks_for_itself() -> None:
    assert explain("dataset", RoundRefused("collect more")) == "dataset: collect more"


def test_each_update_leaves_samples(installation: Installation) -> None:
    installation.trainer(**QUICK).run_once()
    found = SampleLog(installation.directory / "rounds" / "0001").read()
    assert [line["update"] for line in found] == [1] * SAMPLES_AN_UPDATE + [2] * SAMPLES_AN_UPDATE
    scores = [m.value for m in installation.rounds.metrics(1) if m.name == "objective/scores"]
    # With four episodes an update, the samples are all of them.
    assert sum(line["score"] for line in found[:4]) / 4 == pytest.approx(scores[0], rel=1e-4)
    assert all(line["prompt"].endswith("assistant") for line in found)


def test_results_stand_in_the_store_as_on_disk(installation: Installation) -> None:
    installation.trainer(**QUICK).run_once()
    stages = installation.rounds.stages(1)
    assert [stage.name for stage in stages] == list(STAGES)
    for stage in stages:
        path = installation.directory / "rounds" / "0001" / f"{stage.name}.json"
        assert stage.result == json.loads(path.read_text())
        assert stage.seconds is not None


def test_the_checkpoint_that_gold_likes_best_is_published(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: dict[int, str] = {}
    placed: list[Point] = []

    def remember(watching: Watching, candidates: Mapping[int, Path], report: Callable[[Point], None]) -> Any:
        for update, directory in candidates.items():
            offered[update] = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        _, points = choose(watching, candidates, report)
        placed.extend(points)
        # As if the judge had liked the first one best.
        return points[0], points

    monkeypatch.setattr("training.round.choose", remember)
    ended = installation.trainer(**QUICK | {"ppo_updates": 4, "ppo_checkpoints": 2}).run_once()
    assert ended is not None
    assert ended.state == "done", ended.error
    assert list(offered) == [2, 4]
    assert len(set(offered.values())) == 2
    assert installation.weights(ended.version) == offered[2]
    result = {stage.name: stage.result for stage in installation.rounds.stages(1)}["checkpoints"]
    assert result is not None
    assert (result["update"], result["held_out"]) == (2, False)  # 40 prompts are too few for gate and choice
    steps = {m.step for m in installation.rounds.metrics(1) if m.stage == "checkpoints"}
    assert steps == {0, 2, 4}
    assert ended.verdict is not None
    names = [condition["name"] for condition in ended.verdict["conditions"]]
    assert names == ["decided prompts", "win rate", "KL", "gold against proxy"]
    assert ended.verdict["figures"]["watch"]["update"] == 2
    assert any("chosen among 2 by the gold judge" in reason for reason in ended.verdict["reasons"])
    assert placed[0].kl != placed[1].kl


def test_without_checkpoints_the_last_policy_is_published_unwatched(installation: Installation) -> None:
    ended = installation.trainer(**QUICK | {"ppo_checkpoints": 0}).run_once()
    assert ended is not None
    assert ended.verdict is not None
    assert len(ended.verdict["conditions"]) == 3
    assert [m for m in installation.rounds.metrics(1) if m.stage == "checkpoints"] == []
