"""The fault harness, shortly: real processes are killed, cut off and out of room while feedback is given.

`make bench-faults` does the same with every fault and fifty thousand events.
"""

import logging

import pytest

from tests.benchmarks import faults

_LOG = logging.getLogger(__name__)


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (
            "embedded+sqlite",
            ["kill Redis, then the server", "kill ingest", "fill Redis' memory", "weaken Redis' settings"],
        ),
        ("replica+sqlite", ["lose the primary", "cut the server's Redis", "cut HTTP", "kill the server"]),
    ],
)
async def test_what_is_acknowledged_is_stored_once_and_in_order(layout: str, names: list[str]) -> None:
    tally = await faults.harm(layout, names, events=300, seed=1)
    _LOG.info("%s", tally)
    assert tally.sound, tally
    assert tally.acknowledged >= 300
    assert tally.refused > 0, "no fault was felt: the test shows nothing"
    assert dict(tally.faults) == dict.fromkeys(names, 1)
