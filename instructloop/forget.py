"""The `instructloop forget` command: erase a rater or a completion, say what learned from it, list what was.

It parses and prints; what goes is `feedback.forgetting`'s, what is left to do then `instructloop.upkeep`'s.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feedback.forgetting import Subject
    from instructloop.config import Config


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--rater", metavar="ID", help="all that a rater gave, <key id>/<name>")
    subject.add_argument("--completion", metavar="ID", help="a completion and all feedback on it")
    subject.add_argument("--list", action="store_true", help="list what was forgotten, and how far that is")
    parser.set_defaults(command=forget)


def forget(arguments: argparse.Namespace) -> int:
    """Forget, or list what was forgotten; exit code 1 while something is left to do."""
    import redis

    from feedback.forgetting import Forgettings
    from instructloop import config as configuration
    from instructloop import installation, listings
    from instructloop.upkeep import Upkeep

    config = configuration.load(arguments.config)
    engine = installation.open_database(config)
    forgettings = Forgettings(engine)
    if arguments.list:
        listings.show(listings.forgettings(forgettings))
        return 0
    kind: Subject
    kind, id = (
        ("rater", arguments.rater) if arguments.rater is not None else ("completion", arguments.completion)
    )
    number = forgettings.begin(kind, id, actor="command line")
    # Told from here on: a Redis that is away must not hide what the database has done.
    forgettings.erase(number)
    client = redis.Redis.from_url(config.queue_url)
    problems = Upkeep(config, engine, client).finish()
    client.close()
    for line in _lines(described(config, number), id):
        print(line)
    for place, problem in problems.items():
        print(f"still to do: {place}: {problem}")
    if problems:
        print("`instructloop ingest` goes on with it, and so does this command")
    return 1 if problems else 0


def described(config: "Config", number: int) -> Mapping[str, Any]:
    """Return all that is known of one forgetting."""
    from feedback.forgetting import Forgettings
    from instructloop import installation
    from registry.lineage import Lineage
    from server.forgotten import describe

    engine = installation.open_database(config)
    return describe(Forgettings(engine), installation.open_registry(config, engine), Lineage(engine), number)


def _lines(found: Mapping[str, Any], id: str) -> Iterator[str]:
    erased = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["erased"].items())
    yield f"{found['kind']} {id} is forgotten (number {found['id']}): {erased}"
    if found["versions"]:
        yield "versions that learned from it:"
        yield from (f"  {one['version']} ({one['state']}): {one['how']}" for one in found["versions"])
        if found["kind"] == "rater":
            yield f"to train from before them: instructloop train --without-rater {id}"
    else:
        yield "no version learned from it"
    if found["exports"]:
        yield "files that were written with it; delete them, or write them again:"
        yield from (f"  {one['path']} ({one['what']}, {_when(one['at'])})" for one in found["exports"])
    if found["rounds"]:
        numbers = ", ".join(map(str, found["rounds"]))
        yield f"pages about rounds {numbers} that somebody saved from a browser may show it"
    yield f"out of reach: {found['out_of_reach']}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
