"""A training round: the slice of new feedback becomes a candidate version, and the gate decides on it.

Owns the order of the stages, their files and their resumption. A stage that has ended has left
`<stage>.json` in the round's directory and is not run again; one that was killed starts over (PPO from its
last checkpoint), on the same data with the same seeds. The stage `ppo` is that of the configured algorithm,
whichever it is. What happens inside a stage is in its own module; when
a round is due is `training/trainer.py`'s.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from evaluation import tax
from evaluation.cases import CaseChanges, CaseTest, changes
from evaluation.comparison import Interval, clustered_mean
from evaluation.contest import Prompt, answers, compare
from evaluation.gate import decide, gather
from evaluation.overoptimisation import Point, watch_of
from evaluation.reward_model import RewardModel, score_responses, scores_and_spreads
from evaluation.sampler import Sample, Sampler
from evaluation.settings import EvaluationSettings
from feedback.cases import Cases
from feedback.records import Completion
from feedback.store import ResponseScore, Slice, Store
from feedback.tombstones import digest
from registry.registry import Registry, Version
from registry.rounds import Round, Rounds
from registry.states import IllegalTransition
from training import processes
from training.algorithms import Task, train
from training.checkpoints import Checkpoints, Watching, choose
from training.dataset import Dataset, Side, build, responses_of, with_older
from training.logprobs import kl_from
from training.policy import Policy, load_policy, write_checkpoint
from training.pretraining import FileProblem, PretrainingTexts, read_prompts
from training.progress import Progress
from training.rater_weights import RaterWeights, older_than, raters_of, slice_of, standing_of
from training.reward_model import Report, check_backbone, fit
from training.reward_quality import measure
from training.rollouts import Rollouts
from training.samples import SampleLog
from training.settings import TrainingSettings
from training.sft import checkpoint_epochs, fine_tune

logger = logging.getLogger(__name__)

STAGES = ("dataset", "sft", "reward_model", "judge", "select", "ppo", "checkpoints", "publish", "gate")
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
    gets every figure that is stored. Of several processes (`training/processes.py`) each makes its own run of
    the same round, and the first one's does all that is not fitting a model.
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
        self._raters, self._standing = raters_of(round_.config), standing_of(round_.config)
        self._parent = registry.version(round_.config["parent"])
        self._sampler: Sampler | None = None

    def run(self) -> tuple[Result, str]:
        """Run the stages that are left; return the verdict and the candidate's name."""
        try:
            self._prepare()
            self._stage("ppo", self._ppo, together=True)
            self._stage("checkpoints", self._choose_checkpoint)
            version = self._stage("publish", self._publish)["version"]
            verdict = self._stage("gate", lambda: self._gate(version))
        finally:
            self._close()
        if processes.is_first():
            self._act(version, verdict)
        return verdict, version

    def _prepare(self) -> None:
        """Run the stages up to the SFT policy and the reward models, as far as they are left."""
        self._directory.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(self._settings.threads or torch.get_num_threads())
        self._stage("dataset", self._describe_dataset)
        self._stage("sft", self._sft, together=True)
        self._stage("reward_model", self._reward_model, together=True)
        self._stage("judge", self._judge, together=True)
        self._stage("select", self._select)

    def _close(self) -> None:
        """End the engine, if it was started."""
        if self._sampler is not None:
            self._sampler.close()

    def _stage(self, name: str, run: Callable[[], Result], *, together: bool = False) -> Result:
        """Return what stage `name` left behind, after running it if it has not ended yet.

        Where there are several processes all of them run it `together`, or else only the first does.
        """
        done = self._directory / f"{name}.json"
        if processes.from_first(lambda: not done.exists()):
            if processes.is_first():
                self._run_stage(name, run, done)
            elif together:
                torch.manual_seed(self._settings.seed)
                run()
            processes.wait_for_all()
        found: Result = json.loads(done.read_text())
        return found

    def _run_stage(self, name: str, run: Callable[[], Result], done: Path) -> None:
        self._rounds.stage(self._round.id, name, "running")
        self._refuse_to_die_again(name)
        self._refuse_what_was_forgotten(name)
        torch.manual_seed(self._settings.seed)
        result = run()
        staging = done.with_suffix(".partial")
        staging.write_text(json.dumps(result, indent=1))
        # The row first: once the file is there, nobody looks at this stage again.
        self._rounds.stage(self._round.id, name, "done", result)
        staging.rename(done)

    def _refuse_to_die_again(self, name: str) -> None:
        """Raise RoundRefused for a stage that was begun too often: what kills it leaves no error."""
        attempts = {stage.name: stage.attempts for stage in self._rounds.stages(self._round.id)}
        if attempts.get(name, 0) > MOST_ATTEMPTS:
            raise RoundRefused(
                f"its process was killed {MOST_ATTEMPTS} times, most likely for want of memory: look at the "
                "system's log; lower training.prompt_tokens, training.response_tokens, training.ppo_batch or "
                "training.kv_cache_gib, or give the trainer a machine with more"
            )

    def _refuse_what_was_forgotten(self, name: str) -> None:
        """Raise RoundRefused where an event was forgotten after the round had read it; a version stands."""
        if name in ("dataset", "gate"):
            return
        erasures, cutoff = self._result("dataset").get("erasures", 0), self._round.cutoff
        assert cutoff is not None
        if self._store.forgettings.erased_since(erasures, cutoff):
            raise RoundRefused(
                "feedback that it had read was forgotten meanwhile: the next round learns from what is left"
            )

    # -- the stages

    def _describe_dataset(self) -> Result:
        erasures = self._store.forgettings.last_erasure()  # before the slice is read
        data = self._dataset
        for name, side in (("training", data.train), ("held-out", data.held_out)):
            judged = len(side.judged)
            if judged < self._settings.minimum_judged:
                raise RoundRefused(
                    f"only {judged} usable rankings, thumbs and ratings on the {name} prompts, "
                    f"at least {self._settings.minimum_judged} are needed: collect more feedback"
                )
        more_prompts, texts = self._files  # now, rather than when PPO asks for them
        if self._settings.reward_backbone:
            try:
                check_backbone(self._settings.reward_backbone, self._tokenizer)
            except (ValueError, OSError) as problem:
                raise RoundRefused(f"reward_backbone: {problem}") from problem
        try:
            tax.find(self._evaluation.tax_tasks)
        except tax.TaxProblem as problem:
            raise RoundRefused(f"evaluation.tax_tasks: {problem}") from None
        self._rounds.record_uses(self._round.id, data.uses(self._settings))
        return {
            "train": data.train.counts(),
            "held_out": data.held_out.counts(),
            "left_out": dict(data.left_out),
            "replaced": dict(sorted(data.replaced.items())),
            "erasures": erasures,
            "raters": self._weights.figures()
            | {
                "held_out_comparisons": sum(
                    len(side.by_held_out_raters) for side in (data.train, data.held_out)
                )
            },
            "prompts_of_the_file": len(more_prompts),
            "pretraining_mix": texts is not None,
        }

    def _sft(self) -> Result:
        """Fine-tune the version in service on what people wrote, where they wrote enough."""
        target, checkpoints = self._directory / "sft", self._directory / "sft_epochs"
        demonstrations = self._dataset.train.written(self._settings)
        if len(demonstrations) < self._settings.sft_minimum:
            self._write(load_policy(self._parent.path), target)
            return {
                "skipped": f"{len(demonstrations)} demonstrations, {self._settings.sft_minimum} are needed"
            }
        kept = checkpoint_epochs(self._settings.sft_epochs, self._settings.sft_checkpoints)
        epochs: list[dict[str, Any]] = []

        def epoch_end(epoch: int, loss: float, policy: Policy) -> None:
            epochs.append({"epoch": epoch, "loss": loss, "kept": epoch in kept})
            if epoch in kept:
                self._write(policy, checkpoints / str(epoch))

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
        self._write(model, target)
        return {"demonstrations": len(demonstrations), "epochs": epochs}

    def _reward_model(self) -> Result:
        """Fit the reward model that PPO maximises, on the training prompts and some of former rounds."""
        previous = self._round.config["reward_model_from"]
        start = self._directory.parent / f"{previous:04d}" / "reward_model" if previous is not None else None
        side, influence = self._weights.weighed(self._with_older())
        new = {item.event_id for item in self._dataset.train.judged}
        older = [item.event_id for item in side.judged if item.event_id not in new]
        if processes.is_first():
            self._rounds.record_older(self._round.id, older)
        model = self._fit(side, "reward_model", start)
        if processes.is_first():
            self._score_for_queries(model)
        quality = self._quality(model, "reward_model", self._dataset.held_out)
        return {"older": len(older), "influence": influence, **quality}

    def _judge(self) -> Result:
        """Fit the gate's own reward model, on the prompts that PPO never sees."""
        side, influence = self._weights.weighed(self._dataset.held_out)
        model = self._fit(side, "judge", None)
        # The other side's pairs are new to this one.
        return {"influence": influence, **self._quality(model, "judge", self._dataset.train)}

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
            self._keep("select", item["epoch"], figures | {"loss": item["loss"]})
        chosen = max(scored, key=lambda item: item["score"]["estimate"])["epoch"]
        _replace(self._directory / "sft_epochs" / str(chosen), self._directory / "sft")
        return {"epoch": chosen, "epochs": scored}

    def _ppo(self) -> Result:
        """Train the policy by the configured algorithm."""
        shutil.rmtree(self._directory / "sft_epochs", ignore_errors=True)  # the choice has been made
        with self._progress("ppo") as report:
            task = self._task(self._settings, self._directory / "ppo", report)
            policy, details = train(replace(task, checkpoints=self._checkpoints))
        self._write(policy, self._directory / "candidate")
        return {"algorithm": self._settings.algorithm, **details}

    def _choose_checkpoint(self) -> Result:
        """Watch over-optimisation: publish the checkpoint that the gold judge likes best, not the last.

        The judge of the held-out side is gold, the reward model of the training side the proxy.
        """
        ppo = self._result("ppo")
        # Stopped by its KL budget, the algorithm took back its last update.
        last = ppo["updates"] - ppo.get("stopped_by_kl_budget", False)
        prompts, held_out = self._prompts_to_choose_by()
        skipped = {"update": last, "directory": "candidate"}
        if not self._settings.ppo_checkpoints:
            return skipped | {"skipped": "training.ppo_checkpoints is 0"}
        if last < 1 or len(prompts) < 2:
            return skipped | {"skipped": "it takes an update and two prompts to watch"}
        candidates = {**self._checkpoints.kept(before=last), last: self._directory / "candidate"}
        watching = Watching(
            self._engine,
            prompts,
            sft=self._directory / "sft",
            proxy=self._directory / "reward_model",
            gold=self._directory / "judge",
            # Fewer prompts than asked for are answered more often.
            responses=min(
                self._settings.ppo_selection_prompts // len(prompts), self._evaluation.samples_per_prompt
            ),
            settings=self._evaluation,
            seed=self._settings.seed,
        )

        def report(found: Point) -> None:
            self._keep("checkpoints", found.update, found.figures())

        chosen, points = choose(watching, candidates, report)
        return {
            "update": chosen.update,
            "directory": str(candidates[chosen.update].relative_to(self._directory)),
            "prompts": len(prompts),
            "held_out": held_out,
            "points": [item.as_dict() for item in points],
        }

    def _prompts_to_choose_by(self) -> tuple[list[Prompt], bool]:
        """Return the prompts that checkpoints are judged on, and whether they are held-out ones.

        The gate asks none of them, or its win rate would be that of the best of several on its own prompts.
        Where the held-out side has too few for both they are training prompts: the gold judge has seen
        nothing that was said on those.
        """
        count = self._settings.ppo_selection_prompts
        spare = self._dataset.held_out.sorted_prompts()[self._evaluation.prompts :]
        if len(spare) >= count:
            return spare[:count], True
        return self._dataset.train.sorted_prompts()[:count], False

    def _publish(self) -> Result:
        version = self._registry.publish(
            self._directory / self._result("checkpoints")["directory"],
            parent=self._parent.name,
            round_id=self._round.id,
            kind=self._settings.algorithm,
            details={
                "base": self._parent.manifest.details.get("base", self._parent.name),
                "slice": [self._round.cursor, self._round.cutoff],
                "config_hash": self._round.config_hash,
                "seed": self._settings.seed,
                "without_raters": list(self._round.config.get("without_raters", ())),
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
        prompts = self._dataset.held_out.sorted_prompts()[: self._evaluation.prompts]
        seed = self._settings.seed
        ours = answers(self._engine, candidate.path, prompts, self._evaluation, seed)
        theirs = answers(self._engine, incumbent.path, prompts, self._evaluation, seed)
        comparisons = compare(RewardModel.load(self._directory / "judge"), prompts, ours, theirs)
        kl = kl_from(load_policy(incumbent.path), prompts, ours, self._evaluation.temperature)
        evidence = gather(comparisons, kl, self._evaluation, seed=seed)
        watch = watch_of(self._result("checkpoints"))
        cases, benchmarks = self._try_cases(candidate, incumbent), self._tax(candidate, incumbent)
        verdict = decide(replace(evidence, watch=watch, cases=cases, tax=benchmarks), self._evaluation)
        return {**verdict.as_dict(), "incumbent": incumbent.name}

    def _tax(self, candidate: Version, incumbent: Version) -> tuple[tax.Change, ...] | None:
        """Measure what the candidate loses on benchmarks; None where none are configured."""
        if not self._evaluation.tax_tasks:
            return None
        try:
            return tax.changes(
                self._engine,
                self._tokenizer,
                self._registry,
                candidate=candidate,
                incumbent=incumbent,
                settings=self._evaluation,
            )
        except tax.TaxProblem as problem:
            raise RoundRefused(f"evaluation.tax_tasks: {problem}") from None

    def _try_cases(self, candidate: Version, incumbent: Version) -> CaseChanges | None:
        """Put every case to both versions and keep what they answered; None where there are no cases."""
        kept = Cases(self._store.engine)
        cases = kept.list()
        if not cases:
            return None
        test = CaseTest(self._tokenizer, self._settings.prompt_tokens, self._evaluation.case_tokens)
        results = test.results(
            self._engine,
            cases,
            candidate=candidate,
            incumbent=incumbent,
            score=lambda: partial(score_responses, RewardModel.load(self._directory / "judge")),
        )
        kept.record_results(self._round.id, results)
        return changes(results)

    def _act(self, version: str, verdict: Result) -> None:
        """Record the verdict and do what it says; done again after a kill, it changes nothing.

        A repeat only records it: its candidate is for comparison, and an operator's to promote.
        """
        self._registry.annotate(version, verdict=verdict)
        if self._round.repeat_of is not None or self._registry.version(version).state != "candidate":
            return
        actor, reason = f"round {self._round.id}", " ".join(verdict["reasons"])
        share = self._evaluation.canary_share
        if not verdict["promote"]:
            self._registry.reject(version, actor=actor, reason=reason)
        elif share == 0:
            self._registry.promote(version, actor=actor, reason=reason)
        else:
            try:
                self._registry.canary(version, share, actor=actor, reason=reason)
            except IllegalTransition as problem:
                logger.warning("%s passed the gate and stays a candidate: %s", version, problem)

    # -- what the stages share

    def _task(
        self, settings: TrainingSettings, work: Path, report: Report, updates: int | None = None
    ) -> Task:
        more_prompts, texts = self._files
        return Task(
            policy=load_policy(self._directory / "sft", processes.loading_device()),
            tokenizer=self._tokenizer,
            side=self._weights.weighed(self._dataset.train)[0],
            prompts=[*self._dataset.train.sorted_prompts(), *more_prompts],
            reward_model=self._directory / "reward_model",
            rollouts=Rollouts(
                self._engine if processes.is_first() else None,
                self._tokenizer,
                self._directory / "rollout",
                max_tokens=settings.ppo_response_tokens,
                temperature=settings.ppo_temperature,
            ),
            settings=settings,
            work=work,
            report=report,
            updates=updates,
            texts=texts,
            keep_samples=SampleLog(self._directory).keep,
        )

    @property
    def _checkpoints(self) -> Checkpoints:
        directory = self._directory / "ppo_checkpoints"
        return Checkpoints(directory, self._tokenizer, self._settings.ppo_checkpoints)

    @cached_property
    def _files(self) -> tuple[list[Prompt], PretrainingTexts | None]:
        """The prompts and the pretraining texts that the settings name; raises RoundRefused."""
        prompts, texts, settings = [], None, self._settings
        try:
            if settings.ppo_prompt_file:
                file = Path(settings.ppo_prompt_file)
                prompts = read_prompts(file, self._tokenizer, settings.prompt_tokens)
            if settings.ppo_ptx_file:
                file = Path(settings.ppo_ptx_file)
                texts = PretrainingTexts(file, self._tokenizer, settings.ppo_ptx_tokens)
        except FileProblem as problem:
            raise RoundRefused(f"{problem} (ppo_prompt_file or ppo_ptx_file)") from None
        return prompts, texts

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(str(self._parent.path))

    @cached_property
    def _dataset(self) -> Dataset:
        assert self._round.cursor is not None and self._round.cutoff is not None
        data = slice_of(self._store, self._round.cursor, self._round.cutoff, self._standing)
        allowed, held = self._allowed(data), self._standing.held.keys()
        dataset = build(allowed, self._tokenizer, self._settings, raters=self._raters, quarantined=held)
        kept = {event.event_id for event in allowed.events}
        dataset.reasons |= {
            event.event_id: "the round does without the rater"
            for event in data.events
            if event.event_id not in kept
        }
        self._weights.limit_demonstrations(dataset)
        return dataset

    def _allowed(self, data: Slice) -> Slice:
        """Leave out the raters whom this round is to do without."""
        digests: Sequence[str] = self._round.config.get("without_raters", ())
        events = [one for one in data.events if not digests or digest(("rater", one.rater)) not in digests]
        return Slice(events, data.completions)

    @cached_property
    def _weights(self) -> RaterWeights:
        assert self._round.cutoff is not None
        return RaterWeights(self._store, self._round.cutoff, self._standing, self._raters)

    def _with_older(self) -> Side:
        cursor, cutoff = self._round.cursor, self._round.cutoff
        assert cursor is not None and cutoff is not None
        older = self._allowed(older_than(self._store, cursor, cutoff, self._standing))
        return with_older(self._dataset.train, older, self._tokenizer, self._settings, self._raters)

    def _score_for_queries(self, model: RewardModel) -> None:
        """Let the store know how sure the reward model is of recorded responses: raters are asked by that."""
        assert self._round.cursor is not None and self._round.cutoff is not None
        limit = self._settings.reward_query_completions
        judged = self._store.slice(self._round.cursor, self._round.cutoff).completions.values()
        latest = sorted((part for parts in judged for part in parts), key=lambda part: -part.created_at)
        asked: list[Completion] = [*self._store.unjudged(limit), *latest[:limit]]
        # Gold questions too, or raters could tell them from the others.
        asked += self._store.gold_completions() if limit else []
        found = responses_of(asked, self._tokenizer, self._settings)
        items = [(prompt.token_ids, [ids for _, ids in responses]) for prompt, responses in found]
        scored = [
            ResponseScore(completion.id, index, completion.part, score, spread)
            for completion, (_, responses), (scores, spreads) in zip(
                asked, found, scores_and_spreads(model, items), strict=True
            )
            for (index, _), score, spread in zip(responses, scores, spreads, strict=True)
        ]
        self._store.replace_scores(self._round.id, scored)

    @cached_property
    def _engine(self) -> Sampler:
        try:
            self._sampler = self._make_sampler(self._parent.path, self._settings)
        except Exception as problem:
            raise EngineFailed(f"the rollout engine did not start: {problem}") from problem
        return self._sampler

    def _fit(self, side: Side, name: str, start: Path | None) -> RewardModel:
        heads = self._settings.reward_heads
        if start is not None:
            model = RewardModel.load(start)
            if model.heads != heads:
                model = RewardModel(model.backbone, heads)
        else:
            # As in InstructGPT, a first reward model starts from the SFT policy, with new heads.
            source = self._settings.reward_backbone or self._directory / "sft"
            model = RewardModel.from_decoder(source, heads)
        with self._progress(name) as report:
            fit(model, side, self._settings, report)
        if processes.is_first():
            model.save(self._directory / name)
        return model

    def _quality(self, model: RewardModel, stage: str, unseen: Side) -> Result:
        """Keep and return how good `model` is on rankings of prompts that it was not fitted to."""
        quality = measure(model, unseen.comparisons, self._settings.seed, unseen.by_held_out_raters)
        self._keep(stage, 0, quality.metrics())
        return quality.figures()

    def _progress(self, stage: str) -> Progress:
        return Progress(stage, lambda step, figures: self._keep(stage, step, figures))

    def _write(self, policy: Policy, directory: Path) -> None:
        write_checkpoint(policy, self._tokenizer, directory)

    def _keep(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        if not processes.is_first():
            return
        self._rounds.metric(self._round.id, stage, step, figures)
        self._track(stage, step, figures)

    def _result(self, stage: str) -> Result:
        found: Result = json.loads((self._directory / f"{stage}.json").read_text())
        return found


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
