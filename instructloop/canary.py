"""The version on trial: the watch that promotes or rolls it back by rule, and the commands about it.

Owns when the rule is asked and that its decision is carried out once, also where several watches look at the
same trial. What it decides is `evaluation.canary`'s affair; replicas follow the registry by themselves.
"""

import argparse
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from instructloop import access

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from evaluation.canary import Decision
    from instructloop.config import Config
    from registry.registry import Registry, Trial
    from registry.settings import RolloutSettings

_LOG = logging.getLogger(__name__)
_ACTOR = "canary rule"
_LOOK_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0
_DEFAULT_SHARE = 0.1


class Canary:
    """The trial of one installation; any number of processes may watch it. `clock` gives Unix seconds."""

    def __init__(
        self,
        engine: "Engine",
        registry: "Registry",
        settings: "RolloutSettings",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._settings = settings
        self._clock = clock

    def run(self, stop: threading.Event) -> None:
        """Look at the trial until `stop`; while the database is away, less often."""
        from sqlalchemy.exc import SQLAlchemyError

        pause = _LOOK_SECONDS
        while not stop.wait(pause):
            try:
                self.look()
                pause = _LOOK_SECONDS
            except (SQLAlchemyError, OSError) as problem:
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                _LOG.warning("the canary rule waits %.0f s: %s", pause, problem)

    def look(self) -> "Decision | None":
        """Decide on the trial, if there is one, and carry it out unless somebody has acted meanwhile.

        Raises sqlalchemy.exc.SQLAlchemyError when the database is away.
        """
        trial = self._registry.trial()
        if trial is None or not self._settings.canary_rule:
            return None
        decision = self._decide(trial)
        if decision is not None and decision.move != "keep":
            self._act(trial, decision)
        return decision

    def report(self) -> dict[str, Any]:
        """Tell of the trial as plain JSON: what is tried, the votes, and what the rule makes of them."""
        trial = self._registry.trial()
        desired = self._registry.desired()
        decision = None if trial is None else self._decide(trial)
        return {
            "stable": None if desired is None else desired.name,
            "trial": None if trial is None or decision is None else asdict(trial),
            "rule": self._settings.canary_rule,
            "decision": None if decision is None else asdict(decision),
        }

    def _decide(self, trial: "Trial") -> "Decision | None":
        from evaluation.canary import decide
        from feedback.trial_votes import trial_votes
        from registry.registry import STALE_SECONDS

        desired = self._registry.desired()
        if desired is None or desired.name == trial.version:
            return None  # it ended between two looks
        return decide(
            trial,
            desired.name,
            trial_votes(self._engine, trial=trial.version, stable=desired.name, since=trial.since),
            self._registry.replicas(),
            settings=self._settings,
            now=self._clock(),
            stale_seconds=STALE_SECONDS,
        )

    def _act(self, trial: "Trial", decision: "Decision") -> None:
        """Promote or withdraw, as long as just this trial goes on: another watch may have been first."""
        from registry.audit import AuditLog
        from registry.registry import BrokenVersion, IllegalTransition

        log, reason = AuditLog(self._engine), decision.reason
        try:
            if decision.move == "promote":
                try:
                    self._registry.promote(trial.version, actor=_ACTOR, reason=reason, trial=trial)
                except BrokenVersion as problem:
                    log.append(_ACTOR, "promote", trial.version, outcome="refused", detail=str(problem))
                    reason = f"It would be promoted, but its files are broken: {problem}"
                    self._registry.withdraw(actor=_ACTOR, reason=reason, trial=trial)
            else:
                self._registry.withdraw(actor=_ACTOR, reason=reason, trial=trial)
        except IllegalTransition as problem:
            _LOG.info("%s: %s", trial.version, problem)
            return
        _LOG.info("%s of %s: %s", decision.move, trial.version, reason)


# -- commands


def add_to(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands; `add` makes the parser of one."""
    tried = add("canary", _canary, "let a version answer some end users on trial, or show the trial")
    tried.add_argument("version", nargs="?", help="its name, such as policy-0003; none shows the trial")
    tried.add_argument("--json", action="store_true", help="show the trial as JSON")
    shadow = add("shadow", _try, "let a version answer copies of some requests, which nobody sees")
    shadow.set_defaults(mode="shadow")
    shadow.add_argument("version", help="its name, such as policy-0003")
    withdraw = add("withdraw", _withdraw, "end the trial; its version is again what it was before")
    for parser in (tried, shadow):
        parser.add_argument(
            "--share",
            type=_share,
            default=_DEFAULT_SHARE,
            metavar="S",
            help=f"of end users for a canary, of requests for a shadow (default: {_DEFAULT_SHARE})",
        )
    for parser in (tried, shadow, withdraw):
        parser.add_argument("--reason", default="", help="written to the log")


def open_canary(config: "Config", engine: "Engine") -> Canary:
    """Return the trial of an installation."""
    from instructloop import installation

    return Canary(engine, installation.open_registry(config, engine), config.rollout)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share such as 0.1, above 0 and at most 1")
    return share


def _canary(arguments: argparse.Namespace) -> int:
    if arguments.version is not None:
        arguments.mode = "canary"
        return _try(arguments)
    from instructloop import listings

    found = open_canary(*_opened(arguments)).report()
    if arguments.json:
        print(json.dumps(found, indent=1))
    elif found["trial"] is None:
        print("no version is on trial")
    else:
        listings.show(listings.trial(found))
        print(found["decision"]["reason"])
        for why, count in found["decision"]["figures"]["left_out"].items():
            print(f"left out: {count} votes, {why}")
        if not found["rule"]:
            print("nothing acts on it by itself: rollout.canary_rule is off")
    return 0


def _try(arguments: argparse.Namespace) -> int:
    from registry.audit import AuditLog

    config, engine = _opened(arguments)
    who, name, mode = access.actor(), arguments.version, arguments.mode
    with AuditLog(engine).refusals(who, mode, name):
        getattr(_registry(config, engine), mode)(name, arguments.share, actor=who, reason=arguments.reason)
    what = "end users" if mode == "canary" else "requests, unseen"
    print(f"{name} is a {mode} for {arguments.share:.4g} of {what}: `instructloop canary` shows how it does")
    return 0


def _withdraw(arguments: argparse.Namespace) -> int:
    from registry.audit import AuditLog

    config, engine = _opened(arguments)
    who = access.actor()
    with AuditLog(engine).refusals(who, "withdraw"):
        name = _registry(config, engine).withdraw(actor=who, reason=arguments.reason)
    print(f"{name} is on trial no more")
    return 0


def _opened(arguments: argparse.Namespace) -> "tuple[Config, Engine]":
    from instructloop import config, installation

    loaded = config.load(arguments.config)
    return loaded, installation.open_database(loaded)


def _registry(config: "Config", engine: "Engine") -> "Registry":
    from instructloop import installation

    return installation.open_registry(config, engine)
