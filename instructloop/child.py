"""Runs a command that must not outlive the process that started it.

`python -m instructloop.child PARENT_PID COMMAND …` asks the kernel for a SIGTERM when its parent dies,
then becomes COMMAND. It works for programs that are not ours (redis-server) and, unlike a hook between
fork and exec, is safe in a parent with threads. It does not start, watch or restart anything.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def command(*arguments: str) -> list[str]:
    """Return the command line that runs `arguments` bound to the life of the calling process."""
    return [sys.executable, "-m", "instructloop.child", str(os.getpid()), *arguments]


def main(arguments: list[str]) -> None:
    """Bind to the parent and exec; returns only by raising or exiting."""
    parent, program = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # The parent may have died before the request above: then no signal will ever come.
    if os.getppid() != parent:
        sys.exit(0)
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
