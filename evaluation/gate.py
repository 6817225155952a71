"""Whether a candidate may serve: the verdict on the evidence from held-out prompts.

Owns the decision, as a pure function. Collecting the answers and scoring them is `training`'s round; acting
on the verdict is the registry's.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.comparison import Interval, win_rate
from evaluation.settings import EvaluationSettings


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
    `decided_prompts` counts the prompts on which the combined outcomes are not tied overall.
    """

    judge: Interval | None
    checks: Interval | None
    combined: Interval | None
    kl: float | None
    prompts: int
    comparisons: int
    decided_prompts: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision, the reasons for it in sentences, and the figures that it rests on as plain JSON."""

    promote: bool
    reasons: list[str]
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as plain JSON, as it stands in a manifest."""
        return asdict(self)


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
    """Decide on promotion: every condition has to hold, and each one's reason is given either way."""
    tests = [
        _enough(evidence, settings),
        _better(evidence, settings),
        _within_budget(evidence, settings),
    ]
    promote = all(passed for passed, _ in tests)
    reasons = [reason for _, reason in tests] + _remarks(evidence)
    figures = {
        **asdict(evidence),
        "kl": evidence.kl
        if evidence.kl is not None and math.isfinite(evidence.kl)
        else None,  # NaN is not JSON
        "win_rate_bound": settings.win_rate_bound,
        "kl_budget": settings.kl_budget,
        "required_decided_prompts": settings.decided_prompts,
    }
    return Verdict(promote, reasons, figures)


def _enough(evidence: Evidence, settings: EvaluationSettings) -> tuple[bool, str]:
    if evidence.comparisons == 0:
        return False, "There was no comparison on a held-out prompt, so nothing speaks for the candidate."
    # An answer that ties everywhere gives the interval [0.5, 0.5], which "reaches" 0.5 without any evidence.
    # Six wins and no loss are the fewest that a two-sided sign test at 5 % calls a difference.
    count = f"{evidence.decided_prompts} of {evidence.prompts} held-out prompts tell the two versions apart"
    if evidence.decided_prompts < settings.decided_prompts:
        return False, f"Only {count}; at least {settings.decided_prompts} have to."
    return True, f"{count} ({evidence.comparisons} comparisons)."


def _better(evidence: Evidence, settings: EvaluationSettings) -> tuple[bool, str]:
    rate = evidence.combined
    if rate is None:
        return False, "No interval of the win rate can be told from fewer than two held-out prompts."
    text = (
        f"The candidate's win rate is {rate.estimate:.3f}, {rate.confidence:.0%} interval "
        f"[{rate.low:.3f}, {rate.high:.3f}]"
    )
    if rate.low >= settings.win_rate_bound:
        return True, f"{text}: its lower bound reaches the {settings.win_rate_bound:g} that is asked for."
    return False, f"{text}: its lower bound is below the {settings.win_rate_bound:g} that is asked for."


def _within_budget(evidence: Evidence, settings: EvaluationSettings) -> tuple[bool, str]:
    if evidence.kl is None:
        return False, "The KL from the version in service was not measured."
    text = f"The candidate is {evidence.kl:.2f} nats a response from the version in service (KL)"
    # Written so that NaN, from a model that came apart, is over the budget.
    if evidence.kl <= settings.kl_budget:
        return True, f"{text}, within the budget of {settings.kl_budget:g}."
    return False, f"{text}, over the budget of {settings.kl_budget:g}."


def _remarks(evidence: Evidence) -> list[str]:
    """Say what each source alone says; the verdict rests on both together."""
    remarks = []
    if evidence.judge is not None:
        remarks.append(f"By the held-out reward model alone the win rate is {evidence.judge}.")
    if evidence.checks is not None:
        remarks.append(
            f"By the checks alone, on the {evidence.checks.clusters} prompts that have some, "
            f"it is {evidence.checks}."
        )
    return remarks
