"""How often the canary rule errs while it looks after every single vote, and how many votes it takes.

Votes are drawn one after the other: each falls to the canary with its share, and is good with the share of
good votes of its version. All runs of a case are simulated side by side.

- False alarms of "worse": the canary is exactly as good. Of "not worse": it is worse by exactly the margin.
  Both have to stay at or below alpha, however long one looks; `until` is the vote at which a case ends.
- Power: votes until a canary is rolled back or promoted by the rule, with the shipped settings.
- Beside the false alarms those of a z-test of two shares at the same alpha (one-sided, from ten votes of each
  version on), as one would use it with a number of votes that is fixed before: looked at after every vote, it
  stops a good part of all canaries.

Prints JSON; run it with `make bench-canary`.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.comparison import wilson
from evaluation.sequential import log_e_not_worse, log_e_worse
from registry.settings import RolloutSettings

Counts = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
Alarm = Callable[..., NDArray[np.bool_]]
"""Of good and bad votes on the canary and on the stable version, (R,) each: which runs are stopped."""

SETTINGS = RolloutSettings()
RUNS = 10_000
POWER_RUNS = 300
SHARES = (0.1, 0.5)


def worse(alpha: float = SETTINGS.canary_alpha) -> Alarm:
    """The shipped test for a canary that is worse."""
    return lambda *counts: log_e_worse(*counts) >= math.log(1 / alpha)


def not_worse(alpha: float = SETTINGS.canary_alpha, margin: float = SETTINGS.canary_margin) -> Alarm:
    """The shipped test for a canary that is not worse by the margin."""
    return lambda *counts: log_e_not_worse(*counts, margin) >= math.log(1 / alpha)


def promoted() -> Alarm:
    """The same as the rule asks it: from its fewest votes on."""
    alarm = not_worse()
    return lambda a, b, c, d: alarm(a, b, c, d) & (a + b >= SETTINGS.canary_minimum_votes)


def z_test(alpha: float = SETTINGS.canary_alpha, margin: float = 0.0, *, lower: bool = True) -> Alarm:
    """A test for a fixed number of votes: that the canary is worse, or not worse by `margin`."""
    bound = NormalDist().inv_cdf(1 - alpha)

    def alarm(a: Any, b: Any, c: Any, d: Any) -> NDArray[np.bool_]:
        n, m = np.maximum(a + b, 1), np.maximum(c + d, 1)
        p, q = a / n, c / m
        pooled = (a + c) / np.maximum(a + b + c + d, 1)
        spread = pooled * (1 - pooled) * (1 / n + 1 / m)
        if margin:
            spread = p * (1 - p) / n + q * (1 - q) / m
        z = (q - p if lower else p - q + margin) / np.sqrt(np.maximum(spread, 1e-12))
        found: NDArray[np.bool_] = (z > bound) & (n >= 10) & (m >= 10)
        return found

    return alarm


def first_alarms(
    alarms: dict[str, Alarm],
    canary: float,
    stable: float,
    share: float,
    *,
    runs: int,
    until: int,
    seed: int = 0,
) -> dict[str, NDArray[np.int64]]:
    """Return by name the number of votes at each run's first alarm (`runs`,), 0 where it had none by `until`.

    `canary` and `stable` are the shares of good votes, `share` that of votes that fall to the canary.
    """
    random = np.random.default_rng(seed)
    counts = np.zeros((4, runs), dtype=np.int64)
    first = {name: np.zeros(runs, dtype=np.int64) for name in alarms}
    waiting = {name: np.arange(runs) for name in alarms}
    for vote in range(1, until + 1):
        tried = random.random(runs) < share
        good = random.random(runs) < np.where(tried, canary, stable)
        counts[np.where(tried, 0, 2) + ~good, np.arange(runs)] += 1
        for name, alarm in alarms.items():
            who = waiting[name]
            if len(who):
                stopped = alarm(*counts[:, who])
                first[name][who[stopped]] = vote
                waiting[name] = who[~stopped]
    return first


def false_alarms(runs: int, until: int) -> list[dict[str, Any]]:
    """Measure how often canaries are stopped that are as good, or passed that are worse by the margin."""
    rows = []
    margin = SETTINGS.canary_margin
    for share in SHARES:
        for stable in (0.1, 0.5, 0.7, 0.9):
            alarms = {"e-process": worse(), "z-test": z_test()}
            found = first_alarms(alarms, stable, stable, share, runs=runs, until=until, seed=len(rows))
            case = {"test": "worse", "canary": stable, "stable": stable, "share": share}
            rows.append(_errors(case, found, runs=runs, until=until))
        for stable in (0.3, 0.7, 0.9):
            alarms = {"e-process": not_worse(), "z-test": z_test(margin=margin, lower=False)}
            canary = stable - margin
            found = first_alarms(alarms, canary, stable, share, runs=runs, until=until, seed=len(rows))
            case = {"test": "not worse", "canary": round(canary, 3), "stable": stable, "share": share}
            rows.append(_errors(case, found, runs=runs, until=until))
    return rows


def power(runs: int, until: int) -> list[dict[str, Any]]:
    """Measure after how many votes the rule rolls back what is worse and promotes what is as good."""
    rows = []
    for share in SHARES:
        for canary, stable in ((0.4, 0.7), (0.6, 0.7), (0.7, 0.7), (0.8, 0.7)):
            alarms = {"rollback": worse(), "promote": promoted()}
            first = first_alarms(alarms, canary, stable, share, runs=runs, until=until, seed=100 + len(rows))
            never = until + 1
            back, forth = (np.where(first[name] > 0, first[name], never) for name in ("rollback", "promote"))
            decided = np.minimum(back, forth)
            rows.append(
                {
                    "canary": canary,
                    "stable": stable,
                    "share": share,
                    "rolled_back": float((back <= forth)[decided < never].sum() / runs),
                    "promoted": float((forth < back).sum() / runs),
                    "undecided": float((decided == never).mean()),
                    "until": until,
                    "votes": _quantiles(decided),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _errors(
    case: dict[str, Any], found: dict[str, NDArray[np.int64]], *, runs: int, until: int
) -> dict[str, Any]:
    row = case | {"runs": runs, "until": until}
    for name, first in found.items():
        share = wilson(int((first > 0).sum()), runs)
        row[name] = {"false_alarms": share.estimate, "low": share.low, "high": share.high}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _quantiles(votes: NDArray[np.int64]) -> dict[str, float]:
    """Return after how many votes half and nine tenths of the runs were decided; `until` + 1: not by then."""
    return {"half": float(np.quantile(votes, 0.5)), "nine_tenths": float(np.quantile(votes, 0.9))}


def main() -> None:
    """Print everything as JSON, each case on standard error when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--until", type=int, default=1000)
    parser.add_argument("--power-runs", type=int, default=POWER_RUNS)
    parser.add_argument("--power-until", type=int, default=10_000)
    asked = parser.parse_args()
    found = {
        "alpha": SETTINGS.canary_alpha,
        "margin": SETTINGS.canary_margin,
        "false_alarms": false_alarms(asked.runs, asked.until),
        "power": power(asked.power_runs, asked.power_until),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
