"""The `instructloop rounds` commands: list, show, compare, repeat, pin and report training rounds.

They parse and print; what a round is and how two differ is `registry`'s, running one again `training`'s.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instructloop.config import Config
    from registry.round_record import RoundRecord

Command = Callable[[argparse.Namespace], int]


def add_to(parser: argparse.ArgumentParser, repeat_command: Command) -> None:
    """Add the actions; without one, rounds are listed."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, command: Command, text: str, *numbers: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        found.set_defaults(command=command)
        for number in numbers:
            found.add_argument(number, type=int, metavar=number.upper(), help="a round's number")
        return found

    add("list", listing, "list the rounds")
    show = add("show", _show, "show one round: its stages, verdict and last figures", "n")
    diff = add("diff", _diff, "show what differs between two rounds", "a", "b")
    for parser_ in (show, diff):
        parser_.add_argument("--json", action="store_true", help="print JSON")
    repeat = add(
        "repeat", repeat_command, "run a round again on the same feedback; its candidate is not promoted", "n"
    )
    repeat.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a setting, such as training.ppo_updates=12 (may be given several times)",
    )
    add("pin", _pin, "keep a round's files and its version's weights, so that it can be repeated", "n")
    add("unpin", _unpin, "keep a round's files no longer than those of others", "n")
    report = add("report", _report, "write an HTML page about a round, also while it runs", "n")
    report.add_argument("--output", type=Path, metavar="FILE", help="where to (default: round-NNNN.html)")


def listing(arguments: argparse.Namespace) -> int:
    """Print all rounds."""
    from instructloop import installation, listings
    from registry.rounds import Rounds

    listings.show(listings.rounds(Rounds(installation.open_database(_config(arguments)))))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from evaluation.gate import in_words
    from instructloop import listings

    (record,) = _records(_config(arguments), arguments.n)
    if arguments.json:
        fields = asdict(record.round) | {"stages": [asdict(stage) for stage in record.stages]}
        print(json.dumps(fields | {"figures": record.final_figures()}, indent=1))
        return 0
    round_ = record.round
    for name in ("state", "version", "cursor", "cutoff", "seed", "repeat_of", "pinned"):
        print(f"{name}: {getattr(round_, name)}")
    if round_.error:
        print(f"error: {round_.error}")
    if round_.verdict is not None:
        print("\n  ".join(["verdict:", *in_words(round_.verdict)]))
    print(f"seconds: {record.seconds:.0f}\n" if record.seconds is not None else "")
    listings.show(listings.stages(record))
    print()
    listings.show(listings.figures(record))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from instructloop import listings
    from registry.round_record import differences

    old, new = _records(_config(arguments), arguments.a, arguments.b)
    found = differences(old, new)
    if arguments.json:
        print(json.dumps([asdict(item) for item in found], indent=1))
    else:
        listings.show(listings.differences(found, f"ROUND {arguments.a}", f"ROUND {arguments.b}"))
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    return _set_pinned(arguments, True)


def _unpin(arguments: argparse.Namespace) -> int:
    return _set_pinned(arguments, False)


def _set_pinned(arguments: argparse.Namespace, pinned: bool) -> int:
    from instructloop import access, installation
    from registry.audit import AuditLog
    from registry.rounds import Rounds

    engine, who = installation.open_database(_config(arguments)), access.actor()
    with AuditLog(engine).refusals(who, "pin_round" if pinned else "unpin_round", f"round {arguments.n}"):
        Rounds(engine).pin(arguments.n, pinned, who)
    print(f"round {arguments.n} is {'pinned' if pinned else 'pinned no more'}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from feedback.forgetting import Forgettings
    from instructloop import installation, parts
    from registry.rounds import Rounds

    config = _config(arguments)
    output = arguments.output or Path(f"round-{arguments.n:04d}.html")
    engine = installation.open_database(config)
    parts.round_report(config, engine, arguments.n).write(output)
    round_ = Rounds(engine).get(arguments.n)
    if round_.cursor is not None and round_.cutoff is not None:
        path = str(output.resolve())
        Forgettings(engine).note_export(path, f"round {round_.id}", round_.cursor, round_.cutoff)
    print(output)
    return 0


def _records(config: "Config", *numbers: int) -> "list[RoundRecord]":
    from instructloop import installation
    from registry.round_record import read_record
    from registry.rounds import Rounds

    engine = installation.open_database(config)
    registry = installation.open_registry(config, engine)
    return [read_record(Rounds(engine), registry, number) for number in numbers]


def _config(arguments: argparse.Namespace) -> "Config":
    from instructloop import config

    return config.load(arguments.config)
