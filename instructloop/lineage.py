"""The `instructloop lineage` command: the events behind a version, and the versions that an event is behind.

It prints; what the lineage is, is `registry.lineage`'s.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instructloop.listings import Rows
    from registry.lineage import Lineage, RoundBehind, UsedEvent

_PAGE = 10_000
_USES = ("trained", "older", "held_out", "left_out", "unrecorded")


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("version", nargs="?", help="a version's name, such as policy-0003")
    what.add_argument(
        "--event", metavar="ID", help="an event's id: what rounds did with it, what learned from it"
    )
    parser.add_argument(
        "--summary", action="store_true", help="only a version's rounds, without their events"
    )
    parser.add_argument("--round", type=int, metavar="N", help="only the events of this round")
    parser.add_argument("--use", choices=_USES, help="only the events that were used so")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.set_defaults(command=show)


def show(arguments: argparse.Namespace) -> int:
    """Print the lineage of a version or of an event."""
    from instructloop import config, installation
    from registry.lineage import Lineage
    from registry.registry import UnknownVersion

    settings = config.load(arguments.config)
    engine = installation.open_database(settings)
    lineage, states = Lineage(engine), installation.open_registry(settings, engine).states()
    if arguments.event is not None:
        return _show_event(lineage, states, arguments)
    if arguments.version not in states:
        raise UnknownVersion(f"there is no version {arguments.version}")
    return _show_version(lineage, states, arguments)


def _show_version(lineage: "Lineage", states: Mapping[str, str], arguments: argparse.Namespace) -> int:
    from instructloop import listings

    behind = lineage.behind(arguments.version)
    if arguments.json:
        for found in behind:
            print(json.dumps(asdict(found) | {"state": states.get(found.version or "")}))
    else:
        listings.show(_rounds(behind, states))
    if arguments.summary:
        return 0
    if not arguments.json:
        print(f"\n{'ROUND':5}  {'USE':10}  {'EVENT':35}  REASON")
    chosen = [found.round_id for found in behind if arguments.round in (None, found.round_id)]
    for event in _events(lineage, chosen, arguments.use):
        if arguments.json:
            print(json.dumps(asdict(event)))
        else:
            # Line by line, at widths that most have: there may be millions.
            line = f"{event.round_id:5}  {event.use:10}  {event.event_id:35}  {event.reason or ''}"
            print(line.rstrip())
    return 0


def _show_event(lineage: "Lineage", states: Mapping[str, str], arguments: argparse.Namespace) -> int:
    from instructloop import listings

    uses, learned = lineage.uses(arguments.event), lineage.learned(arguments.event)
    if arguments.json:
        for use in uses:
            print(json.dumps(asdict(use)))
        for version in learned:
            print(json.dumps({"version": version, "state": states.get(version)}))
        return 0
    rows: Rows = [("ROUND", "USE", "VERSION", "STATE", "REPEATS", "REASON")]
    for use in uses:
        version, state = use.version or "-", states.get(use.version or "", "-")
        rows.append((str(use.round_id), use.use, version, state, _number(use.repeat_of), use.reason or ""))
    listings.show(rows)
    print(f"\nversions that learned from it: {', '.join(learned) or 'none'}")
    return 0


def _rounds(behind: "Sequence[RoundBehind]", states: Mapping[str, str]) -> "Rows":
    rows: Rows = [
        ("ROUND", "VERSION", "STATE", "BEHIND BY", "REPEATS", "SLICE", *(use.upper() for use in _USES))
    ]
    for found in behind:
        rows.append(
            (
                str(found.round_id),
                found.version or "-",
                states.get(found.version or "", "-"),
                found.through,
                _number(found.repeat_of),
                f"{found.cursor}..{found.cutoff}",
                *(str(found.events.get(use, 0)) for use in _USES),
            )
        )
    return rows


def _number(number: int | None) -> str:
    return "-" if number is None else str(number)


def _events(lineage: "Lineage", rounds: Sequence[int], use: str | None) -> "Iterator[UsedEvent]":
    """All events of the rounds, a page of the database at a time."""
    after = None
    while page := lineage.events(rounds, limit=_PAGE, after=after, use=use):  # type: ignore[arg-type]
        yield from page
        after = (page[-1].round_id, page[-1].event_id)
