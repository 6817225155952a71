"""The `instructloop fix` command: from a found misbehaviour to a served version without it, step by step.

It adds the case, sends it as feedback, asks for a round and watches what becomes of it; a trainer is started
only where none is at work. All that it knows stands in the database, so that it can be ended and run again at
any time. What a case is, is `feedback.cases`'; the round and the swap do their work without it.
"""

import argparse
import fcntl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from instructloop import access, cases, child

if TYPE_CHECKING:
    from feedback.cases import Case, CaseResult
    from feedback.store import StoredEvent
    from instructloop.config import Config
    from registry.registry import Registry, Replica
    from registry.rounds import Round

_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 30.0
_ANSWER_SECONDS = 300.0


class NotFixed(RuntimeError):  # noqa: N818
    """The case is not fixed; the message says why, and what can be done."""


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("case", nargs="?", metavar="CASE", help="a case that there is already, by its id")
    cases.add_content_to(parser)
    parser.add_argument(
        "--again", action="store_true", help="train once more on a case that a round did not fix"
    )
    parser.set_defaults(command=fix)


def fix(arguments: argparse.Namespace) -> int:
    """Fix a case; exit code 1 where it is not fixed, with the reason."""
    from feedback.new_case import BadCase
    from instructloop import config as configuration

    config = configuration.load(arguments.config)
    if (arguments.case is not None) == cases.is_given(arguments):
        raise BadCase("CASE", "give the id of a case, or the prompt of a new one (--prompt, --completion, …)")
    way = _Way(config, arguments.config, _case(config, arguments))
    try:
        way.go(again=arguments.again)
    except NotFixed as problem:
        print(f"not fixed: {problem}")
        return 1
    finally:
        way.close()
    return 0


def _case(config: "Config", arguments: argparse.Namespace) -> "Case":
    from evaluation.cases import check_case
    from feedback.cases import Cases
    from feedback.new_case import BadCase
    from instructloop import installation
    from registry.audit import AuditLog

    kept = Cases(installation.open_database(config))
    if arguments.case is not None:
        found = kept.get(arguments.case)
        if found.removed_at is not None:
            raise BadCase("CASE", f"{found.id} was removed: add it again")
        return found
    new, who = cases.new_case(arguments, train=True), access.actor()
    log = AuditLog(kept.engine)
    with log.refusals(who, "add case"):
        found = kept.add(new, actor=who, validate=check_case)
    log.append(who, "add case", found.id)
    return found


@dataclass(frozen=True, slots=True)
class Learning:
    """Where the round stands that learns from a case: None before it was asked for.

    `result` is what its candidate answered to the case, once its gate has asked.
    """

    round: "Round | None"
    result: "CaseResult | None"

    @property
    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        return self.round is not None and self.round.state in ("done", "failed")


class _Way:
    """The way of one case, as far as it has come."""

    def __init__(self, config: "Config", file: Path | None, case: "Case") -> None:
        from feedback.cases import Cases
        from feedback.store import Store
        from instructloop import installation
        from registry.rounds import Rounds

        self._config, self._file, self._case = config, file, case
        self._engine = installation.open_database(config)
        self._registry = installation.open_registry(config, self._engine)
        self._cases, self._store, self._rounds = (
            Cases(self._engine),
            Store(self._engine),
            Rounds(self._engine),
        )
        self._began = case.added_at
        self._trainer: subprocess.Popen[bytes] | None = None
        self._trainer_log: IO[bytes] | None = None
        self._told: set[str] = set()

    def go(self, *, again: bool) -> None:
        """Go it to its end; raises NotFixed."""
        self._send(again=again)
        position = self._stored()
        before = self._learning(position)
        if before.ended and before.round is not None:
            self._tell_round(before.round)
            if before.round.state == "failed":
                # Its events were left for the next round.
                print(f"round {before.round.id} failed: {before.round.error}")
                before = Learning(None, None)
        learning = self._learned(position, before)
        assert learning.round is not None
        version = self._passed(learning.round, learning.result)
        replica = wait_until_served(self._registry, version, self._tell)
        self._answered(replica, learning.result)

    def close(self) -> None:
        """End the trainer that was started here; its round goes on with the next."""
        if self._trainer is not None and self._trainer.poll() is None:
            self._trainer.terminate()
            self._trainer.wait()
        if self._trainer_log is not None:
            self._trainer_log.close()

    # -- the steps

    def _send(self, *, again: bool) -> None:
        """Send the case as feedback unless it was; with `again`, anew."""
        first = self._case.trainings == 0
        self._case = self._cases.begin_training(self._case.id, again=again)
        events = self._events()
        if self._case.trainings > 1:
            # A later attempt is timed from its own beginning.
            self._began = min(
                (one.event.received_at for one in events if one is not None), default=time.time()
            )
            if again:
                self._began = time.time()
        self._tell("noted", f"{self._case.id} ({self._case.title})", self._began)
        if any(one is None for one in events):
            cases.send_case(self._config, self._case)
            what = ", ".join(id.rpartition("-")[2] for id in self._ids)
            self._tell("queued", what if first or again else f"{what} (once more: it changes nothing)")

    def _stored(self) -> int:
        """Wait until the feedback is stored; returns its last position. Raises NotFixed."""
        began, warned = time.monotonic(), False
        while True:
            events = [one for one in self._events() if one is not None]
            for one in events:
                if one.status == "rejected":
                    raise NotFixed(f"its feedback was rejected: {one.reason}")
            if len(events) == len(self._ids) and all(one.position is not None for one in events):
                at = max(one.ingested_at or 0.0 for one in events)
                self._tell("stored", f"{len(events)} events", at)
                return max(one.position or 0 for one in events)
            if not warned and time.monotonic() - began > _PATIENCE_SECONDS:
                warned = True
                print(
                    "its feedback waits in the queue: is `instructloop ingest` (or `up`) running?", flush=True
                )
            time.sleep(_POLL_SECONDS)

    def _learned(self, position: int, learning: Learning) -> Learning:
        """Ask for a round on the feedback where none has it, and wait until one has ended."""
        if learning.round is None:
            waiting = self._rounds.request(access.actor())
            self._tell("asked for", f"round {waiting}")
            failed = {one.id for one in self._holding(position)}
        else:
            failed = set()
        while True:
            learning = self._learning(position, without=failed)
            if learning.round is not None:
                self._tell_round(learning.round)
                if learning.ended:
                    return learning
            self._keep_a_trainer()
            time.sleep(_POLL_SECONDS)

    def _passed(self, round_: "Round", result: "CaseResult | None") -> str:
        """Return the candidate that passes the case and is promoted; raises NotFixed."""
        once_more = f"`instructloop fix {self._case.id} --again` trains once more on it"
        if round_.state == "failed":
            raise NotFixed(
                f"round {round_.id} failed: {round_.error}\nthe case stays for the next round: "
                f"`instructloop fix {self._case.id}` asks for it"
            )
        if result is None:
            raise NotFixed(f"round {round_.id} was past its gate before it knew of the case; {once_more}")
        print(f"  {result.incumbent} said: {result.before}\n  {result.version} said: {result.after}")
        verdict = round_.verdict or {}
        if not verdict.get("promote"):
            passes = "passes the case, but" if result.after_passed else "still fails the case, and"
            raise NotFixed(
                f"{result.version} {passes} the gate refused it:\n"
                + "\n".join(f"  {reason}" for reason in _objections(verdict))
                + f"\n{once_more}"
            )
        if not result.after_passed:
            raise NotFixed(f"{result.version} was promoted, but still fails the case; {once_more}")
        return result.version

    def _answered(self, replica: "Replica", result: "CaseResult | None") -> None:
        """Ask the server and look at what it says; raises NotFixed."""
        from evaluation.checks import all_satisfied

        text = self._ask(replica)
        if self._case.checks and not all_satisfied(self._case.checks, text):
            raise NotFixed(
                f"{replica.actual} passed the case in the gate, but what it serves does not: {text}"
            )
        now = time.time()
        self._tell("first good answer", text, now)
        if not self._case.checks and result is not None and text != result.after:
            print("  (the judge has seen another wording of it)")
        print(f"fixed in {now - self._began:.1f} s")

    # -- what they share

    @property
    def _ids(self) -> Sequence[str]:
        return self._case.event_ids_of(self._case.trainings)

    def _events(self) -> "list[StoredEvent | None]":
        return [self._store.event(id) for id in self._ids]

    def _holding(self, position: int) -> "list[Round]":
        """Return the rounds that have the feedback in their slice, newest first."""
        return [
            one
            for one in self._rounds.list(1000)
            if one.repeat_of is None
            and one.cursor is not None
            and one.cutoff is not None
            and one.cursor < position <= one.cutoff
        ]

    def _learning(self, position: int, without: "set[int] | None" = None) -> Learning:
        found = [one for one in self._holding(position) if one.id not in (without or ())]
        if not found:
            return Learning(None, None)
        results = self._cases.results(round_id=found[0].id, case_id=self._case.id)
        return Learning(found[0], results[0] if results else None)

    def _keep_a_trainer(self) -> None:
        """Start a trainer where none is at work; raises NotFixed if it can't run."""
        if self._trainer is not None:
            code = self._trainer.poll()
            if code is None:
                return
            if code not in (0, 1) and not trainer_is_at_work(self._config.data_dir):
                log = Path(str(self._trainer_log.name)) if self._trainer_log else None
                last = log.read_text(errors="replace").strip().splitlines()[-1:] if log else []
                raise NotFixed(f"the trainer ended with code {code}: {' '.join(last)} (see {log})")
        if trainer_is_at_work(self._config.data_dir):
            return
        log_file = self._config.data_dir / "logs" / "fix.log"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        print(f"no trainer is at work here: starting one for this round (log: {log_file})", flush=True)
        if self._trainer_log is None:
            self._trainer_log = log_file.open("wb")
        file = [] if self._file is None else ["--config", str(self._file)]
        self._trainer = subprocess.Popen(
            child.command(sys.executable, "-m", "instructloop.cli", *file, "train", "--once"),
            stdout=self._trainer_log,
            stderr=self._trainer_log,
            start_new_session=True,  # Ctrl-C ends this command, which then ends it
        )

    def _ask(self, replica: "Replica") -> str:
        """Return what the replica answers to the case, with a key made for it and revoked after it."""
        import httpx

        keys = access.keys_as(self._engine, f"fix on the {access.actor()}")
        key = keys.create("client", "fix")
        body: dict[str, Any] = {
            "model": "policy",
            "messages": self._case.messages,
            "temperature": 0.0,
            "max_tokens": self._config.evaluation.case_tokens,
        }
        url = (replica.url or "").replace("//0.0.0.0", "//127.0.0.1").replace("//::", "//[::1]")
        try:
            answer = httpx.post(
                f"{url}/v1/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {key.secret}"},
                timeout=_ANSWER_SECONDS,
            )
            answer.raise_for_status()
        except httpx.HTTPError as problem:
            raise NotFixed(
                f"{replica.actual} passes the case, but {url} does not answer: {problem}"
            ) from None
        finally:
            keys.revoke(key.id)
        return str(answer.json()["choices"][0]["message"]["content"] or "")

    def _tell_round(self, round_: "Round") -> None:
        """Tell of what the round has done since the last look."""
        self._tell("round began", f"round {round_.id} from {round_.config['parent']}", round_.started_at)
        for stage in self._rounds.stages(round_.id):
            if stage.state == "done" and stage.seconds is not None:
                note = f"round {round_.id}, took {stage.seconds:.1f} s"
                self._tell(f"  {stage.name}", note, stage.ended_at)
        if round_.state == "done":
            self._tell("gate", str((round_.verdict or {}).get("summary", "decided")), round_.ended_at)

    def _tell(self, step: str, what: str, at: float | None = None) -> None:
        """Print a step once, with when it was since the case was noted."""
        if f"{step} {what}" not in self._told:
            self._told.add(f"{step} {what}")
            print(f"{(at or time.time()) - self._began:8.1f} s  {step}: {what}", flush=True)


def wait_until_served(registry: "Registry", version: str, tell: Callable[[str, str], None]) -> "Replica":
    """Wait until a replica serves the version, through its trial if it is on one.

    `tell` gets each step and what there is to say of it, perhaps more than once. Raises NotFixed where it
    won't be served.
    """
    from registry.registry import STALE_SECONDS

    began = time.monotonic()
    while True:
        live = [
            one
            for one in registry.replicas()
            if one.state != "stopped" and time.time() - one.seen_at < STALE_SECONDS
        ]
        for one in live:
            if one.actual == version and one.state == "serving" and one.track == "stable":
                swap = "" if one.last_swap_seconds is None else f", swap {one.last_swap_seconds:.1f} s"
                tell("serving", f"{version} on {one.id}{swap}")
                return one
            if one.state == "failed" and one.desired == version:
                raise NotFixed(f"{version} passes the case, but {one.id} can't load it: {one.detail}")
        # In this order: one that is promoted in between is still on trial.
        trial, desired = registry.trial(), registry.desired()
        if trial is not None and trial.version == version:
            tell("on trial", f"{version} as a {trial.mode} ({trial.share:g}), until its users' votes decide")
        elif desired is None or desired.name != version:
            wanted = desired.name if desired else "none"
            raise NotFixed(f"{version} passes the case, but {wanted} is to serve since")
        if not live and time.monotonic() - began > _PATIENCE_SECONDS:
            raise NotFixed(f"{version} passes the case and is to serve, but no server runs: start one")
        time.sleep(_POLL_SECONDS)


def _objections(verdict: "dict[str, Any] | Any") -> list[str]:
    """Return what a verdict has against the candidate; of an old one, all its reasons."""
    conditions = verdict.get("conditions")
    if conditions is None:
        return [str(reason) for reason in verdict.get("reasons", ())]
    return [str(one["sentence"]) for one in conditions if one["binding"] and not one["passed"]]


def trainer_is_at_work(data_dir: Path) -> bool:
    """Whether a trainer holds the lock of `training.trainer`, whose import takes torch, or `up` keeps one."""
    return _is_held(data_dir / "rounds" / "lock") or _is_held(data_dir / "up.lock")


def _is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
