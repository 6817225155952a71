"""The `instructloop cases` commands: what was found to go wrong, and whether it still does.

They parse and print; what a case is, is `feedback.cases`', when an answer passes `evaluation.cases`'. The way
from a case to a version that passes it is `fix`'s.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feedback.cases import Case, CaseResult
    from feedback.new_case import NewCase
    from instructloop.config import Config

Command = Callable[[argparse.Namespace], int]


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the actions; without one, cases are listed."""
    parser.set_defaults(removed=False, json=False)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        found.set_defaults(command=command)
        return found

    new = add("add", _add, "add a case: every later candidate is tried on it")
    add_content_to(new)
    new.add_argument("--train", action="store_true", help="let the next round learn from it, too")
    many = add("list", listing, "list the cases and what the last candidate made of them")
    many.add_argument("--removed", action="store_true", help="those that were removed, too")
    show = add("show", _show, "show a case, what candidates answered, and what learned from it")
    removing = add("remove", _remove, "try no candidate on a case any more; says what has learned from it")
    for found in (many, show):
        found.add_argument("--json", action="store_true", help="print JSON")
    for found in (show, removing):
        found.add_argument("case", metavar="CASE", help="its id, such as case-0123456789abcdef")


def add_content_to(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a case is."""
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="what a user says")
    prompt.add_argument(
        "--messages", type=Path, metavar="FILE", help="a conversation: a JSON list of messages"
    )
    prompt.add_argument(
        "--completion", metavar="ID", help="a recorded completion: its prompt, and as the bad answer its own"
    )
    prompt.add_argument("--event", metavar="ID", help="feedback: its prompt, and the answers it speaks of")
    parser.add_argument(
        "--choice", type=int, default=0, metavar="N", help="which of the completion's answers (default: 0)"
    )
    parser.add_argument(
        "--check",
        action="append",
        default=[],
        metavar="JSON",
        dest="checks",
        help='what an answer has to meet, such as {"kind":"max_words","n":20} (may be given several times)',
    )
    parser.add_argument("--answer", metavar="TEXT", help="a good answer")
    parser.add_argument("--bad", metavar="TEXT", help="a bad answer")
    parser.add_argument("--title", default="", help="what it is called (default: how its prompt begins)")


def is_given(arguments: argparse.Namespace) -> bool:
    """Whether the options say of a new case what its prompt is."""
    sources = (arguments.prompt, arguments.messages, arguments.completion, arguments.event)
    return any(source is not None for source in sources)


def new_case(arguments: argparse.Namespace, *, train: bool) -> "NewCase":
    """Read a case from the options; raises BadCase, naming the option at fault."""
    from pydantic import ValidationError

    from feedback.new_case import BadCase, NewCase

    messages: Any = None
    if arguments.prompt is not None:
        messages = [{"role": "user", "content": arguments.prompt}]
    elif arguments.messages is not None:
        try:
            messages = json.loads(arguments.messages.read_text())
        except (OSError, ValueError) as problem:
            raise BadCase("--messages", f"{arguments.messages}: {problem}") from None
    elif not is_given(arguments):
        raise BadCase("--prompt", "give one of --prompt, --messages, --completion and --event")
    fields = {
        "title": arguments.title,
        "messages": messages,
        "completion_id": arguments.completion,
        "event_id": arguments.event,
        "choice": arguments.choice,
        "checks": [_check(number, text) for number, text in enumerate(arguments.checks)],
        "good": arguments.answer,
        "bad": arguments.bad,
        "train": train,
    }
    try:
        return NewCase.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "--prompt"
        raise BadCase(where, str(first["msg"])) from None


def add_case(config: "Config", new: "NewCase") -> "Case":
    """Add a case, and if it is to train send it to the queue; what happened stands in the audit log.

    Raises BadCase, and QueueUnavailable: the case is kept then, and the same command sends it.
    """
    from evaluation.cases import check_case
    from feedback.cases import Cases
    from instructloop import access, installation
    from registry.audit import AuditLog

    engine, who = installation.open_database(config), access.actor()
    cases, log = Cases(engine), AuditLog(engine)
    with log.refusals(who, "add case"):
        case = cases.add(new, actor=who, validate=check_case)
        if new.train:
            case = cases.begin_training(case.id)
    log.append(who, "add case", case.id)
    if new.train:
        send_case(config, case)
    return case


def send_case(config: "Config", case: "Case") -> None:
    """Send a case to the queue as its latest training; raises QueueUnavailable."""
    import asyncio

    import redis.asyncio

    from feedback.cases import send
    from feedback.queue import FeedbackQueue

    async def run() -> None:
        client = redis.asyncio.Redis.from_url(config.queue_url)
        try:
            await send(FeedbackQueue(client, config.queue), case)
        finally:
            await client.aclose()

    asyncio.run(run())


def listing(arguments: argparse.Namespace) -> int:
    """Print cases with their last result."""
    from feedback.cases import Cases
    from instructloop import installation, listings

    cases = Cases(installation.open_database(_config(arguments)))
    last = {result.case_id: result for result in cases.results()}
    found = cases.list(removed=arguments.removed)
    if arguments.json:
        print(json.dumps([_described(case, [last[case.id]] if case.id in last else []) for case in found]))
    else:
        listings.show(listings.cases(found, last))
    return 0


def _add(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    case = add_case(config, new_case(arguments, train=arguments.train))
    print(f"{case.id}: every later candidate is tried on it ({case.title})")
    if arguments.train:
        print(f"sent as feedback: {', '.join(case.event_ids_of(case.trainings))}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from feedback.cases import Cases
    from instructloop import installation, listings

    config = _config(arguments)
    cases = Cases(installation.open_database(config))
    case = cases.get(arguments.case)
    results, learned = cases.results(case_id=case.id), _taught(config, case)
    if arguments.json:
        print(json.dumps(_described(case, results) | {"taught": learned}, indent=1))
        return 0
    for name, value in _described(case, []).items():
        if name not in ("results", "messages"):
            print(f"{name}: {listings.when(value) if name.endswith('_at') else listings.text(value)}")
    for message in case.messages:
        print(f"{message['role']}: {message['content']}")
    for result in results:
        print(f"\nround {result.round_id}: {result.change}")
        print(f"  {result.incumbent} said: {result.before}\n  {result.version} said: {result.after}")
    _print_taught(learned)
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    from feedback.cases import Cases
    from instructloop import access, installation
    from registry.audit import AuditLog

    config, who = _config(arguments), access.actor()
    engine = installation.open_database(config)
    log = AuditLog(engine)
    with log.refusals(who, "remove case", arguments.case):
        case = Cases(engine).remove(arguments.case, actor=who)
    log.append(who, "remove case", case.id)
    print(f"{case.id} is tried on no candidate any more")
    learned = _taught(config, case)
    _print_taught(learned)
    if learned:
        print(f"its feedback stays: `instructloop forget --completion {case.id}` erases it, and the case")
    return 0


def _taught(config: "Config", case: "Case") -> Sequence[Mapping[str, Any]]:
    from feedback.store import Store
    from instructloop import installation
    from registry.lineage import Lineage
    from server.taught import taught

    engine = installation.open_database(config)
    return taught(case, Store(engine), Lineage(engine))


def _print_taught(learned: Sequence[Mapping[str, Any]]) -> None:
    if not learned:
        print("it was never sent as feedback")
    for one in learned:
        rounds = ", ".join(f"round {use['round']} ({use['use'].replace('_', ' ')})" for use in one["rounds"])
        versions = ", ".join(one["versions"]) or "no version"
        print(f"{one['event_id']}: {one['status']}; {rounds or 'no round'}; {versions} learned from it")


def _described(case: "Case", results: "Sequence[CaseResult]") -> dict[str, Any]:
    told = [asdict(result) | {"change": result.change} for result in results]
    return asdict(case) | {"results": told}


def _check(number: int, text: str) -> dict[str, Any]:
    from feedback.new_case import BadCase

    try:
        found = json.loads(text)
    except ValueError as problem:
        raise BadCase(f"--check {number + 1}", f"not JSON: {problem}") from None
    if not isinstance(found, dict):
        raise BadCase(f"--check {number + 1}", "a JSON object is expected")
    return found


def _config(arguments: argparse.Namespace) -> "Config":
    from instructloop import config

    return config.load(arguments.config)
