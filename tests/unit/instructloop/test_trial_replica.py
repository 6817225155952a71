"""When `up` starts and stops the second replica: real processes, the registry behind its one method."""

import asyncio
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructloop.processes import Child
from instructloop.trial_replica import TrialReplica
from registry.registry import Trial


@dataclass
class Book:
    wanted: Trial | None = None
    looks: int = 0

    def trial(self) -> Trial | None:
        self.looks += 1
        return self.wanted


@dataclass
class Rig:
    directory: Path
    book: Book = field(default_factory=Book)
    said: list[str] = field(default_factory=list)
    made: list[Child] = field(default_factory=list)

    def replica(self, linger_seconds: float) -> TrialReplica:
        registry: Any = self.book
        return TrialReplica(registry, self.make, self.said.append, linger_seconds)

    def make(self) -> Child:
        child = Child(
            "trial",
            [sys.executable, "-c", "import time; time.sleep(60)"],
            environment=dict(os.environ),
            log=self.directory / "trial.log",
            say=self.said.append,
            grace_seconds=5,
        )
        self.made.append(child)
        return child


TRIAL = Trial("policy-0001", "canary", 0.1, 3, time.time())


async def running(child: Child) -> int:
    while child.pid is None:
        await asyncio.sleep(0.01)
    return child.pid


async def test_it_runs_while_a_version_is_on_trial_and_a_while_longer(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    replica = rig.replica(linger_seconds=0.3)
    await replica.look()
    assert rig.made == []
    rig.book.wanted = TRIAL
    await replica.look()
    pid = await running(rig.made[0])
    rig.book.wanted = None
    await replica.look()
    assert rig.made[0].pid == pid
    rig.book.wanted = TRIAL
    await replica.look()
    assert len(rig.made) == 1, "the next trial uses the replica that is there"
    rig.book.wanted = None
    await asyncio.sleep(0.35)
    await replica.look()
    assert rig.made[0].pid is None
    rig.book.wanted = TRIAL
    await replica.look()
    assert await running(rig.made[1]) != pid
    await replica.end()
    assert rig.made[1].pid is None
    await replica.look()
    assert len(rig.made) == 2, "after the end nothing is started"


async def test_an_end_in_the_middle_of_a_start_leaves_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Book(TRIAL))
    replica = rig.replica(linger_seconds=10)
    looking = asyncio.create_task(replica.run())
    while not rig.made:
        await asyncio.sleep(0.001)
    await replica.end()
    assert rig.made[0].pid is None
    looking.cancel()
