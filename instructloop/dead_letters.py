"""The `instructloop dead-letters` commands: list, show, fix, replay and drop what could not be stored.

They parse and print; what may become of a dead letter is `feedback.dead_letters`'.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feedback.dead_letters import DeadLetters
    from instructloop.listings import Rows

Command = Callable[[argparse.Namespace], int]
_ID_DIGITS = 12


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the actions; without one, they are listed."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        found.set_defaults(command=command)
        return found

    listed = add("list", listing, "list them, newest first")
    for found in (parser, listed):
        found.add_argument("--limit", type=int, default=100, metavar="N", help="at most (default: 100)")
        found.add_argument("--dropped", action="store_true", help="also those that were given up")
    shown = add("show", _show, "show one with its data")
    shown.add_argument("--raw", action="store_true", help="only its data, byte for byte")
    fixed = add("fix", _fix, "put the record in a file in place of its data; then replay it")
    replayed = add("replay", _replay, "store them as if they had just come")
    dropped = add("drop", _drop, "give them up; an event's receipt then says so")
    for found in (shown, fixed):
        found.add_argument("id", help="its id, or the beginning of it")
    fixed.add_argument(
        "file", type=argparse.FileType("rb"), help="the whole record in JSON; - reads the standard input"
    )
    fixed.add_argument("--kind", choices=("completion", "event"), help="what it is, where that was wrong")
    which = replayed.add_mutually_exclusive_group(required=True)
    which.add_argument("ids", nargs="*", default=[], metavar="id", help="their ids, or beginnings of them")
    which.add_argument("--all", action="store_true", help="all, in the order in which they were queued")
    dropped.add_argument("ids", nargs="+", metavar="id", help="their ids, or beginnings of them")
    dropped.add_argument("--reason", default="", help="told by receipts")


def listing(arguments: argparse.Namespace) -> int:
    """Print them."""
    from instructloop import listings

    rows: Rows = [("ID", "SINCE", "KIND", "EVENT", "BYTES", "NOTE", "REASON")]
    for letter in _letters(arguments).list(arguments.limit, dropped=arguments.dropped):
        rows.append(
            (
                letter.id[:_ID_DIGITS],
                time.strftime("%Y-%m-%d %H:%M", time.localtime(letter.at)),
                ascii(letter.kind)[1:-1] or "-",
                letter.event_id or "-",
                str(letter.size),
                "dropped" if letter.dropped_at else "fixed" if letter.fixed_at else "-",
                " ".join(letter.reason.split()),
            )
        )
    listings.show(rows)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    letters = _letters(arguments)
    letter = letters.get(arguments.id)
    data = letters.data(letter.id)
    if arguments.raw:
        sys.stdout.buffer.write(data)
        return 0
    for name, value in asdict(letter).items():
        print(f"{name}: {value}")
    try:
        text = json.dumps(json.loads(data), indent=1)
    except (ValueError, RecursionError):
        text = ascii(data)[2:-1]
    print(f"\n{text}")
    return 0


def _fix(arguments: argparse.Namespace) -> int:
    letters = _letters(arguments)
    letters.fix(arguments.id, arguments.file.read(), arguments.kind)
    print(f"{letters.get(arguments.id).id[:_ID_DIGITS]} is fixed: replay it now")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    """Replay one after the other; one that still can't be stored stays, and the exit code is then 1."""
    from feedback.dead_letters import StillBroken

    letters = _letters(arguments)
    ids = letters.ids() if arguments.all else arguments.ids
    failed = 0
    for id in ids:
        try:
            letter = letters.replay(id)
        except StillBroken as problem:
            failed += 1
            print(f"{id[:_ID_DIGITS]} still can't be stored: {problem}", file=sys.stderr)
        else:
            print(
                f"{letter.id[:_ID_DIGITS]} is replayed" + (f": {letter.event_id}" if letter.event_id else "")
            )
    print(f"{len(ids) - failed} replayed, {failed} stay")
    return 1 if failed else 0


def _drop(arguments: argparse.Namespace) -> int:
    letters = _letters(arguments)
    for id in arguments.ids:
        print(f"{letters.drop(id, arguments.reason).id[:_ID_DIGITS]} is dropped")
    return 0


def _letters(arguments: argparse.Namespace) -> "DeadLetters":
    from feedback.dead_letters import DeadLetters
    from instructloop import config, installation

    settings = config.load(arguments.config)
    return DeadLetters(installation.open_database(settings), settings.store.waiting_hours)
