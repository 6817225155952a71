"""A training round: the slice of new feedback becomes a candidate version, and the gate decides on it.

Owns the order of the stages, their files and their resumption. A stage that has ended has left
`<stage>.json` in the round's directory and is not run again; one that was killed starts over (PPO from its
last checkpoint), on the same data with the same seeds. The stage `ppo` is that of the configured algorithm,
whichever it is. What happens inside a stage is in its own module; when
a round is due is `training/trainer.py`'s.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evaluation.comparison import Interval, clustered_mean
from evaluation.contest import Prompt, answers, compare
from evaluation.gate import decide, gather
from evaluation.reward_model import RewardModel, score_responses
from evaluation.sampler import Sample, Sampler
from evaluation.settings import EvaluationSettings
from feedback.store import Store
from registry.registry import Registry
from registry.rounds import Round, Rounds
from training.algorithms import Task, train
from training.dataset import Dataset, Side, build
from training.logprobs import total_logprobs
from training.policy import Policy, load_policy, write_checkpoint
from training.progress import Progress
from training.reward_model import Report, accuracy_by_source, fit
from training.rollouts import Rollouts
from training.settings import TrainingSettings
from training.sft import checkpoint_epochs, fine_tune

STAGES = ("dataset", "sft", "reward_model", "judge", "select", "ppo", "publish", "gate")
WORKING_FILES = ("sft", "sft_epochs", "sft_work", "ppo", "candidate", "rollout")
"""What a round needs no more once its candidate is published."""

Result = Mapping[str, Any]
SamplerFactory = Callable[[Path, TrainingSettings], Sampler]


class RoundRefused(ValueError):  # noqa: N818
    """A round can't be run on this data; the message says what is missing."""


class RoundRun:
    """One round's run through the stages, in its own `directory` beside those of the other rounds.

    `make_sampler` starts the engine for rollouts and held-out answers, when a stage first needs it.
    """

    def __init__(
        self,
        round_: Round,
        directory: Path,
        *,
        store: Store,
        registry: Registry,
        rounds: Rounds,
        make_sampler: SamplerFactory,
    ) -> None:
        self._round = round_
        self._directory = directory
        self._store = store
        self._registry = registry
        self._rounds = rounds
        self._make_sampler = make_sampler
        # The round's own settings: a resumed round goes on as it began, whatever has been changed since.
        self._settings = TrainingSettings(**round_.config["training"])
        self._evaluation = EvaluationSettings(**round_.config["evaluation"])
        self._parent = registry.version(round_.config["parent"])
        self._sampler: Sampler | None = None

    def run(self) -> tuple[Result, str]:
        """Run the stages that are left; return the verdict and the candidate's name."""
        try:
            self._prepare()
            self._stage("ppo", self._ppo)
            version = self._stage("publish", self._publish)["version"]
            verdict = self._stage("gate", lambda: self._gate(version))
        finally:
            self._close()
        self._act(version, verdict)
        return verdict, version

    def _prepare(self) -> None:
        """Run the stages up to the SFT policy and the reward models, as far as they are left."""
        self._directory.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(self._settings.threads or torch.get_num_threads())
        self._stage("dataset", self._describe_dataset)
        self._stage("sft", self._sft)
        self._stage("reward_model", self._reward_model)
        self._stage("judge", self._judge)
        self._stage("select", self._select)

    def _close(self) -> None:
        """End the engine, if it was started."""
        if self._sampler is not None:
            self._sampler.close()

    def _stage(self, name: str, run: Callable[[], Result]) -> Result:
        """Return what stage `name` left behind, after running it if it has not ended yet."""
        done = self._directory / f"{name}.json"
        if not done.exists():
            self._rounds.stage(self._round.id, name, "running")
            torch.manual_seed(self._settings.seed)
            result = run()
            staging = done.with_suffix(".partial")
            staging.write_text(json.dumps(result, indent=1))
            staging.rename(done)
            self._rounds.stage(self._round.id, name, "done")
        found: Result = json.loads(done.read_text())
        return found

    # -- the stages

    def _describe_dataset(self) -> Result:
        data = self._dataset
        for name, side in (("training", data.train), ("held-out", data.held_out)):
            judged = len(side.comparisons) + len(side.judgements)
            if judged < self._settings.minimum_judged:
                raise RoundRefused(
                    f"only {judged} usable rankings, thumbs and ratings on the {name} prompts, "
                    f"at least {self._settings.minimum_judged} are needed: collect more feedback"
                )
        return {
            "train": data.train.counts(),
            "held_out": data.held_out.counts(),
            "left_out": dict(data.left_out),
        }

    def _sft(self) -> Result:
        """Fine-tune the version in service on what people wrote, where they wrote enough."""
        target, checkpoints = self._directory / "sft", self._directory / "sft_epochs"
        demonstrations = self._dataset.train.demonstrations
        if len(demonstrations) < self._settings.sft_minimum:
            model = load_policy(self._parent.path)
            write_checkpoint(model, self._tokenizer, target)
            return {
                "skipped": f"{len(demonstrations)} demonstrations, {self._settings.sft_minimum} are needed"
            }
        kept = checkpoint_epochs(self._settings.sft_epochs, self._settings.sft_checkpoints)
        epochs: list[dict[str, Any]] = []

        def epoch_end(epoch: int, loss: float, policy: Policy) -> None:
            epochs.append({"epoch": epoch, "loss": loss, "kept": epoch in kept})
            if epoch in kept:
                write_checkpoint(policy, self._tokenizer, checkpoints / str(epoch))

        with self._progress("sft") as report:
            model = fine_tune(
                self._parent.path,
                self._tokenizer,
                demonstrations,
                settings=self._settings,
                work=self._directory / "sft_work",
                report=report,
                epoch_end=epoch_end,
            )
        write_checkpoint(model, self._tokenizer, target)
        return {"demonstrations": len(demonstrations), "epochs": epochs}

    def _reward_model(self) -> Result:
        """Fit the reward model that PPO maximises, on the training prompts."""
        previous = self._round.config["reward_model_from"]
        start = self._directory.parent / f"{previous:04d}" / "reward_model" if previous is not None else None
        model = self._fit(self._dataset.train, "reward_model", start)
        return self._accuracy(model, "reward_model", self._dataset.held_out)

    def _judge(self) -> Result:
        """Fit the gate's own reward model, on the prompts that PPO never sees."""
        model = self._fit(self._dataset.held_out, "judge", None)
        # The other side's pairs are new to this one.
        return self._accuracy(model, "judge", self._dataset.train)

    def _select(self) -> Result:
        """Let the reward model choose among SFT's checkpoints: the one whose answers score highest.

        By validation loss it would be an early one, though people prefer later ones (Ouyang et al. 2022,
        section 3.5). Of equal ones the earliest is taken, as it is nearest to the version in service.
        """
        sft = self._result("sft")
        candidates = [item for item in sft.get("epochs", ()) if item["kept"]]
        prompts = self._dataset.train.sorted_prompts()[: self._settings.sft_selection_prompts]
        if "skipped" in sft:
            return {"skipped": "there was no SFT"}
        if len(candidates) < 2 or len(prompts) < 2:
            return {"skipped": "it takes two checkpoints and two prompts to choose"}
        model = RewardModel.load(self._directory / "reward_model")
        scored = []
        for item in candidates:
            checkpoint = self._directory / "sft_epochs" / str(item["epoch"])
            samples = answers(self._engine, checkpoint, prompts, self._evaluation, self._settings.seed)
            score = _mean_score(model, prompts, samples, self._evaluation)
            scored.append({"epoch": item["epoch"], "loss": item["loss"], "score": score.figures()})
            figures = {"score": score.estimate, "score/low": score.low, "score/high": score.high}
            self._rounds.metric(self._round.id, "select", item["epoch"], figures | {"loss": item["loss"]})
        chosen = max(scored, key=lambda item: item["score"]["estimate"])["epoch"]
        _replace(self._directory / "sft_epochs" / str(chosen), self._directory / "sft")
        return {"epoch": chosen, "epochs": scored}

    def _ppo(self) -> Result:
        """Train the policy by the configured algorithm."""
        with self._progress("ppo") as report:
            policy, result = train(self._task(self._settings, self._directory / "ppo", report))
        write_checkpoint(policy, self._tokenizer, self._directory / "candidate")
        return {"algorithm": self._settings.algorithm, **result}

    def _publish(self) -> Result:
        version = self._registry.publish(
            self._directory / "candidate",
            parent=self._parent.name,
            round_id=self._round.id,
            kind=self._settings.algorithm,
            details={
                "base": self._parent.manifest.details.get("base", self._parent.name),
                "slice": [self._round.cursor, self._round.cutoff],
                "config_hash": self._round.config_hash,
                "seed": self._settings.seed,
                "stages": {name: self._result(name) for name in STAGES if name not in ("publish", "gate")},
            },
        )
        return {"version": version.name}

    def _gate(self, name: str) -> Result:
        """Let the candidate and the version in service answer held-out prompts, and decide."""
        desired = self._registry.desired()
        incumbent = self._registry.version(
            desired.name if desired and desired.name != name else self._parent.name
        )
        candidate = self._registry.version(name)
        prompts = self._dataset.held_out.sorted_prompts()[: self._evaluation.prompts]
        seed = self._settings.seed
        ours = answers(self._engine, candidate.path, prompts, self._evaluation, seed)
        theirs = answers(self._engine, incumbent.path, prompts, self._evaluation, seed)
        comparisons = compare(RewardModel.load(self._directory / "judge"), prompts, ours, theirs)
        kl = kl_from(load_policy(incumbent.path), prompts, ours, self._evaluation.temperature)
        verdict = decide(gather(comparisons, kl, self._evaluation, seed=seed), self._evaluation)
        return {**verdict.as_dict(), "incumbent": incumbent.name}

    def _act(self, version: str, verdict: Result) -> None:
        """Record the verdict and do what it says; done again after a kill, it changes nothing."""
        self._registry.annotate(version, verdict=verdict)
        if self._registry.version(version).state != "candidate":
            return
        actor, reason = f"round {self._round.id}", " ".join(verdict["reasons"])
        if verdict["promote"]:
            self._registry.promote(version, actor=actor, reason=reason)
        else:
            self._registry.reject(version, actor=actor, reason=reason)

    # -- what the stages share

    def _task(
        self, settings: TrainingSettings, work: Path, report: Report, updates: int | None = None
    ) -> Task:
        return Task(
            policy=load_policy(self._directory / "sft"),
            tokenizer=self._tokenizer,
            side=self._dataset.train,
            reward_model=self._directory / "reward_model",
            rollouts=Rollouts(
                self._engine,
                self._tokenizer,
                self._directory / "rollout",
                max_tokens=settings.ppo_response_tokens,
                temperature=settings.ppo_temperature,
            ),
            settings=settings,
            work=work,
            report=report,
            updates=updates,
        )

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(str(self._parent.path))

    @cached_property
    def _dataset(self) -> Dataset:
        assert self._round.cursor is not None and self._round.cutoff is not None
        return build(
            self._store.slice(self._round.cursor, self._round.cutoff), self._tokenizer, self._settings
        )

    @cached_property
    def _engine(self) -> Sampler:
        self._sampler = self._make_sampler(self._parent.path, self._settings)
        return self._sampler

    def _fit(self, side: Side, name: str, start: Path | None) -> RewardModel:
        # As in InstructGPT, a first reward model starts from the SFT policy, with a new head.
        model = RewardModel.load(start) if start else RewardModel.from_decoder(self._directory / "sft")
        with self._progress(name) as report:
            fit(model, side, self._settings, report)
        model.save(self._directory / name)
        return model

    def _accuracy(self, model: RewardModel, stage: str, unseen: Side) -> Result:
        """Keep and return how often `model` is right on pairs of prompts that it was not fitted to."""
        accuracy = accuracy_by_source(model, unseen.comparisons, self._settings.seed)
        figures = {
            f"held_out_accuracy/{source}/{name}": interval.estimate
            for source, by_name in accuracy.items()
            for name, interval in by_name.items()
        }
        self._rounds.metric(self._round.id, stage, 0, figures)
        return {
            "held_out_accuracy": {
                source: {name: interval.figures() for name, interval in by_name.items()}
                for source, by_name in accuracy.items()
            }
        }

    def _progress(self, stage: str) -> Progress:
        return Progress(
            stage, lambda step, figures: self._rounds.metric(self._round.id, stage, step, figures)
        )

    def _result(self, stage: str) -> Result:
        found: Result = json.loads((self._directory / f"{stage}.json").read_text())
        return found


def kl_from(
    reference: Policy,
    prompts: Sequence[Prompt],
    ours: Sequence[Sequence[Sample]],
    temperature: float,
) -> float:
    """Mean over a policy's answers of log pi - log pi_reference, in nats a response.

    Both at the answers' sampling temperature, where the mean estimates KL(pi || pi_reference).
    """
    pairs = [
        (prompt.token_ids, sample)
        for prompt, samples in zip(prompts, ours, strict=True)
        for sample in samples
    ]
    theirs = total_logprobs(reference, [(prompt, sample.token_ids) for prompt, sample in pairs], temperature)
    gaps = [sum(sample.logprobs) - their for (_, sample), their in zip(pairs, theirs, strict=True)]
    return float(sum(gaps) / len(gaps))


def _mean_score(
    model: RewardModel,
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[Sample]],
    settings: EvaluationSettings,
) -> Interval:
    items = [
        (prompt.token_ids, [sample.token_ids for sample in own])
        for prompt, own in zip(prompts, samples, strict=True)
    ]
    scores = [
        (prompt.key, score)
        for prompt, own in zip(prompts, score_responses(model, items), strict=True)
        for score in own
    ]
    return clustered_mean(
        [key for key, _ in scores],
        [score for _, score in scores],
        confidence=settings.confidence,
        resamples=settings.resamples,
    )


def _replace(source: Path, target: Path) -> None:
    """Make `target` a copy of the directory `source`; done again after a kill, it ends the same."""
    staging = target.with_name(f"{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
