"""`instructloop` in a process that kills itself: `forget_process.py FUNCTION CALL ARGUMENTS…`.

It dies by SIGKILL as it enters the function (`module:Class.method`) for the CALLth time.
"""

import importlib
import os
import signal
import sys
from typing import Any

from instructloop.cli import main


def die_in(function: str, call: int) -> None:
    module, _, path = function.partition(":")
    *holders, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for one in holders:
        holder = getattr(holder, one)
    original, calls = getattr(holder, name), 0

    def die(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)

    setattr(holder, name, die)


if __name__ == "__main__":
    die_in(sys.argv[1], int(sys.argv[2]))
    main(sys.argv[3:])
