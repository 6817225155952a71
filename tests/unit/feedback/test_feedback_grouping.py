"""Calls made together: each gets its own answer, none waits for ever, and a failure is everybody's once."""

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.grouping import Grouped


async def yields(times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


@given(
    callers=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=6), min_size=1, max_size=8),
    work_takes=st.integers(0, 4),
    limit=st.integers(1, 4),
)
def test_each_call_is_answered_whenever_it_comes(
    callers: list[list[int]], work_takes: int, limit: int
) -> None:
    """Callers pause for any number of turns of the loop between calls; no turn may be the wrong one."""
    running = [0]

    async def double(numbers: Sequence[int]) -> list[int]:
        running[0] += 1
        assert 1 <= len(numbers) <= limit
        assert running[0] == 1
        await yields(work_takes)
        running[0] -= 1
        return [2 * number for number in numbers]

    async def call(grouped: Grouped[int, int], name: int, pauses: list[int]) -> None:
        for place, pause in enumerate(pauses):
            await yields(pause)
            assert await grouped(100 * name + place) == 2 * (100 * name + place)

    async def all_of() -> None:
        grouped = Grouped(double, limit=limit)
        async with asyncio.timeout(5):
            await asyncio.gather(*(call(grouped, name, pauses) for name, pauses in enumerate(callers)))

    asyncio.run(all_of())


async def test_what_comes_meanwhile_goes_together() -> None:
    groups: list[list[int]] = []

    async def work(numbers: Sequence[int]) -> list[int]:
        groups.append(list(numbers))
        await asyncio.sleep(0.01)
        return list(numbers)

    grouped = Grouped(work, limit=5)
    first = asyncio.create_task(grouped(0))
    await asyncio.sleep(0.001)
    await asyncio.gather(first, *(grouped(number) for number in range(1, 9)))
    assert groups == [[0], [1, 2, 3, 4, 5], [6, 7, 8]]


async def test_a_failure_is_of_all_that_wait_and_of_none_that_comes_later() -> None:
    fail = True

    async def work(numbers: Sequence[int]) -> list[int]:
        await asyncio.sleep(0.001)
        if fail:
            raise ConnectionError("away")
        return list(numbers)

    grouped = Grouped(work, limit=2)
    found = await asyncio.gather(*(grouped(number) for number in range(7)), return_exceptions=True)
    assert [type(one) for one in found] == [ConnectionError] * 7
    fail = False
    assert await grouped(7) == 7


async def test_a_caller_that_gives_up_holds_up_nobody() -> None:
    go = asyncio.Event()

    async def work(numbers: Sequence[int]) -> list[int]:
        await go.wait()
        return list(numbers)

    grouped = Grouped(work, limit=2)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await grouped(1)
    others = [asyncio.create_task(grouped(number)) for number in (2, 3)]
    go.set()
    assert await asyncio.gather(*others) == [2, 3]


async def test_work_that_answers_too_little_is_an_error_and_not_a_silence() -> None:
    async def work(numbers: Sequence[int]) -> list[int]:
        return list(numbers)[1:]

    with pytest.raises(ValueError, match="zip"):
        async with asyncio.timeout(5):
            await Grouped(work, limit=2)(1)
