"""A training round: the slice of new feedback becomes a candidate version, and the gate decides on it.

Owns the order of the stages, their files and their resumption. A stage that has ended has left
`<stage>.json` in the round's directory and is not run again; one that was killed starts over (PPO from its
last checkpoint), on the same data with the same seeds. What happens inside a stage is in its own module; when
a round is due is `training/trainer.py`'s.
"""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evaluation.contest import Prompt, answers, compare
from evaluation.gate import decide, gather
from evaluation.reward_model import RewardModel
from evaluation.sampler import Sampler
from evaluation.settings import EvaluationSettings
from feedback.store import Store
from registry.registry import Registry
from registry.rounds import Round, Rounds
from training.dataset import Dataset, Side, build
from training.logprobs import total_logprobs
from training.policy import Policy, load_policy, with_adapter, write_checkpoint
from training.ppo import PPO
from training.pretraining import PretrainingTexts, read_prompts
from training.progress import Progress
from training.reward_model import accuracy_by_source, fit
from training.rollouts import Rollouts
from training.samples import SampleLog
from training.settings import TrainingSettings
from training.sft import fine_tune

STAGES = ("dataset", "sft", "reward_model", "judge", "ppo", "publish", "gate")
MODELS = ("reward_model", "judge")
"""What is kept of a round that has ended, for as long as `training/disk.py` says: its reward models."""

MOST_ATTEMPTS = 20
"""How often a stage is begun; beyond that it is no power cut, but the kernel that kills it for its memory."""

Result = Mapping[str, Any]
SamplerFactory = Callable[[Path, TrainingSettings], Sampler]
Track = Callable[[str, int, Mapping[str, float]], None]
"""Called with the stage, the step and the step's figures."""


class RoundRefused(ValueError):  # noqa: N818
    """A round can't be run on this data or this machine; the message says what is missing."""


class EngineFailed(RuntimeError):  # noqa: N818
    """The engine for rollouts and held-out answers did not start."""


class RoundRun:
    """One round's run through the stages, in its own `directory` beside those of the other rounds.

    `make_sampler` starts the engine for rollouts and held-out answers, when a stage first needs it; `track`
    gets every figure that is stored.
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
        track: Track,
    ) -> None:
        self._round = round_
        self._directory = directory
        self._store = store
        self._registry = registry
        self._rounds = rounds
        self._make_sampler = make_sampler
        self._track = track
        # The round's own settings: a resumed round goes on as it began, whatever has been changed since.
        self._settings = TrainingSettings(**round_.config["training"])
        self._evaluation = EvaluationSettings(**round_.config["evaluation"])
        self._parent = registry.version(round_.config["parent"])
        self._sampler: Sampler | None = None

    def run(self) -> tuple[Result, str]:
        """Run the stages that are left; return the verdict and the candidate's name."""
        self._directory.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(self._settings.threads or torch.get_num_threads())
        try:
            self._stage("dataset", self._describe_dataset)
            self._stage("sft", self._sft)
            self._stage("reward_model", self._reward_model)
            self._stage("judge", self._judge)
            self._stage("ppo", self._ppo)
            version = self._stage("publish", self._publish)["version"]
            verdict = self._stage("gate", lambda: self._gate(version))
        finally:
            if self._sampler is not None:
                self._sampler.close()
        self._act(version, verdict)
        return verdict, version

    def _stage(self, name: str, run: Callable[[], Result]) -> Result:
        """Return what stage `name` left behind, after running it if it has not ended yet."""
        done = self._directory / f"{name}.json"
        if not done.exists():
            self._rounds.stage(self._round.id, name, "running")
            self._refuse_to_die_again(name)
            torch.manual_seed(self._settings.seed)
            result = run()
            staging = done.with_suffix(".partial")
            staging.write_text(json.dumps(result, indent=1))
            # The row first: once the file is there, nobody looks at this stage again.
            self._rounds.stage(self._round.id, name, "done", result)
            staging.rename(done)
        found: Result = json.loads(done.read_text())
        return found

    def _refuse_to_die_again(self, name: str) -> None:
        """Raise RoundRefused for a stage that was begun too often: what kills it leaves no error."""
        (attempts,) = (stage.attempts for stage in self._rounds.stages(self._round.id) if stage.name == name)
        if attempts > MOST_ATTEMPTS:
            raise RoundRefused(
                f"its process was killed {MOST_ATTEMPTS} times, most likely for want of memory: look at the "
                "system's log; lower training.prompt_tokens, training.response_tokens, training.ppo_batch or "
                "training.kv_cache_gib, or give the trainer a machine with more"
            )

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
        target = self._directory / "sft"
        demonstrations = self._dataset.train.demonstrations
        if len(demonstrations) < self._settings.sft_minimum:
            model = load_policy(self._parent.path)
            write_checkpoint(model, self._tokenizer, target)
            return {
                "skipped": f"{len(demonstrations)} demonstrations, {self._settings.sft_minimum} are needed"
            }
        with self._progress("sft") as report:
            model = fine_tune(
                self._parent.path,
                self._tokenizer,
                demonstrations,
                settings=self._settings,
                work=self._directory / "sft_work",
                report=report,
            )
        write_checkpoint(model, self._tokenizer, target)
        return {"demonstrations": len(demonstrations)}

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

    def _ppo(self) -> Result:
        settings = self._settings
        policy: Policy = load_policy(self._directory / "sft")
        if settings.ppo_lora_rank:
            policy = with_adapter(policy, settings.ppo_lora_rank)
        prompts = sorted(self._dataset.train.prompts.values(), key=lambda prompt: prompt.key)
        texts = None
        if settings.ppo_prompt_file:
            prompts += read_prompts(Path(settings.ppo_prompt_file), self._tokenizer, settings.prompt_tokens)
        if settings.ppo_ptx_file:
            texts = PretrainingTexts(Path(settings.ppo_ptx_file), self._tokenizer, settings.ppo_ptx_tokens)
        rollouts = Rollouts(
            self._engine,
            self._tokenizer,
            self._directory / "rollout",
            max_tokens=settings.ppo_response_tokens,
            temperature=settings.ppo_temperature,
        )
        with self._progress("ppo") as report:
            ppo = PPO(
                policy=policy,
                tokenizer=self._tokenizer,
                reward_model=RewardModel.load(self._directory / "reward_model"),
                prompts=prompts,
                rollouts=rollouts,
                settings=settings,
                work=self._directory / "ppo",
                report=report,
                texts=texts,
                keep_samples=SampleLog(self._directory).keep,
            )
            ppo.train()
        write_checkpoint(ppo.trained_policy(), self._tokenizer, self._directory / "candidate")
        return ppo.result() | {"prompts": len(prompts)}

    def _publish(self) -> Result:
        version = self._registry.publish(
            self._directory / "candidate",
            parent=self._parent.name,
            round_id=self._round.id,
            kind="ppo",
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
        desired, incumbent = self._registry.desired(), self._parent
        # A repeat is judged against what the first run started from, whatever serves by now.
        if desired and desired.name != name and self._round.repeat_of is None:
            incumbent = self._registry.version(desired.name)
        candidate = self._registry.version(name)
        prompts = sorted(self._dataset.held_out.prompts.values(), key=lambda prompt: prompt.key)
        prompts = prompts[: self._evaluation.prompts]
        seed = self._settings.seed
        ours = answers(self._engine, candidate.path, prompts, self._evaluation, seed)
        theirs = answers(self._engine, incumbent.path, prompts, self._evaluation, seed)
        comparisons = compare(RewardModel.load(self._directory / "judge"), prompts, ours, theirs)
        kl = self._kl(prompts, ours, incumbent.path)
        verdict = decide(gather(comparisons, kl, self._evaluation, seed=seed), self._evaluation)
        return {**verdict.as_dict(), "incumbent": incumbent.name}

    def _kl(self, prompts: list[Prompt], ours: list[list[Any]], incumbent: Path) -> float:
        """Mean over the candidate's answers of log pi_candidate - log pi_incumbent, in nats a response.

        Both at the answers' sampling temperature, where the mean estimates KL(candidate || incumbent).
        """
        model = load_policy(incumbent)
        pairs = [
            (prompt.token_ids, sample)
            for prompt, samples in zip(prompts, ours, strict=True)
            for sample in samples
        ]
        under_incumbent = total_logprobs(
            model, [(prompt, sample.token_ids) for prompt, sample in pairs], self._evaluation.temperature
        )
        gaps = [
            sum(sample.logprobs) - theirs for (_, sample), theirs in zip(pairs, under_incumbent, strict=True)
        ]
        return float(sum(gaps) / len(gaps))

    def _act(self, version: str, verdict: Result) -> None:
        """Record the verdict and do what it says; done again after a kill, it changes nothing.

        A repeat only records it: its candidate is for comparison, and an operator's to promote.
        """
        self._registry.annotate(version, verdict=verdict)
        if self._round.repeat_of is not None or self._registry.version(version).state != "candidate":
            return
        actor, reason = f"round {self._round.id}", " ".join(verdict["reasons"])
        if verdict["promote"]:
            self._registry.promote(version, actor=actor, reason=reason)
        else:
            self._registry.reject(version, actor=actor, reason=reason)

    # -- what the stages share

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
        try:
            self._sampler = self._make_sampler(self._parent.path, self._settings)
        except Exception as problem:
            raise EngineFailed(f"the rollout engine did not start: {problem}") from problem
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
        self._keep(stage, 0, figures)
        return {
            "held_out_accuracy": {
                source: {name: interval.figures() for name, interval in by_name.items()}
                for source, by_name in accuracy.items()
            }
        }

    def _progress(self, stage: str) -> Progress:
        return Progress(stage, lambda step, figures: self._keep(stage, step, figures))

    def _keep(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        self._rounds.metric(self._round.id, stage, step, figures)
        self._track(stage, step, figures)

    def _result(self, stage: str) -> Result:
        found: Result = json.loads((self._directory / f"{stage}.json").read_text())
        return found
