"""The command line: parses arguments, wires the packages together, prints what people read.

Imports of anything heavy happen inside the command that needs them, so that `--help` answers at once.
Every expected failure is one line that says what to do, with exit code 2.
"""

import argparse
import json
import logging
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from instructloop import (
    access,
    canary,
    cases,
    dead_letters,
    evaluations,
    fix,
    forget,
    lineage,
    raters,
    rounds,
    tax,
)

if TYPE_CHECKING:
    from instructloop.config import Config

USAGE_ERROR = 2
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_EXPECTED = (
    ("evaluation.report", "ReportProblem"),
    ("evaluation.tax", "TaxProblem"),
    ("evaluation.run", "EvaluationBusy"),
    ("feedback.new_case", "BadCase"),
    ("feedback.cases", "UnknownCase"),
    ("feedback.dead_letters", "StillBroken"),
    ("feedback.dead_letters", "UnknownLetter"),
    ("feedback.keys", "RevokedKey"),
    ("feedback.keys", "UnknownKey"),
    ("feedback.forgetting", "NotARater"),
    ("feedback.queue", "QueueUnavailable"),
    ("feedback.rater_records", "RaterConflict"),
    ("feedback.rater_records", "UnknownRater"),
    ("feedback.rater_records", "UnsuitableGold"),
    ("feedback.transfer", "ImportProblem"),
    ("instructloop.config", "ConfigProblem"),
    ("instructloop.database", "UnsupportedDatabase"),
    ("instructloop.demo", "DemoProblem"),
    ("instructloop.evaluations", "BadEvaluation"),
    ("instructloop.installation", "InstallationProblem"),
    ("instructloop.model", "ModelProblem"),
    ("instructloop.parts", "PartProblem"),
    ("instructloop.redis_process", "RedisProblem"),
    ("instructloop.supervisor", "SupervisorProblem"),
    ("registry.evaluation_request", "UnsuitableRequest"),
    ("registry.evaluations", "EvaluationConflict"),
    ("registry.evaluations", "UnknownEvaluation"),
    ("registry.manifest", "BrokenVersion"),
    ("registry.registry", "UnknownVersion"),
    ("registry.rounds", "RoundConflict"),
    ("registry.rounds", "UnknownRound"),
    ("registry.states", "IllegalTransition"),
    ("server.app", "NothingToServe"),
    ("sqlalchemy.exc", "OperationalError"),
    ("training.algorithms", "NothingToLearnFrom"),
    ("training.compare", "ComparisonProblem"),
    ("training.processes", "LaunchRefused"),
    ("training.round", "RoundRefused"),
    ("training.trainer", "TrainerBusy"),
)
_ALGORITHMS = ("ppo", "rloo", "dpo", "kto")
_UNIT_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class CommandProblem(RuntimeError):  # noqa: N818
    """A command can't be carried out; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `instructloop`; exits with the command's code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Carry out one command and return its exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"instructloop: {error}", file=sys.stderr)
        return USAGE_ERROR


def seconds(text: str) -> float:
    """`90`, `45s`, `30m`, `6h` or `1d` in seconds."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 30m or 6h")
    return float(match[1]) * _UNIT_SECONDS[match[2]]


def _algorithms(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _ALGORITHMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(_ALGORITHMS)}")
    return list(dict.fromkeys(names))


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


# -- parsing


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="instructloop", description="An inference and evaluation server that learns from its users."
    )
    parser.add_argument("--config", type=Path, help="the configuration file (default: ./instructloop.toml)")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        found.set_defaults(command=command)
        return found

    add("up", _up, "run everything on this machine until Ctrl-C")
    serve = add("serve", _serve, "run one serving replica")
    serve.add_argument(
        "--track",
        choices=["stable", "trial"],
        help="follow the stable version, or the one on trial while there is one (default: configured)",
    )
    ingest = add("ingest", _ingest, "move completions and feedback from Redis to the database")
    ingest.add_argument(
        "--consumer", metavar="NAME", help="its name in Redis' group (default: host and process id)"
    )
    _add_train(add("train", _train, "run training rounds"))
    _add_versions(add)
    canary.add_to(add)
    rounds.add_to(
        add("rounds", rounds.listing, "list, compare, repeat and report the training rounds"), _rounds_repeat
    )
    evaluations.add_to(add("evaluate", _evaluate, "let contestants answer and judges compare them, now"))
    evaluations.add_listing_to(
        add("evaluations", evaluations.listing, "list, show and report the evaluations")
    )
    lineage.add_to(add("lineage", lineage.show, "show the feedback behind a version, or what came of it"))
    dead_letters.add_to(
        add("dead-letters", dead_letters.listing, "list, fix, replay and drop what could not be stored")
    )
    _add_comparison(add("compare-algorithms", _compare_algorithms, "compare PPO with other algorithms"))
    access.add_keys_to(add("keys", access.listing, "make, list, rotate and revoke API keys"), seconds)
    access.add_audit_to(add("audit", access.audit, "list what operators did, newest first"))
    forget.add_to(add("forget", forget.forget, "erase all that a rater gave, or a completion"))
    raters.add_to(
        add("raters", raters.listing, "see who gives feedback; quarantine raters, ask gold questions")
    )
    tax.add_to(add("tax", tax.tax, "measure a served model by benchmarks of lm-evaluation-harness"))
    cases.add_to(
        add("cases", cases.listing, "list, add and remove prompts that every later candidate is tried on")
    )
    fix.add_to(add("fix", fix.fix, "add a case, train on it and wait until a version serves that passes it"))
    _add_feedback(add("feedback", _missing_subcommand, "import and export feedback"))
    demo = add("demo", _demo, "show the loop on a running `up`: a scripted rater, a round, before and after")
    demo.add_argument("--seed", type=int, default=0, help="of the scripted rater and of the measurements")
    demo.add_argument("--output", type=Path, default=Path("demo-report"), help="directory of the report")
    add("doctor", _doctor, "say what is missing on this machine and how to get it")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    when = parser.add_mutually_exclusive_group(required=True)
    when.add_argument("--once", action="store_true", help="one round now, on all feedback since the last")
    when.add_argument(
        "--every", type=seconds, metavar="TIME", help="a round every 30m, 6h, 1d, until stopped"
    )
    when.add_argument(
        "--without-rater",
        metavar="ID",
        help="one round from before a rater's first feedback on all feedback since, but the rater's",
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="VERSION",
        help="the version that --without-rater begins with (default: the last before that feedback)",
    )
    parser.add_argument(
        "--min-events",
        type=int,
        metavar="N",
        help="do nothing unless there are N new events (default: configured)",
    )


def _add_versions(add: Callable[..., argparse.ArgumentParser]) -> None:
    versions = add("versions", _versions, "list the versions of the policy, or show one with its verdict")
    versions.add_argument("version", nargs="?", help="its name, such as policy-0003")
    promote = add("promote", _promote, "let a version serve")
    reject = add("reject", _reject, "rule a version out")
    rollback = add("rollback", _rollback, "go back to the version that served before")
    for parser in (promote, reject):
        parser.add_argument("version", help="its name, such as policy-0003")
    for parser in (promote, reject, rollback):
        parser.add_argument("--reason", default="", help="written to the log")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--algorithms",
        type=_algorithms,
        default=list(_ALGORITHMS),
        metavar="NAMES",
        help=f"of {','.join(_ALGORITHMS)} (default: all)",
    )
    parser.add_argument(
        "--round",
        type=int,
        metavar="N",
        help="on its feedback (default: the last round's, else all feedback)",
    )
    parser.add_argument("--seeds", type=_count, default=3, metavar="N", help="runs of each (default: 3)")
    parser.add_argument(
        "--budget",
        type=seconds,
        default=600.0,
        metavar="TIME",
        help="compute of each run: CPU time, or time on a GPU (default: 10m)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("algorithm-comparison"), help="directory of the report"
    )


def _add_feedback(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    importing = actions.add_parser(
        "import", help="read human preferences (HH-RLHF or TRL, .jsonl or .jsonl.gz)"
    )
    importing.add_argument("file", type=Path)
    importing.add_argument(
        "--source", required=True, metavar="NAME", help="what this data is called from now on"
    )
    importing.set_defaults(command=_feedback_import)
    exporting = actions.add_parser("export", help="write the stored feedback as data sets that TRL reads")
    exporting.add_argument("directory", type=Path)
    exporting.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    exporting.add_argument(
        "--raw",
        action="store_true",
        help="leave personal data in, such as e-mail addresses and phone numbers",
    )
    exporting.set_defaults(command=_feedback_export)


# -- commands


def _up(arguments: argparse.Namespace) -> int:
    from instructloop import supervisor

    return supervisor.up(_config(arguments), _config_file(arguments))


def _serve(arguments: argparse.Namespace) -> int:
    import asyncio

    from uvicorn.loops.auto import auto_loop_factory

    from instructloop import parts

    _log_to_stderr()
    config = _config(arguments)
    if arguments.track is not None:
        server = config.server.model_copy(update={"track": arguments.track})
        config = config.model_copy(update={"server": server})
    # The event loop that uvicorn, and vLLM's own server, would pick: uvloop where it is installed.
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(parts.serve(config))


def _ingest(arguments: argparse.Namespace) -> int:
    from instructloop import parts

    _log_to_stderr()
    return parts.ingest(_config(arguments), arguments.consumer, _stop_on_signals())


def _train(arguments: argparse.Namespace) -> int:
    from instructloop import parts

    _log_to_stderr()
    config = _config(arguments)
    minimum = config.training.minimum_events if arguments.min_events is None else arguments.min_events
    if arguments.start is not None and arguments.without_rater is None:
        raise CommandProblem("--from VERSION is for --without-rater ID")
    if arguments.without_rater is not None:
        _exit_on_terminate()
        return parts.train_without(config, arguments.without_rater, arguments.start)
    if arguments.once:
        _exit_on_terminate()
        return parts.train_once(config, minimum_events=arguments.min_events or 0)
    return parts.train_every(config, arguments.every, minimum, _stop_on_signals(interrupt=True))


def _evaluate(arguments: argparse.Namespace) -> int:
    _log_to_stderr()
    _exit_on_terminate()
    return evaluations.evaluate(arguments)


def _compare_algorithms(arguments: argparse.Namespace) -> int:
    from instructloop import listings, parts

    _log_to_stderr()
    _exit_on_terminate()
    rows = parts.compare_algorithms(
        _config(arguments),
        algorithms=arguments.algorithms,
        round_id=arguments.round,
        seeds=arguments.seeds,
        budget_seconds=arguments.budget,
        output=arguments.output,
    )
    listings.show(rows)
    print(f"the report is {arguments.output / 'comparison.html'}", file=sys.stderr)
    return 0


def _versions(arguments: argparse.Namespace) -> int:
    from instructloop import listings

    registry = _registry(_config(arguments))
    if arguments.version is None:
        listings.show(listings.versions(registry))
    else:
        print("\n".join(listings.version(registry.version(arguments.version))))
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    _move(arguments, "promote", arguments.version)
    print(f"{arguments.version} is to serve: running replicas load it now")
    return 0


def _reject(arguments: argparse.Namespace) -> int:
    _move(arguments, "reject", arguments.version)
    print(f"{arguments.version} is rejected and will not serve")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    name = _move(arguments, "rollback")
    print(f"{name} is to serve again: running replicas load it now")
    return 0


def _move(arguments: argparse.Namespace, action: str, *version: str) -> str | None:
    """Let the registry make a move; what it refuses stands in the audit log too."""
    from instructloop import installation
    from registry.audit import AuditLog

    config, who = _config(arguments), access.actor()
    engine = installation.open_database(config)
    move = getattr(installation.open_registry(config, engine), action)
    with AuditLog(engine).refusals(who, action, *version):
        name: str | None = move(*version, actor=who, reason=arguments.reason)
    return name


def _rounds_repeat(arguments: argparse.Namespace) -> int:
    from instructloop import config, parts

    overrides = {}
    for text in arguments.overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise CommandProblem(f"--set {text}: KEY=VALUE is expected, such as training.ppo_updates=12")
        overrides[key.strip()] = config.parse(value.strip(), f"--set {key}")
    _log_to_stderr()
    _exit_on_terminate()
    return parts.repeat_round(_config(arguments), arguments.n, overrides)


def _feedback_import(arguments: argparse.Namespace) -> int:
    import asyncio

    from instructloop import parts

    _log_to_stderr()
    if not arguments.file.is_file():
        raise CommandProblem(f"{arguments.file}: no such file")
    return asyncio.run(parts.import_feedback(_config(arguments), arguments.file, arguments.source))


def _feedback_export(arguments: argparse.Namespace) -> int:
    from feedback.privacy import PrivacyFilter
    from feedback.store import Store
    from feedback.transfer import export
    from instructloop import installation

    config = _config(arguments)
    store, settings = Store(installation.open_database(config)), config.training
    raw = arguments.raw or not settings.privacy_filter
    counts = export(
        store,
        arguments.directory,
        arguments.format,
        None if raw else PrivacyFilter(settings.privacy_phone_regions),
    )
    print(json.dumps(counts))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from instructloop import parts

    return parts.demo(_config(arguments), seed=arguments.seed, output=arguments.output)


def _doctor(arguments: argparse.Namespace) -> int:
    from instructloop import doctor

    return doctor.report(_config(arguments))


def _missing_subcommand(arguments: argparse.Namespace) -> int:
    raise AssertionError("argparse asks for the action")


# -- wiring


def _config_file(arguments: argparse.Namespace) -> Path | None:
    file: Path | None = arguments.config
    return file


def _config(arguments: argparse.Namespace) -> "Config":
    from instructloop import config

    return config.load(_config_file(arguments))


def _registry(config: "Config"):  # type: ignore[no-untyped-def]
    from instructloop import installation

    return installation.open_registry(config, installation.open_database(config))


def _is_expected(error: Exception) -> bool:
    """Whether the message of `error` was written for the person at the terminal."""
    if isinstance(error, CommandProblem):
        return True
    # Looked up among the loaded modules: an error's class can only come from one of them.
    classes = [getattr(sys.modules.get(module), name, None) for module, name in _EXPECTED]
    return isinstance(error, tuple(found for found in classes if isinstance(found, type)))


def _log_to_stderr() -> None:
    from instructloop import processes

    logging.basicConfig(format=processes.LOG_FORMAT, datefmt=processes.LOG_TIME, level=logging.WARNING)
    for package in processes.OURS:
        logging.getLogger(package).setLevel(logging.INFO)


def _stop_on_signals(*, interrupt: bool = False) -> threading.Event:
    """Return an event that Ctrl-C and SIGTERM set; with `interrupt`, they also end what runs at once."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        if interrupt:
            raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


def _exit_on_terminate() -> None:
    """Make SIGTERM unwind the stack, so that a round's own children are ended with it."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, handle)


if __name__ == "__main__":
    main()
