"""The `instructloop evaluate` and `evaluations` commands: compare contestants; list, report, cancel that.

They parse and print; what a request may hold is `registry`'s, carrying it out `evaluation`'s.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instructloop.config import Config
    from registry.evaluation_request import EvaluationRequest
    from registry.evaluations import Evaluation, Evaluations

Command = Callable[[argparse.Namespace], int]

_SAMPLING = (
    ("n", int, "answers of each to a prompt (default: 1)"),
    ("max_tokens", int, "the longest answer, in tokens (default: 256)"),
    ("temperature", float, "the sampling temperature (default: 0.7)"),
    ("seed", int, "of sampling and of the intervals (default: 0)"),
    ("limit", int, "how many prompts at most (default: 200)"),
)


class BadEvaluation(ValueError):  # noqa: N818
    """The arguments make no evaluation; the message names what is wrong."""


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    parser.add_argument(
        "contestants",
        nargs="*",
        metavar="CONTESTANT",
        help="who answers: policy-0003, base, serving, policy-0000+few-shot, or URL#MODEL[#KEY_VARIABLE] for "
        "an OpenAI-compatible endpoint whose key is in that environment variable",
    )
    parser.add_argument(
        "--prompts",
        default="held-out",
        metavar="FILE",
        help='JSON lines with "prompt" or "messages" and perhaps "checks", or `cases` for those of '
        "`instructloop cases` (default: `held-out`, prompts of the store that no round trains on)",
    )
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="JUDGE",
        help="reward-model[:ROUND], checks, cases (who passes them), [AXIS=]URL#MODEL[#KEY_VARIABLE], with "
        "AXIS+labels= for InstructGPT's labels too, or [AXIS=]people[:VOTES] in the arena; may be repeated "
        "(default: the prompts' checks, with `--prompts cases` who passes them, and the last round's reward "
        "model)",
    )
    for name, kind, text in _SAMPLING:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    parser.add_argument("--output", type=Path, help="the report (default: evaluation-NNNN.html)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--later", action="store_true", help="let the trainer carry it out, between rounds")
    how.add_argument(
        "--resume",
        type=int,
        metavar="N",
        help="go on with evaluation N, which was stopped or cancelled, or count people's votes anew",
    )


def add_listing_to(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `evaluations`; without one, evaluations are listed."""
    parser.set_defaults(limit=20, json=False)
    actions = parser.add_subparsers(title="actions", metavar="ACTION")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text, description=text[:1].upper() + text[1:] + ".")
        found.set_defaults(command=command)
        return found

    many = add("list", listing, "list the evaluations, newest first")
    many.add_argument("--limit", type=int, default=20, metavar="N", help="how many (default: 20)")
    show = add("show", _show, "show one evaluation: who won how often, or how far it is")
    for found in (many, show):
        found.add_argument("--json", action="store_true", help="print JSON")
    report = add("report", _report, "write one as an HTML page: leaderboards, win rates, answers")
    report.add_argument("--output", type=Path, help="the file (default: evaluation-NNNN.html)")
    cancel = add("cancel", _cancel, "end one that waits or runs; `evaluate --resume N` takes it up again")
    cancel.add_argument("--reason", default="", help="written to the log")
    for found in (show, report, cancel):
        found.add_argument("n", type=int, metavar="N", help="the evaluation's number")


def evaluate(arguments: argparse.Namespace) -> int:
    """Compare contestants now, or go on with it, or ask the trainer to; exit code 1 without a result."""
    from instructloop import parts

    config = _config(arguments)
    if arguments.resume is not None:
        number = arguments.resume
        return _ended(config, parts.evaluate(config, lambda _: int(number)), arguments.output)
    if arguments.later:
        asked = _ask(config, _request(arguments), _evaluations(config))
        print(f"evaluation {asked.id} is requested: the trainer carries it out between rounds")
        return 0
    request = _request(arguments)
    ended = parts.evaluate(config, lambda evaluations: _ask(config, request, evaluations).id)
    return _ended(config, ended, arguments.output)


def listing(arguments: argparse.Namespace) -> int:
    """Print evaluations with where they stand."""
    from instructloop import listings

    found = _evaluations(_config(arguments)).list(arguments.limit)
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        listings.show(listings.evaluations(found))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    found = _evaluations(_config(arguments)).get(arguments.n)
    if arguments.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _print(found)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    print(_write_report(_config(arguments), arguments.n, arguments.output))
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from instructloop import access, installation
    from registry.audit import AuditLog
    from registry.evaluations import Evaluations

    engine, who = installation.open_database(_config(arguments)), access.actor()
    with AuditLog(engine).refusals(who, "cancel_evaluation", f"evaluation {arguments.n}"):
        before = Evaluations(engine).cancel(arguments.n, who, arguments.reason)
    stops = ": it stops at its next step" if before.state == "running" else ""
    print(f"evaluation {arguments.n} is cancelled{stops}")
    return 0


def _request(arguments: argparse.Namespace) -> "EvaluationRequest":
    """Read the arguments; raises BadEvaluation naming the one at fault."""
    from pydantic import ValidationError

    from registry.evaluation_request import CASES, HELD_OUT, EvaluationRequest

    prompts = arguments.prompts
    values = {
        "contestants": arguments.contestants,
        "prompts": prompts if prompts in (HELD_OUT, CASES) else str(Path(prompts).resolve()),
        "judges": arguments.judge,
    }
    values |= {
        name: getattr(arguments, name) for name, *_ in _SAMPLING if getattr(arguments, name) is not None
    }
    try:
        return EvaluationRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise BadEvaluation(f"{where}: {message}" if where else message) from None


def _ask(config: "Config", request: "EvaluationRequest", evaluations: "Evaluations") -> "Evaluation":
    """Write the request down; what is refused stands in the audit log, too."""
    from feedback.cases import Cases
    from instructloop import access, installation
    from registry.audit import AuditLog
    from registry.evaluation_request import resolve

    engine, who = installation.open_database(config), access.actor()
    registry = installation.open_registry(config, engine)
    with AuditLog(engine).refusals(who, "request_evaluation"):
        whole = resolve(request, registry, config.data_dir, cases=Cases(engine).list)
        return evaluations.request(whole, who)


def _ended(config: "Config", evaluation: "Evaluation", output: Path | None) -> int:
    if evaluation.state == "failed":
        print(f"evaluation {evaluation.id} failed: {evaluation.error}", file=sys.stderr)
        return 1
    if evaluation.state == "cancelled":
        again = f"`instructloop evaluate --resume {evaluation.id}` goes on with it"
        print(f"evaluation {evaluation.id} was cancelled: {again}", file=sys.stderr)
        return 1
    _print(evaluation)
    print(f"the report is {_write_report(config, evaluation.id, output)}", file=sys.stderr)
    return 0


def _print(evaluation: "Evaluation") -> None:
    from instructloop import listings

    if evaluation.result is None:
        listings.show(listings.evaluations([evaluation]))
        if evaluation.error:
            print(evaluation.error)
        return
    listings.show(listings.win_rates(evaluation.result))
    if labels := evaluation.result.get("labels"):
        print()
        listings.show(listings.labels(labels))


def _write_report(config: "Config", number: int, output: Path | None) -> Path:
    """Write the report; who forgets somebody whose prompts stand in it is told of the file."""
    from feedback.store import Store
    from instructloop import installation, parts
    from registry.evaluations import Evaluations

    path = output or Path(f"evaluation-{number:04d}.html")
    engine = installation.open_database(config)
    parts.evaluation_report(config, engine, number).write(path)
    if not Evaluations(engine).get(number).asked.files:
        store = Store(engine)
        store.forgettings.note_export(str(path.resolve()), f"evaluation {number}", 0, store.head())
    return path


def _evaluations(config: "Config") -> "Evaluations":
    from instructloop import installation
    from registry.evaluations import Evaluations

    return Evaluations(installation.open_database(config))


def _config(arguments: argparse.Namespace) -> "Config":
    from instructloop import config

    return config.load(arguments.config)
