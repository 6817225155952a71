"""Carries an evaluation out: contestants answer, judges compare every two of them, figures are made of it.

Owns the order, the resumption and the lock: each batch of answers and verdicts is a file, and what is there
is not asked for again. Who contestants and judges are is in their own modules, statistics in `tournament`.
"""

import fcntl
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from evaluation.contestants import Answer, Contestant
from evaluation.endpoint import EndpointProblem
from evaluation.endpoint_judge import EndpointJudge
from evaluation.evaluation_files import BATCH, EvaluationFiles, evaluation_directory
from evaluation.judges import ChatPrompt, Judge, Pair
from evaluation.labels import Labelling
from evaluation.participants import CannotEvaluate, Equipment, Participants
from evaluation.people_judge import PeopleJudge
from evaluation.prompts import FileProblem, case_chats, held_out_chats, read_chats
from evaluation.tournament import Answers, Duel, figures
from feedback.cases import Cases
from feedback.tombstones import Name
from registry.arena import Arena
from registry.evaluation_request import CASES, EvaluationRequest, UnsuitableRequest
from registry.evaluations import MOST_ATTEMPTS, Evaluation, EvaluationConflict, Evaluations
from registry.registry import UnknownVersion

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class EvaluationBusy(RuntimeError):  # noqa: N818
    """Another process carries an evaluation out in the same data directory."""


_EXPECTED = (
    CannotEvaluate,
    EndpointProblem,
    FileProblem,
    UnknownVersion,
    UnsuitableRequest,
)


class Evaluator:
    """Carries evaluations out, one at a time over all processes that share the data directory."""

    def __init__(self, equipment: Equipment) -> None:
        self._equipment = equipment
        self._evaluations = equipment.evaluations

    def carry_out_next(self) -> Evaluation | None:
        """Carry out what waits, and go on first with what a killed process left; None without any.

        None also while another process carries one out, and where it was cancelled at the last moment.
        """
        if self._evaluations.next() is None:
            return None
        try:
            with self._lock():
                waiting = self._evaluations.next()
                return None if waiting is None else self._carry_out(self._evaluations.begin(waiting.id))
        except (EvaluationBusy, EvaluationConflict):
            return None

    def carry_out(self, make: Callable[[], int]) -> Evaluation:
        """Carry out the evaluation whose number `make` returns; it is called once nobody else is at work.

        Returns it when it has ended. Raises EvaluationBusy, UnknownEvaluation, and EvaluationConflict if it
        has ended already; one that was cancelled is taken up where it stopped.
        """
        with self._lock():
            return self._carry_out(self._evaluations.begin(make(), again=True))

    def needed(self) -> tuple[set[str], set[int]]:
        """Return the versions that evaluations still wait for, and the rounds whose reward models they do."""
        asked = [evaluation.asked for evaluation in self._evaluations.unfinished()]
        versions = {one.version for request in asked for one in request.contestants if one.version}
        rounds = {one.round for request in asked for one in request.judges if one.round}
        return versions, rounds

    def _carry_out(self, evaluation: Evaluation) -> Evaluation:
        try:
            self._run(evaluation)
        except EvaluationConflict:
            logger.info("evaluation %d was cancelled: what it has is kept", evaluation.id)
        return self._evaluations.get(evaluation.id)

    def _run(self, evaluation: Evaluation) -> None:
        """Run it and write down what came of it; raises EvaluationConflict if it was cancelled meanwhile."""
        try:
            if evaluation.attempts > MOST_ATTEMPTS:
                raise CannotEvaluate(
                    f"its process was killed {MOST_ATTEMPTS} times, most likely for want of memory: look at "
                    "the system's log, or lower max_tokens or training.kv_cache_gib"
                )
            result = EvaluationRun(evaluation, self._equipment).run()
        except (SystemExit, KeyboardInterrupt):
            logger.warning("evaluation %d was stopped: it is gone on with when there is time", evaluation.id)
            raise
        except EvaluationConflict:
            raise
        except Exception as problem:
            # Whatever it was: an evaluation left `running` would be taken up, and fail, again and again.
            if not isinstance(problem, _EXPECTED):
                logger.exception("evaluation %d failed", evaluation.id)
            error = str(problem) if isinstance(problem, _EXPECTED) else f"{type(problem).__name__}: {problem}"
            self._evaluations.finish(evaluation.id, error=error)
        else:
            self._evaluations.finish(evaluation.id, result)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        root = self._equipment.data_dir / "evaluations"
        root.mkdir(parents=True, exist_ok=True)
        with (root / "lock").open("w") as file:
            try:
                # The kernel lets go of it when the process ends, however it ends.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EvaluationBusy(
                    "another evaluation is under way (`instructloop evaluations`): wait for it, or let the "
                    "trainer carry this one out after it, with --later"
                ) from None
            yield


class EvaluationRun:
    """One evaluation's run; what its files hold already is not asked for again."""

    def __init__(self, evaluation: Evaluation, equipment: Equipment) -> None:
        self._evaluation = evaluation
        self._request: EvaluationRequest = evaluation.asked
        self._equipment = equipment
        self._files = EvaluationFiles(evaluation_directory(equipment.data_dir, evaluation.id))
        self._participants = Participants(self._request, equipment)
        self._arena = Arena(equipment.store.engine)
        self._completion_ids: list[str] = []

    def run(self) -> dict[str, Any]:
        """Return the result as plain JSON. Raises CannotEvaluate, EndpointProblem, FileProblem."""
        try:
            prompts = self._prompts()
            contestants = self._participants.contestants()
            self._participants.check_judges()
            pairs = list(combinations(range(len(contestants)), 2))
            labelled = 1 + sum(choice.labels for choice in self._request.judges)
            total = len(prompts) * (labelled * len(contestants) + len(self._request.judges) * len(pairs))
            with _Progress(self._evaluation, self._equipment.evaluations, total) as progress:
                answers = [
                    self._answers(i, contestant, prompts, progress)
                    for i, contestant in enumerate(contestants)
                ]
                judges = self._participants.judges()
                duels = [
                    Duel(
                        j,
                        pair,
                        self._verdicts(j, judge, self._matches(prompts, answers, pair), pair, progress),
                    )
                    for j, judge in enumerate(judges)
                    for pair in pairs
                ]
                labellings = [
                    *self._labellings_by_people(judges, prompts, answers),
                    *self._labellings_by_models(judges, prompts, answers, progress),
                ]
            self._refuse_what_was_forgotten()
            return figures(
                contestants=[contestant.name for contestant in contestants],
                judges=judges,
                prompts=prompts,
                answers=answers,
                duels=duels,
                labellings=labellings,
                settings=self._equipment.settings,
                seed=self._request.seed,
            )
        finally:
            self._participants.close()

    # -- prompts

    def _prompts(self) -> list[ChatPrompt]:
        """Return the prompts that were chosen, or choose them; not those that were forgotten since."""
        chosen = self._files.prompts()
        self._completion_ids = self._files.completion_ids()
        if chosen is None or self._forgotten():
            chosen = self._choose()
            self._files.choose(chosen)
        self._completion_ids = self._files.completion_ids()
        return [
            ChatPrompt(one["key"], tuple(one["messages"]), tuple(one["checks"]), one.get("bad"))
            for one in chosen
        ]

    def _choose(self) -> list[dict[str, Any]]:
        asked, equipment, limit = self._request.prompts, self._equipment, self._request.limit
        if self._request.files:
            found = [_row(chat, None) for chat in islice(read_chats(Path(asked)), limit)]
            place = asked
        elif asked == CASES:
            cases = Cases(equipment.store.engine).list()[-limit:]
            # A case is forgotten under its own id, whatever it was made of.
            found = [_row(chat, chat.key) for chat in case_chats(cases, equipment.privacy)]
            place = "the cases"
        else:
            held_out = held_out_chats(equipment.store, equipment.held_out_share, limit, equipment.privacy)
            found = [_row(chat, completion_id) for chat, completion_id in held_out]
            place = "the held-out side of the store"
        if len(found) < 2:
            raise CannotEvaluate(f"prompts: there are {len(found)} in {place}, at least two are needed")
        return found

    def _forgotten(self) -> bool:
        names: list[Name] = [("completion", id) for id in self._completion_ids]
        return bool(self._equipment.store.forgettings.among(names))

    def _refuse_what_was_forgotten(self) -> None:
        if self._forgotten():
            self._arena.withdraw_asking([one["messages"] for one in self._files.prompts() or ()])
            self._files.delete_texts()
            raise CannotEvaluate("a prompt that it asks was forgotten meanwhile: ask for it again")

    def _answers(
        self, index: int, contestant: Contestant, prompts: Sequence[ChatPrompt], progress: "_Progress"
    ) -> list[list[Answer]]:
        answers: list[list[Answer]] = []
        for number, batch in _batches(prompts):
            self._refuse_what_was_forgotten()
            # Each prompt has seeds of its own, and in a run that is gone on with the same.
            seed = self._request.seed + number * BATCH * self._request.n
            found = self._files.answers(index, number, partial(_asked, contestant, batch, seed))
            answers += [[Answer(**one) for one in own] for own in found]
            progress.step(f"answers of {contestant.name}", len(batch))
        return answers

    def _matches(
        self, prompts: Sequence[ChatPrompt], answers: Sequence[Answers], pair: tuple[int, int]
    ) -> list[list[Pair]]:
        """Set the i-th answers of two contestants to each prompt against each other."""
        first, second = (answers[one] for one in pair)
        return [
            [Pair(prompt, ours.text, theirs.text) for ours, theirs in zip(own, other, strict=True)]
            for prompt, own, other in zip(prompts, first, second, strict=True)
        ]

    def _verdicts(
        self,
        index: int,
        judge: Judge,
        matches: Sequence[Sequence[Pair]],
        pair: tuple[int, int],
        progress: "_Progress",
    ) -> list[list[float | None]]:
        """Return the verdicts on each prompt's matches."""
        verdicts: list[list[float | None]] = []
        for number, batch in _batches(matches):
            self._refuse_what_was_forgotten()
            asked = [match for own in batch for match in own]
            compare = partial(judge.compare, asked)
            # People go on voting, so what they said so far is not kept.
            lasting = not isinstance(judge, PeopleJudge)
            found = self._files.verdicts(index, pair, number, compare) if lasting else compare()
            n = self._request.n
            verdicts += [found[i : i + n] for i in range(0, len(found), n)]
            progress.step(f"verdicts of {judge.name}", len(batch))
        return verdicts

    # -- labels

    def _labellings_by_people(
        self, judges: Sequence[Judge], prompts: Sequence[ChatPrompt], answers: Sequence[Answers]
    ) -> Iterator[Labelling]:
        """Yield the labels that came with votes, of each kind of people who gave any."""
        for judge in judges:
            if not isinstance(judge, PeopleJudge):
                continue
            opinions: list[list[list[list[str]]]] = [[[] for one in own for _ in one] for own in answers]
            for first, second in combinations(range(len(answers)), 2):
                matches = self._matches(prompts, answers, (first, second))
                given = judge.labels([match for own in matches for match in own])
                for at, (ours, theirs) in enumerate(given):
                    opinions[first][at] += ours
                    opinions[second][at] += theirs
            if any(labels for own in opinions for given_ in own for labels in given_):
                yield Labelling(judge.name, opinions)

    def _labellings_by_models(
        self,
        judges: Sequence[Judge],
        prompts: Sequence[ChatPrompt],
        answers: Sequence[Answers],
        progress: "_Progress",
    ) -> Iterator[Labelling]:
        """Yield the labels of each language model that is to give some, with one opinion an answer."""
        for j, (choice, judge) in enumerate(zip(self._request.judges, judges, strict=True)):
            if not (choice.labels and isinstance(judge, EndpointJudge)):
                continue
            opinions = []
            for i, own in enumerate(answers):
                labels: list[list[str] | None] = []
                for number, batch in _batches(list(zip(prompts, own, strict=True))):
                    self._refuse_what_was_forgotten()
                    asked = [(prompt, one.text) for prompt, given in batch for one in given]
                    labels += self._files.labels(j, i, number, partial(judge.labels, asked))
                    progress.step(f"labels of {judge.name}", len(batch))
                opinions.append([[] if one is None else [one] for one in labels])
            yield Labelling(judge.name, opinions)


class _Progress:
    """How far an evaluation is: in the store, on a terminal as a bar, in a log by step."""

    def __init__(self, evaluation: Evaluation, evaluations: Evaluations, total: int) -> None:
        self._evaluation = evaluation
        self._evaluations = evaluations
        self._done, self._total = 0, total
        self._step = ""
        self._bar = tqdm(total=total, unit="prompt", disable=not sys.stderr.isatty())

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, name: str, count: int) -> None:
        """Note that so much more is there; raises EvaluationConflict if the evaluation was cancelled."""
        self._done += count
        self._evaluations.progress(self._evaluation.id, name, self._done, self._total)
        self._bar.set_description(name, refresh=False)
        self._bar.update(count)
        if self._bar.disable and name != self._step:
            logger.info("evaluation %d: %s", self._evaluation.id, name)
        self._step = name


def _batches(items: Sequence[Item]) -> Iterator[tuple[int, Sequence[Item]]]:
    for start in range(0, len(items), BATCH):
        yield start // BATCH, items[start : start + BATCH]


def _asked(contestant: Contestant, batch: Sequence[ChatPrompt], seed: int) -> list[list[dict[str, Any]]]:
    return [[asdict(one) for one in own] for own in contestant.answer(batch, seed)]


def _row(chat: ChatPrompt, completion_id: str | None) -> dict[str, Any]:
    row = {"key": chat.key, "messages": list(chat.messages), "checks": list(chat.checks)}
    row |= {} if chat.bad is None else {"bad": chat.bad}
    return row if completion_id is None else row | {"completion_id": completion_id}
