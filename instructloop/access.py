"""The `keys` and `audit` commands: make, list, rotate and revoke API keys; who did what.

They parse and print; what a key is, is `feedback.keys`' business, what the log holds `registry.audit`'s.
"""

import argparse
import getpass
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from feedback.keys import Keys, NewKey

Command = Callable[[argparse.Namespace], int]


def actor() -> str:
    """Return who acts on the command line, as logs name it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        user = "unknown user"
    return f"command line ({user}@{socket.gethostname()})"


def add_keys_to(parser: argparse.ArgumentParser, seconds: Callable[[str], float]) -> None:
    """Add the actions on keys; without one, keys are listed."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        found.set_defaults(command=command)
        return found

    create = add("create", _create, "make a key and print its secret once")
    create.add_argument("--role", choices=["client", "rater", "operator"], required=True)
    create.add_argument("--name", default="", help="whose it is")
    add("list", listing, "list keys, without their secrets")
    rotate = add("rotate", _rotate, "give a key a new secret and print it once; its id stays")
    rotate.add_argument("id")
    rotate.add_argument(
        "--grace",
        type=seconds,
        default=0.0,
        metavar="TIME",
        help="how long the old secret opens too, such as 30m or 1d (default: no longer)",
    )
    revoke = add("revoke", _revoke, "end a key at once, and the feedback tokens that speak for it")
    revoke.add_argument("id")


def add_audit_to(parser: argparse.ArgumentParser) -> None:
    """Add the options of `audit`."""
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="how many (default: 50)")
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def listing(arguments: argparse.Namespace) -> int:
    """Print all keys."""
    from feedback.keys import Keys
    from instructloop import listings

    listings.show(listings.keys(Keys(_database(arguments))))
    return 0


def audit(arguments: argparse.Namespace) -> int:
    """Print what operators did, newest first."""
    from instructloop import listings
    from registry.audit import AuditLog

    entries = AuditLog(_database(arguments)).entries(max(1, arguments.limit))
    if arguments.json:
        for entry in entries:
            print(json.dumps(asdict(entry)))
    else:
        listings.show(listings.audit(entries))
    return 0


def keys_as(engine: "Engine", who: str) -> "Keys":
    """Return the keys; what is changed through them is written down as done by `who`."""
    from feedback.keys import Keys
    from registry.audit import key_note

    return Keys(engine, note=key_note(who))


def _create(arguments: argparse.Namespace) -> int:
    key = keys_as(_database(arguments), actor()).create(arguments.role, arguments.name)
    _print_secret(key, arguments.role)
    return 0


def _rotate(arguments: argparse.Namespace) -> int:
    from registry.audit import AuditLog

    engine = _database(arguments)
    with AuditLog(engine).refusals(actor(), "rotate_key", f"key {arguments.id}"):
        key = keys_as(engine, actor()).rotate(arguments.id, arguments.grace)
    _print_secret(key, "rotated")
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    from registry.audit import AuditLog

    engine = _database(arguments)
    with AuditLog(engine).refusals(actor(), "revoke_key", f"key {arguments.id}"):
        keys_as(engine, actor()).revoke(arguments.id)
    print(f"key {arguments.id} is revoked")
    return 0


def _print_secret(key: "NewKey", what: str) -> None:
    print(key.secret)
    print(f"key {key.id} ({what}): the secret above is shown only now", file=sys.stderr)


def _database(arguments: argparse.Namespace) -> "Engine":
    from instructloop import config, installation

    return installation.open_database(config.load(arguments.config))
