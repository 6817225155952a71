"""Algorithms side by side on one slice of feedback, each with the same compute.

Owns how a comparison is run and what is reported of it. It is a round up to the SFT policy and the reward
models, from which each algorithm then sets out with each seed; what they learned is measured on held-out
prompts against the SFT policy. Nothing is published, and neither registry nor rounds are changed.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from evaluation.contest import Prompt, answers, compare
from evaluation.gate import Comparison, gather
from evaluation.report import Report as Page
from evaluation.report import Response
from evaluation.reward_model import DEVICE, RewardModel
from evaluation.sampler import Sample
from evaluation.settings import EvaluationSettings
from feedback.settings import RaterSettings
from feedback.store import Store
from registry.registry import Registry
from registry.rounds import Round, Rounds, Stage, UnknownRound
from training.algorithms import train
from training.logprobs import kl_from
from training.policy import Policy, load_policy, write_checkpoint
from training.rater_weights import next_standing
from training.reward_model import Report
from training.round import Result, RoundRun, SamplerFactory
from training.settings import TrainingSettings

UNIT = "CPU seconds" if DEVICE.type == "cpu" else "seconds"
SHOWN_PROMPTS = 5
TRIAL_UPDATES = 2


class ComparisonProblem(ValueError):  # noqa: N818
    """The algorithms can't be compared; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What each algorithm may use with each seed: `seconds` of compute, turned into whole updates.

    A trial of a few updates tells how long one takes. So a run is planned to its end, and its learning rate
    comes down as it would in a round; stopped by the clock it would be measured half-way.
    """

    seconds: float

    def updates(self, first: float, each: float) -> int:
        """Return how many updates fit, at least one; `first` is that of the first with all preparations."""
        return max(1, 1 + int((self.seconds - first) / max(each, 1e-9)))


def compute_seconds() -> float:
    """CPU seconds of this process and those it started (the engine), or elapsed ones where a GPU computes."""
    if DEVICE.type != "cpu":
        return time.monotonic()
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return float(sum(spent.user + spent.system for spent in times))


def slice_to_compare(
    store: Store, registry: Registry, rounds: Rounds, round_id: int | None
) -> dict[str, Any]:
    """Return `cursor`, `cutoff` and `parent` of a round (the last one that is done), else of all feedback.

    With a round come the raters that it left out.
    Raises ComparisonProblem.
    """
    try:
        chosen = rounds.last_done() if round_id is None else rounds.get(round_id)
    except UnknownRound as problem:
        raise ComparisonProblem(str(problem)) from None
    if chosen is not None:
        if chosen.cutoff is None:
            raise ComparisonProblem(f"round {chosen.id} has not begun, so it has no feedback of its own")
        found = {"cursor": chosen.cursor, "cutoff": chosen.cutoff, "parent": chosen.config["parent"]}
        return found | {key: chosen.config[key] for key in ("without_raters",) if key in chosen.config}
    desired = registry.desired()
    if desired is None:
        raise ComparisonProblem("no version is in service, so there is nothing to train from")
    return {"cursor": 0, "cutoff": store.head(), "parent": desired.name}


class ComparisonRun(RoundRun):
    """A round's preparation once, then every algorithm with every seed; resumable as a round is.

    `directory` is its own, and its working files are deleted when it has come to its end.
    """

    def __init__(
        self,
        chosen: Mapping[str, Any],
        directory: Path,
        *,
        training: TrainingSettings,
        evaluation: EvaluationSettings,
        budget: Budget,
        store: Store,
        registry: Registry,
        make_sampler: SamplerFactory,
        raters: RaterSettings | None = None,
    ) -> None:
        config = {
            "parent": chosen["parent"],
            "reward_model_from": None,
            "without_raters": chosen.get("without_raters", []),
            "training": training.model_dump(mode="json"),
            "evaluation": evaluation.model_dump(mode="json"),
            "raters": (raters or RaterSettings()).model_dump(mode="json"),
            "standing": next_standing(store, None, chosen["cursor"], chosen["cutoff"]).as_dict(),
        }
        self._config = config | {"slice": [chosen["cursor"], chosen["cutoff"]], "budget": budget.seconds}
        self._budget = budget
        self._sft_answers: dict[int, list[list[Sample]]] = {}
        super().__init__(
            _round(chosen, config),
            directory / "work",
            store=store,
            registry=registry,
            rounds=_Unrecorded(),
            make_sampler=make_sampler,
            track=lambda *_: None,
        )

    def compare(self, algorithms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
        """Return the comparison as plain JSON; raises ComparisonProblem."""
        self._check_directory()
        results = []
        try:
            self._prepare()
            for algorithm in algorithms:
                trial = partial(self._trial, algorithm)
                updates = self._stage(f"{algorithm}-trial", trial)["updates"]
                runs = [
                    self._stage(f"{algorithm}-{seed}", partial(self._learn, algorithm, seed, updates))
                    for seed in seeds
                ]
                results.append(summary(algorithm, runs, self._evaluation))
        finally:
            self._close()
        stages = ("dataset", "sft", "reward_model", "judge", "select")
        compared = {
            **self._config,
            "unit": UNIT,
            "seeds": list(seeds),
            "prompts": self._shown_prompts(),
            "stages": {name: self._result(name) for name in stages},
            "algorithms": results,
        }
        shutil.rmtree(self._directory)
        return compared

    def _score_for_queries(self, model: RewardModel) -> None:
        """Ask nobody anything: that is for rounds."""

    def _check_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / "config.json"
        text = json.dumps(self._config, indent=1, sort_keys=True)
        if file.exists() and file.read_text() != text:
            raise ComparisonProblem(
                f"{self._directory} is of an unfinished comparison on other feedback or settings: "
                "delete it, or choose another directory"
            )
        file.write_text(text)

    def _trial(self, algorithm: str) -> Result:
        marks: list[float] = []
        settings = self._settings.model_copy(update={"algorithm": algorithm})
        start, _ = self._timed(settings, TRIAL_UPDATES, lambda *_: marks.append(compute_seconds()))
        each = (marks[-1] - marks[0]) / max(1, len(marks) - 1)
        return {"updates": self._budget.updates(marks[0] - start, each), "seconds_an_update": each}

    def _learn(self, algorithm: str, seed: int, updates: int) -> Result:
        """Train with one seed and measure what came of it on held-out prompts."""
        settings = self._settings.model_copy(update={"algorithm": algorithm, "seed": seed})
        done = 0

        def keep(step: int, steps: int, figures: Mapping[str, float]) -> None:
            nonlocal done
            done = step
            report(step, steps, figures)

        with self._progress(f"{algorithm}, seed {seed}") as report:
            start, policy = self._timed(settings, updates, keep)
        seconds = compute_seconds() - start
        write_checkpoint(policy, self._tokenizer, self._directory / "policy")
        del policy
        prompts = self._prompts()
        ours = answers(self._engine, self._directory / "policy", prompts, self._evaluation, seed)
        comparisons = compare(self._judge_model(), prompts, ours, self._answers_of_sft(seed))
        sft = load_policy(self._directory / "sft")
        return {
            "seed": seed,
            "updates": done,
            "seconds": seconds,
            "kl": kl_from(sft, prompts, ours, self._evaluation.temperature),
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "answers": [samples[0].text for samples in ours[:SHOWN_PROMPTS]],
            "sft_answers": [samples[0].text for samples in self._answers_of_sft(seed)[:SHOWN_PROMPTS]],
        }

    def _timed(self, settings: TrainingSettings, updates: int, report: Report) -> tuple[float, Policy]:
        """Return the compute used before training, and the trained policy."""
        work = self._directory / "algorithm"
        shutil.rmtree(work, ignore_errors=True)  # what a killed run left must not save this one its compute
        task = self._task(settings, work, report, updates)  # starts the engine, which is nobody's expense
        torch.manual_seed(settings.seed)
        start = compute_seconds()
        return start, train(task)[0]

    def _answers_of_sft(self, seed: int) -> list[list[Sample]]:
        if seed not in self._sft_answers:
            self._sft_answers[seed] = answers(
                self._engine, self._directory / "sft", self._prompts(), self._evaluation, seed
            )
        return self._sft_answers[seed]

    def _judge_model(self) -> RewardModel:
        return RewardModel.load(self._directory / "judge")

    def _prompts(self) -> list[Prompt]:
        return self._dataset.held_out.sorted_prompts()[: self._evaluation.prompts]

    def _shown_prompts(self) -> list[str]:
        shown = [prompt.token_ids for prompt in self._prompts()[:SHOWN_PROMPTS]]
        return [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in shown]


def summary(algorithm: str, runs: Sequence[Result], settings: EvaluationSettings) -> dict[str, Any]:
    """Return an algorithm's figures over its `runs`, one to a seed.

    Win rates are over the SFT policy, with intervals over held-out prompts: by the checks where a prompt has
    some and else by the held-out judge (`win_rate`), and by each alone. None where none can be told.
    """
    comparisons = [Comparison(**item) for run in runs for item in run["comparisons"]]
    evidence = gather(comparisons, None, settings)
    by_seed = [[Comparison(**item).combined for item in run["comparisons"]] for run in runs]
    return {
        "algorithm": algorithm,
        "win_rate": evidence.combined and evidence.combined.figures(),
        "win_rate_by_checks": evidence.checks and evidence.checks.figures(),
        "win_rate_by_judge": evidence.judge and evidence.judge.figures(),
        "win_rate_by_seed": [sum(outcomes) / len(outcomes) for outcomes in by_seed],
        "kl": [run["kl"] for run in runs],
        "seconds": [run["seconds"] for run in runs],
        "updates": [run["updates"] for run in runs],
        "answers": runs[0]["answers"],
        "sft_answers": runs[0]["sft_answers"],
    }


def table(compared: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the comparison as rows of text, the first of which is the header."""
    rows: list[tuple[str, ...]] = [
        ("ALGORITHM", "WIN RATE OVER SFT", "BY CHECKS", "BY JUDGE", "BY SEED", "KL", "UPDATES", UNIT.upper())
    ]
    for item in compared["algorithms"]:
        rates = [item[name] for name in ("win_rate", "win_rate_by_checks", "win_rate_by_judge")]
        rows.append(
            (
                item["algorithm"],
                *(_interval(rate) for rate in rates),
                " ".join(f"{rate:.3f}" for rate in item["win_rate_by_seed"]),
                f"{_mean(item['kl']):.2f}",
                f"{_mean(item['updates']):.0f}",
                f"{_mean(item['seconds']):.0f}",
            )
        )
    return rows


def write(compared: Mapping[str, Any], directory: Path) -> None:
    """Write `comparison.json` and `comparison.html`; raises `evaluation.report.ReportProblem`."""
    page = Page(
        "Algorithms compared",
        f"On the feedback at positions {compared['slice'][0]} to {compared['slice'][1]}, from "
        f"{compared['parent']}; {compared['budget']:g} {compared['unit']} to each algorithm and seed.",
    )
    header, *rows = table(compared)
    page.heading("Over the SFT policy, on held-out prompts")
    page.table([text.capitalize() for text in header], rows, caption=_CAPTION)
    names = [item["algorithm"] for item in compared["algorithms"]]
    rates = [item["win_rate"] for item in compared["algorithms"]]
    if all(rates):
        page.bars(
            "Win rate over the SFT policy, with its interval's bounds",
            names,
            {
                "upper bound": [rate["high"] for rate in rates],
                "win rate": [rate["estimate"] for rate in rates],
                "lower bound": [rate["low"] for rate in rates],
            },
            x_label="win rate",
            limits=(0, 1),
        )
    page.heading("Answers with the first seed")
    responses = [(compared["algorithms"][0]["sft_answers"]), *(a["answers"] for a in compared["algorithms"])]
    page.samples(
        ["SFT", *names],
        [
            (prompt, [Response(texts[i]) for texts in responses])
            for i, prompt in enumerate(compared["prompts"])
        ],
    )
    page.write(directory / "comparison.html")
    (directory / "comparison.json").write_text(json.dumps(compared, indent=1))


_CAPTION = (
    "Win rates with intervals over prompts, all seeds together: by a prompt's checks where it has some, "
    "else by the reward model of the held-out side. KL from the SFT policy in nats a response. Compute is"
    " what training used with one seed; an algorithm that was through its data earlier used less."
)


class _Unrecorded(Rounds):
    """Takes a run's stages and figures, and keeps nothing."""

    def __init__(self) -> None:
        pass

    def stage(self, round_id: int, name: str, state: str, *_: object) -> None:
        pass

    def stages(self, round_id: int) -> list[Stage]:
        return []

    def record_uses(self, round_id: int, *_: object) -> None:
        pass

    def record_older(self, round_id: int, *_: object) -> None:
        pass

    def metric(self, round_id: int, stage: str, step: int, values: Mapping[str, float]) -> None:
        pass


def _round(chosen: Mapping[str, Any], config: Mapping[str, Any]) -> Round:
    unset: dict[str, Any] = dict.fromkeys(field.name for field in fields(Round))
    begun = {"id": 0, "state": "running", "cursor": chosen["cursor"], "cutoff": chosen["cutoff"]}
    return Round(**unset | begun | {"config": config, "seed": config["training"]["seed"]})


def _interval(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    return f"{figures['estimate']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
