"""A cancellation does not cut cleanup or threads short, and is not lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from coppice import completion, stopping
from coppice.completion import all_of, complete, in_own_thread, in_thread, later


async def test_the_result_is_passed_on() -> None:
    """Without a cancellation the call is a plain await of a result or an error."""

    async def value() -> int:
        return 7

    async def fail() -> None:
        raise ZeroDivisionError

    assert await complete(value()) == 7
    with pytest.raises(ZeroDivisionError):
        await complete(fail())


@pytest.mark.parametrize("cancels", [1, 3])
async def test_work_ends_before_the_cancellation_is_raised(cancels: int) -> None:
    """However often it is cancelled, the caller keeps its locks until the work is done."""
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


async def test_a_cancellation_takes_precedence_over_an_error() -> None:
    """The canceller waits for the cancellation; the work's error does not become a warning either."""
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


async def test_a_deadline_around_the_work_becomes_a_timeout() -> None:
    """asyncio.timeout gets back its own cancellation."""
    proceed = asyncio.Event()

    async def work() -> None:
        await proceed.wait()

    asyncio.get_running_loop().call_later(0.02, proceed.set)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await complete(work())
    assert proceed.is_set()


async def test_work_that_is_cancelled_from_inside_is_cancelled() -> None:
    """If the work cancels itself, the result is that cancellation."""

    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await complete(work())


async def test_a_thread_runs_to_its_end() -> None:
    """A thread cannot be cancelled, and no cleanup may start while it still writes."""
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


async def test_a_thread_passes_its_result_or_error_on() -> None:
    """A thread gets its arguments and passes its result or its error on."""
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 7, 0)


async def test_all_cleanups_end_before_an_error_is_raised() -> None:
    """A failed cleanup must not leave the others running after the caller has continued."""
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


async def test_a_thousand_tasks_do_not_run_all_at_once() -> None:
    """Each removal has files open, and a process may have about a thousand: with all at once the
    last would fail.
    """
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


async def test_tasks_cancelled_before_their_turn_are_closed(recwarn: pytest.WarningsRecorder) -> None:
    """A cancelled coroutine that never ran gives no warning that it was not awaited."""
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


def test_long_work_has_its_own_threads() -> None:
    """A few concurrent image builds must not delay every fork and every database read by minutes."""

    async def of_one_thread() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        started, proceed = threading.Event(), threading.Event()

        def work() -> str:
            started.set()
            proceed.wait(30)
            return "built"

        building = asyncio.create_task(in_own_thread(work))
        try:
            async with asyncio.timeout(10):
                assert await in_thread(started.wait, 5)
        finally:
            proceed.set()
        assert await building == "built"

    asyncio.run(of_one_thread())  # a separate loop, with its own few threads


@pytest.mark.parametrize("run", [in_thread, in_own_thread])
async def test_work_that_checks_for_cancellation_ends_first(
    run: Callable[[Callable[[], None]], Awaitable[None]],
) -> None:
    """The work is notified, and the caller waits for its end."""
    order: list[str] = []
    started = threading.Event()

    def work() -> None:
        started.set()
        try:
            while True:
                stopping.check()
        finally:
            order.append("work")

    async def caller() -> None:
        try:
            await run(work)
        finally:
            order.append("caller")

    task = asyncio.create_task(caller())
    assert await in_thread(started.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["work", "caller"]


class Quick(completion.QuickCalls):
    """A stand-in for the database's calls to the pool."""

    def get(self) -> str:
        """Return the name of the thread."""
        return threading.current_thread().name


async def test_a_database_read_does_not_queue_behind_long_work() -> None:
    """A call of one millisecond takes one millisecond, even if copies of gigabytes occupy every
    thread for long work.
    """
    finish = threading.Event()
    copies = [asyncio.create_task(in_thread(finish.wait, 60)) for _ in range(100)]
    try:
        async with asyncio.timeout(10):
            assert (await in_thread(Quick().get)).startswith("coppice-quick")
    finally:
        finish.set()
        await asyncio.gather(*copies)


def test_threads_end_with_their_loop() -> None:
    """A program that runs one loop after another does not collect threads."""

    async def use() -> str:
        return await in_thread(Quick().get)

    before = threading.active_count()
    for _ in range(3):
        asyncio.run(use())
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def test_a_caller_that_is_cancelled_in_each_turn_of_the_loop_sees_the_end() -> None:
    """As the cancel scopes of a server do it when a client goes away."""
    release = threading.Event()
    task = asyncio.create_task(in_thread(release.wait, 60))
    await asyncio.sleep(0)
    loop, turns = asyncio.get_running_loop(), 0

    def cancel() -> None:
        nonlocal turns
        turns += 1
        if not task.done():
            task.cancel()
            loop.call_soon(cancel)
        if turns == 10:
            release.set()

    cancel()
    async with asyncio.timeout(30):
        await asyncio.wait({task})
    assert task.cancelled()


async def test_work_next_to_a_long_block_only() -> None:
    """A short block starts no task. In a longer one the work runs, and is cancelled at the end of the block."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def side() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    before = asyncio.all_tasks()
    async with later(1000, side):
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
    async with asyncio.timeout(20), later(0.001, side):
        await began.wait()
        assert not ended.is_set()
    assert ended.is_set()
    assert asyncio.all_tasks() == before


async def test_an_error_of_the_work_does_not_reach_the_block() -> None:
    """It only looks for what would end the block."""
    failed = asyncio.Event()

    async def side() -> None:
        failed.set()
        raise OSError

    async with asyncio.timeout(20), later(0.001, side):
        await failed.wait()


def test_threads_that_cannot_be_started_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of processes a call fails, or another thread does its work. Later calls do not wait for ever."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def calls() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(completion._LONG_THREADS + 1):
                with pytest.raises(RuntimeError, match="new thread"):
                    await in_thread(threading.get_ident)
        async with asyncio.timeout(5):
            assert await in_thread(threading.get_ident) != threading.get_ident()
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                both = await asyncio.gather(in_thread(threading.get_ident), in_thread(threading.get_ident))
            assert both[0] == both[1]

    asyncio.run(calls())


async def test_an_error_of_a_thread_keeps_nothing_alive() -> None:
    """Else the objects of the calls that failed, such as open files, would wait for the collector of cycles."""

    class Kept:
        pass

    seen: list[weakref.ref[Kept]] = []

    def fail() -> None:
        kept = Kept()
        seen.append(weakref.ref(kept))
        raise ZeroDivisionError

    gc.disable()
    try:
        for call in (in_thread, in_own_thread):
            with contextlib.suppress(ZeroDivisionError):
                await call(fail)
            for _ in range(100):  # until the thread has left its call
                if seen[-1]() is not None:
                    await asyncio.sleep(0.001)
    finally:
        gc.enable()
    assert [each() for each in seen] == [None, None]
