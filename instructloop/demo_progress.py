"""What the demo shows while it runs: counts that go up, and the line that follows a round."""

import sys
import time
from typing import Any


class Progress:
    """One line that counts up: rewritten in place on a terminal, a line a quarter elsewhere."""

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._shown = -1

    def __call__(self, done: int) -> None:
        """Show that `done` of the total are done."""
        if sys.stdout.isatty():
            end = "\n" if done == self._total else ""
            print(f"\r  {self._label}: {done}/{self._total}\033[K", end=end, flush=True)
        elif (quarter := 4 * done // max(1, self._total)) != self._shown:
            self._shown = quarter
            print(f"  {self._label}: {done}/{self._total}", flush=True)


class RoundLine:
    """The round's progress: stage, time, and the newest figures of that stage."""

    _SHOWN_SECONDS = 30.0

    def __init__(self) -> None:
        self._stage: str | None = None
        self._started = self._last = time.monotonic()

    def __call__(self, state: dict[str, Any]) -> None:
        """Show a round as `GET /v1/rounds/{id}` gives it."""
        now = time.monotonic()
        line = f"  {now - self._started:4.0f} s  {state['stage'] or state['state']}{self._newest(state)}"
        if sys.stdout.isatty():
            print(f"\r{line}\033[K", end="" if state["state"] == "running" else "\n", flush=True)
        elif state["stage"] != self._stage or now - self._last > self._SHOWN_SECONDS:
            self._stage, self._last = state["stage"], now
            print(line, flush=True)

    @staticmethod
    def _newest(state: dict[str, Any]) -> str:
        own = [metric for metric in state["metrics"] if metric["stage"] == state["stage"]]
        if not own:
            return ""
        step = max(metric["step"] for metric in own)
        found = [
            f"{metric['name']} {metric['value']:.3g}"
            for metric in own
            if metric["step"] == step and metric["value"] is not None
        ]
        return f", step {step}: {', '.join(found[:4])}"
