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

from instructloop import rounds

if TYPE_CHECKING:
    from instructloop.config import Config

USAGE_ERROR = 2
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_EXPECTED = (
    ("evaluation.report", "ReportProblem"),
    ("feedback.queue", "QueueUnavailable"),
    ("feedback.transfer", "ImportProblem"),
    ("instructloop.config", "ConfigProblem"),
    ("instructloop.database", "UnsupportedDatabase"),
    ("instructloop.demo", "DemoProblem"),
    ("instructloop.installation", "InstallationProblem"),
    ("instructloop.model", "ModelProblem"),
    ("instructloop.parts", "PartProblem"),
    ("instructloop.redis_process", "RedisProblem"),
    ("instructloop.supervisor", "SupervisorProblem"),
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
    add("serve", _serve, "run one serving replica")
    ingest = add("ingest", _ingest, "move completions and feedback from Redis to the database")
    ingest.add_argument(
        "--consumer", metavar="NAME", help="its name in Redis' group (default: host and process id)"
    )
    _add_train(add("train", _train, "run training rounds"))
    _add_versions(add)
    rounds.add_to(
        add("rounds", rounds.listing, "list, compare, repeat and report the training rounds"), _rounds_repeat
    )
    _add_comparison(add("compare-algorithms", _compare_algorithms, "compare PPO with other algorithms"))
    _add_keys(add("keys", _keys_list, "make, list and revoke API keys"))
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
    parser.add_argument(
        "--min-events",
        type=int,
        metavar="N",
        help="do nothing unless there are N new events (default: configured)",
    )


def _add_versions(add: Callable[..., argparse.ArgumentParser]) -> None:
    add("versions", _versions, "list the versions of the policy")
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


def _add_keys(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    create = actions.add_parser("create", help="make a key and print its secret once")
    create.add_argument("--role", choices=["client", "rater", "operator"], required=True)
    create.add_argument("--name", default="", help="whose it is")
    create.set_defaults(command=_keys_create)
    actions.add_parser("list", help="list keys, without their secrets").set_defaults(command=_keys_list)
    revoke = actions.add_parser("revoke", help="end a key at once")
    revoke.add_argument("id")
    revoke.set_defaults(command=_keys_revoke)


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
    exporting.set_defaults(command=_feedback_export)


# -- commands


def _up(arguments: argparse.Namespace) -> int:
    from instructloop import supervisor

    return supervisor.up(_config(arguments), _config_file(arguments))


def _serve(arguments: argparse.Namespace) -> int:
    import asyncio

    from instructloop import parts

    _log_to_stderr()
    return asyncio.run(parts.serve(_config(arguments)))


def _ingest(arguments: argparse.Namespace) -> int:
    from instructloop import parts

    _log_to_stderr()
    return parts.ingest(_config(arguments), arguments.consumer, _stop_on_signals())


def _train(arguments: argparse.Namespace) -> int:
    from instructloop import parts

    _log_to_stderr()
    config = _config(arguments)
    minimum = config.training.minimum_events if arguments.min_events is None else arguments.min_events
    if arguments.once:
        _exit_on_terminate()
        return parts.train_once(config, minimum_events=arguments.min_events or 0)
    return parts.train_every(config, arguments.every, minimum, _stop_on_signals(interrupt=True))


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
    listings.show(listings.versions(registry))
    return 0


def _promote(arguments: argparse.Namespace) -> int:
    registry = _registry(_config(arguments))
    registry.promote(arguments.version, actor="command line", reason=arguments.reason)
    print(f"{arguments.version} is to serve: running replicas load it now")
    return 0


def _reject(arguments: argparse.Namespace) -> int:
    _registry(_config(arguments)).reject(arguments.version, actor="command line", reason=arguments.reason)
    print(f"{arguments.version} is rejected and will not serve")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    name = _registry(_config(arguments)).rollback(actor="command line", reason=arguments.reason)
    print(f"{name} is to serve again: running replicas load it now")
    return 0


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


def _keys_create(arguments: argparse.Namespace) -> int:
    from feedback.keys import Keys
    from instructloop import installation

    key = Keys(installation.open_database(_config(arguments))).create(arguments.role, arguments.name)
    print(key.secret)
    print(f"key {key.id} ({arguments.role}): the secret above is shown only now", file=sys.stderr)
    return 0


def _keys_list(arguments: argparse.Namespace) -> int:
    from feedback.keys import Keys
    from instructloop import installation, listings

    listings.show(listings.keys(Keys(installation.open_database(_config(arguments)))))
    return 0


def _keys_revoke(arguments: argparse.Namespace) -> int:
    from feedback.keys import Keys, UnknownKey
    from instructloop import installation

    try:
        Keys(installation.open_database(_config(arguments))).revoke(arguments.id)
    except UnknownKey:
        raise CommandProblem(f"no key has the id {arguments.id!r}: see `instructloop keys list`") from None
    print(f"key {arguments.id} is revoked")
    return 0


def _feedback_import(arguments: argparse.Namespace) -> int:
    import asyncio

    from instructloop import parts

    _log_to_stderr()
    if not arguments.file.is_file():
        raise CommandProblem(f"{arguments.file}: no such file")
    return asyncio.run(parts.import_feedback(_config(arguments), arguments.file, arguments.source))


def _feedback_export(arguments: argparse.Namespace) -> int:
    from feedback.store import Store
    from feedback.transfer import export
    from instructloop import installation

    store = Store(installation.open_database(_config(arguments)))
    counts = export(store, arguments.directory, arguments.format)
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
