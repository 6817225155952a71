"""The `instructloop raters` commands: who gives feedback, how far raters agree, quarantine, gold questions.

They parse and print; what is known of raters is `feedback`'s.
"""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feedback.store import Store
    from instructloop.config import Config

Command = Callable[[argparse.Namespace], int]
_ACTOR = "command line"


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the actions; without one, raters are listed."""
    parser.set_defaults(limit=50, json=False)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        found.set_defaults(command=command)
        return found

    many = add("list", listing, "list raters: first those that wait for an operator, then who votes most")
    many.add_argument("--limit", type=int, default=50, metavar="N", help="how many (default: 50)")
    show = add("show", _show, "show what is known of a rater and what was done about it")
    agree = add("agreement", _agreement, "show how far raters agree: in all, by task, over time")
    agree.add_argument("--days", type=int, default=7, metavar="N", help="the length of a period (default: 7)")
    for found in (many, show, agree):
        found.add_argument("--json", action="store_true", help="print JSON")
    for name, text in (
        ("quarantine", "let nothing that a rater says count in a round"),
        ("confirm", "say that a quarantine is right"),
        ("lift", "end a quarantine: what the rater said meanwhile counts in the next round"),
    ):
        move = add(name, _move, text)
        move.set_defaults(move=name)
        move.add_argument("--reason", required=name == "quarantine", default="", help="written to the log")
        move.add_argument("rater", help="its id, such as 0123456789ab/ann")
    show.add_argument("rater", help="its id, such as 0123456789ab/ann")
    _add_gold(add("gold", _gold_list, "list, add and remove gold questions"))


def _add_gold(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    actions.add_parser("list", help="list gold questions").set_defaults(command=_gold_list)
    added = actions.add_parser("add", help="say that the verdict of an event is right")
    added.set_defaults(command=_gold_add)
    added.add_argument("--reason", default="", help="written beside it")
    removed = actions.add_parser("remove", help="measure nobody by an event any more")
    removed.set_defaults(command=_gold_remove)
    for found in (added, removed):
        found.add_argument("event_id", metavar="EVENT", help="the id on its receipt")


def listing(arguments: argparse.Namespace) -> int:
    """Print raters with their state and figures."""
    from instructloop import listings

    found = _report(_config(arguments))[: arguments.limit]
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        listings.show(listings.raters(found))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from feedback.rater_records import UnknownRater
    from instructloop import listings

    config = _config(arguments)
    mine = [row for row in _report(config) if row["rater"] == arguments.rater]
    if not mine:
        raise UnknownRater(arguments.rater)
    entries = _store(config).raters.log(arguments.rater)
    if arguments.json:
        print(json.dumps(mine[0] | {"log": [asdict(entry) for entry in entries]}, indent=1))
        return 0
    for name, value in mine[0].items():
        print(f"{name}: {listings.text(value)}")
    print()
    listings.show(listings.rater_log(entries))
    return 0


def _agreement(arguments: argparse.Namespace) -> int:
    from feedback.rater_report import agreement_report
    from instructloop import listings

    config = _config(arguments)
    store = _store(config)
    found = agreement_report(store.raters, store.head(), config.raters, max(1, arguments.days))
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        listings.show(listings.agreement(found))
    return 0


def _move(arguments: argparse.Namespace) -> int:
    records = _store(_config(arguments)).raters
    entry = getattr(records, arguments.move)(arguments.rater, actor=_ACTOR, reason=arguments.reason)
    print(f"{entry.rater} is {entry.state}")
    return 0


def _gold_list(arguments: argparse.Namespace) -> int:
    from instructloop import listings

    listings.show(listings.gold(_store(_config(arguments)).raters.gold()))
    return 0


def _gold_add(arguments: argparse.Namespace) -> int:
    records = _store(_config(arguments)).raters
    records.add_gold(arguments.event_id, actor=_ACTOR, reason=arguments.reason)
    print(f"{arguments.event_id} is a gold question: others are measured by it")
    return 0


def _gold_remove(arguments: argparse.Namespace) -> int:
    from feedback.rater_records import UnsuitableGold

    if not _store(_config(arguments)).raters.remove_gold(arguments.event_id):
        raise UnsuitableGold(f"{arguments.event_id} is no gold question: see `instructloop raters gold`")
    print(f"{arguments.event_id} is no gold question any more")
    return 0


def _report(config: "Config") -> list[dict[str, Any]]:
    from feedback.rater_report import raters_report

    store = _store(config)
    return raters_report(store.raters, store.head(), config.raters)


def _store(config: "Config") -> "Store":
    from feedback.store import Store
    from instructloop import installation

    return Store(installation.open_database(config))


def _config(arguments: argparse.Namespace) -> "Config":
    from instructloop import config

    return config.load(arguments.config)
