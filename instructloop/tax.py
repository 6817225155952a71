"""The `instructloop tax` command: benchmarks of lm-evaluation-harness on a served API, before and after.

It parses and prints; what is measured and how results are compared is `evaluation.tax`'s.
"""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instructloop.config import Config

KEY = "OPENAI_API_KEY"
_DEFAULT_LENGTH = 2048


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--url", required=True, help="an OpenAI-compatible API, such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="names of lm-evaluation-harness, or directories of task definitions",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--model", metavar="NAME", help="as the API calls it (default: the first it lists)")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="the model's tokenizer, a directory or Hugging Face name (default: that of what is in service)",
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="N", help="requests at once (default: 16)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results there, for --before")
    parser.add_argument(
        "--before", type=Path, metavar="FILE", help="compare with former results, item by item"
    )
    parser.epilog = f"The API's key is taken from {KEY}."


def tax(arguments: argparse.Namespace) -> int:
    """Measure, print, and compare with former results where they are given."""
    from evaluation.tax import Result, TaxProblem, change, measure, served
    from instructloop import listings

    before = _read(arguments.before) if arguments.before else {}
    model, length = _served_model(arguments.url, arguments.model)
    tokenizer = arguments.tokenizer or _tokenizer_here(arguments)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    found = measure(
        served(arguments.url, model, tokenizer, length, arguments.concurrency),
        arguments.tasks,
        arguments.limit,
    )
    if arguments.output:
        kept = {item.task: item.as_dict() for item in found}
        arguments.output.write_text(json.dumps(kept, indent=1))
    rows = [("TASK", "METRIC", "ITEMS", "SCORE", "CHANGE")]
    for item in found:
        moved = ""
        if before:
            if item.task not in before:
                raise TaxProblem(f"{arguments.before} has no result of {item.task}")
            moved = str(change(Result.of(item.task, before[item.task]), item).difference)
        rows.append((item.task, item.metric, str(len(item.right)), str(item.score()), moved))
    listings.show(rows)
    return 0


def _read(path: Path) -> dict[str, Any]:
    from evaluation.tax import TaxProblem

    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise TaxProblem(f"{path} can't be read: {problem}") from None
    return found


def _served_model(url: str, name: str | None) -> tuple[str, int]:
    """Return the model's name and the most tokens that it takes, as the API lists them."""
    import httpx

    from evaluation.tax import TaxProblem

    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/models", headers=headers, timeout=30)
        answer.raise_for_status()
        models = answer.json()["data"]
        found = next(one for one in models if name in (None, one["id"]))
    except httpx.HTTPStatusError as problem:
        raise TaxProblem(
            f"{url} answers {problem.response.status_code}: {problem.response.text[:200]} (the key: {KEY})"
        ) from None
    except (httpx.HTTPError, ValueError, KeyError) as problem:
        raise TaxProblem(f"{url} does not list its models: {problem}") from None
    except StopIteration:
        raise TaxProblem(f"{url} has no model {name!r}: {', '.join(one['id'] for one in models)}") from None
    return str(found["id"]), int(found.get("max_model_len") or _DEFAULT_LENGTH)


def _tokenizer_here(arguments: argparse.Namespace) -> str:
    from evaluation.tax import TaxProblem
    from instructloop import installation

    config: Config = _config(arguments)
    registry = installation.open_registry(config, installation.open_database(config))
    desired = registry.desired()
    if desired is None:
        raise TaxProblem("no version is in service here: say --tokenizer, the directory of the model's")
    return str(registry.version(desired.name).path)


def _config(arguments: argparse.Namespace) -> "Config":
    from instructloop import config

    return config.load(arguments.config)
