"""What we add to vLLM's worker, in the engine's own processes: proof of weights, their exchange, and an end.

vLLM ends its processes when their owner (the server, a trainer) ends in an orderly way. Killed outright, it
would leave them behind, with all their memory; so each worker watches it and takes its part of the engine
along. It imports no vLLM: vLLM mixes it in by name.
"""

import os
import select
import signal
import threading

from registry.logprobs import SampledLogprobs
from registry.proof import WeightProof
from registry.staging import WeightStaging


class WorkerExtension(WeightProof, WeightStaging, SampledLogprobs):
    """Mixed into vLLM's worker class (`worker_extension_cls`); its methods are called by `collective_rpc`."""

    def end_with(self, owner_pid: int) -> None:
        """Kill this process and the engine's core above it as soon as the owner is gone (on one machine)."""
        core_pid = os.getppid()
        try:
            handle = os.pidfd_open(owner_pid)
        except ProcessLookupError:
            _end(core_pid, owner_pid)
            return
        threading.Thread(
            target=_wait_and_end, args=(handle, core_pid, owner_pid), name="end-with-owner", daemon=True
        ).start()


def _wait_and_end(handle: int, core_pid: int, owner_pid: int) -> None:
    # A pidfd becomes readable when its process ends; it can't mean another process that got the same number.
    select.select([handle], [], [])
    _end(core_pid, owner_pid)


def _end(core_pid: int, owner_pid: int) -> None:
    # With one worker it may run in the core's own process, whose parent is the owner itself.
    if core_pid not in (owner_pid, 1) and os.getppid() == core_pid:
        os.kill(core_pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
