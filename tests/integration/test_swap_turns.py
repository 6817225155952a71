"""Many replicas that want to swap at once take turns, on the databases that they really share."""

import threading
import time
from pathlib import Path

import pytest
from sqlalchemy.engine import Engine

from registry.registry import Registry, Replica

REPLICAS, ROUNDS = 5, 3


@pytest.mark.parametrize("max_unavailable", [1, 2])
def test_no_more_swap_at_once_than_may(either_database: Engine, tmp_path: Path, max_unavailable: int) -> None:
    registry = Registry(either_database, tmp_path / "versions")
    swapping: set[str] = set()
    most = 0
    wrong: list[str] = []
    changing, start = threading.Lock(), threading.Barrier(REPLICAS + 1)

    def swap(name: str) -> None:
        nonlocal most
        done = 0
        replica = Replica(name, "policy-0001", "policy-0000", "serving")
        start.wait()
        while done < ROUNDS:
            if not registry.begin_swap(replica, max_unavailable, stale_seconds=30):
                time.sleep(0.005)
                continue
            with changing:
                swapping.add(name)
                most = max(most, len(swapping))
                if len(swapping) > max_unavailable:
                    wrong.append(str(sorted(swapping)))
            time.sleep(0.03)
            with changing:
                swapping.remove(name)
            registry.report(replica)
            done += 1

    threads = [threading.Thread(target=swap, args=(f"replica-{number}",)) for number in range(REPLICAS)]
    for thread in threads:
        thread.start()
    # Another track's replica is nobody's turn, and one that fell silent long ago holds nobody up.
    other = Replica("trial", "policy-0001", "policy-0000", "serving", track="trial")
    assert registry.begin_swap(other, max_unavailable, stale_seconds=30)
    start.wait()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert most == max_unavailable, "they never met: it proves nothing"
    for number in range(max_unavailable):
        registry.report(Replica(f"killed-{number}", "policy-0001", "policy-0000", "swapping"))
    late = Replica("late", "policy-0001", "policy-0000", "serving")
    assert not registry.begin_swap(late, max_unavailable, stale_seconds=30)
    time.sleep(0.05)
    assert registry.begin_swap(late, max_unavailable, stale_seconds=0.04)
