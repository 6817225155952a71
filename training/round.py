"""A training round: the slice of new feedback becomes a candidate version, and the gate decides on it.

Owns the order of the stages, their files and their resumption. A stage that has ended has left
`<stage>.json` in the round's directory and is not run again; one that was killed starts over (PPO from its
last checkpoint), on the same data with the same seeds. What happens inside a stage is in its own module.
"""

import fcntl
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evaluation.contest import Prompt, answers, compare
from evaluation.gate import decide, gather
from evaluation.reward_model import RewardModel
from evaluation.sampler import Sampler, VllmSampler
from evaluation.settings import EvaluationSettings
from feedback.store import Store
from registry.registry import Registry
from registry.rounds import Round, Rounds
from training.dataset import Dataset, Side, build
from training.logprobs import total_logprobs
from training.ppo import PPO
from training.progress import Progress
from training.reward_model import accuracy_by_source, fit
from training.rollouts import Rollouts, load_policy, write_checkpoint
from training.settings import TrainingSettings
from training.sft import fine_tune

logger = logging.getLogger(__name__)

STAGES = ("dataset", "sft", "reward_model", "judge", "ppo", "publish", "gate")

Result = Mapping[str, Any]
SamplerFactory = Callable[[Path, TrainingSettings], Sampler]


class RoundRefused(ValueError):  # noqa: N818
    """A round can't be run on this data; the message says what is missing."""


class TrainerBusy(RuntimeError):  # noqa: N818
    """Another trainer is at work on the same data directory."""


class Trainer:
    """Runs rounds, one at a time, on the store and the registry it is given.

    `data_dir` holds `rounds/NNNN/` with a round's working files, and the lock; `make_sampler` starts the
    engine for rollouts and held-out answers.
    """

    def __init__(
        self,
        *,
        settings: TrainingSettings,
        evaluation: EvaluationSettings,
        store: Store,
        registry: Registry,
        rounds: Rounds,
        data_dir: Path,
        max_model_len: int,
        make_sampler: SamplerFactory | None = None,
    ) -> None:
        self._settings = settings
        self._evaluation = evaluation
        self._store = store
        self._registry = registry
        self._rounds = rounds
        self._root = data_dir / "rounds"
        self._make_sampler = make_sampler or (
            lambda model_dir, chosen: VllmSampler(
                model_dir,
                max_model_len=max_model_len,
                kv_cache_gib=chosen.kv_cache_gib,
                vllm_arguments=chosen.vllm_arguments,
            )
        )

    def run_once(self, minimum_events: int = 0) -> Round | None:
        """Finish the round that a killed trainer left, else run one on all feedback since the last.

        Returns the round when it has ended (`done` or `failed`), None when there is nothing to learn from.
        Raises TrainerBusy while another trainer holds the lock.
        """
        with self._lock():
            return self._run_once(minimum_events)

    def run_every(self, seconds: float, minimum_events: int, stop: threading.Event) -> None:
        """Run a round whenever one is asked for, and every `seconds` where enough events have come.

        Holds the lock until `stop` is set; raises TrainerBusy at once if another trainer has it.
        """
        with self._lock():
            if self._rounds.unfinished() is not None:
                self._run_once(0)
            due = time.monotonic() + seconds
            while not stop.wait(1.0):
                if self._rounds.requested() is not None:
                    self._run_once(0)
                elif time.monotonic() >= due:
                    due = time.monotonic() + seconds
                    self._run_once(minimum_events)

    def _run_once(self, minimum_events: int) -> Round | None:
        round_ = self._rounds.unfinished()
        if round_ is None:
            last = self._rounds.last_done()
            cursor, cutoff = (last.cutoff or 0) if last else 0, self._store.head()
            requested = self._rounds.requested() is not None
            if not requested and cutoff - cursor < max(1, minimum_events):
                return None
            round_ = self._begin(cursor, cutoff, last)
        else:
            logger.info("round %d was not finished: going on with it", round_.id)
        work = _Work(round_, self._root / f"{round_.id:04d}", self)
        try:
            verdict, version = work.run()
        except Exception as problem:
            # Whatever it was: a round left `running` would be taken up, and fail, again and again.
            logger.exception("round %d failed", round_.id)
            stage = self._rounds.get(round_.id).stage or "dataset"
            self._rounds.finish(round_.id, "failed", error=f"{stage}: {problem}")
        else:
            self._rounds.finish(round_.id, "done", version=version, verdict=verdict)
            self._tidy(round_.id)
        return self._rounds.get(round_.id)

    def _begin(self, cursor: int, cutoff: int, last: Round | None) -> Round:
        desired = self._registry.desired()
        if desired is None:
            raise RoundRefused("no version is in service, so there is nothing to train from")
        previous = self._root / f"{last.id:04d}" / "reward_model" if last else None
        config = {
            "parent": desired.name,
            "reward_model_from": last.id
            if last and previous and (previous / "head.safetensors").exists()
            else None,
            "training": self._settings.model_dump(mode="json"),
            "evaluation": self._evaluation.model_dump(mode="json"),
        }
        return self._rounds.begin(cursor, cutoff, config, self._settings.seed)

    def _tidy(self, round_id: int) -> None:
        """Keep the working files of the latest rounds only, and of those no checkpoint that was published."""
        for name in ("sft", "sft_work", "ppo", "candidate", "rollout"):
            shutil.rmtree(self._root / f"{round_id:04d}" / name, ignore_errors=True)
        directories = sorted(path for path in self._root.iterdir() if path.is_dir())
        for old in directories[: -self._settings.keep_rounds]:
            shutil.rmtree(old)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as file:
            try:
                # The kernel lets go of it when the process ends, however it ends.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainerBusy(f"another trainer holds {self._root / 'lock'}") from None
            yield


class _Work:
    """One round's run through the stages, in its own directory."""

    def __init__(self, round_: Round, directory: Path, trainer: Trainer) -> None:
        self._round = round_
        self._directory = directory
        self._registry = trainer._registry
        self._rounds = trainer._rounds
        self._store = trainer._store
        self._make_sampler = trainer._make_sampler
        self._root = trainer._root
        # The round's own settings: a resumed round goes on as it began, whatever has been changed since.
        self._settings = TrainingSettings(**round_.config["training"])
        self._evaluation = EvaluationSettings(**round_.config["evaluation"])
        self._parent = self._registry.version(round_.config["parent"])
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
        start = self._root / f"{previous:04d}" / "reward_model" if previous is not None else None
        model = self._fit(self._dataset.train, "reward_model", start)
        accuracy = accuracy_by_source(model, self._dataset.held_out.comparisons, self._settings.seed)
        figures = {
            f"held_out_accuracy/{source}/{name}": interval.estimate
            for source, by_name in accuracy.items()
            for name, interval in by_name.items()
        }
        self._rounds.metric(self._round.id, "reward_model", 0, figures)
        return {
            "held_out_accuracy": {
                source: {name: interval.figures() for name, interval in by_name.items()}
                for source, by_name in accuracy.items()
            }
        }

    def _judge(self) -> Result:
        """Fit the gate's own reward model, on the prompts that PPO never sees."""
        self._fit(self._dataset.held_out, "judge", None)
        return self._dataset.held_out.counts()

    def _ppo(self) -> Result:
        policy = load_policy(self._directory / "sft")
        rollouts = Rollouts(
            self._engine,
            self._tokenizer,
            self._directory / "rollout",
            max_tokens=self._settings.ppo_response_tokens,
            temperature=self._settings.ppo_temperature,
        )
        with self._progress("ppo") as report:
            PPO(
                policy=policy,
                tokenizer=self._tokenizer,
                reward_model=RewardModel.load(self._directory / "reward_model"),
                prompts=sorted(self._dataset.train.prompts.values(), key=lambda prompt: prompt.key),
                rollouts=rollouts,
                settings=self._settings,
                work=self._directory / "ppo",
                report=report,
            ).train()
        write_checkpoint(policy, self._tokenizer, self._directory / "candidate")
        return {"updates": self._settings.ppo_updates}

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
        desired = self._registry.desired()
        incumbent = self._registry.version(
            desired.name if desired and desired.name != name else self._parent.name
        )
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
        model = RewardModel.load(start) if start else RewardModel.from_decoder(self._parent.path)
        with self._progress(name) as report:
            fit(model, side, self._settings, report)
        model.save(self._directory / name)
        return model

    def _progress(self, stage: str) -> Progress:
        return Progress(
            stage, lambda step, figures: self._rounds.metric(self._round.id, stage, step, figures)
        )

    def _result(self, stage: str) -> Result:
        found: Result = json.loads((self._directory / f"{stage}.json").read_text())
        return found
