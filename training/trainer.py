"""The trainer: when a round is due, one at a time; repeats, rounds without a rater; what is kept of old ones.

What a round does is `training/round.py`'s.
"""

import fcntl
import logging
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from evaluation.run import Evaluator
from evaluation.sampler import Sampler, TransformersSampler, VllmSampler
from evaluation.settings import EvaluationSettings
from feedback.settings import RaterSettings
from feedback.store import Store
from feedback.tombstones import digest
from registry.lineage import Lineage
from registry.registry import Registry
from registry.rounds import Round, Rounds
from training import processes
from training.disk import check_space, tidy
from training.failures import explain
from training.rater_weights import next_standing, quarantine_suspects, raters_of, standing_of
from training.round import Result, RoundRefused, RoundRun, SamplerFactory
from training.settings import TrainingSettings
from training.trackers import Trackers

_SECTIONS: dict[str, type[BaseModel]] = {
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "raters": RaterSettings,
}

logger = logging.getLogger(__name__)


class TrainerBusy(RuntimeError):  # noqa: N818
    """Another trainer is at work on the same data directory."""


def sampler_factory(max_model_len: int) -> SamplerFactory:
    """Return what starts the engine for rollouts and answers; prompt plus response are bounded in tokens."""

    def start(model_dir: Path, settings: TrainingSettings) -> Sampler:
        if settings.rollout_engine == "transformers":
            return TransformersSampler(model_dir)
        return VllmSampler(
            model_dir,
            max_model_len=max_model_len,
            kv_cache_gib=settings.kv_cache_gib,
            vllm_arguments=settings.vllm_arguments,
        )

    return start


class Trainer:
    """Runs rounds, one at a time, on the store and the registry it is given.

    `data_dir` holds `rounds/NNNN/` with a round's working files, and the lock; `make_sampler` starts the
    engine for rollouts and held-out answers. `evaluator` carries out what operators want compared, between
    rounds.
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
        raters: RaterSettings | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self._settings = settings
        self._evaluation = evaluation
        self._raters = raters or RaterSettings()
        self._store = store
        self._registry = registry
        self._rounds = rounds
        self._root = data_dir / "rounds"
        self._make_sampler = make_sampler or sampler_factory(max_model_len)
        self._evaluator = evaluator

    def run_once(self, minimum_events: int = 0) -> Round | None:
        """Finish the round that a killed trainer left, else run one on all feedback since the last.

        Returns the round when it has ended (`done` or `failed`), None when there is nothing to learn from.
        Raises TrainerBusy while another trainer holds the lock.
        """
        with self._lock():
            return self._run_once(minimum_events)

    def repeat(self, round_id: int, overrides: Mapping[str, Any]) -> Round:
        """Run a round again on its slice, parent and seed, with `overrides` on its settings.

        `overrides` are by dotted name, such as `training.ppo_updates`. The repeat is a round of its own, from
        which no later round goes on. It publishes a candidate and records the gate's verdict, but acts on
        none. A repeat that was killed is gone on with. Returns it when it has ended.
        Raises UnknownRound, RoundRefused where what the round needs is gone or an override is wrong, and
        TrainerBusy.
        """
        with self._lock():
            original = self._rounds.get(round_id)
            config = self._repeated(original, overrides)
            round_ = self._rounds.unfinished()
            if round_ is None:
                assert original.cursor is not None and original.cutoff is not None
                seed = config["training"]["seed"]
                round_ = self._rounds.begin(
                    original.cursor, original.cutoff, config, seed, repeat_of=round_id
                )
            elif (round_.repeat_of, round_.config) != (round_id, config):
                raise RoundRefused(
                    f"round {round_.id} was not finished: `instructloop train --once` goes on with it"
                )
            return self._carry_out(round_)

    def retrain(self, without_rater: str, start: str | None = None) -> Round:
        """Run a round from before a rater's first event on all feedback since, but the rater's.

        It begins with the version `start`, by default the one that was in service when the first round that
        learned from the rater began, and on the slice behind what that version learned from. The gate
        acts on its candidate as on any. One that was killed is gone on with. Returns it when it has ended.
        Raises UnknownVersion, RoundRefused and TrainerBusy.
        """
        with self._lock():
            config, cursor = self._without(without_rater, start)
            round_ = self._rounds.unfinished()
            if round_ is None:
                round_ = self._rounds.begin(cursor, self._store.head(), config, self._settings.seed)
            elif (round_.cursor, round_.config) != (cursor, config):
                raise RoundRefused(
                    f"round {round_.id} was not finished: `instructloop train --once` goes on with it"
                )
            return self._carry_out(round_)

    def run_every(self, seconds: float, minimum_events: int, stop: threading.Event) -> None:
        """Run a round whenever one is asked for, and every `seconds` where enough events have come.

        Evaluations that are asked for are carried out in between, one at a time.
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
                elif self._evaluator is not None:
                    self._evaluator.carry_out_next()

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
        return self._carry_out(round_)

    def _carry_out(self, round_: Round) -> Round:
        """Run the stages that are left, end the round and tidy up; returns it as it is then."""
        try:
            verdict, version = self._run(round_)
        except (SystemExit, KeyboardInterrupt):
            logger.warning("round %d was stopped: the next trainer goes on with it", round_.id)
            raise
        except Exception as problem:
            # Whatever it was: a round left `running` would be taken up, and fail, again and again.
            logger.exception("round %d failed", round_.id)
            error = explain(self._rounds.get(round_.id).stage or "start", problem)
            self._rounds.finish(round_.id, "failed", error=error)
            if processes.count() > 1:
                # The others are somewhere inside the stage: whoever started them all ends them with this one.
                raise SystemExit(f"round {round_.id} failed: {error}") from problem
        else:
            self._rounds.finish(round_.id, "done", version=version, verdict=verdict)
        self._tidy()
        return self._rounds.get(round_.id)

    def follow(self) -> None:
        """Run the rounds of the first process with it, in one of the others, until it has no more."""
        while (round_ := processes.from_first(lambda: None)) is not None:
            RoundRun(
                round_,
                self._root / f"{round_.id:04d}",
                store=self._store,
                registry=self._registry,
                rounds=self._rounds,
                make_sampler=self._make_sampler,
                track=lambda *_: None,
            ).run()

    def _run(self, round_: Round) -> tuple[Result, str]:
        directory = self._root / f"{round_.id:04d}"
        if not directory.exists():
            parent = self._registry.version(round_.config["parent"])
            check_space(self._root, parent.path, TrainingSettings(**round_.config["training"]))
        with Trackers(
            self._settings.report_to,
            run_name=f"round-{round_.id:04d}",
            directory=directory,
            config=round_.config,
        ) as trackers:
            processes.from_first(lambda: round_)  # the others follow
            return RoundRun(
                round_,
                directory,
                store=self._store,
                registry=self._registry,
                rounds=self._rounds,
                make_sampler=self._make_sampler,
                track=trackers.log,
            ).run()

    def _begin(self, cursor: int, cutoff: int, last: Round | None) -> Round:
        desired = self._registry.desired()
        if desired is None:
            raise RoundRefused("no version is in service, so there is nothing to train from")
        for rater in quarantine_suspects(self._store, self._raters, cutoff):
            logger.warning("%s is quarantined; `instructloop raters show %s` says why", rater, rater)
        config = self._config(desired.name, last, cursor, cutoff)
        return self._rounds.begin(cursor, cutoff, config, self._settings.seed)

    def _config(self, parent: str, last: Round | None, cursor: int, cutoff: int) -> dict[str, Any]:
        return {
            "parent": parent,
            "reward_model_from": last.id if last and self._is_a_start(last) else None,
            "training": self._settings.model_dump(mode="json"),
            "evaluation": self._evaluation.model_dump(mode="json"),
            "raters": self._raters.model_dump(mode="json"),
            "standing": next_standing(self._store, last, cursor, cutoff).as_dict(),
        }

    def _without(self, rater: str, start: str | None) -> tuple[dict[str, Any], int]:
        """Return the configuration and the cursor of a round without a rater; raises RoundRefused."""
        name, traces = digest(("rater", rater)), self._store.forgettings.traces_of(rater)
        if not traces:
            raise RoundRefused(f"{rater} has no feedback in the store, and none that was forgotten")
        learned = Lineage(self._rounds.engine).learned_from(
            traces, self._store.forgettings.gave(rater), without=name
        )
        touched = {one.version: one.how for one in learned}
        version = self._registry.version(start or self._before(touched))
        if version.name in touched:
            how = touched[version.name]
            raise RoundRefused(
                f"{version.name} learned from {rater} ({how}): give an earlier one, or leave it out"
            )
        if version.state == "pruned":
            raise RoundRefused(f"the weights of {version.name} were pruned: give another version, by --from")
        origin = version.manifest.round_id
        last = self._rounds.get(origin) if origin is not None else None
        cursor = (last.cutoff or 0) if last else 0
        config = self._config(version.name, last, cursor, self._store.head())
        return config | {"without_raters": [name]}, cursor

    def _before(self, touched: Collection[str]) -> str:
        """Return the version that the first of these was trained from, as long as it is none of them."""
        if touched:
            first = self._registry.version(next(iter(touched)))
            assert first.manifest.parent is not None
            return first.manifest.parent
        desired = self._registry.desired()
        if desired is None:
            raise RoundRefused("no version is in service, so there is nothing to train from")
        return desired.name

    def _repeated(self, original: Round, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of a repeat; raises RoundRefused where something it needs is gone."""
        if original.cutoff is None:
            raise RoundRefused(f"round {original.id} has not begun, so there is nothing to repeat")
        parent, previous = original.config["parent"], original.config["reward_model_from"]
        if self._registry.version(parent).state == "pruned":
            raise RoundRefused(
                f"round {original.id} started from {parent}, whose weights were pruned since: "
                "pin rounds that you want to repeat (`instructloop rounds pin`)"
            )
        if previous is not None and not self._has_reward_model(previous):
            raise RoundRefused(
                f"round {original.id} started from round {previous}'s reward model, which was tidied away: "
                "pin rounds that you want to repeat (`instructloop rounds pin`)"
            )
        values = {name: dict(original.config.get(name, {})) for name in _SECTIONS}
        values["raters"] = raters_of(original.config).model_dump(mode="json")
        for key, value in overrides.items():
            section, _, name = key.partition(".")
            if section not in _SECTIONS or name not in _SECTIONS[section].model_fields:
                sections = ", ".join(f"{name}.…" for name in _SECTIONS)
                raise RoundRefused(f"{key} is not a setting of a round: those are {sections}")
            values[section][name] = value
        standing = standing_of(original.config).as_dict()
        config: dict[str, Any] = {"parent": parent, "reward_model_from": previous, "standing": standing}
        if "without_raters" in original.config:
            config["without_raters"] = original.config["without_raters"]
        for name, settings in _SECTIONS.items():
            try:
                config[name] = settings(**values[name]).model_dump(mode="json")
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join([name, *(str(part) for part in first["loc"])])
                raise RoundRefused(
                    f"round {original.id} can't be repeated: {where}: {first['msg']}"
                ) from None
        return config

    def _is_a_start(self, last: Round) -> bool:
        """Whether the round's reward model is there and stands on the trunk that is configured now."""
        trunk = last.config["training"].get("reward_backbone", "")
        return self._has_reward_model(last.id) and trunk == self._settings.reward_backbone

    def _has_reward_model(self, round_id: int) -> bool:
        return (self._root / f"{round_id:04d}" / "reward_model" / "head.safetensors").exists()

    def _tidy(self) -> None:
        """Delete what no later round needs: working files, old reward models, old versions' weights."""
        pinned, last = self._rounds.pinned(), self._rounds.last_done()
        # A pinned round can be repeated, so what it started from stays, too.
        needed = {
            number for round_ in pinned for number in (round_.id, round_.config.get("reward_model_from"))
        }
        newest = [round_.id for round_ in self._rounds.list(self._settings.keep_rounds)]
        versions, judges = (set(), set()) if self._evaluator is None else self._evaluator.needed()
        tidy(self._root, keep_models={*needed, *newest, *judges, last.id if last else None})
        spare = {name for round_ in pinned for name in (round_.version, round_.config.get("parent"))}
        spare |= versions
        for name in self._registry.prune(self._settings.keep_versions, spare - {None}):
            logger.info("%s: its weights are deleted, its manifest is kept", name)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / "lock").open("w") as file:
            try:
                # The kernel lets go of it when the process ends, however it ends.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainerBusy(
                    f"another trainer holds {self._root / 'lock'}: stop it, or `instructloop up`, first"
                ) from None
            yield
            processes.from_first(lambda: None)  # no more rounds to follow
