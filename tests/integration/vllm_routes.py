"""Prints, as JSON, every route that vLLM's app can have: for any task, and with its development routes.

A program of its own: it imports vLLM, and reads the environment while it does.
"""

import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def flat(routes: list[Any], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Path and methods of each route; a WebSocket has no method, a mounted app any."""
    for route in routes:
        path = prefix + route.path
        inner = getattr(route, "routes", None)
        if inner:
            yield from flat(inner, path)
        methods = getattr(route, "methods", None)
        kind = type(route).__name__
        yield path, sorted(methods) if methods else (["WEBSOCKET"] if "WebSocket" in kind else ["MOUNT"])


def main() -> None:
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"
    from pathlib import Path
    from typing import get_args

    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.app import build_app
    from vllm.tasks import SupportedTask

    from server.engine import arguments
    from server.settings import ServerSettings

    args = arguments(ServerSettings(max_model_len=1024), Path(sys.argv[1]))
    tasks = tuple(task for group in get_args(SupportedTask) for task in get_args(group) or (group,))
    app = build_app(args, tasks, AsyncEngineArgs.from_cli_args(args).create_model_config())
    print(json.dumps(list(flat(app.routes))), file=sys.__stdout__)


if __name__ == "__main__":
    main()
