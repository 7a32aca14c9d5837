"""Cleanup and threads are not cut short by a cancellation, and the cancellation is not lost."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from coppice.completion import all_of, complete, in_stoppable_thread, in_thread


async def test_the_result_comes_through() -> None:
    """Without a cancellation it is a plain await, of a result or of an error."""

    async def value() -> int:
        return 7

    async def fail() -> None:
        raise ZeroDivisionError

    assert await complete(value()) == 7
    with pytest.raises(ZeroDivisionError):
        await complete(fail())


@pytest.mark.parametrize("cancels", [1, 3])
async def test_work_ends_before_the_cancellation_is_raised(cancels: int) -> None:
    """However often it is cancelled: the caller keeps its locks until the work is done."""
    entered, proceed = asyncio.Event(), asyncio.Event()
    order: list[str] = []

    async def work() -> None:
        entered.set()
        await proceed.wait()
        order.append("work")

    async def caller() -> None:
        try:
            await complete(work())
        finally:
            order.append("caller")

    task = asyncio.create_task(caller())
    await entered.wait()
    for _ in range(cancels):
        task.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert order == []
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["work", "caller"]


async def test_a_cancellation_goes_before_an_error_of_the_work() -> None:
    """Whoever cancelled waits for the cancellation; the error is no warning either."""
    entered, proceed = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        entered.set()
        await proceed.wait()
        raise ZeroDivisionError

    task = asyncio.create_task(complete(work()))
    await entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_deadline_around_it_becomes_a_timeout() -> None:
    """asyncio.timeout sees its own cancellation again."""
    proceed = asyncio.Event()

    async def work() -> None:
        await proceed.wait()

    asyncio.get_running_loop().call_later(0.02, proceed.set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await complete(work())
    assert proceed.is_set()


async def test_work_that_is_cancelled_from_inside_is_cancelled() -> None:
    """The work's own cancellation is its outcome."""

    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await complete(work())


async def test_a_thread_runs_to_its_end() -> None:
    """A thread cannot be cancelled: nobody cleans up beside one that still writes."""
    started, proceed = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        started.set()
        proceed.wait(10)
        order.append("thread")

    async def caller() -> None:
        try:
            await in_thread(work)
        finally:
            order.append("caller")

    task = asyncio.create_task(caller())
    await asyncio.to_thread(started.wait, 10)
    task.cancel()
    await asyncio.sleep(0)
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["thread", "caller"]


async def test_a_thread_returns_and_raises() -> None:
    """With its arguments."""
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)


async def test_all_of_them_end_before_an_error_is_raised() -> None:
    """A cleanup that fails must not leave the others at work behind the back of whoever goes on."""
    ended: list[int] = []

    async def work(number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)
        ended.append(number)
        if number != 2:
            raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        await all_of(work(number) for number in (1, 2, 3))
    assert ended == [1, 2, 3]


async def test_a_thousand_works_are_not_all_at_once() -> None:
    """Each removal has files open, and a process may have a thousand: the last of so many would fail for want of one."""
    running = most = 0

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1

    await all_of(work() for _ in range(1000))
    assert 1 < most <= 100


async def test_works_that_are_cancelled_before_their_turn_are_over(recwarn: pytest.WarningsRecorder) -> None:
    """Without the warning of a coroutine that nobody has awaited."""
    begun: list[int] = []

    async def work(number: int) -> None:
        begun.append(number)
        await asyncio.Event().wait()

    task = asyncio.create_task(all_of(work(number) for number in range(200)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gc.collect()
    assert 0 < len(begun) < 200
    assert not recwarn.list


def test_long_work_takes_nobody_elses_thread() -> None:
    """A handful of image builds at once must not keep every fork and every look at the database waiting for minutes."""

    async def of_one_thread() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        started, proceed = threading.Event(), threading.Event()

        def work(_: threading.Event) -> str:
            started.set()
            proceed.wait(30)
            return "built"

        building = asyncio.create_task(in_stoppable_thread(work))
        try:
            async with asyncio.timeout(10):
                assert await in_thread(started.wait, 5)
        finally:
            proceed.set()
        assert await building == "built"

    asyncio.run(of_one_thread())  # a loop of its own: its threads are what is few


async def test_work_that_can_be_stopped_cleans_up_before_the_cancellation_is_raised() -> None:
    """It is told, and waited for."""
    order: list[str] = []
    started = threading.Event()

    def work(cancelled: threading.Event) -> None:
        started.set()
        assert cancelled.wait(30)
        order.append("work")

    async def caller() -> None:
        try:
            await in_stoppable_thread(work)
        finally:
            order.append("caller")

    task = asyncio.create_task(caller())
    assert await in_thread(started.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["work", "caller"]
