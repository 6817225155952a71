"""Whether a candidate may serve: the verdict on the evidence, as a list of named conditions.

Owns the decision, as a pure function. Collecting the answers and scoring them is `training`'s round; acting
on the verdict is the registry's. A further condition is a function in `CONDITIONS`, its name in
`evaluation.settings.ConditionName`, and a field of `Evidence` that it reads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.cases import CaseChanges
from evaluation.comparison import Interval, win_rate
from evaluation.overoptimisation import Watch
from evaluation.settings import ConditionName, EvaluationSettings
from evaluation.tax import Change

_SHOWN_CASES = 10


@dataclass(frozen=True, slots=True)
class Comparison:
    """One answer of the candidate beside one of the version in service, to the same held-out prompt.

    Outcomes are the candidate's: 1 won, 0 lost, 0.5 tied. `judge` is by a reward model that PPO did not train
    on, `checks` by the share of the prompt's checks that each answer meets (None where it has none).
    """

    prompt: str
    judge: float
    checks: float | None = None

    @property
    def combined(self) -> float:
        """The checks' outcome where the prompt has some, else the judge's.

        A program does not err. A judge fitted to a few rankings does: one that hardly told pairs apart, asked
        where the checks tied, overruled a candidate that met more constraints.
        """
        return self.judge if self.checks is None else self.checks


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the gate decides on. An interval is None where fewer than two prompts speak for it.

    `kl` is the candidate's mean KL from the version in service in nats a response, None when not measured;
    `decided_prompts` counts the prompts on which the combined outcomes are not tied overall. What is measured
    apart from the comparisons is None where it was not: `watch`, the over-optimisation watch, `cases`,
    what the candidate changed on them, and `tax`, the changes on benchmarks.
    """

    judge: Interval | None
    checks: Interval | None
    combined: Interval | None
    kl: float | None
    prompts: int
    comparisons: int
    decided_prompts: int
    cases: CaseChanges | None = None
    watch: Watch | None = None
    tax: tuple[Change, ...] | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """One of the gate's conditions: whether it holds, why in a sentence, and the figures it rests on.

    One that is not `binding` is reported but refuses nobody.
    """

    name: ConditionName
    passed: bool
    sentence: str
    figures: Mapping[str, Any]
    binding: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision in one sentence, the conditions in order, what else is worth saying, and all figures."""

    promote: bool
    summary: str
    conditions: list[Condition]
    remarks: list[str]
    figures: dict[str, Any]

    @property
    def reasons(self) -> list[str]:
        """Every condition's sentence, then the remarks."""
        return [condition.sentence for condition in self.conditions] + self.remarks

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON, as it stands in a manifest."""
        return {**asdict(self), "reasons": self.reasons}


def gather(
    comparisons: Sequence[Comparison], kl: float | None, settings: EvaluationSettings, *, seed: int = 0
) -> Evidence:
    """Turn comparisons into evidence: win rates with intervals clustered by prompt."""

    def rate(pairs: Sequence[tuple[str, float]]) -> Interval | None:
        prompts = [prompt for prompt, _ in pairs]
        if len(set(prompts)) < 2:
            return None
        return win_rate(
            prompts,
            [value for _, value in pairs],
            confidence=settings.confidence,
            resamples=settings.resamples,
            seed=seed,
        )

    totals: dict[str, float] = {}
    for comparison in comparisons:
        totals[comparison.prompt] = totals.get(comparison.prompt, 0.0) + comparison.combined - 0.5
    return Evidence(
        judge=rate([(item.prompt, item.judge) for item in comparisons]),
        checks=rate([(item.prompt, item.checks) for item in comparisons if item.checks is not None]),
        combined=rate([(item.prompt, item.combined) for item in comparisons]),
        kl=kl,
        prompts=len(totals),
        comparisons=len(comparisons),
        decided_prompts=sum(total != 0 for total in totals.values()),
    )


def decide(evidence: Evidence, settings: EvaluationSettings) -> Verdict:
    """Decide on promotion: every binding condition has to hold, and each one's reason is given either way."""
    conditions = []
    for name, test in CONDITIONS.items():
        found = test(evidence, settings)
        if found is not None:
            passed, sentence, figures = found
            binding = name not in settings.report_only
            conditions.append(Condition(name, passed, sentence, figures, binding))
    failed = [condition.name for condition in conditions if condition.binding and not condition.passed]
    figures = {**asdict(evidence), "kl": _finite(evidence.kl)}
    for condition in conditions:
        figures |= {name: value for name, value in condition.figures.items() if name not in figures}
    return Verdict(not failed, _summary(conditions, failed), conditions, _remarks(evidence), figures)


def _summary(conditions: Sequence[Condition], failed: Sequence[str]) -> str:
    binding = sum(condition.binding for condition in conditions)
    if failed:
        return f"Not to be promoted: {len(failed)} of {binding} conditions failed ({', '.join(failed)})."
    if not binding:
        return "To be promoted: no condition is binding, all are reported only."
    return f"To be promoted: all {binding} conditions hold."


def in_words(verdict: Mapping[str, Any]) -> list[str]:
    """Return a stored verdict as lines for a person: the decision, each condition with its mark, the rest.

    One from before conditions had names has its reasons only.
    """
    promote, conditions = verdict.get("promote"), verdict.get("conditions")
    if conditions is None:
        decision = "To be promoted." if promote else "Not to be promoted."
        return [decision, *map(str, verdict.get("reasons", ()))]
    lines = [str(verdict["summary"])]
    for condition in conditions:
        mark = "holds" if condition["passed"] else "fails" if condition["binding"] else "fails, reported only"
        lines.append(f"{condition['name']} ({mark}): {condition['sentence']}")
    return [*lines, *map(str, verdict.get("remarks", ()))]


def _finite(value: float | None) -> float | None:
    """Return the value, or None where it is no number: NaN and infinity are not JSON."""
    return value if value is not None and math.isfinite(value) else None


Found = tuple[bool, str, dict[str, Any]]
"""Whether a condition holds, why in a sentence, and the figures that decided."""


def _enough(evidence: Evidence, settings: EvaluationSettings) -> Found:
    figures = {
        "decided_prompts": evidence.decided_prompts,
        "prompts": evidence.prompts,
        "comparisons": evidence.comparisons,
        "required_decided_prompts": settings.decided_prompts,
    }
    if evidence.comparisons == 0:
        return (
            False,
            "There was no comparison on a held-out prompt, so nothing speaks for the candidate.",
            figures,
        )
    # An answer that ties everywhere gives the interval [0.5, 0.5], which "reaches" 0.5 without any evidence.
    # Six wins and no loss are the fewest that a two-sided sign test at 5 % calls a difference.
    count = f"{evidence.decided_prompts} of {evidence.prompts} held-out prompts tell the two versions apart"
    if evidence.decided_prompts < settings.decided_prompts:
        return False, f"Only {count}; at least {settings.decided_prompts} have to.", figures
    return True, f"{count} ({evidence.comparisons} comparisons).", figures


def _better(evidence: Evidence, settings: EvaluationSettings) -> Found:
    rate = evidence.combined
    figures = {
        "combined": None if rate is None else rate.figures(),
        "win_rate_bound": settings.win_rate_bound,
    }
    if rate is None:
        return (
            False,
            "No interval of the win rate can be told from fewer than two held-out prompts.",
            figures,
        )
    text = (
        f"The candidate's win rate is {rate.estimate:.3f}, {rate.confidence:.0%} interval "
        f"[{rate.low:.3f}, {rate.high:.3f}]"
    )
    passed = rate.low >= settings.win_rate_bound
    bound = "reaches" if passed else "is below"
    return (
        passed,
        f"{text}: its lower bound {bound} the {settings.win_rate_bound:g} that is asked for.",
        figures,
    )


def _within_budget(evidence: Evidence, settings: EvaluationSettings) -> Found:
    figures = {"kl": _finite(evidence.kl), "kl_budget": settings.kl_budget}
    if evidence.kl is None:
        return False, "The KL from the version in service was not measured.", figures
    text = f"The candidate is {evidence.kl:.2f} nats a response from the version in service (KL)"
    # Written so that NaN, from a model that came apart, is over the budget.
    passed = evidence.kl <= settings.kl_budget
    return passed, f"{text}, {'within' if passed else 'over'} the budget of {settings.kl_budget:g}.", figures


def _cases(evidence: Evidence, settings: EvaluationSettings) -> Found | None:
    changed = evidence.cases
    if changed is None:
        return None
    figures = {"cases": asdict(changed), "cases_may_break": settings.cases_may_break}
    failing, passing = len(changed.still_failing), len(changed.still_passing)
    all_ = len(changed.fixed) + len(changed.broke) + failing + passing
    text = (
        f"Of {all_} cases the candidate fixes {_named(changed.fixed)} and breaks {_named(changed.broke)}; "
        f"{failing} fail as before and {passing} pass as before"
    )
    passed = len(changed.broke) <= settings.cases_may_break
    if changed.broke:
        text += f". At most {settings.cases_may_break} may break"
    return passed, f"{text}.", figures


def _named(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:_SHOWN_CASES]) + (", …" if len(ids) > _SHOWN_CASES else "")
    return f"{len(ids)} ({shown})" if ids else "none"


def _not_over_optimised(evidence: Evidence, settings: EvaluationSettings) -> Found | None:
    watch = evidence.watch
    if watch is None:
        return None
    gains = (
        f"From the SFT policy on, the proxy (the reward that was maximised) moved by {_gain(watch.proxy)} "
        f"and gold (the judge that nobody was trained on) by {_gain(watch.gold)}"
    )
    figures = {"proxy_gain": watch.proxy.figures(), "gold_gain": watch.gold.figures()}
    if watch.over_optimised:
        return False, f"{gains}: gold fell while the proxy rose, which is over-optimisation.", figures
    return True, f"{gains}: it is not so that the proxy rose while gold fell beyond its interval.", figures


def _little_tax(evidence: Evidence, settings: EvaluationSettings) -> Found | None:
    if not evidence.tax:
        return None
    bound = settings.tax_bound
    fallen = [item for item in evidence.tax if not item.difference.low >= -bound]
    texts = [
        f"{item.task} {item.metric} {item.before:.3f} before, {item.after:.3f} now "
        f"({_gain(item.difference)}, {item.difference.clusters} items)"
        for item in evidence.tax
    ]
    text = "Alignment tax: " + "; ".join(texts)
    figures = {"tax": [item.as_dict() for item in evidence.tax], "tax_bound": bound}
    if fallen:
        names = ", ".join(item.task for item in fallen)
        return False, f"{text}. A fall of more than {bound:g} is not ruled out on {names}.", figures
    return True, f"{text}. A fall of more than {bound:g} is ruled out.", figures


def _gain(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


CONDITIONS: dict[ConditionName, Callable[[Evidence, EvaluationSettings], Found | None]] = {
    "decided prompts": _enough,
    "win rate": _better,
    "KL": _within_budget,
    "cases": _cases,
    "gold against proxy": _not_over_optimised,
    "tax": _little_tax,
}
"""The gate's conditions, in the order in which a person reads them; one that returns None does not apply."""


def _remarks(evidence: Evidence) -> list[str]:
    """Say what each source alone says; the verdict rests on both together."""
    remarks = []
    if evidence.watch is not None and evidence.watch.checkpoints > 1:
        kind = "held-out" if evidence.watch.held_out else "training"
        remarks.append(
            f"It is the checkpoint after update {evidence.watch.update}, chosen among "
            f"{evidence.watch.checkpoints} by the gold judge on {evidence.watch.prompts} {kind} prompts; the "
            "win rate is from none of those, so the choice does not flatter it."
        )
    if evidence.judge is not None:
        remarks.append(f"By the held-out reward model alone the win rate is {evidence.judge}.")
    if evidence.checks is not None:
        remarks.append(
            f"By the checks alone, on the {evidence.checks.clusters} prompts that have some, "
            f"it is {evidence.checks}."
        )
    return remarks
