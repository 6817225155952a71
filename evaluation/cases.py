"""Cases as regression tests: what a version answers to each, whether that passes, and what changed.

Owns when an answer passes and what makes a case at all. Cases are kept by `feedback.cases`; the engine and
the judge are handed in, so that this imports without torch. Whether a candidate may break some is the gate's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.checks import BadCheck, all_satisfied, degenerate, satisfied, validate
from feedback.cases import Case, CaseResult
from feedback.new_case import BadCase
from registry.registry import Version

if TYPE_CHECKING:
    from evaluation.sampler import Sample, Sampler

Score = Callable[[Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]], list[list[float]]]
"""Scores responses to prompts, both as token ids: a reward model that the policy was not trained on."""


@dataclass(frozen=True, slots=True)
class CaseChanges:
    """What a candidate changed, as the ids of cases."""

    fixed: list[str]
    broke: list[str]
    still_failing: list[str]
    still_passing: list[str]


def check_case(checks: Sequence[Mapping[str, Any]], good: str | None, bad: str | None) -> None:
    """Refuse what makes no case, naming the field; raises BadCase.

    It takes checks, or a good and a bad answer. Where there are both, the checks must tell them apart.
    """
    for number, check in enumerate(checks):
        try:
            validate(check)
        except BadCheck as problem:
            raise BadCase(f"checks.{number}.{str(problem).partition(': ')[0]}", _reason(problem)) from None
        if good is not None and not satisfied(check, good):
            raise BadCase("good", f"the good answer does not meet checks.{number} ({check['kind']})")
    if checks and bad is not None and all_satisfied(checks, bad):
        raise BadCase("checks", "the bad answer meets them all, so they don't catch it")
    if not checks and good is None:
        raise BadCase("checks", "give checks, or a good and a bad answer")
    if not checks and bad is None:
        raise BadCase("bad", "without checks it takes a bad answer, to judge others against")
    if good is not None and good == bad:
        raise BadCase("bad", "the same as the good answer")


def _reason(problem: BadCheck) -> str:
    return str(problem).partition(": ")[2]


@dataclass(frozen=True, slots=True)
class CaseTest:
    """How cases are put to a version.

    `tokenizer` is Transformers'; prompts keep the last `prompt_tokens`, answers are greedy and of at most
    `max_tokens`.
    """

    tokenizer: Any
    prompt_tokens: int
    max_tokens: int

    def results(
        self,
        sampler: "Sampler",
        cases: Sequence[Case],
        *,
        candidate: Version,
        incumbent: Version,
        score: Callable[[], Score],
    ) -> list[CaseResult]:
        """Put every case to both versions; `score` makes the judge, for cases without checks."""

        def try_on(version: Version) -> list[tuple[str, bool]]:
            found = self.answers(sampler, version.path, cases)
            passed = self.passed(cases, found, score)
            return [(answer.text, passes) for answer, passes in zip(found, passed, strict=True)]

        before, after = try_on(incumbent), try_on(candidate)
        return [
            CaseResult(case.id, candidate.name, incumbent.name, *old, *new)
            for case, old, new in zip(cases, before, after, strict=True)
        ]

    def answers(self, sampler: "Sampler", model_dir: Path, cases: Sequence[Case]) -> "list[Sample]":
        """Return what the version in `model_dir` answers to each case."""
        sampler.load(model_dir)
        prompts = [self._prompt(case) for case in cases]
        found = sampler.sample(prompts, n=1, max_tokens=self.max_tokens, temperature=0.0, seed=0)
        return [samples[0] for samples in found]

    def passed(
        self, cases: Sequence[Case], answers: "Sequence[Sample]", score: Callable[[], Score]
    ) -> list[bool]:
        """Tell which answers pass: by the case's checks, or without any by beating its bad answer.

        `score` makes the judge, and is called only if a case needs it. An answer that is empty or repeats
        itself over and over passes nothing.
        """
        judged = [n for n, case in enumerate(cases) if not case.checks]
        scores = score()([self._beside_bad(cases[n], answers[n]) for n in judged]) if judged else []
        better = {n: own > bad for n, (own, bad) in zip(judged, scores, strict=True)}
        return [
            better[n] and not degenerate(answer.text)
            if n in better
            else all_satisfied(case.checks, answer.text)
            for n, (case, answer) in enumerate(zip(cases, answers, strict=True))
        ]

    def _prompt(self, case: Case) -> list[int]:
        ids: list[int] = self.tokenizer.apply_chat_template(
            case.messages, add_generation_prompt=True, return_dict=False
        )
        return ids[-self.prompt_tokens :]

    def _beside_bad(self, case: Case, answer: "Sample") -> tuple[list[int], list[list[int]]]:
        bad = self.tokenizer(case.bad, add_special_tokens=False).input_ids
        written = [*bad, self.tokenizer.eos_token_id]
        return self._prompt(case), [answer.token_ids, written[: self.max_tokens]]


def changes(results: Sequence[CaseResult]) -> CaseChanges:
    """Sort results by what the candidate changed."""

    def those(change: str) -> list[str]:
        return [result.case_id for result in results if result.change == change]

    return CaseChanges(those("fixed"), those("broke"), those("still failing"), those("still passing"))
