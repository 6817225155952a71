"""Reads of the database on behalf of a request: off the event loop, and given up when it does not answer.

What is read is the caller's affair. Writes do not go this way: one that was given up may still happen.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from server.errors import DATABASE_AWAY, Problem

logger = logging.getLogger(__name__)

LONGEST_SECONDS = 5.0
RETRY_AFTER_SECONDS = 5

P = ParamSpec("P")
T = TypeVar("T")


async def from_database(read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return `read(...)`, run in a thread. Raises Problem 503 if the database is away or hangs.

    The threads are the event loop's own few: while the database hangs, requests wait for one of them in turn
    and are given up like the read itself, instead of filling the process with threads that wait.
    """
    try:
        async with asyncio.timeout(LONGEST_SECONDS):
            return await asyncio.to_thread(read, *args, **kwargs)
    except DATABASE_AWAY as error:
        logger.error("the database is away: %s", error)
    except TimeoutError:
        logger.error("the database did not answer in %g s", LONGEST_SECONDS)
    raise Problem(503, "the database is away", retry_after=RETRY_AFTER_SECONDS)
