"""What the command line lists: versions, rounds, evaluations, raters and so on as rows, a header first."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feedback.cases import Case, CaseResult
    from feedback.forgetting import Forgettings
    from feedback.keys import Keys
    from feedback.rater_records import Gold, RaterLogEntry
    from registry.audit import AuditEntry
    from registry.evaluations import Evaluation
    from registry.registry import Registry, Version
    from registry.round_record import Difference, RoundRecord
    from registry.rounds import Rounds

Rows = list[tuple[str, ...]]
_WIDEST = 60


def show(rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their longest cell; the first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def versions(registry: "Registry") -> Rows:
    """Every version with its state, origin and verdict, then which replicas serve what."""
    serving: dict[str, int] = {}
    for replica in registry.replicas():
        if replica.actual and replica.state == "serving":
            serving[replica.actual] = serving.get(replica.actual, 0) + 1
    rows: Rows = [("VERSION", "STATE", "PARENT", "ROUND", "KIND", "VERDICT", "REPLICAS")]
    for version in registry.versions():
        manifest = version.manifest
        verdict = manifest.verdict or {}
        rows.append(
            (
                version.name,
                version.state,
                manifest.parent or "-",
                "-" if manifest.round_id is None else str(manifest.round_id),
                manifest.kind,
                {True: "promote", False: "keep out"}.get(verdict.get("promote"), "-"),  # type: ignore[arg-type]
                str(serving.get(version.name, 0)),
            )
        )
    return rows


def trial(found: Mapping[str, Any]) -> Rows:
    """Both versions of a trial with the votes on them."""
    tried, decision = found["trial"], found["decision"]
    rows: Rows = [("VERSION", "STATE", "SHARE", "SINCE", "GOOD VOTES", "OF")]
    arms = (
        (tried["version"], tried["mode"], f"{tried['share']:g}", when(tried["since"]), "trial_votes"),
        (found["stable"], "serving", "-", "-", "stable_votes"),
    )
    for *cells, arm in arms:
        votes = decision["figures"][arm]
        rows.append((*cells, str(votes["good"]), str(votes["good"] + votes["bad"])))
    return rows


def version(version: "Version") -> list[str]:
    """One version as lines: where it comes from, its benchmarks, and the gate's verdict in words."""
    from evaluation.gate import in_words
    from evaluation.tax import KEPT, Result

    manifest = version.manifest
    lines = [
        f"{version.name}: {version.state}",
        f"parent: {manifest.parent or '-'}",
        f"round: {'-' if manifest.round_id is None else manifest.round_id}",
        f"made by: {manifest.kind}, {when(manifest.created_at)}",
        f"directory: {version.path}",
    ]
    for task, kept in sorted(manifest.metrics.get(KEPT, {}).items()):
        found = Result.of(task, kept)
        lines.append(f"{task}: {found.metric} {found.score()}, {len(found.right)} items")
    if manifest.verdict is not None:
        decision, *reasons = in_words(manifest.verdict)
        against = manifest.verdict.get("incumbent")
        lines += ["", decision + (f" It was compared with {against}." if against else "")]
        lines += [f"  {reason}" for reason in reasons]
    return lines


def rounds(rounds: "Rounds") -> Rows:
    """Every round with what it learned from, where it stands and what came of it."""
    rows: Rows = [("ROUND", "STATE", "STAGE", "EVENTS", "STARTED", "TOOK", "VERSION", "NOTE", "ERROR")]
    for round_ in rounds.list():
        notes = ["pinned"] * round_.pinned
        notes += ["without a rater"] * ("without_raters" in round_.config)
        notes += [] if round_.repeat_of is None else [f"repeats {round_.repeat_of}"]
        ended = round_.ended_at or time.time()
        took = "-" if round_.started_at is None else f"{(ended - round_.started_at) / 60:.1f} min"
        span = "-" if round_.cutoff is None else f"{round_.cursor}..{round_.cutoff}"
        rows.append(
            (
                str(round_.id),
                round_.state,
                round_.stage or "-",
                span,
                when(round_.started_at),
                took,
                round_.version or "-",
                ", ".join(notes) or "-",
                (round_.error or "").splitlines()[0] if round_.error else "",
            )
        )
    return rows


def stages(record: "RoundRecord") -> Rows:
    """Every stage with how long it took and what it left behind."""
    rows: Rows = [("STAGE", "STATE", "SECONDS", "RESULT")]
    for stage in record.stages:
        # The gate's result is the verdict.
        result = "" if stage.name == "gate" or not stage.result else json.dumps(stage.result)
        rows.append((stage.name, stage.state, text(stage.seconds), result))
    return rows


def figures(record: "RoundRecord") -> Rows:
    """Every figure at its last step."""
    rows: Rows = [("FIGURE", "LAST")]
    rows += [(name, text(value)) for name, value in record.final_figures().items()]
    return rows


def differences(found: "Sequence[Difference]", old: str, new: str) -> Rows:
    """List what differs between two rounds; values that are too wide for a line are cut."""
    rows: Rows = [("PART", "NAME", old, new)]
    rows += [(item.section, item.name, _cut(item.old), _cut(item.new)) for item in found]
    return rows


def evaluations(found: "Sequence[Evaluation]") -> Rows:
    """Every evaluation with who took part and how far it is."""
    rows: Rows = [("NUMBER", "STATE", "DONE", "STARTED", "CONTESTANTS", "PROMPTS", "BY", "ERROR")]
    for one in found:
        rows.append(
            (
                str(one.id),
                one.state,
                f"{one.done / one.total:.0%}" if one.total else "-",
                when(one.started_at),
                _cut(", ".join(contestant.name for contestant in one.asked.contestants)),
                _cut(one.asked.prompts),
                one.requested_by,
                _cut(one.error or ""),
            )
        )
    return rows


def win_rates(result: "Mapping[str, Any]") -> Rows:
    """Every pair of contestants by every judge."""
    rows: Rows = [("JUDGE", "BY", "FIRST", "SECOND", "FIRST WINS", "TIES", "VERDICTS")]
    for table in result["tables"]:
        for pair in table["pairs"]:
            rate = pair["win_rate"]
            rows.append(
                (
                    table["name"],
                    table["axis"],
                    pair["first"],
                    pair["second"],
                    _interval(rate),
                    str(pair["ties"]),
                    str(pair["verdicts"]),
                )
            )
    return rows


def labels(found: "Sequence[Mapping[str, Any]]") -> Rows:
    """Share of each contestant's answers with each label, by who gave some, below how many they looked at."""
    rows: Rows = [("LABELS BY", "LABEL", *(one["name"] for one in found[0]["contestants"]))]
    for source in found:
        name, contestants = source["source"], source["contestants"]
        rows.append((name, "(answers)", *(str(one["answers"]) for one in contestants)))
        for label in contestants[0]["shares"]:
            rows.append((name, label, *(_interval(one["shares"][label]) for one in contestants)))
    return rows


def forgettings(forgettings: "Forgettings") -> Rows:
    """Every forgetting: who was forgotten only as a digest, what went, what is left to do."""
    rows: Rows = [("NUMBER", "KIND", "SHA256", "WHEN", "BY", "COMPLETIONS", "EVENTS", "LEFT TO DO")]
    for one in forgettings.list():
        counts = [str(one.counts.get(name, 0)) for name in ("completions", "events")]
        left = ["database's rows"] * (one.erasure is None) + list(one.left)
        rows.append(
            (
                str(one.id),
                one.kind,
                one.digest[:16],
                when(one.at),
                one.actor,
                *counts,
                ", ".join(left) or "-",
            )
        )
    return rows


def raters(found: "Sequence[Mapping[str, Any]]") -> Rows:
    """Every rater of a report with its state, figures, and what speaks against it."""
    rows: Rows = [("RATER", "STATE", "VOTES", "SHARED", "AGREES", "RIGHT", "WEIGHT", "GOLD", "NOTE")]
    for item in found:
        notes = ["trusted"] * item["trusted"]
        notes += [f"votes as {item['votes_as']}"] if item["votes_as"] else []
        notes += item["suspicions"] if item["state"] == "active" else []
        notes += [item["reason"]] if item["reason"] else []
        rows.append(
            (
                item["rater"],
                item["state"],
                str(item["votes"]),
                str(item["judged"]),
                _share(item["agreement"]),
                _share(item["accuracy"]),
                _share(item["reliability"]),
                f"{item['gold_right']}/{item['gold_asked']}" if item["gold_asked"] else "-",
                " ".join(notes) or "-",
            )
        )
    return rows


def cases(cases: "Sequence[Case]", last: "Mapping[str, CaseResult]") -> Rows:
    """Every case with what it asks for, and what the last candidate that was tried on it made of it."""
    rows: Rows = [("CASE", "TITLE", "BY", "TRAINED", "LAST", "ROUND", "ADDED")]
    for case in cases:
        by = ", ".join(str(check["kind"]) for check in case.checks) or "the judge"
        result = last.get(case.id)
        change = "removed" if case.removed_at is not None else result.change if result else "-"
        number = str(result.round_id) if result else "-"
        sent = f"{case.trainings} times" if case.trainings else "-"
        rows.append((case.id, text(case.title), by, sent, change, number, when(case.added_at)))
    return rows


def rater_log(entries: "Sequence[RaterLogEntry]") -> Rows:
    """List what was done about raters, by whom and why."""
    rows: Rows = [("WHEN", "ACTION", "BY", "REASON")]
    rows += [(when(entry.at), entry.action, entry.actor, entry.reason or "-") for entry in entries]
    return rows


def agreement(found: "Mapping[str, Any]") -> Rows:
    """Show agreement in all, by task and over time: of all pairs of verdicts, and of those without a tie."""
    rows: Rows = [("OF", "RATERS", "SHARED", "AGREE", "PAIRS", "DECIDED AGREE", "PAIRS", "ALPHA")]
    parts = [("all", found["all"]), *found["by_task"].items()]
    parts += [(f"{found['days']} days from {start}", own) for start, own in found["over_time"].items()]
    for name, own in parts:
        rows.append(
            (
                name,
                str(own["raters"]),
                str(own["units"]),
                _share(own["share"]),
                str(own["pairs"]),
                _share(own["decided_share"]),
                str(own["decided_pairs"]),
                _share(own["alpha"]),
            )
        )
    return rows


def gold(found: "Sequence[Gold]") -> Rows:
    """Every gold question with who made it one."""
    rows: Rows = [("EVENT", "TYPE", "RATER", "SINCE", "BY", "REASON")]
    for item in found:
        event = item.event
        rows.append(
            (event.event_id, event.feedback.type, event.rater, when(item.at), item.actor, item.reason or "-")
        )
    return rows


def keys(keys: "Keys") -> Rows:
    """Every key without its secret."""
    rows: Rows = [("ID", "ROLE", "NAME", "MADE", "ROTATED", "OLD SECRET UNTIL", "REVOKED")]
    for key in keys.list():
        times = (key.created_at, key.rotated_at, key.old_secret_until, key.revoked_at)
        rows.append((key.id, key.role, key.name, *map(when, times)))
    return rows


def audit(entries: "Sequence[AuditEntry]") -> Rows:
    """List who did what, with what came of it."""
    rows: Rows = [("WHEN", "WHO", "ACTION", "ON", "OUTCOME", "DETAIL")]
    for entry in entries:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.at))
        target, detail = entry.target or "-", _cut(entry.detail or "-")
        rows.append((when, entry.actor, entry.action, target, entry.outcome, detail))
    return rows


def when(at: float | None) -> str:
    """Show a time (Unix seconds) to the minute, where this machine is; `-` for None."""
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def text(value: Any) -> str:
    """Show a value in a cell: texts as they are, numbers to four digits, `-` for None."""
    match value:
        case None:
            return "-"
        case str():
            return value
        case float():
            return f"{value:.4g}"
    return json.dumps(value)


def _interval(found: "Mapping[str, float] | None") -> str:
    return "-" if found is None else "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _cut(value: Any) -> str:
    line = " ".join(text(value).split())
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 1]}…"
